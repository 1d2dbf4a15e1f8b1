import jax
import numpy as np
import pytest

from moe_jax import load_grid
from moe_jax.spectra.grid import reconstruct_nodes
from moe_jax.spectra.label_model import BROADENING_NODES, GRID_WIDTH, LIGHT_SPEED, chebyshev_terms, default_model
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


def test_the_first_components_say_what_all_of_them_say():
    """The errors of the labels at 100 nodes: derivatives (differences between nodes) of the first components, and of all."""
    model = default_model()
    shape = [len(axis) for axis in model.axes]
    n_slopes, pixels = len(model.fine.slope_basis), model.fine.basis[:, :-2] / 8 + 0.75 * model.fine.basis[:, 1:-1]
    pixels = (pixels + model.fine.basis[:, 2:] / 8).astype(float)
    coef = model.coef[:, : model.broaden.shape[1]].reshape(*shape, -1)
    broaden, terms = model.broaden.astype(float), chebyshev_terms(len(WAVE), 5)
    np.testing.assert_array_equal(model.broaden_slopes, model.broaden[..., 1 : 1 + n_slopes])
    loss = []
    for node in np.random.default_rng(0).integers(0, np.array(shape) - 1, (100, 4)):
        here = coef[tuple(node)]
        steps = [coef[tuple(node + step)] - here for step in np.eye(4, dtype=int)]
        slopes = np.concatenate([np.stack(steps) @ broaden[1], here[None] @ (broaden[2] - broaden[1])])[:, 1:]
        continuum = (here @ broaden[1] @ pixels) * terms
        whole, first = slopes @ pixels[1:], slopes[:, :n_slopes] @ pixels[1 : 1 + n_slopes]
        whole, first = (rows - rows @ np.linalg.pinv(continuum) @ continuum for rows in (whole, first))
        # A fit whose derivatives are not exact solves first @ (residual) = 0.
        inverse = np.linalg.inv(first @ whole.T)
        covariance = inverse @ (first @ first.T) @ inverse.T
        loss.append(np.sqrt(np.diag(covariance) / np.diag(np.linalg.inv(whole @ whole.T))) - 1)
    assert np.all(np.median(loss, axis=0) < 0.01)
    assert np.max(loss) < 0.05
