import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.gaussian_process import GaussianProcessRegressor
from sklearn.gaussian_process.kernels import ConstantKernel, DotProduct

from moe_jax import InputError, ridge_leverage
from moe_jax.apply.uncertainty import (
    approximate_leverage,
    fit_leverage,
    fit_part_scales,
    misfit_variance,
    predictive_variance,
    residual_variance,
    sum_flux,
)
from moe_jax.core.pca import fit_pca


@pytest.mark.parametrize("shape", [(30, 80), (80, 30)], ids=["kernel form", "primal form"])
def test_leverage_is_the_variance_of_a_gaussian_process(rng, dtype, shape):
    x, new, alpha = rng.normal(size=shape), rng.normal(size=(7, shape[1])), 2.5
    ours = ridge_leverage(x.astype(dtype), alpha, new.astype(dtype))
    mean = x.mean(axis=0)
    kernel = ConstantKernel(1 / alpha, "fixed") * DotProduct(0.0, "fixed")
    process = GaussianProcessRegressor(kernel, alpha=1.0, optimizer=None).fit(x - mean, np.zeros(len(x)))
    theirs = process.predict(new - mean, return_std=True)[1] ** 2 + 1 / len(x)
    np.testing.assert_allclose(ours, theirs, rtol=1e-4 if dtype == np.float32 else 1e-10)
    assert ours.dtype == dtype


def test_leverage_is_the_scatter_of_refitted_predictions(rng, x64):
    """Brute force: with coefficients drawn from the prior and unit noise, the error of a ridge's prediction has variance h."""
    n, p, alpha, n_draws = 20, 8, 3.0, 20_000
    x, new = rng.normal(size=(n, p)), rng.normal(size=(1, p))
    coef = rng.normal(size=(n_draws, p)) / np.sqrt(alpha)
    y = coef @ x.T + rng.normal(size=(n_draws, n))
    centred, offset = x - x.mean(axis=0), new[0] - x.mean(axis=0)
    fitted = (y - y.mean(axis=1, keepdims=True)) @ centred @ np.linalg.inv(centred.T @ centred + alpha * np.eye(p))
    error = fitted @ offset + y.mean(axis=1) - coef @ new[0]
    # The variance has a relative standard error of sqrt(2 / 20,000) = 1 %.
    np.testing.assert_allclose(ridge_leverage(x, alpha, new)[0], error.var(), rtol=0.05)


def test_leverage_of_a_low_rank_and_a_diagonal_is_exact(rng, x64):
    """Where X'X is what the approximation takes it for, up to what the diagonal leaves out, so is the result."""
    p, r, n, k = 40, 5, 4_000, 2
    basis = np.linalg.qr(rng.normal(size=(p, r)))[0].T
    cell = rng.integers(-1, k, n)
    flux = 1.0 + rng.normal(size=(n, r)) @ basis * 3 + rng.normal(size=(n, p)) * rng.uniform(0.1, 0.5, p)
    error, center, alpha = rng.uniform(0.1, 0.5, (n, p)), np.full(p, 0.9), np.array([2.0, 50.0])
    parts = [sum_flux(flux[s], error[s], cell[s], center, basis, k) for s in (slice(1500), slice(1500, None))]
    sums = jax.tree.map(jnp.add, *parts)
    counts = np.bincount(cell[cell >= 0])
    np.testing.assert_allclose(sums.n, counts)
    np.testing.assert_allclose(sums.noise[1], (error[cell == 1] ** 2).sum(axis=0))
    own = flux[cell >= 0] - center
    np.testing.assert_allclose(sums.rest, ((own - own @ basis.T @ basis) ** 2).sum(axis=0))
    new = flux[:50]
    for i, factor in ((0, 1.0), (1, 1.0), (1, 3.0)):  # of an expert that was fitted to more stars than were summed
        leverage = fit_leverage(sums, center, basis, alpha, factor * counts)
        centred = flux[cell == i] - flux[cell == i].mean(axis=0)
        scatter = factor * centred.T @ centred
        beside = np.maximum(np.diag(scatter - basis.T @ (basis @ scatter @ basis.T) @ basis), 0)
        model = basis.T @ (basis @ scatter @ basis.T) @ basis + np.diag(beside) + alpha[i] * np.eye(p)
        x = new - flux[cell == i].mean(axis=0)
        straight = np.einsum("np,pq,nq->n", x, np.linalg.inv(model), x) + 1 / (factor * counts[i])
        np.testing.assert_allclose(approximate_leverage(leverage, new)[:, i], straight, rtol=1e-8)


def test_leverage_of_real_spectra_follows_the_exact_one(noisy_flux, survey):
    """The model keeps 16 directions and a diagonal: in float32, on spectra, stars are ordered as by the exact leverage."""
    train, new = noisy_flux[:800], noisy_flux[800:900]
    pca = fit_pca(jax.random.key(0), train, 16)
    sums = sum_flux(train, np.ones_like(train), np.zeros(800, int), pca.mean, pca.components, 1)
    leverage = fit_leverage(sums, pca.mean, pca.components, np.array([1.0], "f4"), np.array([800.0], "f4"))
    ours, exact = np.asarray(approximate_leverage(leverage, new))[:, 0], np.asarray(ridge_leverage(train, 1.0, new))
    assert np.corrcoef(np.argsort(np.argsort(ours)), np.argsort(np.argsort(exact)))[0, 1] > 0.95
    assert 0.4 < np.median(ours / exact) < 1.1


def test_variances_by_hand():
    weights, predictions = np.array([[0.25, 0.75]]), np.array([[1.0, 3.0]])
    parts = predictive_variance(
        weights,
        predictions,
        np.array([[0.5, 0.1]]),
        np.array([0.2, 0.4]),
        np.array([0.1, 0.3]),
        np.array([[1.0, -2.0]]),
        np.array([[0.5, 0.25]]),
    )
    np.testing.assert_allclose(parts.misfit, [0.25 * 0.1 + 0.75 * 0.3], rtol=1e-6)
    np.testing.assert_allclose(parts.coefficients, [0.25 * 0.2 * 0.5 + 0.75 * 0.4 * 0.1], rtol=1e-6)
    np.testing.assert_allclose(parts.spread, [0.25 * 1.5**2 + 0.75 * 0.5**2], rtol=1e-6)
    np.testing.assert_allclose(parts.noise, [0.25 + 0.25], rtol=1e-6)
    np.testing.assert_allclose(parts.total(np.ones(4)), np.sum(parts, axis=0), rtol=1e-6)
    np.testing.assert_allclose(parts.total(np.array([2.0, 0.0, 0.0, 1.0])), 2 * parts.misfit + parts.noise, rtol=1e-6)
    np.testing.assert_allclose(misfit_variance(np.array([1.0, 0.1]), np.ones((2, 2)), np.full((2, 2), 0.2)), [0.6, 0.0], rtol=1e-6)
    mse, leverage = np.array([1.0, 2.0, 3.0]), np.array([[0.5, 9.0, 9.0], [0.3, 9.0, 9.0], [9.0, 1.0, 9.0], [9.0, 9.0, 9.0]])
    found = residual_variance(mse, leverage, np.array([0, 0, 1, -1]))
    np.testing.assert_allclose(found, [1 / 1.4, 1.0, 3.0], rtol=1e-6)


def test_factors_of_the_parts(rng):
    """Alone, a part's is the mean of r^2 / v. Several: those that the errors were drawn with, also where one does not count."""
    parts, true = rng.uniform(0.0, 1.0, (20_000, 4)) ** 3, np.array([0.5, 0.0, 2.0, 1.0])
    residual = rng.normal(size=20_000) * np.sqrt(parts @ true)
    alone = np.stack([parts[:, 0] + 0.1, 0 * residual], axis=1)
    np.testing.assert_allclose(fit_part_scales(alone, residual), [np.mean(residual**2 / alone[:, 0]), 1.0], rtol=1e-5)
    np.testing.assert_allclose(fit_part_scales(parts, residual), true, rtol=0.05, atol=0.02)
    np.testing.assert_allclose(
        fit_part_scales(parts * [1e-6, 1.0, 1e3, 1.0], residual), true * [1e6, 1, 1e-3, 1], rtol=0.05, atol=0.02
    )
    assert fit_part_scales(np.concatenate([np.zeros((20_000, 1)), parts], axis=1), residual)[0] == 1
    for wrong in (parts * -1, parts * np.nan):
        with pytest.raises(InputError, match="expected variances and finite errors"):
            fit_part_scales(wrong, residual)
    with pytest.raises(InputError, match="residual has shape"):
        fit_part_scales(parts, residual[:, None])


def test_stars_of_other_pixels():
    with pytest.raises(InputError, match=r"x has shape \(1, 3\), expected \(M, 2\) beside x_train \(3, 2\)"):
        ridge_leverage(np.ones((3, 2)), 1.0, np.ones((1, 3)))


@pytest.mark.parametrize("alpha", [0.0, -1.0, np.nan])
def test_a_penalty_that_is_none(alpha):
    with pytest.raises(InputError, match="expected positive numbers"):
        ridge_leverage(np.ones((3, 2)), alpha, np.ones((1, 2)))
