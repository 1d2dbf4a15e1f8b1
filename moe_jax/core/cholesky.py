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
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float
from scipy.linalg import lapack

from moe_jax.core.arrays import AnyArray

LAPACK = {
    "float32": (lapack.spotrf, lapack.spotrs, lapack.strtri),
    "float64": (lapack.dpotrf, lapack.dpotrs, lapack.dtrtri),
}


def inverse_cholesky(matrix: Float[AnyArray, "M M"], shift: ArrayLike) -> Float[AnyArray, "M M"]:
    """Inverse W of the Cholesky factor of matrix + shift I, so that (matrix + shift I)^-1 = W' W.

    Args:
        matrix: symmetric.
        shift: added to the diagonal.

    Returns:
        W, a lower triangle. It holds NaN where the matrix is not positive definite.
    """
    if isinstance(matrix, np.ndarray):
        factor = _factorize(matrix, shift)
        _, _, trtri = LAPACK[factor.dtype.name]
        return np.asarray(trtri(factor, lower=1, overwrite_c=1)[0])
    on_device = shifted_cholesky(matrix, shift)
    return lax.linalg.triangular_solve(on_device, jnp.eye(len(matrix), dtype=matrix.dtype), left_side=True, lower=True)


def cholesky_solver(matrix: Float[AnyArray, "M M"], shift: ArrayLike) -> Callable[[Any], Any]:
    """The function that multiplies a vector or columns by (matrix + shift I)^-1; NaN where that is not positive definite."""
    if isinstance(matrix, np.ndarray):
        factor = _factorize(matrix, shift)
        _, potrs, _ = LAPACK[factor.dtype.name]
        return lambda b: potrs(factor, b, lower=1)[0]
    on_device = shifted_cholesky(matrix, shift)
    return lambda b: cho_solve(on_device, b)


def _factorize(matrix: np.ndarray, shift: ArrayLike) -> np.ndarray:
    """The lower Cholesky factor of matrix + shift I by LAPACK, column by column in memory; NaN where there is none."""
    work = np.array(matrix.T, order="F")
    np.fill_diagonal(work, work.diagonal() + np.asarray(shift))
    factor, failed = LAPACK[work.dtype.name][0](work, lower=1, overwrite_a=1, clean=1)
    if failed:
        np.fill_diagonal(factor, np.nan)
    return np.asarray(factor)


def shifted_cholesky(matrix: Float[AnyArray, "M M"], shift: ArrayLike) -> Float[jax.Array, "M M"]:
    """Cholesky factor of matrix + shift I, by XLA; only the lower triangle of the matrix is read."""
    diagonal = jnp.arange(len(matrix))
    factor: jax.Array = lax.linalg.cholesky(jnp.asarray(matrix).at[diagonal, diagonal].add(shift), symmetrize_input=False)
    return factor


def cho_solve(factor: Float[jax.Array, "M M"], b: Float[jax.Array, "M ..."]) -> Float[jax.Array, "M ..."]:
    """Solution of the equations whose Cholesky factor is given."""
    solution: jax.Array = jsl.cho_solve((factor, True), b)
    return solution
