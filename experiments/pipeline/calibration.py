"""What a trained model is told of its own uncertainty: sums over training stars, and stars to calibrate on."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.observation import SLICE, Observation, Part
from experiments.pipeline.stars import Prepared
from experiments.pipeline.surveys import experts_of, open_surveys
from experiments.runner.stages import Stages
from moe_jax.apply.conformal import LEVELS, Calibration, calibrate
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
from moe_jax.experts.ridge import Ridge
from moe_jax.gates.networks import Gate
from moe_jax.gates.optimize import Params
from moe_jax.spectra.simulate import SimulatedSpectra
from moe_jax.spectra.survey import Spectra
from moe_jax.spectra.survey_file import SurveyFile

Config = TypeVar("Config", bound=DataConfig)
SCALING = 4  # of so many stars to calibrate on, one is for the factors of the variance's parts, the others for the quantiles
LEAST_SCALING = 100  # with fewer stars the factors stay at 1
SCALED = 0.05  # spectra whose medians scatter by less than this part were scaled to a common median


@dataclass(frozen=True)
class CalibrationConfig:
    """How the uncertainties of a model are found."""

    n_stars: int = 4_000
    """Stars on which intervals are calibrated, at most; they are neither trained nor tested on. 0: not calibrated."""
    file: Path | None = None
    """HDF5 survey with such stars. By default they are simulated, or those of the training file after the first n_train; without
    n_train, its last tenth is kept for them."""
    n_training: int = 8_192
    """Training stars from which the covariance of the flux is taken, at most."""

    def __post_init__(self) -> None:
        if self.n_stars < 0:
            raise InputError(f"calibration.n_stars is {self.n_stars}, expected at least 0")
        if self.n_training < 100:
            raise InputError(f"calibration.n_training is {self.n_training}, expected at least 100")


def model_of(prepared: Prepared, gate: Gate, gate_params: Params) -> Model:
    """The mixture of the prepared experts with a gate; its uncertainty and provenance are still to come."""
    return Model(
        wave=np.asarray(prepared.wave),
        experts=Ridge(prepared.experts.coef, prepared.experts.intercept),
        global_ridge=prepared.global_ridge.ridge,
        features=prepared.model,
        gate=gate,
        gate_params=gate_params,
        classification_params=prepared.classifier.params,
        provenance={},
    )


def keep_calibration_stars(config: Config, settings: CalibrationConfig, stages: Stages) -> Config:
    """The configuration with a number of training stars that leaves the last tenth of a training file to calibrate on.

    Nothing changes where stars are simulated, a number of training stars was given, or the calibration needs none of them.
    """
    if config.train_file is None or config.n_train or settings.file is not None or settings.n_stars == 0:
        return config
    n_stars = SurveyFile(config.train_file).n_stars
    n_kept = min(settings.n_stars, n_stars // 10)
    stages.note(f"{config.train_file}: the last {n_kept:,} of {n_stars:,} stars are kept to calibrate the uncertainties on")
    return dataclasses.replace(config, n_train=n_stars - n_kept)


def calibration_part(config: DataConfig, settings: CalibrationConfig) -> Part | None:
    """The stars to calibrate on; None where there are none."""
    key = jax.random.fold_in(draw_keys(config.seed).train, 1)
    key_stars, key_noise = jax.random.split(key)
    if settings.n_stars == 0:
        return None
    spectra: Spectra
    if settings.file is not None or config.train_file is not None:
        start = 0 if settings.file is not None else config.n_train
        path = settings.file or config.train_file
        assert path is not None
        spectra = SurveyFile(path, start + settings.n_stars)
    else:
        start, spectra = 0, SimulatedSpectra(key_stars, settings.n_stars, label_sampling=config.label_sampling)
    if spectra.n_stars <= start:
        return None
    return Part(Observation.of(spectra, key_noise, config), start, spectra.n_stars)


def add_uncertainty(
    config: DataConfig, settings: CalibrationConfig, prepared: Prepared, model: Model, stages: Stages
) -> tuple[Model, list[str]]:
    """The model with its uncertainties, and what there is to warn of."""
    with stages("uncertainties"):
        known = fit_uncertainty(config, settings, prepared)
        model = model._replace(uncertainty=known)
        part = calibration_part(config, settings)
        if part is None:
            return model, [
                "uncertainties are not calibrated: no stars were left for it; give --calibration.file, or a smaller --n-train "
                "than the training file has stars"
            ]
        part_scales, calibration = calibrate_model(config, model, part)
    few = int((np.asarray(calibration.n_stars) < len(LEVELS) * 20).sum())
    notes = [f"{few} cells have fewer than {len(LEVELS) * 20} stars to calibrate on"] * bool(few)
    dtype = jnp.asarray(known.misfit).dtype
    found = jax.tree.map(lambda leaf: jnp.asarray(leaf, dtype), {"part_scales": part_scales, "calibration": calibration})
    return model._replace(uncertainty=known._replace(**found)), notes


def fit_uncertainty(config: DataConfig, settings: CalibrationConfig, prepared: Prepared) -> Uncertainty:
    """All but the calibration, from the first training stars."""
    keys, (source, _) = draw_keys(config.seed), open_surveys(config)
    observation = Observation.of(source, keys.train_noise, config)
    cell, n_experts = np.asarray(prepared.train.cell), config.n_experts
    first, center, basis, sums, medians = None, None, None, None, []
    for part, flux, error in observation.slices_with_errors(0, min(settings.n_training, source.n_stars)):
        medians.append(np.median(np.asarray(flux), axis=1))
        if first is None:
            first = flux
            pca = fit_pca(keys.pca, flux, min(N_DIRECTIONS, len(flux)))
            center, basis = pca.mean, pca.components
        own = sum_flux(flux, error, jnp.asarray(cell[part]), center, basis, n_experts)
        sums = own if sums is None else jax.tree.map(jnp.add, sums, own)
    assert sums is not None
    assert first is not None
    assert center is not None
    assert basis is not None
    experts, n_stars = prepared.experts, np.bincount(cell[cell >= 0], minlength=n_experts)
    if (smallest := float(sums.n.min())) < 2:
        raise InputError(f"calibration.n_training is {settings.n_training}: a cell has {smallest:g} stars among them, expected 2")
    noise = sums.noise / sums.n[:, None]
    leverage = fit_leverage(sums, center, basis, experts.alpha, jnp.asarray(n_stars, experts.coef.dtype))
    residual = residual_variance(
        jnp.min(experts.mse, axis=1), approximate_leverage(leverage, first), jnp.asarray(cell[: len(first)])
    )
    median = np.concatenate(medians)
    scaled = median.std() < SCALED * abs(median.mean())
    covered = prepared.train.covered()
    dtype = jnp.asarray(experts.coef).dtype
    return Uncertainty(
        leverage=leverage,
        residual_variance=residual,
        misfit=misfit_variance(residual, experts.coef, noise),
        noise_variance=jnp.sum(sums.noise, axis=0) / jnp.sum(sums.n),
        center=center,
        rest_variance=sums.rest / jnp.sum(sums.n),
        flux_median=jnp.asarray(median.mean() if scaled else np.nan, dtype),
        feature_range=jax.tree.map(jnp.asarray, fit_feature_range(covered.features, covered.cell, n_experts)),
        part_scales=jnp.ones(len(PredictiveVariance._fields), dtype),
        calibration=Calibration(jnp.zeros(0, dtype), jnp.zeros((n_experts, 0), dtype), jnp.zeros(n_experts, dtype)),
    )


class Judged(NamedTuple):
    """What a model says of stars whose log g is known."""

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

    def select(self, rows: np.ndarray) -> Judged:
        """Some of the stars."""
        return Judged(*(array[rows] for array in self))


def judge(config: DataConfig, model: Model, part: Part) -> Judged:
    """Applies a model to the stars of a survey."""
    found = []
    for _, flux, error in part.slices():
        said = predict_model(model, _pad(flux), _pad(error))
        assert said.variance is not None
        parts = jnp.stack(list(said.variance), axis=1)
        columns = (
            said.log_g,
            said.sigma,
            said.half_width,
            said.cell,
            said.distance,
            parts,
        )
        found.append([np.asarray(column)[: len(flux)] for column in columns])
    prediction, sigma, half_width, group, distance, variances = (np.concatenate(column) for column in zip(*found, strict=True))
    rows, labels = slice(part.start, part.stop), part.observation.spectra.labels
    cell = np.asarray(experts_of(labels, config))[rows]
    log_g, mag = np.asarray(labels.log_g)[rows], np.asarray(labels.mag)[rows]
    return Judged(log_g, prediction, sigma, half_width, group, cell, distance, variances, mag)


def _pad(array: jax.Array) -> jax.Array:
    """Stars up to a whole slice, so that all slices share one compiled program."""
    return jnp.pad(array, ((0, SLICE - len(array)), (0, 0)), mode="edge")


def calibrate_model(config: DataConfig, model: Model, part: Part) -> tuple[np.ndarray, Calibration]:
    """From the stars that the cells cover: factors of the variance's parts from some, split-conformal quantiles from the others."""
    judged = judge(config, model, part)
    judged = judged.select(judged.cell >= 0)
    first = np.arange(len(judged.cell)) % SCALING == 0
    scales = np.ones(judged.parts.shape[1])
    if first.sum() >= LEAST_SCALING:
        scales = fit_part_scales(judged.parts[first], judged.residual[first])
        judged = judged.select(~first)
    score = np.abs(judged.residual) / np.sqrt(judged.parts @ scales)
    return scales, calibrate(score, judged.group, config.n_experts)
