"""Cholesky factors and their inverses: the inverses by LAPACK on a CPU, by XLA elsewhere and under ``jit`` or ``vmap``.

On a CPU, XLA calls LAPACK for the Cholesky factor, with two more copies of the matrix. It does not call LAPACK to invert a
triangle, but solves with the identity, which takes three times the operations. SciPy's ``potrf`` and ``trtri`` work in place.
Both ways give the same result up to rounding.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.linalg import lapack

ALIGNMENT = 64  # bytes; JAX copies an array whose memory starts elsewhere
LAPACK = {"float32": (lapack.spotrf, lapack.strtri), "float64": (lapack.dpotrf, lapack.dtrtri)}


def inverse_cholesky(matrix: Float[jax.Array, "M M"], shift: ArrayLike, n_used: int | None = None) -> Float[jax.Array, "M M"]:
    """Inverse W of the Cholesky factor of matrix + shift I, so that (matrix + shift I)^-1 = W' W.

    Args:
        matrix: symmetric; only its lower triangle is read.
        shift: added to the diagonal.
        n_used: number of leading rows and columns that are not padding. The padding is 0; its part of W is unspecified.

    Returns:
        W, a lower triangle. It holds NaN where the matrix is not positive definite.
    """
    if isinstance(matrix, jax.core.Tracer) or isinstance(shift, jax.core.Tracer) or _platform(matrix) != "cpu":
        return _by_xla(matrix, shift)
    size = len(matrix)
    n = size if n_used is None else n_used
    # LAPACK stores a matrix column by column: it sees our rows as columns, and our lower triangle as its upper one.
    work = _aligned(n, matrix.dtype)
    work[:] = np.asarray(matrix)[:n, :n]
    work.flat[:: n + 1] += np.asarray(shift)
    potrf, trtri = LAPACK[work.dtype.name]
    factor, failed = potrf(work.T, lower=0, overwrite_a=1, clean=1)
    if not failed:
        factor, failed = trtri(factor, lower=0, overwrite_c=1)
    if failed:
        return jnp.full((size, size), jnp.nan, work.dtype)
    if n == size:
        return jax.dlpack.from_dlpack(factor.T, copy=False)
    inverse = _aligned(size, matrix.dtype)
    inverse[:n, :n] = factor.T
    inverse[n:], inverse[:n, n:] = 0.0, 0.0
    return jax.dlpack.from_dlpack(inverse, copy=False)


def _aligned(size: int, dtype: np.dtype) -> np.ndarray:
    """An uninitialised square matrix that JAX takes over without a copy."""
    n_bytes = size**2 * dtype.itemsize
    memory = np.empty(n_bytes + ALIGNMENT, np.uint8)
    start = -memory.ctypes.data % ALIGNMENT
    return memory[start : start + n_bytes].view(dtype).reshape(size, size)


def _platform(matrix: jax.Array) -> str:
    platform: str = next(iter(matrix.devices())).platform
    return platform


def shifted_cholesky(matrix: Float[jax.Array, "M M"], shift: ArrayLike, jitter: jax.Array | None = None) -> Float[jax.Array, "M M"]:
    """Cholesky factor of matrix + (shift + jitter) I, by XLA; only the lower triangle of the matrix is read.

    Rounding scales with the largest eigenvalue, and may make a matrix of low rank indefinite. While the factorisation fails, the
    jitter is raised to 32 times itself, three times at most; then the factor holds NaN.
    """
    diagonal = jnp.arange(len(matrix))

    def factor(added: jax.Array, matrix: jax.Array = matrix, shift: ArrayLike = shift) -> jax.Array:
        return lax.linalg.cholesky(matrix.at[diagonal, diagonal].add(shift + added), symmetrize_input=False)

    if jitter is None:
        return factor(jnp.zeros((), matrix.dtype))
    first = factor(jitter)
    # Only the last factorisation is differentiated.
    fixed, at, start = lax.stop_gradient((matrix, jnp.asarray(shift, matrix.dtype), jitter))
    grown, _ = lax.while_loop(
        lambda state: state[1] & (state[0] < 32**3 * start),
        lambda state: (32 * state[0], jnp.isnan(factor(32 * state[0], fixed, at)[-1, -1])),
        (start, jnp.isnan(lax.stop_gradient(first)[-1, -1])),
    )
    result: jax.Array = lax.cond(grown > start, lambda: factor(grown), lambda: first)
    return result


def cho_solve(factor: Float[jax.Array, "M M"], b: Float[jax.Array, "M ..."]) -> Float[jax.Array, "M ..."]:
    """Solution of the equations whose Cholesky factor is given."""
    solution: jax.Array = jsl.cho_solve((factor, True), b)
    return solution


@jax.jit
def _by_xla(matrix: jax.Array, shift: ArrayLike) -> jax.Array:
    factor = shifted_cholesky(matrix, shift)
    inverse: jax.Array = lax.linalg.triangular_solve(factor, jnp.eye(len(matrix), dtype=matrix.dtype), left_side=True, lower=True)
    return inverse
