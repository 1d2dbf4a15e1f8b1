"""The report's claims against what we find, each with interval, command and figure, and a plain verdict.

    python -m experiments.findings        reads the results of the other experiments; about two minutes on 2 cores

Needs the default results of converge_gate, measure_leakage, replicate, calibrate_bootstrap, control_gate, ablate_gate,
train_jointly, cover_all and scale under --results-dir. Writes FINDINGS.md there, and its own tables and figure to findings/.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import BootstrapOptions, DataConfig, OutputOptions, draw_keys
from experiments.pipeline.gates import GateRun, gate_keys, run_gates, training_stars
from experiments.pipeline.methods import PROTOCOLS
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.figures import interval_plot
from experiments.report.markdown import interval, table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, run_command
from experiments.runner.provenance import command_of
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.files import atomic_path
from moe_jax.evaluate.bootstrap import bootstrap_gain, paired_bootstrap, resample_gain, squared_error_gain
from moe_jax.evaluate.intervals import Interval, Resampled, simultaneous_interval
from moe_jax.evaluate.variance import required_stars
from moe_jax.experts.cells import CELL_NAMES, N_CELLS
from moe_jax.gates.networks import LinearGate, MLPGate
from moe_jax.gates.optimize import GateConfig
from moe_jax.gates.routing import route_hard, route_soft
from moe_jax.gates.training import entropy, fit_gate

HOT_METAL_POOR = 6
REPORT_STARS = 816
RESAMPLES_AT_ONCE = 100


@dataclass(frozen=True)
class FindingsConfig:
    """Where the results of the other experiments lie."""

    preset: Literal["default"] = "default"
    """Only ``default`` exists."""
    results_dir: Path = Path("results")
    """Folder of the results of the other commands; FINDINGS.md is written here."""
    n_seeds: int = 4
    """Gates whose squared errors are averaged."""
    mlp: MLPGate = group(MLPGate())
    data: DataConfig = group(DataConfig())
    bootstrap: BootstrapOptions = group(BootstrapOptions(), without=("confidence_level",))
    output: OutputOptions = group(OutputOptions())

    def __post_init__(self) -> None:
        if self.bootstrap.n_resamples < RESAMPLES_AT_ONCE:
            raise InputError(f"n_resamples is {self.bootstrap.n_resamples}, expected at least {RESAMPLES_AT_ONCE}")


PRESETS = {"default": FindingsConfig()}


class Evidence(NamedTuple):
    """What the test stars say of cells, weights and routing."""

    cells: pd.DataFrame
    rivals: pd.DataFrame
    weights: pd.DataFrame
    hard: dict[str, float]
    n_test: int


def read(config: FindingsConfig, experiment: str, table: str) -> pd.DataFrame:
    """A table of another experiment's default results.

    Raises:
        InputError: where it is not there.
    """
    path = config.results_dir / experiment / "default" / f"{table}.csv"
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected the result of `python -m experiments.{experiment}`")
    return pd.read_csv(path, keep_default_na=False, na_values=[""])


def gather(config: FindingsConfig, prepared: Prepared) -> Evidence:
    """Delta R2 by cell with simultaneous intervals, how uniform the weights are, and hard against soft routing."""
    test = prepared.test.covered()
    y, cell, key = jnp.asarray(test.log_g), jnp.asarray(test.cell), draw_keys(config.data.seed).bootstrap
    classify = LinearGate().apply(prepared.classifier.params, test.features)
    soft = route_soft(classify, test.predictions)
    cells, rivals = [], []
    for protocol, fraction in zip(PROTOCOLS, (0.2, 1.0), strict=True):
        run = GateRun(config.mlp, GateConfig(), protocol, fraction, config.n_seeds)
        predictions = jnp.asarray(run_gates(config.data, prepared, run, config.output.cache).predictions)
        gain = jnp.mean(squared_error_gain(y[None, :], predictions, soft[None, :]), axis=0)
        bootstrap = bootstrap_gain(
            key,
            y,
            gain,
            n_resamples=config.bootstrap.n_resamples,
            method=config.bootstrap.interval_method,
            groups=cell,
            n_groups=N_CELLS,
        )
        low, high = np.asarray(bootstrap.simultaneous_low), np.asarray(bootstrap.simultaneous_high)
        n = np.bincount(np.asarray(cell), minlength=N_CELLS)
        for k in range(N_CELLS):
            effect, error = float(bootstrap.group_estimate[k]), float(bootstrap.group_standard_error[k])
            cells.append(
                {
                    "protocol": protocol,
                    "cell": CELL_NAMES[k],
                    "n_test": n[k],
                    "delta_r2": effect,
                    "low": low[k],
                    "high": high[k],
                    "stars_needed_in_the_cell": required_stars(effect, n[k] * error**2),
                }
            )
        rivals += [
            {"protocol": protocol} | row for row in lead(resample_gain(key, y, gain, cell, config.bootstrap.n_resamples, N_CELLS))
        ]
    hard = bootstrap_gain(
        key, y, squared_error_gain(y, soft, route_hard(classify, test.predictions)), n_resamples=config.bootstrap.n_resamples
    )
    return Evidence(
        pd.DataFrame(cells),
        pd.DataFrame(rivals),
        uniformity(config, prepared, classify, key),
        {
            "estimate": float(hard.estimate),
            "low": float(hard.low),
            "high": float(hard.high),
            "stars": required_stars(float(hard.estimate), len(y) * float(hard.standard_error) ** 2),
        },
        len(y),
    )


def lead(resampled: Resampled) -> list[dict[str, Any]]:
    """By how much hot metal-poor stars gain more than each other cell; intervals that hold all eight at once."""
    others = [k for k in range(N_CELLS) if k != HOT_METAL_POOR]
    estimate, error = resampled.estimate[1:], resampled.standard_error[1:]
    samples, sample_errors = resampled.samples[:, 1:], resampled.sample_errors[:, 1:]
    rest = np.array(others)
    # The cells hold different stars, so the errors of their difference add in squares.
    differences = Resampled(
        estimate[HOT_METAL_POOR] - estimate[rest],
        jnp.hypot(error[HOT_METAL_POOR], error[rest]),
        jnp.zeros(len(rest)),
        samples[:, HOT_METAL_POOR, None] - samples[:, rest],
        jnp.hypot(sample_errors[:, HOT_METAL_POOR, None], sample_errors[:, rest]),
    )
    found: Interval = simultaneous_interval(differences, 0.95)
    return [
        {"cell": CELL_NAMES[k], "lead": float(e), "low": float(low), "high": float(high)}
        for k, e, low, high in zip(others, differences.estimate, found.low, found.high, strict=True)
    ]


def uniformity(config: FindingsConfig, prepared: Prepared, classify: jax.Array, key: jax.Array) -> pd.DataFrame:
    """Entropy of the mean weights, and mean entropy of a star's weights: regression gates minus the classification gate."""
    kinds = {"MLP, in-sample 20 %": (PROTOCOLS[0], 0.2), "MLP, cross-fitted": (PROTOCOLS[1], 1.0)}
    rows = []
    keys = jax.random.split(key, config.bootstrap.n_resamples // RESAMPLES_AT_ONCE)

    def measures(weights: jax.Array, own_entropy: jax.Array) -> jax.Array:
        return jnp.stack([entropy(jnp.mean(weights, axis=0, keepdims=True))[0], jnp.mean(own_entropy)])

    def differences(ours: jax.Array, our_entropy: jax.Array, theirs: jax.Array, their_entropy: jax.Array) -> jax.Array:
        return measures(ours, our_entropy) - measures(theirs, their_entropy)

    for name, (protocol, fraction) in kinds.items():
        weights = gate_weights(config, prepared, protocol, fraction)
        arrays = (weights, entropy(weights), classify, entropy(classify))
        estimate = np.asarray(differences(*arrays))
        parts = [paired_bootstrap(k, differences, arrays, RESAMPLES_AT_ONCE) for k in keys]
        low, high = np.quantile(np.concatenate([np.asarray(part) for part in parts]), [0.025, 0.975], axis=0)
        for i, measure in enumerate(("of the mean weights", "of a star's weights, mean")):
            rows.append({"gate": name, "entropy": measure, "difference": estimate[i], "low": low[i], "high": high[i]})
    return pd.DataFrame(rows)


def gate_weights(config: FindingsConfig, prepared: Prepared, protocol: str, fraction: float) -> jax.Array:
    """Weights of the first MLP gate of a protocol for the covered test stars."""
    stars = training_stars(config.data, prepared, protocol, fraction)
    x, yhat, y = map(jnp.asarray, (stars.features, stars.predictions, stars.log_g))
    fit = fit_gate(gate_keys(config.data, 1)[0], config.mlp, x, yhat, y)
    return config.mlp.apply(fit.params, prepared.test.covered().features)


def judge(low: float, high: float, stars: float | None = None) -> str:
    """Holds where the interval lies above 0, does not hold where it lies below, otherwise cannot tell."""
    if low > 0:
        return "**holds**"
    if high < 0:
        return "**does not hold**"
    return "**cannot tell**" + (f" (about {stars:,.0f} test stars would be needed)" if stars is not None else "")


def of(table: pd.DataFrame, column: str, name: str) -> dict[Any, Any]:
    """The row of a table whose column holds a name."""
    rows = table[table[column] == name]
    if len(rows) != 1:
        raise InputError(f"column {column}: found {len(rows)} rows named {name!r}, expected one")
    row: dict[Any, Any] = rows.iloc[0].to_dict()
    return row


def shown(row: Mapping[Any, Any], estimate: str = "delta_r2") -> str:
    """An estimate of a row with its interval."""
    return interval(row[estimate], row["low"], row["high"])


def judge_lead(rivals: pd.DataFrame) -> str:
    """Whether hot metal-poor stars gain more than every other cell."""
    if (rivals["low"] > 0).all():
        return "**holds**"
    if (rivals["high"] < 0).any():
        return "**does not hold**"
    return "**cannot tell**"


def write_findings(config: FindingsConfig, evidence: Evidence, command: str) -> str:
    """FINDINGS.md."""
    converge, leakage = read(config, "converge_gate", "variants"), read(config, "measure_leakage", "differences")
    replicate, spread = read(config, "replicate", "intervals"), read(config, "replicate", "components")
    ranking, coverage = read(config, "calibrate_bootstrap", "ranking"), read(config, "calibrate_bootstrap", "coverage")
    control, ablate = read(config, "control_gate", "variants"), read(config, "ablate_gate", "variants")
    joint, cover, scale = (
        read(config, "train_jointly", "variants"),
        read(config, "cover_all", "variants"),
        read(config, "scale", "scale"),
    )

    mlp_20, mlp = (of(replicate, "gate", name) for name in ("MLP, in-sample 20 %", "MLP, cross-fitted"))
    linear_cold = of(converge, "variant", "linear, in-sample, Adam 100, cold")
    linear_in, linear = (of(converge, "variant", f"linear, {p}, L-BFGS, warm") for p in PROTOCOLS)
    mlp_adam = of(converge, "variant", "MLP, cross-fitted, Adam 100, cold")
    mlp_converged = of(converge, "variant", "MLP, cross-fitted, L-BFGS, cold")
    noisy = scale[(scale["noise_level"] == 1.0) & (scale["method"] == "MLP")].sort_values("n_train")
    at_report = noisy[noisy["n_train"] == 32_000].iloc[0]
    largest = noisy.iloc[-1]
    set_size = json.loads((config.results_dir / "replicate" / "default" / "run.json").read_text())["stars_in_a_test_set"]
    own = spread[(spread["gate"] == mlp_20["gate"]) & spread["source"].str.contains("test")]
    star_variance = set_size * float(own["variance"].clip(lower=0.0).sum())
    weights = {row["gate"] + row["entropy"]: row for row in evidence.weights.to_dict("records")}
    of_mean = weights["MLP, in-sample 20 %of the mean weights"]
    of_star = weights["MLP, in-sample 20 %of a star's weights, mean"]
    rivals = {protocol: evidence.rivals[evidence.rivals["protocol"] == protocol] for protocol in PROTOCOLS}
    gaps = {protocol: table.sort_values("lead").iloc[0].to_dict() for protocol, table in rivals.items()}
    in_cells = evidence.cells[evidence.cells["protocol"] == PROTOCOLS[0]]
    top = in_cells.sort_values("delta_r2").iloc[-1]
    hard = evidence.hard
    claims = [
        [
            "1. A regression gate (MLP) beats the classification gate",
            "+0.0096 [-0.0000, +0.0168]",
            f"{interval(mlp_20['mean'], mlp_20['mean_low'], mlp_20['mean_high'])} in the report's protocol, "
            f"{interval(mlp['mean'], mlp['mean_low'], mlp['mean_high'])} cross-fitted (expected over repetitions)",
            judge(mlp_20["mean_low"], mlp_20["mean_high"]),
            "[replicate](replicate/default/report.md)",
        ],
        [
            "2. Non-linearity is the key: a linear regression gate is worse than the classification gate",
            "-0.0179 [-0.0335, -0.0049]",
            f"{shown(linear_in)} in the report's protocol, {shown(linear)} cross-fitted, once the linear gate has converged "
            f"({shown(linear_cold)} after the report's 100 epochs)",
            judge(-linear_in["high"], -linear_in["low"]),
            "[converge_gate](converge_gate/default/report.md)",
        ],
        [
            "3. Hot metal-poor stars gain most",
            "+0.0193 in that cell, no interval",
            f"{shown(of(in_cells, 'cell', CELL_NAMES[HOT_METAL_POOR]))} in the report's protocol; {top['cell']} gains "
            f"{shown(top.to_dict())}; the smallest lead, over {gaps[PROTOCOLS[0]]['cell']}, is {shown(gaps[PROTOCOLS[0]], 'lead')} "
            f"(cross-fitted: over {gaps[PROTOCOLS[1]]['cell']}, {shown(gaps[PROTOCOLS[1]], 'lead')})",
            judge_lead(rivals[PROTOCOLS[0]]),
            "[findings](findings/cells.png)",
        ],
        [
            "4. The regression gate's weights are more uniform",
            "mean weights by eye",
            f"entropy of the mean weights {shown(of_mean, 'difference')} nats, of a single star's weights "
            f"{shown(of_star, 'difference')}",
            judge(of_mean["low"], of_mean["high"])
            + " of the mean weights, "
            + judge(of_star["low"], of_star["high"])
            + " star by star",
            "[findings](findings/weights.csv)",
        ],
        [
            "5. Soft mixing beats hard routing",
            "(in the reports before)",
            interval(hard["estimate"], hard["low"], hard["high"]),
            judge(hard["low"], hard["high"], hard["stars"]),
            "[findings](findings/run.json)",
        ],
        [
            "6. The gain survives at noise 1",
            "(not tested)",
            f"{interval(at_report['delta_r2'], at_report['delta_r2_low'], at_report['delta_r2_high'])} with 32,000 training stars, "
            f"{interval(largest['delta_r2'], largest['delta_r2_low'], largest['delta_r2_high'])} with {int(largest['n_train']):,}",
            judge(at_report["delta_r2_low"], at_report["delta_r2_high"]),
            "[scale](scale/default/report.md)",
        ],
        [
            "7. The MLP converges within 100 epochs",
            "best epoch 99",
            f"best epoch {mlp_adam['best_epoch']:.0f} of 100, gradient {mlp_adam['gradient_norm']:.0e}; by L-BFGS the held-out loss falls "
            f"from {mlp_adam['validation_loss']:.4f} to {mlp_converged['validation_loss']:.4f}, R2 from {mlp_adam['r2']:.4f} to "
            f"{mlp_converged['r2']:.4f}",
            "**does not hold**" if mlp_adam["best_epoch"] > 90 else "**holds**",
            "[converge_gate](converge_gate/default/report.md)",
        ],
    ]
    header = ["claim of the report", "there", "here", "verdict", "where"]
    table = "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *claims])
    stacked = of(control, "variant", "MLP on features + expert predictions")
    constant = of(control, "variant", "constant weights (simplex least squares)")
    alone = of(control, "variant", "MLP on features")
    leak = {row["gate"] + row["difference"]: row for row in leakage.to_dict("records")}
    leak_mlp = leak["MLPcross-fitted all - in-sample all"]
    leak_linear = leak["linear, convergedcross-fitted all - in-sample all"]
    best_method = ranking.iloc[0]
    percentile = of(ranking, "method", "percentile")
    at_95 = coverage[(coverage["level"] == 0.95) & (coverage["stars"] == "all stars")].groupby("method")["coverage"].mean()
    shares = spread[spread["gate"] == "MLP, in-sample 20 %"].set_index("source")["share"]
    best_cover = cover.sort_values("r2").iloc[-1]
    best_joint = joint.iloc[-1]  # what the held-out choices led to, whatever the test stars say
    ours = control[control["variant"] == "mixture, MLP regression gate"].iloc[0]
    width = ablate[ablate["variant"].str.endswith("hidden units")].sort_values("r2").iloc[-1]
    no_pca = of(ablate, "variant", "features: no PCA")
    needed = required_stars(mlp_20["mean"], star_variance)
    sections = [
        "# Findings",
        f"Made by `{command}` from the results of the other experiments, each of which names its command. All on simulated spectra "
        "(LTE grid, noise 0.2 unless said otherwise); differences are in R2 of log g, with 95 % intervals. The report's figures come "
        "from other spectra: compare signs and sizes, not digits.",
        "## The claims of the report",
        table,
        "Intervals of claims 2, 3, 5 and 7 speak of other test stars only "
        f"({evidence.n_test:,} covered test stars, one training survey); that of claim 1 also of new training stars, noise and gate "
        f"seeds; those of claim 3 hold all cells at once. One more repetition of claim 1 with {set_size} test stars will, with 95 % confidence, lie in "
        f"[{mlp_20['repetition_low']:+.4f}, {mlp_20['repetition_high']:+.4f}] (cross-fitted: [{mlp['repetition_low']:+.4f}, "
        f"{mlp['repetition_high']:+.4f}]); to see a difference of {mlp_20['mean']:+.4f} with 80 % power takes {needed:,.0f} test stars, so "
        f"the report's {REPORT_STARS} were {'enough' if needed < REPORT_STARS else 'too few'} on these spectra.",
        "## What we find beside them",
        f"- **Leakage.** Trained on stars that their experts had not seen, the MLP gains "
        f"{shown(leak_mlp)} and the converged linear gate {shown(leak_linear)} over the same stars in-sample. "
        "[measure_leakage](measure_leakage/default/report.md)\n"
        f"- **The linear gate had not converged.** At its optimum it gets {linear['delta_r2'] / mlp_adam['delta_r2']:.0%} of the MLP's "
        f"gain over the classification gate (cross-fitted); non-linearity adds the rest. [converge_gate](converge_gate/default/report.md)\n"
        f"- **{'Mixing is not the best use of the experts' if stacked['low'] > 0 else 'A simpler use of the experts'}.** A network of the same size that regresses log g on features and expert "
        f"predictions differs from the mixture by {shown(stacked)} (R2 {stacked['r2']:.4f} against {ours['r2']:.4f}); from the 13 features "
        f"alone it reaches {alone['r2']:.4f}, constant weights {constant['r2']:.4f}. [control_gate](control_gate/default/report.md)\n"
        f"- **Training experts and gate together** reaches R2 {best_joint['r2']:.4f}, {shown(best_joint.to_dict())} against frozen experts "
        f"({best_joint['variant']}). [train_jointly](train_jointly/default/report.md)\n"
        f"- **Where a repetition's spread comes from**: test stars {shares['test stars']:.0%} of its variance, survey {shares['survey']:.0%}, "
        f"noise draw {shares['noise draw']:.0%}, gate seed {shares['gate seed']:.0%}, interactions the rest. "
        "[replicate](replicate/default/report.md)\n"
        f"- **Intervals.** At 816 stars the report's percentile intervals hold {at_95['percentile']:.1%} of the time where they promise "
        f"95 %; {best_method['method']} intervals come closest ({at_95[best_method['method']]:.1%}; by cell, root mean square error "
        f"{best_method['rms_error_by_cell']:.1f} against {percentile['rms_error_by_cell']:.1f} points), and are the default here. "
        "[calibrate_bootstrap](calibrate_bootstrap/default/report.md)\n"
        f"- **All stars.** Best on covered and other stars together: {best_cover['variant']}, R2 {best_cover['r2']:.4f} "
        f"({shown(best_cover.to_dict())} against no special treatment). [cover_all](cover_all/default/report.md)\n"
        f"- **One change at a time**: without the principal components {shown(no_pca)}; the best width is {width['variant']}, "
        f"{shown(width.to_dict())} against 64. [ablate_gate](ablate_gate/default/report.md)",
        "## Hot metal-poor stars, cell by cell",
        "![Delta R2 by cell](findings/cells.png)",
        table_markdown(
            pd.DataFrame(
                {
                    "protocol": row["protocol"],
                    "cell": row["cell"],
                    "test stars": row["n_test"],
                    "Delta R2, all cells at once": shown(row),
                    "stars needed in the cell": f"{row['stars_needed_in_the_cell']:,.0f}",
                }
                for row in evidence.cells.to_dict("records")
            )
        ),
        "*Stars needed*: for one interval of this cell alone to exclude 0 with 80 % power, if the difference is what was found.",
    ]
    return "\n\n".join(sections) + "\n"


def compute(config: FindingsConfig, stages: Stages) -> Results:
    """Gathers the evidence."""
    prepared = prepare(config.data, stages, config.output.cache)
    with stages("cells, weights, hard routing"):
        evidence = gather(config, prepared)
    text = write_findings(config, evidence, command_of("findings", config, PRESETS))
    cells = evidence.cells
    figure = interval_plot(
        [f"{row['cell']}, {row['protocol']}" for row in cells.to_dict("records")],
        *_columns(cells),
        xlabel="$\\Delta R^2$ of the MLP gate against the classification gate;\n95 % intervals that hold all nine cells at once",
        groups=list(cells["protocol"]),
    )

    def write_text(_folder: Path, _run: dict[str, Any]) -> None:
        with atomic_path(config.results_dir / "FINDINGS.md") as temporary:
            temporary.write_text(text)
        console.print(f"written: {config.results_dir / 'FINDINGS.md'}", highlight=False)

    return Results(
        "Evidence for FINDINGS.md",
        ["![By cell](cells.png)", table_markdown(evidence.rivals)],
        {"cells": cells, "rivals": evidence.rivals, "weights": evidence.weights},
        {"cells": figure},
        {"soft_minus_hard": evidence.hard},
        write_text,
    )


def _columns(table: pd.DataFrame) -> tuple[AnyArray, AnyArray, AnyArray]:
    return table["delta_r2"].to_numpy(), table["low"].to_numpy(), table["high"].to_numpy()


STUDY = Study("findings", PRESETS, compute)


def main(config: FindingsConfig) -> Results:
    """Writes FINDINGS.md, and the evidence to findings/ beside it."""
    output_dir = config.output.output_dir or config.results_dir / "findings"
    return STUDY(dataclasses.replace(config, output=dataclasses.replace(config.output, output_dir=output_dir)))


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
