"""Experts for the mixture itself: given the gate's weights, all K ridges together in closed form, or by back-fitting.

Given weights p_ik, the mixture f_i = sum_k p_ik (x_i' w_k + b_k) is linear in the experts, so the experts of least

    sum_i (y_i - f_i)^2 + alpha sum_k |w_k|^2

are one ridge regression on the features [p_1 x, ..., p_K x], whose kernel is (P P') o (X X'), with K unpenalised intercepts on
the columns of P. The closed form solves for N unknowns. Back-fitting (Hastie & Tibshirani 1990, section 4.4; block
Gauss-Seidel) minimises over one expert at a time, a ridge with the sample weights p_ik^2; it needs one P x P factor for each
expert, converges to the same solution, and the objective never rises. The pixels are centred first: with an unpenalised
intercept in every expert that changes nothing but rounding.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, InputError, matmul, require_same_length
from moe_jax.experts.ridge import JITTER_ULPS, Ridge, predict_ridges


class MixtureExperts(NamedTuple):
    """K linear experts."""

    coef: Float[jax.Array, "K P"]
    intercept: Float[jax.Array, " K"]


class Backfit(NamedTuple):
    """Experts fitted to a mixture by back-fitting, and without each fold."""

    experts: MixtureExperts  #: on all stars
    by_fold: MixtureExperts  #: (folds, K, P) and (folds, K): without the stars of each fold; empty without folds
    out_of_fold: Float[jax.Array, "N K"]  #: predictions of all experts for each star without its fold; of ``experts`` without folds
    objective: Float[jax.Array, " S"]  #: of the fit on all stars, at the start and after each sweep; NaN after the stop
    n_sweeps: Int[jax.Array, ""]
    converged: jax.Array  #: bool: the last sweep lowered the objective by less than the tolerance


def predict_mixture_experts(experts: MixtureExperts, x: Float[AnyArray, "N P"]) -> Float[jax.Array, "N K"]:
    """Predictions of all experts."""
    return predict_ridges(Ridge(experts.coef, experts.intercept), x)


def mixture_objective(
    experts: MixtureExperts,
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    weights: Float[AnyArray, "N K"],
    alpha: ArrayLike,
) -> Float[jax.Array, ""]:
    """sum_i (y_i - sum_k p_ik (x_i' w_k + b_k))^2 + alpha sum_k |w_k|^2."""
    mixture = jnp.sum(jnp.asarray(weights) * predict_mixture_experts(experts, x), axis=1)
    return jnp.sum((jnp.asarray(y) - mixture) ** 2) + alpha * jnp.sum(experts.coef**2)


def fit_mixture_experts(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], weights: Float[AnyArray, "N K"], alpha: ArrayLike
) -> MixtureExperts:
    """The experts of least mixture objective in closed form: one Cholesky factor of an N x N kernel.

    With Q = (P P') o (X X') + alpha I, the equations Q a + P b = y and P' a = 0 give the dual vector a and the intercepts b;
    w_k = X' (p_k o a).

    Raises:
        InputError: shapes that disagree, or an alpha that is not positive.
    """
    _check(x, y, weights, alpha)
    x, y, weights = (jnp.asarray(array) for array in (x, y, weights))
    return _fit_mixture_experts(x, y.astype(x.dtype), weights.astype(x.dtype), jnp.asarray(alpha, x.dtype))


@jax.jit
def _fit_mixture_experts(x: jax.Array, y: jax.Array, weights: jax.Array, alpha: jax.Array) -> MixtureExperts:
    mean = jnp.mean(x, axis=0)
    centred = x - mean[None, :]
    kernel = matmul(weights, weights.T) * matmul(centred, centred.T)
    diagonal = jnp.arange(len(y))
    factor = lax.linalg.cholesky(kernel.at[diagonal, diagonal].add(alpha), symmetrize_input=False)
    solved = jsl.cho_solve((factor, True), jnp.concatenate([weights, y[:, None]], axis=1))
    # An expert without weight has no intercept of its own: least squares takes the smallest.
    intercept = jnp.linalg.lstsq(matmul(weights.T, solved[:, :-1]), matmul(weights.T, solved[:, -1:]))[0][:, 0]
    a = solved[:, -1] - matmul(solved[:, :-1], intercept[:, None])[:, 0]
    coef = matmul((weights * a[:, None]).T, centred)
    return MixtureExperts(coef, intercept - matmul(coef, mean[:, None])[:, 0])


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
    """The experts of least mixture objective by back-fitting; with ``folds`` also those without each fold, all at once.

    The held-out fits share the products with X, and their Gram matrices come from those of the folds by subtraction.

    Args:
        x: features (noisy flux).
        y: target.
        weights: of the gate, p_ik; fixed.
        alpha: penalty, > 0.
        folds: fold of each star, concrete; at least two.
        max_sweeps: most passes over the experts.
        tolerance: a sweep that lowers no fit's objective by more than this part of it is the last.

    Returns:
        Experts, out-of-fold predictions, and the objective by sweep.

    Raises:
        InputError: shapes that disagree, an alpha that is not positive, fewer than two folds.
    """
    _check(x, y, weights, alpha)
    if folds is None:
        part, n_parts = np.zeros(len(y), int), 1
        include = np.ones((1, 1))
    else:
        require_same_length(x=x, folds=folds)
        names, part = np.unique(np.asarray(folds), return_inverse=True)
        n_parts = len(names)
        if n_parts < 2:
            raise InputError(f"folds holds {n_parts} different values, expected at least 2")
        include = np.concatenate([1.0 - np.eye(n_parts), np.ones((1, n_parts))])
    longest = int(np.bincount(part).max())
    rows = np.stack([np.pad(r := np.flatnonzero(part == f), (0, longest - len(r)), constant_values=len(y)) for f in range(n_parts)])
    x, y, weights = (jnp.asarray(array) for array in (x, y, weights))
    dtype = x.dtype
    return _backfit(
        x,
        y.astype(dtype),
        weights.astype(dtype),
        jnp.asarray(alpha, dtype),
        jnp.asarray(rows),
        jnp.asarray(part),
        jnp.asarray(include, dtype),
        jnp.asarray(tolerance, dtype),
        max_sweeps,
    )


class _Blocks(NamedTuple):
    """What one expert's update needs, for each of J fits; the scatter matrix is that of x around its weighted mean."""

    factor: jax.Array  # (J, P, P) Cholesky factor of scatter + alpha I
    sx: jax.Array  # (J, P) sum of s x, s = p^2
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
    rows: jax.Array,
    part: jax.Array,
    include: jax.Array,
    tolerance: jax.Array,
    max_sweeps: int,
) -> Backfit:
    (n, p), k = x.shape, weights.shape[1]
    n_fits = len(include)
    mean = jnp.mean(x, axis=0)
    x = x - mean[None, :]
    y_mean = jnp.mean(y)
    mask = include[:, part]
    diagonal = jnp.arange(p)

    def blocks(weight: jax.Array) -> _Blocks:
        def sums(rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            own = x.at[rows].get(mode="fill", fill_value=0)
            s = weight.at[rows].get(mode="fill", fill_value=0) ** 2
            return matmul((own * s[:, None]).T, own), matmul(s[None, :], own)[0], jnp.sum(s)

        xx, sx, s = lax.map(sums, rows)

        def hold_out(include: jax.Array) -> _Blocks:
            own_s = jnp.maximum(jnp.sum(include * s), jnp.finfo(s.dtype).tiny)
            own_sx = jnp.sum(include[:, None] * sx, axis=0)
            own_xx = jnp.einsum("f,fpq->pq", include, xx, precision=lax.Precision.HIGHEST) - jnp.outer(own_sx, own_sx) / own_s
            jitter = JITTER_ULPS * jnp.finfo(x.dtype).eps * jnp.trace(own_xx) / p
            factor = lax.linalg.cholesky(own_xx.at[diagonal, diagonal].add(alpha + jitter), symmetrize_input=False)
            return _Blocks(factor, own_sx, own_s)

        held: _Blocks = lax.map(hold_out, include)
        return held

    all_blocks = lax.map(blocks, weights.T)  # (K, J, ...)

    def update(i: jax.Array, state: _State) -> _State:
        block = jax.tree.map(lambda leaf: leaf[i], all_blocks)
        weight = weights[:, i]
        # The step from the gradient, so that the factor's rounding does not show in where the sweeps end.
        pulled = state.residual * weight[None, :]
        total = jnp.sum(pulled, axis=1)
        gradient = matmul(pulled, x) - alpha * state.coef[:, i]
        right = gradient - block.sx * (total / block.s)[:, None]
        step = jax.vmap(lambda factor, b: jsl.cho_solve((factor, True), b))(block.factor, right)
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
    intercept = end.intercept - jnp.einsum("jkp,p->jk", end.coef, mean, precision=lax.Precision.HIGHEST)
    n_folds = n_fits - 1
    predictions = matmul(x, end.coef.reshape(-1, p).T).reshape(n, n_fits, k) + end.intercept[None]
    held_by = part if n_folds else jnp.zeros(n, part.dtype)
    out_of_fold = jnp.take_along_axis(predictions, held_by[:, None, None], axis=1)[:, 0]
    return Backfit(
        MixtureExperts(end.coef[-1], intercept[-1]),
        MixtureExperts(end.coef[:n_folds], intercept[:n_folds]),
        out_of_fold,
        end.history,
        end.sweep,
        end.done,
    )


def _check(x: AnyArray, y: AnyArray, weights: AnyArray, alpha: ArrayLike) -> None:
    require_same_length(x=x, y=y)
    if weights.ndim != 2 or len(weights) != len(y):
        raise InputError(f"weights have shape {weights.shape}, expected (N, K) with the {len(y)} rows of x")
    if not isinstance(alpha, jax.core.Tracer) and not (np.isfinite(np.asarray(alpha)) and np.asarray(alpha) > 0):
        raise InputError(f"alpha is {alpha}, expected a positive number")
