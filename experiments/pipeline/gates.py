"""Trains the gates of many seeds in one compiled call and applies them to the test stars; results are cached."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import PRNGKeyArray

from experiments.pipeline import prepare
from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.methods import PROTOCOLS
from experiments.pipeline.stars import Prepared, Stars
from experiments.runner.cache import Cache
from moe_jax.core.arrays import AnyArray
from moe_jax.core.parallel import devices_for, map_devices, on_all
from moe_jax.gates import Gate, GateConfig, GateFit, Hyper, LinearGate, fit_gate, mixture_loss, route_soft, sharpen
from moe_jax.gates.optimize import Params
from moe_jax.gates.training import require_informative


@dataclass(frozen=True)
class GateRun:
    """Gates of one kind, trained in one way."""

    gate: Gate
    training: GateConfig = field(default_factory=GateConfig)
    protocol: str = PROTOCOLS[1]  #: whether the experts' predictions are in-sample or cross-fitted
    fraction: float = 1.0  #: part of the covered training stars that the gates are trained on
    n_seeds: int = 8


#: The linear gate at its optimum: started from the classification gate, trained on all stars. Nothing in it is random.
CONVERGED = GateConfig(optimizer="lbfgs", init="logistic", validation_fraction=0.0, gradient_tolerance=1e-5)
CONVERGED_LINEAR = GateRun(LinearGate(), CONVERGED, n_seeds=1)


class Sweep(NamedTuple):
    """What S gates, one for each seed, give: predictions for the test stars, and how the training went (see ``GateFit``)."""

    predictions: AnyArray  #: (S, N) predictions of the mixture for the test stars
    mean_weights: AnyArray  #: (S, K) mean over the test stars
    loss: AnyArray  #: (S,) mean squared error of the mixture on all stars that the gate was given, validation stars included
    validation_loss: AnyArray  #: (S,) lowest validation loss; NaN without validation stars
    gradient_norm: AnyArray  #: (S,)
    best_epoch: AnyArray  #: (S,) counted from 1
    converged: AnyArray  #: (S,)


def mix_by_class(prepared: Prepared, stars: Stars) -> np.ndarray:
    """(1, N) predictions of the mixture with the classification gate's weights."""
    weights = LinearGate().apply(prepared.classifier.params, stars.features)
    return np.asarray(route_soft(weights, stars.predictions))[None, :]


def training_stars(config: DataConfig, prepared: Prepared, protocol: str, fraction: float) -> Stars:
    """The stars that a gate is trained on: a random part of the covered stars, the same for both protocols."""
    drawn = jax.random.permutation(draw_keys(config.seed).in_sample, prepared.n_covered)
    n = max(round(fraction * prepared.n_covered), 2)
    stars = prepared.gate_stars() if protocol == PROTOCOLS[1] else prepared.train.covered()
    return stars if n == prepared.n_covered else stars.select(drawn[:n])


def fit_run(key: PRNGKeyArray, config: DataConfig, prepared: Prepared, run: GateRun) -> GateFit:
    """One gate of a run."""
    stars = training_stars(config, prepared, run.protocol, run.fraction)
    data = (stars.features, stars.predictions, stars.log_g)
    return fit_gate(key, run.gate, *data, run.training, logistic=prepared.classifier.params)


def run_gates(config: DataConfig, prepared: Prepared, run: GateRun, cache: Cache) -> Sweep:
    """Trains the gates of a run and applies them to the covered test stars, or reads this from the cache."""

    def compute() -> Sweep:
        stars, test = training_stars(config, prepared, run.protocol, run.fraction), prepared.test.covered()
        return train_gates(gate_keys(config, run.n_seeds), prepared.classifier.params, stars, test, run.gate, run.training)

    settings = dataclasses.asdict(run) | {"gate": repr(run.gate), "data": dataclasses.asdict(config)}
    return cache.load_or_compute("gates", settings, [prepare.__file__, __file__], Sweep, compute)[0]


def gate_keys(config: DataConfig, n_seeds: int) -> jax.Array:
    """One key for each seed; each noise draw has its own. All kinds of gates share them, to be compared on the same draws."""
    return jax.random.split(jax.random.fold_in(draw_keys(config.seed).gates, 1_000 + config.noise_draw), n_seeds)


class Changes(NamedTuple):
    """What differs between S gates that are trained in one call."""

    hyper: Hyper | None  #: (S,) numbers that replace those of the gates' configuration
    mask: AnyArray  #: (S, F) factors on the features; 0 takes a feature away
    temperature: AnyArray | float  #: (S,) temperatures at which the trained weights are used on the test stars


def train_gates(
    keys: jax.Array, logistic: Params, stars: Stars, test: Stars, gate: Gate, config: GateConfig, changes: Changes | None = None
) -> Sweep:
    """Trains a gate for each of S keys, and applies it to test stars; ``logistic`` are the params of the classification gate.

    Raises:
        InputError: where the training stars teach nothing; see ``require_informative``.
    """
    require_informative(stars.features, stars.predictions, stars.log_g)
    changes = changes or Changes(None, jnp.ones((len(keys), test.features.shape[1])), jnp.ones(len(keys)))
    shared = ((stars.features, stars.predictions, stars.log_g), (test.features, test.predictions), logistic)
    arrays = on_all(jax.tree.map(jnp.asarray, ((keys, changes), shared)), devices_for(len(keys)))
    sweep: Sweep = _train_at_once(*arrays, gate, config)
    return jax.tree.map(np.asarray, sweep)


@functools.partial(jax.jit, static_argnames=("gate", "config"))
def _train_at_once(inputs: tuple[jax.Array, Changes], shared: Any, gate: Gate, config: GateConfig) -> Sweep:
    def train_one(one: tuple[jax.Array, Changes], shared: Any) -> Sweep:
        key, (hyper, mask, temperature) = one
        (features, predictions, y), (test_features, test_predictions), logistic = shared
        features, test_features = features * mask[None, :], test_features * mask[None, :]
        fit = fit_gate(key, gate, features, predictions, y, config, logistic=logistic, hyper=hyper)
        weights = sharpen(gate.apply(fit.params, test_features), temperature)
        return Sweep(
            predictions=route_soft(weights, test_predictions),
            mean_weights=jnp.mean(weights, axis=0),
            loss=mixture_loss(gate, fit.params, features, predictions, y),
            validation_loss=fit.validation_loss[fit.best_epoch],
            gradient_norm=fit.gradient_norm,
            best_epoch=fit.best_epoch + 1,
            converged=fit.converged,
        )

    sweep: Sweep = map_devices(train_one, inputs, shared)
    return sweep
