"""The report of an experiment in Markdown, and the published figures that stand beside ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from experiments.pipeline.methods import CLASSIFY, PROTOCOLS, REGRESSION_GATES, Method, Pair
from experiments.report.tables import verdict
from moe_jax.evaluate.bootstrap import Bootstrap
from moe_jax.experts.cells import CELL_NAMES
from moe_jax.gates.optimize import GateFit

PUBLISHED_FILE = Path(__file__).with_name("published.json")


def load_published() -> dict[str, Any]:
    """The figures of the published report: never a target, always a column beside ours."""
    published: dict[str, Any] = json.loads(PUBLISHED_FILE.read_text())
    return published


def markdown_table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _number(value: float | None, form: str = ".4f") -> str:
    return "" if value is None or value != value else format(value, form)


def overall_markdown(overall: pd.DataFrame, published: Mapping[str, Any]) -> str:
    """Our figures with the report's R2, MAE and RMSE beside them."""
    rows = []
    for row in overall.to_dict("records"):
        # The report trained its gates in-sample; the other protocol has no published counterpart.
        report = {} if row["protocol"] == PROTOCOLS[1] else published["overall"].get(row["method"], {})
        ours = [_number(row[column]) for column in ("r2", "mae", "rmse", "rho")]
        rows.append([row["method"], row["protocol"], *ours, *(_number(report.get(column)) for column in ("r2", "mae", "rmse"))])
    return markdown_table(["method", "protocol", "R2", "MAE", "RMSE", "rho", "report R2", "report MAE", "report RMSE"], rows)


def verdict_markdown(comparisons: Mapping[Pair, Bootstrap], overall: pd.DataFrame, published: Mapping[str, Any]) -> str:
    """Delta R2 of each regression gate with its interval and the verdict, the report's beside it."""
    r2 = {Method(row["method"], row["protocol"]): row["r2"] for row in overall.to_dict("records")}
    rows = []
    for method in REGRESSION_GATES:
        bootstrap = comparisons[Pair(method, CLASSIFY)]
        low, high = float(bootstrap.low), float(bootstrap.high)
        report = published["bootstrap"][method.name] if method.protocol == PROTOCOLS[0] else None
        rows.append(
            [
                method.name,
                method.protocol,
                f"{float(bootstrap.estimate):+.4f} [{low:+.4f}, {high:+.4f}]",
                verdict(r2[method], r2[CLASSIFY], low),
                f"{report['mean']:+.4f} [{report['low']:+.4f}, {report['high']:+.4f}]" if report else "",
            ]
        )
    return markdown_table(["gate", "protocol", "Delta R2 [interval]", "verdict", "report"], rows)


def bins_markdown(bins: pd.DataFrame, published: Mapping[str, Any]) -> str:
    """R2 and Delta R2 by cell, the report's R2 (classify, MLP) beside them."""
    rows = []
    for row in bins.to_dict("records"):
        cells = [str(row["bin"]), row["name"], str(row["n_test"]) + ("" if row["defined"] else " (no R2)")]
        cells.append(_number(row["r2_classify"]))
        for method in (Method("regress_mlp", protocol) for protocol in PROTOCOLS):
            column = f"delta_r2_{method.column}"
            cells.append(f"{row[column]:+.4f} [{row[column + '_low']:+.4f}, {row[column + '_high']:+.4f}]")
        report = published["per_bin"]
        cells.append(f"{report['classify'][row['bin']]:.4f} -> {report['regress_mlp'][row['bin']]:.4f}")
        rows.append(cells)
    header = ["cell", "name", "test stars", "classify R2", *(f"MLP Delta R2, {protocol}" for protocol in PROTOCOLS)]
    return markdown_table([*header, "report: classify -> MLP"], rows)


def warnings(fits: Mapping[Method, GateFit], at_edge: list[str], n_undefined: int) -> list[str]:
    """What a reader must know before believing the tables: gates at the epoch cap, choices at the edge of a grid.

    Args:
        fits: the regression gates.
        at_edge: names of the hyper-parameters whose chosen value lies at an edge of its grid.
        n_undefined: resamples of single cells without an R2.
    """
    found = []
    capped = [
        f"{method.title} (best epoch {int(fit.best_epoch) + 1} of {len(fit.train_loss)})"
        for method, fit in fits.items()
        if not bool(fit.stopped_early)
    ]
    if capped:
        found.append(
            f"Stopped at the epoch cap: {', '.join(capped)}. A gate that has not converged is no evidence against its form."
        )
    if at_edge:
        found.append(f"{', '.join(at_edge)}: the chosen value lies at an edge of its grid; the best may lie outside.")
    if n_undefined:
        found.append(f"{n_undefined} resamples of single cells had no R2 (a constant log g); the intervals are of the others.")
    return found


def report_sections(
    *,
    setup: str,
    overall: pd.DataFrame,
    bins: pd.DataFrame,
    comparisons: Mapping[Pair, Bootstrap],
    bootstrap: pd.DataFrame,
    fits: Mapping[Method, GateFit],
    notes: list[str],
    weights: Mapping[Method, Any],
    in_sample_fraction: float,
) -> list[str]:
    """The paragraphs of the report; every figure that they name lies beside it."""
    published = load_published()
    epochs = markdown_table(
        ["gate", "protocol", "best epoch", "epochs run", "validation loss", "report: best epoch, loss"],
        [
            [
                method.name,
                method.protocol,
                str(int(fit.best_epoch) + 1),
                str(int((fit.train_loss == fit.train_loss).sum())),
                _number(float(fit.validation_loss[int(fit.best_epoch)]), ".6f"),
                f"{published['best_epoch'][method.name]}, {published['validation_loss'][method.name]:.6f}"
                if method.protocol == PROTOCOLS[0]
                else "",
            ]
            for method, fit in fits.items()
        ],
    )
    pairs = markdown_table(
        ["comparison", "estimate", "mean", "interval", "fraction above 0"],
        [
            [
                row["comparison"],
                _number(row["estimate"], "+.4f"),
                _number(row["mean"], "+.4f"),
                f"[{row['low']:+.4f}, {row['high']:+.4f}]",
                _number(row["fraction_above_0"], ".3f"),
            ]
            for row in bootstrap.to_dict("records")
        ],
    )
    mean_weights = markdown_table(
        ["cell", *(method.title for method in weights)],
        [[CELL_NAMES[k], *(f"{float(weight[:, k].mean()):.3f}" for weight in weights.values())] for k in range(len(CELL_NAMES))],
    )
    sections = [
        setup,
        "\n".join(f"> **Warning.** {note}\n>" for note in notes).rstrip("\n>") if notes else "",
        "## Every method on the same covered test stars",
        overall_markdown(overall, published),
        "rho = (R2 - R2 global) / (R2 oracle - R2 global). The report's columns come from other spectra (the same set-up): they "
        "are shown for comparison, never tuned to; its global R2 is on 1000 stars, the rest on 816.",
        "![R2 of every method](r2_comparison.png)",
        "## Regression gates against the classification gate",
        verdict_markdown(comparisons, overall, published),
        "passed: R2 above the classification gate's by more than 0.003; partial: by less; significant: the interval's lower end is "
        f"above 0. in-sample: trained on {100 * in_sample_fraction:g} % of the covered training stars with the predictions of "
        "experts that had seen them "
        "(the report's protocol); cross-fitted: on all of them, with out-of-fold predictions.",
        "![Bootstrap distributions](bootstrap.png)",
        pairs,
        "## By cell",
        bins_markdown(bins, published),
        "![Delta R2 by cell](per_bin_delta.png)",
        "## Gates",
        epochs,
        "![Loss curves](loss_curves.png)",
        mean_weights,
        "![Mean weights](mean_weights.png)",
        "![Predicted against true log g](predicted_against_true.png)",
    ]
    return list(filter(None, sections))


def table_markdown(table: pd.DataFrame, formats: Mapping[str, str] | None = None) -> str:
    """A table in Markdown; floats with four decimals where ``formats`` has nothing else for their column."""
    formats = formats or {}

    def show(column: str, value: Any) -> str:
        if isinstance(value, float | np.floating):
            return "" if value != value else format(float(value), formats.get(column, ".4f"))
        return str(value)

    rows = [[show(str(column), value) for column, value in row.items()] for row in table.to_dict("records")]
    return markdown_table([str(column).replace("_", " ") for column in table.columns], rows)


def interval(estimate: float, low: float, high: float, form: str = "+.4f") -> str:
    """An estimate with its interval, as it stands in reports."""
    return f"{float(estimate):{form}} [{float(low):{form}}, {float(high):{form}}]"
