"""Experts for the mixture itself: given the gate's weights, all K ridges together in closed form, or by back-fitting.

Given weights p_ik, the mixture f_i = sum_k p_ik (x_i' w_k + b_k) is linear in the experts. So the experts that minimise

    sum_i (y_i - f_i)^2 + alpha sum_k |w_k|^2

are one ridge regression on the features [p_1 x, ..., p_K x], whose kernel is (P P') o (X X'), with K unpenalised intercepts on
the columns of P. The closed form solves for N unknowns. Back-fitting (Hastie & Tibshirani 1990, section 4.4; block
Gauss-Seidel) minimises over one expert at a time, which is a ridge with the sample weights p_ik^2. It needs one P x P factor
for each expert and converges to the same solution, and the objective never rises. The pixels are centred first: with an
unpenalised intercept in every expert, that changes nothing but rounding.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError, matmul, require_same_length
from moe_jax.core.cholesky import cho_solve, shifted_cholesky
from moe_jax.core.convert import convert_arguments
from moe_jax.experts.alphas import require_positive
from moe_jax.experts.cross_validation import held_rows
from moe_jax.experts.ridge import Ridge, jitter, predict_ridge


class Backfit(NamedTuple):
    """Experts fitted to a mixture by back-fitting, and without each fold."""

    experts: Ridge  #: fitted to all stars; coef (K, P) and intercept (K,)
    by_fold: Ridge  #: fitted without each fold; (folds, K, P) and (folds, K), empty without folds
    out_of_fold: Float[jax.Array, "N K"]  #: all experts' predictions for each star without its fold; of ``experts`` without folds
    objective: Float[jax.Array, " S"]  #: of the fit to all stars, at the start and after each sweep; NaN after the last sweep
    n_sweeps: Int[jax.Array, ""]
    converged: Bool[jax.Array, ""]  #: whether the last sweep lowered the objective by less than the tolerance


def mixture_objective(
    experts: Ridge, x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], weights: Float[AnyArray, "N K"], alpha: ArrayLike
) -> Float[jax.Array, ""]:
    """sum_i (y_i - sum_k p_ik (x_i' w_k + b_k))^2 + alpha sum_k |w_k|^2."""
    mixture = jnp.sum(jnp.asarray(weights) * predict_ridge(experts, x), axis=1)
    return jnp.sum((jnp.asarray(y) - mixture) ** 2) + alpha * jnp.sum(experts.coef**2)


@convert_arguments(finite=("x", "y", "weights"))
def fit_mixture_experts(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], weights: Float[AnyArray, "N K"], alpha: ArrayLike
) -> Ridge:
    """The experts that minimise the mixture's objective, in closed form: one Cholesky factor of an N x N kernel.

    With Q = (P P') o (X X') + alpha I, the equations Q a + P b = y and P' a = 0 give the dual vector a and the intercepts b.
    The coefficients are w_k = X' (p_k o a).

    Args:
        x: features (noisy flux).
        y: target.
        weights: of the gate, p_ik.
        alpha: penalty, > 0.

    Returns:
        K stacked experts.

    Raises:
        InputError: shapes that disagree, or an alpha that is not positive.
    """
    return _fit_mixture_experts(*_checked(x, y, weights, alpha))


@jax.jit
def _fit_mixture_experts(x: jax.Array, y: jax.Array, weights: jax.Array, alpha: jax.Array) -> Ridge:
    mean = jnp.mean(x, axis=0)
    centred = x - mean[None, :]
    factor = shifted_cholesky(matmul(weights, weights.T) * matmul(centred, centred.T), alpha)
    solved = cho_solve(factor, jnp.concatenate([weights, y[:, None]], axis=1))
    # The intercept of an expert without weight is not determined; least squares takes the smallest.
    intercept = jnp.linalg.lstsq(matmul(weights.T, solved[:, :-1]), matmul(weights.T, solved[:, -1:]))[0][:, 0]
    a = solved[:, -1] - matmul(solved[:, :-1], intercept[:, None])[:, 0]
    coef = matmul((weights * a[:, None]).T, centred)
    return Ridge(coef, intercept - matmul(coef, mean[:, None])[:, 0])


@convert_arguments("folds", finite=("x", "y", "weights"))
def backfit_mixture_experts(
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    weights: Float[AnyArray, "N K"],
    alpha: ArrayLike,
    *,
    folds: Int[AnyArray, " N"] | None = None,
    max_sweeps: int = 100,
    tolerance: float = 1e-5,
) -> Backfit:
    """The experts that minimise the mixture's objective, by back-fitting; with ``folds`` also those without each fold.

    All fits run side by side and share the products with X. The Gram matrices of the fits are sums over those of the folds.

    Args:
        x: features (noisy flux).
        y: target.
        weights: of the gate, p_ik; fixed.
        alpha: penalty, > 0.
        folds: fold of each star, concrete; at least two.
        max_sweeps: most passes over the experts.
        tolerance: the sweeps end when one lowers every fit's objective by no more than this fraction of it.

    Returns:
        Experts, out-of-fold predictions, and the objective by sweep.

    Raises:
        InputError: shapes that disagree, an alpha that is not positive, fewer than two folds.
    """
    arrays = _checked(x, y, weights, alpha)
    if folds is None:
        rows, included = np.arange(len(y))[None, :], np.ones((1, 1))
    else:
        require_same_length(x=x, folds=folds)
        rows = held_rows(folds)
        included = np.concatenate([1.0 - np.eye(len(rows)), np.ones((1, len(rows)))])
    dtype = arrays[0].dtype
    return _backfit(*arrays, jnp.asarray(rows), jnp.asarray(included, dtype), jnp.asarray(tolerance, dtype), max_sweeps)


class _Blocks(NamedTuple):
    """What one expert's update needs, for each of J fits. The weights are s = p^2."""

    factor: jax.Array  # (J, P, P) Cholesky factor of the scatter of x about its weighted mean, plus alpha I
    sx: jax.Array  # (J, P) sum of s x
    s: jax.Array  # (J,) sum of s


class _State(NamedTuple):
    coef: jax.Array  # (J, K, P)
    intercept: jax.Array  # (J, K)
    residual: jax.Array  # (J, N), 0 for the stars that a fit holds out
    objective: jax.Array  # (J,)
    history: jax.Array
    sweep: jax.Array
    done: jax.Array


@functools.partial(jax.jit, static_argnames="max_sweeps")
def _backfit(
    x: jax.Array,
    y: jax.Array,
    weights: jax.Array,
    alpha: jax.Array,
    rows: jax.Array,  # (folds, n_held) of each fold, padded with N
    included: jax.Array,  # (J, folds) 1 for the folds that a fit is made to; the last fit is made to all
    tolerance: jax.Array,
    max_sweeps: int,
) -> Backfit:
    (n, p), k = x.shape, weights.shape[1]
    n_fits = len(included)
    mean = jnp.mean(x, axis=0)
    x = x - mean[None, :]
    y_mean = jnp.mean(y)
    fold = jnp.zeros(n, jnp.int32).at[rows].set(jnp.arange(len(rows), dtype=jnp.int32)[:, None], mode="drop")
    mask = included[:, fold]

    def blocks(weight: jax.Array) -> _Blocks:
        def sums(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            x_fold = x.at[rows].get(mode="fill", fill_value=0)
            s = weight.at[rows].get(mode="fill", fill_value=0) ** 2
            return matmul((x_fold * s[:, None]).T, x_fold), matmul(s[None, :], x_fold)[0], jnp.sum(s)

        xx, sx, s = lax.map(sums, rows)

        def add_folds(included: jax.Array) -> _Blocks:
            total_s = jnp.maximum(jnp.sum(included * s), jnp.finfo(s.dtype).tiny)
            total_sx = jnp.sum(included[:, None] * sx, axis=0)
            xx_fit = jnp.einsum("f,fpq->pq", included, xx, precision=lax.Precision.HIGHEST)
            scatter = xx_fit - jnp.outer(total_sx, total_sx) / total_s
            return _Blocks(shifted_cholesky(scatter, alpha + jitter(scatter)), total_sx, total_s)

        by_fit: _Blocks = lax.map(add_folds, included)
        return by_fit

    all_blocks = lax.map(blocks, weights.T)  # (K, J, ...)

    def update(i: jax.Array, state: _State) -> _State:
        block = jax.tree.map(lambda leaf: leaf[i], all_blocks)
        weight = weights[:, i]
        # The step follows from the gradient, so the rounding of the factor does not change the point to which the sweeps converge.
        weighted = state.residual * weight[None, :]
        total = jnp.sum(weighted, axis=1)
        gradient = matmul(weighted, x) - alpha * state.coef[:, i]
        right = gradient - block.sx * (total / block.s)[:, None]
        step = jax.vmap(cho_solve)(block.factor, right)
        shift = (total - jnp.sum(block.sx * step, axis=1)) / block.s
        change = (matmul(step, x.T) + shift[:, None]) * weight[None, :] * mask
        return state._replace(
            coef=state.coef.at[:, i].add(step),
            intercept=state.intercept.at[:, i].add(shift),
            residual=state.residual - change,
        )

    def objective_of(state: _State) -> jax.Array:
        return jnp.sum(state.residual**2, axis=1) + alpha * jnp.sum(state.coef**2, axis=(1, 2))

    def sweep(state: _State) -> _State:
        state = lax.fori_loop(0, k, update, state)
        objective = objective_of(state)
        done = jnp.all(state.objective - objective <= tolerance * objective)
        history = state.history.at[state.sweep + 1].set(objective[-1])
        return state._replace(objective=objective, history=history, sweep=state.sweep + 1, done=done)

    start = _State(
        jnp.zeros((n_fits, k, p), x.dtype),
        jnp.full((n_fits, k), y_mean),
        mask * (y - y_mean * jnp.sum(weights, axis=1))[None, :],
        jnp.zeros(n_fits, x.dtype),
        jnp.full(max_sweeps + 1, jnp.nan, x.dtype),
        jnp.zeros((), jnp.int32),
        jnp.zeros((), bool),
    )
    objective = objective_of(start)
    start = start._replace(objective=objective, history=start.history.at[0].set(objective[-1]))
    end = lax.while_loop(lambda state: (state.sweep < max_sweeps) & ~state.done, sweep, start)
    predictions = predict_ridge(Ridge(end.coef, end.intercept), x)  # (N, J, K), of the centred pixels
    out_of_fold = jnp.take_along_axis(predictions, fold[:, None, None], axis=1)[:, 0]
    intercept = end.intercept - jnp.einsum("jkp,p->jk", end.coef, mean, precision=lax.Precision.HIGHEST)
    whole, by_fold = Ridge(end.coef[-1], intercept[-1]), Ridge(end.coef[:-1], intercept[:-1])
    return Backfit(whole, by_fold, out_of_fold, end.history, end.sweep, end.done)


def _checked(x: AnyArray, y: AnyArray, weights: AnyArray, alpha: ArrayLike) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """The arguments in the precision of x, or an ``InputError``."""
    require_same_length(x=x, y=y)
    if weights.ndim != 2 or len(weights) != len(y):
        raise InputError(f"weights have shape {weights.shape}, expected (N, K) with the {len(y)} rows of x")
    require_positive(alpha)
    x = jnp.asarray(x)
    return x, jnp.asarray(y, x.dtype), jnp.asarray(weights, x.dtype), jnp.asarray(alpha, x.dtype)
