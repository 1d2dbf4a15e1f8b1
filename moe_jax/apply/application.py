"""Applies a model to spectra as a telescope gives them: other pixels, another scale, masked pixels, unusual stars.

The answer comes from the fit of the model grid (``moe_jax.apply.robust``), which knows of velocities, continua, resolutions and
bad pixels. A model that was trained on other spectra than those of the grid answers itself. Its mixture is in the table in
either case. The steps to it, in this order: resample to the model's pixels with the flux conserved, where the wavelengths
differ; scale to the median of the training spectra, if asked to; fill masked pixels from the good ones; predict; flag.

A training spectrum was scaled by the median of its noise-free flux. A telescope spectrum can only be scaled by the median of
its noisy flux, which differs by a few tenths of a per cent, and ridge experts respond to the difference. Its standard deviation
is therefore part of a scaled star's uncertainty. Spectra that are on the scale of the training spectra are best left as they are.
"""

from __future__ import annotations

from typing import Any, Literal, NamedTuple

import jax.numpy as jnp
import numpy as np
import pandas as pd
import scipy
from jaxtyping import Bool, Float

from moe_jax.apply.conformal import LEVELS
from moe_jax.apply.model import MixturePrediction, Model, Uncertainty, predict_model, with_variance
from moe_jax.apply.robust import COOL, LEAST_RESOLUTION, QUANTILES, RobustFit, fit_robustly
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.gates.features import LINE_WINDOWS, SIDEBAND
from moe_jax.spectra.broadening import broadening_width
from moe_jax.spectra.resample import LEAST_OVERLAP, MaskedSpectra, good_medians, overlaps, pixel_edges, resample

UNLIKE_TRAINING, MANY_MASKED, NOT_PREDICTED = "unlike_training", "many_masked", "not_predicted"
MANY = 0.1  # a star is flagged if a larger part of its pixels, or of those in one line window, is masked
TOO_MANY = 0.5  # nothing is predicted if a larger part of a star's pixels is masked
SAME_WAVE = 1e-3  # Angstrom; wavelengths that differ by less count as the same
SAME_RESOLUTION = 0.98  # resolutions that differ by less than 2 % count as the same
SAME_SCALE = 0.02  # spectra are on the training scale if their typical median differs by less than this part, and ...
SCALE_SCATTER = 0.1  # ... the medians of more than half of them differ by less than this part
MEDIAN_ERROR = 1.2533  # standard deviation of a median in units of that of the mean, for normal errors: sqrt(pi / 2)


Answer = Literal["fit", "mixture", "local"]


class Application(NamedTuple):
    """A model that is ready for spectra on given wavelengths."""

    model: Model
    uncertainty: Uncertainty  #: that of the model, which is not None
    overlap: scipy.sparse.csr_matrix | None  #: see ``overlaps``; None where the wavelengths are those of the model
    wave: Float[np.ndarray, " Q"]  #: wavelengths of the spectra
    answer: Answer  #: what the column log_g holds
    resolution: float  #: of the spectra
    scale: bool = False  #: whether each spectrum is scaled to the median of the training spectra

    @property
    def blurred(self) -> bool:
        """Whether the spectra are more blurred than those that the mixture knows."""
        return self.resolution < SAME_RESOLUTION * self.model.resolution


def prepare_application(
    model: Model, wave: Float[AnyArray, " Q"], source: str = "wave", answer: Answer | None = None, resolution: float | None = None
) -> Application:
    """Checks that a model fits the wavelengths of spectra, and sets up the resampling where its own differ.

    Args:
        model: a model with uncertainties.
        wave: increasing vacuum wavelengths of the spectra, Angstrom.
        source: name of the file or argument in error messages.
        answer: whether log g is that of the fit of the model grid, that of the mixture, or that of the model's local linear
            experts. By default it is the fit's if the model was trained on simulated spectra, which are made from this grid.
        resolution: of the spectra, if it is not that of the model. Sharper spectra are degraded to it.

    Raises:
        InputError: for a model without uncertainties, wavelengths that cover less than half of the model's pixels or no
            pixel of a line, or a resolution that is lower than any at which the answer was trained.
    """
    model = model if answer == "local" else model._replace(local=None)  # its local experts are not asked
    if model.uncertainty is None:
        raise InputError("the model has no uncertainties, expected one that a present version of regress_gate has written")
    if answer == "local" and model.local is None:
        raise InputError("the model has no local linear experts, expected one that a present version of regress_gate has written")
    wave, target = np.asarray(wave, np.float64), np.asarray(model.wave, np.float64)
    data = model.provenance.get("config", {}).get("data", {"train_file": "unknown"})
    answer = answer or ("mixture" if data["train_file"] else "fit")
    resolution = _require_resolution(model, answer, source, resolution)
    width = broadening_width(resolution, model.resolution)
    if not width and wave.shape == target.shape and np.allclose(wave, target, rtol=0, atol=SAME_WAVE):
        return Application(model, model.uncertainty, None, wave, answer, resolution)
    overlap = overlaps(wave, target, width)
    covered = np.asarray(overlap.sum(axis=1)).ravel() >= LEAST_OVERLAP * np.diff(pixel_edges(target))
    lows, highs = zip(*LINE_WINDOWS.values(), strict=True)
    lines = [(target >= low - SIDEBAND) & (target <= high + SIDEBAND) for low, high in LINE_WINDOWS.values()]
    if covered.mean() < 1 - TOO_MANY or not all(covered[line].any() for line in lines):
        raise InputError(
            f"{source}: found {wave[0]:g} to {wave[-1]:g} Angstrom, which cover {covered.mean():.0%} of the model's pixels, "
            f"expected most of {target[0]:g} to {target[-1]:g}, and the lines from {min(lows):g} to {max(highs):g}; "
            "a model of your own pixels needs these lines only (`regress_gate --train-file`)"
        )
    return Application(model, model.uncertainty, overlap, wave, answer, resolution)


def _require_resolution(model: Model, answer: Answer, source: str, resolution: float | None) -> float:
    """The resolution of the spectra; raises an ``InputError`` where these are too blurred for the answer."""
    resolution = model.resolution if resolution is None else resolution
    if not 0 < resolution < np.inf:
        raise InputError(f"{source}: resolution is {resolution}, expected a positive number")
    if answer == "fit":
        lowest, advice = LEAST_RESOLUTION, "the least that the fit of the model grid knows"
    else:
        lowest, advice = model.resolution, f"that of the model; train one with `regress_gate --resolution {resolution:g}`"
        if resolution >= SAME_RESOLUTION * LEAST_RESOLUTION:
            advice += ", or ask the fit (`--answer fit`)"
    if resolution < SAME_RESOLUTION * lowest:
        raise InputError(f"{source}: resolution is {resolution:g}, expected at least {lowest:.0f}, {advice}")
    return resolution


def needs_scaling(application: Application, spectra: MaskedSpectra) -> bool:
    """Whether spectra (a sample of those to predict) are on another scale than the training spectra."""
    target = float(application.uncertainty.flux_median)
    medians = good_medians(spectra.flux, spectra.good)[spectra.good.any(axis=1)]
    if not np.isfinite(target) or not len(medians):
        return False
    on_the_whole = abs(np.median(medians) / target - 1) < SAME_SCALE
    one_by_one = np.mean(abs(medians / target - 1) < SCALE_SCATTER) > TOO_MANY
    return not (on_the_whole and one_by_one)


class ModelSpectra(NamedTuple):
    """Spectra on the pixels and the scale of a model."""

    flux: Float[np.ndarray, "N P"]
    error: Float[np.ndarray, "N P"] | None  #: None where it is not known
    good: Bool[np.ndarray, "N P"]  #: False where masked
    usable: Bool[np.ndarray, " N"]  #: False for a star with too few pixels, or with a median that is not positive
    factor: Float[np.ndarray, " N"]  #: by which each spectrum was scaled
    factor_error: Float[np.ndarray, " N"] | None  #: relative standard deviation of the factor; None where nothing was scaled


def to_model(application: Application, spectra: MaskedSpectra) -> ModelSpectra:
    """Resamples and scales spectra as the application says."""
    flux, error, good = spectra
    has_errors = not np.isnan(error).all()
    if application.overlap is not None:
        flux, error, good = resample(flux, np.where(good, error, 0.0), good, application.overlap, application.model.wave)
    target = float(application.uncertainty.flux_median)
    usable = good.mean(axis=1) >= 1 - TOO_MANY
    factor, factor_error = np.ones(len(flux), flux.dtype), None
    if application.scale and np.isfinite(target):
        median = good_medians(flux, good)
        usable &= median > 0
        safe_median = np.where(usable, median, 1.0)
        if has_errors:
            relative = good_medians(error, good) / safe_median
        else:
            relative = np.median(np.sqrt(np.asarray(application.uncertainty.noise_variance))) / target
        relative = relative / np.sqrt(good.sum(axis=1).clip(1))  # of the mean flux of each star
        factor = np.where(usable, target / safe_median, 1.0).astype(flux.dtype)
        factor_error = MEDIAN_ERROR * np.where(usable, relative, 0.0)
        flux, error = flux * factor[:, None], error * factor[:, None]
    usable &= np.isfinite(flux).all(axis=1)
    flux = flux if usable.all() else np.where(usable[:, None], flux, 0.0)
    return ModelSpectra(flux, error if has_errors else None, good, usable, factor, factor_error)


def _correlated_noise(
    overlap: scipy.sparse.csr_matrix, spectra: MaskedSpectra, on_model: ModelSpectra, gradient: AnyArray
) -> Float[np.ndarray, " N"]:
    """(N,) variance that the correlation of resampled pixels adds to the predictions; it may be negative.

    Neighbouring pixels share noise after resampling. With A the resampling and g the gradient in the resampled pixels, A' g is
    the gradient in the telescope's pixels, whose errors e are independent. The variance is |(A' g) e|^2. Resampled pixels with
    errors s, taken as independent, give |g s|^2. The result is the difference of the two.
    """
    error = np.where(spectra.good, spectra.error, 0.0) * on_model.factor[:, None]
    covered = (overlap @ spectra.good.T.astype(np.float64)).T
    resampled_gradient = np.where(on_model.good, np.asarray(gradient), 0.0)
    telescope_gradient = (overlap.T @ (resampled_gradient / np.where(covered > 0, covered, 1.0)).T).T
    resampled_error = np.where(on_model.good, np.asarray(on_model.error), 0.0)
    independent = np.sum((resampled_gradient * resampled_error) ** 2, axis=1)
    return np.sum((telescope_gradient * error) ** 2, axis=1) - independent


def apply_model(application: Application, spectra: MaskedSpectra, first_star: int = 0, pad_to: int = 0) -> pd.DataFrame:
    """The table of predictions for some stars.

    Args:
        application: result of ``prepare_application`` for the wavelengths of the spectra.
        spectra: spectra as a telescope gives them.
        first_star: number of the first star, for the column star.
        pad_to: least number of stars that the mixture is applied to, so that parts of a file share compiled programs. It is raised
            to the next of 64, 128, 256 ...

    Returns:
        Columns star, log_g, uncertainty (half-width of the 68 % interval; of a mixture that is not calibrated, the standard
        deviation) and half_width_LEVEL for the higher levels; of a fit velocity (km/s), T_eff (K), M_H and a_M, each with
        NAME_error, chi2, cool (0 or 1) and outside_cells; mixture_log_g and mixture_uncertainty if the answer is not the mixture's;
        weight_CELL for each expert, distance (in feature space, in units of the limit), n_masked (number of masked pixels) and
        flags (names joined by |). NaN for a star that is not predicted, and in the columns of a mixture that knows sharper
        spectra only.
    """
    spectra = MaskedSpectra(*map(np.asarray, spectra))  # pandas cannot index by arrays of JAX
    n_stars = len(spectra.flux)
    n_padded = max(64, 2 ** (max(n_stars, pad_to) - 1).bit_length())
    pad = ((0, n_padded - n_stars), (0, 0))
    padded = MaskedSpectra(*(np.pad(array, pad, mode="edge") for array in spectra)) if n_padded > n_stars else spectra
    prediction, on_model = _apply_mixture(application, padded)
    usable, masked = on_model.usable[:n_stars], ~on_model.good[:n_stars]
    wave, distance = np.asarray(application.model.wave), np.asarray(prediction.distance)[:n_stars]
    many = masked.mean(axis=1) > MANY
    for low, high in LINE_WINDOWS.values():
        many |= masked[:, (wave >= low) & (wave <= high)].mean(axis=1) > MANY
    n_masked = masked.sum(axis=1)
    raised = {UNLIKE_TRAINING: usable & ~(distance <= 1)}
    levels = application.uncertainty.calibration.levels
    answer = _interval_columns(prediction.log_g, prediction.sigma, prediction.half_width, levels)
    mixture = {} if application.answer == "mixture" else {f"mixture_{name}": answer[name] for name in ("log_g", "uncertainty")}
    mixture |= {f"weight_{k}": weight for k, weight in enumerate(np.asarray(prediction.weights).T)} | {"distance": distance}
    if application.blurred:
        mixture = {name: np.full_like(column, np.nan) for name, column in mixture.items()}
    if application.answer == "local":
        assert application.model.local is not None
        assert prediction.local is not None
        answer = _interval_columns(*prediction.local, application.model.local.calibration.levels)
    elif application.answer == "fit":
        fit = fit_robustly(spectra, application.wave, resolution=application.resolution)
        usable &= fit.fitted
        raised = fit.flags()
        n_masked += fit.n_masked.astype(int)
        answer = _fit_columns(fit)
    usable &= np.isfinite(answer["log_g"][:n_stars])
    raised |= {MANY_MASKED: many, NOT_PREDICTED: ~usable}
    flags = ["|".join(name for name, is_raised in raised.items() if is_raised[i]) for i in range(n_stars)]
    table = pd.DataFrame({name: column[:n_stars] for name, column in (answer | mixture).items()})
    table.loc[~usable] = np.nan
    table.insert(0, "star", np.arange(first_star, first_star + n_stars))
    return table.assign(n_masked=n_masked, flags=flags)


def _interval_columns(log_g: Any, sigma: Any, half_width: Any, levels: Any) -> dict[str, np.ndarray]:
    """Columns log_g, uncertainty and half_width_LEVEL of an answer."""
    half_width = np.asarray(half_width)
    columns = {"log_g": np.asarray(log_g), "uncertainty": half_width[:, 0] if half_width.shape[1] else np.asarray(sigma)}
    return columns | {f"half_width_{100 * level:.0f}": half_width[:, i] for i, level in enumerate(np.asarray(levels)) if i}


def _fit_columns(fit: RobustFit) -> dict[str, np.ndarray]:
    """Columns of the answer of a fit."""
    columns = _interval_columns(fit.labels[:, 1], None, np.outer(fit.error[:, 1], QUANTILES), LEVELS)
    columns |= {"velocity": fit.velocity, "velocity_error": fit.velocity_error}
    for name, i in (("T_eff", 0), ("M_H", 2), ("a_M", 3)):
        columns |= {name: fit.labels[:, i], f"{name}_error": fit.error[:, i]}
    cool = np.where(fit.fitted, fit.labels[:, 0] < COOL, np.nan)
    return columns | {"chi2": fit.chi2, "cool": cool, "outside_cells": fit.outside}


def _apply_mixture(application: Application, spectra: MaskedSpectra) -> tuple[MixturePrediction, ModelSpectra]:
    """What the model predicts, with the noise that resampled pixels share; and the spectra on its pixels."""
    on_model = to_model(application, spectra)
    flux, error, good, usable, _, factor_error = on_model
    fillable = good | ~usable[:, None]  # an unusable star has nothing to be filled from; its results are dropped
    optional = [None if array is None else np.asarray(array, flux.dtype) for array in (error, factor_error)]
    prediction = predict_model(application.model, flux, optional[0], fillable, optional[1])
    if application.overlap is not None and error is not None:
        assert prediction.variance is not None
        assert prediction.gradient is not None
        correlated = _correlated_noise(application.overlap, spectra, on_model, prediction.gradient)
        noise = jnp.maximum(prediction.variance.noise + jnp.asarray(correlated, flux.dtype), 0.0)
        prediction = with_variance(application.model, prediction, prediction.variance._replace(noise=noise))
    return prediction, on_model
