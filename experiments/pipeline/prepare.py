"""The stages before the gates: surveys, noise, experts, features, expert predictions, the classification gate; cached."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.stars import SKELETON, Observed, Prepared, Stars, classify, no_ridge
from experiments.pipeline.stream import stream_stages
from experiments.pipeline.surveys import experts_of, load_surveys, noise_key, require_covered, require_finite_features
from experiments.runner.cache import Cache
from experiments.runner.stages import Stages
from moe_jax.experts.fit import assign_folds, fit_experts, fit_global, predict_experts
from moe_jax.experts.ridge import predict_ridge
from moe_jax.gates.classifier import ClassifierFit
from moe_jax.gates.features import compute_features, fit_features
from moe_jax.spectra.survey import Survey, add_noise


def observe(key: jax.Array, survey: Survey, config: DataConfig) -> Observed:
    """Draws the noise of a survey, and assigns its stars to experts."""
    flux = add_noise(noise_key(key, config), jnp.asarray(survey.flux), jnp.asarray(survey.error), config.noise_level)
    T_eff, M_H, log_g = (jnp.asarray(label) for label in (survey.labels.T_eff, survey.labels.M_H, survey.labels.log_g))
    return Observed(flux, T_eff, M_H, log_g, experts_of(survey.labels, config))


def prepare(config: DataConfig, stages: Stages, cache: Cache) -> Prepared:
    """All stages before the regression gates."""
    return next(prepare_each([config], stages, cache))


def prepare_each(configs: Sequence[DataConfig], stages: Stages, cache: Cache) -> Iterator[Prepared]:
    """Prepares several configurations one after the other; neighbours with the same stars share their surveys."""
    shared: tuple[DataConfig, Survey, Survey] | None = None

    def compute(config: DataConfig, following: DataConfig | None) -> Prepared:
        nonlocal shared
        if config.chunk_stars:
            return stream_stages(config, stages, cache)
        if shared is None or shared[0] != _stars_of(config):
            shared = None
            with stages("surveys"):
                shared = _stars_of(config), *jax.block_until_ready(load_surveys(config))
        with stages("noise and cells"):
            keys, (_, train_survey, test_survey) = draw_keys(config.seed), shared
            train = jax.block_until_ready(observe(keys.train_noise, train_survey, config))
            test = jax.block_until_ready(observe(keys.test_noise, test_survey, config))
            wave = np.asarray(train_survey.wave)
        del train_survey, test_survey
        if following is None or _stars_of(following) != _stars_of(config):
            shared = None  # gives their memory back before the experts need it
        return fit_stages(config, train, test, wave, stages)

    for config, following in zip(configs, [*configs[1:], None], strict=True):
        prepared, found = cache.load_or_compute(
            "prepared", config, [__file__], SKELETON, functools.partial(compute, config, following)
        )
        if found:
            stages.note("data, experts, features, classification gate: found in the cache")
        params, C, accuracy, at_edge, converged = prepared.classifier
        classifier = ClassifierFit(jax.tree.map(jnp.asarray, params), float(C), float(accuracy), bool(at_edge), bool(converged))
        yield prepared._replace(classifier=classifier)


def _stars_of(config: DataConfig) -> DataConfig:
    """The part of a configuration on which its surveys depend."""
    names = ("n_train", "n_test", "label_sampling", "test_sampling", "train_file", "test_file", "seed", "test_seed")
    return DataConfig(**{name: getattr(config, name) for name in names})


def fit_stages(config: DataConfig, train: Observed, test: Observed, wave: np.ndarray, stages: Stages) -> Prepared:
    """Experts, global ridge, features and classification gate."""
    keys = draw_keys(config.seed)
    require_covered(config, train.cell, test.cell)
    folds = np.asarray(assign_folds(keys.folds, train.cell, config.experts.n_folds))
    with stages.steps("experts, cross-validated", config.n_experts) as advance:
        experts = fit_experts(
            train.flux,
            train.log_g,
            train.cell,
            jnp.array(config.experts.alphas),
            folds,
            n_experts=config.n_experts,
            on_fitted=advance,
        )
    if config.experts.global_alphas:
        with stages("global ridge, cross-validated"):
            global_ridge = jax.block_until_ready(
                fit_global(train.flux, train.log_g, jnp.array(config.experts.global_alphas), folds)
            )
    else:
        global_ridge = no_ridge(*train.flux.shape)
    with stages("features"):
        model = fit_features(keys.pca, train.flux, wave)
        train_features, test_features = (compute_features(model, stars.flux, wave) for stars in (train, test))
        require_finite_features(config, train_features, test_features)
    with stages("expert predictions"):
        seen_train, seen_test = (
            Stars(
                features,
                predict_experts(experts, stars.flux),
                predict_ridge(global_ridge.ridge, stars.flux),
                stars.T_eff,
                stars.M_H,
                stars.log_g,
                stars.cell,
            )
            for stars, features in ((train, train_features), (test, test_features))
        )
        jax.block_until_ready((seen_train, seen_test))
    return Prepared(seen_train, seen_test, experts, global_ridge, model, wave, classify(config, seen_train, stages))
