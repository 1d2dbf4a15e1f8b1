import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy
import scipy.optimize

from moe_jax import GateConfig, Hyper, InputError, LinearGate, MLPGate, fit_classifier, fit_gate, mixture_loss
from moe_jax.gates.optimize import Adam, minimize, shuffled_batches
from moe_jax.gates.training import MixtureObjective, entropy

LBFGS = GateConfig(optimizer="lbfgs", validation_fraction=0.0)


@pytest.fixture
def mixture(rng):
    """Three experts, each good where one class of stars lies, with noise; a logistic regression finds the classes."""
    features = rng.normal(size=(600, 4))
    cell = np.argmax(features @ rng.normal(size=(4, 3)) + rng.gumbel(size=(600, 3)), axis=1)
    y = rng.normal(size=600)
    predictions = y[:, None] + rng.normal(size=(600, 3)) * np.where(np.arange(3) == cell[:, None], 0.3, 1.0)
    logistic = fit_classifier(features, cell, C_grid=(1.0,)).params
    return features, predictions, y, logistic


@pytest.mark.slow
def test_warm_linear_gate_is_no_worse_than_the_classification_gate(mixture, dtype):
    """The inequality that must hold, for the first iteration as for many."""
    features, predictions, y, logistic = mixture
    data = tuple(array.astype(dtype) for array in (features, predictions, y))
    gate = LinearGate()
    before = float(mixture_loss(gate, logistic, *data))
    losses = []
    for iterations in (1, 200):
        config = GateConfig(optimizer="lbfgs", init="logistic", validation_fraction=0.0, max_iterations=iterations)
        fit = fit_gate(jax.random.key(0), gate, *data, config, logistic=logistic)
        losses.append(float(mixture_loss(gate, fit.params, *data)))
        assert losses[-1] <= before * (1 + 1e-6)
    assert losses[-1] < 0.98 * before
    assert losses == sorted(losses, reverse=True)


@pytest.mark.slow
def test_lbfgs_reaches_the_optimum_that_scipy_finds(mixture, x64):
    features, predictions, y, logistic = mixture
    config = GateConfig(optimizer="lbfgs", init="logistic", validation_fraction=0.0, gradient_tolerance=1e-7)
    fit = fit_gate(jax.random.key(0), LinearGate(), features, predictions, y, config, logistic=logistic)
    assert bool(fit.converged)
    assert float(fit.gradient_norm) <= 1e-7

    def loss(flat):
        logits = features @ flat[:12].reshape(4, 3) + flat[12:]
        weights = np.exp(logits - logits.max(axis=1, keepdims=True))
        weights /= weights.sum(axis=1, keepdims=True)
        return np.mean((y - (weights * predictions).sum(axis=1)) ** 2)

    start = np.concatenate([np.ravel(logistic["head"]["kernel"]), np.ravel(logistic["head"]["bias"])])
    oracle = scipy.optimize.minimize(loss, start, method="L-BFGS-B", options={"maxiter": 5_000, "maxfun": 10**6, "ftol": 1e-14})
    assert float(mixture_loss(LinearGate(), fit.params, features, predictions, y)) == pytest.approx(oracle.fun, rel=1e-5)


@pytest.mark.slow
def test_lbfgs_history_falls_and_ends(mixture, dtype):
    features, predictions, y, _ = mixture
    fit = fit_gate(jax.random.key(0), LinearGate(), *(a.astype(dtype) for a in (features, predictions, y)), LBFGS)
    loss = np.asarray(fit.train_loss)
    n = int(np.isfinite(loss).sum())
    assert 3 < n < LBFGS.max_iterations
    assert (np.diff(loss[:n]) <= 1e-6).all()
    assert np.isnan(loss[n:]).all()
    assert np.isnan(fit.validation_loss).all()


@pytest.mark.parametrize("gate", [LinearGate(), MLPGate(8), MLPGate(20)])
def test_a_warm_start_is_the_classification_gate(gate, mixture, dtype):
    features, _, _, logistic = mixture
    params = gate.init(jax.random.key(1), 4, 3)
    warm = gate.from_linear(params, logistic)
    assert jax.tree.structure(params) == jax.tree.structure(warm)
    assert [leaf.shape for leaf in jax.tree.leaves(params)] == [leaf.shape for leaf in jax.tree.leaves(warm)]
    expected = LinearGate().apply(logistic, features.astype(dtype))
    np.testing.assert_allclose(gate.apply(warm, features.astype(dtype)), expected, atol=2e-6)


def test_a_narrow_network_cannot_start_warm(mixture):
    *_, logistic = mixture
    gate = MLPGate(7)
    with pytest.raises(InputError, match="hidden is 7, expected at least 8"):
        gate.from_linear(gate.init(jax.random.key(0), 4, 3), logistic)


def test_logistic_start_needs_its_params(mixture):
    features, predictions, y, _ = mixture
    with pytest.raises(InputError, match="logistic is None"):
        fit_gate(jax.random.key(0), LinearGate(), features, predictions, y, GateConfig(init="logistic"))


@pytest.mark.slow
def test_vmap_over_penalties_equals_single_runs(mixture):
    features, predictions, y, _ = (np.asarray(array, np.float32) if i < 3 else array for i, array in enumerate(mixture))
    key, config = jax.random.key(3), GateConfig(epochs=5, batch_size=64)
    hypers = Hyper(jnp.array([1e-3, 1e-2, 1e-3]), jnp.array([0.0, 0.0, 0.1]), jnp.array([0.0, 0.0, 0.05]))
    many = jax.vmap(lambda hyper: fit_gate(key, MLPGate(8), features, predictions, y, config, hyper=hyper))(hypers)
    for i in range(3):
        rate, decay, penalty = (float(column[i]) for column in hypers)
        own = GateConfig(epochs=5, batch_size=64, learning_rate=rate, weight_decay=decay, entropy_penalty=penalty)
        one = fit_gate(key, MLPGate(8), features, predictions, y, own)
        np.testing.assert_allclose(many.validation_loss[i], one.validation_loss, rtol=1e-4)
    norms = [sum(float(jnp.sum(leaf[i] ** 2)) for leaf in jax.tree.leaves(many.params) if leaf.ndim > 2) for i in range(3)]
    assert norms[2] < norms[0]


@pytest.mark.slow
def test_entropy_penalty_sharpens_and_its_opposite_smooths(mixture):
    features, predictions, y, _ = mixture
    found = {}
    for penalty in (-0.5, 0.0, 0.5):
        config = GateConfig(optimizer="lbfgs", validation_fraction=0.0, entropy_penalty=penalty, max_iterations=100)
        fit = fit_gate(jax.random.key(0), LinearGate(), features, predictions, y, config)
        found[penalty] = float(jnp.mean(entropy(LinearGate().apply(fit.params, features))))
    assert found[0.5] < found[0.0] < found[-0.5]
    np.testing.assert_allclose(entropy(np.array([[0.25] * 4, [1.0, 0, 0, 0]])), [np.log(4), 0], atol=1e-6)


def test_biases_do_not_decay(mixture):
    """With a large penalty only the biases are left: the weights are the best constant ones."""
    features, predictions, y, _ = mixture
    predictions = predictions + [0.0, 0.5, 1.0] * np.random.default_rng(0).normal(size=predictions.shape)
    config = GateConfig(optimizer="lbfgs", validation_fraction=0.0, weight_decay=1e3)
    fit = fit_gate(jax.random.key(0), LinearGate(), features, predictions, y, config)
    weights = np.asarray(LinearGate().apply(fit.params, features))
    loss = lambda bias: np.mean((y - predictions @ scipy.special.softmax(np.append(bias, 0))) ** 2)  # noqa: E731
    best = scipy.optimize.minimize(loss, np.zeros(predictions.shape[1] - 1), tol=1e-12).x
    expected = scipy.special.softmax(np.append(best, 0))
    assert np.ptp(expected) > 0.1
    np.testing.assert_allclose(weights, np.broadcast_to(expected, weights.shape), atol=5e-3)


@pytest.mark.parametrize(("n", "size"), [(10, 3), (256, 256), (257, 256), (1000, 64), (5, 8)])
def test_batches_hold_each_star_once(n, size):
    rows = np.asarray(shuffled_batches(jax.random.key(0), n, size))
    assert rows.shape == (-(-n // size), size)
    assert sorted(rows[rows < n]) == list(range(n))
    assert (rows[rows >= n] == n).all()
    assert ((rows < n).sum(axis=1) > 0).all()


def test_batches_mix():
    """Over epochs a star meets all but the few that its column keeps from it, each about equally often."""
    n, size = 120, 12
    met = np.zeros((n, n), int)
    for epoch in range(400):
        for batch in np.asarray(shuffled_batches(jax.random.fold_in(jax.random.key(0), epoch), n, size)):
            met[np.ix_(batch, batch)] += 1
    column = np.arange(n) // (n // size)
    other = column[:, None] != column[None, :]
    assert (met[other] > 10).all()
    assert met[other].mean() == pytest.approx(40, rel=0.05)


def test_given_validation_stars_decide(mixture):
    """The validation loss is that of the stars that were given, and all of the data is trained on."""
    features, predictions, y, _ = (np.asarray(array, np.float32) if i < 3 else array for i, array in enumerate(mixture))
    data, held = (features[:400], predictions[:400], y[:400]), (features[400:], predictions[400:], y[400:])
    gate = LinearGate()
    start = gate.init(jax.random.key(0), 4, 3)
    adam = Adam(learning_rate=1e-12, epochs=1, batch_size=400)
    fit = minimize(jax.random.key(1), MixtureObjective(gate), start, data, adam, validation=held)
    assert float(fit.validation_loss[0]) == pytest.approx(float(mixture_loss(gate, start, *held)), rel=1e-5)
    assert float(fit.train_loss[0]) == pytest.approx(float(mixture_loss(gate, start, *data)), rel=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer": "sgd"}, "optimizer is 'sgd', expected 'adam' or 'lbfgs'"),
        ({"init": "warm"}, "init is 'warm'"),
        ({"gradient_tolerance": 0.0}, "gradient_tolerance is 0.0"),
        ({"weight_decay": -1.0}, "weight_decay is -1.0"),
        ({"entropy_penalty": float("nan")}, "entropy_penalty is nan"),
        ({"max_iterations": 0}, "max_iterations is 0"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(InputError, match=message):
        GateConfig(**change)
