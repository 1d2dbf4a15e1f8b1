import os
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Float

from moe_jax.core import kept
from moe_jax.core.arrays import AnyArray


class Pair(NamedTuple):
    """A result."""

    total: Float[AnyArray, " N"]
    rest: Float[AnyArray, " M"] | None


calls = []


def forget():
    """As a new process would be."""
    kept._programs.clear()
    jax.clear_caches()
    calls.clear()


@pytest.fixture
def folder(tmp_path):
    old = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", str(tmp_path / "compiled"))
    forget()
    yield tmp_path / "compiled"
    jax.config.update("jax_compilation_cache_dir", old)


@jax.jit
def both(x, tree):
    calls.append(x.shape)
    return Pair(x + tree["a"], None if tree["b"] is None else x - tree["b"])


def call(n=3, b=1.0, **static):
    tree = {"a": jnp.ones(n), "b": None if b is None else jnp.full(n, b)}
    return kept.call_kept(both, jnp.arange(float(n)), tree, results=[Pair], **static)


def test_a_program_is_traced_by_one_process_alone(folder):
    first = call()
    assert calls == [(3,)]
    forget()
    again = call()
    assert not calls
    assert isinstance(again, Pair)
    np.testing.assert_array_equal(again.total, [1.0, 2.0, 3.0])
    np.testing.assert_array_equal(again.rest, first.rest)


def test_what_a_program_depends_on_makes_another(folder, monkeypatch):
    call()
    assert call(b=None).rest is None
    assert call(4).total.shape == (4,)
    with jax.enable_x64(True):
        assert call().total.dtype == np.float64
    assert len(list(folder.glob("moe_jax-both-*"))) == 4
    forget()
    monkeypatch.setattr(kept, "_package", lambda: "changed code")
    call()
    assert calls == [(3,)]


@pytest.fixture
def package(tmp_path, monkeypatch):
    (tmp_path / "package" / "data").mkdir(parents=True)
    (tmp_path / "package" / "module.py").write_text("x = 1")
    monkeypatch.setattr(kept, "_PACKAGE", tmp_path / "package")
    monkeypatch.setattr(kept, "_IMPORTED", time.time() + 10)
    kept._package.cache_clear()
    yield tmp_path / "package"
    kept._package.cache_clear()


def test_code_that_changes_while_a_process_runs_is_not_taken_for_what_runs(folder, package):
    os.utime(package / "module.py", (time.time() + 20,) * 2)
    call()
    assert not folder.exists()
    assert kept.kept_tree("pair", Pair, lambda: Pair(np.ones(2), None)).total.tolist() == [1.0, 1.0]
    assert not folder.exists()


def test_an_editors_lock_and_a_folder_are_no_code(folder, package):
    (package / ".#module.py").symlink_to("user@host.1")
    (package / "data" / "notes").mkdir()
    call()
    assert len(list(folder.glob("moe_jax-both-*"))) == 1


def test_a_damaged_program_is_traced_again(folder):
    first = call()
    (file,) = folder.glob("moe_jax-both-*")
    whole = file.read_bytes()
    for damaged in (whole[:-1], whole[:100] + b"x" + whole[101:], b""):
        file.write_bytes(damaged)
        forget()
        np.testing.assert_array_equal(call().total, first.total)
        assert calls == [(3,)]
        assert file.read_bytes()[32:] != damaged[32:]


def test_the_oldest_programs_go(folder, monkeypatch):
    monkeypatch.setattr(kept, "_MOST", 2)
    for n in (2, 3, 4):
        call(n)
    assert len(list(folder.glob("moe_jax-both-*"))) == 2
    forget()
    call(4)
    assert not calls


def test_without_a_folder_nothing_is_kept(folder):
    jax.config.update("jax_compilation_cache_dir", None)
    np.testing.assert_array_equal(call().total, [1.0, 2.0, 3.0])
    assert not folder.exists()


def test_where_the_folder_cannot_be_written_the_answer_comes_nevertheless(folder):
    folder.write_text("a file")
    np.testing.assert_array_equal(call().total, [1.0, 2.0, 3.0])
    assert kept.kept_tree("pair", Pair, lambda: Pair(np.ones(2), None)).total.tolist() == [1.0, 1.0]


def test_inside_other_transformations_the_function_is_called(folder):
    slope = jax.grad(lambda x: kept.call_kept(both, x, {"a": x, "b": None}, results=[Pair]).total.sum())(jnp.ones(3))
    np.testing.assert_array_equal(slope, [2.0, 2.0, 2.0])


def test_a_tree_is_made_once(folder, monkeypatch):
    made = []

    def make():
        made.append(1)
        return Pair(np.arange(3.0), None)

    for _ in range(2):
        np.testing.assert_array_equal(kept.kept_tree("pair", Pair, make).total, [0.0, 1.0, 2.0])
    assert len(made) == 1
    (file,) = folder.glob("moe_jax-pair-*")
    file.write_bytes(file.read_bytes()[:50])
    assert kept.kept_tree("pair", Pair, make).rest is None
    monkeypatch.setattr(kept, "_package", lambda: "changed code")
    kept.kept_tree("pair", Pair, make)
    assert len(made) == 3
