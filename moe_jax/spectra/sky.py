"""The night sky of the error model: a smooth floor and the Meinel bands of OH at R = 5000, in units of its median.

The lines are computed. The term values of OH X 2Pi follow Hill & Van Vleck (1928, Phys. Rev. 32, 250) with the constants of
Huber & Herzberg (1979). The band origins are those of Chamberlain (1961, Physics of the Aurora and Airglow). The levels are
populated at a rotational temperature of 190 K. The wavelengths are accurate to a few Angstrom, which an error model can bear.
"""

from __future__ import annotations

import numpy as np

from moe_jax.spectra.grid import GRID_RESOLUTION
from moe_jax.spectra.pixels import WAVE

ROTATIONAL_TEMPERATURE = 190.0  # K
#: Upper and lower vibrational level: band origin (vacuum Angstrom) and strength relative to the strongest band.
OH_BANDS = {
    (8, 3): (7274.5, 0.60),
    (4, 0): (7521.5, 0.20),
    (9, 4): (7748.3, 0.65),
    (5, 1): (7911.0, 0.75),
    (6, 2): (8341.7, 1.00),
    (7, 3): (8824.1, 1.00),
}
PEAK_OVER_FLOOR = 5.5  #: variance of the strongest line over that of the floor beneath it
FLOOR_ERROR_FALL = 0.15  #: fraction by which the floor of the error falls from the first pixel to the last

_B_E, _ALPHA_E, _SPIN_ORBIT = 18.911, 0.7242, -139.21  # 1/cm
_BOLTZMANN = 0.695035  # 1/cm per K


def _term_values(level: int, J: np.ndarray) -> np.ndarray:
    """(2, len(J)) rotational energies of the 2Pi_3/2 and 2Pi_1/2 ladders of a vibrational level, 1/cm."""
    B = _B_E - _ALPHA_E * (level + 0.5)
    Y = _SPIN_ORBIT / B
    root = 0.5 * np.sqrt(4.0 * (J + 0.5) ** 2 + Y * (Y - 4.0))
    return B * ((J + 0.5) ** 2 - 1.0 + np.array([[-1.0], [1.0]]) * root)


def oh_lines() -> tuple[np.ndarray, np.ndarray]:
    """Vacuum wavelengths (Angstrom) and relative strengths of the P, Q and R lines of ``OH_BANDS``."""
    waves, strengths = [], []
    J = np.arange(1.5, 9.0)
    for (upper, lower), (origin, band_strength) in OH_BANDS.items():
        energy = _term_values(upper, J)
        population = (2 * J + 1) * np.exp(-(energy - energy.min()) / (_BOLTZMANN * ROTATIONAL_TEMPERATURE))
        population /= population.sum()
        for step, branching in ((1.0, 0.55), (0.0, 0.25), (-1.0, 0.20)):  # P, Q and R branch
            final = _term_values(lower, np.maximum(J + step, 1.5))
            wavenumber = 1e8 / origin + (energy - energy.min()) - (final - _term_values(lower, J).min())
            allowed = np.broadcast_to(J + step >= 1.5, population.shape)
            waves.append(1e8 / wavenumber[allowed])
            strengths.append(band_strength * branching * population[allowed])
    return np.concatenate(waves), np.concatenate(strengths)


def sky_variance() -> np.ndarray:
    """(P,) variance of the night sky in units of its median."""
    line_waves, strengths = oh_lines()
    sigma = line_waves / GRID_RESOLUTION / np.sqrt(8.0 * np.log(2.0))
    profiles = np.exp(-0.5 * ((WAVE[:, None] - line_waves) / sigma) ** 2)
    position = (WAVE - WAVE[0]) / (WAVE[-1] - WAVE[0])
    floor = (1.0 - FLOOR_ERROR_FALL * position) ** 2
    lines = profiles @ (strengths / sigma)
    variance = floor * (1.0 + (PEAK_OVER_FLOOR - 1.0) * lines / lines.max())
    return variance / np.median(variance)


def throughput() -> np.ndarray:
    """(P,) slowly varying throughput of median 1: a dome that falls by 15 % to the ends of the arm."""
    position = 2.0 * (WAVE - WAVE[0]) / (WAVE[-1] - WAVE[0]) - 1.0
    dome = 1.0 - 0.15 * position**2
    return dome / np.median(dome)
