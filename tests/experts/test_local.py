"""Local linear experts in closed form, against NumPy, SciPy and scikit-learn in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.special import eval_legendre
from scipy.stats import multivariate_normal
from sklearn.linear_model import Ridge

from moe_jax.core.arrays import InputError
from moe_jax.experts.local import (
    PENALTY,
    LocalExperts,
    fit_flux_model,
    fit_local,
    fit_local_experts,
    median_error,
    polynomial_terms,
    predict_local,
    predict_local_experts,
    project_flux,
)


@pytest.fixture(scope="module")
def survey():
    """Stars whose 40 pixels are curved functions of two labels, with noise that differs between pixels and stars."""
    rng = np.random.default_rng(3)
    labels = rng.uniform(-1, 1, (2_000, 2))
    directions = rng.normal(size=(4, 40))
    curved = np.column_stack([labels[:, 0], labels[:, 1], labels[:, 0] * labels[:, 1], np.sin(2 * labels[:, 1])])
    noise, template = rng.uniform(0.2, 2.0, 2_000), rng.uniform(0.5, 1.5, 40)
    error = noise[:, None] * template
    return labels, 5.0 + curved @ directions + error * rng.normal(size=error.shape), error, noise, template


def test_the_terms_are_products_of_scipys_legendre_polynomials(survey):
    x = survey[0][:50]
    terms = np.asarray(polynomial_terms(jnp.asarray(x, jnp.float32), 3))
    powers = [(1, 0), (0, 1), (2, 0), (1, 1), (0, 2), (3, 0), (2, 1), (1, 2), (0, 3)]
    products = [np.prod([np.sqrt(2 * n + 1) * eval_legendre(n, x[:, j]) for j, n in enumerate(p)], axis=0) for p in powers]
    np.testing.assert_allclose(terms, np.transpose(products), rtol=1e-5, atol=1e-5)


def test_with_all_components_the_flux_model_is_scikit_learns_weighted_ridge(survey):
    labels, flux, _, noise, template = survey
    terms, used = np.asarray(polynomial_terms(labels, 2), np.float64), np.arange(2_000) % 5 > 0
    arrays = (jnp.asarray(array, jnp.float32) for array in (terms, flux, noise, template))
    model = fit_flux_model(*arrays, 5, jnp.asarray(used, jnp.float32))
    weight = used / noise**2
    peer = Ridge(alpha=PENALTY * weight.sum()).fit(terms, flux, sample_weight=weight)
    model = jax.tree.map(np.asarray, model)
    clean = model.mean + model.template * (((terms - model.term_mean) @ model.coef) @ model.components)
    np.testing.assert_allclose(clean, peer.predict(terms), atol=2e-4)
    np.testing.assert_allclose(model.components @ model.components.T, np.eye(5), atol=1e-5)


def test_the_noise_of_the_components_is_the_level_of_the_star(survey):
    labels, flux, error, noise, template = survey
    arrays = (jnp.asarray(a, jnp.float32) for a in (flux, noise, template))
    model = fit_flux_model(polynomial_terms(labels, 3), *arrays, 3, np.ones_like(noise))
    again = flux + error * np.random.default_rng(5).normal(size=error.shape)
    change = np.asarray(project_flux(model, jnp.asarray(again)) - project_flux(model, jnp.asarray(flux))) / noise[:, None]
    np.testing.assert_allclose(np.cov(change.T), np.eye(3), atol=0.12)  # 4 standard errors of a variance from 2,000 stars


def test_the_experts_are_the_moments_of_their_cells(survey):
    rng = np.random.default_rng(0)
    h, y, cell = rng.normal(size=(300, 3)), rng.normal(size=300), rng.integers(-1, 4, 300)
    experts = fit_local_experts(jnp.asarray(h), jnp.asarray(y), jnp.asarray(cell), 4, 3)
    for k in range(4):
        joint = np.cov(np.column_stack([h, y])[cell == k].T, ddof=0)
        axes = np.asarray(experts.axes[k])
        np.testing.assert_allclose(axes.T @ np.diag(experts.variance[k]) @ axes, joint[:3, :3], atol=1e-5)
        np.testing.assert_allclose(axes.T @ experts.covariance[k], joint[:3, 3], atol=1e-5)
        np.testing.assert_allclose(experts.y[k], y[cell == k].mean(), atol=1e-5)
        np.testing.assert_allclose(experts.y_variance[k], joint[3, 3], rtol=1e-4)
        np.testing.assert_allclose(np.exp(experts.log_count[k]), (cell == k).sum(), rtol=1e-5)


@pytest.mark.parametrize(("dtype", "r"), [("float32", 2), ("float64", 2), ("float64", 1), ("float64", 3)])
def test_predictions_are_bayes_theorem_in_full_covariances(dtype, r):
    """Also at a noise that is small beside the spread of the spectra, where float32 could lose digits."""
    rng = np.random.default_rng(1)
    k, c, n = 5, 6, 300
    axes = np.linalg.qr(rng.normal(size=(k, c, r)))[0].transpose(0, 2, 1)
    mean, variance = 3 * rng.normal(size=(k, c)), rng.uniform(0.1, 1.0, (k, r))
    y, covariance, count = rng.normal(size=k), rng.normal(size=(k, r)), rng.integers(5, 50, k)
    y_variance = np.sum(covariance**2 / variance, axis=1) + rng.uniform(0.1, 1.0, k)
    chosen, noise = rng.integers(0, k, n), np.geomspace(0.05, 3.0, n)
    z = mean[chosen] + noise[:, None] * rng.normal(size=(n, c))
    expected, variances = [], []
    for star, s in zip(z, noise, strict=True):
        totals = [axes[i].T @ np.diag(variance[i]) @ axes[i] + s**2 * np.eye(c) for i in range(k)]
        log_weight = np.array([multivariate_normal.logpdf(star, mean[i], totals[i]) + np.log(count[i]) for i in range(k)])
        weight = np.exp(log_weight - log_weight.max())
        by_expert = [y[i] + axes[i].T @ covariance[i] @ np.linalg.solve(totals[i], star - mean[i]) for i in range(k)]
        expected.append(np.sum(weight * by_expert) / weight.sum())
        full = [axes[i].T @ covariance[i] for i in range(k)]
        within = [y_variance[i] - full[i] @ np.linalg.solve(totals[i], full[i]) for i in range(k)]
        variances.append(np.sum(weight * (within + (np.array(by_expert) - expected[-1]) ** 2)) / weight.sum())
    with jax.enable_x64(dtype == "float64"):
        arrays = [jnp.asarray(a, dtype) for a in (mean, axes, variance, y, y_variance, covariance, np.log(count), z, noise)]
        predicted = predict_local_experts(LocalExperts(*arrays[:7]), *arrays[7:])
        assert predicted.y.dtype == predicted.sigma.dtype == dtype
    np.testing.assert_allclose(predicted.y, expected, atol={"float32": 5e-3, "float64": 1e-9}[dtype])
    np.testing.assert_allclose(predicted.sigma, np.sqrt(variances), atol={"float32": 5e-3, "float64": 1e-9}[dtype])


def test_a_fit_recovers_the_label_of_new_stars(survey):
    labels, flux, error, *_ = (np.asarray(a, np.float32) for a in survey)
    train, new = slice(0, 1_600), slice(1_600, 2_000)
    mixture = fit_local(flux[train], error[train], labels[train], labels[train, 1], n_cells=64, degree=4, n_components=(1, 3))
    predicted, sigma = map(np.asarray, predict_local(mixture, flux[new], median_error(error[new])))
    linear = Ridge(1.0).fit(flux[train], labels[train, 1]).predict(flux[new])
    mse, linear_mse = np.mean((predicted - labels[new, 1]) ** 2), np.mean((linear - labels[new, 1]) ** 2)
    assert mixture.model.coef.shape[1] == 3  # one component cannot hold two labels
    assert mse < 0.8 * linear_mse
    assert 0.6 < np.mean(np.abs(predicted - labels[new, 1]) < sigma) < 0.76


def test_without_noise_predictions_are_the_limit_of_a_small_one(survey):
    labels, flux, error, *_ = (np.asarray(a, np.float32) for a in survey)
    mixture = fit_local(flux, error, labels, labels[:, 1], n_cells=16, degree=2, n_components=(3,))
    limit, *others = (predict_local(mixture, flux[:9], np.full(9, noise, np.float32)) for noise in (1e-6, 1e-22, 0.0))
    for other in others:
        np.testing.assert_allclose(other.y, limit.y, atol=1e-4)
        np.testing.assert_allclose(other.sigma, limit.sigma, atol=1e-4)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"error": np.ones((30, 3), np.float32)}, r"error has shape \(30, 3\), expected \(30, 4\)"),
        ({"error": np.zeros((30, 4), np.float32)}, "error holds 0, expected positive numbers"),
        ({"n_cells": 16}, "found 30 stars for 16 cells"),
    ],
)
def test_bad_input_is_named(change, message):
    arrays = {"flux": np.ones((30, 4), np.float32), "error": np.ones((30, 4), np.float32)}
    arguments = arrays | {"labels": np.ones((30, 2), np.float32), "y": np.ones(30, np.float32), "n_cells": 2} | change
    with pytest.raises(InputError, match=message):
        fit_local(**arguments)


def test_input_that_would_teach_nothing_is_refused():
    rng = np.random.default_rng(0)
    flux, error, labels = rng.normal(size=(40, 64)), np.full((40, 64), 0.1), rng.normal(size=(40, 2))
    for change, message in (
        ({"flux": np.where(np.eye(40, 64) > 0, np.nan, flux)}, "flux holds numbers that are not finite"),
        ({"error": np.where(np.arange(64) == 3, 0.0, error)}, "error holds 0, expected positive numbers"),
        ({"flux": 1e-17 * flux, "error": 1e-17 * error}, "divide flux and error by a constant"),
        ({"n_components": ()}, "expected at least 1"),
        ({"n_cells": 4.0}, "n_cells is 4.0, expected a whole number, at least 1"),
        ({"degree": "2"}, "degree is '2', expected a whole number"),
        ({"n_components": (3.0,)}, "n_components is 3.0, expected a whole number"),
        ({"seed": -1}, "seed is -1, expected a whole number, at least 0"),
        ({"labels": labels[:, :0]}, r"labels has shape \(40, 0\), expected at least 1"),
        ({"error": np.where(np.arange(64) == 3, 1e30, error)}, "error holds 1e.30, expected numbers below 1e18 times"),
    ):
        given = {"flux": flux, "error": error, "labels": labels, "y": labels[:, 0], "n_cells": 4, "degree": 1} | change
        with pytest.raises(InputError, match=message):
            fit_local(**given)


@pytest.mark.filterwarnings("ignore:Number of distinct clusters")
def test_fewer_different_labels_than_cells_leave_no_empty_cell():
    """An empty cell has the weight exp(-inf), which no file of a model may hold."""
    rng = np.random.default_rng(0)
    labels = np.tile(rng.uniform(size=(3, 2)), (40, 1))
    flux = 1 + labels @ rng.normal(size=(2, 20)) + 0.01 * rng.normal(size=(120, 20))
    mixture = fit_local(flux, np.full_like(flux, 0.01), labels, labels[:, 0], n_cells=8, degree=1, n_components=2)
    assert mixture.experts.y.shape == (3,)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(mixture))
