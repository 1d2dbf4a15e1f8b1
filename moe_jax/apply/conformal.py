"""Split-conformal calibration: intervals that hold what they promise on stars drawn like the held-out ones.

The score of a held-out star is |y - prediction| / sigma; an interval is prediction +- quantile * sigma. With n held-out stars in
a group, the quantile is the ceil((n + 1) level)-th smallest score, and a new star of the group is covered with a probability of
at least ``level``, whatever the distributions (Vovk, Gammerman & Shafer 2005; Lei et al. 2018).
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Float, Int
from scipy import stats

from moe_jax.core.arrays import AnyArray, InputError, require_vectors

LEVELS = (0.68, 0.90, 0.95)


class Calibration(NamedTuple):
    """Quantiles of the held-out scores."""

    levels: Float[AnyArray, " L"]
    quantiles: Float[AnyArray, "K L"]  #: by group; of all groups together where one has too few stars for its level
    n_stars: Float[AnyArray, " K"]  #: held-out stars of each group


def calibrate(
    score: Float[AnyArray, " N"], group: Int[AnyArray, " N"], n_groups: int, levels: tuple[float, ...] = LEVELS
) -> Calibration:
    """Split-conformal quantiles by group.

    Args:
        score: |y - prediction| / sigma of stars on which nothing was fitted or chosen.
        group: of each star, known for new stars too: 0 .. n_groups - 1.
        n_groups: K.
        levels: coverages, each above 0 and below 1.

    Raises:
        InputError: shapes that disagree, scores that are not finite numbers >= 0, levels out of range, or too few stars in all
            for the highest level.
    """
    n_stars = require_vectors(score=score, group=group)
    score, group = np.asarray(score, np.float64), np.asarray(group)
    if not (np.isfinite(score) & (score >= 0)).all():
        raise InputError(f"score holds {score[~(np.isfinite(score) & (score >= 0))][0]}, expected finite numbers >= 0")
    if not all(0 < level < 1 for level in levels):
        raise InputError(f"levels are {levels}, expected numbers above 0 and below 1")
    if _rank(n_stars, max(levels)) > n_stars:
        raise InputError(f"score holds {n_stars} stars, expected at least {int(np.ceil(max(levels) / (1 - max(levels))))}")
    quantiles = np.empty((n_groups, len(levels)))
    counts = np.bincount(group, minlength=n_groups)
    for k in range(n_groups):
        for i, level in enumerate(levels):
            own = score[group == k] if _rank(int(counts[k]), level) <= counts[k] else score
            quantiles[k, i] = np.sort(own)[_rank(len(own), level) - 1]
    return Calibration(np.asarray(levels), quantiles, counts.astype(float))


def _rank(n_stars: int, level: float) -> int:
    # 1e-9: (n + 1) * level may lie just above the whole number that it stands for
    return int(np.ceil((n_stars + 1) * level - 1e-9))


def half_widths(calibration: Calibration, sigma: Float[AnyArray, " N"], group: Int[AnyArray, " N"]) -> Float[jax.Array, "N L"]:
    """Half the width of each star's interval at each level."""
    return _half_widths(jnp.asarray(calibration.quantiles), jnp.asarray(sigma), jnp.asarray(group))


@jax.jit
def _half_widths(quantiles: jax.Array, sigma: jax.Array, group: jax.Array) -> jax.Array:
    return quantiles[group] * sigma[:, None]


def coverage_table(
    residual: Float[AnyArray, " N"],
    half_width: Float[AnyArray, "N L"],
    levels: Float[AnyArray, " L"],
    groups: dict[str, Int[AnyArray, " N"] | None],
    names: dict[str, list[str]],
) -> pd.DataFrame:
    """Actual coverage and mean half-width by level: of all stars, and by group.

    Args:
        residual: y - prediction.
        half_width: of the intervals.
        levels: that were promised.
        groups: by kind of group, the group of each star (negative: none).
        names: of each kind's groups.

    Returns:
        Columns by, group, n, level, coverage, low, high (95 % Clopper-Pearson interval of the coverage), half_width (mean).
    """
    residual, half_width = np.asarray(residual), np.asarray(half_width)
    inside = np.abs(residual)[:, None] <= half_width
    rows = []
    parts: list[tuple[str, str, np.ndarray]] = [("all", "all", np.ones(len(residual), bool))]
    parts += [(by, name, np.asarray(group) == i) for by, group in groups.items() for i, name in enumerate(names[by])]
    for by, name, chosen in parts:
        if not (n := int(chosen.sum())):
            continue
        for i, level in enumerate(np.asarray(levels)):
            found = int(inside[chosen, i].sum())
            low, high = stats.binomtest(found, n).proportion_ci(0.95)
            width = half_width[chosen, i].mean()
            rows.append((by, name, n, float(level), found / n, low, high, width))
    return pd.DataFrame(rows, columns=["by", "group", "n", "level", "coverage", "low", "high", "half_width"])
