import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

from moe_jax.core.cholesky import inverse_cholesky


@pytest.fixture
def matrix(rng, dtype):
    x = rng.normal(size=(30, 50))
    return (x @ x.T).astype(dtype)


def test_against_scipy(matrix, dtype):
    expected = np.linalg.inv(scipy.linalg.cholesky(matrix.astype(float) + 0.5 * np.eye(30), lower=True))
    for inverse in (inverse_cholesky, jax.jit(inverse_cholesky)):  # by LAPACK, by XLA
        ours = inverse(jnp.asarray(matrix), 0.5)
        assert ours.dtype == dtype
        np.testing.assert_allclose(ours, expected, atol=1e-5 if dtype == np.float32 else 1e-13)


def test_padding_is_left_out(matrix, dtype):
    padded = inverse_cholesky(jnp.asarray(np.pad(matrix, (0, 7))), 0.5, n_used=30)
    assert padded.shape == (37, 37)
    np.testing.assert_array_equal(padded[:30, :30], inverse_cholesky(jnp.asarray(matrix), 0.5))
    assert not padded[30:].any()


def test_only_the_lower_triangle_is_read(matrix, dtype):
    spoilt = np.where(np.tri(30, dtype=bool), matrix, np.nan)
    expected = inverse_cholesky(jnp.asarray(matrix), 0.5)
    for inverse in (inverse_cholesky, jax.jit(inverse_cholesky)):
        np.testing.assert_allclose(inverse(jnp.asarray(spoilt), 0.5), expected, rtol=1e-4, atol=1e-6)


def test_not_positive_definite(matrix, dtype):
    for inverse in (inverse_cholesky, jax.jit(inverse_cholesky)):
        assert np.isnan(np.asarray(inverse(jnp.asarray(-matrix), 0.0))).any()
