"""What do the gates score once they have converged? Linear and MLP, from random params and from the classification gate.

python -m experiments.converge_gate                  Adam for 100 epochs and L-BFGS, 4 seeds; about 3 min on 2 cores
python -m experiments.converge_gate --preset smoke   small; about a minute

Results go to results/converge_gate/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import SMALL, StudyConfig
from experiments.pipeline.gates import GateRun, Sweep, mix_by_class, run_gates, training_stars
from experiments.pipeline.methods import PROTOCOLS
from experiments.pipeline.prepare import prepare
from experiments.report.results import output_folder
from experiments.report.variants import compare_by, write_variants
from experiments.runner.command_line import run_command
from experiments.runner.stages import Stages
from moe_jax.gates.networks import LinearGate, MLPGate
from moe_jax.gates.training import GateConfig, mixture_loss


@dataclass(frozen=True)
class ConvergeConfig(StudyConfig):
    """Gates and their fits."""

    preset: Literal["default", "smoke"] = "default"
    """What the other options start from."""
    n_seeds: int = 4
    """Gates of each kind."""
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    """Adam, as in the report."""
    in_sample_fraction: float = 0.2
    """Part of the covered training stars on which the in-sample gates are trained."""
    patience: int = 100
    """Of L-BFGS for the MLP, in iterations, on held-out stars."""
    max_iterations: int = 2_000
    """Of L-BFGS."""


PRESETS = {
    "default": ConvergeConfig(),
    "smoke": ConvergeConfig(
        preset="smoke",
        **SMALL,
        in_sample_fraction=1.0,
        n_seeds=2,
        gate=GateConfig(epochs=5),
        max_iterations=50,
    ),
}


def runs_of(config: ConvergeConfig) -> dict[str, GateRun]:
    """All gates by name: protocol x form x start x optimiser."""
    adam = config.gate
    lbfgs = GateConfig(optimizer="lbfgs", patience=config.patience, max_iterations=config.max_iterations)
    runs = {}
    for protocol, fraction in zip(PROTOCOLS, (config.in_sample_fraction, 1.0), strict=True):
        for name, gate in (("linear", LinearGate()), ("MLP", MLPGate(config.hidden))):
            # 126 weights cannot fit the noise of thousands of stars: the linear gate is fitted on all of them to its optimum.
            converged = dataclasses.replace(lbfgs, validation_fraction=0.0) if name == "linear" else lbfgs
            for how, training in ((f"Adam {adam.epochs}", adam), ("L-BFGS", converged)):
                for start in ("cold", "warm"):
                    drawn = how != "L-BFGS" or name != "linear" or start == "cold"
                    chosen = dataclasses.replace(training, init="random" if start == "cold" else "logistic")
                    n_seeds = config.n_seeds if drawn else 1
                    runs[f"{name}, {protocol}, {how}, {start}"] = GateRun(gate, chosen, protocol, fraction, n_seeds)
    return runs


def main(config: ConvergeConfig) -> pd.DataFrame:
    """Trains all gates and writes the results."""
    stages = Stages()
    output_folder(config, "converge_gate")
    prepared = prepare(config.data, stages, config.cache)
    runs = runs_of(config)
    sweeps: dict[str, Sweep] = {}
    with stages.steps("gates", len(runs)) as advance:
        for name, run in runs.items():
            sweeps[name] = run_gates(config, prepared, run)
            advance()
    test = prepared.test.covered()
    baseline = mix_by_class(prepared, test)
    with stages("bootstrap"):
        table = compare_by(
            config,
            test.log_g,
            {name: sweep.predictions for name, sweep in sweeps.items()},
            baseline,
        )
    # The linear gate that starts at the classification gate and is fitted on all stars can only fall below its loss.
    classify_loss = {}
    for protocol, fraction in zip(PROTOCOLS, (config.in_sample_fraction, 1.0), strict=True):
        stars = training_stars(config, prepared, protocol, fraction)
        x, yhat, y = map(jnp.asarray, (stars.features, stars.predictions, stars.log_g))
        classify_loss[protocol] = float(mixture_loss(LinearGate(), prepared.classifier.params, x, yhat, y))
    table["training_loss"] = [np.mean(sweep.loss) for sweep in sweeps.values()]
    table["classification_gate_training_loss"] = [classify_loss[run.protocol] for run in runs.values()]
    table["validation_loss"] = [np.mean(sweep.validation_loss) for sweep in sweeps.values()]
    table["best_epoch"] = [float(np.median(sweep.best_epoch)) for sweep in sweeps.values()]
    table["gradient_norm"] = [np.max(sweep.gradient_norm) for sweep in sweeps.values()]
    table["converged"] = [float(np.mean(sweep.converged)) for sweep in sweeps.values()]
    lowest = pd.DataFrame(
        {"variant": name, "seed": i, "loss": sweep.loss[i], "r2": 1 - np.mean(residual**2) / np.var(np.asarray(test.log_g))}
        for name, sweep in sweeps.items()
        for i, residual in enumerate(np.asarray(test.log_g)[None, :] - sweep.predictions)
    )
    holds = all(
        row["training_loss"] <= row["classification_gate_training_loss"]
        for row in table.to_dict("records")
        if "linear" in row["variant"] and "L-BFGS, warm" in row["variant"]
    )
    write_variants(
        "converge_gate",
        "Gates that have converged",
        config,
        PRESETS,
        stages,
        table,
        setup=f"{prepared.n_covered:,} covered training stars (cross-fitted: all of them; in-sample: "
        f"{100 * config.in_sample_fraction:g} %), {len(test.log_g):,} "
        f"covered test stars. cold: random params; warm: the classification gate's. The linear gate by L-BFGS is fitted on all its "
        f"stars until no derivative of the loss is above {GateConfig().gradient_tolerance:g}; the MLP by L-BFGS until "
        f"{config.patience} iterations brought no better loss on held-out stars.",
        against="the classification gate",
        groups=[f"{run.protocol}, {'MLP' if isinstance(run.gate, MLPGate) else 'linear'}" for run in runs.values()],
        sections=[
            "The training loss of the linear gate that starts at the classification gate must not exceed the classification "
            f"gate's on the same stars: it {'does not' if holds else 'DOES'}. Converged: share of the seeds within the "
            "gradient tolerance; gradient norm: the largest over seeds. `seeds.csv` has each seed.",
        ],
        tables={"seeds": lowest},
        found={"inequality_holds": holds},
    )
    return table


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
