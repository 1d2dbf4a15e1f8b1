"""The tables of an experiment: every method on the same covered test stars, overall, by cell, and compared in pairs."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, Int, PRNGKeyArray

from moe_jax.arrays import AnyArray
from moe_jax.bootstrap import DEFAULT_METHOD, Bootstrap, bootstrap_delta_r2, bootstrap_gain
from moe_jax.cells import CELL_NAMES, N_CELLS
from moe_jax.intervals import IntervalMethod
from moe_jax.metrics import mae, r2_by_group, r2_score, retention, rmse


class Method(NamedTuple):
    """A way to predict, and the protocol by which its gate was trained."""

    name: str
    protocol: str = ""  #: "in-sample", "cross-fitted", or empty where it does not apply

    @property
    def column(self) -> str:
        """Name of its column in the tables."""
        return "_".join(filter(None, (self.name, self.protocol.replace("-", "_"))))

    @property
    def title(self) -> str:
        """Name in print."""
        return f"{self.name} ({self.protocol})" if self.protocol else self.name


GLOBAL, ORACLE, CLASSIFY, HARD, FALLBACK = map(Method, ("global", "oracle", "classify", "hard", "fallback"))
PROTOCOLS = ("in-sample", "cross-fitted")
REGRESSION_GATES = tuple(Method(name, protocol) for protocol in PROTOCOLS for name in ("regress_mlp", "regress_linear"))
METHODS = (GLOBAL, ORACLE, CLASSIFY, HARD, FALLBACK, *REGRESSION_GATES)


class Pair(NamedTuple):
    """Two methods that are compared."""

    method: Method
    baseline: Method

    @property
    def title(self) -> str:
        """Name in print."""
        if self.method.name == self.baseline.name:
            return f"{self.method.name}: {self.method.protocol} - {self.baseline.protocol}"
        if self.method.protocol == self.baseline.protocol:
            return f"{self.method.name} - {self.baseline.name}" + (f" ({self.method.protocol})" if self.method.protocol else "")
        return f"{self.method.name} - {self.baseline.name} ({self.method.protocol or self.baseline.protocol})"


PAIRS = (
    *(Pair(method, CLASSIFY) for method in REGRESSION_GATES),
    *(Pair(method, CLASSIFY) for method in (GLOBAL, ORACLE, HARD, FALLBACK)),
    *(Pair(Method("regress_mlp", protocol), Method("regress_linear", protocol)) for protocol in PROTOCOLS),
    *(Pair(Method(name, PROTOCOLS[1]), Method(name, PROTOCOLS[0])) for name in ("regress_mlp", "regress_linear")),
)

Predictions = dict[Method, Float[AnyArray, " N"]]


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


def compare_variants(
    key: PRNGKeyArray,
    y: Float[AnyArray, " N"],
    variants: Mapping[str, Float[AnyArray, "S N"]],
    baseline: Float[AnyArray, "S N"],
    *,
    n_resamples: int = 1000,
    confidence_level: float = 0.95,
    method: IntervalMethod = DEFAULT_METHOD,
) -> pd.DataFrame:
    """R2 of variants that were trained with several seeds, and the mean difference from a baseline with its interval.

    The interval is the paired bootstrap over stars of the mean over seeds; all variants see the same resamples.

    Args:
        key: random key.
        y: target.
        variants: predictions by seed and star, by name.
        baseline: likewise; its number of seeds may be another.
        n_resamples: B.
        confidence_level: of the intervals.
        method: of the intervals.
    """
    y64 = np.asarray(y, np.float64)

    def squared_error(predictions: AnyArray) -> np.ndarray:
        error: np.ndarray = np.mean((y64[None, :] - np.asarray(predictions, np.float64)) ** 2, axis=0)
        return error

    reference, rows = squared_error(baseline), []
    for name, predictions in variants.items():
        gain = (reference - squared_error(predictions)).astype(np.asarray(y).dtype)
        own = jax.random.clone(key)  # the same resamples on purpose
        bootstrap = bootstrap_gain(own, y, gain, n_resamples=n_resamples, confidence_level=confidence_level, method=method)
        r2 = [float(r2_score(y, prediction)) for prediction in np.asarray(predictions)]
        rows.append(
            {
                "variant": name,
                "n_seeds": len(r2),
                "r2": np.mean(r2),
                "r2_sd_over_seeds": np.std(r2, ddof=1) if len(r2) > 1 else np.nan,
                "delta_r2": float(bootstrap.estimate),
                "low": float(bootstrap.low),
                "high": float(bootstrap.high),
                "standard_error": float(bootstrap.standard_error),
            }
        )
    return pd.DataFrame(rows)


def verdict(r2: float, r2_baseline: float, low: float, *, margin: float = 0.003) -> str:
    """The report's verdict: passed, partial or failed, and whether the interval's lower end is above 0."""
    outcome = "passed" if r2 > r2_baseline + margin else "partial" if r2 > r2_baseline else "failed"
    return f"{outcome}, {'significant' if low > 0 else 'not significant'}"
