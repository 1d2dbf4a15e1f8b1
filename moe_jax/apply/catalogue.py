"""Writes tables of predictions in parts, one row for each star: CSV, Parquet or FITS by the suffix."""

from __future__ import annotations

import csv
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from moe_jax.core.arrays import InputError
from moe_jax.core.files import atomic_path, import_extra

AddRows = Callable[["pd.DataFrame"], None]  # as text: pandas is loaded when it is used


def require_suffix(path: Path | str) -> str:
    """The suffix of a table's path, in lower case.

    Raises:
        InputError: for one of a kind of file that is not written.
    """
    suffix = Path(path).suffix.lower()
    if suffix not in _WRITERS:
        *others, last = _WRITERS
        raise InputError(f"{path}: found the suffix {suffix!r}, expected {', '.join(others)} or {last}")
    return suffix


@contextmanager
def open_catalogue(path: Path | str) -> Iterator[AddRows]:
    """Opens a table that appears under ``path`` when the block ends; nothing appears if the block raises.

    The block is given a function that adds rows. CSV and Parquet are written part by part; a FITS table is held in memory until
    the block ends.

    Raises:
        InputError: for another suffix, or where ``path`` is a folder or cannot be written.
        ModuleNotFoundError: for FITS without astropy, and Parquet without pyarrow.
    """
    writer, path = _WRITERS[require_suffix(path)], Path(path)
    try:
        if path.is_dir():
            raise InputError(f"{path}: found a folder, expected the name of a file")
        folder = next(folder for folder in path.parents if folder.exists())
        if not (folder.is_dir() and os.access(folder, os.W_OK)):
            found = "a folder that cannot be written to" if folder.is_dir() else "a file"
            raise InputError(f"{path}: found that {folder} is {found}, expected a folder for the table")
        with atomic_path(path) as temporary, writer(temporary) as add_rows:
            yield add_rows
    except OSError as reason:  # what is read within the block raises an InputError of its own
        raise InputError(
            f"{path}: found that it cannot be written ({reason.strerror or reason}), expected a place for it"
        ) from reason


@contextmanager
def _write_csv(path: Path) -> Iterator[AddRows]:
    with path.open("w", newline="") as file:
        rows = csv.writer(file, lineterminator=os.linesep)

        def add_rows(part: pd.DataFrame) -> None:  # pandas takes three times as long for it
            if file.tell() == 0:
                rows.writerow(part.columns)
            columns = ([_text(x) for x in column.tolist()] for _, column in part.items())
            rows.writerows(zip(*columns, strict=True))

        yield add_rows


def _text(x: object) -> object:
    """What stands in a CSV file: six digits of a fraction, nothing for NaN."""
    if not isinstance(x, float):
        return x
    return f"{x:.6g}" if x == x else ""


@contextmanager
def _write_parquet(path: Path) -> Iterator[AddRows]:
    arrow, parquet = import_extra("pyarrow", "Parquet"), import_extra("pyarrow.parquet", "Parquet")
    with ExitStack() as stack:
        writer: Any = None

        def add_rows(part: pd.DataFrame) -> None:
            nonlocal writer
            table = arrow.Table.from_pandas(part, preserve_index=False)
            writer = writer or stack.enter_context(parquet.ParquetWriter(path, table.schema))
            writer.write_table(table)

        yield add_rows


@contextmanager
def _write_fits(path: Path) -> Iterator[AddRows]:
    table, parts = import_extra("astropy.table", "FITS").Table, list[pd.DataFrame]()
    yield parts.append
    whole, numeric = pd.concat(parts, ignore_index=True), pd.api.types.is_numeric_dtype
    columns = {name: c.to_numpy() if numeric(c) else np.array(c.tolist(), dtype=str) for name, c in whole.items()}
    table(columns).write(path, format="fits", overwrite=True)


_WRITERS = {".csv": _write_csv, ".parquet": _write_parquet, ".fits": _write_fits}
