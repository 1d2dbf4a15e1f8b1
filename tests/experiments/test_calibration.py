"""Whose noise the spectra have, and what the intervals cover, with and without stars to calibrate on."""

import dataclasses

import numpy as np
import pytest
from small_run import SMALL, run_without_figures, with_options

from experiments import make_survey
from experiments.pipeline.calibration import predict_labelled
from experiments.pipeline.config import DataConfig
from experiments.pipeline.surveys import observe_surveys
from moe_jax import InputError, load_model


@pytest.fixture(scope="module")
def observed(tmp_path_factory):
    """Options of files with the noise of the small run in them."""
    folder = tmp_path_factory.mktemp("observed")
    make_survey.main(make_survey.MakeSurveyConfig(n_train=900, n_test=300, noise_level=0.2, output_dir=folder))
    return {"train_file": folder / "train.h5", "test_file": folder / "test.h5", "noise": "observed"}


def coverage(folder):
    """Of the intervals of a model, for 1,635 covered stars of 2,000 with simulated noise."""
    model = load_model(folder / "model")
    stars = predict_labelled(model, observe_surveys(dataclasses.replace(SMALL.data, n_test=2_000))[1])
    assert len(model.uncertainty.calibration.levels) == 3
    covered = stars.select(stars.cell >= 0)
    return np.mean(np.abs(covered.residual)[:, None] <= covered.half_width, axis=0)


def test_spectra_as_observed_are_left_as_they_are(observed):
    """Files that hold the noise which would be drawn for clean ones: the same flux, and the same errors."""
    drawn = observe_surveys(SMALL.data)
    for ours, theirs in zip(observe_surveys(dataclasses.replace(SMALL.data, **observed)), drawn, strict=True):
        for found, expected in zip(ours.read(5, 60), theirs.read(5, 60), strict=True):
            np.testing.assert_allclose(found, np.maximum(expected, 0), rtol=1e-6)
        np.testing.assert_allclose(ours.flux(5, 60), ours.read(5, 60)[0])


@pytest.mark.slow
def test_intervals_cover_what_they_promise_for_both_kinds_of_noise(trained, observed, tmp_path):
    """Calibrated on 450 other stars with simulated noise, and out-of-fold on 550 spectra as observed: some 2 points of error."""
    run_without_figures(with_options(SMALL, **observed, output_dir=tmp_path, use_cache=False))
    for folder in (trained, tmp_path):
        np.testing.assert_allclose(coverage(folder), [0.68, 0.90, 0.95], atol=0.05)


def test_spectra_that_are_simulated_here_are_not_observed():
    with pytest.raises(InputError, match="noise is 'observed' without a train_file"):
        DataConfig(noise="observed")
