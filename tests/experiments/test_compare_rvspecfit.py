"""fit_labels beside rvspecfit: scores by hand, the command without rvspecfit, and the grid as rvspecfit sees it."""

import importlib.util

import jax
import numpy as np
import pandas as pd
import pytest
from scipy.interpolate import CubicSpline
from small_run import with_options

from experiments import compare_rvspecfit
from experiments.runner.command_line import parse_config
from experiments.timing import rvs_peer
from moe_jax import InputError, simulate_survey
from moe_jax.spectra.grid import load_grid
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.simulate import unscaled_flux


def test_scores_by_hand():
    truth = np.zeros((4, 5))
    estimate = np.array([[1.0], [-3.0], [5.0], [np.nan]]) * np.ones(5)
    sigma = np.array([[2.0], [3.0], [4.0], [1.0]]) * np.ones(5)
    fits = np.column_stack([estimate, sigma, [1, 0, 1, 1]])
    found = compare_rvspecfit.score(fits, truth)
    assert found["failed"] == 0.5  # one says so, one has no answer
    for name in compare_rvspecfit.COLUMNS:
        assert found[f"rms_{name}"] == pytest.approx(np.sqrt(35 / 3))
        assert found[f"median_{name}"] == 3
        assert found[f"coverage_{name}"] == pytest.approx(2 / 3)


def test_without_rvspecfit_its_rows_are_left_out_with_a_sentence(tmp_path, monkeypatch):
    def fit(flux, error):
        return np.column_stack([np.zeros((len(flux), 5)), np.ones((len(flux), 6))])

    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(compare_rvspecfit, "fit_ours", fit)
    config = with_options(parse_config(compare_rvspecfit.PRESETS, None, ["--preset", "smoke"]), output_dir=tmp_path / "out")
    assert list(compare_rvspecfit.main(config).tables["fits"]["method"]) == ["fit_labels"]
    assert compare_rvspecfit.MISSING in (tmp_path / "out" / "report.md").read_text()
    table = pd.read_csv(tmp_path / "out" / "fits.csv")
    truth = compare_rvspecfit.draw_stars(config, 0.2)[2]
    assert table["rms_velocity"][0] == pytest.approx(np.sqrt(np.mean(truth[:, 4] ** 2)), rel=1e-5)


@pytest.mark.parametrize("labels", [(4000.0, 2.0, -1.0, 0.125), (5130.0, 3.3, -0.7, 0.3)])
def test_rvspecfits_template_is_the_grid(labels):
    wave = np.geomspace(WAVE[0], WAVE[-1], 4608)
    template = rvs_peer.SplineTemplate({"lam": wave})(np.array([np.log10(labels[0]), *labels[1:]]))
    expected = CubicSpline(WAVE, np.asarray(unscaled_flux(load_grid(), np.array([labels], np.float32)))[0])(wave)
    ratio = template / expected
    np.testing.assert_allclose(ratio, np.median(ratio), rtol=5e-3)
    inside, below = (rvs_peer.Outside({})(np.array([np.log10(4000.0), 2.0, m_h, 0.0])) for m_h in (-1.0, -3.15))
    assert (inside, below) == (0, pytest.approx(0.2))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::RuntimeWarning")
def test_rvspecfit_finds_bright_stars(tmp_path):
    pytest.importorskip("rvspecfit")
    config = rvs_peer.write_library(tmp_path, 600.0, every=30)
    survey = simulate_survey(jax.random.key(3), 2, label_sampling="uniform")
    truth = np.column_stack([survey.labels.T_eff, survey.labels.log_g, survey.labels.M_H, survey.labels.a_M, np.zeros(2)])
    seen = compare_rvspecfit.seen(np.asarray(survey.flux), 0.02 * np.asarray(survey.error))
    for star, expected in zip(seen, truth, strict=True):
        fit = rvs_peer.fit_star(rvs_peer.SPLINES, star, 5, config)
        assert fit[10] == 1
        assert (np.abs(fit[:5] - expected) < [50, 0.1, 0.05, 0.05, 0.5]).all()
        assert rvs_peer.chi2_of(fit[:5], star, 5, config) < 0.2 * len(star[0])  # no noise was drawn
        assert rvs_peer.chi2_of(np.add(expected, [0, 0.5, 0, 0, 0]), star, 5, config) > 2 * len(star[0])


@pytest.mark.parametrize(("change", "message"), [({"noise_levels": ()}, "noise_levels is"), ({"seed": -1}, "seed is -1")])
def test_bad_config(change, message):
    with pytest.raises(InputError, match=message):
        with_options(compare_rvspecfit.PRESETS["smoke"], **change)
