"""A pandas table within an HDF5 file, read and written by h5py alone: nothing that the file holds is executed.

``pandas.read_hdf`` reads tables through PyTables, which unpickles attributes, and a pickle can run any program. Here both layouts
of pandas are read as what they are, arrays: ``fixed`` (``axis0``, ``blockI_items``, ``blockI_values``) and ``table`` (one compound
dataset, whose attributes hold the names of its columns as pickled lists). These lists are read by an unpickler that knows lists and
strings only. What is written is the ``fixed`` layout, which ``pandas.read_hdf`` reads.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import h5py
import numpy as np

_LARGEST_PICKLE = 100_000  # bytes; the names of eight columns take about a hundred


class TableError(ValueError):
    """A table that cannot be read; the message says what was found."""


class _PlainUnpickler(pickle.Unpickler):
    """Builds lists, tuples, numbers and strings; refuses to look up any name, so no code can run."""

    def find_class(self, module_name: str, global_name: str, /) -> Any:
        raise TableError(f"a pickle that names {module_name}.{global_name}")

    def persistent_load(self, pid: Any, /) -> Any:
        raise TableError("a pickle with a persistent id")


def read_table(file: h5py.File) -> dict[str, np.ndarray]:
    """The columns of the one pandas table in an HDF5 file, (N,) each.

    A column of text in the ``fixed`` layout is pickled. It is not read: an empty array of objects stands for it.

    Raises:
        TableError: for no table or several, another layout, columns of different lengths, or a damaged file.
    """
    items: list[Any] = []
    try:
        file.visititems(lambda _, item: items.append(item))
        groups = [item for item in items if isinstance(item, h5py.Group) and "pandas_type" in item.attrs]
        if len(groups) != 1:
            names = ", ".join(group.name for group in groups)
            raise TableError(f"{len(groups)} pandas tables ({names})" if groups else "no pandas table")
        layout = _text(groups[0].attrs["pandas_type"])
        if layout not in _LAYOUTS:
            raise TableError(f"a pandas {layout!r}")
        columns = _LAYOUTS[layout](groups[0])
        if len({len(column) for column in columns.values()}) > 1:
            raise TableError("columns of different lengths")
        return columns
    except TableError:
        raise
    except Exception as reason:  # h5py and NumPy raise a dozen types for a damaged file
        raise TableError(f"damage: {str(reason).splitlines()[0] if str(reason) else type(reason).__name__}") from reason


def write_table(file: h5py.File, key: str, columns: Mapping[str, np.ndarray]) -> None:
    """Writes (N,) columns of one type as a pandas table in the ``fixed`` layout."""
    group = file.create_group(key)
    values = np.stack(list(columns.values()), axis=1)
    names = np.array([name.encode() for name in columns])
    node = {"CLASS": "GROUP", "TITLE": "", "VERSION": "1.0"}
    frame = {"pandas_type": "frame", "encoding": "UTF-8", "errors": "strict", "ndim": 2, "nblocks": 1}
    variety = dict.fromkeys(("axis0_variety", "axis1_variety", "block0_items_variety"), "regular")
    _set_attributes(group, node | frame | variety)
    index = {"name": np.bytes_("N.")}  # a pickled None: pandas' name of an index that has none
    integers, strings = {"kind": "integer"} | index, {"kind": "string"} | index | {"nan_rep": ""}
    common = {"CLASS": "ARRAY", "FLAVOR": "numpy", "TITLE": "", "VERSION": "2.4", "transposed": np.uint8(1)}
    for name, array, kind in (
        ("axis0", names, strings),
        ("axis1", np.arange(len(values)), integers),
        ("block0_items", names, strings),
        ("block0_values", values, {}),
    ):
        _set_attributes(group.create_dataset(name, data=array), common | kind)


def _set_attributes(item: Any, attributes: Mapping[str, Any]) -> None:
    for name, value in attributes.items():
        if isinstance(value, str):  # text is UTF-8 to PyTables; ASCII stands for bytes
            encoded = value.encode()
            value = np.array(encoded, h5py.string_dtype("utf-8", len(encoded))) if encoded else h5py.Empty("S1")
        item.attrs[name] = value


def _read_fixed(group: h5py.Group) -> dict[str, np.ndarray]:
    columns: dict[str, np.ndarray] = {}
    for i in range(int(group.attrs.get("nblocks", 0))):
        names = [_text(name) for name in _array(group, f"block{i}_items")]
        dataset = group.get(f"block{i}_values")
        if isinstance(dataset, h5py.Dataset) and dataset.dtype.kind == "O":  # pickled text: named, but not read
            columns |= {name: np.empty(len(_array(group, "axis1")), object) for name in names}
            continue
        values = _array(group, f"block{i}_values")
        if values.ndim != 2 or len(names) not in values.shape:
            raise TableError(f"block{i}_values of shape {values.shape} for {len(names)} columns")
        # pandas stores a block by column; "transposed" says that the file holds it by row.
        by_row = values if group[f"block{i}_values"].attrs.get("transposed", 0) else values.T
        columns |= dict(zip(names, by_row.T, strict=True))
    return columns


def _read_appendable(group: h5py.Group) -> dict[str, np.ndarray]:
    table, dataset = _array(group, "table"), group["table"]
    columns: dict[str, np.ndarray] = {}
    for field in table.dtype.names or ():
        if field == "index":
            continue
        values = table[field].reshape(len(table), -1)
        names = _plain_list(dataset.attrs.get(f"{field}_kind", b""), field)
        if len(names) != values.shape[1]:
            raise TableError(f"{values.shape[1]} columns in {field} with {len(names)} names")
        columns |= dict(zip(names, values.T, strict=True))
    return columns


_LAYOUTS = {"frame": _read_fixed, "frame_table": _read_appendable}  # pandas' names of the layouts "fixed" and "table"


def _array(group: h5py.Group, name: str) -> np.ndarray:
    dataset = group.get(name)
    if not isinstance(dataset, h5py.Dataset) or dataset.dtype.kind == "O":
        raise TableError(f"no array {group.name}/{name} of numbers")
    return np.asarray(dataset[()])


def _plain_list(pickled: Any, field: str) -> list[str]:
    data = pickled.encode() if isinstance(pickled, str) else np.asarray(pickled).tobytes()
    if len(data) > _LARGEST_PICKLE:
        raise TableError(f"{len(data):,} bytes of names of {field}")
    try:
        names = _PlainUnpickler(io.BytesIO(data)).load()
    except TableError:
        raise
    except Exception as reason:  # a damaged pickle raises a dozen types
        raise TableError(f"no list of names of {field}") from reason
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise TableError(f"no list of names of {field}")
    return names


def _text(value: Any) -> str:
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)
