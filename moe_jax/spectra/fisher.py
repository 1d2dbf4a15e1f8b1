"""The Cramer-Rao floor: the least standard deviation of log g that an unbiased method can reach for a spectrum.

Let J be the derivatives of the noise-free spectrum in the four labels (by ``jax.jacfwd`` through the interpolation of the grid).
With independent Gaussian errors sigma, the Fisher information is J' diag(1 / sigma^2) J. The floor of log g, with the other
labels unknown, is the root of its diagonal element in the inverse. The errors depend on the labels too; the information in
that is left out.
"""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.convert import convert_arguments
from moe_jax.spectra.grid import SpectralGrid, load_grid
from moe_jax.spectra.simulate import LABEL_LATTICE, MEDIAN_FLUX, unscaled_flux
from moe_jax.spectra.survey import Labels

#: Unit of each label of the grid, chosen so that the information matrix is well scaled.
LABEL_UNITS = {"T_eff": 100.0, "log_g": 0.1, "M_H": 0.1, "a_M": 0.1}
_BATCH = 32


def label_derivatives(grid: SpectralGrid, labels: Float[AnyArray, "N 4"]) -> Float[jax.Array, "N P 4"]:
    """Derivatives of the noise-free spectra, scaled to median 0.5, in T_eff (K), log g, [M/H] and [alpha/M].

    The axes of the grid must be concrete. At a node the derivative is that of the spline.
    """

    def spectrum(label: jax.Array) -> jax.Array:
        flux = unscaled_flux(grid, label[None, :])[0]
        return flux * (MEDIAN_FLUX / jnp.median(flux))

    return lax.map(jax.jacfwd(spectrum), jnp.asarray(labels), batch_size=min(_BATCH, len(labels)))


@functools.partial(jax.jit, static_argnames="axes")
def _information(
    labels: jax.Array, error: jax.Array, axes: tuple[tuple[float, ...], ...], components: tuple[jax.Array, ...]
) -> jax.Array:
    derivatives = label_derivatives(SpectralGrid(*map(np.array, axes), *components), labels)
    weighted = derivatives * jnp.array(list(LABEL_UNITS.values()), derivatives.dtype)[None, None, :] / error[:, :, None]
    return jnp.einsum("npi,npj->nij", weighted, weighted, precision="highest")


@convert_arguments()
def fisher_information(
    labels: Labels, error: Float[AnyArray, "N P"], grid: SpectralGrid | None = None
) -> Float[np.ndarray, "N 4 4"]:
    """Fisher information of T_eff, log g, [M/H] and [alpha/M] in the units of ``LABEL_UNITS``; float64.

    Args:
        labels: labels of the stars.
        error: standard deviation of the flux, > 0, for spectra scaled to median 0.5.
        grid: model spectra; by default the grid that ships with the package.

    Raises:
        InputError: shapes that disagree, or errors that are not positive.
    """
    grid = load_grid() if grid is None else grid
    stacked = jnp.stack([jnp.asarray(getattr(labels, name)) for name in LABEL_UNITS], axis=1)
    if len(error) != len(stacked):
        raise InputError(f"error has shape {error.shape}, expected ({len(stacked)}, P), a row for each star of the labels")
    if not bool((jnp.asarray(error) > 0).all()):
        raise InputError(f"error holds {float(jnp.min(jnp.asarray(error))):g}, expected positive numbers")
    axes = tuple(tuple(map(float, np.asarray(axis))) for axis in grid[:4])
    return np.asarray(_information(stacked, jnp.asarray(error), axes, tuple(map(jnp.asarray, grid[4:]))), np.float64)


def cramer_rao(
    labels: Labels, error: Float[AnyArray, "N P"], grid: SpectralGrid | None = None, *, prior: bool = False
) -> Float[np.ndarray, " N"]:
    """Least standard deviation of log g that an unbiased method can reach for each star; the other labels are unknown.

    Args:
        labels: as in ``fisher_information``.
        error: as in ``fisher_information``.
        grid: as in ``fisher_information``.
        prior: adds what is known of the labels before a spectrum is seen (van Trees): the information of normal distributions
            with the variance of the survey's uniform ones. A method that was trained on such a survey has this knowledge, and
            can lie below the floor without the prior.
    """
    return log_g_floor(fisher_information(labels, error, grid), prior=prior)


def log_g_floor(information: Float[np.ndarray, "N 4 4"], *, prior: bool = False) -> Float[np.ndarray, " N"]:
    """``cramer_rao`` for a given Fisher information."""
    if prior:
        widths = [(LABEL_LATTICE[name][1] - LABEL_LATTICE[name][0]) / unit for name, unit in LABEL_UNITS.items()]
        information = information + np.diag(12.0 / np.square(widths))[None]
    unit = LABEL_UNITS["log_g"]
    return unit * np.sqrt(np.linalg.inv(information)[:, 1, 1])
