r"""Ridge regression in closed form, with an unpenalised intercept.

The fit minimises |y - X w - b|^2 + alpha |w|^2. X and y are centred first, which is the same as leaving b unpenalised. For
N < P the dual form is solved, (X X' + alpha I) a = y and w = X' a; otherwise the primal form, (X'X + alpha I) w = X' y. Both
are solved by Cholesky.

Three measures keep a small alpha stable in float32:

- All products are computed with ``Precision.HIGHEST``. A GPU's default would be TF32, with 10 bits.
- The centred kernel X X' has the eigenvalue 0 along the vector of ones. The solution a has no part along that vector, so a
  constant may be added to the whole kernel: it moves this eigenvalue into the middle of the spectrum and changes nothing else.
- A jitter of a few rounding errors of the mean eigenvalue is added to the diagonal of the matrix that is factorised, so that
  the factorisation succeeds however small alpha is. The factor only preconditions: the solution is refined against X itself,
  not against the rounded X X', until the residual of the equations is at rounding level.

Tangents d_it of the features of star i make the fit feel less of a nuisance that moves spectra along them. With independent e_it of
mean 0 and variance 1, the mean over all e of (y_i - (x_i + sum_t e_it d_it) w - b)^2 is the usual square plus sum_t (d_it w)^2
(Bishop 1995, Neural Computation 7, 108; Simard, Victorri, LeCun & Denker 1992, NIPS 4, 895): training on infinitely many copies of
each star. So tangents are further rows of target 0, which have no part in the means. With sums of stars (``moe_jax.experts.sums``)
the same fit is had by adding sum_it d_it' d_it to ``Sums.xx``.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError, by_numpy, matmul, namespace
from moe_jax.core.cholesky import cholesky_solver
from moe_jax.core.convert import convert_arguments
from moe_jax.experts.alphas import require_positive

REFINEMENT_STEPS = 3
JITTER_ULPS = 4.0  # units in the last place of the mean eigenvalue


class Ridge(NamedTuple):
    """A fitted linear model, y = x @ coef + intercept, or several that are stacked in the leading dimensions."""

    coef: Float[AnyArray, "*k P"]
    intercept: Float[AnyArray, "*k"]


@convert_arguments()
def fit_ridge(
    x: Float[AnyArray, "N P"], y: Float[AnyArray, " N"], alpha: ArrayLike, *, tangents: Float[AnyArray, "N T P"] | None = None
) -> Ridge:
    """Fits y on x by ridge regression with an unpenalised intercept; exact, by Cholesky, jitted.

    Args:
        x: features; the computation runs in its precision.
        y: target.
        alpha: penalty of the squared coefficients, in the convention of scikit-learn's ``Ridge``; > 0.
        tangents: T tangents of each star's features, each times the standard deviation of its nuisance, such as those of
            ``tangent_vectors``. The fit has N (T + 1) rows.

    Raises:
        InputError: shapes that disagree, numbers that are not finite, or an alpha that is not positive.
    """
    return _fit(x, y, alpha, np.ones(len(x), np.float32), tangents)


def _fit(x: AnyArray, y: AnyArray, alpha: ArrayLike, root: AnyArray, tangents: AnyArray | None) -> Ridge:
    """The fit of stars with the given roots of their weights; where it is not finite, the error names the array to blame."""
    require_positive(alpha)
    if np.size(alpha) > 1 or not x.shape[1]:
        raise InputError(f"alpha is {alpha} for x of shape {x.shape}, expected one penalty, and at least one column")
    ridge: Ridge = _center_and_solve(x, y, alpha, root, tangents)
    if not isinstance(ridge.coef, jax.core.Tracer) and not np.isfinite(ridge.coef).all():
        for name, array in (("x", x), ("y", y), ("tangents", tangents)):
            if array is not None and not np.isfinite(np.asarray(array)).all():
                raise InputError(f"{name} holds numbers that are not finite, expected finite ones")
        raise InputError("the fit is not finite, expected x of a smaller range or a larger alpha")
    return ridge


@by_numpy
def _center_and_solve(x: AnyArray, y: AnyArray, alpha: Any, root: AnyArray, tangents: AnyArray | None) -> Ridge:
    data = center(x, y, root.astype(x.dtype))
    if tangents is not None:
        data = _append_tangents(data, tangents)
    matrix, added = kernel(data)
    xp = namespace(added)
    alpha = xp.where(xp.isfinite(added), alpha, xp.nan).astype(x.dtype)  # squares that overflow must not end in coefficients of 0
    return solve(data, alpha, cholesky_solver(matrix, alpha, added))


@convert_arguments()
def fit_weighted_ridge(
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    sample_weight: Float[AnyArray, " N"],
    alpha: ArrayLike,
    *,
    tangents: Float[AnyArray, "N T P"] | None = None,
) -> Ridge:
    """Ridge regression of stars with weights: minimises sum_i s_i (y_i - x_i w - b)^2 + alpha |w|^2.

    Args:
        x: features.
        y: target.
        sample_weight: s_i, at least 0 and not all 0. In float32 they should span less than about 10^8.
        alpha: penalty, > 0.
        tangents: as in ``fit_ridge``; the weight of a star is that of its tangents too.

    Raises:
        InputError: shapes that disagree, numbers that are not finite, weights or an alpha out of range.
    """
    if not isinstance(sample_weight, jax.core.Tracer):
        values = np.asarray(sample_weight)
        if not (np.isfinite(values) & (values >= 0)).all() or not values.any():
            raise InputError(f"sample_weight holds {values.min()} to {values.max()}, expected numbers >= 0, not all 0")
    return _fit(x, y, alpha, namespace(sample_weight).sqrt(sample_weight), tangents)


@convert_arguments()
@by_numpy
def predict_ridge(ridge: Ridge, x: Float[AnyArray, "N P"]) -> Float[AnyArray, "N ..."]:
    """Predictions x @ coef + intercept: (N,) of one ridge, (N, K) of K stacked ridges; one matmul in either case.

    A prediction depends on its own row alone, so nothing is centred: rounding is that of x @ coef. Where columns lie far from 0
    against their spread, bring them near 0 before the fit.

    Raises:
        InputError: another number of columns than in the fit.
    """
    *stack, p = ridge.coef.shape
    if x.shape[1] != p:
        raise InputError(f"x has shape {x.shape}, expected (N, {p}) as in the fit")
    return matmul(x, ridge.coef.reshape(-1, p).T).reshape(len(x), *stack) + ridge.intercept[None]


# What follows is shared with moe_jax.experts.cross_validation, which pads cells to a common size. There `mask` is 1 for a star
# and 0 for padding; in a weighted fit it is the root of the weight. Padded rows of x and y are 0 once they are centred.


class Centred(NamedTuple):
    """Data with the mean removed, each row scaled by the root of its weight."""

    x: Float[AnyArray, "N P"]
    y: Float[AnyArray, " N"]
    mask: Float[AnyArray, " N"]
    x_mean: Float[AnyArray, " P"]
    y_mean: Float[AnyArray, ""]


def is_dual(x: AnyArray) -> bool:
    """Whether the dual form is the cheaper one: fewer rows than columns."""
    return x.shape[0] < x.shape[1]


def center(x: AnyArray, y: AnyArray, mask: AnyArray) -> Centred:
    """Removes the weighted means and scales each row by ``mask``, the root s^1/2 of its weight.

    The weighted ridge of x and y is the unweighted ridge of (x - mean) s^1/2 and (y - mean) s^1/2.
    """
    weight = mask**2
    n = weight.sum()
    y = y.astype(x.dtype)
    x_mean = matmul(weight[None, :], x)[0] / n
    # In float32 the first pass leaves a small mean, which the second pass removes.
    x_centred = x - x_mean[None, :]
    rest = matmul(weight[None, :], x_centred)[0] / n
    y_mean = (y * weight).sum() / n
    x_centred -= rest[None, :]  # NumPy does this in place
    x_centred *= mask[:, None]
    return Centred(x_centred, (y - y_mean) * mask, mask, x_mean + rest, y_mean)


def _append_tangents(data: Centred, tangents: AnyArray) -> Centred:
    """Further rows of target 0; like padding, they have no part in the vector along which the kernel's eigenvalue is 0."""
    xp, dtype = namespace(data.x), data.x.dtype
    rows = (tangents.astype(dtype) * data.mask[:, None, None]).reshape(-1, data.x.shape[1])
    y, mask = (xp.concatenate([array, xp.zeros(len(rows), dtype)]) for array in (data.y, data.mask))
    return data._replace(x=xp.concatenate([data.x, rows]), y=y, mask=mask)


def kernel(data: Centred) -> tuple[AnyArray, Any]:
    """The smaller of X X' (with its zero eigenvalue moved) and X'X, and the jitter of its diagonal."""
    x, mask = data.x, data.mask
    if not is_dual(x):
        matrix = matmul(x.T, x)
        return matrix, jitter(matrix)
    matrix, xp = matmul(x, x.T), namespace(x)
    return matrix + xp.trace(matrix) / len(matrix) * xp.outer(mask, mask), jitter(matrix)


def jitter(matrix: AnyArray) -> Any:
    """What is added to the diagonal of a Gram matrix so that its factorisation succeeds."""
    return JITTER_ULPS * jnp.finfo(matrix.dtype).eps * (matrix.trace() / len(matrix))


def solve(data: Centred, alpha: Any, apply_inverse: Callable[[AnyArray], AnyArray]) -> Ridge:
    """Ridge of centred data, refined against the data; ``apply_inverse`` multiplies a column by (kernel + alpha I)^-1."""
    x, y = data.x, data.y
    a, coef = 0.0 * y, 0.0 * data.x_mean
    for _ in range(REFINEMENT_STEPS):
        residual = y - matmul(x, coef[:, None])[:, 0]
        if is_dual(x):
            step = apply_inverse((residual - alpha * a)[:, None])
            a, coef = a + step[:, 0], coef + matmul(x.T, step)[:, 0]
        else:
            gradient = matmul(x.T, residual[:, None])[:, 0] - alpha * coef
            coef = coef + apply_inverse(gradient[:, None])[:, 0]
    return Ridge(coef, data.y_mean - (data.x_mean * coef).sum())
