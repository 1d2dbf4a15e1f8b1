import jax
import numpy as np
import pytest
import scipy.optimize
from sklearn.neural_network import MLPRegressor as ScikitMLP

from moe_jax import GateConfig, InputError
from moe_jax.gates.controls import fit_mlp_regressor, fit_temperature, predict_mlp_regressor, simplex_weights
from moe_jax.gates.routing import route_soft, sharpen


@pytest.mark.parametrize("n_good", [1, 2, 4])
def test_simplex_weights_against_a_general_solver(rng, n_good):
    """Some experts are so bad that their weight is 0; SLSQP finds the same minimum."""
    y = rng.normal(size=400)
    scale = np.where(np.arange(5) < n_good, 0.5, 4.0)
    predictions = y[:, None] + scale * rng.normal(size=(400, 5)) + 0.4 * rng.normal(size=(400, 1))
    weights = simplex_weights(predictions, y)
    assert weights.sum() == pytest.approx(1)
    assert (weights >= 0).all()

    def loss(w):
        return np.mean((y - predictions @ w) ** 2)

    found = scipy.optimize.minimize(
        loss, np.full(5, 0.2), bounds=[(0, 1)] * 5, constraints={"type": "eq", "fun": lambda w: w.sum() - 1}, tol=1e-12
    )
    assert loss(weights) <= found.fun + 1e-9
    np.testing.assert_allclose(weights, found.x, atol=2e-4)


def test_simplex_weights_of_two_experts_by_hand():
    """Errors of variance 1 and 4 that do not correlate: weights 4/5 and 1/5."""
    errors = np.array([[1.0, 2.0], [1.0, -2.0], [-1.0, 2.0], [-1.0, -2.0]])
    np.testing.assert_allclose(simplex_weights(np.full((4, 1), 3.0) + errors, np.full(4, 3.0)), [0.8, 0.2])


def test_dependent_experts(rng):
    y = rng.normal(size=50)
    with pytest.raises(InputError, match="linearly dependent"):
        simplex_weights(np.stack([y, y], axis=1), y)


def test_temperature_is_found(rng):
    """The target is the mixture at temperature 0.4; nothing else was changed."""
    weights = rng.dirichlet(np.ones(3), 500).astype(np.float32)
    predictions = rng.normal(size=(500, 3)).astype(np.float32)
    y = route_soft(sharpen(weights, 0.4), predictions)
    assert fit_temperature(weights, predictions, y) == pytest.approx(0.4, rel=0.01)


def test_sharpen(rng, dtype):
    weights = rng.dirichlet(np.ones(4), 100).astype(dtype)
    np.testing.assert_allclose(sharpen(weights, 1.0), weights, rtol=1e-5)
    powered = weights**2 / (weights**2).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(sharpen(weights, 0.5), powered, rtol=1e-4)
    np.testing.assert_allclose(sharpen(np.eye(3, dtype=dtype), 1.0), np.eye(3), atol=1e-30)


@pytest.mark.slow
def test_mlp_regressor_learns_as_scikit_learn_does(rng):
    x = rng.normal(size=(2_000, 3)).astype(np.float32) * [1, 10, 0.1] + 5
    y = (np.sin(x[:, 0] - 5) * 3 + 100 + (x[:, 1] - 5) * (x[:, 2] - 5)).astype(np.float32)
    model, fit = fit_mlp_regressor(jax.random.key(0), x[:1500], y[:1500], config=GateConfig(epochs=150, learning_rate=3e-3))
    ours = np.mean((predict_mlp_regressor(model, x[1500:]) - y[1500:]) ** 2)
    z = (x - x.mean(axis=0)) / x.std(axis=0)
    oracle = ScikitMLP(
        hidden_layer_sizes=(64,), learning_rate_init=3e-3, batch_size=256, max_iter=150, random_state=0, early_stopping=True
    )
    theirs = np.mean((oracle.fit(z[:1500], y[:1500] - 100).predict(z[1500:]) + 100 - y[1500:]) ** 2)
    assert ours < 1.5 * theirs + 0.01
    assert ours < 0.05 * y.var()
    assert np.isfinite(fit.validation_loss).any()
