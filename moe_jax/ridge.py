r"""Ridge regression in closed form, with an unpenalised intercept, and its exact cross-validation.

The fit minimises |y - X w - b|^2 + alpha |w|^2. X and y are centred first, which is the same as leaving b unpenalised. For
N < P the dual form is solved, (X X' + alpha I) a = y and w = X' a; otherwise the primal form, (X'X + alpha I) w = X' y. Both
by Cholesky.

What keeps a small alpha stable in float32:

- All products are computed with ``Precision.HIGHEST`` (a GPU's default would be TF32, with 10 bits).
- The centred kernel X X' has the eigenvalue 0 along the vector of ones. As a has no part along it, a constant may be added
  to all of the kernel: it moves that eigenvalue into the middle of the spectrum and changes nothing else.
- The matrix that is factorised carries a jitter of a few units in the last place of its mean eigenvalue, so that the
  factorisation succeeds however small alpha is. It only preconditions: the solution is refined against X itself, not
  against the rounded X X', until the residual of the equations is at rounding level.
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

from moe_jax.arrays import AnyArray, InputError, require_same_length

matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)

REFINEMENT_STEPS = 3
JITTER_ULPS = 4.0

# Costs of the decompositions in units of n^3, as measured against products on two CPU cores; they decide which of two
# exact forms is used, so they need not be precise.
CHOLESKY_COST = 1.0
EIGH_COST = 16.0
BLOCK_BATCH = 16  # folds whose held-out blocks are formed at a time, where there are many


class Ridge(NamedTuple):
    """A fitted linear model, y = x @ coef + intercept."""

    coef: Float[jax.Array, " P"]
    intercept: Float[jax.Array, ""]


class RidgeCV(NamedTuple):
    """Exact cross-validation of a ridge regression over several alphas."""

    mse: Float[jax.Array, " A"]  #: mean squared error of the out-of-fold predictions of all N stars
    predictions: Float[jax.Array, "A N"]  #: prediction of each star by the model fitted without the star's fold


class AlphaChoice(NamedTuple):
    """The alpha of the smallest cross-validated error."""

    alpha: Float[jax.Array, ""]
    position: Int[jax.Array, ""]  #: its place among the alphas
    at_edge: jax.Array  #: bool: it is the smallest or the largest of several, so the best may lie outside the grid


class Folds(NamedTuple):
    """Rows of each fold, padded to a common length; ``N`` marks padding and is dropped by gathers and scatters."""

    train: Int[AnyArray, "folds n_train"]
    held: Int[AnyArray, "folds n_held"]


def fit_ridge(x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], alpha: ArrayLike) -> Ridge:
    """Fits y on x by ridge regression with an unpenalised intercept; exact, by Cholesky, jitted.

    Args:
        x: features; the computation runs in its precision.
        y: target.
        alpha: penalty of the squared coefficients, in the convention of scikit-learn's ``Ridge``; > 0.

    Raises:
        InputError: shapes that disagree, or an alpha that is not positive.
    """
    require_same_length(x=x, y=y)
    _require_positive(alpha)
    return _fit(jnp.asarray(x), jnp.asarray(y), alpha, jnp.ones(len(x)))


@jax.jit
def _fit(x: jax.Array, y: jax.Array, alpha: ArrayLike, root: jax.Array) -> Ridge:
    centred = center(x, y, root.astype(x.dtype))
    return solve(centred, gram(centred.x), jnp.asarray(alpha, x.dtype))


def fit_weighted_ridge(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], sample_weight: Float[AnyArray, " N"], alpha: ArrayLike
) -> Ridge:
    """Ridge regression of stars with weights: minimises sum_i s_i (y_i - x_i w - b)^2 + alpha |w|^2.

    Args:
        x: features.
        y: target.
        sample_weight: s_i, at least 0 and not all 0.
        alpha: penalty, > 0.

    Raises:
        InputError: shapes that disagree, weights or an alpha out of range.
    """
    require_same_length(x=x, y=y, sample_weight=sample_weight)
    _require_positive(alpha)
    if not isinstance(sample_weight, jax.core.Tracer):
        values = np.asarray(sample_weight)
        if not (np.isfinite(values) & (values >= 0)).all() or not values.any():
            raise InputError(f"sample_weight holds {values.min()} to {values.max()}, expected numbers >= 0, not all 0")
    return _fit(jnp.asarray(x), jnp.asarray(y), alpha, jnp.sqrt(jnp.asarray(sample_weight)))


@jax.jit
def predict_ridge(ridge: Ridge, x: Float[AnyArray, "N P"]) -> Float[jax.Array, " N"]:
    """Predictions x @ coef + intercept."""
    return matmul(x, ridge.coef[:, None])[:, 0] + ridge.intercept


def cross_validate_ridge(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], alphas: Float[AnyArray, " A"], folds: Int[AnyArray, " N"]
) -> RidgeCV:
    """Out-of-fold predictions of ridge regressions: exactly those of refitting without each fold, for every alpha.

    One Gram matrix serves all folds and alphas. Either each training part is factorised by itself, for each alpha, or one
    decomposition gives the held-out residuals of all folds: the eigendecomposition of the kernel, for all alphas, where
    N < P, one Cholesky factor per alpha otherwise. The form that needs fewer operations is chosen.

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
    alphas = jnp.asarray(alphas, jnp.asarray(x).dtype)
    _require_positive(alphas)
    rows = fold_rows(folds)
    return _cross_validate(jnp.asarray(x), jnp.asarray(y), alphas, rows)


@jax.jit
def _cross_validate(x: jax.Array, y: jax.Array, alphas: jax.Array, folds: Folds) -> RidgeCV:
    data = center(x, y, jnp.ones(len(x), x.dtype))
    return cross_validate_centred(data, gram_by_fold(data, alphas, folds), alphas, folds)


def select_alpha(alphas: Float[AnyArray, " A"], mse: Float[AnyArray, " A"]) -> AlphaChoice:
    """The alpha with the smallest error; a tie goes to the larger alpha."""
    alphas, mse = jnp.asarray(alphas), jnp.asarray(mse)
    position = jnp.argmax(jnp.where(mse == jnp.min(mse), alphas, -jnp.inf))
    alpha = alphas[position]
    at_edge = ((alpha == jnp.min(alphas)) | (alpha == jnp.max(alphas))) & (len(alphas) > 1)
    return AlphaChoice(alpha, position, at_edge)


# What follows is shared with moe_jax.experts, which calls it on cells padded to a common size: `mask` is 1 for a star and
# 0 for padding (the root of the weight in a weighted fit), and padded rows of x and y are 0 once they are centred.


class Centred(NamedTuple):
    """Data with the mean removed, each row scaled by the root of its weight."""

    x: Float[jax.Array, "N P"]
    y: Float[jax.Array, " N"]
    mask: Float[jax.Array, " N"]
    x_mean: Float[jax.Array, " P"]
    y_mean: Float[jax.Array, ""]


class Sums(NamedTuple):
    """Sums over stars that determine a primal ridge fit; those of a part are subtracted to hold it out."""

    n: Float[jax.Array, "*f"]
    x: Float[jax.Array, "*f P"]
    y: Float[jax.Array, "*f"]
    xx: Float[jax.Array, "*f P P"]
    xy: Float[jax.Array, "*f P"]


class Gram(NamedTuple):
    """The one Gram matrix of a fit: X X' where the dual form is the cheaper one, otherwise X'X."""

    matrix: Float[jax.Array, "M M"]
    by_fold: Sums | None  #: the parts of X'X by fold, where cross-validation uses them


def is_dual(x: AnyArray) -> bool:
    """Whether the dual form is the cheaper one."""
    return x.shape[0] < x.shape[1]


def center(x: jax.Array, y: jax.Array, mask: jax.Array) -> Centred:
    """Removes the weighted means, and scales each row by ``mask``: the root of its weight, 1 for a star and 0 for padding.

    With (x - mean) sqrt(s) and (y - mean) sqrt(s) for x and y, a weighted ridge is an unweighted one.
    """
    weight = mask**2
    n = jnp.sum(weight)
    y = y.astype(x.dtype)
    x_mean = matmul(weight[None, :], x)[0] / n
    # The mean is removed twice: what float32 left of it in the first pass is gone after the second.
    x_centred = x - x_mean[None, :]
    rest = matmul(weight[None, :], x_centred)[0] / n
    y_mean = jnp.sum(y * weight) / n
    return Centred((x_centred - rest[None, :]) * mask[:, None], (y - y_mean) * mask, mask, x_mean + rest, y_mean)


def gram(x: jax.Array) -> jax.Array:
    """The smaller of X X' and X'X."""
    return matmul(x, x.T) if is_dual(x) else matmul(x.T, x)


def gram_by_fold(data: Centred, alphas: jax.Array, folds: Folds) -> Gram:
    """The Gram matrix, in parts by fold where the cross-validation will hold them out by subtraction."""
    if is_dual(data.x) or _is_cheaper_at_once(data.x, alphas, folds):
        return Gram(gram(data.x), None)

    def sums(held: jax.Array) -> Sums:
        x, y, mask = (_gather(array, held) for array in (data.x, data.y, data.mask))
        return Sums(jnp.sum(mask), jnp.sum(x, axis=0), jnp.sum(y), matmul(x.T, x), matmul(x.T, y[:, None])[:, 0])

    by_fold = lax.map(sums, jnp.asarray(folds.held))
    return Gram(jnp.sum(by_fold.xx, axis=0), by_fold)


def _cholesky(matrix: jax.Array, alpha: jax.Array, shift: jax.Array) -> jax.Array:
    """Factor of matrix + alpha I; ``shift`` is the matrix's mean eigenvalue, whose last places set the jitter."""
    diagonal = jnp.arange(len(matrix))
    jitter = JITTER_ULPS * jnp.finfo(matrix.dtype).eps * shift
    factor: jax.Array = lax.linalg.cholesky(matrix.at[diagonal, diagonal].add(alpha + jitter), symmetrize_input=False)
    return factor


def _cho_solve(factor: jax.Array, b: jax.Array) -> jax.Array:
    solution: jax.Array = jsl.cho_solve((factor, True), b)
    return solution


def solve(data: Centred, gram_matrix: jax.Array, alpha: jax.Array) -> Ridge:
    """Ridge of centred data, given its Gram matrix; refined against the data."""
    x, y, mask = data.x, data.y, data.mask
    mean_eigenvalue = jnp.trace(gram_matrix) / len(gram_matrix)
    if is_dual(x):
        factor = _cholesky(gram_matrix + mean_eigenvalue * jnp.outer(mask, mask), alpha, mean_eigenvalue)

        def refine(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
            a, coef = state
            residual = y - matmul(x, coef[:, None])[:, 0] - alpha * a
            step = _cho_solve(factor, residual[:, None])
            return a + step[:, 0], coef + matmul(x.T, step)[:, 0]

        start = jnp.zeros_like(y), jnp.zeros_like(data.x_mean)
        coef = lax.fori_loop(0, REFINEMENT_STEPS, refine, start)[1]
    else:
        factor = _cholesky(gram_matrix, alpha, mean_eigenvalue)

        def refine_primal(_: jax.Array, coef: jax.Array) -> jax.Array:
            residual = y - matmul(x, coef[:, None])[:, 0]
            gradient = matmul(x.T, residual[:, None])[:, 0] - alpha * coef
            return coef + _cho_solve(factor, gradient[:, None])[:, 0]

        coef = lax.fori_loop(0, REFINEMENT_STEPS, refine_primal, jnp.zeros_like(data.x_mean))
    return Ridge(coef, data.y_mean - jnp.sum(data.x_mean * coef))


def fold_rows(folds: AnyArray, n_padded: int | None = None, slack: int = 0) -> Folds:
    """Training and held-out rows of each fold.

    Args:
        folds: fold of each star, any integers, at least two different ones.
        n_padded: number of rows of the padded arrays that the rows index; N by default. It is also the mark of padding.
        slack: with it, the lengths are those of equal folds of the padded rows plus this, where that is enough, so that data
            sets of one padded size share their shapes.

    Raises:
        InputError: for fewer than two folds.
    """
    folds = np.asarray(folds)
    n_padded = len(folds) if n_padded is None else n_padded
    names = np.unique(folds)
    if len(names) < 2:
        raise InputError(f"folds holds {len(names)} different values, expected at least 2")

    def padded(parts: list[np.ndarray], fraction: float) -> np.ndarray:
        longest = max(map(len, parts))
        length = max(longest, round(fraction * n_padded) + slack) if slack else longest
        return np.stack([np.pad(part, (0, length - len(part)), constant_values=n_padded) for part in parts]).astype(np.int32)

    held = [np.flatnonzero(folds == name) for name in names]
    if len(names) == len(folds):  # leave-one-out always takes the many-folds form, which needs no training rows
        return Folds(np.zeros((len(names), 0), np.int32), padded(held, 1 / len(names)))
    train = [np.flatnonzero(folds != name) for name in names]
    return Folds(padded(train, 1 - 1 / len(names)), padded(held, 1 / len(names)))


def cross_validate_centred(data: Centred, gram: Gram, alphas: jax.Array, folds: Folds) -> RidgeCV:
    """Exact out-of-fold predictions of centred data, given its Gram matrix."""
    if gram.by_fold is not None:
        residual = _primal_by_fold(data, gram.by_fold, alphas, folds)
    elif not is_dual(data.x):
        residual = _primal_at_once(data, gram.matrix, alphas, folds)
    elif _is_cheaper_at_once(data.x, alphas, folds):
        residual = _dual_at_once(data, gram.matrix, alphas, folds)
    else:
        residual = _dual_by_fold(data, gram.matrix, alphas, folds)
    mse = jnp.sum((residual * data.mask[None, :]) ** 2, axis=1) / jnp.sum(data.mask)
    return RidgeCV(mse, (data.y + data.y_mean)[None, :] - residual)


def _is_cheaper_at_once(x: jax.Array, alphas: jax.Array, folds: Folds) -> bool:
    """Whether one decomposition for all folds costs less than one for each fold and alpha; units of a product's flops / 2."""
    (n, p), (n_folds, n_held), n_train, n_alphas = x.shape, folds.held.shape, folds.train.shape[1], len(alphas)
    if n_train == 0:  # leave-one-out
        return True
    if is_dual(x):
        by_fold = n_alphas * n_folds * CHOLESKY_COST * n_train**3
        at_once = EIGH_COST * n**3 + n_alphas * n_folds * (2 * n_held**2 * n + n_held**3)
    else:
        by_fold = n_alphas * n_folds * CHOLESKY_COST * p**3
        at_once = n_alphas * (CHOLESKY_COST * p**3 + 2 * n * p**2 + n_folds * (2 * n_held**2 * p + n_held**3))
    return at_once < by_fold


def _gather(array: jax.Array, rows: jax.Array) -> jax.Array:
    return array.at[rows].get(mode="fill", fill_value=0)


def _scatter(by_fold: jax.Array, rows: AnyArray, n: int) -> jax.Array:
    """From (folds, A, n_held) values to (A, N)."""
    values = jnp.moveaxis(by_fold, 1, 0).reshape(by_fold.shape[1], -1)
    return jnp.zeros((len(values), n), by_fold.dtype).at[:, jnp.asarray(rows).reshape(-1)].set(values, mode="drop")


def _dual_by_fold(data: Centred, kernel: jax.Array, alphas: jax.Array, folds: Folds) -> jax.Array:
    """Held-out residuals by one Cholesky of the training part of the kernel for each fold and alpha."""
    shift = jnp.trace(kernel) / len(kernel)

    def hold_out(rows: tuple[jax.Array, jax.Array]) -> jax.Array:
        train, held = rows
        y, mask = _gather(data.y, train), _gather(data.mask, train)
        k_train = _gather(_gather(kernel, train).T, train) + shift * jnp.outer(mask, mask)
        k_held = _gather(_gather(kernel, held).T, train).T
        right = jnp.stack([y, mask], axis=1)

        def one_alpha(alpha: jax.Array) -> jax.Array:
            solution = _cho_solve(_cholesky(k_train, alpha, shift), right)
            # [[K + alpha I, 1], [1', 0]] [a; b] = [y; 0]
            intercept = jnp.sum(mask * solution[:, 0]) / jnp.sum(mask * solution[:, 1])
            a = solution[:, 0] - intercept * solution[:, 1]
            return _gather(data.y, held) - matmul(k_held, a[:, None])[:, 0] - intercept

        return lax.map(one_alpha, alphas)

    by_fold = lax.map(hold_out, (jnp.asarray(folds.train), jnp.asarray(folds.held)))
    return _scatter(by_fold, folds.held, len(data.y))


def _solve_block(block: jax.Array, residual: jax.Array, padding: jax.Array) -> jax.Array:
    """Solves one fold's symmetric positive (n_held, n_held) block for its residuals; padded rows become the identity."""
    block = block + jnp.diag(padding.astype(block.dtype))
    if len(block) == 1:  # leave-one-out
        return residual / block[0]
    solution: jax.Array = jnp.linalg.solve(block, residual)
    return solution


def _dual_at_once(data: Centred, kernel: jax.Array, alphas: jax.Array, folds: Folds) -> jax.Array:
    """Held-out residuals of all folds and alphas from one eigendecomposition of the kernel.

    With C the upper left block of the inverse of the bordered matrix [[K + alpha I, 1], [1', 0]] and a = C y, the held-out
    residuals of the fold S are C_SS^-1 a_S (Cawley & Talbot 2004, eq. 11; An, Liu & Venkatesh 2007, eq. 15). From
    K = V L V' follow (K + alpha I)^-1 = V (L + alpha)^-1 V' for every alpha, and of it only the blocks that are needed.
    """
    n, held = len(data.y), jnp.asarray(folds.held)
    shift = jnp.trace(kernel) / n
    eigenvalues, vectors = jnp.linalg.eigh(kernel + shift * jnp.outer(data.mask, data.mask), symmetrize_input=False)
    # Rounding leaves eigenvalues a little below 0 where there should be none; the jitter is that of the Cholesky form.
    eigenvalues = jnp.maximum(eigenvalues, 0.0) + JITTER_ULPS * jnp.finfo(kernel.dtype).eps * shift
    projected = matmul(vectors.T, jnp.stack([data.y, data.mask], axis=1))
    by_fold = _gather(vectors, held)

    def one_alpha(alpha: jax.Array) -> jax.Array:
        inverse = 1.0 / (eigenvalues + alpha)
        solution = matmul(vectors, inverse[:, None] * projected)
        ones, total = solution[:, 1], jnp.sum(data.mask * solution[:, 1])
        a = solution[:, 0] - ones * jnp.sum(data.mask * solution[:, 0]) / total

        def hold_out(fold: tuple[jax.Array, jax.Array]) -> jax.Array:
            rows, own = fold
            column = _gather(ones, rows)
            block = matmul(own * inverse[None, :], own.T) - jnp.outer(column, column) / total
            return _solve_block(block, _gather(a, rows), rows == n)

        return lax.map(hold_out, (held, by_fold), batch_size=min(BLOCK_BATCH, len(held)))

    return _scatter(jnp.moveaxis(lax.map(one_alpha, alphas), 0, 1), folds.held, n)


def _primal_by_fold(data: Centred, by_fold: Sums, alphas: jax.Array, folds: Folds) -> jax.Array:
    """Held-out residuals from the Gram matrix of each fold: a fold is held out by subtracting its own from their sum."""
    total = jax.tree.map(lambda sums: jnp.sum(sums, axis=0), by_fold)

    def hold_out(fold: tuple[Sums, jax.Array]) -> jax.Array:
        own, held = fold
        train: Sums = jax.tree.map(jnp.subtract, total, own)
        x_mean, y_mean = train.x / train.n, train.y / train.n
        scatter = train.xx - train.n * jnp.outer(x_mean, x_mean)
        right = train.xy - train.n * y_mean * x_mean
        mean_eigenvalue = jnp.trace(scatter) / len(scatter)
        x_held = _gather(data.x, held) - x_mean[None, :]

        def one_alpha(alpha: jax.Array) -> jax.Array:
            coef = _cho_solve(_cholesky(scatter, alpha, mean_eigenvalue), right[:, None])
            return _gather(data.y, held) - y_mean - matmul(x_held, coef)[:, 0]

        return lax.map(one_alpha, alphas)

    residuals = lax.map(hold_out, (by_fold, jnp.asarray(folds.held)))
    return _scatter(residuals, folds.held, len(data.y))


def _primal_at_once(data: Centred, scatter: jax.Array, alphas: jax.Array, folds: Folds) -> jax.Array:
    """Held-out residuals (I - H_SS)^-1 r_S of all folds from one factorisation per alpha, H the hat matrix."""
    n, held = len(data.y), jnp.asarray(folds.held)
    mean_eigenvalue = jnp.trace(scatter) / len(scatter)
    right = matmul(data.x.T, data.y[:, None])

    def one_alpha(alpha: jax.Array) -> jax.Array:
        factor = _cholesky(scatter, alpha, mean_eigenvalue)
        residual = data.y - matmul(data.x, _cho_solve(factor, right))[:, 0]
        whitened = lax.linalg.triangular_solve(factor, data.x, left_side=False, lower=True, transpose_a=True)  # X L'^-1

        def hold_out(rows: jax.Array) -> jax.Array:
            part, mask = _gather(whitened, rows), _gather(data.mask, rows)
            # The intercept adds 1 / n to the hat matrix.
            block = jnp.diag(mask) - matmul(part, part.T) - jnp.outer(mask, mask) / jnp.sum(data.mask)
            return _solve_block(block, _gather(residual, rows), rows == n)

        return lax.map(hold_out, held, batch_size=min(BLOCK_BATCH, len(held)))

    return _scatter(jnp.moveaxis(lax.map(one_alpha, alphas), 0, 1), folds.held, n)


def _require_positive(alpha: ArrayLike) -> None:
    if isinstance(alpha, jax.core.Tracer):
        return
    values = np.asarray(alpha)
    if not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"alpha is {alpha}, expected positive numbers")
