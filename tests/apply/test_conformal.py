import numpy as np
import pytest
import scipy.stats

from moe_jax import InputError
from moe_jax.apply.conformal import calibrate, coverage_table, half_widths


def test_quantiles_by_hand():
    score, group = np.arange(1.0, 20.0), np.zeros(19, int)
    found = calibrate(score, group, 1, (0.5, 0.9, 0.95))
    # (n + 1) * level = 10, 18, 19
    np.testing.assert_array_equal(found.quantiles, [[10, 18, 19]])


def test_a_small_group_takes_the_quantile_of_all():
    rng = np.random.default_rng(0)
    score = np.concatenate([rng.uniform(size=200), 5 + rng.uniform(size=5)])
    group = np.repeat([0, 1], [200, 5])
    found = calibrate(score, group, 3, (0.8, 0.9))
    np.testing.assert_allclose(found.quantiles[1, 0], np.sort(score[200:])[4])  # ceil(6 * 0.8) = 5
    everyone = np.sort(score)[int(np.ceil(206 * 0.9)) - 1]
    np.testing.assert_allclose([found.quantiles[1, 1], found.quantiles[2, 1]], everyone)
    np.testing.assert_array_equal(found.n_stars, [200, 5, 0])


def test_new_stars_are_covered_as_promised():
    """Over many draws of held-out and new stars, with scores of any distribution, the mean coverage is at least the level."""
    rng = np.random.default_rng(1)
    level, n, covered = 0.9, 49, []
    for _ in range(4_000):
        score = rng.standard_cauchy(n + 1) ** 2
        quantile = calibrate(score[:n], np.zeros(n, int), 1, (level,)).quantiles[0, 0]
        covered.append(score[n] <= quantile)
    expected = np.ceil(level * (n + 1)) / (n + 1)  # exactly, for scores without ties
    assert abs(np.mean(covered) - expected) < 4 * np.sqrt(expected * (1 - expected) / 4_000)


def test_coverage_table_by_hand():
    residual, widths = np.array([0.0, 1.0, 2.0, 3.0]), np.array([[0.5, 1.5]] * 4)
    table = coverage_table(residual, widths, np.array([0.68, 0.95]), {"cell": np.array([0, 0, 1, -1])}, {"cell": ["a", "b"]})
    assert list(table["coverage"]) == [0.25, 0.5, 0.5, 1.0, 0.0, 0.0]
    assert list(table["n"]) == [4, 4, 2, 2, 1, 1]
    assert list(table["group"]) == ["all", "all", "a", "a", "b", "b"]
    inside, n = (table["coverage"] * table["n"]).to_numpy(), table["n"].to_numpy()
    low, high = scipy.stats.beta.ppf(0.025, inside, n - inside + 1), scipy.stats.beta.ppf(0.975, inside + 1, n - inside)
    np.testing.assert_allclose(table["low"], np.where(inside > 0, low, 0))  # Clopper & Pearson
    np.testing.assert_allclose(table["high"], np.where(inside < n, high, 1))
    np.testing.assert_allclose(table["half_width"], [0.5, 1.5] * 3)


def test_half_widths_follow_group_and_sigma():
    calibration = calibrate(np.arange(1.0, 41.0), np.repeat([0, 1], 20), 2, (0.5,))
    widths = half_widths(calibration, np.array([1.0, 2.0]), np.array([1, 0]))
    np.testing.assert_allclose(widths, [calibration.quantiles[1], 2 * calibration.quantiles[0]])


@pytest.mark.parametrize(
    ("score", "levels", "message"),
    [
        (np.array([1.0, np.nan] * 20), (0.9,), "score holds nan"),
        (np.array([1.0, -2.0] * 20), (0.9,), "score holds -2.0"),
        (np.ones(40), (), r"levels are \(\), expected numbers above 0 and below 1"),
        (np.ones(40), (1.0,), r"levels are \(1.0,\), expected numbers above 0 and below 1"),
        (np.ones(18), (0.95,), "score holds 18 stars, expected at least 19"),
    ],
)
def test_bad_input(score, levels, message):
    with pytest.raises(InputError, match=message):
        calibrate(score, np.zeros(len(score), int), 1, levels)


def test_a_group_that_does_not_exist():
    for group in (-1, 2):
        with pytest.raises(InputError, match=rf"group holds {min(group, 0)} to {max(group, 0)}, expected 0 to 1"):
            calibrate(np.ones(100), np.where(np.arange(100) == 3, group, 0), 2)
