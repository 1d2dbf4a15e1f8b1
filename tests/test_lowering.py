"""Every jitted function of the public API lowers for CUDA and TPU on a machine that has neither.

The lowered text shows what a GPU would be told: matrix products at the highest precision (the default of a GPU is TF32, with 10
bits), no call back to Python, and no large array within the program.
"""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

import moe_jax
from moe_jax import GateConfig, LinearGate, MLPGate
from moe_jax.spectra.pixels import WAVE

N, P, K, F = 40, 60, 3, 5
LARGEST_MODULE = 400_000  # characters of text
x, y = jnp.linspace(0.0, 1.0, N * P).reshape(N, P) ** 2, jnp.linspace(1.0, 5.0, N)
folds, cell = np.arange(N) % 4, jnp.arange(N) % K
features, weights = x[:, :F], jnp.full((N, K), 1.0 / K)
predictions = jnp.stack([y, y + 0.1, y - 0.1], axis=1)
key = jax.random.key(0)


def gate_fit(gate, config):
    def fit(key, features, predictions, y):
        return moe_jax.fit_gate(key, gate, features, predictions, y, config)

    return fit, (key, features, predictions, y)


def simulate(key, components):
    grid = moe_jax.load_grid()
    return moe_jax.simulate_survey(key, 8, grid=type(grid)(*grid[:4], *components))


PROGRAMS = {
    "fit_ridge, dual": (lambda x, y: moe_jax.fit_ridge(x, y, 1.0), (x, y)),
    "fit_ridge, primal": (lambda x, y: moe_jax.fit_ridge(x, y, 1.0), (x[:, :20], y)),
    "fit_ridge, tangents": (lambda x, y: moe_jax.fit_ridge(x, y, 1.0, tangents=x[:, None]), (x, y)),
    "fit_weighted_ridge": (lambda x, y, s: moe_jax.fit_weighted_ridge(x, y, s, 1.0), (x, y, y)),
    "predict_ridge": (moe_jax.predict_ridge, (moe_jax.Ridge(x[0], y[0]), x)),
    "cross_validate_ridge": (lambda x, y: moe_jax.cross_validate_ridge(x, y, np.array([0.1, 1.0]), folds=folds), (x, y)),
    "fit_mixture_experts": (lambda *data: moe_jax.fit_mixture_experts(*data, 1.0), (x, y, weights)),
    "MLP gate, Adam": gate_fit(MLPGate(8), GateConfig(epochs=2)),
    "linear gate, Adam": gate_fit(LinearGate(), GateConfig(epochs=2)),
    "linear gate, L-BFGS": gate_fit(LinearGate(), GateConfig(optimizer="lbfgs", validation_fraction=0.0)),
    "features": (
        lambda key, flux: moe_jax.compute_features(moe_jax.fit_features(key, flux, WAVE), flux, WAVE),
        (key, jnp.ones((30, len(WAVE)))),
    ),
    "route_soft": (moe_jax.route_soft, (weights, predictions)),
    "bootstrap_delta_r2": (
        lambda key, *data: moe_jax.bootstrap_delta_r2(key, *data, n_resamples=64),
        (key, y, predictions[:, 1], predictions[:, 2]),
    ),
    "bootstrap_delta_r2, groups": (
        lambda key, *data: moe_jax.bootstrap_delta_r2(key, *data[:3], n_resamples=64, groups=data[3], n_groups=K, method="bca"),
        (key, y, predictions[:, 1], predictions[:, 2], cell),
    ),
    "r2_by_group": (lambda y, p, g: moe_jax.r2_by_group(y, p, g, K), (y, predictions[:, 1], cell)),
    "simulate_survey": (simulate, (key, tuple(map(jnp.asarray, moe_jax.load_grid()[4:])))),
    "add_noise": (lambda key, *spectra: moe_jax.add_noise(key, *spectra, 0.2), (key, x, x)),
}


@pytest.fixture(scope="module")
def lowered():
    """The text of each program for both platforms, lowered once."""
    texts = {}

    def lower(name):
        if name not in texts:
            function, arguments = PROGRAMS[name]
            shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arguments)
            texts[name] = export.export(jax.jit(function), platforms=["cuda", "tpu"])(*shapes).mlir_module()
        return texts[name]

    return lower


@pytest.mark.parametrize("name", PROGRAMS)
def test_it_lowers_for_cuda_and_tpu(name, lowered):
    text = lowered(name)
    assert len(text) < LARGEST_MODULE, len(text)
    assert "callback" not in text
    for product in re.findall(r"stablehlo\.dot_general.*", text):
        if "tensor<" in product and "xf32" in product:
            assert "precision = [HIGHEST, HIGHEST]" in product, product


def test_a_product_at_default_precision_would_be_seen():
    """The check above can fail: a plain matrix product lowers without ``HIGHEST``."""
    text = export.export(jax.jit(jnp.matmul), platforms=["cuda"])(x, x.T).mlir_module()
    assert "HIGHEST" not in re.findall(r"stablehlo\.dot_general.*", text)[0]
