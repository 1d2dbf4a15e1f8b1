import jax
import jax.numpy as jnp
import numpy as np
import pytest

import moe_jax
from moe_jax import GateConfig, InputError, LinearGate, MLPGate, fit_moe, predict_moe

CONFIG = GateConfig(epochs=60, learning_rate=1e-2)


def two_lines(rng, n=600, dtype=np.float64):
    """A kink: each half has its own line."""
    x = rng.uniform(-1, 1, (n, 3))
    y = np.where(x[:, 0] > 0, 3 * x[:, 0] + x[:, 1], -x[:, 0] - 2 * x[:, 2]) + 0.05 * rng.normal(size=n)
    return x.astype(dtype), y.astype(dtype), (x[:, 0] > 0).astype(int)


def test_the_pieces_in_one_call(rng, dtype):
    x, y, cell = two_lines(rng, dtype=dtype)
    cell[:7] = -1
    features = x[:, :2]
    key = jax.random.key(3)
    mixture = fit_moe(key, x, y, cell, features, alphas=(0.1, 1.0), n_folds=4, gate=LinearGate(), config=CONFIG)
    said = predict_moe(mixture, x, features)
    key_folds, key_gate = jax.random.split(key)
    folds = moe_jax.assign_folds(key_folds, cell, 4)
    experts = moe_jax.fit_experts(x, y, cell, np.array([0.1, 1.0], dtype), folds, n_experts=2)
    yhat = moe_jax.predict_experts(experts, x)
    out = moe_jax.cross_fitted_predictions(yhat, experts.out_of_fold, cell)[7:]
    scaled = (features[7:] - features[7:].mean(axis=0)) / features[7:].std(axis=0)
    fit = moe_jax.fit_gate(key_gate, LinearGate(), scaled.astype(dtype), out, y[7:], CONFIG)
    all_scaled = ((features - features[7:].mean(axis=0)) / features[7:].std(axis=0)).astype(dtype)
    expected = moe_jax.route_soft(LinearGate().apply(fit.params, all_scaled), yhat)
    np.testing.assert_allclose(said.y, expected, rtol=2e-3 if dtype == np.float32 else 1e-8, atol=1e-4)
    assert said.y.dtype == mixture.experts.coef.dtype == dtype


@pytest.mark.slow
def test_it_finds_what_one_ridge_cannot(rng):
    x, y, cell = two_lines(rng)
    new_x, new_y, _ = two_lines(rng)
    mixture = fit_moe(jax.random.key(0), x, y, cell, gate=MLPGate(16), config=CONFIG)
    said = predict_moe(mixture, new_x)
    ridge = moe_jax.fit_ridge(x, y, 1.0)
    assert moe_jax.r2_score(new_y, said.y) > 0.95 > moe_jax.r2_score(new_y, moe_jax.predict_ridge(ridge, new_x)) + 0.3
    np.testing.assert_allclose(np.sum(said.weights, axis=1), 1, rtol=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"y": np.ones(5)}, r"y has shape \(5,\), expected \(40,\)"),
        ({"cell": np.zeros(39, int)}, r"cell has shape \(39,\)"),
        ({"features": np.ones((39, 2))}, r"features has shape \(39, 2\), expected \(40, F\)"),
        ({"x": np.full((40, 3), np.nan)}, "x holds numbers that are not finite"),
        ({"y": np.full(40, np.inf)}, "y holds numbers that are not finite"),
        ({"alphas": (1.0, -1.0)}, "expected positive numbers"),
        ({"n_folds": 1}, "n_folds is 1, expected a whole number, at least 2"),
        ({"cell": np.repeat([0, 1], [35, 5])}, "found 5 stars in cell 1, expected at least 10"),
    ],
)
def test_bad_input(change, message):
    rng = np.random.default_rng(0)
    given = {"x": rng.normal(size=(40, 3)), "y": rng.normal(size=40), "cell": np.arange(40) % 2} | change
    with pytest.raises(InputError, match=message):
        fit_moe(jax.random.key(0), **given)


def test_other_columns_than_in_the_fit(rng):
    x, y, cell = two_lines(rng, 80)
    mixture = fit_moe(jax.random.key(0), x, y, cell, config=GateConfig(epochs=1))
    with pytest.raises(InputError, match=r"x has shape \(80, 2\), expected \(N, 3\) as in the fit"):
        predict_moe(mixture, x[:, :2])
    with pytest.raises(InputError, match=r"features has shape \(80, 2\), expected \(N, 3\) as in the fit"):
        predict_moe(mixture, x, x[:, :2])
    with pytest.raises(InputError, match=r"features has shape \(79, 3\), expected \(80, F\) beside x"):
        predict_moe(mixture, x, jnp.asarray(x[:79]))
