"""What a trained model is told of its own uncertainty: sums over training stars, and stars to calibrate on."""

from __future__ import annotations

import dataclasses
import itertools
import operator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
import pandas as pd

from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.stars import Prepared
from experiments.pipeline.surveys import SLICE, Observation, observe, observe_surveys
from experiments.runner.stages import Stages
from moe_jax.apply.conformal import LEVELS, calibrate, coverage_table, no_calibration
from moe_jax.apply.model import Model, Uncertainty, predict_model
from moe_jax.apply.novelty import fit_feature_range
from moe_jax.apply.uncertainty import (
    N_DIRECTIONS,
    PredictiveVariance,
    approximate_leverage,
    fit_leverage,
    fit_part_scales,
    misfit_variance,
    residual_variance,
    sum_flux,
)
from moe_jax.core.arrays import InputError
from moe_jax.core.pca import fit_pca
from moe_jax.experts.cells import CELL_NAMES
from moe_jax.gates import Gate, route_soft
from moe_jax.gates.optimize import Params
from moe_jax.spectra.simulate import SimulatedSpectra
from moe_jax.spectra.survey import Spectra
from moe_jax.spectra.survey_file import SurveyFile

SCALING = 4  # of so many stars to calibrate on, one is for the factors of the variance's parts, the others for the quantiles
LEAST_SCALING = 100  # with fewer stars the factors stay at 1
LEAST_KEPT = 600  # fewer stars of a training file are not kept to calibrate on: a cell would have less than 60
SCALED = 0.05  # spectra whose medians scatter by less than this part were scaled to a common median
MAG_EDGES = (20.5, 21.0, 21.5, 22.0, 22.5)
MAG_NAMES = tuple(f"{low:g} to {high:g}" for low, high in itertools.pairwise(MAG_EDGES))


@dataclass(frozen=True)
class CalibrationConfig:
    """How the uncertainties of a model are found."""

    n_stars: int = 4_000
    """Stars on which intervals are calibrated, at most; they are neither trained nor tested on. 0: not calibrated."""
    file: Path | None = None
    """HDF5 survey with such stars. By default they are simulated, or those of the training file after the first n_train; without
    n_train, its last tenth is kept for them if that is 600 stars or more. Where none are left, training stars stand in, with
    predictions of experts that did not see them."""
    n_training: int = 8_192
    """Training stars from which the covariance of the flux is taken, at most."""

    def __post_init__(self) -> None:
        if self.n_stars < 0:
            raise InputError(f"calibration.n_stars is {self.n_stars}, expected at least 0")
        if self.n_training < 100:
            raise InputError(f"calibration.n_training is {self.n_training}, expected at least 100")


def model_of(prepared: Prepared, gate: Gate, gate_params: Params, resolution: float) -> Model:
    """The mixture of the prepared experts with a gate; its uncertainty and provenance are still to come."""
    return Model(
        wave=np.asarray(prepared.wave),
        experts=prepared.experts.ridge,
        global_ridge=prepared.global_ridge.ridge,
        features=prepared.model,
        gate=gate,
        gate_params=gate_params,
        classification_params=prepared.classifier.params,
        provenance={},
        resolution=resolution,
    )


def keep_calibration_stars(config: DataConfig, settings: CalibrationConfig, stages: Stages) -> DataConfig:
    """The configuration with a number of training stars that leaves the last tenth of a training file to calibrate on.

    None are left where a tenth would be too few. Nothing changes where stars are simulated, a number of training stars was given,
    or the calibration needs none of them.
    """
    if config.train_file is None or config.n_train or settings.file is not None or settings.n_stars == 0:
        return config
    n_stars = SurveyFile(config.train_file, columns=config.label_columns).n_stars
    n_kept = min(settings.n_stars, n_stars // 10) if n_stars // 10 >= LEAST_KEPT else 0
    if n_kept:
        stages.note(f"{config.train_file}: the last {n_kept:,} of {n_stars:,} stars are kept to calibrate the uncertainties on")
    return dataclasses.replace(config, n_train=n_stars - n_kept)


def observe_calibration_stars(config: DataConfig, settings: CalibrationConfig) -> tuple[Observation, int] | None:
    """The stars to calibrate on, and the first of them; None where there are none."""
    if settings.n_stars == 0:
        return None
    key_stars, key_noise = jax.random.split(jax.random.fold_in(draw_keys(config.seed).train, 1))
    start = 0 if settings.file is not None or config.train_file is None else config.n_train
    path = settings.file or config.train_file
    spectra: Spectra
    if path is None:
        spectra = SimulatedSpectra(key_stars, settings.n_stars, label_sampling=config.label_sampling, resolution=config.resolution)
    else:
        spectra = SurveyFile(path, start + settings.n_stars, config.label_columns)
    return (observe(key_noise, spectra, config), start) if spectra.n_stars > start else None


def add_uncertainty(
    config: DataConfig, settings: CalibrationConfig, prepared: Prepared, model: Model, stages: Stages
) -> tuple[Model, list[str]]:
    """The model with its uncertainties, and what there is to warn of."""
    with stages("uncertainties"):
        uncertainty = fit_uncertainty(config, settings, prepared)
        model = model._replace(uncertainty=uncertainty)
        if settings.n_stars == 0:
            return model, ["uncertainties are not calibrated, as calibration.n_stars is 0"]
        stars = observe_calibration_stars(config, settings)
        if stars is None:
            stages.note("no stars were left to calibrate on: out-of-fold predictions of training stars stand in")
            labelled = predict_out_of_fold(config, prepared, model, settings.n_stars)
        else:
            labelled = predict_labelled(model, *stars)
        uncertainty = calibrate_uncertainty(uncertainty, labelled)
    few = int((uncertainty.calibration.n_stars < len(LEVELS) * 20).sum())
    notes = [f"{few} cells have fewer than {len(LEVELS) * 20} stars to calibrate on"] * bool(few)
    return model._replace(uncertainty=uncertainty), notes


def fit_uncertainty(config: DataConfig, settings: CalibrationConfig, prepared: Prepared) -> Uncertainty:
    """All but the calibration, from the first training stars."""
    train, _ = observe_surveys(config)
    n_stars, n_experts, experts = min(settings.n_training, train.n_stars), config.n_experts, prepared.experts
    first = train.flux(0, min(SLICE, n_stars))
    pca = fit_pca(draw_keys(config.seed).pca, first, min(N_DIRECTIONS, len(first)))
    sums, medians, cell = None, [], np.asarray(prepared.train.cell)
    for rows, flux, error in train.slices(0, n_stars):
        medians.append(np.median(np.asarray(flux), axis=1))
        part = jax.tree.map(np.asarray, sum_flux(flux, error, cell[rows], pca.mean, pca.components, n_experts))
        sums = part if sums is None else jax.tree.map(operator.add, sums, part)
    assert sums is not None
    if (smallest := float(sums.n.min())) < 2:
        raise InputError(f"calibration.n_training is {settings.n_training}: a cell has {smallest:g} stars among them, expected 2")
    dtype = np.asarray(experts.ridge.coef).dtype
    counts = np.bincount(cell[cell >= 0], minlength=n_experts).astype(dtype)
    leverage = fit_leverage(sums, pca.mean, pca.components, experts.alpha, counts)
    of_first = approximate_leverage(leverage, first)
    residual = residual_variance(np.nanmin(np.asarray(experts.mse), axis=1), of_first, cell[: len(first)])
    median, covered = np.concatenate(medians), prepared.train.covered()
    scaled = median.std() < SCALED * abs(median.mean())
    return Uncertainty(
        leverage=leverage,
        residual_variance=residual,
        misfit=misfit_variance(residual, experts.ridge.coef, sums.noise / sums.n[:, None]),
        noise_variance=sums.noise.sum(axis=0) / sums.n.sum(),
        center=pca.mean,
        rest_variance=sums.rest / sums.n.sum(),
        flux_median=np.asarray(median.mean() if scaled else np.nan, dtype),
        feature_range=fit_feature_range(covered.features, covered.cell, n_experts),
        part_scales=np.ones(len(PredictiveVariance._fields), dtype),
        calibration=no_calibration(n_experts, dtype),
    )


class LabelledPrediction(NamedTuple):
    """What a model predicts for stars whose log g is known."""

    log_g: np.ndarray  #: true
    prediction: np.ndarray
    sigma: np.ndarray  #: before calibration
    half_width: np.ndarray  #: (N, L)
    group: np.ndarray  #: likeliest cell, by which intervals are calibrated
    cell: np.ndarray  #: true cell, -1 outside
    distance: np.ndarray
    parts: np.ndarray  #: (N, 4) misfit, coefficients, spread, noise
    mag: np.ndarray

    @property
    def residual(self) -> np.ndarray:
        """True less predicted log g."""
        return self.log_g - self.prediction

    def select(self, rows: np.ndarray) -> LabelledPrediction:
        """Some of the stars."""
        return LabelledPrediction(*(array[rows] for array in self))

    def coverage(self, levels: np.ndarray) -> pd.DataFrame:
        """Coverage of the intervals: of all stars, by true cell and by magnitude; see ``coverage_table``."""
        groups = {"cell": self.cell, "mag": np.digitize(self.mag, MAG_EDGES) - 1}
        return coverage_table(self.residual, self.half_width, levels, groups, {"cell": CELL_NAMES, "mag": MAG_NAMES})


def predict_out_of_fold(config: DataConfig, prepared: Prepared, model: Model, n_stars: int) -> LabelledPrediction:
    """What a model predicts for its first training stars, where the expert of a star's cell was fitted without the star's fold.

    The other experts never saw the star; the gate saw it as one of all training stars.
    """
    train, _ = observe_surveys(config)
    stars = predict_labelled(model, train, 0, min(n_stars, train.n_stars))
    stars = stars.select(stars.cell >= 0)
    first = prepared.gate_stars().select(np.arange(len(stars.cell)))
    mixed = route_soft(model.gate.apply(model.gate_params, first.features), first.predictions)
    return stars._replace(prediction=np.asarray(mixed))


def predict_labelled(
    model: Model, stars: Observation, start: int = 0, stop: int | None = None, *, local: bool = False
) -> LabelledPrediction:
    """Applies a model, or its local linear experts, to the stars ``start`` to ``stop - 1`` of a survey, by default to all."""
    log_g, mag, cell = (np.asarray(array)[start:stop] for array in (stars.labels.log_g, stars.labels.mag, stars.cell))
    predictions = []
    for _, flux, error in stars.slices(start, stop):
        # Padded to a whole slice, so that all slices share one compiled program.
        padding = ((0, SLICE - len(flux)), (0, 0))
        of_slice = predict_model(model, *(np.pad(array, padding, mode="edge") for array in (flux, error)))
        assert of_slice.variance is not None
        parts = np.stack(list(of_slice.variance), axis=1)
        answer: Any = of_slice.local if local else (of_slice.log_g, of_slice.sigma, of_slice.half_width)
        columns = (*answer, of_slice.cell, of_slice.distance, parts)
        predictions.append([np.asarray(column)[: len(flux)] for column in columns])
    prediction, sigma, half_width, group, distance, variances = (
        np.concatenate(column) for column in zip(*predictions, strict=True)
    )
    return LabelledPrediction(log_g, prediction, sigma, half_width, group, cell, distance, variances, mag)


def calibrate_uncertainty(uncertainty: Uncertainty, stars: LabelledPrediction) -> Uncertainty:
    """From stars in the cells: factors of the variance's parts from some, split-conformal quantiles from the others."""
    stars = stars.select(stars.cell >= 0)
    first = np.arange(len(stars.cell)) % SCALING == 0
    scales = np.ones(stars.parts.shape[1])
    if first.sum() >= LEAST_SCALING:
        scales = fit_part_scales(stars.parts[first], stars.residual[first])
        stars = stars.select(~first)
    score = np.abs(stars.residual) / np.sqrt(stars.parts @ scales)
    calibration = calibrate(score, stars.group, len(uncertainty.calibration.n_stars))
    dtype = np.asarray(uncertainty.misfit).dtype
    scales, calibration = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), (scales, calibration))
    return uncertainty._replace(part_scales=scales, calibration=calibration)
