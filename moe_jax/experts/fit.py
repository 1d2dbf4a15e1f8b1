"""The experts: one ridge regression for each cell, its alpha by exact cross-validation, and one for all stars.

Cells hold different numbers of stars, and a compiled program serves one size. So where programs are compiled, cells of similar
size are padded with masked rows to a common size, and share a few of them. The padding does not change the results.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, Int, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, by_numpy, namespace, require_cell_sizes, require_whole, to_device, to_host
from moe_jax.core.convert import convert_arguments
from moe_jax.experts.alphas import require_positive
from moe_jax.experts.cross_validation import CrossValidatedRidge, fit_cross_validated, held_rows
from moe_jax.experts.ridge import predict_ridge

ROW_MULTIPLE = 64  # padded sizes are multiples of this
LEAST_ROWS = 256  # the least padded size: all small cells share it
LEAST_FILL = 0.93  # a cell is padded to a larger cell's size if it fills this part of it; a factor costs size^3
FOLD_SLACK = 8  # rows that a fold may hold more than an equal share, without another program


@convert_arguments()
def assign_folds(key: PRNGKeyArray, cell: Int[AnyArray, " N"], n_folds: int = 5) -> Int[jax.Array, " N"]:
    """Random folds, stratified: within each cell, their sizes differ by one star at the most.

    Raises:
        InputError: unless ``n_folds`` is a whole number, at least 2: with one fold, no star would be left to fit to.
    """
    require_whole("n_folds", n_folds, 2)
    return _assign_folds(key, jnp.asarray(cell), n_folds)


@functools.partial(jax.jit, static_argnames="n_folds")
def _assign_folds(key: jax.Array, cell: jax.Array, n_folds: int) -> jax.Array:
    order = jnp.lexsort((jax.random.uniform(key, (len(cell),)), cell))
    return jnp.zeros(len(cell), jnp.int32).at[order].set(jnp.arange(len(cell), dtype=jnp.int32) % n_folds)


def padded_sizes(counts: Int[np.ndarray, " K"]) -> list[int]:
    """Rows to which each cell is padded: the size of a larger cell, if the cell fills ``LEAST_FILL`` of it."""
    sizes = np.zeros(len(counts), int)
    current = 0
    for k in np.argsort(-counts, kind="stable"):
        if counts[k] < LEAST_FILL * current or current == 0:
            current = max(-(-counts[k] // ROW_MULTIPLE) * ROW_MULTIPLE, LEAST_ROWS)
        sizes[k] = current
    return [int(size) for size in sizes]


def _fit_expert(
    x: AnyArray, y: AnyArray, stars: np.ndarray, n_padded: int, alphas: AnyArray, folds: np.ndarray, extend_decades: int
) -> tuple[np.ndarray, CrossValidatedRidge]:
    """The rows of the given stars, sorted by fold and padded with N, and the expert fitted to these rows."""
    stars = stars[np.argsort(folds[stars], kind="stable")]
    if namespace(x) is np:
        held, ones = held_rows(folds[stars]), np.ones(len(stars), x.dtype)
        return stars, fit_cross_validated(x[stars], y[stars], ones, alphas, held, extend_decades)
    rows = np.pad(stars, (0, n_padded - len(stars)), constant_values=len(y)).astype(np.int32)
    held = held_rows(folds[stars], n_padded, slack=FOLD_SLACK)
    x_cell, y_cell, mask = _take_padded(x, y, rows)
    return rows, fit_cross_validated(x_cell, y_cell, mask, alphas, held, extend_decades)


@jax.jit
def _take_padded(x: jax.Array, y: jax.Array, rows: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Some of the stars, and their mask; a row number N stands for padding."""
    x_cell, y_cell = (array.at[rows].get(mode="fill", fill_value=0) for array in (x, y))
    return x_cell, y_cell, (rows < len(y)).astype(x.dtype)


@convert_arguments("x", "y", "cell", "alphas", "folds")
def fit_experts(
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    cell: Int[AnyArray, " N"],
    alphas: Float[AnyArray, " A"],
    folds: Int[AnyArray, " N"],
    *,
    n_experts: int = 9,
    extend_decades: int = 0,
    on_fitted: Callable[[], None] | None = None,
) -> CrossValidatedRidge:
    """Fits one ridge expert to the stars of each cell.

    Args:
        x: noisy flux.
        y: target (log g).
        cell: expert of each star, 0 .. n_experts - 1, or -1 for a star that belongs to none; concrete.
        alphas: penalties to choose from, by cross-validation in each cell; > 0.
        folds: fold of each star; within a cell, the folds that occur there are used.
        n_experts: K.
        extend_decades: most powers of ten by which a cell's grid of alphas is extended where the best lies at an end of it.
        on_fitted: called after each expert, to report progress.

    Returns:
        Stacked experts; ``predict_experts`` predicts all stars by all experts in one matmul.

    Raises:
        InputError: shapes that disagree, alphas that are not positive, or a cell with fewer stars than twice the number of folds.
    """
    require_positive(alphas)
    require_whole("n_experts", n_experts, 1)
    cell, folds = np.asarray(cell), np.asarray(folds)
    require_cell_sizes("cell", cell, n_experts, 2 * len(np.unique(folds)))
    x, y, alphas = to_host(x, y, alphas)
    alphas = alphas.astype(x.dtype)
    out_of_fold = np.full(len(y) + 1, np.nan, x.dtype)  # the last element takes the padding
    sizes = padded_sizes(np.bincount(cell[cell >= 0], minlength=n_experts))
    fits = []
    for k in range(n_experts):
        rows, fit = _fit_expert(x, y, np.flatnonzero(cell == k), sizes[k], alphas, folds, extend_decades)
        out_of_fold[rows] = fit.out_of_fold
        fits.append(fit._replace(out_of_fold=np.zeros(0, x.dtype)))
        if on_fitted is not None:
            on_fitted()
    experts: CrossValidatedRidge = to_device(jax.tree.map(lambda *leaves: np.stack(leaves), *fits))
    return experts._replace(out_of_fold=to_device(out_of_fold[:-1]))


@convert_arguments("folds")
def fit_global(
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    alphas: Float[AnyArray, " A"],
    folds: Int[AnyArray, " N"],
    *,
    extend_decades: int = 0,
) -> CrossValidatedRidge:
    """One ridge regression for all stars, its alpha by cross-validation; arguments and errors as those of ``fit_experts``."""
    require_positive(alphas)
    x, y, alphas = to_host(x, y, alphas)
    alphas = alphas.astype(x.dtype)
    return fit_cross_validated(x, y, np.ones(len(y), x.dtype), alphas, held_rows(folds), extend_decades)


@convert_arguments()
def predict_experts(experts: CrossValidatedRidge, x: Float[AnyArray, "N P"]) -> Float[jax.Array, "N K"]:
    """Predictions of all experts for all stars: ``predict_ridge`` of ``experts.ridge``."""
    return predict_ridge(experts.ridge, x)


@convert_arguments()
@by_numpy
def cross_fitted_predictions(
    predictions: Float[AnyArray, "N K"], out_of_fold: Float[AnyArray, " N"], cell: Int[AnyArray, " N"]
) -> Float[AnyArray, "N K"]:
    """Predictions to which the star itself did not contribute: that of its own cell's expert is replaced by the out-of-fold one.

    The other experts were fitted to the stars of other cells, so their predictions stay.

    Args:
        predictions: of all experts, for the stars to which the experts were fitted.
        out_of_fold: of ``fit_experts``.
        cell: expert that was fitted to each star; a star of cell -1 keeps all its predictions.
    """
    xp = namespace(predictions)
    was_fitted_to = cell[:, None] == xp.arange(predictions.shape[1])[None, :]
    return xp.where(was_fitted_to, out_of_fold[:, None], predictions)
