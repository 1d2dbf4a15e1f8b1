"""A trained mixture as a file: all that is needed to predict log g from new spectra, and where it came from.

A model is a folder of two files: ``model.safetensors`` holds the arrays, ``model.json`` their meaning: schema version, the
gate's form, the definition of features and cells, provenance, and a hash of the arrays' file. Nothing in them is executed.
"""

from __future__ import annotations

import functools
import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moe_jax.arrays import AnyArray, InputError
from moe_jax.cells import CELL_NAMES, M_H_EDGES, T_EFF_EDGES
from moe_jax.conformal import Calibration, half_widths
from moe_jax.features import FEATURE_NAMES, LINE_WINDOWS, PCA, SIDEBAND, FeatureModel, LinePixels, features_of_pixels, line_pixels
from moe_jax.files import atomic_path
from moe_jax.gates import Gate, LinearGate, MLPGate
from moe_jax.novelty import FeatureRange, feature_distance
from moe_jax.optimize import Params
from moe_jax.resample import fill_masked
from moe_jax.ridge import Ridge, predict_ridge, predict_ridges
from moe_jax.routing import route_soft
from moe_jax.uncertainty import Leverage, PredictiveVariance, approximate_leverage, predictive_variance

SCHEMA_VERSION = 3
ARRAYS, MEANING = "model.safetensors", "model.json"
FEATURE_DEFINITION: dict[str, Any] = {
    "features": list(FEATURE_NAMES),
    "line_windows": {name: list(window) for name, window in LINE_WINDOWS.items()},
    "sideband": SIDEBAND,
}


class Uncertainty(NamedTuple):
    """What a model needs to say how far its predictions can be trusted."""

    leverage: Leverage
    residual_variance: Float[AnyArray, " K"]  #: s_k^2
    misfit: Float[AnyArray, " K"]  #: m_k
    noise_variance: Float[AnyArray, " P"]  #: mean over the training stars: stands for errors that are not known
    center: Float[AnyArray, " P"]  #: flux about which the directions of ``leverage.basis`` go
    rest_variance: Float[AnyArray, " P"]  #: what these directions leave: the variance of a masked pixel that is filled
    flux_median: Float[AnyArray, ""]  #: to which training spectra were scaled; NaN where they were not
    feature_range: FeatureRange
    part_scales: Float[AnyArray, " 4"]  #: factors of the parts of the variance
    calibration: Calibration  #: without levels where there were no stars to calibrate on


class Model(NamedTuple):
    """A mixture of ridge experts with its gate."""

    wave: Float[AnyArray, " P"]  #: vacuum wavelength, Angstrom
    experts: Ridge  #: stacked, coef (K, P) and intercept (K,)
    global_ridge: Ridge
    features: FeatureModel
    gate: Gate
    gate_params: Params
    classification_params: Params  #: of the classification gate, a ``LinearGate``
    provenance: dict[str, Any]  #: whatever JSON can hold
    uncertainty: Uncertainty | None = None


class MixturePrediction(NamedTuple):
    """What a model says of each star."""

    log_g: Float[jax.Array, " N"]
    weights: Float[jax.Array, "N K"]
    features: Float[jax.Array, "N F"]  #: standardised
    expert_predictions: Float[jax.Array, "N K"]
    global_log_g: Float[jax.Array, " N"]  #: of the global ridge
    cell: Int[jax.Array, " N"]  #: the likeliest, by the classification gate; intervals are calibrated by it
    variance: PredictiveVariance | None = None  #: its parts as they are
    sigma: Float[jax.Array, " N"] | None = None  #: root of the sum of the parts, each times its factor; before calibration
    half_width: Float[jax.Array, "N L"] | None = None  #: of the calibrated intervals, by level
    distance: Float[jax.Array, " N"] | None = None  #: in feature space; above 1, the star is unlike the training stars
    gradient: Float[jax.Array, "N P"] | None = None  #: of log_g in the flux


def predict_model(
    model: Model,
    flux: Float[AnyArray, "N P"],
    error: Float[AnyArray, "N P"] | None = None,
    good: Bool[AnyArray, "N P"] | None = None,
    scale_error: Float[AnyArray, " N"] | None = None,
) -> MixturePrediction:
    """Applies a model to noisy spectra on its own wavelengths, scaled as those it was trained on.

    Args:
        model: of ``load_model``.
        flux: noisy.
        error: standard deviation of its noise; by default that of the training stars.
        good: False for pixels that are masked, and filled before anything else; needs a model with uncertainties.
        scale_error: relative standard deviation of the factor by which a spectrum was scaled; 0 by default.

    Raises:
        InputError: for another number of pixels, or masked pixels where the model has nothing to fill them with.
    """
    if flux.ndim != 2 or flux.shape[1] != len(model.wave):
        raise InputError(f"flux has shape {flux.shape}, expected (N, {len(model.wave)}) for the wavelengths of the model")
    for name, array in (("error", error), ("good", good)):
        if array is not None and array.shape != flux.shape:
            raise InputError(f"{name} has shape {array.shape}, expected {flux.shape} like flux")
    known = model.uncertainty
    if good is not None:
        if known is None:
            raise InputError("good was given for a model without uncertainties, expected one that knows how to fill masked pixels")
        flux = fill_masked(flux, good, known.center, known.leverage.basis)
    pixels = tuple(line_pixels(model.wave).values())
    (log_g, gradient), (weights, features, predictions) = _mix(
        model.gate, model.gate_params, model.experts, model.features, pixels, jnp.asarray(flux), known is not None
    )
    cell = jnp.argmax(LinearGate().apply(model.classification_params, features), axis=1)
    prediction = MixturePrediction(log_g, weights, features, predictions, predict_ridge(model.global_ridge, flux), cell)
    if known is None:
        return prediction
    sigma = jnp.sqrt(known.noise_variance)[None, :] if error is None else jnp.asarray(error)
    if good is not None:
        sigma = jnp.where(good, sigma, jnp.sqrt(known.rest_variance)[None, :])
    variance = predictive_variance(
        weights,
        predictions,
        approximate_leverage(known.leverage, flux),
        known.residual_variance,
        known.misfit,
        gradient,
        jnp.broadcast_to(sigma, flux.shape),
    )
    if scale_error is not None:
        scaling = jnp.sum(jnp.asarray(gradient) * flux, axis=1) * scale_error
        variance = variance._replace(noise=variance.noise + scaling**2)
    prediction = prediction._replace(distance=feature_distance(known.feature_range, features), gradient=gradient)
    return with_variance(model, prediction, variance)


def with_variance(model: Model, prediction: MixturePrediction, variance: PredictiveVariance) -> MixturePrediction:
    """A prediction with this variance and the calibrated intervals that follow from it."""
    assert model.uncertainty is not None
    sigma = jnp.sqrt(variance.total(model.uncertainty.part_scales))
    half_width = half_widths(model.uncertainty.calibration, sigma, prediction.cell)
    return prediction._replace(variance=variance, sigma=sigma, half_width=half_width)


@functools.partial(jax.jit, static_argnames=("gate", "differentiate"))
def _mix(
    gate: Gate,
    params: Params,
    experts: Ridge,
    feature_model: FeatureModel,
    pixels: tuple[LinePixels, ...],
    flux: jax.Array,
    differentiate: bool,
) -> tuple[tuple[jax.Array, jax.Array | None], tuple[jax.Array, jax.Array, jax.Array]]:
    """The mixture and its gradient in the flux (one reverse pass, as stars do not mix); weights, features, predictions."""

    def mixture(flux: jax.Array) -> tuple[jax.Array, tuple[jax.Array, jax.Array, jax.Array]]:
        features = features_of_pixels(feature_model, flux, pixels)
        weights, predictions = gate.apply(params, features), predict_ridges(experts, flux)
        return route_soft(weights, predictions), (weights, features, predictions)

    if not differentiate:
        log_g, parts = mixture(flux)
        return (log_g, None), parts
    log_g, pull_back, parts = jax.vjp(mixture, flux, has_aux=True)
    return (log_g, pull_back(jnp.ones_like(log_g))[0]), parts


def save_model(folder: Path | str, model: Model) -> None:
    """Writes a model; the file that names the other by its hash is written last, so that a half-written model is none.

    Raises:
        InputError: for a gate that is neither linear nor an MLP.
    """
    folder = Path(folder)
    data = save({name: np.asarray(array, order="C") for name, array in _arrays(model).items()})
    meaning = {
        "schema_version": SCHEMA_VERSION,
        "arrays_sha256": hashlib.sha256(data).hexdigest(),
        "gate": _describe_gate(model.gate),
        **FEATURE_DEFINITION,
        "cells": list(CELL_NAMES),
        "T_eff_edges": list(T_EFF_EDGES),
        "M_H_edges": list(M_H_EDGES),
        "provenance": model.provenance,
    }
    for name, content in ((ARRAYS, data), (MEANING, (json.dumps(meaning, indent=2) + "\n").encode())):
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)


def load_model(folder: Path | str) -> Model:
    """Reads a model that ``save_model`` wrote, bit by bit the same.

    Raises:
        InputError: one sentence that names the file, what was found and what is expected, for a folder or file that is not
            there, truncated, foreign, or written by a newer version.
    """
    folder = Path(folder)
    meaning = _read_meaning(folder / MEANING)
    path = folder / ARRAYS
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected the arrays of the model")
    data = path.read_bytes()
    if (found := hashlib.sha256(data).hexdigest()) != meaning["arrays_sha256"]:
        expected = str(meaning["arrays_sha256"])[:12]
        raise InputError(
            f"{path}: found {len(data):,} bytes with hash {found[:12]}, expected those with hash {expected} that {MEANING} names: "
            "it is truncated, or belongs to another model"
        )
    try:
        arrays = load(data)
    except SafetensorError as reason:
        raise InputError(f"{path}: found a file that is not safetensors ({reason}), expected one") from reason
    if meaning["schema_version"] == 2 and "uncertainty/misfit" in arrays:  # which had no factors
        arrays["uncertainty/part_scales"] = np.ones(len(PredictiveVariance._fields), arrays["uncertainty/misfit"].dtype)
    gate = _read_gate(folder / MEANING, meaning["gate"])
    flat = {name: jnp.asarray(array) for name, array in arrays.items() if name != "wave"}
    try:
        model = Model(
            wave=arrays["wave"],
            experts=Ridge(flat["experts/coef"], flat["experts/intercept"]),
            global_ridge=Ridge(flat["global/coef"], _scalar(flat["global/intercept"])),
            features=FeatureModel(
                PCA(flat["features/pca_mean"], flat["features/pca_components"]), flat["features/mean"], flat["features/scale"]
            ),
            gate=gate,
            gate_params=_unflatten(flat, "gate"),
            classification_params=_unflatten(flat, "classification"),
            provenance=meaning["provenance"],
            uncertainty=_read_tree(Uncertainty, arrays, "uncertainty") if "uncertainty/misfit" in arrays else None,
        )
    except KeyError as reason:
        raise InputError(f"{path}: found no array {reason}, expected all of schema {SCHEMA_VERSION}") from reason
    _check_shapes(path, model)
    return model


def _arrays(model: Model) -> dict[str, np.ndarray]:
    named = {
        "wave": model.wave,
        "experts/coef": model.experts.coef,
        "experts/intercept": model.experts.intercept,
        "global/coef": model.global_ridge.coef,
        "global/intercept": model.global_ridge.intercept,
        "features/pca_mean": model.features.pca.mean,
        "features/pca_components": model.features.pca.components,
        "features/mean": model.features.mean,
        "features/scale": model.features.scale,
    }
    for kind, params in (("gate", model.gate_params), ("classification", model.classification_params)):
        named |= {f"{kind}/{layer}/{name}": array for layer, leaves in params.items() for name, array in leaves.items()}
    if model.uncertainty is not None:
        named |= _name_tree(model.uncertainty, "uncertainty")
    return {name: np.asarray(array) for name, array in named.items()}


_PARTS: dict[str, Any] = {"leverage": Leverage, "feature_range": FeatureRange, "calibration": Calibration}


def _name_tree(tree: Any, prefix: str) -> dict[str, AnyArray]:
    """The arrays of a named tuple and of those within it, by path."""
    named: dict[str, AnyArray] = {}
    for name, value in tree._asdict().items():
        named |= _name_tree(value, f"{prefix}/{name}") if name in _PARTS else {f"{prefix}/{name}": value}
    return named


def _read_tree(kind: Any, arrays: dict[str, np.ndarray], prefix: str) -> Any:
    """The named tuple whose arrays ``_name_tree`` has named."""
    fields = ((name, f"{prefix}/{name}") for name in kind._fields)
    return kind(*(_read_tree(_PARTS[name], arrays, path) if name in _PARTS else jnp.asarray(arrays[path]) for name, path in fields))


def _check_shapes(path: Path, model: Model) -> None:
    """Raises an ``InputError`` where arrays do not fit together, or a parameter is not finite."""
    n_pixels, (n_experts, n_features) = len(model.wave), (len(model.experts.intercept), len(model.features.mean))
    hidden = model.gate.hidden if isinstance(model.gate, MLPGate) else None
    layers: dict[str, tuple[int, ...]] = {"head": (hidden or n_features, n_experts)}
    if hidden:
        layers["hidden"] = (n_features, hidden)
    expected: dict[str, tuple[int, ...]] = {
        "wave": (n_pixels,),
        "experts/coef": (n_experts, n_pixels),
        "experts/intercept": (n_experts,),
        "global/coef": (n_pixels,),
        "global/intercept": (),
        "features/pca_mean": (n_pixels,),
        "features/mean": (len(FEATURE_NAMES),),
        "features/scale": (len(FEATURE_NAMES),),
        "features/pca_components": (len(model.features.pca.components), n_pixels),
        "classification/head/kernel": (n_features, n_experts),
        "classification/head/bias": (n_experts,),
    }
    for layer, shape in layers.items():
        expected |= {f"gate/{layer}/kernel": shape, f"gate/{layer}/bias": shape[1:]}
    if (known := model.uncertainty) is not None:
        n_directions, n_levels = len(known.leverage.basis), len(known.calibration.levels)
        by_expert = ("residual_variance", "misfit", "leverage/n_stars", "calibration/n_stars")
        expected |= {f"uncertainty/{name}": (n_experts,) for name in by_expert}
        by_pixel = ("noise_variance", "center", "rest_variance")
        expected |= {f"uncertainty/{name}": (n_pixels,) for name in by_pixel}
        expected |= {f"uncertainty/leverage/{name}": (n_experts, n_pixels) for name in ("mean", "inverse_diagonal")}
        expected |= {
            "uncertainty/leverage/basis": (n_directions, n_pixels),
            "uncertainty/leverage/core": (n_experts, n_directions, n_directions),
            "uncertainty/flux_median": (),
            "uncertainty/part_scales": (len(PredictiveVariance._fields),),
            "uncertainty/feature_range/mean": (n_experts, n_features),
            "uncertainty/feature_range/precision": (n_experts, n_features, n_features),
            "uncertainty/feature_range/limit": (),
            "uncertainty/calibration/levels": (n_levels,),
            "uncertainty/calibration/quantiles": (n_experts, n_levels),
        }
    arrays = _arrays(model)
    for name, shape in expected.items():
        if name not in arrays:
            raise InputError(f"{path}: found no array {name!r}, expected all of schema {SCHEMA_VERSION}")
        if arrays[name].shape != shape:
            raise InputError(f"{path}: {name} has shape {arrays[name].shape}, expected {shape} beside the other arrays")
        if not name.startswith("global/") and name != "uncertainty/flux_median" and not np.isfinite(arrays[name]).all():
            raise InputError(f"{path}: {name} holds numbers that are not finite, expected a trained model")


def _unflatten(flat: dict[str, Any], kind: str) -> Params:
    params: Params = {}
    for name, array in flat.items():
        if name.startswith(f"{kind}/"):
            _, layer, leaf = name.split("/")
            params.setdefault(layer, {})[leaf] = array
    if "head" not in params:
        raise KeyError(f"{kind}/head/kernel")
    return params


def _scalar(array: jax.Array) -> jax.Array:
    """Schema 1 held scalars as arrays of one number."""
    return array.reshape(()) if array.shape == (1,) else array


def _describe_gate(gate: Gate) -> dict[str, Any]:
    if isinstance(gate, MLPGate):
        return {"form": "MLPGate", "hidden": gate.hidden}
    if isinstance(gate, LinearGate):
        return {"form": "LinearGate"}
    raise InputError(f"gate is {gate!r}, expected a LinearGate or an MLPGate")


def _read_gate(path: Path, description: Any) -> Gate:
    form = description.get("form") if isinstance(description, dict) else None
    if form == "LinearGate":
        return LinearGate()
    if form == "MLPGate" and isinstance(description.get("hidden"), int):
        return MLPGate(description["hidden"])
    raise InputError(f"{path}: gate: found {description!r}, expected a LinearGate or an MLPGate")


def _read_meaning(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected a model that save_model wrote")
    try:
        meaning = json.loads(path.read_bytes())
    except ValueError as reason:
        raise InputError(f"{path}: found a file that is not JSON ({reason}), expected the description of a model") from reason
    version = meaning.get("schema_version") if isinstance(meaning, dict) else None
    if not isinstance(version, int):
        raise InputError(f"{path}: schema_version: found {version!r}, expected {SCHEMA_VERSION}: this is not a model")
    if version > SCHEMA_VERSION:
        raise InputError(f"{path}: schema_version: found {version}, expected at most {SCHEMA_VERSION}: install a newer moe_jax")
    for name in ("arrays_sha256", "gate", "provenance", *FEATURE_DEFINITION):
        if name not in meaning:
            raise InputError(f"{path}: {name}: found nothing, expected it in schema {SCHEMA_VERSION}")
    for name, expected in FEATURE_DEFINITION.items():
        if meaning[name] != expected:
            raise InputError(f"{path}: {name}: found {meaning[name]}, expected {expected} as this version computes them")
    found: dict[str, Any] = meaning
    return found
