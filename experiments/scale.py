"""How do the methods scale with training stars and noise?

    python -m experiments.scale                  4,000 to 100,000 training stars x noise 0.1 to 1.0; 45 min on 2 cores, 9.2 GiB
    python -m experiments.scale --preset smoke   small; about a minute

A run that was stopped goes on where it was, from the cache. Results go to results/scale/PRESET.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import BootstrapOptions, DataConfig, ExpertOptions, GateStudyConfig, draw_keys
from experiments.pipeline.gates import CONVERGED, CONVERGED_LINEAR, Changes, GateRun, Sweep, gate_keys, run_gates, train_gates
from experiments.pipeline.prepare import prepare_each
from experiments.pipeline.stars import Prepared
from experiments.report.figures import BLACK, BLUE, GREEN, GREY, ORANGE, Figure, new_figure
from experiments.report.markdown import intervals, load_published, table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages, console
from moe_jax.evaluate import paired_bootstrap, r2_score
from moe_jax.experts.cross_validation import CrossValidatedRidge
from moe_jax.gates import GateConfig, Hyper, LinearGate, mixture_loss, route_hard, route_oracle, route_soft

#: Factors of the linear gate's squared weights in its loss, to choose from on held-out stars.
PENALTIES = (0.0, 1e-6, 1e-5, 1e-4, 1e-3)
#: To the end; the params of the lowest loss on a fifth of the stars are kept.
HELD_OUT = dataclasses.replace(CONVERGED, validation_fraction=0.2, patience=CONVERGED.max_iterations)
#: Colour and marker of each method.
STYLES = {
    "global": (GREY, "v"),
    "oracle": (GREEN, "^"),
    "hard": ("#CC79A7", "x"),
    "soft": (BLACK, "D"),
    "MLP": (BLUE, "o"),
    "linear": (ORANGE, "s"),
    "linear, stopped": ("#56B4E9", "P"),
    "linear, penalised": ("#F0E442", "*"),
}
METHODS = tuple(STYLES)
GATES = METHODS[4:]


@dataclass(frozen=True)
class ScaleConfig(GateStudyConfig):
    """Numbers of stars and noise levels."""

    n_trains: tuple[int, ...] = (4_000, 8_000, 16_000, 32_000, 100_000)
    """Numbers of training stars."""
    noise_levels: tuple[float, ...] = (0.1, 0.2, 0.5, 1.0)
    """Factors on the errors of training and test spectra."""
    n_seeds: int = 2
    """MLP gates."""
    gate: GateConfig = group(GateConfig(), prefix=True, without=("optimizer", "max_iterations"))
    data: DataConfig = group(
        DataConfig(experts=ExpertOptions((0.01, 0.1, 1.0, 10.0, 100.0), (1.0, 10.0, 100.0, 1000.0))),
        without=("n_train", "noise_level", "noise", "train_file", "test_file", "columns"),
    )
    bootstrap: BootstrapOptions = group(BootstrapOptions(), without=("interval_method",))

    def __post_init__(self) -> None:
        require_at_least(self, n_seeds=1, n_trains=1, noise_levels=0)
        self.data.experts.require_global_ridge()


PRESETS = {
    "default": ScaleConfig(),
    "smoke": ScaleConfig(
        preset="smoke",
        n_trains=(1_000, 2_000),
        noise_levels=(0.2, 1.0),
        data=DataConfig(n_test=1_200, experts=ExpertOptions((1.0, 10.0), (10.0,), extend_decades=0, C_grid=(10.0,))),
        gate=GateConfig(epochs=20),
    ),
}


def restrain_linear(data: DataConfig, prepared: Prepared) -> Sweep:
    """Two linear gates that held-out stars restrain.

    The first has no penalty and stops where its held-out loss is lowest. The second has the penalty of the lowest held-out loss,
    with which it is then trained on all stars until it has converged.
    """

    def train(config: GateConfig, *penalties: float) -> Sweep:
        n = len(penalties)
        penalty = np.asarray(penalties, np.float32)
        hyper = Hyper(np.full(n, config.learning_rate, np.float32), penalty, np.zeros(n, np.float32))
        keys = jnp.repeat(gate_keys(data, 1), n)
        stars, test = prepared.gate_stars(), prepared.test.covered()
        changes = Changes(hyper, jnp.ones((n, test.features.shape[1])), jnp.ones(n))
        return train_gates(keys, prepared.classifier.params, stars, test, LinearGate(), config, changes)

    held_out = train(HELD_OUT, *PENALTIES)
    penalised = train(CONVERGED, PENALTIES[int(np.argmin(held_out.validation_loss))])
    return jax.tree.map(lambda a, b: np.concatenate([a[:1], b]), held_out, penalised)


def score(config: ScaleConfig, data: DataConfig, prepared: Prepared) -> list[dict[str, float | str]]:
    """R2 of each method, rho and Delta R2 against the soft classification gate, with bootstrap bands; one row each."""
    cache = config.output.cache
    mlp = run_gates(data, prepared, GateRun(config.mlp, config.gate, n_seeds=config.n_seeds), cache)
    linear = run_gates(data, prepared, CONVERGED_LINEAR, cache)
    settings = {"data": dataclasses.asdict(data), "penalties": PENALTIES, "training": dataclasses.asdict(HELD_OUT)}
    restrained, _ = cache.load_or_compute("restrained", settings, [__file__], Sweep, lambda: restrain_linear(data, prepared))
    test, stars = prepared.test.covered(), prepared.gate_stars()
    logistic = prepared.classifier.params
    weights = LinearGate().apply(logistic, test.features)
    predictions = jnp.stack(
        [
            jnp.asarray(test.global_prediction),
            route_oracle(test.cell, test.predictions),
            route_hard(weights, test.predictions),
            route_soft(weights, test.predictions),
            *map(jnp.asarray, mlp.predictions),
            *map(jnp.asarray, (*linear.predictions, *restrained.predictions)),
        ],
        axis=1,
    )

    def statistics(y: jax.Array, predictions: jax.Array) -> jax.Array:
        """R2 of the M methods, then rho and Delta R2 of each; (3, M)."""
        each = jax.vmap(r2_score, in_axes=(None, 1))(y, predictions)
        r2 = jnp.concatenate([each[:4], jnp.mean(each[4:-3], keepdims=True), each[-3:]])
        return jnp.stack([r2, (r2 - r2[0]) / (r2[1] - r2[0]), r2 - r2[3]])

    y = jnp.asarray(test.log_g)
    variance = float(jnp.var(y))
    estimate = jax.jit(statistics)(y, predictions)
    samples = _bootstrap(draw_keys(data.seed).bootstrap, statistics, (y, predictions), config.bootstrap.n_resamples)
    tail = 0.5 * (1 - config.bootstrap.confidence_level)
    low, high = np.quantile(samples, [tail, 1 - tail], axis=0)
    train_mse = dict(zip(GATES, map(float, (mlp.loss.mean(), *linear.loss, *restrained.loss)), strict=True))
    train_mse["soft"] = float(mixture_loss(LinearGate(), logistic, stars.features, stars.predictions, stars.log_g))
    rows: list[dict[str, float | str]] = []
    for j, method in enumerate(METHODS):
        row: dict[str, float | str] = {"n_train": data.n_train, "noise_level": data.noise_level, "method": method}
        for i, name in enumerate(("r2", "rho", "delta_r2")):
            row |= {name: float(estimate[i, j]), f"{name}_low": low[i, j], f"{name}_high": high[i, j]}
        row |= {"train_mse": train_mse.get(method, np.nan), "test_mse": (1 - float(estimate[0, j])) * variance}
        rows.append(row)
    return rows


def _bootstrap(key: jax.Array, statistic: object, arrays: tuple[jax.Array, ...], n_resamples: int) -> np.ndarray:
    """Bootstrap in parts, so that the resampled stars of all resamples need not be held at once."""
    size = 50
    keys = jax.random.split(key, -(-n_resamples // size))
    once = jax.jit(lambda key: paired_bootstrap(key, statistic, arrays, size))  # type: ignore[arg-type]
    return np.concatenate([np.asarray(once(key)) for key in keys])[:n_resamples]


def draw_figures(table: pd.DataFrame, noise_levels: tuple[float, ...]) -> dict[str, Figure]:
    """R2 and Delta R2 against the number of training stars, one panel for each noise level."""
    drawn = {}
    for name, label in (("r2", "$R^2$ of log g"), ("delta_r2", r"$\Delta R^2$ against the classification gate (soft)")):
        shown = METHODS if name == "r2" else ("hard", *GATES)
        fig, axes = new_figure(
            1, len(noise_levels), figsize=(2.6 * len(noise_levels) + 0.6, 3.8), squeeze=False, sharey=name != "r2"
        )
        for ax, noise in zip(axes[0], noise_levels, strict=True):
            for method in shown:
                part = table[(table["method"] == method) & (table["noise_level"] == noise)]
                color, marker = STYLES[method]
                ax.fill_between(part["n_train"], part[f"{name}_low"], part[f"{name}_high"], color=color, alpha=0.15, lw=0)
                ax.plot(part["n_train"], part[name], color=color, marker=marker, ms=4, lw=1.2, label=method)
            if name == "delta_r2":
                ax.axhline(0.0, color=BLACK, lw=0.8, ls="--")
            ax.set_xscale("log")
            sizes = sorted(set(table["n_train"]))
            ax.set_xticks(sizes, [f"{size / 1000:g}k" for size in sizes], fontsize=8)
            ax.minorticks_off()
            ax.set_title(f"noise {noise:g}", fontsize=10)
            ax.set_xlabel("training stars")
        axes[0, 0].set_ylabel(label)
        fig.legend(*axes[0, 0].get_legend_handles_labels(), fontsize=8, ncols=len(shown), loc="outside upper center")
        drawn[name] = fig
    return drawn


def sections_of(config: ScaleConfig, table: pd.DataFrame, choices: pd.DataFrame) -> list[str]:
    """The paragraphs of report.md."""
    table = table.assign(delta=intervals(table, "delta_r2", "delta_r2_low", "delta_r2_high"))

    def by_size(values: str, *methods: str) -> pd.DataFrame:
        return table.pivot(index=["noise_level", "n_train"], columns="method", values=values)[list(methods)]

    parts = {part: by_size(f"{part}_mse", "soft", *GATES) for part in ("train", "test")}
    fitted = pd.concat({f"{method}, {part}": parts[part][method] for method in ("soft", *GATES) for part in parts}, axis=1)
    compared = table[table["method"].isin(["soft", *GATES])]
    plain = {"noise_level": "g"}
    published = load_published()
    large, million = published["n_train_100000"]["r2"], published["n_train_1000000_noise_1"]
    return [
        f"Cross-fitted gates: MLP (Adam, {config.gate.epochs} epochs, {config.n_seeds} seed{'s' * (config.n_seeds > 1)}), "
        "linear (converged), linear, stopped (at the iteration that is best for a held-out fifth of the stars), and linear, "
        f"penalised (converged, with that factor of its squared weights, of {', '.join(f'{p:g}' for p in PENALTIES)}, which is "
        "best for that fifth). "
        f"The test stars are the same {config.data.n_test:,} for all, those that the cells cover; they are "
        "observed at the noise of the training stars. Bands: "
        f"{100 * config.bootstrap.confidence_level:g} % percentile bootstrap over test stars.",
        "## R2",
        table_markdown(by_size("r2", *METHODS).reset_index(), plain),
        "![R2](r2.png)",
        "## Delta R2 against the classification gate (soft)",
        table_markdown(by_size("delta", *GATES).reset_index(), plain),
        "![Delta R2](delta_r2.png)",
        "## Is the linear gate fitted too closely?",
        table_markdown(fitted.reset_index(), plain),
        "Mean squared error on the gate's training stars, with out-of-fold predictions of the experts, and on the test stars.",
        "\n".join(itertools.starmap(overfit, compared.groupby(["noise_level", "n_train"]))).strip(),
        "## Oracle-gain retention rho",
        table_markdown(by_size("rho", "soft", *GATES).reset_index(), plain),
        f"The report at 100,000 training spectra and noise 0.2: soft {large['classify']:.4f}, MLP {large['regress_mlp']:.4f}, "
        f"linear {large['regress_linear']:.4f}; at 1,000,000 and noise 1: global {million['global']:.4f}, "
        f"oracle {million['oracle']:.4f}, soft {million['classify']:.4f}.",
        "## Chosen penalties",
        table_markdown(choices, plain | {"global_alpha": "g", "last_step": ".1e"}),
        "*Cells at edge*: those whose penalty lies at an end of the widened grid, as experts with fewer stars than pixels need "
        "none. *last step*: by how much the last step to that end lowers their cross-validated error, at most.",
    ]


def last_step(experts: CrossValidatedRidge) -> float:
    """By how much, at most, the last step to the end of the grid lowers the cross-validated error of an expert there; relative."""
    steps = [0.0]
    for alpha, at_edge, alphas, mse in zip(experts.alpha, experts.at_edge, experts.alphas, experts.mse, strict=True):
        if at_edge:
            distance = np.abs(np.log(np.asarray(alphas) / float(alpha)))
            chosen, neighbour = np.argsort(distance)[:2]  # NaN, which stand for alphas that were not tried, come last
            steps.append(float(mse[neighbour] / mse[chosen] - 1))
    return max(steps)


def overfit(size: tuple[float, int], rows: pd.DataFrame) -> str:
    """A sentence on how closely the linear gate is fitted, where it loses to the classification gate; empty elsewhere."""
    by_method = rows.set_index("method")[["train_mse", "test_mse", "r2"]]
    soft, linear, penalised = (by_method.loc[method] for method in ("soft", "linear", "linear, penalised"))
    noise, n_train = size
    if linear["test_mse"] <= soft["test_mse"]:
        return ""
    gap, gap_of_soft = (row["test_mse"] / row["train_mse"] - 1 for row in (linear, soft))
    why = "as it is fitted too closely" if gap > gap_of_soft else "but is not fitted more closely"
    return (
        f"With {n_train:,} stars and noise {noise:g} the converged linear gate is worse than the classification gate, {why}: "
        f"its test error is {abs(gap):.0%} {'above' if gap > 0 else 'below'} its training error (classification gate: "
        f"{gap_of_soft:+.0%}), and the penalty changes its R2 by {penalised['r2'] - linear['r2']:+.4f}."
    )


def compute(config: ScaleConfig, stages: Stages) -> Results:
    """Runs all sizes and noise levels."""
    grid = itertools.product(config.n_trains, config.noise_levels)
    configs = [dataclasses.replace(config.data, n_train=n_train, noise_level=noise) for n_train, noise in grid]
    rows, choices = [], []
    preparations = prepare_each(configs, Stages(quiet=True), config.output.cache)
    for data, prepared in zip(stages.each("sizes and noise levels", configs), preparations, strict=True):
        rows += score(config, data, prepared)
        choices.append(
            {
                "noise_level": data.noise_level,
                "n_train": data.n_train,
                "cell_alphas": " ".join(f"{float(alpha):g}" for alpha in prepared.experts.alpha),
                "cells_at_edge": int(np.sum(np.asarray(prepared.experts.at_edge))),
                "last_step": last_step(prepared.experts),
                "global_alpha": float(prepared.global_ridge.alpha),
                "gate_accuracy": prepared.classifier.accuracy,
            }
        )
        scores = ", ".join(f"{row['method']} {row['r2']:.4f}" for row in rows[-len(METHODS) :])
        console.print(f"{data.n_train:>7,} stars, noise {data.noise_level:g}: {scores}")
    table, chosen = pd.DataFrame(rows), pd.DataFrame(choices)
    drawn = draw_figures(table, config.noise_levels)
    return Results("Training stars and noise", sections_of(config, table, chosen), {"scale": table, "choices": chosen}, drawn)


main = Study("scale", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
