"""Steps of the fit: damped Gauss-Newton (Levenberg-Marquardt) with the polynomial solved exactly, and masking between.

The polynomial is linear, so it is solved at every step (variable projection: Golub & Pereyra 1973; the Jacobian leaves out its
derivative, Kaufman 1975).
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from moe_jax.core.arrays import matmul
from moe_jax.core.cholesky import solve_small
from moe_jax.spectra.label_model import BROADENING_NODES, LabelModel, PixelModel, calcium_cores, chebyshev_terms
from moe_jax.spectra.label_point import UNITS, Stars, derivatives_at, model_point, model_rows

_AT_ONCE = 8  # stars of a block that make a step together
_DAMPING = 1e-2  # of the first step
_ROUNDING = 3e-7  # relative, of chi2
_OUTLIER = 5.5  # residual, in standard deviations, at which a pixel is masked
_OUTLIER_NEIGHBOUR = 3.0  # the same beside a masked pixel
_N_BLOCKS = 256  # of pixels, whose sums are looked at too


class Problem(NamedTuple):
    """What does not change during a fit."""

    model: LabelModel
    pixels: PixelModel
    free: tuple[int, ...]  # parameters that are fitted
    n_continuum: int


class State(NamedTuple):
    """The best fit so far of n stars, and what a step from it needs."""

    x: jax.Array  # (n, 6)
    chi2: jax.Array  # (n,)
    products: jax.Array  # (n, f + 4, f + 4) of the derivatives, the residual, and the rare three, without the polynomial's part
    continuum: jax.Array  # (n, K)
    constant: jax.Array  # (n,)
    flux: jax.Array  # (n, P) the model
    damping: jax.Array  # (n,)


def _evaluate(problem: Problem, x: jax.Array, data: Stars) -> State:
    """The state at x.

    The constant is solved after the polynomial, as a spectrum less its own best polynomial: the two look much alike, and float32
    would not tell them apart in normal equations of both.
    """
    point = model_point(model_rows(x, problem.model), x, data, problem.pixels)
    (n, n_pixels), f, k = data.flux.shape, len(problem.free), problem.n_continuum
    order = np.arange(k)
    terms = jnp.asarray(chebyshev_terms(n_pixels, 2 * k - 1), x.dtype)
    root = jnp.sqrt(data.weight)
    flux, spectrum = root * data.flux, root * point.spectrum  # in units of the errors
    moments, *right = (matmul(spectrum * other, terms.T) for other in (spectrum, flux, root))
    # Products of Chebyshev polynomials are sums of two others: 2 T_j T_k = T_(j + k) + T_|j - k|.
    inner = 0.5 * (moments[:, order[:, None] + order[None]] + moments[:, np.abs(order[:, None] - order[None])])
    # To solve is more precise than to invert, where the good pixels cover a part of the range.
    normal = inner + 1e-6 * jnp.einsum("nii->n", inner)[:, None, None] * jnp.eye(k, dtype=inner.dtype)[None]
    coef, constant_coef = jnp.moveaxis(solve_small(normal, jnp.stack([each[:, :k] for each in right], axis=2)), 2, 0)
    residual, rest = (each - matmul(its, terms[:k]) * spectrum for each, its in ((flux, coef), (root, constant_coef)))
    least = 1e-9 * jnp.sum(data.weight, axis=1) + 1e-30  # of the constant's own part; float32 knows no smaller one
    constant = data.additive * jnp.sum(residual * rest, axis=1) / jnp.maximum(jnp.sum(jnp.square(rest), axis=1), least)
    residual = residual - constant[:, None] * rest
    coef = coef - constant[:, None] * constant_coef
    polynomial = matmul(coef, terms[:k])
    derivatives = derivatives_at(point, root * polynomial, data)
    stretch = derivatives[:, 4] * jnp.linspace(-1.0, 1.0, n_pixels, dtype=x.dtype)[None]
    emission = root * jnp.asarray(calcium_cores(n_pixels), x.dtype)[None]
    rows = jnp.concatenate([free_rows(derivatives, problem), jnp.stack([residual, rest, stretch, emission], axis=1)], axis=1)
    products = jnp.einsum("nip,njp->nij", rows, rows)
    chi2 = products[:, f, f]
    cross = matmul((rows * spectrum[:, None]).reshape(-1, n_pixels), terms[:k].T).reshape(n, f + 4, k)
    products = products - jnp.einsum("nik,nkj->nij", cross, solve_small(normal, jnp.swapaxes(cross, 1, 2)))
    along = products[:, f + 1] * (data.additive / jnp.maximum(products[:, f + 1, f + 1], least))[:, None]
    products = products - along[:, :, None] * products[:, f + 1, None]
    model_flux = polynomial * point.spectrum + constant[:, None]
    return State(x, chi2, products, coef, constant, model_flux, jnp.full(n, _DAMPING, x.dtype))


def free_rows(derivatives: jax.Array, problem: Problem) -> jax.Array:
    """Those of the parameters that are fitted."""
    return derivatives if len(problem.free) == 6 else derivatives[:, np.array(problem.free)]


def next_place(problem: Problem, state: State) -> tuple[jax.Array, jax.Array]:
    """Where the next step leads, and by how much it should lower chi2.

    A parameter that would leave the box of the grid is held at its edge.
    """
    chosen = np.array(problem.free)
    units = jnp.asarray(UNITS, state.x.dtype)[chosen]
    axes = problem.model.axes
    low = jnp.array([*(axis[0] for axis in axes), -jnp.inf, 0.0], state.x.dtype)[None, chosen]
    high = jnp.array([*(axis[-1] for axis in axes), jnp.inf, BROADENING_NODES[-1]], state.x.dtype)[None, chosen]
    here, eye = state.x[:, chosen], jnp.eye(len(chosen), dtype=state.x.dtype)[None]
    f = len(chosen)
    gradient = state.products[:, :f, f]
    move = ~((here <= low) & (gradient < 0)) & ~((here >= high) & (gradient > 0))
    normal = state.products[:, :f, :f] * (move[:, :, None] & move[:, None, :])
    diagonal = jnp.where(move, (1.0 + state.damping[:, None]) * jnp.einsum("nii->ni", normal) + 1e-12, 1.0)
    normal = normal * (1.0 - eye) + diagonal[:, :, None] * eye
    gradient = jnp.where(move, gradient, 0.0)
    moved = solve_small(normal, gradient[..., None])[..., 0]
    trial = jnp.clip(here + moved * units[None, :], low, high)
    return state.x.at[:, chosen].set(trial), jnp.sum(moved * gradient, axis=1)


class _Progress(NamedTuple):
    """Of n stars."""

    state: State
    place: jax.Array  # (n, 6), where the next step leads
    gain: jax.Array  # (n,), by how much it should lower chi2
    n_steps: jax.Array  # (n,)
    active: jax.Array  # (n,) whether the star goes on


def solve(
    problem: Problem, x: jax.Array, data: Stars, weight: jax.Array, max_steps: int, tolerance: float
) -> tuple[State, jax.Array]:
    """Levenberg-Marquardt, masking of the pixels that stand out, and Levenberg-Marquardt again.

    Either stops where a star does not expect to lower its chi2 by more than the tolerance times chi2. A star whose weights have
    changed has an infinite chi2, which makes it stay where it is and be evaluated again. That of a star without weights stays
    infinite. Stars need different numbers of steps: each step is one of the first ``_AT_ONCE`` stars that still go on.

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

    def advance(old: _Progress, stars: Stars) -> _Progress:
        """One step of some stars."""
        state = old.state
        fresh = jnp.isinf(state.chi2)
        new = _evaluate(problem, jnp.where(fresh[:, None], state.x, old.place), stars)
        better = fresh | ((new.chi2 <= state.chi2 * (1.0 + _ROUNDING)) & (old.gain > tolerance * state.chi2))
        damping = jnp.where(better, 0.1 * state.damping, jnp.maximum(10.0 * state.damping, 1e-3))
        state = jax.tree.map(lambda a, b: jnp.where(better.reshape(-1, *[1] * (a.ndim - 1)), a, b), new, state)
        state = state._replace(damping=damping)
        place, gain = next_place(problem, state)
        n_steps = old.n_steps + 1
        return _Progress(state, place, gain, n_steps, (n_steps <= max_steps) & (gain > tolerance * state.chi2))

    def go_on(i: Any, carry: tuple[_Progress, jax.Array]) -> tuple[_Progress, jax.Array]:
        """Steps with all pixels; then, where pixels stand out or the star still moves, with the others."""
        progress, weight = carry
        state = progress.state
        masked = lax.cond(i > 0, lambda: _mask(data, state.flux, data.flux.shape[1] // _N_BLOCKS), lambda: weight)
        changed = jnp.any(masked != weight, axis=1) | (i == 0)
        active = (changed | (progress.gain > tolerance * state.chi2)) & jnp.any(masked > 0, axis=1)
        state = state._replace(chi2=jnp.where(changed, jnp.inf, state.chi2))
        start = progress._replace(state=state, active=active, n_steps=jnp.zeros(n, jnp.int32))
        end = lax.while_loop(lambda progress: jnp.any(progress.active), lambda progress: iterate(progress, masked), start)
        return end, masked

    zeros = functools.partial(jnp.zeros, dtype=x.dtype)
    state = State(
        x=x,
        chi2=jnp.full(n, jnp.inf, x.dtype),
        products=zeros((n, f + 4, f + 4)),
        continuum=zeros((n, k)),
        constant=zeros(n),
        flux=zeros(data.flux.shape),
        damping=jnp.full(n, _DAMPING, x.dtype),
    )
    start = _Progress(state, x, zeros(n), jnp.zeros(n, jnp.int32), jnp.ones(n, bool))
    progress, weight = lax.fori_loop(0, 2, go_on, (start, weight))
    return progress.state, weight


def _mask(data: Stars, model_flux: jax.Array, block: int) -> jax.Array:
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
