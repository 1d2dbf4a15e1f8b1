"""One function over many inputs, on all devices at hand, in one compiled call."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec


def devices_for(n_inputs: int, devices: Sequence[jax.Device] | None = None) -> tuple[jax.Device, ...]:
    """As many of the devices, by default all of this process, as there are inputs."""
    return tuple(jax.local_devices() if devices is None else devices)[: max(n_inputs, 1)]


def on_all(tree: Any, devices: Sequence[jax.Device]) -> Any:
    """The arrays of a tree on each of the devices, wherever they were."""
    return jax.device_put(tree, NamedSharding(Mesh(np.array(devices), ("inputs",)), PartitionSpec()))


def map_devices(function: Callable[..., Any], inputs: Any, shared: Any = (), devices: Sequence[jax.Device] | None = None) -> Any:
    """``jax.vmap(function, in_axes=(0, None))(inputs, shared)``, with the inputs divided among devices.

    A GPU takes its part in one vectorised program. A CPU takes it one by one: small matrix products, batched, are loops over
    products in XLA, and what vectorising saves is lost in the cache; a branch that is not taken costs nothing then. Either way
    each result is that of the function by itself, up to rounding.

    Under ``jit``, the arguments must be on all of the devices, see ``on_all``; the results are divided among them.

    Args:
        function: pure; from one input, and what all share, to a tree of arrays.
        inputs: tree of arrays, each with a first dimension S.
        shared: tree of arrays.
        devices: by default ``devices_for`` the inputs. A CPU has one unless JAX was told otherwise (``jax_num_cpu_devices``).

    Returns:
        What the function returns, with a first dimension S.
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
