"""Spectra at a lower resolution: a convolution with a Gaussian in log wavelength.

The resolution R is the wavelength over the full width at half maximum of the line profile, a Gaussian. From R to a lower R', the
widths add in squares.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import scipy
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.spectra.grid import GRID_RESOLUTION, SpectralGrid, map_pixels
from moe_jax.spectra.pixels import WAVE

LOWEST_RESOLUTION = 500.0  #: of simulated spectra; the lines of the gate's features are then one blend


def broadening_width(resolution: float, wanted: float) -> float:
    """Standard deviation, in ln wavelength, of the Gaussian that takes spectra to a lower resolution; 0 where it is not lower."""
    return float(np.sqrt(max(wanted**-2 - resolution**-2, 0.0) / (8.0 * np.log(2.0))))


def broaden(spectra: Float[AnyArray, "N P"], widths: Sequence[float]) -> Float[np.ndarray, "S N P"]:
    """Spectra on the pixels of the model grid, convolved with Gaussians of S widths (standard deviations in ln wavelength).

    They are filtered on even steps of ln wavelength, half as long as a pixel; cubic splines lead there and back.
    """
    log_wave = np.log(WAVE)
    even = np.linspace(log_wave[0], log_wave[-1], 2 * len(WAVE))
    fine = scipy.interpolate.make_interp_spline(log_wave, spectra, axis=1)(even)

    def convolve(width: float) -> np.ndarray:
        if width == 0:
            return np.asarray(spectra)
        filtered = scipy.ndimage.gaussian_filter1d(fine, width / (even[1] - even[0]), axis=1, mode="nearest")
        return scipy.interpolate.make_interp_spline(even, filtered, axis=1)(log_wave)

    return np.stack([convolve(width) for width in widths])


def broaden_grid(grid: SpectralGrid, resolution: float) -> SpectralGrid:
    """A grid of resolution ``GRID_RESOLUTION`` at a lower one, by ``map_pixels``.

    Raises:
        InputError: for a resolution above that of the grid, or below ``LOWEST_RESOLUTION``.
    """
    require_resolution(resolution)
    if resolution == GRID_RESOLUTION:
        return grid
    width = broadening_width(GRID_RESOLUTION, resolution)
    return map_pixels(grid, lambda spectra: broaden(spectra, [width])[0])


def require_resolution(resolution: float) -> None:
    """Raises an ``InputError`` for a resolution that cannot be simulated."""
    if not LOWEST_RESOLUTION <= resolution <= GRID_RESOLUTION:
        raise InputError(
            f"resolution is {resolution:g}, expected {LOWEST_RESOLUTION:g} to {GRID_RESOLUTION:g}, that of the model grid"
        )
