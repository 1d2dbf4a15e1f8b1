"""What is judged of a fit, against brute force; how well the fits do is tested with ``predict``."""

from types import SimpleNamespace

import numpy as np
import pytest

from experiments.pipeline.spoilings import SPOILINGS, TRIED, Exposure
from moe_jax.apply.robust import (
    BLENDED,
    LIMITS,
    POOR_FIT,
    RARE,
    SCALES,
    RobustFit,
    add_prior,
    allow_rare,
    expected_chi2,
    fit_robustly,
    grow,
    in_calcium_cores,
    in_telluric_bands,
    local_chi2,
    local_excess,
    outside_cells,
    scale_chi2,
)
from moe_jax.spectra.label_fit import fit_labels
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.resample import MaskedSpectra, overlaps
from moe_jax.spectra.simulate import LABEL_LATTICE


def test_chi2_at_two_scales(rng):
    residual, good = rng.normal(size=(3, 4096)), rng.random((3, 4096)) > 0.1
    residual[1] += 0.5  # hangs together
    found = scale_chi2(np.where(good, residual, np.nan), good)
    for i, scale in enumerate(SCALES):
        sums = []
        for start in range(0, 4096, scale):
            own = residual[1, start : start + scale][good[1, start : start + scale]]
            if len(own) > scale / 2:
                sums.append(own.sum() ** 2 / len(own))
        assert found[1, i] == pytest.approx(np.mean(sums))
        np.testing.assert_allclose(found[[0, 2], i], 1, atol=0.3)


def test_chi2_of_regions(rng):
    residual, good = rng.normal(size=(2, 4096)), rng.random((2, 4096)) > 0.1
    residual[0, :1024] *= 3
    good[1, 256:512] = False
    found, square = local_chi2(residual, good), residual**2
    for row in (0, 1):
        own = square[row, :256][good[row, :256]]
        expected = (own.sum() / square[row, good[row]].mean() + 32) / (len(own) + 32)
        np.testing.assert_allclose(found[row, 0], expected)
    assert found[1, 1] == 1
    assert found[0, 0] > 5 * found[0, -1]
    inside = np.arange(4096) < 512
    expected = [square[i, inside & good[i]].mean() / square[i, ~inside & good[i]].mean() for i in (0, 1)]
    np.testing.assert_allclose(local_excess(residual, good, inside), expected)


@pytest.mark.slow
def test_what_can_be_put_right_is(small_survey, rng):
    """Seven bright stars: log g moves by little where the fit finds what is wrong, or they are flagged."""
    flux, error = (np.asarray(array, np.float64) for array in (small_survey.flux, 0.2 * small_survey.error))
    labels = np.stack([np.asarray(getattr(small_survey.labels, name)) for name in ("T_eff", "log_g", "M_H")], axis=1)
    inside = (np.abs(labels - [5000, 3, -0.75]) < [800, 1.5, 1.0]).all(axis=1)
    rows = np.flatnonzero(inside & (np.median(flux / error, axis=1) > 20))[:7]
    exposure = Exposure(flux[rows], error[rows] * rng.normal(size=(7, 4096)), error[rows])

    def fit(case):
        spoiled = (SPOILINGS | TRIED)[case](np.random.default_rng(3), exposure)
        observed = spoiled.flux + spoiled.noise
        return fit_robustly(MaskedSpectra(observed, spoiled.error, np.ones(observed.shape, bool)), WAVE)

    plain = fit("untouched")
    assert not any(flag.any() for flag in plain.flags().values())
    for case in ("two arms that differ by 10 %", "lines of water and oxygen", "errors understated by 4 in the blue half"):
        found = fit(case)
        moved = np.abs(found.labels[:, 1] - plain.labels[:, 1])
        handled = (moved < 3 * found.error[:, 1]) & (found.error[:, 1] < 3 * plain.error[:, 1])
        assert handled.sum() >= 4, case
        if case == "lines of water and oxygen":
            in_bands = (found.used[:, in_telluric_bands()] == 0).all(axis=1)
            assert in_bands.sum() >= 5
            assert (found.n_masked[in_bands] >= in_telluric_bands().sum()).all()
        if case == "errors understated by 4 in the blue half":
            # Scaled errors are those of the untouched spectra, but for a common factor, which is in chi2.
            assert (np.abs(found.chi2 - 7) < 2).all()  # the mean of 16 and 1, less what stood out of the first fit
            np.testing.assert_allclose(found.error[:, 1], plain.error[:, 1], rtol=0.2)
            assert (moved < plain.error[:, 1]).all()
    assert fit("half of another star at 200 km/s").flags()[BLENDED].sum() >= 6
    assert fit("resolution 1500").flags()[POOR_FIT].all()
    filled = fit("calcium triplet filled in")
    cores = in_calcium_cores(filled.velocity)
    assert (filled.used[cores] == 0).mean() > 0.6
    assert (plain.used[cores] == 0).mean() < 0.2
    # A scale is found where every fourth pixel is masked.
    observed, most = exposure.flux + exposure.noise, np.arange(4096) % 4 > 0
    gaps = fit_robustly(MaskedSpectra(np.where(most, observed, 0), exposure.error, np.tile(most, (7, 1))), WAVE)
    assert gaps.fitted.all()
    np.testing.assert_allclose(np.median(gaps.flux[:, most], axis=1), 0.5, rtol=0.02)
    # What no explanation puts right stays as it was fitted first.
    waves = exposure.flux * (1 + 0.1 * np.sin(np.arange(4096) / 25)) + exposure.noise
    wavy = fit_robustly(MaskedSpectra(waves, exposure.error, np.ones(waves.shape, bool)), WAVE)
    assert (wavy.scale_chi2 > LIMITS).all()
    first = fit_labels(wavy.flux, wavy.flux_error)
    np.testing.assert_array_equal(wavy.model, first.flux)
    widening = first.chi2 * wavy.scale_chi2.max(axis=1)
    _, covariance = add_prior(first.labels, first.covariance * widening[:, None, None])
    np.testing.assert_allclose(wavy.plain_error, np.sqrt(covariance[:, 1, 1]), rtol=1e-4)


def test_a_poor_fit_is_one_that_matters():
    """Residuals that hang together at one scale count where log g is uncertain, or a label at the edge."""
    scale_chi2 = np.array([[1.0, 1.0], [2.0, 1.0], [1.0, 2.0], [2.0, 2.0], [2.0, 2.0], [1.0, 1.0], [1.0, 1.0], [1.0, 1.0]])
    plain_error = np.array([0.6, 0.6, 0.6, 0.4, 0.4, 0.6, 0.4, 0.4])
    at_edge, too_broad, chi2 = np.eye(8, dtype=bool)[4], np.eye(8, dtype=bool)[6], np.where(np.arange(8) == 7, 200.0, 1.0)
    fields = dict.fromkeys(RobustFit._fields, np.zeros(8)) | {"fitted": np.ones(8, bool), "scale_chi2": scale_chi2}
    fields |= {"plain_error": plain_error, "at_edge": at_edge, "too_broad": too_broad, "chi2": chi2}
    assert list(RobustFit(**fields).flags()[POOR_FIT]) == [False, True, True, False, True, False, True, True]


def test_noise_that_resampling_shares(rng):
    """Noise on pixels twice as wide as those of the grid, resampled and averaged."""
    wave = np.arange(7090.0, 8861.0, 0.9)
    overlap = overlaps(wave, WAVE)
    noise = (overlap @ rng.normal(size=(len(wave), 400)) / np.asarray(overlap.sum(axis=1))).T
    residual = noise / np.sqrt(np.mean(noise**2))
    found = scale_chi2(residual, np.ones(residual.shape, bool)).mean(axis=0)
    np.testing.assert_allclose(expected_chi2(overlap), found, rtol=0.03)
    np.testing.assert_allclose(expected_chi2(overlaps(WAVE, WAVE)), 1, rtol=1e-6)


@pytest.mark.slow
def test_a_common_factor_on_the_errors(small_survey, rng):
    """It changes chi2 alone, or the errors mean nothing and there is no answer."""
    star = np.asarray(small_survey.flux[:1]) + 0.02 * rng.normal(size=(1, 4096))
    error = 0.02 * np.array([[1], [1e-4], [1e3], [1e7], [1e-9]]) * np.ones(star.shape)
    fit = fit_robustly(MaskedSpectra(np.repeat(star, 5, axis=0), error, np.ones(error.shape, bool)), WAVE)
    assert fit.fitted.tolist() == [True, True, True, False, False]
    np.testing.assert_allclose(fit.error[1:3], fit.error[[0, 0]], rtol=0.05)


def test_the_prior_is_that_of_normal_labels(rng):
    """For normal labels and normal errors the posterior mean beats the fit, and its covariance is that of its errors."""
    low, high = np.array([LABEL_LATTICE[name][:2] for name in ("T_eff", "log_g", "M_H", "a_M")]).T
    unit = (high - low) / np.sqrt(12)
    root = rng.normal(size=(4, 4)) * 0.7
    covariance = root @ root.T * np.outer(unit, unit)
    true = (low + high) / 2 + rng.normal(size=(20_000, 4)) * unit
    fitted = true + rng.normal(size=(20_000, 4)) @ root.T * unit
    labels, posterior = add_prior(fitted, np.repeat(covariance[None], 20_000, axis=0))
    error = (labels - true) / unit
    np.testing.assert_allclose(np.cov(error.T), posterior[0] / np.outer(unit, unit), atol=0.03)
    assert (error.std(axis=0) < ((fitted - true) / unit).std(axis=0)).all()


def test_features_grow_and_single_pixels_do_not():
    out = np.zeros((1, 50), bool)
    out[0, [3, 20, 21, 22, 23, 24, 40, 41]] = True
    grown = np.flatnonzero(grow(out)[0])
    assert list(grown) == [3, *range(15, 30), 40, 41]


def test_rare_nuisances_are_averaged_over(rng):
    """Against a mean over draws: half of the stars have no constant, the others one of a normal distribution."""
    n, width, error, slope = 400_000, RARE[0], 0.07, 3.0
    constant = np.where(rng.random(n) < 0.5, 0.0, rng.normal(0, width, n))
    found = constant + rng.normal(0, error, n)
    fit = SimpleNamespace(
        rare=np.array([[0.1, 0.0]]),
        rare_error=np.array([[error, 1e9]]),
        rare_slope=np.array([[[0, slope, 0, 0], [0, 0, 0, 0]]], float),
        rare_correlation=np.eye(2)[None],
        labels=np.array([[5000.0, 3.0, -1.0, 0.0]]),
        covariance=np.eye(4)[None] * 1e-4,
    )
    labels, covariance = allow_rare(fit, np.ones(1), np.array(RARE[:2]))
    alike = constant[np.abs(found - 0.1) < 0.005]
    assert labels[0, 1] - 3.0 == pytest.approx(slope * alike.mean(), abs=0.01)
    assert covariance[0, 1, 1] - 1e-4 == pytest.approx(slope**2 * alike.var(), rel=0.05)


def test_rare_nuisances_that_look_alike(rng):
    """Against a mean over draws, where what a constant and emission do to the spectrum correlates by .8."""
    n, width, error, slope = 4_000_000, np.array(RARE)[[0, 2]], np.array([0.07, 0.1]), np.array([3.0, -1.0])
    true = np.where(rng.random((n, 2)) < 0.5, 0.0, rng.normal(0, width, (n, 2)))
    correlation = np.array([[1.0, 0.8], [0.8, 1.0]])
    # A single step along one of the two also finds a part of the other.
    noise = rng.multivariate_normal([0, 0], correlation, n)
    found = error * ((true / error) @ correlation + noise)
    fit = SimpleNamespace(
        rare=np.array([[0.1, 0.12]]),
        rare_error=error[None],
        rare_slope=np.array([[[0, slope[0], 0, 0], [0, slope[1], 0, 0]]]),
        rare_correlation=correlation[None],
        labels=np.array([[5000.0, 3.0, -1.0, 0.0]]),
        covariance=np.eye(4)[None] * 1e-4,
    )
    labels, covariance = allow_rare(fit, np.ones(1), width)
    shift = (true @ slope)[(np.abs(found - fit.rare) < 0.015).all(axis=1)]
    assert len(shift) > 2_000
    assert labels[0, 1] - 3.0 == pytest.approx(shift.mean(), abs=0.015)
    assert covariance[0, 1, 1] - 1e-4 == pytest.approx(shift.var(), rel=0.08)


def test_stars_outside_the_cells():
    """At the lower edge of [M/H]: in the middle of it one half, far on either side all or nothing, and never beyond the grid."""
    labels = np.array([[5000.0, 3.0, m, 0.0] for m in (-2.0, -2.45, -1.0, 0.7)] + [[6000.0, 3.0, -1.0, 0.0]])
    error = np.array([[100.0, 0.2, 0.05, 0.1]] * 5)
    np.testing.assert_allclose(outside_cells(labels, error), [0.5, 1, 0, 1, 0], atol=1e-3)
