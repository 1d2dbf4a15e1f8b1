"""Paired bootstrap over stars: the difference of two methods' R2, with intervals overall, by group and for all groups at once.

A resample draws N of the N stars with replacement, the same stars for both methods. ``bootstrap_delta_r2`` counts how often
each star was drawn and turns resamples into R2 by a matmul over sufficient statistics; ``paired_bootstrap`` gathers the stars
and evaluates any statistic. From the same key both draw the same stars, and agree resample by resample.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float, Int, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, require_same_length, require_vectors
from moe_jax.evaluate.intervals import (
    Interval,
    IntervalMethod,
    Resampled,
    confidence_interval,
    require_interval,
    simultaneous_interval,
)

# Of the four, its coverage comes closest to what it promises: results/calibrate_bootstrap.
DEFAULT_METHOD: IntervalMethod = "basic"


RESAMPLES_IN_TILE = 64  # whose sums are one matmul of a fixed shape; fewer where N is large
COUNTS_IN_TILE = 2**23
COUNTS_AT_ONCE = 2**20  # drawn and counted at a time, where they are more than a tile's


class Bootstrap(NamedTuple):
    """Delta R2 = R2(prediction) - R2(baseline), with its bootstrap distribution.

    A resample in which y is constant has no R2: its sample is NaN and is counted; the interval is that of the others. The
    group fields have G = 0 where no groups were given.
    """

    estimate: Float[jax.Array, ""]  #: on the stars as they are
    samples: Float[jax.Array, " B"]  #: on each resample
    low: Float[jax.Array, ""]  #: ends of the interval
    high: Float[jax.Array, ""]
    group_estimate: Float[jax.Array, " G"]  #: within each group
    group_samples: Float[jax.Array, "B G"]
    group_low: Float[jax.Array, " G"]  #: ends of each group's own interval
    group_high: Float[jax.Array, " G"]
    n_undefined: Int[jax.Array, ""]  #: resamples without an R2
    group_n_undefined: Int[jax.Array, " G"]
    standard_error: Float[jax.Array, ""]  #: by the influence function
    group_standard_error: Float[jax.Array, " G"]
    simultaneous_low: Float[jax.Array, " G"]  #: ends of intervals that hold all groups at once
    simultaneous_high: Float[jax.Array, " G"]


def resample_rows(key: PRNGKeyArray, n: int) -> Int[jax.Array, " N"]:
    """The stars of one resample: N draws of 0 .. N - 1 with replacement, N < 2^31.

    A draw is the upper half of the product of N and 32 random bits, so the probabilities of two stars differ by 2^-32 at the
    most; drawing without that would double the bits.
    """
    low = np.uint32(0xFFFF)
    bits = jax.random.bits(key, (n,), jnp.uint32)
    bits_high, bits_low, n_high, n_low = bits >> 16, bits & low, np.uint32(n >> 16), np.uint32(n & 0xFFFF)
    # The product of two halves fits into 32 bits; the upper half of the whole product is their sum with carries.
    low_high, high_low = bits_low * n_high, bits_high * n_low
    carried = ((bits_low * n_low) >> 16) + (low_high & low) + (high_low & low)
    return (bits_high * n_high + (low_high >> 16) + (high_low >> 16) + (carried >> 16)).astype(jnp.int32)


def paired_bootstrap(key: PRNGKeyArray, statistic: Callable[..., Any], arrays: tuple[AnyArray, ...], n_resamples: int) -> Any:
    """A statistic on resamples of arrays that are drawn jointly; one ``vmap`` over the resamples' keys.

    Args:
        key: random key.
        statistic: pure function of the resampled arrays, to an array or a pytree of arrays.
        arrays: each with N rows.
        n_resamples: B.

    Returns:
        What the statistic returns, with a first dimension B.

    Raises:
        InputError: arrays of different lengths, none at all, or fewer than one resample.
    """
    if not arrays:
        raise InputError("arrays is empty, expected at least one array")
    if len({len(array) for array in arrays}) != 1:
        raise InputError(f"arrays have {[len(array) for array in arrays]} rows, expected the same number in each")
    _require_resamples(n_resamples)
    arrays = tuple(map(jnp.asarray, arrays))

    def resample(key: jax.Array) -> Any:
        rows = resample_rows(key, len(arrays[0]))
        return statistic(*(array[rows] for array in arrays))

    return jax.vmap(resample)(jax.random.split(key, n_resamples))


def bootstrap_delta_r2(
    key: PRNGKeyArray,
    y: Float[AnyArray, " N"],
    prediction: Float[AnyArray, " N"],
    baseline: Float[AnyArray, " N"],
    *,
    n_resamples: int = 1000,
    confidence_level: float = 0.95,
    method: IntervalMethod = DEFAULT_METHOD,
    groups: Int[AnyArray, " N"] | None = None,
    n_groups: int | None = None,
    block_size: int | None = None,
) -> Bootstrap:
    """Paired bootstrap of R2(prediction) - R2(baseline) over stars, all resamples in one vectorised call.

    The intervals say what other test stars would give, not what other training stars, noise or gate seeds would.

    Args:
        key: random key.
        y: target.
        prediction: of the method.
        baseline: predictions of the method it is compared with, for the same stars.
        n_resamples: B.
        confidence_level: of the intervals.
        method: of the intervals, see ``moe_jax.evaluate.intervals``; ``"percentile"`` is the published report's.
        groups: group of each star, from 0; gives Delta R2 within each group from the same resamples. Stars of a negative
            group count in the overall difference only.
        n_groups: G; by default the highest group plus one.
        block_size: resamples in one call of the compiled program, rounded up to whole tiles; all by default. The result is
            the same to the last bit.

    Raises:
        InputError: shapes that disagree, values that are not finite, B < 1, another method, or a level that is not between
            0 and 1.
    """
    require_vectors(y=y, prediction=prediction, baseline=baseline)
    for name, array in {"y": y, "prediction": prediction, "baseline": baseline}.items():
        _require_finite(name, array)
    gain = squared_error_gain(y, prediction, baseline)
    return bootstrap_gain(
        key,
        y,
        gain,
        n_resamples=n_resamples,
        confidence_level=confidence_level,
        method=method,
        groups=groups,
        n_groups=n_groups,
        block_size=block_size,
    )


def squared_error_gain(
    y: Float[AnyArray, ...], prediction: Float[AnyArray, ...], baseline: Float[AnyArray, ...]
) -> Float[jax.Array, ...]:
    """(y - baseline)^2 - (y - prediction)^2 of each star, in the form that is exactly 0 where the methods agree."""
    y, prediction, baseline = map(jnp.asarray, (y, prediction, baseline))
    return (prediction - baseline) * (2.0 * y - baseline - prediction)


def bootstrap_gain(
    key: PRNGKeyArray,
    y: Float[AnyArray, " N"],
    gain: Float[AnyArray, " N"],
    *,
    n_resamples: int = 1000,
    confidence_level: float = 0.95,
    method: IntervalMethod = DEFAULT_METHOD,
    groups: Int[AnyArray, " N"] | None = None,
    n_groups: int | None = None,
    block_size: int | None = None,
) -> Bootstrap:
    """Paired bootstrap of a difference of R2 from the stars' gains in squared error; the rest as ``bootstrap_delta_r2``.

    A gain may be averaged over seeds of a gate first: as R2 is linear in it, that gives the mean difference.

    Args:
        key: random key.
        y: target.
        gain: (y - baseline)^2 - (y - prediction)^2 of each star.
        n_resamples: B.
        confidence_level: of the intervals.
        method: of the intervals.
        groups: group of each star, from 0, or negative.
        n_groups: G.
        block_size: resamples in one call of the compiled program.

    Raises:
        InputError: as ``bootstrap_delta_r2``.
    """
    require_vectors(y=y, gain=gain)
    _require_resamples(n_resamples)
    if block_size is not None and block_size < 1:
        raise InputError(f"block_size is {block_size}, expected at least 1, or None")
    require_interval(method, confidence_level)
    if groups is None:
        groups, n_groups = jnp.zeros(len(y), jnp.int32), 0
    require_same_length(y=y, groups=groups)
    if n_groups is None:
        n_groups = int(np.max(np.asarray(groups))) + 1
    for name, array in {"y": y, "gain": gain}.items():
        _require_finite(name, array)
    y, gain, groups = map(jnp.asarray, (y, gain, groups))
    resampled = resample_gain(key, y, gain, groups, n_resamples, n_groups, block_size)
    return _summarize(resampled, confidence_level, method)


@functools.partial(jax.jit, static_argnames=("method",))
def _summarize(resampled: Resampled, confidence_level: ArrayLike, method: IntervalMethod) -> Bootstrap:
    low, high = confidence_interval(resampled, method, confidence_level)
    own = Resampled(*(column[..., 1:] for column in resampled))
    any_group = own.estimate.shape[0] > 0
    simultaneous = simultaneous_interval(own, confidence_level) if any_group else Interval(own.estimate, own.estimate)
    undefined = jnp.sum(jnp.isnan(resampled.samples), axis=0)
    estimate, samples, error = resampled.estimate, resampled.samples, resampled.standard_error
    return Bootstrap(
        estimate[0], samples[:, 0], low[0], high[0],
        estimate[1:], samples[:, 1:], low[1:], high[1:],
        undefined[0], undefined[1:],
        error[0], error[1:], simultaneous.low, simultaneous.high,
    )  # fmt: skip


def resample_gain(
    key: PRNGKeyArray,
    y: Float[jax.Array, " N"],
    gain: Float[jax.Array, " N"],
    groups: Int[jax.Array, " N"],
    n_resamples: int,
    n_groups: int,
    block_size: int | None = None,
) -> Resampled:
    """Delta R2 of all stars and of each group, on the stars and on each resample, with standard errors; 1 + G statistics.

    With d = y - mean(y), b = mean(d^2) and g the gain, Delta R2 = mean(g) / b, and its influence function is
    (g - Delta R2 d^2) / b. Its second moment on a resample, whose mean of d is m, needs the moments of d up to the fourth,
    as (d - m)^2 must be multiplied out; so one matmul of counts with nine columns for each group gives everything.

    Resamples are summed in tiles, whose size depends on N alone: the memory does not grow with the number of resamples but
    for the results, and a resample's numbers do not depend on which others are computed with it.
    """
    tile = min(max(COUNTS_IN_TILE // len(y), 1), RESAMPLES_IN_TILE)
    columns, estimate, error, skewed = _columns(y, gain, groups, n_groups)
    at_once = max(COUNTS_AT_ONCE // (tile * len(y)), 1)
    n_tiles = -(-n_resamples // tile)
    n_tiles = n_tiles if n_tiles <= at_once else -(-n_tiles // at_once) * at_once
    keys = jax.random.split(key, n_tiles * tile).reshape(n_tiles, tile)
    step = n_tiles if block_size is None else min(-(-block_size // tile), n_tiles)
    if step > at_once:
        step = -(-step // at_once) * at_once
    if step >= n_tiles:
        samples, errors = _resample(keys, y, columns)
    else:
        last = -(-n_tiles // step) * step  # the last block is filled with tiles that are not needed, to have the same shape
        keys = keys[jnp.minimum(jnp.arange(last), n_tiles - 1)]
        blocks = [jax.device_get(_resample(keys[i : i + step], y, columns)) for i in range(0, last, step)]
        samples, errors = (jnp.asarray(np.concatenate(part)) for part in zip(*blocks, strict=True))
    return Resampled(estimate, error, skewed, samples[:n_resamples], errors[:n_resamples])


@functools.partial(jax.jit, static_argnames="n_groups")
def _columns(y: jax.Array, gain: jax.Array, groups: jax.Array, n_groups: int) -> tuple[jax.Array, ...]:
    """The (9, 1 + G, N) columns whose sums a resample needs; and estimates, standard errors, accelerations."""
    n = len(y)
    # One row for all stars, then one for each group; (1 + G, N).
    member = jnp.concatenate([jnp.ones((1, n), bool), groups[None, :] == jnp.arange(n_groups)[:, None]])
    size = jnp.maximum(jnp.sum(member, axis=1), 1)
    mean = jnp.sum(jnp.where(member, y[None, :], 0.0), axis=1) / size
    # Centred by group, so that the sum of squares is no difference of large numbers.
    d = jnp.where(member, y[None, :] - mean[:, None], 0.0)
    g = jnp.where(member, gain[None, :], 0.0)
    columns = jnp.stack([member.astype(y.dtype), d, d**2, d**3, d**4, g, g * d, g * d**2, g**2])
    own = jnp.sum(columns, axis=2)[:, None, :]
    varies = jnp.max(jnp.where(member, y, -jnp.inf), axis=1) > jnp.min(jnp.where(member, y, jnp.inf), axis=1)
    estimate, error = (row[0] for row in _delta_and_error(own, varies[None, :]))
    influence = jnp.where(member, g - estimate[:, None] * d**2, 0.0)
    square = jnp.sum(influence**2, axis=1)
    skewed = jnp.sum(influence**3, axis=1) / jnp.where(square > 0, 6.0 * square**1.5, 1.0)
    return columns, estimate, error, skewed


@jax.jit
def _resample(keys: jax.Array, y: jax.Array, columns: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Delta R2 and standard errors of the resamples whose (tiles, tile) keys are given; (tiles * tile, 1 + G) each."""
    n, (n_tiles, n_in_tile) = len(y), keys.shape
    member = columns[0] > 0

    def tile(counts: jax.Array) -> tuple[jax.Array, jax.Array]:
        counts = counts.astype(y.dtype)
        sums = jnp.einsum("bn,mgn->mbg", counts, columns, precision=lax.Precision.HIGHEST)
        drawn, _, squares, *_ = sums
        ss_total = squares - sums[1] ** 2 / jnp.maximum(drawn, 1.0)
        # A constant y leaves ss_total at its rounding error. Only where one comes near it need all extremes be looked up.
        surely_defined = ss_total > 8.0 * n * jnp.finfo(y.dtype).eps * squares
        defined = lax.cond(jnp.all(surely_defined), lambda: surely_defined, lambda: _is_not_constant(y, member, counts))
        return _delta_and_error(sums, defined)

    def tiles(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        rows = jax.vmap(lambda key: resample_rows(key, n))(keys.reshape(-1))
        first = n * jnp.arange(len(rows))[:, None]
        counts = jnp.zeros(rows.size, jnp.int32).at[(rows + first).reshape(-1)].add(1, mode="promise_in_bounds")
        found: tuple[jax.Array, jax.Array] = lax.map(tile, counts.reshape(*keys.shape, n))
        return found

    at_once = min(max(COUNTS_AT_ONCE // (n_in_tile * n), 1), n_tiles)
    samples, errors = lax.map(tiles, keys.reshape(n_tiles // at_once, at_once, n_in_tile))
    return samples.reshape(-1, samples.shape[-1]), errors.reshape(-1, errors.shape[-1])


def _delta_and_error(sums: jax.Array, defined: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Delta R2 and its standard error from (9, B, C) sums of the columns of ``resample_gain``."""
    drawn, d1, d2, d3, d4, g1, gd, gd2, g2 = sums
    n = jnp.maximum(drawn, 1.0)
    m = d1 / n
    ss_total = jnp.where(defined, d2 - d1 * m, 1.0)
    delta = g1 / ss_total
    fourth = d4 - 4.0 * m * d3 + 6.0 * m**2 * d2 - 3.0 * m**3 * d1  # sum of (d - m)^4, as n m = d1
    cross = gd2 - 2.0 * m * gd + m**2 * g1  # sum of g (d - m)^2
    error = jnp.sqrt(jnp.maximum(g2 - 2.0 * delta * cross + delta**2 * fourth, 0.0)) / ss_total
    return jnp.where(defined, delta, jnp.nan), jnp.where(defined, error, jnp.nan)


def _is_not_constant(y: jax.Array, member: jax.Array, counts: jax.Array) -> jax.Array:
    """(B, G) whether y takes more than one value among the drawn members of each group; exact."""

    def resample(counts: jax.Array) -> jax.Array:
        drawn = member & (counts > 0)[None, :]
        highest = jnp.max(jnp.where(drawn, y[None, :], -jnp.inf), axis=1)
        return highest > jnp.min(jnp.where(drawn, y[None, :], jnp.inf), axis=1)

    different: jax.Array = lax.map(resample, counts)
    return different


def _require_resamples(n_resamples: int) -> None:
    if n_resamples < 1:
        raise InputError(f"n_resamples is {n_resamples}, expected at least 1")


def _require_finite(name: str, array: AnyArray) -> None:
    if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
        raise InputError(f"{name} holds {int((~np.isfinite(np.asarray(array))).sum())} values that are not finite")
