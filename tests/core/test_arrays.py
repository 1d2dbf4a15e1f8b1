import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.arrays import by_numpy, map_blocks, namespace


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
