"""What does the MLP regression gate owe to its features, its size, its penalties, its stars? One change at a time.

python -m experiments.ablate_gate                  about 3 min on 2 cores
python -m experiments.ablate_gate --preset smoke   small; about two minutes

Results go to results/ablate_gate/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Literal

import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import SMALL, StudyConfig
from experiments.pipeline.gates import CONVERGED_LINEAR, GateRun, Sweep, gate_keys, mix_by_class, run_gates, train_gates
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.results import output_folder
from experiments.report.variants import compare_by, write_variants
from experiments.runner.command_line import run_command
from experiments.runner.stages import Stages
from moe_jax.gates.features import FEATURE_NAMES
from moe_jax.gates.networks import MLPGate
from moe_jax.gates.training import GateConfig, Hyper

CA_LINES = ("depth_8498", "EW_8498", "depth_8542", "EW_8542", "depth_8662", "EW_8662", "EW_CaT")
SODIUM = ("depth_Na", "EW_Na")
COMPONENTS = ("PCA1", "PCA2", "PCA3", "PCA4")
FEATURE_GROUPS = {
    "no PCA": CA_LINES + SODIUM,
    "PCA only": COMPONENTS,
    "no Na": CA_LINES + COMPONENTS,
    "no Ca II": SODIUM + COMPONENTS,
    "Ca II only": CA_LINES,
    "EW_CaT only": ("EW_CaT",),
}


@dataclass(frozen=True)
class AblateConfig(StudyConfig):
    """The baseline, and what is changed."""

    preset: Literal["default", "smoke"] = "default"
    """What the other options start from."""
    n_seeds: int = 4
    """Gates of each kind."""
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    """Of the baseline."""
    widths: tuple[int, ...] = (8, 16, 32, 128, 256)
    """Hidden units."""
    weight_decays: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    entropy_penalties: tuple[float, ...] = (-1e-2, -1e-3, 1e-3, 1e-2)
    temperatures: tuple[float, ...] = (0.5, 0.75, 1.5, 2.0)
    """At which the trained baseline's weights are used."""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Part of the covered training stars that the gate is trained on."""


PRESETS = {
    "default": AblateConfig(),
    "smoke": AblateConfig(
        preset="smoke",
        **SMALL,
        n_seeds=2,
        gate=GateConfig(epochs=5),
        widths=(8,),
        fractions=(0.5,),
    ),
}


def train_variants(config: AblateConfig, prepared: Prepared) -> dict[str, np.ndarray]:
    """Predictions by seed of all variants whose arrays have the baseline's shapes: one vectorised call."""
    stars, test = prepared.gate_stars(), prepared.test.covered()
    n_features, n_seeds = len(FEATURE_NAMES), config.n_seeds
    own = Hyper.of(config.gate)
    variants: list[tuple[str, Hyper, np.ndarray, float]] = []
    everything = np.ones(n_features, np.float32)
    for name, kept in FEATURE_GROUPS.items():
        variants.append((f"features: {name}", own, np.isin(FEATURE_NAMES, kept).astype(np.float32), 1.0))
    for value in config.weight_decays:
        variants.append((f"weight decay {value:g}", own._replace(weight_decay=value), everything, 1.0))
    for value in config.entropy_penalties:
        variants.append((f"entropy penalty {value:g}", own._replace(entropy_penalty=value), everything, 1.0))
    for value in config.temperatures:
        variants.append((f"temperature {value:g} after training", own, everything, value))
    hyper = Hyper(*(jnp.repeat(jnp.array(column), n_seeds) for column in zip(*(v[1] for v in variants), strict=True)))
    sweep = train_gates(
        jnp.tile(gate_keys(config, n_seeds), len(variants)),
        prepared.classifier.params,
        stars,
        test,
        MLPGate(config.hidden),
        config.gate,
        hyper=hyper,
        mask=np.repeat(np.stack([v[2] for v in variants]), n_seeds, axis=0),
        temperature=np.repeat(np.array([v[3] for v in variants], np.float32), n_seeds),
    )
    by_variant = np.asarray(sweep.predictions).reshape(len(variants), n_seeds, -1)
    return {variant[0]: predictions for variant, predictions in zip(variants, by_variant, strict=True)}


def main(config: AblateConfig) -> pd.DataFrame:
    """Trains all variants and writes the results."""
    stages = Stages()
    output_folder(config, "ablate_gate")
    prepared = prepare(config.data, stages, config.cache)
    baseline_run = GateRun(MLPGate(config.hidden), config.gate, n_seeds=config.n_seeds)
    found: dict[str, np.ndarray] = {}

    def keep(name: str, sweep: Sweep) -> None:
        found[name] = np.asarray(sweep.predictions)

    with stages("baseline"):
        keep("baseline", run_gates(config, prepared, baseline_run))
        keep("linear gate, converged", run_gates(config, prepared, CONVERGED_LINEAR))
    with stages("features, penalties and temperatures"):
        found |= train_variants(config, prepared)
    with stages("widths"):
        for width in config.widths:
            run = dataclasses.replace(baseline_run, gate=MLPGate(width))
            keep(f"{width} hidden units", run_gates(config, prepared, run))
    with stages("numbers of stars"):
        for fraction in config.fractions:
            run = dataclasses.replace(baseline_run, fraction=fraction)
            keep(f"{round(fraction * prepared.n_covered):,} gate stars", run_gates(config, prepared, run))
    # Trained on stars with uniform labels, and judged on the same test stars.
    if config.train_file is None:
        other = dataclasses.replace(config, label_sampling="uniform", test_sampling=config.test_sampling or config.label_sampling)
        uniform = prepare(other.data, stages, config.cache)
        with stages("gates of uniform labels"):
            keep("trained on uniform labels", run_gates(other, uniform, baseline_run))
            found["classification gate, uniform labels"] = mix_by_class(uniform, uniform.test.covered())
    test = prepared.test.covered()
    found["classification gate"] = mix_by_class(prepared, test)
    with stages("bootstrap"):
        table = compare_by(
            config,
            test.log_g,
            found,
            found["baseline"],
        )
    write_variants(
        "ablate_gate",
        "One change at a time",
        config,
        PRESETS,
        stages,
        table,
        setup=f"The baseline is the MLP gate with {config.hidden} hidden units, all 13 features, cross-fitted expert predictions "
        f"of {prepared.n_covered:,} stars, Adam for {config.gate.epochs} epochs. {len(test.log_g):,} covered test stars, the same "
        "for all. A positive entropy penalty asks for sharper weights.",
        against="the baseline",
        groups=[_group(name) for name in found],
    )
    return table


def _group(name: str) -> str:
    for start in ("features", "weight decay", "entropy", "temperature"):
        if name.startswith(start):
            return "penalties" if start in ("weight decay", "entropy", "temperature") else "features"
    return "size" if name.endswith(("units", "stars")) else "gates and labels"


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
