"""Array types of the annotations, the checks that every public function makes of its arrays, and rows of several at once.

One legend of dimensions for the whole package: N stars, P pixels, K experts (or cells), F gate features, B bootstrap
resamples, A alphas, E epochs, G groups, S seeds (or other inputs of one call), R components of the model grid or rows of a block.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

AnyArray = jax.Array | np.ndarray
Tree = TypeVar("Tree")


class InputError(ValueError):
    """Input that cannot be used; its message is one sentence: file or array, field, what was found, what is expected."""


def require_whole(name: str, number: Any, least: int) -> None:
    """Raises an ``InputError`` unless a number is whole and large enough."""
    if not isinstance(number, int | np.integer) or number < least:
        raise InputError(f"{name} is {number!r}, expected a whole number, at least {least}")


def require_cell_sizes(source: str, cell: AnyArray, n_experts: int, at_least: int) -> None:
    """Raises an ``InputError`` that starts with ``source`` where a cell holds too few stars to cross-validate."""
    counts = np.bincount(np.asarray(cell)[np.asarray(cell) >= 0], minlength=n_experts)
    if len(counts) > n_experts:
        raise InputError(f"{source}: found cell {len(counts) - 1}, expected cells 0 to {n_experts - 1} or -1")
    if counts.min() < at_least:
        k = int(counts.argmin())
        raise InputError(f"{source}: found {counts[k]} stars in cell {k}, expected at least {at_least} to cross-validate")


def without_offset(y: AnyArray, *others: AnyArray) -> tuple[AnyArray, ...]:
    """All arrays less the mean of y, if they are float64 of NumPy that JAX will cut to float32; else as they are.

    Without it, a target such as 1e7 +- 1 would keep no digit of its spread.
    """
    arrays = (y, *others)
    cut = jax.dtypes.canonicalize_dtype(y.dtype) != y.dtype and namespace(*arrays) is np
    return tuple(array - y.mean() for array in arrays) if cut else arrays


# On a CPU, BLAS and LAPACK are faster than XLA, and nothing needs to be compiled. What follows lets one function serve both:
# NumPy runs it on NumPy's arrays, XLA compiles it for others.


def to_host(*arrays: Any) -> tuple[Any, ...]:
    """The arrays as NumPy's where all are concrete and lie on a CPU, as JAX's elsewhere; in JAX's precision in either case."""
    on_device = [isinstance(array, jax.core.Tracer) or _platform(array) != "cpu" for array in arrays]
    if any(on_device):
        return tuple(map(jnp.asarray, arrays))
    arrays = tuple(map(np.asarray, arrays))
    return tuple(array.astype(jax.dtypes.canonicalize_dtype(array.dtype), copy=False) for array in arrays)


def _platform(array: Any) -> str:
    """Where an array lies, or would lie."""
    return next(iter(array.devices())).platform if isinstance(array, jax.Array) else jax.default_backend()


def namespace(*arrays: Any) -> Any:
    """``numpy`` where all arrays are NumPy's, else ``jax.numpy``."""
    return np if all(isinstance(array, np.ndarray | np.generic) for array in arrays) else jnp


def jit_off_host(function: Callable[..., Tree]) -> Callable[..., Tree]:
    """``jax.jit``, but NumPy runs the function where all its arrays are NumPy's."""
    compiled = jax.jit(function)

    @functools.wraps(function)
    def call(*args: Any) -> Tree:
        if namespace(*jax.tree.leaves(args)) is not np:
            return compiled(*args)
        with np.errstate(all="ignore"):  # an overflow gives infinity without a warning, as in XLA
            return function(*args)

    return call


def by_numpy(function: Callable[..., Any]) -> Callable[..., Any]:
    """``jax.jit``, but NumPy runs the function where all its arrays are concrete and lie on a CPU; the results are JAX's."""
    run = jit_off_host(function)

    @functools.wraps(function)
    def call(*args: Any) -> Any:
        leaves, tree = jax.tree.flatten(args)
        return to_device(run(*jax.tree.unflatten(tree, to_host(*leaves))))

    return call


def to_device(tree: Any) -> Any:
    """NumPy's arrays in a tree as JAX's; unlike ``jnp.asarray``, it compiles nothing."""
    return jax.tree.map(lambda leaf: jax.device_put(leaf) if namespace(leaf) is np else leaf, tree)


def map_blocks(function: Callable[[Any], Any], arrays: Any, start: int, stop: int, size: int) -> Any:
    """A compiled function of the rows ``start`` to ``stop - 1`` of a tree of arrays, ``size`` rows at a time.

    The last block is padded with its last row, so that all calls share one program. On a CPU the blocks are written into the
    whole result as they come, without a second copy of it.
    """
    on_device, tree = jax.tree.flatten(arrays)
    leaves = to_host(*on_device)
    if any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return function(jax.tree.unflatten(tree, [leaf[start:stop] for leaf in leaves]))
    rows = [np.minimum(np.arange(first, first + size), stop - 1) for first in range(start, stop, size)]
    blocks = (function(jax.tree.unflatten(tree, [leaf[part] for leaf in leaves])) for part in rows)
    if namespace(*leaves) is jnp:
        return jax.tree.map(lambda *parts: jnp.concatenate(parts)[: stop - start], *blocks)
    whole: list[np.ndarray] = []
    for i, block in enumerate(blocks):
        parts, form = jax.tree.flatten(block)
        whole = whole or [np.empty((stop - start, *part.shape[1:]), part.dtype) for part in parts]
        for result, part in zip(whole, parts, strict=True):
            here = result[i * size : (i + 1) * size]
            here[:] = np.asarray(part)[: len(here)]
    return to_device(jax.tree.unflatten(form, whole))


def map_rows(function: Callable[[Any], Tree], arrays: Any, batch_size: int | None = None) -> Tree:
    """``lax.map`` over the first dimension of a tree of arrays; a loop where they are NumPy's."""
    leaves = jax.tree.leaves(arrays)
    if namespace(*leaves) is jnp:
        return lax.map(function, arrays, batch_size=batch_size)
    rows = [function(jax.tree.map(lambda leaf, i=i: leaf[i], arrays)) for i in range(len(leaves[0]))]
    return jax.tree.map(lambda *parts: np.stack(parts), *rows)


def matmul(a: AnyArray, b: AnyArray) -> Any:
    """Matrix product with all digits of the precision (a GPU's default for float32 is TF32)."""
    return np.matmul(a, b) if namespace(a, b) is np else jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


@by_numpy
def take_rows(arrays: tuple[AnyArray, ...], rows: AnyArray) -> tuple[AnyArray, ...]:
    """The same rows of several arrays."""
    return tuple(array[rows] for array in arrays)


@by_numpy
def mean_and_scale(raw: Float[AnyArray, "N F"]) -> tuple[Float[AnyArray, " F"], Float[AnyArray, " F"]]:
    """Mean and standard deviation of each column; 1 for that of a constant one."""
    xp, scale = namespace(raw), raw.std(axis=0)
    varies = (scale > 0) & (raw.max(axis=0) > raw.min(axis=0))  # the scale of a constant may be the rounding of its mean
    return raw.mean(axis=0), xp.where(varies, scale, xp.ones_like(scale))


@by_numpy
def scale_columns(raw: Float[AnyArray, "N F"], mean: Float[AnyArray, " F"], scale: Float[AnyArray, " F"]) -> Float[AnyArray, "N F"]:
    """Columns less their mean, in units of their scale."""
    return (raw - mean[None, :]) / scale[None, :]
