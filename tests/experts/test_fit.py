import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import moe_jax
from moe_jax import InputError
from moe_jax.experts import fit

ALPHAS = np.array([0.1, 1.0, 10.0])


@pytest.fixture
def cells(rng):
    """Four cells of unequal size, and stars of none."""
    cell = rng.permutation(np.repeat([-1, 0, 1, 2, 3], [12, 60, 57, 25, 40]))
    x = rng.normal(size=(len(cell), 70)) + 0.3 * cell[:, None]
    y = x @ rng.normal(size=70) + rng.normal(size=len(cell))
    return x, y, cell, rng.permutation(len(cell)) % 5


def test_each_expert_is_the_ridge_of_its_cell(cells, x64):
    x, y, cell, folds = cells
    fitted = moe_jax.fit_experts(x, y, cell, ALPHAS, folds, n_experts=4)
    predictions = moe_jax.predict_experts(fitted, x)
    assert predictions.shape == (len(y), 4)
    for k in range(4):
        stars = cell == k
        cv = moe_jax.cross_validate_ridge(x[stars], y[stars], ALPHAS, folds[stars])
        choice = moe_jax.select_alpha(ALPHAS, cv.mse)
        np.testing.assert_allclose(fitted.mse[k], cv.mse, rtol=1e-8)
        assert float(fitted.alpha[k]) == float(choice.alpha)
        assert bool(fitted.at_edge[k]) == bool(choice.at_edge)
        np.testing.assert_allclose(fitted.out_of_fold[stars], cv.predictions[choice.position], atol=1e-8)
        oracle = Ridge(alpha=float(choice.alpha), solver="svd").fit(x[stars], y[stars])
        np.testing.assert_allclose(predictions[:, k], oracle.predict(x), atol=1e-8)
    assert np.isnan(fitted.out_of_fold[cell < 0]).all()


@pytest.mark.parametrize("n_pixels", [70, 15])
def test_compiled_programs_give_what_lapack_gives(cells, n_pixels, x64, monkeypatch):
    """Off a CPU, cells are padded to common sizes, and XLA compiles what NumPy and LAPACK run here."""
    x, y, cell, folds = cells
    x = x[:, :n_pixels]
    by_lapack = moe_jax.fit_experts(x, y, cell, ALPHAS, folds, n_experts=4)
    monkeypatch.setattr(fit, "to_host", lambda *arrays: tuple(map(jnp.asarray, arrays)))
    compiled = moe_jax.fit_experts(x, y, cell, ALPHAS, folds, n_experts=4)
    jax.tree.map(lambda ours, theirs: np.testing.assert_allclose(ours, theirs, rtol=1e-7, atol=1e-9), compiled, by_lapack)


def test_padded_sizes():
    assert fit.padded_sizes(np.array([3807, 3659, 3297, 3173, 2969, 2749, 2563, 2322, 2041])) == [
        3840, 3840, 3328, 3328, 3008, 2752, 2752, 2368, 2048,
    ]  # fmt: skip


def test_global_ridge(cells, x64):
    x, y, _, folds = cells
    fitted = moe_jax.fit_global(x, y, ALPHAS, folds)
    oracle = Ridge(alpha=float(fitted.alpha), solver="svd").fit(x, y)
    np.testing.assert_allclose(moe_jax.predict_ridge(fitted.ridge, x), oracle.predict(x), atol=1e-8)
    cv = moe_jax.cross_validate_ridge(x, y, ALPHAS, folds)
    np.testing.assert_allclose(fitted.mse, cv.mse, rtol=1e-8)


def test_cross_fitted_predictions_replace_only_the_own_expert(rng):
    predictions, out_of_fold = rng.normal(size=(6, 3)), rng.normal(size=6)
    cell = np.array([0, 1, 2, -1, 1, 0])
    crossed = np.asarray(moe_jax.cross_fitted_predictions(predictions, out_of_fold, cell))
    for i, k in enumerate(cell):
        for j in range(3):
            assert crossed[i, j] == np.float32(out_of_fold[i] if j == k else predictions[i, j])


def test_folds_are_stratified():
    cell = np.repeat([-1, 0, 1], [13, 101, 58])
    folds = np.asarray(moe_jax.assign_folds(jax.random.key(0), cell, 5))
    assert set(folds) == set(range(5))
    for k in (-1, 0, 1):
        counts = np.bincount(folds[cell == k], minlength=5)
        assert counts.max() - counts.min() <= 1
    assert not np.array_equal(folds, moe_jax.assign_folds(jax.random.key(1), cell, 5))


@pytest.mark.parametrize("n_folds", [0, 1, -3, 2.5])
def test_fewer_than_two_folds_are_none(n_folds):
    """One fold holds every star out of its own fit; none at all gave fold numbers that mean nothing."""
    with pytest.raises(InputError, match=f"n_folds is {n_folds}, expected a whole number, at least 2"):
        moe_jax.assign_folds(jax.random.key(0), np.zeros(10, int), n_folds)


def test_a_cell_with_too_few_stars(cells):
    x, y, cell, folds = cells
    with pytest.raises(InputError, match="found 0 stars in cell 4, expected at least 10"):
        moe_jax.fit_experts(x, y, cell, ALPHAS, folds, n_experts=5)
    with pytest.raises(InputError, match="found cell 3, expected cells 0 to 2"):
        moe_jax.fit_experts(x, y, cell, ALPHAS, folds, n_experts=3)
    for options in ({"n_experts": 0}, {"n_experts": 4.0}, {"n_experts": 4, "extend_decades": -1}):
        with pytest.raises(InputError, match=r"(n_experts|extend_decades) is .*, expected a whole number, at least"):
            moe_jax.fit_experts(x, y, cell, ALPHAS, folds, **options)


def test_progress_is_told(cells):
    x, y, cell, folds = cells
    seen = []
    moe_jax.fit_experts(jnp.asarray(x), y, cell, ALPHAS, folds, n_experts=4, on_fitted=lambda: seen.append(1))
    assert len(seen) == 4
