"""A corpus of malformed input, made here: every one ends in one sentence that names what is wrong, and in nothing written."""

import json
import shutil
import struct

import h5py
import jax
import numpy as np
import pandas as pd
import pytest
from astropy.io import fits
from small_run import with_options

import moe_jax
from experiments import regress_gate
from experiments.pipeline.calibration import CalibrationConfig
from experiments.pipeline.config import DataConfig
from experiments.predict import PredictConfig
from experiments.predict import main as predict
from moe_jax import InputError, load_grid, load_model, load_survey, save_survey
from moe_jax.apply.catalogue import open_catalogue
from moe_jax.apply.model_file import ARRAYS, MEANING
from moe_jax.spectra.survey_file import ERROR_FIELD, FLUX_FIELD, WAVE_FIELD
from moe_jax.spectra.telescope_file import IVAR_FIELD, TelescopeFile

CORPUS = []


def malformed(expected):
    """Adds a function of (folder, valid) to the corpus; what it does must raise an ``InputError`` that says ``expected``."""

    def add(function):
        CORPUS.append(pytest.param(function, expected, id=function.__name__))
        return function

    return add


@pytest.fixture(scope="session")
def valid(trained, tmp_path_factory, small_survey):
    """Whole files, copied and spoilt by the cases."""
    folder = tmp_path_factory.mktemp("valid")
    few = small_survey._replace(
        flux=small_survey.flux[:20], error=small_survey.error[:20], labels=jax.tree.map(lambda a: a[:20], small_survey.labels)
    )
    save_survey(folder / "survey.h5", few)
    shutil.copy(trained.parent / "observed.h5", folder / "observed.h5")
    shutil.copytree(trained / "model", folder / "model")
    return folder


def observed(folder, valid, **changes):
    """A copy of the observed spectra in which some datasets are replaced (or, by None, dropped)."""
    names = {"wave": WAVE_FIELD, "flux": FLUX_FIELD, "error": ERROR_FIELD, "ivar": IVAR_FIELD}
    path = folder / "in.h5"
    shutil.copy(valid / "observed.h5", path)
    with h5py.File(path, "a") as file:
        for kind, change in changes.items():
            old = file[names[kind]][()] if names[kind] in file else None
            if old is not None:
                del file[names[kind]]
            if change is not None:
                file[names[kind]] = change(old) if callable(change) else change
    return TelescopeFile(path)


def survey(folder, valid, field, change):
    path = folder / "in.h5"
    shutil.copy(valid / "survey.h5", path)
    with h5py.File(path, "a") as file:
        old = file[field][()]
        del file[field]
        file[field] = change(old)
    return load_survey(path)


def model(folder, valid, **changes):
    """A copy of the model whose arrays are changed, and whose hash is that of the changed arrays."""
    import hashlib

    from safetensors.numpy import load, save

    shutil.copytree(valid / "model", folder / "model")
    arrays = load((folder / "model" / ARRAYS).read_bytes())
    for name, change in changes.items():
        name = name.replace("__", "/")
        arrays[name] = change(arrays[name])
    data = save({name: np.asarray(array, order="C") for name, array in arrays.items() if array is not None})
    (folder / "model" / ARRAYS).write_bytes(data)
    meaning = json.loads((folder / "model" / MEANING).read_text()) | {"arrays_sha256": hashlib.sha256(data).hexdigest()}
    (folder / "model" / MEANING).write_text(json.dumps(meaning))
    return load_model(folder / "model")


def write_fits(folder, **images):
    path = folder / "in.fits"
    fits.HDUList([fits.PrimaryHDU(), *(fits.ImageHDU(data, name=name) for name, data in images.items())]).writeto(path)
    return TelescopeFile(path)


# Observed spectra, HDF5


@malformed("nowhere.h5: found no such file, expected an HDF5 or FITS file")
def no_file(folder, valid):
    TelescopeFile(folder / "nowhere.h5")


@malformed("found a folder, expected an HDF5 or FITS file")
def a_folder(folder, valid):
    TelescopeFile(folder)


@malformed("in.h5: found a file that is not HDF5")
def an_empty_file(folder, valid):
    (folder / "in.h5").touch()
    TelescopeFile(folder / "in.h5")


@malformed("in.h5: found a file that is not HDF5")
def text_in_place_of_hdf5(folder, valid):
    (folder / "in.h5").write_text("wave,flux\n1,2\n")
    TelescopeFile(folder / "in.h5")


@malformed("in.h5: found a file that cannot be read")
def hdf5_cut_in_half(folder, valid):
    data = (valid / "observed.h5").read_bytes()
    (folder / "in.h5").write_bytes(data[: len(data) // 2])
    file = TelescopeFile(folder / "in.h5")
    file.read(0, 300)


@malformed(f"{WAVE_FIELD}: found nothing, expected an array of numbers")
def no_wave(folder, valid):
    observed(folder, valid, wave=None)


@malformed(f"{FLUX_FIELD}: found nothing")
def no_flux(folder, valid):
    observed(folder, valid, flux=None)


@malformed(f"{WAVE_FIELD}: found nothing")
def a_group_in_place_of_wave(folder, valid):
    path = folder / "in.h5"
    with h5py.File(path, "w") as file:
        file.create_group(WAVE_FIELD)
        file[FLUX_FIELD] = np.ones((2, 3))
    TelescopeFile(path)


@malformed(f"{FLUX_FIELD}: found float32 of shape .4096,., expected numbers in 2 dimensions")
def one_spectrum_without_its_dimension(folder, valid):
    observed(folder, valid, flux=lambda flux: flux[0])


@malformed(f"{FLUX_FIELD} has shape .300, 4095., expected .N, 4096.")
def a_pixel_too_few(folder, valid):
    observed(folder, valid, flux=lambda flux: flux[:, 1:])


@malformed(f"{FLUX_FIELD} has shape .0, 4096.")
def no_stars(folder, valid):
    observed(folder, valid, flux=lambda flux: flux[:0], error=None)


@malformed(f"{ERROR_FIELD} has shape .299, 4096., expected .300, 4096.")
def an_error_too_few(folder, valid):
    observed(folder, valid, error=lambda error: error[1:])


@malformed(f"{IVAR_FIELD} has shape .4096, 300.")
def transposed_ivar(folder, valid):
    observed(folder, valid, error=None, ivar=np.ones((4096, 300)))


@malformed(f"{FLUX_FIELD}: found .* expected numbers in 2 dimensions")
def text_flux(folder, valid):
    observed(folder, valid, flux=lambda flux: np.full((3, 4096), b"1.0"))


@malformed(f"{FLUX_FIELD}: found complex64 of shape")
def complex_flux(folder, valid):
    observed(folder, valid, flux=lambda flux: flux.astype("complex64"))


@malformed(rf"{WAVE_FIELD}: found nan at row 2107 \(1989 in all\), expected finite numbers")
def nan_wave(folder, valid):
    observed(folder, valid, wave=lambda wave: np.where(wave > 8000, np.nan, wave))


@malformed("followed by .* at pixel 8, expected increasing wavelengths")
def two_wavelengths_in_turns(folder, valid):
    def swap(wave):
        wave[[7, 8]] = wave[[8, 7]]
        return wave

    observed(folder, valid, wave=swap)


@malformed("followed by .* at pixel 7")
def a_wavelength_twice(folder, valid):
    def repeat(wave):
        wave[7] = wave[6]
        return wave

    observed(folder, valid, wave=repeat)


# Observed spectra, FITS


@malformed("in.fits: found a file that is not HDF5, expected an HDF5 or FITS file with spectra")
def text_in_place_of_fits(folder, valid):
    (folder / "in.fits").write_text("no FITS at all\n" * 300)
    TelescopeFile(folder / "in.fits")


@malformed("in.fits: WAVELENGTH or WAVE: found nothing")
def fits_without_wave(folder, valid):
    write_fits(folder, FLUX=np.ones((2, 5), "f4"))


@malformed("in.fits: FLUX: found nothing")
def fits_without_flux(folder, valid):
    write_fits(folder, WAVE=np.arange(5.0), IVAR=np.ones((2, 5), "f4"))


@malformed("in.fits: FLUX has shape .2, 4.")
def fits_of_other_widths(folder, valid):
    write_fits(folder, WAVELENGTH=np.arange(5.0), FLUX=np.ones((2, 4), "f4"))


@malformed("in.fits: found a file that cannot be read")
def fits_cut_in_half(folder, valid):
    write_fits(folder, WAVELENGTH=np.arange(4000.0), FLUX=np.ones((20, 4000), "f4"))
    data = (folder / "in.fits").read_bytes()
    (folder / "in.fits").write_bytes(data[: len(data) // 2 + 1])
    TelescopeFile(folder / "in.fits").read(0, 20)


# predict


@malformed("found 4000 to 5000 Angstrom, which cover 0% of the model's pixels")
def another_wavelength_range(folder, valid):
    observed(folder, valid, wave=np.linspace(4000, 5000, 4096))
    predict(PredictConfig(valid / "model", (folder / "in.h5",), folder / "out.csv"))


@malformed("which cover .* of the model's pixels, expected most of 7100.21 to 8849.79")
def a_hundredth_of_an_angstrom(folder, valid):
    observed(folder, valid, wave=lambda wave: wave * 100)
    predict(PredictConfig(valid / "model", (folder / "in.h5",), folder / "out.csv"))


@malformed("expected .* the lines from 8180 to 8675; a model of your own pixels needs these lines only")
def a_range_without_the_triplet(folder, valid):
    observed(folder, valid, wave=np.linspace(6500, 8300, 4096))
    predict(PredictConfig(valid / "model", (folder / "in.h5",), folder / "out.csv"))


@malformed("out.xlsx: found the suffix '.xlsx'")
def an_unknown_suffix(folder, valid):
    predict(PredictConfig(valid / "model", (valid / "observed.h5",), folder / "out.xlsx"))


@malformed("out: found the suffix ''")
def no_suffix(folder, valid):
    with open_catalogue(folder / "out"):
        pass


@malformed("d.csv: found a folder, expected the name of a file")
def a_folder_in_the_tables_place(folder, valid):
    (folder / "d.csv").mkdir()
    predict(PredictConfig(valid / "model", (valid / "observed.h5",), folder / "d.csv"))


@malformed("xxx.csv: found that it cannot be written .File name too long., expected a place for it")
def a_name_that_the_system_does_not_take(folder, valid):
    with open_catalogue(folder / f"{'x' * 300}.csv"):
        pass


@malformed("loop.h5: found no such file")
def a_link_to_itself(folder, valid):
    (folder / "loop.h5").symlink_to(folder / "loop.h5")
    predict(PredictConfig(valid / "model", (folder / "loop.h5",), folder / "out.csv"))


@malformed("chunk_stars is 0, expected at least 1")
def chunks_of_nothing(folder, valid):
    PredictConfig(valid / "model", (valid / "observed.h5",), folder / "out.csv", chunk_stars=0)


@malformed("old/model.json: found no such file")
def no_model(folder, valid):
    predict(PredictConfig(folder / "old", (valid / "observed.h5",), folder / "out.csv"))


# Models


@malformed("experts/coef has shape .9, 4000., expected .9, 4096. beside the other arrays")
def experts_of_other_pixels(folder, valid):
    model(folder, valid, experts__coef=lambda a: a[:, :4000])


@malformed("gate/head/bias has shape .5,., expected .9,.")
def a_gate_for_fewer_experts(folder, valid):
    model(folder, valid, gate__head__bias=lambda a: a[:5])


@malformed("features/scale has shape .12,., expected .13,.")
def a_feature_less(folder, valid):
    model(folder, valid, features__scale=lambda a: a[1:])


@malformed("experts/coef holds numbers that are not finite, expected a trained model")
def nan_coefficients(folder, valid):
    model(folder, valid, experts__coef=lambda a: a * np.nan)


@malformed("found no array 'uncertainty/leverage/core'")
def part_of_the_uncertainties(folder, valid):
    model(folder, valid, uncertainty__leverage__core=lambda a: None)


@malformed("found no array 'experts/intercept'")
def no_intercepts(folder, valid):
    model(folder, valid, experts__intercept=lambda a: None)


@malformed("uncertainty/calibration/quantiles has shape .3, 9.")
def transposed_quantiles(folder, valid):
    model(folder, valid, uncertainty__calibration__quantiles=lambda a: a.T)


@malformed("found a file that is not safetensors")
def a_pickle_in_place_of_arrays(folder, valid):
    import hashlib
    import pickle

    shutil.copytree(valid / "model", folder / "model")
    data = pickle.dumps({"a": 1})
    (folder / "model" / ARRAYS).write_bytes(data)
    meaning = json.loads((folder / "model" / MEANING).read_text()) | {"arrays_sha256": hashlib.sha256(data).hexdigest()}
    (folder / "model" / MEANING).write_text(json.dumps(meaning))
    load_model(folder / "model")


@malformed("found a file that is not safetensors")
def a_header_longer_than_the_file(folder, valid):
    import hashlib

    shutil.copytree(valid / "model", folder / "model")
    data = struct.pack("<Q", 10**15) + b"{}"
    (folder / "model" / ARRAYS).write_bytes(data)
    meaning = json.loads((folder / "model" / MEANING).read_text()) | {"arrays_sha256": hashlib.sha256(data).hexdigest()}
    (folder / "model" / MEANING).write_text(json.dumps(meaning))
    load_model(folder / "model")


@malformed("wave holds numbers that are not finite|wave: found")
def a_model_without_wavelengths(folder, valid):
    model(folder, valid, wave=lambda a: a * np.nan)


# Surveys


@malformed(f"{FLUX_FIELD}: found nan at star 3, pixel 5")
def nan_in_a_training_spectrum(folder, valid):
    def spoil(flux):
        flux[3, 5] = np.nan
        return flux

    survey(folder, valid, FLUX_FIELD, spoil)


@malformed(f"{ERROR_FIELD} holds 0 at star 2, pixel 9, expected positive errors")
def no_error_in_a_training_spectrum(folder, valid):
    def spoil(error):
        error[2, 9] = 0
        return error

    survey(folder, valid, ERROR_FIELD, spoil)


@malformed("the labels: found no readable pandas table")
def a_survey_without_labels(folder, valid):
    with h5py.File(valid / "survey.h5") as old, h5py.File(folder / "in.h5", "w") as new:
        for field in (WAVE_FIELD, FLUX_FIELD, ERROR_FIELD):
            new[field] = old[field][()]
    load_survey(folder / "in.h5")


@malformed("label column log_g: found only T_eff, expected")
def labels_without_log_g(folder, valid):
    with h5py.File(valid / "survey.h5") as old, h5py.File(folder / "in.h5", "w") as new:
        for field in (WAVE_FIELD, FLUX_FIELD, ERROR_FIELD):
            new[field] = old[field][()]
    pd.DataFrame({"T_eff": np.ones(20)}).to_hdf(folder / "in.h5", key="labels", mode="a")
    load_survey(folder / "in.h5")


@malformed("grid.npz: found no model grid")
def a_grid_that_is_none(folder, valid):
    np.savez(folder / "grid.npz", T_eff=np.ones(3))
    load_grid(folder / "grid.npz")


@malformed("--train-file was given without --test-file")
def half_of_the_files(folder, valid):
    config = regress_gate.PRESETS["smoke"]
    regress_gate.main(with_options(config, train_file=valid / "survey.h5", output_dir=folder / "out", use_cache=False))


# Configurations and arrays


@malformed("n_train is 0, expected at least 1")
def no_training_stars(folder, valid):
    DataConfig(n_train=0)


@malformed("calibration.n_stars is -1, expected at least 0")
def fewer_than_no_stars(folder, valid):
    CalibrationConfig(n_stars=-1)


@malformed("noise_level is nan, expected a finite number")
def nan_noise(folder, valid):
    DataConfig(noise_level=float("nan"))


@malformed("learning_rate is 0, expected a positive number")
def no_learning_rate(folder, valid):
    moe_jax.GateConfig(learning_rate=0)


@malformed(r"y has shape \(7, 1\), expected \(7,\) beside x \(7, 2\)")
def a_column_in_place_of_a_vector(folder, valid):
    moe_jax.fit_ridge(np.ones((7, 2)), np.ones((7, 1)), 1.0)


@malformed("alpha is -1, expected positive numbers")
def a_negative_penalty(folder, valid):
    moe_jax.fit_ridge(np.ones((7, 2)), np.ones(7), -1)


@malformed("folds holds 1 different values, expected at least 2|expected at least 2 folds|at least 2")
def one_fold(folder, valid):
    moe_jax.cross_validate_ridge(np.ones((7, 2)), np.ones(7), np.ones(1), np.zeros(7, int))


@malformed(r"expert_predictions has shape \(3, 4\), expected \(3, 2\) beside weights \(3, 2\)")
def weights_for_other_experts(folder, valid):
    moe_jax.route_soft(np.ones((3, 2)), np.ones((3, 4)))


@malformed("n_stars is 0, expected a whole number, at least 1")
def a_survey_of_no_stars(folder, valid):
    moe_jax.simulate_survey(jax.random.key(0), 0)


@malformed(r"flux has shape \(4096,\), expected \(N, P\)")
def one_spectrum_for_a_model(folder, valid):
    moe_jax.predict_model(load_model(valid / "model"), np.ones(4096, "f4"))


@malformed(r"error has shape \(2, 1\), expected \(2, 4096\) beside flux \(2, 4096\)")
def errors_of_another_shape(folder, valid):
    moe_jax.predict_model(load_model(valid / "model"), np.ones((2, 4096), "f4"), np.ones((2, 1), "f4"))


@pytest.mark.slow
@pytest.mark.parametrize(("case", "expected"), CORPUS)
def test_one_sentence(case, expected, valid, tmp_path):
    before = sorted(path.name for path in valid.iterdir())
    with pytest.raises(InputError, match=expected) as raised:
        case(tmp_path, valid)
    assert "\n" not in str(raised.value)
    assert len(str(raised.value)) < 600
    assert sorted(path.name for path in valid.iterdir()) == before
    assert not [path for path in tmp_path.rglob("*") if path.name.endswith(".partial") or path.name.startswith("out")]


def test_the_corpus_is_large():
    assert len(CORPUS) >= 40
