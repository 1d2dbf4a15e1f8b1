"""Simulates a survey: random labels, noise-free spectra from the model grid, and their errors for the red arm."""

from __future__ import annotations

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, map_blocks, require_whole, to_device
from moe_jax.core.convert import convert_arguments
from moe_jax.spectra.broadening import broaden_grid
from moe_jax.spectra.grid import GRID_RESOLUTION, SpectralGrid, interpolate_grid, load_grid, map_pixels
from moe_jax.spectra.pixels import WAVE, average_pixels, pixel_sides
from moe_jax.spectra.sky import sky_variance, throughput
from moe_jax.spectra.survey import Labels, Survey, mean_snr

LabelSampling = Literal["lattice", "uniform"]

#: Lowest value, highest value and step of the lattice of each label.
LABEL_LATTICE = {
    "T_eff": (3750.0, 6000.0, 250.0),
    "log_g": (1.0, 5.0, 0.5),
    "M_H": (-2.5, 0.75, 0.25),
    "a_M": (-0.25, 0.5, 0.25),
    "C_M": (-0.75, 0.5, 0.25),
}
MAG_RANGE = (20.5, 22.5)
MEDIAN_FLUX = 0.5
PHOTON_VARIANCE = 0.00062  #: variance of the star's own photons at mag 21.5, flux 0.5 and throughput 1
SKY_VARIANCE = 0.00428  #: variance of the median sky at mag 21.5

_BATCH = 500  # stars that are interpolated at a time; bounds the memory


@functools.partial(jax.jit, static_argnames=("n_stars", "label_sampling"))
def draw_labels(key: PRNGKeyArray, n_stars: int, label_sampling: LabelSampling = "lattice") -> dict[str, jax.Array]:
    """Random labels of N stars, by name; each label is uniform in its range.

    With ``"lattice"`` each label is then moved to the nearest node of its lattice, except for one randomly drawn label of each
    star, which stays continuous. With ``"uniform"`` all labels stay continuous.
    """
    key_values, key_free, key_mag = jax.random.split(key, 3)
    low, high, step = (jnp.array(column)[:, None] for column in zip(*LABEL_LATTICE.values(), strict=True))
    values = low + (high - low) * jax.random.uniform(key_values, (len(LABEL_LATTICE), n_stars))
    if label_sampling == "lattice":
        nodes = low + step * jnp.round((values - low) / step)
        free = jax.random.randint(key_free, (n_stars,), 0, len(LABEL_LATTICE))
        is_free = free[None, :] == jnp.arange(len(LABEL_LATTICE))[:, None]
        values = jnp.where(is_free, values, nodes)
    labels = dict(zip(LABEL_LATTICE, values, strict=True))
    return labels | {"mag": jax.random.uniform(key_mag, (n_stars,), minval=MAG_RANGE[0], maxval=MAG_RANGE[1])}


def median_rows(x: Float[AnyArray, "N P"]) -> Float[jax.Array, " N"]:
    """Exact median of each row of non-negative numbers; on a CPU several times faster than a sort.

    Non-negative floats are ordered like the integers with the same bits. So the k-th smallest is found bit by bit, from the
    highest: a bit is set if no more than k numbers lie below the result.
    """
    n_pixels = x.shape[1]
    integer = jnp.int64 if x.dtype == jnp.float64 else jnp.int32
    n_bits = jnp.iinfo(integer).bits - 1
    order = lax.bitcast_convert_type(jnp.abs(x), integer)
    rank = (n_pixels - 1) // 2

    def add_bit(i: jax.Array, prefix: jax.Array) -> jax.Array:
        candidate = prefix | jnp.left_shift(jnp.ones((), integer), (n_bits - 1 - i).astype(integer))
        return jnp.where(jnp.sum(order < candidate[:, None], axis=1) <= rank, candidate, prefix)

    lower_bits = lax.fori_loop(0, n_bits, add_bit, jnp.zeros(len(x), integer))
    lower = lax.bitcast_convert_type(lower_bits, x.dtype)
    if n_pixels % 2:
        return lower
    # The upper of the two middle numbers equals the lower if that is repeated; otherwise it is the smallest larger number.
    larger = order > lower_bits[:, None]
    next_larger = jnp.min(jnp.where(larger, jnp.abs(x), jnp.inf), axis=1)
    repeated = jnp.sum(~larger, axis=1) > rank + 1
    return 0.5 * (lower + jnp.where(repeated, lower, next_larger))


def model_flux(grid: SpectralGrid, labels: Float[AnyArray, "N 4"]) -> Float[jax.Array, "N P"]:
    """Noise-free spectra at any labels inside the grid, as in ``interpolate_grid``: non-negative, each scaled to median 0.5."""
    flux = unscaled_flux(grid, labels)
    return flux * (MEDIAN_FLUX / median_rows(flux))[:, None]


def unscaled_flux(grid: SpectralGrid, labels: Float[AnyArray, "N 4"]) -> Float[jax.Array, "N P"]:
    """``model_flux`` up to a factor for each star."""
    spectra = interpolate_grid(grid, labels)
    return jnp.maximum(spectra.norm * jnp.exp(spectra.log_continuum), 0.0)


def flux_error(
    mag: Float[AnyArray, " N"], flux: Float[AnyArray, "N P"], factors: Float[AnyArray, "2 P"] | None = None
) -> Float[jax.Array, "N P"]:
    """Standard deviation of the flux at noise level 1, from the photons of the star and of the sky.

    error^2 = 0.00062 x (flux / 0.5) / T(wave) + 0.00428 x^2 S(wave) with x = 10^(0.4 (mag - 21.5)), sky S and
    throughput T. The sky dominates for faint stars. ``factors`` are those of other pixels than the grid's, by ``noise_factors``.
    """
    x = 10.0 ** (0.4 * (mag - 21.5))[:, None]
    factors = noise_factors() if factors is None else factors
    inverse_throughput, sky = (jnp.asarray(factor, flux.dtype)[None, :] for factor in factors)
    return jnp.sqrt(PHOTON_VARIANCE * x * (flux / MEDIAN_FLUX) * inverse_throughput + SKY_VARIANCE * x**2 * sky)


def noise_factors(sides: Float[np.ndarray, "2 P"] | None = None) -> Float[np.ndarray, "2 P"]:
    """1 / T and S of ``flux_error`` on the pixels of the grid, or on other ones: a pixel's variance falls with its width."""
    factors = np.stack([1.0 / throughput(), sky_variance()])
    return factors if sides is None else average_pixels(factors, sides) * (WAVE[1] - WAVE[0]) / (sides[1] - sides[0])[None, :]


@convert_arguments("wave")
def simulate_survey(
    key: PRNGKeyArray,
    n_stars: int,
    *,
    label_sampling: LabelSampling = "lattice",
    grid: SpectralGrid | None = None,
    resolution: float = GRID_RESOLUTION,
    wave: Float[AnyArray, " P"] | None = None,
) -> Survey:
    """Draws a survey: labels, noise-free spectra scaled to median 0.5, and their errors at noise level 1.

    The stars are computed in batches, which need little memory beside the result. C_M is drawn but has no effect on the spectra,
    since the grid holds atomic lines only. The redshift is 0.

    Args:
        key: random key.
        n_stars: N.
        label_sampling: ``"lattice"`` (one continuous label a star) or ``"uniform"``.
        grid: model spectra; by default those that ship with the package.
        resolution: R of the spectra, no higher than that of the grid.
        wave: vacuum wavelengths of your own pixels, Angstrom, increasing, within 7100 to 8850; by default those of the grid.
            The flux is the mean over each pixel, then scaled to median 0.5 over all of these. Wider pixels gather more photons,
            so their errors are smaller. Survey files, experts and ``tangent_vectors`` take any pixels. Features, and so models,
            take those that reach from 8165 to 8690. ``fit_labels`` and ``cramer_rao`` need those of the grid.

    Raises:
        InputError: for fewer than one star, another sampling, a grid that does not span the labels, a resolution that it does not
            have, or fewer than two wavelengths, steps of less than 0.1 Angstrom, or pixels beyond the range.
    """
    source = SimulatedSpectra(key, n_stars, label_sampling=label_sampling, grid=grid, resolution=resolution, wave=wave)
    flux, error = source.read(0, n_stars)
    return Survey(source.wave, flux, error, source.labels._replace(snr=mean_snr(flux, error)))


class SimulatedSpectra:
    """``simulate_survey`` in parts: labels are drawn at once, spectra are computed when they are read.

    The spectra do not depend on the parts in which they are read. ``labels.snr`` is NaN.
    """

    wave: Float[jax.Array, " P"]
    labels: Labels
    n_stars: int

    def __init__(
        self,
        key: PRNGKeyArray,
        n_stars: int,
        *,
        label_sampling: LabelSampling = "lattice",
        grid: SpectralGrid | None = None,
        resolution: float = GRID_RESOLUTION,
        wave: Float[AnyArray, " P"] | None = None,
    ) -> None:
        require_whole("n_stars", n_stars, 1)
        if label_sampling not in ("lattice", "uniform"):
            raise InputError(f"label_sampling is {label_sampling!r}, expected 'lattice' or 'uniform'")
        grid = broaden_grid(load_grid() if grid is None else grid, resolution)
        sides = None if wave is None else pixel_sides(wave)
        if sides is not None:
            grid = map_pixels(grid, lambda spectra: average_pixels(spectra, sides))
        self._factors = None if sides is None else noise_factors(sides)
        self._axes = tuple(tuple(map(float, np.asarray(axis))) for axis in grid[:4])
        self._components = tuple(grid[4:])
        for name, axis in zip(SpectralGrid._fields[:4], self._axes, strict=True):
            low, high, _ = LABEL_LATTICE[name]
            if axis[0] > low or axis[-1] < high:
                raise InputError(f"the grid's {name} runs from {axis[0]:g} to {axis[-1]:g}, expected {low:g} to {high:g}")
        drawn = draw_labels(key, n_stars, label_sampling)
        self.wave, self.n_stars = to_device(WAVE if wave is None else np.asarray(wave, np.float64)), n_stars
        self.labels = Labels(**drawn, redshift=to_device(np.zeros(n_stars)), snr=to_device(np.full(n_stars, np.nan)))

    def read(self, start: int, stop: int) -> tuple[Float[jax.Array, "n P"], Float[jax.Array, "n P"]]:
        """Clean flux and error of the stars ``start`` to ``stop - 1``."""
        stars = {name: getattr(self.labels, name) for name in (*SpectralGrid._fields[:4], "mag")}
        spectra = functools.partial(_spectra, axes=self._axes, components=self._components, factors=self._factors)
        return map_blocks(spectra, stars, start, stop, _BATCH)


@functools.partial(jax.jit, static_argnames=("axes",))
def _spectra(
    labels: dict[str, jax.Array], axes: tuple[tuple[float, ...], ...], components: tuple[jax.Array, ...], factors: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Flux and error of some stars."""
    grid = SpectralGrid(*map(np.array, axes), *components)
    flux = model_flux(grid, jnp.stack([labels[name] for name in SpectralGrid._fields[:4]], axis=1))
    return flux, flux_error(labels["mag"], flux, factors)
