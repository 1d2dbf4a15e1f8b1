"""The tables of an experiment: every method on the same covered test stars, overall, by cell, and compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Int, PRNGKeyArray

from experiments.pipeline.methods import CLASSIFY, GLOBAL, ORACLE, PAIRS, REGRESSION_GATES, Method, Pair, Predictions
from experiments.pipeline.stars import Prepared, Stars
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.bootstrap import Bootstrap, bootstrap_delta_r2
from moe_jax.evaluate.metrics import mae, r2_by_group, r2_score, retention, rmse
from moe_jax.experts.cells import CELL_NAMES, N_CELLS
from moe_jax.gates.optimize import GateFit


class Outcome(NamedTuple):
    """All that a run reports."""

    overall: pd.DataFrame
    bins: pd.DataFrame
    bootstrap: pd.DataFrame
    comparisons: dict[Pair, Bootstrap]
    predictions: Predictions
    fits: dict[Method, GateFit]
    weights: dict[Method, jax.Array]
    star: np.ndarray  #: numbers of the covered test stars
    test: Stars
    prepared: Prepared


def overall_table(y: Float[AnyArray, " N"], predictions: Predictions) -> pd.DataFrame:
    """R2, MAE, RMSE and oracle-gain retention rho of each method; the stars are the same for all."""
    r2 = {method: float(r2_score(y, prediction)) for method, prediction in predictions.items()}
    rows = [
        {
            "method": method.name,
            "protocol": method.protocol,
            "r2": r2[method],
            "mae": float(mae(y, prediction)),
            "rmse": float(rmse(y, prediction)),
            "rho": retention(r2[method], r2[GLOBAL], r2[ORACLE]),
        }
        for method, prediction in predictions.items()
    ]
    return pd.DataFrame(rows)


def compare(
    key: PRNGKeyArray,
    y: Float[AnyArray, " N"],
    predictions: Predictions,
    cell: Int[AnyArray, " N"],
    *,
    pairs: Sequence[Pair] = PAIRS,
    **options: Any,
) -> dict[Pair, Bootstrap]:
    """Delta R2 of each pair, overall and by cell, on the same resamples; options as those of ``bootstrap_gain``."""

    def bootstrap(pair: Pair) -> Bootstrap:
        same_key = jax.random.clone(key)
        method, baseline = predictions[pair.method], predictions[pair.baseline]
        return bootstrap_delta_r2(same_key, y, method, baseline, groups=cell, n_groups=N_CELLS, **options)

    return {pair: bootstrap(pair) for pair in pairs}


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


def published_verdict(r2: float, r2_baseline: float, margin: float = 0.003) -> str:
    """The published report's rule, without an interval.

    "passed": R2 exceeds the baseline's by more than the margin; "partial": by less than that; "failed": not at all.
    """
    return "passed" if r2 > r2_baseline + margin else "partial" if r2 > r2_baseline else "failed"
