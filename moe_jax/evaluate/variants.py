"""Several variants of a method against one baseline."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import pandas as pd
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.bootstrap import bootstrap_gain
from moe_jax.evaluate.metrics import r2_score


def compare_variants(
    key: PRNGKeyArray,
    y: Float[AnyArray, " N"],
    variants: Mapping[str, Float[AnyArray, "S N"]],
    baseline: Float[AnyArray, "S N"],
    **options: Any,
) -> pd.DataFrame:
    """R2 of variants that were trained with several seeds, and the mean difference from a baseline with its interval.

    The difference is the mean over seeds; its interval is by a paired bootstrap over stars. All variants see the same resamples.
    The baseline may have another number of seeds. The options are those of ``bootstrap_gain``: ``n_resamples``,
    ``confidence_level`` and ``method``.

    Returns:
        One row for each variant: its R2 (mean and standard deviation over seeds), and ``delta_r2`` with its interval ``low`` to
        ``high`` and ``standard_error``.
    """
    y64 = np.asarray(y, np.float64)

    def squared_error(predictions: AnyArray) -> np.ndarray:
        return np.mean((y64[None, :] - np.asarray(predictions, np.float64)) ** 2, axis=0)

    reference, rows = squared_error(baseline), []
    for name, predictions in variants.items():
        gain = (reference - squared_error(predictions)).astype(np.asarray(y).dtype)
        difference = bootstrap_gain(jax.random.clone(key), y, gain, **options).overall
        r2 = [float(r2_score(y, prediction)) for prediction in np.asarray(predictions)]
        rows.append(
            {
                "variant": name,
                "n_seeds": len(r2),
                "r2": np.mean(r2),
                "r2_sd_over_seeds": np.std(r2, ddof=1) if len(r2) > 1 else np.nan,
                "delta_r2": float(difference.estimate),
                "low": float(difference.low),
                "high": float(difference.high),
                "standard_error": float(difference.standard_error),
            }
        )
    return pd.DataFrame(rows)
