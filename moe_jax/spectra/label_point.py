"""The model of a spectrum: norm(labels, broadening) * exp(log_continuum(labels)), shifted by the radial velocity; its derivatives.

Spectra and derivatives are interpolated in the principal components of the grid, and expanded by one matrix product. The observed
pixels lie where they are. Each belongs to the pixel of the model that is nearest, and the model is taken at its centre.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.core.arrays import matmul
from moe_jax.spectra.fisher import LABEL_UNITS
from moe_jax.spectra.grid import spline_weights
from moe_jax.spectra.label_model import BROADENING_NODES, LIGHT_SPEED, REBIN, LabelModel, PixelModel, rebin
from moe_jax.spectra.pixels import WAVE

PIXEL = float(WAVE[1] - WAVE[0])  #: Angstrom
UNITS = np.array([*LABEL_UNITS.values(), 1.0, 0.1], np.float32)  #: of the labels, km/s, broadening


class Stars(NamedTuple):
    """Spectra of n stars, at rest up to a part of a pixel."""

    flux: jax.Array  # (n, P), 0 where the weight is 0
    weight: jax.Array  # (n, P), inverse variance
    offset: jax.Array  # (n, P), by how many pixels the centre of the observed pixel lies beside that of the model, at ``velocity``
    velocity: jax.Array  # (n,), km/s
    drift: jax.Array  # (P,), change of the offset with the velocity
    additive: jax.Array  # (n,), 1 where a constant is added to the model, else 0


def at_rest(flux: jax.Array, weight: jax.Array, velocity: jax.Array, additive: jax.Array) -> Stars:
    """Takes for each pixel of the model the observed pixel whose wavelength at rest is nearest; nothing is interpolated."""
    wave = jnp.asarray(WAVE - WAVE[0], flux.dtype)  # in float32, only differences of wavelengths are precise
    stretch = (velocity / LIGHT_SPEED)[:, None]
    place = (wave[None, :] + stretch * (wave + float(WAVE[0]))[None, :]) / PIXEL
    index = jnp.round(place)
    offset = (index - place) / (1.0 + stretch)
    inside = (index >= 0) & (index <= flux.shape[1] - 1)
    index = jnp.clip(index, 0, flux.shape[1] - 1).astype(jnp.int32)
    # Where v < 0 an observed pixel can be nearest to two pixels of the model: it counts once.
    first = jnp.concatenate([jnp.ones((len(flux), 1), bool), index[:, 1:] > index[:, :-1]], axis=1)
    flux, weight = take_pixels(index, flux, weight)
    weight = jnp.where(inside & first, weight, 0.0)
    drift = -jnp.asarray(WAVE / (LIGHT_SPEED * PIXEL), flux.dtype)
    return Stars(jnp.where(weight > 0, flux, 0.0), weight, offset, velocity, drift, additive)


def coarsen(flux: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted means of neighbouring pixels, and their weights."""
    total = rebin(weight)
    return rebin(weight * flux) / jnp.where(total > 0, total, 1.0), total


def coarse_stars(data: Stars) -> Stars:
    """The spectra on coarse pixels."""
    flux, weight = coarsen(data.flux, data.weight)
    offset, drift = (rebin(x) / REBIN**2 for x in (data.offset, data.drift))
    return Stars(flux, weight, offset, data.velocity, drift, data.additive)


def take_pixels(place: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The pixels of arrays (n, P) at places (n, P), which lie within; ``take_along_axis`` takes twice as long."""
    rows = place.shape[1] * jnp.arange(len(place), dtype=place.dtype)[:, None]
    return [array.reshape(-1).at[place + rows].get(mode="promise_in_bounds") for array in arrays]


class Rows(NamedTuple):
    """Coefficients of the model of n stars, and of its derivatives."""

    norm: jax.Array  # (n, R1)
    norm_slopes: jax.Array  # (n, 5, R2), in the labels and the broadening
    log_continuum: jax.Array  # (n, 5, D1), and its derivatives in the labels


def model_rows(x: jax.Array, model: LabelModel) -> Rows:
    """At parameters (n, 6): T_eff, log g, [M/H], [alpha/M], velocity, broadening."""
    coef = _coefficients(x, model)
    n, n_source = len(x), model.broaden.shape[1]
    norm, continuum = coef[..., :n_source], coef[..., n_source:]
    # The norm as broadened by each node, weighted; and the derivative in the broadening.
    weight, slope = _weights(BROADENING_NODES, x[:, 5])
    weighted = jnp.concatenate([norm[:, :, None] * weight[:, None, :, None], norm[:, :1, None] * slope[:, None, :, None]], axis=1)
    weighted = weighted.reshape(n, 6, -1)
    rows = matmul(weighted[:, 0], model.broaden.reshape(weighted.shape[2], -1))
    slopes = matmul(weighted[:, 1:].reshape(5 * n, -1), model.broaden_slopes.reshape(weighted.shape[2], -1))
    return Rows(rows, slopes.reshape(n, 5, -1), continuum)


def _coefficients(x: jax.Array, model: LabelModel) -> jax.Array:
    """Coefficients of the grid at the labels, and their derivatives in these (n, 5, C): a tensor product of splines."""
    n, (n_t, n_g, n_z, n_m) = len(x), (len(axis) for axis in model.axes)
    (t, dt), (g, dg), (z, dz), (m, dm) = (_weights(nodes, x[:, i]) for i, nodes in enumerate(model.axes))

    def outer(pairs: list[tuple[jax.Array, jax.Array]]) -> jax.Array:
        return jnp.stack([(a[:, :, None] * b[:, None]).reshape(n, -1) for a, b in pairs], axis=1)

    first = outer([(t, g), (dt, g), (t, dg)])
    second = outer([(z, m), (dz, m), (z, dm)])
    rows = matmul(first.reshape(3 * n, -1), model.coef.reshape(n_t * n_g, -1)).reshape(n, 3, n_z * n_m, -1)
    products = matmul(jnp.repeat(second, 3, axis=0), rows.reshape(3 * n, n_z * n_m, -1)).reshape(n, 3, 3, -1)
    return jnp.stack([products[:, i, j] for i, j in ((0, 0), (1, 0), (2, 0), (0, 1), (0, 2))], axis=1)


@functools.partial(jax.jit, static_argnames="nodes")  # so that it is traced once
def _weights(nodes: tuple[float, ...], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``spline_weights`` and their derivatives."""
    return jax.jvp(lambda x: spline_weights(np.array(nodes), x), (x,), (jnp.ones_like(x),))


class Point(NamedTuple):
    """The model of n stars at some parameters, without the polynomial, and what its derivatives are made of."""

    spectrum: jax.Array  # (n, P)
    factor: jax.Array  # (n, P), the continuum of the grid
    continuum_slopes: jax.Array  # (n, 4, P), derivatives of its logarithm in the labels
    norm: jax.Array  # (n, P + 2), splines of the normalised flux
    norm_slopes: jax.Array  # (n, 5, P + 2), splines of its derivatives in the labels and the broadening
    offset: jax.Array  # (n, P), pixels


def model_point(rows: Rows, x: jax.Array, data: Stars, pixels: PixelModel) -> Point:
    """The model on some pixels."""
    n = len(x)
    norm = matmul(rows.norm, pixels.basis)
    norm_slopes = matmul(rows.norm_slopes.reshape(5 * n, -1), pixels.slope_basis).reshape(n, 5, -1)
    log_continuum = matmul(rows.log_continuum.reshape(5 * n, -1), pixels.log_continuum).reshape(n, 5, -1)
    offset = jnp.clip(data.offset + (x[:, 4] - data.velocity)[:, None] * data.drift[None, :], -1.0, 1.0)
    factor = jnp.exp(log_continuum[:, 0])
    spectrum = _between(norm[:, None], offset)[:, 0] * factor
    # XLA would compute these again for each of their uses.
    return lax.optimization_barrier(Point(spectrum, factor, log_continuum[:, 1:], norm, norm_slopes, offset))


def _between(splines: jax.Array, offset: jax.Array) -> jax.Array:
    """Quadratic B-splines (n, k, P + 2) at the centres of the observed pixels."""
    before, middle, after = (0.5 * jnp.square(0.5 - offset), 0.75 - jnp.square(offset), 0.5 * jnp.square(0.5 + offset))
    return before[:, None] * splines[..., :-2] + middle[:, None] * splines[..., 1:-1] + after[:, None] * splines[..., 2:]


def derivatives_at(point: Point, scale: jax.Array, data: Stars) -> jax.Array:
    """Derivatives (n, 6, P) of the spectra in the parameters, in units of ``UNITS``, times ``scale``."""
    norm, factor, offset = point.norm, point.factor * scale, point.offset
    slopes = _between(point.norm_slopes, offset) * factor[:, None]
    labels = slopes[:, :4] + point.continuum_slopes * (point.spectrum * scale)[:, None]
    velocity = (offset - 0.5) * norm[:, :-2] - 2.0 * offset * norm[:, 1:-1] + (offset + 0.5) * norm[:, 2:]
    velocity = velocity * data.drift[None, :] * factor
    derivatives = jnp.concatenate([labels, velocity[:, None], slopes[:, 4:]], axis=1)
    return lax.optimization_barrier(derivatives * jnp.asarray(UNITS, scale.dtype)[None, :, None])
