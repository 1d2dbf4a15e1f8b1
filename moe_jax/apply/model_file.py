"""A trained mixture as a folder: the arrays, and what they mean."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jaxtyping import Float
from safetensors import SafetensorError
from safetensors.numpy import load, save

from moe_jax.apply.model import LocalModel, Model, Uncertainty
from moe_jax.core.arrays import InputError
from moe_jax.core.files import atomic_path, require_readable
from moe_jax.core.trees import build_tree, name_leaves
from moe_jax.experts.cells import CELL_NAMES, M_H_EDGES, T_EFF_EDGES
from moe_jax.experts.ridge import Ridge
from moe_jax.gates.features import FEATURE_NAMES, LINE_WINDOWS, SIDEBAND, FeatureModel
from moe_jax.gates.networks import Gate, LinearGate, MLPGate
from moe_jax.gates.optimize import Params
from moe_jax.spectra.grid import GRID_RESOLUTION

SCHEMA_VERSION = 3

ARRAYS, MEANING = "model.safetensors", "model.json"

FEATURE_DEFINITION: dict[str, Any] = {
    "features": list(FEATURE_NAMES),
    "line_windows": {name: list(window) for name, window in LINE_WINDOWS.items()},
    "sideband": SIDEBAND,
}

#: What the file holds, by name; in the order of the fields of ``Model``.
_KINDS: dict[str, Any] = {
    "wave": Float[np.ndarray, " P"],
    "experts": Ridge,
    "global": Ridge,
    "features": FeatureModel,
    "gate": Params,
    "classification": Params,
    "uncertainty": Uncertainty | None,
    "local": LocalModel | None,
}
#: Arrays whose name in the file is not their path in the tree.
_NAME_IN_TREE = {"features/pca_mean": "features/pca/mean", "features/pca_components": "features/pca/components"}
_NAME_IN_FILE = {path: name for name, path in _NAME_IN_TREE.items()}


def save_model(folder: Path | str, model: Model) -> None:
    """Writes a model; the file that names the other by its hash is written last, so that a half-written model is none.

    Raises:
        InputError: for a gate that is neither linear nor an MLP, and for a model that could not be loaded again, such as one
            whose numbers are not finite. Nothing is written then.
    """
    folder = Path(folder)
    trees = (model.wave, model.experts, model.global_ridge, model.features, model.gate_params, model.classification_params)
    leaves = name_leaves(dict(zip(_KINDS, (*trees, model.uncertainty, model.local), strict=True)))
    gate = _describe_gate(model.gate)
    _assemble(folder / ARRAYS, model.gate, leaves, model.provenance, model.resolution)
    data = save({_NAME_IN_FILE.get(path, path): array for path, array in leaves.items()})
    meaning = {
        "schema_version": SCHEMA_VERSION,
        "arrays_sha256": hashlib.sha256(data).hexdigest(),
        "gate": gate,
        **FEATURE_DEFINITION,
        "cells": list(CELL_NAMES),
        "T_eff_edges": list(T_EFF_EDGES),
        "M_H_edges": list(M_H_EDGES),
        "resolution": float(model.resolution),
        "provenance": model.provenance,
    }
    for name, content in ((ARRAYS, data), (MEANING, (json.dumps(meaning, indent=2) + "\n").encode())):
        with atomic_path(folder / name) as temporary:
            temporary.write_bytes(content)


def load_model(folder: Path | str) -> Model:
    """Reads a model that ``save_model`` wrote, bit by bit the same.

    Raises:
        InputError: one sentence that names the file, what was found and what is expected, for a folder or file that is not
            there, truncated, foreign, or of another schema version.
    """
    folder = Path(folder)
    meaning = _read_meaning(folder / MEANING)
    path = folder / ARRAYS
    require_readable(path)
    if not path.is_file():
        raise InputError(f"{path}: found no such file, expected the arrays of the model")
    data = path.read_bytes()
    found, expected = hashlib.sha256(data).hexdigest(), str(meaning["arrays_sha256"])
    if found != expected:
        raise InputError(
            f"{path}: found {len(data):,} bytes with hash {found[:12]}, expected those with hash {expected[:12]} that {MEANING} "
            "names: it is truncated, or belongs to another model"
        )
    try:
        arrays = load(data)
    except SafetensorError as reason:
        raise InputError(f"{path}: found a file that is not safetensors ({reason}), expected one") from reason
    leaves = {_NAME_IN_TREE.get(name, name): array for name, array in arrays.items()}
    gate = _read_gate(folder / MEANING, meaning["gate"])
    resolution = meaning.get("resolution", GRID_RESOLUTION)  # models were made without it, at that of the grid
    return _assemble(path, gate, leaves, meaning["provenance"], resolution)


def _assemble(path: Path, gate: Gate, leaves: dict[str, np.ndarray], provenance: dict[str, Any], resolution: Any) -> Model:
    """The model of its arrays; raises an ``InputError`` where one has another shape or type, or is not finite."""
    sizes = _require_layers(path, gate, leaves)
    # The local experts have a K of their own.
    wave, *trees = (build_tree(str(path), kind, leaves, name, {} if name == "local" else sizes) for name, kind in _KINDS.items())
    for name, array in leaves.items():
        if not name.startswith("global/") and name != "uncertainty/flux_median" and not np.isfinite(array).all():
            raise InputError(f"{path}: {name} holds numbers that are not finite, expected a trained model")
    number = isinstance(resolution, int | float | np.number) and not isinstance(resolution, bool)
    if not number or not 0 < float(resolution) < np.inf:
        raise InputError(f"{path.with_name(MEANING)}: resolution: found {resolution!r}, expected a positive number")
    experts, global_ridge, features, gate_params, classification_params, uncertainty, local = jax.device_put(trees)
    params = (gate, gate_params, classification_params)
    return Model(wave, experts, global_ridge, features, *params, provenance, uncertainty, local, float(resolution))


def _require_layers(path: Path, gate: Gate, leaves: dict[str, np.ndarray]) -> dict[str, tuple[int, ...]]:
    """The numbers of experts and features; raises an ``InputError`` unless experts and gates have the shapes that go with them."""
    n_experts, n_features = np.size(leaves.get("experts/intercept", ())), len(FEATURE_NAMES)
    hidden = gate.hidden if isinstance(gate, MLPGate) else None
    layers = [("classification/head", n_features, n_experts), ("gate/head", hidden or n_features, n_experts)]
    layers += [("gate/hidden", n_features, hidden)] if hidden else []
    expected: dict[str, tuple[int, ...]] = {"experts/intercept": (n_experts,), "global/intercept": ()}
    for layer, n_inputs, n_outputs in layers:
        expected |= {f"{layer}/kernel": (n_inputs, n_outputs), f"{layer}/bias": (n_outputs,)}
    for name, shape in expected.items():
        if name not in leaves or leaves[name].shape != shape:
            found = f"{name} has shape {leaves[name].shape}" if name in leaves else f"found no array {name!r}"
            raise InputError(f"{path}: {found}, expected {shape} beside the other arrays")
    return {"K": (n_experts,), "F": (n_features,)}


def _describe_gate(gate: Gate) -> dict[str, Any]:
    if isinstance(gate, MLPGate):
        return {"form": "MLPGate", "hidden": gate.hidden}
    if isinstance(gate, LinearGate):
        return {"form": "LinearGate"}
    raise InputError(f"gate is {gate!r}, expected a LinearGate or an MLPGate")


def _read_gate(path: Path, description: Any) -> Gate:
    match description:
        case {"form": "LinearGate"}:
            return LinearGate()
        case {"form": "MLPGate", "hidden": int(hidden)}:
            return MLPGate(hidden)
    raise InputError(f"{path}: gate: found {description!r}, expected a LinearGate or an MLPGate")


def _read_meaning(path: Path) -> dict[str, Any]:
    require_readable(path)
    if not path.is_file():
        below = f"; {path.parent / 'model'} is one" if (path.parent / "model" / MEANING).is_file() else ""
        raise InputError(f"{path}: found no such file, expected a model that save_model wrote{below}")
    try:
        meaning = json.loads(path.read_bytes())
    except ValueError as reason:
        raise InputError(f"{path}: found a file that is not JSON ({reason}), expected the description of a model") from reason
    version = meaning.get("schema_version") if isinstance(meaning, dict) else None
    if version != SCHEMA_VERSION:
        advice = "make the model again with this version" if isinstance(version, int) else "this is not a model"
        raise InputError(f"{path}: schema_version: found {version!r}, expected {SCHEMA_VERSION}: {advice}")
    for name in ("arrays_sha256", "gate", "provenance", *FEATURE_DEFINITION):
        if name not in meaning:
            raise InputError(f"{path}: {name}: found nothing, expected it in schema {SCHEMA_VERSION}")
    for name, expected in FEATURE_DEFINITION.items():
        if meaning[name] != expected:
            raise InputError(f"{path}: {name}: found {meaning[name]}, expected {expected} as this version computes them")
    return meaning
