import importlib.util

import jax
import numpy as np
import pandas as pd
import pytest
from sklearn.metrics import r2_score

import moe_jax
from experiments import benchmark, check_gpu, make_survey
from experiments.pipeline.config import OutputOptions
from experiments.runner.command_line import parse_config
from experiments.timing import peers
from experiments.timing import rows as benchmark_rows
from moe_jax import InputError

needs_torch = pytest.mark.skipif(importlib.util.find_spec("torch") is None, reason="PyTorch is not installed")


@pytest.mark.slow
def test_what_the_peers_compute_is_what_we_compute():
    """The same Delta R2 overall and by cell, and intervals of the same length."""
    y, ours, theirs, cell = benchmark_rows.bootstrap_data(816)
    result = moe_jax.bootstrap_delta_r2(jax.random.key(0), y, ours, theirs, groups=cell, method="percentile")
    expected = r2_score(y, ours) - r2_score(y, theirs)
    assert float(result.overall.estimate) == pytest.approx(expected, abs=1e-5)
    joint = peers.scipy_joint_bootstrap(y, ours, theirs, cell, 1_000)
    np.testing.assert_allclose(joint.standard_error, [result.overall.standard_error, *result.groups.standard_error], rtol=0.2)
    loop = peers.loop_bootstrap(y, ours, theirs, cell, 300)
    for k, by_scipy in enumerate(peers.scipy_bootstrap(y, ours, theirs, cell, 1_000)):
        errors = result.overall.standard_error if k == 0 else result.groups.standard_error[k - 1]
        assert by_scipy.standard_error == pytest.approx(float(errors), rel=0.2)
        assert np.std(loop[:, k]) == pytest.approx(float(errors), rel=0.3)


def test_grid_search_chooses_our_alpha(survey, noisy_flux):
    x, y = noisy_flux[:400], np.asarray(survey.labels.log_g)[:400]
    theirs = peers.grid_search_ridge(x, y, (1.0, 10.0, 1000.0), 5)
    folds = np.repeat(np.arange(5), 80)  # as KFold cuts them
    ours = moe_jax.fit_global(x, y, np.array([1.0, 10.0, 1000.0]), folds)
    assert float(ours.alpha) == theirs.alpha
    difference = np.asarray(moe_jax.predict_ridge(ours.ridge, x)) - theirs.predict(x)
    assert np.sqrt(np.mean(difference**2)) < 1e-3 * np.std(y)


@needs_torch
@pytest.mark.slow
def test_the_peers_pipeline_finds_what_the_experiment_finds(tmp_path, monkeypatch):
    """With few resamples and penalties; of the many only the time would be of interest."""
    loop = peers.loop_bootstrap
    monkeypatch.setattr(peers, "loop_bootstrap", lambda *arrays_and_number: loop(*arrays_and_number[:-1], 10))
    monkeypatch.setattr(peers, "ALPHAS", (1.0, 10.0))
    monkeypatch.setattr(peers, "GLOBAL_ALPHAS", (10.0, 100.0))
    make_survey.main(make_survey.MakeSurveyConfig(n_train=1_200, n_test=300, output_dir=tmp_path))
    found = peers.pipeline(tmp_path / "train.h5", tmp_path / "test.h5")
    assert set(found["r2"]) == {
        "global",
        "classify",
        "mlp, in-sample",
        "linear, in-sample",
        "mlp, cross-fitted",
        "linear, cross-fitted",
    }
    assert 0.6 < found["r2"]["global"] < 0.95


@pytest.mark.slow
def test_rows_are_timed_and_written(tmp_path):
    config = benchmark_rows.BenchmarkConfig(rows=("folds",), n_train=1_200, n_pairs=1, output=OutputOptions(tmp_path / "out"))
    table = benchmark.main(config).tables["benchmark"]
    assert table["row"].str.startswith("experts").sum() == 2
    assert (table[["ours_s", "peer_s", "ratio"]] > 0).all(axis=None)
    np.testing.assert_allclose(table["ratio"][1:], (table["peer_s"] / table["ours_s"])[1:])  # rows of one pair
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        *("benchmark.csv", "ratios.pdf", "ratios.png", "report.md", "run.json")
    }
    for row in table["row"]:
        assert row in (tmp_path / "out" / "report.md").read_text()


def test_what_fell_is_said(tmp_path):
    rows = pd.DataFrame({"row": ["a", "b", "new"], "peer": ["p", "p", "p"], "ratio": [10.0, 10.0, 1.0]})
    rows.to_csv(tmp_path / "before.csv")
    found = benchmark.fallen(rows.assign(ratio=[6.0, 8.0, 1.0]).iloc[:2], tmp_path / "before.csv")
    assert found == ["fell: a against p: 6.0x, was 10.0x", "stands: b against p: 8.0x, was 10.0x"]
    assert "nothing to compare" in benchmark.fallen(rows, tmp_path / "none.csv")[0]


@pytest.mark.parametrize(("change", "message"), [({"rows": ("speed",)}, "rows holds 'speed'"), ({"n_pairs": 0}, "n_pairs is 0")])
def test_bad_config(change, message):
    with pytest.raises(InputError, match=message):
        benchmark_rows.BenchmarkConfig(**change)


def test_quick_sets_its_own_options():
    config = benchmark_rows.BenchmarkConfig(quick=True, start=True)
    with pytest.raises(InputError, match="--quick was given with options that it sets itself"):
        benchmark.main(config)


@pytest.mark.parametrize("presets", [benchmark.PRESETS, check_gpu.PRESETS])
def test_presets(presets):
    for name, config in presets.items():
        assert parse_config(presets, None, ["--preset", name]) == config


def test_checks_of_a_gpu_need_one():
    with pytest.raises(InputError, match="expected a GPU"):
        check_gpu.main(check_gpu.PRESETS["smoke"])


@pytest.mark.slow
def test_checks_run_on_any_device(tmp_path):
    config = check_gpu.CheckConfig("smoke", 300, 256, 2, None, any_device=True, output=OutputOptions(tmp_path / "out"))
    table = check_gpu.main(config).tables["checks"]
    assert table["fine"].dropna().all()
    assert (table["found"] >= 0).all()
    assert (tmp_path / "out" / "report.md").exists()
