"""Gates for many seeds in one vectorised call, and what they predict for the test stars; cached."""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline import prepare
from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.methods import PROTOCOLS
from experiments.pipeline.stars import Prepared, Stars
from experiments.runner.cache import Cache
from moe_jax.core.arrays import AnyArray
from moe_jax.core.parallel import devices_for, map_devices, on_all
from moe_jax.gates.networks import Gate, LinearGate
from moe_jax.gates.optimize import GateConfig, Hyper, Params
from moe_jax.gates.routing import route_soft, sharpen
from moe_jax.gates.training import fit_gate, mixture_loss


@dataclass(frozen=True)
class GateRun:
    """Gates of one kind, trained in one way."""

    gate: Gate
    training: GateConfig = field(default_factory=GateConfig)
    protocol: str = PROTOCOLS[1]  #: "in-sample" or "cross-fitted" expert predictions
    fraction: float = 1.0  #: part of the covered training stars
    n_seeds: int = 8


#: The linear gate at its optimum, from the classification gate's weights on all stars: nothing is drawn.
CONVERGED = GateConfig(optimizer="lbfgs", init="logistic", validation_fraction=0.0, gradient_tolerance=1e-5)
CONVERGED_LINEAR = GateRun(LinearGate(), CONVERGED, n_seeds=1)


class Sweep(NamedTuple):
    """Gates of several seeds, as seen by the test stars."""

    predictions: AnyArray  #: (S, N) of the mixture for each test star, by seed
    mean_weights: AnyArray  #: (S, K) over the test stars
    loss: AnyArray  #: (S,) mean squared error of the mixture on all stars that the gate was given, validation stars included
    validation_loss: AnyArray  #: (S,) the lowest; NaN without validation
    gradient_norm: AnyArray  #: (S,)
    best_epoch: AnyArray  #: (S,) counted from 1
    n_run: AnyArray  #: (S,) epochs or iterations
    stopped_early: AnyArray  #: (S,)
    converged: AnyArray  #: (S,)


SWEEP = Sweep(*[np.zeros(0)] * 9)


def mix_by_class(prepared: Prepared, stars: Stars) -> np.ndarray:
    """(1, N) predictions of the mixture with the classification gate's weights."""
    weights = LinearGate().apply(prepared.classifier.params, stars.features)
    return np.asarray(route_soft(weights, stars.predictions))[None, :]


def training_stars(config: DataConfig, prepared: Prepared, protocol: str, fraction: float) -> Stars:
    """Training stars of a gate: a part of the covered stars, the same for both protocols."""
    drawn = jax.random.permutation(draw_keys(config.seed).in_sample, prepared.n_covered)
    n = max(round(fraction * prepared.n_covered), 2)
    stars = prepared.gate_stars() if protocol == PROTOCOLS[1] else prepared.train.covered()
    return stars if n == prepared.n_covered else stars.select(drawn[:n])


def run_gates(config: DataConfig, prepared: Prepared, run: GateRun, cache: Cache) -> Sweep:
    """Trains the gates of a run and applies them to the covered test stars; from the cache where they are known."""

    def compute() -> Sweep:
        stars = training_stars(config, prepared, run.protocol, run.fraction)
        keys = gate_keys(config, run.n_seeds)
        return train_gates(keys, prepared.classifier.params, stars, prepared.test.covered(), run.gate, run.training)

    settings = dataclasses.asdict(run) | {"gate": repr(run.gate), "data": dataclasses.asdict(config)}
    return cache.load_or_compute("gates", settings, [prepare.__file__, __file__], SWEEP, compute)[0]


def gate_keys(config: DataConfig, n_seeds: int) -> jax.Array:
    """Keys of several gates: the same for every kind of gate, so that kinds are compared on the same draws."""
    return jax.random.split(jax.random.fold_in(draw_keys(config.seed).gates, 1_000), n_seeds)


def train_gates(
    keys: jax.Array,
    logistic: Params,
    stars: Stars,
    test: Stars,
    gate: Gate,
    gate_config: GateConfig,
    *,
    hyper: Hyper | None = None,
    mask: AnyArray | None = None,
    temperature: AnyArray | None = None,
) -> Sweep:
    """Trains a gate for each key, and applies them to test stars.

    Args:
        keys: (S,) random keys.
        logistic: params of the classification gate.
        stars: what the gates are trained on.
        test: what they are applied to.
        gate: form of the gates.
        gate_config: how they are trained.
        hyper: (S,) each; replaces the numbers of ``gate_config``.
        mask: (S, F) factor on the features; 0 takes a feature away.
        temperature: (S,) at which the trained weights are used on the test stars.
    """
    n_seeds, n_features = len(keys), test.features.shape[1]
    mask = jnp.ones((n_seeds, n_features)) if mask is None else jnp.asarray(mask)
    temperature = jnp.ones(n_seeds) if temperature is None else jnp.asarray(temperature)
    train = tuple(map(jnp.asarray, (stars.features, stars.predictions, stars.log_g)))
    seen = tuple(map(jnp.asarray, (test.features, test.predictions)))
    hyper = jax.tree.map(jnp.asarray, hyper)
    arrays = on_all(((keys, hyper, mask, temperature), train, seen, logistic), devices_for(n_seeds))
    sweep: Sweep = _train_at_once(*arrays, gate, gate_config)
    return jax.tree.map(np.asarray, sweep)


@functools.partial(jax.jit, static_argnames=("gate", "config"))
def _train_at_once(
    each: tuple[jax.Array, Hyper | None, jax.Array, jax.Array],
    train: tuple[jax.Array, ...],
    test: tuple[jax.Array, ...],
    logistic: Params,
    gate: Gate,
    config: GateConfig,
) -> Sweep:
    def one(each: tuple[jax.Array, Hyper | None, jax.Array, jax.Array], shared: Any) -> Sweep:
        key, hyper, mask, temperature = each
        (features, predictions, y), test, logistic = shared
        fit = fit_gate(key, gate, features * mask[None, :], predictions, y, config, logistic=logistic, hyper=hyper)
        weights = sharpen(gate.apply(fit.params, test[0] * mask[None, :]), temperature)
        n_run = jnp.sum(jnp.isfinite(fit.train_loss))
        return Sweep(
            predictions=route_soft(weights, test[1]),
            mean_weights=jnp.mean(weights, axis=0),
            loss=mixture_loss(gate, fit.params, features * mask[None, :], predictions, y),
            validation_loss=fit.validation_loss[fit.best_epoch],
            gradient_norm=fit.gradient_norm,
            best_epoch=fit.best_epoch + 1,
            n_run=n_run,
            stopped_early=fit.stopped_early,
            converged=fit.converged,
        )

    sweep: Sweep = map_devices(one, each, (train, test, logistic))
    return sweep
