"""Invariances, for whatever numbers hypothesis finds."""

import hypothesis.strategies as st
import jax
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis.extra.numpy import arrays

import moe_jax
from moe_jax.apply.novelty import feature_distance, fit_feature_range
from moe_jax.gates.routing import sharpen
from moe_jax.spectra.resample import overlaps, resample

settings.register_profile(
    "suite", max_examples=25, deadline=None, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
settings.load_profile("suite")
pytestmark = pytest.mark.usefixtures("x64")

numbers = st.floats(-100, 100, allow_nan=False, width=32)
seeds = st.integers(0, 2**32 - 1)


def vector(n):
    return arrays(np.float64, n, elements=numbers, unique=True)


@given(vector(20), vector(20), st.floats(-50, 50), st.floats(0.1, 50), st.booleans())
def test_r2_is_invariant_under_shift_and_scale(y, prediction, shift, scale, flip):
    scale = -scale if flip else scale
    straight, moved = moe_jax.r2_score(y, prediction), moe_jax.r2_score(scale * y + shift, scale * prediction + shift)
    np.testing.assert_allclose(moved, straight, rtol=1e-6, atol=1e-9)


@given(vector(20), vector(20), st.permutations(range(20)))
def test_r2_does_not_depend_on_the_order_of_stars(y, prediction, order):
    np.testing.assert_allclose(moe_jax.r2_score(y[order], prediction[order]), moe_jax.r2_score(y, prediction), rtol=1e-9)


@given(seeds, st.sampled_from([(15, 6), (6, 15)]), st.floats(0.01, 100))
def test_ridge_under_permutation_and_rotation(seed, shape, alpha):
    """Neither the order of the stars nor an orthogonal change of the pixels' basis shows in predictions."""
    rng = np.random.default_rng(seed)
    x, y, new = rng.normal(size=shape), rng.normal(size=shape[0]), rng.normal(size=(4, shape[1]))
    prediction = moe_jax.predict_ridge(moe_jax.fit_ridge(x, y, alpha), new)
    order, rotation = rng.permutation(shape[0]), np.linalg.qr(rng.normal(size=(shape[1], shape[1])))[0]
    permuted = moe_jax.fit_ridge(x[order], y[order], alpha)
    rotated = moe_jax.fit_ridge(x @ rotation, y, alpha)
    np.testing.assert_allclose(moe_jax.predict_ridge(permuted, new), prediction, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(moe_jax.predict_ridge(rotated, new @ rotation), prediction, rtol=1e-8, atol=1e-9)
    np.testing.assert_allclose(
        moe_jax.ridge_leverage(x @ rotation, alpha, new @ rotation), moe_jax.ridge_leverage(x[order], alpha, new), rtol=1e-7
    )


@given(seeds, st.floats(-20, 20), st.floats(0.1, 10))
def test_ridge_under_shift_and_scale_of_the_target(seed, shift, scale):
    rng = np.random.default_rng(seed)
    x, y, new = rng.normal(size=(12, 5)), rng.normal(size=12), rng.normal(size=(4, 5))
    straight = moe_jax.predict_ridge(moe_jax.fit_ridge(x, y, 2.0), new)
    moved = moe_jax.predict_ridge(moe_jax.fit_ridge(x + shift, scale * y + shift, 2.0), new + shift)
    np.testing.assert_allclose(moved, scale * straight + shift, rtol=1e-7, atol=1e-7)


@given(arrays(np.float64, (6, 13), elements=numbers), seeds, st.floats(0.2, 5))
def test_weights_lie_on_the_simplex(features, seed, temperature):
    """Whatever the features, weights are positive with sum 1, and the mixture lies between its experts."""
    predictions = np.random.default_rng(seed).normal(size=(6, 4))
    for gate in (moe_jax.LinearGate(), moe_jax.MLPGate(8)):
        weights = gate.apply(gate.init(jax.random.key(seed), 13, 4), features)
        for w in (weights, sharpen(weights, temperature)):
            assert (np.asarray(w) >= 0).all()
            np.testing.assert_allclose(np.sum(w, axis=1), 1, rtol=1e-9)
            mixture = moe_jax.route_soft(w, predictions)
            assert (mixture >= predictions.min(axis=1) - 1e-9).all()
            assert (mixture <= predictions.max(axis=1) + 1e-9).all()


@given(seeds, st.permutations(range(3)))
def test_bootstrap_under_relabelling_of_groups(seed, names):
    rng = np.random.default_rng(seed)
    y, ours, theirs = rng.normal(size=(3, 30))
    groups = np.arange(30) % 3
    one = moe_jax.bootstrap_delta_r2(jax.random.key(seed), y, ours, theirs, n_resamples=20, groups=groups, n_groups=3)
    two = moe_jax.bootstrap_delta_r2(
        jax.random.key(seed), y, ours, theirs, n_resamples=20, groups=np.array(names)[groups], n_groups=3
    )
    np.testing.assert_allclose(two.groups.low[np.array(names)], one.groups.low, rtol=1e-9)
    np.testing.assert_allclose([two.overall.low, two.overall.high], [one.overall.low, one.overall.high], rtol=1e-12)


@given(seeds, st.floats(0.1, 10), st.floats(-10, 10))
def test_bootstrap_under_exchange_shift_and_scale(seed, scale, shift):
    """Exchanging the two predictions changes the sign of every resample; shifting and scaling all changes nothing."""
    rng = np.random.default_rng(seed)
    y, ours, theirs = rng.normal(size=(3, 30))

    def interval(*arrays):
        result = moe_jax.bootstrap_delta_r2(jax.random.key(seed), *arrays, n_resamples=20, method="percentile")
        return np.array([result.overall.low, result.overall.high])

    straight = interval(y, ours, theirs)
    np.testing.assert_allclose(interval(y, theirs, ours), -straight[::-1], rtol=1e-7, atol=1e-9)
    moved = interval(*(scale * a + shift for a in (y, ours, theirs)))
    np.testing.assert_allclose(moved, straight, rtol=1e-6, atol=1e-8)


@given(seeds, st.integers(5, 60), st.integers(5, 60))
def test_resampling_is_linear_and_stays_within_its_bounds(seed, n_given, n_wanted):
    rng = np.random.default_rng(seed)
    wave = np.cumsum(rng.uniform(0.5, 2, n_given))
    target = np.linspace(wave[0], wave[-1], n_wanted)
    one, two = rng.normal(size=(2, 1, n_given))
    overlap, good, error = overlaps(wave, target), np.ones((1, n_given), bool), np.ones((1, n_given))
    first, second, both = (resample(flux, error, good, overlap, target) for flux in (one, two, 2 * one - 3 * two))
    np.testing.assert_allclose(both.flux, 2 * first.flux - 3 * second.flux, rtol=1e-9, atol=1e-9)
    seen = first.flux[first.good]
    assert seen.size == 0 or (one.min() - 1e-9 <= seen.min() and seen.max() <= one.max() + 1e-9)


@given(seeds)
def test_feature_distance_is_invariant_under_rotation(seed):
    rng = np.random.default_rng(seed)
    x, cell = rng.normal(size=(60, 3)), np.arange(60) % 2
    rotation = np.linalg.qr(rng.normal(size=(3, 3)))[0]
    one, two = fit_feature_range(x, cell, 2), fit_feature_range(x @ rotation, cell, 2)
    np.testing.assert_allclose(feature_distance(two, x @ rotation), feature_distance(one, x), rtol=1e-6, atol=1e-9)
