"""Fits the model grid to spectra as observed: labels, velocity, broadening and continuum of every star, by least squares.

The model of a spectrum is norm(labels, broadening) * exp(log_continuum(labels)), shifted by the radial velocity and multiplied by a
polynomial in wavelength. The polynomial is linear, so it is solved exactly at every step (variable projection: Golub & Pereyra
1973; the Jacobian leaves out its derivative, Kaufman 1975). The other parameters are found by damped Gauss-Newton steps
(Levenberg-Marquardt) with analytic derivatives. Spectra and derivatives are interpolated in the principal components of the grid
and expanded by one matrix product.

A fit goes from coarse to fine: a search over velocities and over the nodes of the grid, steps on pixels that are four times
as wide, and steps on all pixels. Pixels that stand out of the residuals are masked between these.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError, matmul, require_whole, to_host
from moe_jax.core.convert import convert_arguments
from moe_jax.core.kept import call_kept
from moe_jax.core.parallel import devices_for, map_devices, on_all
from moe_jax.spectra.fisher import LABEL_UNITS
from moe_jax.spectra.grid import spline_weights
from moe_jax.spectra.label_model import (
    BROADENING_NODES,
    GRID_WIDTH,
    LIGHT_SPEED,
    MAX_VELOCITY,
    NORMALISE_TERMS,
    REBIN,
    VELOCITY_STEP,
    LabelModel,
    PixelModel,
    chebyshev_terms,
    default_model,
    rebin,
)
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.simulate import median_rows

_PIXEL = float(WAVE[1] - WAVE[0])
_UNITS = np.array([*LABEL_UNITS.values(), 1.0, 0.1], np.float32)  # of the labels, km/s, broadening
_SEPARATION = 150.0  # km/s, least distance of a second velocity
_N_PARTS = 64  # of a flattened spectrum; those of the grid have means from -0.32 to 0.10
_FAINTEST, _BRIGHTEST = -0.4, 0.25
_LEAST_PIXELS = 50  # of a star that is fitted
_BLOCK = 64  # stars that are prepared together, and ...
_AT_ONCE = 8  # ... those of them that make a step together
_COARSE_STEPS, _FINE_STEPS = 6, 8  # at most, before and after masking
_COARSE_TOLERANCE, _TOLERANCE = 1e-3, 5e-5  # expected relative decrease of chi2 at which a fit has converged
_DAMPING = 1e-2  # of the first step
_ROUNDING = 3e-7  # relative, of chi2
_OUTLIER = 5.5  # residual, in standard deviations, at which a pixel is masked
_OUTLIER_NEIGHBOUR = 3.0  # the same beside a masked pixel
_N_BLOCKS = 256  # of pixels, whose sums are looked at too


class LabelFit(NamedTuple):
    """Fits of N stars."""

    labels: Float[AnyArray, "N 4"]  #: T_eff (K), log g, [M/H], [alpha/M]; within the grid
    covariance: Float[AnyArray, "N 4 4"]  #: of the labels, from the errors as given; velocity and continuum are unknown
    velocity: Float[AnyArray, " N"]  #: km/s, positive where the star recedes
    velocity_error: Float[AnyArray, " N"]  #: km/s; 0 where the velocity was given
    velocity_contrast: Float[AnyArray, " N"]  #: how much worse a second velocity is, in chi2; see ``find_velocity``
    broadening: Float[AnyArray, " N"]  #: standard deviation, km/s, by which lines are broader than those of the grid
    chi2: Float[AnyArray, " N"]  #: chi2 per degree of freedom of the pixels used
    n_masked: Int[AnyArray, " N"]  #: pixels masked since they stand out
    converged: Bool[AnyArray, " N"]
    at_edge: Bool[AnyArray, "N 4"]  #: True where a label ended at the edge of the grid
    continuum: Float[AnyArray, "N K"]  #: Chebyshev coefficients of the polynomial
    constant: Float[AnyArray, " N"]  #: flux that is added to the star's; 0 unless asked for
    good: Bool[AnyArray, "N P"]  #: pixels used, as observed
    flux: Float[AnyArray, "N P"]  #: the fitted model on the pixels as observed
    rare: Float[AnyArray, "N 2"]  #: what a linear step finds of a constant (flux), and of a stretch (km/s at the red end)
    rare_error: Float[AnyArray, "N 2"]  #: their standard deviations
    rare_slope: Float[AnyArray, "N 2 4"]  #: by how much the labels change with them
    blend_gain: Float[AnyArray, " N"]  #: by how much the light of a second star would lower chi2


@convert_arguments()
def fit_labels(
    flux: Float[AnyArray, "N P"],
    error: Float[AnyArray, "N P"],
    good: Bool[AnyArray, "N P"] | None = None,
    *,
    velocity: Float[AnyArray, " N"] | None = None,
    n_continuum: int = 5,
    broadening: bool = True,
    additive: bool | Bool[AnyArray, " N"] = False,
    model: LabelModel | None = None,
) -> LabelFit:
    """Labels of every star by least squares on the model grid, with its velocity, broadening and continuum unknown.

    Args:
        flux: spectra as observed, on the pixels of the grid.
        error: standard deviation of the flux; pixels where it is not a positive number are not used.
        good: False for pixels that are not to be used.
        velocity: known velocities, km/s; by default they are found, within +-600 km/s.
        n_continuum: number K of terms of the polynomial; 1 trusts the flux calibration and fits the amplitude only.
        broadening: whether lines may be broader than those of the grid.
        additive: whether a constant may be added to the flux (of each star), as by a sky that was subtracted wrongly; log g then
            is less certain.
        model: result of ``label_model``; by default that of the grid that ships with the package.

    Returns:
        The fits. A star with fewer than 50 usable pixels, or without light, has NaN in all numbers and has not converged.

    Raises:
        InputError: for shapes that disagree, or pixels other than those of the grid.
    """
    require_whole("n_continuum", n_continuum, 1)
    flux, error = to_host(flux, error)
    good = np.ones(flux.shape, bool) if good is None else to_host(good)[0]
    model = default_model() if model is None else model
    if flux.ndim != 2 or flux.shape[1] != len(WAVE) or len(flux) == 0:
        raise InputError(f"flux has shape {flux.shape}, expected (N, {len(WAVE)}) on the pixels of the model grid")
    for name, array in (("error", error), ("good", good)):
        if array.shape != flux.shape:
            raise InputError(f"{name} has shape {array.shape}, expected {flux.shape} like flux")
    if velocity is not None and np.shape(velocity) != (len(flux),):
        raise InputError(f"velocity has shape {np.shape(velocity)}, expected ({len(flux)},)")
    known = np.zeros(len(flux), flux.dtype) if velocity is None else np.asarray(velocity, flux.dtype)
    constant = np.broadcast_to(np.asarray(additive, flux.dtype), len(flux))
    free = (0, 1, 2, 3, *([4] if velocity is None else []), *([5] if broadening else []))
    devices = devices_for(_BLOCK)  # also for a single star, so that one program serves all numbers of stars
    axes = tuple(tuple(map(float, axis)) for axis in model.axes)
    arrays = on_all(tuple(model[1:]), devices)
    fits = []
    for start in range(0, len(flux), _BLOCK * len(devices)):
        # The last star fills the last blocks.
        rows = np.minimum(np.arange(start, start + _BLOCK * len(devices)), len(flux) - 1)
        blocks = tuple(
            array[rows].reshape(len(devices), _BLOCK, *array.shape[1:]) for array in (flux, error, good, known, constant)
        )
        shared = on_all(blocks, devices), arrays
        static = {"axes": axes, "free": free, "n_continuum": n_continuum, "devices": devices}
        fits.append(call_kept(_fit_blocks, *shared, results=[LabelFit], **static))
    leaves = (np.concatenate(parts).reshape(-1, *parts[0].shape[2:])[: len(flux)] for parts in zip(*fits, strict=True))
    return _without_unknown(LabelFit(*leaves), np.asarray(flux), np.asarray(error), np.asarray(good))


def _without_unknown(fit: LabelFit, flux: np.ndarray, error: np.ndarray, good: np.ndarray) -> LabelFit:
    """The fits, with NaN for stars of which nothing is known."""
    light = good & np.isfinite(flux) & np.isfinite(error) & (error > 0) & (flux != 0)
    known = (light.sum(axis=1) >= _LEAST_PIXELS) & np.isfinite(fit.chi2) & np.isfinite(fit.labels).all(axis=1)

    def keep(leaf: np.ndarray) -> np.ndarray:
        rows = known.reshape(-1, *[1] * (leaf.ndim - 1))
        return leaf & rows if leaf.dtype == bool else np.where(rows, leaf, np.nan).astype(leaf.dtype)

    converged = fit.converged & (np.abs(fit.velocity) <= 1.1 * MAX_VELOCITY)
    numbers = {name: keep(np.asarray(leaf)) for name, leaf in fit._asdict().items() if np.asarray(leaf).dtype.kind in "bf"}
    return fit._replace(**numbers | {"converged": converged & known})


@functools.partial(jax.jit, static_argnames=("axes", "free", "n_continuum", "devices"))
def _fit_blocks(blocks: Any, arrays: Any, axes: Any, free: tuple[int, ...], n_continuum: int, devices: Any) -> LabelFit:
    def fit(block: Any, arrays: Any) -> LabelFit:
        model = LabelModel(axes, *arrays)
        flux, error, good, known, additive = block
        return _fit_block(flux, error, good, known, additive, _Problem(model, model.coarse, free, n_continuum))

    return map_devices(fit, blocks, arrays, devices)


class _Data(NamedTuple):
    """Spectra of n stars, at rest up to a part of a pixel."""

    flux: jax.Array  # (n, P), 0 where the weight is 0
    weight: jax.Array  # (n, P), inverse variance
    offset: jax.Array  # (n, P), by how many pixels the centre of the observed pixel lies beside that of the model, at ``velocity``
    velocity: jax.Array  # (n,), km/s
    drift: jax.Array  # (P,), change of the offset with the velocity
    additive: jax.Array  # (n,), 1 where a constant is added to the model, else 0


class _Problem(NamedTuple):
    """What does not change during a fit."""

    model: LabelModel
    pixels: PixelModel
    free: tuple[int, ...]  # parameters that are fitted
    n_continuum: int


def _fit_block(
    flux: jax.Array, error: jax.Array, good: jax.Array, known: jax.Array, additive: jax.Array, problem: _Problem
) -> LabelFit:
    model, free = problem.model, problem.free
    usable = good & (error > 0) & jnp.isfinite(error) & jnp.isfinite(flux)
    flux = jnp.where(usable, flux, 0.0)
    # In units of the typical flux, so that float32 holds any unit of the file.
    scale = median_rows(flux[:, ::8])[:, None]
    scale = jnp.where(scale > 0, scale, 1.0)
    flux = flux / scale
    weight = jnp.where(usable, 1.0 / jnp.square(jnp.where(usable, error, 1.0) / scale), 0.0)
    # Light that no star has: far above the spectrum or below 0.
    beyond = jnp.maximum(jnp.maximum(flux - 3.0, -flux), 0.0)
    observed = jnp.where(weight * jnp.square(beyond) > 64.0, 0.0, weight)
    smooth = _continuum(*_coarsen(flux, observed))
    velocity, contrast = known, jnp.full(len(flux), jnp.inf)
    if 4 in free:
        velocity, contrast = find_velocity(*_flat(flux, observed, smooth), model)
    data = _at_rest(flux, observed, velocity, additive)
    flat, flat_weight = _flat(data.flux, data.weight, smooth)
    start = _nearest_node(flat, flat_weight, model)
    x = jnp.concatenate([start, velocity[:, None], jnp.full((len(start), 1), 0.3 if 5 in free else 0.0)], axis=1)
    coarse = _coarse_data(data)
    state, kept = _solve(problem, x, coarse, jnp.where(flat_weight > 0, coarse.weight, 0.0), _COARSE_STEPS, _COARSE_TOLERANCE)
    velocity = state.x[:, 4]
    data = _at_rest(flux, observed, velocity, additive)
    problem = problem._replace(pixels=model.fine)
    kept = jnp.where(jnp.repeat(kept > 0, REBIN, axis=1), data.weight, 0.0)
    state, weight = _solve(problem, state.x, data, kept, _FINE_STEPS, _TOLERANCE)
    n_masked = jnp.sum(usable & (observed == 0), axis=1) + jnp.sum((data.weight > 0) & (weight == 0), axis=1)
    data = data._replace(weight=weight)
    fit = _report(problem, state, data, usable, contrast, n_masked, _blend_gain(problem, state, data, smooth))
    unit = jnp.concatenate([scale, jnp.ones_like(scale)], axis=1)  # of a constant, and of a stretch
    return fit._replace(
        continuum=fit.continuum * scale,
        constant=fit.constant * scale[:, 0],
        flux=fit.flux * scale,
        rare=fit.rare * unit,
        rare_error=fit.rare_error * unit,
        rare_slope=fit.rare_slope / unit[..., None],
    )


def _continuum(flux: jax.Array, weight: jax.Array) -> jax.Array:
    """A polynomial through each coarse spectrum; pixels far from it count less and less."""
    terms = jnp.asarray(chebyshev_terms(flux.shape[1], NORMALISE_TERMS), flux.dtype)
    products = (terms[:, None] * terms[None, :]).reshape(-1, flux.shape[1])
    robust = weight
    for _ in range(3):
        normal = matmul(robust, products.T).reshape(len(flux), len(terms), len(terms))
        coef = _solve_small(normal, matmul(robust * flux, terms.T)[..., None])[..., 0]
        smooth = matmul(coef, terms)
        deviation = jnp.abs(flux - smooth)
        typical = jnp.sum(robust * deviation, axis=1) / jnp.sum(robust, axis=1)
        robust = weight / (1.0 + jnp.square(deviation / (3.0 * typical[:, None])))
    return smooth


def _flat(flux: jax.Array, weight: jax.Array, smooth: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Coarse spectra over their polynomial, less 1, and their weights; none where no star of the grid is so faint or bright."""
    flux, weight = _coarsen(flux, weight)
    flat = jnp.where((weight > 0) & (smooth != 0), flux / jnp.where(smooth == 0, 1.0, smooth) - 1.0, 0.0)
    parts = jnp.mean(flat.reshape(len(flat), _N_PARTS, -1), axis=2)
    possible = (parts > _FAINTEST) & (parts < _BRIGHTEST)
    return flat, weight * jnp.square(smooth) * jnp.repeat(possible, flat.shape[1] // _N_PARTS, axis=1)


def _coarsen(flux: jax.Array, weight: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Weighted means of neighbouring pixels, and their weights."""
    total = rebin(weight)
    return rebin(weight * flux) / jnp.where(total > 0, total, 1.0), total


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
    shifted = jnp.asarray(model.shifted).reshape(-1, flat.shape[1])
    overlap = jnp.maximum(matmul(weight * flat, shifted.T), 0.0)
    # The squares are means over some pixels, with the sums of their weights: a quarter of the work, and nearly the same.
    power = matmul(rebin(weight), jnp.asarray(model.shifted_power).reshape(len(shifted), -1).T)
    gain = jnp.square(overlap) / jnp.maximum(power, 1e-30)
    gain = jnp.max(gain.reshape(len(flat), *model.shifted.shape[:2]), axis=2)
    v, n = jnp.asarray(model.velocities), len(model.velocities)
    best = jnp.clip(jnp.argmax(gain, axis=1), 1, n - 2)
    left, middle, right = (jnp.take_along_axis(gain, best[:, None] + i, axis=1)[:, 0] for i in (-1, 0, 1))
    curvature = jnp.minimum(left - 2.0 * middle + right, -1e-30)
    shift = jnp.clip(0.5 * (left - right) / curvature, -1.0, 1.0)
    total = jnp.sum(weight * jnp.square(flat), axis=1) - middle
    apart = jnp.abs(v[None, :] - v[best][:, None]) > _SEPARATION
    second = jnp.max(jnp.where(apart, gain, 0.0), axis=1)
    reduced = total / jnp.maximum(jnp.sum(weight > 0, axis=1), 1)
    return v[best] + shift * VELOCITY_STEP, (middle - second) / jnp.maximum(reduced, 1e-30)


def _nearest_node(flat: jax.Array, weight: jax.Array, model: LabelModel) -> jax.Array:
    """Labels (n, 4) of the node of the grid whose flattened spectrum is nearest."""
    nodes = jnp.asarray(model.nodes)
    chi2 = matmul(weight, jnp.asarray(model.node_square).T) - 2.0 * matmul(weight * flat, nodes.T)
    places = jnp.unravel_index(jnp.argmin(chi2, axis=1), [len(axis) for axis in model.axes])
    return jnp.stack([jnp.asarray(axis, flat.dtype)[place] for axis, place in zip(model.axes, places, strict=True)], axis=1)


def _at_rest(flux: jax.Array, weight: jax.Array, velocity: jax.Array, additive: jax.Array) -> _Data:
    """Takes for each pixel of the model the observed pixel whose wavelength at rest is nearest; nothing is interpolated."""
    wave = jnp.asarray(WAVE - WAVE[0], flux.dtype)  # in float32, only differences of wavelengths are precise
    stretch = (velocity / LIGHT_SPEED)[:, None]
    place = (wave[None, :] + stretch * (wave + float(WAVE[0]))[None, :]) / _PIXEL
    index = jnp.round(place)
    offset = (index - place) / (1.0 + stretch)
    inside = (index >= 0) & (index <= flux.shape[1] - 1)
    index = jnp.clip(index, 0, flux.shape[1] - 1).astype(jnp.int32)
    # Where v < 0 an observed pixel can be nearest to two pixels of the model: it counts once.
    first = jnp.concatenate([jnp.ones((len(flux), 1), bool), index[:, 1:] > index[:, :-1]], axis=1)
    flux, weight = _pixels(index, flux, weight)
    weight = jnp.where(inside & first, weight, 0.0)
    drift = -jnp.asarray(WAVE / (LIGHT_SPEED * _PIXEL), flux.dtype)
    return _Data(jnp.where(weight > 0, flux, 0.0), weight, offset, velocity, drift, additive)


def _pixels(place: jax.Array, *arrays: jax.Array) -> list[jax.Array]:
    """The pixels of arrays (n, P) at places (n, P), which lie within; ``take_along_axis`` takes twice as long."""
    rows = place.shape[1] * jnp.arange(len(place), dtype=place.dtype)[:, None]
    return [array.reshape(-1).at[place + rows].get(mode="promise_in_bounds") for array in arrays]


def _coarse_data(data: _Data) -> _Data:
    flux, weight = _coarsen(data.flux, data.weight)
    offset, drift = (rebin(x) / REBIN**2 for x in (data.offset, data.drift))
    return _Data(flux, weight, offset, data.velocity, drift, data.additive)


@functools.partial(jax.jit, static_argnames="nodes")  # so that it is traced once
def _weights(nodes: tuple[float, ...], x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """``spline_weights`` and their derivatives."""
    return jax.jvp(lambda x: spline_weights(np.array(nodes), x), (x,), (jnp.ones_like(x),))


class _Point(NamedTuple):
    """The model of n stars at some parameters, without the polynomial, and what its derivatives are made of."""

    spectrum: jax.Array  # (n, P)
    factor: jax.Array  # (n, P), the continuum of the grid
    continuum_slopes: jax.Array  # (n, 4, P), derivatives of its logarithm in the labels
    norm: jax.Array  # (n, P + 2), splines of the normalised flux
    norm_slopes: jax.Array  # (n, 5, P + 2), splines of its derivatives in the labels and the broadening
    offset: jax.Array  # (n, P), pixels


class _Rows(NamedTuple):
    """Coefficients of the model of n stars, and of its derivatives."""

    norm: jax.Array  # (n, R1)
    norm_slopes: jax.Array  # (n, 5, R2), in the labels and the broadening
    log_continuum: jax.Array  # (n, 5, D1), and its derivatives in the labels


def _rows(x: jax.Array, model: LabelModel) -> _Rows:
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
    return _Rows(rows, slopes.reshape(n, 5, -1), continuum)


def _point(rows: _Rows, x: jax.Array, data: _Data, pixels: PixelModel) -> _Point:
    """The model on some pixels."""
    n = len(x)
    norm = matmul(rows.norm, pixels.basis)
    norm_slopes = matmul(rows.norm_slopes.reshape(5 * n, -1), pixels.slope_basis).reshape(n, 5, -1)
    log_continuum = matmul(rows.log_continuum.reshape(5 * n, -1), pixels.log_continuum).reshape(n, 5, -1)
    offset = jnp.clip(data.offset + (x[:, 4] - data.velocity)[:, None] * data.drift[None, :], -1.0, 1.0)
    factor = jnp.exp(log_continuum[:, 0])
    spectrum = _between(norm[:, None], offset)[:, 0] * factor
    # XLA would compute these again for each of their uses.
    return lax.optimization_barrier(_Point(spectrum, factor, log_continuum[:, 1:], norm, norm_slopes, offset))


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


def _between(splines: jax.Array, offset: jax.Array) -> jax.Array:
    """Quadratic B-splines (n, k, P + 2) at the centres of the observed pixels."""
    before, middle, after = (0.5 * jnp.square(0.5 - offset), 0.75 - jnp.square(offset), 0.5 * jnp.square(0.5 + offset))
    return before[:, None] * splines[..., :-2] + middle[:, None] * splines[..., 1:-1] + after[:, None] * splines[..., 2:]


def _derivatives(point: _Point, scale: jax.Array, data: _Data) -> jax.Array:
    """Derivatives (n, 6, P) of the spectra in the parameters, in units of ``_UNITS``, times ``scale``."""
    norm, factor, offset = point.norm, point.factor * scale, point.offset
    slopes = _between(point.norm_slopes, offset) * factor[:, None]
    labels = slopes[:, :4] + point.continuum_slopes * (point.spectrum * scale)[:, None]
    velocity = (offset - 0.5) * norm[:, :-2] - 2.0 * offset * norm[:, 1:-1] + (offset + 0.5) * norm[:, 2:]
    velocity = velocity * data.drift[None, :] * factor
    derivatives = jnp.concatenate([labels, velocity[:, None], slopes[:, 4:]], axis=1)
    return lax.optimization_barrier(derivatives * jnp.asarray(_UNITS, scale.dtype)[None, :, None])


class _State(NamedTuple):
    """The best fit so far of n stars, and what a step from it needs."""

    x: jax.Array  # (n, 6)
    chi2: jax.Array  # (n,)
    normal: jax.Array  # (n, f, f) normal equations of the free parameters, the polynomial eliminated
    gram: jax.Array  # (n, f + 3, f + 3) products of the derivatives, the residual, a constant and a stretch, in units of the errors
    cross: jax.Array  # (n, f + 3, K + 1) of these with the polynomial and the constant
    inner: jax.Array  # (n, K + 1, K + 1) of the polynomial and the constant with each other
    continuum: jax.Array  # (n, K)
    constant: jax.Array  # (n,)
    flux: jax.Array  # (n, P) the model
    damping: jax.Array  # (n,)


@jax.jit  # so that each shape is traced once
def _solve_small(normal: jax.Array, right: jax.Array) -> jax.Array:
    """Solves small positive definite systems (n, k, k) for right sides (n, k, m), by Gauss-Jordan elimination.

    LAPACK's batches wait for threads of XLA's pool, and stand still where several devices share it.
    """
    k = normal.shape[1]
    scale = 1.0 / jnp.sqrt(jnp.maximum(jnp.einsum("nii->ni", normal), 1e-30))
    system = jnp.concatenate([normal * scale[:, None, :] * scale[:, :, None], right * scale[:, :, None]], axis=2)

    def eliminate(i: Any, system: jax.Array) -> jax.Array:
        row = system[:, i] / system[:, i, i][:, None]
        return (system - system[:, :, i][:, :, None] * row[:, None]).at[:, i].set(row)

    system = lax.fori_loop(0, k, eliminate, system)
    return system[:, :, k:] * scale[:, :, None]


def _evaluate(problem: _Problem, x: jax.Array, data: _Data) -> _State:
    """The state at x."""
    point = _point(_rows(x, problem.model), x, data, problem.pixels)
    (n, n_pixels), f, k = data.flux.shape, len(problem.free), problem.n_continuum
    order = np.arange(k)
    terms = jnp.asarray(chebyshev_terms(n_pixels, 2 * k - 1), x.dtype)
    root = jnp.sqrt(data.weight)
    flux, spectrum = root * data.flux, root * point.spectrum  # in units of the errors
    moments, right, border = (matmul(spectrum * other, terms.T) for other in (spectrum, flux, root))
    # Products of Chebyshev polynomials are sums of two others: 2 T_j T_k = T_(j + k) + T_|j - k|.
    inner = 0.5 * (moments[:, order[:, None] + order[None]] + moments[:, np.abs(order[:, None] - order[None])])
    border = data.additive[:, None] * border[:, :k]
    corner = jnp.where(data.additive > 0, jnp.sum(data.weight, axis=1), moments[:, 0])
    inner = jnp.concatenate([inner, border[:, None]], axis=1)
    inner = jnp.concatenate([inner, jnp.concatenate([border, corner[:, None]], axis=1)[..., None]], axis=2)
    eye = jnp.eye(k + 1, dtype=inner.dtype)[None]
    normal = inner + 1e-6 * jnp.einsum("nii->n", inner)[:, None, None] * eye
    total = data.additive * jnp.sum(root * flux, axis=1)
    coef = _solve_small(normal, jnp.concatenate([right[:, :k], total[:, None]], axis=1)[..., None])[..., 0]
    coef, constant = coef[:, :-1], coef[:, -1]
    polynomial = matmul(coef, terms[:k])
    residual = flux - polynomial * spectrum - constant[:, None] * root
    derivatives = _derivatives(point, root * polynomial, data)
    stretch = derivatives[:, 4] * jnp.linspace(-1.0, 1.0, n_pixels, dtype=x.dtype)[None]
    rows = jnp.concatenate([_free(derivatives, problem), jnp.stack([residual, root, stretch], axis=1)], axis=1)
    gram = jnp.einsum("nip,njp->nij", rows, rows)
    cross = matmul((rows * spectrum[:, None]).reshape(-1, n_pixels), terms[:k].T).reshape(n, f + 3, k)
    cross = jnp.concatenate([cross, data.additive[:, None, None] * gram[:, :, f + 1 : f + 2]], axis=2)
    eliminated = _solve_small(normal, jnp.swapaxes(cross[:, :f], 1, 2))
    reduced = gram[:, :f, :f] - jnp.einsum("nik,nkj->nij", cross[:, :f], eliminated)
    model_flux = polynomial * point.spectrum + constant[:, None]
    damping = jnp.full(n, _DAMPING, x.dtype)
    return _State(x, gram[:, f, f], reduced, gram, cross, inner, coef, constant, model_flux, damping)


def _free(derivatives: jax.Array, problem: _Problem) -> jax.Array:
    """Those of the parameters that are fitted."""
    return derivatives if len(problem.free) == 6 else derivatives[:, np.array(problem.free)]


def _step(problem: _Problem, state: _State) -> tuple[jax.Array, jax.Array]:
    """Where the next step leads, and by how much it should lower chi2.

    A parameter that would leave the box of the grid is held at its edge.
    """
    chosen = np.array(problem.free)
    units = jnp.asarray(_UNITS, state.x.dtype)[chosen]
    axes = problem.model.axes
    low = jnp.array([*(axis[0] for axis in axes), -jnp.inf, 0.0], state.x.dtype)[None, chosen]
    high = jnp.array([*(axis[-1] for axis in axes), jnp.inf, BROADENING_NODES[-1]], state.x.dtype)[None, chosen]
    here, eye = state.x[:, chosen], jnp.eye(len(chosen), dtype=state.x.dtype)[None]
    gradient = state.gram[:, : len(chosen), len(chosen)]
    move = ~((here <= low) & (gradient < 0)) & ~((here >= high) & (gradient > 0))
    normal = state.normal * (move[:, :, None] & move[:, None, :])
    diagonal = jnp.where(move, (1.0 + state.damping[:, None]) * jnp.einsum("nii->ni", normal) + 1e-12, 1.0)
    normal = normal * (1.0 - eye) + diagonal[:, :, None] * eye
    gradient = jnp.where(move, gradient, 0.0)
    moved = _solve_small(normal, gradient[..., None])[..., 0]
    trial = jnp.clip(here + moved * units[None, :], low, high)
    return state.x.at[:, chosen].set(trial), jnp.sum(moved * gradient, axis=1)


class _Progress(NamedTuple):
    """Of n stars."""

    state: _State
    place: jax.Array  # (n, 6), where the next step leads
    gain: jax.Array  # (n,), by how much it should lower chi2
    n_steps: jax.Array  # (n,)
    active: jax.Array  # (n,) whether the star goes on


def _solve(
    problem: _Problem, x: jax.Array, data: _Data, weight: jax.Array, max_steps: int, tolerance: float
) -> tuple[_State, jax.Array]:
    """Levenberg-Marquardt, masking of the pixels that stand out, and Levenberg-Marquardt again.

    Either stops where a star does not expect to lower its chi2 by more than the tolerance times chi2. A star whose weights have
    changed has an infinite chi2, which makes it stay where it is and be evaluated again. Stars need different numbers of steps:
    each step is one of the first ``_AT_ONCE`` stars that still go on.

    Returns:
        The state, and the weights that it belongs to.
    """
    n, f, k = len(x), len(problem.free), problem.n_continuum
    n_at_once = min(_AT_ONCE, n)

    def iterate(progress: _Progress, weight: jax.Array) -> _Progress:
        chosen = jnp.argsort(~progress.active)[:n_at_once]  # a stable sort
        old = jax.tree.map(lambda leaf: leaf[chosen], progress)
        per_star = {name: array[chosen] for name, array in data._asdict().items() if name != "drift"}
        new = advance(old, data._replace(**per_star | {"weight": weight[chosen]}))

        def put(whole: jax.Array, old: jax.Array, new: jax.Array) -> jax.Array:
            rows = progress.active[chosen].reshape(-1, *[1] * (old.ndim - 1))
            return whole.at[chosen].set(jnp.where(rows, new, old), mode="promise_in_bounds", unique_indices=True)

        moved: _Progress = jax.tree.map(put, progress, old, new)
        return moved

    def advance(old: _Progress, stars: _Data) -> _Progress:
        """One step of some stars."""
        state = old.state
        fresh = jnp.isinf(state.chi2)
        new = _evaluate(problem, jnp.where(fresh[:, None], state.x, old.place), stars)
        better = fresh | ((new.chi2 <= state.chi2 * (1.0 + _ROUNDING)) & (old.gain > tolerance * state.chi2))
        damping = jnp.where(better, 0.1 * state.damping, jnp.maximum(10.0 * state.damping, 1e-3))
        state = jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state)
        state = state._replace(damping=damping)
        place, gain = _step(problem, state)
        n_steps = old.n_steps + 1
        return _Progress(state, place, gain, n_steps, (n_steps <= max_steps) & (gain > tolerance * state.chi2))

    def go_on(i: Any, carry: tuple[_Progress, jax.Array]) -> tuple[_Progress, jax.Array]:
        """Steps with all pixels; then, where pixels stand out or the star still moves, with the others."""
        progress, weight = carry
        state = progress.state
        masked = lax.cond(i > 0, lambda: _mask(data, state.flux, data.flux.shape[1] // _N_BLOCKS), lambda: weight)
        changed = jnp.any(masked != weight, axis=1) | (i == 0)
        active = changed | (progress.gain > tolerance * state.chi2)
        state = state._replace(chi2=jnp.where(changed, jnp.inf, state.chi2))
        start = progress._replace(state=state, active=active, n_steps=jnp.zeros(n, jnp.int32))
        end = lax.while_loop(lambda progress: jnp.any(progress.active), lambda progress: iterate(progress, masked), start)
        return end, masked

    zeros = functools.partial(jnp.zeros, dtype=x.dtype)
    state = _State(
        x=x,
        chi2=jnp.full(n, jnp.inf, x.dtype),
        normal=zeros((n, f, f)),
        gram=zeros((n, f + 3, f + 3)),
        cross=zeros((n, f + 3, k + 1)),
        inner=zeros((n, k + 1, k + 1)),
        continuum=zeros((n, k)),
        constant=zeros(n),
        flux=zeros(data.flux.shape),
        damping=jnp.full(n, _DAMPING, x.dtype),
    )
    start = _Progress(state, x, zeros(n), jnp.zeros(n, jnp.int32), jnp.ones(n, bool))
    progress, weight = lax.fori_loop(0, 2, go_on, (start, weight))
    return progress.state, weight


def _mask(data: _Data, model_flux: jax.Array, block: int) -> jax.Array:
    """Weights without the pixels that stand out, alone, as the sum of two neighbouring blocks, or as a quarter of these.

    The limits are in units of the standard deviation of a good spectrum, or of the typical residual of a bad one.
    """
    residual = (data.flux - model_flux) * jnp.sqrt(data.weight)
    size = jnp.abs(residual)
    used = jnp.sum(data.weight > 0, axis=1)
    scale = jnp.maximum(_positive_median(size, used) / 0.6745, 1.0)[:, None]
    out = size > _OUTLIER * scale
    beside = jnp.pad(out, ((0, 0), (1, 1)))
    out = out | ((beside[:, :-2] | beside[:, 2:]) & (size > _OUTLIER_NEIGHBOUR * scale))

    blocks = (len(residual), -1, block)
    sums = jnp.sum(jnp.where(out, 0.0, residual).reshape(blocks), axis=2)
    pairs = jnp.abs(sums[:, 1:] + sums[:, :-1]) / np.sqrt(2.0 * block)
    scale = jnp.maximum(_positive_median(pairs, jnp.sum(pairs > 0, axis=1)) / 0.6745, 1.0)[:, None]
    n_out = jnp.sum(out.reshape(blocks), axis=2)
    far = (pairs > _OUTLIER * scale) | (n_out[:, 1:] + n_out[:, :-1] > block / 2)
    far = jnp.pad(far, ((0, 0), (1, 1)))
    return jnp.where(out | jnp.repeat(far[:, 1:] | far[:, :-1], block, axis=1), 0.0, data.weight)


def _positive_median(x: jax.Array, n_positive: jax.Array) -> jax.Array:
    """Median of the numbers of each row that are not 0, to a per cent: by bisection of their logarithm."""

    def halve(_: Any, bounds: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        low, high = bounds
        middle = jnp.sqrt(low * high)
        above = 2 * jnp.sum(x > middle[:, None], axis=1) > n_positive
        return jnp.where(above, middle, low), jnp.where(above, high, middle)

    low, high = lax.fori_loop(0, 10, halve, (jnp.full(len(x), 1e-2, x.dtype), jnp.full(len(x), 1e4, x.dtype)))
    return jnp.sqrt(low * high)


def _report(
    problem: _Problem,
    state: _State,
    data: _Data,
    usable: jax.Array,
    contrast: jax.Array,
    n_masked: jax.Array,
    blend_gain: jax.Array,
) -> LabelFit:
    free, axes = problem.free, problem.model.axes
    n_pixels = data.flux.shape[1]
    used = data.weight > 0
    units = jnp.asarray(_UNITS, state.x.dtype)[np.array(free)]
    eye = jnp.broadcast_to(jnp.eye(len(free), dtype=units.dtype), state.normal.shape)
    covariance = _solve_small(state.normal + 1e-12 * eye, eye) * units[None, :, None] * units[None, None, :]
    low, high = (jnp.array([axis[i] for axis in axes], state.x.dtype) for i in (0, -1))
    # A last step, which is too small to be tried.
    last, gain = _step(problem, state)
    converged = gain <= 3.0 * _TOLERANCE * state.chi2
    x = jnp.where(converged[:, None], last, state.x)
    labels = x[:, :4]
    # From pixels of the model back to observed ones.
    wave = jnp.asarray(WAVE - WAVE[0], data.flux.dtype)
    stretch = (data.velocity / LIGHT_SPEED)[:, None]
    place = jnp.round((wave[None, :] - stretch * float(WAVE[0])) / (1.0 + stretch) / _PIXEL).astype(jnp.int32)
    inside = (place >= 0) & (place < n_pixels)
    place = jnp.clip(place, 0, n_pixels - 1)
    good, flux = _pixels(place, used, state.flux)
    return LabelFit(
        labels,
        covariance[:, :4, :4],
        x[:, 4],
        jnp.sqrt(covariance[:, 4, 4]) if 4 in free else jnp.zeros(len(x)),
        contrast,
        jnp.sqrt(x[:, 5]) * GRID_WIDTH,
        state.chi2 / jnp.maximum(jnp.sum(used, axis=1) - len(free) - problem.n_continuum - data.additive, 1),
        n_masked,
        converged,
        (labels <= low[None]) | (labels >= high[None]),
        state.continuum,
        state.constant,
        good & inside & usable,
        flux,
        *_rare(state, data),
        blend_gain,
    )


def _rare(state: _State, data: _Data) -> tuple[jax.Array, jax.Array, jax.Array]:
    """What the residuals say of a constant and of a stretch of the wavelengths: a linear step along both, a score test.

    Whatever the parameters of the fit can imitate does not count. The fit has eliminated the polynomial. Its ridge leaves the
    residuals not quite orthogonal to the polynomial.

    Returns:
        ``rare``, ``rare_error`` and ``rare_slope`` of ``LabelFit``.
    """
    f, gram = state.normal.shape[1], state.gram
    solved = _solve_small(_with_ridge(state.inner), jnp.swapaxes(state.cross[:, f:], 1, 2))
    eliminated = gram - jnp.einsum("nij,njk->nik", state.cross, jnp.pad(solved, ((0, 0), (0, 0), (f, 0))))
    gradient, cross = eliminated[:, :f, f], eliminated[:, :f, f + 1 :]
    slope = _solve_small(_with_ridge(state.normal), cross)
    power = jnp.stack([gram[:, i, i] for i in (f + 1, f + 2)], axis=1)
    information = jnp.stack([eliminated[:, i, i] for i in (f + 1, f + 2)], axis=1) - jnp.einsum("nik,nik->nk", slope, cross)
    rare_error = 1.0 / jnp.sqrt(jnp.maximum(information, 1e-6 * power + 1e-30))  # float32 knows no smaller part
    score = eliminated[:, f, f + 1 :] - jnp.einsum("nik,ni->nk", slope, gradient)
    unknown = jnp.stack([1.0 - data.additive, jnp.ones_like(data.additive)], axis=1)  # a constant that was fitted is not rare
    rare = score * jnp.square(rare_error) * unknown
    return rare, rare_error, -jnp.swapaxes(slope[:, :4], 1, 2) * jnp.asarray(_UNITS[:4], rare.dtype)[None, None]


def _blend_gain(problem: _Problem, state: _State, data: _Data, smooth: jax.Array) -> jax.Array:
    """By how much the light of a second star would lower chi2: score tests of all templates of the search for the velocity.

    A second star is a template in place of a part of the first one, on coarse pixels: the two differ by smooth * template + rest.
    Whatever the parameters of the fit can imitate does not count. ``smooth`` is the continuum of the spectra on coarse pixels.
    """
    residual = rebin(data.weight * (data.flux - state.flux))
    data = _coarse_data(data)
    point = _point(_rows(state.x, problem.model), state.x, data, problem.model.coarse)
    terms = chebyshev_terms(smooth.shape[1], problem.n_continuum)
    total, polynomial = data.weight, matmul(state.continuum, terms)
    fitted = _free(_derivatives(point, total * polynomial, data), problem)
    rows = jnp.concatenate([(total * point.spectrum)[:, None] * terms[None], fitted, residual[:, None]], axis=1)
    mean = 1.0 / jnp.where(total > 0, total, 1.0)
    templates = jnp.asarray(problem.model.shifted)[len(problem.model.velocities) // 2]
    rest = smooth - polynomial * point.spectrum
    products = matmul((rows * smooth[:, None]).reshape(-1, smooth.shape[1]), templates.T).reshape(*rows.shape[:2], -1)
    products = products + jnp.einsum("nip,np->ni", rows, rest)[..., None]
    overlap, score = products[:, :-1], products[:, -1]
    gram = jnp.einsum("nip,njp->nij", rows[:, :-1] * mean[:, None], rows)
    solved = _solve_small(_with_ridge(gram[..., :-1]), overlap)
    score = score - jnp.einsum("nit,ni->nt", solved, gram[..., -1])
    power = matmul(total * jnp.square(smooth), jnp.square(templates).T) + 2.0 * matmul(total * smooth * rest, templates.T)
    power = power + jnp.sum(total * jnp.square(rest), axis=1)[:, None]
    information = jnp.maximum(power - jnp.einsum("nit,nit->nt", overlap, solved), 1e-3 * power)
    return jnp.max(jnp.square(jnp.maximum(score, 0.0)) / information, axis=1)


def _with_ridge(normal: jax.Array) -> jax.Array:
    """Normal equations (n, k, k) with a ridge that keeps them from being singular."""
    return normal * (1.0 + 1e-6 * jnp.eye(normal.shape[1], dtype=normal.dtype)[None])
