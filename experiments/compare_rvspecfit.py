"""Is fit_labels as accurate as rvspecfit, which surveys use, on the same stars and the same grid, and how fast is either?

    pip install -e '.[rvspecfit]'
    python -m experiments.compare_rvspecfit                  some 20 minutes on 2 cores
    python -m experiments.compare_rvspecfit --preset smoke   four stars

Both fit T_eff, log g, [M/H], [alpha/M], the velocity and a continuum of five terms, with no broadening and no prior. rvspecfit
interpolates in the grid as it does by itself, or calls the grid's own splines. Results go to results/compare_rvspecfit/PRESET.
"""

from __future__ import annotations

import contextlib
import importlib.util
import io
import logging
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd
from threadpoolctl import threadpool_limits

from experiments.pipeline.config import OutputOptions, StudyConfig, draw_keys
from experiments.pipeline.spoilings import LIGHT, Exposure, shift
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, require_positive, require_seed, run_command
from experiments.runner.stages import Stages
from experiments.timing.rvs_peer import NODES, SPLINES, chi2_of, fit_star, write_library
from moe_jax.spectra import add_noise, fit_labels, simulate_survey
from moe_jax.spectra.fisher import LABEL_UNITS
from moe_jax.spectra.pixels import WAVE

OURS = "fit_labels"
PEERS = {"rvspecfit, linear between nodes": NODES, "rvspecfit, the grid's splines": SPLINES}
MISSING = "rvspecfit is not installed, so its rows are left out; the extra `rvspecfit` has it."
N_TERMS = 5
SEARCH = 600.0  # km/s, in which both look for the velocity
_BLUEST, _REDDEST = WAVE[0] * (1 + 1.05 * SEARCH / LIGHT), WAVE[-1] * (1 - 1.05 * SEARCH / LIGHT)  # in the grid at each of these
SEEN = (WAVE >= _BLUEST) & (WAVE <= _REDDEST)
PART = 64  # stars that each method fits before the next one's turn
COLUMNS = (*LABEL_UNITS, "velocity")
PARTS = {"rms": "Rms of the errors", "median": "Median size of the errors", "coverage": "Share of errors within 1 sigma"}


@dataclass(frozen=True)
class RvsConfig(StudyConfig):
    """The comparison."""

    n_stars: int = 192
    """Stars of each noise level; their labels are uniform, their velocities within 200 km/s."""
    noise_levels: tuple[float, ...] = (0.2, 1.0)
    """Factors on the errors."""
    seed: int = 0
    """Seed of stars and noise."""
    output: OutputOptions = group(OutputOptions(), without=("cache_dir", "use_cache"))

    def __post_init__(self) -> None:
        require_at_least(self, n_stars=1)
        require_positive(self, "noise_levels")
        require_seed(self, "seed")


PRESETS = {"default": RvsConfig(), "smoke": RvsConfig(preset="smoke", n_stars=4, noise_levels=(0.2,))}

Method = Callable[[np.ndarray, np.ndarray], np.ndarray]
"""From flux and error (N, P) to labels and velocity, their five standard deviations, and 1 where all is well: (N, 11)."""


def fit_ours(flux: np.ndarray, error: np.ndarray) -> np.ndarray:
    """``fit_labels``."""
    fit = fit_labels(flux, error, np.broadcast_to(SEEN, flux.shape), n_continuum=N_TERMS, broadening=False)
    sigma = np.sqrt(np.einsum("nii->ni", np.asarray(fit.covariance)))
    return np.column_stack([fit.labels, fit.velocity, sigma, fit.velocity_error, fit.converged])


def seen(flux: np.ndarray, error: np.ndarray) -> list[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Wavelengths, flux and error of each star, where it is seen."""
    return [(WAVE[SEEN], *star) for star in zip(flux[:, SEEN], error[:, SEEN], strict=True)]


def draw_stars(config: RvsConfig, noise_level: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Noisy flux and error (N, P), labels and velocity (N, 5)."""
    keys = draw_keys(config.seed)
    survey = simulate_survey(keys.test, config.n_stars, label_sampling="uniform")
    velocity = np.random.default_rng(config.seed).uniform(-200, 200, config.n_stars)
    error = np.asarray(survey.error)
    flux = shift(Exposure(np.asarray(survey.flux), error, error), velocity).flux.astype(np.float32)
    truth = np.column_stack([*(np.asarray(getattr(survey.labels, name)) for name in LABEL_UNITS), velocity])
    return np.asarray(add_noise(keys.test_noise, flux, error, noise_level)), np.float32(noise_level) * error, truth


def score(fits: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Failures, and of each column the rms, the median size and the coverage of 1 sigma of the errors, of stars with an answer."""
    answered = np.isfinite(fits[:, :5]).all(axis=1)
    size, sigma = np.abs(fits[:, :5] - truth)[answered], fits[answered, 5:10]
    parts = dict(
        zip(PARTS, (np.sqrt(np.mean(size**2, axis=0)), np.median(size, axis=0), np.mean(size <= sigma, axis=0)), strict=True)
    )
    columns = {f"{part}_{name}": value for part, values in parts.items() for name, value in zip(COLUMNS, values, strict=True)}
    return {"failed": float(np.mean(fits[:, 10] * answered == 0))} | columns


def fit_in_turns(
    methods: dict[str, Method], flux: np.ndarray, error: np.ndarray
) -> tuple[dict[str, np.ndarray], dict[str, dict[str, float]]]:
    """The fits of each method and its seconds; the methods take turns, after a first call that is timed apart."""
    parts: dict[str, list[np.ndarray]] = {name: [] for name in methods}
    times = {}
    for name, fit in methods.items():
        n_first = PART if name == OURS else 1  # rvspecfit compiles nothing, but reads its library
        start = time.perf_counter()
        fit(flux[:n_first], error[:n_first])
        times[name] = {"seconds": 0.0, "cpu_seconds": 0.0, "first_call": time.perf_counter() - start}
    for begin in range(0, len(flux), PART):
        for name, fit in methods.items():
            start, cpu = time.perf_counter(), time.process_time()
            parts[name].append(fit(flux[begin : begin + PART], error[begin : begin + PART]))
            times[name]["seconds"] += (time.perf_counter() - start) / len(flux)
            times[name]["cpu_seconds"] += (time.process_time() - cpu) / len(flux)
    return {name: np.concatenate(fits) for name, fits in parts.items()}, times


def compute(config: RvsConfig, stages: Stages) -> Results:
    """Fits all stars by all methods."""
    methods: dict[str, Method] = {OURS: fit_ours}
    rows, library = [], None
    with tempfile.TemporaryDirectory() as folder, threadpool_limits(1, "blas"):
        if importlib.util.find_spec("rvspecfit"):
            logging.getLogger().setLevel(logging.ERROR)
            with stages("library"), contextlib.redirect_stdout(io.StringIO()):
                library = write_library(Path(folder), SEARCH)
            for name, setup in PEERS.items():
                methods[name] = lambda *data, setup=setup: np.array([fit_star(setup, s, N_TERMS, library) for s in seen(*data)])
        for level in config.noise_levels:
            with stages(f"noise {level:g}"):
                flux, error, truth = draw_stars(config, level)
                fits, times = fit_in_turns(methods, flux, error)
                worse = dict.fromkeys(methods, np.nan)
                if library is not None:
                    stars = seen(flux, error)
                    chi2 = [[chi2_of(x, s, N_TERMS, library) for x, s in zip(f[:, :5], stars, strict=True)] for f in fits.values()]
                    worse = dict(zip(methods, np.mean(np.array(chi2) > np.nanmin(chi2, axis=0) + 1, axis=1), strict=True))
            for name in methods:
                row = {"noise_level": level, "method": name, "worse": worse[name]}
                rows.append({**row, **times[name], **score(fits[name], truth)})
    table = pd.DataFrame(rows)
    setup = (
        f"{config.n_stars} stars a noise level, with uniform labels and velocities within 200 km/s; both search {SEARCH:g} km/s "
        f"and see the {SEEN.sum():,} pixels that are in the grid at all of these. rvspecfit has its default configuration and one "
        "thread, and its cross-correlation starts its fit. worse: share of stars where chi2, of the grid's splines, is more than "
        "1 above that of another row. failed: no answer, no convergence or no errors. Seconds are those of a star, the methods in "
        "turns on one machine; CPU seconds are those of all threads."
    )
    formats = {"noise_level": "g"} | dict.fromkeys([*table.columns[2:6], "failed", *COLUMNS], ".3g")
    sections = [setup, table_markdown(table[[*table.columns[:6], "failed"]], formats)]
    for part, title in PARTS.items():
        shown = table[["noise_level", "method"]].assign(**{name: table[f"{part}_{name}"] for name in COLUMNS})
        sections += [f"## {title}", table_markdown(shown, formats)]
    return Results("Beside rvspecfit", sections + ([MISSING] if library is None else []), {"fits": table})


main = Study("compare_rvspecfit", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
