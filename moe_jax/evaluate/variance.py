"""Where the spread of a repeated experiment comes from, and in which interval the next repetition will lie.

The design is balanced: S surveys, N noise draws of each survey, and G gate seeds of their own for each draw. All are judged on
the same T test sets, whose noise is part of them. A value y[s, n, g, t] is the sum of independent random effects,

    y = mean + survey_s + noise_n(s) + seed_g(s, n) + test_t + (training x test effects).

The components are estimated by the method of moments (analysis of variance; Searle, Casella & McCulloch 1992, chapter 4). A
component of few degrees of freedom is hardly known: read its share with its interval.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import scipy
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.convert import convert_arguments

SOURCES = ("test stars", "survey", "noise draw", "gate seed", "survey x test", "noise x test", "seed x test")
#: The sources whose variance falls as 1 / (stars in a test set).
SOURCES_IN_TEST_STARS = tuple(source for source in SOURCES if "test" in source)
N_PIVOTS = 10_000  # draws behind the intervals of the shares; their noise moves an end by about 0.005


class VarianceComponents(NamedTuple):
    """Spread of a repeated measurement by its sources, and two intervals for it."""

    mean: float  #: over all repetitions and test sets
    variance: dict[str, float]  #: component of each of ``SOURCES``; a moment estimate, which may be below 0
    share: dict[str, float]  #: of each component in ``total``; one below 0 counts as 0
    total: float  #: variance of one repetition from scratch: sum of the components that are above 0
    total_df: float  #: its degrees of freedom (Satterthwaite)
    mean_variance: float  #: variance of ``mean``
    mean_df: float
    prediction_low: float  #: interval for one repetition from scratch
    prediction_high: float
    mean_low: float  #: interval for the expected value
    mean_high: float
    squares: dict[str, tuple[float, int]]  #: sum of squares and degrees of freedom of each source
    shape: tuple[int, ...]  #: of the values

    def share_intervals(self, confidence_level: float = 0.95) -> dict[str, tuple[float, float]]:
        """Generalised confidence interval of each share (Weerahandi 1993): each sum of squares over chi^2 is a mean square."""
        rng = np.random.default_rng(0)
        mean_squares = {name: total / rng.chisquare(df, N_PIVOTS) for name, (total, df) in self.squares.items()}
        positive = {name: np.maximum(value, 0.0) for name, value in _components(mean_squares, self.shape).items()}
        total = np.maximum(sum(positive.values()), np.finfo(float).tiny)
        tails = 0.5 * (1 - confidence_level), 0.5 * (1 + confidence_level)
        return {name: (float(low), float(high)) for name, v in positive.items() for low, high in [np.quantile(v / total, tails)]}


@convert_arguments("values", finite=("values",))
def variance_components(values: Float[AnyArray, "S N G T"], confidence_level: float = 0.95) -> VarianceComponents:
    """Splits the spread of values[s, n, g, t] into its sources.

    Args:
        values: by survey, noise draw of that survey, gate seed of that draw, and test set; at least two of each. The test sets
            are the same for all.
        confidence_level: of all intervals. The interval ``prediction`` is for one more repetition from scratch (new survey,
            noise, seed and test stars): mean +- t sqrt(total + mean_variance). The interval ``mean`` is for the expected value.

    Raises:
        InputError: if there are fewer than two of anything, or a value is not finite.
    """
    y = np.asarray(values, np.float64)
    if min(y.shape) < 2:
        raise InputError(f"values have shape {y.shape}, expected (surveys, noise draws, seeds, test sets), at least 2 of each")
    S, N, G, T = y.shape
    # A name lists the dimensions that are left: st is the mean over noise draws and seeds.
    m = y.mean()
    t, s, n, g = y.mean((0, 1, 2)), y.mean((1, 2, 3)), y.mean((2, 3)), y.mean(3)
    st, nt = y.mean((1, 2)), y.mean(2)
    squares = {
        "test stars": (S * N * G * np.sum((t - m) ** 2), T - 1),
        "survey": (N * G * T * np.sum((s - m) ** 2), S - 1),
        "noise draw": (G * T * np.sum((n - s[:, None]) ** 2), S * (N - 1)),
        "gate seed": (T * np.sum((g - n[:, :, None]) ** 2), S * N * (G - 1)),
        "survey x test": (N * G * np.sum((st - s[:, None] - t + m) ** 2), (S - 1) * (T - 1)),
        "noise x test": (G * np.sum((nt - n[:, :, None] - st[:, None] + s[:, None, None]) ** 2), S * (N - 1) * (T - 1)),
        "seed x test": (
            np.sum((y - g[..., None] - nt[:, :, None] + n[:, :, None, None]) ** 2),
            S * N * (G - 1) * (T - 1),
        ),
    }
    ms = {name: total / df for name, (total, df) in squares.items()}
    df = {name: df for name, (_, df) in squares.items()}
    variance = {name: float(value) for name, value in _components(ms, y.shape).items()}
    total = sum(max(value, 0.0) for value in variance.values())
    weights: dict[str, float] = dict.fromkeys(SOURCES, 0.0)  # of the mean squares in the total
    for name, (terms, size) in _combinations(y.shape).items():
        for k, c in terms.items():
            weights[k] += (variance[name] > 0) * c / size
    # Var(mean) = survey / S + test / T + survey x test / (S T) + ... = (MS_survey + MS_test - MS_survey_x_test) / (S N G T)
    mean_weights = {"survey": 1 / y.size, "test stars": 1 / y.size, "survey x test": -1 / y.size}
    floor = max(ms["survey"], ms["test stars"]) / y.size  # the moment estimate may be lower, which is impossible
    mean_variance = max(sum(c * ms[k] for k, c in mean_weights.items()), floor)
    total_df, mean_df = (_satterthwaite(w, ms, df) for w in (weights, mean_weights))
    expected = _half_width(mean_variance, mean_df, confidence_level)
    # In a tiny design the interval of the expected value has few degrees of freedom, and may be the wider one.
    prediction = max(_half_width(total + mean_variance, total_df, confidence_level), expected)
    return VarianceComponents(
        mean=m,
        variance=variance,
        share={name: max(value, 0.0) / total if total else 0.0 for name, value in variance.items()},
        total=total,
        total_df=total_df,
        mean_variance=mean_variance,
        mean_df=mean_df,
        prediction_low=m - prediction,
        prediction_high=m + prediction,
        mean_low=m - expected,
        mean_high=m + expected,
        squares=squares,
        shape=y.shape,
    )


def _combinations(shape: tuple[int, ...]) -> dict[str, tuple[dict[str, int], int]]:
    """Each component as a sum of mean squares over a number, from their expectations in the balanced design."""
    S, N, G, T = shape
    return {
        "test stars": ({"test stars": 1, "survey x test": -1}, S * N * G),
        "survey": ({"survey": 1, "noise draw": -1, "survey x test": -1, "noise x test": 1}, N * G * T),
        "noise draw": ({"noise draw": 1, "gate seed": -1, "noise x test": -1, "seed x test": 1}, G * T),
        "gate seed": ({"gate seed": 1, "seed x test": -1}, T),
        "survey x test": ({"survey x test": 1, "noise x test": -1}, N * G),
        "noise x test": ({"noise x test": 1, "seed x test": -1}, G),
        "seed x test": ({"seed x test": 1}, 1),
    }


def _components(mean_squares: Mapping[str, Any], shape: tuple[int, ...]) -> dict[str, Any]:
    return {name: sum(c * mean_squares[k] for k, c in terms.items()) / n for name, (terms, n) in _combinations(shape).items()}


def _satterthwaite(weights: dict[str, float], ms: dict[str, float], df: dict[str, int]) -> float:
    """Degrees of freedom of a combination of independent mean squares (Satterthwaite 1946); at least 1."""
    combined = sum(c * ms[k] for k, c in weights.items())
    spread = sum((c * ms[k]) ** 2 / df[k] for k, c in weights.items())
    return max(combined**2 / spread, 1.0) if spread > 0 else float("inf")


def _half_width(variance: float, df: float, confidence_level: float) -> float:
    return float(scipy.stats.t.ppf(0.5 * (1 + confidence_level), df) * np.sqrt(variance))


def mean_over_seeds(
    by_seed: Float[AnyArray, " S"], standard_error: float, confidence_level: float = 0.95
) -> tuple[float, float, float]:
    """Mean of a difference over gate seeds, and an interval that covers other seeds and other test stars.

    Args:
        by_seed: the difference on all test stars, for each of at least two seeds.
        standard_error: of the mean over these seeds, by the sampling of test stars.
        confidence_level: of the interval, mean +- t sqrt(standard_error^2 + variance over seeds / S). t has the degrees of freedom
            of Satterthwaite: only the part of the seeds has few.

    Returns:
        Mean, low, high.

    Raises:
        InputError: fewer than two seeds.
    """
    values = np.asarray(by_seed, np.float64)
    if values.ndim != 1 or len(values) < 2:
        raise InputError(f"by_seed has shape {values.shape}, expected (S,) of at least two seeds")
    of_seeds, variance = values.var(ddof=1) / len(values), standard_error**2 + values.var(ddof=1) / len(values)
    df = (len(values) - 1) * (variance / of_seeds) ** 2 if of_seeds > 0 else np.inf
    width, mean = _half_width(variance, df, confidence_level), float(values.mean())
    return mean, mean - width, mean + width


def required_stars(effect: float, influence_variance: float, *, power: float = 0.8, confidence_level: float = 0.95) -> float:
    """Number of test stars for which an interval excludes 0 with the given power: (z_conf + z_power)^2 variance / effect^2.

    Args:
        effect: the true difference.
        influence_variance: variance of the influence function of the difference, N times its squared standard error.
        power: probability that the interval excludes 0.
        confidence_level: of the two-sided interval.
    """
    z = scipy.stats.norm.ppf(0.5 * (1 + confidence_level)) + scipy.stats.norm.ppf(power)
    return float(z**2 * influence_variance / effect**2) if effect else float("inf")
