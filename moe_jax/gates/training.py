"""Training of regression gates, whose loss is the squared error of the mixture."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Float, Key, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, require_whole
from moe_jax.core.convert import convert_arguments
from moe_jax.core.parallel import devices_for, map_devices, on_all
from moe_jax.gates.networks import Gate, require_simplex
from moe_jax.gates.optimize import LBFGS, Adam, GateFit, Params, Rows, minimize
from moe_jax.gates.routing import route_soft


@dataclass(frozen=True)
class GateConfig:
    """How a gate is trained; the defaults are the report's where it names them."""

    optimizer: Literal["adam", "lbfgs"] = "adam"
    """Adam on mini-batches, or L-BFGS on all training stars until the gradient vanishes."""
    init: Literal["random", "logistic"] = "random"
    """Start: random params, or those that make the gate equal to the classification gate."""
    epochs: int = 100
    """Epochs of Adam."""
    learning_rate: float = 1e-3
    """Step size of Adam."""
    batch_size: int = 256
    """Stars in a mini-batch of Adam (not in the report)."""
    patience: int = 10
    """Epochs, or iterations of L-BFGS, without a better loss before the training stops."""
    validation_fraction: float = 0.2
    """Part of the stars that is held out; their loss decides which params are kept. 0: the training loss decides."""
    max_iterations: int = 2_000
    """Iterations of L-BFGS."""
    gradient_tolerance: float = 1e-5
    """A fit has converged, and L-BFGS stops, where no derivative of the training loss is larger."""
    weight_decay: float = 0.0
    """Factor of the sum of squared kernel weights in the loss."""
    entropy_penalty: float = 0.0
    """Factor of the weights' mean entropy in the loss; negative values reward uniform weights."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "max_iterations"):
            require_whole(name, getattr(self, name), 1)
        for name in ("learning_rate", "gradient_tolerance"):
            if not 0 < getattr(self, name) < np.inf:
                raise InputError(f"{name} is {getattr(self, name)}, expected a positive number")
        if not 0 <= self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}, expected at least 0 and below 1")
        if not 0 <= self.weight_decay < np.inf:
            raise InputError(f"weight_decay is {self.weight_decay}, expected a finite number, at least 0")
        if not np.isfinite(self.entropy_penalty):
            raise InputError(f"entropy_penalty is {self.entropy_penalty}, expected a finite number")
        for name, choices in (("optimizer", ("adam", "lbfgs")), ("init", ("random", "logistic"))):
            if getattr(self, name) not in choices:
                raise InputError(f"{name} is {getattr(self, name)!r}, expected {' or '.join(map(repr, choices))}")

    def method(self, learning_rate: ArrayLike | None = None) -> Adam | LBFGS:
        """The optimiser that the options describe; with another learning rate where one is given."""
        if self.optimizer == "lbfgs":
            return LBFGS(self.max_iterations, self.patience, self.gradient_tolerance)
        rate = self.learning_rate if learning_rate is None else learning_rate
        return Adam(rate, self.epochs, self.batch_size, self.patience, self.gradient_tolerance)


class Hyper(NamedTuple):
    """The numbers of a ``GateConfig`` over which a fit may be vmapped."""

    learning_rate: ArrayLike
    weight_decay: ArrayLike
    entropy_penalty: ArrayLike

    @classmethod
    def of(cls, config: GateConfig) -> Hyper:
        """Those of a configuration."""
        return cls(config.learning_rate, config.weight_decay, config.entropy_penalty)


@convert_arguments()
def mixture_loss(
    gate: Gate,
    params: Params,
    features: Float[AnyArray, "N F"],
    expert_predictions: Float[AnyArray, "N K"],
    y: Float[AnyArray, " N"],
) -> Float[jax.Array, ""]:
    """Mean of (y - sum_k p_k yhat_k)^2, the loss of a regression gate."""
    rows = (jnp.asarray(features), jnp.asarray(expert_predictions), jnp.asarray(y))
    return jnp.mean(MixtureObjective(gate)(params, rows))


@functools.partial(jax.tree_util.register_dataclass, data_fields=("entropy_penalty",), meta_fields=("gate",))
@dataclass(frozen=True)
class MixtureObjective:
    """(y - sum_k p_k yhat_k)^2 of each star, plus ``entropy_penalty`` times the entropy of its weights p."""

    gate: Gate
    entropy_penalty: ArrayLike | None = None

    def __call__(self, params: Params, rows: Rows) -> jax.Array:
        """(N,) losses; ``rows`` are features (N, F), expert predictions (N, K) and target (N,)."""
        features, expert_predictions, y = rows
        weights = self.gate.apply(params, features)
        loss = (y - route_soft(weights, expert_predictions)) ** 2
        return loss if self.entropy_penalty is None else loss + jnp.asarray(self.entropy_penalty, loss.dtype) * entropy(weights)


def entropy(weights: Float[AnyArray, "N K"]) -> Float[jax.Array, " N"]:
    """Entropy of each star's weights, - sum_k p_k log p_k, in nats."""
    weights = jnp.asarray(weights)
    return -jnp.sum(weights * jnp.log(jnp.maximum(weights, jnp.finfo(weights.dtype).tiny)), axis=1)


@convert_arguments(finite=("features", "expert_predictions", "y"))
def require_informative(
    features: Float[AnyArray, "N F"], expert_predictions: Float[AnyArray, "N K"], y: Float[AnyArray, " N"]
) -> None:
    """Raises unless a gate can learn from the data; traced arrays, whose values are not known yet, pass.

    Raises:
        InputError: shapes that disagree, numbers that are not finite, a constant target, or several experts that all predict the
            same for every star.
    """
    if any(isinstance(array, jax.core.Tracer) for array in (features, expert_predictions, y)):
        return
    predictions, y = np.asarray(expert_predictions), np.asarray(y)
    if len(y) > 1 and (y == y[0]).all():
        raise InputError(f"y: found the same value for all {len(y)} stars, expected a target that varies")
    if predictions.shape[1] > 1 and (predictions == predictions[:, :1]).all():
        raise InputError(
            "expert_predictions: found the same prediction of all experts for every star, expected experts that differ"
        )


@convert_arguments()
def fit_gate(
    key: PRNGKeyArray,
    gate: Gate,
    features: Float[AnyArray, "N F"],
    expert_predictions: Float[AnyArray, "N K"],
    y: Float[AnyArray, " N"],
    config: GateConfig | None = None,
    *,
    logistic: Params | None = None,
    hyper: Hyper | None = None,
) -> GateFit:
    """Trains a gate on the squared error of the mixture; the params of the lowest validation loss are kept.

    The function is pure: ``jax.vmap(lambda key: fit_gate(key, ...))(keys)`` trains a gate for every key. The key draws the
    initial params, the validation stars and the batches.

    With ``optimizer="lbfgs"``, ``init="logistic"`` and ``validation_fraction=0`` the training loss of the result is at most
    that of the classification gate: the fit starts there, and the params of the lowest loss are kept.

    Args:
        key: random key.
        gate: ``LinearGate()``, ``MLPGate(hidden)``, or anything with their ``init``, ``from_linear`` and ``apply``.
        features: standardised features.
        expert_predictions: predictions of the frozen experts for the same stars.
        y: target (log g).
        config: ``GateConfig()`` by default.
        logistic: params of the classification gate, for ``init="logistic"``.
        hyper: replaces the learning rate and the penalties of ``config``; may hold tracers, to vmap over them.

    Raises:
        InputError: as ``require_informative``; also for fewer than 2 stars, no ``logistic`` to start from, a gate whose
            weights are not on the simplex, or a loss that is not finite.
    """
    config = GateConfig() if config is None else config
    require_informative(features, expert_predictions, y)
    features, expert_predictions, y = (jnp.asarray(array) for array in (features, expert_predictions, y))
    key_init, key_train = jax.random.split(key)
    params = _init(key_init, gate, features.shape[1], expert_predictions.shape[1], features.dtype)
    if config.init == "logistic":
        if logistic is None:
            raise InputError("logistic is None, expected the params of a classification gate, as config.init is 'logistic'")
        params = gate.from_linear(params, logistic)
    require_simplex(gate, params, features)
    numbers = Hyper.of(config) if hyper is None else hyper
    penalty = None if hyper is None and config.entropy_penalty == 0 else numbers.entropy_penalty
    fit = minimize(
        key_train,
        MixtureObjective(gate, penalty),
        params,
        (features, expert_predictions, y.astype(features.dtype)),
        config.method(numbers.learning_rate),
        validation=config.validation_fraction,
        validation_objective=MixtureObjective(gate),
        weight_decay=numbers.weight_decay,
    )
    traced = isinstance(fit.train_loss, jax.core.Tracer)
    if not traced and not np.isfinite(loss := np.asarray(fit.train_loss)[int(fit.best_epoch)]):
        raise InputError(f"the loss is {loss}, expected numbers whose squares do not overflow")
    return fit


@convert_arguments()
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
    """``fit_gate`` for each of S keys in one compiled call; each result is that of ``fit_gate`` with its key.

    The arrays of the ``GateFit`` have a first dimension S. The keys are divided among ``devices``, by default all of this process.
    The other arguments, and the errors, are those of ``fit_gate``.
    """
    require_informative(features, expert_predictions, y)
    data = tuple(map(jnp.asarray, (features, expert_predictions, y)))
    chosen = devices_for(len(keys), devices)
    divided = _fit_gates(*on_all((keys, data), chosen), gate, config, chosen)
    return jax.device_put(divided, chosen[0])  # together on one device, as other computations expect


@functools.partial(jax.jit, static_argnames=("gate", "config", "devices"))
def _fit_gates(
    keys: jax.Array, data: tuple[jax.Array, ...], gate: Gate, config: GateConfig | None, devices: tuple[jax.Device, ...]
) -> GateFit:
    def fit(key: jax.Array, data: tuple[jax.Array, ...]) -> GateFit:
        features, expert_predictions, y = data
        return fit_gate(key, gate, features, expert_predictions, y, config)

    return map_devices(fit, keys, data, devices)


@functools.partial(jax.jit, static_argnames=("gate", "n_features", "n_experts", "dtype"))
def _init(key: jax.Array, gate: Gate, n_features: int, n_experts: int, dtype: jnp.dtype) -> Params:
    """Random params. A program of its own, which does not depend on the number of stars and is compiled once."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), gate.init(key, n_features, n_experts))
