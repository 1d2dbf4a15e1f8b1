"""Results of an experiment that compares variants with one baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import pandas as pd

from experiments.pipeline.config import StudyConfig, draw_keys
from experiments.report.figures import interval_plot
from experiments.report.markdown import interval, table_markdown
from experiments.report.results import output_folder, write_results
from experiments.runner.provenance import command_of, describe_run
from experiments.runner.stages import Stages, console
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.variants import compare_variants

#: Columns that say in words of one kind what the name of a variant says; report.md leaves them out.
_KEYS = ["protocol", "stars", "form", "optimiser", "start", "inputs", "changed", "value"]
_FORMATS = {"gradient_norm": ".1e", "loss": ".5f", "validation_loss": ".5f", "best_epoch": ".0f", "converged": ".0%"}


def compare_by(config: StudyConfig, y: AnyArray, variants: Mapping[str, AnyArray], baseline: AnyArray) -> pd.DataFrame:
    """``compare_variants`` with the resamples, level and method of a configuration."""
    return compare_variants(
        draw_keys(config.seed).bootstrap,
        y,
        variants,
        baseline,
        n_resamples=config.n_resamples,
        confidence_level=config.confidence_level,
        method=config.interval_method,
    )


def write_variants(
    experiment: str,
    title: str,
    config: StudyConfig,
    presets: Mapping[str, Any],
    stages: Stages,
    table: pd.DataFrame,
    *,
    setup: str,
    against: str,
    groups: Sequence[str] | None = None,
    sections: Sequence[str] = (),
    tables: Mapping[str, pd.DataFrame] | None = None,
    found: Mapping[str, Any] | None = None,
) -> None:
    """Writes the results of an experiment that compares variants with one baseline: table, figure, report.md, run.json.

    Args:
        experiment: name of its module.
        title: of the report.
        config: of the run.
        presets: of the experiment.
        stages: timed.
        table: of ``moe_jax.evaluate.variants.compare_variants``, with any further columns.
        setup: what was compared on what, in the report.
        against: name of the baseline.
        groups: kind of each variant, for colours.
        sections: Markdown after the table.
        tables: further tables to write.
        found: further fields of run.json.
    """
    command = command_of(experiment, config, presets)
    label = f"$\\Delta R^2$ against {against}, {100 * config.confidence_level:g} % intervals"
    figure = interval_plot(list(table["variant"]), table, label, groups=groups)
    shown = table.drop(columns=["standard_error", "low", "high", *table.columns.intersection(_KEYS)]).rename(
        columns={"delta_r2": f"delta R2 against {against}"}
    )
    shown[f"delta R2 against {against}"] = [interval(row["delta_r2"], row["low"], row["high"]) for row in table.to_dict("records")]
    intervals = (
        f"Intervals: {100 * config.confidence_level:g} %, {config.interval_method} bootstrap over the test stars "
        f"({config.n_resamples:,} resamples) of the mean over seeds; they speak of other test stars only."
    )
    text = [f"# {title}", f"Made by `{command}`.", setup, table_markdown(shown, _FORMATS), intervals]
    report = "\n\n".join([*text, "![Differences of R2](delta_r2.png)", *sections]) + "\n"
    run = describe_run(command, config, stages.seconds, **(found or {}))
    for row in table.to_dict("records"):
        difference = interval(row["delta_r2"], row["low"], row["high"])
        console.print(f"{row['variant']:<56} R2 {row['r2']:.4f}  {difference}", highlight=False)
    write_results(output_folder(config, experiment), {"variants": table, **(tables or {})}, {"delta_r2": figure}, report, run)
