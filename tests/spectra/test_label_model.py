import jax
import numpy as np
import pytest

from moe_jax import load_grid
from moe_jax.spectra.grid import reconstruct_nodes
from moe_jax.spectra.label_model import BROADENING_NODES, GRID_WIDTH, LIGHT_SPEED, default_model
from moe_jax.spectra.pixels import WAVE


@pytest.mark.slow
def test_components_carry_the_broadened_grid():
    """Oracle: a node convolved by the Gaussian pixel by pixel; the B-splines are undone by their values at the centres."""
    model, node = default_model(), 400
    truth = np.asarray(jax.device_get(reconstruct_nodes(load_grid()).norm)).reshape(-1, len(WAVE))[node]
    coef = model.coef[node, : model.broaden.shape[1]]
    for i, variance in enumerate(BROADENING_NODES):
        spline = coef @ model.broaden[i] @ model.fine.basis
        ours = spline[:-2] / 8 + 0.75 * spline[1:-1] + spline[2:] / 8
        expected = truth
        if variance:
            width = np.sqrt(variance) * GRID_WIDTH / LIGHT_SPEED
            kernel = np.exp(-0.5 * (np.log(WAVE[:, None] / WAVE) / width) ** 2)
            expected = kernel @ truth / kernel.sum(axis=1)
        np.testing.assert_allclose(ours[50:-50], expected[50:-50], atol=3e-3)
        assert np.std((ours - expected)[50:-50]) < 5e-4
