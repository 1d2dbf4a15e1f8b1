"""Surveys: the types, and the HDF5 layout in which they are read and written.

Layout of a file: ``spectrumdataset/wave`` (P,), ``dataset/arrays/flux/value`` (N, P), ``dataset/arrays/error/value`` (N, P),
and the labels as the one pandas table of the file, ``pd.read_hdf(path)``, with the columns of :class:`Labels`.
"""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import h5py
import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Float, PRNGKeyArray

from moe_jax.arrays import AnyArray, InputError
from moe_jax.files import atomic_path

WAVE_FIELD = "spectrumdataset/wave"
FLUX_FIELD = "dataset/arrays/flux/value"
ERROR_FIELD = "dataset/arrays/error/value"
LABELS_KEY = "labels"

_NOISE_BATCH = 256


class Labels(NamedTuple):
    """What is known of each star."""

    T_eff: Float[AnyArray, " N"]  #: effective temperature, K
    log_g: Float[AnyArray, " N"]  #: surface gravity, log10 of cm/s^2
    M_H: Float[AnyArray, " N"]  #: metallicity, dex
    a_M: Float[AnyArray, " N"]  #: alpha enhancement [alpha/M], dex
    C_M: Float[AnyArray, " N"]  #: carbon enhancement [C/M], dex
    mag: Float[AnyArray, " N"]  #: apparent magnitude
    redshift: Float[AnyArray, " N"]
    snr: Float[AnyArray, " N"]  #: mean over the pixels of flux / error


class Survey(NamedTuple):
    """Clean spectra, the size of their errors, and their labels."""

    wave: Float[AnyArray, " P"]  #: vacuum wavelength, Angstrom, increasing
    flux: Float[AnyArray, "N P"]  #: noise-free, non-negative flux, each spectrum scaled to median 0.5
    error: Float[AnyArray, "N P"]  #: standard deviation of the flux at noise level 1
    labels: Labels


def add_noise(
    key: PRNGKeyArray, flux: Float[AnyArray, "N P"], error: Float[AnyArray, "N P"], noise_level: ArrayLike
) -> Float[jax.Array, "N P"]:
    """Draws noisy spectra: flux + noise_level * error * N(0, 1), without clipping.

    Args:
        key: random key.
        flux: clean flux.
        error: standard deviation at noise level 1.
        noise_level: factor on the errors.

    Raises:
        InputError: where flux and error disagree in shape.
    """
    if flux.shape != error.shape:
        raise InputError(f"error has shape {error.shape}, expected {flux.shape} like flux")
    return _add_noise(key, flux, error, noise_level)


@jax.jit
def _add_noise(key: jax.Array, flux: jax.Array, error: jax.Array, noise_level: ArrayLike) -> jax.Array:
    def observe(star: tuple[jax.Array, jax.Array, jax.Array]) -> jax.Array:
        key, flux, error = star
        return flux + jnp.asarray(noise_level, flux.dtype) * error * jax.random.normal(key, flux.shape, flux.dtype)

    # In batches, so that the random bits of a batch fit into the cache: three times faster, and a third of the memory.
    keys = jax.random.split(key, len(flux))
    noisy: jax.Array = lax.map(observe, (keys, flux, error), batch_size=min(_NOISE_BATCH, len(flux)))
    return noisy


def save_survey(path: Path | str, survey: Survey) -> None:
    """Writes a survey in the HDF5 layout of this module, float32; the file appears whole or not at all."""
    with atomic_path(path) as temporary:
        with h5py.File(temporary, "w") as file:
            file[WAVE_FIELD] = np.asarray(survey.wave, np.float64)
            file[FLUX_FIELD] = np.asarray(survey.flux, np.float32)
            file[ERROR_FIELD] = np.asarray(survey.error, np.float32)
        labels = pd.DataFrame({name: np.asarray(column, np.float32) for name, column in survey.labels._asdict().items()})
        labels.to_hdf(temporary, key=LABELS_KEY, mode="a")


def load_survey(path: Path | str, n_stars: int | None = None) -> Survey:
    """Reads and checks a survey, float32 but for the wavelengths.

    Negative flux is set to 0. A NaN error in the first or last pixel is replaced by its neighbour's; elsewhere it is an
    error. Only the rows that are asked for are read.

    Args:
        path: HDF5 file in the layout of this module.
        n_stars: most rows to read, from the start of the file; None for all.

    Raises:
        InputError: one sentence that names the file, the field, what was found and what is expected.
    """
    path = Path(path)
    wave, flux, error = _read_arrays(path, n_stars)
    labels = _read_labels(path, n_stars, n_expected=len(flux))
    _check_wave(path, wave)
    _check_finite(path, FLUX_FIELD, flux)
    error[:, 0] = np.where(np.isnan(error[:, 0]), error[:, 1], error[:, 0])
    error[:, -1] = np.where(np.isnan(error[:, -1]), error[:, -2], error[:, -1])
    _check_finite(path, ERROR_FIELD, error)
    if (smallest := error.min()) <= 0:
        raise InputError(f"{path}: {ERROR_FIELD} holds {smallest:g} {_where(error <= 0)}, expected positive errors")
    return Survey(wave, np.maximum(flux, 0), error, labels)


def _read_arrays(path: Path, n_stars: int | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    if n_stars is not None and n_stars < 1:
        raise InputError(f"{path}: {n_stars} stars were asked for, expected at least 1")
    if not path.is_file():
        raise InputError(f"{path}: found {'a folder' if path.is_dir() else 'no such file'}, expected an HDF5 file")
    if not h5py.is_hdf5(path):
        raise InputError(f"{path}: found a file that is not HDF5, expected an HDF5 file")
    try:
        with h5py.File(path, "r") as file:
            wave = _dataset(path, file, WAVE_FIELD, 1)
            flux = _dataset(path, file, FLUX_FIELD, 2)
            error = _dataset(path, file, ERROR_FIELD, 2)
            n_pixels = wave.shape[0]
            if n_pixels < 2 or flux.shape[0] < 1:
                raise InputError(f"{path}: {FLUX_FIELD} has shape {flux.shape}, expected at least one star of 2 pixels")
            if flux.shape[1] != n_pixels:
                raise InputError(
                    f"{path}: {FLUX_FIELD} has shape {flux.shape}, expected (N, {n_pixels}) as {WAVE_FIELD} has {n_pixels} pixels"
                )
            if error.shape != flux.shape:
                raise InputError(f"{path}: {ERROR_FIELD} has shape {error.shape}, expected {flux.shape} like {FLUX_FIELD}")
            rows = slice(n_stars)
            return wave[()].astype(np.float64), flux[rows].astype(np.float32), error[rows].astype(np.float32)
    except OSError as reason:
        raise InputError(f"{path}: found an HDF5 file that cannot be read ({reason}), expected a readable one") from reason


def _dataset(path: Path, file: h5py.File, field: str, ndim: int) -> h5py.Dataset:
    dataset = file.get(field)
    if not isinstance(dataset, h5py.Dataset):
        found = "nothing" if dataset is None else "a group"
        raise InputError(f"{path}: {field}: found {found}, expected a dataset with {ndim} dimension{'s' * (ndim > 1)}")
    if dataset.ndim != ndim or dataset.dtype.kind not in "fiu":
        found = f"{dataset.dtype} of shape {dataset.shape}"
        raise InputError(f"{path}: {field}: found {found}, expected numbers in {ndim} dimension{'s' * (ndim > 1)}")
    return dataset


def _read_labels(path: Path, n_stars: int | None, n_expected: int) -> Labels:
    try:
        table = pd.read_hdf(path)
    except Exception as reason:  # pandas and PyTables raise a dozen types for a table that is not there or not readable
        summary = str(reason).split("\n")[0]
        raise InputError(f"{path}: the labels: found no readable pandas table ({summary}), expected exactly one") from reason
    if not isinstance(table, pd.DataFrame):
        raise InputError(f"{path}: the labels: found a pandas {type(table).__name__}, expected a table (DataFrame)")
    for name in Labels._fields:
        if name not in table.columns:
            found = ", ".join(map(str, table.columns))
            raise InputError(f"{path}: label column {name}: found only {found}, expected {', '.join(Labels._fields)}")
        if table[name].dtype.kind not in "fiu":
            raise InputError(f"{path}: label column {name}: found {table[name].dtype}, expected numbers")
    n_found = len(table) if n_stars is None else min(len(table), n_stars)
    if n_found != n_expected:
        raise InputError(f"{path}: the labels: found {len(table)} rows, expected {n_expected}, one for each spectrum")
    labels = Labels(*(table[name].to_numpy(np.float32)[:n_expected] for name in Labels._fields))
    for name in ("T_eff", "log_g", "M_H"):
        _check_finite(path, f"label column {name}", getattr(labels, name))
    return labels


def _check_wave(path: Path, wave: np.ndarray) -> None:
    _check_finite(path, WAVE_FIELD, wave)
    if not (steps := np.diff(wave) > 0).all():
        i = int(np.argmin(steps))
        raise InputError(
            f"{path}: {WAVE_FIELD}: found {wave[i]:g} followed by {wave[i + 1]:g} at pixel {i + 1}, expected increasing wavelengths"
        )


def _check_finite(path: Path, field: str, values: np.ndarray) -> None:
    if not (finite := np.isfinite(values)).all():
        value = values[~finite][0]
        raise InputError(f"{path}: {field}: found {value} {_where(~finite)}, expected finite numbers")


def _where(bad: np.ndarray) -> str:
    """Names the first bad element of an array by star and pixel, and says how many there are."""
    first = np.argwhere(bad)[0]
    place = f"star {first[0]}, pixel {first[1]}" if bad.ndim == 2 else f"row {first[0]}"
    return f"at {place} ({bad.sum()} in all)" if bad.sum() > 1 else f"at {place}"
