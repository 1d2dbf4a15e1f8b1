"""Is a gate trained to classify also the best for regressing? Nine ridge experts, a classification gate, regression gates.

    python -m experiments.regress_gate                      32,000 training and 1,000 test stars, about a minute on 2 cores
    python -m experiments.regress_gate --preset smoke       everything, small: 90 s at first, 20 s once compiled
    python -m experiments.regress_gate --preset large_test  10,000 test stars
    python -m experiments.regress_gate --train-file a.h5 --test-file b.h5
    python -m experiments.regress_gate --chunk-stars 100000 --n-train 1000000     more stars than fit into memory

Expect R2 0.91 to 0.95 for the mixtures of the default run: the linear gate in-sample below the classification gate, the MLP
gates above it. The smoke run has few stars and gates that have not converged: R2 0.51 to 0.83.
Tables, figures, report.md and the trained model go to results/regress_gate/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd

from experiments.pipeline.calibration import CalibrationConfig, add_uncertainty, keep_calibration_stars, model_of
from experiments.pipeline.config import SURVEYS, BootstrapOptions, DataConfig, StudyConfig, draw_keys
from experiments.pipeline.gates import GateRun, fit_run
from experiments.pipeline.local import LocalConfig, add_local
from experiments.pipeline.methods import CLASSIFY, CROSS_FITTED, FALLBACK, GLOBAL, HARD, ORACLE, REGRESSION_GATES, Method
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.report import figures
from experiments.report.local import judge_local
from experiments.report.markdown import interval, load_published, report_sections, warnings
from experiments.report.results import Results, Study
from experiments.report.tables import Outcome, bin_table, bootstrap_table, compare, overall_table
from experiments.runner.command_line import Cluster, group, require_fraction, run_command
from experiments.runner.stages import Stages, console
from moe_jax.apply.model_file import save_model
from moe_jax.core.arrays import InputError
from moe_jax.gates import Gate, GateConfig, GateFit, LinearGate, MLPGate, route_fallback, route_hard, route_oracle, route_soft


@dataclass(frozen=True)
class RegressGateConfig(StudyConfig):
    """The experiment; its defaults are the report's."""

    in_sample_fraction: float = 0.2
    """Fraction of the covered training stars on which the in-sample gates are trained."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    mlp: MLPGate = group(MLPGate())
    data: DataConfig = group(SURVEYS["default"])
    bootstrap: BootstrapOptions = group(BootstrapOptions())
    calibration: CalibrationConfig = group(CalibrationConfig(), prefix=True)
    local: LocalConfig = group(LocalConfig(), prefix=True)
    cluster: Cluster = group(Cluster(), prefix=True)

    def __post_init__(self) -> None:
        if self.cluster.join and not self.data.chunk_stars:
            raise InputError("--cluster.join was given without --chunk-stars: processes take turns at chunks, expected both")
        require_fraction(self, "in_sample_fraction")
        self.data.experts.require_nine_experts()


PRESETS = {
    "default": RegressGateConfig(),
    "smoke": RegressGateConfig("smoke", in_sample_fraction=1.0, gate=GateConfig(epochs=30), data=SURVEYS["smoke"]),
    "large_test": RegressGateConfig("large_test", data=SURVEYS["large_test"]),
}


def fit_regression_gates(config: RegressGateConfig, prepared: Prepared) -> dict[Method, GateFit]:
    """The MLP and the linear regression gate by both protocols."""
    key, gates, fits = draw_keys(config.data.seed).gates, regression_gates(config), {}
    for i, method in enumerate(REGRESSION_GATES):
        fraction = 1.0 if method.protocol == CROSS_FITTED else config.in_sample_fraction
        of_method = GateRun(gates[method.name], config.gate, method.protocol, fraction)
        fits[method] = fit_run(jax.random.fold_in(key, i), config.data, prepared, of_method)
    return jax.block_until_ready(fits)


def regression_gates(config: RegressGateConfig) -> dict[str, Gate]:
    """The gates that are trained on the squared error of the mixture."""
    return {"regress_mlp": config.mlp, "regress_linear": LinearGate()}


def run(config: RegressGateConfig, stages: Stages) -> Outcome:
    """The whole experiment: data, experts, features, gates, evaluation."""
    prepared = prepare(config.data, stages, config.output.cache)
    with stages("regression gates"):
        fits = fit_regression_gates(config, prepared)
    with stages("evaluation and bootstrap"):
        test = prepared.test.covered()
        gates = regression_gates(config)
        weights = {CLASSIFY: LinearGate().apply(prepared.classifier.params, test.features)}
        weights |= {method: gates[method.name].apply(fit.params, test.features) for method, fit in fits.items()}
        predictions = {
            GLOBAL: test.global_prediction,
            ORACLE: route_oracle(test.cell, test.predictions),
            CLASSIFY: route_soft(weights[CLASSIFY], test.predictions),
            HARD: route_hard(weights[CLASSIFY], test.predictions),
            FALLBACK: route_fallback(weights[CLASSIFY], test.predictions, test.global_prediction),
        } | {method: route_soft(weights[method], test.predictions) for method in fits}
        if not prepared.has_global_ridge:
            del predictions[GLOBAL], predictions[FALLBACK]
        key = draw_keys(config.data.seed).bootstrap
        comparisons = compare(key, test.log_g, predictions, test.cell, **config.bootstrap.arguments)
        return Outcome(
            overall=overall_table(test.log_g, predictions),
            bins=bin_table(test.log_g, predictions, test.cell, comparisons),
            bootstrap=bootstrap_table(comparisons),
            comparisons=comparisons,
            predictions=predictions,
            fits=fits,
            weights=weights,
            test=test,
            prepared=prepared,
        )


def prediction_table(results: Outcome) -> pd.DataFrame:
    """Every method's prediction of each covered test star."""
    star = np.flatnonzero(np.asarray(results.prepared.test.cell) >= 0)
    columns = {"star": star, "bin": np.asarray(results.test.cell), "log_g": np.asarray(results.test.log_g)}
    return pd.DataFrame(columns | {method.column: np.asarray(of_method) for method, of_method in results.predictions.items()})


def draw_figures(results: Outcome, confidence_level: float) -> dict[str, figures.Figure]:
    """All figures by file name."""
    published = load_published()
    cross_fitted = [method for method in REGRESSION_GATES if method.protocol == CROSS_FITTED]
    shown = [method for method in (GLOBAL, CLASSIFY, *cross_fitted) if method in results.predictions]
    return {
        "r2_comparison": figures.r2_comparison(results.overall, published),
        "per_bin_delta": figures.per_bin_delta(results.comparisons, confidence_level),
        "mean_weights": figures.mean_weights({m: results.weights[m] for m in (CLASSIFY, *cross_fitted)}, published),
        "bootstrap": figures.bootstrap_histograms(results.comparisons, confidence_level),
        "loss_curves": figures.loss_curves(results.fits),
        "predicted_against_true": figures.predicted_against_true(results.test.log_g, {m: results.predictions[m] for m in shown}),
    }


def describe_choices(results: Outcome) -> dict[str, Any]:
    """The hyper-parameters that were chosen, and how the gates' training ended."""
    experts, global_ridge = results.prepared.experts, results.prepared.global_ridge
    has_global = results.prepared.has_global_ridge
    return {
        "n_covered_train": results.prepared.n_covered,
        "n_covered_test": len(results.test.log_g),
        "alpha": {
            "cells": np.asarray(experts.alpha).tolist(),
            "cells_at_edge": np.asarray(experts.at_edge).tolist(),
            "global": float(global_ridge.alpha) if has_global else None,
            "global_at_edge": bool(global_ridge.at_edge),
        },
        "classifier": results.prepared.classifier._asdict() | {"params": None, "test_accuracy": test_accuracy(results)},
        "gates": {
            method.column: {
                "best_epoch": int(fit.best_epoch) + 1,
                "epochs_run": int(np.isfinite(fit.train_loss).sum()),
                "stopped_early": bool(fit.stopped_early),
                "gradient_norm": float(fit.gradient_norm),
                "converged": bool(fit.converged),
                "validation_loss": float(fit.validation_loss[int(fit.best_epoch)]),
            }
            for method, fit in results.fits.items()
        },
    }


def test_accuracy(results: Outcome) -> float:
    """Fraction of the covered test stars whose cell the classification gate finds."""
    return float(np.mean(np.argmax(results.weights[CLASSIFY], axis=1) == np.asarray(results.test.cell)))


def sections_of(config: RegressGateConfig, results: Outcome) -> list[str]:
    """The paragraphs of report.md."""
    prepared, options = results.prepared, config.data
    data = f"{options.train_file} and {options.test_file}" if options.train_file else "simulated from the LTE grid"
    alphas = ", ".join(f"{float(alpha):g}" for alpha in np.asarray(prepared.experts.alpha))
    of_global = f"{float(prepared.global_ridge.alpha):g} (global)" if prepared.has_global_ridge else "no global ridge"
    setup = (
        f"Data: {data}. Covered stars: {prepared.n_covered:,} to train, {len(results.test.log_g):,} to test. "
        f"{options.described_noise}, seed {options.seed}. {config.bootstrap.n_resamples:,} resamples of the test stars, "
        f"{100 * config.bootstrap.confidence_level:g}% {config.bootstrap.interval_method} intervals. Alpha by cross-validation: "
        f"{alphas} (cells), {of_global}. Classification gate: C {prepared.classifier.C:g}, "
        f"accuracy {prepared.classifier.accuracy:.4f} (cross-validated), {test_accuracy(results):.4f} (test)."
    )
    return report_sections(setup, results, config.in_sample_fraction)


CHOSEN = Method("regress_mlp", CROSS_FITTED)  # the gate of the model that is written


def provenance_of(results: Outcome, run_json: dict[str, Any]) -> dict[str, Any]:
    """Where the model came from, and what it scored."""
    scores = results.overall[(results.overall["method"] == CHOSEN.name) & (results.overall["protocol"] == CHOSEN.protocol)]
    names = ("command", "config", "git_commit", "versions", "device", "precision", "n_covered_train", "n_covered_test")
    return {name: run_json[name] for name in names} | {"test_r2": float(scores["r2"].iloc[0])}


def print_table(results: Outcome) -> None:
    """The table at the end of a run."""
    published, overall = load_published()["overall"], results.overall
    report = overall["method"].map(lambda name: published.get(name, {}).get("r2")).where(overall["protocol"] != CROSS_FITTED)
    shown = overall.assign(report_r2=report).to_string(index=False, float_format="%.4f", na_rep="")
    console.print(f"log g of the covered test stars\n{shown}")
    for row in results.bootstrap.head(4).to_dict("records"):
        console.print(f"{row['comparison']:<42} {interval(row['estimate'], row['low'], row['high'])}")


def compute(config: RegressGateConfig, stages: Stages) -> Results:
    """Runs the experiment, and adds uncertainties and local linear experts to the model of the chosen gate."""
    config.cluster.start()
    config = dataclasses.replace(config, data=keep_calibration_stars(config.data, config.calibration, stages))
    results = run(config, stages)
    with stages("figures"):
        drawn = draw_figures(results, config.bootstrap.confidence_level)
    mixture = model_of(results.prepared, regression_gates(config)[CHOSEN.name], results.fits[CHOSEN].params, config.data.resolution)
    model, notes = add_uncertainty(config.data, config.calibration, results.prepared, mixture, stages)
    print_table(results)
    model, local, more_notes = add_local(config.data, config.local, config.calibration, model, stages, config.output.cache)
    tables = {"overall": results.overall, "per_bin": results.bins, "bootstrap": results.bootstrap}
    tables["predictions"], sections = prediction_table(results), sections_of(config, results)
    if local is not None:
        local_tables, local_sections = judge_local(config.data, config.bootstrap, local, results.predictions[CHOSEN])
        console.print(local_sections[1])
        tables |= local_tables
        sections += local_sections
    for note in [*warnings(results), *notes, *more_notes]:
        console.print(f"warning: {note}")

    def write_model(folder: Path, run_json: dict[str, Any]) -> None:
        save_model(folder / "model", model._replace(provenance=provenance_of(results, run_json)))

    title = "Regression gates against the classification gate"
    return Results(title, sections, tables, drawn, describe_choices(results), write_model)


main = Study("regress_gate", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
