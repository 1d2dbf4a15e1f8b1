import numpy as np
import pytest
import scipy.stats

from moe_jax.core.arrays import InputError
from moe_jax.evaluate.variance import SOURCES, mean_over_seeds, required_stars, variance_components

TRUE = {"test stars": 3.0, "survey": 2.0, "noise draw": 1.0, "gate seed": 0.5, "survey x test": 0.4, "noise x test": 0.3}


def draw(rng, S, N, G, T):
    shapes = {
        "test stars": (1, 1, 1, T), "survey": (S, 1, 1, 1), "noise draw": (S, N, 1, 1), "gate seed": (S, N, G, 1),
        "survey x test": (S, 1, 1, T), "noise x test": (S, N, 1, T), "seed x test": (S, N, G, T),
    }  # fmt: skip
    variance = TRUE | {"seed x test": 0.2}
    return 5.0 + sum(np.sqrt(variance[name]) * rng.normal(size=shape) for name, shape in shapes.items())


def test_components_are_unbiased(rng):
    """Means over 3,000 designs; five standard errors are exceeded once in 10^6 runs."""
    found = [variance_components(draw(rng, 4, 3, 2, 5)) for _ in range(3_000)]
    for name in SOURCES:
        values = np.array([f.variance[name] for f in found])
        assert abs(values.mean() - (TRUE | {"seed x test": 0.2})[name]) < 5 * values.std() / np.sqrt(len(values)), name


def test_variance_of_the_mean_and_coverage(rng):
    """Each binomial standard error is about 0.7 %."""
    found = [(variance_components(draw(rng, 6, 3, 2, 8)), draw(rng, 2, 2, 2, 2)[0, 0, 0, 0]) for _ in range(1_500)]
    assert np.mean([f.mean_low < 5.0 < f.mean_high for f, _ in found]) == pytest.approx(0.95, abs=0.03)
    assert np.mean([f.prediction_low < new < f.prediction_high for f, new in found]) == pytest.approx(0.95, abs=0.03)


def test_two_by_two_by_hand():
    """Only surveys and test sets differ: the textbook two-way table with means 1, 3 (rows) and 0, 4 (columns)."""
    table = np.array([[-1.0, 3.0], [1.0, 5.0]])
    found = variance_components(np.broadcast_to(table[:, None, None, :], (2, 2, 2, 2)))
    assert found.mean == 2
    # MS_survey = 8 * ((1 - 2)^2 + (3 - 2)^2) = 16, MS_test = 8 * (4 + 4) = 64, no interaction
    assert found.variance["survey"] == pytest.approx(16 / 8)
    assert found.variance["test stars"] == pytest.approx(64 / 8)
    assert found.total == pytest.approx(10)
    assert found.mean_variance == pytest.approx((16 + 64) / 16)


def test_all_sources_by_hand():
    """Orthogonal effects of +-1 times these factors in 2 x 2 x 2 x 2 values: each sum of squares is 16 factor^2."""
    s, n, g, t = (np.array([-1.0, 1.0])[np.indices((2, 2, 2, 2))[i]] for i in range(4))
    found = variance_components(7 + 4 * t + 3 * s + 2 * n + g + s * t + 0.5 * n * t + 0.25 * g * t, 0.9)
    # Mean squares: test 256, survey 144, noise 64 / 2, seed 16 / 4, survey x test 16, noise x test 4 / 2, seed x test 1 / 4
    expected = [30, 12.25, 6.5625, 1.875, 3.5, 0.875, 0.25]
    np.testing.assert_allclose([found.variance[name] for name in SOURCES], expected)
    np.testing.assert_allclose([found.share[name] for name in SOURCES], np.divide(expected, 55.3125))
    assert found.mean == pytest.approx(7)
    assert found.mean_variance == pytest.approx((144 + 256 - 16) / 16)
    assert found.mean_df == pytest.approx(384**2 / (144**2 + 256**2 + 16**2))
    assert found.total == pytest.approx(55.3125)
    # In the total, test, survey and noise have the factor 1 / 8, seed 1 / 4, noise x test 1 / 8, seed x test 1 / 4.
    assert found.total_df == pytest.approx(55.3125**2 / (32**2 + 18**2 + 4**2 / 2 + 1 / 4 + 0.25**2 / 2 + 0.0625**2 / 4))
    of_mean, of_new = (
        scipy.stats.t.ppf(0.95, df) * np.sqrt(variance) for df, variance in ((found.mean_df, 24), (found.total_df, 79.3125))
    )
    assert (found.mean_low, found.mean_high) == pytest.approx((7 - of_mean, 7 + of_mean))
    assert (found.prediction_low, found.prediction_high) == pytest.approx((7 - of_new, 7 + of_new))


def test_intervals_of_the_shares_cover(rng):
    """At 90 % in 150 designs; a binomial count below 0.82 comes once in 1,000 runs. Few surveys say little."""
    truth = {name: value / sum((TRUE | {"seed x test": 0.2}).values()) for name, value in (TRUE | {"seed x test": 0.2}).items()}
    found = [variance_components(draw(rng, 4, 3, 2, 5)).share_intervals(0.9) for _ in range(150)]
    for name in SOURCES:
        assert np.mean([f[name][0] <= truth[name] <= f[name][1] for f in found]) > 0.82, name
        assert all(0 <= f[name][0] <= f[name][1] <= 1 for f in found)
    assert np.mean([f["survey"][1] - f["survey"][0] for f in found]) > 0.3


def test_mean_over_seeds_by_hand():
    mean, low, high = mean_over_seeds(np.array([1.0, 2.0, 3.0]), 0.0)
    assert (mean, high - mean, mean - low) == pytest.approx((2, *2 * [4.30265 * np.sqrt(1 / 3)]), rel=1e-5)
    # 1 / 3 of the seeds and 2 / 3 of the stars: 2 (1 / (1 / 3))^2 = 18 degrees of freedom
    assert mean_over_seeds(np.array([1.0, 2.0, 3.0]), np.sqrt(2 / 3))[2] == pytest.approx(2 + scipy.stats.t.ppf(0.975, 18))
    assert mean_over_seeds(np.ones(4), 1.0)[2] == pytest.approx(1 + 1.959964)
    with pytest.raises(InputError, match=r"by_seed has shape \(1,\), expected \(S,\) of at least two seeds"):
        mean_over_seeds(np.ones(1), 1.0)


def test_one_way_against_scipy(rng):
    """With test sets that are all alike, the survey's mean square is that of scipy's analysis of variance."""
    by_survey = rng.normal(size=(3, 40)) + np.array([0.0, 1.0, 2.0])[:, None]
    values = np.broadcast_to(by_survey[:, :, None, None], (3, 40, 2, 2))
    found = variance_components(values)
    F = scipy.stats.f_oneway(*by_survey).statistic
    within = by_survey.var(axis=1, ddof=1).mean()
    assert found.variance["noise draw"] == pytest.approx(within)
    assert found.variance["survey"] == pytest.approx((F - 1) * within / 40)


@pytest.mark.parametrize(
    ("values", "message"),
    [(np.zeros((2, 2, 2)), r"has shape \(2, 2, 2\)"), (np.full((2, 2, 2, 2), np.nan), "values holds numbers that are not finite")],
)
def test_bad_input(values, message):
    with pytest.raises(InputError, match=message):
        variance_components(values)


def test_required_stars_gives_the_power(rng):
    """A mean of n normal stars is found different from 0 as often as was asked for; the standard error is 0.9 %."""
    n = round(required_stars(0.2, 1.0, power=0.8))
    means = rng.normal(0.2, 1 / np.sqrt(n), size=2_000)
    assert np.mean(means - 1.96 / np.sqrt(n) > 0) == pytest.approx(0.8, abs=0.045)
    assert required_stars(0.0, 1.0) == np.inf
