"""What takes a second to prepare and is the same in every process: kept in JAX's folder of compiled programs, if it has one.

JAX keeps what XLA compiles. But it traces a function again in every process, which can take longer than to run it.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeVar

import jax
from jax import export

from moe_jax.core.arrays import InputError
from moe_jax.core.files import atomic_path, fingerprint
from moe_jax.core.trees import load_tree, save_tree

Tree = TypeVar("Tree")
_PACKAGE = Path(__file__).resolve().parents[1]
_IMPORTED = time.time()
_MOST = 16  # files of one name that stay; the oldest go first
_programs: dict[Path, Any] = {}  # of this process


def kept_tree(name: str, kind: type[Tree], compute: Callable[[], Tree]) -> Tree:
    """The tree of arrays that ``compute`` makes from nothing but the code and the data of this package; read, if it was made."""
    path = _path(name, ".npz")
    if path is None:
        return compute()
    with contextlib.suppress(OSError, InputError):  # there is none, or none that can be read
        return load_tree(path, kind)
    tree = compute()
    with _writing(path):
        save_tree(path, tree)
    return tree


def call_kept(function: Any, *arguments: Any, results: Sequence[type], **static: Any) -> Any:
    """``function(*arguments, **static)``, without tracing the function where a process has done so before.

    The function is one of this package, under ``jax.jit``. ``results`` are the NamedTuples that it returns, ``static`` its static
    arguments, whose ``repr`` says all about them.
    """
    leaves, structure = jax.tree.flatten(arguments)
    if jax.process_count() > 1 or any(isinstance(leaf, jax.core.Tracer) for leaf in leaves):
        return function(*arguments, **static)
    kinds = [(jax.typeof(leaf), getattr(leaf, "sharding", None)) for leaf in leaves]
    modes = [jax.__version__, jax.default_backend(), *map(_setting, ("enable_x64", "default_matmul_precision"))]
    path = _path(function.__name__, ".stablehlo", structure, kinds, modes, static)
    if path is None:
        return function(*arguments, **static)
    if path not in _programs:

        def flat(*leaves: Any) -> Any:
            return function(*jax.tree.unflatten(structure, leaves), **static)

        for kind in results:
            _register(kind)
        _programs[path] = jax.jit(_exported(path, flat, leaves).call)
    return _programs[path](*leaves)


def _exported(path: Path, function: Any, leaves: Sequence[Any]) -> export.Exported:
    """The traced function, from a file that begins with the hash of the rest, or else traced now."""
    with contextlib.suppress(OSError):  # there is none, or none that can be read
        whole = path.read_bytes()
        if hashlib.sha256(whole[32:]).digest() == whole[:32]:
            return export.deserialize(bytearray(whole[32:]))
    exported = export.export(jax.jit(function))(*leaves)
    serialized = exported.serialize()
    with _writing(path), atomic_path(path) as temporary:
        temporary.write_bytes(hashlib.sha256(serialized).digest() + serialized)
    return exported


@functools.cache
def _register(kind: type) -> None:
    export.register_namedtuple_serialization(kind, serialized_name=f"{kind.__module__}.{kind.__qualname__}")


def _path(name: str, ending: str, *depends_on: Any) -> Path | None:
    """Where something lies: named by what it depends on, with the code and the data of this package; None where nothing is kept."""
    folder = _setting("compilation_cache_dir")
    if not folder or "://" in folder or not _setting("enable_compilation_cache"):
        return None
    if (package := _package()) is None:
        return None
    text = repr((package, depends_on))
    return Path(folder) / f"moe_jax-{name}-{hashlib.sha256(text.encode()).hexdigest()[:20]}{ending}"


def _setting(name: str) -> Any:
    """One of JAX's settings."""
    return getattr(jax.config, f"jax_{name}")


@functools.cache
def _package() -> str | None:
    """Hash of the modules and of the data of this package; None where one has changed since, and may not be what runs."""
    files = [*_PACKAGE.rglob("*.py"), *_PACKAGE.rglob("data/*")]
    files = sorted(path for path in files if path.is_file())  # neither folders nor the links by which editors lock files
    return None if any(path.stat().st_mtime > _IMPORTED for path in files) else fingerprint(files)


@contextlib.contextmanager
def _writing(path: Path) -> Iterator[None]:
    """Lets its block write a file, where the folder can be written, and removes the oldest of those of its name."""
    with contextlib.suppress(OSError):
        yield
        name = path.name.rpartition("-")[0]
        files = sorted(path.parent.glob(f"{name}-*{path.suffix}"), key=lambda file: file.stat().st_mtime)
        for file in files[:-_MOST]:
            file.unlink(missing_ok=True)
