"""A model applied to spectra as they were observed: other pixels, another scale, masked pixels, unusual stars.

In this order: resampled to the model's pixels with the flux conserved, where they differ; scaled to the median of the training
spectra, where these had one; masked pixels filled by what the others suggest; predicted; flagged.

The training spectra are scaled by the median of their noise-free flux, an observed one can only be by its own. Ridge experts
feel the difference, a few tenths of a per cent: its standard deviation is part of a scaled star's uncertainty. Spectra that
come on the scale of the training spectra are best left on it.
"""

from __future__ import annotations

from typing import NamedTuple

import jax.numpy as jnp
import numpy as np
import pandas as pd
from jaxtyping import Bool, Float
from scipy import sparse

from moe_jax.apply.model import Model, Uncertainty, predict_model, with_variance
from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.gates.features import LINE_WINDOWS, SIDEBAND
from moe_jax.spectra.observed import ObservedSpectra
from moe_jax.spectra.resample import LEAST_OVERLAP, overlaps, pixel_edges, resample

UNLIKE_TRAINING, MANY_MASKED, NOT_PREDICTED = "unlike_training", "many_masked", "not_predicted"
MANY = 0.1  # part of the pixels, all or of one line's window, above which a star is flagged
TOO_MANY = 0.5  # part of the pixels above which nothing is predicted
SAME_WAVE = 1e-3  # Angstrom
SAME_SCALE = 0.02  # part by which the scale of spectra may differ from that of the training spectra, on the whole
SCALE_SCATTER = 0.1  # and one by one, for more than half of them
MEDIAN_ERROR = 1.2533  # standard deviation of a median in units of that of the mean


class Application(NamedTuple):
    """A model prepared for spectra on given wavelengths."""

    model: Model
    known: Uncertainty
    overlap: sparse.csr_matrix | None  #: None where the wavelengths are those of the model
    scale: bool = False  #: whether each spectrum is scaled to the median of the training spectra


def prepare_application(model: Model, wave: Float[AnyArray, " Q"], source: str = "wave") -> Application:
    """Checks a model against wavelengths, and sets up the resampling where they differ.

    Args:
        model: with uncertainties.
        wave: of the spectra, vacuum Angstrom, increasing.
        source: whose name errors carry.

    Raises:
        InputError: for a model without uncertainties, or wavelengths that cover less than half of the model's pixels or no
            pixel of a line.
    """
    if model.uncertainty is None:
        raise InputError("the model has no uncertainties, expected one that a present version of regress_gate has written")
    wave, own = np.asarray(wave, np.float64), np.asarray(model.wave, np.float64)
    if wave.shape == own.shape and np.allclose(wave, own, rtol=0, atol=SAME_WAVE):
        return Application(model, model.uncertainty, None)
    overlap = overlaps(wave, own)
    covered = np.asarray(overlap.sum(axis=1)).ravel() >= LEAST_OVERLAP * np.diff(pixel_edges(own))
    windows = [covered[(own >= low - SIDEBAND) & (own <= high + SIDEBAND)] for low, high in LINE_WINDOWS.values()]
    if covered.mean() < 1 - TOO_MANY or not all(window.any() for window in windows):
        raise InputError(
            f"{source}: found {wave[0]:g} to {wave[-1]:g} Angstrom, which cover {covered.mean():.0%} of the model's pixels, "
            f"expected most of {own[0]:g} to {own[-1]:g}, and the lines from {min(low for low, _ in LINE_WINDOWS.values()):g} to "
            f"{max(high for _, high in LINE_WINDOWS.values()):g}"
        )
    return Application(model, model.uncertainty, overlap)


def needs_scaling(application: Application, spectra: ObservedSpectra) -> bool:
    """Whether spectra, a sample of those that a model is applied to, lie on another scale than those that it was trained on."""
    target = float(application.known.flux_median)
    medians = np.array([np.median(flux[good]) for flux, good in zip(spectra.flux, spectra.good, strict=True) if good.any()])
    if not np.isfinite(target) or not len(medians):
        return False
    return not (abs(np.median(medians) / target - 1) < SAME_SCALE and np.mean(abs(medians / target - 1) < SCALE_SCATTER) > TOO_MANY)


class Prepared(NamedTuple):
    """Spectra on the model's pixels and scale."""

    flux: Float[np.ndarray, "N P"]
    error: Float[np.ndarray, "N P"] | None
    good: Bool[np.ndarray, "N P"]
    usable: Bool[np.ndarray, " N"]  #: False for a star with too few pixels, or a median that is not positive
    scale_error: Float[np.ndarray, " N"] | None  #: relative, of the factor by which it was scaled
    scale: Float[np.ndarray, " N"]  #: that factor


def prepare_spectra(application: Application, spectra: ObservedSpectra) -> Prepared:
    """Resamples and scales observed spectra; arguments as those of ``apply_model``."""
    flux, error, good = spectra
    has_errors = not np.isnan(error).all()
    if application.overlap is not None:
        flux, error, good = resample(flux, np.where(good, error, 0.0), good, application.overlap, application.model.wave)
    target = float(application.known.flux_median)
    usable = good.mean(axis=1) >= 1 - TOO_MANY
    scale_error, scale = None, np.ones(len(flux), flux.dtype)
    if application.scale and np.isfinite(target):
        rows = list(zip(flux, error, good, usable, strict=True))
        median = np.array([np.median(f[g]) if u else np.nan for f, _, g, u in rows])
        typical = np.array([np.median(e[g]) / np.sqrt(g.sum()) if u else np.nan for _, e, g, u in rows])
        usable &= median > 0
        safe = np.where(usable, median, 1.0)
        scale = np.where(usable, target / safe, 1.0).astype(flux.dtype)
        flux, error = flux * scale[:, None], error * scale[:, None]
        known = np.sqrt(np.asarray(application.known.noise_variance))
        unknown = np.median(known) / target / np.sqrt(good.sum(axis=1).clip(1))
        scale_error = MEDIAN_ERROR * np.where(usable, typical / safe if has_errors else unknown, 0.0)
    usable &= np.isfinite(flux).all(axis=1)
    return Prepared(np.where(usable[:, None], flux, 0.0), error if has_errors else None, good, usable, scale_error, scale)


def _shared_noise(
    overlap: sparse.csr_matrix, spectra: ObservedSpectra, prepared: Prepared, gradient: AnyArray
) -> Float[np.ndarray, " N"]:
    """What the noise that neighbouring pixels share after resampling adds to the variance of each star's prediction.

    The gradient in the observed pixels, times their errors, less the same sum in the resampled pixels as if independent.
    """
    good, observed = spectra.good, np.where(spectra.good, spectra.error, 0.0) * prepared.scale[:, None]
    covered = (overlap @ good.T.astype(np.float64)).T
    own = np.where(prepared.good, np.asarray(gradient), 0.0)
    back = (overlap.T @ (own / np.where(covered > 0, covered, 1.0)).T).T
    apart = np.where(prepared.good, np.asarray(prepared.error), 0.0)
    found: np.ndarray = np.sum((back * observed) ** 2, axis=1) - np.sum((own * apart) ** 2, axis=1)
    return found


def apply_model(application: Application, spectra: ObservedSpectra, first_star: int = 0) -> pd.DataFrame:
    """The table of predictions for some stars.

    Args:
        application: of ``prepare_application``.
        spectra: as observed, on the wavelengths that it was prepared for.
        first_star: number of the first of them.

    Returns:
        Columns star, log_g, uncertainty (half-width of the 68 % interval; standard deviation before calibration where the model
        is not calibrated), half_width_LEVEL for the higher levels, weight_CELL for each expert, distance (in feature space, 1: the
        limit), n_masked (of the model's pixels) and flags (names joined by |). NaN for a star that is not predicted.
    """
    model, known = application.model, application.known
    prepared = prepare_spectra(application, spectra)
    flux, error, good, usable, scale_error, _ = prepared
    safe = np.where(usable[:, None], good, True)  # nothing to fill a star from: what is said of it is dropped
    optional = [None if array is None else jnp.asarray(array, flux.dtype) for array in (error, scale_error)]
    said = predict_model(model, jnp.asarray(flux), optional[0], jnp.asarray(safe), optional[1])
    assert said.variance is not None
    if application.overlap is not None and error is not None:
        assert said.gradient is not None
        shared = _shared_noise(application.overlap, spectra, prepared, said.gradient)
        noise = jnp.maximum(said.variance.noise + jnp.asarray(shared, flux.dtype), 0.0)
        said = with_variance(model, said, said.variance._replace(noise=noise))
    masked = ~good
    many = masked.mean(axis=1) > MANY
    wave = np.asarray(model.wave)
    for low, high in LINE_WINDOWS.values():
        many |= masked[:, (wave >= low) & (wave <= high)].mean(axis=1) > MANY
    distance = np.asarray(said.distance)
    bits = {UNLIKE_TRAINING: usable & ~(distance <= 1), MANY_MASKED: many, NOT_PREDICTED: ~usable}
    flags = ["|".join(name for name, raised in zip(bits, row, strict=True) if raised) for row in zip(*bits.values(), strict=True)]

    def column(values: AnyArray) -> np.ndarray:
        return np.where(usable, np.asarray(values), np.nan)

    sigma, half_width = np.asarray(said.sigma), np.asarray(said.half_width)
    levels = np.asarray(known.calibration.levels)
    columns: dict[str, AnyArray | list[str]] = {"star": np.arange(first_star, first_star + len(flux)), "log_g": column(said.log_g)}
    columns["uncertainty"] = column(half_width[:, 0] if len(levels) else sigma)
    columns |= {f"half_width_{100 * level:.0f}": column(half_width[:, i]) for i, level in enumerate(levels) if i}
    weights = np.asarray(said.weights)
    columns |= {f"weight_{k}": column(weights[:, k]) for k in range(weights.shape[1])}
    columns |= {"distance": column(distance), "n_masked": masked.sum(axis=1), "flags": flags}
    return pd.DataFrame(columns)
