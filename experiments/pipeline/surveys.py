"""Where the data enters: surveys from files or simulated, the experts of their stars, and the noise that is drawn for them.

They are read all at once or slice by slice.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from moe_jax.core.arrays import AnyArray, InputError, by_numpy, map_blocks, require_cell_sizes, to_device
from moe_jax.experts.cells import N_CELLS, assign_cells, nearest_cells
from moe_jax.gates.features import line_pixels
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.simulate import SimulatedSpectra
from moe_jax.spectra.survey import Labels, Spectra, Survey, add_star_noise, star_keys
from moe_jax.spectra.survey_file import WAVE_FIELD, SurveyFile

SLICE = 2_048  # stars that are in memory at a time
BLOCK = 256  # stars whose noise is drawn at a time
DRAWN = 32_768  # keys are drawn for a multiple of so many stars, so that surveys share a program; a key depends on its star alone

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


def require_grid_pixels(config: DataConfig) -> None:
    """Raises an ``InputError`` where the pixels are not those of the model grid: for studies that set the grid beside the stars."""
    wave = open_surveys(config)[1].wave
    if len(wave) != len(WAVE) or not np.allclose(wave, WAVE, rtol=0, atol=1e-3):
        raise InputError(f"{config.test_file}: {WAVE_FIELD}: found {len(wave)} pixels, expected the {len(WAVE)} of the model grid")


def load_surveys(config: DataConfig) -> tuple[Survey, Survey]:
    """Both surveys in memory."""
    train, test = (Survey(s.wave, *s.read(0, s.n_stars), s.labels) for s in open_surveys(config))
    return train, test


def experts_of(labels: Labels, config: DataConfig) -> jax.Array:
    """The expert of each star, -1 where it has none."""
    T_eff, M_H = np.asarray(labels.T_eff), np.asarray(labels.M_H)
    cell = nearest_cells(T_eff, M_H) if config.experts.coverage == "edge_clamp" else assign_cells(T_eff, M_H)
    return jax.device_put(np.where(cell < 0, N_CELLS, cell)) if config.experts.coverage == "tenth_expert" else cell


@dataclass(frozen=True)
class Observation:
    """A survey with noise: itself spectra that are read in parts. A star's noise does not depend on the parts."""

    spectra: Spectra  #: clean, or as observed
    noise_keys: np.ndarray  #: (at least N, 2) data of a random key for each star
    noise_level: float | None  #: None: the spectra are as observed, and no noise is drawn
    cell: jax.Array  #: (N,) the expert of each star, -1 where it has none

    @property
    def wave(self) -> AnyArray:
        """(P,) vacuum wavelength, Angstrom."""
        return self.spectra.wave

    @property
    def labels(self) -> Labels:
        """Labels of all stars."""
        return self.spectra.labels

    @property
    def n_stars(self) -> int:
        """N."""
        return self.spectra.n_stars

    def flux(self, start: int = 0, stop: int | None = None) -> jax.Array:
        """Noisy flux of the stars ``start`` to ``stop - 1``, by default of all; (n, P)."""
        return self._observe(start, self.n_stars if stop is None else stop)[0]

    def read(self, start: int, stop: int) -> tuple[jax.Array, jax.Array]:
        """Noisy flux of the stars ``start`` to ``stop - 1`` and the standard deviation of its noise; (n, P) each."""
        flux, error = self._observe(start, stop)
        if self.noise_level is None:
            return flux, to_device(error)
        return flux, _multiply(error, np.asarray(self.noise_level, np.asarray(error).dtype))

    def slices(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[slice, jax.Array, jax.Array]]:
        """Rows, noisy flux and its standard deviation of the stars ``start`` to ``stop - 1``, a slice at a time."""
        return ((rows, *self.read(rows.start, rows.stop)) for rows in slices(start, self.n_stars if stop is None else stop))

    def read_covered(self, stop: int | None = None) -> tuple[np.ndarray, np.ndarray]:
        """Noisy flux and its standard deviation of the stars before ``stop`` that have an expert; the others are not kept."""
        covered, done = np.asarray(self.cell)[:stop] >= 0, 0
        flux, error = np.empty((2, covered.sum(), len(self.wave)), jax.dtypes.canonicalize_dtype(float))
        for rows, *parts in self.slices(0, len(covered)):
            n = covered[rows].sum()
            flux[done : done + n], error[done : done + n] = (np.asarray(part)[covered[rows]] for part in parts)
            done += n
        return flux, error

    def _observe(self, start: int, stop: int) -> tuple[jax.Array, AnyArray]:
        """Noisy flux, and the errors as the spectra have them."""
        flux, error = self.spectra.read(start, stop)
        if self.noise_level is None:
            return to_device(flux), error
        keys = self.noise_keys[start:stop]  # a star has the same noise whenever it is read
        add_noise = functools.partial(_add_noise, noise_level=self.noise_level)
        return map_blocks(add_noise, (keys, flux, error), 0, stop - start, BLOCK), error


@jax.jit
def _add_noise(stars: tuple[jax.Array, ...], noise_level: float) -> jax.Array:
    keys, flux, error = stars
    return add_star_noise(jax.random.wrap_key_data(keys), flux, error, noise_level)


@functools.partial(jax.jit, static_argnames="n_stars")
def _draw_keys(key: jax.Array, n_stars: int) -> jax.Array:
    return jax.random.key_data(star_keys(key, n_stars))


@by_numpy
def _multiply(array: AnyArray, factor: AnyArray) -> AnyArray:
    return array * factor


def slices(start: int, stop: int) -> Iterator[slice]:
    """The rows ``start`` to ``stop - 1``, at most ``SLICE`` at a time."""
    return (slice(first, min(first + SLICE, stop)) for first in range(start, stop, SLICE))


def observe(key: jax.Array, spectra: Spectra, config: DataConfig) -> Observation:
    """Spectra with the noise of a key."""
    keys = _draw_keys(key, -(-spectra.n_stars // DRAWN) * DRAWN)
    noise_level = None if config.noise == "observed" else config.noise_level
    return Observation(spectra, np.asarray(keys), noise_level, experts_of(spectra.labels, config))


def observe_surveys(config: DataConfig, surveys: tuple[Spectra, Spectra] | None = None) -> tuple[Observation, Observation]:
    """The training and the test survey with their noise; ``surveys`` are those of ``open_surveys`` by default.

    Raises:
        InputError: one sentence, where the stars are too few, or their log g is the same for all.
    """
    train, test = surveys or open_surveys(config)
    train_key = draw_keys(config.seed).train_noise
    train_key = jax.random.fold_in(train_key, config.noise_draw) if config.noise_draw else train_key
    # The noise of test stars belongs to them: neither another survey nor another noise draw to train on changes it.
    test_key = draw_keys(config.seed if config.test_seed is None else config.test_seed).test_noise
    observed = observe(train_key, train, config), observe(test_key, test, config)
    names = [config.train_file or "the simulated training survey", config.test_file or "the simulated test survey"]
    require_cell_sizes(f"{names[0]}: labels T_eff and M_H", observed[0].cell, config.n_experts, 2 * config.experts.n_folds)
    for name, observation in zip(names, observed, strict=True):
        log_g = np.asarray(observation.labels.log_g)[np.asarray(observation.cell) >= 0]
        if len(log_g) < 2:
            raise InputError(f"{name}: labels T_eff and M_H: found {len(log_g)} stars in the nine cells, expected at least 2")
        if (log_g == log_g[0]).all():
            raise InputError(f"{name}: label log_g: found {log_g[0]:g} for all stars in the nine cells, expected different values")
    return observed
