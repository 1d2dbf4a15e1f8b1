"""Gates for many seeds in one vectorised call, and what they predict for the test stars; cached."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cache import package_files
from experiments.prepare import CODE, Prepared, Stars, draw_keys
from experiments.study import StudyConfig
from moe_jax.arrays import AnyArray
from moe_jax.evaluation import PROTOCOLS
from moe_jax.gates import Gate
from moe_jax.optimize import GateConfig, Hyper, Params
from moe_jax.routing import route_soft
from moe_jax.training import fit_gate

CODE_OF_GATES = [*CODE, *package_files("gates.py", "optimize.py", "training.py", "routing.py"), Path(__file__)]
SEEDS_AT_ONCE = 8  # more at a time gain nothing on a CPU


class Sweep(NamedTuple):
    """Gates of several seeds, as seen by the test stars."""

    predictions: AnyArray  #: (S, N) of the mixture for each covered test star, by seed
    mean_weights: AnyArray  #: (S, K) over the covered test stars
    train_loss: AnyArray  #: (S,) last finite training loss
    validation_loss: AnyArray  #: (S,) the lowest; NaN without validation
    gradient_norm: AnyArray  #: (S,)
    best_epoch: AnyArray  #: (S,) counted from 1
    n_run: AnyArray  #: (S,) epochs or iterations
    stopped_early: AnyArray  #: (S,)
    converged: AnyArray  #: (S,)


SWEEP = Sweep(*[np.zeros(0)] * 9)


def in_sample_stars(config: StudyConfig, prepared: Prepared, fraction: float) -> Stars:
    """A part of the covered training stars, with the predictions of the experts that were fitted on them."""
    train = prepared.train
    covered = np.flatnonzero(np.asarray(train.cell) >= 0)
    drawn = jax.random.permutation(draw_keys(config.seed).in_sample, covered)
    return train.select(drawn[: max(round(fraction * len(covered)), 2)])


def stars_of(config: StudyConfig, prepared: Prepared, protocol: str, fraction: float) -> Stars:
    """Training stars of a gate: ``"in-sample"`` or ``"cross-fitted"`` expert predictions, for a part of the covered stars."""
    if protocol == PROTOCOLS[0]:
        return in_sample_stars(config, prepared, fraction)
    stars = prepared.gate_stars()
    if fraction == 1.0:
        return stars
    n = len(stars.log_g)
    drawn = jax.random.permutation(draw_keys(config.seed).in_sample, n)  # the same stars as those of the other protocol
    return stars.select(drawn[: max(round(fraction * n), 2)])


def gate_keys(config: StudyConfig, n_seeds: int, stream: int = 0) -> jax.Array:
    """Keys of several gates; ``stream`` sets those of one sweep apart from those of another."""
    return jax.random.split(jax.random.fold_in(draw_keys(config.seed).gates, 1_000 + stream), n_seeds)


def train_gates(
    keys: jax.Array,
    prepared: Prepared,
    stars: Stars,
    gate: Gate,
    gate_config: GateConfig,
    *,
    hyper: Hyper | None = None,
    mask: AnyArray | None = None,
) -> Sweep:
    """Trains a gate for each key, and applies them to the covered test stars.

    Args:
        keys: (S,) random keys.
        prepared: test stars and the classification gate.
        stars: what the gates are trained on.
        gate: form of the gates.
        gate_config: how they are trained.
        hyper: (S,) each; replaces the numbers of ``gate_config``.
        mask: (S, F) factor on the features; 0 takes a feature away.
    """
    test = prepared.test.covered()
    n_seeds, n_features = len(keys), test.features.shape[1]
    mask = jnp.ones((n_seeds, n_features)) if mask is None else jnp.asarray(mask)
    train = tuple(map(jnp.asarray, (stars.features, stars.predictions, stars.log_g)))
    seen = tuple(map(jnp.asarray, (test.features, test.predictions)))
    parts = []
    for i in range(0, n_seeds, SEEDS_AT_ONCE):
        part = slice(i, i + SEEDS_AT_ONCE)
        own = jax.tree.map(lambda values, part=part: jnp.asarray(values)[part], hyper)
        parts.append(_train_at_once(keys[part], own, mask[part], train, seen, prepared.classifier.params, gate, gate_config))
    sweep: Sweep = jax.tree.map(lambda *leaves: np.concatenate([np.asarray(leaf) for leaf in leaves]), *parts)
    return sweep


@functools.partial(jax.jit, static_argnames=("gate", "config"))
def _train_at_once(
    keys: jax.Array,
    hyper: Hyper | None,
    mask: jax.Array,
    train: tuple[jax.Array, ...],
    test: tuple[jax.Array, ...],
    logistic: Params,
    gate: Gate,
    config: GateConfig,
) -> Sweep:
    def one(key: jax.Array, hyper: Hyper | None, mask: jax.Array) -> Sweep:
        features, predictions, y = train
        fit = fit_gate(key, gate, features * mask[None, :], predictions, y, config, logistic=logistic, hyper=hyper)
        weights = gate.apply(fit.params, test[0] * mask[None, :])
        n_run = jnp.sum(jnp.isfinite(fit.train_loss))
        return Sweep(
            predictions=route_soft(weights, test[1]),
            mean_weights=jnp.mean(weights, axis=0),
            train_loss=fit.train_loss[n_run - 1],
            validation_loss=fit.validation_loss[fit.best_epoch],
            gradient_norm=fit.gradient_norm,
            best_epoch=fit.best_epoch + 1,
            n_run=n_run,
            stopped_early=fit.stopped_early,
            converged=fit.converged,
        )

    return jax.vmap(one)(keys, hyper, mask)


def cached_sweep(config: StudyConfig, settings: dict[str, object], compute: Callable[[], Sweep]) -> Sweep:
    """A sweep from the cache, or computed and kept; ``settings`` names all that it depends on beside the data."""
    kept = config.cache if config.train_file is None else dataclasses.replace(config.cache, folder=None)
    key = {"data": dataclasses.asdict(config.data)} | settings
    return kept.load_or_compute("gates", key, CODE_OF_GATES, SWEEP, compute)[0]
