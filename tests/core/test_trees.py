import re
import zipfile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jaxtyping import Bool, Float

from moe_jax import InputError
from moe_jax.core.arrays import AnyArray
from moe_jax.core.trees import build_tree, load_tree, name_leaves, save_tree


class Line(NamedTuple):
    slope: Float[AnyArray, " P"]
    intercept: Float[AnyArray, ""]


class Tree(NamedTuple):
    lines: Line
    wave: Float[jax.Array, " P"]
    params: dict[str, dict[str, jax.Array]]
    done: Bool[AnyArray, ""]
    score: float
    n: int
    fine: bool
    extra: Line | None = None


def tree(stack=(), n_pixels=4):
    line = Line(np.arange(n_pixels * np.prod(stack, dtype=int), dtype=np.float32).reshape(*stack, n_pixels), np.ones(stack))
    return Tree(line, jnp.linspace(0, 1, n_pixels), {"head": {"bias": np.ones(2)}}, np.array(True), 0.5, 3, True, line)


@pytest.mark.parametrize("stack", [(), (3,), (2, 3)])
@pytest.mark.parametrize("extra", [True, False])
def test_what_was_saved_comes_back(tmp_path, stack, extra):
    saved = tree(stack) if extra else tree(stack)._replace(extra=None)
    save_tree(tmp_path / "tree.npz", saved)
    loaded = load_tree(tmp_path / "tree.npz", Tree)
    assert jax.tree.structure(loaded) == jax.tree.structure(saved)
    for ours, theirs in zip(jax.tree.leaves(loaded), jax.tree.leaves(saved), strict=True):
        np.testing.assert_array_equal(ours, theirs)
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
    assert (type(loaded.score), type(loaded.n), type(loaded.fine)) == (float, int, bool)


def test_leaves_have_the_names_of_their_fields():
    names = {"lines/slope", "lines/intercept", "wave", "params/head/bias", "done", "score", "n", "fine"}
    assert set(name_leaves(tree()._replace(extra=None))) == names


@pytest.mark.parametrize(
    ("name", "array", "message"),
    [
        ("wave", None, "found no array 'wave', expected one"),
        ("lines/slope", None, "found no array 'lines/slope', expected one"),
        ("lines/slope", np.ones(5), "lines/slope has shape (5,), expected (4,) beside the other arrays"),
        ("lines/slope", np.ones((3, 4)), "lines/intercept has shape (), expected (3,) beside the other arrays"),
        ("wave", np.ones(()), "wave has shape (), expected (P,) beside the other arrays"),
        ("done", np.ones(()), "done holds float64, expected Bool"),
    ],
)
def test_another_tree_is_refused(name, array, message):
    leaves = {key: leaf for key, leaf in name_leaves(tree()).items() if key != name} | ({} if array is None else {name: array})
    with pytest.raises(InputError, match=re.escape(f"x.npz: {message}")):
        build_tree("x.npz", Tree, leaves)


def test_a_damaged_file_is_refused(tmp_path):
    path = tmp_path / "tree.npz"
    save_tree(path, tree())
    content = path.read_bytes()
    unknown, encrypted = bytearray(content), bytearray(content)
    entry = content.index(b"PK\x01\x02")  # of the first array in the directory of the file
    unknown[entry + 10], encrypted[entry + 8] = 255, 1
    np.save(tmp_path / "array.npy", np.ones(3))
    array = (tmp_path / "array.npy").read_bytes()
    for damage in (content[: len(content) // 2], b"", b"\x89PNG\r\n" * 20, unknown, encrypted, array):
        path.write_bytes(damage)
        with pytest.raises(InputError, match=r"tree\.npz: found a file that cannot be read"):
            load_tree(path, Tree)
    with zipfile.ZipFile(path, "w") as file:
        for name in name_leaves(tree()):
            file.writestr(name, "text")
    with pytest.raises(InputError, match=r"tree\.npz: wave has shape \(\), expected"):
        load_tree(path, Tree)
    with pytest.raises(FileNotFoundError):
        load_tree(tmp_path / "none.npz", Tree)
