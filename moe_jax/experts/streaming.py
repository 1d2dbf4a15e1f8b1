"""Experts for surveys that do not fit into memory: sums of the stars of each group, added up block by block on many devices.

The stars of a block belong to one group (a cell's fold), so a block adds one Gram matrix and the step has a fixed shape. Each
device adds up its own part of every block; ``collect`` brings the parts of all devices, and of all processes, together. The
fits need nothing but the sums: their time and memory do not depend on the number of stars.

Without the spectra a solution cannot be refined against them as ``moe_jax.experts.ridge`` does: in float32, a group with fewer
stars than pixels wants an alpha above the rounding error of its Gram matrix (1e-7 times the largest eigenvalue).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, matmul
from moe_jax.experts.cross_validation import select_alpha
from moe_jax.experts.sums import Sums, moments, solve_moments, sum_stars

Tree = TypeVar("Tree")
STARS = "stars"  # the axis of a mesh along which stars are divided


class Block(NamedTuple):
    """Stars of one group."""

    group: int
    x: Float[np.ndarray, "R P"]  #: rows of 0 fill it up
    y: Float[np.ndarray, " R"]
    mask: Float[np.ndarray, " R"]  #: 1 for a star


class SumsFit(NamedTuple):
    """A ridge regression from sums by fold, its alpha by exact cross-validation."""

    coef: Float[jax.Array, " P"]
    intercept: Float[jax.Array, ""]
    alpha: Float[jax.Array, ""]
    at_edge: Bool[jax.Array, ""]
    mse: Float[jax.Array, " A"]  #: cross-validated mean squared error
    fold_coef: Float[jax.Array, "folds P"]  #: fitted without each fold
    fold_intercept: Float[jax.Array, " folds"]


def device_mesh(devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A line of devices: by default all of this process, or one CPU, whose devices share cores and memory."""
    if devices is None:
        devices = jax.local_devices()[:1] if jax.local_devices()[0].platform == "cpu" else jax.local_devices()
    return Mesh(np.array(devices), (STARS,))


def empty_sums(n_groups: int, n_pixels: int, mesh: Mesh, dtype: jnp.dtype | type = jnp.float32) -> Sums:
    """Sums of no stars: for each device of the mesh, and each group."""
    shapes: tuple[tuple[int, ...], ...] = ((), (n_pixels,), (), (n_pixels, n_pixels), (n_pixels,), ())  # of the fields of Sums
    sharding = NamedSharding(mesh, PartitionSpec(STARS))
    return Sums(*(jnp.zeros((mesh.size, n_groups, *shape), dtype, device=sharding) for shape in shapes))


def add_block(sums: Sums, block: Block, mesh: Mesh) -> Sums:
    """Adds the stars of a block; ``sums`` is used up. The rows of the block are divided among the devices."""
    sharding = NamedSharding(mesh, PartitionSpec(STARS))
    x, y, mask = (jax.device_put(array, sharding) for array in block[1:])
    return _add(sums, x, y, mask, np.int32(block.group), mesh)


@functools.partial(jax.jit, static_argnames="mesh", donate_argnames="sums")
def _add(sums: Sums, x: jax.Array, y: jax.Array, mask: jax.Array, group: jax.Array, mesh: Mesh) -> Sums:
    def add_own(sums: Sums, x: jax.Array, y: jax.Array, mask: jax.Array, group: jax.Array) -> Sums:
        return jax.tree.map(lambda total, part: total.at[0, group].add(part), sums, sum_stars(x, y, mask))

    rows = PartitionSpec(STARS)
    add = jax.shard_map(add_own, mesh=mesh, in_specs=(rows, rows, rows, rows, PartitionSpec()), out_specs=rows)
    total: Sums = add(sums, x, y, mask, group)
    return total


class Blocks:
    """Stars as they come, sorted into blocks of their groups.

    Args:
        n_groups: G.
        n_rows: R, rows of a block: a multiple of the number of devices.
        n_pixels: P.
        dtype: of the stars.
    """

    def __init__(self, n_groups: int, n_rows: int, n_pixels: int, dtype: np.dtype | type = np.float32) -> None:
        self._n_rows, self._n_pixels, self._dtype = n_rows, n_pixels, dtype
        self._waiting: list[Block | None] = [None] * n_groups
        self._count = np.zeros(n_groups, int)

    def add(self, x: Float[np.ndarray, "N P"], y: Float[np.ndarray, " N"], group: Int[np.ndarray, " N"]) -> Iterator[Block]:
        """Takes stars and gives the blocks that are full with them."""
        order = np.argsort(group, kind="stable")
        for g, rows in ((int(group[part[0]]), part) for part in np.split(order, np.flatnonzero(np.diff(group[order])) + 1)):
            while len(rows):
                block = self._waiting[g] or self._empty(g)
                first = self._count[g]
                taken, rows = rows[: self._n_rows - first], rows[self._n_rows - first :]
                filled = slice(first, first + len(taken))
                block.x[filled], block.y[filled], block.mask[filled] = x[taken], y[taken], 1.0
                self._waiting[g], self._count[g] = block, filled.stop
                if filled.stop == self._n_rows:
                    yield self._release(g)

    def flush(self) -> Iterator[Block]:
        """Gives the blocks that are not full."""
        for g in np.flatnonzero(self._count):
            yield self._release(int(g))

    def _empty(self, group: int) -> Block:
        zeros = functools.partial(np.zeros, dtype=self._dtype)
        return Block(group, zeros((self._n_rows, self._n_pixels)), zeros(self._n_rows), zeros(self._n_rows))

    def _release(self, group: int) -> Block:
        block = self._waiting[group]
        assert block is not None
        self._waiting[group], self._count[group] = None, 0
        return block


def collect(sums: Sums, groups: Int[np.ndarray, "n m"]) -> Sums:
    """Sums over the m groups of each row, all devices and all processes, on the first device of this process; (n, ...)."""
    own = _collect_own(sums, jnp.asarray(groups))
    return sum_processes(jax.device_put(own, jax.local_devices()[0]))


@jax.jit
def _collect_own(sums: Sums, groups: jax.Array) -> Sums:
    def one(row: jax.Array) -> Sums:
        def group(i: int | jax.Array) -> Sums:
            return jax.tree.map(lambda leaf: jnp.sum(lax.dynamic_index_in_dim(leaf, row[i], 1, keepdims=False), axis=0), sums)

        # One by one, since several Gram matrices at a time would be most of the memory.
        total: Sums = lax.fori_loop(1, groups.shape[1], lambda i, total: jax.tree.map(jnp.add, total, group(i)), group(0))
        return total

    return lax.map(one, groups)


def sum_processes(tree: Tree) -> Tree:
    """Adds up the arrays that each process holds; with one process, they are what they were."""
    if jax.process_count() == 1:
        return tree
    firsts = [next(device for device in jax.devices() if device.process_index == i) for i in range(jax.process_count())]
    mesh = Mesh(np.array(firsts), ("processes",))
    apart, together = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (("processes",), ()))
    add = jax.jit(lambda array: jnp.sum(array, axis=0), out_shardings=together)

    def reduce(own: jax.Array) -> jax.Array:
        one = jax.device_put(jnp.asarray(own)[None], jax.local_devices()[0])
        whole = jax.make_array_from_single_device_arrays((len(firsts), *own.shape), apart, [one])
        total: jax.Array = add(whole).addressable_data(0)
        return total

    summed: Tree = jax.tree.map(reduce, tree)
    return summed


def fit_sums(
    by_fold: Sums, alphas: Float[AnyArray, " A"], x_offset: Float[AnyArray, " P"], y_offset: Float[AnyArray, ""]
) -> SumsFit:
    """Ridge regression from sums by fold, with the alpha of the smallest cross-validated error; exact.

    Args:
        by_fold: sums of the stars of each fold, less the offsets.
        alphas: penalties to choose from.
        x_offset: what was subtracted from the features before they were added up, to keep the sums of squares small.
        y_offset: likewise from the target.
    """
    alphas = jnp.asarray(alphas, by_fold.xx.dtype)
    mse, coefs, intercepts = _cross_validate(by_fold, alphas)
    choice = select_alpha(alphas, mse)
    coef, intercept = _fit(jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), by_fold), choice.alpha)
    fold_coef, fold_intercept = coefs[:, choice.position], intercepts[:, choice.position]
    return SumsFit(
        coef,
        intercept + y_offset - jnp.sum(x_offset * coef),
        choice.alpha,
        choice.at_edge,
        mse,
        fold_coef,
        fold_intercept + y_offset - jnp.sum(x_offset[None, :] * fold_coef, axis=1),
    )


@jax.jit
def _fit(total: Sums, alpha: jax.Array) -> tuple[jax.Array, jax.Array]:
    train = moments(total)
    coef = solve_moments(train, alpha)
    return coef, train.y_mean - jnp.sum(train.x_mean * coef)


@jax.jit
def _cross_validate(by_fold: Sums, alphas: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """(A,) errors; (folds, A, P) coefficients and (folds, A) intercepts of the fits without each fold."""
    total = jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), by_fold)

    def hold_out(own: Sums) -> tuple[jax.Array, jax.Array, jax.Array]:
        train = moments(jax.tree.map(jnp.subtract, total, own))

        def one_alpha(alpha: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
            coef = solve_moments(train, alpha)
            intercept = train.y_mean - jnp.sum(train.x_mean * coef)
            # The sum of (y - x w - b)^2, multiplied out.
            straight = own.yy - 2.0 * jnp.sum(coef * own.xy) + jnp.sum(coef * matmul(own.xx, coef[:, None])[:, 0])
            error = straight - 2.0 * intercept * (own.y - jnp.sum(coef * own.x)) + own.n * intercept**2
            return error, coef, intercept

        return lax.map(one_alpha, alphas)

    errors, coefs, intercepts = lax.map(hold_out, by_fold)
    return jnp.sum(errors, axis=0) / total.n, coefs, intercepts
