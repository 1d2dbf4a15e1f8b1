"""A mixture of ridge experts on a data set that has nothing to do with stars, beside what one would use otherwise.

    python -m experiments.compare_tabular                  about a minute on 2 cores
    python -m experiments.compare_tabular --preset smoke   one repetition

scikit-learn's diabetes data: 442 patients, ten columns, the progress of the disease a year later. Predictions are out-of-fold,
in repeated 10-fold cross-validation; intervals by bootstrap over the patients. Results go to results/compare_tabular/PRESET.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jax
import numpy as np

from experiments.pipeline.config import BootstrapOptions, OutputOptions, StudyConfig
from experiments.report.results import Results, Study
from experiments.report.variants import variants_results
from experiments.runner.command_line import group, require_at_least, require_seed, run_command
from experiments.runner.stages import Stages
from moe_jax.evaluate.variants import compare_variants
from moe_jax.mixture import ALPHAS


@dataclass(frozen=True)
class TabularConfig(StudyConfig):
    """The comparison."""

    n_repeats: int = 5
    """Divisions into folds."""
    n_folds: int = 10
    """Folds of the cross-validation."""
    n_experts: int = 4
    """Clusters, each with its expert."""
    seed: int = 0
    """Seed of the folds, the estimators and the resamples."""
    bootstrap: BootstrapOptions = group(BootstrapOptions())
    output: OutputOptions = group(OutputOptions(), without=("cache_dir", "use_cache"))

    def __post_init__(self) -> None:
        require_at_least(self, n_repeats=1, n_folds=2, n_experts=1)
        require_seed(self, "seed")


PRESETS = {"default": TabularConfig(), "smoke": TabularConfig(preset="smoke", n_repeats=1, n_folds=5)}
BASELINE = "global ridge"


def estimators(config: TabularConfig, seed: int) -> dict[str, Any]:
    """What is compared."""
    from sklearn.ensemble import HistGradientBoostingRegressor, StackingRegressor
    from sklearn.linear_model import RidgeCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    from moe_jax.estimator import RidgeMixtureRegressor

    ridge = make_pipeline(StandardScaler(), RidgeCV(ALPHAS))
    boosting = HistGradientBoostingRegressor(random_state=seed)
    return {
        BASELINE: ridge,
        "ridge mixture, MLP gate": RidgeMixtureRegressor(config.n_experts, random_state=seed),
        "ridge mixture, linear gate": RidgeMixtureRegressor(config.n_experts, gate="linear", random_state=seed),
        "HistGradientBoosting": boosting,
        "stacking of ridge and boosting": StackingRegressor([("ridge", ridge), ("boosting", boosting)], final_estimator=RidgeCV()),
    }


def compute(config: TabularConfig, stages: Stages) -> Results:
    """Compares the estimators."""
    from sklearn.datasets import load_diabetes
    from sklearn.model_selection import KFold, cross_val_predict

    x, y = load_diabetes(return_X_y=True)
    predictions: dict[str, list[np.ndarray]] = {}
    for name in estimators(config, 0):
        for seed in stages.each(name, range(config.seed, config.seed + config.n_repeats)):
            folds = KFold(config.n_folds, shuffle=True, random_state=seed)
            predictions.setdefault(name, []).append(cross_val_predict(estimators(config, seed)[name], x, y, cv=folds))
    with stages("bootstrap"):
        variants = {name: np.stack(repeats) for name, repeats in predictions.items()}
        table = compare_variants(jax.random.key(config.seed), y, variants, variants[BASELINE], **config.bootstrap.arguments)
    return variants_results(
        "A mixture of ridge experts on other data",
        config.bootstrap,
        table,
        setup=f"Diabetes data of scikit-learn ({len(y)} patients, {x.shape[1]} columns): out-of-fold predictions of "
        f"{config.n_folds}-fold cross-validation, repeated {config.n_repeats} times with other folds and seeds. Mixtures have "
        f"{config.n_experts} experts, one for each cluster of the training rows; everything is chosen within the training part of "
        "each fold.",
        against=f"the {BASELINE}",
        drawn="patients",
        repeated="repetitions",
    )


main = Study("compare_tabular", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
