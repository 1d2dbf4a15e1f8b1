"""Spectra in the formats of the field: the same numbers, however they come."""

import tracemalloc
from pathlib import Path

import h5py
import numpy as np
import pandas as pd
import pytest
from astropy import units as u
from astropy.io import fits
from astropy.table import Table

from moe_jax import InputError
from moe_jax.spectra.resample import air_to_vacuum
from moe_jax.spectra.spectrum_files import open_spectra
from moe_jax.spectra.survey_file import FLUX_FIELD, WAVE_FIELD
from moe_jax.spectra.telescope_file import TelescopeFile

WAVE = np.linspace(7000.0, 8999.0, 2_000)
FLUX = 1 + 0.1 * np.sin(WAVE / 30)[None] * np.array([[1.0], [2.0]])
ERROR = np.full_like(FLUX, 0.02)


def image(data, **header):
    hdu = fits.PrimaryHDU(data)
    hdu.header.update(header)
    return hdu


def by_pixel(path):
    Table({"wave": WAVE, "flux": FLUX[0], "err": ERROR[0]}).write(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 1


def by_star(path):
    Table({"WAVELENGTH": np.tile(WAVE, (2, 1)), "FLUX": FLUX, "IVAR": ERROR**-2.0}).write(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 2


def sdss(path):
    coadd = fits.BinTableHDU(Table({"flux": FLUX[0], "loglam": np.log10(WAVE), "ivar": ERROR[0] ** -2}), name="COADD")
    lines = fits.BinTableHDU(Table({"LINEWAVE": [6564.6], "flux": [1.0]}), name="SPZLINE")
    fits.HDUList([fits.PrimaryHDU(), coadd, lines]).writeto(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 1


def tabular_fits(path):
    """As specutils writes it: Spectrum(...).write(path, format="tabular-fits")."""
    columns = {"wavelength": WAVE / 10 * u.nm, "flux": FLUX[0] * u.Jy, "uncertainty": ERROR[0] * u.Jy}
    Table(columns).write(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 1


def image_of_one_star(path):
    hdus = [image(FLUX[0], CRVAL1=WAVE[100], CDELT1=1.0, CRPIX1=101.0), fits.ImageHDU(ERROR[0], name="SIGMA")]
    fits.HDUList(hdus).writeto(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 1


def image_in_micrometres(path):
    image(FLUX, CRVAL1=0.7, CD1_1=1e-4, CUNIT1="um").writeto(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 2


def bands_of_iraf(path):
    bands = np.stack([FLUX, 0 * FLUX, 0 * FLUX, ERROR])
    image(bands, CRVAL1=7000.0, CD1_1=1.0, CTYPE1="LINEAR").writeto(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 2


def images_in_nanometres(path):
    wave = fits.ImageHDU(WAVE / 10, name="WAVE")
    wave.header["BUNIT"] = "nm"
    fits.HDUList([fits.PrimaryHDU(), wave, fits.ImageHDU(FLUX, name="FLUX")]).writeto(path.with_suffix(".fits"))
    return path.with_suffix(".fits"), 2


def csv(path):
    rows = [f"{w},{f},{e}" for w, f, e in zip(WAVE, FLUX[0], ERROR[0], strict=True)]
    path.with_suffix(".csv").write_text("\n".join(["wavelength [Angstrom],flux,error", *rows]))
    return path.with_suffix(".csv"), 1


def bare_text(path):
    np.savetxt(path.with_suffix(".txt"), np.stack([WAVE[::-1] / 10, FLUX[0, ::-1], ERROR[0, ::-1]], axis=1), fmt="%.9g")
    return path.with_suffix(".txt"), 1


def text_with_a_comment(path):
    np.savetxt(path.with_suffix(".dat"), np.stack([ERROR[0], WAVE, FLUX[0]], axis=1), header="sigma  lambda  flux", fmt="%.9g")
    return path.with_suffix(".dat"), 1


def ecsv(path):
    Table({"wave": WAVE / 1e4 * u.um, "flux": FLUX[0], "error": ERROR[0]}).write(path.with_suffix(".ecsv"))
    return path.with_suffix(".ecsv"), 1


def hdf5_with_a_unit(path):
    with h5py.File(path.with_suffix(".h5"), "w") as file:
        file[WAVE_FIELD], file[FLUX_FIELD] = WAVE / 10, FLUX
        file[WAVE_FIELD].attrs["unit"] = "nm"
    return path.with_suffix(".h5"), 2


WRITERS = [by_pixel, by_star, sdss, tabular_fits, image_of_one_star, image_in_micrometres, bands_of_iraf, images_in_nanometres, csv]
WRITERS += [bare_text, text_with_a_comment, ecsv, hdf5_with_a_unit]


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_every_format_holds_the_same(write, tmp_path):
    path, n_stars = write(tmp_path / "in")
    (source,) = open_spectra(path)
    np.testing.assert_allclose(source.wave, WAVE, rtol=1e-7)
    assert source.n_stars == n_stars
    found = source.read(0, n_stars)
    np.testing.assert_allclose(found.flux, FLUX[:n_stars], rtol=1e-6)
    assert found.good.all()
    if source.has_errors:
        np.testing.assert_allclose(found.error, ERROR[:n_stars], rtol=1e-5)
    assert source.has_errors == (write not in (image_in_micrometres, images_in_nanometres, hdf5_with_a_unit))


def test_wavelengths_star_by_star(tmp_path):
    """Neighbours with the same wavelengths stay together; rows of shorter spectra are filled up with NaN."""
    wave = np.stack([WAVE, WAVE, WAVE + 3.0, np.where(WAVE < 8000, WAVE, np.nan)])
    Table({"wave": wave, "flux": FLUX[[0, 1, 0, 1]]}).write(tmp_path / "in.fits")
    sources = open_spectra(tmp_path / "in.fits")
    assert [source.n_stars for source in sources] == [2, 1, 1]
    assert [len(source.wave) for source in sources] == [2000, 2000, 1000]
    np.testing.assert_allclose(sources[1].wave[0], 7003.0)
    np.testing.assert_allclose(sources[2].read(0, 1).flux[0], FLUX[1, :1000], rtol=1e-6)


def test_the_sentence_says_what_there_is(tmp_path):
    Table({"x": WAVE, "brightness": FLUX[0]}).write(tmp_path / "in.fits")
    with pytest.raises(InputError, match=r"found x \(2000,\), brightness \(2000,\), expected .*wave \(wavelength, wave, .*CRVAL1"):
        open_spectra(tmp_path / "in.fits")
    Table({"wave": WAVE * u.Hz, "flux": FLUX[0]}).write(tmp_path / "frequency.fits")
    with pytest.raises(InputError, match="found wavelengths in 'Hz', expected Angstrom"):
        open_spectra(tmp_path / "frequency.fits")
    (tmp_path / "in.csv").write_text("wave,flux\n1,2\n3\n")
    with pytest.raises(InputError, match=r"in\.csv: found 1 cells in the line \['3'\], expected 2 like the first"):
        open_spectra(tmp_path / "in.csv")


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("wave,flux\n7000,cloud\n7001,1\n", r"in\.csv: flux: found 'cloud' \(1 such cells\), expected numbers"),
        ("some words\nand more\n", "found a file that is not HDF5, FITS or columns of numbers"),
        ("0 7000 1 0.1\n1 7001 1 0.1\n2 7002 1 0.1\n", "found the numbers of the rows in the first column, expected wavelengths"),
        ("wave,flux\n7000,1\nnan,1\n7002,1\nnan,1\n7004,1\n", "wave: found star 0: 2 of 5 wavelengths that are not numbers"),
    ],
)
def test_odd_text(tmp_path, text, sentence):
    (tmp_path / "in.csv").write_text(text)
    with pytest.raises(InputError, match=sentence):
        open_spectra(tmp_path / "in.csv")


def test_a_number_that_is_missing_is_masked(tmp_path):
    (tmp_path / "in.csv").write_text("name,wave,flux\nsun,7000,--\nsun,7001,1\nsun,7002,2\n")
    (source,) = open_spectra(tmp_path / "in.csv")
    assert source.read(0, 1).good.tolist() == [[False, True, True]]


def test_fits_under_another_name(tmp_path):
    path, _ = by_pixel(tmp_path / "in")
    (source,) = open_spectra(path.rename(tmp_path / "in.csv"))
    np.testing.assert_allclose(source.wave, WAVE)


def test_text_that_is_named_fits(tmp_path):
    (tmp_path / "in.fits").write_text("wave,flux\n7000,1\n7001,2\n")
    (source,) = open_spectra(tmp_path / "in.fits")
    np.testing.assert_array_equal(source.wave, [7000, 7001])
    (tmp_path / "in.fits").write_text("no spectrum\n")
    with pytest.raises(InputError, match="found a file that is not HDF5, FITS or columns of numbers"):
        open_spectra(tmp_path / "in.fits")


def test_a_table_that_pandas_wrote_with_row_numbers(tmp_path):
    pd.DataFrame({"wave": [7000.0, 7001.0], "flux": [1.0, 2.0]}).to_csv(tmp_path / "in.csv")
    (source,) = open_spectra(tmp_path / "in.csv")
    np.testing.assert_array_equal(source.wave, [7000, 7001])


def test_hdf5_of_another_layout(tmp_path):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file["mine/wave"], file["mine/flux"] = np.arange(5.0), np.ones((2, 5))
    with pytest.raises(InputError, match=r"the file has mine/flux \(2, 5\), mine/wave \(5,\)"):
        open_spectra(tmp_path / "in.h5")


def test_hdf5_that_decreases_with_a_unit_in_bytes_and_a_variance(tmp_path):
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file[WAVE_FIELD], file[FLUX_FIELD] = WAVE[::-1] / 10, FLUX[:, ::-1]
        file["dataset/arrays/variance/value"] = np.linspace(1, 2, FLUX.size).reshape(FLUX.shape)
        file[WAVE_FIELD].attrs["unit"] = np.bytes_(b"nm")
    (source,) = open_spectra(tmp_path / "in.h5")
    np.testing.assert_allclose(source.wave, WAVE)
    found = source.read(1, 2)
    np.testing.assert_allclose(found.flux, FLUX[1:], rtol=1e-6)
    np.testing.assert_allclose(found.error[0] ** 2, np.linspace(1, 2, FLUX.size).reshape(FLUX.shape)[1, ::-1], rtol=1e-5)


@pytest.mark.parametrize(("name", "values"), [("VAR", ERROR**2), ("VARIANCE", ERROR**2), ("IVAR", ERROR**-2.0)])
def test_variances(tmp_path, name, values):
    """As an image beside the flux, and as a column."""
    hdus = [fits.PrimaryHDU(), fits.ImageHDU(WAVE, name="WAVE"), fits.ImageHDU(FLUX, name="FLUX"), fits.ImageHDU(values, name=name)]
    fits.HDUList(hdus).writeto(tmp_path / "image.fits")
    Table({"wave": WAVE, "flux": FLUX[0], name: values[0]}).write(tmp_path / "table.fits")
    for file in ("image.fits", "table.fits"):
        (source,) = open_spectra(tmp_path / file)
        np.testing.assert_allclose(source.read(0, 1).error, ERROR[:1], rtol=1e-5)


def write_images(path, primary=None, **images):
    fits.HDUList([primary or fits.PrimaryHDU(), *(fits.ImageHDU(data, name=name) for name, data in images.items())]).writeto(path)


def test_one_star_in_images(tmp_path):
    write_images(tmp_path / "in.fits", WAVE=WAVE, FLUX=FLUX[0], IVAR=ERROR[0] ** -2)
    (source,) = open_spectra(tmp_path / "in.fits")
    np.testing.assert_allclose(source.read(0, 1).error, ERROR[:1], rtol=1e-5)


def test_errors_under_another_name_beside_wavelengths(tmp_path):
    """They were left out, and the errors of the training stars stood in."""
    write_images(tmp_path / "in.fits", WAVE=WAVE, FLUX=FLUX, SIGMA=3 * ERROR)
    (source,) = open_spectra(tmp_path / "in.fits")
    np.testing.assert_allclose(source.read(0, 2).error, 3 * ERROR, rtol=1e-5)


def test_errors_of_another_shape_are_refused(tmp_path):
    """Left out, they would be replaced by those of the training stars."""
    header = image(FLUX, CRVAL1=7000.0, CDELT1=1.0)
    write_images(tmp_path / "header.fits", header, ERROR=ERROR[0])
    with pytest.raises(InputError, match=r"header.fits: error has shape \(2000,\), expected \(2, 2000\) like flux"):
        open_spectra(tmp_path / "header.fits")
    write_images(tmp_path / "wave.fits", WAVE=WAVE, FLUX=FLUX, ERROR=ERROR[0])
    with pytest.raises(InputError, match=r"wave.fits: ERROR: found float64 of shape \(2000,\), expected numbers in 2 dimensions"):
        open_spectra(tmp_path / "wave.fits")
    write_images(tmp_path / "sigma.fits", WAVE=WAVE, FLUX=FLUX, SIGMA=ERROR[:, :-1])
    with pytest.raises(InputError, match=r"sigma.fits: sigma has shape \(2, 1999\), expected \(2, 2000\) like flux"):
        open_spectra(tmp_path / "sigma.fits")


def test_errors_of_the_right_shape_beside_others(tmp_path):
    """One row of errors for one star, and an image of the detector under another name."""
    write_images(tmp_path / "in.fits", image(FLUX[0], CRVAL1=7000.0, CDELT1=1.0), STD=np.ones((7, 9)), IVAR=ERROR[:1] ** -2)
    np.testing.assert_allclose(open_spectra(tmp_path / "in.fits")[0].read(0, 1).error, ERROR[:1], rtol=1e-5)


@pytest.mark.parametrize("suffix", [".fits", ".fits.gz"])
def test_images_are_read_in_parts(suffix, tmp_path):
    """16 MB of images; neither their opening nor the reading of ten stars takes more than a tenth of that."""
    flux = np.ones((1_000, len(WAVE)), "f4")
    write_images(tmp_path / f"in{suffix}", WAVE=WAVE, FLUX=flux, ERROR=0.1 * flux)
    open_spectra(tmp_path / f"in{suffix}")  # astropy keeps what it imports
    tracemalloc.start()
    try:
        (source,) = open_spectra(tmp_path / f"in{suffix}")
        assert source.read(500, 510).good.all()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < flux.nbytes / 5


@pytest.mark.parametrize("name", ["in.h5", "in.fits", "in.dat"])
def test_a_file_that_the_system_does_not_let_us_read(name, tmp_path, monkeypatch):
    (tmp_path / name).write_bytes(b"SIMPLE")

    def refuse(*arguments, **options):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "open", refuse)
    for read in (TelescopeFile, open_spectra):
        with pytest.raises(InputError, match=rf"{name}: found that it cannot be read \(Permission denied\)"):
            read(tmp_path / name)


def test_air_to_vacuum():
    """The calcium triplet, as NIST lists it in air and in vacuum."""
    np.testing.assert_allclose(air_to_vacuum(np.array([8498.02, 8542.09, 8662.14])), [8500.36, 8544.44, 8664.52], atol=0.006)


def text_with_empty_cells(path):
    rows = [f"{w},{'' if i < 9 else f},{e}" for i, (w, f, e) in enumerate(zip(WAVE, FLUX[0], ERROR[0], strict=True))]
    path.with_suffix(".csv").write_text("\n".join(["wave,flux,err", *rows]))
    return path.with_suffix(".csv")


def ecsv_with_masked_cells(path):
    Table({"wave": WAVE, "flux": np.ma.array(FLUX[0], mask=np.arange(len(WAVE)) < 9), "err": ERROR[0]}).write(
        path.with_suffix(".ecsv")
    )
    return path.with_suffix(".ecsv")


def fits_with_masked_counts(path):
    """Whole numbers have no NaN: the header names the number (TNULL) that stands for none."""
    counts = np.ma.array(np.round(1000 * FLUX[0]).astype("i4"), mask=np.arange(len(WAVE)) < 9)
    Table({"wave": WAVE, "flux": counts, "err": 1000 * ERROR[0]}).write(path.with_suffix(".fits"))
    return path.with_suffix(".fits")


@pytest.mark.parametrize("write", [text_with_empty_cells, ecsv_with_masked_cells, fits_with_masked_counts])
def test_numbers_that_are_not_there_are_masked_pixels(write, tmp_path):
    (source,) = open_spectra(write(tmp_path / "in"))
    good = source.read(0, 1).good[0]
    assert (good == (np.arange(len(WAVE)) >= 9)).all()


@pytest.mark.parametrize(("unit", "factor"), [("\u00c5", 1.0), ("\u212b", 1.0), ("\u00b5m", 1e-4), ("\u03bcm", 1e-4)])
def test_units_by_their_signs(unit, factor, tmp_path):
    """The letter and the sign of the Angstrom, the micro sign and the Greek letter."""
    with h5py.File(tmp_path / "in.h5", "w") as file:
        file[WAVE_FIELD], file[FLUX_FIELD] = WAVE * factor, FLUX
        file[WAVE_FIELD].attrs["unit"] = unit
    np.testing.assert_allclose(open_spectra(tmp_path / "in.h5")[0].wave, WAVE)


def test_a_star_without_wavelengths(tmp_path):
    Table({"wave": np.stack([WAVE, np.nan * WAVE]), "flux": FLUX}).write(tmp_path / "in.fits")
    with pytest.raises(InputError, match=r"in.fits: wave: found 0 numbers for star 1, expected at least 2 wavelengths"):
        open_spectra(tmp_path / "in.fits")


def test_a_column_twice(tmp_path):
    (tmp_path / "in.csv").write_text("wave,flux,FLUX\n7000,1,2\n7001,1,2\n")
    with pytest.raises(InputError, match=r"in.csv: found 2 columns named flux, expected one"):
        open_spectra(tmp_path / "in.csv")
