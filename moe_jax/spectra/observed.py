"""Observed spectra in files, HDF5 or FITS: read in parts, with the pixels that cannot be used marked.

HDF5: ``spectrumdataset/wave`` (P,), ``dataset/arrays/flux/value`` (N, P), and optionally ``dataset/arrays/error/value`` or
``dataset/arrays/ivar/value`` (N, P): the layout of ``moe_jax.spectra.survey_file``, without labels. FITS (needs astropy): image
extensions WAVELENGTH (or WAVE), FLUX, and optionally ERROR or IVAR, of the same shapes. Wavelengths are in vacuum, in Angstrom.

A pixel is masked where its flux or error is not finite, its error is not positive, or its inverse variance is not positive.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import h5py
import numpy as np
from jaxtyping import Bool, Float

from moe_jax.core.arrays import InputError
from moe_jax.core.files import import_extra
from moe_jax.spectra.survey_file import ERROR_FIELD, FLUX_FIELD, WAVE_FIELD, require_increasing

IVAR_FIELD = "dataset/arrays/ivar/value"
FITS_SUFFIXES = (".fits", ".fit", ".fits.gz", ".fz")
_FITS_NAMES = {"wave": ("WAVELENGTH", "WAVE"), "flux": ("FLUX",), "error": ("ERROR",), "ivar": ("IVAR",)}
_HDF5_NAMES = {"wave": (WAVE_FIELD,), "flux": (FLUX_FIELD,), "error": (ERROR_FIELD,), "ivar": (IVAR_FIELD,)}


class ObservedSpectra(NamedTuple):
    """Spectra as observed, on the wavelengths of their file."""

    flux: Float[np.ndarray, "N P"]  #: 0 where masked
    error: Float[np.ndarray, "N P"]  #: standard deviation; 0 where masked, NaN where the file has neither errors nor ivar
    good: Bool[np.ndarray, "N P"]


class ObservedFile:
    """Observed spectra on disk: wavelengths at once, spectra in parts.

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
        self._fits = self.path.name.lower().endswith(FITS_SUFFIXES)
        with self._open() as arrays:
            found = {kind: self._find(arrays, kind) for kind in _HDF5_NAMES}
            for kind in ("wave", "flux"):
                if found[kind] is None:
                    raise InputError(f"{path}: {self._names(kind)}: found nothing, expected an array of numbers")
            if found["error"] is not None and found["ivar"] is not None:
                found["ivar"] = None  # errors are what ivar would be turned into
            wave, flux = arrays[found["wave"]], arrays[found["flux"]]
            self._fields = found
            for kind, ndim in (("wave", 1), ("flux", 2), ("error", 2), ("ivar", 2)):
                if (field := found[kind]) is not None and (
                    len(arrays[field].shape) != ndim or arrays[field].dtype.kind not in "fiu"
                ):
                    described = f"{arrays[field].dtype} of shape {arrays[field].shape}"
                    dimensions = "1 dimension" if ndim == 1 else "2 dimensions"
                    raise InputError(f"{path}: {field}: found {described}, expected numbers in {dimensions}")
            if flux.shape[0] < 1 or wave.shape[0] < 2 or flux.shape[1] != wave.shape[0]:
                raise InputError(
                    f"{path}: {found['flux']} has shape {tuple(flux.shape)}, expected (N, {wave.shape[0]}), at least one star of "
                    f"at least 2 pixels, as {found['wave']} has {wave.shape[0]}"
                )
            for kind in ("error", "ivar"):
                if (field := found[kind]) is not None and arrays[field].shape != flux.shape:
                    shape = tuple(arrays[field].shape)
                    raise InputError(f"{path}: {field} has shape {shape}, expected {tuple(flux.shape)} like {found['flux']}")
            self.wave = np.asarray(wave[...], np.float64)
            self.n_stars = int(flux.shape[0])
        self.has_errors = found["error"] is not None or found["ivar"] is not None
        field = found["wave"]
        assert field is not None
        if not np.isfinite(self.wave).all():
            raise InputError(f"{path}: {field}: found wavelengths that are not finite, expected finite numbers")
        require_increasing(self.path, field, self.wave)

    def read(self, start: int, stop: int) -> ObservedSpectra:
        """The stars ``start`` to ``stop - 1``."""
        with self._open() as arrays:
            flux = np.asarray(arrays[self._fields["flux"]][start:stop], np.float32)
            field = self._fields["error"] or self._fields["ivar"]
            error = np.full_like(flux, np.nan) if field is None else np.asarray(arrays[field][start:stop], np.float32)
        good = np.isfinite(flux)
        if field is None:
            return ObservedSpectra(np.where(good, flux, 0.0), error, good)
        if field == self._fields["ivar"]:
            with np.errstate(divide="ignore", invalid="ignore"):
                error = np.reciprocal(np.sqrt(error))
        good &= np.isfinite(error) & (error > 0)
        return ObservedSpectra(np.where(good, flux, 0.0), np.where(good, error, 0.0), good)

    def _names(self, kind: str) -> str:
        return " or ".join((_FITS_NAMES if self._fits else _HDF5_NAMES)[kind])

    def _find(self, arrays: Any, kind: str) -> str | None:
        names = (_FITS_NAMES if self._fits else _HDF5_NAMES)[kind]
        return next((name for name in names if name in arrays), None)

    @contextmanager
    def _open(self) -> Iterator[Any]:
        """The arrays of the file by name."""
        path = self.path
        if not path.is_file():
            found = "a folder" if path.is_dir() else "no such file"
            raise InputError(f"{path}: found {found}, expected an HDF5 or FITS file with spectra")
        try:
            if self._fits:
                with _open_fits(path) as arrays:
                    yield arrays
            else:
                if not h5py.is_hdf5(path):
                    raise InputError(f"{path}: found a file that is not HDF5, expected an HDF5 file, or a FITS file named *.fits")
                with h5py.File(path, "r") as file:
                    yield _Datasets(file)
        except (InputError, ModuleNotFoundError):
            raise
        except Exception as reason:  # h5py and astropy raise a dozen types for a damaged file
            summary = str(reason).split("\n")[0]
            raise InputError(f"{path}: found a file that cannot be read ({summary}), expected a whole one") from reason


class _Datasets:
    """The datasets of an HDF5 file; groups and other objects count for nothing."""

    def __init__(self, file: h5py.File) -> None:
        self._file = file

    def __contains__(self, name: str) -> bool:
        return isinstance(self._file.get(name), h5py.Dataset)

    def __getitem__(self, name: str) -> Any:
        return self._file[name]


@contextmanager
def _open_fits(path: Path) -> Iterator[dict[str, Any]]:
    """The images of a FITS file; their parts are read when they are asked for."""
    fits = import_extra("astropy.io.fits", "FITS")
    with fits.open(path, memmap=False, lazy_load_hdus=False) as hdus:
        yield {hdu.name.upper(): hdu.section for hdu in hdus if hdu.is_image and hdu.shape}
