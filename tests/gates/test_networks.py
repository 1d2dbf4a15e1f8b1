import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import LinearGate, MLPGate, linear_params


@pytest.mark.parametrize("gate", [LinearGate(), MLPGate(5)])
def test_weights_lie_on_the_simplex(gate, rng):
    params = gate.init(jax.random.key(0), 13, 9)
    weights = gate.apply(params, rng.normal(size=(40, 13)).astype(np.float32) * 10)
    assert weights.shape == (40, 9)
    assert (np.asarray(weights) >= 0).all()
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, atol=1e-6)


def test_linear_gate_is_softmax_regression(dtype, rng):
    kernel, bias = rng.normal(size=(4, 3)).astype(dtype), rng.normal(size=3).astype(dtype)
    x = rng.normal(size=(10, 4)).astype(dtype)
    logits = x.astype(float) @ kernel + bias
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(LinearGate().apply(linear_params(kernel, bias), x), expected, rtol=1e-5)


def test_mlp_gate_by_hand(x64, rng):
    gate = MLPGate(6)
    params = jax.tree.map(lambda leaf: np.asarray(leaf, float), gate.init(jax.random.key(1), 4, 3))
    x = rng.normal(size=(10, 4))
    hidden = np.maximum(x @ params["hidden"]["kernel"] + params["hidden"]["bias"], 0)
    logits = hidden @ params["head"]["kernel"] + params["head"]["bias"]
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(gate.apply(params, x), expected, rtol=1e-10)


def test_initial_params():
    params = MLPGate().init(jax.random.key(0), 13, 9)
    assert {k: {n: a.shape for n, a in v.items()} for k, v in params.items()} == {
        "hidden": {"kernel": (13, 64), "bias": (64,)},
        "head": {"kernel": (64, 9), "bias": (9,)},
    }
    assert float(jnp.abs(params["hidden"]["kernel"]).max()) <= 13**-0.5
    assert float(jnp.abs(params["hidden"]["kernel"]).max()) > 0.9 * 13**-0.5
    assert not np.any(params["head"]["bias"])


def test_params_are_a_plain_pytree():
    gate = MLPGate(3)
    many = jax.vmap(lambda key: gate.init(key, 2, 4))(jax.random.split(jax.random.key(0), 5))
    weights = jax.vmap(gate.apply, in_axes=(0, None))(many, jnp.ones((7, 2)))
    assert weights.shape == (5, 7, 4)
