"""Experts for the mixture itself: given the gate's weights, all K ridges together in closed form.

Given weights p_ik, the mixture f_i = sum_k p_ik (x_i' w_k + b_k) is linear in the experts. So the experts that minimise

    sum_i (y_i - f_i)^2 + alpha sum_k |w_k|^2

are one ridge regression on the features [p_1 x, ..., p_K x], whose kernel is (P P') o (X X'), with K unpenalised intercepts on
the columns of P. The closed form solves for N unknowns, whatever K and P are. The pixels are centred first: with an unpenalised
intercept in every expert, that changes nothing but rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, matmul
from moe_jax.core.cholesky import cholesky_solver
from moe_jax.core.convert import convert_arguments
from moe_jax.experts.alphas import require_positive
from moe_jax.experts.ridge import Ridge


@convert_arguments(finite=("x", "y", "weights"))
def fit_mixture_experts(
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    weights: Float[AnyArray, "N K"],
    alpha: ArrayLike,
    *,
    kernel: Float[AnyArray, "N N"] | None = None,
) -> Ridge:
    """The K stacked experts that minimise the mixture's objective, in closed form: one Cholesky factor of an N x N kernel.

    With Q = (P P') o (X X') + alpha I, the equations Q a + P b = y and P' a = 0 give the dual vector a and the intercepts b.
    The coefficients are w_k = X' (p_k o a).

    Args:
        x: features (noisy flux).
        y: target.
        weights: of the gate, p_ik.
        alpha: penalty, > 0.
        kernel: x x', if it is known, as fits to parts of the same rows can share it. Then x is not centred here: give it centred.

    Raises:
        InputError: shapes that disagree, or an alpha that is not positive.
    """
    require_positive(alpha)
    x = jnp.asarray(x)
    y, weights, alpha = (jnp.asarray(array, x.dtype) for array in (y, weights, alpha))
    return _fit_mixture_experts(x, y, weights, alpha, None if kernel is None else jnp.asarray(kernel, x.dtype))


@jax.jit
def _fit_mixture_experts(x: jax.Array, y: jax.Array, weights: jax.Array, alpha: jax.Array, kernel: jax.Array | None) -> Ridge:
    mean = jnp.mean(x, axis=0) if kernel is None else jnp.zeros(x.shape[1], x.dtype)
    centred = x - mean[None, :]
    kernel = matmul(centred, centred.T) if kernel is None else kernel
    solve = cholesky_solver(matmul(weights, weights.T) * kernel, alpha)
    solved = solve(jnp.concatenate([weights, y[:, None]], axis=1))
    # The intercept of an expert without weight is not determined; least squares takes the smallest.
    intercept = jnp.linalg.lstsq(matmul(weights.T, solved[:, :-1]), matmul(weights.T, solved[:, -1:]))[0][:, 0]
    a = solved[:, -1] - matmul(solved[:, :-1], intercept[:, None])[:, 0]
    coef = matmul((weights * a[:, None]).T, centred)
    return Ridge(coef, intercept - matmul(coef, mean[:, None])[:, 0])
