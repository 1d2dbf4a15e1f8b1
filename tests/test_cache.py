import dataclasses
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from experiments.cache import Cache


class Tree(NamedTuple):
    a: np.ndarray
    b: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


SKELETON = Tree(np.zeros(0), {"x": np.zeros(0)})


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "code.py"
    path.write_text("one")
    return [path]


def make(value=1.0):
    return Tree(np.full(3, value, np.float32), {"x": np.array(True)})


def forbidden():
    raise AssertionError("computed again")


def test_what_was_kept_comes_back(tmp_path, code):
    cache = Cache(tmp_path / "cache")
    first, found = cache.load_or_compute("stage", Config(), code, SKELETON, make)
    assert not found
    again, found = cache.load_or_compute("stage", Config(), code, SKELETON, forbidden)
    assert found
    np.testing.assert_array_equal(again.a, first.a)
    assert again.a.dtype == np.float32
    assert again.b["x"].dtype == bool


@pytest.mark.parametrize("change", ["stage", "config", "code"])
def test_another_stage_config_or_code_is_computed(tmp_path, code, change):
    cache = Cache(tmp_path / "cache")
    cache.load_or_compute("stage", Config(), code, SKELETON, make)
    if change == "code":
        code[0].write_text("two")
    stage, config = ("other" if change == "stage" else "stage"), Config(seed=int(change == "config"))
    other, found = cache.load_or_compute(stage, config, code, SKELETON, lambda: make(2.0))
    assert not found
    assert other.a[0] == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_file_is_computed_again(tmp_path, code, damage):
    cache = Cache(tmp_path / "cache")
    cache.load_or_compute("stage", Config(), code, SKELETON, make)
    path = cache.path("stage", Config(), code)
    assert isinstance(path, Path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "foreign": b"\x89PNG\r\n" * 20}[damage])
    again, found = cache.load_or_compute("stage", Config(), code, SKELETON, lambda: make(3.0))
    assert not found
    assert again.a[0] == 3
    assert cache.load_or_compute("stage", Config(), code, SKELETON, forbidden)[1]


def test_a_failed_computation_leaves_nothing(tmp_path, code):
    cache = Cache(tmp_path / "cache")
    with pytest.raises(AssertionError):
        cache.load_or_compute("stage", Config(), code, SKELETON, forbidden)
    assert not list((tmp_path / "cache").glob("*"))


def test_without_a_folder_nothing_is_kept(tmp_path, code):
    assert Cache(None).path("stage", Config(), code) is None
    for value in (1.0, 2.0):
        tree, found = Cache(None).load_or_compute("stage", Config(), code, SKELETON, lambda value=value: make(value))
        assert (float(tree.a[0]), found) == (value, False)
