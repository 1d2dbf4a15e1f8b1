"""Tangents of spectra, against lines whose derivatives are known, and what a ridge regression has of them."""

import jax
import numpy as np
import pytest
import scipy

from moe_jax import InputError, add_noise, fit_ridge, predict_ridge, rmse, simulate_survey, tangent_vectors
from moe_jax.spectra.label_model import LIGHT_SPEED
from moe_jax.spectra.pixels import WAVE

LINES = np.array([7500.0, 8200.0, 8662.0])[:, None]
WIDTH = 30 / LIGHT_SPEED


def lines(velocity=0.0, broadening=0.0):
    """Spectra of 1 with a Gaussian absorption line, moved and broadened; km/s."""
    width = np.hypot(WIDTH, broadening / LIGHT_SPEED)
    offset = np.log(WAVE / LINES) - velocity / LIGHT_SPEED
    return 1 - 0.6 * WIDTH / width * np.exp(-0.5 * (offset / width) ** 2)


def test_lines_move_and_broaden():
    """The tangents are the differences that small velocities and broadenings make; the sign of a velocity does not matter."""
    moving, broad = np.moveaxis(np.asarray(tangent_vectors(WAVE, lines(), velocity=8.0, broadening=12.0)), 1, 0)
    np.testing.assert_allclose(moving, 8 * (lines(velocity=-0.05) - lines(velocity=0.05)) / 0.1, atol=2e-3)
    np.testing.assert_allclose(broad, 1e4 * (lines(broadening=0.12) - lines()), atol=4e-3)
    assert np.abs(moving).max() > 0.09
    assert np.abs(broad).max() > 0.04


def test_continuum_and_constant(rng, dtype):
    wave, flux = np.sort(rng.uniform(5000, 6000, 40)), rng.uniform(size=(3, 40)).astype(dtype)
    np.testing.assert_array_equal(tangent_vectors(wave, flux, continuum=0.05), tangent_vectors(wave, flux, continuum=(0.05,)))
    tangents = tangent_vectors(wave, flux, continuum=(0.05, 0.0, 0.2), constant=0.1)
    t = 2 * (wave - wave[0]) / np.ptp(wave) - 1
    level = np.broadcast_to(0.1 * np.median(flux, axis=1)[:, None], flux.shape)
    expected = np.stack([0.05 * t * flux, 0.2 * (2.5 * t**3 - 1.5 * t) * flux, level], axis=1)
    assert tangents.dtype == dtype
    np.testing.assert_allclose(tangents, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("wave", "sizes", "message"),
    [
        (np.arange(1.0, 6.0), {"velocity": 1}, r"flux has shape \(2, 6\), expected \(N, 5\) beside wave"),
        (np.ones(6), {"velocity": 1}, "at least 4, positive, increasing"),
        (np.arange(1.0, 7.0), {"velocity": -1}, "expected finite numbers of at least 0"),
        (np.arange(1.0, 7.0), {"continuum": (0, np.nan)}, "expected finite numbers of at least 0"),
        (np.arange(1.0, 7.0), {}, "and one above 0"),
    ],
)
def test_bad_input(wave, sizes, message):
    with pytest.raises(InputError, match=message):
        tangent_vectors(wave, np.ones((2, 6)), **sizes)


@pytest.mark.slow
def test_a_ridge_with_tangents_bears_velocities():
    train, test = simulate_survey(jax.random.key(0), 1_000), simulate_survey(jax.random.key(1), 500)
    x = add_noise(jax.random.key(2), train.flux, train.error, 0.2)
    shifted = scipy.interpolate.make_interp_spline(WAVE, test.flux, axis=1)(np.clip(WAVE * (1 - 30 / LIGHT_SPEED), WAVE[0], None))
    noise = add_noise(jax.random.key(3), 0 * test.flux, test.error, 0.2)

    def errors(tangents):
        ridge = fit_ridge(x, train.labels.log_g, 0.3, tangents=tangents)
        return [float(rmse(test.labels.log_g, predict_ridge(ridge, flux + noise))) for flux in (test.flux, shifted)]

    untouched, moving = errors(None)
    untouched_with, moving_with = errors(tangent_vectors(train.wave, train.flux, velocity=30.0))
    assert untouched_with < 1.02 * untouched
    assert moving_with - untouched_with < 0.65 * (moving - untouched)
