"""What do the gates score once they have converged? Linear and MLP, from random params and from the classification gate.

    python -m experiments.converge_gate                  Adam (100, 1,000 epochs) and L-BFGS, 4 seeds; about 6 min on 2 cores
    python -m experiments.converge_gate --preset smoke   small; about a minute

Results go to results/converge_gate/PRESET.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

from experiments.pipeline.config import QUICK, GateStudyConfig
from experiments.pipeline.gates import GateRun, Sweep, mix_by_class, run_gates, training_stars
from experiments.pipeline.methods import PROTOCOLS
from experiments.pipeline.prepare import prepare
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, seed_interval, variants_results
from experiments.runner.command_line import group, require_at_least, require_fraction, run_command
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.variance import mean_over_seeds
from moe_jax.gates import Gate, GateConfig, LinearGate, mixture_loss

#: Adam with ten times the epochs.
LONGER = "Adam, longer"
STARTS: dict[str, Literal["random", "logistic"]] = {"cold": "random", "warm": "logistic"}


@dataclass(frozen=True)
class ConvergeConfig(GateStudyConfig):
    """Gates and their fits."""

    in_sample_fraction: float = 0.2
    """Fraction of the covered training stars on which the in-sample gates are trained."""
    patience: int = 100
    """Iterations of L-BFGS without a better loss on held-out stars, after which the MLP's training stops."""
    max_iterations: int = 2_000
    """Iterations of L-BFGS."""
    gate: GateConfig = group(GateConfig(), prefix=True, without=("optimizer", "init", "max_iterations"))

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=1, patience=1, max_iterations=1)
        require_fraction(self, "in_sample_fraction")


PRESETS = {"default": ConvergeConfig(), "smoke": ConvergeConfig(**QUICK, in_sample_fraction=1.0, max_iterations=50)}


def runs_of(config: ConvergeConfig) -> dict[tuple[str, str, str, str], GateRun]:
    """All gates by form, protocol, optimiser and start."""
    adam = config.gate
    lbfgs = GateConfig(optimizer="lbfgs", patience=config.patience, max_iterations=config.max_iterations)
    # 126 weights cannot fit the noise of thousands of stars: the linear gate is fitted on all of them to its optimum.
    trainings = {
        "linear": {"Adam": adam, "L-BFGS": dataclasses.replace(lbfgs, validation_fraction=0.0)},
        "MLP": {"Adam": adam, LONGER: dataclasses.replace(adam, epochs=10 * adam.epochs), "L-BFGS": lbfgs},
    }
    gates: dict[str, Gate] = {"linear": LinearGate(), "MLP": config.mlp}
    runs = {}
    for protocol, fraction in zip(PROTOCOLS, (config.in_sample_fraction, 1.0), strict=True):
        for form, gate in gates.items():
            for optimiser, start in itertools.product(trainings[form], STARTS):
                drawn = (form, optimiser, start) != ("linear", "L-BFGS", "warm")
                training = dataclasses.replace(trainings[form][optimiser], init=STARTS[start])
                run = GateRun(gate, training, protocol, fraction, config.n_seeds if drawn else 1)
                runs[form, protocol, optimiser, start] = run
    return runs


def more_training(config: ConvergeConfig, y: AnyArray, sweeps: Mapping[tuple[str, str, str, str], Sweep]) -> pd.DataFrame:
    """What more training changes for the MLP, seed by seed: the loss on its held-out stars, and R2 on the test stars.

    The intervals cover gate seeds, those of R2 also the sampling of test stars.
    """
    rows = []
    for protocol in PROTOCOLS:
        short = sweeps["MLP", protocol, "Adam", "cold"]
        for optimiser in (LONGER, "L-BFGS"):
            long = sweeps["MLP", protocol, optimiser, "cold"]
            row: dict[str, Any] = {"protocol": protocol, "optimiser": optimiser, "n_seeds": len(long.loss), "n_test": len(y)}
            loss = np.asarray(long.validation_loss - short.validation_loss)
            changes = {
                "loss": mean_over_seeds(loss, 0.0, config.bootstrap.confidence_level),
                "r2": seed_interval(config, y, long.predictions, short.predictions),
            }
            for name, ends in changes.items():
                row |= dict(zip((f"delta_{name}", f"delta_{name}_low", f"delta_{name}_high"), ends, strict=True))
            rows.append(row)
    return pd.DataFrame(rows)


def compute(config: ConvergeConfig, stages: Stages) -> Results:
    """Trains all gates."""
    prepared = prepare(config.data, stages, config.output.cache)
    runs = runs_of(config)
    trained = stages.each("gates", runs.items())
    sweeps = {kind: run_gates(config.data, prepared, run, config.output.cache) for kind, run in trained}
    test = prepared.test.covered()
    predictions = {", ".join(kind): sweep.predictions for kind, sweep in sweeps.items()}
    with stages("bootstrap"):
        table = compare_by(config, test.log_g, predictions, mix_by_class(prepared, test))
    table[["form", "protocol", "optimiser", "start"]] = list(runs)
    more = more_training(config, test.log_g, sweeps)
    # The linear gate that starts at the classification gate and is fitted on all stars can only fall below its loss.
    classify_loss = {}
    for protocol, fraction in zip(PROTOCOLS, (config.in_sample_fraction, 1.0), strict=True):
        stars = training_stars(config.data, prepared, protocol, fraction)
        data = (stars.features, stars.predictions, stars.log_g)
        classify_loss[protocol] = float(mixture_loss(LinearGate(), prepared.classifier.params, *data))
    table["training_loss"] = [np.mean(sweep.loss) for sweep in sweeps.values()]
    table["classification_gate_training_loss"] = table["protocol"].map(classify_loss)
    table["validation_loss"] = [np.mean(sweep.validation_loss) for sweep in sweeps.values()]
    table["best_epoch"] = [float(np.median(sweep.best_epoch)) for sweep in sweeps.values()]
    table["gradient_norm"] = [np.max(sweep.gradient_norm) for sweep in sweeps.values()]
    table["converged"] = [float(np.mean(sweep.converged)) for sweep in sweeps.values()]
    y = np.asarray(test.log_g)
    seeds = pd.DataFrame(
        {"variant": ", ".join(kind), "seed": i, "loss": sweep.loss[i], "r2": 1 - np.mean(residual**2) / np.var(y)}
        for kind, sweep in sweeps.items()
        for i, residual in enumerate(y[None, :] - sweep.predictions)
    )
    warm = table[(table["form"] == "linear") & (table["optimiser"] == "L-BFGS") & (table["start"] == "warm")]
    holds = bool((warm["training_loss"] <= warm["classification_gate_training_loss"]).all())
    return variants_results(
        "Gates that have converged",
        config.bootstrap,
        table,
        setup=f"{prepared.n_covered:,} covered training stars (cross-fitted: all of them; in-sample: "
        f"{100 * config.in_sample_fraction:g} %), {len(test.log_g):,} "
        f"covered test stars. cold: random params; warm: the classification gate's. The linear gate by L-BFGS is fitted on all its "
        f"stars until no derivative of the loss is above {GateConfig().gradient_tolerance:g}; the MLP by L-BFGS until "
        f"{config.patience} iterations brought no better loss on held-out stars.",
        against="the classification gate",
        groups=[f"{protocol}, {form}" for form, protocol, _, _ in runs],
        sections=[
            f"## What more training changes for the MLP after {config.gate.epochs} epochs of Adam",
            table_markdown(more, {"delta_loss": "+.5f", "delta_loss_low": "+.5f", "delta_loss_high": "+.5f"}),
            f"*{LONGER}*: the cap is {10 * config.gate.epochs:,} epochs instead of {config.gate.epochs}, the patience the same. "
            "*loss*: on the stars that each seed holds out, whose lowest loss decides which params are kept; intervals over seeds. "
            "*R2*: intervals over seeds and test stars.",
            "## Optima of the linear gate",
            optima(table),
            "The training loss of the linear gate that starts at the classification gate must not exceed the classification "
            f"gate's on the same stars: it {'does not' if holds else 'DOES'}. Converged: share of the seeds within the "
            "gradient tolerance; gradient norm: the largest over seeds. `seeds.csv` has each seed.",
        ],
        tables={"seeds": seeds, "more_training": more},
        fields={"inequality_holds": holds},
    )


def optima(table: pd.DataFrame) -> str:
    """How far the stationary points of the linear gate's loss lie apart. The loss is not convex, so there may be several."""
    texts = []
    for protocol in PROTOCOLS:
        chosen = (table["form"] == "linear") & (table["optimiser"] == "L-BFGS") & (table["protocol"] == protocol)
        fits = sorted(table[chosen].to_dict("records"), key=lambda row: row["training_loss"])
        each = (f"{row['start']} start: training loss {row['training_loss']:.5f}, R2 {row['r2']:.4f}" for row in fits)
        texts.append(f"{protocol}: {', '.join(each)}")
    return (
        "The squared error of a softmax mixture is not convex. From different starts, L-BFGS ends at different points where no "
        f"derivative is left ({'; '.join(texts)}). The other commands use the gate of the warm start."
    )


main = Study("converge_gate", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
