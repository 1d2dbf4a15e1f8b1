"""Pairs of methods by group: each difference is that of the group's stars alone."""

import jax
import numpy as np
import pytest

from experiments.pipeline.calibration import MAG_NAMES
from experiments.pipeline.config import BootstrapOptions
from experiments.report.tables import magnitude_bins, pair_table
from moe_jax.evaluate.metrics import r2_score
from moe_jax.experts.cells import CELL_NAMES


def test_magnitudes_have_bins_and_those_beyond_join_the_ends():
    bins = magnitude_bins(np.array([20.0, 20.5, 20.99, 21.0, 22.0, 22.5, 23.0]))
    assert bins.tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert MAG_NAMES == ("20.5 to 21", "21 to 21.5", "21.5 to 22", "22 to 22.5")


@pytest.mark.slow
def test_differences_are_those_of_the_groups(rng):
    y, cell, mag = rng.normal(size=900), np.arange(900) % len(CELL_NAMES), rng.uniform(20.5, 22.5, size=900)
    predictions = {"a": y + 0.1 * rng.normal(size=900), "b": y + 0.5 * rng.normal(size=900)}
    table = pair_table(jax.random.key(0), BootstrapOptions(n_resamples=200), y, predictions, [("a", "b")], cell, mag)
    assert len(table) == 1 + len(CELL_NAMES) + len(MAG_NAMES)
    chosen = {("all", "all"): np.ones(900, bool), ("cell", CELL_NAMES[2]): cell == 2}
    chosen["magnitude", MAG_NAMES[1]] = (mag >= 21) & (mag < 21.5)
    for (by, stars), rows in chosen.items():
        (row,) = table[(table["by"] == by) & (table["stars"] == stars)].to_dict("records")
        peer = r2_score(y[rows], predictions["a"][rows]) - r2_score(y[rows], predictions["b"][rows])
        np.testing.assert_allclose(row["delta_r2"], peer, rtol=1e-3)
        assert row["low"] < row["delta_r2"] < row["high"]
        assert row["n_test"] == rows.sum()
