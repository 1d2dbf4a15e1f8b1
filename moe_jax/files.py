"""Files that are complete or absent: write to a temporary name beside the target, then rename; and formats that need an extra."""

from __future__ import annotations

import importlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


@contextmanager
def atomic_path(path: Path | str) -> Iterator[Path]:
    """Yields a temporary name beside ``path``; renames it to ``path`` at the end, removes it where the block raises.

    A process that is killed inside the block leaves at most a ``.partial`` file, never a half-written ``path``.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: Path | str) -> Iterator[Path]:
    """Yields an empty temporary folder beside ``path``; at the end renames its files into ``path``, one by one.

    Files of other names that ``path`` holds stay. Where the block raises, ``path`` is left as it was.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
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
        raise ModuleNotFoundError(f"{files} files need {package}: pip install 'moe_jax[astro]'") from reason
