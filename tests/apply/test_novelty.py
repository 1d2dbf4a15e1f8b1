import jax.numpy as jnp
import numpy as np
from scipy.spatial.distance import mahalanobis

from moe_jax.apply.novelty import QUANTILE, SHRINKAGE, feature_distance, fit_feature_range


def test_distance_is_scipys_to_the_nearest_cell(rng, x64):
    x, cell = rng.normal(size=(400, 5)), rng.integers(0, 2, 400)
    x[cell == 1] = 2 * x[cell == 1] + 6
    known = fit_feature_range(x, cell, 2)
    new = rng.normal(3, 4, size=(20, 5))
    inverses = [np.linalg.inv(np.cov(x[cell == k].T, bias=True) + SHRINKAGE * np.eye(5)) for k in range(2)]
    means = [x[cell == k].mean(axis=0) for k in range(2)]
    straight = [min(mahalanobis(star, m, i) for m, i in zip(means, inverses, strict=True)) for star in new]
    np.testing.assert_allclose(feature_distance(known, new) * known.limit, straight, rtol=1e-9)


def test_limit_is_the_quantile_of_the_training_stars(rng):
    x, cell = rng.normal(size=(5_000, 4)).astype("float32"), rng.integers(0, 3, 5_000)
    distance = np.asarray(feature_distance(fit_feature_range(x, cell, 3), x))
    assert abs(np.mean(distance <= 1) - QUANTILE) < 1e-3
    far = jnp.full((1, 4), 20.0)
    assert float(feature_distance(fit_feature_range(x, cell, 3), far)[0]) > 2


def test_a_feature_that_is_the_sum_of_others(rng):
    x = rng.normal(size=(500, 3)).astype("float32")
    x = np.concatenate([x, x.sum(axis=1, keepdims=True)], axis=1)
    distance = feature_distance(fit_feature_range(x, np.zeros(500, int), 1), x)
    assert np.isfinite(np.asarray(distance)).all()
