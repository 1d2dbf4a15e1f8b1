"""Spoiled spectra are what their names say, and the verdicts follow the rule."""

import jax
import numpy as np
import pandas as pd
import pytest
from small_run import with_options

from experiments import stress_predict
from experiments.pipeline.spoilings import LATER, LIGHT, SPOILINGS, TRIED, WAVE, Exposure, blur, shift
from moe_jax import InputError, save_survey, simulate_survey


@pytest.fixture(scope="module")
def line():
    """Two stars with a Gaussian line, without noise."""
    flux = np.repeat(0.5 - 0.2 * np.exp(-0.5 * ((WAVE[None] - 8000) / 2) ** 2), 2, axis=0)
    return Exposure(flux, np.zeros_like(flux), np.full_like(flux, 0.01))


def moments(flux):
    depth = 0.5 - flux
    mean = np.sum(depth * WAVE) / np.sum(depth)
    return mean, np.sum(depth * (WAVE - mean) ** 2) / np.sum(depth)


def test_velocities_and_resolutions(line):
    moved = shift(line, np.array([150.0, -90.0]))
    assert moments(moved.flux[0])[0] == pytest.approx(8000 * (1 + 150 / LIGHT), abs=0.01)
    assert moments(moved.flux[1])[0] == pytest.approx(8000 * (1 - 90 / LIGHT), abs=0.01)
    fwhm = 7975 * np.sqrt(1 / 2500**2 - 1 / 5000**2)
    assert moments(blur(line, 2500).flux[0])[1] - moments(line.flux[0])[1] == pytest.approx((fwhm / 2.3548) ** 2, rel=0.01)


@pytest.mark.parametrize("name", SPOILINGS)
def test_spoilings_change_what_they_should(line, name):
    def spoil(seed):
        return SPOILINGS[name](np.random.default_rng(seed), line)

    found, again = spoil(0), spoil(0)
    np.testing.assert_array_equal(found.flux, again.flux)
    assert found.flux.shape == found.noise.shape == found.error.shape == line.flux.shape
    changed = any(not np.array_equal(new, old) for new, old in zip(found, line, strict=True))
    assert changed == (name not in ("untouched", "two stars in one"))  # here both stars are the same


def test_verdicts():
    flagged = [0.0, 0.0, 0.0, 0.0, 0.96, 0.94, 1.0]
    rms, coverage = [0.3, 0.4, 0.41, 0.3, 2.0, 2.0, np.nan], [0.68, 0.68, 0.68, 0.5, 0.1, 0.1, np.nan]
    judged = stress_predict.judge(pd.DataFrame({"flagged": flagged, "rms": rms, "coverage": coverage}))
    assert list(judged["handled"]) == ["yes", "yes", "no", "no", "yes", "no", "yes"]


def test_scores_are_of_stars_without_a_flag():
    table = pd.DataFrame({"flags": ["", "", "bad"], "log_g": [1.0, 2.0, 9.0], "uncertainty": [0.2, 0.2, 0.2]})
    row = stress_predict.score("case", table, np.array([1.1, 2.3, 0.0]))
    assert row == {"case": "case", "flagged": pytest.approx(1 / 3), "rms": pytest.approx(np.sqrt(0.05)), "coverage": 0.5}


def test_what_no_flag_can_see():
    """Good spectra are flagged as often as noise makes it; a second star is hidden by large errors and seen by small ones."""
    exposure, log_g = stress_predict.draw_exposure(stress_predict.StressConfig(n_stars=20))
    seen, bias = stress_predict.most_flagged(exposure, log_g)
    assert 0.005 <= seen < 0.1
    assert bias < 0.02
    two = SPOILINGS["two stars in one"](np.random.default_rng(0), exposure)
    shares = [stress_predict.most_flagged(two._replace(error=two.error * factor), log_g) for factor in (1e3, 1.0, 0.1)]
    assert shares[0][0] == pytest.approx(stress_predict.FALSE_ALARMS, rel=0.1)
    assert shares[0][1] > 0.1
    assert 0.3 < shares[1][0] < 0.95 < shares[2][0]
    survey = simulate_survey(jax.random.key(0), 20)
    poor = np.asarray(survey.labels.M_H) < -2.1  # less metal than any cell has, which is seen without a residual
    flux, error, log_g = (np.asarray(array, np.float64)[poor] for array in (survey.flux, survey.error, survey.labels.log_g))
    assert poor.any()
    assert stress_predict.most_flagged(Exposure(flux, np.zeros_like(flux), 0.2 * error), log_g) == (1.0, 0.0)


def test_each_real_star_needs_a_label(tmp_path):
    survey = simulate_survey(jax.random.key(0), 2)
    save_survey(tmp_path / "stars.h5", survey)
    (tmp_path / "labels.csv").write_text("log_g\n4.5\n")
    files = {"real_stars": tmp_path / "stars.h5", "real_labels": tmp_path / "labels.csv"}
    with pytest.raises(InputError, match="labels.csv: found 1 rows of log_g, expected the log_g of 2 stars"):
        stress_predict.read_real_stars(with_options(stress_predict.PRESETS["smoke"], **files), None)


@pytest.mark.slow
def test_the_study(trained, tmp_path, monkeypatch):
    """On some cases, of which each takes another way through the fit; what every case does to spectra is tested above."""
    names = ("untouched", "velocity 200 km/s", "resolution 2500", "dead pixels hold NaN", "scale times 1000", "noise only")
    few = {name: SPOILINGS[name] for name in names}
    monkeypatch.setattr(stress_predict, "SPOILINGS", few)
    config = with_options(stress_predict.PRESETS["smoke"], model=trained / "model", n_stars=40, output_dir=tmp_path)
    stress_predict.main(config)
    cases = pd.read_csv(tmp_path / "cases.csv")
    assert list(cases["case"]) == [*few, *LATER, *TRIED]
    assert cases["flagged"].iloc[0] < 0.1
    assert (tmp_path / "cases.png").exists()
