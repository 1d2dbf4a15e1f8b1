"""Noisy spectra of a survey, in parts."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp

from experiments.pipeline.config import DataConfig
from experiments.pipeline.surveys import noise_key
from moe_jax.core.arrays import AnyArray
from moe_jax.spectra.survey import Spectra, add_star_noise, star_keys

SLICE = 2_048  # stars that are in memory at a time


@dataclass(frozen=True)
class Observation:
    """A survey with the noise that is drawn for it."""

    spectra: Spectra
    keys: jax.Array  #: (N,) of each star's noise
    noise_level: float
    chunk_stars: int

    @classmethod
    def of(cls, spectra: Spectra, key: jax.Array, config: DataConfig) -> Observation:
        """Spectra with the noise that a key and a configuration draw."""
        keys = star_keys(noise_key(key, config), spectra.n_stars)
        return cls(spectra, keys, config.noise_level, config.chunk_stars)

    def own_chunks(self) -> list[tuple[int, int]]:
        """First and last star (exclusive) of the chunks that are this process's turn."""
        starts = range(0, self.spectra.n_stars, self.chunk_stars)[jax.process_index() :: jax.process_count()]
        return [(start, min(start + self.chunk_stars, self.spectra.n_stars)) for start in starts]

    def slices(self, start: int, stop: int) -> Iterator[tuple[slice, jax.Array]]:
        """The noisy flux of some stars, a slice at a time."""
        return ((part, flux) for part, flux, _ in self._slices(start, stop))

    def slices_with_errors(self, start: int, stop: int) -> Iterator[tuple[slice, jax.Array, jax.Array]]:
        """Likewise, with the standard deviation of the noise; at noise level 0 the spectra are taken as observed ones."""
        for part, flux, error in self._slices(start, stop):
            yield part, flux, jnp.asarray(error) * (self.noise_level or 1.0)

    def _slices(self, start: int, stop: int) -> Iterator[tuple[slice, jax.Array, AnyArray]]:
        """Likewise, with the errors at noise level 1."""
        for first in range(start, stop, SLICE):
            part = slice(first, min(first + SLICE, stop))
            flux, error = self.spectra.read(part.start, part.stop)
            yield part, add_star_noise(self.keys[part], flux, error, self.noise_level), error


class Part(NamedTuple):
    """Stars of a survey: the spectra, and from which to which row."""

    observation: Observation
    start: int
    stop: int

    def slices(self) -> Iterator[tuple[slice, jax.Array, jax.Array]]:
        """Rows, noisy flux and its errors."""
        return self.observation.slices_with_errors(self.start, self.stop)
