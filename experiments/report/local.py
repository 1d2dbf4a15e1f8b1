"""What a run reports of its local linear experts, beside the report's own table."""

from __future__ import annotations

import numpy as np
import pandas as pd

from experiments.pipeline.calibration import LabelledPrediction
from experiments.pipeline.config import BootstrapOptions, DataConfig, draw_keys
from experiments.pipeline.local import NOT_CALIBRATED
from experiments.report.markdown import interval, table_markdown
from moe_jax.apply.conformal import LEVELS
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate import bootstrap_delta_r2, r2_score


def judge_local(
    config: DataConfig, options: BootstrapOptions, stars: LabelledPrediction, mixture: AnyArray
) -> tuple[dict[str, pd.DataFrame], list[str]]:
    """Tables and paragraphs: R2 against the mixture of nine ridges on the covered test stars, and coverage.

    ``stars`` are what the local linear experts predict for these stars, ``mixture`` (N,) is what the other mixture predicts.
    """
    key = draw_keys(config.seed).bootstrap
    difference = bootstrap_delta_r2(key, stars.log_g, stars.prediction, mixture, **options.arguments).overall
    gain, low, high = (float(value) for value in (difference.estimate, difference.low, difference.high))
    residuals = [stars.log_g - np.asarray(mixture), stars.residual]
    r2 = [float(r2_score(stars.log_g, stars.log_g - residual)) for residual in residuals]
    scores = {
        "method": ["nine ridges, MLP gate", "local linear experts"],
        "r2": r2,
        "rmse": [float(np.sqrt(np.mean(residual**2))) for residual in residuals],
    }
    tables = {"local": pd.DataFrame(scores | {"delta_r2": [np.nan, gain], "low": [np.nan, low], "high": [np.nan, high]})}
    sections = [
        "## Beside the report: local linear experts",
        f"Many local linear experts, in closed form too, fitted to the same stars. On the covered test stars: R2 "
        f"{r2[1]:.4f}, {interval(gain, low, high)} from the mixture of nine ridges with the "
        f"cross-fitted MLP gate (R2 {r2[0]:.4f}). They are in the model: `predict --answer local`.",
    ]
    if not stars.half_width.shape[1]:
        sections.append(f"Their intervals are {NOT_CALIBRATED}.")
    else:
        tables["local_coverage"] = stars.coverage(np.asarray(LEVELS))
        of_level = tables["local_coverage"]["level"] == LEVELS[0]
        sections += [
            "Coverage of their 68 % intervals, with 95 % intervals of the coverage (Clopper-Pearson):",
            table_markdown(tables["local_coverage"][of_level].drop(columns="level"), {}),
        ]
    return tables, sections
