"""Paired bootstrap over stars: the difference of two methods' R2, with intervals overall, by group and for all groups at once.

A resample draws N of the N stars with replacement, the same stars for both methods. ``bootstrap_delta_r2`` counts how often
each star was drawn, and turns the counts into R2 by a matmul over sufficient statistics. ``paired_bootstrap`` gathers the stars
and evaluates any statistic. From the same key both draw the same stars, and they agree resample by resample.
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
from jaxtyping import Float, Int, PRNGKeyArray, UInt32

from moe_jax.core.arrays import AnyArray, InputError, by_numpy, jit_off_host, namespace, require_whole, to_host, without_offset
from moe_jax.core.convert import convert_arguments
from moe_jax.evaluate.intervals import (
    IntervalMethod,
    Resampled,
    borrow_spread,
    confidence_interval,
    require_interval,
    simultaneous_interval,
)
from moe_jax.evaluate.metrics import center_groups, varies

#: Of the five methods, its actual coverage comes closest to the confidence level for the difference of all of 816 test stars, as
#: many as the published report has. With 8,000 stars "percentile" comes closest, and all five miss by about a point or less.
#: Within cells "symmetric" comes closest. See results/calibrate_bootstrap.
DEFAULT_METHOD: IntervalMethod = "basic"

# Resamples are summed in tiles, each one matmul of a fixed shape.
RESAMPLES_IN_TILE = 1024  # at most; fewer where N is large
COUNTS_IN_TILE = 2**23  # at most, where N is below this number
_DRAWN_AT_ONCE = 2**20  # stars, by all cores; more would not stay in the cache


class Difference(NamedTuple):
    """Delta R2 = R2(prediction) - R2(baseline) with its bootstrap distribution, for all stars or for each of G groups.

    The arrays have no dimension G for all stars. A resample in which y is constant has no R2: its sample is NaN, and the
    interval is that of the other samples.
    """

    estimate: Float[jax.Array, "*G"]  #: on the stars as they are
    samples: Float[jax.Array, " B *G"]  #: on each resample
    standard_error: Float[jax.Array, "*G"]  #: by the influence function
    low: Float[jax.Array, "*G"]  #: lower end of the interval
    high: Float[jax.Array, "*G"]  #: upper end of the interval

    @property
    @by_numpy
    def n_undefined(self) -> Int[jax.Array, "*G"]:
        """Number of resamples without an R2."""
        return namespace(self.samples).isnan(self.samples).sum(axis=0)


class Bootstrap(NamedTuple):
    """The differences of two methods from one set of resamples. G = 0 where no groups were given."""

    overall: Difference  #: of all stars
    groups: Difference  #: within each group; each interval is for its group alone
    simultaneous: Difference  #: within each group; the intervals are wider, and hold for all groups at once


def random_bits(key: PRNGKeyArray, n: int) -> UInt32[jax.Array, " N"]:
    """32 random bits for each of N draws, equal to ``jax.random.bits(key, (n,))``; of a Threefry key five times as fast on CPUs.

    JAX compiles Threefry for CPUs as a loop that writes its state to memory after every four rounds. Here the 20 rounds (Salmon
    et al. 2011, Threefry-2x32) are one expression. Keys of other generators (``jax.random.key(seed, impl=...)``) go to JAX.
    """
    if not is_threefry(key):
        return jax.random.bits(key, (n,), jnp.uint32)
    first, second = jax.random.key_data(key)
    schedule = (first, second, first ^ second ^ np.uint32(0x1BD11BDA))
    left, right = jnp.broadcast_to(first, n), jnp.arange(n, dtype=jnp.uint32) + second
    for group in range(5):
        for turn in ((13, 15, 26, 6), (17, 29, 16, 24))[group % 2]:
            left = left + right
            right = ((right << turn) | (right >> (32 - turn))) ^ left
        left, right = left + schedule[(group + 1) % 3], right + schedule[(group + 2) % 3] + np.uint32(group + 1)
    return left ^ right


def is_threefry(key: PRNGKeyArray) -> bool:
    """Whether a key is one of JAX's default generator."""
    return str(jax.random.key_impl(key)) == "threefry2x32"


def resample_rows(key: PRNGKeyArray, n: int) -> Int[jax.Array, " N"]:
    """The stars of one resample: N draws of 0 .. N - 1 with replacement, N < 2^31.

    A draw is the upper half of the product of N and 32 random bits. The probabilities of two stars then differ by at most
    2^-32. Exactly equal probabilities would take twice the random bits.
    """
    low = np.uint32(0xFFFF)
    bits = random_bits(key, n)
    bits_high, bits_low, n_high, n_low = bits >> 16, bits & low, np.uint32(n >> 16), np.uint32(n & 0xFFFF)
    # The product of two halves fits into 32 bits; the upper half of the whole product is their sum with carries.
    low_high, high_low = bits_low * n_high, bits_high * n_low
    carried = ((bits_low * n_low) >> 16) + (low_high & low) + (high_low & low)
    return (bits_high * n_high + (low_high >> 16) + (high_low >> 16) + (carried >> 16)).astype(jnp.int32)


def paired_bootstrap(key: PRNGKeyArray, statistic: Callable[..., Any], arrays: tuple[AnyArray, ...], n_resamples: int) -> Any:
    """A statistic on B resamples of the rows of several arrays, which are drawn together.

    Args:
        key: random key.
        statistic: pure function of the resampled arrays. It returns an array or a pytree of arrays.
        arrays: each with N rows.
        n_resamples: B.

    Returns:
        What the statistic returns, with a first dimension B.

    Raises:
        InputError: if the arrays have different lengths, if there are none, or if B < 1.
    """
    if not arrays:
        raise InputError("arrays is empty, expected at least one array")
    if len({len(array) for array in arrays}) != 1:
        raise InputError(f"arrays have {[len(array) for array in arrays]} rows, expected the same number in each")
    require_whole("n_resamples", n_resamples, 1)
    arrays, n = tuple(map(jnp.asarray, arrays)), len(arrays[0])
    # Under vmap, JAX's generator "rbg" draws another sequence for a key than alone; in a loop, it draws the same.
    rows = lax.map(lambda key: resample_rows(key, n), jax.random.split(key, n_resamples))
    return jax.vmap(lambda rows: statistic(*(array[rows] for array in arrays)))(rows)


@convert_arguments(finite=("y", "prediction", "baseline"))
def bootstrap_delta_r2(
    key: PRNGKeyArray,
    y: Float[AnyArray, " N"],
    prediction: Float[AnyArray, " N"],
    baseline: Float[AnyArray, " N"],
    **options: Any,
) -> Bootstrap:
    """Paired bootstrap of R2(prediction) - R2(baseline) over stars, all resamples in one vectorised call.

    The intervals cover the sampling of test stars, not new training stars, noise or gate seeds.

    Args:
        key: random key.
        y: target.
        prediction: of the method.
        baseline: predictions of the method it is compared with, for the same stars.
        options: keyword arguments of ``bootstrap_gain``: ``n_resamples``, ``confidence_level``, ``method``, ``groups``,
            ``n_groups`` and ``n_borrowed``.

    Raises:
        InputError: if shapes disagree, a value is not finite, or an option is out of range.
    """
    y, prediction, baseline = _on_host(*without_offset(y, prediction, baseline))
    unit = _unit(y)
    y, prediction, baseline = y * unit, prediction * unit, baseline * unit
    return bootstrap_gain(key, y, squared_error_gain(y, prediction, baseline), **options)


def _on_host(*arrays: AnyArray) -> tuple[AnyArray, ...]:
    """NumPy's arrays as they are, and JAX's of a CPU as NumPy's, so that nothing is compiled for a scale."""
    return arrays if namespace(*arrays) is np else to_host(*arrays)


@jit_off_host
def _unit(y: AnyArray) -> ArrayLike:
    """The power of two that brings the range of y near 1. In these units no fourth power of y overflows or vanishes."""
    xp, most = namespace(y), jnp.finfo(y.dtype).maxexp - 2
    exponent = xp.frexp(y.max() - y.min())[1]
    return xp.ldexp(xp.ones((), y.dtype), -xp.clip(exponent, -most, most))


@by_numpy
def squared_error_gain(
    y: Float[AnyArray, ...], prediction: Float[AnyArray, ...], baseline: Float[AnyArray, ...]
) -> Float[AnyArray, ...]:
    """(y - baseline)^2 - (y - prediction)^2 of each star, in a form that is exactly 0 where the two methods agree."""
    return (prediction - baseline) * ((y - baseline) + (y - prediction))  # small differences, also where y has a large offset


@convert_arguments(finite=("y", "gain"))
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
    n_borrowed: float = 0,
) -> Bootstrap:
    """As ``bootstrap_delta_r2``, from the gain in squared error of each star.

    The gains may be means over several seeds of a gate: R2 is linear in them, so the result is the mean difference of R2.

    Args:
        key: random key.
        y: target.
        gain: (y - baseline)^2 - (y - prediction)^2 of each star.
        n_resamples: B.
        confidence_level: of the intervals.
        method: of the intervals, see ``moe_jax.evaluate.intervals``. The published report used ``"percentile"``.
        groups: group of each star, from 0. The differences within groups come from the same resamples as the overall one. A
            star with a negative group counts in the overall difference only.
        n_groups: G; by default the highest group plus one, unless groups are traced. Under ``jit``, B and G are static.
        n_borrowed: stars of which each group's standard error borrows the spread, see ``borrow_spread``; for the methods
            ``"symmetric"`` and ``"studentized"``, and for the simultaneous intervals. results/calibrate_bootstrap measures it.

    Raises:
        InputError: as ``bootstrap_delta_r2``.
    """
    require_whole("n_resamples", n_resamples, 1)
    require_interval(method, confidence_level)
    if np.ndim(n_borrowed) or np.asarray(n_borrowed).dtype.kind not in "iuf" or not 0 <= n_borrowed < np.inf:
        raise InputError(f"n_borrowed is {n_borrowed}, expected a finite number, at least 0")
    if n_borrowed and method not in ("symmetric", "studentized"):
        raise InputError(f"n_borrowed is {n_borrowed} with the method {method!r}, expected the method symmetric or studentized")
    if groups is None:
        groups, n_groups = jnp.zeros(len(y), jnp.int32), 0
    if n_groups is None:
        if isinstance(groups, jax.core.Tracer):
            raise InputError("n_groups is None, expected a number where groups is traced")
        n_groups = max(int(np.max(np.asarray(groups))) + 1, 0)
        if n_groups > len(y):
            raise InputError(f"groups holds {n_groups - 1}, expected numbers below {len(y)}, that of the stars, or n_groups")
    require_whole("n_groups", n_groups, 0)
    y, gain = _on_host(*without_offset(y), gain)
    unit = _unit(y)
    y, gain, groups = map(jnp.asarray, (y * unit, gain * unit * unit, groups))
    resampled = resample_gain(key, y, gain, groups, n_resamples, n_groups)
    if n_borrowed:
        resampled = borrow_spread(resampled, group_sizes(groups, n_groups), n_borrowed)
    return summarize(resampled, confidence_level, method)


def group_sizes(groups: Int[jax.Array, " N"], n_groups: int) -> Int[jax.Array, " C"]:
    """Number of all stars, then of those in each of G groups; (1 + G,)."""
    return jnp.concatenate([jnp.array([len(groups)]), jnp.sum(groups[None, :] == jnp.arange(n_groups)[:, None], axis=1)])


@functools.partial(jax.jit, static_argnames=("method",))
def summarize(resampled: Resampled, confidence_level: ArrayLike, method: IntervalMethod) -> Bootstrap:
    """The differences and their intervals from what ``resample_gain`` returns."""

    def part(columns: int | slice, low: jax.Array, high: jax.Array) -> Difference:
        estimate, samples, error = resampled.estimate, resampled.samples, resampled.standard_error
        return Difference(estimate[columns], samples[:, columns], error[columns], low, high)

    low, high = confidence_interval(resampled, method, confidence_level)
    groups = slice(1, None)
    wide = simultaneous_interval(resampled.columns(groups), confidence_level)
    return Bootstrap(part(0, low[0], high[0]), part(groups, low[groups], high[groups]), part(groups, wide.low, wide.high))


def resample_gain(
    key: PRNGKeyArray,
    y: Float[jax.Array, " N"],
    gain: Float[jax.Array, " N"],
    groups: Int[jax.Array, " N"],
    n_resamples: int,
    n_groups: int,
) -> Resampled:
    """Delta R2 of all stars (column 0) and of each group, on the stars and on each resample, with standard errors.

    With d = y - mean(y), b = mean(d^2) and g the gain, Delta R2 = mean(g) / b, and its influence function is
    (g - Delta R2 d^2) / b. The standard error of a resample needs the second moment of the influence there. The mean of d is
    then m, not 0; multiplying out (d - m)^2 leaves moments of d up to the fourth. One matmul of the counts with nine columns
    for each group gives them all.

    Resamples are summed in tiles, whose size depends on N alone. Therefore only the results take more memory with more
    resamples, and a resample's numbers do not depend on which others are computed with it.
    """
    columns, estimate, error, acceleration = _columns(y, gain, groups, n_groups)
    samples, errors = _resample(key, y, columns, n_resamples)
    return Resampled(estimate, error, acceleration, samples, errors)


@functools.partial(jax.jit, static_argnames="n_groups")
def _columns(y: jax.Array, gain: jax.Array, groups: jax.Array, n_groups: int) -> tuple[jax.Array, ...]:
    """The (9, 1 + G, N) columns whose sums a resample needs, then estimates, standard errors and accelerations, (1 + G) each."""
    n = len(y)
    # One row for all stars, then one for each group; (1 + G, N).
    member = jnp.concatenate([jnp.ones((1, n), bool), groups[None, :] == jnp.arange(n_groups)[:, None]])
    d = center_groups(y, member)  # by group: the sum of squares is then not the difference of two large numbers
    g = jnp.where(member, gain[None, :], 0.0)
    columns = jnp.stack([member.astype(y.dtype), d, d**2, d**3, d**4, g, g * d, g * d**2, g**2])
    sums = jnp.sum(columns, axis=2)[:, None, :]
    estimate, error = (row[0] for row in _delta_and_error(sums, varies(y, member)[None, :]))
    influence = jnp.where(member, g - estimate[:, None] * d**2, 0.0)
    square = jnp.sum(influence**2, axis=1)
    acceleration = jnp.sum(influence**3, axis=1) / jnp.where(square > 0, 6.0 * square**1.5, 1.0)
    return columns, estimate, error, acceleration


@functools.partial(jax.jit, static_argnames="n_resamples")
def _resample(key: jax.Array, y: jax.Array, columns: jax.Array, n_resamples: int) -> tuple[jax.Array, jax.Array]:
    """Delta R2 and standard errors of B resamples, (B, 1 + G) each."""
    n = len(y)

    def count(rows: jax.Array) -> jax.Array:
        return jnp.zeros(n, y.dtype).at[rows].add(1.0, mode="promise_in_bounds")

    def varies_in(counts: jax.Array) -> jax.Array:
        return varies(y, (columns[0] > 0) & (counts > 0)[None, :])

    def tile(keys: jax.Array) -> tuple[jax.Array, jax.Array]:
        # One resample after another: XLA's CPU code for a scatter of all of them is several times slower within a loop, and
        # under vmap JAX's generator "rbg" draws another sequence for a key than alone.
        if is_threefry(key) and len(keys) * n <= _DRAWN_AT_ONCE:
            counts = lax.map(count, jax.vmap(lambda key: resample_rows(key, n))(keys))
        else:
            counts = lax.map(lambda key: count(resample_rows(key, n)), keys)
        sums = jnp.einsum("bn,mgn->mbg", counts, columns, precision=lax.Precision.HIGHEST)
        drawn, _, squares, *_ = sums
        ss_total = squares - sums[1] ** 2 / jnp.maximum(drawn, 1.0)
        # For a constant y, ss_total is rounding error. Only if some ss_total is that small, the exact test is run.
        surely_defined = ss_total > 8.0 * n * jnp.finfo(y.dtype).eps * squares
        defined = lax.cond(jnp.all(surely_defined), lambda: surely_defined, lambda: lax.map(varies_in, counts))
        return _delta_and_error(sums, defined)

    n_in_tile = min(max(COUNTS_IN_TILE // n, 1), RESAMPLES_IN_TILE)
    n_tiles = -(-n_resamples // n_in_tile)
    samples, errors = lax.map(tile, jax.random.split(key, n_tiles * n_in_tile).reshape(n_tiles, n_in_tile))
    return samples.reshape(-1, samples.shape[-1])[:n_resamples], errors.reshape(-1, errors.shape[-1])[:n_resamples]


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
