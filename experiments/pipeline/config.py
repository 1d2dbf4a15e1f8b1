"""Options that commands share, in groups, and one random key for each thing that is drawn."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import numpy as np

from experiments.runner.cache import DEFAULT_FOLDER, Cache
from experiments.runner.command_line import PresetConfig, group, require, require_at_least, require_positive, require_seed
from moe_jax.core.arrays import InputError
from moe_jax.evaluate.bootstrap import DEFAULT_METHOD
from moe_jax.evaluate.intervals import IntervalMethod
from moe_jax.experts.cells import N_CELLS
from moe_jax.gates import GateConfig, MLPGate
from moe_jax.gates.classifier import C_GRID
from moe_jax.spectra.broadening import require_resolution
from moe_jax.spectra.grid import GRID_RESOLUTION
from moe_jax.spectra.simulate import LabelSampling

Coverage = Literal["cells", "edge_clamp", "tenth_expert"]
Noise = Literal["simulated", "observed"]


@dataclass(frozen=True)
class ExpertOptions:
    """Ridge experts, the global ridge and the classification gate."""

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

    def __post_init__(self) -> None:
        require_at_least(self, n_folds=2, extend_decades=0)
        require_positive(self, "alphas", "C_grid", *["global_alphas"] * bool(self.global_alphas))

    def require_global_ridge(self) -> None:
        """Raises an ``InputError`` where no penalty is given for the global ridge: for studies that compare it."""
        if not self.global_alphas:
            raise InputError("global_alphas is empty, expected at least one penalty: this command compares the global ridge")

    def require_nine_experts(self) -> None:
        """Raises an ``InputError`` where a tenth expert is asked for: for studies whose tables have a row for each cell."""
        if self.coverage == "tenth_expert":
            raise InputError("coverage is 'tenth_expert', expected 'cells' or 'edge_clamp': this command has tables of nine cells")


@dataclass(frozen=True)
class DataConfig:
    """Stars and their noise. The defaults are the report's but for the number of test stars."""

    n_train: int = 32_000
    """Training stars that are simulated. Of a file all are read, unless a number is given: then so many, from its start."""
    n_test: int = 10_000
    """Test stars that are simulated. Of a file all are read, unless a number is given: then so many, from its start."""
    noise: Noise = "simulated"
    """What the flux of files is: simulated: clean, and noise is drawn for it; observed: noisy already, with the errors that the
    file gives. Spectra that are simulated here are clean."""
    noise_level: float = 0.2
    """Factor on the errors for noise that is simulated; of no effect on spectra as observed."""
    label_sampling: LabelSampling = "lattice"
    """How simulated labels are drawn."""
    test_sampling: LabelSampling | None = None
    """How the labels of simulated test stars are drawn; None: as those of the training stars."""
    resolution: float = GRID_RESOLUTION
    """Resolution of the spectra: that to which simulated ones are degraded, or that of the files."""
    train_file: Path | None = None
    """HDF5 survey to train on, instead of a simulated one."""
    test_file: Path | None = None
    """HDF5 survey to test on."""
    columns: str = ""
    """Names of label columns in the files, such as T_eff=teff,log_g=logg."""
    seed: int = 0
    """Seed of the data, the noise, the folds and everything else that is drawn."""
    test_seed: int | None = None
    """Seed of the test stars and of their noise; None: ``seed``."""
    noise_draw: int = 0
    """Number of the noise draw: each number gives the same training stars other noise, and the gates other seeds."""
    chunk_stars: int = 0
    """Stars of a chunk; 0: all at once. Spectra are read or simulated chunk by chunk, in memory that does not grow with their
    number. A run that was stopped goes on from its last chunk."""
    experts: ExpertOptions = group(ExpertOptions())

    def __post_init__(self) -> None:
        for name, file in (("n_train", self.train_file), ("n_test", self.test_file)):
            if (number := getattr(self, name)) < (file is None):
                raise InputError(f"{name} is {number}, expected at least 1 without a file, and at least 0 (all stars) with one")
        require_at_least(self, chunk_stars=0)
        require_seed(self, "seed", "test_seed")
        require(self, f"0 to {2**31 - 1}", lambda number: 0 <= number < 2**31, "noise_draw")
        if self.train_file is None:
            require_resolution(self.resolution)
        elif not 0 < self.resolution < np.inf:
            raise InputError(f"resolution is {self.resolution}, expected a positive number")
        if any(pair.count("=") != 1 for pair in self.columns.split(",") if pair):
            raise InputError(f"columns is {self.columns!r}, expected LABEL=COLUMN,LABEL=COLUMN")
        require(self, "a finite number, at least 0", lambda number: 0 <= number < np.inf, "noise_level")
        if self.noise == "observed" and self.train_file is None:
            raise InputError("noise is 'observed' without a train_file, expected 'simulated' for stars that are simulated")

    @property
    def label_columns(self) -> dict[str, str]:
        """The column of each label that ``columns`` names."""
        return dict(pair.replace(" ", "").split("=") for pair in self.columns.split(",") if pair)

    @property
    def described_noise(self) -> str:
        """The noise in a sentence of a report."""
        return "Noise as observed" if self.noise == "observed" else f"Noise level {self.noise_level:g}"

    @property
    def n_experts(self) -> int:
        """K."""
        return N_CELLS + (self.experts.coverage == "tenth_expert")


#: The stars of regress_gate, by preset.
SURVEYS: dict[Literal["default", "smoke", "large_test"], DataConfig] = {
    "default": DataConfig(n_test=1_000),
    "smoke": DataConfig(n_train=1_200, n_test=1_200, experts=ExpertOptions(C_grid=(10.0, 100.0))),
    "large_test": DataConfig(),
}
#: The stars of the smoke preset of most other commands.
SMALL = DataConfig(n_train=1_200, n_test=1_200, experts=ExpertOptions(alphas=(1.0,), global_alphas=(10.0,), C_grid=(10.0,)))


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
    return _split(jax.random.key(seed))


@jax.jit
def _split(key: jax.Array) -> Keys:
    return Keys(*jax.random.split(key, len(Keys._fields)))


@dataclass(frozen=True)
class BootstrapOptions:
    """Bootstrap over the test stars."""

    n_resamples: int = 1_000
    """Bootstrap resamples."""
    confidence_level: float = 0.95
    """Confidence level of the intervals."""
    interval_method: IntervalMethod = DEFAULT_METHOD
    """Method of the intervals; "percentile" is the report's."""

    def __post_init__(self) -> None:
        require_at_least(self, n_resamples=1)
        require(self, "a number between 0 and 1", lambda number: 0 < number < 1, "confidence_level")

    @property
    def arguments(self) -> dict[str, Any]:
        """The keyword arguments of ``moe_jax.evaluate``'s bootstraps."""
        return {"n_resamples": self.n_resamples, "confidence_level": self.confidence_level, "method": self.interval_method}


@dataclass(frozen=True)
class OutputOptions:
    """Where results and cached stages go."""

    output_dir: Path | None = None
    """Folder of the results; None: results/COMMAND/PRESET."""
    cache_dir: Path = DEFAULT_FOLDER
    """Folder of the cached stages, which commands share."""
    use_cache: bool = True
    """Reuse cached stages."""

    @property
    def cache(self) -> Cache:
        """The cache of the stages."""
        return Cache(self.cache_dir if self.use_cache else None)


@dataclass(frozen=True)
class StudyConfig(PresetConfig):
    """What all studies share."""

    output: OutputOptions = group(OutputOptions())


@dataclass(frozen=True)
class ComparisonConfig(StudyConfig):
    """What the studies share that compare methods on the same test stars."""

    data: DataConfig = group(DataConfig())
    bootstrap: BootstrapOptions = group(BootstrapOptions())


@dataclass(frozen=True)
class GateStudyConfig(ComparisonConfig):
    """Likewise of those that train gates of several seeds."""

    n_seeds: int = 4
    """Gates of each kind."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    mlp: MLPGate = group(MLPGate())

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=1)


#: What the smoke presets of these have in common.
QUICK: dict[str, Any] = {"preset": "smoke", "data": SMALL, "n_seeds": 2, "gate": GateConfig(epochs=5)}
