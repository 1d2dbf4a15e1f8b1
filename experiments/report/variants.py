"""Results of a study that compares variants with one baseline."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd

from experiments.pipeline.config import BootstrapOptions, ComparisonConfig, draw_keys
from experiments.report.figures import interval_plot
from experiments.report.markdown import intervals, table_markdown
from experiments.report.results import Results
from experiments.runner.stages import console
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.variance import mean_over_seeds
from moe_jax.evaluate.variants import compare_variants

#: Columns that say in words of one kind what the name of a variant says; report.md leaves them out.
_KEYS = ["protocol", "stars", "form", "optimiser", "start", "inputs", "changed", "value"]
_FORMATS = {"gradient_norm": ".1e", "loss": ".5f", "validation_loss": ".5f", "best_epoch": ".0f", "converged": ".0%"}


def compare_by(config: ComparisonConfig, y: AnyArray, variants: Mapping[str, AnyArray], baseline: AnyArray) -> pd.DataFrame:
    """``compare_variants`` with the resamples, level and method of a configuration."""
    return compare_variants(draw_keys(config.data.seed).bootstrap, y, variants, baseline, **config.bootstrap.arguments)


def seed_interval(config: ComparisonConfig, y: AnyArray, predictions: AnyArray, baseline: AnyArray) -> tuple[float, float, float]:
    """Mean difference of R2 from a baseline, both (S, N), and its interval over the S seeds and the test stars."""
    y64 = np.asarray(y, np.float64)
    by_seed = np.mean((y64 - baseline) ** 2 - (y64 - predictions) ** 2, axis=1) / y64.var()
    error = compare_by(config, y, {"": predictions}, baseline)["standard_error"].iloc[0]
    return mean_over_seeds(by_seed, float(error), config.bootstrap.confidence_level)


def variants_results(
    title: str,
    options: BootstrapOptions,
    table: pd.DataFrame,
    *,
    setup: str,
    against: str,
    drawn: str = "test stars",
    repeated: str = "seeds",
    groups: Sequence[str] | None = None,
    sections: Sequence[str] = (),
    tables: Mapping[str, pd.DataFrame] | None = None,
    fields: Mapping[str, Any] | None = None,
) -> Results:
    """Prints the differences of a table by ``compare_by``, and returns them as results with a table and a figure.

    ``setup`` says what was compared on what, ``drawn`` what the bootstrap draws, ``repeated`` over what the predictions of a
    variant are averaged. ``groups`` has the kind of each variant, for colours. The last three are added to the results.
    """
    percent = f"{100 * options.confidence_level:g} %"
    label = f"$\\Delta R^2$ against {against}, " + f"{percent} intervals".replace(" ", "\N{NO-BREAK SPACE}")
    differences = intervals(table)
    for name, r2, difference in zip(table["variant"], table["r2"], differences, strict=True):
        console.print(f"{name:<56} R2 {r2:.4f}  {difference}")
    shown = table.drop(columns=["standard_error", "low", "high", *table.columns.intersection(_KEYS)]).assign(delta_r2=differences)
    names = {"delta_r2": f"delta R2 against {against}", "n_seeds": f"n_{repeated}"}
    text = [
        setup,
        table_markdown(shown.rename(columns=names), _FORMATS),
        f"Intervals: {percent}, {options.interval_method} bootstrap over the {drawn} ({options.n_resamples:,} resamples) of the "
        f"mean over {repeated}. They cover the sampling of {drawn}, not new training data, noise or seeds.",
        "![Differences of R2](delta_r2.png)",
        *sections,
    ]
    figure = interval_plot(list(table["variant"]), table, label, groups=groups)
    return Results(title, text, {"variants": table, **(tables or {})}, {"delta_r2": figure}, fields or {})
