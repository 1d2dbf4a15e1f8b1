"""Fits the params of a small network: Adam on mini-batches, or L-BFGS on all stars until the gradient vanishes.

``minimize`` knows nothing of gates. It takes any loss that gives one number for each star, holds a part of the stars out, and
returns the params whose loss on these was lowest. A fit is one compiled program and depends on nothing but its arguments.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError

Params = dict[str, dict[str, jax.Array]]
Rows = tuple[jax.Array, ...]  #: arrays with one row for each star
#: (N,) losses of stars. It is a pytree, so that numbers in it may be traced; see ``jax.tree_util.register_dataclass``.
Objective = Callable[[Params, Rows], jax.Array]


@functools.partial(
    jax.tree_util.register_dataclass,
    data_fields=("learning_rate",),
    meta_fields=("epochs", "batch_size", "patience", "gradient_tolerance"),
)
@dataclass(frozen=True)
class Adam:
    """Adam on mini-batches (Kingma & Ba 2015)."""

    learning_rate: ArrayLike = 1e-3  #: may be a tracer, so that one may vmap over it
    epochs: int = 100
    batch_size: int = 256
    patience: int = 10  #: epochs without a better loss before the fit stops
    gradient_tolerance: float = 1e-5  #: decides only whether the result is called converged


@jax.tree_util.register_static
@dataclass(frozen=True)
class LBFGS:
    """L-BFGS on all training stars at once."""

    max_iterations: int = 2_000
    patience: int = 10  #: iterations without a better loss before the fit stops
    gradient_tolerance: float = 1e-5  #: the fit stops where no derivative of the loss is larger


class GateFit(NamedTuple):
    """A trained gate, or any other trained network."""

    params: Params  #: those of the best epoch
    best_epoch: Int[jax.Array, ""]  #: epoch (or iteration) of the lowest validation loss, counted from 0
    stopped_early: Bool[jax.Array, ""]  #: whether patience ran out
    gradient_norm: Float[jax.Array, ""]  #: largest derivative of the training loss at params, in absolute value
    converged: Bool[jax.Array, ""]  #: whether that is within the gradient tolerance
    train_loss: Float[jax.Array, " E"]  #: Adam: mean over the epoch's batches; L-BFGS: before the iteration; NaN after the stop
    validation_loss: Float[jax.Array, " E"]  #: at the same time; NaN after the stop, and everywhere without validation stars


def minimize(
    key: PRNGKeyArray,
    objective: Objective,
    params: Params,
    data: tuple[Float[AnyArray, "N ..."], ...],
    optimizer: Adam | LBFGS,
    *,
    validation: float | tuple[Float[AnyArray, "M ..."], ...] = 0.2,
    validation_objective: Objective | None = None,
    weight_decay: ArrayLike = 0.0,
) -> GateFit:
    """Fits params to data; returns the params of the lowest validation loss.

    Args:
        key: draws the validation stars and the batches.
        objective: the loss that is minimised, penalties included.
        params: where the fit starts.
        data: arrays with N rows each.
        optimizer: ``Adam(...)`` or ``LBFGS(...)``.
        validation: part of the stars that is held out, or other stars, as arrays like ``data``. The params of the lowest loss on
            the held-out stars are returned. With 0 all stars are trained on, and the training loss decides.
        validation_objective: the loss on the held-out stars; by default the objective.
        weight_decay: factor of the sum of squared kernel weights in the training loss.

    Raises:
        InputError: too few stars for a training and a validation part.
    """
    if (n_stars := len(data[0])) < 2:
        raise InputError(f"found {n_stars} stars, expected at least 2: one to train and one to validate")
    fraction, given = (0.0, validation) if isinstance(validation, tuple) else (validation, None)
    n_held = min(max(round(fraction * n_stars), 1), n_stars - 1) if fraction > 0 else 0
    objectives = (objective, objective if validation_objective is None else validation_objective)
    return _minimize(key, objectives, params, tuple(map(jnp.asarray, data)), given, optimizer, weight_decay, n_held)


@functools.partial(jax.jit, static_argnames="n_held")
def _minimize(
    key: jax.Array,
    objectives: tuple[Objective, Objective],
    params: Params,
    data: Rows,
    given: Rows | None,
    optimizer: Adam | LBFGS,
    weight_decay: ArrayLike,
    n_held: int,
) -> GateFit:
    objective, validation_objective = objectives
    key_split, key_batches = jax.random.split(key)
    order = jax.random.permutation(key_split, len(data[0]))
    train = tuple(array[order[n_held:]] for array in data)
    held = tuple(array[order[:n_held]] for array in data) if given is None else given
    dtype = data[0].dtype
    decay = jnp.asarray(weight_decay, dtype)

    def mean_loss(params: Params, rows: Rows, is_star: jax.Array | None = None) -> jax.Array:
        loss = objective(params, rows)
        mean = jnp.mean(loss) if is_star is None else jnp.sum(jnp.where(is_star, loss, 0.0)) / jnp.sum(is_star)
        return mean + decay * sum(jnp.sum(leaf**2) for leaf in jax.tree.leaves(params) if leaf.ndim > 1)

    def judge(best: _Best, params: Params, epoch: jax.Array, train_loss: jax.Array) -> tuple[_Best, jax.Array]:
        has_held = len(held[0]) > 0
        validation_loss = jnp.mean(validation_objective(params, held)) if has_held else jnp.full((), jnp.nan, dtype)
        candidate = _Best(params, validation_loss if has_held else train_loss, epoch)
        better = candidate.loss < best.loss
        return jax.tree.map(lambda new, old: jnp.where(better, new, old), candidate, best), validation_loss

    best = _Best(params, jnp.full((), jnp.inf, dtype), jnp.zeros((), jnp.int32))
    if isinstance(optimizer, Adam):
        best, stopped, *losses = _adam(key_batches, optimizer, mean_loss, judge, best, train)
    else:
        best, stopped, *losses = _lbfgs(optimizer, lambda params: mean_loss(params, train), judge, best)
    norm = _largest(jax.grad(mean_loss)(best.params, train))
    return GateFit(best.params, best.epoch, stopped, norm, norm <= optimizer.gradient_tolerance, *losses)


class _Best(NamedTuple):
    """The best params so far, and when they were reached."""

    params: Params
    loss: jax.Array
    epoch: jax.Array


def _largest(gradient: Params) -> jax.Array:
    """Largest derivative in absolute value."""
    return jnp.max(jnp.stack([jnp.max(jnp.abs(leaf)) for leaf in jax.tree.leaves(gradient)]))


def shuffled_batches(key: PRNGKeyArray, n: int, batch_size: int) -> Int[jax.Array, "n_batches batch_size"]:
    """The rows 0 .. n - 1, each once, in the batches of one epoch; ``n`` marks padding.

    Column j takes one row for each batch from j * n_batches ... (j + 1) * n_batches - 1: in turn, from a random start. The rows
    must be in random order already. That takes a hundredth of the time of the sorts behind a random permutation.
    """
    n_batches = -(-n // batch_size)
    start = jax.random.randint(key, (1, batch_size), 0, n_batches)
    turn = (jnp.arange(n_batches)[:, None] + start) % n_batches
    return jnp.minimum(jnp.arange(batch_size)[None, :] * n_batches + turn, n)


#: From the best params so far, params, their epoch and training loss to the best params, and the validation loss.
_Judge = Callable[[_Best, Params, jax.Array, jax.Array], tuple[_Best, jax.Array]]
#: The best params, whether patience ran out, and the training and the validation loss by epoch.
_Run = tuple[_Best, jax.Array, jax.Array, jax.Array]


def _adam(key: jax.Array, optimizer: Adam, mean_loss: Callable[..., jax.Array], judge: _Judge, best: _Best, train: Rows) -> _Run:
    n_train, dtype = len(train[0]), train[0].dtype
    adam = optax.adam(jnp.asarray(optimizer.learning_rate, dtype))

    def step(state: tuple[Params, Any], batch: jax.Array) -> tuple[tuple[Params, Any], jax.Array]:
        params, adam_state = state
        rows = tuple(array.at[batch].get(mode="fill", fill_value=0) for array in train)
        loss, gradient = jax.value_and_grad(mean_loss)(params, rows, batch < n_train)
        updates, adam_state = adam.update(gradient, adam_state, params)
        return (optax.apply_updates(params, updates), adam_state), loss

    State = tuple[Params, Any, _Best, jax.Array]

    def run_epoch(state: State, epoch: jax.Array) -> tuple[State, tuple[jax.Array, jax.Array]]:
        params, adam_state, best, _ = state
        batches = shuffled_batches(jax.random.fold_in(key, epoch), n_train, optimizer.batch_size)
        (params, adam_state), losses = lax.scan(step, (params, adam_state), batches)
        train_loss = jnp.sum(losses * jnp.sum(batches < n_train, axis=1)) / n_train
        best, validation_loss = judge(best, params, epoch, train_loss)
        return (params, adam_state, best, epoch - best.epoch >= optimizer.patience), (train_loss, validation_loss)

    def epoch_or_skip(state: State, epoch: jax.Array) -> Any:
        nan = jnp.full((), jnp.nan, dtype)
        return lax.cond(state[-1], lambda state, _: (state, (nan, nan)), run_epoch, state, epoch)

    start = (best.params, adam.init(best.params), best, jnp.zeros((), bool))
    (_, _, best, stopped), losses = lax.scan(epoch_or_skip, start, jnp.arange(optimizer.epochs, dtype=jnp.int32))
    return best, stopped, *losses


class _Iteration(NamedTuple):
    """Where L-BFGS stands."""

    number: jax.Array
    params: Params
    memory: Any
    best: _Best
    converged: jax.Array
    stopped: jax.Array
    train_loss: jax.Array
    validation_loss: jax.Array


def _lbfgs(optimizer: LBFGS, loss: Callable[[Params], jax.Array], judge: _Judge, best: _Best) -> _Run:
    lbfgs = optax.lbfgs()
    value_and_gradient = optax.value_and_grad_from_state(loss)

    def iterate(state: _Iteration) -> _Iteration:
        i, params = state.number, state.params
        value, gradient = value_and_gradient(params, state=state.memory)
        best, validation_loss = judge(state.best, params, i, value)
        updates, memory = lbfgs.update(gradient, state.memory, params, value=value, grad=gradient, value_fn=loss)
        return _Iteration(
            i + 1,
            optax.apply_updates(params, updates),
            memory,
            best,
            converged=_largest(gradient) <= optimizer.gradient_tolerance,
            stopped=i - best.epoch >= optimizer.patience,
            train_loss=state.train_loss.at[i].set(value),
            validation_loss=state.validation_loss.at[i].set(validation_loss),
        )

    def goes_on(state: _Iteration) -> jax.Array:
        return (state.number < optimizer.max_iterations) & ~state.converged & ~state.stopped

    no, history = jnp.zeros((), bool), jnp.full(optimizer.max_iterations, jnp.nan, best.loss.dtype)
    start = _Iteration(jnp.zeros((), jnp.int32), best.params, lbfgs.init(best.params), best, no, no, history, history)
    end = lax.while_loop(goes_on, iterate, start)
    return end.best, end.stopped, end.train_loss, end.validation_loss
