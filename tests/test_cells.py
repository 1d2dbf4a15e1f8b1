import numpy as np
import pytest

from moe_jax import CELL_NAMES, InputError, assign_cells
from moe_jax.cells import M_H_EDGES, T_EFF_EDGES


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
