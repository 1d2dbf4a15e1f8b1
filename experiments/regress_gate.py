"""Is a gate trained to classify also the best for regressing? Nine ridge experts, a classification gate, regression gates.

python -m experiments.regress_gate                      32,000 training and 1,000 test stars, about a minute and a half on 2 cores
python -m experiments.regress_gate --preset smoke       a small run of everything, about 20 s
python -m experiments.regress_gate --preset large_test  10,000 test stars
python -m experiments.regress_gate --train-file a.h5 --test-file b.h5

Expect R2 0.93 to 0.97 for the mixtures, the linear gate in-sample below the classification gate, the MLP gates above it.
Tables, figures and report.md go to results/regress_gate/PRESET.
"""

from __future__ import annotations

import dataclasses
import json
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure
from rich.table import Table

from experiments.command_line import Stages, console, run_command
from moe_jax import figures
from moe_jax.arrays import InputError
from moe_jax.bootstrap import Bootstrap
from moe_jax.cells import N_CELLS, assign_cells
from moe_jax.classifier import C_GRID, ClassifierFit, fit_classifier
from moe_jax.evaluation import (
    CLASSIFY,
    FALLBACK,
    GLOBAL,
    HARD,
    METHODS,
    ORACLE,
    PROTOCOLS,
    REGRESSION_GATES,
    Method,
    Pair,
    Predictions,
    bin_table,
    bootstrap_table,
    compare,
    overall_table,
)
from moe_jax.experts import (
    CrossValidatedRidge,
    Experts,
    assign_folds,
    cross_fitted_predictions,
    fit_experts,
    fit_global,
    predict_experts,
    require_cell_sizes,
)
from moe_jax.features import compute_features, fit_features, line_pixels
from moe_jax.files import atomic_folder
from moe_jax.gates import Gate, LinearGate, MLPGate
from moe_jax.optimize import GateConfig, GateFit
from moe_jax.report import load_published, warnings, write_report
from moe_jax.ridge import predict_ridge
from moe_jax.routing import route_fallback, route_hard, route_oracle, route_soft
from moe_jax.simulate import LabelSampling, simulate_survey
from moe_jax.survey import WAVE_FIELD, Survey, add_noise, load_survey
from moe_jax.training import fit_gate


@dataclass(frozen=True)
class RegressGateConfig:
    """The experiment; its defaults are the report's."""

    preset: Literal["default", "smoke", "large_test"] = "default"
    """What the other options start from."""
    n_train: int = 32_000
    """Training stars; of a file, the most that are read."""
    n_test: int = 1_000
    """Test stars; of a file, the most that are read."""
    noise_level: float = 0.2
    """Factor on the errors of training and test spectra."""
    label_sampling: LabelSampling = "lattice"
    """How simulated labels are drawn."""
    train_file: Path | None = None
    """HDF5 survey to train on, instead of a simulated one."""
    test_file: Path | None = None
    """HDF5 survey to test on."""
    alphas: tuple[float, ...] = (1e-3, 1e-2, 1e-1, 1.0, 10.0, 100.0)
    """Ridge penalties of the experts to choose from."""
    global_alphas: tuple[float, ...] = (1.0, 10.0, 100.0)
    """Ridge penalties of the global ridge to choose from; the report does not name its grid."""
    n_folds: int = 5
    """Folds of every cross-validation."""
    C_grid: tuple[float, ...] = C_GRID
    """Inverse penalties of the logistic regression to choose from."""
    hidden: int = 64
    """Hidden units of the MLP gate."""
    gate: GateConfig = dataclasses.field(default_factory=GateConfig)
    in_sample_fraction: float = 0.2
    """Part of the covered training stars on which the in-sample gates are trained."""
    n_resamples: int = 1_000
    """Bootstrap resamples."""
    confidence_level: float = 0.95
    seed: int = 0
    """Of the data, the noise, the folds, the gates and the bootstrap."""
    output_dir: Path | None = None
    """Where the results go; results/regress_gate/PRESET by default."""

    def __post_init__(self) -> None:
        checks = {
            "n_train": (self.n_train >= 1, "at least 1"),
            "n_test": (self.n_test >= 1, "at least 1"),
            "noise_level": (0 <= self.noise_level < np.inf, "a finite number, at least 0"),
            "n_folds": (self.n_folds >= 2, "at least 2"),
            "alphas": (len(self.alphas) > 0 and all(0 < a < np.inf for a in self.alphas), "positive numbers"),
            "global_alphas": (len(self.global_alphas) > 0 and all(0 < a < np.inf for a in self.global_alphas), "positive numbers"),
            "C_grid": (len(self.C_grid) > 0 and all(0 < c < np.inf for c in self.C_grid), "positive numbers"),
            "hidden": (self.hidden >= 1, "at least 1"),
            "in_sample_fraction": (0 < self.in_sample_fraction <= 1, "a number above 0, at most 1"),
            "n_resamples": (self.n_resamples >= 1, "at least 1"),
            "confidence_level": (0 < self.confidence_level < 1, "a number between 0 and 1"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise InputError(f"{name} is {getattr(self, name)}, expected {expected}")


PRESETS = {
    "default": RegressGateConfig(),
    "smoke": RegressGateConfig(
        preset="smoke", n_train=1_200, n_test=1_200, in_sample_fraction=1.0, C_grid=(10.0, 100.0), gate=GateConfig(epochs=30)
    ),
    "large_test": RegressGateConfig(preset="large_test", n_test=10_000),
}


class Keys(NamedTuple):
    """One random key for each thing that is drawn."""

    train: jax.Array
    test: jax.Array
    train_noise: jax.Array
    test_noise: jax.Array
    folds: jax.Array
    pca: jax.Array
    in_sample: jax.Array
    gates: jax.Array
    bootstrap: jax.Array


class Stars(NamedTuple):
    """Stars as the methods see them."""

    flux: jax.Array  #: (N, P) noisy
    log_g: jax.Array  #: (N,)
    cell: jax.Array  #: (N,), -1 where not covered


class Results(NamedTuple):
    """All that is reported."""

    overall: pd.DataFrame
    bins: pd.DataFrame
    bootstrap: pd.DataFrame
    comparisons: dict[Pair, Bootstrap]
    predictions: Predictions
    fits: dict[Method, GateFit]
    weights: dict[Method, jax.Array]
    star: np.ndarray
    log_g: jax.Array
    cell: jax.Array
    experts: Experts
    global_ridge: CrossValidatedRidge
    classifier: ClassifierFit
    n_covered_train: int


def draw_keys(seed: int) -> Keys:
    """The keys of a seed."""
    return Keys(*jax.random.split(jax.random.key(seed), len(Keys._fields)))


def load_surveys(config: RegressGateConfig, keys: Keys) -> tuple[Survey, Survey]:
    """The training and the test survey, from files or simulated, and checked against each other."""
    if config.train_file is None or config.test_file is None:
        train = simulate_survey(keys.train, config.n_train, label_sampling=config.label_sampling)
        return train, simulate_survey(keys.test, config.n_test, label_sampling=config.label_sampling)
    train, test = load_survey(config.train_file, config.n_train), load_survey(config.test_file, config.n_test)
    for path, survey in ((config.train_file, train), (config.test_file, test)):
        line_pixels(survey.wave, f"{path}: {WAVE_FIELD}")
    if train.wave.shape != test.wave.shape or not np.allclose(train.wave, test.wave, rtol=0, atol=1e-3):
        raise InputError(
            f"{config.test_file}: {WAVE_FIELD}: found {len(test.wave)} pixels from {test.wave[0]:g} to {test.wave[-1]:g} Angstrom, "
            f"expected those of {config.train_file}: {len(train.wave)} from {train.wave[0]:g} to {train.wave[-1]:g}"
        )
    return train, test


def observe(key: jax.Array, survey: Survey, noise_level: float) -> Stars:
    """Draws the noise of a survey, and assigns its stars to cells."""
    flux = add_noise(key, jnp.asarray(survey.flux), jnp.asarray(survey.error), noise_level)
    labels = survey.labels
    return Stars(flux, jnp.asarray(labels.log_g), assign_cells(labels.T_eff, labels.M_H))


@jax.jit
def take_rows(arrays: tuple[jax.Array, ...], rows: jax.Array) -> tuple[jax.Array, ...]:
    """The same rows of several arrays."""
    return tuple(array[rows] for array in arrays)


def fit_regression_gates(
    keys: Keys, config: RegressGateConfig, train: Stars, features: jax.Array, predictions: jax.Array, out_of_fold: jax.Array
) -> dict[Method, GateFit]:
    """The MLP and the linear regression gate by both protocols."""
    covered = np.flatnonzero(np.asarray(train.cell) >= 0)
    n_in_sample = max(round(config.in_sample_fraction * len(covered)), 2)
    rows = {"in-sample": jax.random.permutation(keys.in_sample, covered)[:n_in_sample], "cross-fitted": jnp.asarray(covered)}
    targets = {"in-sample": predictions, "cross-fitted": cross_fitted_predictions(predictions, out_of_fold, train.cell)}
    data = {p: take_rows((features, targets[p], train.log_g), rows[p]) for p in PROTOCOLS}
    fits = {}
    for i, method in enumerate(REGRESSION_GATES):
        gate = regression_gates(config)[method.name]
        x, yhat, y = data[method.protocol]
        fits[method] = fit_gate(jax.random.fold_in(keys.gates, i), gate, x, yhat, y, config.gate)
    return jax.block_until_ready(fits)


def regression_gates(config: RegressGateConfig) -> dict[str, Gate]:
    """The gates that are trained on the squared error of the mixture."""
    return {"regress_mlp": MLPGate(config.hidden), "regress_linear": LinearGate()}


def run(config: RegressGateConfig, stages: Stages) -> Results:
    """The whole experiment: data, experts, features, gates, evaluation."""
    keys = draw_keys(config.seed)
    with stages("surveys"):
        train_survey, test_survey = jax.block_until_ready(load_surveys(config, keys))
        wave = np.asarray(train_survey.wave)
        source = str(config.train_file or "the simulated training survey")
    with stages("noise and cells"):
        train = jax.block_until_ready(observe(keys.train_noise, train_survey, config.noise_level))
        test = observe(keys.test_noise, test_survey, config.noise_level)
        del train_survey, test_survey
        require_cell_sizes(f"{source}: labels T_eff and M_H", train.cell, N_CELLS, 2 * config.n_folds)
        star = np.flatnonzero(np.asarray(test.cell) >= 0)
        if len(star) < 2:
            where = config.test_file or "the simulated test survey"
            raise InputError(f"{where}: labels T_eff and M_H: found {len(star)} stars in the nine cells, expected at least 2")
    folds = np.asarray(assign_folds(keys.folds, train.cell, config.n_folds))
    with stages.steps("experts: nine cells, cross-validated", N_CELLS) as advance:
        experts = fit_experts(train.flux, train.log_g, train.cell, jnp.array(config.alphas), folds, on_fitted=advance)
    with stages("global ridge, cross-validated"):
        global_ridge = jax.block_until_ready(fit_global(train.flux, train.log_g, jnp.array(config.global_alphas), folds))
    with stages("features"):
        model = fit_features(keys.pca, train.flux, wave)
        train_features, test_features = (compute_features(model, stars.flux, wave) for stars in (train, test))
        if not bool(jnp.isfinite(train_features).all() & jnp.isfinite(test_features).all()):
            raise InputError(f"{source}: the gate features are not all finite, expected fluxes within float32's range")
    with stages("expert predictions"):
        train_predictions, test_predictions = (predict_experts(experts, stars.flux) for stars in (train, test))
        jax.block_until_ready((train_predictions, test_predictions))
    with stages("classification gate"):
        covered = np.flatnonzero(np.asarray(train.cell) >= 0)
        classifier = fit_classifier(
            *take_rows((train_features, train.cell), jnp.asarray(covered)),
            C_grid=config.C_grid,
            n_folds=config.n_folds,
            seed=config.seed,
        )
    with stages("regression gates"):
        fits = fit_regression_gates(keys, config, train, train_features, train_predictions, experts.out_of_fold)
    with stages("evaluation and bootstrap"):
        yhat, y, cell, test_features, test_flux = take_rows(
            (test_predictions, test.log_g, test.cell, test_features, test.flux), jnp.asarray(star)
        )
        gates = regression_gates(config)
        weights = {CLASSIFY: LinearGate().apply(classifier.params, test_features)}
        weights |= {method: gates[method.name].apply(fit.params, test_features) for method, fit in fits.items()}
        global_prediction = predict_ridge(global_ridge.ridge, test_flux)
        predictions = {
            GLOBAL: global_prediction,
            ORACLE: route_oracle(cell, yhat),
            CLASSIFY: route_soft(weights[CLASSIFY], yhat),
            HARD: route_hard(weights[CLASSIFY], yhat),
            FALLBACK: route_fallback(weights[CLASSIFY], yhat, global_prediction),
        } | {method: route_soft(weights[method], yhat) for method in fits}
        comparisons = compare(
            keys.bootstrap,
            y,
            predictions,
            cell,
            n_resamples=config.n_resamples,
            confidence_level=config.confidence_level,
        )
        return Results(
            overall=overall_table(y, predictions),
            bins=bin_table(y, predictions, cell, comparisons),
            bootstrap=bootstrap_table(comparisons),
            comparisons=comparisons,
            predictions=predictions,
            fits=fits,
            weights=weights,
            star=star,
            log_g=y,
            cell=cell,
            experts=experts,
            global_ridge=global_ridge,
            classifier=classifier,
            n_covered_train=len(covered),
        )


def prediction_table(results: Results) -> pd.DataFrame:
    """Every method's prediction of each covered test star."""
    columns = {"star": results.star, "bin": np.asarray(results.cell), "log_g": np.asarray(results.log_g)}
    return pd.DataFrame(columns | {method.column: np.asarray(results.predictions[method]) for method in METHODS})


def draw_figures(results: Results) -> dict[str, Figure]:
    """All figures by file name."""
    published = load_published()
    cross_fitted = [Method(name, PROTOCOLS[1]) for name in ("regress_mlp", "regress_linear")]
    shown = [GLOBAL, CLASSIFY, *cross_fitted]
    return {
        "r2_comparison": figures.r2_comparison(results.overall, published),
        "per_bin_delta": figures.per_bin_delta(results.comparisons),
        "mean_weights": figures.mean_weights({m: results.weights[m] for m in (CLASSIFY, *cross_fitted)}, published),
        "bootstrap": figures.bootstrap_histograms(results.comparisons),
        "loss_curves": figures.loss_curves(results.fits),
        "predicted_against_true": figures.predicted_against_true(results.log_g, {m: results.predictions[m] for m in shown}),
    }


def git_commit() -> str | None:
    """The commit of the code, marked where the working tree differs; None outside a checkout."""
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../moe_jax", "../pyproject.toml")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_run(config: RegressGateConfig, results: Results, seconds: Mapping[str, float]) -> dict[str, Any]:
    """What run.json holds: all that is needed to repeat the run and to judge it."""
    device = jax.devices()[0]
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // (1024 if sys.platform == "darwin" else 1)
    packages = ("moe_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "pandas", "h5py", "tables")
    return {
        "command": "python -m experiments.regress_gate",
        "config": json.loads(json.dumps(dataclasses.asdict(config), default=str)),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": f"{device.platform}: {device.device_kind}",
        "precision": f"{results.experts.coef.dtype}, matmul precision highest (no TF32)",
        "seconds": dict(seconds) | {"total": round(sum(seconds.values()), 3)},
        "peak_memory_gib": round(peak_kib / 2**20, 2),
        "n_covered_train": results.n_covered_train,
        "n_covered_test": len(results.star),
        "alpha": {
            "cells": [float(alpha) for alpha in results.experts.alpha],
            "cells_at_edge": [bool(edge) for edge in results.experts.at_edge],
            "global": float(results.global_ridge.alpha),
            "global_at_edge": bool(results.global_ridge.at_edge),
        },
        "classifier": results.classifier._asdict() | {"params": None, "test_accuracy": test_accuracy(results)},
        "gates": {
            method.column: {
                "best_epoch": int(fit.best_epoch) + 1,
                "epochs_run": int(np.isfinite(fit.train_loss).sum()),
                "stopped_early": bool(fit.stopped_early),
                "validation_loss": float(fit.validation_loss[int(fit.best_epoch)]),
            }
            for method, fit in results.fits.items()
        },
    }


def test_accuracy(results: Results) -> float:
    """Fraction of the covered test stars whose cell the classification gate finds."""
    return float(jnp.mean(jnp.argmax(results.weights[CLASSIFY], axis=1) == results.cell))


def found_notes(results: Results) -> list[str]:
    """The warnings of a run."""
    at_edge = [f"alpha of cell {k}" for k in np.flatnonzero(results.experts.at_edge)]
    at_edge += ["alpha of the global ridge"] * bool(results.global_ridge.at_edge)
    at_edge += ["C of the classification gate"] * results.classifier.at_edge
    undefined = sum(int(bootstrap.group_n_undefined.sum()) for bootstrap in results.comparisons.values())
    notes = warnings(results.fits, at_edge, undefined)
    return notes if results.classifier.converged else [*notes, "classification gate: the logistic regression did not converge."]


def write_results(
    folder: Path, config: RegressGateConfig, results: Results, drawn: Mapping[str, Figure], seconds: Mapping[str, float]
) -> None:
    """Writes tables, figures, report.md and run.json; all of them or none."""
    command = f"python -m experiments.regress_gate --preset {config.preset} --seed {config.seed}"
    data = f"{config.train_file} and {config.test_file}" if config.train_file else "simulated from the LTE grid"
    alphas = ", ".join(f"{float(alpha):g}" for alpha in results.experts.alpha)
    setup = (
        f"Data: {data}. Covered stars: {results.n_covered_train:,} to train, {len(results.star):,} to test. Noise level "
        f"{config.noise_level:g}, seed {config.seed}. {config.n_resamples:,} resamples of the test stars, "
        f"{config.confidence_level:.0%} percentile intervals. Alpha by cross-validation: {alphas} (cells), "
        f"{float(results.global_ridge.alpha):g} (global). Classification gate: C {results.classifier.C:g}, accuracy "
        f"{results.classifier.accuracy:.4f} (cross-validated), {test_accuracy(results):.4f} (test)."
    )
    with atomic_folder(folder) as temporary:
        for name, table in {
            "overall": results.overall,
            "per_bin": results.bins,
            "bootstrap": results.bootstrap,
            "predictions": prediction_table(results),
        }.items():
            table.to_csv(temporary / f"{name}.csv", index=False, float_format="%.7g")
        for name, figure in drawn.items():
            figures.save_figure(figure, temporary / f"{name}.png")
        report = write_report(
            title="Regression gates against the classification gate",
            command=command,
            setup=setup,
            overall=results.overall,
            bins=results.bins,
            comparisons=results.comparisons,
            bootstrap=results.bootstrap,
            fits=results.fits,
            notes=found_notes(results),
            weights=results.weights,
        )
        (temporary / "report.md").write_text(report)
        (temporary / "run.json").write_text(json.dumps(describe_run(config, results, seconds), indent=2) + "\n")


def print_table(results: Results) -> None:
    """The table at the end of a run."""
    published = load_published()["overall"]
    table = Table(title="log g of the covered test stars")
    for column in ("method", "protocol", "R2", "MAE", "RMSE", "rho", "report R2"):
        table.add_column(column, justify="left" if column in ("method", "protocol") else "right")
    for row in results.overall.to_dict("records"):
        report = published.get(row["method"]) if row["protocol"] != PROTOCOLS[1] else None
        numbers = [f"{row[column]:.4f}" for column in ("r2", "mae", "rmse", "rho")]
        table.add_row(row["method"], row["protocol"], *numbers, f"{report['r2']:.4f}" if report else "")
    console.print(table)
    for row in results.bootstrap.head(4).to_dict("records"):
        console.print(f"{row['comparison']:<42} {row['estimate']:+.4f} [{row['low']:+.4f}, {row['high']:+.4f}]", highlight=False)


def main(config: RegressGateConfig) -> Results:
    """Runs the experiment and writes its results."""
    if (config.train_file is None) != (config.test_file is None):
        missing, given = ("train", "test") if config.train_file is None else ("test", "train")
        raise InputError(f"--{given}-file was given without --{missing}-file, expected both or neither")
    stages = Stages()
    folder = config.output_dir or Path("results/regress_gate") / config.preset
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: found a file, expected a folder for the results")
    results = run(config, stages)
    with stages("figures"):
        drawn = draw_figures(results)
    write_results(folder, config, results, drawn, stages.seconds)
    print_table(results)
    for note in found_notes(results):
        console.print(f"warning: {note}", highlight=False)
    console.print("written: " + " ".join(str(path) for path in sorted(folder.iterdir())), highlight=False, soft_wrap=True)
    return results


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
