import dataclasses
import json
import shutil
import subprocess
import sys
import time

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
import tyro
from small_run import SMALL, run_without_figures, with_options

from experiments import cover_all, make_survey, regress_gate, scale
from experiments.build_lte_grid import PRESETS as BUILD_PRESETS
from experiments.pipeline.config import draw_keys
from experiments.pipeline.methods import METHODS
from experiments.pipeline.surveys import load_surveys, observe
from experiments.report.results import Results, write_results
from experiments.runner.command_line import parse_config
from experiments.runner.stages import Stages
from moe_jax import InputError, load_model, load_survey, predict_model
from moe_jax.spectra.survey_file import FLUX_FIELD, WAVE_FIELD

pytestmark = pytest.mark.slow

TABLES = ("overall", "per_bin", "bootstrap", "predictions", "local", "local_coverage")
FIGURES = ("r2_comparison", "per_bin_delta", "mean_weights", "bootstrap", "loss_curves", "predicted_against_true")


@pytest.fixture(scope="module")
def surveys(tmp_path_factory):
    """Train and test files of the small run."""
    folder = tmp_path_factory.mktemp("surveys")
    make_survey.main(make_survey.MakeSurveyConfig(n_train=900, n_test=300, output_dir=folder))
    return folder


@pytest.fixture
def results(trained):
    """Results of the small run."""
    return trained


def read(folder):
    return {name: (folder / f"{name}.csv").read_text() for name in TABLES}


def test_all_files_are_written(results):
    expected = (
        [f"{name}.csv" for name in TABLES]
        + [f"{name}.{kind}" for name in FIGURES for kind in ("png", "pdf")]
        + ["model", "report.md", "run.json"]
    )
    assert sorted(path.name for path in results.iterdir()) == sorted(expected)
    assert not list(results.parent.glob(".*"))


def test_tables(results):
    overall = pd.read_csv(results / "overall.csv", keep_default_na=False)
    assert list(overall.columns) == ["method", "protocol", "r2", "mae", "rmse", "rho"]
    assert list(zip(overall["method"], overall["protocol"], strict=True)) == list(METHODS)
    predictions = pd.read_csv(results / "predictions.csv")
    bins = pd.read_csv(results / "per_bin.csv")
    assert len(predictions) == bins["n_test"].sum()
    residual = predictions["log_g"] - predictions["regress_mlp_cross_fitted"]
    r2 = 1 - (residual**2).sum() / ((predictions["log_g"] - predictions["log_g"].mean()) ** 2).sum()
    assert overall.set_index(["method", "protocol"]).loc[("regress_mlp", "cross-fitted"), "r2"] == pytest.approx(r2, rel=1e-4)
    assert {"comparison", "mean", "low", "high", "fraction_above_0"} <= set(pd.read_csv(results / "bootstrap.csv").columns)


def test_run_json(results):
    run = json.loads((results / "run.json").read_text())
    assert run["config"]["data"]["n_train"] == 900
    assert run["config"]["gate"]["epochs"] == 3
    assert run["seconds"]["experts, cross-validated"] > 0
    assert len(run["alpha"]["cells"]) == 9
    assert set(run["gates"]) == {method.column for method in METHODS if method.protocol}
    assert {"versions", "device", "precision", "git_commit", "peak_memory_gib"} <= set(run)


def test_report_warns_of_gates_at_the_epoch_cap(results):
    report = (results / "report.md").read_text()
    assert report.count("> **Warning.** Stopped at the epoch cap: ") == 1
    assert "regress_linear (cross-fitted) (best epoch 3 of 3)" in report
    assert "0.9213" in report  # the published baseline stands beside ours
    for name in FIGURES:
        assert f"({name}.png)" in report


def test_the_model_predicts_what_the_run_predicted(results, surveys):
    """The saved mixture, applied to the noisy test spectra, gives the column of the cross-fitted MLP gate."""
    model = load_model(results / "model")
    test = observe(draw_keys(SMALL.data.seed).test_noise, load_survey(surveys / "test.h5"), SMALL.data).flux()
    table = pd.read_csv(results / "predictions.csv")
    ours = predict_model(model, test)
    np.testing.assert_allclose(np.asarray(ours.log_g)[table["star"]], table["regress_mlp_cross_fitted"], atol=1e-4)
    overall = pd.read_csv(results / "overall.csv")
    cross_fitted = overall[(overall["method"] == "regress_mlp") & (overall["protocol"] == "cross-fitted")]
    assert model.provenance["test_r2"] == pytest.approx(cross_fitted["r2"].iloc[0], rel=1e-6)


def test_the_local_experts_of_the_model_are_those_of_the_tables(results, surveys):
    """The saved experts, applied to the noisy test spectra, have the R2 and the coverage that the run reports."""
    test = observe(draw_keys(SMALL.data.seed).test_noise, load_survey(surveys / "test.h5"), SMALL.data)
    star = pd.read_csv(results / "predictions.csv")["star"].to_numpy()
    answer = predict_model(load_model(results / "model"), *test.read(0, test.n_stars)).local
    log_g, predicted = np.asarray(test.labels.log_g)[star], np.asarray(answer.log_g)[star]
    scores = pd.read_csv(results / "local.csv").set_index("method")
    assert scores.loc["local linear experts", "r2"] == pytest.approx(1 - np.mean((log_g - predicted) ** 2) / log_g.var(), abs=1e-4)
    assert scores["delta_r2"].iloc[1] == pytest.approx(scores["r2"].iloc[1] - scores["r2"].iloc[0], abs=1e-5)
    coverage = pd.read_csv(results / "local_coverage.csv")
    inside = np.mean(np.abs(log_g - predicted)[:, None] <= np.asarray(answer.half_width)[star], axis=0)
    np.testing.assert_allclose(coverage[coverage["by"] == "all"]["coverage"], inside, atol=1.1 / len(star))
    assert f"R2 {scores['r2'].iloc[1]:.4f}" in (results / "report.md").read_text()


def test_same_seed_same_tables_and_the_cache_changes_nothing(results, tmp_path):
    run_without_figures(with_options(SMALL, output_dir=tmp_path / "second", cache_dir=results.parent / "cache"))
    assert read(tmp_path / "second") == read(results)
    assert list((results.parent / "cache").glob("local-*.npz"))
    assert "experts, cross-validated" not in json.loads((tmp_path / "second" / "run.json").read_text())["seconds"]


def test_another_seed_draws_all_anew():
    """Its keys are others, each of them; so are stars and noise."""
    first, other = (jax.random.key_data(jnp.stack(list(draw_keys(seed)))) for seed in (0, 1))
    assert len(np.unique(np.concatenate([first, other]), axis=0)) == 2 * len(first)
    few = dataclasses.replace(SMALL.data, n_train=20, n_test=20)
    for ours, theirs in zip(load_surveys(few), load_surveys(dataclasses.replace(few, seed=1)), strict=True):
        assert not np.isin(ours.flux[:, 0], theirs.flux[:, 0]).any()


def test_files_give_the_same_tables_without_a_cache(results, surveys, tmp_path):
    files = {"train_file": surveys / "train.h5", "test_file": surveys / "test.h5"}
    run_without_figures(with_options(SMALL, **files, output_dir=tmp_path / "files", use_cache=False))
    # No stars are left to calibrate the local experts on, and so there is no coverage.
    first = read(results)
    assert {name: (tmp_path / "files" / f"{name}.csv").read_text() for name in TABLES[:-1]} == {n: first[n] for n in TABLES[:-1]}
    assert "Their intervals are not calibrated: no stars were left" in (tmp_path / "files" / "report.md").read_text()


def test_without_a_global_ridge_its_methods_are_left_out(results, tmp_path):
    """``--global-alphas`` without a value: all other numbers are those of the run that has one."""
    out = tmp_path / "none"
    regress_gate.main(with_options(SMALL, global_alphas=(), output_dir=out, cache_dir=tmp_path / "cache"))
    assert sorted(path.name for path in out.iterdir()) == sorted(path.name for path in results.iterdir())
    ours, theirs = (pd.read_csv(folder / "overall.csv", keep_default_na=False) for folder in (out, results))
    left = theirs[~theirs["method"].isin(["global", "fallback"])].assign(rho="")
    pd.testing.assert_frame_equal(ours, left.reset_index(drop=True))
    for name in ("per_bin", "bootstrap", "predictions"):
        text = (out / f"{name}.csv").read_text()
        assert "global" not in text
        assert "fallback" not in text
    assert "nan" not in (out / "report.md").read_text()
    assert json.loads((out / "run.json").read_text())["alpha"]["global"] is None
    assert np.isnan(load_model(out / "model").global_ridge.intercept)


@pytest.mark.parametrize("command", [cover_all, scale])
def test_a_study_of_the_global_ridge_needs_one(command):
    with pytest.raises(InputError, match="global_alphas is empty, expected at least one penalty"):
        with_options(command.PRESETS["smoke"], global_alphas=())


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def cut_pixels(survey_path, keep):
    def change(file):
        for field in (WAVE_FIELD, FLUX_FIELD, "dataset/arrays/error/value"):
            values = file[field][()]
            del file[field]
            file[field] = values[..., keep]

    edit(survey_path, change)


def relabel(path, **labels):
    table = pd.read_hdf(path).assign(**labels)
    edit(path, lambda file: file.__delitem__("labels"))
    table.to_hdf(path, key="labels", mode="a")


BAD = {
    "no file": (lambda train, test: train.unlink(), "train.h5: found no such file"),
    "no test file": (lambda train, test: test.unlink(), "test.h5: found no such file"),
    "no window": (lambda train, test: cut_pixels(train, slice(0, 3600)), "expected at least two pixels in the window of line 8662"),
    "few pixels": (lambda train, test: cut_pixels(train, slice(0, 4096, 400)), "found 11 pixels, expected at least 13"),
    "other pixels": (lambda train, test: cut_pixels(test, slice(0, 4090)), "found 4090 pixels"),
    "empty cell": (lambda train, test: relabel(train, M_H=-0.5), "found 0 stars in cell 0, expected at least 10"),
    "few in a cell": (lambda train, test: relabel(train, M_H=lambda t: t["M_H"].where(t.index < 90, -0.5)), "expected at least 10"),
    "nobody covered": (lambda train, test: relabel(test, M_H=-2.5), "found 0 stars in the nine cells"),
    "one log g": (lambda train, test: relabel(train, log_g=4.5), "log_g: found 4.5 for all stars in the nine cells, expected diff"),
    "one log g to test": (lambda train, test: relabel(test, log_g=1.0), "log_g: found 1 for all stars in the nine cells"),
    "NaN flux": (lambda train, test: edit(test, lambda file: file[FLUX_FIELD].__setitem__((0, 0), np.nan)), "found nan at star 0"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_end_in_one_sentence_and_write_nothing(surveys, tmp_path, case):
    change, message = BAD[case]
    train, test = (shutil.copy(surveys / f"{name}.h5", tmp_path) for name in ("train", "test"))
    change(*(tmp_path / name for name in ("train.h5", "test.h5")))
    with pytest.raises(InputError, match=message) as caught:
        config = with_options(SMALL, use_cache=False, n_folds=5, train_file=train, test_file=test, output_dir=tmp_path / "out")
        regress_gate.main(config)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)
    assert sorted(path.name for path in tmp_path.iterdir() if path.is_dir()) == []


def command(*arguments):
    return subprocess.run(
        [sys.executable, "-m", "experiments.regress_gate", *map(str, arguments)], capture_output=True, text=True, timeout=300
    )


def test_command_ends_with_code_2_and_no_traceback(tmp_path):
    arguments = ("--train-file", tmp_path / "a.h5", "--test-file", tmp_path / "b.h5", "--output-dir", tmp_path / "out")
    done = command("--preset", "smoke", *arguments)
    assert done.returncode == 2
    assert done.stderr == f"error: {tmp_path / 'a.h5'}: found no such file, expected an HDF5 file\n"
    assert not (tmp_path / "out").exists()
    with pytest.raises(InputError, match="--train-file was given without --test-file"):
        regress_gate.main(with_options(SMALL, train_file=tmp_path / "a.h5", output_dir=tmp_path / "out", use_cache=False))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"n_folds": 1}, "n_folds is 1"),
        ({"alphas": (1.0, -1.0)}, "alphas is"),
        ({"noise_level": -0.1}, "noise_level is -0.1"),
        ({"confidence_level": 95.0}, "confidence_level is 95.0"),
        ({"in_sample_fraction": 0.0}, "in_sample_fraction is 0.0"),
        ({"seed": -1}, "seed is -1, expected 0 to 4294967295"),
        ({"test_seed": 2**32}, "test_seed is 4294967296, expected 0 to 4294967295"),
        ({"noise_draw": 5 * 10**9}, "noise_draw is 5000000000, expected 0 to 2147483647"),
    ],
)
def test_bad_config(change, message):
    with pytest.raises(InputError, match=message):
        with_options(regress_gate.PRESETS["default"], **change)


@pytest.mark.parametrize("presets", [regress_gate.PRESETS, make_survey.PRESETS, BUILD_PRESETS])
def test_every_preset_loads_from_the_command_line(presets):
    for name, config in presets.items():
        assert config.preset == name
        assert parse_config(presets, None, ["--preset", name]) == config
        assert parse_config(presets, None, [f"--preset={name}"]) == config


def test_options_change_what_the_preset_says():
    config = parse_config(regress_gate.PRESETS, None, ["--preset", "smoke", "--seed", "3", "--gate.epochs", "7"])
    assert (config.data.n_train, config.data.seed, config.gate.epochs) == (1_200, 3, 7)
    with pytest.raises(SystemExit):
        parse_config(regress_gate.PRESETS, None, ["--preset", "huge"])
    assert tyro.cli(regress_gate.RegressGateConfig, args=[]) == regress_gate.PRESETS["default"]


def test_the_defaults_are_the_experiment():
    config = regress_gate.PRESETS["default"]
    assert (config.data.n_train, config.data.n_test, config.data.noise_level, config.mlp.hidden) == (32_000, 1_000, 0.2, 64)
    assert (config.gate.epochs, config.gate.learning_rate, config.gate.patience) == (100, 1e-3, 10)
    assert (config.bootstrap.n_resamples, config.bootstrap.confidence_level, config.in_sample_fraction) == (1_000, 0.95, 0.2)
    assert regress_gate.PRESETS["large_test"].data.n_test == 10_000


def test_survey_files_hold_what_is_simulated(surveys):
    assert load_survey(surveys / "train.h5").flux.shape == (900, 4096)
    simulated, _ = load_surveys(SMALL.data)
    np.testing.assert_array_equal(load_survey(surveys / "train.h5").flux, simulated.flux)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"output_dir": "file"}, "file: found a file, expected a folder for the surveys"),
        ({"output_dir": "file/below"}, "found that nothing can be written there"),
        ({"wave": "one.txt"}, r"wave has shape \(1,\), expected \(P,\) with at least 2 wavelengths"),
        ({"seed": 10**20}, "seed is 1"),
    ],
)
def test_a_survey_that_cannot_be_made(change, message, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "one.txt").write_text("8000\n")
    change = {name: tmp_path / value if isinstance(value, str) else value for name, value in change.items()}
    with pytest.raises(InputError, match=message):
        make_survey.main(make_survey.MakeSurveyConfig(**{"n_train": 5, "n_test": 5, "output_dir": tmp_path / "out"} | change))
    assert not (tmp_path / "out").exists()


def test_results_whose_model_cannot_be_written_are_none(tmp_path):
    def refuse(folder, run):
        raise InputError("the model is not finite")

    with pytest.raises(InputError, match="not finite"):
        write_results(tmp_path / "out", Results("", [], {"a": pd.DataFrame({"b": [1]})}, write_more=refuse), "", {})
    assert not (tmp_path / "out").exists()
    assert not list(tmp_path.iterdir())


def test_stages_measure():
    stages = Stages()
    with stages("a"):
        time.sleep(0.02)
    with stages.steps("b", 2) as advance:
        advance()
    assert stages.seconds["a"] >= 0.02
    assert "b" in stages.seconds
