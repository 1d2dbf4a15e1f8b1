"""The experts: one ridge regression for each cell, its alpha by exact cross-validation, and one for all stars.

Cells hold different numbers of stars. Cells of similar size are padded with masked rows to one size, so that the nine share a
few compiled programs instead of having one each, and nothing of the padding reaches the numbers.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, require_same_length
from moe_jax.experts.cross_validation import CrossValidatedRidge, fit_cross_validated, held_rows
from moe_jax.experts.ridge import Ridge, is_dual, predict_ridges

ROW_MULTIPLE = 64  # of a padded size
LEAST_ROWS = 256  # small cells all share one size
LEAST_FILL = 0.93  # a cell is padded to the size of a larger one if it fills this part of it
FOLD_SLACK = 8


class Experts(NamedTuple):
    """K fitted ridge experts, stacked, and what cross-validation said of each."""

    coef: Float[jax.Array, "K P"]
    intercept: Float[jax.Array, " K"]
    alpha: Float[jax.Array, " K"]  #: the alpha chosen for each
    at_edge: Bool[jax.Array, " K"]  #: whether that alpha lies at an end of the grid
    mse: Float[jax.Array, "K A"]  #: cross-validated mean squared error
    out_of_fold: Float[jax.Array, " N"]  #: each star predicted by its own cell's expert, fitted without its fold; NaN outside


def assign_folds(key: PRNGKeyArray, cell: Int[AnyArray, " N"], n_folds: int = 5) -> Int[jax.Array, " N"]:
    """Random folds, stratified: within each cell, their sizes differ by one star at the most."""
    return _assign_folds(key, jnp.asarray(cell), n_folds)


@functools.partial(jax.jit, static_argnames="n_folds")
def _assign_folds(key: jax.Array, cell: jax.Array, n_folds: int) -> jax.Array:
    order = jnp.lexsort((jax.random.uniform(key, (len(cell),)), cell))
    return jnp.zeros(len(cell), jnp.int32).at[order].set(jnp.arange(len(cell), dtype=jnp.int32) % n_folds)


def padded_sizes(counts: Int[np.ndarray, " K"]) -> list[int]:
    """Rows to which each cell is padded: of cells that differ by less than ``LEAST_FILL``, the size of the largest."""
    sizes = np.zeros(len(counts), int)
    current = 0
    for k in np.argsort(-counts, kind="stable"):
        if counts[k] < LEAST_FILL * current or current == 0:
            current = max(-(-counts[k] // ROW_MULTIPLE) * ROW_MULTIPLE, LEAST_ROWS)
        sizes[k] = current
    return [int(size) for size in sizes]


def _fit_expert(
    x: jax.Array, y: jax.Array, stars: np.ndarray, n_padded: int, alphas: jax.Array, folds: np.ndarray
) -> tuple[np.ndarray, CrossValidatedRidge]:
    """The rows of the given stars, by fold and padded with N, and the expert that is fitted to them."""
    stars = stars[np.argsort(folds[stars], kind="stable")]
    rows = np.pad(stars, (0, n_padded - len(stars)), constant_values=len(y)).astype(np.int32)
    held = held_rows(folds[stars], n_padded, slack=FOLD_SLACK)
    x_cell, y_cell, mask = _take_padded(x, y, rows)
    return rows, fit_cross_validated(x_cell, y_cell, mask, alphas, held, len(stars))


@jax.jit
def _take_padded(x: jax.Array, y: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Some of the stars, where rows of N are padding, and the mask."""
    x_cell, y_cell = (array.at[rows].get(mode="fill", fill_value=0) for array in (x, y))
    return x_cell, y_cell, (rows < len(y)).astype(x.dtype)


def fit_experts(
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    cell: Int[AnyArray, " N"],
    alphas: Float[AnyArray, " A"],
    folds: Int[AnyArray, " N"],
    *,
    n_experts: int = 9,
    on_fitted: Callable[[], None] | None = None,
) -> Experts:
    """Fits one ridge expert to the stars of each cell.

    Args:
        x: noisy flux.
        y: target (log g).
        cell: expert of each star, 0 .. n_experts - 1, or -1 for a star that belongs to none; concrete.
        alphas: penalties to choose from, by cross-validation in each cell.
        folds: fold of each star; within a cell, the folds that occur there are used.
        n_experts: K.
        on_fitted: called when an expert is done, for progress.

    Returns:
        Stacked experts; predictions of all experts for all stars are one matmul, ``predict_experts``.

    Raises:
        InputError: shapes that disagree, or a cell with fewer stars than twice the number of folds.
    """
    require_same_length(x=x, y=y, cell=cell, folds=folds)
    cell, folds = np.asarray(cell), np.asarray(folds)
    require_cell_sizes("cell", cell, n_experts, 2 * len(np.unique(folds)))
    x, y = jnp.asarray(x), jnp.asarray(y)
    alphas = jnp.asarray(alphas, x.dtype)
    out_of_fold = np.full(len(y) + 1, np.nan, x.dtype)  # the last takes what is padding
    sizes = padded_sizes(np.bincount(cell[cell >= 0], minlength=n_experts))
    fits = []
    for k in range(n_experts):
        rows, fit = _fit_expert(x, y, np.flatnonzero(cell == k), sizes[k], alphas, folds)
        out_of_fold[rows] = fit.out_of_fold
        fits.append((fit.ridge.coef, fit.ridge.intercept, fit.alpha, fit.at_edge, fit.mse))
        if on_fitted is not None:
            on_fitted()
    coef, intercept, alpha, at_edge, mse = (jnp.asarray(np.stack(column)) for column in zip(*fits, strict=True))
    return Experts(coef, intercept, alpha, at_edge, mse, jnp.asarray(out_of_fold[:-1]))


def fit_global(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], alphas: Float[AnyArray, " A"], folds: Int[AnyArray, " N"]
) -> CrossValidatedRidge:
    """One ridge regression for all stars, its alpha by cross-validation; arguments as those of ``fit_experts``."""
    require_same_length(x=x, y=y, folds=folds)
    x, y, folds, alphas = jnp.asarray(x), jnp.asarray(y), np.asarray(folds), jnp.asarray(alphas, jnp.asarray(x).dtype)
    if not is_dual(x):
        return fit_cross_validated(x, y, jnp.ones(len(y), x.dtype), alphas, held_rows(folds), len(y))
    rows, fit = _fit_expert(x, y, np.arange(len(y)), len(y), alphas, folds)
    return fit._replace(out_of_fold=jnp.zeros_like(y).at[rows].set(fit.out_of_fold))


@jax.jit
def predict_experts(experts: Experts, x: Float[AnyArray, "N P"]) -> Float[jax.Array, "N K"]:
    """Predictions of all experts for all stars: one matmul."""
    return predict_ridges(Ridge(experts.coef, experts.intercept), x)


@jax.jit
def cross_fitted_predictions(
    predictions: Float[AnyArray, "N K"], out_of_fold: Float[AnyArray, " N"], cell: Int[AnyArray, " N"]
) -> Float[jax.Array, "N K"]:
    """Expert predictions that no star had a part in: a star's own expert is replaced by its out-of-fold prediction.

    The other experts were fitted on other cells' stars, so theirs are free of leakage as they stand.

    Args:
        predictions: of all experts for the stars that the experts were fitted on.
        out_of_fold: ``Experts.out_of_fold``.
        cell: own expert of each star; a star of cell -1 keeps its predictions.
    """
    require_same_length(predictions=predictions, out_of_fold=out_of_fold, cell=cell)
    own = jnp.asarray(cell)[:, None] == jnp.arange(predictions.shape[1])[None, :]
    return jnp.where(own, jnp.asarray(out_of_fold)[:, None], predictions)


def require_cell_sizes(source: str, cell: AnyArray, n_experts: int, at_least: int) -> None:
    """Raises an ``InputError`` in the name of ``source`` where a cell holds too few stars to cross-validate."""
    counts = np.bincount(np.asarray(cell)[np.asarray(cell) >= 0], minlength=n_experts)
    if len(counts) > n_experts:
        raise InputError(f"{source}: found cell {len(counts) - 1}, expected cells 0 to {n_experts - 1} or -1")
    if counts.min() < at_least:
        k = int(counts.argmin())
        raise InputError(f"{source}: found {counts[k]} stars in cell {k}, expected at least {at_least} to cross-validate")
