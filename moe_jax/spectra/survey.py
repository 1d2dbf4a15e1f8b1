"""Surveys in memory: the types, and the noise of the flux. ``survey_file`` reads and writes them."""

from __future__ import annotations

from typing import NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float, Key, PRNGKeyArray

from moe_jax.core.arrays import AnyArray
from moe_jax.core.convert import convert_arguments

_NOISE_BATCH = 256


class Labels(NamedTuple):
    """The labels of N stars."""

    T_eff: Float[AnyArray, " N"]  #: effective temperature, K
    log_g: Float[AnyArray, " N"]  #: surface gravity, log10 of cm/s^2
    M_H: Float[AnyArray, " N"]  #: metallicity, dex
    a_M: Float[AnyArray, " N"]  #: alpha enhancement [alpha/M], dex
    C_M: Float[AnyArray, " N"]  #: carbon enhancement [C/M], dex
    mag: Float[AnyArray, " N"]  #: apparent magnitude
    redshift: Float[AnyArray, " N"]
    snr: Float[AnyArray, " N"]  #: mean over the pixels of flux / error


class Survey(NamedTuple):
    """Noise-free spectra with their errors and labels."""

    wave: Float[AnyArray, " P"]  #: vacuum wavelength, Angstrom, increasing
    flux: Float[AnyArray, "N P"]  #: noise-free, non-negative flux, each spectrum scaled to median 0.5
    error: Float[AnyArray, "N P"]  #: standard deviation of the flux at noise level 1
    labels: Labels

    @property
    def n_stars(self) -> int:
        """N."""
        return len(self.flux)

    def read(self, start: int, stop: int) -> tuple[AnyArray, AnyArray]:
        """Clean flux and error of the stars ``start`` to ``stop - 1``; (n, P) each."""
        return self.flux[start:stop], self.error[start:stop]


@runtime_checkable
class Spectra(Protocol):
    """Spectra that are read in parts: those of a file, simulated ones, or a survey in memory."""

    @property
    def wave(self) -> AnyArray:
        """(P,) vacuum wavelength, Angstrom."""

    @property
    def labels(self) -> Labels:
        """Labels of all stars."""

    @property
    def n_stars(self) -> int:
        """Number of stars, N."""

    def read(self, start: int, stop: int) -> tuple[AnyArray, AnyArray]:
        """(n, P) clean flux and (n, P) error of the stars ``start`` to ``stop - 1``."""


@convert_arguments()
def add_noise(
    key: PRNGKeyArray, flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"], noise_level: ArrayLike
) -> Float[jax.Array, "N P"]:
    """Draws noisy spectra: flux + noise_level * error * N(0, 1), without clipping.

    Args:
        key: random key.
        flux: clean flux.
        error: standard deviation at noise level 1.
        noise_level: factor on the errors.

    Raises:
        InputError: where flux and error disagree in shape.
    """
    return add_star_noise(star_keys(key, len(flux)), flux, error, noise_level)


def star_keys(key: PRNGKeyArray, n_stars: int) -> Key[jax.Array, " N"]:
    """One key for the noise of each star."""
    return jax.random.split(key, n_stars)


@jax.jit
def add_star_noise(
    keys: Key[jax.Array, " N"], flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"], noise_level: ArrayLike
) -> Float[jax.Array, "N P"]:
    """``add_noise`` for some of the stars of a survey, given their ``star_keys``."""

    def observe(star: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        key, flux, error = star
        return flux + jnp.asarray(noise_level, flux.dtype) * error * jax.random.normal(key, flux.shape, flux.dtype)

    # In batches, so that the random bits of a batch fit into the cache: three times faster, and a third of the memory.
    return lax.map(observe, (keys, flux, error), batch_size=min(_NOISE_BATCH, len(flux)))


@jax.jit
def mean_snr(flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"]) -> Float[jax.Array, " N"]:
    """Mean over the pixels of flux / error."""
    return jnp.mean(flux / error, axis=1)
