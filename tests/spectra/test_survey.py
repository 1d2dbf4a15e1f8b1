import h5py
import jax
import numpy as np
import pandas as pd
import pytest

from moe_jax import InputError, add_noise, load_survey, save_survey
from moe_jax.spectra.simulate import SimulatedSpectra
from moe_jax.spectra.survey import add_star_noise, star_keys
from moe_jax.spectra.survey_file import ERROR_FIELD, FLUX_FIELD, WAVE_FIELD, SurveyFile, save_spectra


@pytest.fixture
def path(tmp_path, small_survey):
    path = tmp_path / "survey.h5"
    save_survey(path, small_survey)
    return path


def test_round_trip(path, small_survey):
    loaded = load_survey(path)
    np.testing.assert_allclose(loaded.wave, small_survey.wave, rtol=1e-7)
    np.testing.assert_array_equal(loaded.flux, small_survey.flux)
    np.testing.assert_array_equal(loaded.error, small_survey.error)
    for name in loaded.labels._fields:
        np.testing.assert_array_equal(getattr(loaded.labels, name), getattr(small_survey.labels, name))
    assert loaded.flux.dtype == loaded.labels.log_g.dtype == np.float32
    assert not list(path.parent.glob(".*"))


def test_the_layout_is_the_original_one(path):
    with h5py.File(path) as file:
        assert file["spectrumdataset/wave"].shape == (4096,)
        assert file["dataset/arrays/flux/value"].shape == file["dataset/arrays/error/value"].shape == (400, 4096)
    table = pd.read_hdf(path)
    assert list(table.columns) == ["T_eff", "log_g", "M_H", "a_M", "C_M", "mag", "redshift", "snr"]
    assert len(table) == 400


def test_a_file_written_by_others(tmp_path, rng):
    """float64 arrays, integer labels, columns in another order and more of them, another key."""
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file[WAVE_FIELD] = np.linspace(7100, 8850, 50)
        file[FLUX_FIELD] = rng.uniform(0.4, 0.6, (7, 50))
        file[ERROR_FIELD] = rng.uniform(0.1, 0.2, (7, 50))
    columns = ["snr", "redshift", "mag", "C_M", "a_M", "M_H", "log_g", "T_eff", "id"]
    pd.DataFrame({name: np.arange(7) for name in columns}).to_hdf(path, key="dataset/params", mode="a", format="table")
    survey = load_survey(path, 5)
    assert survey.flux.shape == (5, 50)
    assert survey.labels.T_eff.tolist() == [0, 1, 2, 3, 4]


def test_only_the_rows_that_are_asked_for_are_read(path):
    edit(path, lambda file: file[FLUX_FIELD].__setitem__((399, 3), np.nan))
    assert load_survey(path, 20).flux.shape == (20, 4096)
    assert load_survey(path, 20).labels.mag.shape == (20,)
    with pytest.raises(InputError, match="star 399, pixel 3"):
        load_survey(path)


def test_parts_of_a_file_and_of_a_simulation_are_those_of_the_whole(path, small_survey):
    file = SurveyFile(path)
    simulated = SimulatedSpectra(jax.random.key(3), 400)  # the key of small_survey
    for source in (file, simulated):
        assert source.n_stars == 400
        np.testing.assert_array_equal(source.labels.T_eff, small_survey.labels.T_eff)
        parts = [source.read(start, min(start + 150, 400)) for start in range(0, 400, 150)]
        for i, whole in enumerate((small_survey.flux, small_survey.error)):
            np.testing.assert_allclose(np.concatenate([part[i] for part in parts]), whole, rtol=2e-6)


def test_noise_of_some_stars_is_that_of_the_whole_survey(small_survey):
    key = jax.random.key(5)
    whole = add_noise(key, small_survey.flux, small_survey.error, 0.2)
    part = add_star_noise(star_keys(key, 400)[100:137], small_survey.flux[100:137], small_survey.error[100:137], 0.2)
    np.testing.assert_allclose(part, whole[100:137], rtol=1e-6)


def test_a_survey_written_in_parts_is_the_survey(tmp_path, path):
    written = []
    save_spectra(tmp_path / "parts.h5", SimulatedSpectra(jax.random.key(3), 400), 170, written.append)
    assert written == [170, 170, 60]
    parts, whole = load_survey(tmp_path / "parts.h5"), load_survey(path)
    np.testing.assert_allclose(parts.flux, whole.flux, rtol=2e-6)
    np.testing.assert_allclose(parts.labels.snr, whole.labels.snr, rtol=1e-5)


def test_a_part_names_the_star_of_the_whole_file(path):
    edit(path, lambda file: file[FLUX_FIELD].__setitem__((310, 3), np.nan))
    with pytest.raises(InputError, match="star 310, pixel 3"):
        SurveyFile(path).read(300, 400)


def test_errors_at_the_ends_are_copied_and_negative_flux_is_clipped(path):
    def change(file):
        file[ERROR_FIELD][:, 0] = np.nan
        file[ERROR_FIELD][5, -1] = np.nan
        file[FLUX_FIELD][2, 7] = -0.3

    edit(path, change)
    survey = load_survey(path)
    np.testing.assert_array_equal(survey.error[:, 0], survey.error[:, 1])
    assert survey.error[5, -1] == survey.error[5, -2]
    assert survey.flux[2, 7] == 0


def edit(path, change):
    with h5py.File(path, "r+") as file:
        change(file)


def replace(field, values):
    def change(path):
        def swap(file):
            del file[field]
            if values is not None:
                file[field] = values

        edit(path, swap)

    return change


def put(field, where, value):
    return lambda path: edit(path, lambda file: file[field].__setitem__(where, value))


def relabel(change):
    def apply(path):
        table = change(pd.read_hdf(path))
        edit(path, lambda file: file.__delitem__("labels"))
        table.to_hdf(path, key="labels", mode="a")

    return apply


def stop_wave(path):
    edit(path, lambda file: file[WAVE_FIELD].__setitem__(10, file[WAVE_FIELD][9]))


def write_text(path):
    path.write_text("not HDF5")


def cut_off(path):
    path.write_bytes(path.read_bytes()[:5_000])


BAD = {
    "missing": (lambda path: path.unlink(), "no such file"),
    "not HDF5": (write_text, "found a file that is not HDF5"),
    "truncated": (cut_off, "cannot be read"),
    "no wave": (replace(WAVE_FIELD, None), "spectrumdataset/wave: found nothing"),
    "no flux": (replace(FLUX_FIELD, None), "flux/value: found nothing"),
    "no error": (replace(ERROR_FIELD, None), "error/value: found nothing"),
    "text flux": (replace(FLUX_FIELD, "abc"), "flux/value: found object"),
    "flat flux": (replace(FLUX_FIELD, np.ones(4096)), r"found float64 of shape \(4096,\)"),
    "flux of other pixels": (replace(FLUX_FIELD, np.ones((400, 4000))), r"shape \(400, 4000\), expected \(N, 4096\)"),
    "error of other stars": (replace(ERROR_FIELD, np.ones((399, 4096))), r"shape \(399, 4096\), expected \(400, 4096\)"),
    "NaN flux": (put(FLUX_FIELD, (3, 9), np.nan), "flux/value: found nan at star 3, pixel 9"),
    "infinite flux": (put(FLUX_FIELD, (3, 9), np.inf), "flux/value: found inf at star 3, pixel 9"),
    "NaN error": (put(ERROR_FIELD, (3, 9), np.nan), "error/value: found nan at star 3, pixel 9"),
    "zero error": (put(ERROR_FIELD, (3, 9), 0.0), "holds 0 at star 3, pixel 9, expected positive"),
    "negative error": (put(ERROR_FIELD, (slice(3, 5), 9), -1.0), r"holds -1 at star 3, pixel 9 \(2 in all\)"),
    "wave falls": (put(WAVE_FIELD, 10, 7000.0), "expected increasing wavelengths"),
    "wave stands still": (stop_wave, "at pixel 10, expected increasing"),
    "NaN wave": (put(WAVE_FIELD, 10, np.nan), "wave: found nan"),
    "no log_g": (relabel(lambda table: table.drop(columns="log_g")), "label column log_g: found only T_eff, M_H"),
    "text labels": (relabel(lambda table: table.assign(M_H="x")), "label column M_H: found"),
    "NaN label": (relabel(lambda table: table.assign(T_eff=np.nan)), "label column T_eff: found nan"),
    "fewer labels": (relabel(lambda table: table.iloc[:10]), "found 10 rows, expected 400"),
    "no labels": (lambda path: edit(path, lambda file: file.__delitem__("labels")), "no readable pandas table"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_are_named_in_one_sentence(path, case):
    change, message = BAD[case]
    change(path)
    with pytest.raises(InputError, match=message) as caught:
        load_survey(path)
    assert str(caught.value).startswith(str(path))
    assert "\n" not in str(caught.value)
    assert "expected" in str(caught.value)


def test_a_folder_and_no_stars(tmp_path, path):
    with pytest.raises(InputError, match="found a folder"):
        load_survey(tmp_path)
    with pytest.raises(InputError, match="0 stars were asked for"):
        load_survey(path, 0)


def test_noise(small_survey, dtype):
    """Mean and standard deviation of 1.6 million draws: six Monte-Carlo standard deviations."""
    flux, error = np.asarray(small_survey.flux, dtype), np.asarray(small_survey.error, dtype)
    noisy = add_noise(jax.random.key(0), flux, error, 0.2)
    assert noisy.dtype == dtype
    normal = (np.asarray(noisy, float) - flux) / (0.2 * error)
    assert abs(normal.mean()) < 6 / normal.size**0.5
    assert abs(normal.std() - 1) < 6 / (2 * normal.size) ** 0.5
    np.testing.assert_array_equal(noisy, add_noise(jax.random.key(0), flux, error, 0.2))
    assert not np.array_equal(noisy, add_noise(jax.random.key(1), flux, error, 0.2))
    np.testing.assert_array_equal(add_noise(jax.random.key(0), flux, error, 0.0), flux)


def test_noise_needs_equal_shapes(small_survey):
    with pytest.raises(InputError, match="error has shape"):
        add_noise(jax.random.key(0), small_survey.flux, small_survey.error[:, :5], 0.2)


def test_labels_as_they_come(path, small_survey):
    """Other names, and only the labels that training needs."""
    labels = pd.read_hdf(path)
    with h5py.File(path, "a") as file:
        del file["labels"]
    labels[["T_eff", "log_g", "M_H"]].rename(columns={"T_eff": "teff", "log_g": "logg"}).to_hdf(path, key="stars", mode="a")
    found = load_survey(path, 100, {"T_eff": "teff", "log_g": "logg"}).labels
    for name in ("T_eff", "log_g", "M_H"):
        np.testing.assert_array_equal(getattr(found, name), getattr(small_survey.labels, name)[:100])
    for name in ("a_M", "C_M", "mag", "redshift", "snr"):
        assert np.isnan(getattr(found, name)).all()
    with pytest.raises(
        InputError, match="label column T_eff: found only teff, logg, M_H, expected T_eff, log_g, M_H, or --columns"
    ):
        load_survey(path)
    with pytest.raises(InputError, match="label column alpha: found only teff, logg, M_H, expected teff, logg, M_H, alpha, or"):
        load_survey(path, columns={"T_eff": "teff", "log_g": "logg", "a_M": "alpha"})
    with pytest.raises(InputError, match="columns were given for Teff, expected T_eff"):
        load_survey(path, columns={"Teff": "teff"})
