"""The variance of each star's prediction by a mixture: ridge, spread between experts, and noise of the flux.

For a star with flux x and errors sigma, weights p_k and expert predictions f_k, the mixture f = sum_k p_k f_k has the variance

    sum_k p_k m_k                        misfit: error of an expert with noise-free spectra and exact coefficients
    + sum_k p_k s_k^2 (1 / n_k + h_k)    coefficients: their uncertainty, as in the closed-form predictive variance of a ridge
    + sum_k p_k (f_k - f)^2              spread between the experts
    + sum_j (df / dx_j)^2 sigma_j^2      noise of the flux, through experts, features and gate

s_k^2: residual variance of expert k. Its out-of-fold squared error in its own cell is s_k^2 (1 + 1 / n_k + mean h_k).
m_k: residual variance that flux noise does not explain (>= 0).
h_k: leverage x' (X'X + alpha I)^-1 x of the centred flux. ``ridge_leverage`` computes 1 / n_k + h_k exactly from the training
spectra. A model does not keep these: ``approximate_leverage`` describes X'X by R common directions and a diagonal.

The first three parts overlap, and the errors of the experts are not independent. So the plain sum is too large, for some stars
more than for others. ``fit_part_scales`` finds factors for the three parts by maximum likelihood, from the errors of held-out
stars. The noise of the flux is known and gets the factor 1.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, InputError, matmul
from moe_jax.core.cholesky import cholesky_solver
from moe_jax.core.convert import convert_arguments
from moe_jax.experts.alphas import require_positive
from moe_jax.experts.ridge import center, is_dual, kernel

N_DIRECTIONS = 16


class Leverage(NamedTuple):
    """(X'X + alpha I)^-1 of each expert: a diagonal D less a matrix of rank R, D basis' core basis D."""

    n_stars: Float[jax.Array, " K"]
    mean: Float[jax.Array, "K P"]  #: mean flux of each expert's training stars
    inverse_diagonal: Float[jax.Array, "K P"]
    basis: Float[jax.Array, "R P"]  #: orthonormal, common to all experts
    core: Float[jax.Array, "K R R"]


class FluxSums(NamedTuple):
    """Additive sums over the training stars of each expert, with x = flux - center."""

    n: Float[jax.Array, " K"]  #: number of stars
    x: Float[jax.Array, "K P"]
    xx: Float[jax.Array, "K P"]  #: x^2, pixel by pixel
    zz: Float[jax.Array, "K R R"]  #: z z', where z is the projection of x on the basis
    noise: Float[jax.Array, "K P"]  #: variance of the flux noise
    rest: Float[jax.Array, " P"]  #: (x - basis' z)^2 of the stars of all experts


class PredictiveVariance(NamedTuple):
    """The four parts of the variance of each star's prediction; see the module."""

    misfit: Float[jax.Array, " N"]
    coefficients: Float[jax.Array, " N"]
    spread: Float[jax.Array, " N"]
    noise: Float[jax.Array, " N"]

    def total(self, scales: Float[AnyArray, " 4"]) -> Float[jax.Array, " N"]:
        """Sum of the parts, each times its factor."""
        parts = jnp.stack(list(self), axis=1)
        return jnp.sum(parts * jnp.asarray(scales, parts.dtype)[None, :], axis=1)


@convert_arguments(finite=("x_train",))
def ridge_leverage(x_train: Float[AnyArray, "N P"], alpha: ArrayLike, x: Float[AnyArray, "M P"]) -> Float[jax.Array, " M"]:
    """1/n + x' (X'X + alpha I)^-1 x of centred data: the variance of a ridge's prediction in units of the residual variance.

    The result is exact. With fewer rows than columns the second term is (|x - X'a|^2 + alpha |a|^2) / alpha, where
    a = (X X' + alpha I)^-1 X x. This is a sum of squares, so no digits cancel in float32.

    Args:
        x_train: rows that the ridge was fitted to.
        alpha: penalty of the ridge, > 0.
        x: rows of new stars.

    Raises:
        InputError: shapes that disagree, or an alpha that is not positive.
    """
    require_positive(alpha)
    return _ridge_leverage(jnp.asarray(x_train), jnp.asarray(alpha, jnp.asarray(x_train).dtype), jnp.asarray(x))


@jax.jit
def _ridge_leverage(x_train: jax.Array, alpha: jax.Array, x: jax.Array) -> jax.Array:
    n = len(x_train)
    data = center(x_train, jnp.zeros(n, x_train.dtype), jnp.ones(n, x_train.dtype))
    new = x - data.x_mean[None, :]
    matrix, jitter = kernel(data)
    solve = cholesky_solver(matrix, alpha, jitter)
    if is_dual(data.x):
        a = solve(matmul(data.x, new.T))
        remainder = new - matmul(a.T, data.x)
        return 1.0 / n + jnp.sum(remainder**2, axis=1) / alpha + jnp.sum(a**2, axis=0)
    return 1.0 / n + jnp.sum(new.T * solve(new.T), axis=0)


@functools.partial(jax.jit, static_argnames="n_experts")
def sum_flux(
    flux: Float[AnyArray, "N P"],
    error: Float[AnyArray, "N P"],
    expert: Int[AnyArray, " N"],
    center: Float[AnyArray, " P"],
    basis: Float[AnyArray, "R P"],
    n_experts: int,
) -> FluxSums:
    """Sums over some training stars, without those of expert -1; add the sums of several parts.

    ``center`` is a flux near the mean of all stars, the R directions of the basis are orthonormal.
    """
    belongs = (expert[:, None] == jnp.arange(n_experts)[None, :]).astype(flux.dtype)
    x = flux - center[None, :]
    z = matmul(x, basis.T)
    rest = (x - matmul(z, basis)) * jnp.sum(belongs, axis=1, keepdims=True)
    return FluxSums(
        n=jnp.sum(belongs, axis=0),
        x=matmul(belongs.T, x),
        xx=matmul(belongs.T, x**2),
        zz=lax.map(lambda of_expert: matmul((z * of_expert[:, None]).T, z), belongs.T),
        noise=matmul(belongs.T, error**2),
        rest=jnp.sum(rest**2, axis=0),
    )


@jax.jit
def fit_leverage(
    sums: FluxSums,
    center: Float[AnyArray, " P"],
    basis: Float[AnyArray, "R P"],
    alpha: Float[AnyArray, " K"],
    n_stars: Float[AnyArray, " K"],
) -> Leverage:
    """Approximates (X'X + alpha I)^-1 by Woodbury's identity.

    X'X is kept exactly along the basis, as basis' A basis with A = root root'. Beside the basis only its diagonal is kept. With
    D = (diagonal + alpha)^-1 the inverse is D - D basis' core basis D, where core = root (root' basis D basis' root + I)^-1 root'.

    The sums are those of ``sum_flux`` over some, or all, of the training stars; they are scaled to the number of stars that each
    expert was fitted to.
    """

    def fit_one(expert: tuple[jax.Array, ...]) -> tuple[jax.Array, jax.Array, jax.Array]:
        n, x, xx, zz, alpha, n_stars = expert
        n = jnp.maximum(n, 1.0)
        mean = x / n
        z = matmul(basis, mean[:, None])[:, 0]
        along = (zz / n - jnp.outer(z, z)) * n_stars
        total = (xx / n - mean**2) * n_stars
        beside = jnp.maximum(total - jnp.sum(basis * matmul(along, basis), axis=0), 0.0)
        inverse = 1.0 / (beside + alpha)
        values, vectors = jnp.linalg.eigh(along)
        root = vectors * jnp.sqrt(jnp.maximum(values, 0.0))[None, :]
        inner = matmul(matmul(root.T, matmul(basis * inverse[None, :], basis.T)), root) + jnp.eye(len(root), dtype=root.dtype)
        core = matmul(root, jnp.linalg.solve(inner, root.T))
        return jnp.asarray(center) + mean, inverse, core

    mean, inverse, core = lax.map(fit_one, (sums.n, sums.x, sums.xx, sums.zz, alpha, n_stars))
    return Leverage(jnp.asarray(n_stars), mean, inverse, jnp.asarray(basis), core)


@jax.jit
def approximate_leverage(leverage: Leverage, flux: Float[AnyArray, "N P"]) -> Float[jax.Array, "N K"]:
    """1/n_k + h_k of each star and expert.

    The flux is taken from one center, that of all experts, so that each product reads it once, not once for each expert.
    """
    n_stars, mean, inverse, basis, core = leverage
    center = jnp.mean(mean, axis=0)
    x, shift = flux - center[None, :], mean - center[None, :]
    square = matmul(x**2, inverse.T) - 2 * matmul(x, (inverse * shift).T) + jnp.sum(inverse * shift**2, axis=1)[None, :]
    directions = inverse[:, None, :] * basis[None, :, :]  # (K, R, P)
    z = matmul(x, directions.reshape(-1, x.shape[1]).T).reshape(len(x), *core.shape[:2])
    z = jnp.moveaxis(z, 0, 1) - matmul(directions, shift[:, :, None])[:, None, :, 0]  # (K, N, R)
    along = jnp.sum(z * matmul(z, core), axis=2).T
    return 1.0 / n_stars[None, :] + jnp.maximum(square - along, 0.0)


@jax.jit
def residual_variance(
    mse: Float[AnyArray, " K"], leverage: Float[AnyArray, "N K"], expert: Int[AnyArray, " N"]
) -> Float[jax.Array, " K"]:
    """s_k^2: the out-of-fold squared error of each expert without the part that uncertain coefficients contribute.

    That part follows from 1/n_k + h_k of some stars and the expert of each (-1: none). An expert without stars keeps its ``mse``.
    """
    belongs = (expert[:, None] == jnp.arange(len(mse))[None, :]).astype(leverage.dtype)
    mean = jnp.sum(belongs * leverage, axis=0) / jnp.maximum(jnp.sum(belongs, axis=0), 1.0)
    return jnp.asarray(mse) / (1.0 + mean)


@jax.jit
def misfit_variance(
    residual_variance: Float[AnyArray, " K"], coef: Float[AnyArray, "K P"], noise: Float[AnyArray, "K P"]
) -> Float[jax.Array, " K"]:
    """m_k: residual variance that flux noise does not explain (>= 0), from its mean variance among each expert's stars."""
    return jnp.maximum(jnp.asarray(residual_variance) - jnp.sum(coef**2 * noise, axis=1), 0.0)


@jax.jit
def predictive_variance(
    weights: Float[AnyArray, "N K"],
    expert_predictions: Float[AnyArray, "N K"],
    leverage: Float[AnyArray, "N K"],
    residual_variance: Float[AnyArray, " K"],
    misfit: Float[AnyArray, " K"],
    gradient: Float[AnyArray, "N P"],
    error: Float[AnyArray, "N P"],
) -> PredictiveVariance:
    """The four parts of the variance of each star's mixture.

    Args:
        weights: p_k.
        expert_predictions: f_k.
        leverage: 1/n_k + h_k.
        residual_variance: s_k^2.
        misfit: m_k.
        gradient: derivative of the mixture in the flux.
        error: standard deviation of the flux noise.
    """
    weights, expert_predictions = jnp.asarray(weights), jnp.asarray(expert_predictions)
    mixture = jnp.sum(weights * expert_predictions, axis=1, keepdims=True)
    return PredictiveVariance(
        jnp.sum(weights * misfit[None, :], axis=1),
        jnp.sum(weights * residual_variance[None, :] * leverage, axis=1),
        jnp.sum(weights * (expert_predictions - mixture) ** 2, axis=1),
        jnp.sum((gradient * error) ** 2, axis=1),
    )


@convert_arguments("variance", "residual")
def fit_part_scales(variance: Float[AnyArray, "N 4"], residual: Float[AnyArray, " N"]) -> Float[np.ndarray, " 4"]:
    """Factors (>= 0) of the parts of the variance, by maximum likelihood of normal errors; that of the noise is 1.

    A part that is 0 for all stars gets the factor 1.

    Args:
        variance: the parts of ``PredictiveVariance``, in its order, for held-out stars.
        residual: true less predicted values of the same stars.

    Raises:
        InputError: shapes that disagree, parts that are negative, or numbers that are not finite.
    """
    variance, residual = np.asarray(variance, np.float64), np.asarray(residual, np.float64)
    if not (np.isfinite(variance).all() and np.isfinite(residual).all() and (variance >= 0).all()):
        raise InputError("variance or residual hold numbers that are negative or not finite, expected variances and finite errors")
    parts, noise, squared = variance[:, :-1], variance[:, -1], residual**2
    mean, typical = np.maximum(parts.mean(axis=0), np.finfo(float).tiny), max(squared.mean(), np.finfo(float).tiny)

    def negative_log_likelihood(log_share: np.ndarray) -> tuple[float, np.ndarray]:
        by_part = parts / mean * np.exp(log_share)
        total = np.maximum(by_part.sum(axis=1) + noise, 1e-12 * typical)
        slope = (1.0 / total - squared / total**2)[:, None] * by_part
        return float(np.mean(np.log(total) + squared / total)), slope.mean(axis=0)

    start = np.full(len(mean), np.log(typical / len(mean)))
    bounds = [(start[0] - 12.0, start[0] + 4.0)] * len(mean)
    optimum = scipy.optimize.minimize(negative_log_likelihood, start, jac=True, method="L-BFGS-B", bounds=bounds)
    return np.append(np.where(parts.any(axis=0), np.exp(optimum.x) / mean, 1.0), 1.0)
