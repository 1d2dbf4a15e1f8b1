"""Experts for surveys that do not fit into memory: sums of the stars of each group, added up block by block on many devices.

All stars of a block belong to one group (a fold of a cell), so a block adds one Gram matrix, and every block has the same
shape. Each device sums its own part of every block; ``collect`` adds up the parts of all devices and all processes. The fits
need nothing but the sums: their time and memory do not depend on the number of stars.

Without the spectra a solution cannot be refined against them as ``moe_jax.experts.ridge`` does. So in float32, a group with
fewer stars than pixels needs an alpha above the rounding error of its Gram matrix, 1e-7 times the largest eigenvalue.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, jit_off_host, map_rows, matmul, to_device, to_host
from moe_jax.experts.alphas import require_positive, search_alphas
from moe_jax.experts.cross_validation import CrossValidatedRidge
from moe_jax.experts.ridge import Ridge
from moe_jax.experts.sums import Sums, hold_out_each, moments, solve_moments, sum_parts, sum_stars

Tree = TypeVar("Tree")
STARS = "stars"  # the axis of a mesh along which stars are divided


class Block(NamedTuple):
    """Stars of one group."""

    group: int
    x: Float[np.ndarray, "R P"]  #: the rows after the last star are 0
    y: Float[np.ndarray, " R"]
    mask: Float[np.ndarray, " R"]  #: 1 for a star


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A line of devices: by default all of this process; of CPU devices, which share cores and memory, only one."""
    if devices is None:
        devices = jax.local_devices()[:1] if jax.local_devices()[0].platform == "cpu" else jax.local_devices()
    return Mesh(np.array(devices), (STARS,))


def empty_sums(n_groups: int, n_pixels: int, mesh: Mesh, dtype: jnp.dtype | type = jnp.float32) -> Sums:
    """Sums of no stars, all 0: (devices, groups, ...), the first dimension divided among the devices."""
    shapes: tuple[tuple[int, ...], ...] = ((), (n_pixels,), (), (n_pixels, n_pixels), (n_pixels,), ())  # of the fields of Sums
    sharding = NamedSharding(mesh, PartitionSpec(STARS))
    return Sums(*(jnp.zeros((mesh.size, n_groups, *shape), dtype, device=sharding) for shape in shapes))


def add_block(sums: Sums, block: Block, mesh: Mesh) -> Sums:
    """Adds the stars of a block, whose rows are divided among the devices. Do not use the old ``sums`` again: it is overwritten."""
    sharding = NamedSharding(mesh, PartitionSpec(STARS))
    x, y, mask = (jax.device_put(array, sharding) for array in block[1:])
    return _add(sums, x, y, mask, np.int32(block.group), mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="sums")
def _add(sums: Sums, x: jax.Array, y: jax.Array, mask: jax.Array, group: jax.Array, mesh: Mesh) -> Sums:
    def add_part(sums: Sums, x: jax.Array, y: jax.Array, mask: jax.Array, group: jax.Array) -> Sums:
        return jax.tree.map(lambda total, part: total.at[0, group].add(part), sums, sum_stars(x, y, mask))

    rows = PartitionSpec(STARS)
    add = jax.shard_map(add_part, mesh=mesh, in_specs=(rows, rows, rows, rows, PartitionSpec()), out_specs=rows)
    return add(sums, x, y, mask, group)


class Blocks:
    """Stars as they come, sorted into blocks of their groups; ``n_rows`` of a block are a multiple of the number of devices."""

    def __init__(self, n_rows: int, n_pixels: int, dtype: np.dtype | type = np.float32) -> None:
        self._shape, self._dtype = (n_rows, n_pixels), dtype
        self._waiting: dict[int, tuple[Block, int]] = {}  # by group: a block that is not full, and its number of stars

    def add(self, x: Float[np.ndarray, "N P"], y: Float[np.ndarray, " N"], group: Int[np.ndarray, " N"]) -> Iterator[Block]:
        """Takes stars, and gives each block that they fill."""
        n_rows, zeros = self._shape[0], functools.partial(np.zeros, dtype=self._dtype)
        for g in map(int, np.unique(group)):
            rows = np.flatnonzero(group == g)
            while len(rows):
                empty = Block(g, zeros(self._shape), zeros(n_rows), zeros(n_rows)), 0
                block, first = self._waiting.pop(g, empty)
                taken, rows = rows[: n_rows - first], rows[n_rows - first :]
                filled = slice(first, first + len(taken))
                block.x[filled], block.y[filled], block.mask[filled] = x[taken], y[taken], 1.0
                if filled.stop == n_rows:
                    yield block
                else:
                    self._waiting[g] = block, filled.stop

    def flush(self) -> Iterator[Block]:
        """Gives the blocks that hold stars but are not full."""
        for g in sorted(self._waiting):
            yield self._waiting.pop(g)[0]


def collect(sums: Sums, groups: Int[np.ndarray, "n m"]) -> Sums:
    """Sums over the m groups of each row, all devices and all processes, on the first device of this process; (n, ...)."""
    here = _collect_here(sums, jnp.asarray(groups))
    return sum_processes(jax.device_put(here, jax.local_devices()[0]))


@jax.jit
def _collect_here(sums: Sums, groups: jax.Array) -> Sums:
    def one(row: jax.Array) -> Sums:
        def group(i: int | jax.Array) -> Sums:
            return jax.tree.map(lambda leaf: jnp.sum(lax.dynamic_index_in_dim(leaf, row[i], 1, keepdims=False), axis=0), sums)

        # One group at a time: the Gram matrices of several would be most of the memory.
        return lax.fori_loop(1, groups.shape[1], lambda i, total: jax.tree.map(jnp.add, total, group(i)), group(0))

    return lax.map(one, groups)


def sum_processes(tree: Tree) -> Tree:
    """Adds up the arrays that each process holds; with one process, returns them as they are."""
    if jax.process_count() == 1:
        return tree
    firsts = [next(device for device in jax.devices() if device.process_index == i) for i in range(jax.process_count())]
    mesh = Mesh(np.array(firsts), ("processes",))
    apart, together = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("processes",), ()))
    add = jax.jit(lambda array: jnp.sum(array, axis=0), out_shardings=together)

    def reduce(array: jax.Array) -> jax.Array:
        one = jax.device_put(jnp.asarray(array)[None], jax.local_devices()[0])
        whole = jax.make_array_from_single_device_arrays((len(firsts), *array.shape), apart, [one])
        return add(whole).addressable_data(0)

    return jax.tree.map(reduce, tree)


def fit_sums(
    by_fold: Sums,
    alphas: Float[AnyArray, " A"],
    x_offset: Float[AnyArray, " P"],
    y_offset: Float[AnyArray, ""],
    *,
    extend_decades: int = 0,
) -> tuple[CrossValidatedRidge, Ridge]:
    """Ridge regression from sums by fold, with the alpha of the smallest cross-validated error; exact.

    Args:
        by_fold: sums of the stars of each fold, less the offsets.
        alphas: penalties to choose from, > 0.
        x_offset: what was subtracted from the features before they were summed, so that the sums of squares keep their digits.
        y_offset: likewise from the target.
        extend_decades: most powers of ten by which the grid of alphas is extended where the best lies at an end of it.

    Returns:
        The fit to all stars, whose ``out_of_fold`` is empty, since the stars are not at hand; and the fits without each fold,
        stacked: coef (folds, P) and intercept (folds,).

    Raises:
        InputError: alphas that are not positive.
    """
    require_positive(alphas)
    *leaves, alphas = to_host(*by_fold, alphas)
    by_fold, alphas = Sums(*leaves), alphas.astype(by_fold.xx.dtype)
    choice, tried, mse, without_fold = search_alphas(alphas, functools.partial(_cross_validate, by_fold), extend_decades)

    def with_offsets(fit: Ridge) -> Ridge:
        shift = (np.asarray(x_offset) * fit.coef).sum(axis=-1)
        return Ridge(fit.coef, fit.intercept + y_offset - shift)

    whole = with_offsets(_fit(by_fold, choice.alpha))
    fit = CrossValidatedRidge(whole, choice.alpha, choice.at_edge, tried, mse, np.zeros(0, mse.dtype))
    return to_device((fit, with_offsets(without_fold)))


_fit = jit_off_host(lambda by_fold, alpha: solve_moments(moments(sum_parts(by_fold)), alpha))


@jit_off_host
def _cross_validate(by_fold: Sums, alphas: AnyArray) -> tuple[Any, Ridge]:
    """(A,) errors, and the fits without each fold, stacked as (A, folds)."""

    def fit_rest(fold: Sums, rest: Sums) -> tuple[Any, Ridge]:
        train = moments(rest)

        def one_alpha(alpha: Any) -> tuple[Any, Ridge]:
            fit = solve_moments(train, alpha)
            coef, intercept = fit
            # The sum of (y - x w - b)^2, multiplied out.
            straight = fold.yy - 2.0 * (coef * fold.xy).sum() + (coef * matmul(fold.xx, coef[:, None])[:, 0]).sum()
            error = straight - 2.0 * intercept * (fold.y - (coef * fold.x).sum()) + fold.n * intercept**2
            return error, fit

        return map_rows(one_alpha, alphas)

    errors, fits = hold_out_each(fit_rest, by_fold)
    by_alpha: Ridge = jax.tree.map(lambda leaf: leaf.swapaxes(0, 1), fits)
    return errors.sum(axis=0) / by_fold.n.sum(), by_alpha
