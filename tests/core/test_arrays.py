import jax
import jax.numpy as jnp
import numpy as np
from sklearn.preprocessing import StandardScaler

from moe_jax.core.arrays import by_numpy, map_blocks, mean_and_scale, namespace, scale_columns


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


def test_standardisation_is_scikit_learns(dtype, rng):
    """Also of constants, whose mean is rounded."""
    x = np.column_stack([np.full(1_000, value) for value in (0.1, 1 / 3, 3.3, 0.0)] + [rng.normal(5, 3, 1_000)]).astype(dtype)
    theirs = StandardScaler().fit(x.astype(float))
    for columns in (x, jnp.asarray(x)):
        mean, scale = mean_and_scale(columns)
        np.testing.assert_array_equal(scale[:4], 1)
        np.testing.assert_allclose(scale, theirs.scale_, rtol=1e-5)
        np.testing.assert_allclose(mean, theirs.mean_, rtol=2e-5)
    np.testing.assert_allclose(scale_columns(x, mean, scale)[:, :4], 0, atol=1e-4)


def test_blocks_share_a_program_and_give_the_whole(rng):
    """Against the function of all rows at once; the last block is padded."""
    x = rng.normal(size=(10, 3)).astype(np.float32)
    doubled = jax.jit(lambda arrays: {"sum": arrays[0].sum(axis=1), "twice": 2 * arrays[1]})
    result = map_blocks(doubled, (x, jnp.asarray(x)), 1, 8, 3)
    np.testing.assert_array_equal(result["twice"], 2 * x[1:8])
    np.testing.assert_allclose(result["sum"], x[1:8].sum(axis=1), rtol=1e-6)
    assert doubled._cache_size() == 1
