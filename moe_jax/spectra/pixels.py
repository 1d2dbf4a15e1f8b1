"""The pixels of the medium-resolution red arm: 4096 of equal width from 7100 to 8850 Angstrom, in vacuum; and others."""

from __future__ import annotations

import numpy as np
import scipy
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError

N_PIXELS = 4096
PIXEL_EDGES = np.linspace(7100.0, 8850.0, N_PIXELS + 1)
WAVE = 0.5 * (PIXEL_EDGES[1:] + PIXEL_EDGES[:-1])
FINEST_STEP = 0.1  #: least distance of other pixels, Angstrom; a line of the model grid is 16 times as wide


def pixel_sides(wave: Float[AnyArray, " Q"]) -> Float[np.ndarray, "2 Q"]:
    """Lower and upper edges of other pixels. Each is as wide as the distance to its nearer neighbour: it does not reach into a gap.

    Raises:
        InputError: for fewer than two wavelengths, steps below ``FINEST_STEP``, or pixels beyond ``PIXEL_EDGES``.
    """
    wave = np.asarray(wave, np.float64)
    steps = np.diff(wave)
    if wave.ndim != 1 or len(wave) < 2:
        raise InputError(f"wave has shape {wave.shape}, expected (P,) with at least 2 wavelengths")
    half = 0.5 * np.abs(np.minimum(np.append(steps, np.inf), np.insert(steps, 0, np.inf)))
    sides, (low, high) = np.stack([wave - half, wave + half]), PIXEL_EDGES[[0, -1]]
    if sides.min() < low - 0.01 or sides.max() > high + 0.01:  # float32 rounds by less
        found = f"{sides.min():.2f} to {sides.max():.2f}"
        raise InputError(f"wave has pixels from {found} Angstrom, expected none outside {low:g} to {high:g}, as the model grid")
    if not (steps >= FINEST_STEP).all():
        raise InputError(f"wave has a step of {steps.min():g} Angstrom, expected increasing steps of at least {FINEST_STEP}")
    return np.clip(sides, low, high)


def average_pixels(spectra: Float[AnyArray, "N P"], sides: Float[np.ndarray, "2 Q"]) -> Float[np.ndarray, "N Q"]:
    """Means over other pixels of spectra on the grid's, by a cubic spline of the flux up to each edge: it is conserved."""
    total = np.cumsum(spectra * np.diff(PIXEL_EDGES)[None, :], axis=1)
    up_to = scipy.interpolate.make_interp_spline(PIXEL_EDGES, np.insert(total, 0, 0, axis=1), axis=1)
    return (up_to(sides[1]) - up_to(sides[0])) / (sides[1] - sides[0])[None, :]
