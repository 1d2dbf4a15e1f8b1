"""Array types of the annotations, the checks that every public function makes of its arrays, and rows of several at once.

One legend of dimensions for the whole package: N stars, P pixels, K experts (or cells), F gate features, B bootstrap
resamples, A alphas, E epochs, G groups, S seeds (or other inputs of one call), R components of the model grid or rows of a block.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

AnyArray = jax.Array | np.ndarray


class InputError(ValueError):
    """Input that cannot be used; its message is one sentence: file or array, field, what was found, what is expected."""


def require_same_length(**arrays: AnyArray) -> int:
    """Raises unless all arrays have the same first dimension N and those after the first have no more than one dimension.

    Args:
        **arrays: arrays by the name that the message uses; the first may be (N,) or (N, P), the others are (N,).

    Returns:
        N.

    Raises:
        InputError: shapes that disagree, an (N, 1) among the (N,), or no stars at all.
    """
    (first, reference), *others = arrays.items()
    n = reference.shape[0] if reference.ndim else 0
    if n == 0:
        raise InputError(f"{first} has shape {reference.shape}, expected at least one row")
    for name, array in others:
        if array.shape != (n,):
            raise InputError(f"{name} has shape {array.shape}, expected ({n},) like the rows of {first} {reference.shape}")
    return n


def require_vectors(**arrays: AnyArray) -> int:
    """Like ``require_same_length``, where the first array must be (N,) too: no silent (N, 1) against (N,)."""
    name, array = next(iter(arrays.items()))
    if array.ndim != 1:
        raise InputError(f"{name} has shape {array.shape}, expected (N,)")
    return require_same_length(**arrays)


@jax.jit
def take_rows(arrays: tuple[jax.Array, ...], rows: jax.Array) -> tuple[jax.Array, ...]:
    """The same rows of several arrays."""
    return tuple(array[rows] for array in arrays)


matmul = functools.partial(jnp.matmul, precision=lax.Precision.HIGHEST)


@jax.jit
def mean_and_scale(raw: Float[AnyArray, "N F"]) -> tuple[Float[jax.Array, " F"], Float[jax.Array, " F"]]:
    """Mean and standard deviation of each column; 1 for that of a constant one."""
    scale = jnp.std(raw, axis=0)
    return jnp.mean(raw, axis=0), jnp.where(scale > 0, scale, 1.0)


@jax.jit
def scale_columns(
    raw: Float[AnyArray, "N F"], mean: Float[AnyArray, " F"], scale: Float[AnyArray, " F"]
) -> Float[jax.Array, "N F"]:
    """Columns less their mean, in units of their scale."""
    return (jnp.asarray(raw) - mean[None, :]) / scale[None, :]
