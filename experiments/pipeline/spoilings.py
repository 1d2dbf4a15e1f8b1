"""What happens to spectra on their way to a user: pure functions of drawn exposures, each with its own random numbers."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.sky import sky_variance

LIGHT = 299_792.458  # speed of light, km/s
RESOLUTION = 5_000  # of the model grid
POSITION = 2 * (WAVE - WAVE.mean()) / np.ptp(WAVE)  # -1 to 1 over the range
STEP = WAVE[1] - WAVE[0]
NEBULA = (7137.8, 7321.9, 7332.7, 8448.6, 8547.7, 8600.8, 8667.4, 8752.9)  # [Ar III], [O II], O I, Paschen; vacuum Angstrom


class Exposure(NamedTuple):
    """Spectra on the pixels of the model grid, with the noise kept apart; N stars, P pixels."""

    flux: Float[np.ndarray, "N P"]  #: without noise
    noise: Float[np.ndarray, "N P"]  #: as drawn
    error: Float[np.ndarray, "N P"]  #: standard deviation that the file states


Spoiling = Callable[[np.random.Generator, Exposure], Exposure]


def multiply(exposure: Exposure, factor: np.ndarray | float) -> Exposure:
    """Another calibration of the flux: (N, P), (1, P) or a number."""
    return Exposure(*(array * factor for array in exposure))


def alternate(exposure: Exposure) -> Float[np.ndarray, "N 1"]:
    """+1 and -1 by turns."""
    return np.where(np.arange(len(exposure.flux)) % 2, -1.0, 1.0)[:, None]


def warp(flux: Float[np.ndarray, "N P"], factor: Float[np.ndarray, " P"]) -> Float[np.ndarray, "N P"]:
    """Spectra whose wavelengths are multiplied by a factor (P,), by cubic splines."""
    moved: np.ndarray = scipy.interpolate.make_interp_spline(WAVE, flux, axis=1)(np.clip(WAVE / factor, WAVE[0], WAVE[-1]))
    return moved


def shift(exposure: Exposure, velocity: Float[np.ndarray, " N"]) -> Exposure:
    """Each star at its velocity, km/s."""
    moved = [warp(star[None], np.full(WAVE.shape, 1 + v / LIGHT))[0] for star, v in zip(exposure.flux, velocity, strict=True)]
    return exposure._replace(flux=np.stack(moved))


def blur(exposure: Exposure, resolution: float) -> Exposure:
    """Stars at another resolution, at most that of the grid; the noise is that of the pixels, as before."""
    fwhm = WAVE.mean() * np.sqrt(1 / resolution**2 - 1 / RESOLUTION**2)
    return exposure._replace(flux=scipy.ndimage.gaussian_filter1d(exposure.flux, fwhm / STEP / 2.3548, axis=1, mode="nearest"))


def slope(exposure: Exposure, size: float | np.ndarray) -> Exposure:
    """A tilt of the continuum; ``size`` is the relative change from the middle to the ends."""
    return multiply(exposure, 1 + alternate(exposure) * size * POSITION[None])


def moving(velocity: float) -> Spoiling:
    """Towards us and away by turns, km/s."""
    return lambda rng, exposure: shift(exposure, velocity * alternate(exposure)[:, 0])


def normalise(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Divided by a running high percentile, as a user would normalise a continuum."""
    continuum = scipy.ndimage.percentile_filter(exposure.flux[:, ::8], 90, size=(1, 41), mode="nearest")
    smooth = scipy.ndimage.gaussian_filter1d(continuum, 15, axis=1, mode="nearest")
    return multiply(exposure, 1 / np.stack([np.interp(WAVE, WAVE[::8], star) for star in smooth]))


def wiggle(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Slow errors of the calibration: six waves of 1 % each, other ones for each star."""
    waves = np.stack([np.cos(np.pi * k * (POSITION + 1) / 2) for k in range(1, 7)])
    return multiply(exposure, 1 + 0.01 * rng.normal(size=(len(exposure.flux), 6)) @ waves)


def fringe(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """A ripple of 2 % with a period of 60 Angstrom."""
    phase = rng.uniform(0, 2 * np.pi, (len(exposure.flux), 1))
    return multiply(exposure, 1 + 0.02 * np.sin(2 * np.pi * WAVE[None] / 60 + phase))


def hit(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Cosmic rays in 0.2 % of the pixels: 1 to 10 times the typical flux is added."""
    struck = rng.random(exposure.flux.shape) < 0.002
    return exposure._replace(noise=exposure.noise + struck * rng.uniform(0.5, 5.0, exposure.flux.shape))


def absorb(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """The telluric A band at 7600 Angstrom takes half of the light."""
    band = 1 - 0.5 * ((WAVE > 7590) & (WAVE < 7680))
    return exposure._replace(flux=exposure.flux * band[None], noise=exposure.noise * np.sqrt(band)[None])


def sky_lines(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Lines of the sky that are over- or undersubtracted: up to 20 % of the typical flux in the strongest."""
    lines = sky_variance() - scipy.ndimage.minimum_filter1d(sky_variance(), 301)
    return exposure._replace(noise=exposure.noise + 0.1 * rng.uniform(-1, 1, (len(exposure.flux), 1)) * lines[None] / lines.max())


def emit(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Lines of a nebula in emission, 10 to 60 % above the continuum."""
    profiles = np.exp(-0.5 * ((WAVE[None] - np.array(NEBULA)[:, None]) / 0.8) ** 2)
    return exposure._replace(flux=exposure.flux + rng.uniform(0.05, 0.3, (len(exposure.flux), len(NEBULA))) @ profiles)


def kill(rng: np.random.Generator, exposure: Exposure, value: float) -> Exposure:
    """One pixel in a hundred, and forty pixels in a row, hold a value; their errors look good."""
    dead = rng.random(exposure.flux.shape) < 0.01
    start = rng.integers(0, len(WAVE) - 40, (len(dead), 1))
    dead |= (np.arange(len(WAVE)) >= start) & (np.arange(len(WAVE)) < start + 40)
    return exposure._replace(flux=np.where(dead, value, exposure.flux), noise=np.where(dead, 0.0, exposure.noise))


def rotate(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Stars that rotate with v sin i = 40 km/s, without limb darkening."""
    half = int(np.ceil(WAVE.mean() * 40 / LIGHT / STEP))
    kernel = np.sqrt(np.maximum(1 - (np.arange(-half, half + 1) * STEP / (WAVE.mean() * 40 / LIGHT)) ** 2, 0))
    return exposure._replace(flux=scipy.ndimage.convolve1d(exposure.flux, kernel / kernel.sum(), axis=1, mode="nearest"))


def correlate(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Noise that neighbouring pixels share, as after a resampling; its standard deviation is as before."""
    kernel = np.array([0.5, 1.0, 0.5]) / np.sqrt(1.5)
    return exposure._replace(noise=scipy.ndimage.convolve1d(exposure.noise, kernel, axis=1, mode="reflect"))


def quasar(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """No star: a power law with broad emission lines."""
    centre, width = (rng.uniform(low, high, (len(exposure.flux), 3, 1)) for low, high in ((7100, 8850), (15, 60)))
    lines = np.exp(-0.5 * ((WAVE[None, None] - centre) / width) ** 2).sum(axis=1)
    return exposure._replace(flux=0.5 * (WAVE[None] / 8000) ** -1.5 * (1 + 0.6 * lines))


def water_and_oxygen(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Lines of the Earth's atmosphere, the same in all spectra but for the depth: up to 40 % where they crowd."""
    absorption = np.zeros(len(WAVE))
    places = np.random.default_rng(8)
    for low, high, n_lines, strength in ((7170, 7340, 80, 0.6), (8130, 8340, 110, 0.6), (7594, 7700, 60, 1.0)):
        for centre in places.uniform(low, high, n_lines):
            fall = np.exp(-(centre - low) / 50) if low == 7594 else 1.0  # the A band has a head
            absorption += strength * places.uniform(0.1, 1) * fall * np.exp(-0.5 * ((WAVE - centre) / 0.7) ** 2)
    return exposure._replace(flux=exposure.flux * np.exp(-0.3 * absorption * rng.uniform(0.5, 1.5, (len(exposure.flux), 1))))


def fill_in_calcium(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Chromospheres: emission in the cores of the calcium triplet, 8 to 22 % of the typical flux."""
    lines = np.exp(-0.5 * ((WAVE[:, None] - [8500.4, 8544.4, 8664.5]) / (0.9 * STEP)) ** 2).sum(axis=1)
    typical = np.median(exposure.flux, axis=1, keepdims=True)
    return exposure._replace(flux=exposure.flux + 0.15 * typical * lines * rng.uniform(0.5, 1.5, (len(exposure.flux), 1)))


def accompany(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Half of the light is that of another star at another velocity: 200 km/s."""
    other = np.roll(exposure.flux, 3, axis=0)
    other = other * (np.median(exposure.flux, axis=1, keepdims=True) / np.median(other, axis=1, keepdims=True))
    return exposure._replace(flux=0.5 * exposure.flux + 0.5 * warp(other, np.full(len(WAVE), 1 + 200 / LIGHT)))


def warm_up(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """A hot companion without lines, with 30 % of the light."""
    typical = np.median(exposure.flux, axis=1, keepdims=True)
    return exposure._replace(flux=0.7 * exposure.flux + 0.3 * typical * (WAVE / 8000) ** -3)


def everything(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """Velocity of 75 km/s, resolution 4,000, a slope of 10 %, cosmic rays, and errors understated by 1.4."""
    struck = hit(rng, slope(blur(moving(75.0)(rng, exposure), 4_000), 0.1))
    return struck._replace(error=struck.error * (1 / 1.4))


def disturb(rng: np.random.Generator, exposure: Exposure) -> Exposure:
    """What ordinary spectra have, of a random size for each star, on which intervals are calibrated.

    Slopes of up to 10 %, velocities of up to 10 km/s, resolutions of 4,500 to 5,000 (four of them), lines of the sky that are left
    (half as strong as in ``sky_lines``), and errors understated by up to 1.5.
    """
    n_stars = len(exposure.flux)
    moved = shift(exposure, rng.uniform(-10, 10, n_stars))
    blurred = np.stack([moved.flux, *(blur(moved, resolution).flux for resolution in (4_850, 4_700, 4_500))])
    moved = moved._replace(flux=blurred[rng.integers(0, 4, n_stars), np.arange(n_stars)])
    lines = 0.5 * (sky_lines(rng, moved).noise - moved.noise)
    tilted = slope(moved._replace(noise=moved.noise + lines), rng.uniform(-0.1, 0.1, (n_stars, 1)))
    return tilted._replace(error=tilted.error / rng.uniform(1, 1.5, (n_stars, 1)))


#: Those from which the method was made.
SPOILINGS: dict[str, Spoiling] = {
    "untouched": lambda rng, exposure: exposure,
    **{f"velocity {velocity} km/s": moving(velocity) for velocity in (30, 60, 100, 200)},
    "continuum slope 5 %": lambda rng, exposure: slope(exposure, 0.05),
    "continuum slope 20 %": lambda rng, exposure: slope(exposure, 0.2),
    "continuum normalised": normalise,
    "continuum bent by 20 %": lambda rng, exposure: multiply(
        exposure, 1 + alternate(exposure) * 0.2 * (POSITION[None] ** 2 - 1 / 3)
    ),
    "slow errors of calibration": wiggle,
    "fringes": fringe,
    # a power law of index -1.61 in the wavelength
    "reddening, A_V = 2": lambda rng, exposure: multiply(
        exposure, 10 ** (-0.4 * 2.0 * ((WAVE[None] / 5500) ** -1.61 - (8000 / 5500) ** -1.61))
    ),
    "resolution 3500": lambda rng, exposure: blur(exposure, 3_500),
    "resolution 2500": lambda rng, exposure: blur(exposure, 2_500),
    "cosmic rays": hit,
    "telluric band": absorb,
    # a sky that was subtracted wrongly: 10 % of the median is left
    "constant added": lambda rng, exposure: exposure._replace(
        flux=exposure.flux + 0.1 * np.median(exposure.flux, axis=1, keepdims=True)
    ),
    "sky lines left": sky_lines,
    "emission lines": emit,
    "errors understated by 2": lambda rng, exposure: exposure._replace(error=exposure.error * 0.5),
    "errors overstated by 2": lambda rng, exposure: exposure._replace(error=exposure.error * 2.0),
    "two stars in one": lambda rng, exposure: exposure._replace(flux=0.5 * (exposure.flux + np.roll(exposure.flux, 1, axis=0))),
    "dead pixels hold 0": lambda rng, exposure: kill(rng, exposure, 0.0),
    "dead pixels hold NaN": lambda rng, exposure: kill(rng, exposure, np.nan),
    # wrong by -0.4 Angstrom at the blue end and by +0.8 at the red one
    "wavelength scale stretched": lambda rng, exposure: exposure._replace(
        flux=warp(exposure.flux, 1 + (0.2 + 0.6 * POSITION) / WAVE)
    ),
    "scale times 1000": lambda rng, exposure: multiply(exposure, 1000.0),
    "flux per frequency": lambda rng, exposure: multiply(exposure, 1e-15 * (WAVE[None] / 8000) ** 2),
    "noise only": lambda rng, exposure: exposure._replace(flux=np.full_like(exposure.flux, 0.02)),
}

#: Those that were written down when the method was finished. After their first run (five of six handled) the constants of
#: ``moe_jax.apply.robust`` were taken from calibration stars, and a rule for emission lines was corrected.
LATER: dict[str, Spoiling] = {
    "rotation of 40 km/s": rotate,
    # joined at 7900 Angstrom
    "two arms that differ by 5 %": lambda rng, exposure: multiply(exposure, 1 + 0.05 * alternate(exposure) * (WAVE > 7900)[None]),
    "correlated noise": correlate,
    "nothing below 7600 Angstrom": lambda rng, exposure: exposure._replace(flux=np.where(WAVE[None] < 7600, np.nan, exposure.flux)),
    "quasars": quasar,
    "everything at once": everything,
}

#: Those of some 140 that a stranger tried later which told most: none was handled. The method was changed for the first five.
TRIED: dict[str, Spoiling] = {
    # joined at 8000 Angstrom
    "two arms that differ by 10 %": lambda rng, exposure: multiply(exposure, 1 + 0.1 * alternate(exposure) * (WAVE > 8000)[None]),
    "lines of water and oxygen": water_and_oxygen,
    "errors understated by 4 in the blue half": lambda rng, exposure: exposure._replace(
        error=exposure.error * np.where(POSITION < 0, 0.25, 1.0)[None]
    ),
    "half of another star at 200 km/s": accompany,
    "resolution 1500": lambda rng, exposure: blur(exposure, 1_500),
    "a hot companion": warm_up,
    "calcium triplet filled in": fill_in_calcium,
}
