"""What does the MLP regression gate owe to its features, its size, its penalties, its stars? One change at a time.

    python -m experiments.ablate_gate                  about 9 min on 2 cores
    python -m experiments.ablate_gate --preset smoke   small; about two minutes

Results go to results/ablate_gate/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline.config import QUICK, GateStudyConfig
from experiments.pipeline.gates import CONVERGED_LINEAR, Changes, GateRun, gate_keys, mix_by_class, run_gates, train_gates
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.results import Results, Study
from experiments.report.variants import compare_by, variants_results
from experiments.runner.command_line import group, require_at_least, require_fraction, run_command
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray
from moe_jax.gates import FEATURE_NAMES, GateConfig, Hyper, MLPGate

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

#: A variant: its name, what was changed, and to what.
Variant = tuple[str, str, str]
#: Kind of each change, for colours.
KINDS = {
    "features": "features",
    "weight decay": "penalties",
    "entropy penalty": "penalties",
    "temperature": "penalties",
    "hidden units": "size",
    "gate stars": "size",
}


@dataclass(frozen=True)
class AblateConfig(GateStudyConfig):
    """The baseline, and what is changed."""

    widths: tuple[int, ...] = (8, 16, 32, 128, 256)
    """Numbers of hidden units."""
    weight_decays: tuple[float, ...] = (1e-5, 1e-4, 1e-3, 1e-2)
    """Factors of the squared kernel weights in the loss."""
    entropy_penalties: tuple[float, ...] = (-1e-2, -1e-3, 1e-3, 1e-2)
    """Factors of the weights' entropy in the loss."""
    temperatures: tuple[float, ...] = (0.5, 0.75, 1.5, 2.0)
    """Temperatures at which the weights of the trained baseline are used."""
    fractions: tuple[float, ...] = (0.05, 0.1, 0.2, 0.5)
    """Fractions of the covered training stars that the gate is trained on."""
    gate: GateConfig = group(GateConfig(), prefix=True, without=("optimizer", "max_iterations"))

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=1)
        require_fraction(self, "fractions")


PRESETS = {"default": AblateConfig(), "smoke": AblateConfig(**QUICK, widths=(8,), fractions=(0.5,))}


def train_variants(config: AblateConfig, prepared: Prepared) -> dict[Variant, np.ndarray]:
    """Predictions by seed of all variants whose arrays have the baseline's shapes: one vectorised call."""
    n_seeds, baseline, everything = config.n_seeds, Hyper.of(config.gate), np.ones(len(FEATURE_NAMES), np.float32)
    variants: dict[Variant, Changes] = {}
    for name, kept in FEATURE_GROUPS.items():
        mask = np.isin(FEATURE_NAMES, kept).astype(np.float32)
        variants[f"features: {name}", "features", name] = Changes(baseline, mask, 1.0)
    for value in config.weight_decays:
        hyper = baseline._replace(weight_decay=value)
        variants[f"weight decay {value:g}", "weight decay", f"{value:g}"] = Changes(hyper, everything, 1.0)
    for value in config.entropy_penalties:
        hyper = baseline._replace(entropy_penalty=value)
        variants[f"entropy penalty {value:g}", "entropy penalty", f"{value:g}"] = Changes(hyper, everything, 1.0)
    for value in config.temperatures:
        variants[f"temperature {value:g} after training", "temperature", f"{value:g}"] = Changes(baseline, everything, value)
    keys = jnp.tile(gate_keys(config.data, n_seeds), len(variants))
    stars, test = prepared.gate_stars(), prepared.test.covered()
    changes = jax.tree.map(lambda *leaves: np.repeat(np.stack(leaves), n_seeds, axis=0), *variants.values())
    sweep = train_gates(keys, prepared.classifier.params, stars, test, config.mlp, config.gate, changes)
    return dict(zip(variants, np.asarray(sweep.predictions).reshape(len(variants), n_seeds, -1), strict=True))


def compute(config: AblateConfig, stages: Stages) -> Results:
    """Trains all variants."""
    cache = config.output.cache
    prepared = prepare(config.data, stages, cache)
    test = prepared.test.covered()
    baseline_run = GateRun(config.mlp, config.gate, n_seeds=config.n_seeds)
    predictions: dict[Variant, AnyArray] = {}

    def train(name: str, changed: str, value: object, run: GateRun) -> None:
        predictions[name, changed, str(value)] = run_gates(config.data, prepared, run, cache).predictions

    with stages("baseline"):
        train("baseline", "", "", baseline_run)
        train("linear gate, converged", "form", "linear", CONVERGED_LINEAR)
    with stages("features, penalties and temperatures"):
        predictions |= train_variants(config, prepared)
    with stages("widths"):
        for width in config.widths:
            train(f"{width} hidden units", "hidden units", width, dataclasses.replace(baseline_run, gate=MLPGate(width)))
    with stages("numbers of stars"):
        for fraction in config.fractions:
            n_stars = round(fraction * prepared.n_covered)
            train(f"{n_stars:,} gate stars", "gate stars", n_stars, dataclasses.replace(baseline_run, fraction=fraction))
    # Trained on stars with uniform labels, and judged on the same test stars.
    if config.data.train_file is None:
        test_sampling = config.data.test_sampling or config.data.label_sampling
        other = dataclasses.replace(config.data, label_sampling="uniform", test_sampling=test_sampling)
        uniform = prepare(other, stages, cache)
        with stages("gates of uniform labels"):
            sweep = run_gates(other, uniform, baseline_run, cache)
            predictions["trained on uniform labels", "labels", "uniform"] = sweep.predictions
            classified = mix_by_class(uniform, uniform.test.covered())
            predictions["classification gate, uniform labels", "form and labels", "classification, uniform"] = classified
    predictions["classification gate", "form", "classification"] = mix_by_class(prepared, test)
    with stages("bootstrap"):
        named = {name: prediction for (name, _, _), prediction in predictions.items()}
        table = compare_by(config, test.log_g, named, named["baseline"])
    table[["changed", "value"]] = [(changed, value) for _, changed, value in predictions]
    return variants_results(
        "One change at a time",
        config.bootstrap,
        table,
        setup=f"The baseline is the MLP gate with {config.mlp.hidden} hidden units, all 13 features, cross-fitted expert "
        f"predictions of {prepared.n_covered:,} stars, Adam for {config.gate.epochs} epochs. {len(test.log_g):,} covered test "
        "stars, the same for all. A positive entropy penalty asks for sharper weights.",
        against="the baseline",
        groups=[KINDS.get(changed, "gates and labels") for _, changed, _ in predictions],
    )


main = Study("ablate_gate", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
