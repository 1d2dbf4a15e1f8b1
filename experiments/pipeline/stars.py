"""What all experiments start from: stars as gates see them, the experts, and the classification gate."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from experiments.pipeline.config import DataConfig
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray, InputError, mean_and_scale, scale_columns, take_rows
from moe_jax.core.pca import PCA
from moe_jax.experts import CrossValidatedRidge, cross_fitted_predictions
from moe_jax.gates import ClassifierFit, FeatureModel, fit_classifier
from moe_jax.gates.training import require_informative


class Stars(NamedTuple):
    """Stars as gates see them."""

    features: AnyArray  #: (N, F) standardised; raw before ``finish``
    predictions: AnyArray  #: (N, K) of all experts
    global_prediction: AnyArray  #: (N,) of the global ridge
    log_g: AnyArray  #: (N,)
    cell: AnyArray  #: (N,) the expert of each star, -1 where it has none

    def select(self, rows: AnyArray) -> Stars:
        """Some of the stars."""
        return Stars(*take_rows(tuple(self), np.asarray(rows)))

    def covered(self) -> Stars:
        """The stars that have an expert."""
        return self.select(np.flatnonzero(np.asarray(self.cell) >= 0))


class Prepared(NamedTuple):
    """All stages before the regression gates."""

    train: Stars
    test: Stars
    experts: CrossValidatedRidge
    global_ridge: CrossValidatedRidge
    model: FeatureModel
    wave: AnyArray  #: (P,) vacuum wavelength, Angstrom
    classifier: ClassifierFit

    @property
    def n_covered(self) -> int:
        """Training stars that have an expert."""
        return int(np.sum(np.asarray(self.train.cell) >= 0))

    @property
    def has_global_ridge(self) -> bool:
        """Whether a global ridge was fitted; without one, its predictions are NaN."""
        return bool(np.isfinite(np.asarray(self.global_ridge.alpha)))

    def gate_stars(self) -> Stars:
        """The covered training stars with cross-fitted expert predictions: what a regression gate is trained on."""
        train = self.train
        predictions = cross_fitted_predictions(train.predictions, self.experts.out_of_fold, train.cell)
        return train._replace(predictions=predictions).covered()


def finish(
    config: DataConfig,
    train: Stars,
    test: Stars,
    experts: CrossValidatedRidge,
    global_ridge: CrossValidatedRidge,
    pca: PCA,
    wave: AnyArray,
    stages: Stages,
) -> Prepared:
    """Standardises the raw features of the stars, and fits the classification gate.

    Raises:
        InputError: where the stars of a survey teach nothing; see ``require_informative``.
    """
    model = FeatureModel(pca, *mean_and_scale(train.features))
    train, test = (stars._replace(features=scale_columns(stars.features, model.mean, model.scale)) for stars in (train, test))
    for name, file, stars in (("training", config.train_file, train), ("test", config.test_file, test)):
        try:
            require_informative(stars.features, stars.predictions, stars.log_g)
        except InputError as reason:
            raise InputError(f"{file or f'the simulated {name} survey'}: {reason}") from reason
    covered = train.covered()
    with stages("classification gate"):
        classifier = fit_classifier(
            covered.features, covered.cell, C_grid=config.experts.C_grid, n_folds=config.experts.n_folds, seed=config.seed
        )
    return Prepared(train, test, experts, global_ridge, model, wave, classifier)
