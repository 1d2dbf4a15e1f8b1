"""How many stars of a file are used, and what is said of surveys from which nothing can be learnt."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import regress_gate
from experiments.pipeline import calibration
from experiments.pipeline.calibration import CalibrationConfig, keep_calibration_stars, observe_calibration_stars
from experiments.pipeline.config import DataConfig
from experiments.pipeline.stars import Stars, finish
from experiments.pipeline.surveys import open_surveys
from experiments.runner.command_line import parse_config
from experiments.runner.stages import Stages
from moe_jax import InputError, Survey, save_survey, simulate_survey


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Command-line options of a training file of 120 stars and a test file of 50."""
    folder = tmp_path_factory.mktemp("surveys")
    for name, n_stars in (("train", 120), ("test", 50)):
        whole = simulate_survey(jax.random.key(n_stars), n_stars)
        save_survey(folder / f"{name}.h5", Survey(whole.wave[::8], whole.flux[:, ::8], whole.error[:, ::8], whole.labels))
    return ["--train-file", str(folder / "train.h5"), "--test-file", str(folder / "test.h5")]


@pytest.mark.parametrize("preset", regress_gate.PRESETS)
def test_all_stars_of_a_file_are_used_unless_a_number_is_given(files, preset):
    def n_stars(*arguments):
        config = parse_config(regress_gate.PRESETS, None, ["--preset", preset, *files, *arguments])
        return tuple(survey.n_stars for survey in open_surveys(config.data))

    assert n_stars() == (120, 50)
    assert n_stars("--n-train", "40") == (40, 50)
    assert n_stars("--n_train=40", "--n-test=30") == (40, 30)
    assert n_stars("--n-train", "9000") == (120, 50)
    simulated = parse_config(regress_gate.PRESETS, None, ["--preset", preset])
    assert simulated == regress_gate.PRESETS[preset]


def test_a_simulated_survey_needs_a_number():
    with pytest.raises(InputError, match="n_test is 0, expected at least 1 without a file"):
        DataConfig(n_test=0)


def test_the_last_tenth_of_a_training_file_is_kept_to_calibrate_on(files, capsys, monkeypatch):
    config = parse_config(regress_gate.PRESETS, None, files).data
    all_used = keep_calibration_stars(config, CalibrationConfig(), Stages())
    assert all_used.n_train == 120
    assert observe_calibration_stars(all_used, CalibrationConfig()) is None
    monkeypatch.setattr(calibration, "LEAST_KEPT", 12)
    kept = keep_calibration_stars(config, CalibrationConfig(), Stages())
    assert kept.n_train == 108
    assert "the last 12 of 120 stars are kept" in " ".join(capsys.readouterr().out.split())
    stars, start = observe_calibration_stars(kept, CalibrationConfig())
    assert (start, stars.n_stars) == (108, 120)
    assert keep_calibration_stars(config, CalibrationConfig(n_stars=5), Stages()).n_train == 115
    given = dataclasses.replace(config, n_train=100)
    for unchanged, settings in (
        (given, CalibrationConfig()),
        (config, CalibrationConfig(n_stars=0)),
        (config, CalibrationConfig(file=config.test_file)),
        (DataConfig(), CalibrationConfig()),
    ):
        assert keep_calibration_stars(unchanged, settings, Stages()) == unchanged


def test_experts_that_all_predict_the_same_are_refused():
    ones, cell = np.ones(45), np.arange(45) % 9
    features = np.random.default_rng(0).normal(size=(45, 13))
    stars = Stars(features, np.ones((45, 9)), ones, ones, ones, np.arange(45.0), cell)
    with pytest.raises(InputError, match="training survey: expert_predictions: found the same prediction of all experts"):
        finish(DataConfig(), stars, stars, None, None, None, ones, Stages())
