"""Training of regression gates: on the squared error of the mixture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Key, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, require_same_length
from moe_jax.core.parallel import devices_for, map_devices, on_all
from moe_jax.gates.networks import Gate
from moe_jax.gates.optimize import GateConfig, GateFit, Hyper, Params, minimize
from moe_jax.gates.routing import route_soft


def mixture_loss(
    gate: Gate,
    params: Params,
    features: Float[AnyArray, "N F"],
    expert_predictions: Float[AnyArray, "N K"],
    y: Float[AnyArray, " N"],
) -> Float[jax.Array, ""]:
    """Mean of (y - sum_k p_k yhat_k)^2, the loss of a regression gate."""
    return jnp.mean((y - route_soft(gate.apply(params, features), expert_predictions)) ** 2)


@dataclass(frozen=True)
class MixtureObjective:
    """(y - sum_k p_k yhat_k)^2 of each star, and the entropy of its weights where that is penalised."""

    gate: Gate
    penalize_entropy: bool = False

    def __call__(self, params: Params, entropy_penalty: ArrayLike, data: tuple[jax.Array, ...]) -> jax.Array:
        """(N,) losses of features, expert predictions and target."""
        features, expert_predictions, y = data
        weights = self.gate.apply(params, features)
        loss = (y - route_soft(weights, expert_predictions)) ** 2
        return loss + entropy_penalty * entropy(weights) if self.penalize_entropy else loss


def entropy(weights: Float[AnyArray, "N K"]) -> Float[jax.Array, " N"]:
    """Entropy of each star's weights, - sum_k p_k log p_k, in nats."""
    weights = jnp.asarray(weights)
    return -jnp.sum(weights * jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny)), axis=1)


def fit_gate(
    key: PRNGKeyArray,
    gate: Gate,
    features: Float[AnyArray, "N F"],
    expert_predictions: Float[AnyArray, "N K"],
    y: Float[AnyArray, " N"],
    config: GateConfig | None = None,
    *,
    logistic: Params | None = None,
    start: Params | None = None,
    hyper: Hyper | None = None,
) -> GateFit:
    """Trains a gate on the squared error of the mixture; the params of the lowest validation loss are kept.

    Pure, and one compiled program: ``jax.vmap(lambda key: fit_gate(key, ...))(keys)`` trains a gate for every key. The key
    draws the initial params, the validation stars and the batches.

    With ``optimizer="lbfgs"``, ``init="logistic"`` and ``validation_fraction=0`` the training loss of the result is at most
    that of the classification gate, since that is where the fit starts and the params of the lowest loss are kept.

    Args:
        key: random key.
        gate: ``LinearGate()``, ``MLPGate(hidden)``, or anything with their ``init``, ``from_linear`` and ``apply``.
        features: standardised.
        expert_predictions: of the frozen experts, for the same stars.
        y: target (log g).
        config: ``GateConfig()`` by default.
        logistic: params of the classification gate, for ``init="logistic"``.
        start: params to start from, instead of those that ``config.init`` names.
        hyper: replaces the learning rate and the penalties of ``config``; may hold tracers, to vmap over them.

    Raises:
        InputError: shapes that disagree, too few stars for a training and a validation part, or no ``logistic`` to start at.
    """
    config = GateConfig() if config is None else config
    require_same_length(features=features, y=y)
    require_same_length(expert_predictions=expert_predictions, y=y)
    if start is None and config.init == "logistic" and logistic is None:
        raise InputError("logistic is None, expected the params of a classification gate, as config.init is 'logistic'")
    features, expert_predictions, y = (jnp.asarray(array) for array in (features, expert_predictions, y))
    key_init, key_train = jax.random.split(key)
    params = _init(key_init, gate, features.shape[1], expert_predictions.shape[1], features.dtype)
    if start is not None:
        params = start
    elif config.init == "logistic" and logistic is not None:
        params = gate.from_linear(params, logistic)
    objective = MixtureObjective(gate, hyper is not None or config.entropy_penalty != 0)
    return minimize(key_train, objective, params, (features, expert_predictions, y.astype(features.dtype)), config, hyper)


def fit_gates(
    keys: Key[jax.Array, " S"],
    gate: Gate,
    features: Float[AnyArray, "N F"],
    expert_predictions: Float[AnyArray, "N K"],
    y: Float[AnyArray, " N"],
    config: GateConfig | None = None,
    *,
    devices: Sequence[jax.Device] | None = None,
) -> GateFit:
    """``fit_gate`` for each of S keys in one compiled call, on all devices at hand; each gate is the one of its key alone.

    Args:
        keys: (S,) random keys.
        gate: as ``fit_gate``, like the arguments that follow.
        features: standardised.
        expert_predictions: of the frozen experts.
        y: target.
        config: ``GateConfig()`` by default.
        devices: among which the keys are divided; by default all of this process.

    Returns:
        A ``GateFit`` whose arrays have a first dimension S.

    Raises:
        InputError: as ``fit_gate``.
    """
    data = tuple(map(jnp.asarray, (features, expert_predictions, y)))
    chosen = devices_for(len(keys), devices)
    divided = _fit_gates(*on_all((keys, data), chosen), gate, config, chosen)
    fits: GateFit = jax.device_put(divided, chosen[0])  # where other computations find them
    return fits


@functools.partial(jax.jit, static_argnames=("gate", "config", "devices"))
def _fit_gates(
    keys: jax.Array, data: tuple[jax.Array, ...], gate: Gate, config: GateConfig | None, devices: tuple[jax.Device, ...]
) -> GateFit:
    def fit(key: jax.Array, data: tuple[jax.Array, ...]) -> GateFit:
        features, expert_predictions, y = data
        return fit_gate(key, gate, features, expert_predictions, y, config)

    fits: GateFit = map_devices(fit, keys, data, devices)
    return fits


@functools.partial(jax.jit, static_argnames=("gate", "n_features", "n_experts", "dtype"))
def _init(key: jax.Array, gate: Gate, n_features: int, n_experts: int, dtype: jnp.dtype) -> Params:
    """Random params; compiled by itself, as it does not depend on the number of stars."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), gate.init(key, n_features, n_experts))
