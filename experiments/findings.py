"""The published report's claims against our results: for each a verdict, the intervals behind it, and where they come from.

    python -m experiments.findings        reads the results of the other experiments; about two minutes on 2 cores

Needs the default results of converge_gate, measure_leakage, replicate, calibrate_bootstrap, control_gate, ablate_gate,
train_jointly, cover_all, compare_methods and scale under --results-dir. Writes FINDINGS.md there, and its own tables and figure
to findings/.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import BootstrapOptions, ComparisonConfig, draw_keys
from experiments.pipeline.gates import GateRun, gate_keys, run_gates, training_stars
from experiments.pipeline.methods import CROSS_FITTED, IN_SAMPLE
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report import claims
from experiments.report.claims import ENTROPIES, HOT_METAL_POOR, read, shown
from experiments.report.figures import interval_plot
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.provenance import command_of
from experiments.runner.stages import Stages, console
from moe_jax.core.files import atomic_path
from moe_jax.evaluate.bootstrap import bootstrap_gain, resample_gain, squared_error_gain, summarize
from moe_jax.evaluate.intervals import Resampled, simultaneous_interval
from moe_jax.evaluate.variance import mean_over_seeds, required_stars
from moe_jax.experts.cells import CELL_NAMES, N_CELLS
from moe_jax.gates import GateConfig, LinearGate, MLPGate, fit_gates, route_hard, route_soft
from moe_jax.gates.training import entropy

#: Part of the covered training stars that the MLP gates of each protocol see: the report's, and all.
FRACTIONS = {IN_SAMPLE: 0.2, CROSS_FITTED: 1.0}


@dataclass(frozen=True)
class FindingsConfig(ComparisonConfig):
    """Where the results of the other experiments lie."""

    results_dir: Path = Path("results")
    """Folder of the results of the other commands; FINDINGS.md is written here."""
    n_seeds: int = 4
    """Gates whose squared errors are averaged."""
    n_weight_seeds: int = 16
    """Gates whose weights are compared with the classification gate's."""
    mlp: MLPGate = group(MLPGate())
    bootstrap: BootstrapOptions = group(BootstrapOptions(), without=("confidence_level",))

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=1, n_weight_seeds=2)
        self.data.experts.require_nine_experts()


PRESETS = {"default": FindingsConfig()}


class Evidence(NamedTuple):
    """What this experiment finds by itself on the covered test stars."""

    cells: pd.DataFrame  #: Delta R2 of the MLP gate by protocol and cell; the intervals hold for all cells at once
    rivals: pd.DataFrame  #: lead of hot metal-poor stars over each other cell, by protocol; likewise
    weights: pd.DataFrame  #: entropy of the MLP gates' weights minus that of the classification gate's, by protocol
    hard: dict[str, float]  #: Delta R2 of soft mixing against hard routing, and the stars needed to see it


def gather(config: FindingsConfig, prepared: Prepared) -> Evidence:
    """Delta R2 by cell, the leads of one cell, how uniform the weights are, and soft against hard routing."""
    test = prepared.test.covered()
    y, cell, key = jnp.asarray(test.log_g), jnp.asarray(test.cell), draw_keys(config.data.seed).bootstrap
    classify = LinearGate().apply(prepared.classifier.params, test.features)
    soft = route_soft(classify, test.predictions)
    n = np.bincount(np.asarray(cell), minlength=N_CELLS)
    cells, rivals = [], []
    for protocol, fraction in FRACTIONS.items():
        run = GateRun(config.mlp, GateConfig(), protocol, fraction, config.n_seeds)
        predictions = jnp.asarray(run_gates(config.data, prepared, run, config.output.cache).predictions)
        gain = jnp.mean(squared_error_gain(y[None, :], predictions, soft[None, :]), axis=0)
        resampled = resample_gain(key, y, gain, cell, config.bootstrap.n_resamples, N_CELLS)
        by_cell = summarize(resampled, 0.95, config.bootstrap.interval_method).simultaneous
        table = pd.DataFrame({"protocol": protocol, "cell": CELL_NAMES, "n_test": n, "delta_r2": np.asarray(by_cell.estimate)})
        table["low"], table["high"] = np.asarray(by_cell.low), np.asarray(by_cell.high)
        variance = n * np.asarray(by_cell.standard_error, np.float64) ** 2
        table["stars_needed_in_the_cell"] = [*map(required_stars, map(float, by_cell.estimate), map(float, variance))]
        cells.append(table)
        rivals.append(lead(resampled.columns(slice(1, None))).assign(protocol=protocol))
    hard_gain = squared_error_gain(y, soft, route_hard(classify, test.predictions))
    hard = bootstrap_gain(key, y, hard_gain, **config.bootstrap.arguments).overall
    numbers = {"estimate": float(hard.estimate), "low": float(hard.low), "high": float(hard.high)}
    numbers |= {"stars": required_stars(numbers["estimate"], len(y) * float(hard.standard_error) ** 2), "n_test": len(y)}
    leads = pd.concat(rivals, ignore_index=True)[["protocol", "cell", "lead", "low", "high"]]
    return Evidence(pd.concat(cells, ignore_index=True), leads, uniformity(config, prepared, classify), numbers)


def lead(cells: Resampled) -> pd.DataFrame:
    """By how much hot metal-poor stars gain more than each other cell; the intervals hold for all eight at once."""
    rest = np.array([k for k in range(N_CELLS) if k != HOT_METAL_POOR])
    # The cells hold different stars, so the variances add.
    differences = Resampled(
        cells.estimate[HOT_METAL_POOR] - cells.estimate[rest],
        jnp.hypot(cells.standard_error[HOT_METAL_POOR], cells.standard_error[rest]),
        jnp.zeros(len(rest)),
        cells.samples[:, HOT_METAL_POOR, None] - cells.samples[:, rest],
        jnp.hypot(cells.sample_errors[:, HOT_METAL_POOR, None], cells.sample_errors[:, rest]),
    )
    low, high = map(np.asarray, simultaneous_interval(differences, 0.95))
    return pd.DataFrame({"cell": np.take(CELL_NAMES, rest), "lead": np.asarray(differences.estimate), "low": low, "high": high})


def uniformity(config: FindingsConfig, prepared: Prepared, classify: jax.Array) -> pd.DataFrame:
    """``entropy_differences`` of MLP gates of many seeds, by protocol."""
    tables, features = [], prepared.test.covered().features
    for protocol, fraction in FRACTIONS.items():
        stars = training_stars(config.data, prepared, protocol, fraction)
        keys, y = gate_keys(config.data, config.n_weight_seeds), jnp.asarray(stars.log_g)
        fits = fit_gates(keys, config.mlp, stars.features, stars.predictions, y)
        weights = jax.vmap(lambda params: config.mlp.apply(params, features))(fits.params)
        tables.append(entropy_differences(np.asarray(weights), np.asarray(classify)).assign(protocol=protocol))
    return pd.concat(tables, ignore_index=True)


def entropy_differences(weights: np.ndarray, classify: np.ndarray) -> pd.DataFrame:
    """Entropy of the mean weights, and mean entropy of a star's weights: S gates (S, N, K) minus the classification gate (N, K).

    Each has the mean over gates, with an interval that covers gate seeds and test stars, and the range of single gates. The
    standard error over stars is that of the influence function: -sum_k w_k log(mean w_k) of each star for the mean weights.
    """
    each = np.concatenate([weights, classify[None]]).astype(np.float64)
    mean = each.mean(axis=1)
    of_mean = -np.einsum("snk,sk->sn", each, np.log(np.maximum(mean, np.finfo(float).tiny)))
    of_star = np.stack([np.asarray(entropy(gate), np.float64) for gate in each])
    rows = []
    # The mean of either over stars is the entropy itself.
    for name, influence in zip(ENTROPIES, (of_mean, of_star), strict=True):
        difference = influence[:-1] - influence[-1]
        n_seeds, n_test = difference.shape
        by_seed, error = difference.mean(axis=1), difference.mean(axis=0).std(ddof=1) / np.sqrt(n_test)
        ends = dict(zip(("difference", "low", "high"), mean_over_seeds(by_seed, error), strict=True))
        single = {"least_seed": by_seed.min(), "largest_seed": by_seed.max(), "n_seeds": n_seeds, "n_test": n_test}
        rows.append({"entropy": name} | ends | single)
    return pd.DataFrame(rows)


def write_findings(config: FindingsConfig, evidence: Evidence, command: str) -> str:
    """FINDINGS.md, from the evidence and the tables of the other experiments."""
    folder = config.results_dir
    experiments = ("converge_gate", "control_gate", "ablate_gate", "cover_all")
    converge, control, ablate, cover = (read(folder, experiment, "variants") for experiment in experiments)
    intervals, components, differences = (read(folder, "replicate", name) for name in ("intervals", "components", "differences"))
    ranking, coverage = (read(folder, "calibrate_bootstrap", table) for table in ("ranking", "coverage"))
    scale, choices = (read(folder, "scale", table) for table in ("scale", "choices"))
    pairs, methods = (read(folder, "compare_methods", table) for table in ("pairs", "methods"))
    more = read(folder, "converge_gate", "more_training")
    leaks, joint = (read(folder, experiment, "differences") for experiment in ("measure_leakage", "train_jointly"))
    runs = {
        name: json.loads((folder / name / "default" / "run.json").read_text()) for name in ("replicate", "scale", "train_jointly")
    }
    over = claims.design(differences)
    judged = [
        claims.mlp_beats_classification(intervals, over),
        claims.linear_is_worse(intervals, over),
        claims.non_linearity_adds(intervals, over),
        claims.hot_metal_poor_gain_most(evidence.cells, evidence.rivals),
        claims.weights_are_more_uniform(evidence.weights),
        claims.soft_beats_hard(evidence.hard),
        claims.gain_survives_noise(scale, choices, runs["scale"]["config"]["data"]["n_test"]),
        claims.mlp_converges(more),
    ]
    ours = claims.table_of_claims([claims.nine_ridges_compete(pairs, methods), claims.local_experts_suffice(pairs, methods)])
    others = [
        *claims.about_gates(converge, leaks, control, ablate, joint, runs["train_jointly"]["config"]["data"]["n_train"], cover),
        *claims.about_intervals(components, ranking, coverage),
    ]
    cells = evidence.cells.rename(columns={"n_test": "test stars"})
    cells["Delta R2, all cells at once"] = [shown(row) for row in cells.to_dict("records")]
    cells["stars needed in the cell"] = cells["stars_needed_in_the_cell"].map("{:,.0f}".format)
    sections = [
        "# Findings",
        f"Made by `{command}` from the results of the other experiments, each of which names its own command. All spectra are "
        "simulated (LTE grid, noise 0.2 unless another is named). Differences are in R2 of log g, with 95 % intervals. The report "
        "used other spectra: compare signs and sizes, not digits.",
        "## The claims of the report",
        table_markdown(claims.table_of_claims(judged)),
        "A claim *holds* if the interval lies on its side of 0, it *does not hold* if the interval lies on the other side, and we "
        "*cannot tell* if the interval contains 0. Each interval covers what its row names, and nothing else: where it names test "
        "stars alone, another training survey or another gate seed may give a value outside.",
        claims.repetitions(intervals, components, runs["replicate"]["stars_in_a_test_set"]),
        "## Two claims of our own",
        table_markdown(ours.rename(columns={"claim of the report": "claim"})),
        "## What we find beside them",
        "Intervals are over test stars. Those of joint training are also over gate seeds, those of the variance are over "
        "repetitions.",
        "\n".join(f"- {text}" for text in others),
        "## Hot metal-poor stars, cell by cell",
        "![Delta R2 by cell](findings/cells.png)",
        table_markdown(cells[["protocol", "cell", "test stars", "Delta R2, all cells at once", "stars needed in the cell"]]),
        "*Stars needed*: for an interval of this cell alone to exclude 0 with 80 % power, if the true difference is the one in the "
        "table.",
    ]
    return "\n\n".join(sections) + "\n"


def compute(config: FindingsConfig, stages: Stages) -> Results:
    """Gathers the evidence, and writes FINDINGS.md."""
    prepared = prepare(config.data, stages, config.output.cache)
    with stages("cells, weights, hard routing"):
        evidence = gather(config, prepared)
    text = write_findings(config, evidence, command_of("findings", config, PRESETS))
    cells, rivals = evidence.cells, evidence.rivals
    figure = interval_plot(
        [f"{row['cell']}, {row['protocol']}" for row in cells.to_dict("records")],
        cells,
        "$\\Delta R^2$ of the MLP gate against the classification gate;\n95 % intervals that hold for all nine cells at once",
        groups=list(cells["protocol"]),
    )

    def write_text(_folder: Path, _run: dict[str, Any]) -> None:
        with atomic_path(config.results_dir / "FINDINGS.md") as temporary:
            temporary.write_text(text)
        console.print(f"written: {config.results_dir / 'FINDINGS.md'}")

    return Results(
        "Evidence for FINDINGS.md",
        ["![By cell](cells.png)", table_markdown(rivals)],
        {"cells": cells, "rivals": rivals, "weights": evidence.weights},
        {"cells": figure},
        {"soft_minus_hard": evidence.hard},
        write_text,
    )


main = Study("findings", PRESETS, compute, lambda config: config.results_dir / "findings")

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
