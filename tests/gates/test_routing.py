import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import InputError, route_fallback, route_hard, route_oracle, route_soft

WEIGHTS = np.array([[0.7, 0.2, 0.1], [0.4, 0.35, 0.25], [0.0, 0.5, 0.5]])
YHAT = np.array([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0], [7.0, 8.0, 9.0]])


def test_by_hand(dtype):
    weights, yhat = jnp.asarray(WEIGHTS, dtype), jnp.asarray(YHAT, dtype)
    np.testing.assert_allclose(route_soft(weights, yhat), [1.4, 4.85, 8.5], rtol=1e-6)
    assert route_hard(weights, yhat).tolist() == [1, 4, 8]
    np.testing.assert_allclose(route_fallback(weights, yhat, jnp.array([0.0, -1.0, 0.0], dtype)), [1.4, -1, 8.5], rtol=1e-6)
    np.testing.assert_array_equal(route_oracle(jnp.array([2, -1, 0]), yhat), [3, np.nan, 7])
    for route in (route_oracle, jax.jit(route_oracle)):  # by NumPy, by XLA
        np.testing.assert_array_equal(route(jnp.array([3, -7, 1]), yhat), [np.nan, np.nan, 8])


def test_soft_equals_hard_for_one_hot_weights(rng):
    yhat = rng.normal(size=(50, 9)).astype(np.float32)
    one_hot = np.eye(9, dtype=np.float32)[rng.integers(0, 9, 50)]
    np.testing.assert_array_equal(route_soft(one_hot, yhat), route_hard(one_hot, yhat))


def test_shapes():
    with pytest.raises(InputError, match="expert_predictions has shape"):
        route_soft(WEIGHTS, YHAT[:, :2])
    with pytest.raises(InputError, match="global_prediction has shape"):
        route_fallback(WEIGHTS, YHAT, np.zeros((3, 1)))
