"""Do the intervals hold what they promise? Thousands of test sets from one simulated population, with frozen gates.

    python -m experiments.calibrate_bootstrap                  2,000 test sets of 816 from 100,000 stars; about 3 min on 2 cores
    python -m experiments.calibrate_bootstrap --preset smoke   40 test sets; about a minute

Each test set is drawn with replacement from the population, so that the population's Delta R2 is the exact truth for it.
Results go to results/calibrate_bootstrap/PRESET.
"""

from __future__ import annotations

import dataclasses
import functools
from dataclasses import dataclass
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax
from matplotlib.figure import Figure

from experiments.pipeline.config import SMALL, BootstrapOptions, DataConfig, OutputOptions, draw_keys
from experiments.pipeline.gates import CONVERGED, training_stars
from experiments.pipeline.methods import PROTOCOLS
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, new_figure
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.bootstrap import resample_gain, squared_error_gain
from moe_jax.evaluate.intervals import METHODS, confidence_interval, simultaneous_interval
from moe_jax.experts.cells import CELL_NAMES, N_CELLS, assign_cells
from moe_jax.experts.fit import predict_experts
from moe_jax.gates.features import compute_features
from moe_jax.gates.networks import Gate, LinearGate, MLPGate
from moe_jax.gates.routing import route_soft
from moe_jax.gates.training import GateConfig, fit_gate
from moe_jax.spectra.simulate import simulate_survey
from moe_jax.spectra.survey import add_noise

LEVELS = (0.90, 0.95, 0.99)
_CHUNK = 5_000  # stars of the population that are simulated at a time
_SETS = 50  # test sets between two steps of the progress


@dataclass(frozen=True)
class CalibrateConfig:
    """The population and the test sets."""

    preset: Literal["default", "smoke"] = "default"
    """Preset from which the other options start."""
    n_population: int = 100_000
    """Stars of the population; those that the cells cover are drawn from."""
    n_sets: int = 2_000
    """Test sets."""
    set_size: int = 816
    """Covered stars of a test set."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    mlp: MLPGate = group(MLPGate())
    data: DataConfig = group(DataConfig(), without=("train_file", "test_file", "columns"))
    bootstrap: BootstrapOptions = group(BootstrapOptions(), without=("confidence_level", "interval_method"))
    output: OutputOptions = group(OutputOptions())

    def __post_init__(self) -> None:
        require_at_least(self, n_population=100, n_sets=2, set_size=2)


PRESETS = {
    "default": CalibrateConfig(),
    "smoke": CalibrateConfig(
        preset="smoke",
        data=SMALL,
        n_population=5_000,
        n_sets=50,
        bootstrap=BootstrapOptions(n_resamples=200),
        gate=GateConfig(epochs=5),
    ),
}


class Population(NamedTuple):
    """The covered stars of the population."""

    y: AnyArray  #: (N,)
    cell: AnyArray  #: (N,)
    gains: AnyArray  #: (pairs, N) gain in squared error of each gate over the classification gate


class Ends(NamedTuple):
    """Intervals of all test sets, levels and methods; column 0 is overall, then the cells."""

    low: AnyArray  #: (sets, levels, methods, 1 + G)
    high: AnyArray
    simultaneous_low: AnyArray  #: (sets, levels, G)
    simultaneous_high: AnyArray


PAIRS = ("MLP, cross-fitted", "linear, converged", "linear, in-sample 20 %")


def simulate_population(config: CalibrateConfig, prepared: Prepared, stages: Stages) -> Population:
    """Trains the gates, and has them predict the population, chunk by chunk."""
    keys = draw_keys(config.data.seed)
    logistic = prepared.classifier.params
    fits = []
    with stages("gates"):
        settings: tuple[tuple[Gate, GateConfig, str, float], ...] = (
            (config.mlp, config.gate, PROTOCOLS[1], 1.0),
            (LinearGate(), CONVERGED, PROTOCOLS[1], 1.0),
            (LinearGate(), config.gate, PROTOCOLS[0], 0.2),
        )
        for i, (gate, gate_config, protocol, fraction) in enumerate(settings):
            stars = training_stars(config.data, prepared, protocol, fraction)
            x, yhat, y = map(jnp.asarray, (stars.features, stars.predictions, stars.log_g))
            fit = fit_gate(jax.random.fold_in(keys.gates, i), gate, x, yhat, y, gate_config, logistic=logistic)
            fits.append((gate, fit.params))
    chunks = []
    sizes = [min(_CHUNK, config.n_population - i) for i in range(0, config.n_population, _CHUNK)]
    with stages.steps("population", len(sizes)) as advance:
        for i, size in enumerate(sizes):
            key_stars, key_noise = jax.random.split(jax.random.fold_in(keys.test, 1_000 + i))
            survey = simulate_survey(key_stars, size, label_sampling=config.data.label_sampling)
            flux = add_noise(key_noise, jnp.asarray(survey.flux), jnp.asarray(survey.error), config.data.noise_level)
            features = compute_features(prepared.model, flux, survey.wave)
            yhat = predict_experts(prepared.experts, flux)
            baseline = route_soft(LinearGate().apply(logistic, features), yhat)
            y = jnp.asarray(survey.labels.log_g)
            gains = [squared_error_gain(y, route_soft(gate.apply(params, features), yhat), baseline) for gate, params in fits]
            cell = np.asarray(assign_cells(survey.labels.T_eff, survey.labels.M_H))
            covered = np.flatnonzero(cell >= 0)
            chunks.append(Population(np.asarray(y)[covered], cell[covered], np.stack(gains)[:, covered]))
            advance()
    return Population(*(np.concatenate(column, axis=-1) for column in zip(*chunks, strict=True)))


@functools.partial(jax.jit, static_argnames=("set_size", "n_resamples"))
def intervals_of_sets(keys: jax.Array, y: jax.Array, gain: jax.Array, cell: jax.Array, set_size: int, n_resamples: int) -> Ends:
    """Draws a test set for each key, and all its intervals from one set of resamples."""

    def one(key: jax.Array) -> Ends:
        key_stars, key_resamples = jax.random.split(key)
        rows = jax.random.randint(key_stars, (set_size,), 0, len(y))
        resampled = resample_gain(key_resamples, y[rows], gain[rows], cell[rows], n_resamples, N_CELLS)
        by_cell = resampled.columns(slice(1, None))
        single = [[confidence_interval(resampled, method, level) for method in METHODS] for level in LEVELS]
        at_once = [simultaneous_interval(by_cell, level) for level in LEVELS]
        return Ends(
            jnp.stack([jnp.stack([interval.low for interval in row]) for row in single]),
            jnp.stack([jnp.stack([interval.high for interval in row]) for row in single]),
            jnp.stack([interval.low for interval in at_once]),
            jnp.stack([interval.high for interval in at_once]),
        )

    ends: Ends = lax.map(one, keys)
    return ends


def truth_of(population: Population) -> np.ndarray:
    """Delta R2 of the whole population, overall and by cell, in float64; (pairs, 1 + G)."""
    y, cell, gains = (np.asarray(array) for array in population)
    y, gains = y.astype(np.float64), gains.astype(np.float64)
    parts = [np.ones(len(y), bool), *(cell == k for k in range(N_CELLS))]
    return np.array([[gain[part].mean() / y[part].var() for part in parts] for gain in gains])


def coverage_tables(ends: list[Ends], truth: np.ndarray) -> dict[str, pd.DataFrame]:
    """Coverage, misses on either side and mean width, of each method, level and comparison; overall, by cell, and at once."""
    rows, simultaneous = [], []
    names = ("all stars", *CELL_NAMES)
    for pair, (end, true) in enumerate(zip(ends, truth, strict=True)):
        low, high = np.asarray(end.low, np.float64), np.asarray(end.high, np.float64)
        n_sets = len(low)
        for (i, level), (j, method), (k, part) in (
            (a, b, c) for a in enumerate(LEVELS) for b in enumerate(METHODS) for c in enumerate(names)
        ):
            above, below = low[:, i, j, k] > true[k], high[:, i, j, k] < true[k]
            coverage = 1.0 - np.mean(above | below)
            rows.append(
                {
                    "comparison": PAIRS[pair],
                    "method": method,
                    "level": level,
                    "stars": part,
                    "coverage": coverage,
                    "monte_carlo_error": np.sqrt(level * (1 - level) / n_sets),
                    "truth_below": np.mean(above),
                    "truth_above": np.mean(below),
                    "mean_width": np.mean(high[:, i, j, k] - low[:, i, j, k]),
                }
            )
        inside = (np.asarray(end.simultaneous_low) <= true[1:]) & (true[1:] <= np.asarray(end.simultaneous_high))
        for i, level in enumerate(LEVELS):
            simultaneous.append(
                {
                    "comparison": PAIRS[pair],
                    "level": level,
                    "all_nine_inside": np.mean(inside[:, i].all(axis=1)),
                    "monte_carlo_error": np.sqrt(level * (1 - level) / n_sets),
                    "mean_width": np.mean(np.asarray(end.simultaneous_high - end.simultaneous_low)[:, i]),
                }
            )
    return {"coverage": pd.DataFrame(rows), "simultaneous": pd.DataFrame(simultaneous)}


def rank_methods(coverage: pd.DataFrame) -> pd.DataFrame:
    """Root mean square of coverage - level, in points, over comparisons and levels: overall, by cell, and of both together."""
    error = coverage.assign(square=(100 * (coverage["coverage"] - coverage["level"])) ** 2)
    overall = error["stars"] == "all stars"
    table = pd.DataFrame(
        {
            "rms_error_overall": np.sqrt(error[overall].groupby("method", sort=False)["square"].mean()),
            "rms_error_by_cell": np.sqrt(error[~overall].groupby("method", sort=False)["square"].mean()),
        }
    )
    table["rms_error"] = np.sqrt((table**2).mean(axis=1))
    return table.sort_values("rms_error").reset_index()


def draw_figure(coverage: pd.DataFrame) -> Figure:
    """Actual minus nominal coverage by method: overall, and in each cell."""
    fig, axes = new_figure(1, len(LEVELS), figsize=(9.0, 3.9), sharey=True)
    colors = dict(zip(METHODS, (ORANGE, GREY, GREEN, BLUE), strict=True))
    for ax, level in zip(axes, LEVELS, strict=True):
        at_level = coverage[coverage["level"] == level]
        error = 100 * at_level["monte_carlo_error"].iloc[0]
        ax.axhspan(-2 * error, 2 * error, color="#EEEEEE", zorder=0)
        ax.axhline(0.0, color=BLACK, lw=0.8)
        for i, method in enumerate(METHODS):
            part = at_level[at_level["method"] == method]
            off = 100 * (part["coverage"] - level)
            overall = (part["stars"] == "all stars").to_numpy()
            x = i + np.linspace(-0.25, 0.25, int((~overall).sum()))
            ax.plot(x, off[~overall], ".", ms=4, color=colors[method], label="a cell" if i == 3 else None)
            ax.plot(
                np.full(overall.sum(), i), off[overall], "D", ms=7, mfc="white", mec=BLACK, label="all stars" if i == 3 else None
            )
        ax.set_xticks(range(len(METHODS)), METHODS, rotation=30, ha="right", fontsize=9)
        ax.set_title(f"{level:.0%} intervals")
    axes[0].set_ylabel("actual - promised coverage, points")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside upper center")
    fig.supxlabel("grey band: two Monte-Carlo standard errors", fontsize=9)
    return fig


def sections_of(config: CalibrateConfig, tables: dict[str, pd.DataFrame], truth: np.ndarray, n: int) -> list[str]:
    """The paragraphs of report.md."""
    coverage, ranking = tables["coverage"], tables["ranking"]
    wide = coverage[coverage["stars"] == "all stars"].copy()
    wide["coverage"] = [f"{c:.1%} ± {e:.1%}" for c, e in zip(wide["coverage"], wide["monte_carlo_error"], strict=True)]
    percent = {"truth_below": ".1%", "truth_above": ".1%", "level": ".0%"}
    cells = coverage[(coverage["stars"] != "all stars") & (coverage["level"] == 0.95)]
    by_cell = 100 * cells.pivot_table(index="stars", columns=["comparison", "method"], values="coverage", sort=False)
    by_cell.columns = [": ".join(names) for names in by_cell.columns.to_list()]
    simultaneous = tables["simultaneous"].copy()
    simultaneous["all_nine_inside"] = [
        f"{c:.1%} ± {e:.1%}" for c, e in zip(simultaneous["all_nine_inside"], simultaneous["monte_carlo_error"], strict=True)
    ]
    best = ranking["method"].iloc[0]
    truths = ", ".join(f"{name} {value[0]:+.4f}" for name, value in zip(PAIRS, truth, strict=True))
    return [
        f"{config.n_sets:,} test sets of {config.set_size} stars, drawn with replacement from {n:,} covered stars of a simulated "
        f"population; {config.bootstrap.n_resamples:,} resamples of each. The gates are frozen; the true Delta R2 against the "
        f"classification gate are those of the population: {truths}.",
        f"**{best}** comes closest to what it promises.",
        table_markdown(ranking, dict.fromkeys(ranking.columns[1:], ".2f")),
        "Root mean square of (actual - promised coverage) in points, over levels and comparisons. The Monte-Carlo error alone "
        f"would give {100 * np.sqrt(np.mean([level * (1 - level) for level in LEVELS]) / config.n_sets):.2f}.",
        "## All stars",
        table_markdown(wide[["comparison", "method", "level", "coverage", "truth_below", "truth_above", "mean_width"]], percent),
        "*truth below, above*: how often the truth lies below or above the interval.",
        "![Coverage](coverage.png)",
        "## By cell: coverage of 95 % intervals, per cent",
        table_markdown(by_cell.reset_index(), dict.fromkeys(by_cell.columns, ".1f")),
        f"The Monte-Carlo error is {100 * np.sqrt(0.95 * 0.05 / config.n_sets):.1f}. `coverage.csv` has the other levels.",
        "## All nine cells at once (max-t)",
        table_markdown(simultaneous[["comparison", "level", "all_nine_inside", "mean_width"]], {"level": ".0%"}),
    ]


def compute(config: CalibrateConfig, stages: Stages) -> Results:
    """Measures the coverage."""
    cache = config.output.cache
    prepared = prepare(config.data, stages, cache)
    settings = {"data": dataclasses.asdict(config.data), "gate": dataclasses.asdict(config.gate), "hidden": config.mlp.hidden}
    population, _ = cache.load_or_compute(
        "population",
        settings | {"n": config.n_population},
        [__file__],
        Population,
        lambda: simulate_population(config, prepared, stages),
    )
    truth = truth_of(population)
    y, cell, gains = map(jnp.asarray, population)
    keys = jax.random.split(draw_keys(config.data.seed).bootstrap, config.n_sets)
    ends = []
    for name, gain in zip(PAIRS, gains, strict=True):
        parts = []
        with stages.steps(f"intervals: {name}", -(-config.n_sets // _SETS)) as advance:
            for i in range(0, config.n_sets, _SETS):
                part = intervals_of_sets(keys[i : i + _SETS], y, gain, cell, config.set_size, config.bootstrap.n_resamples)
                parts.append(jax.tree.map(np.asarray, part))
                advance()
        ends.append(Ends(*(np.concatenate(column) for column in zip(*parts, strict=True))))
    tables = coverage_tables(ends, truth)
    tables["ranking"] = rank_methods(tables["coverage"])
    shown = tables["coverage"][tables["coverage"]["stars"] == "all stars"]
    for row in shown.to_dict("records"):
        coverage = f"{row['coverage']:.3f} +- {row['monte_carlo_error']:.3f}"
        console.print(f"{row['comparison']:<24} {row['method']:<12} {row['level']:.0%}  {coverage}", highlight=False)
    return Results(
        "Do the intervals hold what they promise?",
        sections_of(config, tables, truth, len(y)),
        tables,
        {"coverage": draw_figure(tables["coverage"])},
        {"truth": truth, "n_covered_population": len(y)},
    )


main = Study("calibrate_bootstrap", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
