"""A trained mixture as a file: all that is needed to predict log g from new spectra, and where it came from.

A model is a folder of two files: ``model.safetensors`` holds the arrays, ``model.json`` their meaning: schema version, the
gate's form, the definition of features and cells, provenance, and a hash of the arrays' file. Nothing in them is executed.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moe_jax.arrays import AnyArray, InputError
from moe_jax.cells import CELL_NAMES, M_H_EDGES, T_EFF_EDGES
from moe_jax.features import FEATURE_NAMES, LINE_WINDOWS, PCA, SIDEBAND, FeatureModel, compute_features
from moe_jax.files import atomic_path
from moe_jax.gates import Gate, LinearGate, MLPGate
from moe_jax.optimize import Params
from moe_jax.ridge import Ridge, predict_ridge, predict_ridges
from moe_jax.routing import route_soft

SCHEMA_VERSION = 1
ARRAYS, MEANING = "model.safetensors", "model.json"
FEATURE_DEFINITION: dict[str, Any] = {
    "features": list(FEATURE_NAMES),
    "line_windows": {name: list(window) for name, window in LINE_WINDOWS.items()},
    "sideband": SIDEBAND,
}


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


class MixturePrediction(NamedTuple):
    """What a model says of each star."""

    log_g: Float[jax.Array, " N"]
    weights: Float[jax.Array, "N K"]
    features: Float[jax.Array, "N F"]  #: standardised
    expert_predictions: Float[jax.Array, "N K"]
    global_log_g: Float[jax.Array, " N"]  #: of the global ridge


def predict_model(model: Model, flux: Float[AnyArray, "N P"]) -> MixturePrediction:
    """Applies a model to noisy spectra on its own wavelengths.

    Raises:
        InputError: for another number of pixels.
    """
    if flux.ndim != 2 or flux.shape[1] != len(model.wave):
        raise InputError(f"flux has shape {flux.shape}, expected (N, {len(model.wave)}) for the wavelengths of the model")
    features = compute_features(model.features, flux, np.asarray(model.wave))
    weights = model.gate.apply(model.gate_params, features)
    predictions = predict_ridges(model.experts, flux)
    global_log_g = predict_ridge(model.global_ridge, flux)
    return MixturePrediction(route_soft(weights, predictions), weights, features, predictions, global_log_g)


def save_model(folder: Path | str, model: Model) -> None:
    """Writes a model; the file that names the other by its hash is written last, so that a half-written model is none.

    Raises:
        InputError: for a gate that is neither linear nor an MLP.
    """
    folder = Path(folder)
    data = save({name: np.ascontiguousarray(array) for name, array in _arrays(model).items()})
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
    gate = _read_gate(folder / MEANING, meaning["gate"])
    flat = {name: jnp.asarray(array) for name, array in arrays.items() if name != "wave"}
    try:
        return Model(
            wave=arrays["wave"],
            experts=Ridge(flat["experts/coef"], flat["experts/intercept"]),
            global_ridge=Ridge(flat["global/coef"], flat["global/intercept"]),
            features=FeatureModel(
                PCA(flat["features/pca_mean"], flat["features/pca_components"]), flat["features/mean"], flat["features/scale"]
            ),
            gate=gate,
            gate_params=_unflatten(flat, "gate"),
            classification_params=_unflatten(flat, "classification"),
            provenance=meaning["provenance"],
        )
    except KeyError as reason:
        raise InputError(f"{path}: found no array {reason}, expected all of schema {SCHEMA_VERSION}") from reason


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
    return {name: np.asarray(array) for name, array in named.items()}


def _unflatten(flat: dict[str, Any], kind: str) -> Params:
    params: Params = {}
    for name, array in flat.items():
        if name.startswith(f"{kind}/"):
            _, layer, leaf = name.split("/")
            params.setdefault(layer, {})[leaf] = array
    if "head" not in params:
        raise KeyError(f"{kind}/head/kernel")
    return params


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
