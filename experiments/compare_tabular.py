"""A mixture of ridge experts on a data set that has nothing to do with stars, beside what one would use otherwise.

    python -m experiments.compare_tabular                  about a minute on 2 cores
    python -m experiments.compare_tabular --preset smoke   one repetition

scikit-learn's diabetes data: 442 patients, ten columns, the progress of the disease a year later. Predictions are out-of-fold,
in repeated 10-fold cross-validation; intervals by bootstrap over the patients. Results go to results/compare_tabular/PRESET.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np
from sklearn.datasets import load_diabetes
from sklearn.ensemble import HistGradientBoostingRegressor, StackingRegressor
from sklearn.linear_model import RidgeCV
from sklearn.model_selection import KFold, cross_val_predict
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

from experiments.report.figures import interval_plot
from experiments.report.markdown import interval, table_markdown
from experiments.report.results import output_folder, write_results
from experiments.runner.command_line import run_command
from experiments.runner.provenance import command_of, describe_run
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import InputError
from moe_jax.estimator import RidgeMixtureRegressor
from moe_jax.evaluate.bootstrap import DEFAULT_METHOD
from moe_jax.evaluate.intervals import IntervalMethod
from moe_jax.evaluate.variants import compare_variants
from moe_jax.mixture import ALPHAS


@dataclass(frozen=True)
class TabularConfig:
    """The comparison."""

    preset: Literal["default", "smoke"] = "default"
    """What the other options start from."""
    n_repeats: int = 5
    """Divisions into folds."""
    n_folds: int = 10
    """Folds of the cross-validation."""
    n_experts: int = 4
    """Clusters, each with its expert."""
    n_resamples: int = 1_000
    """Bootstrap resamples."""
    confidence_level: float = 0.95
    interval_method: IntervalMethod = DEFAULT_METHOD
    """Of the bootstrap intervals."""
    seed: int = 0
    output_dir: Path | None = None
    """Where the results go; results/compare_tabular/PRESET by default."""

    def __post_init__(self) -> None:
        for name, least in (("n_repeats", 1), ("n_folds", 2), ("n_experts", 1), ("n_resamples", 1)):
            if getattr(self, name) < least:
                raise InputError(f"{name} is {getattr(self, name)}, expected at least {least}")


PRESETS = {"default": TabularConfig(), "smoke": TabularConfig(preset="smoke", n_repeats=1, n_folds=5)}
BASELINE = "global ridge"


def estimators(config: TabularConfig, seed: int) -> dict[str, Any]:
    """What is compared."""
    ridge = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
    boosting = HistGradientBoostingRegressor(random_state=seed)
    return {
        BASELINE: ridge,
        "ridge mixture, MLP gate": RidgeMixtureRegressor(config.n_experts, random_state=seed),
        "ridge mixture, linear gate": RidgeMixtureRegressor(config.n_experts, gate="linear", random_state=seed),
        "HistGradientBoosting": boosting,
        "stacking of ridge and boosting": StackingRegressor([("ridge", ridge), ("boosting", boosting)], final_estimator=RidgeCV()),
    }


def main(config: TabularConfig) -> None:
    """Compares, and writes the results."""
    stages, folder = Stages(), output_folder(config, "compare_tabular")
    x, y = load_diabetes(return_X_y=True)
    predictions: dict[str, list[np.ndarray]] = {}
    for name in estimators(config, 0):
        with stages.steps(name, config.n_repeats) as advance:
            for repeat in range(config.n_repeats):
                seed = config.seed + repeat
                folds = KFold(config.n_folds, shuffle=True, random_state=seed)
                predictions.setdefault(name, []).append(cross_val_predict(estimators(config, seed)[name], x, y, cv=folds))
                advance()
    with stages("bootstrap"):
        variants = {name: np.stack(repeats) for name, repeats in predictions.items()}
        table = compare_variants(
            jax.random.key(config.seed),
            y,
            variants,
            variants[BASELINE],
            n_resamples=config.n_resamples,
            confidence_level=config.confidence_level,
            method=config.interval_method,
        )
    for row in table.to_dict("records"):
        difference = interval(row["delta_r2"], row["low"], row["high"])
        console.print(f"{row['variant']:<40} R2 {row['r2']:.4f}  {difference}", highlight=False)
    label = f"$\\Delta R^2$ against the {BASELINE}, {100 * config.confidence_level:g} % intervals"
    figure = interval_plot(list(table["variant"]), table, label)
    command = command_of("compare_tabular", config, PRESETS)
    shown = table.drop(columns=["standard_error", "low", "high"]).rename(columns={"n_seeds": "repeats", "delta_r2": "delta R2"})
    shown["delta R2"] = [interval(row["delta_r2"], row["low"], row["high"]) for row in table.to_dict("records")]
    report = [
        "# A mixture of ridge experts on other data",
        f"Made by `{command}`.",
        f"Diabetes data of scikit-learn ({len(y)} patients, {x.shape[1]} columns): out-of-fold predictions of "
        f"{config.n_folds}-fold cross-validation, repeated {config.n_repeats} times with other folds and seeds. Mixtures have "
        f"{config.n_experts} experts, one for each cluster of the training rows; everything is chosen within the training part of "
        "each fold.",
        table_markdown(shown),
        f"Intervals: {100 * config.confidence_level:g} %, {config.interval_method} bootstrap over the patients "
        f"({config.n_resamples:,} resamples) of the mean over repetitions.",
        "![Differences of R2](delta_r2.png)",
    ]
    run = describe_run(command, config, stages.seconds)
    write_results(folder, {"variants": table}, {"delta_r2": figure}, "\n\n".join(report) + "\n", run)


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
