import warnings

import numpy as np
import pytest
from sklearn.metrics import mean_absolute_error, r2_score, root_mean_squared_error

import moe_jax


@pytest.fixture
def stars(rng, dtype):
    y = rng.uniform(1, 5, 500).astype(dtype)
    return y, (y + rng.normal(0, 0.3, 500)).astype(dtype), rng.integers(-1, 9, 500)


def test_against_scikit_learn(stars, dtype):
    y, prediction, _ = stars
    rtol = 1e-6 if dtype == np.float32 else 1e-13
    for ours, theirs in (
        (moe_jax.r2_score, r2_score),
        (moe_jax.mae, mean_absolute_error),
        (moe_jax.rmse, root_mean_squared_error),
    ):
        np.testing.assert_allclose(float(ours(y, prediction)), theirs(y.astype(float), prediction.astype(float)), rtol=rtol)


def test_by_group_against_scikit_learn(stars, dtype):
    y, prediction, groups = stars
    scores = moe_jax.r2_by_group(y, prediction, groups, 9)
    rtol = 1e-5 if dtype == np.float32 else 1e-12
    for k in range(9):
        member = groups == k
        np.testing.assert_allclose(scores.r2[k], r2_score(y[member].astype(float), prediction[member].astype(float)), rtol=rtol)
        assert scores.n[k] == member.sum()
    assert scores.defined.all()


def test_undefined_r2_is_nan_and_quiet(dtype):
    y = np.array([3.3, 3.3, 3.3, 1.0, 2.0, 4.1], dtype)
    groups = np.array([0, 0, 0, 1, 1, 2])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scores = moe_jax.r2_by_group(y, y + 1, groups, 4)
        assert np.isnan(moe_jax.r2_score(y[:3], y[:3]))
        assert np.isnan(moe_jax.r2_score(y[:1], y[:1]))
    assert np.isnan(np.asarray(scores.r2)).tolist() == [True, False, True, True]
    assert scores.defined.tolist() == [False, True, False, False]
    assert scores.n.tolist() == [3, 2, 1, 0]


def test_invariance_to_shift_and_scale(x64, rng):
    y, prediction = rng.normal(size=100), rng.normal(size=100)
    np.testing.assert_allclose(moe_jax.r2_score(3 * y + 7, 3 * prediction + 7), moe_jax.r2_score(y, prediction), rtol=1e-12)


def test_retention():
    assert moe_jax.retention(0.9, 0.8, 0.95) == pytest.approx(2 / 3)
    assert np.isnan(moe_jax.retention(0.9, 0.8, 0.8))


def test_no_silent_broadcasting():
    for score in (moe_jax.r2_score, moe_jax.mae, moe_jax.rmse):
        with pytest.raises((moe_jax.InputError, TypeError)):
            score(np.zeros(5), np.zeros((5, 1)))
