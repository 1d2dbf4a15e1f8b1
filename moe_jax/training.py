"""Training of gates: the classification gate by scikit-learn, regression gates on the squared error of the mixture."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jaxtyping import Bool, Float, Int, PRNGKeyArray
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import log_loss
from sklearn.model_selection import StratifiedKFold

from moe_jax.arrays import AnyArray, InputError, require_same_length
from moe_jax.gates import Gate, Params, linear_params
from moe_jax.routing import route_soft

C_GRID = (10.0, 100.0, 1000.0)


@dataclass(frozen=True)
class GateConfig:
    """How a regression gate is trained; the defaults are the report's where it names them."""

    epochs: int = 100
    learning_rate: float = 1e-3
    batch_size: int = 256  # not in the report
    patience: int = 10  # epochs without a better validation loss before the training stops
    validation_fraction: float = 0.2  # not in the report

    def __post_init__(self) -> None:
        for name in ("epochs", "batch_size", "patience"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least 1")
        if not self.learning_rate > 0:
            raise InputError(f"learning_rate is {self.learning_rate}, expected a positive number")
        if not 0 < self.validation_fraction < 1:
            raise InputError(f"validation_fraction is {self.validation_fraction}, expected a number between 0 and 1")


class GateFit(NamedTuple):
    """A trained regression gate."""

    params: Params  #: of the best epoch
    best_epoch: Int[jax.Array, ""]  #: epoch of the lowest validation loss, counted from 0
    stopped_early: Bool[jax.Array, ""]  #: whether patience ran out; if not, the gate may not have converged
    train_loss: Float[jax.Array, " E"]  #: mean over the epoch's batches; NaN after the stop
    validation_loss: Float[jax.Array, " E"]  #: after the epoch; NaN after the stop


class ClassifierFit(NamedTuple):
    """The classification gate: params for a ``LinearGate``."""

    params: Params
    C: float  #: inverse strength of the L2 penalty, chosen by cross-validation
    accuracy: float  #: cross-validated, at that C
    at_edge: bool  #: whether C lies at an end of the grid
    converged: bool


def mixture_loss(
    gate: Gate,
    params: Params,
    features: Float[AnyArray, "N F"],
    expert_predictions: Float[AnyArray, "N K"],
    y: Float[AnyArray, " N"],
) -> Float[jax.Array, ""]:
    """Mean of (y - sum_k p_k yhat_k)^2, the loss of a regression gate."""
    return jnp.mean((y - route_soft(gate.apply(params, features), expert_predictions)) ** 2)


def fit_gate(
    key: PRNGKeyArray,
    gate: Gate,
    features: Float[AnyArray, "N F"],
    expert_predictions: Float[AnyArray, "N K"],
    y: Float[AnyArray, " N"],
    config: GateConfig | None = None,
) -> GateFit:
    """Trains a gate on the squared error of the mixture: Adam on mini-batches, early stopping, the best params restored.

    Pure, and one compiled program: ``jax.vmap(lambda key: fit_gate(key, ...))(keys)`` trains a gate for every key. The key
    draws the initial params, the validation stars and the batches.

    Args:
        key: random key.
        gate: ``LinearGate()``, ``MLPGate(hidden)``, or anything with their ``init`` and ``apply``.
        features: standardised.
        expert_predictions: of the frozen experts, for the same stars.
        y: target (log g).
        config: ``GateConfig()`` by default.

    Raises:
        InputError: shapes that disagree, or too few stars for a training and a validation part.
    """
    config = GateConfig() if config is None else config
    require_same_length(features=features, y=y)
    require_same_length(expert_predictions=expert_predictions, y=y)
    if len(y) < 2:
        raise InputError(f"y has {len(y)} stars, expected at least 2: one to train and one to validate")
    key_init, key_train = jax.random.split(key)
    params = _init(key_init, gate, features.shape[1], expert_predictions.shape[1], jnp.asarray(features).dtype)
    return _fit_gate(key_train, gate, params, jnp.asarray(features), jnp.asarray(expert_predictions), jnp.asarray(y), config)


@functools.partial(jax.jit, static_argnames=("gate", "n_features", "n_experts", "dtype"))
def _init(key: jax.Array, gate: Gate, n_features: int, n_experts: int, dtype: jnp.dtype) -> Params:
    """Random params; compiled by itself, as it does not depend on the number of stars."""
    return jax.tree.map(lambda leaf: leaf.astype(dtype), gate.init(key, n_features, n_experts))


class _State(NamedTuple):
    params: Params
    optimizer: optax.OptState
    best_params: Params
    best_loss: jax.Array
    best_epoch: jax.Array
    stopped: jax.Array


@functools.partial(jax.jit, static_argnames=("gate", "config"))
def _fit_gate(
    key: jax.Array, gate: Gate, params: Params, features: jax.Array, predictions: jax.Array, y: jax.Array, config: GateConfig
) -> GateFit:
    n_stars = len(y)
    n_validation = min(max(round(config.validation_fraction * n_stars), 1), n_stars - 1)
    n_train = n_stars - n_validation
    n_batches = -(-n_train // config.batch_size)
    key_split, key_batches = jax.random.split(key)
    data = (features, predictions, y.astype(features.dtype))
    order = jax.random.permutation(key_split, n_stars)
    validation = jax.tree.map(lambda array: array[order[:n_validation]], data)
    train = jax.tree.map(lambda array: array[order[n_validation:]], data)
    optimizer = optax.adam(config.learning_rate)

    def batch_loss(params: Params, batch: tuple[jax.Array, ...], is_star: jax.Array) -> jax.Array:
        x, yhat, target = batch
        residual = jnp.where(is_star, target - route_soft(gate.apply(params, x), yhat), 0.0)
        return jnp.sum(residual**2) / jnp.sum(is_star)

    def step(state: tuple[Params, optax.OptState], rows: jax.Array) -> tuple[tuple[Params, optax.OptState], jax.Array]:
        params, optimizer_state = state
        batch = jax.tree.map(lambda array: array.at[rows].get(mode="fill", fill_value=0), train)
        loss, gradient = jax.value_and_grad(batch_loss)(params, batch, rows < n_train)
        updates, optimizer_state = optimizer.update(gradient, optimizer_state, params)
        return (optax.apply_updates(params, updates), optimizer_state), loss

    def run_epoch(state: _State, epoch: jax.Array) -> tuple[_State, tuple[jax.Array, jax.Array]]:
        shuffled = jax.random.permutation(jax.random.fold_in(key_batches, epoch), n_train)
        rows = jnp.pad(shuffled, (0, n_batches * config.batch_size - n_train), constant_values=n_train)
        start = (state.params, state.optimizer)
        (params, optimizer_state), losses = lax.scan(step, start, rows.reshape(n_batches, config.batch_size))
        batch_sizes = jnp.sum(rows.reshape(n_batches, -1) < n_train, axis=1)
        train_loss = jnp.sum(losses * batch_sizes) / n_train
        validation_loss = mixture_loss(gate, params, *validation)
        better = validation_loss < state.best_loss
        best_epoch = jnp.where(better, epoch, state.best_epoch)
        best_params = jax.tree.map(lambda new, old: jnp.where(better, new, old), params, state.best_params)
        best_loss = jnp.where(better, validation_loss, state.best_loss)
        stopped = epoch - best_epoch >= config.patience
        return _State(params, optimizer_state, best_params, best_loss, best_epoch, stopped), (train_loss, validation_loss)

    def skip_epoch(state: _State, epoch: jax.Array) -> tuple[_State, tuple[jax.Array, jax.Array]]:
        nan = jnp.full((), jnp.nan, features.dtype)
        return state, (nan, nan)

    def epoch_or_skip(state: _State, epoch: jax.Array) -> tuple[_State, tuple[jax.Array, jax.Array]]:
        result: tuple[_State, tuple[jax.Array, jax.Array]] = lax.cond(state.stopped, skip_epoch, run_epoch, state, epoch)
        return result

    infinite = jnp.full((), jnp.inf, features.dtype)
    start = _State(params, optimizer.init(params), params, infinite, jnp.zeros((), jnp.int32), jnp.zeros((), bool))
    end, (train_loss, validation_loss) = lax.scan(epoch_or_skip, start, jnp.arange(config.epochs, dtype=jnp.int32))
    return GateFit(end.best_params, end.best_epoch, end.stopped, train_loss, validation_loss)


def fit_classifier(
    features: Float[AnyArray, "N F"],
    cell: Int[AnyArray, " N"],
    *,
    C_grid: tuple[float, ...] = C_GRID,
    n_folds: int = 5,
    seed: int = 0,
) -> ClassifierFit:
    """The classification gate: multinomial logistic regression of the cell on the features, C by cross-validation.

    By scikit-learn in float64; C is the one with the best cross-validated log loss, and the weights become the params of a
    ``LinearGate``.

    Args:
        features: standardised features of the covered training stars.
        cell: their cells, 0 .. K - 1, each of which must occur.
        C_grid: inverse penalties to choose from.
        n_folds: folds of the cross-validation.
        seed: of the shuffle into folds.

    Raises:
        InputError: shapes that disagree, or a cell that is missing or holds fewer stars than folds.
    """
    require_same_length(features=features, cell=cell)
    counts = np.bincount(np.asarray(cell))
    if counts.min() < n_folds:
        k = int(counts.argmin())
        raise InputError(f"cell: found {counts[k]} stars in cell {k}, expected at least {n_folds} to cross-validate")
    x, cell, C_grid = np.asarray(features, np.float64), np.asarray(cell), tuple(sorted(C_grid))
    # Newton steps on the exact Hessian: a dozen iterations, where L-BFGS needs hundreds at large C; along the grid each fit
    # starts from the one before.
    model = LogisticRegression(solver="newton-cholesky", max_iter=200, warm_start=True)
    loss, accuracy = np.zeros((2, n_folds, len(C_grid)))
    for i, (train, held) in enumerate(StratifiedKFold(n_folds, shuffle=True, random_state=seed).split(x, cell)):
        for j, C in enumerate(C_grid):
            probabilities = model.set_params(C=C).fit(x[train], cell[train]).predict_proba(x[held])
            loss[i, j] = log_loss(cell[held], probabilities)
            accuracy[i, j] = np.mean(np.argmax(probabilities, axis=1) == cell[held])
    best = int(np.argmin(loss.mean(axis=0)))
    model.set_params(C=C_grid[best], tol=1e-8).fit(x, cell)
    features = jnp.asarray(features)
    kernel, bias = jnp.asarray(model.coef_.T, features.dtype), jnp.asarray(model.intercept_, features.dtype)
    return ClassifierFit(
        linear_params(kernel, bias),
        C=C_grid[best],
        accuracy=float(accuracy.mean(axis=0)[best]),
        at_edge=len(C_grid) > 1 and C_grid[best] in (min(C_grid), max(C_grid)),
        converged=bool(np.all(model.n_iter_ < model.max_iter)),
    )
