import numpy as np
import pytest

from moe_jax import InputError
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.resample import fill_masked, good_medians, overlaps, pixel_edges, resample


def brute_force(flux, wave, target):
    """Flux in target pixels from a step function that is integrated on 200,000 points."""
    edges, wanted = pixel_edges(wave), pixel_edges(target)
    fine = np.linspace(wanted[0], wanted[-1], 200_001)
    middle = 0.5 * (fine[1:] + fine[:-1])
    inside = (middle >= edges[0]) & (middle < edges[-1])
    steps = np.where(inside, flux[np.clip(np.searchsorted(edges, middle, side="right") - 1, 0, len(flux) - 1)], 0.0)
    which = np.searchsorted(wanted, middle, side="right") - 1
    return np.bincount(which, steps) / np.bincount(which, inside)


@pytest.mark.parametrize("n", [37, 80, 211])
def test_against_brute_force(rng, n):
    wave, target = np.sort(rng.uniform(0, 100, 80)), np.linspace(10, 85, n)
    flux = rng.uniform(0.5, 1.5, 80)
    good = np.ones((1, 80), bool)
    ours = resample(flux[None], np.ones((1, 80)), good, overlaps(wave, target), target)
    assert ours.good.all()
    np.testing.assert_allclose(ours.flux[0], brute_force(flux, wave, target), atol=5e-3)


def test_the_integral_is_conserved(rng):
    wave = np.linspace(7000, 9000, 3_000)
    edges = np.linspace(*pixel_edges(wave)[[0, -1]], 1_778)
    target = 0.5 * (edges[1:] + edges[:-1])
    flux = rng.uniform(0, 1, (4, 3_000))
    new = resample(flux, np.ones_like(flux), np.ones(flux.shape, bool), overlaps(wave, target), target)
    np.testing.assert_allclose((new.flux * np.diff(edges)).sum(axis=1), (flux * np.diff(pixel_edges(wave))).sum(axis=1), rtol=1e-12)


def test_a_constant_stays_one_and_the_same_grid_changes_nothing(rng):
    wave = np.cumsum(rng.uniform(0.5, 1.5, 60))
    flux, good = rng.normal(size=(2, 60)), np.ones((2, 60), bool)
    same = resample(flux, np.ones_like(flux), good, overlaps(wave, wave), wave)
    np.testing.assert_allclose(same.flux, flux, rtol=1e-12)
    np.testing.assert_allclose(same.error, 1.0, rtol=1e-12)
    target = np.linspace(wave[3], wave[-3], 41)
    constant = resample(np.full_like(flux, 7.0), np.ones_like(flux), good, overlaps(wave, target), target)
    np.testing.assert_allclose(constant.flux, 7.0, rtol=1e-12)


def test_errors_are_those_of_the_mean_of_independent_pixels():
    wave, target = np.arange(40) + 0.5, np.arange(10) * 4 + 2.0
    error = np.full((1, 40), 0.3)
    new = resample(np.ones((1, 40)), error, np.ones((1, 40), bool), overlaps(wave, target), target)
    np.testing.assert_allclose(new.error, 0.15, rtol=1e-12)


def test_masked_pixels_count_for_nothing():
    wave, target = np.arange(40) + 0.5, np.arange(10) * 4 + 2.0
    flux, good = np.ones((1, 40)), np.ones((1, 40), bool)
    flux[0, [5, 8, 9, 10]] = [1e9, np.nan, np.inf, -1e9]
    good[0, [5, 8, 9, 10]] = False
    new = resample(flux, np.ones((1, 40)), good, overlaps(wave, target), target)
    np.testing.assert_array_equal(new.good[0], [True, True, False, *[True] * 7])  # 8, 9, 10: three quarters of the third
    np.testing.assert_allclose(new.flux[0, new.good[0]], 1.0)


def test_filled_pixels_are_near_the_truth(noisy_flux, survey, rng):
    import jax

    from moe_jax.core.pca import fit_pca

    pca = fit_pca(jax.random.key(0), noisy_flux[:1_000], 16)
    flux, clean = noisy_flux[2_000:2_020], np.asarray(survey.flux)[2_000:2_020]
    good = rng.uniform(size=flux.shape) > 0.1
    spoilt = np.where(good, flux, np.nan)
    filled = np.asarray(fill_masked(spoilt, good, pca.mean, pca.components))
    np.testing.assert_array_equal(filled[good], flux[good])
    off = (filled - clean)[~good]
    mean_only = (np.asarray(pca.mean)[None] - clean)[~good]
    assert off.std() < 0.2 * mean_only.std()


def test_bad_wavelengths():
    with pytest.raises(InputError, match="wave holds 3 wavelengths, expected at least 2, increasing"):
        overlaps(np.array([1.0, 3.0, 2.0]), WAVE)
    with pytest.raises(InputError, match="target holds 1 wavelengths"):
        overlaps(WAVE, np.array([1.0]))


def test_medians_of_good_pixels(rng):
    """In the precision of the flux, whether or not a star has no pixel: so no star depends on those beside it."""
    flux, good = rng.normal(size=(4, 101)).astype(np.float32), rng.random((4, 101)) > 0.2
    good[3] = False
    medians = good_medians(flux, good)
    assert medians.dtype == np.float32
    assert list(medians[:3]) == [np.median(row[used]) for row, used in zip(flux[:3], good[:3], strict=True)]
    assert np.isnan(medians[3])
