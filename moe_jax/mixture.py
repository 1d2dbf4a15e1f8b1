"""A mixture of ridge experts for any data, from plain arrays.

One ridge regression is fitted to each cell of the data, with a penalty chosen by cross-validation. Then a gate is trained on the
experts' out-of-fold predictions, to which a row itself did not contribute. The caller chooses the cells: bins of a label,
clusters of x, anything.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, mean_and_scale, scale_columns, take_rows
from moe_jax.core.convert import convert_arguments
from moe_jax.experts.fit import assign_folds, cross_fitted_predictions, fit_experts
from moe_jax.experts.ridge import Ridge, predict_ridge
from moe_jax.gates.networks import Gate, MLPGate
from moe_jax.gates.optimize import Params
from moe_jax.gates.routing import route_soft
from moe_jax.gates.training import GateConfig, fit_gate

ALPHAS = (1e-2, 1e-1, 1.0, 10.0, 100.0, 1000.0)


class MixtureOfExperts(NamedTuple):
    """A fitted mixture."""

    experts: Ridge  #: stacked, coef (K, P) and intercept (K,)
    alpha: Float[AnyArray, " K"]  #: penalty of each expert
    at_edge: Bool[AnyArray, " K"]  #: whether the penalty is the smallest or largest that was tried
    gate: Gate
    gate_params: Params
    feature_mean: Float[AnyArray, " F"]
    feature_scale: Float[AnyArray, " F"]  #: standard deviation of the training rows; 1 for a constant


class MoEPrediction(NamedTuple):
    """Predictions of a mixture for N rows."""

    y: Float[jax.Array, " N"]
    weights: Float[jax.Array, "N K"]
    expert_predictions: Float[jax.Array, "N K"]


@convert_arguments("x", "y", "cell", "features", finite=("x", "y", "features"))
def fit_moe(
    key: PRNGKeyArray,
    x: Float[AnyArray, "N P"],
    y: Float[AnyArray, " N"],
    cell: Int[AnyArray, " N"],
    features: Float[AnyArray, "N F"] | None = None,
    *,
    alphas: tuple[float, ...] = ALPHAS,
    n_folds: int = 5,
    gate: Gate | None = None,
    config: GateConfig | None = None,
) -> MixtureOfExperts:
    """Fits the experts and the gate, in the precision of x.

    The rows of a cell set the shapes of its expert, so x, y, cell and features must be concrete: this function does not pass
    through ``jit`` or ``vmap``. ``predict_moe`` does, and a mixture is a pytree.

    Args:
        key: draws the folds, the gate's initial params, its validation rows and its batches.
        x: columns that the experts regress on. A ridge penalises all columns alike, so bring them to one scale.
        y: target.
        cell: expert of each row, 0 .. K - 1, or -1 for a row that is left out. Each cell needs at least
            2 * n_folds rows.
        features: columns that the gate sees, standardised inside; x by default.
        alphas: penalties to choose from, for each expert.
        n_folds: folds within each cell, for the choice of the penalties and for the out-of-fold predictions.
        gate: ``MLPGate()`` by default.
        config: how the gate is trained; ``GateConfig()`` by default.

    Raises:
        InputError: shapes that disagree, numbers that are not finite, a cell with too few rows, penalties that are not
            positive, or data that teach the gate nothing (see ``require_informative``).
    """
    features = x if features is None else features
    gate, config = gate or MLPGate(), config or GateConfig()
    key_folds, key_gate = jax.random.split(key)
    x, y, features, cell = jnp.asarray(x), jnp.asarray(y), jnp.asarray(features), np.asarray(cell)
    if cell.max() < 0:
        raise InputError(f"cell is {cell.max()} for all {len(cell)} rows, expected 0 to K - 1 for some")
    folds = assign_folds(key_folds, cell, n_folds)
    experts = fit_experts(x, y, cell, np.asarray(alphas), folds, n_experts=int(cell.max()) + 1)
    rows = np.flatnonzero(cell >= 0)
    predictions = cross_fitted_predictions(predict_ridge(experts.ridge, x), experts.out_of_fold, cell)
    features, predictions, y = take_rows((features, predictions, y), rows)
    mean, scale = mean_and_scale(features)
    fit = fit_gate(key_gate, gate, scale_columns(features, mean, scale), predictions, y, config)
    return MixtureOfExperts(experts.ridge, experts.alpha, experts.at_edge, gate, fit.params, mean, scale)


@convert_arguments()
def predict_moe(
    mixture: MixtureOfExperts, x: Float[AnyArray, "N P"], features: Float[AnyArray, "N F"] | None = None
) -> MoEPrediction:
    """Predictions of a mixture for any rows.

    Args:
        mixture: result of ``fit_moe``.
        x: columns as in the fit.
        features: columns as in the fit; x by default.

    Raises:
        InputError: another number of columns than in the fit.
    """
    features = x if features is None else features
    predictions = predict_ridge(mixture.experts, jnp.asarray(x))
    if features.shape[1] != len(mixture.feature_mean):
        raise InputError(f"features has shape {features.shape}, expected (N, {len(mixture.feature_mean)}) as in the fit")
    weights = mixture.gate.apply(
        mixture.gate_params, scale_columns(jnp.asarray(features), mixture.feature_mean, mixture.feature_scale)
    )
    return MoEPrediction(route_soft(weights, predictions), weights, predictions)
