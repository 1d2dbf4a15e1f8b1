import functools

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import InputError, cramer_rao, load_grid
from moe_jax.spectra.fisher import LABEL_UNITS, fisher_information, label_derivatives
from moe_jax.spectra.simulate import model_flux

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def stars():
    return moe_jax.simulate_survey(jax.random.key(4), 12, label_sampling="uniform")


def test_derivatives_are_finite_differences(stars, x64):
    grid = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), load_grid())
    labels = np.stack([np.asarray(getattr(stars.labels, name), np.float64) for name in LABEL_UNITS], axis=1)[:3]
    ours = jax.jit(functools.partial(label_derivatives, grid))(labels)
    flux_at = jax.jit(functools.partial(model_flux, grid))
    for i, step in enumerate((1e-2, 1e-5, 1e-5, 1e-5)):
        up, down = labels.copy(), labels.copy()
        up[:, i] += step
        down[:, i] -= step
        difference = np.asarray(flux_at(up) - flux_at(down)) / (2 * step)
        scale = np.abs(difference).max()
        np.testing.assert_allclose(ours[..., i], difference, atol=2e-3 * scale)


def test_floor_by_hand(stars):
    error = np.asarray(stars.error) * 0.2
    information = fisher_information(stars.labels, error)
    assert information.dtype == np.float64
    # Marginalised over three labels: the Schur complement of log g.
    others = [0, 2, 3]
    for star, floor in zip(information, cramer_rao(stars.labels, error), strict=True):
        cross = star[1, others]
        own = star[1, 1] - cross @ np.linalg.inv(star[np.ix_(others, others)]) @ cross
        np.testing.assert_allclose(floor, LABEL_UNITS["log_g"] / np.sqrt(own), rtol=1e-6)


def test_floor_scales_with_the_errors_and_knows_priors(stars):
    error = np.asarray(stars.error)
    floor, ten = cramer_rao(stars.labels, error), cramer_rao(stars.labels, 10 * error)
    np.testing.assert_allclose(ten, 10 * floor, rtol=1e-3)
    prior = cramer_rao(stars.labels, 1e6 * error, prior=True)
    np.testing.assert_allclose(prior, 4.0 / np.sqrt(12), rtol=1e-3)  # nothing but the range 1 to 5
    assert (cramer_rao(stars.labels, error, prior=True) < floor).all()


def test_a_maximum_likelihood_fit_reaches_the_floor(stars, x64):
    """One Gauss-Newton step from the truth, for many draws of the noise: its scatter is the floor."""
    grid = jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), load_grid())
    labels = np.stack([np.asarray(getattr(stars.labels, name), np.float64) for name in LABEL_UNITS], axis=1)[:1]
    error = np.asarray(stars.error, np.float64)[:1] * 0.02
    design = np.asarray(jax.jit(functools.partial(label_derivatives, grid))(labels))[0] / error[0][:, None]
    noise = np.random.default_rng(0).normal(size=(4_000, design.shape[0]))
    steps = noise @ np.linalg.pinv(design).T
    first = jax.tree.map(lambda leaf: leaf[:1], stars.labels)
    np.testing.assert_allclose(steps[:, 1].std(), cramer_rao(first, error)[0], rtol=0.06)


def test_errors_that_are_none(stars):
    with pytest.raises(InputError, match="error holds 0, expected positive numbers"):
        cramer_rao(stars.labels, np.zeros_like(stars.error))
    with pytest.raises(InputError, match=r"error has shape \(3, 4096\), expected \(12, P\)"):
        cramer_rao(stars.labels, np.ones((3, 4096)))
