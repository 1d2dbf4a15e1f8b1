"""Confidence intervals from bootstrap resamples: percentile, basic, BCa, studentized, symmetric, and simultaneous by max-t.

Each takes a ``Resampled``, which holds for C statistics at once what the methods need. Acceleration and standard errors come
from the influence function, so no jackknife and no second level of resampling is run. When each fails:

- Percentile and basic intervals are too short for small or skewed samples of stars.
- BCa reads quantiles further out, so it needs more resamples.
- Studentized intervals grow long if the standard error of a resample may be near 0.
- All are too short where a few stars of the population carry most of a difference and most samples hold none of them. See
  ``borrow_spread``.
"""

from __future__ import annotations

import functools
from typing import Literal, NamedTuple, get_args

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import ndtr, ndtri
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, InputError

IntervalMethod = Literal["percentile", "basic", "bca", "studentized", "symmetric"]
METHODS: tuple[IntervalMethod, ...] = get_args(IntervalMethod)
LEAST_TO_SORT_PARTLY = 100  # with fewer samples, a whole sort is as fast


class Resampled(NamedTuple):
    """C statistics on the stars and on B resamples of them; NaN where one is not defined."""

    estimate: Float[jax.Array, " C"]  #: on the stars as they are
    standard_error: Float[jax.Array, " C"]  #: by the influence function
    acceleration: Float[jax.Array, " C"]  #: sum(I^3) / (6 sum(I^2)^1.5) of the influences I (Efron 1987, eq. 6.6)
    samples: Float[jax.Array, "B C"]  #: on each resample
    sample_errors: Float[jax.Array, "B C"]  #: standard error of each sample, by the influence function of its resample

    def columns(self, chosen: slice) -> Resampled:
        """Some of the statistics."""
        return Resampled(*(array[..., chosen] for array in self))


class Interval(NamedTuple):
    """Ends of the intervals."""

    low: Float[jax.Array, " C"]
    high: Float[jax.Array, " C"]


def confidence_interval(resampled: Resampled, method: IntervalMethod, confidence_level: ArrayLike) -> Interval:
    """Intervals of C statistics, each by itself.

    Args:
        resampled: the statistics and their resamples. Undefined samples (NaN) are left out.
        method: ``"percentile"`` (Efron & Tibshirani 1993, section 13.3), ``"basic"`` (Davison & Hinkley 1997, eq. 5.6),
            ``"bca"`` (Efron 1987; bias from the samples, acceleration from the influence function), ``"studentized"``
            (Davison & Hinkley 1997, eq. 5.7), or ``"symmetric"``, which is studentized with equal arms (Hall 1988).
        confidence_level: between 0 and 1.

    Raises:
        InputError: if the method is not one of these, or the level is not between 0 and 1.
    """
    require_interval(method, confidence_level)
    level = jnp.asarray(confidence_level, resampled.samples.dtype)
    tail = 0.5 * (1.0 - level)
    tails = jnp.stack([tail, 1.0 - tail])
    samples, estimate = resampled.samples, resampled.estimate
    if method == "percentile":
        return Interval(*column_quantiles(samples, tails))
    if method == "basic":
        low, high = column_quantiles(samples, tails)
        return Interval(2.0 * estimate - high, 2.0 * estimate - low)
    if method == "studentized":
        low, high = column_quantiles(_studentized(resampled), tails)
        return Interval(estimate - high * resampled.standard_error, estimate - low * resampled.standard_error)
    if method == "symmetric":
        width = column_quantiles(jnp.abs(_studentized(resampled)), jnp.stack([1.0 - level, level]))[1] * resampled.standard_error
        return Interval(estimate - width, estimate + width)
    return Interval(*column_quantiles(samples, _bca_probabilities(resampled, tails)))


def borrow_spread(resampled: Resampled, size: Int[AnyArray, " C"], n_borrowed: float) -> Resampled:
    """Standard errors of groups that borrow from all stars, as if each group had further stars with the spread of the whole.

    The variance of a group's influence becomes (n s^2 + m S^2) / (n + m), of its own s^2 and that of all stars S^2. No standard
    error becomes smaller. Symmetric, studentized and simultaneous intervals become wider in proportion. Column 0 is of all stars,
    the others are of groups of n = ``size``; m = ``n_borrowed``.
    """
    error, n = resampled.standard_error, jnp.asarray(size, resampled.standard_error.dtype)
    spread = jnp.square(error) * n
    borrowed = jnp.sqrt((n * spread + n_borrowed * spread[0]) / (n + n_borrowed) / n)
    return resampled._replace(standard_error=jnp.maximum(error, borrowed))


def column_quantiles(samples: Float[jax.Array, "B C"], probabilities: jax.Array) -> Float[jax.Array, "2 C"]:
    """A low and a high quantile of each column by linear interpolation, as ``jnp.nanquantile``: NaN are left out.

    ``probabilities`` is (2,) for all columns, or (2, C). If the quantiles lie in the lowest and highest eighth of the samples,
    they are found by a partial sort, which takes a tenth of the time of a whole one.
    """
    n_samples, n_columns = samples.shape
    n_kept = n_samples // 8 + 2
    probabilities = jnp.broadcast_to(probabilities.reshape(2, -1), (2, n_columns))
    whole = functools.partial(jax.vmap(jnp.nanquantile, in_axes=(1, 1), out_axes=1), samples, probabilities)
    if n_samples < LEAST_TO_SORT_PARTLY:
        return whole()
    undefined = jnp.isnan(samples)
    last = (n_samples - 1 - jnp.sum(undefined, axis=0)).astype(samples.dtype)  # rank of the largest defined sample, from 0

    def read(ascending: jax.Array, rank: jax.Array) -> jax.Array:
        """Values of (C, n_kept) sorted samples at (C,) ranks, which need not be whole numbers."""
        below = jnp.floor(rank)
        low, high = (
            jnp.take_along_axis(ascending, place.astype(jnp.int32)[:, None], axis=1)[:, 0] for place in (below, jnp.ceil(rank))
        )
        return jnp.where(low == high, low, low + (high - low) * (rank - below))

    def partly() -> jax.Array:
        lowest = -lax.top_k(-jnp.where(undefined, jnp.inf, samples).T, n_kept)[0]
        highest = lax.top_k(jnp.where(undefined, -jnp.inf, samples).T, n_kept)[0]
        return jnp.stack([read(lowest, probabilities[0] * last), read(highest, (1.0 - probabilities[1]) * last)])

    outside = (probabilities[0] * last <= n_kept - 2) & ((1.0 - probabilities[1]) * last <= n_kept - 2)
    return lax.cond(jnp.all(outside & (last >= n_kept)), partly, whole)


def simultaneous_interval(resampled: Resampled, confidence_level: ArrayLike) -> Interval:
    """Intervals that hold all C statistics at once, by max-t (Romano & Wolf 2005): estimate +- c standard errors.

    c is the quantile over resamples of the largest studentized difference max_c |sample - estimate| / sample error.
    """
    require_interval("studentized", confidence_level)
    largest = jnp.max(jnp.nan_to_num(jnp.abs(_studentized(resampled)), nan=0.0), axis=1, initial=0.0)
    width = jnp.quantile(largest, jnp.asarray(confidence_level, largest.dtype)) * resampled.standard_error
    return Interval(resampled.estimate - width, resampled.estimate + width)


def _studentized(resampled: Resampled) -> jax.Array:
    """(sample - estimate) / (standard error of the sample); 0 if two methods are equal, NaN where it is not defined."""
    difference = resampled.samples - resampled.estimate[None, :]
    defined = resampled.sample_errors > 0
    t = difference / jnp.where(defined, resampled.sample_errors, 1.0)
    return jnp.where(defined, t, jnp.where(difference == 0, 0.0, jnp.nan))


def _bca_probabilities(resampled: Resampled, tails: jax.Array) -> jax.Array:
    """(2, C) probabilities at which BCa reads the quantiles of the samples (Efron 1987, eq. 2.3)."""
    samples, estimate = resampled.samples, resampled.estimate[None, :]
    n_defined = jnp.maximum(jnp.sum(~jnp.isnan(samples), axis=0), 1)
    below = 0.5 * (jnp.sum(samples < estimate, axis=0) + jnp.sum(samples <= estimate, axis=0)) / n_defined
    # The bias of an estimate outside all samples would be infinite. The estimate is taken to lie half a sample inside.
    bias = ndtri(jnp.clip(below, 0.5 / n_defined, 1.0 - 0.5 / n_defined))[None, :]
    # A tail that rounds to 0 would lie at an infinite quantile.
    smallest = jnp.finfo(tails.dtype).eps
    shifted = bias + ndtri(jnp.clip(tails, smallest, 1.0 - smallest))[:, None]
    stretch = jnp.maximum(1.0 - resampled.acceleration[None, :] * shifted, 1e-3)
    return ndtr(bias + shifted / stretch)


def require_interval(method: str, confidence_level: ArrayLike) -> None:
    """Raises an ``InputError`` if the method is unknown, or the level is not between 0 and 1."""
    if method not in METHODS:
        raise InputError(f"method is {method!r}, expected one of {', '.join(METHODS)}")
    if isinstance(confidence_level, jax.core.Tracer):
        return
    level = np.asarray(confidence_level)
    if level.ndim or level.dtype.kind not in "iuf" or not 0 < level < 1:
        raise InputError(f"confidence_level is {confidence_level}, expected a number between 0 and 1")
