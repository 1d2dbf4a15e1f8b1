"""Configurations: the data and experts, and an experiment; one random key for each thing that is drawn."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.runner.cache import DEFAULT_FOLDER, Cache
from moe_jax.core.arrays import InputError
from moe_jax.evaluate.bootstrap import DEFAULT_METHOD
from moe_jax.evaluate.intervals import IntervalMethod
from moe_jax.experts.cells import N_CELLS
from moe_jax.gates.classifier import C_GRID
from moe_jax.spectra.simulate import LabelSampling

Coverage = Literal["cells", "edge_clamp", "tenth_expert"]

#: The data of a smoke preset.
SMALL: dict[str, Any] = {"n_train": 1_200, "n_test": 1_200, "alphas": (1.0,), "global_alphas": (10.0,), "C_grid": (10.0,)}


@dataclass(frozen=True)
class DataConfig:
    """Data, experts, features and classification gate; the defaults are the report's but for the number of test stars."""

    n_train: int = 32_000
    """Training stars that are simulated. Of a file all are read, unless a number is given: then so many, from its start."""
    n_test: int = 10_000
    """Test stars; likewise."""
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
    extend_decades: int = 4
    """Most powers of ten by which either grid of penalties is extended where the best penalty lies at an end of it."""
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
            "n_train": (
                self.n_train >= (self.train_file is None),
                "at least 1 without a file, and at least 0 (all stars) with one",
            ),
            "n_test": (self.n_test >= (self.test_file is None), "at least 1 without a file, and at least 0 (all stars) with one"),
            "noise_level": (0 <= self.noise_level < np.inf, "a finite number, at least 0"),
            "n_folds": (self.n_folds >= 2, "at least 2"),
            "alphas": (len(self.alphas) > 0 and all(0 < a < np.inf for a in self.alphas), "positive numbers"),
            "global_alphas": (all(0 < a < np.inf for a in self.global_alphas), "positive numbers"),
            "extend_decades": (self.extend_decades >= 0, "at least 0"),
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


@dataclass(frozen=True)
class StudyConfig(DataConfig):
    """An experiment: its data, and where its results go."""

    preset: str = "default"
    """What the other options start from."""
    hidden: int = 64
    """Hidden units of the MLP gate."""
    n_resamples: int = 1_000
    """Bootstrap resamples."""
    confidence_level: float = 0.95
    interval_method: IntervalMethod = DEFAULT_METHOD
    """Of the bootstrap intervals; "percentile" is the report's."""
    output_dir: Path | None = None
    """Where the results go; results/EXPERIMENT/PRESET by default."""
    cache_dir: Path = DEFAULT_FOLDER
    """Where the stages that experiments share are kept."""
    use_cache: bool = True
    """Whether they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = {
            "hidden": (self.hidden >= 1, "at least 1"),
            "n_resamples": (self.n_resamples >= 1, "at least 1"),
            "confidence_level": (0 < self.confidence_level < 1, "a number between 0 and 1"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise InputError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def data(self) -> DataConfig:
        """What the prepared stages depend on."""
        return DataConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DataConfig)})

    @property
    def cache(self) -> Cache:
        """The cache of the stages."""
        return Cache(self.cache_dir if self.use_cache else None)
