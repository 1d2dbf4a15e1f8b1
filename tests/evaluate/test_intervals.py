from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import scipy.stats

from moe_jax import InputError, bootstrap_delta_r2
from moe_jax.evaluate import intervals
from moe_jax.evaluate.bootstrap import DEFAULT_METHOD, resample_gain, resample_rows, squared_error_gain, summarize
from moe_jax.evaluate.intervals import METHODS, Resampled, borrow_spread

# One program each; step by step they are a hundred.
confidence_interval = jax.jit(intervals.confidence_interval, static_argnames="method")
simultaneous_interval = jax.jit(intervals.simultaneous_interval)
column_quantiles = jax.jit(intervals.column_quantiles)


def delta(y, p, b, axis=-1):
    total = ((y - y.mean(axis=axis, keepdims=True)) ** 2).sum(axis=axis)
    return (((y - b) ** 2).sum(axis=axis) - ((y - p) ** 2).sum(axis=axis)) / total


@pytest.fixture
def stars(rng):
    """816 stars with a few gross errors, so that the distribution is skewed."""
    y = rng.uniform(1, 5, 816)
    return y, y + 0.3 * rng.normal(size=816), y + 0.2 * rng.exponential(size=816) ** 1.5


def resampled_of(stars, B, groups=None, n_groups=0, seed=4):
    y, p, b = map(jnp.asarray, stars)
    groups = jnp.zeros(len(y), int) if groups is None else jnp.asarray(groups)
    return resample_gain(jax.random.key(seed), y, squared_error_gain(y, p, b), groups, B, n_groups)


@pytest.mark.slow
def test_bca_against_scipy_on_the_same_resamples(stars, x64):
    """scipy's acceleration is the jackknife's, ours the influence function's: they differ in order 1 / N."""
    resampled = resampled_of(stars, 4_000)
    ours = confidence_interval(resampled, "bca", 0.9)
    given = scipy.stats._resampling.BootstrapResult(None, np.asarray(resampled.samples[:, 0]), 0.0)
    theirs = scipy.stats.bootstrap(
        stars, delta, paired=True, vectorized=True, n_resamples=0, bootstrap_result=given, method="BCa", confidence_level=0.9
    ).confidence_interval
    width = theirs.high - theirs.low
    np.testing.assert_allclose([ours.low[0], ours.high[0]], theirs, atol=0.01 * width)
    percentile = confidence_interval(resampled, "percentile", 0.9)
    assert abs(float(percentile.low[0]) - theirs.low) > 0.02 * width  # they are told apart


def test_basic_and_percentile_against_scipy_on_the_same_resamples(stars, x64):
    resampled = resampled_of(stars, 500)
    given = scipy.stats._resampling.BootstrapResult(None, np.asarray(resampled.samples[:, 0]), 0.0)
    for method in ("percentile", "basic"):
        ours = confidence_interval(resampled, method, 0.95)
        theirs = scipy.stats.bootstrap(
            stars, delta, paired=True, vectorized=True, n_resamples=0, bootstrap_result=given, method=method
        ).confidence_interval
        np.testing.assert_allclose([ours.low[0], ours.high[0]], theirs, rtol=1e-10)


def test_errors_and_acceleration_against_the_jackknife(stars, x64):
    """The influence function is the limit of the jackknife: N - 1 times what a star's removal changes."""
    resampled = resampled_of(stars, 3)
    left_out = np.array([delta(*(np.delete(array, i) for array in stars)) for i in range(816)])
    change = left_out.mean() - left_out
    np.testing.assert_allclose(resampled.standard_error[0], np.sqrt(815 / 816 * np.sum(change**2)), rtol=5e-3)
    np.testing.assert_allclose(resampled.acceleration[0], np.sum(change**3) / (6 * np.sum(change**2) ** 1.5), rtol=3e-2)
    assert abs(float(resampled.acceleration[0])) > 0.02


def test_sample_errors_by_brute_force(stars, rng, dtype):
    """The standard error of a resample is that of its stars, taken as a sample of their own; overall and by group."""
    y, p, b = (array.astype(dtype) for array in stars)
    groups = rng.integers(-1, 3, 816)
    resampled = resampled_of((y, p, b), 5, groups, 3)
    for i, key in enumerate(jax.random.split(jax.random.key(4), 5)):
        rows = np.asarray(resample_rows(key, 816))
        for column, drawn in enumerate([rows, *(rows[groups[rows] == k] for k in range(3))]):
            Y, P, B = (array[drawn].astype(float) for array in (y, p, b))
            square = (Y - Y.mean()) ** 2
            gain = (Y - B) ** 2 - (Y - P) ** 2
            influence = (gain - gain.mean() / square.mean() * square) / square.mean()
            rtol = 1e-10 if dtype == np.float64 else 2e-3
            np.testing.assert_allclose(resampled.sample_errors[i, column], np.sqrt(np.mean(influence**2) / len(Y)), rtol=rtol)


def test_five_samples_by_hand(x64):
    """Samples -1, 0, 1, 2, 3 around an estimate of 1: no bias; at 80 % the quantiles are read at 0.1 and 0.9: -0.6 and 2.6."""
    samples = jnp.array([[0.0], [2.0], [-1.0], [3.0], [1.0]])
    errors = jnp.array([[1.0], [2.0], [1.0], [4.0], [1.0]])
    resampled = Resampled(jnp.array([1.0]), jnp.array([0.5]), jnp.array([0.0]), samples, errors)
    ends = {m: np.ravel(confidence_interval(resampled, m, 0.8)) for m in METHODS}
    np.testing.assert_allclose(ends["percentile"], [-0.6, 2.6])
    np.testing.assert_allclose(ends["basic"], [2 - 2.6, 2 + 0.6])
    np.testing.assert_allclose(ends["bca"], ends["percentile"])
    # t = -1, 0.5, -2, 0.5, 0: quantiles at 0.1 and 0.9 are -1.6 and 0.5
    np.testing.assert_allclose(ends["studentized"], [1 - 0.5 * 0.5, 1 + 1.6 * 0.5])
    # |t| = 0, 0.5, 0.5, 1, 2: the quantile at 0.8 is 1.2
    np.testing.assert_allclose(ends["symmetric"], [1 - 0.6, 1 + 0.6])
    np.testing.assert_allclose(np.ravel(simultaneous_interval(resampled, 0.8)), [1 - 0.6, 1 + 0.6])
    # A bias: the estimate above four of five samples; z0 = Phi^-1(0.8), read at Phi(2 z0 -+ 1.2816).
    biased = resampled._replace(estimate=jnp.array([2.5]))
    z0, z = scipy.stats.norm.ppf([0.8, 0.9])
    expected = np.quantile(np.arange(-1, 4), scipy.stats.norm.cdf([2 * z0 - z, 2 * z0 + z]))
    np.testing.assert_allclose(np.ravel(confidence_interval(biased, "bca", 0.8)), expected)


def test_simultaneous_intervals_hold_all_groups_of_normal_statistics(rng, x64):
    """Nine independent normal statistics: the half width is the known quantile of max |z|, for 95 % 2.766 (1 - 0.95^(1/9))."""
    samples = jnp.asarray(rng.normal(size=(200_000, 9)))
    resampled = Resampled(jnp.zeros(9), jnp.full(9, 2.0), jnp.zeros(9), samples, jnp.ones((200_000, 9)))
    known = scipy.stats.norm.ppf(0.5 * (1 + 0.95 ** (1 / 9)))
    np.testing.assert_allclose(simultaneous_interval(resampled, 0.95).high, 2.0 * known, rtol=0.01)


def test_borrowed_spread_by_hand(stars, x64):
    """A quiet group of 4 stars borrows 12 of the whole; a loud one keeps its own, and m = 0 changes nothing."""
    errors = jnp.array([0.2, 0.5, 3.0])
    resampled = Resampled(jnp.zeros(3), errors, jnp.zeros(3), jnp.zeros((5, 3)), jnp.ones((5, 3)))
    size = np.array([100, 4, 4])
    # variances of the influences: 100 x .04 = 4, 4 x .25 = 1, 4 x 9 = 36
    expected = [0.2, np.sqrt((4 * 1 + 12 * 4) / 16 / 4), 3.0]
    np.testing.assert_allclose(borrow_spread(resampled, size, 12).standard_error, expected)
    np.testing.assert_allclose(borrow_spread(resampled, size, 0).standard_error, errors)
    y, prediction, baseline = stars
    groups = np.where(np.arange(len(y)) < 30, 0, 1)
    baseline = np.where(groups == 0, prediction + 1e-3, baseline)
    key = jax.random.key(2)
    own, borrowed = (
        bootstrap_delta_r2(key, y, prediction, baseline, method="symmetric", groups=groups, n_resamples=200, n_borrowed=m)
        for m in (0, 10)
    )
    for part in ("groups", "simultaneous"):
        widths = [np.asarray(getattr(b, part).high - getattr(b, part).low) for b in (own, borrowed)]
        assert widths[1][0] > 5 * widths[0][0]
        assert widths[1][1] == pytest.approx(widths[0][1], rel=0.05)
    np.testing.assert_array_equal(own.overall.low, borrowed.overall.low)
    n, variance, whole = np.array([30, 786]), own.groups.standard_error**2, float(own.overall.standard_error) ** 2
    expected = np.maximum(variance, (n * n * variance + 10 * 816 * whole) / (n + 10) / n)
    np.testing.assert_allclose(borrowed.groups.standard_error**2, expected, rtol=1e-10)
    with pytest.raises(InputError, match="n_borrowed is 5 with the method 'basic', expected the method symmetric or studentized"):
        bootstrap_delta_r2(key, y, prediction, baseline, n_borrowed=5)


@pytest.mark.parametrize("method", METHODS)
def test_a_level_next_to_1_gives_the_widest_interval_that_the_samples_hold(method, rng, dtype):
    samples = rng.normal(size=(1_000, 2)).astype(dtype)
    resampled = Resampled(jnp.zeros(2, dtype), jnp.ones(2, dtype), jnp.array([0.05, -0.05], dtype), samples, np.ones_like(samples))
    wide, usual = (confidence_interval(resampled, method, level) for level in (1 - 1e-12, 0.9))
    assert (wide.low < usual.low).all()
    assert (wide.high > usual.high).all()
    assert (abs(np.concatenate(wide)) < 6).all()


@pytest.mark.parametrize("method", METHODS)
def test_identical_methods_have_no_width(method, stars, dtype):
    y, p, _ = (array.astype(dtype) for array in stars)
    result = bootstrap_delta_r2(jax.random.key(0), y, p, p, n_resamples=50, method=method, groups=np.arange(816) % 9)
    assert float(result.overall.low) == float(result.overall.high) == 0
    assert not np.any(result.groups.low)
    assert not np.any(result.simultaneous.high)


@pytest.mark.slow
def test_all_methods_agree_on_many_ordinary_stars(rng, x64):
    y = rng.uniform(1, 5, 20_000)
    resampled = resampled_of((y, y + rng.normal(0, 0.3, 20_000), y + rng.normal(0, 0.33, 20_000)), 4_000, seed=0)
    error = float(resampled.standard_error[0])
    expected = float(resampled.estimate[0]) + 1.96 * error * np.array([-1, 1])
    for method in METHODS:
        result = summarize(resampled, 0.95, method).overall
        np.testing.assert_allclose([result.low, result.high], expected, atol=0.1 * error, err_msg=method)


def test_bad_method(stars):
    with pytest.raises(InputError, match=r"method is 'bootstrap', expected one of percentile, basic, bca, studentized, symmetric"):
        bootstrap_delta_r2(jax.random.key(0), *stars, method="bootstrap")


@pytest.mark.parametrize("n_samples", [20, 400])
@pytest.mark.parametrize("level", [0.5, 0.9, 0.99])
def test_column_quantiles_against_numpy(n_samples, level, rng, dtype):
    """Few samples and low levels take the whole sort, the others the partial one; undefined samples are left out."""
    samples = rng.normal(size=(n_samples, 4)).astype(dtype)
    samples[:5, 1], samples[:, 2], samples[:, 3] = np.nan, 1.5, np.round(samples[:, 3])
    tails = np.array([0.5 - level / 2, 0.5 + level / 2])
    by_column = tails[:, None] * np.array([1.0, 0.9, 1.0, 1.0])
    for probabilities in (tails, by_column):
        ours = column_quantiles(jnp.asarray(samples), jnp.asarray(probabilities, dtype))
        each = np.broadcast_to(probabilities.reshape(2, -1), (2, 4))
        expected = [np.nanquantile(samples[:, c].astype(float), each[:, c]) for c in range(4)]
        np.testing.assert_allclose(ours, np.transpose(expected), rtol=2e-5, atol=1e-6)


def test_the_default_is_what_the_calibration_found():
    """Of the difference of all stars, with as many test stars as the published report has; the results lie in the repository."""
    ranking = pd.read_csv(Path(__file__).parents[2] / "results/calibrate_bootstrap/default/ranking.csv")
    chosen = ranking[ranking["chosen"]].set_index(["set_size", "stars"])["method"].to_dict()
    assert chosen == {
        (816, "all stars"): DEFAULT_METHOD,
        (816, "by cell"): "symmetric",
        (8_000, "all stars"): "percentile",
        (8_000, "by cell"): "symmetric",
    }
    of_all = ranking[(ranking["set_size"] == 8_000) & (ranking["stars"] == "all stars")]
    assert set(METHODS) <= set(of_all["method"])
    assert of_all["rms_error"].max() < 1.1
