"""Files that are complete or absent: write to a temporary name beside the target, then rename; and formats that need an extra."""

from __future__ import annotations

import glob
import hashlib
import importlib
import os
import shutil
import socket
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from moe_jax.core.arrays import InputError


def require_readable(path: Path) -> None:
    """Raises an ``InputError`` for a file that is there, or may be, and that the system does not let us read."""
    try:
        if path.is_file():
            path.open("rb").close()
    except OSError as reason:
        raise InputError(f"{path}: found that it cannot be read ({reason.strerror}), expected a file that can") from reason


def temporary_beside(path: Path) -> Path:
    """A hidden name beside ``path``, of this process; what killed processes of this machine left under such names is removed."""
    mark = f".{path.name}.{socket.gethostname()}."
    for left in path.parent.glob(f"{glob.escape(mark)}*.partial"):
        if not _is_running(left.name.removeprefix(mark).removesuffix(".partial")):
            shutil.rmtree(left, ignore_errors=True) if left.is_dir() else left.unlink(missing_ok=True)
    return path.with_name(f"{mark}{os.getpid()}.partial")


def _is_running(pid: str) -> bool:
    """Whether another process of this number is there; True where it cannot be known."""
    if not pid.isdigit() or os.name != "posix":
        return True
    try:
        os.kill(int(pid), 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        return True
    return int(pid) != os.getpid()


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; renames it to ``path`` at the end, removes it where the block raises.

    A process that is killed inside the block leaves at most a hidden ``.partial`` file, which the next one on this machine that
    writes ``path`` removes, never a half-written ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def fingerprint(paths: Sequence[Path]) -> str:
    """Hash of the contents of some files."""
    digest = hashlib.sha256()
    for path in paths:
        digest.update(path.name.encode() + path.read_bytes())
    return digest.hexdigest()


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``path``; at the end renames its files into ``path``, one by one.

    Files of other names that ``path`` holds stay. Where the block raises, ``path`` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = temporary_beside(path)
    temporary.mkdir()
    try:
        yield temporary
        path.mkdir(exist_ok=True)
        for file in sorted(temporary.iterdir()):
            os.replace(file, path / file.name)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def import_extra(module: str, files: str) -> Any:
    """A module of the extra ``astro``, for files of a format.

    Raises:
        ModuleNotFoundError: one sentence that says how to install it.
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as reason:
        package = module.partition(".")[0]
        raise ModuleNotFoundError(f"{files} files need {package}: pip install -e '.[astro]'") from reason
