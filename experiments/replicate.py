"""Would the difference come out again? Surveys, noise draws and gate seeds are repeated, and judged on ten test sets.

    python -m experiments.replicate                 4 surveys x 4 noise draws x 16 gate seeds x 10 test sets; 15 min on 2 cores
    python -m experiments.replicate --preset smoke  2 x 2 x 2 x 2, small; about a minute

A run that was stopped goes on where it was, from the cache. Results go to results/replicate/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import numpy as np
import pandas as pd

from experiments.pipeline.config import BootstrapOptions, DataConfig, ExpertOptions, GateStudyConfig
from experiments.pipeline.gates import CONVERGED, GateRun, mix_by_class, run_gates
from experiments.pipeline.methods import CROSS_FITTED, IN_SAMPLE
from experiments.pipeline.prepare import prepare_each
from experiments.pipeline.stars import Prepared
from experiments.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, Figure, new_figure
from experiments.report.markdown import interval, table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages
from moe_jax.evaluate.variance import SOURCES, VarianceComponents, variance_components
from moe_jax.gates import GateConfig, LinearGate

#: Cross-validation chose this penalty for all nine cells, here and in the report. No difference depends on the global ridge.
EXPERTS = ExpertOptions(alphas=(1.0,), global_alphas=())


@dataclass(frozen=True)
class ReplicateConfig(GateStudyConfig):
    """The repeated experiment."""

    n_surveys: int = 4
    """Surveys, each with training stars of its own."""
    n_draws: int = 4
    """Noise draws of each survey."""
    n_seeds: int = 16
    """Gate seeds of each noise draw."""
    n_sets: int = 10
    """Parts of the covered test stars, each a test set of the report's size."""
    data: DataConfig = group(
        DataConfig(experts=EXPERTS), without=("noise", "train_file", "test_file", "columns", "test_seed", "noise_draw")
    )
    bootstrap: BootstrapOptions = group(BootstrapOptions(), without=("n_resamples", "interval_method"))

    def __post_init__(self) -> None:
        require_at_least(self, n_surveys=2, n_draws=2, n_seeds=2, n_sets=2)


PRESETS = {
    "default": ReplicateConfig(),
    "smoke": ReplicateConfig(
        preset="smoke",
        data=DataConfig(n_train=1_200, n_test=1_200, experts=dataclasses.replace(EXPERTS, C_grid=(10.0,))),
        n_surveys=2,
        n_draws=2,
        n_seeds=2,
        n_sets=2,
        gate=GateConfig(epochs=5),
    ),
}

#: The converged linear gate on the stars that the MLP is trained on: of the same fifth, the same part is held out.
CONVERGED_ON_SAME = dataclasses.replace(CONVERGED, validation_fraction=0.2, patience=100)
#: Differences between two gates: name, gate, and the gate that it is compared with instead of the classification gate.
DIFFERENCES = {
    "MLP - converged linear, in-sample 20 %": ("MLP, in-sample 20 %", "linear, in-sample 20 %, converged"),
    "MLP - converged linear, cross-fitted": ("MLP, cross-fitted", "linear, cross-fitted, converged"),
}


def gates_of(config: ReplicateConfig) -> dict[str, GateRun]:
    """The gates by the name in the tables; in a converged one only the stars that are held out are drawn, once."""
    mlp, linear = config.mlp, LinearGate()
    return {
        "MLP, in-sample 20 %": GateRun(mlp, config.gate, IN_SAMPLE, 0.2, config.n_seeds),
        "MLP, cross-fitted": GateRun(mlp, config.gate, n_seeds=config.n_seeds),
        "linear, in-sample 20 %": GateRun(linear, config.gate, IN_SAMPLE, 0.2, config.n_seeds),
        "linear, in-sample 20 %, converged": GateRun(linear, CONVERGED_ON_SAME, IN_SAMPLE, 0.2, 1),
        "linear, cross-fitted, converged": GateRun(linear, CONVERGED_ON_SAME, CROSS_FITTED, 1.0, 1),
    }


def delta_r2(y: np.ndarray, prediction: np.ndarray, baseline: np.ndarray, n_sets: int) -> np.ndarray:
    """Delta R2 of (S, N) predictions against (N,) of a baseline on ``n_sets`` equal parts of the stars; (S, n_sets)."""
    size = len(y) // n_sets
    parts = [slice(i * size, (i + 1) * size) for i in range(n_sets)]
    gain = (y - baseline) ** 2 - (y - prediction) ** 2
    return np.stack([gain[:, part].sum(axis=1) / ((y[part] - y[part].mean()) ** 2).sum() for part in parts], axis=1)


def repeat_once(config: ReplicateConfig, data: DataConfig, prepared: Prepared) -> dict[str, np.ndarray]:
    """Delta R2 against the classification gate by gate; (seeds, test sets) each."""
    test = prepared.test.covered()
    y, baseline = np.asarray(test.log_g, np.float64), mix_by_class(prepared, test)[0].astype(np.float64)
    values = {}
    for name, run in gates_of(config).items():
        sweep = run_gates(data, prepared, run, config.output.cache)
        delta = delta_r2(y, np.asarray(sweep.predictions, np.float64), baseline, config.n_sets)
        values[name] = np.broadcast_to(delta, (config.n_seeds, config.n_sets))
    return values


def repeat(config: ReplicateConfig, stages: Stages) -> tuple[dict[str, np.ndarray], int]:
    """Delta R2 of all repetitions by gate, (surveys, noise draws, seeds, test sets) each; and the stars of a test set."""
    seed = config.data.seed
    configs = [
        dataclasses.replace(config.data, seed=seed + survey, test_seed=seed, noise_draw=draw)
        for survey in range(config.n_surveys)
        for draw in range(config.n_draws)
    ]
    repetitions = []
    preparations = prepare_each(configs, Stages(quiet=True), config.output.cache)
    for data, prepared in zip(stages.each("repetitions", configs), preparations, strict=True):
        repetitions.append(repeat_once(config, data, prepared))
        size = int(np.sum(np.asarray(prepared.test.cell) >= 0)) // config.n_sets
    shape = (config.n_surveys, config.n_draws, config.n_seeds, config.n_sets)
    values = {name: np.stack([values[name] for values in repetitions]).reshape(shape) for name in repetitions[0]}
    return values | {name: values[ours] - values[theirs] for name, (ours, theirs) in DIFFERENCES.items()}, size


def summarize(config: ReplicateConfig, values: dict[str, np.ndarray]) -> tuple[dict[str, pd.DataFrame], dict]:
    """Tables of the intervals, the components and all single differences; and the components by gate."""
    components = {name: variance_components(value, config.bootstrap.confidence_level) for name, value in values.items()}
    intervals = pd.DataFrame(
        {
            "gate": name,
            "mean": c.mean,
            "mean_low": c.mean_low,
            "mean_high": c.mean_high,
            "repetition_sd": np.sqrt(c.total),
            "repetition_low": c.prediction_low,
            "repetition_high": c.prediction_high,
            "fraction_above_0": float((values[name] > 0).mean()),
        }
        for name, c in components.items()
    )
    sources = pd.DataFrame(
        {"gate": name, "source": source, "sd": np.sqrt(max(v, 0.0)), "share": c.share[source]}
        | {"share_low": shares[source][0], "share_high": shares[source][1], "variance": v}
        for name, c in components.items()
        for shares in [c.share_intervals(config.bootstrap.confidence_level)]
        for source, v in c.variance.items()
    )
    singles = pd.DataFrame(
        {"gate": name, "survey": s, "noise_draw": n, "gate_seed": g} | {f"set_{t}": value[s, n, g, t] for t in range(config.n_sets)}
        for name, value in values.items()
        for s, n, g in np.ndindex(value.shape[:3])
    )
    return {"intervals": intervals, "components": sources, "differences": singles}, components


def draw_figures(values: dict[str, np.ndarray], components: dict[str, VarianceComponents]) -> dict[str, Figure]:
    """All repetitions with both intervals; the shares of the variance."""
    from matplotlib.ticker import PercentFormatter

    names = list(values)
    fig, ax = new_figure(figsize=(8.0, 4.2))
    for i, name in enumerate(names):
        c, value = components[name], values[name].mean(axis=2)  # seeds averaged: one point for survey, noise draw and test set
        for s in range(value.shape[0]):
            x = i - 0.3 + 0.6 * (s + 0.5) / value.shape[0] + np.zeros(value[s].size)
            ax.plot(value[s].ravel(), x, "|", ms=7, color=GREY, label="a repetition (seeds averaged)" if i + s == 0 else None)
        ax.plot([c.prediction_low, c.prediction_high], [i + 0.4] * 2, color=BLUE, lw=2, label="one repetition" if i == 0 else None)
        ax.plot([c.mean_low, c.mean_high], [i - 0.4] * 2, color=ORANGE, lw=4, label="expected value" if i == 0 else None)
        ax.plot(c.mean, i, "D", color=BLACK, ms=5, zorder=3, label="mean" if i == 0 else None)
    ax.axvline(0.0, color=BLACK, lw=0.8, ls="--")
    ax.set_yticks(range(len(names)), names)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel(r"$\Delta R^2$, test sets of the report's size")
    fig.legend(fontsize=8, ncols=4, loc="outside upper center")
    shares, ax = new_figure(figsize=(8.0, 3.6))
    left = np.zeros(len(names))
    colors = (GREY, BLUE, ORANGE, GREEN, "#56B4E9", "#F0E442", "#CC79A7")
    hatches = ("", "", "", "", "//", "\\\\", "xx")
    for source, color, hatch in zip(SOURCES, colors, hatches, strict=True):
        width = np.array([components[name].share[source] for name in names])
        ax.barh(range(len(names)), width, left=left, color=color, hatch=hatch, edgecolor="white", label=source)
        left += width
    ax.set_yticks(range(len(names)), names)
    ax.invert_yaxis()
    ax.xaxis.set_major_formatter(PercentFormatter(1.0))
    ax.set_xlabel("share of the variance of one repetition")
    shares.legend(fontsize=8, ncols=4, loc="outside upper center")
    return {"repetitions": fig, "shares": shares}


def sections_of(config: ReplicateConfig, tables: dict[str, pd.DataFrame], size: int) -> list[str]:
    """The paragraphs of report.md."""
    level = f"{100 * config.bootstrap.confidence_level:g} %"
    shown = pd.DataFrame(
        {
            "gate": row["gate"],
            f"expected Delta R2 [{level}]": interval(row["mean"], row["mean_low"], row["mean_high"]),
            f"one repetition from scratch, {level}": f"[{row['repetition_low']:+.4f}, {row['repetition_high']:+.4f}]",
            "standard deviation of a repetition": row["repetition_sd"],
            "repetitions above 0": f"{row['fraction_above_0']:.1%}",
        }
        for row in tables["intervals"].to_dict("records")
    )
    parts = tables["components"].copy()
    ends = zip(parts["share"], parts["share_low"], parts["share_high"], strict=True)
    parts["shown"] = [f"{share:.0%} [{low:.0%}, {high:.0%}]" for share, low, high in ends]
    shares = parts.pivot(index="gate", columns="source", values="shown").loc[tables["intervals"]["gate"], list(SOURCES)]
    return [
        f"{config.n_surveys} surveys of {config.data.n_train:,} training stars x {config.n_draws} noise draws x "
        f"{config.n_seeds} gate seeds, each judged on the same {config.n_sets} test sets of {size} covered stars. Delta R2 is "
        "against the classification gate of the same repetition; in the last two rows, of the MLP against the converged linear "
        "gate. Test stars keep their noise; each draw of the training stars' noise has gate seeds of its own. A converged gate "
        "starts at the classification gate; both kinds hold out a fifth of their stars.",
        table_markdown(shown),
        "*Expected*: holds the mean over repetitions. *One repetition*: holds what a new survey, noise draw, gate seed and test "
        "set would give; it is what a single published number should be read with.",
        "![All repetitions](repetitions.png)",
        f"## Where the spread comes from: shares of the variance of one repetition, with {level} intervals",
        table_markdown(shares.reset_index()),
        "The last three are interactions: how differently test sets take the same change of survey, noise or seed. Moment "
        "estimates (balanced analysis of variance), those below 0 as 0, and generalised confidence intervals: "
        f"{config.n_surveys} surveys say little about the share of surveys. `components.csv` has the standard deviations.",
        "![Shares of the variance](shares.png)",
    ]


def compute(config: ReplicateConfig, stages: Stages) -> Results:
    """Runs all repetitions."""
    values, size = repeat(config, stages)
    tables, components = summarize(config, values)
    sections, drawn = sections_of(config, tables, size), draw_figures(values, components)
    return Results("The difference, repeated from scratch", sections, tables, drawn, {"stars_in_a_test_set": size})


main = Study("replicate", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
