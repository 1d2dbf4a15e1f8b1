"""Does predict hold on spectra unlike its training set? Spoiled simulated stars, and real ones if a file is given.

    python -m experiments.stress_predict                  about a minute on 2 cores
    python -m experiments.stress_predict --preset smoke   fewer stars
    python -m experiments.stress_predict --real-stars stars.h5 --real-labels labels.csv

Every case is one way to spoil the spectra of the same covered stars (``experiments.pipeline.spoilings``). A case is handled if
at least 95 % of its stars are flagged, or if the stars without a flag have an rms of at most 1.35 times that of untouched spectra
and 68 % intervals that cover .58 to .80 of them. For the other cases the report says how many stars a
flag could see at most. Results go to results/stress_predict/PRESET.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import jax
import numpy as np
import pandas as pd
import scipy

from experiments.pipeline.config import OutputOptions, StudyConfig
from experiments.pipeline.spoilings import LATER, SPOILINGS, TRIED, Exposure, Spoiling, disturb
from experiments.report.figures import BLUE, ORANGE, Figure, new_figure
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, require_positive, require_seed, run_command
from experiments.runner.stages import Stages, console
from moe_jax.apply import Model, load_model
from moe_jax.apply.application import Application, apply_model, needs_scaling, prepare_application
from moe_jax.apply.conformal import LEVELS
from moe_jax.apply.robust import BROADEST, LIMITS, QUANTILES, SCALES, fit_robustly
from moe_jax.core.arrays import InputError
from moe_jax.experts.cells import assign_cells
from moe_jax.spectra.label_fit import fit_labels
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.resample import MaskedSpectra
from moe_jax.spectra.simulate import SimulatedSpectra
from moe_jax.spectra.survey import add_noise
from moe_jax.spectra.telescope_file import TelescopeFile, mask_unusable

MOST_RMS = 1.35  # times that of untouched spectra
COVERAGES = (0.58, 0.80)
ENOUGH_FLAGGED = 0.95
FALSE_ALARMS = 0.005  # share of good spectra that all flags together may be raised for


@dataclass(frozen=True)
class StressConfig(StudyConfig):
    """What is spoiled, and by which model it is predicted."""

    model: Path = Path("results/regress_gate/default/model")
    """Folder of a model that regress_gate wrote."""
    n_stars: int = 500
    """Covered stars of each case."""
    noise_level: float = 0.2
    """Factor on the errors."""
    seed: int = 0
    """Seed of stars, noise and spoilings."""
    real_stars: Path | None = None
    """File of observed spectra."""
    real_labels: Path | None = None
    """CSV file with their log_g, row by row."""
    output: OutputOptions = group(OutputOptions(), without=("cache_dir", "use_cache"))

    def __post_init__(self) -> None:
        require_at_least(self, n_stars=10)
        require_positive(self, "noise_level")
        require_seed(self, "seed")
        if (self.real_stars is None) != (self.real_labels is None):
            raise InputError("one of real_stars and real_labels was given, expected both or none")


PRESETS = {"default": StressConfig(), "smoke": StressConfig("smoke", n_stars=100)}


def draw_exposure(config: StressConfig) -> tuple[Exposure, np.ndarray]:
    """Covered stars, and their log g."""
    key_stars, key_noise = jax.random.split(jax.random.fold_in(jax.random.key(config.seed), 16))
    stars = SimulatedSpectra(key_stars, config.n_stars * 3 // 2 + 20)
    flux, error = stars.read(0, stars.n_stars)
    noisy = add_noise(key_noise, flux, error, config.noise_level)
    covered = np.flatnonzero(np.asarray(assign_cells(stars.labels.T_eff, stars.labels.M_H)) >= 0)[: config.n_stars]
    exposure = Exposure(*(np.asarray(array, np.float64)[covered] for array in (flux, noisy - flux, config.noise_level * error)))
    return exposure, np.asarray(stars.labels.log_g)[covered]


def as_file(exposure: Exposure) -> MaskedSpectra:
    """The spectra as the reader of files gives them."""
    return mask_unusable(exposure.flux + exposure.noise, np.broadcast_to(exposure.error, exposure.flux.shape))


def predict(application: Application, spectra: MaskedSpectra) -> pd.DataFrame:
    """As the command does."""
    return apply_model(application._replace(scale=needs_scaling(application, spectra)), spectra)


def score(name: str, table: pd.DataFrame, log_g: np.ndarray) -> dict[str, str | float]:
    """How many stars are flagged, and how well the others are predicted."""
    kept = (table["flags"] == "").to_numpy()
    residual = table["log_g"].to_numpy()[kept] - log_g[kept]
    row = {"case": name, "flagged": 1 - kept.mean(), "rms": np.nan, "coverage": np.nan}
    if kept.any():
        row |= {"rms": np.sqrt(np.mean(residual**2)), "coverage": np.mean(np.abs(residual) <= table["uncertainty"][kept])}
    return row


def judge(table: pd.DataFrame) -> pd.DataFrame:
    """The table of ``score`` with a column of verdicts; the first row is that of untouched spectra."""
    held = (table["rms"] <= MOST_RMS * table["rms"].iloc[0]) & table["coverage"].between(*COVERAGES)
    return table.assign(handled=np.where(held | (table["flagged"] >= ENOUGH_FLAGGED), "yes", "no"))


def most_flagged(spoiled: Exposure, log_g: np.ndarray) -> tuple[float, float]:
    """How many stars of a case a flag can see at most that is raised for ``FALSE_ALARMS`` of good spectra of each kind of star.

    A good spectrum is one that the fit can make, of a star in the cells and without too broad lines. The noise-free spoiled
    spectrum lies sqrt(d) standard deviations of the noise from the nearest one that the fit can make, where d is its chi2. If the
    nearest one is good, to tell these two apart is the easiest task: no test does it with a higher probability than
    Phi(sqrt(d) - z) (Neyman & Pearson 1933). If not, the star counts as seen. The errors are taken to be those of the noise.

    Returns:
        The mean of these probabilities, and the rms of the error in log g, without noise, of the stars that such a flag misses.
    """
    error = np.broadcast_to(spoiled.error, spoiled.flux.shape)
    fit = fit_labels(spoiled.flux.astype(np.float32), error.astype(np.float32))
    distance = np.sqrt(np.nansum(((spoiled.flux - fit.flux) / error) ** 2, axis=1))
    seen = scipy.special.ndtr(distance - scipy.special.ndtri(1 - FALSE_ALARMS))
    outside = assign_cells(fit.labels[:, 0], fit.labels[:, 2]) < 0  # also where no fit is found
    seen[outside | (fit.broadening >= BROADEST)] = 1.0  # the nearest spectrum is itself one that is flagged
    square = np.nan_to_num(fit.labels[:, 1] - log_g) ** 2
    return float(seen.mean()), float(np.sqrt(np.sum((1 - seen) * square) / max(np.sum(1 - seen), 1e-30)))


def read_real_stars(config: StressConfig, model: Model) -> tuple[Application, MaskedSpectra, pd.DataFrame] | None:
    """The model ready for the observed spectra, these spectra, and their labels; None where no file was given.

    Raises:
        InputError: unless there is a log g for each spectrum.
    """
    if config.real_stars is None or config.real_labels is None:
        return None
    file, labels = TelescopeFile(config.real_stars), pd.read_csv(config.real_labels)
    if "log_g" not in labels or len(labels) != file.n_stars:
        found = f"{len(labels)} rows of {', '.join(labels.columns)}"
        raise InputError(f"{config.real_labels}: found {found}, expected the log_g of {file.n_stars} stars")
    return prepare_application(model, file.wave, str(config.real_stars)), file.read(0, file.n_stars), labels


def calibrate_fit(config: StressConfig) -> pd.DataFrame:
    """What the constants of ``moe_jax.apply.robust`` are taken from, with other stars than those of the cases.

    Quantiles of |error| / standard deviation on stars that are disturbed as ordinary spectra are, and the chi2 that few of the
    untouched ones exceed.
    """
    exposure, log_g = draw_exposure(dataclasses.replace(config, seed=config.seed + 1_000))
    rng = np.random.default_rng(config.seed + 1_000)
    fit = fit_robustly(as_file(disturb(rng, exposure)), WAVE)
    score = np.abs(fit.labels[:, 1] - log_g) / fit.error[:, 1]
    rows = [(f"error / sigma, {level:.0%}", np.quantile(score, level), used) for level, used in zip(LEVELS, QUANTILES, strict=True)]
    untouched = fit_robustly(as_file(exposure), WAVE).scale_chi2
    rows += [
        (f"chi2 over {scale} pixels, 99.7 %", np.quantile(untouched[:, i], 0.997), LIMITS[i]) for i, scale in enumerate(SCALES)
    ]
    return pd.DataFrame(rows, columns=["quantity", "found", "used"])


def compute(config: StressConfig, stages: Stages) -> Results:
    """Spoils, predicts and judges, case by case."""
    model = load_model(config.model)
    application, real_stars = prepare_application(model, model.wave), read_real_stars(config, model)
    with stages("stars"):
        exposure, log_g = draw_exposure(config)
    cases: dict[str, Spoiling] = SPOILINGS | LATER | TRIED

    def spoiled(name: str) -> Exposure:
        return cases[name](np.random.default_rng([config.seed, list(cases).index(name)]), exposure)

    with stages("cases"):
        table = judge(pd.DataFrame([score(name, predict(application, as_file(spoiled(name))), log_g) for name in cases]))
    limits = table.loc[table["handled"] == "no", ["case", "flagged"]]
    with stages("limits"):
        limits[["most", "bias"]] = np.reshape([most_flagged(spoiled(name), log_g) for name in limits["case"]], (-1, 2))
    with stages("calibration"):
        tables = {"cases": table, "calibration": calibrate_fit(config), "limits": limits}
    n_handled = int((table["handled"][1:] == "yes").sum())
    summary = f"{n_handled} of {len(table) - 1} cases are handled"
    shape = {"flagged": ".1%", "rms": ".3f", "coverage": ".2f"}
    sections = [
        f"{len(log_g):,} covered stars, noise level {config.noise_level:g}, seed {config.seed}; {summary}.",
        table_markdown(table, shape),
        f"*flagged*: stars with a flag; *rms* of log g and *coverage* of the 68 % intervals: of the stars without one. *handled*: "
        f"{ENOUGH_FLAGGED:.0%} flagged, or rms at most {MOST_RMS:g} of the first row and coverage {COVERAGES[0]} to "
        f"{COVERAGES[1]}. The {len(LATER)} cases before the last {len(TRIED)} were chosen when the method was finished. "
        f"The last {len(TRIED)} were tried later; none was handled before the method was changed for six of them.",
        "![Cases](cases.png)",
        "## What no flag can see",
        table_markdown(tables["limits"], {"flagged": ".1%", "most": ".1%", "bias": ".2f"}),
        "The cases that are not handled. *most*: of these stars, no flag can be raised for more if it is raised for "
        f"{FALSE_ALARMS:.1%} of the good spectra of each kind of star in the cells, even if it knew how each was spoiled. The "
        "noise hides the difference from a spectrum that such a star can have (Neyman & Pearson 1933). *bias*: rms error of log g, "
        "without any noise, of the stars that such a flag misses.",
        "## Calibration",
        table_markdown(tables["calibration"], {"found": ".3f", "used": ".2f"}),
        "*found*: with other simulated stars, disturbed as ordinary spectra are (`experiments.pipeline.spoilings.disturb`) or, for "
        "chi2, untouched; *used*: by `moe_jax.apply.robust`.",
    ]
    if real_stars is not None:
        application, spectra, labels = real_stars
        answers = predict(application, spectra)
        tables["real_stars"] = pd.concat([labels.add_prefix("literature_"), answers], axis=1)
        real = score("real stars", answers, labels["log_g"].to_numpy())
        sections.insert(3, f"Real stars: {real['flagged']:.0%} flagged, rms {real['rms']:.2f}, coverage {real['coverage']:.2f}.")
        console.print(sections[3])
    console.print(table.to_string(index=False, float_format="%.3f"))
    console.print(summary)
    return Results("Does predict hold on spectra unlike its training set?", sections, tables, {"cases": plot_cases(table)})


def plot_cases(table: pd.DataFrame) -> Figure:
    """Share of flagged stars, and rms of the others, case by case."""
    figure, axes = new_figure(1, 2, figsize=(9, 7), sharey=True)
    position = np.arange(len(table))[::-1]
    colors = [BLUE if handled == "yes" else ORANGE for handled in table["handled"]]
    axes[0].barh(position, table["flagged"], color=colors)
    axes[0].set_yticks(position, table["case"])
    axes[0].set_xlabel("share flagged")
    axes[1].scatter(table["rms"], position, c=colors)
    axes[1].axvline(MOST_RMS * table["rms"].iloc[0], color="k", lw=0.8)
    axes[1].set_xlabel("rms of log g, not flagged; line: the limit")
    axes[1].set_xscale("log")
    axes[1].set_xticks([0.2, 0.3, 0.5, 0.8], ["0.2", "0.3", "0.5", "0.8"])
    axes[1].set_xticks([], minor=True)
    axes[0].set_ylim(-0.8, len(table) - 0.2)
    return figure


main = Study("stress_predict", PRESETS, compute)

if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
