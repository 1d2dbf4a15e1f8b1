"""The figures of an experiment, each a function from tables or arrays to a Matplotlib figure. Okabe & Ito's colours."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from jaxtyping import Float
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from experiments.pipeline.methods import CLASSIFY, PROTOCOLS, Method, Pair
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.bootstrap import Bootstrap
from moe_jax.experts.cells import CELL_NAMES, M_H_NAMES, N_CELLS
from moe_jax.gates.optimize import GateFit

BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#999999", "#000000"
_KIND_COLORS = (BLUE, ORANGE, GREEN, BLACK, "#CC79A7")
_KIND_MARKERS = ("o", "s", "D", "^", "v")
COLORS = {"classify": BLACK, "regress_mlp": BLUE, "regress_linear": ORANGE}
MARKERS = {"in-sample": "o", "cross-fitted": "s", "": "D"}
TITLES = {
    "global": "one global ridge",
    "oracle": "oracle: true cell's expert",
    "classify": "classification gate",
    "hard": "classification gate, hard",
    "fallback": "classification gate, fallback",
    "regress_mlp": "regression gate, MLP",
    "regress_linear": "regression gate, linear",
}
_LABEL_BOX = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}
_METAL_POOR = [k for k in range(N_CELLS) if k % len(M_H_NAMES) == 0]
_CELL_LABELS = [name.replace(" ", "\n", 1) for name in CELL_NAMES]
#: Style file of all figures: ``plt.style.use(STYLE)`` gives it to your own.
STYLE = Path(__file__).with_name("figures.mplstyle")


def new_figure(*shape: int, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure and its axes in the style of the package; arguments as those of ``matplotlib.pyplot.subplots``."""
    with plt.style.context(STYLE):
        return plt.subplots(*shape, layout="constrained", **kwargs)


def _title(method: Method) -> str:
    return TITLES[method.name] + (f", {method.protocol}" if method.protocol else "")


def _errors(estimate: np.ndarray, low: np.ndarray, high: np.ndarray) -> np.ndarray:
    """Lengths of error bars; an interval need not contain the estimate, so neither is below 0."""
    return np.maximum(np.stack([estimate - low, high - estimate]), 0.0)


def save_figure(figure: Figure, path: Path | str) -> None:
    """Writes a figure as PNG, and beside it as PDF (vectors, for papers), and closes it."""
    with plt.style.context(STYLE):
        figure.savefig(path)
        figure.set_layout_engine("none")  # what it has found holds for the second file too
        figure.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)


def r2_comparison(overall: pd.DataFrame, published: Mapping[str, Any]) -> Figure:
    """R2 of every method, with the report's beside it."""
    fig, ax = new_figure(figsize=(7.0, 4.0))
    table = overall.iloc[::-1].reset_index(drop=True)
    for i, row in table.iterrows():
        color = COLORS.get(row["method"], GREY)
        ax.plot(row["r2"], i, MARKERS[row["protocol"]], color=color, ms=7, zorder=3)
        ax.annotate(
            f"{row['r2']:.4f}", (row["r2"], i), (0, 8), textcoords="offset points", ha="center", fontsize=8, bbox=_LABEL_BOX
        )
        report = published["overall"].get(row["method"])
        if report and row["protocol"] != "cross-fitted":
            ax.plot(report["r2"], i, MARKERS[row["protocol"]], mfc="white", mec=color, ms=7)
    baseline = float(table.loc[table["method"] == "classify", "r2"].iloc[0])
    ax.axvline(baseline, color=BLACK, lw=0.8, ls=":")
    ax.plot([], [], "o", color=GREY, label="this run")
    ax.plot([], [], "o", mfc="white", mec=GREY, label="the report (other spectra)")
    ax.set_yticks(range(len(table)), [_title(Method(m, p)) for m, p in zip(table["method"], table["protocol"], strict=True)])
    ax.set_ylim(-0.6, len(table) - 0.3)
    ax.margins(x=0.08)
    ax.set_xlabel("$R^2$ of log g, covered test stars\n(dotted: classification gate)")
    ax.legend(loc="lower left", fontsize=8)
    return fig


def interval_plot(
    names: Sequence[str],
    estimate: Float[AnyArray, " V"],
    low: Float[AnyArray, " V"],
    high: Float[AnyArray, " V"],
    xlabel: str,
    *,
    reference: float = 0.0,
    groups: Sequence[str] | None = None,
) -> Figure:
    """Estimates with intervals, one line each from top to bottom; names of one group share colour and marker."""
    groups = [""] * len(names) if groups is None else groups
    kinds = list(dict.fromkeys(groups))
    fig, ax = new_figure(figsize=(8.0, 1.4 + 0.27 * len(names)))
    estimate, low, high = (np.asarray(array, float) for array in (estimate, low, high))
    for kind, color, marker in zip(kinds, _KIND_COLORS * 3, _KIND_MARKERS * 3, strict=False):
        rows = np.array([i for i, group in enumerate(groups) if group == kind])
        bars = _errors(estimate[rows], low[rows], high[rows])
        ax.errorbar(estimate[rows], rows, xerr=bars, fmt=marker, color=color, capsize=3, ms=5, label=kind or None)
    ax.axvline(reference, color=BLACK, lw=0.8, ls="--")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set_ylim(len(names) - 0.4, -0.6)
    ax.set_xlabel(xlabel)
    if len(kinds) > 1:
        fig.legend(fontsize=8, ncols=min(len(kinds), 4), loc="outside upper center")
    return fig


def per_bin_delta(comparisons: Mapping[Pair, Bootstrap], confidence_level: float) -> Figure:
    """Delta R2 of the regression gates against the classification gate in each cell, with intervals."""
    fig, axes = new_figure(2, 1, figsize=(8.0, 6.0), sharex=True)
    for ax, protocol in zip(axes, PROTOCOLS, strict=True):
        for k in _METAL_POOR:
            ax.axvspan(k - 0.5, k + 0.5, color="#EEEEEE", zorder=0, label="metal-poor cells" if k == 0 else None)
        for name, offset in (("regress_mlp", -0.12), ("regress_linear", 0.12)):
            bootstrap = comparisons[Pair(Method(name, protocol), CLASSIFY)]
            estimate = np.asarray(bootstrap.group_estimate)
            bars = _errors(estimate, np.asarray(bootstrap.group_low), np.asarray(bootstrap.group_high))
            x = np.arange(N_CELLS) + offset
            marker = "o" if name == "regress_mlp" else "s"
            ax.errorbar(x, estimate, bars, fmt=marker, color=COLORS[name], capsize=3, label=TITLES[name])
        ax.axhline(0.0, color=BLACK, lw=0.8)
        ax.set_ylabel(r"$\Delta R^2$")
        ax.set_title(f"gates trained {protocol}", loc="left")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=3)
    axes[1].set_xticks(range(N_CELLS), _CELL_LABELS, fontsize=8)
    axes[1].set_xlim(-0.5, N_CELLS - 0.5)
    fig.supxlabel(f"cell (bars: {100 * confidence_level:g} % bootstrap intervals, each cell by itself)", fontsize=9)
    return fig


def mean_weights(weights: Mapping[Method, Float[AnyArray, "N K"]], published: Mapping[str, Any]) -> Figure:
    """Mean weight of each expert by the three gates side by side; the report's beside them."""
    fig, ax = new_figure(figsize=(8.0, 3.8))
    for (method, weight), offset in zip(weights.items(), (-0.27, 0.0, 0.27), strict=True):
        x = np.arange(N_CELLS) + offset
        ax.bar(x, np.asarray(weight).mean(axis=0), width=0.25, color=COLORS[method.name], label=_title(method))
        ax.plot(x, published["mean_weights"][method.name], "D", mfc="white", mec=BLACK, ms=4, zorder=3)
    ax.plot([], [], "D", mfc="white", mec=BLACK, ms=4, ls="none", label="the report (other spectra)")
    ax.set_xticks(range(N_CELLS), _CELL_LABELS, fontsize=8)
    ax.set_ylabel("mean weight, covered test stars")
    ax.set_ylim(top=ax.get_ylim()[1] * 1.25)
    ax.legend(fontsize=8, ncols=2, loc="upper left")
    return fig


def bootstrap_histograms(comparisons: Mapping[Pair, Bootstrap], confidence_level: float) -> Figure:
    """Bootstrap distributions of Delta R2 against the classification gate, with intervals and a line at zero."""
    fig, axes = new_figure(2, 2, figsize=(8.0, 5.2), sharex="col")
    for row, protocol in zip(axes, PROTOCOLS, strict=True):
        for ax, name in zip(row, ("regress_mlp", "regress_linear"), strict=True):
            bootstrap = comparisons[Pair(Method(name, protocol), CLASSIFY)]
            samples = np.asarray(bootstrap.samples)
            low, high = float(bootstrap.low), float(bootstrap.high)
            ax.hist(samples[~np.isnan(samples)], bins=40, color=COLORS[name], alpha=0.75)
            ax.axvspan(low, high, color=GREY, alpha=0.25, zorder=0)
            ax.axvline(0.0, color=BLACK, lw=1.2, ls="--")
            ax.axvline(float(bootstrap.estimate), color=BLACK, lw=1.2)
            interval = f"{float(bootstrap.estimate):+.4f} [{low:+.4f}, {high:+.4f}]"
            ax.set_title(f"{_title(Method(name, protocol))}\n{interval}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel(r"$\Delta R^2$ against the classification gate")
    for ax in axes[:, 0]:
        ax.set_ylabel("resamples")
    fig.supxlabel(f"solid: estimate; dashed: zero; shaded: {100 * confidence_level:g} % interval", fontsize=9)
    return fig


def loss_curves(fits: Mapping[Method, GateFit]) -> Figure:
    """Training and validation loss of the regression gates by epoch, and the epoch whose params were kept."""
    fig, axes = new_figure(1, 2, figsize=(8.5, 3.6), sharey=True)
    for ax, protocol in zip(axes, PROTOCOLS, strict=True):
        for name in ("regress_mlp", "regress_linear"):
            fit = fits[Method(name, protocol)]
            best = int(fit.best_epoch)
            epochs = np.arange(1, len(fit.train_loss) + 1)
            ax.plot(epochs, fit.train_loss, color=COLORS[name], ls=":", lw=1.4, label=f"{TITLES[name]}: training")
            ax.plot(epochs, fit.validation_loss, color=COLORS[name], lw=1.4, label=f"{TITLES[name]}: validation")
            ax.plot(best + 1, fit.validation_loss[best], "o" if name == "regress_mlp" else "s", color=COLORS[name])
        ax.set_title(f"gates trained {protocol}", loc="left")
        ax.set_xlabel("epoch (marker: best)")
        ax.set_yscale("log")
        _plain_log_ticks(ax)
    axes[0].set_ylabel("mean squared error of the mixture")
    axes[0].legend(fontsize=8)
    return fig


def _plain_log_ticks(ax: Axes) -> None:
    ax.yaxis.set_major_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.yaxis.set_minor_formatter(matplotlib.ticker.FormatStrFormatter("%g"))
    ax.tick_params(axis="y", which="minor", labelsize=7)


def predicted_against_true(y: Float[AnyArray, " N"], predictions: Mapping[Method, Float[AnyArray, " N"]]) -> Figure:
    """Predicted against true log g, one panel for each method."""
    fig, axes = new_figure(1, len(predictions), figsize=(3.0 * len(predictions), 3.8), sharex=True, sharey=True, squeeze=False)
    y = np.asarray(y)
    limits = (y.min() - 0.5, y.max() + 0.5)
    for ax, (method, prediction) in zip(axes[0], predictions.items(), strict=True):
        ax.plot(y, np.asarray(prediction), ".", ms=3, alpha=0.4, color=COLORS.get(method.name, GREY), rasterized=True)
        ax.plot(limits, limits, color=BLACK, lw=0.8)
        ax.set_title(_title(method).replace("gate, ", "gate,\n"), fontsize=9)
        ax.set_xlabel("true log g")
        ax.set_xlim(limits)
        ax.set_ylim(limits)
    axes[0, 0].set_ylabel("predicted log g")
    return fig


def coverage_plot(coverage: pd.DataFrame) -> Figure:
    """Actual coverage of intervals by level: of all stars, by cell and by magnitude, with its own 95 % interval."""
    levels = sorted(coverage["level"].unique())
    groups = list(dict.fromkeys(zip(coverage["by"], coverage["group"], strict=True)))
    colors = {"all": BLACK, "cell": BLUE, "mag": ORANGE}
    markers = {"all": "D", "cell": "o", "mag": "s"}
    fig, axes = new_figure(1, len(levels), figsize=(9.5, 0.28 * len(groups) + 1.4), sharey=True, squeeze=False)
    for ax, level in zip(axes[0], levels, strict=True):
        own = coverage[coverage["level"] == level]
        for i, (by, group) in enumerate(reversed(groups)):
            row = own[(own["by"] == by) & (own["group"] == group)].iloc[0]
            ax.plot([row["low"], row["high"]], [i, i], color=colors[by], lw=1.4)
            ax.plot(row["coverage"], i, markers[by], color=colors[by], ms=5)
        ax.axvline(level, color=GREY, lw=1.0, ls="--")
        ax.set_xlabel("actual coverage")
        ax.set_title(f"{level:.0%} promised", loc="left")
    names = {"all": "all stars", "cell": "{}", "mag": "mag {}"}
    axes[0, 0].set_yticks(range(len(groups)), [names[by].format(group) for by, group in reversed(groups)])
    return fig


def error_against_uncertainty(uncertainty: Float[AnyArray, " N"], error: Float[AnyArray, " N"], n_bins: int = 20) -> Figure:
    """|error| against the half-width of each star's 68 % interval, and the 68 % quantile of |error| in bins of equal numbers."""
    uncertainty, error = np.asarray(uncertainty), np.asarray(error)
    fig, ax = new_figure(figsize=(5.5, 4.2))
    ax.plot(uncertainty, error, ".", ms=3, alpha=0.25, color=BLUE, rasterized=True, label="a test star")
    bins = [part for part in np.array_split(np.argsort(uncertainty), n_bins) if len(part)]
    center, quantile = zip(*[(np.median(uncertainty[part]), np.quantile(error[part], 0.68)) for part in bins], strict=True)
    ax.plot(center, quantile, "o-", color=BLACK, ms=5, label=f"68 % quantile of |error|, {len(bins)} bins")
    limits = np.quantile(uncertainty, [0.001, 0.999])
    ax.plot(limits, limits, color=ORANGE, lw=1.6, ls="--", label="equal")
    ax.set_xlim(limits[0] * 0.9, limits[1] * 1.1)
    ax.set_ylim(0, np.quantile(error, 0.998))
    ax.set_xlabel("uncertainty of log g (half-width of the 68 % interval)")
    ax.set_ylabel("|error| of log g")
    ax.legend(fontsize=8, loc="upper left")
    return fig


def floor_plot(table: pd.DataFrame) -> Figure:
    """RMSE of log g of every method by magnitude, and the Cramer-Rao floor."""
    fig, ax = new_figure(figsize=(6.5, 4.2))
    x = np.arange(len(table))
    shapes = {"global ridge": ("v", GREY), "oracle": ("^", GREEN), "classification gate": ("D", BLACK), "MLP gate": ("o", BLUE)}
    for name, (marker, color) in shapes.items():
        ax.plot(x, table[name], marker=marker, color=color, ms=6, lw=1.2, label=name)
    ax.plot(x, table["floor"], color=ORANGE, lw=2.0, marker="s", ms=6, label="Cram\u00e9r-Rao floor")
    ax.plot(
        x,
        table["floor_with_prior"],
        color=ORANGE,
        lw=2.0,
        ls="--",
        marker="s",
        mfc="white",
        ms=6,
        label="floor, label ranges known",
    )
    ax.set_yscale("log")
    _plain_log_ticks(ax)
    ax.set_xticks(x, list(table["mag"]))
    ax.set_xlabel("magnitude")
    ax.set_ylabel("root mean squared error of log g")
    ax.legend(fontsize=8, ncols=2, loc="upper center", bbox_to_anchor=(0.5, 1.25))
    return fig
