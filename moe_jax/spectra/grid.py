"""The grid of LTE model spectra that ships with the package: compressing, reading, interpolating.

The continuum-normalised flux of the nodes and the log of their continuum are stored as principal components. Between the nodes
the coefficients are interpolated by a tensor product of not-a-knot cubic splines (a parabola along an axis of three nodes).
Interpolating every pixel would give the same spectrum, since both operations are linear.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import scipy
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError, matmul
from moe_jax.core.files import atomic_path

GRID_RESOLUTION = 5000.0  #: wavelength over the full width at half maximum of a line profile
GRID_FILE = Path(__file__).parent / "data" / "lte_grid.npz"


class SpectralGrid(NamedTuple):
    """A grid of model spectra on T x G x Z x M nodes, compressed."""

    T_eff: Float[AnyArray, " T"]  #: K
    log_g: Float[AnyArray, " G"]
    M_H: Float[AnyArray, " Z"]
    a_M: Float[AnyArray, " M"]
    norm_mean: Float[AnyArray, " P"]  #: mean normalised flux of the nodes
    norm_basis: Float[AnyArray, "R P"]  #: principal components of the normalised flux
    norm_coef: Float[AnyArray, "T G Z M R"]
    continuum_mean: Float[AnyArray, " P"]  #: mean over the nodes of the natural log of the continuum
    continuum_basis: Float[AnyArray, "D P"]  #: principal components of the log continuum
    continuum_coef: Float[AnyArray, "T G Z M D"]


class GridSpectra(NamedTuple):
    """Spectra of the grid: norm * exp(log_continuum), up to a constant factor."""

    norm: Float[jax.Array, "*nodes P"]  #: continuum-normalised flux
    log_continuum: Float[jax.Array, "*nodes P"]


def compress_grid(
    axes: Sequence[Sequence[float]],
    norm: np.ndarray,
    log_continuum: np.ndarray,
    *,
    n_components: int = 320,
    n_continuum_components: int = 24,
) -> SpectralGrid:
    """Compresses computed nodes into principal components: computed in float64, returned in float32.

    Args:
        axes: increasing nodes of T_eff, log g, [M/H] and [alpha/M].
        norm: (T, G, Z, M, P) continuum-normalised flux.
        log_continuum: (T, G, Z, M, P) natural log of the continuum.
        n_components: R, components kept of the normalised flux.
        n_continuum_components: D, components kept of the log continuum.
    """
    components = (*_principal_components(norm, n_components), *_principal_components(log_continuum, n_continuum_components))
    return SpectralGrid(*(np.asarray(array, np.float32) for array in (*axes, *components)))


def _principal_components(nodes: np.ndarray, n_components: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Mean (P,), components (R, P) and coefficients (T, G, Z, M, R) of the nodes (T, G, Z, M, P)."""
    flat = nodes.reshape(-1, nodes.shape[-1]).astype(np.float64)
    mean = flat.mean(axis=0)
    left, singular, basis = np.linalg.svd(flat - mean, full_matrices=False)
    coef = (left * singular)[:, :n_components]
    return mean, basis[:n_components], coef.reshape(*nodes.shape[:-1], -1)


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


def map_pixels(grid: SpectralGrid, change: Callable[[np.ndarray], np.ndarray]) -> SpectralGrid:
    """A grid whose lines and log continuum are changed one by one by a linear function of spectra (n, P), in float64.

    Their product differs from the changed spectrum where a line lies at one of the continuum's few steps, each of some per cent,
    such as the Paschen jump.
    """
    changed: dict[str, np.ndarray] = {}
    for part in ("norm", "continuum"):
        names = (f"{part}_mean", f"{part}_basis")
        mean, basis = (np.asarray(getattr(grid, name)) for name in names)
        rows = change(np.vstack([mean[None], basis]).astype(np.float64)).astype(basis.dtype)
        changed |= dict(zip(names, (rows[0], rows[1:]), strict=True))
    return grid._replace(**changed)


def reconstruct_nodes(grid: SpectralGrid) -> GridSpectra:
    """All nodes of the grid, uncompressed: (T, G, Z, M, P)."""
    return _expand(grid, jnp.asarray(grid.norm_coef), jnp.asarray(grid.continuum_coef))


def _expand(grid: SpectralGrid, norm_coef: jax.Array, continuum_coef: jax.Array) -> GridSpectra:
    """From coefficients (..., R) and (..., D) to spectra (..., P)."""

    def expand(coef: jax.Array, basis: AnyArray, mean: AnyArray) -> jax.Array:
        return matmul(coef, basis) + jnp.expand_dims(mean, range(coef.ndim - 1))

    return GridSpectra(
        expand(norm_coef, grid.norm_basis, grid.norm_mean), expand(continuum_coef, grid.continuum_basis, grid.continuum_mean)
    )


def spline_weights(nodes: Float[np.ndarray, " n"], x: Float[AnyArray, " N"]) -> Float[jax.Array, "N n"]:
    """Weights that the not-a-knot cubic spline at ``x`` gives to the values at the nodes; each row sums to 1.

    A spline is linear in the values. So weight j is the spline whose value is 1 at node j and 0 at the others. SciPy computes
    the polynomials of these splines from the nodes, which must be concrete. Beyond the nodes the end polynomials continue.
    """
    spline = scipy.interpolate.CubicSpline(nodes, np.eye(len(nodes)))
    coefficients = jnp.asarray(np.swapaxes(spline.c, 0, 1), x.dtype)  # (n - 1, 4, n), highest power first
    starts = jnp.asarray(nodes, x.dtype)
    interval = jnp.sum(x[:, None] >= starts[None, 1:-1], axis=1)
    t, powers = (x - starts[interval])[:, None], coefficients[interval]
    return ((powers[:, 0] * t + powers[:, 1]) * t + powers[:, 2]) * t + powers[:, 3]


def interpolate_grid(grid: SpectralGrid, labels: Float[AnyArray, "N 4"]) -> GridSpectra:
    """Spectra at any labels inside the grid, by tensor-product cubic splines.

    Args:
        grid: the axes must be concrete, since SciPy sets the splines up; the coefficients may be traced.
        labels: T_eff, log g, [M/H], [alpha/M] of N stars.

    Returns:
        (N, P) normalised flux and log continuum.
    """
    axis_weights = [spline_weights(np.asarray(axis, np.float64), labels[:, i]) for i, axis in enumerate(grid[:4])]
    weights = jnp.einsum("nt,ng,nz,nm->ntgzm", *axis_weights, precision="highest").reshape(len(labels), -1)

    def interpolate(coef: AnyArray) -> jax.Array:
        return matmul(weights, coef.reshape(weights.shape[1], -1))

    return _expand(grid, interpolate(grid.norm_coef), interpolate(grid.continuum_coef))
