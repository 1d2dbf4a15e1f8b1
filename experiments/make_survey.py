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
from typing import Literal

from experiments import regress_gate
from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.observation import observe
from experiments.pipeline.surveys import open_surveys
from experiments.runner.command_line import run_command
from experiments.runner.stages import Stages, console
from moe_jax.spectra.simulate import LabelSampling
from moe_jax.spectra.survey import Spectra
from moe_jax.spectra.survey_file import save_spectra


@dataclass(frozen=True)
class MakeSurveyConfig:
    """What is drawn and where it goes."""

    preset: Literal["default", "smoke", "large_test"] = "default"
    """The preset of regress_gate whose surveys are written."""
    n_train: int = regress_gate.PRESETS["default"].n_train
    n_test: int = regress_gate.PRESETS["default"].n_test
    label_sampling: LabelSampling = "lattice"
    """How labels are drawn."""
    noise_level: float = 0.0
    """0: clean spectra, whose noise regress_gate draws. Above: noisy ones with their errors, as predict reads them; the noise is
    that which regress_gate draws with the same seed and noise level."""
    seed: int = 0
    output_dir: Path = Path("surveys")
    """Where train.h5 and test.h5 go."""


PRESETS = {name: MakeSurveyConfig(config.preset, config.n_train, config.n_test) for name, config in regress_gate.PRESETS.items()}


def main(config: MakeSurveyConfig) -> None:
    """Draws both surveys and writes them, in parts, so that they may be larger than the memory."""
    stages = Stages()
    drawn = DataConfig(
        n_train=config.n_train,
        n_test=config.n_test,
        label_sampling=config.label_sampling,
        seed=config.seed,
        noise_level=config.noise_level,
    )
    keys = draw_keys(config.seed)
    noise = {"train": keys.train_noise, "test": keys.test_noise}
    for (name, key), source in zip(noise.items(), open_surveys(drawn), strict=True):
        spectra: Spectra = observe(key, source, drawn) if config.noise_level > 0 else source
        path = config.output_dir / f"{name}.h5"
        with stages.chunks(f"{name}.h5", spectra.n_stars) as advance:
            save_spectra(path, spectra, on_written=advance)
        console.print(f"{path}: {spectra.n_stars:,} stars", highlight=False)


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
