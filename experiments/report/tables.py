"""The tables of an experiment: every method on the same covered test stars, overall, by cell, and compared in pairs."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Int, PRNGKeyArray

from experiments.pipeline.methods import CLASSIFY, GLOBAL, ORACLE, PAIRS, REGRESSION_GATES, Pair, Predictions
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.bootstrap import DEFAULT_METHOD, Bootstrap, bootstrap_delta_r2
from moe_jax.evaluate.intervals import IntervalMethod
from moe_jax.evaluate.metrics import mae, r2_by_group, r2_score, retention, rmse
from moe_jax.experts.cells import CELL_NAMES, N_CELLS


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
    n_resamples: int = 1000,
    confidence_level: float = 0.95,
    method: IntervalMethod = DEFAULT_METHOD,
) -> dict[Pair, Bootstrap]:
    """Bootstraps Delta R2 of each pair, overall and by cell, all on the same resamples of stars."""
    return {
        pair: bootstrap_delta_r2(
            jax.random.clone(key),  # the same resamples on purpose
            y,
            predictions[pair.method],
            predictions[pair.baseline],
            n_resamples=n_resamples,
            confidence_level=confidence_level,
            method=method,
            groups=cell,
            n_groups=N_CELLS,
        )
        for pair in pairs
    }


def bin_table(
    y: Float[AnyArray, " N"], predictions: Predictions, cell: Int[AnyArray, " N"], comparisons: dict[Pair, Bootstrap]
) -> pd.DataFrame:
    """R2 of each method in each cell, and Delta R2 of each regression gate against the classification gate.

    The intervals ``low`` to ``high`` are of each cell by itself, ``simultaneous_low`` to ``simultaneous_high`` of all at once.

    NaN where a cell holds fewer than two test stars; the column ``defined`` says so.
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
            table[f"delta_r2_{pair.method.column}"] = np.asarray(bootstrap.group_estimate)
            table[f"delta_r2_{pair.method.column}_low"] = np.asarray(bootstrap.group_low)
            table[f"delta_r2_{pair.method.column}_high"] = np.asarray(bootstrap.group_high)
            table[f"delta_r2_{pair.method.column}_simultaneous_low"] = np.asarray(bootstrap.simultaneous_low)
            table[f"delta_r2_{pair.method.column}_simultaneous_high"] = np.asarray(bootstrap.simultaneous_high)
            table[f"undefined_resamples_{pair.method.column}"] = np.asarray(bootstrap.group_n_undefined)
    return table


def bootstrap_table(comparisons: dict[Pair, Bootstrap]) -> pd.DataFrame:
    """Mean, interval and the fraction of positive samples of each comparison, and the estimate on the stars as they are."""
    rows = []
    for pair, bootstrap in comparisons.items():
        samples = np.asarray(bootstrap.samples)
        defined = samples[~np.isnan(samples)]
        rows.append(
            {
                "comparison": pair.title,
                "mean": defined.mean() if len(defined) else np.nan,
                "low": float(bootstrap.low),
                "high": float(bootstrap.high),
                "fraction_above_0": float((defined > 0).mean()) if len(defined) else np.nan,
                "estimate": float(bootstrap.estimate),
                "n_resamples": len(samples),
                "n_undefined": int(bootstrap.n_undefined),
            }
        )
    return pd.DataFrame(rows)


def verdict(r2: float, r2_baseline: float, low: float, *, margin: float = 0.003) -> str:
    """The report's verdict: passed, partial or failed, and whether the interval's lower end is above 0."""
    outcome = "passed" if r2 > r2_baseline + margin else "partial" if r2 > r2_baseline else "failed"
    return f"{outcome}, {'significant' if low > 0 else 'not significant'}"
