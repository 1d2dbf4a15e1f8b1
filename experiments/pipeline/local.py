"""The mixture of local linear experts that a run fits beside its nine ridges, trained and calibrated on the same stars."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass

import jax
import numpy as np

from experiments.pipeline.calibration import CalibrationConfig, LabelledPrediction, observe_calibration_stars, predict_labelled
from experiments.pipeline.config import DataConfig
from experiments.pipeline.surveys import Observation, observe_surveys
from experiments.runner.cache import Cache
from experiments.runner.command_line import require_at_least
from experiments.runner.stages import Stages
from moe_jax.apply.conformal import Calibration, calibrate, no_calibration
from moe_jax.apply.model import LocalModel, Model
from moe_jax.core.arrays import InputError, to_device
from moe_jax.experts.local import LocalMixture, fit_local

LABELS = ("T_eff", "log_g", "M_H", "a_M")  # what shapes the spectra
CELL_STARS = 4  # at least so many stars in a local cell, on average
HIGH_DEGREE, LOW_DEGREE, MANY_STARS = 7, 4, 8_000  # of the polynomial: with so many stars, and with fewer
NOT_CALIBRATED = "not calibrated: no stars were left to calibrate on"
LEAST_STARS = 200  # with fewer there are more terms than half the stars


@dataclass(frozen=True)
class LocalConfig:
    """The local linear experts that are fitted beside the nine ridges."""

    n_training: int = 32_768
    """Training stars to fit them to, at most; 0: none are fitted."""
    n_cells: int = 1_024
    """Local experts, at most; there is one for four stars or more."""

    def __post_init__(self) -> None:
        require_at_least(self, n_training=0, n_cells=1)


def fit_local_mixture(config: DataConfig, settings: LocalConfig, train: Observation, cache: Cache) -> LocalMixture:
    """A mixture for the covered stars among the first training stars, or the one that the cache has.

    Raises:
        InputError: for too few of these stars, and errors that are not positive.
    """
    n_stars = min(settings.n_training, train.n_stars)
    covered = np.asarray(train.cell)[:n_stars] >= 0
    n_covered = int(covered.sum())
    if n_covered < LEAST_STARS:
        raise InputError(f"found {n_covered} covered stars, expected at least {LEAST_STARS}")

    def compute() -> LocalMixture:
        values = [np.asarray(getattr(train.labels, name))[:n_stars][covered] for name in LABELS]
        labels = np.stack([value for value in values if np.isfinite(value).all() and np.ptp(value) > 0], axis=1)
        degree = HIGH_DEGREE if n_covered >= MANY_STARS else LOW_DEGREE
        n_cells = min(settings.n_cells, n_covered // CELL_STARS)
        return fit_local(*train.read_covered(n_stars), labels, values[1], n_cells=n_cells, degree=degree, seed=config.seed)

    of_all = {"data": dataclasses.asdict(config), "local": dataclasses.asdict(settings)}
    mixture: LocalMixture = to_device(cache.load_or_compute("local", of_all, [__file__], LocalMixture, compute)[0])
    return mixture


def add_local(
    config: DataConfig, settings: LocalConfig, calibration: CalibrationConfig, model: Model, stages: Stages, cache: Cache
) -> tuple[Model, LabelledPrediction | None, list[str]]:
    """The model with its local linear experts, what these predict for the test stars, and what there is to warn of."""
    if settings.n_training == 0:
        return model, None, []
    with stages("local linear experts"):
        train, test = observe_surveys(config)
        try:
            mixture = fit_local_mixture(config, settings, train, cache)
        except InputError as reason:
            return model, None, [f"no local linear experts were fitted: {reason}"]
        n_groups, dtype = config.n_experts, np.asarray(mixture.experts.y).dtype
        model = model._replace(local=LocalModel(mixture, no_calibration(n_groups, dtype)))
        held = observe_calibration_stars(config, calibration)
        if held is not None:
            stars = predict_labelled(model, *held, local=True)
            stars = stars.select(stars.cell >= 0)
            calibrated = calibrate(np.abs(stars.residual) / stars.sigma, stars.group, n_groups)
            of_type: Calibration = jax.tree.map(lambda leaf: np.asarray(leaf, dtype), calibrated)
            model = model._replace(local=LocalModel(mixture, of_type))
        predicted = predict_labelled(model, test, local=True)
    notes = [f"the local linear experts are {NOT_CALIBRATED}"] * (held is None)
    return model, predicted.select(predicted.cell >= 0), notes
