"""Paired bootstrap over stars: the difference of two methods' R2, with percentile intervals.

A resample draws N of the N stars with replacement, the same stars for both methods. ``bootstrap_delta_r2`` counts how often
each star was drawn and turns all resamples into R2 by one matmul over sufficient statistics; ``paired_bootstrap`` gathers
the stars and evaluates any statistic. From the same key both draw the same stars, and agree resample by resample.
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

from moe_jax.arrays import AnyArray, InputError, require_same_length, require_vectors
from moe_jax.metrics import r2_by_group, r2_score


class Bootstrap(NamedTuple):
    """Delta R2 = R2(prediction) - R2(baseline), with its bootstrap distribution.

    A resample in which y is constant has no R2: its sample is NaN and is counted; the interval is that of the others. The
    group fields have G = 0 where no groups were given.
    """

    estimate: Float[jax.Array, ""]  #: on the stars as they are
    samples: Float[jax.Array, " B"]  #: on each resample
    low: Float[jax.Array, ""]  #: ends of the percentile interval
    high: Float[jax.Array, ""]
    group_estimate: Float[jax.Array, " G"]  #: within each group
    group_samples: Float[jax.Array, "B G"]
    group_low: Float[jax.Array, " G"]
    group_high: Float[jax.Array, " G"]
    n_undefined: Int[jax.Array, ""]  #: resamples without an R2
    group_n_undefined: Int[jax.Array, " G"]


def resample_rows(key: PRNGKeyArray, n: int) -> Int[jax.Array, " N"]:
    """The stars of one resample: N draws of 0 .. N - 1 with replacement."""
    return jax.random.randint(key, (n,), 0, n)


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
    groups: Int[AnyArray, " N"] | None = None,
    n_groups: int | None = None,
) -> Bootstrap:
    """Paired bootstrap of R2(prediction) - R2(baseline) over stars, all resamples in one vectorised call.

    The percentile interval (Efron & Tibshirani 1993, section 13.3). It is not corrected for bias or skewness, and it says
    what other test stars would give, not what other training stars, noise or gate seeds would.

    Args:
        key: random key.
        y: target.
        prediction: of the method.
        baseline: predictions of the method it is compared with, for the same stars.
        n_resamples: B.
        confidence_level: of the intervals.
        groups: group of each star, from 0; gives Delta R2 within each group from the same resamples. Stars of a negative
            group count in the overall difference only.
        n_groups: G; by default the highest group plus one.

    Raises:
        InputError: shapes that disagree, values that are not finite, B < 1, or a level that is not between 0 and 1.
    """
    require_vectors(y=y, prediction=prediction, baseline=baseline)
    _require_resamples(n_resamples)
    if not 0 < confidence_level < 1:
        raise InputError(f"confidence_level is {confidence_level}, expected a number between 0 and 1")
    if groups is None:
        groups, n_groups = jnp.zeros(len(y), jnp.int32), 0
    require_same_length(y=y, groups=groups)
    if n_groups is None:
        n_groups = int(np.max(np.asarray(groups))) + 1
    for name, array in {"y": y, "prediction": prediction, "baseline": baseline}.items():
        if not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
            raise InputError(f"{name} holds {int((~np.isfinite(np.asarray(array))).sum())} values that are not finite")
    y, prediction, baseline, groups = map(jnp.asarray, (y, prediction, baseline, groups))
    return _bootstrap_delta_r2(key, y, prediction, baseline, groups, confidence_level, n_resamples, n_groups)


@functools.partial(jax.jit, static_argnames=("n_resamples", "n_groups"))
def _bootstrap_delta_r2(
    key: jax.Array,
    y: jax.Array,
    prediction: jax.Array,
    baseline: jax.Array,
    groups: jax.Array,
    confidence_level: ArrayLike,
    n_resamples: int,
    n_groups: int,
) -> Bootstrap:
    n = len(y)
    # One row for all stars, then one for each group; (1 + G, N).
    member = jnp.concatenate([jnp.ones((1, n), bool), groups[None, :] == jnp.arange(n_groups)[:, None]])
    size = jnp.maximum(jnp.sum(member, axis=1), 1)
    mean = jnp.sum(jnp.where(member, y[None, :], 0.0), axis=1) / size
    # Sufficient statistics of R2: counts, sums and squares of y (centred by group, so that ss_total is no
    # difference of large numbers), and the difference of the squared errors.
    centred = jnp.where(member, y[None, :] - mean[:, None], 0.0)
    # (y - b)^2 - (y - p)^2, in the form that is exactly 0 where the methods agree.
    gain = jnp.where(member, ((prediction - baseline) * (2.0 * y - baseline - prediction))[None, :], 0.0)
    statistics = jnp.concatenate([member.astype(y.dtype), centred, centred**2, gain])

    def count(key: jax.Array) -> jax.Array:
        return jnp.zeros(n, y.dtype).at[resample_rows(key, n)].add(1.0)

    counts = jax.vmap(count)(jax.random.split(key, n_resamples))
    sums = jnp.matmul(counts, statistics.T, precision=lax.Precision.HIGHEST).reshape(n_resamples, 4, 1 + n_groups)
    drawn, total, squares, gained = (sums[:, i] for i in range(4))
    ss_total = squares - total**2 / jnp.maximum(drawn, 1.0)
    # A constant y leaves ss_total at its rounding error. Only where one comes near it need all extremes be looked up.
    surely_defined = ss_total > 8.0 * n * jnp.finfo(y.dtype).eps * squares
    defined = lax.cond(jnp.all(surely_defined), lambda: surely_defined, lambda: _is_not_constant(y, member, counts))
    # R2(prediction) - R2(baseline) = (SS_baseline - SS_prediction) / SS_total
    samples = jnp.where(defined, gained / jnp.where(defined, ss_total, 1.0), jnp.nan)
    tail = 0.5 * (1.0 - jnp.asarray(confidence_level, y.dtype))
    low, high = jnp.nanquantile(samples, jnp.stack([tail, 1.0 - tail]), axis=0)
    estimate = r2_score(y, prediction) - r2_score(y, baseline)
    group_estimate = r2_by_group(y, prediction, groups, n_groups).r2 - r2_by_group(y, baseline, groups, n_groups).r2
    undefined = jnp.sum(~defined, axis=0)
    return Bootstrap(
        estimate, samples[:, 0], low[0], high[0],
        group_estimate, samples[:, 1:], low[1:], high[1:],
        undefined[0], undefined[1:],
    )  # fmt: skip


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
