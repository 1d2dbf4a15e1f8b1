"""Trees of arrays on disk: each leaf under the path of its fields, checked against the annotations when it is read.

A tree is a NamedTuple whose fields are arrays, numbers, other NamedTuples, dictionaries of arrays, or None. Its structure is
read from the annotations, so no example of it is needed.
"""

from __future__ import annotations

import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, cast, get_args, get_origin, get_type_hints

import numpy as np

from moe_jax.core.arrays import InputError
from moe_jax.core.files import atomic_path

Tree = TypeVar("Tree")
Sizes = dict[str, tuple[int, ...]]


def save_tree(path: Path | str, tree: Any) -> None:
    """Writes a tree as one ``.npz`` file, whole or not at all."""
    with atomic_path(path) as temporary, temporary.open("wb") as file:
        np.savez(file, **cast("dict[str, Any]", name_leaves(tree)))


def load_tree(path: Path | str, kind: type[Tree]) -> Tree:
    """Reads a tree of a kind that ``save_tree`` wrote; its arrays are NumPy's.

    Raises:
        FileNotFoundError: where there is no file.
        InputError: one sentence, where the file is damaged, or holds another kind of tree.
    """
    try:
        with np.load(path) as file:
            leaves = {name: np.asarray(leaf) for name, leaf in file.items()}
    # One byte can make NumPy take a file for another format, or ``zipfile`` a file for one that it cannot read.
    except (zipfile.BadZipFile, ValueError, EOFError, RuntimeError, TypeError) as reason:
        raise InputError(f"{path}: found a file that cannot be read ({reason}), expected a tree of arrays") from reason
    return build_tree(str(path), kind, leaves)


def name_leaves(tree: Any, path: str = "") -> dict[str, np.ndarray]:
    """The leaves of a tree by their path, such as ``experts/coef``."""
    children = tree._asdict() if hasattr(tree, "_asdict") else tree
    if not isinstance(children, dict):
        return {} if tree is None else {path: np.asarray(tree, order="C")}
    leaves: dict[str, np.ndarray] = {}
    for key, child in children.items():
        leaves |= name_leaves(child, f"{path}/{key}".lstrip("/"))
    return leaves


def build_tree(source: str, kind: Any, leaves: Mapping[str, np.ndarray], path: str = "", sizes: Sizes | None = None) -> Any:
    """The tree of a kind from the leaves that ``name_leaves`` named.

    A dimension of jaxtyping's annotations has one size in all arrays of a NamedTuple and of those within it. A NamedTuple may
    be stacked: its arrays then have the same dimensions before those of their annotations.

    Leaves that the tree does not have are ignored. ``source`` is what errors name, ``path`` that of the tree among the leaves;
    ``sizes`` gains the dimensions that are met.

    Raises:
        InputError: one sentence, for a leaf that is missing, or of another type or shape.
    """
    if type(None) in get_args(kind):  # optional: None where no leaf of it was kept
        there = any(name.startswith(f"{path}/") for name in leaves)
        return build_tree(source, get_args(kind)[0], leaves, path, sizes) if there else None
    if hasattr(kind, "_fields"):
        hints = get_type_hints(kind)
        known = {name: size for name, size in (sizes or {}).items() if not name.startswith("*")}
        # Arrays first, as their dimensions are those of the tuples within.
        order = sorted(hints, key=lambda field: hasattr(hints[field], "_fields"))
        return kind(**{field: build_tree(source, hints[field], leaves, f"{path}/{field}".lstrip("/"), known) for field in order})
    if get_origin(kind) is dict:
        keys = dict.fromkeys(name.removeprefix(f"{path}/").split("/")[0] for name in leaves if name.startswith(f"{path}/"))
        return {key: build_tree(source, get_args(kind)[1], leaves, f"{path}/{key}", sizes) for key in keys}
    if path not in leaves:
        raise InputError(f"{source}: found no array {path!r}, expected one")
    leaf, annotation = leaves[path], next(iter(get_args(kind)), kind)
    if hasattr(annotation, "dim_str"):
        _require_shape(source, path, leaf, annotation, {} if sizes is None else sizes)
    return leaf.item() if kind in (bool, int, float) else leaf


def _require_shape(source: str, path: str, leaf: np.ndarray, annotation: Any, sizes: Sizes) -> None:
    """Raises an ``InputError`` unless an array has the type and the dimensions of its annotation."""
    dimensions = annotation.dim_str.split()
    names = [name for name in dimensions if not name.startswith(("*", "..."))]
    # Leading dimensions that the annotation names, such as *k, are the same wherever it names them.
    stack = next((name for name in dimensions if name.startswith("*")), "*")
    n_stacked = max(leaf.ndim - len(names), 0)
    found = [leaf.shape[:n_stacked], *((n,) for n in leaf.shape[n_stacked:])]
    expected = [
        (int(name),) if name.isdecimal() else sizes.setdefault(name, size)
        for name, size in zip([stack, *names], found, strict=False)
    ]
    if found != expected or leaf.ndim < len(names):
        shown = [*map(str, expected[0]), *(str(sizes[name][0]) if name in sizes else name for name in names)]
        shape = f"({shown[0]},)" if len(shown) == 1 else f"({', '.join(shown)})"
        raise InputError(f"{source}: {path} has shape {leaf.shape}, expected {shape} beside the other arrays")
    if leaf.dtype.name not in annotation.dtypes:
        raise InputError(f"{source}: {path} holds {leaf.dtype}, expected {annotation.__name__}")
