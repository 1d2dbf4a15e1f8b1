"""Spectra at a lower resolution, against Gaussian lines, whose convolution is known."""

import jax
import numpy as np
import pytest

from moe_jax import InputError, load_grid, simulate_survey
from moe_jax.spectra.broadening import broaden, broaden_grid, broadening_width
from moe_jax.spectra.grid import GRID_RESOLUTION
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.resample import overlaps, pixel_edges, resample

ONE = broadening_width(np.inf, GRID_RESOLUTION)  # of a line of the grid
LINES = (7500.0, 8200.0, 8662.0)


def lines(wave, width, depth):
    """Spectra of 1 with a Gaussian absorption line of this width in ln wavelength."""
    return np.stack([1 - depth * np.exp(-0.5 * (np.log(wave / line) / width) ** 2) for line in LINES])


def test_width_is_that_of_the_line_profile():
    """A Gaussian profile of R = 2500 is at half of its depth where the wavelength is off by a 5000th."""
    assert lines(np.array([7500 * np.exp(1 / 5000)]), broadening_width(np.inf, 2500), 1.0)[0, 0] == pytest.approx(0.5)
    assert broadening_width(5000, 5000) == broadening_width(2500, 5000) == 0
    np.testing.assert_allclose(np.hypot(broadening_width(5000, 3000), broadening_width(3000, 2000)), broadening_width(5000, 2000))


@pytest.mark.parametrize(("resolution", "atol"), [(4500, 1e-3), (2500, 1e-4), (1000, 1e-4)])
def test_a_gaussian_line_stays_one(resolution, atol):
    """But for the error of the splines, where the line is a few pixels wide."""
    width = broadening_width(GRID_RESOLUTION, resolution)
    broad = np.hypot(ONE, width)
    same, broadened = broaden(lines(WAVE, ONE, 0.8), [0.0, width])
    np.testing.assert_array_equal(same, lines(WAVE, ONE, 0.8))
    np.testing.assert_allclose(broadened, lines(WAVE, broad, 0.8 * ONE / broad), atol=atol)


@pytest.mark.parametrize("wave", [WAVE, np.geomspace(7000.0, 8900.0, 9_000)], ids=["pixels of the model", "other pixels"])
def test_observed_spectra_are_degraded(wave):
    """On the pixels of the model, with the errors of the sums of independent pixels."""
    width = broadening_width(8000, 2500)
    one, broad = broadening_width(np.inf, 8000), broadening_width(np.inf, 2500)
    matrix = overlaps(wave, WAVE, width)
    np.testing.assert_allclose(matrix.sum(axis=1).ravel(), overlaps(wave, WAVE).sum(axis=1).ravel())
    error = np.random.default_rng(0).uniform(0.1, 0.3, (3, len(wave)))
    degraded = resample(lines(wave, one, 0.8), error, np.ones((3, len(wave)), bool), matrix, WAVE)
    assert degraded.good.all()
    np.testing.assert_allclose(degraded.flux, lines(WAVE, broad, 0.8 * one / broad), atol=3e-3)  # pixels are as wide as lines
    near = np.abs(np.log(wave / WAVE[2000])) < 4 * width
    weight = np.exp(-0.5 * (np.log(wave[near] / WAVE[2000]) / width) ** 2) * np.diff(pixel_edges(wave))[near]
    expected = np.sqrt(np.sum((weight * error[:, near]) ** 2, axis=1)) / weight.sum()
    np.testing.assert_allclose(degraded.error[:, 2000], expected, rtol=0.03)


def test_a_gap_is_as_good_as_masked_pixels():
    """A pixel beside a gap does not count for the gap."""
    width = broadening_width(8000, 2500)
    flux, gap = lines(WAVE, broadening_width(np.inf, 8000), 0.8), (WAVE > 8201) & (WAVE < 8260)
    error, good = np.full(flux.shape, 0.1), np.broadcast_to(~gap, flux.shape)
    masked = resample(flux, error, good, overlaps(WAVE, WAVE, width), WAVE)
    there = ~gap
    cut = resample(flux[:, there], error[:, there], good[:, there], overlaps(WAVE[there], WAVE, width), WAVE)
    both = masked.good & cut.good
    both[:, np.flatnonzero(gap)[[0, -1]]] = False  # half of these pixels belongs to their neighbours
    assert both[:, there].mean() > 0.99
    np.testing.assert_allclose(cut.flux[both], masked.flux[both], atol=2e-3)


@pytest.mark.parametrize("width", [np.nan, -1e-4, np.inf])
def test_widths_that_are_none(width):
    with pytest.raises(InputError, match=f"width is {width}, expected a number of at least 0"):
        overlaps(WAVE, WAVE, width)


def test_simulated_spectra_of_a_lower_resolution():
    """They are those of the grid, degraded like observed ones."""
    sharp, blurred = (simulate_survey(jax.random.key(0), 20, resolution=resolution) for resolution in (GRID_RESOLUTION, 2500))
    matrix = overlaps(WAVE, WAVE, broadening_width(GRID_RESOLUTION, 2500))
    degraded = resample(np.asarray(sharp.flux), np.asarray(sharp.error), np.ones(sharp.flux.shape, bool), matrix, WAVE).flux
    degraded *= 0.5 / np.median(degraded, axis=1)[:, None]
    inner = slice(20, -20)  # beyond the first and the last pixel nothing is known
    np.testing.assert_allclose(blurred.flux[:, inner], degraded[:, inner], atol=3e-4)
    assert np.abs(np.asarray(blurred.flux) - np.asarray(sharp.flux)).max() > 0.02
    np.testing.assert_allclose(np.median(blurred.flux, axis=1), 0.5, rtol=1e-6)


def test_resolutions_that_the_grid_does_not_have():
    grid = load_grid()
    assert broaden_grid(grid, GRID_RESOLUTION) is grid
    for resolution in (5001, 100, np.nan):
        with pytest.raises(InputError, match=rf"resolution is {resolution}, expected 500 to 5000, that of the model grid"):
            broaden_grid(grid, resolution)
