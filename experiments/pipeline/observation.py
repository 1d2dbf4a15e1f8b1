"""The spectra of an experiment: surveys with the noise that is drawn for their stars, read all at once or slice by slice."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass

import jax
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.surveys import experts_of, open_surveys
from moe_jax.core.arrays import AnyArray, InputError, by_numpy, map_blocks, require_cell_sizes, to_device
from moe_jax.spectra.survey import Labels, Spectra, add_star_noise, star_keys

SLICE = 2_048  # stars that are in memory at a time
BLOCK = 256  # stars whose noise is drawn at a time
DRAWN = 32_768  # keys are drawn for a multiple of so many stars, so that surveys share a program; a key depends on its star alone


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
