import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from moe_jax.core.cholesky import cholesky_solver, inverse_cholesky


@pytest.fixture
def matrix(rng, dtype):
    x = rng.normal(size=(30, 50))
    return (x @ x.T).astype(dtype)


def test_against_scipy(matrix, dtype):
    shifted, tolerance = matrix.astype(float) + 0.5 * np.eye(30), 1e-5 if dtype == np.float32 else 1e-13
    expected = np.linalg.inv(scipy.linalg.cholesky(shifted, lower=True))
    for array in (matrix, jnp.asarray(matrix)):  # by LAPACK, by XLA
        ours = inverse_cholesky(array, 0.5)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, expected, atol=tolerance)
        solution = cholesky_solver(array, 0.5, np.zeros((), dtype))(array[:, :2])
        np.testing.assert_allclose(solution, scipy.linalg.solve(shifted, matrix[:, :2]), rtol=0, atol=10 * tolerance)
    assert isinstance(inverse_cholesky(matrix, 0.5), np.ndarray)


def test_not_positive_definite(matrix, dtype):
    for array in (-matrix, jnp.asarray(-matrix)):
        assert np.isnan(np.asarray(inverse_cholesky(array, 0.0))).any()
        assert np.isnan(np.asarray(cholesky_solver(array, 0.0, np.zeros((), dtype))(array[:, 0]))).all()


def test_a_factor_that_rounding_has_spoiled_is_made_again(rng):
    """Matrices of rank 3: no square of a factor's diagonal lies far below the smallest eigenvalue, as some would in float32."""
    for _ in range(20):
        x = (rng.normal(size=(60, 3)) @ rng.normal(size=(3, 200))).astype(np.float32)
        matrix, shift = x @ x.T, np.float32(1e-3)
        jitter = 4 * np.finfo(np.float32).eps * np.trace(matrix) / 60
        for array in (matrix, jnp.asarray(matrix)):
            inverse = np.asarray(inverse_cholesky(array, shift, jitter))
            assert (np.diagonal(inverse).astype(float) ** -2 > 0.49 * (shift + jitter)).all()
