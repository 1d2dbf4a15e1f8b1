"""Results of stages on disk, named by the configuration and the code that made them, so that nothing is computed twice."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import hashlib
import json
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from moe_jax.core.arrays import InputError
from moe_jax.core.files import fingerprint
from moe_jax.core.trees import load_tree, save_tree

DEFAULT_FOLDER = Path(".cache/moe_jax")
ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("moe_jax", "experiments")
Tree = TypeVar("Tree")


@functools.cache
def source_files(*modules: Path) -> tuple[Path, ...]:
    """The modules and all modules of this project that they import, directly or through others, with their data; sorted.

    The imports are read from the source, so a stage depends on all code that can run in it. Data files are those in the
    folder ``data`` beside an imported module.
    """
    files: set[Path] = set()
    waiting = {module.resolve() for module in modules}
    while waiting:
        path = waiting.pop()
        files.add(path)
        if path.suffix == ".py":
            data = {file for file in path.parent.glob("data/*") if file.is_file()}
            waiting |= (imported_files(path) | data) - files
    return tuple(sorted(files))


def imported_files(path: Path) -> set[Path]:
    """The files of this project's modules that a Python file imports."""
    files = []
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            files += [file for alias in node.names for file in (_module_file(node.module), _handed_on(node.module, alias.name))]
        elif isinstance(node, ast.Import):
            files += [_module_file(alias.name) for alias in node.names]
    return {file for file in files if file is not None}


def _module_file(name: str) -> Path | None:
    """The file of a module or package of this project; None for other names."""
    if name.partition(".")[0] not in PACKAGES:
        return None
    stem = ROOT.joinpath(*name.split("."))
    candidates = (stem.with_suffix(".py"), stem / "__init__.py")
    return next((file for file in candidates if file.is_file()), None)


def _handed_on(package: str, name: str) -> Path | None:
    """The file of a package's module ``name``, or of the module from which the package's stub takes ``name``."""
    stub = ROOT.joinpath(*package.split("."), "__init__.pyi")
    if stub.is_file():
        for node in ast.walk(ast.parse(stub.read_text())):
            if isinstance(node, ast.ImportFrom) and node.module and name in (alias.name for alias in node.names):
                return _module_file(f"{package}.{node.module}")
    return _module_file(f"{package}.{name}")


def require_writable(folder: Path, contents: str) -> None:
    """Raises an ``InputError`` where a file is in the way, or nothing can be written: at once, not when the work is done."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: found a file, expected a folder for {contents}")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as reason:
        why = f"{existing} is not a folder" if not existing.is_dir() else reason.strerror
        raise InputError(f"{folder}: found that nothing can be written there ({why}), expected a folder for {contents}") from reason


@dataclass(frozen=True)
class Cache:
    """A folder of results, each a tree of arrays in one file. Without a folder, nothing is kept."""

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
        self, stage: str, config: Any, modules: Sequence[Path | str], kind: type[Tree], compute: Callable[[], Tree]
    ) -> tuple[Tree, bool]:
        """The result of a stage, a NamedTuple, and whether it was kept before; otherwise it is computed and kept.

        ``config`` is all that the result depends on: a dataclass, or anything that JSON can hold. ``modules`` are the files of
        those that compute it and its input; a change to them, or to any module that they import, makes the result stale.
        """
        path = self.path(stage, config, modules)
        if path is not None:
            with contextlib.suppress(OSError, InputError):  # there is none, or none that can be read
                return load_tree(path, kind), True
            require_writable(path.parent, "the cached stages")
        tree = jax.block_until_ready(compute())
        if path is not None:
            save_tree(path, tree)
        return tree, False


def _identity(value: Any) -> Any:
    """Text for a value that JSON cannot hold; for a file, also its size and the time of its last change."""
    if isinstance(value, Path) and value.is_file():
        state = value.stat()
        return [str(value.resolve()), state.st_size, state.st_mtime_ns]
    return str(value)
