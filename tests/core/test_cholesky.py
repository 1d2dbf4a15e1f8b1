import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from moe_jax.core.cholesky import cholesky_solver, inverse_cholesky, solve_small


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


@pytest.mark.parametrize(("lowest", "growth"), [(-0.3, 1), (-0.9, 32), (-3.0, 32), (-40.0, 1024), (-2_000.0, 32**3)])
def test_the_jitter_grows_until_the_factor_is_sound(lowest, growth, dtype):
    """An eigenvalue that rounding has made negative (in jitters): the factor fails, or keeps too little of its place."""
    jitter = dtype.type(2.0**-12)
    matrix = np.diag(np.array([1.0, 1.0, lowest * jitter, 1.0], dtype))
    for array in (matrix, jnp.asarray(matrix)):
        inverse = np.asarray(inverse_cholesky(array, 0.0, jitter))
        np.testing.assert_allclose(np.diagonal(inverse) ** -2, np.diagonal(matrix) + growth * jitter, rtol=1e-3)


def test_small_systems(rng):
    root = rng.normal(size=(5, 6, 9))
    normal, right = (root @ root.transpose(0, 2, 1)).astype(np.float32), rng.normal(size=(5, 6, 2)).astype(np.float32)
    np.testing.assert_allclose(solve_small(normal, right), np.linalg.solve(normal, right), rtol=2e-3, atol=2e-3)
