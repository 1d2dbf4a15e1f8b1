import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression

from moe_jax import GateConfig, InputError, LinearGate, MLPGate, fit_classifier, fit_gate, fit_gates, mixture_loss
from moe_jax.gates import optimize

QUICK = GateConfig(epochs=15, batch_size=64)


@pytest.fixture
def mixture(rng):
    """A mixture whose true weights are a softmax of the features: y = sum_k p_k yhat_k exactly."""
    features = rng.normal(size=(2_000, 2)).astype(np.float32)
    kernel = np.array([[2.0, -1.0, 0.0], [0.0, 1.5, -1.0]], np.float32)
    logits = features @ kernel
    weights = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    predictions = rng.normal(size=(2_000, 3)).astype(np.float32) * 2
    return features, predictions, (weights * predictions).sum(axis=1), weights


@pytest.mark.slow
@pytest.mark.parametrize("gate", [LinearGate(), MLPGate(16)])
def test_vmap_over_keys_equals_single_runs(gate, mixture):
    features, predictions, y, _ = mixture
    keys = jax.random.split(jax.random.key(0), 8)
    many = jax.vmap(lambda key: fit_gate(key, gate, features, predictions, y, QUICK))(keys)
    for i, key in enumerate(keys):
        one = fit_gate(key, gate, features, predictions, y, QUICK)
        assert int(one.best_epoch) == int(many.best_epoch[i])
        np.testing.assert_allclose(many.validation_loss[i], one.validation_loss, rtol=2e-4, atol=1e-6)
        for ours, theirs in zip(jax.tree.leaves(one.params), jax.tree.leaves(many.params), strict=True):
            np.testing.assert_allclose(theirs[i], ours, atol=2e-4)


def test_it_does_not_retrace(mixture):
    features, predictions, y = (array[:1_777] for array in mixture[:3])
    before = optimize._minimize._cache_size()
    for seed in range(3):
        fit_gate(jax.random.key(seed), LinearGate(), features, predictions, y + seed, QUICK)
    assert optimize._minimize._cache_size() == before + 1


def test_linear_gate_reaches_the_known_optimum(mixture):
    features, predictions, y, weights = mixture
    config = GateConfig(epochs=300, learning_rate=3e-2, batch_size=500, patience=300)
    fit = fit_gate(jax.random.key(0), LinearGate(), features, predictions, y, config)
    assert float(mixture_loss(LinearGate(), fit.params, features, predictions, y)) < 1e-6
    np.testing.assert_allclose(LinearGate().apply(fit.params, features), weights, atol=5e-3)


@pytest.mark.slow
def test_early_stopping_restores_the_best_params(mixture, rng):
    """On pure noise, with a rate far too high, the validation loss soon stops falling."""
    features, predictions, _, _ = mixture
    y = rng.normal(size=2_000).astype(np.float32)
    config = GateConfig(epochs=60, learning_rate=0.3, patience=4, batch_size=100)
    fit = fit_gate(jax.random.key(2), MLPGate(32), features, predictions, y, config)
    loss = np.asarray(fit.validation_loss)
    assert bool(fit.stopped_early)
    assert int(fit.best_epoch) == int(np.nanargmin(loss))
    run = int(fit.best_epoch) + 4 + 1
    assert np.isfinite(loss[:run]).all()
    assert np.isnan(loss[run:]).all()
    assert run < 60
    # The params are those of the best epoch: training for exactly that many epochs ends in the same place.
    shorter = GateConfig(epochs=int(fit.best_epoch) + 1, learning_rate=0.3, patience=100, batch_size=100)
    again = fit_gate(jax.random.key(2), MLPGate(32), features, predictions, y, shorter)
    for ours, theirs in zip(jax.tree.leaves(fit.params), jax.tree.leaves(again.params), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)


def test_histories_are_those_of_the_loss(mixture):
    """One epoch of one batch with no learning to speak of: both losses are the initial loss on their parts."""
    features, predictions, y, _ = mixture
    config = GateConfig(epochs=1, learning_rate=1e-12, batch_size=4_000, validation_fraction=0.5)
    fit = fit_gate(jax.random.key(0), LinearGate(), features, predictions, y, config)
    total = float(mixture_loss(LinearGate(), fit.params, features, predictions, y))
    assert float(fit.train_loss[0] + fit.validation_loss[0]) / 2 == pytest.approx(total, rel=1e-5)


def test_x64(mixture, x64):
    features, predictions, y, _ = mixture
    fit = fit_gate(jax.random.key(0), MLPGate(4), features.astype(float), predictions.astype(float), y.astype(float), QUICK)
    assert all(leaf.dtype == jnp.float64 for leaf in jax.tree.leaves(fit.params))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"epochs": 0}, "epochs is 0"),
        ({"batch_size": -1}, "batch_size is -1"),
        ({"batch_size": 2.5}, "batch_size is 2.5, expected a whole number"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0"),
        ({"validation_fraction": 1.0}, "validation_fraction is 1.0"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(InputError, match=message):
        GateConfig(**change)


def test_bad_arrays(mixture):
    features, predictions, y, _ = mixture
    with pytest.raises(InputError, match="y has shape"):
        fit_gate(jax.random.key(0), LinearGate(), features, predictions, y[:5])
    with pytest.raises(InputError, match="at least 2"):
        fit_gate(jax.random.key(0), LinearGate(), features[:1], predictions[:1], y[:1])


def test_data_without_information(mixture):
    """Experts that agree on every star, a constant target, and NaN are refused, alone and for several keys."""
    features, predictions, y, _ = mixture
    unknown = features.copy()
    unknown[3, 1] = np.nan
    keys = jax.random.split(jax.random.key(0), 2)
    for arrays, message in (
        ((features, np.repeat(predictions[:, :1], 3, axis=1), y), "found the same prediction of all experts for every star"),
        ((features, predictions, np.full_like(y, 2.5)), "y: found the same value for all 2000 stars"),
        ((unknown, predictions, y), "features holds numbers that are not finite"),
    ):
        with pytest.raises(InputError, match=message):
            fit_gate(keys[0], LinearGate(), *arrays, QUICK)
        with pytest.raises(InputError, match=message):
            fit_gates(keys, LinearGate(), *arrays, QUICK)


def test_one_expert_is_enough(mixture):
    features, predictions, y, _ = mixture
    fit = fit_gate(jax.random.key(0), LinearGate(), features, predictions[:, :1], y, QUICK)
    np.testing.assert_allclose(LinearGate().apply(fit.params, features), 1.0)


def test_classifier_against_lbfgs(rng):
    """Another solver finds the same weights; C comes from the grid."""
    x = rng.normal(size=(600, 4))
    cell = np.argmax(x @ rng.normal(size=(4, 3)) + rng.gumbel(size=(600, 3)), axis=1)
    fit = fit_classifier(x, cell, C_grid=(100.0, 1.0, 0.01))
    assert fit.C in (1.0, 100.0)
    assert fit.converged
    oracle = LogisticRegression(C=fit.C, tol=1e-10, max_iter=10_000).fit(x, cell)
    np.testing.assert_allclose(LinearGate().apply(fit.params, x), oracle.predict_proba(x), atol=1e-4)
    assert abs(fit.accuracy - oracle.score(x, cell)) < 0.05


def test_classifier_needs_every_cell(rng):
    with pytest.raises(InputError, match="found 0 stars in cell 1, expected at least 5"):
        fit_classifier(rng.normal(size=(20, 2)), np.repeat([0, 2], 10))


@pytest.mark.parametrize(
    ("cell", "options", "message"),
    [
        ([0, 1] * 10, {"n_folds": 1}, "n_folds is 1, expected a whole number, at least 2"),
        ([0, 1] * 10, {"C_grid": ()}, "C_grid is .*, expected positive numbers"),
        ([0, 1] * 10, {"C_grid": (1.0, -1.0)}, "C_grid is .*, expected positive numbers"),
        ([0] * 20, {}, "cell is 0 for all stars, expected at least two cells"),
    ],
)
def test_what_a_classifier_cannot_be_fitted_with(cell, options, message, rng):
    with pytest.raises(InputError, match=message):
        fit_classifier(rng.normal(size=(20, 3)), np.array(cell), **options)
