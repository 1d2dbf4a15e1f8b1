import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import moe_jax
from moe_jax import InputError, select_alpha
from moe_jax.experts.alphas import require_positive, search_alphas


def test_ties_go_to_the_larger_alpha_and_edges_are_reported():
    choice = select_alpha(np.array([0.1, 10.0, 1.0]), np.array([0.5, 0.5, 0.7]))
    assert (float(choice.alpha), int(choice.position), bool(choice.at_edge)) == (10.0, 1, True)
    assert not bool(select_alpha(np.array([0.1, 1.0, 10.0]), np.array([0.5, 0.4, 0.7])).at_edge)
    assert not bool(select_alpha(np.array([1.0]), np.array([0.5])).at_edge)


def test_nan_is_never_chosen():
    choice = select_alpha(np.array([0.1, 1.0, 10.0, 100.0]), np.array([np.nan, 0.5, 0.7, np.nan]))
    assert (float(choice.alpha), int(choice.position), bool(choice.at_edge)) == (1.0, 1, True)
    with pytest.raises(InputError, match="mse is NaN at all 2 alphas"):
        select_alpha(np.array([1.0, 10.0]), np.full(2, np.nan))
    with pytest.raises(InputError, match="alphas is empty"):
        select_alpha(np.zeros(0), np.zeros(0))


def parabola(best):
    """An error with its minimum at 10^best, and the alphas it was asked for, as the arrays to pick from."""
    return lambda alphas: ((jnp.log10(alphas) - best) ** 2, {"alpha": alphas})


@pytest.mark.parametrize(
    ("best", "decades", "expected", "n_tried", "at_edge"),
    [
        (0.0, 4, 0, 3, False),  # inside: nothing is added
        (3.0, 4, 3, 6, False),  # one beyond the best, so that it lies inside
        (-2.0, 4, -2, 5, False),
        (9.0, 4, 5, 7, True),  # at the bound
        (3.0, 0, 1, 3, True),  # not asked for
    ],
)
def test_a_grid_is_extended_until_the_best_lies_inside(best, decades, expected, n_tried, at_edge, x64):
    grid = jnp.array([1.0, 0.1, 10.0])
    choice, alphas, mse, arrays = search_alphas(grid, parabola(best), decades)
    np.testing.assert_allclose([choice.alpha, arrays["alpha"]], 10.0**expected)
    assert bool(choice.at_edge) == at_edge
    assert alphas.shape == mse.shape == (3 + decades,)
    np.testing.assert_array_equal(alphas[:3], grid)
    tried = np.asarray(alphas[:n_tried])
    assert np.isnan(alphas[n_tried:]).all()
    np.testing.assert_allclose(
        mse, np.pad((np.log10(tried) - best) ** 2, (0, 3 + decades - n_tried), constant_values=np.nan), atol=1e-12
    )


def test_a_single_alpha_is_no_grid():
    choice, alphas, *_ = search_alphas(jnp.ones(1), parabola(5.0), 3)
    assert (float(choice.alpha), bool(choice.at_edge), int(np.isfinite(alphas).sum())) == (1.0, False, 1)


def test_the_search_ends_where_alphas_fail():
    def fails_below(limit):
        return lambda alphas: (jnp.where(alphas < limit, jnp.nan, alphas), alphas)

    choice, alphas, *_ = search_alphas(jnp.array([0.1, 1.0]), fails_below(0.005), 4)
    np.testing.assert_allclose(choice.alpha, 0.01, rtol=1e-6)
    assert bool(choice.at_edge)
    assert int(np.isfinite(alphas).sum()) == 4  # 0.1, 1, 0.01 and 0.001, which failed
    choice, alphas, *_ = search_alphas(jnp.array([0.001, 0.1, 1.0]), fails_below(0.005), 4)
    np.testing.assert_allclose(choice.alpha, 0.1, rtol=1e-6)
    assert int(np.isfinite(alphas).sum()) == 3


@pytest.mark.parametrize("shape", [(60, 90), (200, 40)])
def test_experts_extend_their_own_grids(shape, x64, rng):
    """One cell needs a large penalty, the other a small one; each ends where a wide grid would, and as scikit-learn says."""
    x, noise, cell = rng.normal(size=shape), rng.normal(size=shape[0]), np.arange(shape[0]) % 2
    y = np.where(cell == 0, noise, x @ rng.normal(size=shape[1]) + 0.3 * noise)
    folds, narrow, wide = np.arange(shape[0]) // 2 % 5, np.array([10.0, 20.0]), 10.0 ** np.arange(-4, 7)
    plain = moe_jax.fit_experts(x, y, cell, narrow, folds, n_experts=2)
    extended = moe_jax.fit_experts(x, y, cell, narrow, folds, n_experts=2, extend_decades=6)
    assert np.asarray(plain.at_edge).all()
    assert plain.mse.shape == (2, 2)
    np.testing.assert_array_equal(extended.mse[:, :2], plain.mse)
    for k in range(2):
        own = cell == k
        tried = np.asarray(extended.alphas[k])[np.isfinite(extended.alphas[k])]
        cv = moe_jax.cross_validate_ridge(x[own], y[own], tried, folds[own])
        best = moe_jax.select_alpha(tried, cv.mse)
        np.testing.assert_allclose(extended.alpha[k], best.alpha)
        np.testing.assert_allclose(extended.out_of_fold[own], cv.predictions[best.position], atol=1e-9)
        np.testing.assert_allclose(extended.ridge.coef[k], Ridge(alpha=float(best.alpha)).fit(x[own], y[own]).coef_, atol=1e-8)
        assert min(extended.mse[k, : len(tried)]) <= min(moe_jax.cross_validate_ridge(x[own], y[own], wide, folds[own]).mse) * 1.05


def test_no_penalty_and_bad_penalties():
    for alpha in (np.zeros(0), [1.0, -1.0], np.nan, np.inf):
        with pytest.raises(InputError, match="expected positive numbers"):
            require_positive(alpha)
    jax.jit(require_positive)(-1.0)  # a tracer is not checked
