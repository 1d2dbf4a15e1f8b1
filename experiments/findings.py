"""The published report's claims against our results: for each a verdict, the intervals behind it, and where they come from.

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
from experiments.pipeline.methods import CROSS_FITTED, IN_SAMPLE, PROTOCOLS
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.figures import interval_plot
from experiments.report.markdown import interval, table_markdown
from experiments.report.results import Results, Study
from experiments.report.tables import verdict
from experiments.runner.command_line import group, run_command
from experiments.runner.provenance import command_of
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import InputError
from moe_jax.core.files import atomic_path
from moe_jax.evaluate.bootstrap import bootstrap_gain, paired_bootstrap, resample_gain, squared_error_gain, summarize
from moe_jax.evaluate.intervals import Resampled, simultaneous_interval
from moe_jax.evaluate.variance import SOURCES_IN_TEST_STARS, required_stars
from moe_jax.experts.cells import CELL_NAMES, N_CELLS
from moe_jax.gates.networks import LinearGate, MLPGate
from moe_jax.gates.routing import route_hard, route_soft
from moe_jax.gates.training import GateConfig, entropy, fit_gate

HOT_METAL_POOR = CELL_NAMES.index("Hot Metal-poor")
REPORT_STARS = 816
#: Part of the covered training stars that the MLP gates of each protocol see: the report's, and all.
FRACTIONS = {IN_SAMPLE: 0.2, CROSS_FITTED: 1.0}
#: The same gates in the tables of ``replicate``.
REPLICATED = {IN_SAMPLE: "MLP, in-sample 20 %", CROSS_FITTED: "MLP, cross-fitted"}
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
    """What this experiment finds by itself on the covered test stars."""

    cells: pd.DataFrame  #: Delta R2 of the MLP gate by protocol and cell; the intervals hold for all cells at once
    rivals: pd.DataFrame  #: lead of hot metal-poor stars over each other cell, by protocol; likewise
    weights: pd.DataFrame  #: entropy of the MLP gate's weights minus that of the classification gate's, by protocol
    hard: dict[str, float]  #: Delta R2 of soft mixing against hard routing, and the stars needed to see it
    n_test: int


class Claim(NamedTuple):
    """A row of the table of claims."""

    claim: str
    its_evidence: str
    our_result: str
    verdict: str
    source: str


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
    hard = bootstrap_gain(key, y, hard_gain, n_resamples=config.bootstrap.n_resamples).overall
    numbers = {"estimate": float(hard.estimate), "low": float(hard.low), "high": float(hard.high)}
    numbers["stars"] = required_stars(numbers["estimate"], len(y) * float(hard.standard_error) ** 2)
    weights = uniformity(config, prepared, classify, key)
    return Evidence(
        pd.concat(cells, ignore_index=True),
        pd.concat(rivals, ignore_index=True)[["protocol", "cell", "lead", "low", "high"]],
        weights,
        numbers,
        len(y),
    )


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


def uniformity(config: FindingsConfig, prepared: Prepared, classify: jax.Array, key: jax.Array) -> pd.DataFrame:
    """Entropy of the mean weights, and mean entropy of a star's weights: MLP gates minus the classification gate."""

    def measures(weights: jax.Array, entropy_of_star: jax.Array) -> jax.Array:
        return jnp.stack([entropy(jnp.mean(weights, axis=0, keepdims=True))[0], jnp.mean(entropy_of_star)])

    def differences(ours: jax.Array, our_entropy: jax.Array, theirs: jax.Array, their_entropy: jax.Array) -> jax.Array:
        return measures(ours, our_entropy) - measures(theirs, their_entropy)

    rows, n_resamples = [], config.bootstrap.n_resamples
    keys = jax.random.split(key, -(-n_resamples // RESAMPLES_AT_ONCE))
    for protocol, fraction in FRACTIONS.items():
        stars, gate = training_stars(config.data, prepared, protocol, fraction), config.mlp
        x, yhat, y = map(jnp.asarray, (stars.features, stars.predictions, stars.log_g))
        weights = gate.apply(fit_gate(gate_keys(config.data, 1)[0], gate, x, yhat, y).params, prepared.test.covered().features)
        arrays = (weights, entropy(weights), classify, entropy(classify))
        estimate = np.asarray(differences(*arrays))
        # In parts, so that the weights of all resamples need not be held at once.
        parts = [paired_bootstrap(k, differences, arrays, RESAMPLES_AT_ONCE) for k in keys]
        samples = np.concatenate([np.asarray(part) for part in parts])[:n_resamples]
        low, high = np.quantile(samples, [0.025, 0.975], axis=0)
        for i, measure in enumerate(("of the mean weights", "of a star's weights, mean")):
            row = {"protocol": protocol, "entropy": measure, "difference": estimate[i], "low": low[i], "high": high[i]}
            rows.append({"gate": REPLICATED[protocol]} | row)
    return pd.DataFrame(rows)


def read(config: FindingsConfig, experiment: str, table: str) -> pd.DataFrame:
    """A table of another experiment's default results.

    Raises:
        InputError: if there is no such file.
    """
    path = config.results_dir / experiment / "default" / f"{table}.csv"
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected the result of `python -m experiments.{experiment}`")
    rows = pd.read_csv(path, keep_default_na=False, na_values=[""])
    rows.attrs["file"] = str(path)
    return rows


def row_of(table: pd.DataFrame, **values: object) -> dict[Any, Any]:
    """The row of a table whose columns have the given values.

    Raises:
        InputError: if a column is missing, or there is not exactly one such row.
    """
    name = table.attrs.get("file", "table")
    for column in set(values) - set(table.columns):
        raise InputError(f"{name}: found no column {column}, expected it: run the experiment again")
    rows = table[(table[list(values)] == pd.Series(values)).all(axis=1)]
    if len(rows) != 1:
        wanted = ", ".join(f"{column} {value}" for column, value in values.items())
        raise InputError(f"{name}: found {len(rows)} rows with {wanted}, expected one")
    row: dict[Any, Any] = rows.iloc[0].to_dict()
    return row


def shown(row: Mapping[Any, Any], estimate: str = "delta_r2", prefix: str = "") -> str:
    """An estimate of a row with its interval."""
    return interval(row[estimate], row[f"{prefix}low"], row[f"{prefix}high"])


def link(experiment: str) -> str:
    """A link to the report of another experiment."""
    return f"[{experiment}]({experiment}/default/report.md)"


def judge(low: float, high: float) -> str:
    """Whether a claim of a positive difference holds: the interval lies above 0, or below 0, or it holds 0."""
    words = {"better": "**holds**", "worse": "**does not hold**", "no difference shown": "**cannot tell**"}
    return words[verdict(low, high)]


def mlp_beats_classification(intervals: pd.DataFrame) -> Claim:
    """Claim 1, from the expected difference over repetitions in the report's protocol."""
    ours, cross_fitted = (row_of(intervals, gate=gate) for gate in REPLICATED.values())
    return Claim(
        "1. A regression gate (MLP) beats the classification gate",
        "+0.0096 [-0.0000, +0.0168]",
        f"{shown(ours, 'mean', 'mean_')} in the report's protocol, {shown(cross_fitted, 'mean', 'mean_')} cross-fitted "
        "(expected over repetitions)",
        judge(ours["mean_low"], ours["mean_high"]),
        link("replicate"),
    )


def linear_is_worse(converge: pd.DataFrame) -> Claim:
    """Claim 2, from the converged linear gate in the report's protocol: the claim is of a negative difference."""
    ours, cross_fitted = (row_of(converge, form="linear", protocol=p, optimiser="L-BFGS", start="warm") for p in PROTOCOLS)
    adam = row_of(converge, form="linear", protocol=IN_SAMPLE, optimiser="Adam", start="cold")
    return Claim(
        "2. Non-linearity is the key: a linear regression gate is worse than the classification gate",
        "-0.0179 [-0.0335, -0.0049]",
        f"{shown(ours)} in the report's protocol, {shown(cross_fitted)} cross-fitted, once the linear gate has converged "
        f"({shown(adam)} after the report's 100 epochs)",
        judge(-ours["high"], -ours["low"]),
        link("converge_gate"),
    )


def hot_metal_poor_gain_most(cells: pd.DataFrame, rivals: pd.DataFrame) -> Claim:
    """Claim 3, from the lead over every other cell in the report's protocol: the smallest lead decides."""
    ours = row_of(cells, protocol=IN_SAMPLE, cell=CELL_NAMES[HOT_METAL_POOR])
    top = cells[cells["protocol"] == IN_SAMPLE].nlargest(1, "delta_r2").iloc[0].to_dict()
    leads = rivals[rivals["protocol"] == IN_SAMPLE]
    least, least_cross_fitted = (rivals[rivals["protocol"] == p].nsmallest(1, "lead").iloc[0].to_dict() for p in PROTOCOLS)
    return Claim(
        "3. Hot metal-poor stars gain most",
        "+0.0193 in that cell, no interval",
        f"{shown(ours)} in the report's protocol; {top['cell']} gains {shown(top)}; "
        f"the smallest lead, over {least['cell']}, is {shown(least, 'lead')} "
        f"(cross-fitted: over {least_cross_fitted['cell']}, {shown(least_cross_fitted, 'lead')})",
        judge(leads["low"].min(), leads["high"].min()),
        "[findings](findings/cells.png)",
    )


def weights_are_more_uniform(weights: pd.DataFrame) -> Claim:
    """Claim 4, from the entropy in the report's protocol: of the mean weights, and of the weights of single stars."""
    of_mean, of_star = (
        row_of(weights, protocol=IN_SAMPLE, entropy=measure) for measure in ("of the mean weights", "of a star's weights, mean")
    )
    return Claim(
        "4. The regression gate's weights are more uniform",
        "mean weights by eye",
        f"entropy of the mean weights {shown(of_mean, 'difference')} nats, of a single star's weights {shown(of_star, 'difference')}",
        f"{judge(of_mean['low'], of_mean['high'])} of the mean weights, {judge(of_star['low'], of_star['high'])} star by star",
        "[findings](findings/weights.csv)",
    )


def soft_beats_hard(hard: Mapping[str, float]) -> Claim:
    """Claim 5, for the classification gate's weights; if it cannot be told, with the test stars that would be needed."""
    outcome = judge(hard["low"], hard["high"])
    if verdict(hard["low"], hard["high"]) == "no difference shown":
        outcome += f" (about {hard['stars']:,.0f} test stars would be needed)"
    return Claim(
        "5. Soft mixing beats hard routing",
        "(in the reports before)",
        shown(hard, "estimate"),
        outcome,
        "[findings](findings/run.json)",
    )


def gain_survives_noise(scale: pd.DataFrame) -> Claim:
    """Claim 6, from the MLP gate at noise 1 with the report's number of training stars."""
    noisy = scale[(scale["noise_level"] == 1.0) & (scale["method"] == "MLP")]
    ours, largest = (row_of(noisy, n_train=n_train) for n_train in (32_000, noisy["n_train"].max()))
    return Claim(
        "6. The gain survives at noise 1",
        "(not tested)",
        f"{shown(ours, prefix='delta_r2_')} with 32,000 training stars, {shown(largest, prefix='delta_r2_')} with "
        f"{int(largest['n_train']):,}",
        judge(ours["delta_r2_low"], ours["delta_r2_high"]),
        link("scale"),
    )


def mlp_converges(converge: pd.DataFrame) -> Claim:
    """Claim 7: it does not hold if the median of the best epochs is among the last ten."""
    adam, converged = (row_of(converge, form="MLP", protocol=CROSS_FITTED, optimiser=o, start="cold") for o in ("Adam", "L-BFGS"))
    return Claim(
        "7. The MLP converges within 100 epochs",
        "best epoch 99",
        f"best epoch {adam['best_epoch']:.0f} of 100, gradient {adam['gradient_norm']:.0e}; by L-BFGS the held-out loss falls from "
        f"{adam['validation_loss']:.4f} to {converged['validation_loss']:.4f}, R2 from {adam['r2']:.4f} to {converged['r2']:.4f}",
        "**does not hold**" if adam["best_epoch"] > 90 else "**holds**",
        link("converge_gate"),
    )


def repetitions(intervals: pd.DataFrame, components: pd.DataFrame, set_size: int) -> str:
    """What one more repetition would give, and whether the report had enough test stars."""
    ours, cross_fitted = (row_of(intervals, gate=gate) for gate in REPLICATED.values())
    sources = components[(components["gate"] == REPLICATED[IN_SAMPLE]) & components["source"].isin(SOURCES_IN_TEST_STARS)]
    needed = required_stars(ours["mean"], set_size * float(sources["variance"].clip(lower=0.0).sum()))
    return (
        f"One more repetition of claim 1 with {set_size} test stars will, with 95 % confidence, lie in "
        f"[{ours['repetition_low']:+.4f}, {ours['repetition_high']:+.4f}] (cross-fitted: "
        f"[{cross_fitted['repetition_low']:+.4f}, {cross_fitted['repetition_high']:+.4f}]). To see a difference of "
        f"{ours['mean']:+.4f} with 80 % power takes {needed:,.0f} test stars: on these spectra the report's {REPORT_STARS} were "
        f"{'enough' if needed < REPORT_STARS else 'too few'}."
    )


def about_gates(
    converge: pd.DataFrame,
    leaks: pd.DataFrame,
    control: pd.DataFrame,
    ablate: pd.DataFrame,
    joint: pd.DataFrame,
    cover: pd.DataFrame,
) -> list[str]:
    """Leakage, convergence, other uses of the experts, joint training, stars outside the cells, and changes of the gate.

    The last variant of joint training is reported: it was chosen on held-out stars, whatever the test stars say.
    """
    seen = {"protocol": CROSS_FITTED, "stars": "all", "baseline_protocol": IN_SAMPLE, "baseline_stars": "all"}
    leak_mlp, leak_linear = (row_of(leaks, form=form, **seen) for form in ("MLP", "linear"))
    linear = row_of(converge, form="linear", protocol=CROSS_FITTED, optimiser="L-BFGS", start="warm")
    mlp = row_of(converge, form="MLP", protocol=CROSS_FITTED, optimiser="Adam", start="cold")
    inputs = "features + expert predictions"
    stacked, mixture = row_of(control, form="MLP", inputs=inputs), row_of(control, form="MLP gate", inputs=inputs)
    alone, constant = row_of(control, form="MLP", inputs="features"), row_of(control, form="constant weights")
    title = "Mixing is not the best use of the experts" if stacked["low"] > 0 else "A simpler use of the experts"
    last, best = joint.iloc[-1].to_dict(), cover.nlargest(1, "r2").iloc[0].to_dict()
    no_pca = row_of(ablate, changed="features", value="no PCA")
    width = ablate[ablate["changed"] == "hidden units"].nlargest(1, "r2").iloc[0].to_dict()
    return [
        "**Leakage.** A gate can be trained with predictions of experts that had not seen its stars, or that had. The first minus "
        f"the second: MLP {shown(leak_mlp)}, converged linear gate {shown(leak_linear)}. {link('measure_leakage')}",
        f"**The linear gate had not converged.** At its optimum it has {linear['delta_r2'] / mlp['delta_r2']:.0%} of the MLP's gain "
        f"over the classification gate (cross-fitted). Non-linearity adds the rest. {link('converge_gate')}",
        f"**{title}.** A network of the same size that regresses log g on features and expert predictions differs from the mixture "
        f"by {shown(stacked)} (R2 {stacked['r2']:.4f} against {mixture['r2']:.4f}). From the 13 features alone it reaches "
        f"{alone['r2']:.4f}; constant weights reach {constant['r2']:.4f}. {link('control_gate')}",
        f"**Training experts and gate together** reaches R2 {last['r2']:.4f}, {shown(last)} against frozen experts "
        f"({last['variant']}). {link('train_jointly')}",
        f"**All stars.** Best on covered and other stars together: {best['variant']}, R2 {best['r2']:.4f} ({shown(best)} against no "
        f"special treatment). {link('cover_all')}",
        f"**One change at a time.** Without the principal components: {shown(no_pca)}. The best width is {width['variant']}: "
        f"{shown(width)} against 64. {link('ablate_gate')}",
    ]


def about_intervals(components: pd.DataFrame, ranking: pd.DataFrame, coverage: pd.DataFrame) -> list[str]:
    """Where the variance of a repetition comes from, and which intervals hold what they promise."""
    sources = ("test stars", "survey", "noise draw", "gate seed")
    shares = {source: row_of(components, gate=REPLICATED[IN_SAMPLE], source=source)["share"] for source in sources}
    best, percentile = ranking.iloc[0], row_of(ranking, method="percentile")
    at_95 = coverage[(coverage["level"] == 0.95) & (coverage["stars"] == "all stars")].groupby("method")["coverage"].mean()
    return [
        f"**Where the variance of a repetition comes from**: {', '.join(f'{source} {share:.0%}' for source, share in shares.items())}; "
        f"the rest are interactions. {link('replicate')}",
        f"**Intervals.** At {REPORT_STARS} stars the report's percentile intervals hold the truth {at_95['percentile']:.1%} of the "
        f"time where they promise 95 %. The {best['method']} intervals come closest ({at_95[best['method']]:.1%}), and are the "
        f"default here. By cell, the root mean square errors of the coverage are {percentile['rms_error_by_cell']:.1f} and "
        f"{best['rms_error_by_cell']:.1f} points. {link('calibrate_bootstrap')}",
    ]


def write_findings(config: FindingsConfig, evidence: Evidence, command: str) -> str:
    """FINDINGS.md, from the evidence and the tables of the other experiments."""
    experiments = ("converge_gate", "control_gate", "ablate_gate", "train_jointly", "cover_all")
    converge, control, ablate, joint, cover = (read(config, experiment, "variants") for experiment in experiments)
    intervals, components = (read(config, "replicate", table) for table in ("intervals", "components"))
    ranking, coverage = (read(config, "calibrate_bootstrap", table) for table in ("ranking", "coverage"))
    leaks, scale = read(config, "measure_leakage", "differences"), read(config, "scale", "scale")
    set_size = json.loads((config.results_dir / "replicate" / "default" / "run.json").read_text())["stars_in_a_test_set"]
    claims = [
        mlp_beats_classification(intervals),
        linear_is_worse(converge),
        hot_metal_poor_gain_most(evidence.cells, evidence.rivals),
        weights_are_more_uniform(evidence.weights),
        soft_beats_hard(evidence.hard),
        gain_survives_noise(scale),
        mlp_converges(converge),
    ]
    others = [
        *about_gates(converge, leaks, control, ablate, joint, cover),
        *about_intervals(components, ranking, coverage),
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
        table_markdown(pd.DataFrame(claims).rename(columns={"claim": "claim of the report"})),
        "A claim *holds* if the interval lies on its side of 0, it *does not hold* if the interval lies on the other side, and we "
        "*cannot tell* if the interval contains 0.",
        "The intervals of claims 2 to 6 cover the sampling of test stars only, for one training survey "
        f"({evidence.n_test:,} covered test stars in claims 2 to 5). The interval of claim 1 also covers new training stars, noise "
        f"and gate seeds. The intervals of claim 3 hold for all cells at once. {repetitions(intervals, components, set_size)}",
        "## What we find beside them",
        "\n".join(f"- {text}" for text in others),
        "## Hot metal-poor stars, cell by cell",
        "![Delta R2 by cell](findings/cells.png)",
        table_markdown(cells[["protocol", "cell", "test stars", "Delta R2, all cells at once", "stars needed in the cell"]]),
        "*Stars needed*: for an interval of this cell alone to exclude 0 with 80 % power, if the true difference is the one in the "
        "table.",
    ]
    return "\n\n".join(sections) + "\n"


def compute(config: FindingsConfig, stages: Stages) -> Results:
    """Gathers the evidence."""
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
        console.print(f"written: {config.results_dir / 'FINDINGS.md'}", highlight=False)

    return Results(
        "Evidence for FINDINGS.md",
        ["![By cell](cells.png)", table_markdown(rivals)],
        {"cells": cells, "rivals": rivals, "weights": evidence.weights},
        {"cells": figure},
        {"soft_minus_hard": evidence.hard},
        write_text,
    )


STUDY = Study("findings", PRESETS, compute)


def main(config: FindingsConfig) -> Results:
    """Writes FINDINGS.md, and the evidence to findings/ beside it."""
    output_dir = config.output.output_dir or config.results_dir / "findings"
    return STUDY(dataclasses.replace(config, output=dataclasses.replace(config.output, output_dir=output_dir)))


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
