"""Results of stages on disk, keyed by their configuration and by the code that made them, so that no sweep refits what it has."""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.files import atomic_path

DEFAULT_FOLDER = Path(".cache/moe_jax")
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("moe_jax", "experiments")
Tree = TypeVar("Tree")


def fingerprint(paths: Sequence[Path]) -> str:
    """Hash of the contents of some files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@functools.cache
def source_files(*modules: Path) -> tuple[Path, ...]:
    """The modules and all modules of this project that they import, directly or through others, with their data; sorted.

    The imports are read from the source, so a stage depends on all code that can run in it. Data files are those in the
    folder ``data`` beside an imported module.

    Args:
        *modules: paths of Python files in this project.
    """
    found: set[Path] = set()
    waiting = [module.resolve() for module in modules]
    while waiting:
        path = waiting.pop()
        if path in found:
            continue
        found.add(path)
        if path.suffix == ".py":
            waiting += imported_files(path)
            waiting += (file for file in path.parent.glob("data/*") if file.is_file())
    return tuple(sorted(found))


def imported_files(path: Path) -> list[Path]:
    """The files of this project's modules that a Python file imports; of a package, the names that it hands on."""
    files = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.partition(".")[0] in PACKAGES:
            files += [file for alias in node.names for file in (_module_file(node.module), _handed_on(node.module, alias.name))]
        elif isinstance(node, ast.Import):
            files += [_module_file(alias.name) for alias in node.names if alias.name.partition(".")[0] in PACKAGES]
    return [file for file in files if file is not None]


def _module_file(name: str) -> Path | None:
    """The file of a module or package; None where there is none of that name."""
    stem = ROOT.joinpath(*name.split("."))
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _handed_on(package: str, name: str) -> Path | None:
    """The file of a module ``name`` of a package, or of the module from which the package hands ``name`` on."""
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi")
    if stub.is_file():
        for node in ast.walk(ast.parse(stub.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and name in (alias.name for alias in node.names):
                return _module_file(f"{package}.{node.module}")
    return _module_file(f"{package}.{name}")


@dataclass(frozen=True)
class Cache:
    """A folder of results; each is a tree of arrays in one ``.npz`` file. Without a folder, nothing is kept."""

    folder: Path | None = DEFAULT_FOLDER

    def path(self, stage: str, config: Any, modules: Sequence[Path | str]) -> Path | None:
        """Where the result of a stage lies: named by the stage and a hash of configuration, files, code, JAX and precision."""
        if self.folder is None:
            return None
        settings = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
        made_by = {"jax": jax.__version__, "float": str(jnp.zeros(0).dtype), "device": jax.devices()[0].platform}
        text = json.dumps(
            [stage, settings, fingerprint(source_files(*map(Path, modules))), made_by], default=_identity, sort_keys=True
        )
        return self.folder / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"

    def load_or_compute(
        self, stage: str, config: Any, modules: Sequence[Path | str], skeleton: Tree, compute: Callable[[], Tree]
    ) -> tuple[Tree, bool]:
        """The result of a stage, and whether it was found; computed and kept where it was not.

        Args:
            stage: name of the stage.
            config: all that its result depends on: a dataclass, or anything that JSON can hold.
            modules: files of the modules that compute it and its input; a change to them, or to any module that they import,
                makes the result stale.
            skeleton: a tree of the result's structure, whatever its leaves.
            compute: makes the result.
        """
        path = self.path(stage, config, modules)
        if path is not None and (leaves := _read(path)) is not None:
            tree: Tree = jax.tree.unflatten(jax.tree.structure(skeleton), leaves)
            return tree, True
        tree = jax.block_until_ready(compute())
        if path is not None:
            with atomic_path(path) as temporary, temporary.open("wb") as file:
                np.savez(file, *(np.asarray(leaf) for leaf in jax.tree.leaves(tree)))
        return tree, False


def _identity(value: Any) -> Any:
    """What stands for a value that JSON cannot hold: of a file, also its size and the time of its last change."""
    if isinstance(value, Path) and value.is_file():
        state = value.stat()
        return [str(value.resolve()), state.st_size, state.st_mtime_ns]
    return str(value)


def _read(path: Path) -> list[np.ndarray] | None:
    """The leaves of a kept result; None where there is none, or none that can be read."""
    try:
        with np.load(path) as file:
            return [file[name] for name in file.files]
    except (FileNotFoundError, zipfile.BadZipFile, ValueError, EOFError, OSError):
        return None
