import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.interpolate import CubicSpline

from moe_jax import InputError, load_grid
from moe_jax.spectra.grid import GRID_FILE, compress_grid, interpolate_grid, reconstruct_nodes, save_grid, spline_weights
from moe_jax.spectra.pixels import WAVE

SHARED_GRID = Path(__file__).parents[3] / "shared" / "lte_grid" / "grid.npz"


@pytest.fixture(scope="module")
def nodes():
    return jax.tree.map(np.asarray, reconstruct_nodes(load_grid()))


def test_the_shipped_grid():
    grid = load_grid()
    assert grid.T_eff.tolist() == [3750, 4000, 4500, 5000, 5500, 6000]
    assert grid.log_g.tolist() == [1, 2, 3, 4, 5]
    assert grid.M_H.tolist() == [-2.5, -2, -1.5, -1, -0.5, 0, 0.5, 0.75]
    assert grid.a_M.tolist() == [-0.25, 0.125, 0.5]
    assert GRID_FILE.stat().st_size <= 12e6


@pytest.mark.skipif(not SHARED_GRID.exists(), reason="the independently computed grid does not lie beside this checkout")
def test_against_the_grid_that_was_computed_independently(nodes):
    with np.load(SHARED_GRID) as shared:
        norm, log_continuum = shared["norm"][..., 0, :], shared["logcont"][..., 0, :]
        assert shared["am"].tolist() == [0.125]
        np.testing.assert_allclose(shared["wave"], WAVE, atol=1e-9)
    rms = np.sqrt(np.mean((nodes.norm[..., 1, :] - norm) ** 2, axis=-1))
    assert rms.max() <= 1e-3
    assert np.abs(nodes.log_continuum[..., 1, :] - log_continuum).max() <= 1e-3


def test_spectra_look_like_stars(nodes):
    assert nodes.norm.min() > 0
    assert nodes.norm.max() < 1.01
    triplet = nodes.norm[..., np.argmin(np.abs(WAVE - 8544.4))]
    assert (np.diff(triplet, axis=2) < 0.02).all()  # the core of 8542 deepens with [M/H]


def test_compression_keeps_what_it_is_told_to(rng, tmp_path):
    axes = ([1.0, 2.0, 3.0], [1.0, 2.0], [0.0, 1.0], [0.0, 0.5])
    norm = (rng.normal(size=(24, 5)) @ rng.normal(size=(5, 40))).reshape(3, 2, 2, 2, 40)
    grid = compress_grid(axes, norm, 0.1 * norm, n_components=5, n_continuum_components=5)
    np.testing.assert_allclose(reconstruct_nodes(grid).norm, norm, atol=1e-5)
    save_grid(tmp_path / "grid.npz", grid)
    for ours, theirs in zip(load_grid(tmp_path / "grid.npz"), grid, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("nodes", [[3750, 4000, 4500, 5000, 5500, 6000], [1, 2, 3, 4, 5], [-0.25, 0.125, 0.5], [0, 1]])
def test_spline_weights_against_scipy(nodes, dtype, rng):
    nodes = np.array(nodes, float)
    values = rng.normal(size=len(nodes))
    x = rng.uniform(nodes[0], nodes[-1], 100)
    weights = jax.jit(functools.partial(spline_weights, nodes))(jnp.asarray(x, dtype))
    atol = 2e-5 if dtype == np.float32 else 1e-11
    np.testing.assert_allclose(np.asarray(weights, float) @ values, CubicSpline(nodes, values)(x), atol=atol)
    np.testing.assert_allclose(np.sum(weights, axis=1), 1, atol=atol)


def test_interpolation_at_a_node_is_the_node(nodes):
    grid = load_grid()
    at = [(0, 0, 0, 0), (5, 4, 7, 2), (2, 1, 6, 1), (3, 3, 2, 0)]
    labels = jnp.array([[axis[i] for axis, i in zip(grid[:4], index, strict=True)] for index in at])
    spectra = jax.jit(functools.partial(interpolate_grid, grid))(labels)
    for i, index in enumerate(at):
        np.testing.assert_allclose(spectra.norm[i], nodes.norm[index], atol=2e-5)
        np.testing.assert_allclose(spectra.log_continuum[i], nodes.log_continuum[index], atol=2e-5)


def test_a_polynomial_is_interpolated_exactly(x64, rng):
    """Not-a-knot splines reproduce cubics, parabolas on three nodes, lines on two."""
    axes = ([0.0, 1.0, 2.5, 4.0, 5.0], [0.0, 1.0, 2.0, 3.0], [0.0, 1.0, 3.0], [0.0, 1.0])

    def function(t, g, z, m):
        return (1 + t**3 - 2 * t) * (0.5 * g**3 + g) * (1 - z**2) * (2 + m)

    values = function(*np.meshgrid(*axes, indexing="ij"))[..., None] * np.array([1.0, 2.0])
    grid = compress_grid(axes, values, values)
    grid = grid._replace(**{k: np.asarray(v, float) for k, v in grid._asdict().items()})
    x = rng.uniform(size=(20, 4)) * [5, 3, 3, 1]
    expected = function(*x.T)
    np.testing.assert_allclose(interpolate_grid(grid, jnp.asarray(x)).norm[:, 0], expected, atol=1e-4 * np.abs(values).max())


def test_not_a_grid(tmp_path):
    (tmp_path / "x.npz").write_bytes(b"junk")
    with pytest.raises(InputError, match="found no model grid"):
        load_grid(tmp_path / "x.npz")
