"""How many stars of a file are used, and what is said of surveys from which nothing can be learnt."""

import dataclasses

import jax
import numpy as np
import pytest

from experiments import make_survey, regress_gate
from experiments.pipeline import calibration
from experiments.pipeline.calibration import CalibrationConfig, keep_calibration_stars, observe_calibration_stars
from experiments.pipeline.config import DataConfig, draw_keys
from experiments.pipeline.stars import Stars, finish
from experiments.pipeline.surveys import open_surveys, require_grid_pixels
from experiments.runner.command_line import parse_config
from experiments.runner.stages import Stages
from moe_jax import InputError, Survey, save_survey, simulate_survey

SHARP = np.asarray(simulate_survey(draw_keys(0).train, 3).flux)


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """Command-line options of a training file of 120 stars and a test file of 50."""
    folder = tmp_path_factory.mktemp("surveys")
    for name, n_stars in (("train", 120), ("test", 50)):
        whole = simulate_survey(jax.random.key(n_stars), n_stars)
        save_survey(folder / f"{name}.h5", Survey(whole.wave[::8], whole.flux[:, ::8], whole.error[:, ::8], whole.labels))
    return ["--train-file", str(folder / "train.h5"), "--test-file", str(folder / "test.h5")]


@pytest.mark.slow
def test_resolution_is_that_of_all_stars():
    config = DataConfig(n_train=3, n_test=2, resolution=1500)
    simulated = simulate_survey(draw_keys(0).train, 3, resolution=1500)
    calibration_stars, _ = observe_calibration_stars(config, CalibrationConfig(n_stars=4))
    for spectra in (*open_surveys(config), calibration_stars.spectra):
        flux = np.asarray(spectra.read(0, 2)[0])
        assert np.abs(np.diff(flux, 2, axis=1)).max() < 0.5 * np.abs(np.diff(SHARP, 2, axis=1)).max()
    np.testing.assert_array_equal(open_surveys(config)[0].read(0, 3)[0], simulated.flux)
    with pytest.raises(InputError, match="resolution is 7000, expected 500 to 5000"):
        DataConfig(resolution=7000)
    with pytest.raises(InputError, match="resolution is -1, expected a positive number"):
        DataConfig(resolution=-1, train_file="a.h5", test_file="b.h5")


def test_files_on_other_pixels(tmp_path):
    """The file has the wavelengths, and what ``regress_gate`` reads is what is simulated."""
    wave = np.linspace(8160, 8700, 300)
    np.savetxt(tmp_path / "wave.txt", wave)
    made = make_survey.MakeSurveyConfig(n_train=3, n_test=2, wave=tmp_path / "wave.txt", output_dir=tmp_path)
    make_survey.main(made)
    train, _ = open_surveys(DataConfig(train_file=tmp_path / "train.h5", test_file=tmp_path / "test.h5"))
    np.testing.assert_allclose(train.wave, wave)
    np.testing.assert_array_equal(train.read(0, 3)[0], simulate_survey(draw_keys(0).train, 3, wave=wave).flux)
    with pytest.raises(InputError, match="missing.txt: found no wavelengths"):
        make_survey.main(dataclasses.replace(made, wave=tmp_path / "missing.txt"))


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


def test_a_study_that_uses_the_grid_needs_its_pixels(files):
    require_grid_pixels(DataConfig(n_train=3, n_test=2))
    with pytest.raises(InputError, match=r"test\.h5: spectrumdataset/wave: found 512 pixels, expected the 4096 of the model grid"):
        require_grid_pixels(parse_config(regress_gate.PRESETS, None, files).data)


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
    stars = Stars(features, np.ones((45, 9)), ones, np.arange(45.0), cell)
    with pytest.raises(InputError, match="training survey: expert_predictions: found the same prediction of all experts"):
        finish(DataConfig(), stars, stars, None, None, None, ones, Stages())
