"""Brings spectra to the pixels of a model, with the flux conserved, and fills masked pixels.

A pixel reaches half-way to its neighbours. The flux density in a new pixel is the mean of the flux densities of the old pixels,
weighted by the widths of their overlaps with it. So the integral over wavelength is the same on both grids.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Bool, Float

from moe_jax.core.arrays import AnyArray, InputError, by_numpy, map_rows, matmul, namespace

LEAST_OVERLAP = 0.5  # part of a new pixel that good pixels must cover; otherwise it is masked
GAUSSIAN_REACH = 4  # standard deviations
_FILL_SHRINKAGE = 1e-6


class MaskedSpectra(NamedTuple):
    """Spectra some of whose pixels cannot be used."""

    flux: Float[np.ndarray, "N P"]  #: 0 where masked
    error: Float[np.ndarray, "N P"]  #: standard deviation of the flux; 0 where masked; all NaN where it is not known
    good: Bool[np.ndarray, "N P"]  #: False where masked


def good_medians(values: Float[np.ndarray, "N P"], good: Bool[np.ndarray, "N P"]) -> Float[np.ndarray, " N"]:
    """Median of each star's good pixels; NaN where there are none."""
    if good.all():
        return np.median(values, axis=1)
    medians = (np.median(row[used]) if used.any() else np.nan for row, used in zip(values, good, strict=True))
    return np.fromiter(medians, values.dtype)  # NaN would make float64 of float32, and change the last digit of other stars


def pixel_edges(wave: Float[AnyArray, " P"]) -> Float[np.ndarray, " P1"]:
    """(P + 1,) edges of pixels that reach half-way to their neighbours."""
    wave = np.asarray(wave, np.float64)
    middle = 0.5 * (wave[1:] + wave[:-1])
    return np.concatenate([[2 * wave[0] - middle[0]], middle, [2 * wave[-1] - middle[-1]]])


def air_to_vacuum(wave: Float[AnyArray, " P"]) -> Float[np.ndarray, " P"]:
    """Vacuum wavelengths from those in air at 15 C and 760 mm, Angstrom, above 2000 (Morton 2000, ApJS 130, 403, inverted)."""
    air = np.asarray(wave, np.float64)
    vacuum = air
    for _ in range(3):
        s = (1e4 / vacuum) ** 2
        vacuum = air * (1 + 8.34254e-5 + 2.406147e-2 / (130 - s) + 1.5998e-4 / (38.9 - s))
    return vacuum


def overlaps(wave: Float[AnyArray, " Q"], target: Float[AnyArray, " P"], width: float = 0.0) -> scipy.sparse.csr_matrix:
    """(P, Q) widths, in Angstrom, of the overlap of each target pixel with each given pixel.

    Args:
        wave: wavelengths of the given pixels.
        target: wavelengths of the new pixels.
        width: standard deviation, in ln wavelength, of a Gaussian with which the given spectra are convolved first; its weights
            then stand in place of the overlaps, with the same sum for each target pixel.

    Raises:
        InputError: for fewer than two wavelengths, wavelengths that do not increase, or a width that is negative or not finite.
    """
    if not 0 <= width < np.inf:
        raise InputError(f"width is {width}, expected a number of at least 0")
    for name, grid in (("wave", wave), ("target", target)):
        if len(grid) < 2 or not (np.diff(grid) > 0).all():
            raise InputError(f"{name} holds {len(grid)} wavelengths, expected at least 2, increasing")
    given, wanted = pixel_edges(wave), pixel_edges(target)
    cuts = np.unique(np.concatenate([given, wanted]))
    middle, common = 0.5 * (cuts[1:] + cuts[:-1]), np.diff(cuts)
    column, row = (np.searchsorted(edges, middle, side="right") - 1 for edges in (given, wanted))
    both = (column >= 0) & (column < len(wave)) & (row >= 0) & (row < len(target))
    matrix = scipy.sparse.csr_matrix((common[both], (row[both], column[both])), shape=(len(target), len(wave)))
    return matrix @ _gaussian(np.asarray(wave, np.float64), width) if width else matrix


def _gaussian(wave: np.ndarray, width: float) -> scipy.sparse.csr_matrix:
    """(Q, Q) weights of a convolution with a Gaussian; the sum of each row is 1."""
    log_wave = np.log(wave)
    spacing = np.diff(wave)
    size = np.minimum(np.append(spacing, np.inf), np.insert(spacing, 0, np.inf))  # a pixel does not reach into a gap beside it
    first, last = (np.searchsorted(log_wave, log_wave + far) for far in (-GAUSSIAN_REACH * width, GAUSSIAN_REACH * width))
    row = np.repeat(np.arange(len(wave)), last - first)
    column = np.arange(len(row)) - np.repeat(np.cumsum(last - first) - last, last - first)
    weight = np.exp(-0.5 * ((log_wave[column] - log_wave[row]) / width) ** 2) * size[column]
    weight /= np.bincount(row, weight)[row]
    return scipy.sparse.csr_matrix((weight, (row, column)), shape=(len(wave), len(wave)))


def resample(
    flux: Float[AnyArray, "N Q"],
    error: Float[AnyArray, "N Q"],
    good: Bool[AnyArray, "N Q"],
    overlap: scipy.sparse.csr_matrix,
    target: Float[AnyArray, " P"],
) -> MaskedSpectra:
    """Spectra on other pixels, with the flux conserved.

    The flux is a density per unit wavelength; what masked pixels hold does not matter. ``overlap`` is that of ``overlaps``. A new
    pixel is masked where good pixels cover less than half of it. The errors are those of independent pixels.
    """
    good = np.asarray(good)
    width = np.diff(pixel_edges(target))
    covered = (overlap @ good.T.astype(np.float64)).T
    safe = np.where(covered > 0, covered, 1.0)
    new = (overlap @ np.where(good, flux, 0.0).T.astype(np.float64)).T / safe
    variance = (overlap.power(2) @ np.where(good, error, 0.0).T.astype(np.float64) ** 2).T / safe**2
    enough = covered >= LEAST_OVERLAP * width[None, :]
    dtype = np.asarray(flux).dtype
    return MaskedSpectra(np.where(enough, new, 0.0).astype(dtype), np.where(enough, np.sqrt(variance), 0.0).astype(dtype), enough)


@by_numpy
def fill_masked(
    flux: Float[AnyArray, "N P"], good: Bool[AnyArray, "N P"], center: Float[AnyArray, " P"], basis: Float[AnyArray, "R P"]
) -> Float[AnyArray, "N P"]:
    """Replaces masked pixels by the least-squares fit of the basis to the good pixels of the same star.

    The basis holds orthonormal directions in which the training stars vary about their mean flux ``center``.
    """
    xp = namespace(flux)

    def fit(star: tuple[AnyArray, AnyArray]) -> Any:
        flux, good = star
        weight = good.astype(basis.dtype)
        normal = matmul(basis * weight[None, :], basis.T) + _FILL_SHRINKAGE * xp.eye(len(basis), dtype=basis.dtype)
        x = xp.where(good, flux - center, xp.zeros_like(center))
        fitted = xp.linalg.solve(normal, matmul(basis, x[:, None]))
        return xp.where(good, flux, center + matmul(fitted.T, basis)[0])

    if xp is jnp:
        return map_rows(fit, (flux, good), batch_size=64)
    masked = np.flatnonzero(~good.all(axis=1))
    if not len(masked):
        return flux
    filled = flux.copy()
    filled[masked] = map_rows(fit, (flux[masked], good[masked]))
    return filled
