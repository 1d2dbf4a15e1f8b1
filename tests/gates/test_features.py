import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.decomposition import PCA

import moe_jax
from moe_jax import FEATURE_NAMES, InputError
from moe_jax.core.pca import fit_pca, fit_pca_scatter
from moe_jax.gates.features import LINE_WINDOWS, line_features, line_pixels, raw_features
from moe_jax.spectra.pixels import WAVE


def by_hand(flux, wave):
    """The line features of one star, spelled out."""
    values = {}
    for name, (low, high) in LINE_WINDOWS.items():
        sides = ((wave >= low - 15) & (wave < low)) | ((wave > high) & (wave <= high + 15))
        ratio = flux[(wave >= low) & (wave <= high)] / np.median(flux[sides])
        values[f"depth_{name}"], values[f"EW_{name}"] = 1 - ratio.min(), np.sum(1 - ratio)
    values["EW_CaT"] = values["EW_8498"] + values["EW_8542"] + values["EW_8662"]
    return [values[name] for name in FEATURE_NAMES[:9]]


def test_lines_by_hand(noisy_flux, dtype):
    flux = noisy_flux[:20].astype(dtype)
    ours = jax.jit(lambda flux: line_features(flux, line_pixels(WAVE)))(flux)
    expected = np.array([by_hand(star.astype(float), WAVE) for star in flux])
    np.testing.assert_allclose(ours, expected, rtol=1e-4 if dtype == np.float32 else 1e-10, atol=1e-5)


def test_there_are_thirteen(noisy_flux):
    model = moe_jax.fit_features(jax.random.key(0), noisy_flux, WAVE)
    assert moe_jax.compute_features(model, noisy_flux[:5], WAVE).shape == (5, 13)
    assert len(FEATURE_NAMES) == 13


@pytest.mark.slow
def test_components_against_scikit_learn(noisy_flux):
    x = noisy_flux[:, ::3]
    ours = fit_pca(jax.random.key(0), x, 4)
    theirs = PCA(4, svd_solver="covariance_eigh").fit(x.astype(float))
    cosines = np.abs(np.sum(np.asarray(ours.components) * theirs.components_, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-5)
    np.testing.assert_allclose(ours.mean, theirs.mean_, atol=1e-5)
    assert (np.asarray(ours.components)[np.arange(4), np.argmax(np.abs(ours.components), axis=1)] > 0).all()


def test_components_from_the_scatter_matrix(noisy_flux):
    x = noisy_flux[:500, ::8].astype(float)
    theirs = PCA(4, svd_solver="full").fit(x)
    scatter = (x - x.mean(axis=0)).T @ (x - x.mean(axis=0))
    ours = fit_pca_scatter(jax.random.key(0), jnp.asarray(x.mean(axis=0)), jnp.asarray(scatter), 4)
    cosines = np.abs(np.sum(np.asarray(ours.components) * theirs.components_, axis=1))
    np.testing.assert_allclose(cosines, 1, atol=1e-4)


def test_the_key_does_not_show(noisy_flux):
    first, other = (fit_pca(jax.random.key(k), noisy_flux[:500], 4) for k in (0, 1))
    np.testing.assert_allclose(first.components, other.components, atol=1e-4)


def test_standardised_by_the_training_stars_only(noisy_flux):
    model = moe_jax.fit_features(jax.random.key(0), noisy_flux[:2000], WAVE)
    train = moe_jax.compute_features(model, noisy_flux[:2000], WAVE)
    np.testing.assert_allclose(np.mean(train, axis=0), 0, atol=1e-3)
    np.testing.assert_allclose(np.std(train, axis=0), 1, atol=1e-3)
    one = moe_jax.compute_features(model, noisy_flux[2500:2501], WAVE)
    many = moe_jax.compute_features(model, noisy_flux[2400:2600], WAVE)
    np.testing.assert_allclose(one[0], many[100], atol=1e-4)
    raw = raw_features(noisy_flux[2500:2501], line_pixels(WAVE), model.pca)
    np.testing.assert_allclose(one, (raw - model.mean[None, :]) / model.scale[None, :], rtol=1e-6)


def test_a_star_without_continuum_has_no_lines():
    features = line_features(jnp.zeros((2, len(WAVE))), line_pixels(WAVE))
    assert not np.any(features)


@pytest.mark.parametrize(
    ("wave", "message"),
    [
        (np.linspace(8100, 8700, 12), "found 12 pixels, expected at least 13"),
        (np.linspace(7100, 8600, 4096), "line 8662"),
        (np.linspace(8300, 8850, 4096), "line Na"),
        (np.linspace(7100, 8850, 40), "at least two pixels"),
    ],
)
def test_bad_wavelengths(wave, message):
    with pytest.raises(InputError, match=message) as caught:
        line_pixels(wave, "a.h5: spectrumdataset/wave")
    assert str(caught.value).startswith("a.h5: spectrumdataset/wave: found")


def test_too_many_components():
    with pytest.raises(InputError, match="n_components is 7, expected 1 to 5"):
        fit_pca(jax.random.key(0), np.zeros((5, 20)), 7)
