"""A trained mixture with all that is needed to predict log g from new spectra; ``model_file`` writes and reads it."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from moe_jax.apply.conformal import Calibration, half_widths
from moe_jax.apply.novelty import FeatureRange, feature_distance
from moe_jax.apply.uncertainty import Leverage, PredictiveVariance, approximate_leverage, predictive_variance
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.convert import convert_arguments
from moe_jax.core.kept import call_kept
from moe_jax.experts.local import LocalMixture, median_error, predict_local
from moe_jax.experts.ridge import Ridge, predict_ridge
from moe_jax.gates.features import FeatureModel, LinePixels, features_of_pixels, line_pixels
from moe_jax.gates.networks import Gate, LinearGate, MLPGate
from moe_jax.gates.optimize import Params
from moe_jax.gates.routing import route_soft
from moe_jax.spectra.grid import GRID_RESOLUTION
from moe_jax.spectra.resample import fill_masked, good_medians


class Uncertainty(NamedTuple):
    """What a model needs to give the uncertainties of its predictions."""

    leverage: Leverage
    residual_variance: Float[AnyArray, " K"]  #: s_k^2, see ``moe_jax.apply.uncertainty``
    misfit: Float[AnyArray, " K"]  #: m_k, likewise
    noise_variance: Float[AnyArray, " P"]  #: mean over the training stars; used for stars whose errors are not uncertainty
    center: Float[AnyArray, " P"]  #: mean flux, from which the directions of ``leverage.basis`` start
    rest_variance: Float[AnyArray, " P"]  #: variance that these directions do not explain; the variance of a filled pixel
    flux_median: Float[AnyArray, ""]  #: median to which the training spectra were scaled; NaN where they were not
    feature_range: FeatureRange
    part_scales: Float[AnyArray, " 4"]  #: factors of the parts of the variance
    calibration: Calibration  #: has no levels where there were no stars to calibrate on


class LocalModel(NamedTuple):
    """The mixture of local linear experts that was trained on the same stars."""

    mixture: LocalMixture
    calibration: Calibration  #: by the likeliest cell, as that of the other mixture


class Model(NamedTuple):
    """A mixture of ridge experts with its gate.

    It holds text, and its wavelengths say what is computed. So give it from outside of ``jit``:
    ``jax.jit(functools.partial(predict_model, model))``.
    """

    wave: Float[AnyArray, " P"]  #: vacuum wavelength, Angstrom
    experts: Ridge  #: stacked, coef (K, P) and intercept (K,)
    global_ridge: Ridge
    features: FeatureModel
    gate: Gate
    gate_params: Params
    classification_params: Params  #: of the classification gate, a ``LinearGate``
    provenance: dict[str, Any]  #: how the model was made; anything that JSON can hold
    uncertainty: Uncertainty | None = None
    local: LocalModel | None = None
    resolution: float = GRID_RESOLUTION  #: of the spectra that it was trained on


class LocalAnswer(NamedTuple):
    """What the local linear experts of a model predict for N stars."""

    log_g: Float[jax.Array, " N"]
    sigma: Float[jax.Array, " N"]  #: standard deviation before calibration
    half_width: Float[jax.Array, "N L"]  #: half-width of the calibrated interval at each level


class MixturePrediction(NamedTuple):
    """Predictions of a model for N stars; fields are None for a model without uncertainties, or local experts."""

    log_g: Float[jax.Array, " N"]
    weights: Float[jax.Array, "N K"]
    features: Float[jax.Array, "N F"]  #: standardised
    expert_predictions: Float[jax.Array, "N K"]
    global_log_g: Float[jax.Array, " N"]  #: prediction of the global ridge
    cell: Int[jax.Array, " N"]  #: likeliest cell, by the classification gate; intervals are calibrated by cell
    variance: PredictiveVariance | None = None  #: parts of the variance, before their factors
    sigma: Float[jax.Array, " N"] | None = None  #: standard deviation with the factors, before calibration
    half_width: Float[jax.Array, "N L"] | None = None  #: half-width of the calibrated interval at each level
    distance: Float[jax.Array, " N"] | None = None  #: in feature space; above 1 a star is unlike the training stars
    gradient: Float[jax.Array, "N P"] | None = None  #: derivative of log_g in the flux
    local: LocalAnswer | None = None  #: of a model that has local linear experts


@convert_arguments()
def predict_model(
    model: Model,
    flux: Float[AnyArray, "N P"],
    error: Float[AnyArray, "N P"] | None = None,
    good: Bool[AnyArray, "N P"] | None = None,
    scale_error: Float[AnyArray, " N"] | None = None,
) -> MixturePrediction:
    """Applies a model to noisy spectra on its own wavelengths and on the scale of its training spectra.

    Args:
        model: a trained model, for example from ``load_model``.
        flux: noisy flux.
        error: standard deviation of the noise; by default that of the training stars.
        good: False for masked pixels, which are filled first; needs a model with uncertainties.
        scale_error: relative standard deviation of the factor by which each spectrum was scaled; 0 by default.

    Raises:
        InputError: for another number of pixels, no stars, an array of NumPy with negative errors, or for ``good`` and a model
            without uncertainties.
    """
    if flux.shape[1] != len(model.wave):
        raise InputError(f"flux has shape {flux.shape}, expected (N, {len(model.wave)}) for the wavelengths of the model")
    if isinstance(error, np.ndarray):
        negative = error[(error < 0) if good is None else (error < 0) & np.asarray(good)]
        if negative.size:
            raise InputError(f"error holds {negative.min():g}, expected no negative errors: mask such pixels by good")
    if good is not None:
        if model.uncertainty is None:
            raise InputError("good was given for a model without uncertainties, expected one that knows how to fill masked pixels")
        # Not a part of _predict: with the loop over stars inside, XLA's CPU runtime stands still after some calls (jaxlib 0.10.2).
        flux = fill_masked(flux, good, model.uncertainty.center, model.uncertainty.leverage.basis)
    pixels = line_pixels(model.wave)
    arrays = model._replace(gate=cast(Any, None), provenance={}, local=None)  # what a compiled program can take
    inputs, gate = (arrays, pixels, flux, error, good, scale_error), model.gate
    prediction: MixturePrediction
    if type(gate) in (LinearGate, MLPGate):
        prediction = call_kept(_predict, *inputs, results=[MixturePrediction, PredictiveVariance], gate=gate)
    else:  # a gate of one's own, whose code may change
        prediction = _predict(*inputs, gate=gate)
    if model.local is None:
        return prediction
    y, sigma = predict_local(model.local.mixture, flux, _noise_level(model, flux, error, good))
    return prediction._replace(local=LocalAnswer(y, sigma, half_widths(model.local.calibration, sigma, prediction.cell)))


def _noise_level(model: Model, flux: AnyArray, error: AnyArray | None, good: AnyArray | None) -> AnyArray:
    """(N,) ``median_error`` of each star, or that of its good pixels; that of the training stars where errors are not known."""
    if error is None:
        variance = np.ones(flux.shape[1]) if model.uncertainty is None else model.uncertainty.noise_variance
        return jnp.broadcast_to(median_error(jnp.sqrt(variance)[None, :]), flux.shape[:1])
    if good is None:
        return median_error(error)
    error, good = np.asarray(error), np.asarray(good)
    level, masked = np.array(median_error(error)), ~good.all(axis=1)
    level[masked] = good_medians(error[masked], good[masked])
    return level


@functools.partial(jax.jit, static_argnames="gate")
def _predict(
    model: Model,
    pixels: dict[str, LinePixels],
    flux: jax.Array,
    error: jax.Array | None,
    good: jax.Array | None,
    scale_error: jax.Array | None,
    *,
    gate: Gate,
) -> MixturePrediction:
    """``predict_model`` in one program."""

    def mixture(flux: jax.Array) -> tuple[Any, tuple[Any, Any, Any]]:
        features = features_of_pixels(model.features, flux, pixels)
        weights, predictions = gate.apply(model.gate_params, features), predict_ridge(model.experts, flux)
        return route_soft(weights, predictions), (weights, features, predictions)

    log_g, pull_back, (weights, features, predictions) = jax.vjp(mixture, flux, has_aux=True)
    cell = jnp.argmax(LinearGate().apply(model.classification_params, features), axis=1)
    prediction = MixturePrediction(log_g, weights, features, predictions, predict_ridge(model.global_ridge, flux), cell)
    uncertainty = model.uncertainty
    if uncertainty is None:
        return prediction
    # One reverse pass gives the gradients of all stars, since each prediction depends on its own star's flux alone.
    (gradient,) = pull_back(jnp.ones_like(log_g))
    sigma = jnp.sqrt(uncertainty.noise_variance)[None, :] if error is None else jnp.asarray(error)
    if good is not None:
        sigma = jnp.where(good, sigma, jnp.sqrt(uncertainty.rest_variance)[None, :])
    of_experts = approximate_leverage(uncertainty.leverage, flux), uncertainty.residual_variance, uncertainty.misfit
    variance = predictive_variance(weights, predictions, *of_experts, gradient, jnp.broadcast_to(sigma, flux.shape))
    if scale_error is not None:
        scaling = jnp.sum(gradient * flux, axis=1) * scale_error
        variance = variance._replace(noise=variance.noise + scaling**2)
    prediction = prediction._replace(distance=feature_distance(uncertainty.feature_range, features), gradient=gradient)
    return with_variance(model, prediction, variance)


def with_variance(model: Model, prediction: MixturePrediction, variance: PredictiveVariance) -> MixturePrediction:
    """The prediction with this variance, and with the intervals that follow from it."""
    assert model.uncertainty is not None
    sigma = jnp.sqrt(variance.total(model.uncertainty.part_scales))
    half_width = half_widths(model.uncertainty.calibration, sigma, prediction.cell)
    return prediction._replace(variance=variance, sigma=sigma, half_width=half_width)
