"""Spectra as a telescope gives them, in HDF5 or FITS files: read in parts, with the unusable pixels masked.

HDF5: ``spectrumdataset/wave`` (P,), ``dataset/arrays/flux/value`` (N, P), and optionally ``dataset/arrays/error/value``, or in its
place ``ivar`` or ``variance`` (N, P): the layout of ``moe_jax.spectra.survey_file``, without labels. FITS (needs astropy): image
extensions WAVELENGTH (or WAVE), FLUX, and optionally ERROR, IVAR or VARIANCE (or VAR), of the same shapes. Wavelengths are in
vacuum, and increase or decrease. An attribute ``unit`` of the HDF5 dataset names their unit; without one, the numbers tell
Angstrom, nm and um apart.

A pixel is masked where its flux or error is not finite, or its error, inverse variance or variance is not positive.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.files import import_extra, require_readable
from moe_jax.spectra.resample import MaskedSpectra
from moe_jax.spectra.survey_file import ERROR_FIELD, FLUX_FIELD, WAVE_FIELD, require_numbers, require_wave

IVAR_FIELD = "dataset/arrays/ivar/value"
FITS_SUFFIXES = (".fits", ".fit", ".fits.gz", ".fz")
_FITS_NAMES = {
    "wave": ("WAVELENGTH", "WAVE"),
    "flux": ("FLUX",),
    "error": ("ERROR",),
    "ivar": ("IVAR",),
    "variance": ("VARIANCE", "VAR"),
}
_HDF5_NAMES = {"wave": (WAVE_FIELD,), "flux": (FLUX_FIELD,), "error": (ERROR_FIELD,), "ivar": (IVAR_FIELD,)}
_HDF5_NAMES["variance"] = ("dataset/arrays/variance/value",)
UNCERTAINTIES = ("error", "ivar", "variance")  #: what may stand for the errors; the first that is there is used

_UNITS = dict.fromkeys(("angstrom", "angstroms", "aa", "a", "å", "0.1nm"), 1.0)
_UNITS |= dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 10.0) | {"m": 1e10}
_UNITS |= dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres"), 1e4)


class TelescopeFile:
    """A file of telescope spectra: wavelengths are read at once, spectra in parts.

    Args:
        path: an HDF5 or FITS file in the layout of this module; FITS by its suffix.

    Raises:
        InputError: one sentence that names the file, the field, what was found and what is expected.
        ModuleNotFoundError: for a FITS file, where astropy is not installed.
    """

    wave: Float[np.ndarray, " P"]
    n_stars: int
    has_errors: bool

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        all_names = _FITS_NAMES if is_fits(self.path) else _HDF5_NAMES
        with _open(self.path) as arrays:
            self._fields = fields = {
                kind: name
                for kind, names in all_names.items()
                if (name := next((name for name in names if name in arrays), None)) is not None
            }
            for kind in ("wave", "flux"):
                if kind not in fields:
                    raise InputError(f"{path}: {' or '.join(all_names[kind])}: found nothing, expected an array of numbers")
            for kind in [kind for kind in UNCERTAINTIES if kind in fields][1:]:
                fields.pop(kind)  # they say the same
            for kind, field in fields.items():
                require_numbers(self.path, field, arrays[field], 1 if kind == "wave" else 2)
            wave, flux = arrays[fields["wave"]], arrays[fields["flux"]]
            if flux.shape[0] < 1 or wave.shape[0] < 2 or flux.shape[1] != wave.shape[0]:
                raise InputError(
                    f"{path}: {fields['flux']} has shape {tuple(flux.shape)}, expected (N, {wave.shape[0]}), at least one star of "
                    f"at least 2 pixels, as {fields['wave']} has {wave.shape[0]}"
                )
            for kind in fields.keys() & set(UNCERTAINTIES):
                if (shape := tuple(arrays[fields[kind]].shape)) != tuple(flux.shape):
                    expected = f"expected {tuple(flux.shape)} like {fields['flux']}"
                    raise InputError(f"{path}: {fields[kind]} has shape {shape}, {expected}")
            attributes = getattr(wave, "attrs", {})
            unit = attributes.get("unit", attributes.get("units", ""))
            unit = unit.decode("utf-8", "replace") if isinstance(unit, bytes) else str(unit)
            self.wave = to_angstrom(self.path, np.asarray(wave[...], np.float64), unit)
            self._order = slice(None, None, -1 if (np.diff(self.wave) < 0).all() else 1)
            self.wave = self.wave[self._order]
            self.n_stars = int(flux.shape[0])
        self.has_errors = not fields.keys().isdisjoint(UNCERTAINTIES)
        require_wave(self.path, fields["wave"], self.wave)

    def read(self, start: int, stop: int) -> MaskedSpectra:
        """The stars ``start`` to ``stop - 1``, float32. Errors are NaN where the file has neither errors nor ivar."""
        with _open(self.path) as arrays:
            stars = {kind: arrays[field][start:stop] for kind, field in self._fields.items() if kind != "wave"}
        values = {kind: np.asarray(array, np.float64 if kind in UNCERTAINTIES else np.float32) for kind, array in stars.items()}
        values = {kind: array[:, self._order] for kind, array in values.items()}
        return mask_unusable(values["flux"], error_of(values))


def error_of(values: Mapping[str, np.ndarray]) -> np.ndarray | None:
    """Errors from the first of ``UNCERTAINTIES`` that is there; not finite, or not positive, where there is none."""
    kind = next((kind for kind in UNCERTAINTIES if kind in values), None)
    if kind is None or kind == "error":
        return values.get("error")
    with np.errstate(divide="ignore", invalid="ignore"):
        return np.sqrt(values[kind]) if kind == "variance" else 1 / np.sqrt(values[kind])


def to_angstrom(path: Path, wave: np.ndarray, unit: str) -> np.ndarray:
    """Wavelengths in Angstrom; without a unit, numbers about 0.8 are taken as um, and those about 800 as nm.

    Raises:
        InputError: for a unit that is not one of a length.
    """
    name = unit.strip().lower().replace(" ", "")
    if not name:
        typical = np.nanmedian(wave) if np.isfinite(wave).any() else np.nan
        return wave * (1e4 if 0.1 < typical < 10 else 10.0 if 100 < typical < 2_500 else 1.0)
    if name not in _UNITS:
        raise InputError(f"{path}: found wavelengths in {unit!r}, expected Angstrom, nm, um or m")
    return wave * _UNITS[name]


def is_fits(path: Path) -> bool:
    """Whether a file is FITS, by its suffix or its first bytes."""
    if path.name.lower().endswith(FITS_SUFFIXES) or not path.is_file():
        return path.name.lower().endswith(FITS_SUFFIXES)
    with path.open("rb") as file:
        return file.read(9) == b"SIMPLE  ="


def mask_unusable(flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"] | None) -> MaskedSpectra:
    """Spectra, float32, with the pixels masked that are not finite or have no positive error."""
    flux = np.asarray(flux, np.float32)
    good = np.isfinite(flux)
    if error is None:
        return MaskedSpectra(np.where(good, flux, 0.0), np.full_like(flux, np.nan), good)
    error = np.asarray(error, np.float32)
    good &= np.isfinite(error) & (error > 0)
    return MaskedSpectra(np.where(good, flux, 0.0), np.where(good, error, 0.0), good)


@contextmanager
def _open(path: Path) -> Iterator[dict[str, Any]]:
    """The arrays of a file by name; none is read before it is sliced."""
    require_readable(path)
    if not path.is_file():
        found = "a folder" if path.is_dir() else "no such file"
        raise InputError(f"{path}: found {found}, expected an HDF5 or FITS file with spectra")
    try:
        if is_fits(path):
            fits = import_extra("astropy.io.fits", "FITS")
            with fits.open(path, memmap=False, lazy_load_hdus=False) as hdus:
                yield {hdu.name.upper(): hdu.section for hdu in hdus if hdu.is_image and hdu.shape}
        elif h5py.is_hdf5(path):
            with h5py.File(path, "r") as file:
                names = [name for names in _HDF5_NAMES.values() for name in names]
                yield {name: file[name] for name in names if isinstance(file.get(name), h5py.Dataset)}
        else:
            raise InputError(f"{path}: found a file that is not HDF5, expected an HDF5 file, or a FITS file named *.fits")
    except (InputError, ModuleNotFoundError):
        raise
    except Exception as reason:  # h5py and astropy raise a dozen types for a damaged file
        summary = str(reason).split("\n")[0]
        raise InputError(f"{path}: found a file that cannot be read ({summary}), expected a whole one") from reason
