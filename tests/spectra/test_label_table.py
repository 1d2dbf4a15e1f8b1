import contextlib
import pickle
import warnings

import h5py
import numpy as np
import pandas as pd
import pytest

from moe_jax import InputError, load_survey, save_survey
from moe_jax.spectra.label_table import TableError, read_table, write_table


@pytest.fixture
def table(rng):
    return pd.DataFrame(
        {"T_eff": rng.uniform(3750, 6000, 5).astype("float32"), "log_g": rng.uniform(1, 5, 5), "snr": rng.integers(1, 9, 5)}
    )


@pytest.mark.parametrize("layout", ["fixed", "table", "some columns by name"])
def test_both_layouts_of_pandas_are_read(tmp_path, table, layout):
    options = {"data_columns": ["log_g"]} if layout == "some columns by name" else {}
    table.to_hdf(tmp_path / "t.h5", key="labels", format="fixed" if layout == "fixed" else "table", **options)
    expected = pd.read_hdf(tmp_path / "t.h5")
    with h5py.File(tmp_path / "t.h5") as file:
        columns = read_table(file)
    assert set(columns) == set(expected.columns)
    for name, column in columns.items():
        np.testing.assert_array_equal(column, expected[name])
        assert column.dtype == expected[name].dtype


def test_pandas_reads_what_is_written(tmp_path, rng):
    columns = {name: rng.normal(size=7).astype("float32") for name in ("T_eff", "log_g", "M_H")}
    with h5py.File(tmp_path / "t.h5", "w") as file:
        write_table(file, "labels", columns)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        frame = pd.read_hdf(tmp_path / "t.h5")
    assert list(frame.columns) == list(columns)
    assert list(frame.index) == list(range(7))
    for name, column in columns.items():
        np.testing.assert_array_equal(frame[name], column)
    with h5py.File(tmp_path / "t.h5") as file:
        np.testing.assert_array_equal(read_table(file)["M_H"], columns["M_H"])


class Hostile:
    """Its pickle makes a file when it is loaded."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return (open, (str(self.path), "w"))


@pytest.mark.parametrize("layout", ["fixed", "table"])
def test_a_survey_file_cannot_run_code(tmp_path, small_survey, layout):
    """The same attribute runs code when pandas reads the file, and does not when ``load_survey`` does."""
    path, ran = tmp_path / "survey.h5", tmp_path / "ran"
    save_survey(path, small_survey)
    labels = pd.read_hdf(path)
    with h5py.File(path, "a") as file:
        del file["labels"]
    labels.to_hdf(path, key="labels", mode="a", format=layout)
    attack = np.bytes_(pickle.dumps(Hostile(ran), protocol=0))
    with h5py.File(path, "a") as file:
        if layout == "fixed":
            file["labels/block0_items"].attrs["name"] = attack
            file["labels"].attrs["extra"] = attack
        else:
            file["labels/table"].attrs["values_block_0_kind"] = attack
    if layout == "fixed":
        assert load_survey(path).flux.shape == small_survey.flux.shape
    else:
        with pytest.raises(
            InputError, match=r"survey.h5: the labels: found no readable pandas table .a pickle that names \w+.open"
        ):
            load_survey(path)
    assert not ran.exists()
    with contextlib.suppress(Exception):  # whatever pandas makes of the result, the code has run
        pd.read_hdf(path)
    assert ran.exists()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda file: file.__delitem__("labels"), "no pandas table"),
        (lambda file: file.copy("labels", "more"), r"2 pandas tables \(/labels, /more\)"),
        (lambda file: file["labels"].attrs.__setitem__("pandas_type", b"series"), "a pandas 'series'"),
        (lambda file: file["labels"].__delitem__("block0_values"), "no array /labels/block0_values of numbers"),
        (lambda file: file["labels/table"].attrs.__setitem__("values_block_0_kind", b"(lp0\nV"), "no list of names"),
        (lambda file: file["labels/table"].attrs.__setitem__("values_block_0_kind", b"(lp0\nVx\np1\na."), "with 1 names"),
        (lambda file: file["labels/table"].attrs.__setitem__("values_block_0_kind", b"I1\n."), "no list of names"),
    ],
)
def test_a_damaged_table_is_named(tmp_path, table, damage, message):
    layout = "table" if "names" in message else "fixed"
    table[["T_eff", "log_g"]].astype("float32").to_hdf(tmp_path / "t.h5", key="labels", format=layout)
    with h5py.File(tmp_path / "t.h5", "a") as file:
        damage(file)
        with pytest.raises(TableError, match=message):
            read_table(file)
