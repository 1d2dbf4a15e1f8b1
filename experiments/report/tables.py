"""The tables of an experiment: every method on the same covered test stars, overall, by cell, and compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Int, PRNGKeyArray

from experiments.pipeline.calibration import MAG_EDGES, MAG_NAMES
from experiments.pipeline.config import BootstrapOptions
from experiments.pipeline.methods import CLASSIFY, GLOBAL, ORACLE, PAIRS, REGRESSION_GATES, Method, Pair, Predictions
from experiments.pipeline.stars import Prepared, Stars
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate import Bootstrap, bootstrap_delta_r2, mae, r2_by_group, r2_score, retention, rmse
from moe_jax.experts.cells import CELL_NAMES, N_CELLS
from moe_jax.gates.optimize import GateFit

#: A change of R2 that the report does not count as one.
MARGIN = 0.003


class Outcome(NamedTuple):
    """All that a run reports."""

    overall: pd.DataFrame
    bins: pd.DataFrame
    bootstrap: pd.DataFrame
    comparisons: dict[Pair, Bootstrap]
    predictions: Predictions
    fits: dict[Method, GateFit]
    weights: dict[Method, jax.Array]
    test: Stars
    prepared: Prepared


def overall_table(y: Float[AnyArray, " N"], predictions: Predictions) -> pd.DataFrame:
    """R2, MAE, RMSE and oracle-gain retention rho of each method; the stars are the same for all. rho is NaN without GLOBAL."""
    r2 = {method: float(r2_score(y, prediction)) for method, prediction in predictions.items()}
    r2_global = r2.get(GLOBAL, np.nan)
    return pd.DataFrame(
        {
            "method": method.name,
            "protocol": method.protocol,
            "r2": r2[method],
            "mae": float(mae(y, prediction)),
            "rmse": float(rmse(y, prediction)),
            "rho": retention(r2[method], r2_global, r2[ORACLE]),
        }
        for method, prediction in predictions.items()
    )


def compare(
    key: PRNGKeyArray, y: Float[AnyArray, " N"], predictions: Predictions, cell: Int[AnyArray, " N"], **options: Any
) -> dict[Pair, Bootstrap]:
    """Delta R2 of each of ``PAIRS``, overall and by cell, on the same resamples; options as those of ``bootstrap_gain``.

    Pairs of which a method has no predictions are left out.
    """
    options |= {"groups": cell, "n_groups": N_CELLS}
    return {
        pair: bootstrap_delta_r2(jax.random.clone(key), y, predictions[pair.method], predictions[pair.baseline], **options)
        for pair in PAIRS
        if predictions.keys() >= set(pair)
    }


def bin_table(
    y: Float[AnyArray, " N"], predictions: Predictions, cell: Int[AnyArray, " N"], comparisons: dict[Pair, Bootstrap]
) -> pd.DataFrame:
    """R2 of each method in each cell, and Delta R2 of each regression gate against the classification gate.

    The intervals ``low`` to ``high`` are of each cell by itself, ``simultaneous_low`` to ``simultaneous_high`` of all at once.
    A cell with fewer than two test stars has no R2: its numbers are NaN, and its ``defined`` is False.
    """
    scores = {method: r2_by_group(y, prediction, cell, N_CELLS) for method, prediction in predictions.items()}
    any_score = scores[CLASSIFY]
    table = pd.DataFrame(
        {"bin": range(N_CELLS), "name": CELL_NAMES, "n_test": np.asarray(any_score.n), "defined": np.asarray(any_score.defined)}
    )
    for method, score in scores.items():
        table[f"r2_{method.column}"] = np.asarray(score.r2)
    for pair, bootstrap in comparisons.items():
        if pair.baseline == CLASSIFY and pair.method in REGRESSION_GATES:
            name = f"delta_r2_{pair.method.column}"
            table[name] = np.asarray(bootstrap.groups.estimate)
            for prefix, difference in ((name, bootstrap.groups), (f"{name}_simultaneous", bootstrap.simultaneous)):
                table[f"{prefix}_low"] = np.asarray(difference.low)
                table[f"{prefix}_high"] = np.asarray(difference.high)
            table[f"undefined_resamples_{pair.method.column}"] = np.asarray(bootstrap.groups.n_undefined)
    return table


def bootstrap_table(comparisons: dict[Pair, Bootstrap]) -> pd.DataFrame:
    """Mean, interval and the fraction of positive samples of each comparison, and the estimate on the stars as they are."""
    rows = []
    for pair, bootstrap in comparisons.items():
        difference = bootstrap.overall
        samples = np.asarray(difference.samples)
        defined = samples[~np.isnan(samples)]
        rows.append(
            {
                "comparison": pair.title,
                "mean": defined.mean() if len(defined) else np.nan,
                "low": float(difference.low),
                "high": float(difference.high),
                "fraction_above_0": float((defined > 0).mean()) if len(defined) else np.nan,
                "estimate": float(difference.estimate),
                "n_resamples": len(samples),
                "n_undefined": int(difference.n_undefined),
            }
        )
    return pd.DataFrame(rows)


def verdict(low: float, high: float) -> str:
    """What the interval of a difference says: "better" (above 0), "worse" (below 0), or "no difference shown" (it holds 0)."""
    return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def published_verdict(r2: float, r2_baseline: float) -> str:
    """The published report's rule, without an interval.

    "passed": R2 exceeds the baseline's by more than the margin; "partial": by less than that; "failed": not at all.
    """
    return "passed" if r2 > r2_baseline + MARGIN else "partial" if r2 > r2_baseline else "failed"


def magnitude_bins(mag: Float[AnyArray, " N"]) -> Int[np.ndarray, " N"]:
    """(N,) numbers of the bins ``MAG_NAMES``; those of brighter and fainter stars are the first and the last."""
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

    Within a kind of group the intervals hold for all its groups at once. R2 within a group is that of its stars alone. All
    pairs share the resamples.
    """
    kinds = {"cell": (np.asarray(cell), CELL_NAMES), "magnitude": (magnitude_bins(mag), MAG_NAMES)}
    rows = []
    for method, baseline in pairs:
        for kind, (group, names) in kinds.items():
            by_group = options.arguments | {"groups": group, "n_groups": len(names)}
            difference = bootstrap_delta_r2(jax.random.clone(key), y, predictions[method], predictions[baseline], **by_group)
            one, each = difference.overall, difference.simultaneous
            if kind == "cell":
                rows.append((method, baseline, "all", "all", len(y), *map(float, (one.estimate, one.low, one.high))))
            columns = (names, np.bincount(group, minlength=len(names)), *map(np.asarray, (each.estimate, each.low, each.high)))
            rows += [(method, baseline, kind, *row) for row in zip(*columns, strict=True)]
    return pd.DataFrame(rows, columns=["method", "baseline", "by", "stars", "n_test", "delta_r2", "low", "high"])
