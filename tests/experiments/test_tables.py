import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score

from experiments.pipeline.calibration import MAG_NAMES
from experiments.pipeline.config import BootstrapOptions
from experiments.pipeline.methods import CLASSIFY, FALLBACK, GLOBAL, METHODS, ORACLE, PAIRS, REGRESSION_GATES, Method, Pair
from experiments.report.figures import floor_plot
from experiments.report.markdown import load_published, verdict_markdown
from experiments.report.tables import (
    bin_table,
    bootstrap_table,
    compare,
    magnitude_bins,
    overall_table,
    pair_table,
    published_verdict,
    verdict,
)
from moe_jax import bootstrap_delta_r2
from moe_jax.evaluate.variants import compare_variants
from moe_jax.experts.cells import CELL_NAMES


@pytest.fixture
def run(rng):
    y = rng.uniform(1, 5, 300).astype(np.float32)
    cell = np.concatenate([np.arange(9), rng.integers(0, 8, 291)])  # cell 8 holds one star
    predictions = {m: (y + rng.normal(0, 0.2 + 0.02 * i, 300)).astype(np.float32) for i, m in enumerate(METHODS)}
    return y, cell, predictions, compare(jax.random.key(0), y, predictions, cell, n_resamples=100)


def test_overall(run):
    y, _, predictions, _ = run
    table = overall_table(y, predictions)
    assert list(table.columns) == ["method", "protocol", "r2", "mae", "rmse", "rho"]
    assert list(zip(table["method"], table["protocol"], strict=True)) == list(METHODS)
    rho = dict(zip(METHODS, table["rho"], strict=True))
    assert (rho[GLOBAL], rho[ORACLE]) == (0, 1)
    np.testing.assert_allclose(table["r2"], [r2_score(y, p) for p in predictions.values()], rtol=1e-5)


def test_without_a_global_ridge_nothing_is_compared_with_it(run):
    y, cell, predictions, comparisons = run
    left = {method: prediction for method, prediction in predictions.items() if method not in (GLOBAL, FALLBACK)}
    table = overall_table(y, left)
    assert list(zip(table["method"], table["protocol"], strict=True)) == list(left)
    assert table["rho"].isna().all()
    fewer = compare(jax.random.key(0), y, left, cell, n_resamples=100)
    assert list(fewer) == [pair for pair in PAIRS if not {GLOBAL, FALLBACK} & set(pair)]
    for pair, bootstrap in fewer.items():
        np.testing.assert_array_equal(bootstrap.overall.samples, comparisons[pair].overall.samples)


def test_the_floor_is_drawn_without_a_global_ridge():
    names = ("oracle", "classification gate", "MLP gate", "floor", "floor_with_prior")
    table = pd.DataFrame({"mag": ["20.5 to 21", "21 to 21.5"]} | {name: [0.1, 0.2] for name in names})
    figure = floor_plot(table)
    assert len(figure.axes[0].lines) == len(names)
    assert len(floor_plot(table.assign(**{"global ridge": 0.3})).axes[0].lines) == len(names) + 1


def test_bins_flag_a_cell_of_one_star(run):
    y, cell, predictions, comparisons = run
    table = bin_table(y, predictions, cell, comparisons)
    assert table["n_test"].tolist() == np.bincount(cell, minlength=9).tolist()
    assert table["defined"].tolist() == [True] * 8 + [False]
    assert table.loc[8, "r2_classify"] != table.loc[8, "r2_classify"]
    third = cell == 3
    assert table.loc[3, "r2_global"] == pytest.approx(r2_score(y[third], predictions[GLOBAL][third]), rel=1e-4)
    method = Method("regress_mlp", "in-sample")
    difference = table["r2_regress_mlp_in_sample"] - table["r2_classify"]
    np.testing.assert_allclose(table["delta_r2_regress_mlp_in_sample"], difference, atol=1e-5)
    assert (table["delta_r2_regress_mlp_in_sample_low"][:8] < table["delta_r2_regress_mlp_in_sample_high"][:8]).all()
    widths = (comparisons[Pair(method, CLASSIFY)].simultaneous, "_simultaneous"), (comparisons[Pair(method, CLASSIFY)].groups, "")
    for part, suffix in widths:
        for end in ("low", "high"):
            np.testing.assert_array_equal(table[f"delta_r2_regress_mlp_in_sample{suffix}_{end}"], getattr(part, end))


def test_bootstrap(run):
    *_, comparisons = run
    table = bootstrap_table(comparisons)
    assert table["comparison"].is_unique
    assert len(table) == len(PAIRS)
    assert table["comparison"][0] == "regress_mlp - classify (in-sample)"
    row = table.set_index("comparison").loc["oracle - classify"]
    assert row["low"] < row["mean"] < row["high"]
    assert row["fraction_above_0"] > 0.5  # the oracle was given less noise


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0.001, 0.02, "better"),
        (-0.0188, -0.0039, "worse"),
        (-0.01, 0.01, "no difference shown"),
        (0.0, 0.02, "no difference shown"),
        (-0.02, 0.0, "no difference shown"),
        (np.nan, np.nan, "no difference shown"),
    ],
)
def test_verdict_has_a_sign(low, high, expected):
    assert verdict(low, high) == expected


@pytest.mark.parametrize(("r2", "expected"), [(0.94, "passed"), (0.932, "partial"), (0.93, "failed"), (0.9, "failed")])
def test_published_verdict(r2, expected):
    assert published_verdict(r2, 0.93) == expected


@pytest.mark.parametrize(("noise", "expected"), [(0.1, "better"), (0.9, "worse")])
def test_the_report_says_what_is_significantly_worse(run, noise, expected):
    y, cell, predictions, _ = run
    rng = np.random.default_rng(1)
    predictions = predictions | {m: (y + rng.normal(0, noise, 300)).astype(np.float32) for m in REGRESSION_GATES}
    comparisons = compare(jax.random.key(0), y, predictions, cell, n_resamples=100)
    text = verdict_markdown(comparisons, overall_table(y, predictions), load_published())
    rows = [line.split(" | ") for line in text.splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows] == [method.name for method in REGRESSION_GATES]
    assert {row[3] for row in rows} == {expected}
    assert {row[4] for row in rows} == {"passed" if expected == "better" else "failed"}


def test_variants_of_several_seeds(rng):
    """The mean over seeds of R2 by scikit-learn, and the bootstrap of the mean gain."""
    y = rng.uniform(1, 5, 200)
    variants = {"a": y + rng.normal(0, 0.3, (3, 200)), "b": y + rng.normal(0, 0.5, (1, 200))}
    baseline = y + rng.normal(0, 0.4, (2, 200))
    table = compare_variants(jax.random.key(0), y, variants, baseline, n_resamples=50, method="percentile").set_index("variant")
    reference = np.mean([r2_score(y, p) for p in baseline])
    for name, predictions in variants.items():
        r2 = [r2_score(y, p) for p in predictions]
        assert table.loc[name, "r2"] == pytest.approx(np.mean(r2), abs=1e-5)
        assert table.loc[name, "delta_r2"] == pytest.approx(np.mean(r2) - reference, abs=1e-5)
    assert table.loc["a", "r2_sd_over_seeds"] == pytest.approx(np.std([r2_score(y, p) for p in variants["a"]], ddof=1), abs=1e-5)
    assert np.isnan(table.loc["b", "r2_sd_over_seeds"])
    one = bootstrap_delta_r2(jax.random.key(0), y, variants["b"][0], baseline[0], n_resamples=50, method="percentile")
    same = compare_variants(jax.random.key(0), y, {"b": variants["b"]}, baseline[:1], n_resamples=50, method="percentile")
    np.testing.assert_allclose([same["low"][0], same["high"][0]], [one.overall.low, one.overall.high], atol=1e-5)


def test_magnitudes_have_bins_and_those_beyond_join_the_ends():
    bins = magnitude_bins(np.array([20.0, 20.5, 20.99, 21.0, 22.0, 22.5, 23.0]))
    assert bins.tolist() == [0, 0, 0, 1, 3, 3, 3]
    assert MAG_NAMES == ("20.5 to 21", "21 to 21.5", "21.5 to 22", "22 to 22.5")


@pytest.mark.slow
def test_differences_are_those_of_the_groups(rng):
    y, cell, mag = rng.normal(size=900), np.arange(900) % len(CELL_NAMES), rng.uniform(20.5, 22.5, size=900)
    predictions = {"a": y + 0.1 * rng.normal(size=900), "b": y + 0.5 * rng.normal(size=900)}
    table = pair_table(jax.random.key(0), BootstrapOptions(n_resamples=200), y, predictions, [("a", "b")], cell, mag)
    assert len(table) == 1 + len(CELL_NAMES) + len(MAG_NAMES)
    chosen = {("all", "all"): np.ones(900, bool), ("cell", CELL_NAMES[2]): cell == 2}
    chosen["magnitude", MAG_NAMES[1]] = (mag >= 21) & (mag < 21.5)
    for (by, stars), rows in chosen.items():
        (row,) = table[(table["by"] == by) & (table["stars"] == stars)].to_dict("records")
        peer = r2_score(y[rows], predictions["a"][rows]) - r2_score(y[rows], predictions["b"][rows])
        np.testing.assert_allclose(row["delta_r2"], peer, rtol=1e-3)
        assert row["low"] < row["delta_r2"] < row["high"]
        assert row["n_test"] == rows.sum()
