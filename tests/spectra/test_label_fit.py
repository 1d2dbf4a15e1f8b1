import jax
import numpy as np
import pytest
from numpy.polynomial import chebyshev
from scipy.interpolate import CubicSpline
from scipy.optimize import least_squares

import moe_jax
from moe_jax import InputError, fit_labels, interpolate_grid, load_grid
from moe_jax.spectra.label_model import LIGHT_SPEED, calcium_cores
from moe_jax.spectra.pixels import WAVE

pytestmark = pytest.mark.slow

NOISE = 0.2
UNITS = np.array([100.0, 0.1, 0.1, 0.1])


@pytest.fixture(scope="module")
def stars():
    """Labels, noisy flux and errors of 64 stars that a spectrum says something about, away from the edges of the grid."""
    survey = moe_jax.simulate_survey(jax.random.key(5), 200, label_sampling="uniform")
    labels = np.stack([np.asarray(getattr(survey.labels, name)) for name in ("T_eff", "log_g", "M_H", "a_M")], axis=1)
    inside = (np.abs(labels - [4875.0, 3.0, -0.5, 0.125]) < [1000.0, 1.7, 1.0, 0.3]).all(axis=1)
    rows = np.flatnonzero(inside)[:64]
    assert len(rows) == 64
    error = NOISE * np.asarray(survey.error)[rows]
    noisy = np.asarray(moe_jax.add_noise(jax.random.key(6), survey.flux, survey.error, NOISE))[rows]
    return labels[rows], noisy, error


@pytest.fixture(scope="module")
def fit(stars):
    return fit_labels(*stars[1:])


def spoil(flux, velocity, slope):
    """Spectra (rows) at a velocity, with a slope of the continuum."""
    moved = CubicSpline(WAVE, flux, axis=1, extrapolate=True)(WAVE / (1 + velocity / LIGHT_SPEED))
    return (moved * (1 + slope * np.linspace(-0.5, 0.5, len(WAVE)))).astype(np.float32)


def test_scipy_finds_the_same_minimum(stars, fit):
    """Independent model: the whole grid in float64, shifted by a spline; velocity and polynomial are parameters like others."""
    _, flux, error = stars
    position = np.linspace(-1, 1, len(WAVE))
    for star in np.flatnonzero(fit.broadening == 0)[:2]:
        sigma = error[star].astype(np.float64)

        def residual(x, star=star, sigma=sigma):
            with jax.enable_x64(True):
                norm, log_continuum = map(np.asarray, interpolate_grid(load_grid(), np.asarray(x[None, :4] * UNITS)))
            moved = CubicSpline(WAVE, norm[0] * np.exp(log_continuum[0]))(WAVE / (1 + x[4] / LIGHT_SPEED))
            return ((flux[star] - moved * chebyshev.chebval(position, x[5:])) / sigma)[fit.good[star]]

        ours = np.concatenate([fit.labels[star] / UNITS, [fit.velocity[star]], fit.continuum[star]])
        theirs = least_squares(residual, ours, x_scale="jac")
        deviation = np.sqrt(np.diag(np.linalg.inv(theirs.jac.T @ theirs.jac)))
        # 128 components are not the whole grid: a fraction of the error, and of 1 in chi2.
        np.testing.assert_array_less(np.abs(ours - theirs.x)[:5], 0.3 * deviation[:5])
        np.testing.assert_array_less(np.sum(residual(ours) ** 2), 2 * theirs.cost + 0.2)
        np.testing.assert_allclose(np.sqrt(np.diag(fit.covariance[star])), deviation[:4] * UNITS, rtol=0.1)
        np.testing.assert_allclose(fit.velocity_error[star], deviation[4], rtol=0.05)


def test_intervals_cover(stars, fit):
    """64 stars: a share of 68 % lies between 50 and 84 % but once in 300 times, for each of the labels."""
    labels, *_ = stars
    deviation = np.sqrt(np.einsum("nii->ni", fit.covariance))
    covered = (np.abs(fit.labels - labels) < deviation).mean(axis=0)
    assert ((covered > 0.5) & (covered < 0.86)).all(), covered
    assert np.abs(fit.velocity / fit.velocity_error).max() < 4.5
    assert np.abs(fit.chi2 - 1).max() < 0.1
    assert fit.n_masked.sum() <= 2
    assert fit.converged.mean() > 0.95


@pytest.mark.parametrize("velocity", [-430.0, 100.0])
def test_a_velocity_and_a_slope_change_nothing(stars, fit, velocity):
    labels, flux, error = stars
    spoiled = fit_labels(spoil(flux, velocity, 0.2), error)
    np.testing.assert_allclose(spoiled.velocity, velocity, atol=8)
    scatter = [np.sqrt(np.mean((one.labels - labels) ** 2, axis=0)) for one in (spoiled, fit)]
    np.testing.assert_array_less(scatter[0], 1.2 * scatter[1])


def test_pixels_that_stand_out_are_masked(stars, fit, rng):
    labels, flux, error = stars
    hit = rng.random(flux.shape) < 0.002
    spoiled = fit_labels(np.where(hit, flux + rng.exponential(50, flux.shape) * error + 10 * error, flux).astype(np.float32), error)
    assert (~spoiled.good[hit]).mean() > 0.99
    assert (~spoiled.good[~hit]).mean() < 1e-3
    scatter = [np.sqrt(np.mean((one.labels - labels) ** 2, axis=0)) for one in (spoiled, fit)]
    np.testing.assert_array_less(scatter[0], 1.2 * scatter[1])


def test_blocks_of_pixels_that_stand_out_are_masked(stars, fit):
    labels, flux, error = stars
    band, dead = (WAVE > 7594) & (WAVE < 7700), (WAVE > 8200) & (WAVE < 8240)
    spectra = np.where(dead, 0, np.where(band, 0.6 * flux, flux)).astype(np.float32)
    spoiled = fit_labels(spectra, error)
    assert spoiled.good[:, band | dead].mean() < 0.01
    assert spoiled.good[:, ~(band | dead)].mean() > 0.97
    scatter = np.sqrt(np.mean((spoiled.labels - labels) ** 2, axis=0))
    stated = [np.sqrt(np.mean(np.einsum("nii->ni", one.covariance), axis=0)) for one in (spoiled, fit)]
    np.testing.assert_array_less(scatter, 1.2 * stated[0])
    np.testing.assert_array_less(stated[0], 1.3 * stated[1])
    few = [fit_labels(each, error, n_continuum=5) for each in (spectra, flux)]
    assert few[0].good[:, band | dead].mean() < 0.01
    assert few[0].good[:, ~(band | dead)].mean() > 0.97
    scatter = [np.sqrt(np.mean((one.labels - labels) ** 2, axis=0)) for one in few]
    np.testing.assert_array_less(scatter[0], 1.3 * scatter[1])


def test_an_added_constant_is_found(stars):
    _, flux, error = (array[:20] for array in stars)
    one, other = (fit_labels(spectra, error, n_continuum=5, additive=True) for spectra in (flux, flux + np.float32(0.1)))
    deviation = np.sqrt(np.einsum("nii->ni", one.covariance))
    np.testing.assert_array_less(np.abs(other.labels - one.labels), 0.3 * deviation)
    np.testing.assert_allclose(other.constant - one.constant, 0.1, atol=0.02)


def test_what_the_residuals_say_is_what_a_fit_finds(stars, fit):
    """A linear step towards a constant leads where the fit with a constant ends; good spectra have neither that nor a stretch."""
    _, flux, error = stars
    few = fit_labels(flux, error, n_continuum=5)
    for good in (few, fit):
        assert np.abs(good.rare / good.rare_error).max() < 4.5
        np.testing.assert_allclose((good.rare / good.rare_error).std(axis=0), 1, atol=0.35)
    certain = few.rare_error[:, 0] < 0.02
    fitted = fit_labels(flux[certain] + np.float32(0.02), error[certain], n_continuum=5, additive=True)
    step = fit_labels(flux[certain] + np.float32(0.02), error[certain], n_continuum=5)
    difference = np.abs(fitted.constant - step.rare[:, 0])
    assert np.median(difference) < 0.005
    assert np.mean(difference < 0.02) > 0.9  # far from the fit's start a linear step is not exact
    shifted = step.labels + step.rare[:, :1] * step.rare_slope[:, 0]
    deviation = np.sqrt(np.einsum("nii->ni", fitted.covariance))
    assert np.median(np.abs(shifted - fitted.labels) / deviation, axis=0).max() < 0.3
    assert not fitted.rare[:, 0].any()  # a constant that was fitted is not rare
    assert not fitted.rare_correlation[:, 0].any()


@pytest.mark.parametrize("additive", [False, True])
def test_a_part_of_the_range_is_fitted_as_well(additive):
    """Half of the pixels of bright stars, in float32: chi2 is that of noise, and every variance is positive."""
    survey = moe_jax.simulate_survey(jax.random.key(8), 64)
    flux = np.asarray(survey.flux)
    error = np.tile(np.median(flux, axis=1, keepdims=True) / 100, (1, len(WAVE))).astype(np.float32)
    noisy = flux + error * np.random.default_rng(0).normal(size=flux.shape).astype(np.float32)
    found = fit_labels(noisy, error, np.tile(np.arange(len(WAVE)) > 2048, (64, 1)), additive=additive)
    assert np.median(found.chi2) < 1.02
    assert (np.einsum("nii->ni", found.covariance) > 0).all()


def test_what_says_nothing_of_a_constant_has_finite_results(stars):
    """70 pixels, and spectra without lines."""
    _, flux, error = (array[:8] for array in stars)
    few = np.broadcast_to((np.arange(len(WAVE)) >= 100) & (np.arange(len(WAVE)) < 170), flux.shape)
    for spectra, errors, good in ((flux, error, few), (np.full_like(flux, 0.5), error, None)):
        found = fit_labels(spectra, errors, good, additive=True)
        assert all(np.isfinite(leaf).all() for leaf in found)


def test_a_stretch_is_found(stars, fit):
    """Wavelengths that are wrong by 10 km/s at the red end, and by -10 km/s at the blue one."""
    _, flux, error = stars
    wrong = WAVE / (1 + 10 / LIGHT_SPEED * np.linspace(-1, 1, len(WAVE)))
    stretched = fit_labels(CubicSpline(WAVE, flux, axis=1, extrapolate=True)(wrong).astype(np.float32), error)
    assert np.median(stretched.rare[:, 1] - fit.rare[:, 1]) == pytest.approx(10, abs=1.5)


def test_emission_in_the_calcium_triplet_is_found(stars, fit):
    _, flux, error = stars
    filled = fit_labels(flux + np.float32(0.03) * calcium_cores(len(WAVE)).astype(np.float32), error)
    assert np.median(filled.rare[:, 2] - fit.rare[:, 2]) == pytest.approx(0.03, abs=0.005)


def test_a_second_star_is_seen(stars, fit):
    """Pairs of bright stars that differ; the same star twice is none."""
    labels, flux, error = stars
    bright = np.flatnonzero(np.median(flux / error, axis=1) > 40)
    hot, cool = bright[labels[bright, 0] > 5000][:6], bright[labels[bright, 0] < 4800][:6]
    n = min(len(hot), len(cool))
    pairs = fit_labels(0.5 * (flux[hot[:n]] + flux[cool[:n]]), np.float32(np.sqrt(0.5)) * error[hot[:n]])
    assert np.median(pairs.blend_gain) > 15
    assert np.median(pairs.second_gain) < 8.7  # lines at the same velocity do not count
    assert np.quantile(fit.blend_gain, 0.9) < 13


def test_a_second_star_at_another_velocity_is_seen(stars, fit):
    """The same star again, 300 km/s away, is a second one; at the same velocity it is none."""
    _, flux, error = stars
    bright = np.flatnonzero(np.median(flux / error, axis=1) > 40)[:6]
    apart = CubicSpline(WAVE, flux[bright], axis=1, extrapolate=True)(WAVE / (1 + 300 / LIGHT_SPEED)).astype(np.float32)
    pairs = fit_labels(0.5 * (flux[bright] + apart), np.float32(np.sqrt(0.5)) * error[bright])
    assert np.median(pairs.second_gain) > 50
    assert np.quantile(fit.second_gain, 0.9) < 19


def test_the_unit_of_the_flux_does_not_matter(stars, fit):
    _, flux, error = (array[:4] for array in stars)
    tiny = fit_labels(flux * np.float32(1e-17), error * np.float32(1e-17))
    np.testing.assert_array_less(np.abs(tiny.labels - fit.labels[:4]), 0.2 * np.sqrt(np.einsum("nii->ni", tiny.covariance)))
    np.testing.assert_allclose(tiny.continuum[:, 0], 1e-17 * fit.continuum[:4, 0], rtol=1e-2)


def test_a_spectrum_without_pixels_leaves_others_alone(stars, fit):
    _, flux, error = (array[:3] for array in stars)
    one = fit_labels(flux, error, np.arange(3)[:, None] != np.ones(flux.shape))
    assert list(one.converged) == [True, False, True]
    assert not one.good[1].any()
    np.testing.assert_allclose(one.labels[[0, 2]], fit.labels[[0, 2]], rtol=0.02)


def test_pixels_without_an_error_are_not_used(stars):
    _, flux, error = (array[:4] for array in stars)
    spoiled, unknown, good = flux.copy(), error.copy(), np.ones(flux.shape, bool)
    spoiled[:, 100:200], unknown[:, 1000:1010], good[:, 2000:2020] = np.nan, np.inf, False
    one = fit_labels(spoiled, unknown, good)
    assert not one.good[:, np.r_[100:200, 1000:1010, 2000:2020]].any()
    assert np.isfinite(one.labels).all()
    assert (one.n_masked == 0).all()


def test_the_model_of_the_flux_follows_the_spectrum(stars, fit):
    _, flux, error = stars
    residual = (flux - fit.flux) / error
    np.testing.assert_allclose((np.where(fit.good, residual, 0) ** 2).sum(axis=1) / fit.good.sum(axis=1), fit.chi2, rtol=5e-3)


def test_bad_input():
    flux = np.ones((2, 4096), np.float32)
    with pytest.raises(InputError, match=r"flux has shape \(2, 100\), expected \(N, 4096\)"):
        fit_labels(flux[:, :100], flux[:, :100])
    with pytest.raises(InputError, match=r"error has shape \(1, 4096\), expected \(2, 4096\)"):
        fit_labels(flux, flux[:1])
    with pytest.raises(InputError, match=r"velocity has shape \(3,\), expected \(2,\)"):
        fit_labels(flux, flux, velocity=np.zeros(3))
    with pytest.raises(InputError, match="n_continuum is 0, expected a whole number, at least 1"):
        fit_labels(flux, flux, n_continuum=0)
    with pytest.raises(InputError, match="flux holds values of type <U32, expected real numbers"):
        fit_labels(flux.astype(str), flux)
    with pytest.raises(InputError, match="good holds values of type float64, expected True and False"):
        fit_labels(flux, flux, np.full(flux.shape, 0.5))
    with pytest.raises(InputError, match="flux has 4096 masked values, expected none"):
        fit_labels(np.ma.array(flux, mask=[[True], [False]] * np.ones(flux.shape, bool)), flux)


def test_counts_of_photons_and_a_known_velocity(stars):
    """Whole numbers: the velocity was cut to whole km/s as the flux is whole."""
    flux, error = (np.round(1e4 * array[:1]) for array in stars[1:])
    fits = [fit_labels(flux.astype(kind), error.astype(kind), velocity=[12.7]) for kind in (np.float32, np.int32)]
    np.testing.assert_array_equal(fits[0].labels, fits[1].labels)
    assert fits[1].velocity[0] == np.float32(12.7)


def test_a_star_of_which_nothing_is_known_has_no_labels(stars):
    flux, error = (np.array(array[:3]) for array in stars[1:])
    error[0], flux[1] = 0.0, np.nan
    fit = fit_labels(flux, error)
    assert np.isnan(fit.labels[:2]).all()
    assert np.isnan(fit.chi2[:2]).all()
    assert not fit.converged[:2].any()
    assert np.isfinite(fit.labels[2]).all()
    observed = fit.flux
    assert np.isnan(observed[:2]).all()
    assert np.isfinite(observed[2]).all()
