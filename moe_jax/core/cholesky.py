"""Cholesky factors, their inverses, and solutions of equations: by LAPACK of NumPy's arrays, by XLA of others.

On a CPU, XLA takes twice the time of LAPACK for a factor. It does not call LAPACK to invert a triangle, but solves with the
identity, which takes three times the operations. Both ways give the same result up to rounding.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
import scipy
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray

JITTER_GROWTH = (1, 32, 32**2, 32**3)  # while the factorisation fails
ROWS_CLEARED = 256  # at a time
LEAST_PIVOT = 0.5  # of the smallest eigenvalue; a smaller square of the diagonal is rounding


def inverse_cholesky(matrix: Float[AnyArray, "M M"], shift: ArrayLike, jitter: ArrayLike | None = None) -> Float[AnyArray, "M M"]:
    """Inverse W of the Cholesky factor of matrix + (shift + jitter) I, so that its inverse is W' W; see ``shifted_cholesky``.

    W is a lower triangle. It holds NaN where the matrix is not positive definite.
    """
    if isinstance(matrix, np.ndarray):
        factor = _factorize(matrix, shift, jitter)
        return _lapack("trtri", factor)(factor, lower=1, overwrite_c=1)[0]
    on_device = shifted_cholesky(matrix, shift, jitter)
    return lax.linalg.triangular_solve(on_device, jnp.eye(len(matrix), dtype=matrix.dtype), left_side=True, lower=True)


def cholesky_solver(matrix: Float[AnyArray, "M M"], shift: ArrayLike, jitter: ArrayLike | None = None) -> Callable[[Any], Any]:
    """The function that multiplies columns by (matrix + (shift + jitter) I)^-1; for the jitter see ``shifted_cholesky``."""
    if isinstance(matrix, np.ndarray):
        factor = _factorize(matrix, shift, jitter)
        potrs = _lapack("potrs", factor)
        return lambda b: potrs(factor, b, lower=1)[0]
    on_device = shifted_cholesky(matrix, shift, jitter)
    return lambda b: jsl.cho_solve((on_device, True), b)


def _lapack(name: str, matrix: np.ndarray) -> Any:
    """LAPACK's routine in the precision of the matrix."""
    return scipy.linalg.get_lapack_funcs(name, (matrix,))


def _factorize(matrix: np.ndarray, shift: ArrayLike, jitter: ArrayLike | None) -> np.ndarray:
    """``shifted_cholesky`` by LAPACK, column by column in memory; the diagonal is NaN where there is no factor."""
    for growth in JITTER_GROWTH if jitter is not None else (0,):
        work = np.array(matrix.T, order="F")
        np.fill_diagonal(work, work.diagonal() + (np.asarray(shift) + growth * np.asarray(jitter or 0)))
        factor, failed = _lapack("potrf", work)(work, lower=1, overwrite_a=1, clean=0)
        if not failed and (jitter is None or factor.diagonal().min() ** 2 >= LEAST_PIVOT * (shift + growth * jitter)):
            break
    for first in range(0, len(factor), ROWS_CLEARED):  # LAPACK leaves the matrix above the diagonal; its own clearing is slower
        rest = slice(first, first + ROWS_CLEARED)
        factor[:first, rest] = 0
        factor[rest, rest] = np.tril(factor[rest, rest])
    if failed:
        np.fill_diagonal(factor, np.nan)
    return factor


def shifted_cholesky(matrix: Float[AnyArray, "M M"], shift: ArrayLike, jitter: ArrayLike | None = None) -> Float[jax.Array, "M M"]:
    """Cholesky factor of matrix + (shift + jitter) I, by XLA; only the lower triangle of the matrix is read.

    Rounding scales with the largest eigenvalue, and may make a matrix of low rank indefinite, or nearly so: no square of the
    factor's diagonal is less than the smallest eigenvalue, which is at least shift + jitter, unless by rounding. While the
    factorisation fails, or such a square is less than half of that, the jitter is raised to 32 times itself, three times at
    most. A factor that fails even then holds NaN.
    """
    diagonal, matrix = jnp.arange(len(matrix)), jnp.asarray(matrix)

    def factor(added: jax.Array, matrix: jax.Array = matrix, shift: ArrayLike = shift) -> jax.Array:
        return lax.linalg.cholesky(matrix.at[diagonal, diagonal].add(shift + added), symmetrize_input=False)

    if jitter is None:
        return factor(jnp.zeros((), matrix.dtype))
    jitter = jnp.asarray(jitter)
    first = factor(jitter)

    def is_bad(triangle: jax.Array, added: jax.Array) -> jax.Array:
        pivots = lax.stop_gradient(triangle)[diagonal, diagonal] ** 2
        return ~jnp.all(pivots >= LEAST_PIVOT * (lax.stop_gradient(shift) + added))

    # Only the last factorisation is differentiated.
    fixed, at, start = lax.stop_gradient((matrix, jnp.asarray(shift, matrix.dtype), jitter))
    grown, _ = lax.while_loop(
        lambda state: state[1] & (state[0] < JITTER_GROWTH[-1] * start),
        lambda state: (32 * state[0], is_bad(factor(32 * state[0], fixed, at), 32 * state[0])),
        (start, is_bad(first, start)),
    )
    return lax.cond(grown > start, lambda: factor(grown), lambda: first)


@jax.jit  # so that each shape is traced once
def solve_small(normal: jax.Array, right: jax.Array) -> jax.Array:
    """Solutions of many small positive definite systems (n, k, k) for right sides (n, k, m), by Gauss-Jordan elimination.

    LAPACK's batches wait for threads of XLA's pool, and stand still where several devices share it.
    """
    k = normal.shape[1]
    scale = 1.0 / jnp.sqrt(jnp.maximum(jnp.einsum("nii->ni", normal), 1e-30))
    system = jnp.concatenate([normal * scale[:, None, :] * scale[:, :, None], right * scale[:, :, None]], axis=2)

    def eliminate(i: Any, system: jax.Array) -> jax.Array:
        row = system[:, i] / system[:, i, i][:, None]
        return (system - system[:, :, i][:, :, None] * row[:, None]).at[:, i].set(row)

    system = lax.fori_loop(0, k, eliminate, system)
    return system[:, :, k:] * scale[:, :, None]
