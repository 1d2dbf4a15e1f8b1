"""Where the data enters: surveys from files or simulated, their stars' experts, and the checks before anything is fitted."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.experts.cells import N_CELLS, assign_cells, nearest_cells
from moe_jax.experts.fit import require_cell_sizes
from moe_jax.gates.features import line_pixels
from moe_jax.spectra.simulate import LabelSampling, SimulatedSpectra, simulate_survey
from moe_jax.spectra.survey import Labels, Spectra, Survey
from moe_jax.spectra.survey_file import WAVE_FIELD, SurveyFile


def open_surveys(config: DataConfig) -> tuple[Spectra, Spectra]:
    """The training and the test survey, to be read in parts; from files, which are checked against each other, or simulated."""
    if (config.train_file is None) != (config.test_file is None):
        missing, given = ("train", "test") if config.train_file is None else ("test", "train")
        raise InputError(f"--{given}-file was given without --{missing}-file, expected both or neither")
    if config.train_file is None or config.test_file is None:
        train_key, test_key, sampling = _simulation(config)
        simulated = SimulatedSpectra(train_key, config.n_train, label_sampling=config.label_sampling)
        return simulated, SimulatedSpectra(test_key, config.n_test, label_sampling=sampling)
    train, test = SurveyFile(config.train_file, config.n_train), SurveyFile(config.test_file, config.n_test)
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
    if config.train_file is None and config.test_file is None:
        train_key, test_key, sampling = _simulation(config)
        train = simulate_survey(train_key, config.n_train, label_sampling=config.label_sampling)
        return train, simulate_survey(test_key, config.n_test, label_sampling=sampling)
    train_file, test_file = (Survey(s.wave, *s.read(0, s.n_stars), s.labels) for s in open_surveys(config))
    return train_file, test_file


def _simulation(config: DataConfig) -> tuple[jax.Array, jax.Array, LabelSampling]:
    """Keys of the training and test stars, and the label sampling of the latter."""
    test_keys = draw_keys(config.seed if config.test_seed is None else config.test_seed)
    return draw_keys(config.seed).train, test_keys.test, config.test_sampling or config.label_sampling


def noise_key(key: jax.Array, config: DataConfig) -> jax.Array:
    """The key of a survey's noise in the draw that the configuration names."""
    return jax.random.fold_in(key, config.noise_draw) if config.noise_draw else key


def experts_of(labels: Labels, config: DataConfig) -> jax.Array:
    """The expert of each star, -1 where it has none."""
    T_eff, M_H = jnp.asarray(labels.T_eff), jnp.asarray(labels.M_H)
    cell = nearest_cells(T_eff, M_H) if config.experts.coverage == "edge_clamp" else assign_cells(T_eff, M_H)
    return jnp.where(cell < 0, N_CELLS, cell) if config.experts.coverage == "tenth_expert" else cell


def require_covered(config: DataConfig, train_cell: AnyArray, test_cell: AnyArray) -> None:
    """Raises an ``InputError`` where too few stars have an expert."""
    source = config.train_file or "the simulated training survey"
    require_cell_sizes(f"{source}: labels T_eff and M_H", train_cell, config.n_experts, 2 * config.experts.n_folds)
    n_covered = int(np.sum(np.asarray(test_cell) >= 0))
    if n_covered < 2:
        where = config.test_file or "the simulated test survey"
        raise InputError(f"{where}: labels T_eff and M_H: found {n_covered} stars in the nine cells, expected at least 2")


def require_finite_features(config: DataConfig, *features: AnyArray) -> None:
    """Raises an ``InputError`` where a feature is not finite."""
    if not all(np.isfinite(np.asarray(array)).all() for array in features):
        source = config.train_file or "the simulated training survey"
        raise InputError(f"{source}: the gate features are not all finite, expected fluxes within float32's range")
