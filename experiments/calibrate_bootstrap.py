"""Do the intervals hold what they promise? Thousands of test sets from one simulated population, with frozen gates.

    python -m experiments.calibrate_bootstrap                  test sets of 816 and 8,000 from 100,000 stars; 5 min on 2 cores
    python -m experiments.calibrate_bootstrap --preset smoke   40 test sets; about a minute

Each test set is drawn with replacement from a half of the population, whose Delta R2 is the exact truth for it. On one half the
method is chosen, on the other its coverage is measured.
Results go to results/calibrate_bootstrap/PRESET.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax

from experiments.pipeline.config import SMALL, BootstrapOptions, ComparisonConfig, DataConfig, draw_keys
from experiments.pipeline.gates import CONVERGED_LINEAR, GateRun, fit_run
from experiments.pipeline.methods import IN_SAMPLE
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, Figure, new_figure
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.evaluate.bootstrap import group_sizes, resample_gain, squared_error_gain
from moe_jax.evaluate.intervals import METHODS, IntervalMethod, borrow_spread, confidence_interval, simultaneous_interval
from moe_jax.experts.cells import CELL_NAMES, N_CELLS, assign_cells
from moe_jax.experts.fit import predict_experts
from moe_jax.gates import GateConfig, LinearGate, MLPGate, compute_features, route_soft
from moe_jax.spectra import add_noise, simulate_survey

LEVELS = (0.90, 0.95, 0.99)
#: Of the symmetric intervals, the stars whose spread each cell borrows.
BORROWED = (2, 5, 10, 20)
CANDIDATES: dict[str, tuple[IntervalMethod, int]] = {method: (method, 0) for method in METHODS}
CANDIDATES |= {f"symmetric, {m} borrowed": ("symmetric", m) for m in BORROWED}
_CHUNK = 5_000  # stars of the population that are simulated at a time
_SETS = 50  # test sets between two steps of the progress


@dataclass(frozen=True)
class CalibrateConfig(ComparisonConfig):
    """The population and the test sets."""

    n_population: int = 100_000
    """Stars of the population; those that the cells cover are drawn from."""
    set_sizes: tuple[int, ...] = (816, 8_000)
    """Covered stars of a test set: the report's, and that of the other experiments."""
    n_sets: tuple[int, ...] = (2_000, 500)
    """Test sets of each size from each half of the population."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    mlp: MLPGate = group(MLPGate())
    data: DataConfig = group(
        DataConfig(),
        without=("n_test", "test_sampling", "test_seed", "noise", "train_file", "test_file", "columns", "coverage"),
    )
    bootstrap: BootstrapOptions = group(BootstrapOptions(), without=("confidence_level", "interval_method"))

    def __post_init__(self) -> None:
        require_at_least(self, n_population=100, set_sizes=2, n_sets=2)
        if len(self.set_sizes) != len(self.n_sets):
            raise InputError(f"set_sizes is {self.set_sizes} and n_sets {self.n_sets}, expected as many of one as of the other")


PRESETS = {
    "default": CalibrateConfig(),
    "smoke": CalibrateConfig(
        preset="smoke",
        data=SMALL,
        n_population=5_000,
        set_sizes=(816,),
        n_sets=(20,),
        bootstrap=BootstrapOptions(n_resamples=200),
        gate=GateConfig(epochs=5),
    ),
}


class Population(NamedTuple):
    """The covered stars of the population."""

    y: AnyArray  #: (N,)
    cell: AnyArray  #: (N,)
    gains: AnyArray  #: (pairs, N) gain in squared error of each gate over the classification gate

    def half(self, which: int) -> Population:
        """Every other star."""
        return Population(*(array[..., which::2] for array in self))


HALVES = ("first half", "second half")
PAIRS = ("MLP, cross-fitted", "linear, converged", "linear, in-sample 20 %")


def simulate_population(config: CalibrateConfig, prepared: Prepared, stages: Stages) -> Population:
    """Trains the gates, and has them predict the population, chunk by chunk."""
    keys = draw_keys(config.data.seed)
    runs = (GateRun(config.mlp, config.gate), CONVERGED_LINEAR, GateRun(LinearGate(), config.gate, IN_SAMPLE, 0.2))
    with stages("gates"):
        fits = [fit_run(jax.random.fold_in(keys.gates, i), config.data, prepared, run) for i, run in enumerate(runs)]
    chunks = []
    sizes = [min(_CHUNK, config.n_population - i) for i in range(0, config.n_population, _CHUNK)]
    for i, size in enumerate(stages.each("population", sizes)):
        key_stars, key_noise = jax.random.split(jax.random.fold_in(keys.test, 1_000 + i))
        survey = simulate_survey(key_stars, size, label_sampling=config.data.label_sampling, resolution=config.data.resolution)
        flux = add_noise(key_noise, jnp.asarray(survey.flux), jnp.asarray(survey.error), config.data.noise_level)
        features = compute_features(prepared.model, flux, survey.wave)
        yhat = predict_experts(prepared.experts, flux)
        baseline = route_soft(LinearGate().apply(prepared.classifier.params, features), yhat)
        y = jnp.asarray(survey.labels.log_g)
        mixed = [route_soft(run.gate.apply(fit.params, features), yhat) for run, fit in zip(runs, fits, strict=True)]
        gains = [squared_error_gain(y, prediction, baseline) for prediction in mixed]
        cell = np.asarray(assign_cells(survey.labels.T_eff, survey.labels.M_H))
        covered = np.flatnonzero(cell >= 0)
        chunks.append(Population(np.asarray(y)[covered], cell[covered], np.stack(gains)[:, covered]))
    return Population(*(np.concatenate(column, axis=-1) for column in zip(*chunks, strict=True)))


@functools.partial(jax.jit, static_argnames=("set_size", "n_resamples"))
def intervals_of_sets(
    keys: jax.Array, y: jax.Array, gain: jax.Array, cell: jax.Array, set_size: int, n_resamples: int
) -> jax.Array:
    """Draws a test set for each key, and all its intervals from one set of resamples.

    Returns:
        (sets, levels, methods + 1, 2, 1 + G) ends, of all stars first, then by cell. The last method is max-t, for all cells at
        once; it has none for all stars (NaN).
    """

    def one(key: jax.Array) -> jax.Array:
        key_stars, key_resamples = jax.random.split(key)
        rows = jax.random.randint(key_stars, (set_size,), 0, len(y))
        resampled = resample_gain(key_resamples, y[rows], gain[rows], cell[rows], n_resamples, N_CELLS)
        size = group_sizes(cell[rows], N_CELLS)
        single = [
            [jnp.stack(confidence_interval(borrow_spread(resampled, size, m), method, level)) for method, m in CANDIDATES.values()]
            for level in LEVELS
        ]
        at_once = [jnp.stack(simultaneous_interval(resampled.columns(slice(1, None)), level)) for level in LEVELS]
        padded = [jnp.pad(ends, ((0, 0), (1, 0)), constant_values=jnp.nan) for ends in at_once]
        return jnp.stack([jnp.stack([*row, last]) for row, last in zip(single, padded, strict=True)])

    ends: jax.Array = lax.map(one, keys)
    return ends


def truth_of(population: Population) -> np.ndarray:
    """Delta R2 of the whole population, overall and by cell, in float64; (pairs, 1 + G)."""
    y, cell, gains = (np.asarray(array) for array in population)
    y, gains = y.astype(np.float64), gains.astype(np.float64)
    parts = [np.ones(len(y), bool), *(cell == k for k in range(N_CELLS))]
    return np.array([[gain[part].mean() / y[part].var() for part in parts] for gain in gains])


def coverage_tables(ends: np.ndarray, truth: np.ndarray, **columns: object) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Coverage, misses on either side and mean width of each method and level: overall and by cell; and of all cells at once.

    ``ends`` are those of ``intervals_of_sets``, ``truth`` is (1 + G,), and ``columns`` are further columns, for all rows.
    """
    above, below = (outside(ends[:, :, :, i, :], truth) for i, outside in enumerate((np.greater, np.less)))
    width, n_sets = (ends[:, :, :, 1, :] - ends[:, :, :, 0, :]).mean(axis=0), len(ends)
    rows, simultaneous = [], []
    for i, level in enumerate(LEVELS):
        error = np.sqrt(level * (1 - level) / n_sets)
        for (j, method), (k, stars) in itertools.product(enumerate(CANDIDATES), enumerate(("all stars", *CELL_NAMES))):
            missed = above[:, i, j, k].mean(), below[:, i, j, k].mean()
            row = {"method": method, "level": level, "stars": stars, "coverage": 1.0 - sum(missed), "monte_carlo_error": error}
            rows.append(columns | row | {"truth_below": missed[0], "truth_above": missed[1], "mean_width": width[i, j, k]})
        inside = ~(above | below)[:, i, -1, 1:].any(axis=1)
        row = {"level": level, "all_nine_inside": inside.mean(), "monte_carlo_error": error}
        simultaneous.append(columns | row | {"mean_width": width[i, -1, 1:].mean()})
    return pd.DataFrame(rows), pd.DataFrame(simultaneous)


def rank_methods(coverage: pd.DataFrame, half: str) -> pd.DataFrame:
    """Errors of the coverage, in points, on the given half of the population.

    The method of the least root mean square of coverage - level is *chosen*, that of the smallest shortfall is the *safest*.
    """
    part = coverage[coverage["half"] == half]
    error = part.assign(off=100 * (part["coverage"] - part["level"]))
    error["stars"] = np.where(error["stars"] == "all stars", "all stars", "by cell")
    off = error.groupby(["set_size", "stars", "method"], sort=False)["off"]
    table = pd.DataFrame({"rms_error": np.sqrt(off.apply(np.square).groupby(level=[0, 1, 2], sort=False).mean())})
    table["worst_shortfall"] = -off.min()
    table = table.reset_index()
    for choice, column in (("chosen", "rms_error"), ("safest", "worst_shortfall")):
        table[choice] = table.index.isin(table.groupby(["set_size", "stars"])[column].idxmin())
    return table.sort_values(["set_size", "stars", "rms_error"], ignore_index=True)


def rare_stars(population: Population, cell: str, pair: str, sizes: tuple[int, ...]) -> str:
    """Why a cell is hard: the share of its difference that one star in a hundred carries, and how many test sets hold none."""
    member = population.cell == CELL_NAMES.index(cell)
    gain = np.sort(population.gains[PAIRS.index(pair)][member].astype(np.float64))[::-1]
    n_rare = max(len(gain) // 100, 1)
    none = " and ".join(f"{(1 - n_rare / len(population.y)) ** size:.0%} of those of {size:,}" for size in sizes)
    return (
        f"In {cell}, the {n_rare} stars of {len(gain):,} that gain most carry {gain[:n_rare].sum() / gain.sum():.0%} of the "
        f"difference ({pair}), and {none} test sets hold none of them. No resampling of the other stars, and no transformation of "
        "what is resampled, can know of them. Two things help: more stars, or the spread that all stars together have. The "
        "*borrowed* intervals are symmetric ones whose standard errors are those of cells with so many stars more, which have the "
        "spread of all stars. They are too long in quiet cells. `coverage.csv` has every cell."
    )


def draw_figure(coverage: pd.DataFrame) -> Figure:
    """Actual minus nominal coverage by method: overall, and in each cell; a row for each size of test sets."""
    sizes = sorted(coverage["set_size"].unique())
    fig, axes = new_figure(len(sizes), len(LEVELS), figsize=(9.0, 0.8 + 3.1 * len(sizes)), sharey=True, squeeze=False)
    colors = (ORANGE, GREY, GREEN, BLUE, BLACK, *("#56B4E9",) * len(BORROWED))
    for ax, (size, level) in zip(axes.flat, itertools.product(sizes, LEVELS), strict=True):
        at_level = coverage[(coverage["level"] == level) & (coverage["set_size"] == size)]
        error = 100 * at_level["monte_carlo_error"].iloc[0]
        ax.axhspan(-2 * error, 2 * error, color="#EEEEEE", zorder=0)
        ax.axhline(0.0, color=BLACK, lw=0.8)
        for i, method in enumerate(CANDIDATES):
            part = at_level[at_level["method"] == method]
            off = 100 * (part["coverage"] - level)
            overall = (part["stars"] == "all stars").to_numpy()
            x = i + np.linspace(-0.25, 0.25, int((~overall).sum()))
            ax.plot(x, off[~overall], ".", ms=4, color=colors[i], label="a cell" if i == 3 else None)
            style = {"ms": 7, "mfc": "white", "mec": BLACK}
            ax.plot(np.full(overall.sum(), i), off[overall], "D", **style, label="all stars" if i == 3 else None)
        ax.set_xticks(range(len(CANDIDATES)), CANDIDATES, rotation=40, ha="right", fontsize=7)
        ax.set_title(f"{level:.0%} intervals, {size:,} stars", fontsize=10)
    fig.supylabel("actual - promised coverage, points", fontsize=9)
    fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside upper center")
    fig.supxlabel("grey band: two Monte-Carlo standard errors", fontsize=9)
    return fig


def sections_of(config: CalibrateConfig, tables: dict[str, pd.DataFrame], truth: np.ndarray, population: Population) -> list[str]:
    """The paragraphs of report.md."""
    coverage, simultaneous = tables["coverage"].copy(), tables["simultaneous"].copy()
    for table, column in ((coverage, "coverage"), (simultaneous, "all_nine_inside")):
        table["shown"] = [f"{c:.1%} ± {e:.1%}" for c, e in zip(table[column], table["monte_carlo_error"], strict=True)]
    names = ["set_size", "comparison", "method", "level", "shown", "truth_below", "truth_above", "mean_width"]
    by_cell = coverage[coverage["stars"] != "all stars"]
    worst = by_cell.loc[by_cell.groupby(["set_size", "method", "level"], sort=False)["coverage"].idxmin()]
    percent = {"truth_below": ".1%", "truth_above": ".1%", "level": ".0%", "rms_error": ".2f", "worst_shortfall": ".1f"}
    hardest = by_cell.iloc[int((by_cell["coverage"] - by_cell["level"]).argmin())]
    width = by_cell.groupby(["set_size", "method", "level"], sort=False)["mean_width"].mean().rename("mean_width_by_cell")
    worst = worst.merge(width, on=["set_size", "method", "level"])
    rename = {"shown": "coverage"}
    drawn = ", ".join(f"{n:,} of {size:,} stars" for n, size in zip(config.n_sets, config.set_sizes, strict=True))
    truths = ", ".join(f"{name} {value[0]:+.4f}" for name, value in zip(PAIRS, truth, strict=True))
    return [
        f"Test sets ({drawn}) are drawn with replacement from each half of the covered stars of a simulated population, with "
        f"{config.bootstrap.n_resamples:,} resamples of each. The gates are frozen; the true Delta R2 against the classification "
        f"gate are those of the half: {truths} on the second. A method is chosen on the first half; all coverage below is that on "
        "the second, which had no part in the choice.",
        table_markdown(tables["ranking"], percent),
        "On the first half, in points, over levels, comparisons and cells: *rms error* of (actual - promised coverage), and the "
        "*worst shortfall*. The intervals of the least error are *chosen*, those of the least shortfall are the *safest*.",
        "## All stars",
        table_markdown(coverage[coverage["stars"] == "all stars"][names].rename(columns=rename), percent),
        "*truth below, above*: how often the truth lies below or above the interval.",
        "![Coverage](coverage.png)",
        "## The worst cell",
        table_markdown(
            worst[["set_size", "method", "level", "stars", "comparison", "shown", "mean_width_by_cell"]].rename(columns=rename),
            percent,
        ),
        rare_stars(population, hardest["stars"], hardest["comparison"], config.set_sizes),
        "## All nine cells at once (max-t)",
        table_markdown(simultaneous[["set_size", "comparison", "level", "shown", "mean_width"]].rename(columns=rename), percent),
    ]


def compute(config: CalibrateConfig, stages: Stages) -> Results:
    """Measures the coverage."""
    cache = config.output.cache
    prepared = prepare(config.data, stages, cache)
    settings = {"data": dataclasses.asdict(config.data), "gate": dataclasses.asdict(config.gate), "hidden": config.mlp.hidden}
    settings |= {"n": config.n_population}
    simulate = functools.partial(simulate_population, config, prepared, stages)
    population, _ = cache.load_or_compute("population", settings, [__file__], Population, simulate)
    tables = []
    for half, size, n_sets in ((h, *pair) for h in (0, 1) for pair in zip(config.set_sizes, config.n_sets, strict=True)):
        part = population.half(half)
        truth, (y, cell, gains) = truth_of(part), map(jnp.asarray, part)
        keys = jax.random.split(jax.random.fold_in(draw_keys(config.data.seed).bootstrap, half), n_sets)
        for name, gain, true in zip(PAIRS, gains, truth, strict=True):
            ends = []
            for i in stages.each(f"{HALVES[half]}, {size:,} stars: {name}", range(0, n_sets, _SETS)):
                intervals = intervals_of_sets(keys[i : i + _SETS], y, gain, cell, size, config.bootstrap.n_resamples)
                ends.append(np.asarray(intervals, np.float64))
            columns = {"half": HALVES[half], "set_size": size, "comparison": name}
            tables.append(coverage_tables(np.concatenate(ends), true, **columns))
    coverage, simultaneous = (pd.concat(parts, ignore_index=True) for parts in zip(*tables, strict=True))
    confirmed = {"coverage": coverage, "simultaneous": simultaneous}
    results = {name: table[table["half"] == HALVES[1]].drop(columns="half") for name, table in confirmed.items()}
    results["ranking"] = rank_methods(coverage, HALVES[0])
    return Results(
        "Do the intervals hold what they promise?",
        sections_of(config, results, truth, population.half(1)),
        results,
        {"coverage": draw_figure(results["coverage"])},
        {"truth": truth, "n_covered_population": len(population.y)},
    )


main = Study("calibrate_bootstrap", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
