"""Split-conformal calibration: intervals with a guaranteed coverage for stars drawn like the held-out ones.

The score of a held-out star is |y - prediction| / sigma; an interval is prediction +- quantile * sigma. With n held-out stars in
a group, the quantile is the ceil((n + 1) level)-th smallest score. A new star of the group is then covered with a probability
of at least ``level``, whatever the distributions (Vovk, Gammerman & Shafer 2005; Lei et al. 2018).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pandas as pd
import scipy
from jaxtyping import Float, Int
from numpy.typing import DTypeLike

from moe_jax.core.arrays import AnyArray, InputError, by_numpy
from moe_jax.core.convert import convert_arguments

LEVELS = (0.68, 0.90, 0.95)


class Calibration(NamedTuple):
    """Quantiles of the held-out scores."""

    levels: Float[AnyArray, " L"]
    quantiles: Float[AnyArray, "K L"]  #: of each group; of all stars where a group has too few for the level
    n_stars: Float[AnyArray, " K"]  #: held-out stars of each group


def no_calibration(n_groups: int, dtype: DTypeLike) -> Calibration:
    """Of a model for which no stars were held out: it has no levels."""
    return Calibration(np.zeros(0, dtype), np.zeros((n_groups, 0), dtype), np.zeros(n_groups, dtype))


@convert_arguments("score", "group")
def calibrate(
    score: Float[AnyArray, " N"], group: Int[AnyArray, " N"], n_groups: int, levels: tuple[float, ...] = LEVELS
) -> Calibration:
    """Split-conformal quantiles by group.

    Args:
        score: |y - prediction| / sigma of stars that had no part in any fit or choice.
        group: group of each star, 0 .. n_groups - 1; it must be known for new stars too.
        n_groups: K.
        levels: coverages, each above 0 and below 1.

    Raises:
        InputError: shapes that disagree, scores that are not finite numbers >= 0, groups or levels out of range, or too few stars
            in all for the highest level.
    """
    score, group, n_stars = np.asarray(score, np.float64), np.asarray(group), len(score)
    if not (np.isfinite(score) & (score >= 0)).all():
        raise InputError(f"score holds {score[~(np.isfinite(score) & (score >= 0))][0]}, expected finite numbers >= 0")
    if group.min() < 0 or group.max() >= n_groups:
        raise InputError(f"group holds {group.min()} to {group.max()}, expected 0 to {n_groups - 1}")
    if not levels or not all(0 < level < 1 for level in levels):
        raise InputError(f"levels are {levels}, expected numbers above 0 and below 1")
    if _rank(n_stars, max(levels)) > n_stars:
        raise InputError(f"score holds {n_stars} stars, expected at least {int(np.ceil(max(levels) / (1 - max(levels))))}")
    quantiles = np.empty((n_groups, len(levels)))
    counts = np.bincount(group, minlength=n_groups)
    for k in range(n_groups):
        for i, level in enumerate(levels):
            scores = score[group == k] if _rank(int(counts[k]), level) <= counts[k] else score
            quantiles[k, i] = np.sort(scores)[_rank(len(scores), level) - 1]
    return Calibration(np.asarray(levels), quantiles, counts.astype(float))


def _rank(n_stars: int, level: float) -> int:
    """ceil((n + 1) level); a product that exceeds a whole number by a rounding error counts as that number."""
    return int(np.ceil((n_stars + 1) * level - 1e-9))


@by_numpy
def half_widths(calibration: Calibration, sigma: Float[AnyArray, " N"], group: Int[AnyArray, " N"]) -> Float[AnyArray, "N L"]:
    """Half the width of each star's interval at each level."""
    return calibration.quantiles[group] * sigma[:, None]


def coverage_table(
    residual: Float[AnyArray, " N"],
    half_width: Float[AnyArray, "N L"],
    levels: Float[AnyArray, " L"],
    groups: Mapping[str, Int[AnyArray, " N"]],
    names: Mapping[str, Sequence[str]],
) -> pd.DataFrame:
    """Actual coverage and mean half-width at each level, for all stars and for each group, of one or more kinds of groups.

    A star of a negative group is in none of that kind.

    Returns:
        Columns by, group, n, level, coverage, low, high (95 % Clopper-Pearson interval of the coverage), half_width (mean).
    """
    residual, half_width = np.asarray(residual), np.asarray(half_width)
    inside = np.abs(residual)[:, None] <= half_width
    rows = []
    parts = [("all", "all", np.ones(len(residual), bool))]
    parts += [(by, name, np.asarray(group) == i) for by, group in groups.items() for i, name in enumerate(names[by])]
    for by, name, chosen in parts:
        if not (n := int(chosen.sum())):
            continue
        for i, level in enumerate(np.asarray(levels)):
            n_inside = int(inside[chosen, i].sum())
            low, high = scipy.stats.binomtest(n_inside, n).proportion_ci(0.95)
            rows.append((by, name, n, float(level), n_inside / n, low, high, half_width[chosen, i].mean()))
    return pd.DataFrame(rows, columns=["by", "group", "n", "level", "coverage", "low", "high", "half_width"])
