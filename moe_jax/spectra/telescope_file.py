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

import numpy as np
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.files import import_extra, require_readable
from moe_jax.spectra.resample import MaskedSpectra
from moe_jax.spectra.survey_file import WAVE_FIELD, name_damage, open_hdf5, require_spectra, require_wave

IVAR_FIELD = "dataset/arrays/ivar/value"
FITS_SUFFIXES = (".fits", ".fit", ".fits.gz", ".fz")
GZIP = b"\x1f\x8b"  # the first bytes of a file that gzip has compressed
_FITS_NAMES: dict[str, tuple[str, ...]] = {kind: (kind.upper(),) for kind in ("flux", "error", "ivar")}
_FITS_NAMES |= {"wave": ("WAVELENGTH", "WAVE"), "variance": ("VARIANCE", "VAR")}
_HDF5_NAMES = {"wave": (WAVE_FIELD,)} | {kind: (f"dataset/arrays/{kind}/value",) for kind in ("flux", "error", "ivar", "variance")}
UNCERTAINTIES = ("error", "ivar", "variance")  #: what may stand for the errors; the first that is there is used

_UNITS = dict.fromkeys(("angstrom", "angstroms", "aa", "a", "å", "0.1nm"), 1.0)
_UNITS |= dict.fromkeys(("nm", "nanometer", "nanometers", "nanometre", "nanometres"), 10.0) | {"m": 1e10}
_UNITS |= dict.fromkeys(("um", "µm", "μm", "micron", "microns", "micrometer", "micrometers", "micrometre", "micrometres"), 1e4)


class TelescopeFile:
    """An HDF5 or FITS file in the layout of this module: wavelengths are read at once, spectra in parts.

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
            fields = {}
            for kind, names in all_names.items():
                fields[kind] = next((name for name in names if name in arrays), " or ".join(names))
            error = [kind for kind in UNCERTAINTIES if fields[kind] in arrays][:1]  # the others say the same
            self._fields = {kind: fields[kind] for kind in ("wave", "flux", *error)}
            require_spectra(self.path, arrays, *self._fields.values())
            wave = arrays[fields["wave"]]
            attributes = getattr(wave, "attrs", {})
            unit = attributes.get("unit", attributes.get("units", ""))
            unit = unit.decode("utf-8", "replace") if isinstance(unit, bytes) else str(unit)
            self.wave = to_angstrom(self.path, np.asarray(wave[...], np.float64), unit)
            self._order = slice(None, None, -1 if (np.diff(self.wave) < 0).all() else 1)
            self.wave = self.wave[self._order]
            self.n_stars = int(arrays[fields["flux"]].shape[0])
        self.has_errors = bool(error)
        require_wave(self.path, fields["wave"], self.wave)

    def read(self, start: int, stop: int) -> MaskedSpectra:
        """The stars ``start`` to ``stop - 1``, float32. Errors are NaN where the file has neither errors nor ivar."""
        with _open(self.path) as arrays:
            stars = {kind: arrays[field][start:stop] for kind, field in self._fields.items() if kind != "wave"}
        values = {kind: np.asarray(array, np.float32 if kind in ("flux", "error") else np.float64) for kind, array in stars.items()}
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
    """Whether a file is FITS: by its first bytes, where it is compressed or not there by its suffix.

    Raises:
        InputError: for a file that the system does not let us read.
    """
    require_readable(path)
    named_so = path.name.lower().endswith(FITS_SUFFIXES)
    if not path.is_file():
        return named_so
    with path.open("rb") as file:
        start = file.read(9)
    return start == b"SIMPLE  =" or (named_so and start.startswith(GZIP))


def mask_unusable(flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"] | None) -> MaskedSpectra:
    """Spectra, float32, with the pixels masked that are not finite or have no positive error."""
    flux = np.asarray(flux, np.float32)
    good = np.isfinite(flux)
    if error is not None:
        error = np.asarray(error, np.float32)
        good &= np.isfinite(error) & (error > 0)
    if not good.all():  # otherwise copies would take longer than reading
        flux, error = np.where(good, flux, 0.0), None if error is None else np.where(good, error, 0.0)
    return MaskedSpectra(flux, np.full_like(flux, np.nan) if error is None else error, good)


@contextmanager
def _open(path: Path) -> Iterator[Mapping[str, Any]]:
    """The arrays of a file by name; none is read before it is sliced."""
    if is_fits(path) and path.is_file():
        fits = import_extra("astropy.io.fits", "FITS")
        with name_damage(path), fits.open(path, memmap=False, lazy_load_hdus=False) as hdus:
            yield {hdu.name.upper(): hdu.section for hdu in hdus if hdu.is_image and hdu.shape}
    else:
        with open_hdf5(path, "an HDF5 or FITS file with spectra") as file:
            yield file
