"""The rivals of the mixtures against peers, and on problems whose answer is known."""

import jax
import numpy as np
import pytest
import scipy

from experiments.pipeline.rivals import ConvNet, fit_cannon, fit_conv, fit_joint, predict_cannon, quadratic_terms
from moe_jax.gates.networks import MLPGate
from moe_jax.gates.training import GateConfig

SCATTER = 0.02


@pytest.fixture
def spectra(rng):
    """Spectra that are quadratic in two labels, with errors that differ between stars and a scatter in every third pixel."""
    labels = rng.uniform([4_000, 0], [6_000, 5], size=(1_500, 2))
    terms = quadratic_terms((labels - [5_000, 2.5]) / [1_000, 2.5])
    error = np.broadcast_to(rng.uniform(0.01, 0.05, size=(1_500, 1)), (1_500, 60))
    scatter = SCATTER * (np.arange(60) % 3 == 0)
    clean = terms @ rng.normal(size=(6, 60)) * 0.3
    return labels, clean + rng.normal(size=clean.shape) * np.sqrt(error**2 + scatter**2), error


def test_the_cannon_finds_the_scatter(spectra):
    cannon = fit_cannon(*spectra)
    scattered = np.arange(60) % 3 == 0
    np.testing.assert_allclose(cannon.scatter[scattered], SCATTER, rtol=0.15)
    assert cannon.scatter[~scattered].max() < SCATTER / 3


def test_the_cannons_coefficients_are_those_of_weighted_least_squares(spectra):
    labels, flux, error = spectra
    cannon = fit_cannon(*spectra)
    terms = quadratic_terms(2 * (labels - cannon.low) / (cannon.high - cannon.low) - 1)
    for pixel in (0, 1):
        root = 1 / np.sqrt(error[:, pixel] ** 2 + cannon.scatter[pixel] ** 2)
        peer = np.linalg.lstsq(terms * root[:, None], flux[:, pixel] * root, rcond=None)[0]
        np.testing.assert_allclose(cannon.coef[:, pixel], peer, atol=1e-3)


def test_the_cannons_labels_are_those_of_scipy(spectra):
    cannon = fit_cannon(*spectra)
    labels, flux, error = (array[:40] for array in spectra)
    found = predict_cannon(cannon, flux, error)
    sigma = np.sqrt(error**2 + cannon.scatter[None, :] ** 2)
    width = cannon.high - cannon.low

    for star in range(40):

        def residual(x, star=star):
            return (flux[star] - quadratic_terms(x[None, :])[0] @ cannon.coef) / sigma[star]

        at = 2 * (found[star] - cannon.low) / width - 1
        starts = [at, np.zeros(2), *np.random.default_rng(star).uniform(-0.9, 0.9, size=(6, 2))]
        best = min(
            (scipy.optimize.least_squares(residual, np.clip(s, -0.999, 0.999), bounds=(-1, 1)) for s in starts),
            key=lambda fit: fit.cost,
        )
        np.testing.assert_allclose(at, best.x, atol=1e-3)
    assert np.median(np.abs(found - labels) / width) < 0.02


@pytest.mark.slow
def test_a_convolutional_network_learns_what_a_line_says(rng):
    depth = rng.uniform(size=600).astype(np.float32)
    x = np.ones((600, 301), np.float32) + rng.normal(size=(600, 301)).astype(np.float32) * 0.05
    x[:, 100:110] -= depth[:, None]
    predict = fit_conv(jax.random.key(0), x[:500], depth[:500], ConvNet(16), GateConfig(epochs=40, batch_size=64))
    error = np.asarray(predict(x[500:])) - depth[500:]
    assert np.mean(error**2) < 0.1 * depth.var()


@pytest.mark.slow
def test_experts_and_gate_learn_a_bent_line_together(rng):
    x = rng.uniform(-1, 1, size=(800, 2)).astype(np.float32)
    y = np.abs(x[:, 0]) + 0.1 * x[:, 1]
    config = GateConfig(epochs=150, learning_rate=1e-2, patience=30)
    predict = fit_joint(jax.random.key(0), x[:700], y[:700], 2, MLPGate(16), config)
    error = np.asarray(predict(x[700:])) - y[700:]
    assert np.mean(error**2) < 0.02 * y.var()
