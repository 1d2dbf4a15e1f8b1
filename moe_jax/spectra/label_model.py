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
from moe_jax.core.kept import kept_tree
from moe_jax.spectra.broadening import broaden
from moe_jax.spectra.grid import GRID_RESOLUTION, SpectralGrid, load_grid
from moe_jax.spectra.pixels import WAVE

LIGHT_SPEED = 299792.458  # km/s
GRID_WIDTH = LIGHT_SPEED / GRID_RESOLUTION / np.sqrt(8.0 * np.log(2.0))  #: standard deviation of the grid's line profile, km/s
BROADENING_NODES = (0.0, 0.5, 1.25, 2.5, 4.5, 8.0)  #: variance added to the line profile, in units of GRID_WIDTH^2
MAX_VELOCITY = 600.0  #: km/s
CALCIUM = (8500.36, 8544.44, 8664.52)  #: Angstrom, vacuum: the triplet of ionised calcium
REBIN = 4  # pixels of a coarse pixel
_N_SOURCE = 160  # components of the grid from which those of the broadened grid are made
_N_COMPONENTS = 128
_N_SLOPES = 96  # of these, which derivatives are made of
_N_CONTINUUM = 6  # components of the log continuum
VELOCITY_STEP = 30.0  # km/s, of the search
_TEMPLATES = ((0, 2, 3, 5), (0, 4), (0, 2, 4, 6), (1,))  # nodes of the grid that the search for the velocity uses
NORMALISE_TERMS = 5  # of the polynomial that flattens spectra before the searches


class LabelAxes(NamedTuple):
    """Nodes of the grid."""

    T_eff: Float[AnyArray, " I"]  #: K
    log_g: Float[AnyArray, " J"]
    M_H: Float[AnyArray, " K"]
    a_M: Float[AnyArray, " M"]


class PixelModel(NamedTuple):
    """The grid on some pixels."""

    basis: Float[AnyArray, "R1 P2"]  #: mean and components of the normalised flux: quadratic B-splines, one more at either end
    slope_basis: Float[AnyArray, "R2 P2"]  #: the first of these components, which derivatives are made of
    log_continuum: Float[AnyArray, "D1 P"]  #: mean and components


class LabelModel(NamedTuple):
    """The grid as the fit uses it; see ``label_model``."""

    axes: LabelAxes
    coef: Float[AnyArray, "L C"]  #: 1, components of the normalised flux, 1, components of the log continuum of each node
    broaden: Float[AnyArray, "S C1 R1"]  #: from 1 and these components to 1 and those of the flux broadened by BROADENING_NODES
    broaden_slopes: Float[AnyArray, "S C1 R2"]  #: to the first components alone
    fine: PixelModel
    coarse: PixelModel
    nodes: Float[AnyArray, "L P4"]  #: coarse flattened spectra of the nodes, less their polynomial
    shifted: Float[AnyArray, "V T P4"]  #: the same of some nodes, at each velocity of the search
    velocities: Float[AnyArray, " V"]  #: km/s
    node_power: Float[AnyArray, "L P16"]  #: mean squares of the nodes over ``REBIN`` coarse pixels
    shifted_power: Float[AnyArray, "V T P16"]  #: the same of the templates


@functools.cache
def default_model() -> LabelModel:
    """``label_model`` of the grid that ships with the package."""
    return kept_tree("label_model", LabelModel, lambda: label_model(load_grid()))


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
    turn = _telling_first(grid, broadened, rebin(np.vstack([source[:1], components])) / REBIN)
    components, broadened[..., 1:] = turn @ components, broadened[..., 1:] @ turn.T
    continuum_coef = np.asarray(grid.continuum_coef).reshape(len(node_coef), -1)[:, :_N_CONTINUUM]
    ones = np.ones((len(node_coef), 1))
    coef = np.hstack([ones, node_coef, ones, continuum_coef])
    basis = np.vstack([source[:1], components])
    log_continuum = np.vstack([grid.continuum_mean[None], grid.continuum_basis[:_N_CONTINUUM]])
    fine, coarse = (
        PixelModel(*(np.asarray(array, np.float32) for array in (splines, splines[1 : 1 + _N_SLOPES], continuum)))
        for splines, continuum in (
            (_splines(basis), log_continuum),
            (_splines(rebin(basis) / REBIN), rebin(log_continuum) / REBIN),
        )
    )
    nodes = coef[:, : 1 + _N_SOURCE] @ source
    velocities = np.arange(-MAX_VELOCITY - VELOCITY_STEP, MAX_VELOCITY + 1.5 * VELOCITY_STEP, VELOCITY_STEP)
    flags = [np.isin(np.arange(len(axis)), wanted) for axis, wanted in zip(grid[:4], _TEMPLATES, strict=True)]
    templates = nodes[functools.reduce(np.multiply.outer, flags).ravel()]
    spline = scipy.interpolate.CubicSpline(WAVE, templates, axis=1)
    at_rest = (np.clip(WAVE / (1 + v / LIGHT_SPEED), WAVE[0], WAVE[-1]) for v in velocities)
    shifted = np.stack([_flatten(rebin(spline(wave)) / REBIN) for wave in at_rest])
    flat_nodes = _flatten(rebin(nodes) / REBIN)
    return LabelModel(
        LabelAxes(*map(np.asarray, grid[:4])),
        coef.astype(np.float32),
        broadened.astype(np.float32),
        broadened[..., 1 : 1 + _N_SLOPES].astype(np.float32),
        fine,
        coarse,
        flat_nodes.astype(np.float32),
        shifted.astype(np.float32),
        velocities.astype(np.float32),
        (rebin(np.square(flat_nodes)) / REBIN).astype(np.float32),
        (rebin(np.square(shifted)) / REBIN).astype(np.float32),
    )


def _telling_first(grid: SpectralGrid, broadened: np.ndarray, basis: np.ndarray) -> np.ndarray:
    """(R, R) rotation after which the first components say most of the labels and the broadening.

    What a spectrum says of a label is the sum of its derivatives that changes with this label alone (Fisher information; the
    continuum is unknown too). These sums, of equal length, have leading eigenvectors. They are computed at every third node of the
    grid, which is enough, for sharp and for broadened lines. With 96 of 128 components in the derivatives,
    log g is less certain by 0.1 % in the median.

    Args:
        grid: model spectra.
        broadened: (S, C1, R1), as in ``LabelModel``.
        basis: (R1, P4) mean and components.
    """
    axes = grid[:4]
    coef = np.asarray(grid.norm_coef[..., :_N_SOURCE], np.float64)
    slopes = [scipy.interpolate.CubicSpline(axis, coef, axis=i)(axis, 1) for i, axis in enumerate(axes)]
    rows = np.stack([coef, *slopes], axis=-2).reshape(-1, 5, _N_SOURCE)[::3]
    rows = np.concatenate([np.broadcast_to(np.eye(5)[:, :1], (len(rows), 5, 1)), rows], axis=2)
    telling = []
    for node in (0, 3):
        slope = scipy.interpolate.CubicSpline(BROADENING_NODES, broadened)(BROADENING_NODES[node], 1)
        at_node = np.concatenate([rows @ broadened[node], rows[:, :1] @ slope], axis=1)
        spectrum, derivatives = at_node[:, :1] @ basis, at_node[:, 1:, 1:] @ basis[1:]
        unit = np.linalg.norm(derivatives, axis=2, keepdims=True)
        derivatives, continuum = derivatives / unit, spectrum * chebyshev_terms(basis.shape[1], NORMALISE_TERMS)
        cross = derivatives @ continuum.swapaxes(1, 2)
        inner = derivatives @ derivatives.swapaxes(1, 2) + 1e-9 * np.eye(5)
        inner -= cross @ np.linalg.solve(continuum @ continuum.swapaxes(1, 2), cross.swapaxes(1, 2))
        covariance = np.linalg.inv(inner)
        scale = np.sqrt(np.diagonal(covariance, axis1=1, axis2=2))[..., None]
        telling.append(covariance / scale @ (at_node[:, 1:, 1:] / unit))
    flat = np.concatenate(telling).reshape(-1, len(basis) - 1)
    rotation: np.ndarray = np.linalg.eigh(flat.T @ flat)[1][:, ::-1].T
    return rotation


def _splines(spectra: np.ndarray) -> np.ndarray:
    """Coefficients of quadratic B-splines through the pixels; those at either end are repeated."""
    return np.pad(scipy.ndimage.spline_filter1d(spectra, 2, axis=1), ((0, 0), (1, 1)), mode="edge")


def rebin(spectra: AnyArray, width: int = REBIN) -> Any:
    """Sums of ``width`` neighbouring pixels, for arrays of NumPy and of JAX; XLA is slow at sums over a short axis."""
    return functools.reduce(operator.add, (spectra[..., i::width] for i in range(width)))


def _flatten(spectra: np.ndarray) -> np.ndarray:
    """Spectra divided by a polynomial that is fitted to them, less 1."""
    terms = chebyshev_terms(spectra.shape[1], NORMALISE_TERMS).astype(np.float64)
    return spectra / (spectra @ np.linalg.pinv(terms) @ terms) - 1.0


def chebyshev_terms(n_pixels: int, n_terms: int) -> np.ndarray:
    """(n_terms, n_pixels) Chebyshev polynomials over the wavelength range."""
    return chebyshev.chebvander(np.linspace(-1.0, 1.0, n_pixels), n_terms - 1).T.astype(np.float32)


def calcium_cores(n_pixels: int) -> np.ndarray:
    """(n_pixels,) emission in the cores of the calcium triplet, of height 1 and as wide as the grid's line profile."""
    wave = rebin(WAVE, len(WAVE) // n_pixels) / (len(WAVE) // n_pixels)
    lines = np.array(CALCIUM)
    return np.exp(-0.5 * ((wave[:, None] / lines - 1) * LIGHT_SPEED / GRID_WIDTH) ** 2).sum(axis=1)
