"""The stages before the gates: surveys, noise, experts, features, expert predictions, the classification gate; cached."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.stars import Prepared, Stars, finish
from experiments.pipeline.stream import fit_by_chunks
from experiments.pipeline.surveys import load_surveys, observe_surveys, survey_settings
from experiments.runner.cache import Cache
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray
from moe_jax.core.pca import fit_pca
from moe_jax.experts import CrossValidatedRidge, Ridge, assign_folds, fit_experts, fit_global, predict_experts, predict_ridge
from moe_jax.gates.features import N_COMPONENTS, line_pixels, raw_features
from moe_jax.spectra.survey import Survey


def prepare(config: DataConfig, stages: Stages, cache: Cache) -> Prepared:
    """All stages before the regression gates."""
    return next(prepare_each([config], stages, cache))


def prepare_each(configs: Sequence[DataConfig], stages: Stages, cache: Cache) -> Iterator[Prepared]:
    """Prepares several configurations one after the other; neighbours with the same stars share their surveys."""
    shared: dict[Any, tuple[Survey, Survey]] = {}

    def compute(config: DataConfig, following: DataConfig | None) -> Prepared:
        if config.chunk_stars:
            return fit_by_chunks(config, stages, cache)
        settings = survey_settings(config)
        if settings not in shared:
            shared.clear()
            with stages("surveys"):
                shared[settings] = jax.block_until_ready(load_surveys(config))
        with stages("noise and cells"):
            observed = observe_surveys(config, shared[settings])
            flux = [jax.block_until_ready(observation.flux()) for observation in observed]
        log_g, cells = [observation.labels.log_g for observation in observed], [observation.cell for observation in observed]
        wave = np.asarray(observed[0].wave)
        del observed
        if following is None or survey_settings(following) != settings:
            shared.clear()  # gives their memory back before the experts need it
        return fit_in_memory(config, flux, log_g, cells, wave, stages)

    for config, following in zip(configs, [*configs[1:], None], strict=True):
        compute_this = functools.partial(compute, config, following)
        prepared, from_cache = cache.load_or_compute("prepared", config, [__file__], Prepared, compute_this)
        if from_cache:
            stages.note("data, experts, features, classification gate: found in the cache")
        note_extended_grids(config, prepared, stages)
        for path, stars in ((config.train_file, prepared.train), (config.test_file, prepared.test)):
            if path is not None:
                stages.note(f"{path}: {len(stars.log_g):,} stars")
        params = jax.tree.map(jnp.asarray, prepared.classifier.params)
        yield prepared._replace(classifier=prepared.classifier._replace(params=params))


def note_extended_grids(config: DataConfig, prepared: Prepared, stages: Stages) -> None:
    """Says which penalties were tried beyond a grid because the best lay at an end of it."""
    tried = {
        "experts": np.asarray(prepared.experts.alphas)[:, len(config.experts.alphas) :],
        "global ridge": np.asarray(prepared.global_ridge.alphas)[len(config.experts.global_alphas) :],
    }
    for name, beyond in tried.items():
        if np.isfinite(beyond).any():
            listed = ", ".join(f"{alpha:g}" for alpha in np.unique(beyond[np.isfinite(beyond)]))
            stages.note(f"{name}: the best penalty lay at an end of its grid, so these were tried too: {listed}")


def fit_in_memory(
    config: DataConfig,
    flux: Sequence[jax.Array],
    log_g: Sequence[AnyArray],
    cells: Sequence[jax.Array],
    wave: AnyArray,
    stages: Stages,
) -> Prepared:
    """Experts, global ridge, features and classification gate from the noisy flux of the training and the test stars."""
    keys, options, x, y = draw_keys(config.seed), config.experts, flux[0], log_g[0]
    folds, decades = np.asarray(assign_folds(keys.folds, cells[0], options.n_folds)), options.extend_decades
    alphas, n_experts = np.array(options.alphas), config.n_experts
    with stages.steps("experts, cross-validated", n_experts) as advance:
        experts = fit_experts(x, y, cells[0], alphas, folds, n_experts=n_experts, extend_decades=decades, on_fitted=advance)
    with stages("global ridge, cross-validated"):
        if options.global_alphas:
            global_ridge = fit_global(x, y, np.array(options.global_alphas), folds, extend_decades=decades)
        else:
            global_ridge = no_ridge(*x.shape)
        jax.block_until_ready(global_ridge)
    with stages("features"):
        pca = fit_pca(keys.pca, x, N_COMPONENTS)
        pixels = line_pixels(wave)
        features = jax.block_until_ready([raw_features(part, pixels, pca) for part in flux])
    with stages("expert predictions"):
        train, test = jax.block_until_ready(
            [
                Stars(raw, predict_experts(experts, part), predict_ridge(global_ridge.ridge, part), jax.device_put(target), cell)
                for target, cell, raw, part in zip(log_g, cells, features, flux, strict=True)
            ]
        )
    return finish(config, train, test, experts, global_ridge, pca, wave, stages)


def no_ridge(n_stars: int, n_pixels: int) -> CrossValidatedRidge:
    """Stands for the global ridge where none was asked for: all that it predicts is NaN."""
    nan, none = jnp.full((), jnp.nan), jnp.zeros((), bool)
    ridge, nothing = Ridge(jnp.full(n_pixels, jnp.nan), nan), jnp.zeros(0)
    return CrossValidatedRidge(ridge, nan, none, nothing, nothing, jnp.full(n_stars, jnp.nan))
