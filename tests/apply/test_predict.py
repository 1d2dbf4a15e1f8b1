"""Spectra as observed: files in, tables out."""

import shutil
import subprocess
import sys
import threading

import h5py
import jax
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from astropy.table import Table
from matplotlib import pyplot

from experiments.pipeline.spoilings import Exposure, shift, slope
from experiments.predict import PredictConfig, main
from moe_jax import InputError, load_model, predict_model, simulate_survey
from moe_jax.apply.application import MANY_MASKED, NOT_PREDICTED, UNLIKE_TRAINING, apply_model, needs_scaling, prepare_application
from moe_jax.experts.cells import assign_cells
from moe_jax.spectra.resample import MaskedSpectra, overlaps, resample
from moe_jax.spectra.survey_file import ERROR_FIELD, FLUX_FIELD, WAVE_FIELD
from moe_jax.spectra.telescope_file import IVAR_FIELD, TelescopeFile

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(trained):
    return load_model(trained / "model")


@pytest.fixture(scope="module")
def spectra(trained):
    return TelescopeFile(trained.parent / "observed.h5").read(0, 300)


@pytest.fixture(scope="module")
def application(model):
    return prepare_application(model, model.wave, answer="mixture")


@pytest.fixture(scope="module")
def table(application, spectra):
    return apply_model(application, spectra)


def predict(trained, spectra, output, answer="mixture", **options):
    main(PredictConfig(trained / "model", (spectra,), output, answer=answer, **options))
    return output


def test_the_answer_of_the_local_experts(trained, spectra, model, table):
    local = apply_model(prepare_application(model, model.wave, answer="local"), spectra)
    np.testing.assert_array_equal(local["mixture_log_g"], table["log_g"])
    log_g = pd.read_csv(trained / "predictions.csv").set_index("star")["log_g"]
    ours, mixtures = (np.sqrt(np.mean((answer.loc[log_g.index, "log_g"] - log_g) ** 2)) for answer in (local, table))
    assert ours < mixtures
    masked = spectra._replace(good=spectra.good.copy(), error=spectra.error.copy())
    masked.good[:, 100:130], masked.error[:, 100:130] = False, 0.0
    again = apply_model(prepare_application(model, model.wave, answer="local"), masked)
    assert np.median(np.abs(again["log_g"] - local["log_g"])) < 0.1 * np.median(local["uncertainty"])
    masked.good[1:], masked.error[1:] = spectra.good[1:], spectra.error[1:]
    again = apply_model(prepare_application(model, model.wave, answer="local"), masked)
    np.testing.assert_array_equal(again["log_g"][1:], local["log_g"][1:])  # no star feels what is masked of another
    with pytest.raises(InputError, match="the model has no local linear experts"):
        prepare_application(model._replace(local=None), model.wave, answer="local")


def test_calls_with_masked_pixels_end(model):
    """With the filling of masked pixels inside the compiled prediction, XLA's CPU runtime stood still after some calls."""
    rng = np.random.default_rng(7)
    flux = rng.normal(1.0, 0.1, (500, len(model.wave))).astype("f4")
    good = rng.uniform(size=flux.shape) > 0.01

    def predict_often():
        for _ in range(30):
            np.asarray(predict_model(model, flux, good=good).log_g)

    calls = threading.Thread(target=predict_often, daemon=True)
    calls.start()
    calls.join(timeout=120)
    assert not calls.is_alive()


def test_what_the_run_predicted(trained, tmp_path, capsys):
    """The table of the command is the run's own, star by star, and says all that it promises."""
    table = pd.read_csv(predict(trained, trained.parent / "observed.h5", tmp_path / "out.csv", chunk_stars=64))
    run = pd.read_csv(trained / "predictions.csv")
    np.testing.assert_allclose(table["log_g"][run["star"]], run["regress_mlp_cross_fitted"], atol=2e-4)
    weights = [f"weight_{k}" for k in range(9)]
    widths = ["uncertainty", "half_width_90", "half_width_95"]
    assert list(table.columns) == ["file", "star", "log_g", *widths, *weights, "distance", "n_masked", "flags"]
    np.testing.assert_allclose(table[weights].sum(axis=1), 1, atol=1e-5)
    assert (np.diff(table[widths], axis=1) >= 0).all()
    assert (table["uncertainty"] > 0).all()
    assert list(table["star"]) == list(range(300))
    assert "300 stars, 0 masked pixels" in capsys.readouterr().out
    assert [path.name for path in tmp_path.iterdir()] == ["out.csv"]


def test_chunks_and_formats_change_nothing(trained, tmp_path, table):
    for name in ("a.csv", "b.parquet", "c.fits"):
        predict(trained, trained.parent / "observed.h5", tmp_path / name, chunk_stars=90)
    read = [pd.read_csv(tmp_path / "a.csv", keep_default_na=False), pd.read_parquet(tmp_path / "b.parquet")]
    for found in [*read, Table.read(tmp_path / "c.fits", character_as_bytes=False).to_pandas()]:
        assert list(found.columns) == ["file", *table.columns]
        assert [str(flag).strip() for flag in found["flags"]] == list(table["flags"])
        for name in table.columns[:-1]:
            np.testing.assert_allclose(found[name], table[name], rtol=2e-5, atol=1e-6)


def test_the_parts_of_the_variance_are_scaled(trained, spectra):
    present = load_model(trained / "model").uncertainty
    assert not np.allclose(present.part_scales, 1)
    own = predict_model(load_model(trained / "model"), spectra.flux[:5], spectra.error[:5])
    np.testing.assert_allclose(own.sigma**2, np.asarray(own.variance).T @ np.asarray(present.part_scales), rtol=1e-5)


def test_fits_in(trained, spectra, tmp_path, table):
    wave = TelescopeFile(trained.parent / "observed.h5").wave
    ivar = np.where(spectra.good, 1 / np.where(spectra.good, spectra.error, 1) ** 2, 0)
    images = [fits.PrimaryHDU(), fits.ImageHDU(wave, name="WAVELENGTH"), fits.ImageHDU(spectra.flux, name="FLUX")]
    fits.HDUList([*images, fits.ImageHDU(ivar.astype("f4"), name="IVAR")]).writeto(tmp_path / "in.fits")
    found = pd.read_csv(predict(trained, tmp_path / "in.fits", tmp_path / "out.csv"))
    np.testing.assert_allclose(found["log_g"], table["log_g"], atol=1e-4)
    np.testing.assert_allclose(found["uncertainty"], table["uncertainty"], rtol=1e-3)


def test_masked_pixels_are_found_counted_and_filled(trained, spectra, tmp_path, table):
    path = tmp_path / "masked.h5"
    with h5py.File(trained.parent / "observed.h5") as old, h5py.File(path, "w") as new:
        wave, flux, error = old[WAVE_FIELD][()], old[FLUX_FIELD][()], old[ERROR_FIELD][()]
        flux[0, :3], flux[1, 5], error[2, 7], error[3, 9] = np.nan, np.inf, 0.0, np.nan
        error[4, (wave > 8532) & (wave < 8552)] = -1.0  # a whole line
        error[5, ::2], error[5, 1] = np.inf, np.inf  # more than half
        flux[6] = np.nan
        new[WAVE_FIELD], new[FLUX_FIELD], new[ERROR_FIELD] = wave, flux, error
    found = pd.read_csv(predict(trained, path, tmp_path / "out.csv"), keep_default_na=False)
    in_line = int(((wave > 8532) & (wave < 8552)).sum())
    assert list(found["n_masked"][:8]) == [3, 1, 1, 1, in_line, 2049, 4096, 0]
    assert list(found["flags"][4:7]) == [MANY_MASKED, f"{MANY_MASKED}|{NOT_PREDICTED}", f"{MANY_MASKED}|{NOT_PREDICTED}"]
    numbers = pd.to_numeric(found["log_g"], errors="coerce")
    assert list(np.flatnonzero(numbers.isna())) == [5, 6]
    np.testing.assert_allclose(numbers[:4], table["log_g"][:4], atol=0.1)
    np.testing.assert_allclose(numbers[7:], table["log_g"][7:], atol=1e-4)
    # The same pixels by inverse variance.
    with h5py.File(path, "a") as file:
        with np.errstate(divide="ignore"):
            ivar = np.where(np.isfinite(error) & (error > 0), 1 / np.square(error), 0)
        del file[ERROR_FIELD]
        file[IVAR_FIELD] = ivar.astype("f4")
    again = pd.read_csv(predict(trained, path, tmp_path / "again.csv"), keep_default_na=False)
    assert list(again["n_masked"]) == list(found["n_masked"])


def test_another_scale_is_seen_and_undone(application, spectra, table):
    assert not needs_scaling(application, spectra)
    factor = np.linspace(3, 4000, 300, dtype="f4")[:, None]
    bright = MaskedSpectra(spectra.flux * factor, spectra.error * factor, spectra.good)
    assert needs_scaling(application, bright)
    found = apply_model(application._replace(scale=True), bright)
    assert np.abs(found["log_g"] - table["log_g"]).median() < 0.1 * table["uncertainty"].median()
    assert (found["uncertainty"] > 0.95 * table["uncertainty"]).mean() > 0.9
    negative = MaskedSpectra(-bright.flux, bright.error, bright.good)
    assert (apply_model(application._replace(scale=True), negative)["flags"] == NOT_PREDICTED).all()


def test_arrays_of_jax_and_errors_of_masked_pixels(application, spectra):
    """64 stars are not padded: as arrays of JAX they ended in a KeyError. A masked pixel may hold any error, -1 too."""
    some = MaskedSpectra(*(array[:64].copy() for array in spectra))
    some.good[0, 5], some.error[0, 5] = False, 0.0
    before = apply_model(application, some)
    pd.testing.assert_frame_equal(apply_model(application, MaskedSpectra(*map(jax.numpy.asarray, some))), before)
    some.error[0, 5] = -1.0
    pd.testing.assert_frame_equal(apply_model(application, some), before)
    some.good[0, 5] = True
    with pytest.raises(InputError, match="error holds -1, expected no negative errors"):
        apply_model(application, some)


def test_errors_that_mean_nothing(model, spectra):
    """Local experts take no noise for what it is; a fit says that there is no answer."""
    few = MaskedSpectra(*(array[:3] for array in spectra))
    local, fit = (prepare_application(model, model.wave, answer=answer) for answer in ("local", "fit"))
    assert np.isfinite(apply_model(local, few._replace(error=few.error * np.float32(1e-25)))["log_g"]).all()
    for factor in (1e-25, 1e7, 1e20):
        found = apply_model(fit, few._replace(error=few.error * np.float32(factor)))
        assert found["log_g"].isna().all()
        assert (found["flags"] == NOT_PREDICTED).all()


def test_other_pixels_are_resampled(model, spectra, table):
    wave = np.linspace(7095, 8855, 5_000)
    other = resample(*spectra, overlaps(np.asarray(model.wave), wave), wave)
    application = prepare_application(model, wave, answer="mixture")
    assert application.overlap is not None
    found = apply_model(application, other)
    assert np.abs(found["log_g"] - table["log_g"]).median() < 0.3 * table["uncertainty"].median()
    assert (found["n_masked"] <= 2).all()


def test_sharper_spectra_are_degraded(model):
    """They are predicted as spectra that were simulated at the model's resolution."""
    blurred = model._replace(resolution=2500.0)
    keys = jax.random.key(8), 100
    sharp, like = (simulate_survey(*keys, resolution=resolution) for resolution in (5000, 2500))
    sharp, like = (
        MaskedSpectra(np.asarray(s.flux), 0.05 * np.asarray(s.error), np.ones(s.flux.shape, bool)) for s in (sharp, like)
    )
    found = apply_model(prepare_application(blurred, model.wave, "wave", "mixture", 5000.0), sharp)
    expected = apply_model(prepare_application(blurred, model.wave, "wave", "mixture"), like)
    wrong = apply_model(prepare_application(model, model.wave, "wave", "mixture", 5000.0), sharp)
    off, off_if_not = (np.abs(table["log_g"] - expected["log_g"]) for table in (found, wrong))
    assert off.median() < 0.2 * off_if_not.median()
    assert (found["uncertainty"] > 0).all()


def test_resolutions_at_which_the_answer_was_not_trained(model):
    sentence = r"night.h5: resolution is 2700, expected at least 5000, that of the model; train one with `regress_gate --resolution"
    with pytest.raises(InputError, match=sentence):
        prepare_application(model, model.wave, "night.h5", "mixture", 2700.0)
    blurred = prepare_application(model, model.wave, "night.h5", "fit", 2700.0)
    assert blurred.overlap is None
    survey = simulate_survey(jax.random.key(9), 2)
    table = apply_model(
        blurred, MaskedSpectra(np.asarray(survey.flux), 0.2 * np.asarray(survey.error), np.ones(survey.flux.shape, bool))
    )
    assert np.isfinite(table["log_g"]).all()
    assert table[["mixture_log_g", "mixture_uncertainty", "weight_0", "distance"]].isna().all(axis=None)
    assert prepare_application(model, model.wave, "night.h5", "mixture", 4950.0).overlap is None
    with pytest.raises(InputError, match="night.h5: resolution is 1200, expected at least 1777, the least that the fit"):
        prepare_application(model, model.wave, "night.h5", "fit", 1200.0)
    blurred = model._replace(resolution=1000.0)  # no option names it: it is that of the training stars
    with pytest.raises(InputError, match="night.h5: resolution is 1000, expected at least 1777, the least that the fit"):
        prepare_application(blurred, model.wave, "night.h5", "fit")
    assert prepare_application(blurred, model.wave, "night.h5", "mixture").resolution == 1000
    with pytest.raises(InputError, match="resolution is nan, expected a positive number"):
        prepare_application(model, model.wave, "night.h5", "fit", np.nan)


def test_noise_of_resampled_pixels_is_that_of_the_observed_ones(model, spectra):
    """The variance by propagation is the scatter of predictions over draws of the noise on the observed pixels."""
    wave = np.linspace(7095, 8855, 3_000)
    clean = resample(*spectra, overlaps(np.asarray(model.wave), wave), wave)
    application = prepare_application(model, wave, answer="mixture")
    rng, error = np.random.default_rng(0), np.full((1, 3_000), 2e-3, "f4")
    flux = clean.flux[:1] + error * rng.normal(size=(300, 3_000)).astype("f4")
    drawn = apply_model(application, MaskedSpectra(flux, np.repeat(error, 300, axis=0), np.repeat(clean.good[:1], 300, axis=0)))
    without = apply_model(application, MaskedSpectra(clean.flux[:1], error * 1e-3, clean.good[:1]))
    within = apply_model(application, MaskedSpectra(clean.flux[:1], error, clean.good[:1]))
    known = model.uncertainty
    assert known is not None
    cell_quantile = (within["uncertainty"] / np.sqrt(1.0)).iloc[0]
    # uncertainty^2 is quantile^2 times (what the noise adds + the rest); the quantile follows from the two.
    weights = within[[f"weight_{k}" for k in range(9)]].to_numpy()[0]
    assert weights.sum() == pytest.approx(1, abs=1e-4)
    candidates = np.asarray(known.calibration.quantiles)[:, 0] ** 2
    added = (cell_quantile**2 - without["uncertainty"].iloc[0] ** 2) / candidates
    assert np.abs(added / drawn["log_g"].var() - 1).min() < 0.25


def test_what_is_no_star_is_flagged(application, spectra):
    wave = np.asarray(application.model.wave)
    flat, hill = np.full_like(wave, 0.5), 0.5 + 0.4 * np.sin(wave / 40)
    noise = np.random.default_rng(0).normal(0.5, 2.0, wave.shape)
    flux = np.stack([hill, noise, flat]).astype("f4")
    strange = MaskedSpectra(flux, np.full_like(flux, 0.01), np.ones(flux.shape, bool))
    found = apply_model(application, strange)
    assert (found["flags"][:2] == UNLIKE_TRAINING).all()
    assert (found["distance"][:2] > 1).all()
    assert (apply_model(application, spectra)["flags"] == UNLIKE_TRAINING).mean() < 0.05
    assert (apply_model(application._replace(answer="fit"), strange)["flags"].str.contains("not_a_star")).all()


def test_the_answer_of_the_fit(model, small_survey):
    """What the mixture trusts and the fit does not: a slope, a velocity, and wrong errors."""
    rng, error = np.random.default_rng(0), 0.2 * np.asarray(small_survey.error)[:60]
    exposure = Exposure(np.asarray(small_survey.flux)[:60], error * rng.normal(size=error.shape), error / 2)
    flux, noise, error = (array.astype("f4") for array in slope(shift(exposure, np.full(60, 50.0)), 0.1))
    spectra = MaskedSpectra(flux + noise, error, np.ones(flux.shape, bool))
    application = prepare_application(model, model.wave)
    assert application.answer == "fit"  # the model was trained on spectra of the grid
    found, true = apply_model(application, spectra, first_star=7), small_survey.labels
    kept = found["flags"].isin(["", "outside_cells"]).to_numpy()  # the fit's log g holds there too
    assert kept.mean() > 0.95
    outside = np.asarray(assign_cells(true.T_eff, true.M_H))[:60] < 0
    flagged = found["flags"] == "outside_cells"
    assert flagged[~outside].mean() < 0.05 < flagged[outside].mean()  # some covered stars lie on an edge of the cells
    residual = (found["log_g"] - np.asarray(true.log_g)[:60])[kept]
    assert np.sqrt(np.mean(residual**2)) < 0.4
    assert np.sqrt(np.mean((found["mixture_log_g"] - np.asarray(true.log_g)[:60]) ** 2)) > 0.6
    assert 0.5 < np.mean(np.abs(residual) < found["uncertainty"][kept]) < 0.85
    assert found["velocity"].median() == pytest.approx(50, abs=1)
    assert np.abs(found["T_eff"] - np.asarray(true.T_eff)[:60]).median() < 100
    assert found["chi2"].median() == pytest.approx(4, rel=0.05)
    assert list(found["star"]) == list(range(7, 67))
    widths = ["uncertainty", "half_width_90", "half_width_95", "T_eff_error", "M_H_error", "a_M_error", "velocity_error"]
    assert (found[widths] > 0).all().all()
    unknown = apply_model(application, spectra._replace(error=np.full_like(error, np.nan)))
    assert np.median(np.abs(unknown["log_g"] - found["log_g"])) < 0.1


def test_a_model_of_other_spectra_answers_itself(model):
    for provenance in ({"config": {"data": {"train_file": "stars.h5"}}}, {}):
        assert prepare_application(model._replace(provenance=provenance), model.wave).answer == "mixture"


def test_without_errors_those_of_the_training_stars_stand_in(trained, tmp_path, capsys, table):
    with h5py.File(trained.parent / "observed.h5") as old, h5py.File(tmp_path / "in.h5", "w") as new:
        new[WAVE_FIELD], new[FLUX_FIELD] = old[WAVE_FIELD][()], old[FLUX_FIELD][()]
    found = pd.read_csv(predict(trained, tmp_path / "in.h5", tmp_path / "out.csv"))
    assert "neither errors nor ivar" in capsys.readouterr().out
    np.testing.assert_allclose(found["log_g"], table["log_g"], atol=1e-4)
    assert 0.5 < (found["uncertainty"] / table["uncertainty"]).median() < 2


def test_a_model_that_is_not_calibrated(trained, tmp_path, capsys, model):
    from moe_jax import save_model
    from moe_jax.apply.conformal import Calibration

    known = model.uncertainty
    empty = Calibration(np.zeros(0, "f4"), np.zeros((9, 0), "f4"), np.zeros(9, "f4"))
    save_model(tmp_path / "model", model._replace(uncertainty=known._replace(calibration=empty)))
    main(PredictConfig(tmp_path / "model", (trained.parent / "observed.h5",), tmp_path / "out.csv", answer="mixture"))
    assert "not calibrated" in capsys.readouterr().out
    found = pd.read_csv(tmp_path / "out.csv")
    assert (found["uncertainty"] > 0).all()
    assert "half_width_90" not in found
    save_model(tmp_path / "model", model._replace(local=model.local._replace(calibration=empty)))
    main(PredictConfig(tmp_path / "model", (trained.parent / "observed.h5",), tmp_path / "out.csv", answer="local"))
    assert "not calibrated" in capsys.readouterr().out


def test_the_command(trained, tmp_path):
    command = [sys.executable, "-m", "experiments.predict", str(trained / "model"), str(trained.parent / "observed.h5")]
    command += ["--answer", "mixture"]
    done = subprocess.run([*command, "-o", str(tmp_path / "out.csv")], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(pd.read_csv(tmp_path / "out.csv")) == 300
    wrong = subprocess.run([*command, "-o", str(tmp_path / "out.xlsx")], capture_output=True, text=True)
    assert wrong.returncode == 2
    assert wrong.stderr == f"error: {tmp_path / 'out.xlsx'}: found the suffix '.xlsx', expected .csv, .parquet or .fits\n"


def test_an_error_on_the_way_leaves_nothing(trained, tmp_path):
    """The last chunk cannot be read: no table, and none of its parts."""
    path = tmp_path / "in.h5"
    shutil.copy(trained.parent / "observed.h5", path)
    size = path.stat().st_size
    with h5py.File(path) as file:
        end = file[ERROR_FIELD].id.get_offset() + file[ERROR_FIELD].id.get_storage_size()
    with path.open("r+b") as file:
        file.truncate(min(end, size) - 4096 * 4)
    output = tmp_path / "out.csv"
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "experiments.predict",
            str(trained / "model"),
            str(path),
            "-o",
            str(output),
            "--chunk-stars",
            "50",
            "--answer",
            "mixture",
        ],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2
    assert done.stderr.count("\n") == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["in.h5"]


def test_several_files_and_patterns(trained, spectra, tmp_path, table):
    """A row for each star with its file's name; star by star in air or in nm, whatever the format."""
    wave = TelescopeFile(trained.parent / "observed.h5").wave
    for i in range(2):
        Table({"wave": wave / 10, "flux": spectra.flux[i], "err": spectra.error[i]}).write(tmp_path / f"spec-{i}.csv")
    output = tmp_path / "out.csv"
    main(PredictConfig(trained / "model", (trained.parent / "observed.h5", tmp_path / "spec-*.csv"), output, answer="mixture"))
    found = pd.read_csv(output)
    assert list(found["file"]) == ["observed.h5"] * 300 + ["spec-0.csv", "spec-1.csv"]
    assert list(found["star"]) == [*range(300), 0, 0]
    np.testing.assert_allclose(found["log_g"][300:], table["log_g"][:2], atol=2e-4)
    with pytest.raises(InputError, match="found no file of such a name"):
        main(PredictConfig(trained / "model", (tmp_path / "nothing-*.csv",), output))
    with pytest.raises(InputError, match="spectra: found no file, expected at least one"):
        PredictConfig(trained / "model", (), output)


def test_files_of_one_name(trained, spectra, tmp_path):
    """The table and the figures tell them apart; a file that is given twice is refused."""
    wave = TelescopeFile(trained.parent / "observed.h5").wave
    paths = [tmp_path / folder / "in.csv" for folder in "ab"]
    for i, path in enumerate(paths):
        path.parent.mkdir()
        Table({"wave": wave, "flux": spectra.flux[i], "err": spectra.error[i]}).write(path)
    main(PredictConfig(trained / "model", tuple(paths), tmp_path / "out.csv", answer="mixture", plots="1"))
    assert list(pd.read_csv(tmp_path / "out.csv")["file"]) == [str(path) for path in paths]
    assert len(list((tmp_path / "out_plots").iterdir())) == 2
    with pytest.raises(InputError, match=r"a/in.csv: found it twice among the files"):
        main(PredictConfig(trained / "model", (paths[0], tmp_path / "a" / "*.csv"), tmp_path / "again.csv"))


def test_figures_of_the_stars_that_are_asked_for(trained, tmp_path):
    for name, plots, expected in (("a.csv", "2", [0, 1]), ("b.csv", "7,3", [3, 7]), ("c.csv", "5,", [5])):
        predict(trained, trained.parent / "observed.h5", tmp_path / name, plots=plots, chunk_stars=150)
        folder = tmp_path / f"{name[0]}_plots"
        assert sorted(path.name for path in folder.iterdir()) == [f"observed_{star}.png" for star in expected]
    assert not pyplot.get_fignums()
    with pytest.raises(InputError, match="plots: found 'two', expected a number of stars, or their numbers"):
        PredictConfig(trained / "model", (tmp_path / "in.h5",), tmp_path / "out.csv", plots="two")


def test_a_star_that_is_not_there_has_no_figure(trained, tmp_path, capsys):
    predict(trained, trained.parent / "observed.h5", tmp_path / "out.csv", plots="900,")
    assert "--plots 900,: no file has such a star" in capsys.readouterr().out


def test_files_are_opened_before_the_work(trained, tmp_path, capsys):
    files = (trained.parent / "observed.h5", tmp_path / "none.h5")
    with pytest.raises(InputError, match=r"none\.h5: found no such file"):
        main(PredictConfig(trained / "model", files, tmp_path / "out.csv", answer="mixture"))
    assert "observed.h5" not in capsys.readouterr().out


def test_a_table_below_a_file(trained, tmp_path):
    (tmp_path / "plain").write_text("")
    with pytest.raises(InputError, match=r"plain/deep/out\.csv: found that .*plain is a file, expected a folder"):
        predict(trained, trained.parent / "observed.h5", tmp_path / "plain" / "deep" / "out.csv")
