"""Writes the simulated training and test surveys of an experiment as HDF5 files, in the original layout.

    python -m experiments.make_survey --output-dir surveys
    python -m experiments.regress_gate --train-file surveys/train.h5 --test-file surveys/test.h5

With the same seed and numbers of stars the second command gives the table that ``regress_gate`` gives without files.
The default files take 1.1 GB.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from experiments import regress_gate
from experiments.command_line import Stages, console, run_command
from experiments.prepared import DataConfig
from experiments.surveys import open_surveys
from moe_jax.simulate import LabelSampling
from moe_jax.survey import save_spectra


@dataclass(frozen=True)
class MakeSurveyConfig:
    """What is drawn and where it goes."""

    preset: Literal["default", "smoke", "large_test"] = "default"
    """The preset of regress_gate whose surveys are written."""
    n_train: int = regress_gate.PRESETS["default"].n_train
    n_test: int = regress_gate.PRESETS["default"].n_test
    label_sampling: LabelSampling = "lattice"
    """How labels are drawn."""
    seed: int = 0
    output_dir: Path = Path("surveys")
    """Where train.h5 and test.h5 go."""


PRESETS = {name: MakeSurveyConfig(config.preset, config.n_train, config.n_test) for name, config in regress_gate.PRESETS.items()}


def main(config: MakeSurveyConfig) -> None:
    """Draws both surveys and writes them, in parts, so that they may be larger than the memory."""
    stages = Stages()
    drawn = DataConfig(n_train=config.n_train, n_test=config.n_test, label_sampling=config.label_sampling, seed=config.seed)
    for name, spectra in zip(("train", "test"), open_surveys(drawn), strict=True):
        path = config.output_dir / f"{name}.h5"
        with stages.chunks(f"{name}.h5", spectra.n_stars) as advance:
            save_spectra(path, spectra, on_written=advance)
        console.print(f"{path}: {spectra.n_stars:,} stars", highlight=False)


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
