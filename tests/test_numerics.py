"""Where float32 ends: data of low rank, huge or tiny numbers, extreme weights. Oracles are float64."""

import jax
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import moe_jax
from moe_jax import InputError


def low_rank(rng):
    """600 rows, of which 30 are different, of rank 3."""
    x = np.repeat(rng.normal(size=(30, 3)) @ rng.normal(size=(3, 200)), 20, axis=0)
    return x.astype(np.float32), (x[:, 0] + 0.1 * rng.normal(size=600)).astype(np.float32)


def test_rows_of_low_rank_at_a_tiny_alpha(rng):
    x, y = low_rank(rng)
    for rows, alpha, error in ((slice(None), 1e-3, 1e-5), (slice(None, None, 4), 1e-3, 2e-2), (slice(None), 1.0, 1e-5)):
        ours = moe_jax.predict_ridge(moe_jax.fit_ridge(x[rows], y[rows], alpha), x[rows])
        theirs = Ridge(alpha).fit(x[rows].astype(float), y[rows]).predict(x[rows])
        np.testing.assert_allclose(ours, theirs, atol=error)
    mixture = moe_jax.fit_moe(jax.random.key(0), x, y, np.arange(600) % 2, alphas=(1e-3, 1e-2), config=moe_jax.GateConfig(epochs=2))
    assert moe_jax.r2_score(y, moe_jax.predict_moe(mixture, x).y) > 0.98


def test_cross_validation_where_folds_leave_fewer_rows_than_columns(rng):
    """The error is within the bound of the docstring."""
    x = rng.normal(size=(100, 100)).astype(np.float32)
    y, folds = x[:, 0] + 0.1 * rng.normal(size=100).astype(np.float32), np.arange(100) % 5
    largest = np.linalg.norm(x, 2) ** 2
    for share in (1e-5, 1e-3, 1e-1):
        alpha, refitted = share * largest, np.zeros(100)
        for k in range(5):
            rest = folds != k
            refitted[~rest] = Ridge(alpha).fit(x[rest].astype(float), y[rest]).predict(x[~rest])
        ours = moe_jax.cross_validate_ridge(x, y, np.array([alpha]), folds).predictions[0]
        assert np.abs(ours - refitted).max() < (1.2e-7 / share + 1e-5) * np.abs(refitted).max()


def test_extreme_weights(rng):
    x = rng.normal(size=(600, 50)).astype(np.float32)
    y, weights = x[:, 0] + 0.1 * rng.normal(size=600).astype(np.float32), 10.0 ** rng.uniform(-8, 8, 600)
    ours, theirs = moe_jax.fit_weighted_ridge(x, y, weights, 1.0), Ridge(1.0).fit(x.astype(float), y, weights)
    np.testing.assert_allclose(ours.coef, theirs.coef_, atol=1e-4)
    few, dual = slice(40), moe_jax.fit_weighted_ridge(x[:40], y[:40], 10.0 ** rng.uniform(-3, 3, 40), 1.0)
    assert np.isfinite(moe_jax.fit_weighted_ridge(x[few], y[few], weights[few], 1.0).coef).all()
    assert np.isfinite(dual.coef).all()


@pytest.mark.parametrize(
    ("x", "message"),
    [(np.full((5, 2), np.nan), "x holds numbers that are not finite"), (1e30 * np.eye(5), "the fit is not finite")],
)
def test_a_fit_that_is_not_finite_is_refused(x, message):
    for fit in (moe_jax.fit_ridge, lambda x, y, alpha: moe_jax.fit_weighted_ridge(x, y, np.ones(5), alpha)):
        with pytest.raises(InputError, match=message):
            fit(x.astype(np.float32), np.arange(5, dtype=np.float32), 1.0)


def test_a_loss_that_overflows_is_refused(rng):
    x = rng.normal(size=(40, 2)).astype(np.float32)
    with pytest.raises(InputError, match="the loss is (nan|inf), expected numbers whose squares do not overflow"):
        moe_jax.fit_gate(jax.random.key(0), moe_jax.LinearGate(), x, 1e25 * x, x[:, 0], moe_jax.GateConfig(epochs=2))
