"""Can the uncertainties be trusted? Coverage of the calibrated intervals, and how far every method stands from the floor.

    python -m experiments.calibrate_uncertainty                  about three minutes on 2 cores
    python -m experiments.calibrate_uncertainty --preset smoke   small; about half a minute

A model is trained as by regress_gate (MLP gate, cross-fitted), its intervals are calibrated on stars of their own, and judged
on test stars that nothing was fitted, chosen or calibrated on. Results go to results/calibrate_uncertainty/PRESET.
"""

from __future__ import annotations

import dataclasses
import itertools
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy

from experiments.pipeline.calibration import (
    CalibrationConfig,
    LabelledPrediction,
    add_uncertainty,
    keep_calibration_stars,
    model_of,
    predict_labelled,
)
from experiments.pipeline.config import SMALL, DataConfig, OutputOptions, draw_keys
from experiments.pipeline.observation import Observation, observe_surveys
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared, Stars
from experiments.report import figures
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, run_command
from experiments.runner.stages import Stages, console
from moe_jax.apply.conformal import coverage_table
from moe_jax.apply.model import Model
from moe_jax.apply.uncertainty import PredictiveVariance, approximate_leverage, ridge_leverage
from moe_jax.core.arrays import InputError
from moe_jax.experts.cells import CELL_NAMES
from moe_jax.gates.networks import LinearGate, MLPGate
from moe_jax.gates.routing import route_oracle, route_soft
from moe_jax.gates.training import GateConfig, fit_gate
from moe_jax.spectra.fisher import fisher_information, log_g_floor
from moe_jax.spectra.survey import Labels

MAG_EDGES = (20.5, 21.0, 21.5, 22.0, 22.5)
MAG_NAMES = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(MAG_EDGES)]


@dataclass(frozen=True)
class UncertaintyConfig:
    """The model, its calibration, and its judgement."""

    preset: Literal["default", "smoke"] = "default"
    """Preset from which the other options start."""
    n_floor: int = 4_000
    """Test stars for which the Cramer-Rao floor is computed."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    mlp: MLPGate = group(MLPGate())
    data: DataConfig = group(DataConfig())
    calibration: CalibrationConfig = group(CalibrationConfig(), prefix=True)
    output: OutputOptions = group(OutputOptions())


PRESETS = {
    "default": UncertaintyConfig(),
    "smoke": UncertaintyConfig(
        preset="smoke",
        data=SMALL,
        gate=GateConfig(epochs=30),
        calibration=CalibrationConfig(n_stars=2_000, n_training=1_200),
        n_floor=200,
    ),
}


def train_model(config: UncertaintyConfig, prepared: Prepared) -> Model:
    """The mixture with a cross-fitted MLP gate."""
    stars = prepared.gate_stars()
    fit = fit_gate(draw_keys(config.data.seed).gates, config.mlp, stars.features, stars.predictions, stars.log_g, config.gate)
    return model_of(prepared, config.mlp, fit.params)


def leverage_check(prepared: Prepared, model: Model, train: Observation, test: Observation) -> pd.DataFrame:
    """The model's leverage of test stars beside the exact one, for the expert of the smallest and of the largest cell."""
    cell = np.asarray(prepared.train.cell)
    counts = np.bincount(cell[cell >= 0])
    flux = next(test.slices())[1][:500]
    assert model.uncertainty is not None
    approximate = np.asarray(approximate_leverage(model.uncertainty.leverage, flux))
    chosen: dict[int, list[np.ndarray]] = {int(counts.argmin()): [], int(counts.argmax()): []}
    for part, x, _ in train.slices():
        for k, spectra in chosen.items():
            spectra.append(np.asarray(x)[cell[part] == k])
    rows = []
    for k, spectra in chosen.items():
        exact = np.asarray(ridge_leverage(np.concatenate(spectra), float(prepared.experts.alpha[k]), flux))
        ratio = approximate[:, k] / exact
        row = {"expert": CELL_NAMES[k], "n": int(counts[k]), "exact_median": float(np.median(exact))}
        row |= {"ratio_median": float(np.median(ratio)), "ratio_low": float(np.quantile(ratio, 0.05))}
        correlation = float(scipy.stats.spearmanr(exact, approximate[:, k]).statistic)
        rows.append(row | {"ratio_high": float(np.quantile(ratio, 0.95)), "rank_correlation": correlation})
    return pd.DataFrame(rows)


def floor_table(config: UncertaintyConfig, prepared: Prepared, model: Model, test: Observation) -> pd.DataFrame:
    """RMSE of every method and the floor by magnitude, for covered test stars."""
    labels = test.labels
    stars: Stars = prepared.test
    rows = np.flatnonzero(np.asarray(stars.cell) >= 0)
    rows = rows[rows < config.n_floor]
    chosen = stars.select(rows)
    information = []
    for part, _, error in test.slices(0, int(rows.max()) + 1):
        labels_of_part = Labels(*(jnp.asarray(column)[part] for column in labels))
        information.append(fisher_information(labels_of_part, error))
    floor, bayes = (log_g_floor(np.concatenate(information)[rows], prior=prior) for prior in (False, True))
    classify = LinearGate().apply(prepared.classifier.params, chosen.features)
    predictions = {
        "global ridge": chosen.global_prediction,
        "oracle": route_oracle(chosen.cell, chosen.predictions),
        "classification gate": route_soft(classify, chosen.predictions),
        "MLP gate": route_soft(model.gate.apply(model.gate_params, chosen.features), chosen.predictions),
    }
    errors = {name: np.asarray(prediction) - np.asarray(chosen.log_g) for name, prediction in predictions.items()}
    mag = np.asarray(labels.mag)[rows]
    table = []
    for name, low, high in zip(["all", *MAG_NAMES], (-np.inf, *MAG_EDGES[:-1]), (np.inf, *MAG_EDGES[1:]), strict=True):
        in_bin = (mag >= low) & (mag < high)
        if not in_bin.any():
            continue
        row: dict[str, Any] = {"mag": name, "n": int(in_bin.sum()), "floor": float(np.sqrt(np.mean(floor[in_bin] ** 2)))}
        row["floor_with_prior"] = float(np.sqrt(np.mean(bayes[in_bin] ** 2)))
        row |= {method: float(np.sqrt(np.mean(residual[in_bin] ** 2))) for method, residual in errors.items()}
        table.append(row)
    return pd.DataFrame(table)


class Judgement(NamedTuple):
    """All that is reported."""

    coverage: pd.DataFrame
    outside: pd.DataFrame  #: coverage of the stars outside the cells
    variance: pd.DataFrame
    quantiles: pd.DataFrame
    leverage: pd.DataFrame
    floor: pd.DataFrame
    flagged: pd.DataFrame
    rank: float  #: correlation of |error| and uncertainty
    n_covered: int
    n_calibration: int
    notes: list[str]


def judge_uncertainty(config: UncertaintyConfig, stages: Stages) -> tuple[Judgement, LabelledPrediction]:
    """Trains, calibrates, and judges; also what the model says of the covered test stars."""
    prepared = prepare(config.data, stages, config.output.cache)
    with stages("MLP gate"):
        model = jax.block_until_ready(train_model(config, prepared))
    model, notes = add_uncertainty(config.data, config.calibration, prepared, model, stages)
    assert model.uncertainty is not None
    calibration = model.uncertainty.calibration
    levels = [round(float(level), 6) for level in np.asarray(calibration.levels)]
    if not levels:
        raise InputError("no stars were left to calibrate on, expected --calibration.file, or fewer stars to train on")
    with stages("test stars"):
        train, test = observe_surveys(config.data)
        everyone = predict_labelled(model, test)
        judged, outside = everyone.select(everyone.cell >= 0), everyone.select(everyone.cell < 0)
    with stages("exact leverage"):
        leverage = leverage_check(prepared, model, train, test)
    with stages("Cramer-Rao floor"):
        floor = floor_table(config, prepared, model, test)
    groups = {"cell": judged.cell, "mag": np.digitize(judged.mag, MAG_EDGES) - 1}
    names = {"cell": list(CELL_NAMES), "mag": MAG_NAMES}
    scales = np.asarray(model.uncertainty.part_scales)
    parts = judged.parts.mean(axis=0)
    share = parts * scales / (parts @ scales)
    parts_table = {"part": PredictiveVariance._fields, "mean_variance": parts, "factor": scales, "share": share}
    quantiles = pd.DataFrame(np.asarray(calibration.quantiles), columns=[f"{level:.0%}" for level in levels])
    n_stars = np.asarray(calibration.n_stars).astype(int)
    quantiles = pd.concat([pd.DataFrame({"expert": CELL_NAMES[: len(n_stars)], "n": n_stars}), quantiles], axis=1)
    both = {"covered": judged, "outside the cells": outside}
    flagged = [
        {"stars": name, "n": len(s.mag), "flagged": float(np.mean(s.distance > 1))} for name, s in both.items() if len(s.mag)
    ]
    judgement = Judgement(
        coverage=coverage_table(judged.residual, judged.half_width, np.array(levels), groups, names),
        outside=coverage_table(outside.residual, outside.half_width, np.array(levels), {}, {}),
        variance=pd.DataFrame(parts_table),
        quantiles=quantiles,
        leverage=leverage,
        floor=floor,
        flagged=pd.DataFrame(flagged),
        rank=float(scipy.stats.spearmanr(np.abs(judged.residual), judged.sigma).statistic),
        n_covered=prepared.n_covered,
        n_calibration=int(n_stars.sum()),
        notes=notes,
    )
    return judgement, judged


def sections_of(config: UncertaintyConfig, judgement: Judgement, n_test: int) -> list[str]:
    """The paragraphs of report.md."""
    levels = sorted(judgement.coverage["level"].unique())
    thirds = dict.fromkeys(["coverage", "low", "high", "half_width", "ratio_median", "ratio_low", "ratio_high"], ".3f")
    shape = thirds | {"level": ".2f", "share": ".1%", "flagged": ".2%", "mean_variance": ".5f", "factor": ".3g"}
    normal = ", ".join(f"{scipy.stats.norm.ppf(0.5 + level / 2):.2f}" for level in levels)
    return [
        f"Nine ridge experts and a cross-fitted MLP gate, trained on {judgement.n_covered:,} covered stars; intervals "
        f"calibrated on {judgement.n_calibration:,} others, by the likeliest cell (split-conformal); judged on {n_test:,} "
        f"covered test stars. {config.data.described_noise}, seed {config.data.seed}.",
        *[f"Warning: {note}." for note in judgement.notes],
        "## Coverage",
        table_markdown(judgement.coverage, shape),
        "*low*, *high*: 95 % interval of the coverage (Clopper-Pearson); *half width*: mean over the stars. Intervals promise "
        "their level to the stars that the classification gate puts into one cell, not to those of one true cell or magnitude.",
        "![Coverage](coverage.png)",
        "![Error against uncertainty](error_against_uncertainty.png)",
        f"Rank correlation of |error| and uncertainty: {judgement.rank:.3f}.",
        "## What the variance is made of",
        table_markdown(judgement.variance, shape),
        "*mean variance*: over the test stars; *factor*: by which a part counts, from the errors of other calibration stars, a "
        "third as many (maximum likelihood; the noise counts in full); *share*: of sigma squared, the sum with these factors.",
        f"Quantiles of |error| / sigma on the other calibration stars; of a normal distribution they are {normal}:",
        table_markdown(judgement.quantiles, {name: ".2f" for name in judgement.quantiles.columns}),
        "## Leverage",
        table_markdown(judgement.leverage, shape),
        "*exact*: the kernel form with all training spectra, for 500 test stars; *ratio*: of what the model keeps to it (median, "
        "5 % and 95 % quantiles).",
        "## The floor",
        table_markdown(judgement.floor),
        "Root mean squared error of log g of the first covered test stars by magnitude, beside the root mean square of the "
        "Cramer-Rao floor (T_eff, [M/H] and [alpha/M] unknown). *floor with prior*: the same with the information of normal "
        "priors of the labels that have the variance of the survey's ranges (van Trees). It is no floor for a method that "
        "knows more of the survey: that most labels lie on nodes of a lattice.",
        "![Cramer-Rao floor](cramer_rao.png)",
        "## Stars outside the cells",
        table_markdown(judgement.flagged, shape),
        "*flagged*: further from the training stars in feature space than all but 0.1 % of them. What the intervals cover of the "
        "stars outside the cells, to which nothing is promised:",
        table_markdown(judgement.outside, shape),
    ]


def compute(config: UncertaintyConfig, stages: Stages) -> Results:
    """Judges the uncertainties."""
    config = dataclasses.replace(config, data=keep_calibration_stars(config.data, config.calibration, stages))
    judgement, judged = judge_uncertainty(config, stages)
    with stages("figures"):
        drawn = {
            "coverage": figures.coverage_plot(judgement.coverage),
            "error_against_uncertainty": figures.error_against_uncertainty(judged.half_width[:, 0], np.abs(judged.residual)),
            "cramer_rao": figures.floor_plot(judgement.floor[judgement.floor["mag"] != "all"]),
        }
    for row in judgement.coverage[judgement.coverage["by"] == "all"].to_dict("records"):
        actual = f"{row['coverage']:.2%} [{row['low']:.2%}, {row['high']:.2%}]"
        console.print(f"{row['level']:.0%} intervals cover {actual}, mean half-width {row['half_width']:.3f}", highlight=False)
    return Results(
        "Can the uncertainties be trusted?",
        sections_of(config, judgement, len(judged.mag)),
        {name: table for name, table in judgement._asdict().items() if isinstance(table, pd.DataFrame)},
        drawn,
        {"rank_correlation": judgement.rank, "notes": judgement.notes},
    )


main = Study("calibrate_uncertainty", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
