"""Exact cross-validation of ridge regressions: the residuals of every fold, for every alpha, without refitting.

There are three forms; ``Solver`` takes the cheapest. S are the rows of a fold.

- Dual, for fewer stars than pixels. K is the kernel, C the upper left block of the inverse of the bordered matrix
  [[K + alpha I, 1], [1', 0]], and a = C y. The held-out residuals are C_SS^-1 a_S (Cawley & Talbot 2004, eq. 11; An, Liu &
  Venkatesh 2007, eq. 15).
- Primal, for many small folds. H is the hat matrix and r are the residuals of the fit to all stars. The held-out residuals
  are (I - H_SS)^-1 r_S.
- By fold, for few large folds: a fit to the sums of all stars less those of the fold.

The first two take one factorisation for each alpha, however many folds there are: leave-one-out costs what five folds cost.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError, jit_off_host, map_rows, matmul, namespace, to_device, to_host
from moe_jax.core.cholesky import inverse_cholesky
from moe_jax.core.convert import convert_arguments
from moe_jax.experts import ridge
from moe_jax.experts.alphas import require_positive, search_alphas
from moe_jax.experts.ridge import Centred, Ridge, center, is_dual, jitter, kernel
from moe_jax.experts.sums import Moments, hold_out_each, moments, solve_moments, sum_stars

# These numbers set the speed and the memory. The results do not depend on them, except for rounding.
SMALL_FOLD = 32  # rows; blocks up to this size do not keep a processor busy one by one
FOLDS_AT_A_TIME = 16  # so many small blocks are formed together
# Time of factorising an (n, n) matrix, in units of n^3 operations of a matrix product; measured on two CPU cores.
CHOLESKY_COST = 1.0
INVERSE_CHOLESKY_COST = 1.5


class RidgeCV(NamedTuple):
    """Exact cross-validation of a ridge regression over several alphas."""

    mse: Float[AnyArray, " A"]  #: mean squared error of the out-of-fold predictions of all N stars
    predictions: Float[AnyArray, "A N"]  #: prediction of each star by the model fitted without the star's fold


class CrossValidatedRidge(NamedTuple):
    """A ridge regression whose alpha was chosen by cross-validation, or K of them, stacked: the experts."""

    ridge: Ridge  #: coef (P,) and intercept (), or (K, P) and (K,)
    alpha: Float[AnyArray, "*k"]  #: the chosen alpha
    at_edge: Bool[AnyArray, "*k"]  #: whether it is the smallest or the largest that was tried
    alphas: Float[AnyArray, "*k A"]  #: the alphas tried: those of the grid, then those that extend it (NaN where there is none)
    mse: Float[AnyArray, "*k A"]  #: cross-validated mean squared error at each of ``alphas``
    out_of_fold: Float[AnyArray, " N"]  #: each star predicted without its fold, by its own cell's expert; NaN without a cell


@convert_arguments("folds", finite=("x", "y"))
def cross_validate_ridge(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], alphas: Float[AnyArray, " A"], folds: Int[AnyArray, " N"]
) -> RidgeCV:
    """Out-of-fold predictions of ridge regressions for every alpha; they equal those of a refit without each fold.

    Unlike a fit they are not refined. Where fewer stars than pixels are left without a fold, but not without any (N from P to
    5/4 P for five folds), the relative error is at most about the rounding error times the largest eigenvalue of X'X over alpha;
    an alpha of 1e-3 of that eigenvalue gives 1e-4 in float32. Elsewhere it is below 1e-4.

    Args:
        x: features.
        y: target.
        alphas: penalties, > 0.
        folds: fold of each star, any integers, at least two different ones. Concrete: the sizes of the folds set the shapes.

    Returns:
        Mean squared error by alpha, and the predictions.

    Raises:
        InputError: shapes that disagree, alphas that are not positive, fewer than two folds.
    """
    require_positive(alphas)
    x, y, alphas = to_host(x, y, alphas)
    alphas = alphas.astype(x.dtype)
    return to_device(Solver(x, y, np.ones(len(x), x.dtype), held_rows(folds)).cross_validate(alphas))


def fit_cross_validated(
    x: AnyArray,
    y: AnyArray,
    mask: AnyArray,
    alphas: AnyArray,
    held: Int[np.ndarray, "folds n_held"],
    extend_decades: int = 0,
) -> CrossValidatedRidge:
    """Cross-validates over the alphas and fits with the best; the arrays are those of ``Solver``."""
    solver = Solver(x, y, mask, held)
    choice, tried, mse, out_of_fold = search_alphas(alphas, solver.cross_validate, extend_decades)
    fit = CrossValidatedRidge(solver.solve(choice.alpha), choice.alpha, choice.at_edge, tried, mse, out_of_fold)
    return to_device(fit)


def held_rows(folds: AnyArray, n_padded: int | None = None, slack: int = 0) -> Int[np.ndarray, "folds n_held"]:
    """Rows of each fold, padded to a common length with ``n_padded``: the number of rows of the arrays, N by default.

    With a slack the length is at least that of equal folds of the padded rows plus the slack, so that data sets of one padded
    size share their shapes. Raises an ``InputError`` for fewer than two folds.
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


class Solver:
    """The fits to all stars, and to all but those of each fold, for any alpha; the Gram matrix is formed once.

    Args:
        x: features; rows of padding are 0.
        y: target, padded likewise.
        mask: 1 for a star, 0 for padding.
        held: ``held_rows``.
    """

    def __init__(self, x: AnyArray, y: AnyArray, mask: AnyArray, held: Int[np.ndarray, "folds n_held"]) -> None:
        (n, p), (n_folds, n_held) = x.shape, held.shape
        cost_by_fold = n_folds * CHOLESKY_COST * p**3
        cost_at_once = INVERSE_CHOLESKY_COST * p**3 + n * p**2 + n_folds * (n_held**2 * p + n_held**3)
        self.held = held
        self._factors: dict[float, AnyArray] = {}
        self.without_fold: Moments | None = None
        if is_dual(x) or cost_at_once <= cost_by_fold:
            self.data, self.matrix, self.jitter = _center_and_multiply(x, y, mask)
        else:
            self.data, self.matrix, self.jitter, self.without_fold = _center_and_sum(x, y, mask, held)

    def inverse_factor(self, alpha: Any) -> AnyArray:
        """W with (matrix + alpha I)^-1 = W' W, computed once for each alpha."""
        if isinstance(alpha, jax.core.Tracer):  # under jit
            return _inverse_factor(self.matrix, alpha, self.jitter)
        if float(alpha) not in self._factors:
            self._factors[float(alpha)] = _inverse_factor(self.matrix, alpha, self.jitter)
        return self._factors[float(alpha)]

    def residuals(self, alpha: Any) -> Float[AnyArray, " N"]:
        """Target less out-of-fold prediction."""
        if self.without_fold is not None:
            return _residuals_by_fold(self.data, self.without_fold, alpha, self.held)
        held_out = _dual_residuals if is_dual(self.data.x) else _primal_residuals
        return held_out(self.data, self.inverse_factor(alpha), self.held)

    def cross_validate(self, alphas: AnyArray) -> RidgeCV:
        """Errors and out-of-fold predictions."""
        each = alphas if isinstance(alphas, jax.core.Tracer) else np.asarray(alphas)
        return _cross_validation_of(self.data, [self.residuals(alpha) for alpha in each])

    def solve(self, alpha: Any) -> Ridge:
        """The ridge of all stars."""
        return _solve(self.data, alpha, self.inverse_factor(alpha))


_inverse_factor = jit_off_host(inverse_cholesky)


@jit_off_host
def _center_and_multiply(x: AnyArray, y: AnyArray, mask: AnyArray) -> tuple[Centred, AnyArray, Any]:
    data = center(x, y, mask)
    return data, *kernel(data)


@jit_off_host
def _center_and_sum(x: AnyArray, y: AnyArray, mask: AnyArray, held: AnyArray) -> tuple[Centred, AnyArray, Any, Moments]:
    data = center(x, y, mask)
    by_fold = map_rows(lambda rows: sum_stars(*(_gather(array, rows) for array in (data.x, data.y, data.mask))), held)
    matrix = by_fold.xx.sum(axis=0)
    return data, matrix, jitter(matrix), hold_out_each(lambda _, rest: moments(rest), by_fold)


@jit_off_host
def _solve(data: Centred, alpha: Any, inverse_factor: AnyArray) -> Ridge:
    return ridge.solve(data, alpha, lambda b: matmul(inverse_factor.T, matmul(inverse_factor, b)))


@jit_off_host
def _cross_validation_of(data: Centred, residuals: list[AnyArray]) -> RidgeCV:
    stacked = namespace(*residuals).stack(residuals)
    mse = ((stacked * data.mask[None, :]) ** 2).sum(axis=1) / data.mask.sum()
    return RidgeCV(mse, (data.y + data.y_mean)[None, :] - stacked)


def _gather(array: Any, rows: AnyArray) -> Any:
    """Some rows of an array; 0 for the row numbers N, which stand for padding."""
    if namespace(array) is not np:
        return array.at[rows].get(mode="fill", fill_value=0)
    taken = array[np.minimum(rows, len(array) - 1)]
    taken[rows == len(array)] = 0
    return taken


def _sum_of_squares(rows: AnyArray) -> AnyArray:
    """Of each row; NumPy's einsum forms no array of all squares."""
    return np.einsum("ij,ij->i", rows, rows) if namespace(rows) is np else (rows**2).sum(axis=1)


def _hold_out_each(hold_out: Callable[[Any], AnyArray], data: Centred, held: AnyArray, *more: Any) -> AnyArray:
    """(N,) what ``hold_out`` gives for the rows of each fold, which are followed by the fold's part of each of ``more``."""
    n, xp = len(data.y), namespace(data.y)
    batch_size = min(FOLDS_AT_A_TIME, len(held)) if held.shape[1] <= SMALL_FOLD else None
    values = map_rows(hold_out, (held, *more), batch_size).reshape(-1)
    if xp is jnp:
        return jnp.zeros(n, values.dtype).at[held.reshape(-1)].set(values, mode="drop")
    residuals = np.zeros(n + 1, values.dtype)  # the last element takes the padding
    residuals[held.reshape(-1)] = values
    return residuals[:-1]


def _solve_block(block: AnyArray, residual: AnyArray, padding: AnyArray) -> AnyArray:
    """Solves one fold's symmetric positive (n_held, n_held) block for its residuals; padded rows become the identity."""
    xp = namespace(block)
    return xp.linalg.solve(block + xp.diag(padding.astype(block.dtype)), residual)


@jit_off_host
def _dual_residuals(data: Centred, inverse_factor: AnyArray, held: AnyArray) -> AnyArray:
    """(N,) held-out residuals from the inverse Cholesky factor W of the kernel: (K + alpha I)^-1 = W' W."""
    xp, n = namespace(inverse_factor), len(data.y)
    solution = matmul(inverse_factor.T, matmul(inverse_factor, xp.stack([data.y, data.mask], axis=1)))
    a, ones = solution.T  # a sums to 0, as y does, since a constant is an eigenvector of the kernel
    total = (data.mask * ones).sum()
    if held.shape[1] == 1:  # leave-one-out
        return a / (_sum_of_squares(inverse_factor.T) - ones**2 / total)

    def hold_out(fold: tuple[AnyArray]) -> AnyArray:
        (rows,) = fold
        # The columns of W that belong to the fold are 0 above its first row; NumPy can leave these zeros out.
        columns = _gather(inverse_factor.T, rows)[:, rows.min() if xp is np else 0 :]
        column = _gather(ones, rows)
        block = matmul(columns, columns.T) - xp.outer(column, column) / total
        return _solve_block(block, _gather(a, rows), rows == n)

    return _hold_out_each(hold_out, data, held)


@jit_off_host
def _primal_residuals(data: Centred, inverse_factor: AnyArray, held: AnyArray) -> AnyArray:
    """(N,) held-out residuals from the inverse Cholesky factor W of the scatter matrix: H = (X W')(X W')'."""
    xp, n, n_stars = namespace(inverse_factor), len(data.y), data.mask.sum()
    whitened = matmul(data.x, inverse_factor.T)
    residual = data.y - matmul(whitened, matmul(whitened.T, data.y[:, None]))[:, 0]
    # The intercept adds 1 / n to the hat matrix.
    if held.shape[1] == 1:  # leave-one-out
        return residual / (1.0 - _sum_of_squares(whitened) - 1.0 / n_stars)

    def hold_out(fold: tuple[AnyArray]) -> AnyArray:
        (rows,) = fold
        part, mask = _gather(whitened, rows), _gather(data.mask, rows)
        block = xp.diag(mask) - matmul(part, part.T) - xp.outer(mask, mask) / n_stars
        return _solve_block(block, _gather(residual, rows), rows == n)

    return _hold_out_each(hold_out, data, held)


@jit_off_host
def _residuals_by_fold(data: Centred, without_fold: Moments, alpha: Any, held: AnyArray) -> AnyArray:
    """(N,) held-out residuals from the moments of all stars but those of each fold."""

    def hold_out(fold: tuple[AnyArray, Moments]) -> AnyArray:
        rows, train = fold
        x_held, y_held = _gather(data.x, rows) - train.x_mean[None, :], _gather(data.y, rows) - train.y_mean
        return y_held - matmul(x_held, solve_moments(train, alpha).coef[:, None])[:, 0]

    return _hold_out_each(hold_out, data, held, without_fold)
