"""Can the uncertainties be trusted? Coverage of the calibrated intervals, and how far every method stands from the floor.

    python -m experiments.calibrate_uncertainty                  about three minutes on 2 cores
    python -m experiments.calibrate_uncertainty --preset smoke   small; about half a minute

A model is trained as by regress_gate (MLP gate, cross-fitted), its intervals are calibrated on stars of their own, and judged
on test stars that nothing was fitted, chosen or calibrated on. Results go to results/calibrate_uncertainty/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy

from experiments.pipeline.calibration import (
    MAG_EDGES,
    MAG_NAMES,
    CalibrationConfig,
    add_uncertainty,
    keep_calibration_stars,
    model_of,
    predict_labelled,
)
from experiments.pipeline.config import SMALL, DataConfig, StudyConfig, draw_keys
from experiments.pipeline.gates import GateRun, fit_run
from experiments.pipeline.prepare import prepare
from experiments.pipeline.stars import Prepared
from experiments.pipeline.surveys import Observation, observe_surveys, require_grid_pixels
from experiments.report import figures
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages, console
from moe_jax.apply.conformal import coverage_table
from moe_jax.apply.model import Model
from moe_jax.apply.uncertainty import PredictiveVariance, approximate_leverage, ridge_leverage
from moe_jax.core.arrays import InputError
from moe_jax.experts.cells import CELL_NAMES
from moe_jax.gates import GateConfig, LinearGate, MLPGate, route_oracle, route_soft
from moe_jax.spectra import Labels, load_grid
from moe_jax.spectra.broadening import broaden_grid
from moe_jax.spectra.fisher import fisher_information, log_g_floor


@dataclass(frozen=True)
class UncertaintyConfig(StudyConfig):
    """The model, its calibration, and its judgement."""

    n_floor: int = 4_000
    """Test stars for which the Cramer-Rao floor is computed."""
    gate: GateConfig = group(GateConfig(), prefix=True)
    mlp: MLPGate = group(MLPGate())
    data: DataConfig = group(DataConfig())
    calibration: CalibrationConfig = group(CalibrationConfig(), prefix=True)

    def __post_init__(self) -> None:
        require_at_least(self, n_floor=1)
        self.data.experts.require_nine_experts()


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
        row = {"expert": CELL_NAMES[k], "n": counts[k], "exact_median": np.median(exact), "ratio_median": np.median(ratio)}
        row |= {"ratio_low": np.quantile(ratio, 0.05), "ratio_high": np.quantile(ratio, 0.95)}
        rows.append(row | {"rank_correlation": scipy.stats.spearmanr(exact, approximate[:, k]).statistic})
    return pd.DataFrame(rows)


def floor_table(config: UncertaintyConfig, prepared: Prepared, model: Model, test: Observation) -> pd.DataFrame:
    """RMSE of every method and the floor by magnitude, for covered test stars."""
    rows = np.flatnonzero(np.asarray(prepared.test.cell) >= 0)
    rows = rows[rows < config.n_floor]
    chosen = prepared.test.select(rows)
    grid = broaden_grid(load_grid(), config.data.resolution)
    information = [
        fisher_information(Labels(*(jnp.asarray(column)[part] for column in test.labels)), error, grid)
        for part, _, error in test.slices(0, int(rows.max()) + 1)
    ]
    floor, bayes = (log_g_floor(np.concatenate(information)[rows], prior=prior) for prior in (False, True))
    classify = LinearGate().apply(prepared.classifier.params, chosen.features)
    predictions = {"global ridge": chosen.global_prediction} if prepared.has_global_ridge else {}
    predictions |= {
        "oracle": route_oracle(chosen.cell, chosen.predictions),
        "classification gate": route_soft(classify, chosen.predictions),
        "MLP gate": route_soft(model.gate.apply(model.gate_params, chosen.features), chosen.predictions),
    }
    errors = {"floor": floor, "floor_with_prior": bayes}
    errors |= {name: np.asarray(prediction) - np.asarray(chosen.log_g) for name, prediction in predictions.items()}
    mag = np.digitize(np.asarray(test.labels.mag)[rows], MAG_EDGES) - 1
    bins = {"all": np.ones(len(mag), bool)} | {name: mag == i for i, name in enumerate(MAG_NAMES)}
    return pd.DataFrame(
        {"mag": name, "n": in_bin.sum()} | {column: np.sqrt(np.mean(error[in_bin] ** 2)) for column, error in errors.items()}
        for name, in_bin in bins.items()
        if in_bin.any()
    )


def sections_of(
    config: UncertaintyConfig, tables: dict[str, pd.DataFrame], notes: list[str], rank: float, n_covered: int, n_test: int
) -> list[str]:
    """The paragraphs of report.md."""
    levels = sorted(tables["coverage"]["level"].unique())
    thirds = dict.fromkeys(["coverage", "low", "high", "half_width", "ratio_median", "ratio_low", "ratio_high"], ".3f")
    shape = thirds | {"level": ".2f", "share": ".1%", "flagged": ".2%", "mean_variance": ".5f", "factor": ".3g"}
    normal = ", ".join(f"{scipy.stats.norm.ppf(0.5 + level / 2):.2f}" for level in levels)
    return [
        f"Nine ridge experts and a cross-fitted MLP gate, trained on {n_covered:,} covered stars; intervals "
        f"calibrated on {tables['quantiles']['n'].sum():,} others, by the likeliest cell (split-conformal); judged on {n_test:,} "
        f"covered test stars. {config.data.described_noise}, seed {config.data.seed}.",
        *[f"Warning: {note}." for note in notes],
        "## Coverage",
        table_markdown(tables["coverage"], shape),
        "*low*, *high*: 95 % interval of the coverage (Clopper-Pearson); *half width*: mean over the stars. Intervals promise "
        "their level to the stars that the classification gate puts into one cell, not to those of one true cell or magnitude.",
        "![Coverage](coverage.png)",
        "![Error against uncertainty](error_against_uncertainty.png)",
        f"Rank correlation of |error| and uncertainty: {rank:.3f}.",
        "## What the variance is made of",
        table_markdown(tables["variance"], shape),
        "*mean variance*: over the test stars; *factor*: by which a part counts, from the errors of other calibration stars, a "
        "third as many (maximum likelihood; the noise counts in full); *share*: of sigma squared, the sum with these factors.",
        f"Quantiles of |error| / sigma on the other calibration stars; of a normal distribution they are {normal}:",
        table_markdown(tables["quantiles"], {name: ".2f" for name in tables["quantiles"].columns}),
        "## Leverage",
        table_markdown(tables["leverage"], shape),
        "*exact*: the kernel form with all training spectra, for 500 test stars; *ratio*: of what the model keeps to it (median, "
        "5 % and 95 % quantiles).",
        "## The floor",
        table_markdown(tables["floor"]),
        "Root mean squared error of log g of the first covered test stars by magnitude, beside the root mean square of the "
        "Cramer-Rao floor (T_eff, [M/H] and [alpha/M] unknown). *floor with prior*: the same with the information of normal "
        "priors of the labels that have the variance of the survey's ranges (van Trees). It is no floor for a method that "
        "knows more of the survey: that most labels lie on nodes of a lattice.",
        "![Cramer-Rao floor](cramer_rao.png)",
        "## Stars outside the cells",
        table_markdown(tables["flagged"], shape),
        "*flagged*: further from the training stars in feature space than all but 0.1 % of them. What the intervals cover of the "
        "stars outside the cells, to which nothing is promised:",
        table_markdown(tables["outside"], shape),
    ]


def compute(config: UncertaintyConfig, stages: Stages) -> Results:
    """Trains, calibrates, and judges the uncertainties."""
    require_grid_pixels(config.data)
    config = dataclasses.replace(config, data=keep_calibration_stars(config.data, config.calibration, stages))
    prepared = prepare(config.data, stages, config.output.cache)
    with stages("MLP gate"):
        key, run = draw_keys(config.data.seed).gates, GateRun(config.mlp, config.gate)
        fit = jax.block_until_ready(fit_run(key, config.data, prepared, run))
    mixture = model_of(prepared, config.mlp, fit.params, config.data.resolution)
    model, notes = add_uncertainty(config.data, config.calibration, prepared, mixture, stages)
    assert model.uncertainty is not None
    calibration = model.uncertainty.calibration
    levels = np.array([round(float(level), 6) for level in np.asarray(calibration.levels)])
    if not len(levels):
        raise InputError("no stars were left to calibrate on, expected --calibration.file, or fewer stars to train on")
    with stages("test stars"):
        train, test = observe_surveys(config.data)
        everyone = predict_labelled(model, test)
        judged, outside = everyone.select(everyone.cell >= 0), everyone.select(everyone.cell < 0)
    with stages("exact leverage"):
        leverage = leverage_check(prepared, model, train, test)
    with stages("Cramer-Rao floor"):
        floor = floor_table(config, prepared, model, test)
    scales, parts = np.asarray(model.uncertainty.part_scales), judged.parts.mean(axis=0)
    variance = {"part": PredictiveVariance._fields, "mean_variance": parts, "factor": scales}
    n_stars = np.asarray(calibration.n_stars).astype(int)
    quantiles = pd.DataFrame({"expert": CELL_NAMES[: len(n_stars)], "n": n_stars})
    quantiles[[f"{level:.0%}" for level in levels]] = np.asarray(calibration.quantiles)
    flagged = [
        {"stars": name, "n": len(stars.mag), "flagged": float(np.mean(stars.distance > 1))}
        for name, stars in (("covered", judged), ("outside the cells", outside))
        if len(stars.mag)
    ]
    tables = {
        "coverage": judged.coverage(levels),
        "outside": coverage_table(outside.residual, outside.half_width, levels, {}, {}),
        "variance": pd.DataFrame(variance | {"share": parts * scales / (parts @ scales)}),
        "quantiles": quantiles,
        "leverage": leverage,
        "floor": floor,
        "flagged": pd.DataFrame(flagged),
    }
    with stages("figures"):
        drawn = {
            "coverage": figures.coverage_plot(tables["coverage"]),
            "error_against_uncertainty": figures.error_against_uncertainty(judged.half_width[:, 0], np.abs(judged.residual)),
            "cramer_rao": figures.floor_plot(floor[floor["mag"] != "all"]),
        }
    for row in tables["coverage"][tables["coverage"]["by"] == "all"].to_dict("records"):
        actual = f"{row['coverage']:.2%} [{row['low']:.2%}, {row['high']:.2%}]"
        console.print(f"{row['level']:.0%} intervals cover {actual}, mean half-width {row['half_width']:.3f}")
    rank = float(scipy.stats.spearmanr(np.abs(judged.residual), judged.sigma).statistic)
    sections = sections_of(config, tables, notes, rank, prepared.n_covered, len(judged.mag))
    return Results("Can the uncertainties be trusted?", sections, tables, drawn, {"rank_correlation": rank, "notes": notes})


main = Study("calibrate_uncertainty", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
