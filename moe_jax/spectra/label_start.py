"""Where the fit of a spectrum starts: its continuum, its velocity, and the nearest node of the grid; all on coarse pixels."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moe_jax.core.arrays import matmul
from moe_jax.core.cholesky import solve_small
from moe_jax.spectra.label_model import NORMALISE_TERMS, VELOCITY_STEP, LabelModel, chebyshev_terms, rebin
from moe_jax.spectra.label_point import coarsen

SEPARATION = 150.0  #: km/s, least distance of a second velocity
_N_PARTS = 64  # of a flattened spectrum; those of the grid have means from -0.32 to 0.10
_FAINTEST, _BRIGHTEST = -0.4, 0.25


def smooth_continuum(flux: jax.Array, weight: jax.Array) -> jax.Array:
    """A polynomial through each coarse spectrum; pixels far from it count less and less."""
    terms = jnp.asarray(chebyshev_terms(flux.shape[1], NORMALISE_TERMS), flux.dtype)
    products = (terms[:, None] * terms[None, :]).reshape(-1, flux.shape[1])
    robust = weight
    for _ in range(3):
        normal = matmul(robust, products.T).reshape(len(flux), len(terms), len(terms))
        coef = solve_small(normal, matmul(robust * flux, terms.T)[..., None])[..., 0]
        smooth = matmul(coef, terms)
        deviation = jnp.abs(flux - smooth)
        typical = jnp.sum(robust * deviation, axis=1) / jnp.sum(robust, axis=1)
        robust = weight / (1.0 + jnp.square(deviation / (3.0 * typical[:, None])))
    return smooth


def flatten(flux: jax.Array, weight: jax.Array, smooth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coarse spectra over their polynomial, less 1, and their weights; none where no star of the grid is so faint or bright."""
    flux, weight = coarsen(flux, weight)
    flat = jnp.where((weight > 0) & (smooth != 0), flux / jnp.where(smooth == 0, 1.0, smooth) - 1.0, 0.0)
    parts = jnp.mean(flat.reshape(len(flat), _N_PARTS, -1), axis=2)
    possible = (parts > _FAINTEST) & (parts < _BRIGHTEST)
    return flat, weight * jnp.square(smooth) * jnp.repeat(possible, flat.shape[1] // _N_PARTS, axis=1)


def velocity_gains(product: jax.Array, weight: jax.Array, model: LabelModel) -> jax.Array:
    """By how much the best template at each velocity lowers chi2, if its strength is free.

    Args:
        product: (N, P4) coarse spectra times their weights.
        weight: (N, P4) inverse variances.
        model: has the templates.

    Returns:
        (N, V), 0 where the lines of all templates have the wrong sign.
    """
    shifted = model.shifted.reshape(-1, product.shape[1])
    overlap = matmul(product, shifted.T).clip(0.0)
    # The squares are means over some pixels, with the sums of their weights: a quarter of the work, and nearly the same.
    power = matmul(rebin(weight), model.shifted_power.reshape(len(shifted), -1).T).clip(1e-30)
    return (overlap**2 / power).reshape(len(product), *model.shifted.shape[:2]).max(axis=2)


def best_apart(gain: jax.Array, velocity: jax.Array, model: LabelModel) -> jax.Array:
    """The largest of the gains (N, V) at velocities that lie apart from one of each star (N,)."""
    apart = jnp.abs(jnp.asarray(model.velocities)[None, :] - velocity[:, None]) > SEPARATION
    return jnp.max(jnp.where(apart, gain, 0.0), axis=1)


def find_velocity(
    flat: Float[jax.Array, "N P4"], weight: Float[jax.Array, "N P4"], model: LabelModel
) -> tuple[Float[jax.Array, " N"], Float[jax.Array, " N"]]:
    """The velocity at which a template fits best, with a free strength of its lines.

    This is a cross-correlation with weights: chi2 of each template at each velocity (Zucker 2003, MNRAS 342, 1291).

    Args:
        flat: flattened coarse spectra.
        weight: their inverse variance.
        model: has the templates.

    Returns:
        Velocity (km/s) and its contrast: by how much the best chi2 of a velocity more than 150 km/s away is larger, in units of
        the least chi2 per degree of freedom. Below some 25 the velocity is not unique.
    """
    gain = velocity_gains(weight * flat, weight, model)
    v, n = jnp.asarray(model.velocities), len(model.velocities)
    best = jnp.clip(jnp.argmax(gain, axis=1), 1, n - 2)
    left, middle, right = (jnp.take_along_axis(gain, best[:, None] + i, axis=1)[:, 0] for i in (-1, 0, 1))
    curvature = jnp.minimum(left - 2.0 * middle + right, -1e-30)
    shift = jnp.clip(0.5 * (left - right) / curvature, -1.0, 1.0)
    total = jnp.sum(weight * jnp.square(flat), axis=1) - middle
    second = best_apart(gain, v[best], model)
    reduced = total / jnp.maximum(jnp.sum(weight > 0, axis=1), 1)
    return v[best] + shift * VELOCITY_STEP, (middle - second) / jnp.maximum(reduced, 1e-30)


def nearest_node(flat: jax.Array, weight: jax.Array, model: LabelModel) -> jax.Array:
    """Labels (n, 4) of the node of the grid whose flattened spectrum is nearest."""
    nodes = jnp.asarray(model.nodes)
    chi2 = matmul(rebin(weight), jnp.asarray(model.node_power).T) - 2.0 * matmul(weight * flat, nodes.T)
    places = jnp.unravel_index(jnp.argmin(chi2, axis=1), [len(axis) for axis in model.axes])
    return jnp.stack([jnp.asarray(axis, flat.dtype)[place] for axis, place in zip(model.axes, places, strict=True)], axis=1)
