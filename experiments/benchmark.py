"""How fast is it, against what a user would write otherwise and against what the machine allows?

    python -m experiments.benchmark                  all rows; about 15 minutes on 2 cores
    python -m experiments.benchmark --quick          the short rows, under two minutes, compared with the committed ones
    python -m experiments.benchmark --start          imports, help, compilation, a short prediction, beside an older commit; 12 min

Each row is timed side by side with its peer, in turns and in one run: the ratio is the median over the pairs, the first call
of ours (which compiles) is apart. The floor is what the row's dense linear algebra takes by itself, in the same pair. Results
go to results/benchmark/PRESET, of ``--start`` to results/first_minute. Peers in PyTorch and arch need the extra ``benchmark``.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.pipeline.config import OutputOptions
from experiments.report.figures import BLACK, BLUE, GREY, Figure, new_figure
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import run_command
from experiments.runner.stages import Stages, console
from experiments.timing.rows import GROUPS, BenchmarkConfig
from experiments.timing.start import time_start
from moe_jax.core.arrays import InputError

MUST_STAND = 0.7  # of a committed ratio; what is below fell by more than the noise of these machines

PRESETS = {
    "default": BenchmarkConfig(),
    "quick": BenchmarkConfig(preset="quick", rows=("experts", "gates", "bootstrap"), n_train=9_600, n_gates=16, n_pairs=2),
}


def draw_figure(table: pd.DataFrame) -> Figure:
    """The ratios, with the targets."""
    fig, ax = new_figure(1, 1, figsize=(8.5, 0.48 * len(table) + 1.2))
    place = np.arange(len(table))[::-1]
    ax.barh(place, table["ratio"], color=BLUE, height=0.55, label="median of the pairs")
    ax.hlines(place, table["ratio_low"], table["ratio_high"], color=GREY, lw=3, label="range of the pairs")
    ax.scatter(table["target"].astype(float), place, marker="|", s=220, color=BLACK, lw=1.8, label="target", zorder=3)
    ax.set_yticks(place, [f"{row['row']}\nagainst {row['peer']}" for row in table.to_dict("records")], fontsize=7)
    ax.set_xscale("log")
    ax.axvline(1.0, color=BLACK, lw=0.8)
    ax.set_xlabel("times faster than the peer")
    fig.legend(loc="outside upper center", ncols=3, fontsize=8)
    return fig


def fallen(table: pd.DataFrame, committed: Path) -> list[str]:
    """A line for each row that an earlier run has too: whether its ratio stands or fell."""
    if not committed.is_file():
        return [f"{committed} is not there: nothing to compare with"]
    both = table.merge(pd.read_csv(committed)[["row", "peer", "ratio"]], on=["row", "peer"], suffixes=("", "_before"))
    return [
        f"{'fell' if row['ratio'] < MUST_STAND * row['ratio_before'] else 'stands'}: {row['row']} against {row['peer']}: "
        f"{row['ratio']:.1f}x, was {row['ratio_before']:.1f}x"
        for row in both.to_dict("records")
    ]


def sections_of(table: pd.DataFrame) -> list[str]:
    """The paragraphs of report.md."""
    shown = table[
        ["row", "ours_s", "compile_s", "peer", "peer_s", "ratio", "ratio_low", "ratio_high", "pairs", "target", "over_floor"]
    ]
    formats = dict.fromkeys(("ours_s", "peer_s"), ".4g") | dict.fromkeys(("ratio", "ratio_low", "ratio_high", "target"), ".3g")
    formats |= {"compile_s": ".2f", "over_floor": ".2f"}
    notes = [f"- {row['row']} ({row['peer']}): {row['note']}." for row in table.to_dict("records") if row["note"]]
    return [
        "Seconds are medians; the ratio is the median over pairs that were timed in turns in one run, with its range. compile_s is "
        "what the first call took longer; over_floor compares with the row's dense linear algebra alone: for the experts one "
        "float32 syrk and per alpha one potrf and one potri by SciPy's LAPACK; for the gates their multiplications at "
        "the rate of a large matrix product.",
        table_markdown(shown, formats),
        "![Ratios](ratios.png)",
        *(["\n".join(notes)] if notes else []),
    ]


def compute(config: BenchmarkConfig, stages: Stages) -> Results:
    """Times all rows."""
    records = []
    for name in config.rows:
        with stages(name):
            for row in GROUPS[name](config):
                record = row.record()
                records.append(record)
                times = f"{record['ours_s']:.4g} s; {row.peer}: {record['peer_s']:.4g} s; {record['ratio']:.1f}x"
                console.print(f"  {row.name}: {times}")
    if not records:
        raise InputError("no row could be timed, expected the packages of the extra 'benchmark'")
    table = pd.DataFrame(records)
    if config.preset == "quick":
        for line in fallen(table, Path("results/benchmark/quick/benchmark.csv")):
            console.print(line)
    return Results("Benchmark", sections_of(table), {"benchmark": table}, {"ratios": draw_figure(table)})


def compute_start(config: BenchmarkConfig, stages: Stages) -> Results:
    """Times the start of everything."""
    table = time_start(config.before, config.n_pairs, stages)
    formats = {"before": ".3g", "now": ".3g", "before / now": ".2f", "now / import jax": ".2f"}
    console.print(table.to_string(index=False, float_format="%.3g"))
    setup = (
        f"Whole processes, of commit {config.before} and of this one in turns on one machine; medians of {config.n_pairs} runs, "
        "of the default run one each. First start: no compiled programs and no cached stages; second: with compiled programs."
    )
    return Results("The first minute", [setup, table_markdown(table, formats)], {"start": table})


def main(config: BenchmarkConfig) -> Results:
    """Times all rows and writes the results; of the quick ones only where a folder is given."""
    if config.quick:
        if dataclasses.replace(config, quick=False, output=OutputOptions()) != PRESETS["default"]:
            raise InputError("--quick was given with options that it sets itself, expected --preset quick with these")
        config = dataclasses.replace(PRESETS["quick"], output=config.output)
    if config.start:
        return Study("benchmark", PRESETS, compute_start, lambda _: Path("results/first_minute"))(config)
    if config.preset == "quick" and config.output.output_dir is None:
        return compute(config, Stages())
    return Study("benchmark", PRESETS, compute)(config)


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
