"""Predicts log g of the stars in a file with a trained model.

    python -m experiments.predict MODEL SPECTRA.h5 -o OUT.csv
    python -m experiments.predict results/regress_gate/default/model spectra.fits -o stars.parquet

MODEL is the folder ``model`` that regress_gate wrote. SPECTRA holds noisy spectra as observed: HDF5 with
spectrumdataset/wave, dataset/arrays/flux/value and dataset/arrays/error/value (or ivar), or FITS with the extensions
WAVELENGTH, FLUX and ERROR (or IVAR). Wavelengths in vacuum, Angstrom; other pixels than the model's are resampled. OUT ends in
.csv, .parquet or .fits (FITS and Parquet: pip install 'moe_jax[astro]').

OUT has one row for each star, with these columns (NaN where nothing is predicted):

    star               number of the star in SPECTRA, from 0
    log_g              predicted surface gravity, log10 of cm / s^2
    uncertainty        half-width of the 68 % interval; standard deviation where the model is not calibrated
    half_width_90      half-width of the 90 % interval, where the model is calibrated
    half_width_95      likewise of the 95 % interval
    weight_0 to 8      weight of each expert in the prediction; they sum to 1
    distance           distance from the training stars in feature space, in units of the limit for unlike_training
    n_masked           masked pixels, of the model's
    flags              names of what is unusual, joined by |:
      unlike_training    distance above 1: only 0.1 % of the training stars are further out
      many_masked        more than 10 % of the pixels, or of the pixels of one line, are masked
      not_predicted      more than half of the pixels are masked, or the spectrum has no positive median to scale by
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tyro

from experiments.runner.command_line import require_at_least, run_command
from experiments.runner.stages import Stages, console
from moe_jax.apply.application import Application, apply_model, needs_scaling, prepare_application
from moe_jax.apply.catalogue import open_catalogue, require_suffix
from moe_jax.apply.model_file import load_model
from moe_jax.core.arrays import InputError
from moe_jax.spectra.resample import MaskedSpectra
from moe_jax.spectra.telescope_file import TelescopeFile

SCALE_SAMPLE = 512  # stars, from the first on, by which --scale auto decides


@dataclass(frozen=True)
class PredictConfig:
    """What is predicted, with what, and where it goes."""

    model: tyro.conf.Positional[Path]
    """Folder of a model that regress_gate wrote."""
    spectra: tyro.conf.Positional[Path]
    """HDF5 or FITS file of observed spectra."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Table to write: .csv, .parquet or .fits."""
    scale: Literal["auto", "always", "never"] = "auto"
    """Scale each spectrum to the median of the training spectra; auto: if the spectra of the file lie on another scale."""
    chunk_stars: int = 2_048
    """Stars in memory at a time."""

    def __post_init__(self) -> None:
        require_at_least(self, chunk_stars=1)


def main(config: PredictConfig) -> None:
    """Predicts chunk by chunk, and prints how the spectra were treated and which flags were raised."""
    stages = Stages()
    require_suffix(config.output)
    model = load_model(config.model)
    file = TelescopeFile(config.spectra)
    try:
        application = prepare_application(model, file.wave, str(config.spectra))
    except InputError as reason:
        raise InputError(str(reason).replace("the model has", f"{config.model}: the model has", 1)) from reason
    if application.overlap is not None:
        console.print(
            f"{config.spectra}: {len(file.wave)} pixels from {file.wave[0]:.2f} to {file.wave[-1]:.2f} Angstrom, resampled to the "
            f"{len(model.wave)} of the model",
            highlight=False,
        )
    scale = config.scale == "always"
    if config.scale == "auto":
        scale = needs_scaling(application, file.read(0, min(SCALE_SAMPLE, file.n_stars)))
    application = application._replace(scale=scale)
    if scale:
        console.print(f"{config.spectra}: each spectrum is scaled to the median of the training spectra", highlight=False)
    if not file.has_errors:
        console.print(f"{config.spectra}: neither errors nor ivar; those of the training stars stand in", highlight=False)
    if not len(np.asarray(application.uncertainty.calibration.levels)):
        console.print(f"{config.model}: not calibrated; uncertainty is the standard deviation of the model", highlight=False)
    flags: Counter[str] = Counter()
    masked = 0
    with open_catalogue(config.output) as catalogue, stages.chunks("predicted", file.n_stars) as advance:
        for start in range(0, file.n_stars, config.chunk_stars):
            stop = min(start + config.chunk_stars, file.n_stars)
            part = _apply(application, file.read(start, stop), start, min(config.chunk_stars, file.n_stars))
            catalogue.write(part)
            flags.update(flag for row in part["flags"] for flag in row.split("|") if flag)
            masked += int(part["n_masked"].sum())
            advance(stop - start)
    console.print(f"{config.output}: {file.n_stars:,} stars, {masked:,} masked pixels", highlight=False)
    for flag, count in flags.items():
        console.print(f"{flag}: {count:,} stars", highlight=False)


def _apply(application: Application, spectra: MaskedSpectra, start: int, chunk_stars: int) -> pd.DataFrame:
    """``apply_model`` on a whole chunk, so that the last one shares the compiled programs of the others."""
    n_stars = len(spectra.flux)
    pad = ((0, chunk_stars - n_stars), (0, 0))
    return apply_model(application, MaskedSpectra(*(np.pad(array, pad, mode="edge") for array in spectra)), start)[:n_stars]


if __name__ == "__main__":
    run_command(main, PredictConfig, __doc__)
