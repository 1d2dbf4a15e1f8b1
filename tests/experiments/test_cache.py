import ast
import dataclasses
import re
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest

from experiments.runner import cache as runner_cache
from experiments.runner.cache import ROOT, Cache, source_files
from moe_jax import InputError
from moe_jax.core.files import fingerprint


class Tree(NamedTuple):
    a: np.ndarray
    b: dict[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class Config:
    seed: int = 0


@pytest.fixture
def code(tmp_path):
    path = tmp_path / "code.py"
    path.write_text("one = 1")
    return [path]


def make(value=1.0):
    return Tree(np.full(3, value, np.float32), {"x": np.array(True)})


def forbidden():
    raise AssertionError("computed again")


def test_what_was_kept_comes_back(tmp_path, code):
    cache = Cache(tmp_path / "cache")
    first, found = cache.load_or_compute("stage", Config(), code, Tree, make)
    assert not found
    again, found = cache.load_or_compute("stage", Config(), code, Tree, forbidden)
    assert found
    np.testing.assert_array_equal(again.a, first.a)
    assert again.a.dtype == np.float32
    assert again.b["x"].dtype == bool


@pytest.mark.parametrize("change", ["stage", "config", "code"])
def test_another_stage_config_or_code_is_computed(tmp_path, code, change):
    cache = Cache(tmp_path / "cache")
    cache.load_or_compute("stage", Config(), code, Tree, make)
    if change == "code":
        code[0].write_text("two = 2")
        source_files.cache_clear()
    stage, config = ("other" if change == "stage" else "stage"), Config(seed=int(change == "config"))
    other, found = cache.load_or_compute(stage, config, code, Tree, lambda: make(2.0))
    assert not found
    assert other.a[0] == 2


@pytest.mark.parametrize("damage", ["cut", "empty", "foreign"])
def test_a_damaged_file_is_computed_again(tmp_path, code, damage):
    cache = Cache(tmp_path / "cache")
    cache.load_or_compute("stage", Config(), code, Tree, make)
    path = cache.path("stage", Config(), code)
    assert isinstance(path, Path)
    content = path.read_bytes()
    path.write_bytes({"cut": content[: len(content) // 2], "empty": b"", "foreign": b"\x89PNG\r\n" * 20}[damage])
    again, found = cache.load_or_compute("stage", Config(), code, Tree, lambda: make(3.0))
    assert not found
    assert again.a[0] == 3
    assert cache.load_or_compute("stage", Config(), code, Tree, forbidden)[1]


def test_a_failed_computation_leaves_nothing(tmp_path, code):
    cache = Cache(tmp_path / "cache")
    with pytest.raises(AssertionError):
        cache.load_or_compute("stage", Config(), code, Tree, forbidden)
    assert not list((tmp_path / "cache").glob("*"))


def test_a_folder_that_cannot_be_written_is_named_before_the_work(tmp_path, code):
    (tmp_path / "file").write_text("")
    for folder, found in (("file", "found a file"), ("file/cache", "found that nothing can be written there")):
        with pytest.raises(InputError, match=rf"{folder}: {found}.*, expected a folder for the cached stages"):
            Cache(tmp_path / folder).load_or_compute("stage", Config(), code, Tree, forbidden)


def test_without_a_folder_nothing_is_kept(tmp_path, code):
    assert Cache(None).path("stage", Config(), code) is None
    for value in (1.0, 2.0):
        tree, found = Cache(None).load_or_compute("stage", Config(), code, Tree, lambda value=value: make(value))
        assert (float(tree.a[0]), found) == (value, False)


def test_the_code_of_a_stage_is_read_from_its_imports():
    """Every cached stage of an experiment depends on the folds, on what reads the spectra and on the grid."""
    for stage in ("pipeline/prepare", "pipeline/stream", "pipeline/gates", "train_jointly", "calibrate_bootstrap"):
        names = {str(path.relative_to(ROOT)) for path in source_files(ROOT / f"experiments/{stage}.py")}
        for needed in ("experts/fit.py", "experts/ridge.py", "core/cholesky.py", "spectra/survey.py", "spectra/data/lte_grid.npz"):
            assert f"moe_jax/{needed}" in names, (stage, needed)
        assert "experiments/pipeline/surveys.py" in names, stage
        assert "experiments/report/figures.py" not in names or not stage.startswith("pipeline"), stage


def test_every_cached_stage_depends_on_the_module_that_computes_it():
    calls = [
        node
        for path in ROOT.glob("experiments/**/*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.Call) and ast.unparse(node.func) in ("cache.load_or_compute", "cache.path")
    ]
    assert len(calls) >= 7
    for call in calls:
        assert "__file__" in [ast.unparse(file) for file in call.args[2].elts], ast.unparse(call)


def test_a_change_to_assign_folds_misses_the_cache_everywhere(tmp_path, monkeypatch):
    """In a copy of the project, one line of ``assign_folds`` is changed: the key of every cached stage changes."""
    stages = re.compile(r"(?:load_or_compute|cache\.path)\(")
    users = [path for path in ROOT.glob("experiments/**/*.py") if stages.search(path.read_text()) and path.name != "cache.py"]
    assert len(users) >= 5

    def keys(root):
        monkeypatch.setattr(runner_cache, "ROOT", root)
        source_files.cache_clear()
        return [fingerprint(source_files(root / path.relative_to(ROOT))) for path in users]

    for package in ("moe_jax", "experiments"):
        shutil.copytree(ROOT / package, tmp_path / package, ignore=shutil.ignore_patterns("__pycache__"))
    before = keys(tmp_path)
    path = tmp_path / "moe_jax/experts/fit.py"
    source = path.read_text()
    assert "def assign_folds(" in source
    path.write_text(source.replace("def assign_folds(", "# changed\ndef assign_folds("))
    after = keys(tmp_path)
    source_files.cache_clear()
    assert all(a != b for a, b in zip(before, after, strict=True))
