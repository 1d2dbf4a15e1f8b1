"""How the params of a network are fitted: Adam on mini-batches, or L-BFGS on all stars to a gradient tolerance.

Both are one compiled program, pure in their key, and hold a part of the stars out to choose the params by. An objective
gives one loss for each star, so the same loops train gates and any other small network.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError

Params = dict[str, dict[str, jax.Array]]


@dataclass(frozen=True)
class GateConfig:
    """How a gate is trained; the defaults are the report's where it names them."""

    optimizer: Literal["adam", "lbfgs"] = "adam"
    """Adam on mini-batches, or L-BFGS on all training stars until the gradient vanishes."""
    init: Literal["random", "logistic"] = "random"
    """Random params, or those that make the gate equal to the classification gate."""
    epochs: int = 100
    """Epochs of Adam."""
    learning_rate: float = 1e-3
    """Of Adam."""
    batch_size: int = 256
    """Of Adam; not in the report."""
    patience: int = 10
    """Epochs, or iterations of L-BFGS, without a better loss before the training stops."""
    validation_fraction: float = 0.2
    """Part of the stars whose loss decides which params are kept (not in the report); 0: the training loss decides."""
    max_iterations: int = 2_000
    """Iterations of L-BFGS."""
    gradient_tolerance: float = 1e-5
    """L-BFGS has converged where no derivative of the training loss is larger."""
    weight_decay: float = 0.0
    """Factor of the sum of squared kernel weights in the loss."""
    entropy_penalty: float = 0.0
    """Factor of the weights' mean entropy in the loss; negative values reward uniform weights."""

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience", "max_iterations"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
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


class Hyper(NamedTuple):
    """The numbers of a ``GateConfig`` over which a fit may be vmapped."""

    learning_rate: ArrayLike
    weight_decay: ArrayLike
    entropy_penalty: ArrayLike

    @classmethod
    def of(cls, config: GateConfig) -> Hyper:
        """Those of a configuration."""
        return cls(config.learning_rate, config.weight_decay, config.entropy_penalty)


class GateFit(NamedTuple):
    """A trained gate, or any other trained network."""

    params: Params  #: of the best epoch
    best_epoch: Int[jax.Array, ""]  #: epoch (or iteration) of the lowest validation loss, counted from 0
    stopped_early: Bool[jax.Array, ""]  #: whether patience ran out
    gradient_norm: Float[jax.Array, ""]  #: largest derivative of the training loss at params, in absolute value
    converged: Bool[jax.Array, ""]  #: whether that is within the gradient tolerance
    train_loss: Float[jax.Array, " E"]  #: Adam: mean over the epoch's batches; L-BFGS: before the iteration; NaN after the stop
    validation_loss: Float[jax.Array, " E"]  #: at the same time, without penalties; NaN after the stop and without validation


@runtime_checkable
class Objective(Protocol):
    """A loss for each star. It is hashable, since the compiled loops are kept by it."""

    def __call__(self, params: Params, entropy_penalty: ArrayLike, data: tuple[jax.Array, ...]) -> jax.Array:
        """(N,) losses; an ``entropy_penalty`` of 0 gives the plain ones, by which params are chosen."""


def minimize(
    key: PRNGKeyArray,
    objective: Objective,
    params: Params,
    data: tuple[Float[AnyArray, "N ..."], ...],
    config: GateConfig,
    hyper: Hyper | None = None,
    validation: tuple[Float[AnyArray, "M ..."], ...] | None = None,
) -> GateFit:
    """Fits params to data by the objective; the params of the lowest validation loss are returned.

    Args:
        key: draws the validation stars and the batches.
        objective: loss by star.
        params: where the fit starts.
        data: arrays with N rows each.
        config: optimiser, stopping, held-out part.
        hyper: replaces the configuration's numbers; may hold tracers.
        validation: held-out data, instead of a part that the key draws.

    Raises:
        InputError: too few stars for a training and a validation part.
    """
    if (n_stars := len(data[0])) < 2:
        raise InputError(f"found {n_stars} stars, expected at least 2: one to train and one to validate")
    hyper = Hyper.of(config) if hyper is None else hyper
    shape = dataclasses.replace(config, learning_rate=1.0, weight_decay=0.0, entropy_penalty=0.0, init="random")
    return _minimize(key, objective, params, tuple(map(jnp.asarray, data)), shape, hyper, validation)


@functools.partial(jax.jit, static_argnames=("objective", "config"))
def _minimize(
    key: jax.Array,
    objective: Objective,
    params: Params,
    data: tuple[jax.Array, ...],
    config: GateConfig,
    hyper: Hyper,
    given: tuple[jax.Array, ...] | None,
) -> GateFit:
    key_split, key_batches = jax.random.split(key)
    n_stars = len(data[0])
    held = config.validation_fraction > 0
    n_validation = min(max(round(config.validation_fraction * n_stars), 1), n_stars - 1) if held and given is None else 0
    order = jax.random.permutation(key_split, n_stars)
    validation = tuple(array[order[:n_validation]] for array in data) if given is None else given
    train = tuple(array[order[n_validation:]] for array in data)
    dtype = data[0].dtype
    hyper = Hyper(*(jnp.asarray(value, dtype) for value in hyper))

    def mean_loss(params: Params, rows: tuple[jax.Array, ...], is_star: jax.Array | None = None) -> jax.Array:
        loss = objective(params, hyper.entropy_penalty, rows)
        mean = jnp.mean(loss) if is_star is None else jnp.sum(jnp.where(is_star, loss, 0.0)) / jnp.sum(is_star)
        kernels = sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)
        return mean + hyper.weight_decay * kernels

    def validate(params: Params) -> jax.Array:
        return jnp.mean(objective(params, 0.0, validation)) if held else jnp.full((), jnp.nan, dtype)

    if config.optimizer == "adam":
        fit = _adam(key_batches, mean_loss, validate, params, train, config, hyper.learning_rate)
    else:
        fit = _lbfgs(lambda params: mean_loss(params, train), validate, params, config, dtype)
    gradient = jax.tree.leaves(jax.grad(mean_loss)(fit.params, train))
    norm = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in gradient]))
    return fit._replace(gradient_norm=norm, converged=norm <= config.gradient_tolerance)


class _Best(NamedTuple):
    """The best params so far, and when they were found."""

    params: Params
    loss: jax.Array
    epoch: jax.Array

    def update(self, params: Params, loss: jax.Array, epoch: jax.Array) -> _Best:
        better = loss < self.loss
        kept = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, self.params)
        return _Best(kept, jnp.where(better, loss, self.loss), jnp.where(better, epoch, self.epoch))


def shuffled_batches(key: PRNGKeyArray, n: int, batch_size: int) -> Int[jax.Array, "n_batches batch_size"]:
    """Rows 0 .. n - 1, each once, in batches for one epoch; ``n`` marks padding.

    Column j draws from the rows j * n_batches ... (j + 1) * n_batches - 1, which are in random order already, in turn from a
    random start. That takes a hundredth of the time of the sorts behind a random permutation.
    """
    n_batches = -(-n // batch_size)
    start = jax.random.randint(key, (1, batch_size), 0, n_batches)
    turn = (jnp.arange(n_batches)[:, None] + start) % n_batches
    return jnp.minimum(jnp.arange(batch_size)[None, :] * n_batches + turn, n)


def _adam(
    key: jax.Array, mean_loss: Any, validate: Any, params: Params, train: tuple[jax.Array, ...], config: GateConfig, rate: Any
) -> GateFit:
    n_train = len(train[0])
    optimizer = optax.adam(rate)

    def step(state: tuple[Params, Any], rows: jax.Array) -> tuple[tuple[Params, Any], jax.Array]:
        params, optimizer_state = state
        batch = tuple(array.at[rows].get(mode="fill", fill_value=0) for array in train)
        loss, gradient = jax.value_and_grad(mean_loss)(params, batch, rows < n_train)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    State = tuple[Params, Any, _Best, jax.Array]

    def run_epoch(state: State, epoch: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
        params, optimizer_state, best, _ = state
        rows = shuffled_batches(jax.random.fold_in(key, epoch), n_train, config.batch_size)
        (params, optimizer_state), losses = lax.scan(step, (params, optimizer_state), rows)
        train_loss = jnp.sum(losses * jnp.sum(rows < n_train, axis=1)) / n_train
        validation_loss = validate(params)
        best = best.update(params, validation_loss if config.validation_fraction else train_loss, epoch)
        stopped = epoch - best.epoch >= config.patience
        return (params, optimizer_state, best, stopped), (train_loss, validation_loss)

    def skip_epoch(state: State, _: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
        nan = jnp.full((), jnp.nan, train[0].dtype)
        return state, (nan, nan)

    def epoch_or_skip(state: State, epoch: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
        result: tuple[State, tuple[jax.Array, jax.Array]] = lax.cond(state[-1], skip_epoch, run_epoch, state, epoch)
        return result

    best = _Best(params, jnp.full((), jnp.inf, train[0].dtype), jnp.zeros((), jnp.int32))
    start: State = (params, optimizer.init(params), best, jnp.zeros((), bool))
    (_, _, best, stopped), (train_loss, validation_loss) = lax.scan(
        epoch_or_skip, start, jnp.arange(config.epochs, dtype=jnp.int32)
    )
    return _unfinished(best, stopped, train_loss, validation_loss)


def _lbfgs(total_loss: Any, validate: Any, params: Params, config: GateConfig, dtype: Any) -> GateFit:
    optimizer = optax.lbfgs()
    value_and_grad = optax.value_and_grad_from_state(total_loss)
    State = tuple[jax.Array, Params, Any, _Best, jax.Array, jax.Array, jax.Array, jax.Array]

    def iterate(state: State) -> State:
        i, params, optimizer_state, best, _, _, train_loss, validation_loss = state
        value, gradient = value_and_grad(params, state=optimizer_state)
        held_loss = validate(params)
        best = best.update(params, held_loss if config.validation_fraction else value, i)
        norm = jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))
        updates, optimizer_state = optimizer.update(
            gradient, optimizer_state, params, value=value, grad=gradient, value_fn=total_loss
        )
        train_loss, validation_loss = train_loss.at[i].set(value), validation_loss.at[i].set(held_loss)
        params = optax.apply_updates(params, updates)
        done, stopped = norm <= config.gradient_tolerance, i - best.epoch >= config.patience
        return i + 1, params, optimizer_state, best, done, stopped, train_loss, validation_loss

    def goes_on(state: State) -> jax.Array:
        i, _, _, _, done, stopped, _, _ = state
        return (i < config.max_iterations) & ~done & ~stopped

    no = jnp.zeros((), bool)
    best = _Best(params, jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32))
    history = jnp.full(config.max_iterations, jnp.nan, dtype)
    start: State = (jnp.zeros((), jnp.int32), params, optimizer.init(params), best, no, no, history, history)
    end = lax.while_loop(goes_on, iterate, start)
    return _unfinished(end[3], end[5], end[6], end[7])


def _unfinished(best: _Best, stopped: jax.Array, train_loss: jax.Array, validation_loss: jax.Array) -> GateFit:
    """A fit whose gradient is still to be looked at."""
    return GateFit(best.params, best.epoch, stopped, best.loss, stopped, train_loss, validation_loss)
