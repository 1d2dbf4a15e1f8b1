"""What all experiments start from: a survey, its noise, experts, features and the classification gate; cached."""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.cache import Cache, package_files
from experiments.command_line import Stages
from moe_jax.arrays import AnyArray, InputError
from moe_jax.cells import N_CELLS, assign_cells, nearest_cells
from moe_jax.classifier import C_GRID, ClassifierFit, fit_classifier
from moe_jax.cross_validation import CrossValidatedRidge
from moe_jax.experts import (
    Experts,
    assign_folds,
    cross_fitted_predictions,
    fit_experts,
    fit_global,
    predict_experts,
    require_cell_sizes,
)
from moe_jax.features import PCA, FeatureModel, compute_features, fit_features, line_pixels
from moe_jax.gates import linear_params
from moe_jax.ridge import Ridge, predict_ridge
from moe_jax.simulate import LabelSampling, simulate_survey
from moe_jax.survey import WAVE_FIELD, Survey, add_noise, load_survey

Coverage = Literal["cells", "edge_clamp", "tenth_expert"]
MODULES = (
    *("pixels", "grid", "sky", "simulate", "survey", "cells", "ridge", "factorize", "sums", "cross_validation", "experts"),
    *("features", "classifier"),
)
CODE = [*package_files(*(f"{name}.py" for name in MODULES), "data/lte_grid.npz"), Path(__file__)]


@dataclass(frozen=True)
class DataConfig:
    """Data, experts, features and classification gate; the defaults are the report's but for the number of test stars."""

    n_train: int = 32_000
    """Training stars; of a file, the most that are read."""
    n_test: int = 10_000
    """Test stars; of a file, the most that are read."""
    noise_level: float = 0.2
    """Factor on the errors of training and test spectra."""
    label_sampling: LabelSampling = "lattice"
    """How simulated labels are drawn."""
    test_sampling: LabelSampling | None = None
    """Likewise for the test stars; as for the training stars by default."""
    train_file: Path | None = None
    """HDF5 survey to train on, instead of a simulated one."""
    test_file: Path | None = None
    """HDF5 survey to test on."""
    alphas: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Ridge penalties of the experts to choose from."""
    global_alphas: tuple[float, ...] = (1.0, 10.0, 100.0)
    """Ridge penalties of the global ridge to choose from (the report does not name its grid); none: no global ridge."""
    n_folds: int = 5
    """Folds of every cross-validation."""
    C_grid: tuple[float, ...] = C_GRID
    """Inverse penalties of the logistic regression to choose from."""
    coverage: Coverage = "cells"
    """Who is trained on the stars outside the cells: nobody, the nearest cell's expert, or a tenth expert."""
    seed: int = 0
    """Of the data, the noise, the folds and all else that is drawn."""
    test_seed: int | None = None
    """Of the test stars; the seed by default."""
    noise_draw: int = 0
    """Which of the seed's draws of the noise."""

    def __post_init__(self) -> None:
        checks = {
            "n_train": (self.n_train >= 1, "at least 1"),
            "n_test": (self.n_test >= 1, "at least 1"),
            "noise_level": (0 <= self.noise_level < np.inf, "a finite number, at least 0"),
            "n_folds": (self.n_folds >= 2, "at least 2"),
            "alphas": (len(self.alphas) > 0 and all(0 < a < np.inf for a in self.alphas), "positive numbers"),
            "global_alphas": (all(0 < a < np.inf for a in self.global_alphas), "positive numbers"),
            "C_grid": (len(self.C_grid) > 0 and all(0 < c < np.inf for c in self.C_grid), "positive numbers"),
            "noise_draw": (self.noise_draw >= 0, "at least 0"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise InputError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def n_experts(self) -> int:
        """K."""
        return N_CELLS + (self.coverage == "tenth_expert")


class Keys(NamedTuple):
    """One random key for each thing that is drawn."""

    train: jax.Array
    test: jax.Array
    train_noise: jax.Array
    test_noise: jax.Array
    folds: jax.Array
    pca: jax.Array
    in_sample: jax.Array
    gates: jax.Array
    bootstrap: jax.Array


def draw_keys(seed: int) -> Keys:
    """The keys of a seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


class Observed(NamedTuple):
    """Noisy spectra, and what is known of their stars."""

    flux: AnyArray  #: (N, P) noisy
    T_eff: AnyArray  #: (N,) K
    M_H: AnyArray  #: (N,) dex
    log_g: AnyArray  #: (N,)
    cell: AnyArray  #: (N,) the expert of each star, -1 where it has none


class Stars(NamedTuple):
    """Stars as gates see them."""

    features: AnyArray  #: (N, F) standardised
    predictions: AnyArray  #: (N, K) of all experts
    global_prediction: AnyArray  #: (N,) of the global ridge
    T_eff: AnyArray  #: (N,) K
    M_H: AnyArray  #: (N,) dex
    log_g: AnyArray  #: (N,)
    cell: AnyArray  #: (N,) the expert of each star, -1 where it has none

    def select(self, rows: AnyArray) -> Stars:
        """Some of the stars."""
        return Stars(*take_rows(tuple(jnp.asarray(array) for array in self), jnp.asarray(rows)))

    def covered(self) -> Stars:
        """The stars that have an expert."""
        return self.select(np.flatnonzero(np.asarray(self.cell) >= 0))


class Prepared(NamedTuple):
    """All stages before the regression gates."""

    train: Stars
    test: Stars
    experts: Experts
    global_ridge: CrossValidatedRidge
    model: FeatureModel
    classifier: ClassifierFit

    @property
    def n_covered(self) -> int:
        """Training stars that have an expert."""
        return int(np.sum(np.asarray(self.train.cell) >= 0))

    def gate_stars(self) -> Stars:
        """The covered training stars with cross-fitted expert predictions: what a regression gate is trained on."""
        train = self.train
        predictions = cross_fitted_predictions(jnp.asarray(train.predictions), self.experts.out_of_fold, train.cell)
        return train._replace(predictions=predictions).covered()


_LEAF = np.zeros(0)
SKELETON = Prepared(
    train=Stars(*[_LEAF] * 7),
    test=Stars(*[_LEAF] * 7),
    experts=Experts(*[_LEAF] * 6),  # type: ignore[arg-type]
    global_ridge=CrossValidatedRidge(Ridge(*[_LEAF] * 2), *[_LEAF] * 4),  # type: ignore[arg-type]
    model=FeatureModel(PCA(*[_LEAF] * 2), _LEAF, _LEAF),  # type: ignore[arg-type]
    classifier=ClassifierFit(linear_params(_LEAF, _LEAF), 0.0, 0.0, False, False),
)


@jax.jit
def take_rows(arrays: tuple[jax.Array, ...], rows: jax.Array) -> tuple[jax.Array, ...]:
    """The same rows of several arrays."""
    return tuple(array[rows] for array in arrays)


def load_surveys(config: DataConfig) -> tuple[Survey, Survey]:
    """The training and the test survey, from files or simulated, and checked against each other."""
    if (config.train_file is None) != (config.test_file is None):
        missing, given = ("train", "test") if config.train_file is None else ("test", "train")
        raise InputError(f"--{given}-file was given without --{missing}-file, expected both or neither")
    if config.train_file is None or config.test_file is None:
        test_keys = draw_keys(config.seed if config.test_seed is None else config.test_seed)
        train = simulate_survey(draw_keys(config.seed).train, config.n_train, label_sampling=config.label_sampling)
        sampling = config.test_sampling or config.label_sampling
        return train, simulate_survey(test_keys.test, config.n_test, label_sampling=sampling)
    train, test = load_survey(config.train_file, config.n_train), load_survey(config.test_file, config.n_test)
    for path, survey in ((config.train_file, train), (config.test_file, test)):
        line_pixels(survey.wave, f"{path}: {WAVE_FIELD}")
    if train.wave.shape != test.wave.shape or not np.allclose(train.wave, test.wave, rtol=0, atol=1e-3):
        raise InputError(
            f"{config.test_file}: {WAVE_FIELD}: found {len(test.wave)} pixels from {test.wave[0]:g} to {test.wave[-1]:g} Angstrom, "
            f"expected those of {config.train_file}: {len(train.wave)} from {train.wave[0]:g} to {train.wave[-1]:g}"
        )
    return train, test


def observe(key: jax.Array, survey: Survey, config: DataConfig) -> Observed:
    """Draws the noise of a survey, and assigns its stars to experts."""
    if config.noise_draw:
        key = jax.random.fold_in(key, config.noise_draw)
    flux = add_noise(key, jnp.asarray(survey.flux), jnp.asarray(survey.error), config.noise_level)
    T_eff, M_H, log_g = (jnp.asarray(label) for label in (survey.labels.T_eff, survey.labels.M_H, survey.labels.log_g))
    cell = nearest_cells(T_eff, M_H) if config.coverage == "edge_clamp" else assign_cells(T_eff, M_H)
    if config.coverage == "tenth_expert":
        cell = jnp.where(cell < 0, N_CELLS, cell)
    return Observed(flux, T_eff, M_H, log_g, cell)


def prepare(config: DataConfig, stages: Stages, cache: Cache) -> Prepared:
    """All stages before the regression gates."""
    return next(prepare_each([config], stages, cache))


def prepare_each(configs: Sequence[DataConfig], stages: Stages, cache: Cache) -> Iterator[Prepared]:
    """Prepares several configurations one after the other; neighbours with the same stars share their surveys."""
    shared: tuple[DataConfig, Survey, Survey] | None = None

    def compute(config: DataConfig, following: DataConfig | None) -> Prepared:
        nonlocal shared
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
        prepared, found = cache.load_or_compute("prepared", config, CODE, SKELETON, functools.partial(compute, config, following))
        if found:
            stages.note("data, experts, features, classification gate: found in the cache")
        params, C, accuracy, at_edge, converged = prepared.classifier
        classifier = ClassifierFit(jax.tree.map(jnp.asarray, params), float(C), float(accuracy), bool(at_edge), bool(converged))
        yield prepared._replace(classifier=classifier)


def _no_ridge(n_stars: int, n_pixels: int) -> CrossValidatedRidge:
    """Stands for the global ridge where none was asked for: all that it predicts is NaN."""
    nan, none = jnp.full((), jnp.nan), jnp.zeros((), bool)
    return CrossValidatedRidge(Ridge(jnp.full(n_pixels, jnp.nan), nan), nan, none, jnp.zeros(0), jnp.full(n_stars, jnp.nan))


def _stars_of(config: DataConfig) -> DataConfig:
    """The part of a configuration on which its surveys depend."""
    names = ("n_train", "n_test", "label_sampling", "test_sampling", "train_file", "test_file", "seed", "test_seed")
    return DataConfig(**{name: getattr(config, name) for name in names})


def fit_stages(config: DataConfig, train: Observed, test: Observed, wave: np.ndarray, stages: Stages) -> Prepared:
    """Experts, global ridge, features and classification gate of training and test stars."""
    keys = draw_keys(config.seed)
    source = str(config.train_file or "the simulated training survey")
    require_cell_sizes(f"{source}: labels T_eff and M_H", train.cell, config.n_experts, 2 * config.n_folds)
    n_covered = int(np.sum(np.asarray(test.cell) >= 0))
    if n_covered < 2:
        where = config.test_file or "the simulated test survey"
        raise InputError(f"{where}: labels T_eff and M_H: found {n_covered} stars in the nine cells, expected at least 2")
    folds = np.asarray(assign_folds(keys.folds, train.cell, config.n_folds))
    with stages.steps("experts, cross-validated", config.n_experts) as advance:
        experts = fit_experts(
            train.flux,
            train.log_g,
            train.cell,
            jnp.array(config.alphas),
            folds,
            n_experts=config.n_experts,
            on_fitted=advance,
        )
    if config.global_alphas:
        with stages("global ridge, cross-validated"):
            global_ridge = jax.block_until_ready(fit_global(train.flux, train.log_g, jnp.array(config.global_alphas), folds))
    else:
        global_ridge = _no_ridge(*train.flux.shape)
    with stages("features"):
        model = fit_features(keys.pca, train.flux, wave)
        train_features, test_features = (compute_features(model, stars.flux, wave) for stars in (train, test))
        if not bool(jnp.isfinite(train_features).all() & jnp.isfinite(test_features).all()):
            raise InputError(f"{source}: the gate features are not all finite, expected fluxes within float32's range")
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
    with stages("classification gate"):
        covered = seen_train.covered()
        classifier = fit_classifier(covered.features, covered.cell, C_grid=config.C_grid, n_folds=config.n_folds, seed=config.seed)
    return Prepared(seen_train, seen_test, experts, global_ridge, model, classifier)
