"""Prepares the model grid for ``fit_labels``: broadened line profiles, fewer components, wide pixels, shifted templates."""

from __future__ import annotations

import functools
import operator
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float
from numpy.polynomial import chebyshev

from moe_jax.core.arrays import AnyArray
from moe_jax.spectra.broadening import broaden
from moe_jax.spectra.grid import GRID_RESOLUTION, SpectralGrid, load_grid
from moe_jax.spectra.pixels import WAVE

LIGHT_SPEED = 299792.458  # km/s
GRID_WIDTH = LIGHT_SPEED / GRID_RESOLUTION / np.sqrt(8.0 * np.log(2.0))  #: standard deviation of the grid's line profile, km/s
BROADENING_NODES = (0.0, 0.5, 1.25, 2.5, 4.5, 8.0)  #: variance added to the line profile, in units of GRID_WIDTH^2
MAX_VELOCITY = 600.0  #: km/s
REBIN = 4  # pixels of a coarse pixel
_N_SOURCE = 160  # components of the grid from which those of the broadened grid are made
_N_COMPONENTS = 128
_N_CONTINUUM = 6  # components of the log continuum
VELOCITY_STEP = 30.0  # km/s, of the search
_TEMPLATES = ((0, 2, 3, 5), (0, 4), (0, 2, 4, 6), (1,))  # nodes of the grid that the search for the velocity uses
NORMALISE_TERMS = 5  # of the polynomial that flattens spectra before the searches


class PixelModel(NamedTuple):
    """The grid on some pixels."""

    basis: Float[AnyArray, "R1 P2"]  #: mean and components of the normalised flux: quadratic B-splines, one more at either end
    log_continuum: Float[AnyArray, "D1 P"]  #: mean and components
    nodes: Float[AnyArray, "L P"]  #: flattened spectra of the nodes, less their polynomial


class LabelModel(NamedTuple):
    """The grid as the fit uses it; see ``label_model``."""

    axes: tuple[tuple[float, ...], ...]  #: nodes of T_eff, log g, [M/H], [alpha/M]
    coef: Float[AnyArray, "L C"]  #: 1, components of the normalised flux, 1, components of the log continuum of each node
    broaden: Float[AnyArray, "S C1 R1"]  #: from 1 and these components to 1 and those of the flux broadened by BROADENING_NODES
    fine: PixelModel
    coarse: PixelModel
    shifted: Float[AnyArray, "V T P4"]  #: coarse flattened templates at each velocity of the search
    velocities: Float[AnyArray, " V"]  #: km/s


@functools.cache
def default_model() -> LabelModel:
    """``label_model`` of the grid that ships with the package."""
    return label_model(load_grid())


def label_model(grid: SpectralGrid) -> LabelModel:
    """Prepares a grid for ``fit_labels``: broadens it, compresses it again and shifts templates; some seconds.

    The broadened spectra at all nodes are components of the grid after a Gaussian filter in log wavelength. Their second moment
    over nodes and broadenings has ``R`` leading eigenvectors, which carry all of them to some 1e-4 of the continuum.
    """
    node_coef = np.asarray(grid.norm_coef, np.float64).reshape(-1, grid.norm_coef.shape[-1])[:, :_N_SOURCE]
    source = np.vstack([grid.norm_mean[None], grid.norm_basis[:_N_SOURCE]]).astype(np.float64)
    blurred = broaden(source, [np.sqrt(variance) * GRID_WIDTH / LIGHT_SPEED for variance in BROADENING_NODES])
    scale = np.concatenate([[1.0], np.sqrt(np.mean(node_coef**2, axis=0))])
    deviation = blurred.copy()
    deviation[:, 0] -= source[0]
    stacked = (deviation * scale[None, :, None]).reshape(-1, source.shape[1])
    power, rotation = (array[..., : -_N_COMPONENTS - 1 : -1] for array in np.linalg.eigh(stacked @ stacked.T))
    components = (rotation / np.sqrt(power)).T @ stacked
    broadened = np.pad(deviation @ components.T, ((0, 0), (0, 0), (1, 0)))
    broadened[:, 0, 0] = 1.0  # the mean
    continuum_coef = np.asarray(grid.continuum_coef).reshape(len(node_coef), -1)[:, :_N_CONTINUUM]
    ones = np.ones((len(node_coef), 1))
    coef = np.hstack([ones, node_coef, ones, continuum_coef])
    basis = np.vstack([source[:1], components])
    log_continuum = np.vstack([grid.continuum_mean[None], grid.continuum_basis[:_N_CONTINUUM]])
    nodes = coef[:, : 1 + _N_SOURCE] @ source
    fine, coarse = (
        PixelModel(*(np.asarray(array, np.float32) for array in (_splines(b), c, _flatten(n))))
        for b, c, n in ((basis, log_continuum, nodes), (rebin(array) / REBIN for array in (basis, log_continuum, nodes)))
    )
    velocities = np.arange(-MAX_VELOCITY - VELOCITY_STEP, MAX_VELOCITY + 1.5 * VELOCITY_STEP, VELOCITY_STEP)
    flags = [np.isin(np.arange(len(axis)), wanted) for axis, wanted in zip(grid[:4], _TEMPLATES, strict=True)]
    templates = nodes[functools.reduce(np.multiply.outer, flags).ravel()]
    spline = scipy.interpolate.CubicSpline(WAVE, templates, axis=1)
    at_rest = (np.clip(WAVE / (1 + v / LIGHT_SPEED), WAVE[0], WAVE[-1]) for v in velocities)
    shifted = np.stack([_flatten(rebin(spline(wave)) / REBIN) for wave in at_rest])
    return LabelModel(
        tuple(tuple(map(float, axis)) for axis in grid[:4]),
        coef.astype(np.float32),
        broadened.astype(np.float32),
        fine,
        coarse,
        shifted.astype(np.float32),
        velocities.astype(np.float32),
    )


def _splines(spectra: np.ndarray) -> np.ndarray:
    """Coefficients of quadratic B-splines through the pixels; those at either end are repeated."""
    return np.pad(scipy.ndimage.spline_filter1d(spectra, 2, axis=1), ((0, 0), (1, 1)), mode="edge")


def rebin(spectra: AnyArray) -> Any:
    """Sums of ``REBIN`` neighbouring pixels, for arrays of NumPy and of JAX; XLA is slow at sums over a short axis."""
    return functools.reduce(operator.add, (spectra[..., i::REBIN] for i in range(REBIN)))


def _flatten(spectra: np.ndarray) -> np.ndarray:
    """Spectra divided by a polynomial that is fitted to them, less 1."""
    terms = chebyshev_terms(spectra.shape[1], NORMALISE_TERMS).astype(np.float64)
    return spectra / (spectra @ np.linalg.pinv(terms) @ terms) - 1.0


def chebyshev_terms(n_pixels: int, n_terms: int) -> np.ndarray:
    """(n_terms, n_pixels) Chebyshev polynomials over the wavelength range."""
    return chebyshev.chebvander(np.linspace(-1.0, 1.0, n_pixels), n_terms - 1).T.astype(np.float32)
