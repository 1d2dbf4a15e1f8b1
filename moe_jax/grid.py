"""The grid of LTE model spectra that ships with the package: compressed, read, interpolated.

The continuum-normalised flux of the nodes is kept as principal components, the log continuum as Legendre polynomials. A
spectrum between the nodes is a tensor product of not-a-knot cubic splines (a parabola along an axis of three nodes) in the
coefficients, which is the same as in every pixel, since both are linear.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float
from scipy.interpolate import CubicSpline

from moe_jax.arrays import AnyArray, InputError
from moe_jax.files import atomic_path

GRID_FILE = Path(__file__).parent / "data" / "lte_grid.npz"
AXIS_NAMES = ("T_eff", "log_g", "M_H", "a_M")
CONTINUUM_DEGREE = 12


class SpectralGrid(NamedTuple):
    """A grid of model spectra on T x G x Z x M nodes, compressed."""

    T_eff: Float[AnyArray, " T"]  #: K
    log_g: Float[AnyArray, " G"]
    M_H: Float[AnyArray, " Z"]
    a_M: Float[AnyArray, " M"]
    norm_mean: Float[AnyArray, " P"]  #: mean normalised flux of the nodes
    norm_basis: Float[AnyArray, "R P"]  #: principal components of the normalised flux
    norm_coef: Float[AnyArray, "T G Z M R"]
    continuum_basis: Float[AnyArray, "D P"]  #: Legendre polynomials in wavelength
    continuum_coef: Float[AnyArray, "T G Z M D"]  #: of the natural log of the continuum, mean 0 over the pixels


class GridSpectra(NamedTuple):
    """Spectra of the grid; a spectrum is norm * exp(log_continuum), up to a constant factor."""

    norm: Float[jax.Array, "*nodes P"]  #: continuum-normalised flux
    log_continuum: Float[jax.Array, "*nodes P"]


def compress_grid(
    axes: Sequence[Sequence[float]], norm: np.ndarray, log_continuum: np.ndarray, *, n_components: int
) -> SpectralGrid:
    """Compresses computed nodes; float64 inside, float32 out.

    Args:
        axes: increasing nodes of T_eff, log g, [M/H] and [alpha/M].
        norm: (T, G, Z, M, P) continuum-normalised flux.
        log_continuum: (T, G, Z, M, P) natural log of the continuum.
        n_components: R; all of the variance is kept where R reaches the number of nodes.
    """
    shape, n_pixels = norm.shape[:-1], norm.shape[-1]
    flat = norm.reshape(-1, n_pixels).astype(np.float64)
    mean = flat.mean(axis=0)
    left, singular, basis = np.linalg.svd(flat - mean, full_matrices=False)
    r = min(n_components, len(singular))
    continuum_basis = np.polynomial.legendre.legvander(np.linspace(-1, 1, n_pixels), CONTINUUM_DEGREE).T
    continuum_coef = np.linalg.lstsq(continuum_basis.T, log_continuum.reshape(-1, n_pixels).T.astype(np.float64), rcond=None)[0].T
    grid = SpectralGrid(
        *(np.asarray(axis, np.float64) for axis in axes),
        norm_mean=mean,
        norm_basis=basis[:r],
        norm_coef=(left[:, :r] * singular[:r]).reshape(*shape, r),
        continuum_basis=continuum_basis,
        continuum_coef=continuum_coef.reshape(*shape, -1),
    )
    return SpectralGrid(*(np.asarray(array, np.float32) for array in grid))


def save_grid(path: Path | str, grid: SpectralGrid) -> None:
    """Writes a grid as a compressed npz; the file appears whole or not at all."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        np.savez_compressed(file, allow_pickle=False, **grid._asdict())


@functools.cache
def load_grid(path: Path | str = GRID_FILE) -> SpectralGrid:
    """Reads a grid written by ``save_grid``; by default the one that ships with the package.

    Raises:
        InputError: where the file is missing or is not such a grid.
    """
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return SpectralGrid(*(arrays[name] for name in SpectralGrid._fields))
    except (OSError, KeyError, ValueError) as reason:
        raise InputError(f"{path}: found no model grid ({reason}), expected a file written by save_grid") from reason


def reconstruct_nodes(grid: SpectralGrid) -> GridSpectra:
    """All nodes of the grid, uncompressed: (T, G, Z, M, P)."""
    norm = jnp.matmul(grid.norm_coef, grid.norm_basis, precision=lax.Precision.HIGHEST)
    log_continuum = jnp.matmul(grid.continuum_coef, grid.continuum_basis, precision=lax.Precision.HIGHEST)
    return GridSpectra(norm + jnp.expand_dims(grid.norm_mean, range(norm.ndim - 1)), log_continuum)


def spline_weights(nodes: Float[np.ndarray, " n"], x: Float[AnyArray, " N"]) -> Float[jax.Array, "N n"]:
    """Weights of the nodes' values in the not-a-knot cubic spline at ``x``; they sum to 1 and are one-hot at a node.

    The spline is linear in the values, so its weights are the splines through the unit vectors: their polynomial
    coefficients are computed once by SciPy from the (static) nodes. Outside the nodes the end polynomials go on.
    """
    coefficients = jnp.asarray(CubicSpline(nodes, np.eye(len(nodes))).c, x.dtype)  # (4, n - 1, n), highest power first
    starts = jnp.asarray(nodes, x.dtype)
    interval = jnp.clip(jnp.searchsorted(starts, x, side="right") - 1, 0, len(nodes) - 2)
    t = (x - starts[interval])[:, None]
    weights = coefficients[0, interval]
    for power in coefficients[1:]:
        weights = weights * t + power[interval]
    return weights


def interpolate_grid(grid: SpectralGrid, labels: Float[AnyArray, "N 4"]) -> GridSpectra:
    """Spectra at any labels inside the grid, by tensor-product cubic splines.

    Args:
        grid: its axes must be concrete arrays (the splines are set up while tracing), its coefficients may be traced.
        labels: T_eff, log g, [M/H], [alpha/M] of N stars.

    Returns:
        (N, P) normalised flux and log continuum.
    """
    weights = [spline_weights(np.asarray(axis, np.float64), labels[:, i]) for i, axis in enumerate(grid[:4])]

    def interpolate(coef: jax.Array) -> jax.Array:
        # The first contraction is one matmul; what is left is small.
        t, g, z, m, r = coef.shape
        partial = jnp.matmul(weights[0], coef.reshape(t, -1), precision=lax.Precision.HIGHEST).reshape(-1, g, z, m, r)
        return jnp.einsum("ngzmr,ng,nz,nm->nr", partial, *weights[1:], precision=lax.Precision.HIGHEST)

    norm = jnp.matmul(interpolate(jnp.asarray(grid.norm_coef)), grid.norm_basis, precision=lax.Precision.HIGHEST)
    continuum_coef = interpolate(jnp.asarray(grid.continuum_coef))
    log_continuum = jnp.matmul(continuum_coef, grid.continuum_basis, precision=lax.Precision.HIGHEST)
    return GridSpectra(norm + grid.norm_mean[None, :], log_continuum)


def grid_range(grid: SpectralGrid) -> dict[str, tuple[float, float]]:
    """Lowest and highest node of each axis."""
    return {name: (float(axis[0]), float(axis[-1])) for name, axis in zip(AXIS_NAMES, grid[:4], strict=True)}


