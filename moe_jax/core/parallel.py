"""Applies one function to many inputs on all devices, in one compiled call; and reads ahead."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

Item = TypeVar("Item")


def one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """The items, none of which is None; a thread makes the next one while the caller works on the last.

    Making them must not use JAX: two threads that compute can wait for each other.
    """
    source = iter(items)
    with ThreadPoolExecutor(1) as thread:
        ahead = thread.submit(next, source, None)
        while (item := ahead.result()) is not None:
            ahead = thread.submit(next, source, None)
            yield item


def devices_for(n_inputs: int, devices: Sequence[jax.Device] | None = None) -> tuple[jax.Device, ...]:
    """The first of the devices, no more than there are inputs; by default from all devices of this process."""
    return tuple(jax.local_devices() if devices is None else devices)[: max(n_inputs, 1)]


def on_all(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """Copies the arrays of a tree to each of the devices."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), ("inputs",)), PartitionSpec()))


def map_devices(function: Callable[..., Any], inputs: Any, shared: Any = (), devices: Sequence[jax.Device] | None = None) -> Any:
    """``jax.vmap(function, in_axes=(0, None))(inputs, shared)``, with the inputs divided among devices.

    A GPU computes its inputs in one vectorised program. A CPU computes them one by one: XLA turns a batch of small matrix
    products into a loop anyway, each input alone fits the cache better, and branches that are not taken cost nothing. Either
    way each result is that of the function alone, up to rounding.

    Under ``jit`` the arguments must be on all of the devices (see ``on_all``). The results are divided among the devices. A CPU is
    one device unless ``jax_num_cpu_devices`` says otherwise.
    """
    n_inputs = len(jax.tree.leaves(inputs)[0])
    devices = devices_for(n_inputs) if devices is None else devices
    one_by_one = devices[0].platform == "cpu"

    def part(inputs: Any, shared: Any) -> Any:
        if one_by_one:
            return lax.map(lambda one: function(one, shared), inputs)
        return jax.vmap(function, in_axes=(0, None))(inputs, shared)

    n_padded = -(-n_inputs // len(devices)) * len(devices)
    padded = jax.tree.map(lambda leaf: jnp.asarray(leaf)[np.minimum(np.arange(n_padded), n_inputs - 1)], inputs)
    split, mesh = PartitionSpec("inputs"), Mesh(np.array(devices), ("inputs",))
    mapped = jax.shard_map(part, mesh=mesh, in_specs=(split, PartitionSpec()), out_specs=split, check_vma=False)
    return jax.tree.map(lambda leaf: leaf[:n_inputs], mapped(padded, shared))
