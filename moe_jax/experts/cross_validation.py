"""Exact cross-validation of ridge regressions: the residuals of every fold, for every alpha, without refitting.

There are three forms; ``choose_solver`` takes the cheapest. S are the rows of a fold.

- ``Dual``, for fewer stars than pixels. K is the kernel, C the upper left block of the inverse of the bordered matrix
  [[K + alpha I, 1], [1', 0]], and a = C y. The held-out residuals are C_SS^-1 a_S (Cawley & Talbot 2004, eq. 11; An, Liu &
  Venkatesh 2007, eq. 15).
- ``Primal``, for many small folds. H is the hat matrix and r are the residuals of the fit to all stars. The held-out residuals
  are (I - H_SS)^-1 r_S.
- ``ByFold``, for few large folds: a fit to the sums of all stars less those of the fold.

The first two take one factorisation for each alpha, however many folds there are: leave-one-out costs what five folds cost.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError, matmul, require_same_length
from moe_jax.core.cholesky import inverse_cholesky
from moe_jax.core.convert import convert_arguments
from moe_jax.experts import ridge
from moe_jax.experts.alphas import require_positive, search_alphas
from moe_jax.experts.ridge import Centred, Ridge, center, is_dual, jitter, kernel
from moe_jax.experts.sums import Sums, hold_out_each, moments, solve_moments, sum_stars

# These numbers set the speed and the memory. The results do not depend on them, except for rounding.
SMALL_FOLD = 32  # rows; blocks up to this size do not keep a processor busy one by one
FOLDS_AT_A_TIME = 16  # so many small blocks are formed together
ROWS_WORTH_SKIPPING = 1_024  # below, the zeros of a triangular factor cost less than a program of their own
ROW_STEPS = 6  # the rows to skip are rounded down to this fraction of all rows, so that similar data sets share programs
# Time of factorising an (n, n) matrix, in units of n^3 operations of a matrix product; measured on two CPU cores.
CHOLESKY_COST = 1.0
INVERSE_CHOLESKY_COST = 1.5


class RidgeCV(NamedTuple):
    """Exact cross-validation of a ridge regression over several alphas."""

    mse: Float[jax.Array, " A"]  #: mean squared error of the out-of-fold predictions of all N stars
    predictions: Float[jax.Array, "A N"]  #: prediction of each star by the model fitted without the star's fold


class CrossValidatedRidge(NamedTuple):
    """A ridge regression whose alpha was chosen by cross-validation, or K of them, stacked: the experts."""

    ridge: Ridge  #: coef (P,) and intercept (), or (K, P) and (K,)
    alpha: Float[jax.Array, "*k"]  #: the chosen alpha
    at_edge: Bool[jax.Array, "*k"]  #: whether it is the smallest or the largest that was tried
    alphas: Float[jax.Array, "*k A"]  #: the alphas tried: those of the grid, then those that extend it (NaN where there is none)
    mse: Float[jax.Array, "*k A"]  #: cross-validated mean squared error at each of ``alphas``
    out_of_fold: Float[jax.Array, " N"]  #: each star predicted without its fold, by its own cell's expert; NaN without a cell


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
    require_same_length(x=x, y=y, folds=folds)
    require_positive(alphas)
    x, y, folds = jnp.asarray(x), jnp.asarray(y), np.asarray(folds)
    alphas, mask = jnp.asarray(alphas, x.dtype), jnp.ones(len(x), x.dtype)
    if not is_dual(x):
        return choose_solver(x, y, mask, held_rows(folds), len(x)).cross_validate(alphas)
    order = np.argsort(folds, kind="stable")
    cv = choose_solver(x[order], y[order], mask, held_rows(folds[order]), len(x)).cross_validate(alphas)
    return cv._replace(predictions=cv.predictions[:, np.argsort(order)])


def fit_cross_validated(
    x: jax.Array,
    y: jax.Array,
    mask: jax.Array,
    alphas: jax.Array,
    held: Int[np.ndarray, "folds n_held"],
    n_stars: int,
    extend_decades: int = 0,
) -> CrossValidatedRidge:
    """Cross-validates over the alphas and fits with the best; the Gram matrix is formed once.

    Args:
        x: features; the rows after the first ``n_stars`` are padding, and 0.
        y: target, padded likewise.
        mask: 1 for a star, 0 for padding.
        alphas: penalties.
        held: ``held_rows``; in the dual form (fewer rows than columns) the rows of a fold must follow one another.
        n_stars: number of rows that are stars.
        extend_decades: see ``search_alphas``.
    """
    solver = choose_solver(x, y, mask, held, n_stars)
    choice, tried, mse, out_of_fold = search_alphas(alphas, solver.cross_validate, extend_decades)
    return CrossValidatedRidge(solver.solve(choice.alpha), choice.alpha, choice.at_edge, tried, mse, out_of_fold)


def held_rows(folds: AnyArray, n_padded: int | None = None, slack: int = 0) -> Int[np.ndarray, "folds n_held"]:
    """Rows of each fold, padded to a common length.

    Args:
        folds: fold of each star, any integers, at least two different ones.
        n_padded: number of rows of the padded arrays that are indexed, N by default. The same number marks padding.
        slack: if not 0, the length is at least that of equal folds of the padded rows plus this, so that data sets of one
            padded size share their shapes.

    Raises:
        InputError: fewer than two folds.
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


def choose_solver(
    x: jax.Array, y: jax.Array, mask: jax.Array, held: Int[np.ndarray, "folds n_held"], n_stars: int
) -> Dual | Primal | ByFold:
    """The cheapest form for the numbers of stars, pixels and folds; arguments as those of ``fit_cross_validated``."""
    (n, p), (n_folds, n_held) = x.shape, held.shape
    if is_dual(x):
        return Dual(x, y, mask, held, n_stars)
    by_fold = n_folds * CHOLESKY_COST * p**3
    at_once = INVERSE_CHOLESKY_COST * p**3 + n * p**2 + n_folds * (n_held**2 * p + n_held**3)
    return ByFold(x, y, mask, held) if by_fold < at_once else Primal(x, y, mask, held)


class _Solver:
    """What the three forms share: the inverse Cholesky factor of the Gram matrix for each alpha, and the fit to all stars."""

    data: Centred
    matrix: jax.Array  # the Gram matrix, X X' or X'X
    jitter: jax.Array
    n_used: int | None = None  # rows of the matrix that are not padding, if not all

    def __init__(self, x: jax.Array, y: jax.Array, mask: jax.Array, held: np.ndarray) -> None:
        self.held = held
        self._factors: dict[float, jax.Array] = {}
        self.prepare(x, y, mask)

    def prepare(self, x: jax.Array, y: jax.Array, mask: jax.Array) -> None:
        """Sets what does not depend on alpha."""
        self.data, self.matrix, self.jitter = _center_and_multiply(x, y, mask)

    def inverse_factor(self, alpha: jax.Array | np.floating) -> jax.Array:
        """W with (matrix + alpha I)^-1 = W' W, computed once for each alpha."""
        if isinstance(alpha, jax.core.Tracer):  # under jit
            return inverse_cholesky(self.matrix, alpha + self.jitter, self.n_used)
        if float(alpha) not in self._factors:
            for growth in (1, 32, 32**2, 32**3):  # as in ``shifted_cholesky``
                factor = inverse_cholesky(self.matrix, alpha + growth * self.jitter, self.n_used)
                if jnp.isfinite(factor[0, 0]):
                    break
            self._factors[float(alpha)] = factor
        return self._factors[float(alpha)]

    def residuals(self, alpha: jax.Array | np.floating) -> Float[jax.Array, " N"]:
        """Target less out-of-fold prediction."""
        raise NotImplementedError

    def cross_validate(self, alphas: jax.Array) -> RidgeCV:
        """Errors and out-of-fold predictions."""
        each = alphas if isinstance(alphas, jax.core.Tracer) else np.asarray(alphas)
        return _cross_validation_of(self.data, [self.residuals(alpha) for alpha in each])

    def solve(self, alpha: jax.Array) -> Ridge:
        """The ridge of all stars."""
        return _solve(self.data, alpha, self.inverse_factor(alpha))


class Dual(_Solver):
    """One factor of the kernel for each alpha; the rows of a fold follow one another."""

    def __init__(self, x: jax.Array, y: jax.Array, mask: jax.Array, held: np.ndarray, n_stars: int) -> None:
        super().__init__(x, y, mask, held)
        self.n_used, self.first_rows = n_stars, _first_rows(held, len(y))

    def residuals(self, alpha: jax.Array | np.floating) -> Float[jax.Array, " N"]:
        return _dual_residuals(self.data, self.inverse_factor(alpha), self.held, self.first_rows)


class Primal(_Solver):
    """One factor of the scatter matrix for each alpha."""

    def residuals(self, alpha: jax.Array | np.floating) -> Float[jax.Array, " N"]:
        return _primal_residuals(self.data, self.inverse_factor(alpha), self.held)


class ByFold(_Solver):
    """One factor of the scatter matrix for each alpha and fold."""

    def prepare(self, x: jax.Array, y: jax.Array, mask: jax.Array) -> None:
        self.data = _center(x, y, mask)
        self.by_fold = _sum_by_fold(self.data, self.held)
        self.matrix, self.jitter = _sum_folds(self.by_fold.xx)

    def residuals(self, alpha: jax.Array | np.floating) -> Float[jax.Array, " N"]:
        return _residuals_by_fold(self.data, self.by_fold, alpha, self.held)


_center = jax.jit(center)


@jax.jit
def _center_and_multiply(x: jax.Array, y: jax.Array, mask: jax.Array) -> tuple[Centred, jax.Array, jax.Array]:
    data = center(x, y, mask)
    return data, *kernel(data)


@jax.jit
def _solve(data: Centred, alpha: jax.Array, inverse_factor: jax.Array) -> Ridge:
    return ridge.solve(data, alpha, lambda b: matmul(inverse_factor.T, matmul(inverse_factor, b)))


@jax.jit
def _cross_validation_of(data: Centred, residuals: list[jax.Array]) -> RidgeCV:
    stacked = jnp.stack(residuals)
    mse = jnp.sum((stacked * data.mask[None, :]) ** 2, axis=1) / jnp.sum(data.mask)
    return RidgeCV(mse, (data.y + data.y_mean)[None, :] - stacked)


def _batch(held: AnyArray) -> int | None:
    """How many folds are worked on at a time; None for one."""
    return min(FOLDS_AT_A_TIME, len(held)) if held.shape[1] <= SMALL_FOLD else None


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
    """First possibly non-zero row of each fold's columns of a lower triangle, rounded down so that data sets share shapes.

    Empty where folds are many: they share one program that reads all rows.
    """
    if len(held) > FOLDS_AT_A_TIME:
        return ()
    if n < ROWS_WORTH_SKIPPING:
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
        """W_S' W_S of the columns of W that belong to the fold."""
        columns = lax.dynamic_slice_in_dim(inverse_factor[first_row:], jnp.minimum(rows[0], n - n_held), n_held, 1)
        return matmul(columns.T, columns)

    def hold_out(fold: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        rows, block = fold
        start = jnp.minimum(rows[0], n - n_held)  # the slice may reach over the ends of the fold
        window = start + jnp.arange(n_held)
        in_fold = (window >= rows[0]) & (window < rows[0] + jnp.sum(rows < n))
        column, right = (jnp.where(in_fold, lax.dynamic_slice_in_dim(values, start, n_held), 0.0) for values in (ones, a))
        block = jnp.where(in_fold[:, None] & in_fold[None, :], block, 0.0) - jnp.outer(column, column) / total
        return _solve_block(block, right, ~in_fold), jnp.where(in_fold, window, n)

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
    return lax.map(lambda rows: sum_stars(*(_gather(array, rows) for array in (data.x, data.y, data.mask))), held)


@jax.jit
def _sum_folds(by_fold: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The Gram matrix from those of the folds, and its jitter."""
    matrix = jnp.sum(by_fold, axis=0)
    return matrix, jitter(matrix)


@jax.jit
def _residuals_by_fold(data: Centred, by_fold: Sums, alpha: jax.Array, held: jax.Array) -> jax.Array:
    """(N,) held-out residuals from the sums of each fold."""

    def residuals(_: Sums, rest: Sums, rows: jax.Array) -> jax.Array:
        train = moments(rest)
        x_held, y_held = _gather(data.x, rows) - train.x_mean[None, :], _gather(data.y, rows) - train.y_mean
        return y_held - matmul(x_held, solve_moments(train, alpha).coef[:, None])[:, 0]

    return _scatter(hold_out_each(residuals, by_fold, held), held, len(data.y))
