"""Fits the model grid to spectra as observed: labels, velocity, broadening and continuum of every star, by least squares.

The model of a spectrum is norm(labels, broadening) * exp(log_continuum(labels)), shifted by the radial velocity and multiplied by a
polynomial in wavelength. A fit goes from coarse to fine. ``label_start`` searches over velocities and over the nodes of the grid.
``label_steps`` makes steps on pixels that are four times as wide, and then on all pixels; those that stand out of the residuals are
masked between these. ``label_point`` has the model and its derivatives, ``label_model`` prepares the grid.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError, matmul, require_whole, to_host
from moe_jax.core.cholesky import solve_small
from moe_jax.core.convert import convert_arguments
from moe_jax.core.kept import call_kept
from moe_jax.core.parallel import devices_for, map_devices, on_all
from moe_jax.spectra.label_model import (
    GRID_WIDTH,
    LIGHT_SPEED,
    MAX_VELOCITY,
    REBIN,
    LabelModel,
    chebyshev_terms,
    default_model,
    rebin,
)
from moe_jax.spectra.label_point import (
    PIXEL,
    UNITS,
    Stars,
    at_rest,
    coarse_stars,
    coarsen,
    derivatives_at,
    model_point,
    model_rows,
    take_pixels,
)
from moe_jax.spectra.label_start import best_apart, find_velocity, flatten, nearest_node, smooth_continuum, velocity_gains
from moe_jax.spectra.label_steps import Problem, State, free_rows, next_place, solve
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.simulate import median_rows

N_CONTINUUM = 9  #: terms of the continuum's polynomial
_LEAST_PIXELS = 50  # of a star that is fitted
_BLOCK = 64  # stars that are prepared together
_COARSE_STEPS, _FINE_STEPS = 6, 8  # at most, before and after masking
_COARSE_TOLERANCE, _TOLERANCE = 1e-3, 5e-5  # expected relative decrease of chi2 at which a fit has converged


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
    rare: Float[AnyArray, "N 3"]  #: of a constant, a stretch (km/s at the red end) and calcium emission: what a linear step finds
    rare_error: Float[AnyArray, "N 3"]  #: their standard deviations
    rare_slope: Float[AnyArray, "N 3 4"]  #: by how much the labels change with them
    rare_correlation: Float[AnyArray, "N 3 3"]  #: of what they do to the spectrum, apart from what the fit can imitate
    blend_gain: Float[AnyArray, " N"]  #: by how much the light of a second star would lower chi2
    second_gain: Float[AnyArray, " N"]  #: the same of one at another velocity


@convert_arguments()
def fit_labels(
    flux: Float[AnyArray, "N P"],
    error: Float[AnyArray, "N P"],
    good: Bool[AnyArray, "N P"] | None = None,
    *,
    velocity: Float[AnyArray, " N"] | None = None,
    n_continuum: int = N_CONTINUUM,
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
    if flux.shape[1] != len(WAVE):
        raise InputError(f"flux has shape {flux.shape}, expected (N, {len(WAVE)}) on the pixels of the model grid")
    known = np.zeros(len(flux), flux.dtype) if velocity is None else np.asarray(velocity, flux.dtype)
    constant = np.broadcast_to(np.asarray(additive, flux.dtype), len(flux))
    free = (0, 1, 2, 3, *([4] if velocity is None else []), *([5] if broadening else []))
    devices = devices_for(_BLOCK)  # also for a single star, so that one program serves all numbers of stars
    axes = tuple(tuple(map(float, axis)) for axis in model.axes)
    arrays = on_all(tuple(model[1:]), devices)
    fits = []
    for start in range(0, len(flux), _BLOCK * len(devices)):
        # The last star fills the last blocks, without a good pixel, so that no steps are made for it.
        places = np.arange(start, start + _BLOCK * len(devices))
        rows = np.minimum(places, len(flux) - 1)
        usable = good[rows] & (places < len(flux))[:, None]
        given = (flux[rows], error[rows], usable, known[rows], constant[rows])
        blocks = tuple(array.reshape(len(devices), _BLOCK, *array.shape[1:]) for array in given)
        shared = on_all(blocks, devices), arrays
        static = {"axes": axes, "free": free, "n_continuum": n_continuum, "devices": devices}
        fits.append(call_kept(_fit_blocks, *shared, results=[LabelFit], **static))
    leaves = (np.concatenate(parts).reshape(-1, *parts[0].shape[2:])[: len(flux)] for parts in zip(*fits, strict=True))
    return _without_unknown(LabelFit(*leaves), np.asarray(flux), np.asarray(error), np.asarray(good))


def _without_unknown(fit: LabelFit, flux: np.ndarray, error: np.ndarray, good: np.ndarray) -> LabelFit:
    """The fits, with NaN for stars of which nothing is known."""
    light = good & np.isfinite(flux) & np.isfinite(error) & (error > 0) & (flux != 0)
    unknown = (light.sum(axis=1) < _LEAST_PIXELS) | ~np.isfinite(fit.chi2) | ~np.isfinite(fit.labels).all(axis=1)
    for leaf in fit:
        if leaf.dtype.kind in "bf":
            leaf[unknown] = False if leaf.dtype == bool else np.nan
    return fit._replace(converged=fit.converged & (np.abs(fit.velocity) <= 1.1 * MAX_VELOCITY))


@functools.partial(jax.jit, static_argnames=("axes", "free", "n_continuum", "devices"))
def _fit_blocks(blocks: Any, arrays: Any, axes: Any, free: tuple[int, ...], n_continuum: int, devices: Any) -> LabelFit:
    def fit(block: Any, arrays: Any) -> LabelFit:
        model = LabelModel(axes, *arrays)
        flux, error, good, known, additive = block
        return _fit_block(flux, error, good, known, additive, Problem(model, model.coarse, free, n_continuum))

    return map_devices(fit, blocks, arrays, devices)


def _fit_block(
    flux: jax.Array, error: jax.Array, good: jax.Array, known: jax.Array, additive: jax.Array, problem: Problem
) -> LabelFit:
    model, free = problem.model, problem.free
    usable = good & (error > 0) & jnp.isfinite(error) & jnp.isfinite(flux)
    flux = jnp.where(usable, flux, 0.0)
    # In units of the typical flux, so that float32 holds any unit of the file.
    scale = median_rows(flux[:, ::8])[:, None]
    scale = jnp.where(scale > 0, scale, 1.0)
    flux = flux / scale
    given = jnp.where(usable, 1.0 / jnp.square(jnp.where(usable, error, 1.0) / scale), 0.0)
    # Light that no star has: far above the spectrum or below 0.
    beyond = jnp.maximum(jnp.maximum(flux - 3.0, -flux), 0.0)
    observed = jnp.where(given * jnp.square(beyond) > 64.0, 0.0, given)
    smooth = smooth_continuum(*coarsen(flux, observed))
    velocity, contrast = known, jnp.full(len(flux), jnp.inf)
    if 4 in free:
        velocity, contrast = find_velocity(*flatten(flux, observed, smooth), model)
    data = at_rest(flux, observed, velocity, additive)
    flat, flat_weight = flatten(data.flux, data.weight, smooth)
    start = nearest_node(flat, flat_weight, model)
    x = jnp.concatenate([start, velocity[:, None], jnp.full((len(start), 1), 0.3 if 5 in free else 0.0)], axis=1)
    coarse = coarse_stars(data)
    state, kept = solve(problem, x, coarse, jnp.where(flat_weight > 0, coarse.weight, 0.0), _COARSE_STEPS, _COARSE_TOLERANCE)
    velocity = state.x[:, 4]
    data = at_rest(flux, observed, velocity, additive)
    problem = problem._replace(pixels=model.fine)
    kept = jnp.where(jnp.repeat(kept > 0, REBIN, axis=1), data.weight, 0.0)
    state, weight = solve(problem, state.x, data, kept, _FINE_STEPS, _TOLERANCE)
    n_masked = jnp.sum(usable & (observed == 0), axis=1) + jnp.sum((data.weight > 0) & (weight == 0), axis=1)
    data = data._replace(weight=weight)
    fit = _report(problem, state, data, flux, given, contrast, n_masked, smooth)
    unit = jnp.concatenate([scale, jnp.ones_like(scale), scale], axis=1)  # of a constant, a stretch, and emission
    return fit._replace(
        continuum=fit.continuum * scale,
        constant=fit.constant * scale[:, 0],
        flux=fit.flux * scale,
        rare=fit.rare * unit,
        rare_error=fit.rare_error * unit,
        rare_slope=fit.rare_slope / unit[..., None],
    )


def _report(
    problem: Problem,
    state: State,
    data: Stars,
    flux: jax.Array,
    given: jax.Array,
    contrast: jax.Array,
    n_masked: jax.Array,
    smooth: jax.Array,
) -> LabelFit:
    """The fits. ``flux`` and their weights ``given`` are as observed, ``smooth`` is their continuum on coarse pixels."""
    free, axes = problem.free, problem.model.axes
    n_pixels = data.flux.shape[1]
    used = data.weight > 0
    units = jnp.asarray(UNITS, state.x.dtype)[np.array(free)]
    normal = state.products[:, : len(free), : len(free)]
    eye = jnp.broadcast_to(jnp.eye(len(free), dtype=units.dtype), normal.shape)
    covariance = solve_small(normal + 1e-12 * eye, eye) * units[None, :, None] * units[None, None, :]
    low, high = (jnp.array([axis[i] for axis in axes], state.x.dtype) for i in (0, -1))
    # A last step, which is too small to be tried.
    last, gain = next_place(problem, state)
    converged = gain <= 3.0 * _TOLERANCE * state.chi2
    x = jnp.where(converged[:, None], last, state.x)
    labels = x[:, :4]
    # From pixels of the model back to observed ones.
    wave = jnp.asarray(WAVE - WAVE[0], data.flux.dtype)
    stretch = (data.velocity / LIGHT_SPEED)[:, None]
    place = jnp.round((wave[None, :] - stretch * float(WAVE[0])) / (1.0 + stretch) / PIXEL).astype(jnp.int32)
    inside = (place >= 0) & (place < n_pixels)
    place = jnp.clip(place, 0, n_pixels - 1)
    good, model_flux = take_pixels(place, used, state.flux)
    good = good & inside & (given > 0)
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
        good,
        model_flux,
        *_rare(state.products, data.additive),
        _blend_gain(problem, state, data, smooth),
        _second_gain(problem.model, x[:, 4], flux - model_flux, jnp.where(good, given, 0.0), smooth),
    )


def _rare(products: jax.Array, additive: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """What the residuals say of a constant, a stretch of the wavelengths, and emission: a linear step along each, a score test.

    Whatever the parameters of the fit can imitate does not count.

    Args:
        products: those of the state.
        additive: that of the spectra.

    Returns:
        ``rare``, ``rare_error``, ``rare_slope`` and ``rare_correlation`` of ``LabelFit``.
    """
    f = products.shape[1] - 4
    gradient, cross = products[:, :f, f], products[:, :f, f + 1 :]
    slope = solve_small(_with_ridge(products[:, :f, :f]), cross)
    joint = products[:, f + 1 :, f + 1 :] - jnp.einsum("nik,nij->nkj", slope, cross)
    power, information = (jnp.einsum("nkk->nk", each) for each in (products[:, f + 1 :, f + 1 :], joint))
    rare_error = 1.0 / jnp.sqrt(jnp.maximum(jnp.maximum(information, 1e-6 * power), 1e-10))  # float32 knows no smaller part
    score = products[:, f, f + 1 :] - jnp.einsum("nik,ni->nk", slope, gradient)
    one = jnp.ones_like(additive)
    unknown = jnp.stack([one - additive, one, one], axis=1)  # a constant that was fitted is not rare
    rare = score * jnp.square(rare_error) * unknown
    scale = rare_error * unknown
    correlation = joint * scale[:, :, None] * scale[:, None, :]
    return rare, rare_error, -jnp.swapaxes(slope[:, :4], 1, 2) * jnp.asarray(UNITS[:4], rare.dtype)[None, None], correlation


def _blend_gain(problem: Problem, state: State, data: Stars, smooth: jax.Array) -> jax.Array:
    """By how much the light of a second star would lower chi2: score tests of all templates of the search for the velocity.

    A second star is a template in place of a part of the first one, on coarse pixels: the two differ by smooth * template + rest.
    Whatever the parameters of the fit can imitate does not count. ``smooth`` is the continuum of the spectra on coarse pixels.
    """
    residual = rebin(data.weight * (data.flux - state.flux))
    data = coarse_stars(data)
    point = model_point(model_rows(state.x, problem.model), state.x, data, problem.model.coarse)
    terms = chebyshev_terms(smooth.shape[1], problem.n_continuum)
    total, polynomial = data.weight, matmul(state.continuum, terms)
    fitted = free_rows(derivatives_at(point, total * polynomial, data), problem)
    rows = jnp.concatenate([(total * point.spectrum)[:, None] * terms[None], fitted, residual[:, None]], axis=1)
    mean = 1.0 / jnp.where(total > 0, total, 1.0)
    templates = jnp.asarray(problem.model.shifted)[len(problem.model.velocities) // 2]
    rest = smooth - polynomial * point.spectrum
    products = matmul((rows * smooth[:, None]).reshape(-1, smooth.shape[1]), templates.T).reshape(*rows.shape[:2], -1)
    products = products + jnp.einsum("nip,np->ni", rows, rest)[..., None]
    overlap, score = products[:, :-1], products[:, -1]
    gram = jnp.einsum("nip,njp->nij", rows[:, :-1] * mean[:, None], rows)
    solved = solve_small(_with_ridge(gram[..., :-1]), overlap)
    score = score - jnp.einsum("nit,ni->nt", solved, gram[..., -1])
    power = matmul(total * jnp.square(smooth), jnp.square(templates).T) + 2.0 * matmul(total * smooth * rest, templates.T)
    power = power + jnp.sum(total * jnp.square(rest), axis=1)[:, None]
    information = jnp.maximum(power - jnp.einsum("nit,nit->nt", overlap, solved), 1e-3 * power)
    return jnp.max(jnp.square(jnp.maximum(score, 0.0)) / information, axis=1)


def _second_gain(model: LabelModel, velocity: jax.Array, residual: jax.Array, weight: jax.Array, smooth: jax.Array) -> jax.Array:
    """By how much the lines of a second star at another velocity would lower chi2.

    The residuals are compared with the templates of the search for the velocity. The labels cannot imitate lines at another
    velocity, so they are held.
    """
    gain = velocity_gains(rebin(weight * residual) * smooth, rebin(weight) * jnp.square(smooth), model)
    return best_apart(gain, velocity, model)


def _with_ridge(normal: jax.Array) -> jax.Array:
    """Normal equations (n, k, k) with a ridge that keeps them from being singular."""
    eye = jnp.eye(normal.shape[1], dtype=normal.dtype)[None]
    return normal * (1.0 + 1e-6 * eye) + 1e-12 * eye
