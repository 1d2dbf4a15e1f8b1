r"""Ridge regression in closed form, with an unpenalised intercept.

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
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError, matmul, require_same_length
from moe_jax.core.cholesky import shifted_cholesky

REFINEMENT_STEPS = 3
JITTER_ULPS = 4.0


class Ridge(NamedTuple):
    """A fitted linear model, y = x @ coef + intercept."""

    coef: Float[jax.Array, " P"]
    intercept: Float[jax.Array, ""]


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
    require_positive(alpha)
    return _fit(jnp.asarray(x), jnp.asarray(y), alpha, jnp.ones(len(x)))


@jax.jit
def _fit(x: jax.Array, y: jax.Array, alpha: ArrayLike, root: jax.Array) -> Ridge:
    data = center(x, y, root.astype(x.dtype))
    alpha = jnp.asarray(alpha, x.dtype)
    matrix, mean_eigenvalue = kernel(data)
    factor = cholesky(matrix, alpha, mean_eigenvalue)
    return solve(data, alpha, functools.partial(cho_solve, factor))


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
    require_positive(alpha)
    if not isinstance(sample_weight, jax.core.Tracer):
        values = np.asarray(sample_weight)
        if not (np.isfinite(values) & (values >= 0)).all() or not values.any():
            raise InputError(f"sample_weight holds {values.min()} to {values.max()}, expected numbers >= 0, not all 0")
    return _fit(jnp.asarray(x), jnp.asarray(y), alpha, jnp.sqrt(jnp.asarray(sample_weight)))


@jax.jit
def predict_ridge(ridge: Ridge, x: Float[AnyArray, "N P"]) -> Float[jax.Array, " N"]:
    """Predictions x @ coef + intercept."""
    return matmul(x, ridge.coef[:, None])[:, 0] + ridge.intercept


@jax.jit
def predict_ridges(ridges: Ridge, x: Float[AnyArray, "N P"]) -> Float[jax.Array, "N K"]:
    """Predictions of K stacked ridges, coef (K, P) and intercept (K,), for all stars: one matmul."""
    return matmul(x, ridges.coef.T) + ridges.intercept[None, :]


# What follows is shared with moe_jax.experts.cross_validation, which pads cells to a common size: `mask` is 1 for a star and
# 0 for padding (the root of the weight in a weighted fit), and padded rows of x and y are 0 once they are centred.


class Centred(NamedTuple):
    """Data with the mean removed, each row scaled by the root of its weight."""

    x: Float[jax.Array, "N P"]
    y: Float[jax.Array, " N"]
    mask: Float[jax.Array, " N"]
    x_mean: Float[jax.Array, " P"]
    y_mean: Float[jax.Array, ""]


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


def kernel(data: Centred) -> tuple[jax.Array, jax.Array]:
    """The smaller of X X', with its zero eigenvalue moved, and X'X; and its mean eigenvalue."""
    x, mask = data.x, data.mask
    if not is_dual(x):
        matrix = matmul(x.T, x)
        return matrix, jnp.trace(matrix) / len(matrix)
    matrix = matmul(x, x.T)
    mean_eigenvalue = jnp.trace(matrix) / len(matrix)
    return matrix + mean_eigenvalue * jnp.outer(mask, mask), mean_eigenvalue


def jitter(mean_eigenvalue: jax.Array) -> jax.Array:
    """What is added to the diagonal so that the factorisation succeeds."""
    return JITTER_ULPS * jnp.finfo(mean_eigenvalue.dtype).eps * mean_eigenvalue


def cholesky(matrix: jax.Array, alpha: jax.Array, mean_eigenvalue: jax.Array) -> jax.Array:
    """Factor of matrix + alpha I, with jitter."""
    return shifted_cholesky(matrix, alpha + jitter(mean_eigenvalue))


def cho_solve(factor: jax.Array, b: jax.Array) -> jax.Array:
    """Solution of the equations whose Cholesky factor is given."""
    solution: jax.Array = jsl.cho_solve((factor, True), b)
    return solution


def solve(data: Centred, alpha: jax.Array, apply_inverse: Callable[[jax.Array], jax.Array]) -> Ridge:
    """Ridge of centred data, refined against the data.

    Args:
        data: N centred rows.
        alpha: penalty.
        apply_inverse: multiplies a column by the inverse of the kernel plus alpha.
    """
    x, y = data.x, data.y

    def refine_dual(_: jax.Array, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        a, coef = state
        residual = y - matmul(x, coef[:, None])[:, 0] - alpha * a
        step = apply_inverse(residual[:, None])
        return a + step[:, 0], coef + matmul(x.T, step)[:, 0]

    def refine_primal(_: jax.Array, coef: jax.Array) -> jax.Array:
        residual = y - matmul(x, coef[:, None])[:, 0]
        gradient = matmul(x.T, residual[:, None])[:, 0] - alpha * coef
        return coef + apply_inverse(gradient[:, None])[:, 0]

    zero = jnp.zeros_like(data.x_mean)
    if is_dual(x):
        coef = lax.fori_loop(0, REFINEMENT_STEPS, refine_dual, (jnp.zeros_like(y), zero))[1]
    else:
        coef = lax.fori_loop(0, REFINEMENT_STEPS, refine_primal, zero)
    return Ridge(coef, data.y_mean - jnp.sum(data.x_mean * coef))


def require_positive(alpha: ArrayLike) -> None:
    """Raises unless all penalties are positive; a tracer is not looked at."""
    if isinstance(alpha, jax.core.Tracer):
        return
    values = np.asarray(alpha)
    if not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"alpha is {alpha}, expected positive numbers")
