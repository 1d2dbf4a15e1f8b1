"""Surveys as HDF5 files: checked when they are read, written whole or not at all.

Layout of a file: ``spectrumdataset/wave`` (P,), ``dataset/arrays/flux/value`` (N, P), ``dataset/arrays/error/value`` (N, P),
and the labels as the one pandas table of the file, ``pd.read_hdf(path)``, with the columns of :class:`Labels`. T_eff, log_g and
M_H must be there; the others are NaN where they are not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.files import atomic_path, require_readable
from moe_jax.spectra.label_table import TableError, read_table, write_table
from moe_jax.spectra.survey import Labels, Spectra, Survey, mean_snr

WAVE_FIELD = "spectrumdataset/wave"
FLUX_FIELD = "dataset/arrays/flux/value"
ERROR_FIELD = "dataset/arrays/error/value"
LABELS_KEY = "labels"
REQUIRED = ("T_eff", "log_g", "M_H")  #: labels without which nothing can be trained


def save_survey(path: Path | str, survey: Survey) -> None:
    """Writes a survey in the layout of this module, float32."""
    save_spectra(path, survey, snr=survey.labels.snr)


def save_spectra(
    path: Path | str,
    spectra: Spectra,
    chunk_stars: int = 4_096,
    on_written: Callable[[int], None] = lambda _: None,
    snr: AnyArray | None = None,
) -> None:
    """Writes spectra that are computed or read in parts of ``chunk_stars`` stars, in the layout of this module, float32.

    ``on_written`` is called after each part with its number of stars. The label ``snr`` is by default computed from the spectra.
    """
    shape, computed = (spectra.n_stars, len(spectra.wave)), np.zeros(spectra.n_stars, np.float32)
    with atomic_path(path) as temporary, h5py.File(temporary, "w") as file:
        file[WAVE_FIELD] = np.asarray(spectra.wave, np.float64)
        fluxes, errors = (file.create_dataset(field, shape, np.float32) for field in (FLUX_FIELD, ERROR_FIELD))
        for start in range(0, spectra.n_stars, chunk_stars):
            rows = slice(start, min(start + chunk_stars, spectra.n_stars))
            flux, error = spectra.read(rows.start, rows.stop)
            fluxes[rows], errors[rows] = np.asarray(flux, np.float32), np.asarray(error, np.float32)
            computed[rows] = mean_snr(flux, error)
            on_written(len(flux))
        labels = spectra.labels._replace(snr=computed if snr is None else snr)._asdict()
        write_table(file, LABELS_KEY, {name: np.asarray(column, np.float32) for name, column in labels.items()})


class SurveyFile:
    """A survey on disk: wavelengths and labels are read at once, spectra in parts.

    Args:
        path: HDF5 file in the layout of this module.
        n_stars: reads at most this many stars, from the start of the file; all by default.
        columns: names of label columns that are not called as in ``Labels``, such as ``{"T_eff": "teff"}``.

    Raises:
        InputError: one sentence that names the file, the field, what was found and what is expected.
    """

    wave: Float[np.ndarray, " P"]
    labels: Labels
    n_stars: int

    def __init__(self, path: Path | str, n_stars: int | None = None, columns: Mapping[str, str] = MappingProxyType({})) -> None:
        self.path = Path(path)
        if n_stars is not None and n_stars < 1:
            raise InputError(f"{path}: {n_stars} stars were asked for, expected at least 1")
        with open_hdf5(self.path, "an HDF5 file") as file:
            require_spectra(self.path, file, WAVE_FIELD, FLUX_FIELD, ERROR_FIELD)
            self.wave = file[WAVE_FIELD][()].astype(np.float64)
            self.n_stars = min(n_stars or len(file[FLUX_FIELD]), len(file[FLUX_FIELD]))
            require_wave(self.path, WAVE_FIELD, self.wave)
            self.labels = _read_labels(self.path, file, n_stars, self.n_stars, columns)

    def read(self, start: int, stop: int) -> tuple[Float[np.ndarray, "n P"], Float[np.ndarray, "n P"]]:
        """Clean flux and error of the stars ``start`` to ``stop - 1``, checked, float32.

        Negative flux is set to 0. An error that is NaN in the first or last pixel is replaced by that of the next pixel.

        Raises:
            InputError: as the constructor.
        """
        with open_hdf5(self.path, "an HDF5 file") as file:
            flux, error = (file[field][start:stop].astype(np.float32) for field in (FLUX_FIELD, ERROR_FIELD))
        _check_finite(self.path, FLUX_FIELD, flux, start)
        error[:, 0] = np.where(np.isnan(error[:, 0]), error[:, 1], error[:, 0])
        error[:, -1] = np.where(np.isnan(error[:, -1]), error[:, -2], error[:, -1])
        _check_finite(self.path, ERROR_FIELD, error, start)
        if (smallest := error.min()) <= 0:
            raise InputError(f"{self.path}: {ERROR_FIELD} holds {smallest:g} {_where(error <= 0, start)}, expected positive errors")
        return np.maximum(flux, 0), error


def load_survey(path: Path | str, n_stars: int | None = None, columns: Mapping[str, str] = MappingProxyType({})) -> Survey:
    """Reads and checks a whole survey: float32, wavelengths float64. Arguments and errors are those of ``SurveyFile``."""
    file = SurveyFile(path, n_stars, columns)
    return Survey(file.wave, *file.read(0, file.n_stars), file.labels)


@contextmanager
def open_hdf5(path: Path, expected: str) -> Iterator[h5py.File]:
    """Opens a file for reading, and raises an ``InputError`` where there is none, it is no HDF5 file, or it is damaged."""
    require_readable(path)
    if not path.is_file():
        raise InputError(f"{path}: found {'a folder' if path.is_dir() else 'no such file'}, expected {expected}")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path}: found a file that is not HDF5, expected {expected}")
    with name_damage(path), h5py.File(path) as file:
        yield file


@contextmanager
def name_damage(path: Path) -> Iterator[None]:
    """Raises an ``InputError`` in place of whatever the libraries raise where a file is damaged: a dozen types."""
    try:
        yield
    except (InputError, ModuleNotFoundError, MemoryError):
        raise
    except Exception as reason:
        summary = str(reason).split("\n")[0]
        raise InputError(f"{path}: found a file that cannot be read ({summary}), expected a whole one") from reason


def require_spectra(path: Path, arrays: Mapping[str, Any], wave: str, flux: str, *others: str) -> None:
    """Raises an ``InputError`` in the name of a file's field unless the arrays hold numbers, of shapes that go together."""
    for field in (wave, flux, *others):
        array: Any = arrays.get(field)
        if not hasattr(array, "shape"):
            there = _arrays_of(arrays)
            raise InputError(f"{path}: {field}: found nothing, expected an array of numbers; the file has {there}")
        n_dimensions = 1 if field == wave else 2
        if len(array.shape) != n_dimensions or array.dtype.kind not in "fiu":
            expected = f"numbers in {n_dimensions} dimension{'s' * (n_dimensions > 1)}"
            raise InputError(f"{path}: {field}: found {array.dtype} of shape {array.shape}, expected {expected}")
    shape, n_pixels = arrays[flux].shape, arrays[wave].shape[0]
    if shape[0] < 1 or n_pixels < 2 or shape[1] != n_pixels:
        expected = f"expected (N, {n_pixels}), at least one star of at least 2 pixels, as {wave} has {n_pixels}"
        raise InputError(f"{path}: {flux} has shape {shape}, {expected}")
    for field in others:
        if arrays[field].shape != shape:
            raise InputError(f"{path}: {field} has shape {arrays[field].shape}, expected {shape} like {flux}")


def _arrays_of(arrays: Mapping[str, Any]) -> str:
    """Names and shapes of the first arrays of a file."""
    everything: dict[str, Any] = {}
    if isinstance(arrays, h5py.Group):
        arrays.visititems(everything.__setitem__)
    else:
        everything.update(arrays)
    found = [f"{name} {array.shape}" for name, array in everything.items() if hasattr(array, "shape")]
    return ", ".join([*found[:8], *["..."] * (len(found) > 8)]) or "no arrays"


def _read_labels(path: Path, file: h5py.File, n_stars: int | None, n_expected: int, columns: Mapping[str, str]) -> Labels:
    if unknown := columns.keys() - set(Labels._fields):
        raise InputError(f"{path}: columns were given for {', '.join(sorted(unknown))}, expected {', '.join(Labels._fields)}")
    try:
        table = read_table(file)
    except TableError as reason:
        raise InputError(f"{path}: the labels: found no readable pandas table ({reason}), expected exactly one") from reason
    names = {name: columns.get(name, name) for name in Labels._fields}
    for name, column in names.items():
        if column not in table:
            if name in REQUIRED or name in columns:
                expected = ", ".join(dict.fromkeys([*(names[label] for label in REQUIRED), column]))
                raise InputError(f"{path}: label column {column}: found only {', '.join(table)}, expected {expected}, or --columns")
            table[column] = np.full(len(table[names["T_eff"]]), np.nan)
        if table[column].dtype.kind not in "fiu":
            raise InputError(f"{path}: label column {column}: found {table[column].dtype}, expected numbers")
    n_rows = len(table[names["T_eff"]])
    n_found = n_rows if n_stars is None else min(n_rows, n_stars)
    if n_found != n_expected:
        raise InputError(f"{path}: the labels: found {n_rows} rows, expected {n_expected}, one for each spectrum")
    labels = Labels(*(table[column].astype(np.float32)[:n_expected] for column in names.values()))
    for name in REQUIRED:
        _check_finite(path, f"label column {names[name]}", getattr(labels, name))
    return labels


def require_wave(path: Path, field: str, wave: np.ndarray) -> None:
    """Raises an ``InputError`` in the name of a file's field unless its wavelengths are finite and increase."""
    _check_finite(path, field, wave)
    if not (steps := np.diff(wave) > 0).all():
        i = int(np.argmin(steps))
        raise InputError(
            f"{path}: {field}: found {wave[i]:g} followed by {wave[i + 1]:g} at pixel {i + 1}, expected increasing wavelengths"
        )


def _check_finite(path: Path, field: str, values: np.ndarray, first: int = 0) -> None:
    if not (finite := np.isfinite(values)).all():
        value = values[~finite][0]
        raise InputError(f"{path}: {field}: found {value} {_where(~finite, first)}, expected finite numbers")


def _where(bad: np.ndarray, first: int = 0) -> str:
    """Place of the first bad element, and how many there are; ``first`` is the number of the star in row 0."""
    index = np.argwhere(bad)[0]
    place = f"star {index[0] + first}, pixel {index[1]}" if bad.ndim == 2 else f"row {index[0] + first}"
    return f"at {place} ({bad.sum()} in all)" if bad.sum() > 1 else f"at {place}"
