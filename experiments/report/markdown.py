"""The report of an experiment in Markdown, and the published figures that stand beside ours."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, SupportsFloat

import numpy as np
import pandas as pd

from experiments.pipeline.methods import CLASSIFY, CROSS_FITTED, GLOBAL, IN_SAMPLE, PROTOCOLS, REGRESSION_GATES, Method, Pair
from experiments.report.tables import Outcome, published_verdict, verdict
from moe_jax.evaluate.bootstrap import Bootstrap
from moe_jax.experts.cells import CELL_NAMES
from moe_jax.gates.optimize import GateFit

PUBLISHED_FILE = Path(__file__).with_name("published.json")


def load_published() -> dict[str, Any]:
    """The figures of the published report. They stand beside ours, and nothing is tuned to them."""
    published: dict[str, Any] = json.loads(PUBLISHED_FILE.read_text())
    return published


def table_markdown(table: pd.DataFrame, formats: Mapping[str, str] | None = None) -> str:
    """A table in Markdown. Floats have four decimals, unless ``formats`` names another format for their column."""
    formats = formats or {}

    def show(column: str, value: Any) -> str:
        if isinstance(value, float | np.floating):
            return "" if value != value else format(float(value), formats.get(column, ".4f"))
        return str(value)

    header = [str(column).replace("_", " ") for column in table.columns]
    rows = [[show(str(column), value) for column, value in row.items()] for row in table.to_dict("records")]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in [header, ["---"] * len(header), *rows])


def interval(estimate: SupportsFloat, low: SupportsFloat, high: SupportsFloat, form: str = "+.4f") -> str:
    """An estimate with its interval, as it stands in reports."""
    return f"{float(estimate):{form}} [{float(low):{form}}, {float(high):{form}}]"


def intervals(table: pd.DataFrame, estimate: str = "delta_r2", low: str = "low", high: str = "high") -> list[str]:
    """The estimates of a table's rows with their intervals, from three of its columns."""
    return [interval(*row) for row in zip(table[estimate], table[low], table[high], strict=True)]


def overall_markdown(overall: pd.DataFrame, published: Mapping[str, Any]) -> str:
    """R2, MAE, RMSE and rho of each method, with the report's figures beside them."""
    rows = []
    for row in overall.to_dict("records"):
        # The report trained its gates in-sample; cross-fitted gates have no published figures.
        report = {} if row["protocol"] == CROSS_FITTED else published["overall"].get(row["method"], {})
        ours = {"method": row["method"], "protocol": row["protocol"]} | {c: row[c.lower()] for c in ("R2", "MAE", "RMSE", "rho")}
        rows.append(ours | {f"report {c}": report.get(c.lower(), np.nan) for c in ("R2", "MAE", "RMSE")})
    return table_markdown(pd.DataFrame(rows))


def verdict_markdown(comparisons: Mapping[Pair, Bootstrap], overall: pd.DataFrame, published: Mapping[str, Any]) -> str:
    """Delta R2 of each regression gate with its interval and both verdicts, with the report's figures beside them."""
    r2 = {Method(row["method"], row["protocol"]): row["r2"] for row in overall.to_dict("records")}
    rows = []
    for method in REGRESSION_GATES:
        difference = comparisons[Pair(method, CLASSIFY)].overall
        low, high = float(difference.low), float(difference.high)
        report = published["bootstrap"][method.name]
        rows.append(
            {
                "gate": method.name,
                "protocol": method.protocol,
                "Delta R2 [interval]": interval(difference.estimate, low, high),
                "verdict": verdict(low, high),
                "by the report's rule": published_verdict(r2[method], r2[CLASSIFY]),
                "report": interval(report["mean"], report["low"], report["high"]) if method.protocol == IN_SAMPLE else "",
            }
        )
    return table_markdown(pd.DataFrame(rows))


def bins_markdown(bins: pd.DataFrame, published: Mapping[str, Any]) -> str:
    """R2 of the classification gate and Delta R2 of the MLP gate by cell, with the report's R2 of both beside them."""
    n_test = [f"{n}{'' if defined else ' (no R2)'}" for n, defined in zip(bins["n_test"], bins["defined"], strict=True)]
    shown = pd.DataFrame({"cell": bins["bin"], "name": bins["name"], "test stars": n_test, "classify R2": bins["r2_classify"]})
    for protocol in PROTOCOLS:
        column = f"delta_r2_{Method('regress_mlp', protocol).column}"
        shown[f"MLP Delta R2, {protocol}"] = intervals(bins, column, f"{column}_low", f"{column}_high")
    report = zip(published["per_bin"]["classify"], published["per_bin"]["regress_mlp"], strict=True)
    shown["report: classify -> MLP"] = [f"{classify:.4f} -> {mlp:.4f}" for classify, mlp in report]
    return table_markdown(shown)


def gates_markdown(fits: Mapping[Method, GateFit], published: Mapping[str, Any]) -> str:
    """How the training of each regression gate ended, with the report's figures beside it."""
    rows = []
    for method, fit in fits.items():
        best = int(fit.best_epoch)
        report = f"{published['best_epoch'][method.name]}, {published['validation_loss'][method.name]:.6f}"
        rows.append(
            {
                "gate": method.name,
                "protocol": method.protocol,
                "best epoch": best + 1,
                "epochs run": int(np.sum(~np.isnan(np.asarray(fit.train_loss)))),
                "validation loss": float(fit.validation_loss[best]),
                "report: best epoch, loss": report if method.protocol == IN_SAMPLE else "",
            }
        )
    return table_markdown(pd.DataFrame(rows), {"validation loss": ".6f"})


def pairs_markdown(bootstrap: pd.DataFrame) -> str:
    """Every comparison of ``bootstrap_table``."""
    ends = [f"[{low:+.4f}, {high:+.4f}]" for low, high in zip(bootstrap["low"], bootstrap["high"], strict=True)]
    shown = bootstrap.assign(interval=ends)[["comparison", "estimate", "mean", "interval", "fraction_above_0"]]
    return table_markdown(shown, {"estimate": "+.4f", "mean": "+.4f", "fraction_above_0": ".3f"})


def weights_markdown(weights: Mapping[Method, Any]) -> str:
    """Mean weight of each expert by each gate."""
    means = {method.title: np.asarray(weight).mean(axis=0) for method, weight in weights.items()}
    rows = [{"gate": title} | dict(zip(CELL_NAMES, mean, strict=True)) for title, mean in means.items()]
    return table_markdown(pd.DataFrame(rows), dict.fromkeys(CELL_NAMES, ".3f"))


def warnings(results: Outcome) -> list[str]:
    """What a reader must know before believing the tables: gates at the epoch cap, choices at the edge of a grid."""
    prepared = results.prepared
    notes: list[str] = []
    capped = [
        f"{method.title} (best epoch {int(fit.best_epoch) + 1} of {len(fit.train_loss)})"
        for method, fit in results.fits.items()
        if not bool(fit.stopped_early)
    ]
    if capped:
        notes.append(
            f"Stopped at the epoch cap: {', '.join(capped)}. A gate that has not converged is no evidence against its form."
        )
    at_edge = [f"alpha of cell {k}" for k in np.flatnonzero(prepared.experts.at_edge)]
    at_edge += ["alpha of the global ridge"] * bool(prepared.global_ridge.at_edge)
    at_edge += ["C of the classification gate"] * prepared.classifier.at_edge
    if at_edge:
        notes.append(f"{', '.join(at_edge)}: the chosen value lies at an edge of its grid; the best may lie outside.")
    n_undefined = sum(int(np.sum(np.asarray(bootstrap.groups.n_undefined))) for bootstrap in results.comparisons.values())
    if n_undefined:
        notes.append(f"{n_undefined} resamples of single cells had no R2 (a constant log g); the intervals are of the others.")
    if not prepared.classifier.converged:
        notes.append("The logistic regression of the classification gate did not converge.")
    return notes


def report_sections(setup: str, results: Outcome, in_sample_fraction: float) -> list[str]:
    """The paragraphs of the report; every figure that they name lies beside it."""
    published, notes = load_published(), warnings(results)
    rho = "rho = (R2 - R2 global) / (R2 oracle - R2 global)" if GLOBAL in results.predictions else "rho needs a global ridge"
    sections = [
        setup,
        "\n".join(f"> **Warning.** {note}\n>" for note in notes).rstrip("\n>"),
        "## Every method on the same covered test stars",
        overall_markdown(results.overall, published),
        f"{rho}. The report's columns come from other spectra (the same set-up). They "
        "are shown for comparison, and nothing is tuned to them. Its global R2 is on 1000 stars, the rest on 816.",
        "![R2 of every method](r2_comparison.png)",
        "## Regression gates against the classification gate",
        verdict_markdown(results.comparisons, results.overall, published),
        "verdict: better if the interval lies above 0, worse if it lies below 0, no difference shown if it holds 0. By the "
        "report's rule, whatever the interval: passed if R2 exceeds the classification gate's by more than 0.003, partial if by "
        f"less, failed if not at all. in-sample: trained on {100 * in_sample_fraction:g} % of the covered training stars, with the "
        "predictions of experts that had seen them (the report's protocol). cross-fitted: trained on all of them, with "
        "out-of-fold predictions.",
        "![Bootstrap distributions](bootstrap.png)",
        pairs_markdown(results.bootstrap),
        "## By cell",
        bins_markdown(results.bins, published),
        "![Delta R2 by cell](per_bin_delta.png)",
        "## Gates",
        gates_markdown(results.fits, published),
        "![Loss curves](loss_curves.png)",
        weights_markdown(results.weights),
        "![Mean weights](mean_weights.png)",
        "![Predicted against true log g](predicted_against_true.png)",
    ]
    return list(filter(None, sections))
