"""Exact cross-validation of ridge regressions: every fold and every alpha from one Gram matrix and one factor per alpha.

Held-out residuals follow from the fit to all stars. Dual form (N < P), with K the kernel, C the upper left block of the
inverse of the bordered matrix [[K + alpha I, 1], [1', 0]] and a = C y: those of the fold S are C_SS^-1 a_S (Cawley & Talbot
2004, eq. 11; An, Liu & Venkatesh 2007, eq. 15). Primal form, with H the hat matrix and r the residuals: (I - H_SS)^-1 r_S; or,
where folds are few, a fit to the sums of all stars less those of the fold. So leave-one-out costs what five folds cost.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError, matmul, require_same_length
from moe_jax.core.cholesky import inverse_cholesky
from moe_jax.experts import ridge
from moe_jax.experts.ridge import Centred, Ridge, center, is_dual, jitter, kernel, require_positive
from moe_jax.experts.sums import Moments, Sums, moments, solve_moments, sum_stars

BLOCK_BATCH = 16  # folds whose held-out blocks are formed at a time, where they are small
LARGEST_IN_BATCH = 32  # rows
LEAST_TO_SKIP = 1_024  # rows
ROW_STEPS = 6  # equal folds of data sets that differ by a few per cent start within the same step
# Costs in units of n^3 operations, as measured against products on two CPU cores; they choose between exact forms.
CHOLESKY_COST = 1.0
INVERSE_CHOLESKY_COST = 1.5


class RidgeCV(NamedTuple):
    """Exact cross-validation of a ridge regression over several alphas."""

    mse: Float[jax.Array, " A"]  #: mean squared error of the out-of-fold predictions of all N stars
    predictions: Float[jax.Array, "A N"]  #: prediction of each star by the model fitted without the star's fold


class AlphaChoice(NamedTuple):
    """The alpha of the smallest cross-validated error."""

    alpha: Float[jax.Array, ""]
    position: Int[jax.Array, ""]  #: its place among the alphas
    at_edge: jax.Array  #: bool: it is the smallest or the largest of several, so the best may lie outside the grid


class CrossValidatedRidge(NamedTuple):
    """One ridge regression with its alpha by cross-validation."""

    ridge: Ridge
    alpha: Float[jax.Array, ""]
    at_edge: Bool[jax.Array, ""]
    mse: Float[jax.Array, " A"]
    out_of_fold: Float[jax.Array, " N"]


def cross_validate_ridge(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], alphas: Float[AnyArray, " A"], folds: Int[AnyArray, " N"]
) -> RidgeCV:
    """Out-of-fold predictions of ridge regressions: exactly those of refitting without each fold, for every alpha.

    Args:
        x: features.
        y: target.
        alphas: penalties, > 0.
        folds: fold of each star, any integers; concrete, since their sizes set the shapes. At least two folds.

    Returns:
        Mean squared error by alpha, and the predictions.

    Raises:
        InputError: shapes that disagree, alphas that are not positive, fewer than two folds.
    """
    require_same_length(x=x, y=y, folds=folds)
    x, y = jnp.asarray(x), jnp.asarray(y)
    alphas = jnp.asarray(alphas, x.dtype)
    require_positive(alphas)
    if not is_dual(x):
        return _cross_validate(x, y, jnp.ones(len(x), x.dtype), alphas, held_rows(folds), len(x)).cv
    order = np.argsort(np.asarray(folds), kind="stable")
    held = held_rows(np.asarray(folds)[order])
    cv = _cross_validate(x[order], y[order], jnp.ones(len(x), x.dtype), alphas, held, len(x)).cv
    return cv._replace(predictions=cv.predictions[:, np.argsort(order)])


def fit_cross_validated(
    x: jax.Array, y: jax.Array, mask: jax.Array, alphas: jax.Array, held: Int[np.ndarray, "folds n_held"], n_stars: int
) -> CrossValidatedRidge:
    """Cross-validates over the alphas and fits with the best, all from one Gram matrix.

    Args:
        x: features; the rows after the first ``n_stars`` are padding, and 0.
        y: target, likewise.
        mask: 1 for a star, 0 for padding.
        alphas: penalties.
        held: ``held_rows``; in the dual form (fewer rows than columns) the rows of a fold must follow one another.
        n_stars: rows that are stars.
    """
    found = _cross_validate(x, y, mask, alphas, held, n_stars)
    fit = _solve(found.data, found.choice.alpha, found.inverse_factor(found.choice))
    return CrossValidatedRidge(fit, found.choice.alpha, found.choice.at_edge, found.cv.mse, found.out_of_fold)


@jax.jit
def select_alpha(alphas: Float[AnyArray, " A"], mse: Float[AnyArray, " A"]) -> AlphaChoice:
    """The alpha with the smallest error; a tie goes to the larger alpha."""
    alphas, mse = jnp.asarray(alphas), jnp.asarray(mse)
    position = jnp.argmax(jnp.where(mse == jnp.min(mse), alphas, -jnp.inf))
    alpha = alphas[position]
    at_edge = ((alpha == jnp.min(alphas)) | (alpha == jnp.max(alphas))) & (len(alphas) > 1)
    return AlphaChoice(alpha, position, at_edge)


def held_rows(folds: AnyArray, n_padded: int | None = None, slack: int = 0) -> Int[np.ndarray, "folds n_held"]:
    """Rows of each fold, padded to a common length.

    Args:
        folds: fold of each star, any integers, at least two different ones.
        n_padded: number of rows of the padded arrays that the rows index; N by default. It is also the mark of padding.
        slack: with it, the length is that of equal folds of the padded rows plus this, where that is enough, so that data
            sets of one padded size share their shapes.

    Raises:
        InputError: for fewer than two folds.
    """
    folds = np.asarray(folds)
    n_padded = len(folds) if n_padded is None else n_padded
    names, position = np.unique(folds, return_inverse=True)
    if len(names) < 2:
        raise InputError(f"folds holds {len(names)} different values, expected at least 2")
    counts = np.bincount(position)
    length = max(counts.max(), round(n_padded / len(names)) + slack if slack else 0)
    rows = np.full((len(names), length), n_padded, np.int32)
    order = np.argsort(position, kind="stable")
    first = np.cumsum(counts) - counts
    rows[position[order], np.arange(len(folds)) - np.repeat(first, counts)] = order
    return rows


class _CrossValidated(NamedTuple):
    data: Centred
    cv: RidgeCV
    choice: AlphaChoice
    out_of_fold: jax.Array  # at the chosen alpha
    inverse_factor: Callable[[AlphaChoice], jax.Array]


_center = jax.jit(center)


@jax.jit
def _prepare(x: jax.Array, y: jax.Array, mask: jax.Array, alphas: jax.Array) -> tuple[Centred, jax.Array, jax.Array]:
    """Centred data, the kernel, and what is added to its diagonal for each alpha."""
    data = center(x, y, mask)
    matrix, mean_eigenvalue = kernel(data)
    return data, matrix, alphas + jitter(mean_eigenvalue)


@jax.jit
def _solve(data: Centred, alpha: jax.Array, inverse_factor: jax.Array) -> Ridge:
    return ridge.solve(data, alpha, lambda b: matmul(inverse_factor.T, matmul(inverse_factor, b)))


def _cross_validate(
    x: jax.Array, y: jax.Array, mask: jax.Array, alphas: jax.Array, held: Int[np.ndarray, "folds n_held"], n_stars: int
) -> _CrossValidated:
    """The cross-validation, with a function that gives the inverse Cholesky factor at the chosen alpha."""
    dual = is_dual(x)
    if not dual and _is_cheaper_by_fold(x, held):
        data = _center(x, y, mask)
        by_fold = _sum_by_fold(data, held)
        cv, choice, out_of_fold = _finish(data, _residuals_by_fold(data, by_fold, alphas, held), alphas)
        matrix, shift = _sum_folds(by_fold.xx)
        return _CrossValidated(data, cv, choice, out_of_fold, lambda choice: inverse_cholesky(matrix, choice.alpha + shift))
    data, matrix, shifts = _prepare(x, y, mask, alphas)
    on_host = shifts if isinstance(shifts, jax.core.Tracer) else np.asarray(shifts)
    factors = [inverse_cholesky(matrix, on_host[i], n_stars if dual else None) for i in range(len(alphas))]
    if dual:
        residuals = [_dual_residuals(data, factor, held, _first_rows(held, len(y))) for factor in factors]
    else:
        residuals = [_primal_residuals(data, factor, held) for factor in factors]
    cv, choice, out_of_fold = _finish(data, residuals, alphas)
    return _CrossValidated(data, cv, choice, out_of_fold, lambda choice: factors[int(choice.position)])


def _finish(data: Centred, residuals: jax.Array | list[jax.Array], alphas: jax.Array) -> tuple[RidgeCV, AlphaChoice, jax.Array]:
    """Errors, the alpha of the smallest, and the out-of-fold predictions of all alphas and of that one."""
    cv = _errors(data, residuals)
    choice = select_alpha(alphas, cv.mse)
    return cv, choice, _take_row(cv.predictions, choice.position)


@jax.jit
def _errors(data: Centred, residuals: jax.Array | list[jax.Array]) -> RidgeCV:
    stacked = jnp.stack(residuals) if isinstance(residuals, list) else residuals
    mse = jnp.sum((stacked * data.mask[None, :]) ** 2, axis=1) / jnp.sum(data.mask)
    return RidgeCV(mse, (data.y + data.y_mean)[None, :] - stacked)


@jax.jit
def _take_row(array: jax.Array, row: jax.Array) -> jax.Array:
    taken: jax.Array = lax.dynamic_index_in_dim(array, row, keepdims=False)
    return taken


@jax.jit
def _sum_folds(by_fold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix from those of the folds, and its jitter."""
    matrix = jnp.sum(by_fold, axis=0)
    return matrix, jitter(jnp.trace(matrix) / len(matrix))


def _is_cheaper_by_fold(x: jax.Array, held: AnyArray) -> bool:
    """Whether a primal fit for each fold costs less than one for all folds."""
    (n, p), (n_folds, n_held) = x.shape, held.shape
    by_fold = n_folds * CHOLESKY_COST * p**3
    at_once = INVERSE_CHOLESKY_COST * p**3 + n * p**2 + n_folds * (n_held**2 * p + n_held**3)
    return by_fold < at_once


def _batch(held: AnyArray) -> int | None:
    """Folds at a time: several where their blocks are small; large ones keep the processor busy by themselves."""
    return min(BLOCK_BATCH, len(held)) if held.shape[1] <= LARGEST_IN_BATCH else None


def _gather(array: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[rows].get(mode="fill", fill_value=0)


def _scatter(values: jax.Array, rows: jax.Array, n: int) -> jax.Array:
    """From (folds, n_held) values to (N,)."""
    return jnp.zeros(n, values.dtype).at[rows.reshape(-1)].set(values.reshape(-1), mode="drop")


def _solve_block(block: jax.Array, residual: jax.Array, padding: jax.Array) -> jax.Array:
    """Solves one fold's symmetric positive (n_held, n_held) block for its residuals; padded rows become the identity."""
    block = block + jnp.diag(padding.astype(block.dtype))
    if len(block) == 1:  # leave-one-out
        return residual / block[0]
    solution: jax.Array = jnp.linalg.solve(block, residual)
    return solution


def _first_rows(held: np.ndarray, n: int) -> tuple[int, ...]:
    """For a few large folds, a row before which a fold's columns of a lower triangle are 0; in steps that data sets share."""
    if len(held) > BLOCK_BATCH:
        return ()
    if n < LEAST_TO_SKIP:
        return (0,) * len(held)
    return tuple(int(ROW_STEPS * start // n * n // ROW_STEPS) for start in held[:, 0])


@functools.partial(jax.jit, static_argnames="first_rows")
def _dual_residuals(data: Centred, inverse_factor: jax.Array, held: jax.Array, first_rows: tuple[int, ...]) -> jax.Array:
    """(N,) held-out residuals from the inverse Cholesky factor W of the kernel: (K + alpha I)^-1 = W' W.

    The rows of a fold follow one another, so that its columns of W are a slice.
    """
    n, n_held = len(data.y), held.shape[1]
    solution = matmul(inverse_factor.T, matmul(inverse_factor, jnp.stack([data.y, data.mask], axis=1)))
    ones, total = solution[:, 1], jnp.sum(data.mask * solution[:, 1])
    a = solution[:, 0] - ones * jnp.sum(data.mask * solution[:, 0]) / total

    def product(rows: jax.Array, first_row: int = 0) -> jax.Array:
        """Of the fold's columns of W with each other."""
        columns = lax.dynamic_slice_in_dim(inverse_factor[first_row:], jnp.minimum(rows[0], n - n_held), n_held, 1)
        return matmul(columns.T, columns)

    def hold_out(fold: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, block = fold
        start = jnp.minimum(rows[0], n - n_held)  # the slice may reach over the fold's ends
        window = start + jnp.arange(n_held)
        own = (window >= rows[0]) & (window < rows[0] + jnp.sum(rows < n))
        column, right = (jnp.where(own, lax.dynamic_slice_in_dim(values, start, n_held), 0.0) for values in (ones, a))
        block = jnp.where(own[:, None] & own[None, :], block, 0.0) - jnp.outer(column, column) / total
        return _solve_block(block, right, ~own), jnp.where(own, window, n)

    if first_rows:
        products = jnp.stack([product(held[i], first) for i, first in enumerate(first_rows)])
        residuals, rows = lax.map(hold_out, (held, products))
    else:
        residuals, rows = lax.map(lambda rows: hold_out((rows, product(rows))), held, batch_size=_batch(held))
    return _scatter(residuals, rows, n)


@jax.jit
def _primal_residuals(data: Centred, inverse_factor: jax.Array, held: jax.Array) -> jax.Array:
    """(N,) held-out residuals from the inverse Cholesky factor W of the scatter matrix: H = (X W')(X W')'."""
    n = len(data.y)
    whitened = matmul(data.x, inverse_factor.T)
    residual = data.y - matmul(whitened, matmul(whitened.T, data.y[:, None]))[:, 0]

    def hold_out(rows: jax.Array) -> jax.Array:
        part, mask = _gather(whitened, rows), _gather(data.mask, rows)
        # The intercept adds 1 / n to the hat matrix.
        block = jnp.diag(mask) - matmul(part, part.T) - jnp.outer(mask, mask) / jnp.sum(data.mask)
        return _solve_block(block, _gather(residual, rows), rows == n)

    return _scatter(lax.map(hold_out, held, batch_size=_batch(held)), held, n)


@jax.jit
def _sum_by_fold(data: Centred, held: jax.Array) -> Sums:
    def sums(rows: jax.Array) -> Sums:
        return sum_stars(*(_gather(array, rows) for array in (data.x, data.y, data.mask)))

    return lax.map(sums, held)


@jax.jit
def _residuals_by_fold(data: Centred, by_fold: Sums, alphas: jax.Array, held: jax.Array) -> jax.Array:
    """(A, N) held-out residuals: a fold is held out by subtracting its sums from those of all."""
    total = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), by_fold)

    def hold_out(fold: tuple[Sums, jax.Array]) -> jax.Array:
        own, rows = fold
        train: Moments = moments(jax.tree.map(jnp.subtract, total, own))
        x_held, y_held = _gather(data.x, rows) - train.x_mean[None, :], _gather(data.y, rows) - train.y_mean
        return lax.map(lambda alpha: y_held - matmul(x_held, solve_moments(train, alpha)[:, None])[:, 0], alphas)

    by_alpha = jnp.moveaxis(lax.map(hold_out, (by_fold, held)), 1, 0)
    return jax.vmap(lambda values: _scatter(values, held, len(data.y)))(by_alpha)
