"""Writes tables of predictions in parts, one row for each star: CSV, Parquet or FITS by the suffix."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import pandas as pd

from moe_jax.core.arrays import InputError
from moe_jax.core.files import atomic_path, import_extra

SUFFIXES = (".csv", ".parquet", ".fits")


class Writer(Protocol):
    """Takes the parts of a table."""

    def write(self, part: pd.DataFrame) -> None:
        """Adds rows."""


def require_suffix(path: Path | str) -> str:
    """The suffix of a table's path, in lower case.

    Raises:
        InputError: for one that is none of ``SUFFIXES``.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise InputError(f"{path}: found the suffix {suffix!r}, expected {', '.join(SUFFIXES[:-1])} or {SUFFIXES[-1]}")
    return suffix


@contextmanager
def open_catalogue(path: Path | str) -> Iterator[Writer]:
    """Opens a table that appears under ``path`` when the block ends; nothing appears if the block raises.

    CSV and Parquet are written part by part; a FITS table is held in memory until the block ends.

    Raises:
        InputError: for another suffix, or where ``path`` is a folder or cannot be written.
        ModuleNotFoundError: for FITS without astropy, and Parquet without pyarrow.
    """
    suffix, path = require_suffix(path), Path(path)
    kinds: dict[str, Any] = {".csv": _CSV, ".parquet": _Parquet, ".fits": _FITS}
    try:
        if path.is_dir():
            raise InputError(f"{path}: found a folder, expected the name of a file")
        for folder in path.parents:
            if folder.exists() and not (folder.is_dir() and os.access(folder, os.W_OK)):
                found = "a folder that cannot be written to" if folder.is_dir() else "a file"
                raise InputError(f"{path}: found that {folder} is {found}, expected a folder for the table")
            if folder.exists():
                break
        with atomic_path(path) as temporary, ExitStack() as stack:
            writer = kinds[suffix](temporary, stack)
            yield writer
            writer.end()
    except OSError as reason:  # what is read within the block raises an InputError of its own
        raise InputError(
            f"{path}: found that it cannot be written ({reason.strerror or reason}), expected a place for it"
        ) from reason


class _CSV:
    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._file, self._first = stack.enter_context(path.open("w", newline="")), True

    def write(self, part: pd.DataFrame) -> None:
        part.to_csv(self._file, index=False, header=self._first, float_format="%.6g")
        self._first = False

    def end(self) -> None:
        self._file.flush()


class _Parquet:
    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._arrow, self._parquet = import_extra("pyarrow", "Parquet"), import_extra("pyarrow.parquet", "Parquet")
        self._path, self._stack = path, stack
        self._writer: Any = None

    def write(self, part: pd.DataFrame) -> None:
        table = self._arrow.Table.from_pandas(part, preserve_index=False)
        if self._writer is None:
            self._writer = self._stack.enter_context(self._parquet.ParquetWriter(self._path, table.schema))
        self._writer.write_table(table)

    def end(self) -> None:
        if self._writer is not None:
            self._writer.close()


class _FITS:
    def __init__(self, path: Path, stack: ExitStack) -> None:
        self._table, self._path = import_extra("astropy.table", "FITS").Table, path
        self._parts: list[pd.DataFrame] = []

    def write(self, part: pd.DataFrame) -> None:
        self._parts.append(part)

    def end(self) -> None:
        whole = pd.concat(self._parts, ignore_index=True)
        numeric = pd.api.types.is_numeric_dtype
        columns = {name: c.to_numpy() if numeric(c) else np.array(c.tolist(), dtype=str) for name, c in whole.items()}
        self._table(columns).write(self._path, format="fits", overwrite=True)
