"""Results of stages on disk, keyed by their configuration and by the code that made them, so that no sweep refits what it has."""

from __future__ import annotations

import dataclasses
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

import moe_jax
from moe_jax.files import atomic_path

DEFAULT_FOLDER = Path(".cache/moe_jax")
Tree = TypeVar("Tree")


def fingerprint(paths: Sequence[Path]) -> str:
    """Hash of the contents of some files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


def package_files(*names: str) -> list[Path]:
    """Files of the package ``moe_jax`` by their paths in it."""
    return [Path(moe_jax.__file__).parent / name for name in names]


@dataclass(frozen=True)
class Cache:
    """A folder of results; each is a tree of arrays in one ``.npz`` file. Without a folder, nothing is kept."""

    folder: Path | None = DEFAULT_FOLDER

    def path(self, stage: str, config: Any, code: Sequence[Path]) -> Path | None:
        """Where the result of a stage lies: named by the stage and a hash of configuration, files, code, JAX and precision."""
        if self.folder is None:
            return None
        settings = dataclasses.asdict(config) if dataclasses.is_dataclass(config) and not isinstance(config, type) else config
        made_by = {"jax": jax.__version__, "float": str(jnp.zeros(0).dtype), "device": jax.devices()[0].platform}
        text = json.dumps([stage, settings, fingerprint(code), made_by], default=_identity, sort_keys=True)
        return self.folder / f"{stage}-{hashlib.sha256(text.encode()).hexdigest()[:20]}.npz"

    def load_or_compute(
        self, stage: str, config: Any, code: Sequence[Path], skeleton: Tree, compute: Callable[[], Tree]
    ) -> tuple[Tree, bool]:
        """The result of a stage, and whether it was found; computed and kept where it was not.

        Args:
            stage: name of the stage.
            config: all that its result depends on: a dataclass, or anything that JSON can hold.
            code: files whose change makes the result stale.
            skeleton: a tree of the result's structure, whatever its leaves.
            compute: makes the result.
        """
        path = self.path(stage, config, code)
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
