"""What of the stars outside the nine cells? Edge clamp, a tenth expert, the global ridge, or nothing at all, on all test stars.

    python -m experiments.cover_all                  about 4 min on 2 cores
    python -m experiments.cover_all --preset smoke   small; about a minute

Results go to results/cover_all/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import QUICK, Coverage, DataConfig, GateStudyConfig
from experiments.pipeline.gates import gate_keys, mix_by_class, train_gates
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared, Stars
from experiments.report.markdown import load_published, table_markdown
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, variants_results
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages
from moe_jax.evaluate.metrics import r2_score
from moe_jax.experts.cells import N_CELLS
from moe_jax.experts.fit import cross_fitted_predictions


@dataclass(frozen=True)
class CoverConfig(GateStudyConfig):
    """The experiment on all stars."""

    data: DataConfig = group(DataConfig(), without=("coverage",))

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=1)
        self.data.experts.require_global_ridge()


PRESETS = {"default": CoverConfig(), "smoke": CoverConfig(**QUICK)}


def with_global_expert(prepared: Prepared) -> tuple[Stars, Stars]:
    """Training and test stars of a gate over ten experts, the tenth of which is the global ridge."""

    def replace(stars: Stars, tenth: object) -> Stars:
        return stars._replace(predictions=jnp.asarray(stars.predictions).at[:, N_CELLS].set(jnp.asarray(tenth)))

    train = replace(prepared.gate_stars(), prepared.global_ridge.out_of_fold)
    return train, replace(prepared.test, prepared.test.global_prediction)


def predict_all(config: CoverConfig, stages: Stages) -> tuple[dict[str, np.ndarray], Stars]:
    """Predictions of each way for all test stars, by seed; and the test stars with their cells (-1: not covered)."""
    keys, cache = gate_keys(config.data, config.n_seeds), config.output.cache
    predictions: dict[str, np.ndarray] = {}

    def both(name: str, prepared: Prepared, train: Stars, test: Stars) -> None:
        params = prepared.classifier.params
        predictions[f"{name}, classification gate"] = mix_by_class(prepared, test)
        sweep = train_gates(keys, params, train, test, config.mlp, config.gate)
        predictions[f"{name}, MLP regression gate"] = np.asarray(sweep.predictions)

    def prepare_with(coverage: Coverage) -> Prepared:
        experts = dataclasses.replace(config.data.experts, coverage=coverage)
        return prepare(dataclasses.replace(config.data, experts=experts), stages, cache)

    cells = prepare_with("cells")
    predictions["global ridge alone"] = np.asarray(cells.test.global_prediction)[None, :]
    with stages("gates: no special treatment"):
        both("no special treatment", cells, cells.gate_stars(), cells.test)
        # All experts are strangers to a star outside the cells, so its predictions are free of leakage as they are.
        cross_fitted = cross_fitted_predictions(jnp.asarray(cells.train.predictions), cells.experts.out_of_fold, cells.train.cell)
        everyone = cells.train._replace(predictions=cross_fitted)
        sweep = train_gates(keys, cells.classifier.params, everyone, cells.test, config.mlp, config.gate)
        predictions["nine experts, MLP gate trained on all stars"] = np.asarray(sweep.predictions)
    clamped = prepare_with("edge_clamp")
    with stages("gates: edge clamp"):
        both("edge clamp", clamped, clamped.gate_stars(), clamped.test)
    tenth = prepare_with("tenth_expert")
    with stages("gates: tenth expert, global fallback"):
        both("tenth expert", tenth, tenth.gate_stars(), tenth.test)
        both("global fallback", tenth, *with_global_expert(tenth))
    return predictions, cells.test


def compute(config: CoverConfig, stages: Stages) -> Results:
    """Trains all gates."""
    predictions, test = predict_all(config, stages)
    with stages("bootstrap"):
        table = compare_by(config, test.log_g, predictions, predictions["no special treatment, classification gate"])
    covered = np.asarray(test.cell) >= 0
    y = np.asarray(test.log_g)
    for column, rows in (("r2_covered", covered), ("r2_outside", ~covered)):
        table[column] = [np.mean([float(r2_score(y[rows], p[rows])) for p in seeds]) for seeds in predictions.values()]
    published = load_published()["full_coverage"]
    report = pd.DataFrame({"way": list(published), "report R2 (1,000 stars)": list(published.values())})
    return variants_results(
        "All stars",
        config.bootstrap,
        table,
        setup=f"All {len(y):,} test stars, {int(covered.sum()):,} of them covered by the nine cells. *No special treatment*: "
        "experts and gates of the nine cells, applied to all stars. *Edge clamp*: experts and gates trained on all stars, each "
        "with the nearest cell's. *Tenth expert*: a ridge and a class of its own for the stars outside. *Global fallback*: that "
        "class's weight goes to the global ridge. The way is decided by the gate from the features, never by a test star's labels.",
        against="no special treatment, classification gate",
        groups=[name.split(", ")[0] if ", " in name and not name.startswith("nine") else "other" for name in predictions],
        sections=[
            "## What the report's follow-up found (other spectra)",
            table_markdown(report),
            "It does not name its gate; its ways are those of the classification gate here.",
        ],
    )


main = Study("cover_all", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
