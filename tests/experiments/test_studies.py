"""Every study runs on a few stars, from one cache, and writes what its report names."""

import json
import re

import numpy as np
import pandas as pd
import pytest
from sklearn.datasets import load_diabetes
from sklearn.ensemble import HistGradientBoostingRegressor
from sklearn.metrics import r2_score
from sklearn.model_selection import KFold, cross_val_predict
from small_run import SMALL, option_names, with_options

from experiments import (
    ablate_gate,
    calibrate_bootstrap,
    calibrate_uncertainty,
    compare_methods,
    compare_tabular,
    control_gate,
    converge_gate,
    cover_all,
    findings,
    measure_leakage,
    replicate,
    scale,
    train_jointly,
)
from experiments.runner.command_line import parse_config
from moe_jax import GateConfig, InputError

pytestmark = pytest.mark.slow

QUICK = GateConfig(epochs=3)
TINY = {
    "n_train": 900,
    "n_test": 300,
    "n_resamples": 40,
    "alphas": (1.0,),
    "global_alphas": (10.0,),
    "C_grid": (10.0,),
    "n_folds": 2,
}
STUDIES = {
    "converge_gate": (converge_gate, {"n_seeds": 2, "gate": QUICK, "max_iterations": 20, "hidden": 26}),
    "measure_leakage": (measure_leakage, {"n_seeds": 2, "gate": QUICK}),
    "control_gate": (control_gate, {"n_seeds": 2, "network": QUICK}),
    "compare_methods": (compare_methods, {"n_components": (5,), "n_cells": (32,), "n_floor": 50, "network": QUICK}),
    "ablate_gate": (ablate_gate, {"n_seeds": 2, "gate": QUICK, "widths": (8,), "fractions": (0.5,)}),
    "cover_all": (cover_all, {"n_seeds": 2, "gate": QUICK}),
    "calibrate_bootstrap": (calibrate_bootstrap, {"n_population": 600, "n_sets": (100,), "set_sizes": (200,), "gate": QUICK}),
    "replicate": (replicate, {"n_surveys": 2, "n_draws": 2, "n_seeds": 2, "n_sets": 2, "gate": QUICK, "global_alphas": ()}),
    "train_jointly": (train_jointly, {"joint_alphas": (1.0,), "n_rounds": 1, "gradient_epochs": 2, "gate": QUICK}),
    "calibrate_uncertainty": (
        calibrate_uncertainty,
        {"gate": QUICK, "calibration": SMALL.calibration, "n_floor": 100},
    ),
    "scale": (scale, {"n_trains": (900,), "noise_levels": (0.2, 1.0), "gate": QUICK}),
}
ALL = [module for module, _ in STUDIES.values()] + [findings]


@pytest.fixture(scope="session")
def folder(common):
    (common / "studies").mkdir(exist_ok=True)
    return common / "studies"


def config_of(name, folder):
    module, own = STUDIES[name]
    places = {"output_dir": folder / name, "cache_dir": folder / "cache"}
    config = module.PRESETS["smoke"]
    tiny = {option: value for option, value in TINY.items() if option in option_names(config)}
    return with_options(config, **(tiny | own | places))


@pytest.fixture(scope="session", params=STUDIES)
def study(request, run_study):
    return run_study(request.param)


@pytest.fixture(scope="session")
def run_study(folder, once):
    def run(name):
        once(folder / name, lambda _: STUDIES[name][0].main(config_of(name, folder)))
        return folder / name

    return run


def test_report_and_files(study):
    report = (study / "report.md").read_text()
    assert report.startswith("# ")
    assert "Made by `python -m experiments." in report
    assert "nan" not in report
    for name in re.findall(r"\]\((\w+\.png)\)", report):
        assert (study / name).stat().st_size > 5_000
    run = json.loads((study / "run.json").read_text())
    assert run["config"]["data"]["n_test"] == 300
    for path in study.glob("*.csv"):
        assert len(pd.read_csv(path)) > 0


def test_variants_are_consistent(study):
    if not (study / "variants.csv").exists():
        pytest.skip("no table of variants")
    table = pd.read_csv(study / "variants.csv")
    assert (table["low"] <= table["high"]).all()
    # Differences from one baseline are differences of the mean R2.
    offset = table["r2"] - table["delta_r2"]
    np.testing.assert_allclose(offset, offset.iloc[0], atol=2e-5)


def test_the_inequality_is_reported(run_study):
    results = run_study("converge_gate")
    assert json.loads((results / "run.json").read_text())["inequality_holds"] is True
    table = pd.read_csv(results / "variants.csv")
    warm = table[table["variant"].str.contains("linear.*L-BFGS, warm")]
    assert len(warm) == 2
    assert (warm["training_loss"] <= warm["classification_gate_training_loss"]).all()


def test_differences_of_pairs_are_those_of_the_variants(run_study):
    """Which of two gates is subtracted from which, in all tables of differences that FINDINGS reads."""
    leak, converge, joint = map(run_study, ("measure_leakage", "converge_gate", "train_jointly"))
    r2 = pd.read_csv(leak / "variants.csv").set_index(["form", "protocol", "stars"])["r2"]
    for row in pd.read_csv(leak / "differences.csv").to_dict("records"):
        ours, theirs = (r2[row["form"], row[f"{of}protocol"], row[f"{of}stars"]] for of in ("", "baseline_"))
        assert row["delta_r2"] == pytest.approx(ours - theirs, abs=2e-5)
    trained = pd.read_csv(converge / "variants.csv").set_index(["form", "protocol", "optimiser", "start"])
    for row in pd.read_csv(converge / "more_training.csv").to_dict("records"):
        longer, adam = (trained.loc["MLP", row["protocol"], optimiser, "cold"] for optimiser in (row["optimiser"], "Adam"))
        assert row["delta_r2"] == pytest.approx(longer["r2"] - adam["r2"], abs=2e-5)
        assert row["delta_loss"] == pytest.approx(longer["validation_loss"] - adam["validation_loss"], abs=2e-5)
    r2 = pd.read_csv(joint / "variants.csv").set_index("variant")["r2"]
    for row in pd.read_csv(joint / "differences.csv").to_dict("records"):
        assert row["delta_r2"] == pytest.approx(r2[row["method"]] - r2[row["baseline"]], abs=2e-5)


def test_a_difference_of_two_gates_is_that_of_their_means(run_study):
    mean = pd.read_csv(run_study("replicate") / "intervals.csv").set_index("gate")["mean"]
    for name, (ours, theirs) in replicate.DIFFERENCES.items():
        assert mean[name] == pytest.approx(mean[ours] - mean[theirs], abs=1e-6)


def test_scales_differences_are_from_the_classification_gate_and_rho_is_a_share_of_the_oracles_gain(run_study):
    for _, rows in pd.read_csv(run_study("scale") / "scale.csv").groupby(["n_train", "noise_level"]):
        r2 = rows["r2"].set_axis(rows["method"])
        np.testing.assert_allclose(rows["delta_r2"], r2 - r2["soft"], atol=2e-6)
        np.testing.assert_allclose(rows["rho"], (r2 - r2["global"]) / (r2["oracle"] - r2["global"]), rtol=1e-4, atol=1e-5)
        assert (rows["delta_r2_low"] <= rows["delta_r2_high"]).all()


def test_coverage_table(folder, tmp_path):
    config = with_options(config_of("calibrate_bootstrap", folder), output_dir=tmp_path / "out")
    tables = calibrate_bootstrap.main(config).tables
    assert set(tables["coverage"]["method"]) == set(calibrate_bootstrap.CANDIDATES)
    overall = tables["coverage"][tables["coverage"]["stars"] == "all stars"]
    total = overall["coverage"] + overall["truth_below"] + overall["truth_above"]
    np.testing.assert_allclose(total, 1.0)
    assert overall["coverage"].mean() > 0.8
    wider = overall.pivot_table(index=["comparison", "method"], columns="level", values="mean_width")
    assert (np.diff(wider.to_numpy(), axis=1) > 0).all()


def test_intervals_and_floor_of_the_uncertainties(run_study):
    results = run_study("calibrate_uncertainty")
    coverage = pd.read_csv(results / "coverage.csv")
    overall = coverage[coverage["by"] == "all"]
    np.testing.assert_allclose(overall["coverage"], overall["level"], atol=0.1)
    assert set(coverage["by"]) == {"all", "cell", "mag"}
    for name in ("cell", "mag"):
        own = coverage[coverage["by"] == name]
        assert own["n"].sum() == overall["n"].sum()
    floor = pd.read_csv(results / "floor.csv").set_index("mag")
    assert (floor["floor_with_prior"] <= floor["floor"]).all()
    assert floor.loc["all", "floor"] < floor.loc["all", "MLP gate"]
    faint_to_bright = floor["floor"].drop("all").to_numpy()
    assert (np.diff(faint_to_bright) > 0).all()
    assert (pd.read_csv(results / "leverage.csv")["rank_correlation"] > 0.9).all()


def test_tabular_data(tmp_path):
    tiny = {"n_repeats": 1, "n_folds": 2, "n_experts": 2, "n_resamples": 50, "output_dir": tmp_path / "out"}
    compare_tabular.main(with_options(compare_tabular.PRESETS["default"], **tiny))
    table = pd.read_csv(tmp_path / "out" / "variants.csv").set_index("variant")
    assert table.loc["global ridge", "delta_r2"] == 0
    x, y = load_diabetes(return_X_y=True)
    folds = KFold(2, shuffle=True, random_state=0)
    oracle = cross_val_predict(HistGradientBoostingRegressor(random_state=0), x, y, cv=folds)
    assert table.loc["HistGradientBoosting", "r2"] == pytest.approx(r2_score(y, oracle), abs=1e-6)
    assert 0.4 < table.loc["ridge mixture, MLP gate", "r2"] < 0.55
    assert "python -m experiments.compare_tabular" in (tmp_path / "out" / "report.md").read_text()


def test_a_second_run_refits_nothing(folder, tmp_path, monkeypatch):
    config = with_options(config_of("measure_leakage", folder), output_dir=tmp_path / "out")
    first = measure_leakage.main(config).tables["variants"]
    monkeypatch.setattr("experiments.pipeline.gates.train_gates", None)
    monkeypatch.setattr("experiments.pipeline.prepare.fit_in_memory", None)
    pd.testing.assert_frame_equal(measure_leakage.main(config).tables["variants"], first)


def test_delta_r2_of_parts_by_hand(rng):
    y = rng.normal(size=20)
    prediction, baseline = y + rng.normal(size=(3, 20)), y + rng.normal(size=20)
    found = replicate.delta_r2(y, prediction, baseline, 2)
    part = slice(10, 20)
    own = 1 - ((y[part] - prediction[1, part]) ** 2).sum() / ((y[part] - y[part].mean()) ** 2).sum()
    theirs = 1 - ((y[part] - baseline[part]) ** 2).sum() / ((y[part] - y[part].mean()) ** 2).sum()
    assert found.shape == (3, 2)
    assert found[1, 1] == pytest.approx(own - theirs)


@pytest.mark.parametrize("module", ALL, ids=[module.__name__ for module in ALL])
def test_presets_load_from_the_command_line(module):
    for name, config in module.PRESETS.items():
        assert config.preset == name
        assert parse_config(module.PRESETS, None, ["--preset", name]) == config
    assert "python -m " + module.__name__ in module.__doc__


def test_the_replication_is_as_large_as_it_says():
    config = replicate.PRESETS["default"]
    assert (config.n_surveys, config.n_draws, config.n_seeds, config.data.n_train) == (4, 4, 16, 32_000)
    calibration = calibrate_bootstrap.PRESETS["default"]
    assert calibration.set_sizes == (816, 8_000)
    assert calibration.n_sets[0] >= 2_000


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: replicate.ReplicateConfig(n_seeds=1), "n_seeds is 1, expected at least 2"),
        (lambda: scale.ScaleConfig(n_trains=()), r"n_trains is \(\), expected at least 1"),
        (
            lambda: with_options(scale.PRESETS["default"], noise_levels=(0.2, -1.0)),
            r"noise_levels is \(0.2, -1.0\), expected at least 0",
        ),
        (lambda: with_options(measure_leakage.PRESETS["smoke"], n_seeds=0), "n_seeds is 0, expected at least 1"),
        (lambda: with_options(control_gate.PRESETS["smoke"], n_seeds=0), "n_seeds is 0"),
        (
            lambda: with_options(control_gate.PRESETS["smoke"], stack_alphas=(1.0, 0.0)),
            "stack_alphas is .*, expected positive numbers",
        ),
        (
            lambda: with_options(control_gate.PRESETS["smoke"], coverage="tenth_expert"),
            "coverage is 'tenth_expert', expected 'cells' or",
        ),
        (
            lambda: with_options(converge_gate.PRESETS["smoke"], in_sample_fraction=0.0),
            "in_sample_fraction is 0.0, expected a number",
        ),
        (
            lambda: with_options(ablate_gate.PRESETS["smoke"], fractions=(0.5, 2.0)),
            r"fractions is \(0.5, 2.0\), expected a number above",
        ),
        (lambda: with_options(cover_all.PRESETS["smoke"], n_seeds=0), "n_seeds is 0"),
        (lambda: with_options(train_jointly.PRESETS["smoke"], joint_alphas=()), r"joint_alphas is \(\), expected positive"),
        (lambda: with_options(calibrate_uncertainty.PRESETS["smoke"], n_floor=0), "n_floor is 0"),
        (lambda: with_options(compare_tabular.PRESETS["smoke"], seed=-1), "seed is -1, expected 0 to 4294967295"),
        (
            lambda: calibrate_bootstrap.CalibrateConfig(n_sets=(5,)),
            r"set_sizes is \(816, 8000\) and n_sets \(5,\), expected as many",
        ),
        (lambda: with_options(findings.PRESETS["default"], n_weight_seeds=1), "n_weight_seeds is 1, expected at least 2"),
        (lambda: calibrate_bootstrap.CalibrateConfig(set_sizes=(1,)), r"set_sizes is \(1,\)"),
        (lambda: compare_methods.CompareConfig(n_cells=()), r"n_cells is \(\)"),
        (lambda: with_options(converge_gate.PRESETS["default"], hidden=0), "hidden is 0"),
    ],
)
def test_bad_config(make, message):
    with pytest.raises(InputError, match=message):
        make()
