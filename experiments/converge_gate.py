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

from experiments.pipeline.config import SMALL, BootstrapOptions, DataConfig, OutputOptions
from experiments.pipeline.gates import GateRun, Sweep, mix_by_class, run_gates, training_stars
from experiments.pipeline.methods import PROTOCOLS
from experiments.pipeline.prepare import prepare
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, variants_results
from experiments.runner.command_line import group, run_command
from experiments.runner.stages import Stages
from moe_jax.gates.networks import LinearGate, MLPGate
from moe_jax.gates.training import GateConfig, mixture_loss


@dataclass(frozen=True)
class ConvergeConfig:
    """Gates and their fits."""

    preset: Literal["default", "smoke"] = "default"
    """Preset from which the other options start."""
    n_seeds: int = 4
    """Gates of each kind."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    in_sample_fraction: float = 0.2
    """Fraction of the covered training stars on which the in-sample gates are trained."""
    patience: int = 100
    """Iterations of L-BFGS without a better loss on held-out stars, after which the MLP's training stops."""
    max_iterations: int = 2_000
    """Iterations of L-BFGS."""
    mlp: MLPGate = group(MLPGate())
    data: DataConfig = group(DataConfig())
    bootstrap: BootstrapOptions = group(BootstrapOptions())
    output: OutputOptions = group(OutputOptions())


PRESETS = {
    "default": ConvergeConfig(),
    "smoke": ConvergeConfig(
        preset="smoke", data=SMALL, in_sample_fraction=1.0, n_seeds=2, gate=GateConfig(epochs=5), max_iterations=50
    ),
}


def runs_of(config: ConvergeConfig) -> dict[tuple[str, str, str, str], GateRun]:
    """All gates by form, protocol, optimiser and start."""
    adam = config.gate
    lbfgs = GateConfig(optimizer="lbfgs", patience=config.patience, max_iterations=config.max_iterations)
    runs = {}
    for protocol, fraction in zip(PROTOCOLS, (config.in_sample_fraction, 1.0), strict=True):
        for name, gate in (("linear", LinearGate()), ("MLP", config.mlp)):
            # 126 weights cannot fit the noise of thousands of stars: the linear gate is fitted on all of them to its optimum.
            converged = dataclasses.replace(lbfgs, validation_fraction=0.0) if name == "linear" else lbfgs
            for how, training in ((f"Adam {adam.epochs}", adam), ("L-BFGS", converged)):
                for start in ("cold", "warm"):
                    drawn = how != "L-BFGS" or name != "linear" or start == "cold"
                    chosen = dataclasses.replace(training, init="random" if start == "cold" else "logistic")
                    n_seeds = config.n_seeds if drawn else 1
                    runs[name, protocol, how, start] = GateRun(gate, chosen, protocol, fraction, n_seeds)
    return runs


def compute(config: ConvergeConfig, stages: Stages) -> Results:
    """Trains all gates."""
    prepared = prepare(config.data, stages, config.output.cache)
    runs = runs_of(config)
    sweeps: dict[tuple[str, str, str, str], Sweep] = {}
    with stages.steps("gates", len(runs)) as advance:
        for kind, run in runs.items():
            sweeps[kind] = run_gates(config.data, prepared, run, config.output.cache)
            advance()
    test = prepared.test.covered()
    predictions = {", ".join(kind): sweep.predictions for kind, sweep in sweeps.items()}
    with stages("bootstrap"):
        table = compare_by(config, test.log_g, predictions, mix_by_class(prepared, test))
    table[["form", "protocol", "optimiser", "start"]] = [(form, p, how.split()[0], start) for form, p, how, start in runs]
    # The linear gate that starts at the classification gate and is fitted on all stars can only fall below its loss.
    classify_loss = {}
    for protocol, fraction in zip(PROTOCOLS, (config.in_sample_fraction, 1.0), strict=True):
        stars = training_stars(config.data, prepared, protocol, fraction)
        x, yhat, y = map(jnp.asarray, (stars.features, stars.predictions, stars.log_g))
        classify_loss[protocol] = float(mixture_loss(LinearGate(), prepared.classifier.params, x, yhat, y))
    table["training_loss"] = [np.mean(sweep.loss) for sweep in sweeps.values()]
    table["classification_gate_training_loss"] = [classify_loss[run.protocol] for run in runs.values()]
    table["validation_loss"] = [np.mean(sweep.validation_loss) for sweep in sweeps.values()]
    table["best_epoch"] = [float(np.median(sweep.best_epoch)) for sweep in sweeps.values()]
    table["gradient_norm"] = [np.max(sweep.gradient_norm) for sweep in sweeps.values()]
    table["converged"] = [float(np.mean(sweep.converged)) for sweep in sweeps.values()]
    lowest = pd.DataFrame(
        {
            "variant": ", ".join(kind),
            "seed": i,
            "loss": sweep.loss[i],
            "r2": 1 - np.mean(residual**2) / np.var(np.asarray(test.log_g)),
        }
        for kind, sweep in sweeps.items()
        for i, residual in enumerate(np.asarray(test.log_g)[None, :] - sweep.predictions)
    )
    holds = all(
        row["training_loss"] <= row["classification_gate_training_loss"]
        for row in table.to_dict("records")
        if (row["form"], row["optimiser"], row["start"]) == ("linear", "L-BFGS", "warm")
    )
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
            "The training loss of the linear gate that starts at the classification gate must not exceed the classification "
            f"gate's on the same stars: it {'does not' if holds else 'DOES'}. Converged: share of the seeds within the "
            "gradient tolerance; gradient norm: the largest over seeds. `seeds.csv` has each seed.",
        ],
        tables={"seeds": lowest},
        fields={"inequality_holds": holds},
    )


main = Study("converge_gate", PRESETS, compute)


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
