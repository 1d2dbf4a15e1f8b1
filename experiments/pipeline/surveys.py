"""Where the data enters: surveys from files or simulated, and the experts of their stars."""

from __future__ import annotations

import operator

import jax
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.experts.cells import N_CELLS, assign_cells, nearest_cells
from moe_jax.gates.features import line_pixels
from moe_jax.spectra.simulate import SimulatedSpectra
from moe_jax.spectra.survey import Labels, Spectra, Survey
from moe_jax.spectra.survey_file import WAVE_FIELD, SurveyFile

#: The part of a configuration on which its surveys depend.
survey_settings = operator.attrgetter(
    "n_train", "n_test", "label_sampling", "test_sampling", "resolution", "train_file", "test_file", "columns", "seed", "test_seed"
)


def open_surveys(config: DataConfig, wave: AnyArray | None = None) -> tuple[Spectra, Spectra]:
    """The training and the test survey, to be read in parts; from files, which are checked against each other, or simulated.

    ``wave`` are the wavelengths of simulated ones; by default those of the grid.
    """
    if (config.train_file is None) != (config.test_file is None):
        missing, given = ("train", "test") if config.train_file is None else ("test", "train")
        raise InputError(f"--{given}-file was given without --{missing}-file, expected both or neither")
    if config.train_file is None or config.test_file is None:
        test_key = draw_keys(config.seed if config.test_seed is None else config.test_seed).test
        test_sampling = config.test_sampling or config.label_sampling
        train_key, R = draw_keys(config.seed).train, config.resolution
        simulated = SimulatedSpectra(train_key, config.n_train, label_sampling=config.label_sampling, resolution=R, wave=wave)
        return simulated, SimulatedSpectra(test_key, config.n_test, label_sampling=test_sampling, resolution=R, wave=wave)
    train = SurveyFile(config.train_file, config.n_train or None, config.label_columns)
    test = SurveyFile(config.test_file, config.n_test or None, config.label_columns)
    for path, survey in ((config.train_file, train), (config.test_file, test)):
        line_pixels(survey.wave, f"{path}: {WAVE_FIELD}")
    if train.wave.shape != test.wave.shape or not np.allclose(train.wave, test.wave, rtol=0, atol=1e-3):
        raise InputError(
            f"{config.test_file}: {WAVE_FIELD}: found {len(test.wave)} pixels from {test.wave[0]:g} to {test.wave[-1]:g} Angstrom, "
            f"expected those of {config.train_file}: {len(train.wave)} from {train.wave[0]:g} to {train.wave[-1]:g}"
        )
    return train, test


def load_surveys(config: DataConfig) -> tuple[Survey, Survey]:
    """Both surveys in memory."""
    train, test = (Survey(s.wave, *s.read(0, s.n_stars), s.labels) for s in open_surveys(config))
    return train, test


def experts_of(labels: Labels, config: DataConfig) -> jax.Array:
    """The expert of each star, -1 where it has none."""
    T_eff, M_H = np.asarray(labels.T_eff), np.asarray(labels.M_H)
    cell = nearest_cells(T_eff, M_H) if config.experts.coverage == "edge_clamp" else assign_cells(T_eff, M_H)
    return jax.device_put(np.where(cell < 0, N_CELLS, cell)) if config.experts.coverage == "tenth_expert" else cell
