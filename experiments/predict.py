"""Predicts log g of the stars in a file with a trained model.

    python -m experiments.predict MODEL SPECTRA.h5 -o OUT.csv
    python -m experiments.predict results/regress_gate/default/model night1.fits 'spec-*.fits' --air -o stars.parquet

MODEL is the folder ``model`` that regress_gate wrote. SPECTRA are files of noisy spectra as observed: HDF5, FITS tables and
images, CSV and other text (``moe_jax.spectra.spectrum_files`` says how names and units are found). Wavelengths are in vacuum;
with --air, in air. Other pixels than the model's are resampled. OUT ends in .csv, .parquet or .fits. FITS and Parquet need
pip install -e '.[astro]'.

OUT has one row for each star, with these columns (NaN where nothing is predicted; without those from velocity to outside_cells
where the mixture or the local experts answer):

    file               name of the file; its path where another has the same name
    star               number of the star in the file, from 0
    log_g              surface gravity, log10 of cm / s^2: of the fit of the model grid, or of the mixture (--answer)
    uncertainty        half-width of the 68 % interval; standard deviation of an answer that is not calibrated
    half_width_90      half-width of the 90 % interval
    half_width_95      likewise of the 95 % interval
    velocity           km/s, as observed (not barycentric); positive: the star recedes
    T_eff, M_H, a_M    effective temperature (K), metallicity, alpha enhancement; these and velocity with NAME_error (1 sigma)
    chi2               of the fit, per degree of freedom; the uncertainties are scaled to it
    cool               1 below 4,250 K, where molecules matter that the grid does not have; else 0
    outside_cells      probability that the star lies outside the mixture's nine cells of T_eff and [M/H]
    mixture_log_g      log g of the mixture of experts, which trusts velocity, continuum and resolution of the spectrum
    mixture_uncertainty  half-width of its 68 % interval
    weight_0 to 8      weight of each expert in the mixture; they sum to 1
    distance           distance from the training stars in feature space, in units of the limit for unlike_training
    n_masked           pixels of the model that are masked in the file, not reached by the spectrum, or stand out
    flags              names of what is unusual, joined by |:
      poor_fit           a misfit that leaves log g uncertain by more than 0.5, or drove a label to the edge of the grid,
                         lines broader than the fit knows (a resolution below 1,777), or chi2 above 100
      blended            a second star in the spectrum, also at another velocity, describes the residuals; log g is wrong
      outside_cells      it is sure (99.9 %) that the star lies outside the mixture's cells; log g is that of the fit
      emission_lines     three or more lines in emission; they were masked
      velocity_uncertain another velocity fits almost as well
      not_a_star         no spectrum of the grid is seen
      unlike_training    of a mixture's answer: distance above 1; only 0.1 % of the training stars are further out
      many_masked        more than 10 % of the model's pixels, or of those of one line, are masked in the file or not reached
      not_predicted      more than half of the pixels are masked, the spectrum has no positive median to scale by, or the fit
                         is given errors below 1e-7 or above 100 times the flux
"""

from __future__ import annotations

import glob
import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import pandas as pd
import tyro

from experiments.runner.command_line import require_at_least, run_command
from experiments.runner.stages import Stages, console
from moe_jax.apply import Model, load_model
from moe_jax.apply.application import SAME_WAVE, Application, apply_model, needs_scaling, prepare_application
from moe_jax.apply.catalogue import open_catalogue, require_suffix
from moe_jax.apply.robust import fit_robustly
from moe_jax.core.arrays import InputError
from moe_jax.core.parallel import one_ahead
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.resample import MaskedSpectra, air_to_vacuum
from moe_jax.spectra.spectrum_files import Source, open_spectra

SCALE_SAMPLE = 512  # stars, from the first on, by which --scale auto decides


@dataclass(frozen=True)
class PredictConfig:
    """What is predicted, with what, and where it goes."""

    model: tyro.conf.Positional[Path]
    """Folder of a model that regress_gate wrote."""
    spectra: tyro.conf.Positional[tuple[Path, ...]]
    """Files of observed spectra; a pattern in quotation marks stands for all that match it."""
    output: Annotated[Path, tyro.conf.arg(aliases=["-o"])]
    """Table to write: .csv, .parquet or .fits."""
    scale: Literal["auto", "always", "never"] = "auto"
    """Scale each spectrum to the median of the training spectra; auto: if the spectra of the file lie on another scale."""
    answer: Literal["auto", "fit", "mixture", "local"] = "auto"
    """Whose log g is given: that of the fit of the model grid, that of the mixture, or that of the local linear experts, which are
    as fast as the mixture; auto: the fit's if the model was trained on simulated spectra."""
    air: bool = False
    """The wavelengths of the files are in air."""
    resolution: float | None = None
    """Resolution of the spectra, if it is not that of the model. Sharper ones are degraded to it. Below it only the fit answers,
    which finds by itself how blurred they are."""
    plots: str = ""
    """Stars of each file whose fit is drawn, in the folder OUT_plots: 5 for the first five, or their numbers, as in 3,17 or 3,."""
    chunk_stars: int = 512
    """Stars in memory at a time."""

    def __post_init__(self) -> None:
        require_at_least(self, chunk_stars=1)
        if not self.spectra:
            raise InputError("spectra: found no file, expected at least one")
        if self.plots and not all(part.strip().isdecimal() for part in self.plots.removesuffix(",").split(",")):
            raise InputError(f"plots: found {self.plots!r}, expected a number of stars, or their numbers, as in 3,17 or 3,")

    def drawn(self, start: int, stop: int) -> list[int]:
        """Which of the stars ``start`` to ``stop - 1`` of a file are drawn."""
        if "," in self.plots:
            return [star for star in map(int, self.plots.removesuffix(",").split(",")) if start <= star < stop]
        return list(range(start, min(stop, int(self.plots or 0))))


def main(config: PredictConfig) -> None:
    """Predicts file by file and chunk by chunk, and prints how the spectra were treated and which flags were raised."""
    stages = Stages()
    require_suffix(config.output)
    model = load_model(config.model)
    if model.uncertainty is None:
        raise InputError(f"{config.model}: the model has no uncertainties, expected one that a present version has written")
    answering = model.local if config.answer == "local" and model.local is not None else model.uncertainty
    if not len(np.asarray(answering.calibration.levels)):
        console.print(f"{config.model}: not calibrated; uncertainty is the standard deviation of the model")
    paths = [path for given in config.spectra for path in files_of(given)]
    places = [os.path.realpath(path) for path in paths]
    if os.path.realpath(config.output) in places:
        raise InputError(f"{config.output}: found that it is a file of spectra too, expected another name for the table")
    if twice := next((path for path, place in zip(paths, places, strict=True) if places.count(place) > 1), None):
        raise InputError(f"{twice}: found it twice among the files of spectra, expected it once")
    for path in paths:  # one that cannot be opened is named before the work, not after most of it
        open_spectra(path)
    flags: Counter[str] = Counter()
    n_stars = masked = drawn = 0
    with open_catalogue(config.output) as add_rows:
        for path, (name, figures) in zip(paths, short_names(paths), strict=True):
            star = 0
            for source in open_spectra(path):
                application = _prepare(config, model, path, source, quiet=star > 0)
                chunk = min(config.chunk_stars, source.n_stars)
                with stages.chunks(path.name, source.n_stars) as advance:
                    starts = range(0, source.n_stars, chunk)
                    for start, spectra in one_ahead((i, source.read(i, min(i + chunk, source.n_stars))) for i in starts):
                        part = apply_model(application, spectra, star + start, chunk)
                        drawn += _draw(config, application, spectra, part, figures)
                        part.insert(0, "file", name)
                        add_rows(part)
                        flags.update(flag for row in part["flags"] for flag in row.split("|") if flag)
                        masked += int(part["n_masked"].sum())
                        advance(len(part))
                star += source.n_stars
            n_stars += star
    console.print(f"{config.output}: {n_stars:,} stars, {masked:,} masked pixels")
    for flag, count in flags.items():
        console.print(f"{flag}: {count:,} stars")
    if config.plots and not drawn:
        console.print(f"--plots {config.plots}: no file has such a star")


def _draw(config: PredictConfig, application: Application, spectra: MaskedSpectra, table: pd.DataFrame, name: str) -> int:
    """Writes the figures of the stars that are asked for, among those of a table; returns how many were asked for."""
    first = int(table["star"].iloc[0])
    wanted = config.drawn(first, first + len(table))
    if not wanted:
        return 0
    from experiments.report.figures import plot_fit, save_figure  # takes a moment, and most runs draw nothing

    folder = config.output.with_name(f"{config.output.stem}_plots")
    folder.mkdir(parents=True, exist_ok=True)
    rows = np.array(wanted) - first
    fit = fit_robustly(MaskedSpectra(*(array[rows] for array in spectra)), application.wave, resolution=application.resolution)
    for i, (star, row) in enumerate(zip(wanted, rows, strict=True)):
        if fit.fitted[i]:
            answer = table.iloc[row]
            title = f"{name}, star {star}: log g {answer['log_g']:.2f} +- {answer['uncertainty']:.2f}  {answer['flags']}"
            figure = plot_fit(WAVE, fit.flux[i], fit.flux_error[i], fit.model[i], fit.used[i], title)
            save_figure(figure, folder / f"{name}_{star}.png", pdf=False, dpi=100)
    console.print(f"{folder}: {int(fit.fitted.sum())} figures of {name}")
    return len(wanted)


def short_names(paths: Sequence[Path]) -> list[tuple[str, str]]:
    """What each file is called in the table, and in figures: by its name, or by its path where another file has the same name."""
    names, stems = (Counter(kind) for kind in ([path.name for path in paths], [path.stem for path in paths]))
    in_table = [path.name if names[path.name] == 1 else str(path) for path in paths]
    in_figures = [path.stem if stems[path.stem] == 1 else str(path).strip(os.sep).replace(os.sep, "_") for path in paths]
    return list(zip(in_table, in_figures, strict=True))


def files_of(given: Path) -> list[Path]:
    """A file, or those that match a pattern, by name.

    Raises:
        InputError: where nothing matches.
    """
    if given.exists() or not glob.has_magic(str(given)):
        return [given]
    paths = sorted(Path(given.anchor).glob(str(given.relative_to(given.anchor))))
    if not paths:
        raise InputError(f"{given}: found no file of such a name, expected at least one")
    return paths


def _prepare(config: PredictConfig, model: Model, path: Path, source: Source, quiet: bool) -> Application:
    """The model ready for the spectra of a source; says once a file how these are treated."""
    wave = air_to_vacuum(source.wave) if config.air else source.wave
    application = prepare_application(model, wave, str(path), None if config.answer == "auto" else config.answer, config.resolution)
    scale = config.scale == "always"
    if config.scale == "auto":
        scale = needs_scaling(application, source.read(0, min(SCALE_SAMPLE, source.n_stars)))
    notes = []
    if application.resolution > model.resolution:
        notes.append(f"resolution {application.resolution:g}, degraded to the {model.resolution:g} of the model")
    elif application.blurred:
        notes.append(f"resolution {application.resolution:g}; the mixture knows {model.resolution:g} only: its columns are empty")
    if len(wave) != len(model.wave) or not np.allclose(wave, model.wave, rtol=0, atol=SAME_WAVE):
        notes.append(
            f"{len(wave)} pixels from {wave[0]:.2f} to {wave[-1]:.2f} Angstrom, resampled to the {len(model.wave)} of the model"
        )
    if scale:
        notes.append("each spectrum is scaled to the median of the training spectra")
    if not source.has_errors:
        notes.append("neither errors nor ivar; those of the training stars stand in")
    for note in notes * (not quiet):
        console.print(f"{path}: {note}")
    return application._replace(scale=scale)


if __name__ == "__main__":
    run_command(main, PredictConfig, __doc__)
