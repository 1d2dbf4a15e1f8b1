import numpy as np
import pytest

import moe_jax
from moe_jax import CELL_NAMES, InputError, assign_cells
from moe_jax.experts.cells import M_H_EDGES, T_EFF_EDGES


def test_edges(dtype):
    T_eff = np.array([3750, 4500, 4499.9, 5250, 6000, 6000.1, 3749, 5000, 5000, 5000, 5000, np.nan], dtype)
    M_H = np.array([-2, -2, -1, 0, 0.5, 0.5, 0, -2.01, 0.51, -1, 0, 0], dtype)
    assert assign_cells(T_eff, M_H).tolist() == [0, 3, 1, 8, 8, -1, -1, -1, -1, 4, 5, -1]
    assert CELL_NAMES[3] == "Mid Metal-poor"


def test_against_numpy_histogram(dtype, rng):
    T_eff, M_H = rng.uniform(3500, 6250, 2000).astype(dtype), rng.uniform(-2.5, 0.75, 2000).astype(dtype)
    cell = np.asarray(assign_cells(T_eff, M_H))
    counts, _, _ = np.histogram2d(T_eff, M_H, bins=[T_EFF_EDGES, M_H_EDGES])
    assert np.bincount(cell[cell >= 0], minlength=9).tolist() == counts.astype(int).ravel().tolist()


def test_shapes():
    with pytest.raises(InputError, match="M_H has shape"):
        assign_cells(np.zeros(3), np.zeros(4))


def test_nearest_cells_leave_nobody_out(rng):
    """By brute force: the cell whose rectangle is nearest in each label."""
    T_eff, M_H = rng.uniform(3500, 6500, 500).astype("f"), rng.uniform(-3, 1, 500).astype("f")
    found = np.asarray(moe_jax.nearest_cells(T_eff, M_H))
    inside = np.asarray(moe_jax.assign_cells(T_eff, M_H))
    assert (found[inside >= 0] == inside[inside >= 0]).all()
    edges_T, edges_M = np.array([3750, 4500, 5250, 6000]), np.array([-2, -1, 0, 0.5])
    for t, m, cell in zip(T_eff, M_H, found, strict=True):
        distance = [
            [max(edges_T[i] - t, t - edges_T[i + 1], 0) / 750 + max(edges_M[j] - m, m - edges_M[j + 1], 0) for j in range(3)]
            for i in range(3)
        ]
        assert np.argmin(np.ravel(distance)) == cell or np.ravel(distance)[cell] == np.min(distance)
