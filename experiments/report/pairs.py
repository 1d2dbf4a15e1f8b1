"""Pairs of methods, compared on all stars, by cell and by magnitude."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Int, PRNGKeyArray

from experiments.pipeline.calibration import MAG_EDGES
from experiments.pipeline.calibration import MAG_NAMES as MAGNITUDES
from experiments.pipeline.config import BootstrapOptions
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.bootstrap import bootstrap_delta_r2
from moe_jax.experts.cells import CELL_NAMES

ALL_STARS = "all"


def magnitude_bins(mag: Float[AnyArray, " N"]) -> Int[np.ndarray, " N"]:
    """(N,) numbers of the bins ``MAGNITUDES``; those of brighter and fainter stars are the first and the last."""
    bins: np.ndarray = np.digitize(np.asarray(mag), MAG_EDGES[1:-1])
    return bins


def pair_table(
    key: PRNGKeyArray,
    options: BootstrapOptions,
    y: Float[AnyArray, " N"],
    predictions: Mapping[str, Float[AnyArray, " N"]],
    pairs: Sequence[tuple[str, str]],
    cell: Int[AnyArray, " N"],
    mag: Float[AnyArray, " N"],
) -> pd.DataFrame:
    """Differences of R2 for each pair of a method and a baseline: of all stars, and within cells and bins of magnitude.

    Within a kind of group the intervals hold for all its groups at once. R2 within a group is that of its stars alone.

    Args:
        key: draws the resamples, which all pairs share.
        options: of the bootstrap.
        y: target.
        predictions: of each method by name.
        pairs: methods and their baselines.
        cell: of each star, from 0.
        mag: magnitude of each star.
    """
    kinds = {"cell": (np.asarray(cell), CELL_NAMES), "magnitude": (magnitude_bins(mag), MAGNITUDES)}
    rows = []
    for method, baseline in pairs:
        for kind, (group, names) in kinds.items():
            found = bootstrap_delta_r2(
                jax.random.clone(key),
                y,
                predictions[method],
                predictions[baseline],
                **options.arguments,
                groups=group,
                n_groups=len(names),
            )
            one, each = found.overall, found.simultaneous
            if kind == "cell":
                rows.append((method, baseline, ALL_STARS, ALL_STARS, len(y), float(one.estimate), float(one.low), float(one.high)))
            counts, ends = np.bincount(group, minlength=len(names)), (each.estimate, each.low, each.high)
            rows += [(method, baseline, kind, *row) for row in zip(names, counts, *map(np.asarray, ends), strict=True)]
    return pd.DataFrame(rows, columns=["method", "baseline", "by", "stars", "n_test", "delta_r2", "low", "high"])
