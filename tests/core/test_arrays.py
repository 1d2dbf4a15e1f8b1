import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax.core.arrays import InputError, by_numpy, map_blocks, namespace, require_same_length, require_vectors


def test_lengths_that_agree():
    assert require_same_length(x=np.zeros((3, 2)), y=np.zeros(3)) == 3
    assert require_vectors(y=np.zeros(3), p=np.zeros(3)) == 3


@pytest.mark.parametrize("y", [np.zeros(4), np.zeros((3, 1)), np.zeros(())])
def test_other_shapes_are_named(y):
    with pytest.raises(InputError, match=r"y has shape .*expected \(3,\)"):
        require_same_length(x=np.zeros((3, 2)), y=y)


def test_a_column_is_not_a_vector():
    with pytest.raises(InputError, match=r"y has shape \(3, 1\), expected \(N,\)"):
        require_vectors(y=np.zeros((3, 1)), p=np.zeros(3))


def test_no_rows():
    with pytest.raises(InputError, match="at least one row"):
        require_same_length(x=np.zeros((0, 2)), y=np.zeros(0))


def test_numpy_runs_what_is_concrete_and_xla_compiles_the_rest(dtype):
    seen = []

    @by_numpy
    def twice(tree):
        seen.append(namespace(*tree))
        return 2 * tree[0] + tree[1]

    x = np.arange(3, dtype=dtype)
    for result in (twice((x, jnp.ones(3))), twice((jnp.asarray(x), 1.0)), jax.jit(twice)((x, 1.0))):
        assert isinstance(result, jax.Array)
        assert result.dtype == dtype
        np.testing.assert_array_equal(result, 2 * x + 1)
    assert seen == [np, np, jnp]


def test_blocks_share_a_program_and_give_the_whole(rng):
    """Against the function of all rows at once; the last block is padded."""
    x = rng.normal(size=(10, 3)).astype(np.float32)
    doubled = jax.jit(lambda arrays: {"sum": arrays[0].sum(axis=1), "twice": 2 * arrays[1]})
    result = map_blocks(doubled, (x, jnp.asarray(x)), 1, 8, 3)
    np.testing.assert_array_equal(result["twice"], 2 * x[1:8])
    np.testing.assert_allclose(result["sum"], x[1:8].sum(axis=1), rtol=1e-6)
    assert doubled._cache_size() == 1
