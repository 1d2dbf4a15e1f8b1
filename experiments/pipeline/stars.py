"""What all experiments start from: the configuration of data and experts, the keys, and what the stages before the gates give."""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from experiments.pipeline.config import DataConfig
from experiments.runner.stages import Stages
from moe_jax.core.arrays import AnyArray, take_rows
from moe_jax.core.pca import PCA
from moe_jax.experts.cross_validation import CrossValidatedRidge
from moe_jax.experts.fit import Experts, cross_fitted_predictions
from moe_jax.experts.ridge import Ridge
from moe_jax.gates.classifier import ClassifierFit, fit_classifier
from moe_jax.gates.features import FeatureModel


class Observed(NamedTuple):
    """Noisy spectra, and what is known of their stars."""

    flux: AnyArray  #: (N, P) noisy
    T_eff: AnyArray  #: (N,) K
    M_H: AnyArray  #: (N,) dex
    log_g: AnyArray  #: (N,)
    cell: AnyArray  #: (N,) the expert of each star, -1 where it has none


class Stars(NamedTuple):
    """Stars as gates see them."""

    features: AnyArray  #: (N, F) standardised
    predictions: AnyArray  #: (N, K) of all experts
    global_prediction: AnyArray  #: (N,) of the global ridge
    T_eff: AnyArray  #: (N,) K
    M_H: AnyArray  #: (N,) dex
    log_g: AnyArray  #: (N,)
    cell: AnyArray  #: (N,) the expert of each star, -1 where it has none

    def select(self, rows: AnyArray) -> Stars:
        """Some of the stars."""
        return Stars(*take_rows(tuple(jnp.asarray(array) for array in self), jnp.asarray(rows)))

    def covered(self) -> Stars:
        """The stars that have an expert."""
        return self.select(np.flatnonzero(np.asarray(self.cell) >= 0))


def no_ridge(n_stars: int, n_pixels: int) -> CrossValidatedRidge:
    """Stands for the global ridge where none was asked for: all that it predicts is NaN."""
    nan, none = jnp.full((), jnp.nan), jnp.zeros((), bool)
    return CrossValidatedRidge(Ridge(jnp.full(n_pixels, jnp.nan), nan), nan, none, jnp.zeros(0), jnp.full(n_stars, jnp.nan))


class Prepared(NamedTuple):
    """All stages before the regression gates."""

    train: Stars
    test: Stars
    experts: Experts
    global_ridge: CrossValidatedRidge
    model: FeatureModel
    wave: AnyArray  #: (P,) vacuum wavelength, Angstrom
    classifier: ClassifierFit

    @property
    def n_covered(self) -> int:
        """Training stars that have an expert."""
        return int(np.sum(np.asarray(self.train.cell) >= 0))

    def gate_stars(self) -> Stars:
        """The covered training stars with cross-fitted expert predictions: what a regression gate is trained on."""
        train = self.train
        predictions = cross_fitted_predictions(jnp.asarray(train.predictions), self.experts.out_of_fold, train.cell)
        return train._replace(predictions=predictions).covered()


_LEAF = np.zeros(0)
SKELETON = Prepared(
    train=Stars(*[_LEAF] * 7),
    test=Stars(*[_LEAF] * 7),
    experts=Experts(*[_LEAF] * 6),  # type: ignore[arg-type]
    global_ridge=CrossValidatedRidge(Ridge(*[_LEAF] * 2), *[_LEAF] * 4),  # type: ignore[arg-type]
    model=FeatureModel(PCA(*[_LEAF] * 2), _LEAF, _LEAF),  # type: ignore[arg-type]
    wave=_LEAF,
    classifier=ClassifierFit({"head": {"bias": _LEAF, "kernel": _LEAF}}, 0.0, 0.0, False, False),  # type: ignore[dict-item]
)


def classify(config: DataConfig, train: Stars, stages: Stages) -> ClassifierFit:
    """The classification gate of the covered training stars."""
    with stages("classification gate"):
        covered = train.covered()
        return fit_classifier(
            covered.features, covered.cell, C_grid=config.experts.C_grid, n_folds=config.experts.n_folds, seed=config.seed
        )
