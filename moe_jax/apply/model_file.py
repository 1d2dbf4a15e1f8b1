"""A trained mixture as a folder: the arrays, and what they mean."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moe_jax.apply.conformal import Calibration
from moe_jax.apply.model import Model, Uncertainty
from moe_jax.apply.novelty import FeatureRange
from moe_jax.apply.uncertainty import Leverage, PredictiveVariance
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.files import atomic_path
from moe_jax.core.pca import PCA
from moe_jax.experts.cells import CELL_NAMES, M_H_EDGES, T_EFF_EDGES
from moe_jax.experts.ridge import Ridge
from moe_jax.gates.features import FEATURE_NAMES, LINE_WINDOWS, SIDEBAND, FeatureModel
from moe_jax.gates.networks import Gate, LinearGate, MLPGate
from moe_jax.gates.optimize import Params

SCHEMA_VERSION = 3

ARRAYS, MEANING = "model.safetensors", "model.json"

FEATURE_DEFINITION: dict[str, Any] = {
    "features": list(FEATURE_NAMES),
    "line_windows": {name: list(window) for name, window in LINE_WINDOWS.items()},
    "sideband": SIDEBAND,
}

_PARTS: dict[str, Any] = {"leverage": Leverage, "feature_range": FeatureRange, "calibration": Calibration}


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
