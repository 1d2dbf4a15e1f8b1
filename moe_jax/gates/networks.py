"""Gates turn a star's features into the weights of the experts.

A gate is a small frozen description (``LinearGate()``, ``MLPGate(hidden=64)``) with two pure functions: ``init`` makes its
params, a nested dict of arrays, and ``apply`` turns features into weights. The networks behind them are Flax NNX modules, of
``flax_networks``, which is imported when a gate is first used: it takes longer to import than all else here. A gate is a pytree
without leaves, so that a mixture may pass through ``jit``; register one of your own with ``jax.tree_util.register_static``.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, require_whole
from moe_jax.core.convert import convert_arguments
from moe_jax.gates.optimize import Params


@runtime_checkable
class Gate(Protocol):
    """The methods that training and routing call."""

    def init(self, key: PRNGKeyArray, n_features: int, n_experts: int) -> Params:
        """Random params."""

    def from_linear(self, params: Params, linear: Params) -> Params:
        """Params, in the shapes of ``params``, that give the same weights as a ``LinearGate`` with ``linear``."""

    def apply(self, params: Params, features: Float[AnyArray, "N F"]) -> Float[jax.Array, "N K"]:
        """Weights of the experts for each star: positive, sum 1."""


class _FlaxGate:
    """``init`` and ``apply`` of a gate with a number of hidden units, which may be 0."""

    hidden: int

    def build(self, n_features: int, n_experts: int, rngs: Any) -> Any:
        """The ``nnx.Module`` that maps (N, F) features to (N, K) logits, its params drawn from ``nnx.Rngs``."""
        from moe_jax.gates.flax_networks import Network

        return Network(n_features, n_experts, self.hidden, rngs)

    def init(self, key: PRNGKeyArray, n_features: int, n_experts: int) -> Params:
        """Random params: kernels uniform in +-1 / sqrt(fan-in), biases 0."""
        from flax import nnx

        return nnx.to_pure_dict(nnx.state(self.build(n_features, n_experts, nnx.Rngs(key))))

    def apply(self, params: Params, features: Float[AnyArray, "N F"]) -> Float[jax.Array, "N K"]:
        """Weights of the experts for each star: the softmax of the network's logits, positive, sum 1."""
        return _weights(self, params, features)

    def logits(self, params: Params, features: Float[AnyArray, "N F"]) -> Float[jax.Array, "N K"]:
        """Output of the network, before the softmax."""
        return _logits(self, params, features)


@functools.partial(jax.jit, static_argnames="gate")
def _logits(gate: _FlaxGate, params: Params, features: jax.Array) -> jax.Array:
    from flax import nnx

    return nnx.merge(_graph(gate, features.shape[-1], params["head"]["bias"].shape[-1]), params)(features)


@functools.partial(jax.jit, static_argnames="gate")
def _weights(gate: _FlaxGate, params: Params, features: jax.Array) -> jax.Array:
    return jax.nn.softmax(_logits(gate, params, features), axis=-1)


@functools.cache
def _graph(gate: _FlaxGate, n_features: int, n_experts: int) -> Any:
    """The ``nnx.GraphDef`` of a gate's network: its static part."""
    from flax import nnx

    return nnx.split(nnx.eval_shape(lambda: gate.build(n_features, n_experts, nnx.Rngs(0))))[0]


@jax.tree_util.register_static
@dataclass(frozen=True)
class LinearGate(_FlaxGate):
    """softmax(W features + b): the form of a multinomial logistic regression."""

    hidden = 0

    def from_linear(self, params: Params, linear: Params) -> Params:
        """The params ``linear`` themselves, in the precision of ``params``."""
        return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), params, linear)


@jax.tree_util.register_static
@dataclass(frozen=True)
class MLPGate(_FlaxGate):
    """softmax of a network with one hidden layer of rectified units."""

    hidden: int = 64
    """Hidden units."""

    def __post_init__(self) -> None:
        require_whole("hidden", self.hidden, 1)

    def from_linear(self, params: Params, linear: Params) -> Params:
        """Params that give the same weights as a ``LinearGate`` with ``linear``.

        The first 2 F hidden units compute relu(x) and relu(-x), whose difference is x. The others keep their random kernels;
        their weights in the head are 0.

        Raises:
            InputError: for fewer than 2 F hidden units.
        """
        kernel, hidden = linear["head"]["kernel"], params["hidden"]
        n_features, n_experts = kernel.shape
        n_used = 2 * n_features
        if self.hidden < n_used:
            raise InputError(f"hidden is {self.hidden}, expected at least {n_used}, twice the features, to start at a linear gate")
        identity = jnp.eye(n_features, dtype=hidden["kernel"].dtype)
        carried, rest = jnp.concatenate([identity, -identity], axis=1), jnp.zeros((self.hidden - n_used, n_experts), kernel.dtype)
        start = {
            "hidden": {"bias": hidden["bias"].at[:n_used].set(0.0), "kernel": hidden["kernel"].at[:, :n_used].set(carried)},
            "head": {"bias": linear["head"]["bias"], "kernel": jnp.concatenate([kernel, -kernel, rest])},
        }
        return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), params, start)


def require_simplex(gate: Gate, params: Params, features: AnyArray) -> None:
    """Raises an ``InputError`` if a gate of one's own gives no weights: they must be >= 0 and sum to 1. Tracers are not checked."""
    if isinstance(gate, _FlaxGate) or any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves((params, features))):
        return
    weights = np.asarray(gate.apply(params, features), np.float64)
    total = weights.sum(axis=-1)
    if not (weights.min() >= -1e-3 and np.all(np.abs(total - 1) <= 1e-3)):
        raise InputError(
            f"gate.apply gives weights of at least {weights.min():.3g} that sum to {total.min():.3g} to {total.max():.3g}, "
            "expected weights >= 0 of sum 1: end with a softmax"
        )


@convert_arguments()
def linear_params(kernel: Float[AnyArray, "F K"], bias: Float[AnyArray, " K"]) -> Params:
    """Params of a ``LinearGate`` from the weights of any softmax regression."""
    return {"head": {"bias": jnp.asarray(bias), "kernel": jnp.asarray(kernel)}}
