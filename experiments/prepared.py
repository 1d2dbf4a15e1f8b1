"""What all experiments start from: the configuration of data and experts, the keys, and what the stages before the gates give."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from experiments.command_line import Stages
from moe_jax.arrays import AnyArray, InputError, take_rows
from moe_jax.cells import N_CELLS
from moe_jax.classifier import C_GRID, ClassifierFit, fit_classifier
from moe_jax.cross_validation import CrossValidatedRidge
from moe_jax.experts import Experts, cross_fitted_predictions
from moe_jax.features import PCA, FeatureModel
from moe_jax.ridge import Ridge
from moe_jax.simulate import LabelSampling

Coverage = Literal["cells", "edge_clamp", "tenth_expert"]


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
    chunk_stars: int = 0
    """Stars of a chunk: spectra are read, or simulated, chunk by chunk, in memory that does not grow with their number, and a
    stopped run goes on from its last chunk; 0: all at once."""

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
            "chunk_stars": (self.chunk_stars >= 0, "at least 0"),
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


def no_ridge(n_stars: int, n_pixels: int) -> CrossValidatedRidge:
    """Stands for the global ridge where none was asked for: all that it predicts is NaN."""
    nan, none = jnp.full((), jnp.nan), jnp.zeros((), bool)
    return CrossValidatedRidge(Ridge(jnp.full(n_pixels, jnp.nan), nan), nan, none, jnp.zeros(0), jnp.full(n_stars, jnp.nan))


class Prepared(NamedTuple):
    """All stages before the regression gates."""

    train: Stars
    test: Stars
    experts: Experts
    global_ridge: CrossValidatedRidge
    model: FeatureModel
    wave: AnyArray  #: (P,) vacuum wavelength, Angstrom
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
    wave=_LEAF,
    classifier=ClassifierFit({"head": {"bias": _LEAF, "kernel": _LEAF}}, 0.0, 0.0, False, False),  # type: ignore[dict-item]
)


def classify(config: DataConfig, train: Stars, stages: Stages) -> ClassifierFit:
    """The classification gate of the covered training stars."""
    with stages("classification gate"):
        covered = train.covered()
        return fit_classifier(covered.features, covered.cell, C_grid=config.C_grid, n_folds=config.n_folds, seed=config.seed)
