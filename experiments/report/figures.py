"""The figures of an experiment, each a function from tables or arrays to a Matplotlib figure.

The colours are those of Okabe & Ito (2008), which colour-blind readers can tell apart. Markers differ as well.
"""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import pandas as pd
from jaxtyping import Float

from experiments.pipeline.methods import CLASSIFY, PROTOCOLS, Method, Pair
from experiments.report.markdown import interval
from moe_jax.core.arrays import AnyArray
from moe_jax.evaluate.bootstrap import Bootstrap
from moe_jax.experts.cells import CELL_NAMES, M_H_NAMES, N_CELLS
from moe_jax.gates.optimize import GateFit

if TYPE_CHECKING:
    import matplotlib.figure
    from matplotlib.axes import Axes

#: The type of figures. Matplotlib is loaded when the first one is drawn.
Figure: TypeAlias = "matplotlib.figure.Figure"
BLUE, ORANGE, GREEN, GREY, BLACK = "#0072B2", "#E69F00", "#009E73", "#999999", "#000000"
_KIND_COLORS = (BLUE, ORANGE, GREEN, BLACK, "#CC79A7")
_KIND_MARKERS = ("o", "s", "D", "^", "v")
COLORS = {"classify": BLACK, "regress_mlp": BLUE, "regress_linear": ORANGE}
MARKERS = {"in-sample": "o", "cross-fitted": "s", "": "D"}
GATES = {"regress_mlp": "o", "regress_linear": "s"}  # the regression gates with their markers
TITLES = {
    "global": "one global ridge",
    "oracle": "oracle: true cell's expert",
    "classify": "classification gate",
    "hard": "classification gate, hard",
    "fallback": "classification gate, fallback",
    "regress_mlp": "regression gate, MLP",
    "regress_linear": "regression gate, linear",
}
_HOLLOW = {"ls": "none", "mfc": "white", "mec": BLACK}
_METAL_POOR = [k for k in range(N_CELLS) if k % len(M_H_NAMES) == 0]
_CELL_LABELS = [name.replace(" ", "\n", 1) for name in CELL_NAMES]
#: Style file of all figures. ``plt.style.use(STYLE)`` applies it to others.
STYLE = Path(__file__).with_name("figures.mplstyle")


def _pyplot() -> Any:
    """Matplotlib, for files only; imported when the first figure is drawn."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot

    return matplotlib.pyplot


def new_figure(*shape: int, **kwargs: Any) -> tuple[Figure, Any]:
    """A figure and its axes in the common style; arguments as those of ``matplotlib.pyplot.subplots``."""
    plt = _pyplot()
    with plt.style.context(STYLE):
        return plt.subplots(*shape, layout="constrained", **kwargs)


def _title(method: Method) -> str:
    return TITLES[method.name] + (f", {method.protocol}" if method.protocol else "")


def _errors(estimate: AnyArray, low: AnyArray, high: AnyArray) -> np.ndarray:
    """Lengths of error bars. An interval need not contain the estimate; a length is then 0, as it must not be negative."""
    lengths: np.ndarray = np.maximum(np.stack([np.subtract(estimate, low), np.subtract(high, estimate)]), 0.0)
    return lengths


def save_figure(figure: Figure, path: Path | str, *, pdf: bool = True, **options: Any) -> None:
    """Writes a figure as PNG, writes it beside that as PDF (vectors, for papers) if asked for, and closes it."""
    plt = _pyplot()
    with plt.style.context(STYLE):
        figure.savefig(path, **options)
        figure.set_layout_engine("none")  # keeps the layout of the first file
        if pdf:
            figure.savefig(Path(path).with_suffix(".pdf"), metadata={"CreationDate": None})
    plt.close(figure)


def r2_comparison(overall: pd.DataFrame, published: Mapping[str, Any]) -> Figure:
    """R2 of every method, with the report's beside it."""
    fig, ax = new_figure(figsize=(7.0, 4.4))
    for i, row in enumerate(overall.to_dict("records")):
        color, marker = COLORS.get(row["method"], GREY), MARKERS[row["protocol"]]
        ax.plot(row["r2"], i, marker, color=color, ms=7, zorder=3)
        report = published["overall"].get(row["method"])
        if report and row["protocol"] != "cross-fitted":
            ax.plot(report["r2"], i, marker, ms=7, **_HOLLOW | {"mec": color})
        ax.annotate(f"{row['r2']:.4f}", (1.02, i), xycoords=("axes fraction", "data"), va="center", fontsize=9)
    baseline = float(overall.loc[overall["method"] == "classify", "r2"].iloc[0])
    ax.axvline(baseline, color=BLACK, lw=0.8, ls=":", label="classification gate, this run")
    ax.plot([], [], "o", color=GREY, label="this run")
    ax.plot([], [], "o", label="the report (other spectra)", **_HOLLOW)
    ax.set_yticks(range(len(overall)), [_title(Method(m, p)) for m, p in zip(overall["method"], overall["protocol"], strict=True)])
    ax.margins(x=0.08)
    ax.set(xlabel="$R^2$ of log g, covered test stars (right: this run's)", ylim=(len(overall) - 0.5, -0.5))
    fig.legend(fontsize=8, ncols=3, loc="outside upper center")
    return fig


def interval_plot(names: Sequence[str], table: pd.DataFrame, xlabel: str, *, groups: Sequence[str] | None = None) -> Figure:
    """The differences ``delta_r2`` of a table with their intervals, one line each. Names of one group share colour and marker."""
    groups = [""] * len(names) if groups is None else groups
    kinds = list(dict.fromkeys(groups))
    fig, ax = new_figure(figsize=(8.0, 1.4 + 0.27 * len(names)))
    estimate, low, high = (table[column].to_numpy(float) for column in ("delta_r2", "low", "high"))
    for kind, color, marker in zip(kinds, _KIND_COLORS * 3, _KIND_MARKERS * 3, strict=False):
        rows = np.array([i for i, group in enumerate(groups) if group == kind])
        bars = _errors(estimate[rows], low[rows], high[rows])
        ax.errorbar(estimate[rows], rows, xerr=bars, fmt=marker, color=color, capsize=3, ms=5, label=kind or None)
    ax.axvline(0.0, color=BLACK, lw=0.8, ls="--")
    ax.set_yticks(range(len(names)), names, fontsize=8)
    ax.set(xlabel=textwrap.fill(xlabel, 65), ylim=(len(names) - 0.4, -0.6))
    if len(kinds) > 1:
        fig.legend(fontsize=8, ncols=min(len(kinds), 4), loc="outside upper center")
    return fig


def per_bin_delta(comparisons: Mapping[Pair, Bootstrap], confidence_level: float) -> Figure:
    """Delta R2 of the regression gates against the classification gate in each cell, with intervals."""
    fig, axes = new_figure(2, 1, figsize=(8.0, 6.0), sharex=True)
    for ax, protocol in zip(axes, PROTOCOLS, strict=True):
        for k in _METAL_POOR:
            ax.axvspan(k - 0.5, k + 0.5, color="#EEEEEE", zorder=0, label="metal-poor cells" if k == 0 else None)
        for (name, marker), offset in zip(GATES.items(), (-0.12, 0.12), strict=True):
            cells = comparisons[Pair(Method(name, protocol), CLASSIFY)].groups
            bars = _errors(cells.estimate, cells.low, cells.high)
            x = np.arange(N_CELLS) + offset
            ax.errorbar(x, np.asarray(cells.estimate), bars, fmt=marker, color=COLORS[name], capsize=3, label=TITLES[name])
        ax.axhline(0.0, color=BLACK, lw=0.8)
        ax.set_ylabel(r"$\Delta R^2$")
        ax.set_title(f"gates trained {protocol}", loc="left")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, loc="outside upper center", ncols=3)
    axes[1].set_xticks(range(N_CELLS), _CELL_LABELS, fontsize=8)
    axes[1].set_xlim(-0.5, N_CELLS - 0.5)
    fig.supxlabel(f"cell (bars: {100 * confidence_level:g} % bootstrap intervals, each cell by itself)", fontsize=9)
    return fig


def mean_weights(weights: Mapping[Method, Float[AnyArray, "N K"]], published: Mapping[str, Any]) -> Figure:
    """Mean weight of each expert by three gates, with the report's beside them."""
    fig, ax = new_figure(figsize=(8.0, 3.8))
    for (method, weight), offset in zip(weights.items(), (-0.27, 0.0, 0.27), strict=True):
        x = np.arange(N_CELLS) + offset
        ax.bar(x, np.asarray(weight).mean(axis=0), width=0.25, color=COLORS[method.name], label=_title(method))
        ax.plot(x, published["mean_weights"][method.name], "D", ms=4, zorder=3, **_HOLLOW)
    ax.plot([], [], "D", ms=4, label="the report (other spectra)", **_HOLLOW)
    ax.set_xticks(range(N_CELLS), _CELL_LABELS, fontsize=8)
    ax.set_ylabel("mean weight, covered test stars")
    fig.legend(fontsize=8, ncols=2, loc="outside upper center")
    return fig


def bootstrap_histograms(comparisons: Mapping[Pair, Bootstrap], confidence_level: float) -> Figure:
    """Bootstrap distributions of Delta R2 against the classification gate, with intervals and a line at zero."""
    fig, axes = new_figure(2, 2, figsize=(8.0, 5.2), sharex="col")
    for row, protocol in zip(axes, PROTOCOLS, strict=True):
        for ax, name in zip(row, GATES, strict=True):
            difference = comparisons[Pair(Method(name, protocol), CLASSIFY)].overall
            samples = np.asarray(difference.samples)
            ax.hist(samples[~np.isnan(samples)], bins=40, color=COLORS[name], alpha=0.75)
            ax.axvspan(float(difference.low), float(difference.high), color=GREY, alpha=0.25, zorder=0)
            ax.axvline(0.0, color=BLACK, lw=1.2, ls="--")
            ax.axvline(float(difference.estimate), color=BLACK, lw=1.2)
            with_interval = interval(difference.estimate, difference.low, difference.high)
            ax.set_title(f"{_title(Method(name, protocol))}\n{with_interval}", fontsize=9)
    for ax in axes[-1]:
        ax.set_xlabel(r"$\Delta R^2$ against the classification gate")
    for ax in axes[:, 0]:
        ax.set_ylabel("resamples")
    fig.supxlabel(f"solid: estimate; dashed: zero; shaded: {100 * confidence_level:g} % interval", fontsize=9)
    return fig


def loss_curves(fits: Mapping[Method, GateFit]) -> Figure:
    """Training and validation loss of the regression gates by epoch. A marker shows the epoch whose params were kept."""
    fig, axes = new_figure(1, 2, figsize=(8.5, 3.6), sharey=True)
    for ax, protocol in zip(axes, PROTOCOLS, strict=True):
        for name, marker in GATES.items():
            fit = fits[Method(name, protocol)]
            best = int(fit.best_epoch)
            epochs = np.arange(1, len(fit.train_loss) + 1)
            ax.plot(epochs, fit.train_loss, color=COLORS[name], ls=":", lw=1.4, label=f"{TITLES[name]}: training")
            ax.plot(epochs, fit.validation_loss, color=COLORS[name], lw=1.4, label=f"{TITLES[name]}: validation")
            ax.plot(best + 1, np.asarray(fit.validation_loss)[best], marker, color=COLORS[name])
        ax.set_title(f"gates trained {protocol}", loc="left")
        ax.set(xlabel="epoch (marker: best)", yscale="log")
        _plain_log_ticks(ax)
    axes[0].set_ylabel("mean squared error of the mixture")
    fig.legend(*axes[0].get_legend_handles_labels(), fontsize=8, ncols=2, loc="outside upper center")
    return fig


def _plain_log_ticks(ax: Axes) -> None:
    ax.yaxis.set_major_formatter("{x:g}")
    ax.yaxis.set_minor_formatter("{x:g}")
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
        ax.set(xlabel="true log g", xlim=limits, ylim=limits)
    axes[0, 0].set_ylabel("predicted log g")
    return fig


def coverage_plot(coverage: pd.DataFrame) -> Figure:
    """Actual coverage of intervals by level: of all stars, by cell and by magnitude, each with its own 95 % interval."""
    levels = sorted(coverage["level"].unique())
    styles = {"all": ("all stars", BLACK, "D"), "cell": ("{}", BLUE, "o"), "mag": ("mag {}", ORANGE, "s")}
    names = list(dict.fromkeys(styles[by][0].format(group) for by, group in zip(coverage["by"], coverage["group"], strict=True)))
    fig, axes = new_figure(1, len(levels), figsize=(9.5, 0.28 * len(names) + 1.4), sharey=True, squeeze=False)
    for ax, level in zip(axes[0], levels, strict=True):
        for row in coverage[coverage["level"] == level].to_dict("records"):
            name, color, marker = styles[row["by"]]
            i = names.index(name.format(row["group"]))
            ax.plot([row["low"], row["high"]], [i, i], color=color, lw=1.4)
            ax.plot(row["coverage"], i, marker, color=color, ms=5)
        ax.axvline(level, color=GREY, lw=1.0, ls="--")
        ax.set_xlabel("actual coverage")
        ax.set_title(f"{level:.0%} promised", loc="left")
    axes[0, 0].set_yticks(range(len(names)), names)
    axes[0, 0].invert_yaxis()
    return fig


def error_against_uncertainty(uncertainty: Float[AnyArray, " N"], error: Float[AnyArray, " N"]) -> Figure:
    """|error| against the half-width of each star's 68 % interval, with 68 % quantiles of |error| in bins of equal numbers."""
    uncertainty, error = np.asarray(uncertainty), np.asarray(error)
    fig, ax = new_figure(figsize=(5.5, 4.2))
    ax.plot(uncertainty, error, ".", ms=3, alpha=0.25, color=BLUE, rasterized=True, label="a test star")
    bins = [part for part in np.array_split(np.argsort(uncertainty), 20) if len(part)]
    center, quantile = zip(*[(np.median(uncertainty[part]), np.quantile(error[part], 0.68)) for part in bins], strict=True)
    ax.plot(center, quantile, "o-", color=BLACK, ms=5, label=f"68 % quantile of |error|, {len(bins)} bins")
    limits = np.quantile(uncertainty, [0.001, 0.999])
    ax.plot(limits, limits, color=ORANGE, lw=1.6, ls="--", label="equal")
    ax.set(xlabel="uncertainty of log g (half-width of the 68 % interval)", ylabel="|error| of log g")
    ax.set(xlim=(limits[0] * 0.9, limits[1] * 1.1), ylim=(0, np.quantile(error, 0.998)))
    fig.legend(fontsize=8, ncols=3, loc="outside upper center")
    return fig


def floor_plot(table: pd.DataFrame) -> Figure:
    """RMSE of log g of every method by magnitude, and the Cramer-Rao floor."""
    fig, ax = new_figure(figsize=(6.5, 4.2))
    x = np.arange(len(table))
    shapes = {"global ridge": ("v", GREY), "oracle": ("^", GREEN), "classification gate": ("D", BLACK), "MLP gate": ("o", BLUE)}
    for name, (marker, color) in shapes.items():
        if name not in table:  # no global ridge was fitted
            continue
        ax.plot(x, table[name], marker=marker, color=color, ms=6, lw=1.2, label=name)
    ax.plot(x, table["floor"], color=ORANGE, lw=2.0, marker="s", ms=6, label="Cramér-Rao floor")
    ax.plot(x, table["floor_with_prior"], color=ORANGE, lw=2.0, ls="--", marker="s", ms=6, mfc="w", label="floor, normal priors")
    ax.set(xlabel="magnitude", ylabel="root mean squared error of log g", yscale="log")
    _plain_log_ticks(ax)
    ax.set_xticks(x, list(table["mag"]))
    fig.legend(fontsize=8, ncols=3, loc="outside upper center")
    return fig


def plot_fit(wave: np.ndarray, flux: np.ndarray, error: np.ndarray, model: np.ndarray, used: np.ndarray, title: str) -> Figure:
    """A spectrum (P,), its fit, and the residuals in standard deviations.

    ``used`` is 1 where a pixel was used, 0 where it stands out, and -1 where the file masks it.
    """
    figure, axes = new_figure(2, 1, figsize=(12, 6), sharex=True, height_ratios=(3, 1))
    known = used >= 0
    axes[0].plot(wave, np.where(known, flux, np.nan), color="0.6", lw=0.7, label="data")
    axes[0].plot(wave, model, color=BLUE, lw=0.8, label="fit")
    axes[0].set(ylabel="flux, scaled to a median of 0.5", ylim=(0.0, 1.15 * np.percentile(flux[known], 99.5)))
    axes[0].set_title(title, loc="left")
    residual = (flux - model) / error
    axes[1].plot(wave, np.where(used == 1, residual, np.nan), color="0.4", lw=0.5)
    limit = max(5.0, float(1.2 * np.percentile(np.abs(residual[used == 1]), 99.5)))
    axes[1].set(xlabel="vacuum wavelength (Angstrom)", ylabel="residual / error", ylim=(-limit, limit))
    for value, color, marker, label in ((0, ORANGE, "x", "stands out, masked"), (-1, "k", "|", "masked in the file")):
        masked = used == value
        if masked.any():
            place = np.clip(residual[masked], -limit, limit) if value == 0 else np.full(masked.sum(), -limit)
            axes[1].plot(wave[masked], place, marker, color=color, ms=4, clip_on=False)
            axes[0].plot([], [], marker, color=color, label=f"{label}: {masked.sum()} pixels")
    axes[0].legend(loc="lower right", ncols=4, frameon=False)
    return figure
