"""Writes the simulated training and test surveys of an experiment as HDF5 files, in the original layout.

    python -m experiments.make_survey --output-dir surveys
    python -m experiments.regress_gate --train-file surveys/train.h5 --test-file surveys/test.h5

    python -m experiments.make_survey --noise-level 0.2 --n-train 1 --output-dir observed      as a spectrograph sees them
    python -m experiments.predict results/regress_gate/default/model observed/test.h5 -o stars.csv

With the same seed and numbers of stars regress_gate gives from the files the table that it gives without them.
The default files take 1.1 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.pipeline.config import SURVEYS, DataConfig, draw_keys
from experiments.pipeline.surveys import observe, open_surveys
from experiments.runner.cache import require_writable
from experiments.runner.command_line import PresetConfig, run_command
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import InputError
from moe_jax.spectra.grid import GRID_RESOLUTION
from moe_jax.spectra.simulate import LabelSampling
from moe_jax.spectra.survey import Spectra
from moe_jax.spectra.survey_file import save_spectra


@dataclass(frozen=True)
class MakeSurveyConfig(PresetConfig):
    """What is drawn and where it goes."""

    n_train: int = SURVEYS["default"].n_train
    """Training stars."""
    n_test: int = SURVEYS["default"].n_test
    """Test stars."""
    label_sampling: LabelSampling = "lattice"
    """How labels are drawn."""
    resolution: float = GRID_RESOLUTION
    """Resolution of the spectra."""
    wave: Path | None = None
    """Text file with a vacuum wavelength, Angstrom, in each line: your own pixels; None: those of the grid."""
    noise_level: float = 0.0
    """Factor on the errors. 0: clean spectra, as regress_gate reads them to draw the noise itself. Above 0: noisy spectra, as
    predict reads them; their noise is the same that regress_gate draws with this seed and noise level."""
    seed: int = 0
    """Seed of the stars and their noise."""
    output_dir: Path = Path("surveys")
    """Folder of train.h5 and test.h5."""


PRESETS = {name: MakeSurveyConfig(name, data.n_train, data.n_test) for name, data in SURVEYS.items()}


def main(config: MakeSurveyConfig) -> None:
    """Draws both surveys and writes them, in parts, so that they may be larger than the memory."""
    stages = Stages()
    require_writable(config.output_dir, "the surveys")
    drawn = DataConfig(
        n_train=config.n_train,
        n_test=config.n_test,
        label_sampling=config.label_sampling,
        resolution=config.resolution,
        seed=config.seed,
        noise_level=config.noise_level,
    )
    try:
        wave = None if config.wave is None else np.loadtxt(config.wave, ndmin=1)
    except (OSError, ValueError) as reason:
        raise InputError(f"{config.wave}: found no wavelengths ({reason}), expected a number in each line") from reason
    keys = draw_keys(config.seed)
    noise = {"train": keys.train_noise, "test": keys.test_noise}
    for (name, key), source in zip(noise.items(), open_surveys(drawn, wave), strict=True):
        spectra: Spectra = observe(key, source, drawn) if config.noise_level > 0 else source
        path = config.output_dir / f"{name}.h5"
        with stages.chunks(f"{name}.h5", spectra.n_stars) as advance:
            save_spectra(path, spectra, on_written=advance)
        console.print(f"{path}: {spectra.n_stars:,} stars")


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
