"""Spectra as they come: HDF5, FITS images and tables, and text, opened as sources that share their wavelengths.

The page on spectra lists the layouts. Columns and extensions are found by their names, whatever their case: ``NAMES``. Units come
from the file. Where it names none, the numbers tell Angstrom, nm and um apart.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import Float

from moe_jax.core.arrays import InputError
from moe_jax.core.files import import_extra, require_readable
from moe_jax.spectra.resample import MaskedSpectra
from moe_jax.spectra.survey_file import name_damage, require_wave
from moe_jax.spectra.telescope_file import UNCERTAINTIES, TelescopeFile, error_of, is_fits, mask_unusable, to_angstrom

#: Names of columns and extensions, in small letters.
NAMES = dict(
    wave=("wavelength", "wave", "lambda", "lam", "wl", "spectral_axis", "loglam", "log_lambda", "logwave", "col1"),
    flux=("flux", "flux_density", "f_lambda", "flam", "spectrum", "spec", "counts", "intensity", "normalized_flux", "col2"),
    error=("error", "err", "flux_error", "flux_err", "e_flux", "fluxerr", "sigma", "std", "stddev", "uncertainty", "unc", "col3"),
    ivar=("ivar", "inverse_variance", "invvar", "flux_ivar"),
    variance=("variance", "var", "flux_variance", "flux_var"),
)
_ERROR_NAMES = {name for kind in UNCERTAINTIES for name in NAMES[kind]}
_MISSING = ("", "-", "--", "n/a", "na", "null", "none", "masked")  # numbers that are not there, in text
_LOGARITHMIC = ("loglam", "log_lambda", "logwave")
_NAME_WITH_UNIT = re.compile(r"\s*(.*?)\s*(?:[\[(]\s*(.*?)\s*[\])]|_(nm|um|aa|angstrom|micron))\s*", re.IGNORECASE)


class LoadedSpectra(NamedTuple):
    """A source in memory."""

    wave: Float[np.ndarray, " P"]
    spectra: MaskedSpectra

    @property
    def n_stars(self) -> int:
        """Number of stars, N."""
        return len(self.spectra.flux)

    @property
    def has_errors(self) -> bool:
        """Whether the file gives errors."""
        return not np.isnan(self.spectra.error).all()

    def read(self, start: int, stop: int) -> MaskedSpectra:
        """The stars ``start`` to ``stop - 1``."""
        return MaskedSpectra(*(array[start:stop] for array in self.spectra))


#: Spectra on common wavelengths: those of a file, or a part of it.
Source = TelescopeFile | LoadedSpectra


class _Field(NamedTuple):
    """An array of a file."""

    name: str
    values: Any
    unit: str = ""
    of_image: bool = False  #: whether it is an image of FITS, not a column


def open_spectra(path: Path | str) -> list[Source]:
    """The spectra of a file, in its order; one source where all stars share their wavelengths.

    Raises:
        InputError: one sentence that says what the file contains and what is looked for.
        ModuleNotFoundError: for FITS and ECSV, where astropy is not installed.
    """
    path = Path(path)
    require_readable(path)
    if not path.is_file() or h5py.is_hdf5(path):
        return [TelescopeFile(path)]
    with name_damage(path):
        if not is_fits(path):
            return _sources(path, [_read_text(path)])
        with import_extra("astropy.io.fits", "FITS").open(path, memmap=False, lazy_load_hdus=False) as hdus:
            if _is_telescope_file(hdus):
                return [TelescopeFile(path)]  # reads in parts
            return _sources(path, [_fields_of(hdu) for hdu in hdus])


def _sources(path: Path, parts: Sequence[list[_Field]]) -> list[Source]:
    """Sources from the first part of a file, or else from all parts together, that has wavelengths and flux."""
    everything = [field for part in parts for field in part]
    for fields in (*parts, everything):
        by_kind = {kind: field for kind in NAMES if (field := _find(kind, fields)) is not None}
        if {"wave", "flux"} <= by_kind.keys():
            if by_kind.keys().isdisjoint(UNCERTAINTIES):
                by_kind |= _errors_apart(path, by_kind["flux"], everything)
            return list(_group(path, by_kind))
    contents = ", ".join(f"{field.name} {np.shape(field.values)}" for field in everything) or "no arrays"
    expected = " and ".join(f"{kind} ({', '.join(NAMES[kind][:-1])})" for kind in ("wave", "flux"))
    raise InputError(
        f"{path}: found {contents}, expected columns or extensions named {expected}, or a header with CRVAL1 and CDELT1"
    )


def _errors_apart(path: Path, flux: _Field, everything: Sequence[_Field]) -> dict[str, _Field]:
    """Errors in an extension of their own, by their kind; none where there is no such extension.

    Raises:
        InputError: if images of errors are there, but none is of the flux's shape. Columns of other tables may be of anything.
    """
    shape = np.atleast_2d(flux.values).shape
    others = {kind: field for kind in UNCERTAINTIES if (field := _find(kind, everything)) is not None}
    of_shape = {kind: field for kind, field in others.items() if np.atleast_2d(field.values).shape == shape}
    odd = next((field for field in others.values() if field.of_image and flux.of_image), None)
    if odd is not None and not of_shape:
        raise InputError(f"{path}: {odd.name} has shape {np.shape(odd.values)}, expected {np.shape(flux.values)} like {flux.name}")
    return of_shape


def _find(kind: str, fields: Iterable[_Field]) -> _Field | None:
    numbers = {field.name: field for field in fields if np.asarray(field.values).dtype.kind in "fiu" and np.ndim(field.values)}
    return next((numbers[name] for name in NAMES[kind] if name in numbers), None)


def _group(path: Path, by_kind: dict[str, _Field]) -> Iterable[LoadedSpectra]:
    """Checks shapes, and joins neighbouring stars with the same wavelengths."""
    arrays = {kind: np.atleast_2d(np.asarray(field.values, np.float64)) for kind, field in by_kind.items()}
    shape = arrays["flux"].shape
    for kind, array in arrays.items():
        if array.ndim != 2 or array.shape[1] != shape[1] or len(array) not in ({1, shape[0]} if kind == "wave" else {shape[0]}):
            expected = f"expected {shape} like {by_kind['flux'].name}"
            raise InputError(f"{path}: {by_kind[kind].name} has shape {array.shape}, {expected}")
    if shape[0] < 1 or shape[1] < 2:
        raise InputError(f"{path}: {by_kind['flux'].name} has shape {shape}, expected at least one star of at least 2 pixels")
    field = by_kind["wave"]
    logarithmic = field.name in _LOGARITHMIC or field.unit.lower().startswith("log")
    wave = to_angstrom(path, 10 ** arrays["wave"] if logarithmic else arrays["wave"], "angstrom" if logarithmic else field.unit)
    error = error_of(arrays)
    ends = [i for i in range(1, len(wave)) if not np.array_equal(wave[i], wave[i - 1], equal_nan=True)]
    for start, stop in itertools.pairwise([0, *ends, len(wave)]):
        rows = slice(start, stop) if len(wave) > 1 else slice(None)
        there = np.isfinite(wave[start])  # rows of stars of different lengths are filled up
        if there.sum() < 2:
            raise InputError(f"{path}: {field.name}: found {there.sum()} numbers for star {start}, expected at least 2 wavelengths")
        if not np.trim_zeros(there).all():
            gap = f"star {start}: {(~there).sum()} of {len(there)} wavelengths that are not numbers between those that are"
            raise InputError(f"{path}: {field.name}: found {gap}, expected all of them")
        order = np.flatnonzero(there)[np.argsort(wave[start][there])]
        require_wave(path, field.name, wave[start][order])
        flux, error_there = arrays["flux"][rows][:, order], None if error is None else error[rows][:, order]
        yield LoadedSpectra(wave[start][order], mask_unusable(flux, error_there))


def _named(name: str, values: Any, unit: str | None = None) -> _Field:
    """A field by its name in small letters; a unit may stand in the name, as in "wave [nm]"."""
    if not unit and (match := _NAME_WITH_UNIT.fullmatch(str(name))) is not None:
        name, unit = match[1], match[2] or match[3]
    return _Field(str(name).strip().lower(), values, str(unit or ""))


def _filled(column: Any) -> np.ndarray:
    """The values of a column, NaN where numbers are masked."""
    values, mask = np.ma.getdata(column), np.ma.getmaskarray(column)
    return np.where(mask, np.nan, values) if mask.any() and values.dtype.kind in "fiu" else np.asarray(values)


def _field_of(column: Any, values: np.ndarray) -> _Field:
    """A column of a FITS table; whole numbers may have one that stands for none."""
    values = values.astype(values.dtype.newbyteorder("="))
    if values.dtype.kind in "iu" and column.null is not None:
        values = _filled(np.ma.masked_equal(values, column.null))
    return _named(column.name, values, column.unit)


def _is_telescope_file(hdus: Iterable[Any]) -> bool:
    """Whether the images of a FITS file are those of a ``TelescopeFile``. Their headers tell: no image is read.

    Spectra of one dimension, and errors under a name that a ``TelescopeFile`` does not look for, are not.
    """
    images = [hdu for hdu in hdus if hdu.is_image and hdu.shape and not _has_wave(hdu)]
    fields = {field.name: field for field in (_image_field(hdu, hdu.section) for hdu in images)}
    wave = fields.get("wavelength", fields.get("wave"))
    if "flux" not in fields or len(fields["flux"].values.shape) == 1 or wave is None or len(wave.values.shape) != 1 or wave.unit:
        return False
    return bool(fields.keys() & {"error", "ivar", "variance", "var"}) or not fields.keys() & _ERROR_NAMES


def _image_field(hdu: Any, values: Any) -> _Field:
    return _named(hdu.name or "primary", values, hdu.header.get("BUNIT"))._replace(of_image=True)


def _step(hdu: Any) -> Any:
    return hdu.header.get("CDELT1", hdu.header.get("CD1_1"))


def _has_wave(hdu: Any) -> bool:
    """Whether the header of an image says the wavelengths of its flux."""
    if _image_field(hdu, None).name in _ERROR_NAMES:
        return False
    return _step(hdu) is not None and "CRVAL1" in hdu.header and len(hdu.shape) <= 3


def _fields_of(hdu: Any) -> list[_Field]:
    """Columns of a FITS table, or the image and the wavelengths of its header."""
    if not hdu.is_image:
        return [_field_of(column, np.asarray(hdu.data[column.name])) for column in hdu.columns]
    if hdu.data is None:
        return []
    header, data, step = hdu.header, np.asarray(hdu.data), _step(hdu)
    if not _has_wave(hdu):
        return [_image_field(hdu, data)]
    wave = header["CRVAL1"] + (np.arange(data.shape[-1]) + 1 - header.get("CRPIX1", 1)) * step
    logarithmic = header.get("DC-FLAG") == 1 or "LOG" in str(header.get("CTYPE1", "")).upper() or (2 < wave[0] < 5 and step < 1e-2)
    fields = [_Field("loglam" if logarithmic else "wave", wave, "" if logarithmic else str(header.get("CUNIT1", "")))]
    if data.ndim == 3:  # bands of IRAF: the flux comes first, the error last
        return [*fields, _Field("flux", data[0]), *([_Field("error", data[3])] if len(data) == 4 else [])]
    return [*fields, _Field("flux", data, of_image=True)]


def _read_text(path: Path) -> list[_Field]:
    """Columns of a text file; their names stand in its first line, commented or not, or count from col1."""
    data = path.read_bytes()
    if b"\0" in data[:4096]:
        raise InputError(f"{path}: found a file that is not HDF5, expected an HDF5 file, or a FITS file named *.fits, or text")
    lines = data.decode("utf-8", "replace").lstrip("\ufeff").splitlines()
    if lines and lines[0].startswith("# %ECSV"):
        table = import_extra("astropy.table", "ECSV").Table.read(path, format="ascii.ecsv")
        return [_named(name, _filled(table[name]), str(table[name].unit or "")) for name in table.colnames]
    rows = [_split(line) for line in lines if line.strip() and line.lstrip()[0] not in "#%"]
    comments = [_split(line.lstrip(" #%")) for line in lines if line.lstrip().startswith(("#", "%"))]
    first_cell = next(filter(None, rows[0]), "") if rows else ""  # pandas leaves the name of its row numbers empty
    headers = [rows.pop(0)] if not _is_number(first_cell) else comments[::-1]
    if not any(_is_number(cell) for row in rows for cell in row):
        raise InputError(f"{path}: found a file that is not HDF5, FITS or columns of numbers, expected one with spectra")
    if odd := next((row for row in rows if len(row) != len(rows[0])), None):
        raise InputError(f"{path}: found {len(odd)} cells in the line {odd[:3]}, expected {len(rows[0])} like the first")
    names = next((names for names in headers if len(names) == len(rows[0])), [f"col{i + 1}" for i in range(len(rows[0]))])
    known = [name for kinds in NAMES.values() for name in kinds]
    short = [_named(name, None).name for name in names]
    if twice := next((name for name in short if name in known and short.count(name) > 1), None):
        raise InputError(f"{path}: found {short.count(twice)} columns named {twice}, expected one")
    fields = []
    for name, meaning, column in zip(names, short, zip(*rows, strict=True), strict=True):
        text = [cell for cell in column if not _is_number(cell) and cell.lower() not in _MISSING]
        if text and meaning in known:
            raise InputError(f"{path}: {name}: found {text[0]!r} ({len(text)} such cells), expected numbers")
        fields.append(_named(name, np.array([float(cell or "nan") if _is_number(cell) else np.nan for cell in column])))
    first = fields[0].values
    if names[0] == "col1" and first[0] in (0, 1) and len(first) > 1 and (np.diff(first) == 1).all():
        raise InputError(
            f"{path}: found the numbers of the rows in the first column, expected wavelengths, or names of the columns"
        )
    return fields


def _split(line: str) -> list[str]:
    separator = next((s for s in (",", ";", "\t", "|") if s in line), None)
    return [cell.strip().strip('"') for cell in line.strip().strip("|").split(separator)]


def _is_number(text: str) -> bool:
    try:
        float(text or "nan")
    except ValueError:
        return False
    return True
