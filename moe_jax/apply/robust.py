"""Labels of observed stars by the fit of the model grid, with intervals that know the misfit, and flags.

A spectrum is resampled to the pixels of the grid, scaled, and fitted by ``moe_jax.spectra.label_fit``: labels, velocity, broadening
and a continuum. Where many pixels stand out, they are masked with their surroundings and the star is fitted once more.

Some spectra have a constant added to them (a sky that was subtracted wrongly), a stretched wavelength scale, or emission in the
cores of the calcium triplet (a chromosphere). Most have not, and lose precision where it is fitted. So each combination is
given a probability, from how much it lowers chi2: half of the stars are taken to have each of them, of a normal distribution with
the width ``RARE``. The labels are means over all combinations. Where a constant is beyond doubt, the star is fitted once more with
it. Where emission is beyond doubt, the star is fitted once more without the cores.

How well a fit describes a spectrum is judged by three chi2: of single pixels, of the residuals' means over 4 pixels, and of those
over 32. The first one alone says that the stated errors are wrong, and scales the uncertainties. The other two, divided by the
first, are near 1 unless residuals hang together, as those of lines and continua that the grid does not have.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray
from moe_jax.experts.cells import M_H_EDGES, T_EFF_EDGES
from moe_jax.spectra.broadening import broadening_width
from moe_jax.spectra.fisher import LABEL_UNITS
from moe_jax.spectra.grid import GRID_RESOLUTION
from moe_jax.spectra.label_fit import N_CONTINUUM, LabelFit, fit_labels
from moe_jax.spectra.label_model import BROADENING_NODES, CALCIUM, GRID_WIDTH, LIGHT_SPEED, default_model, rebin
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.resample import MaskedSpectra, good_medians, overlaps, resample
from moe_jax.spectra.simulate import LABEL_LATTICE

POOR_FIT, EMISSION_LINES, VELOCITY_UNCERTAIN, NOT_A_STAR = "poor_fit", "emission_lines", "velocity_uncertain", "not_a_star"
BLENDED, OUTSIDE_CELLS = "blended", "outside_cells"
N_WAVY = 25  # terms of the continuum where N_CONTINUUM do not describe it, as with a jump between two arms
SCALES = (4, 32)  # pixels over which residuals are averaged
LIMITS = (1.09, 1.36)  #: of chi2 at these scales; 0.3 % of good spectra lie above each of them
TELLURIC = ((7165.0, 7345.0), (7593.0, 7705.0), (8130.0, 8345.0))  #: Angstrom, vacuum: water, the A band of oxygen, water
TOO_UNCERTAIN = 0.5  #: a misfit that leaves log g less certain than this is a poor fit
EMISSIONS = 3  #: so many lines in emission are flagged
QUANTILES = (0.93, 1.66, 2.11)  #: of |error| / standard deviation at the levels of ``moe_jax.apply.conformal``
UNIQUE = 25.0  #: contrast below which the velocity is not unique
NO_STAR = 12.0  #: contrast below which nothing looks like a star
RARE = (0.1, 20.0, 0.2)  #: standard deviations: constant (median fluxes), stretch (km/s at the ends), emission (median fluxes)
SECOND_STAR = 13.0  #: decrease of chi2 by a second star, in units of the misfit, above which a star is a blend
SECOND_VELOCITY = 19.0  #: the same of one at another velocity; more templates are compared
ABSURD = 100.0  #: chi2 above which the errors, or the fit, mean nothing
COOL = 4250.0  #: K; below, molecules matter that the grid does not have
BROADEST = 0.93 * np.sqrt(BROADENING_NODES[-1]) * GRID_WIDTH  #: km/s; of broader lines the fit may find as little
LEAST_RESOLUTION = GRID_RESOLUTION / np.sqrt(1 + (BROADEST / GRID_WIDTH) ** 2)  #: of spectra whose lines are not too broad
SURELY = 0.999  #: probability of lying outside the cells that is flagged
_CERTAIN = 3.0  # standard deviations above which a constant is fitted, or the cores are masked
_MANY_MASKED = 10  # pixels that stand out, above which a star is fitted again
_RUN, _GROWTH = 4, 5  # so many masked neighbours are a feature, and so many pixels on both sides belong to it
_REGION, _FEW = 256, 32  # pixels over which errors are compared, and of chi2 1 that are added to them
_UNEVEN = 2.0  # ratio of two regions' chi2 above which the errors are scaled by region
_STATED = (1e-7, 100.0)  # median errors in units of the median flux at which float32 still fits; others mean nothing
_LEAST_GOOD = 0.3  # part of the pixels of the grid that a fit needs


class RobustFit(NamedTuple):
    """Fits of N stars; NaN where a spectrum cannot be fitted."""

    labels: Float[np.ndarray, "N 4"]  #: T_eff (K), log g, [M/H], [alpha/M]
    error: Float[np.ndarray, "N 4"]  #: standard deviations, widened by the misfit
    plain_error: Float[np.ndarray, " N"]  #: of log g, if there is neither a constant nor a stretch
    velocity: Float[np.ndarray, " N"]  #: km/s, as observed: not barycentric
    velocity_error: Float[np.ndarray, " N"]  #: km/s
    chi2: Float[np.ndarray, " N"]  #: per degree of freedom, of single pixels
    scale_chi2: Float[np.ndarray, "N 2"]  #: of the means over SCALES pixels, divided by chi2
    contrast: Float[np.ndarray, " N"]  #: see ``LabelFit``
    n_masked: Float[np.ndarray, " N"]  #: pixels that were masked since they stand out
    n_emission: Float[np.ndarray, " N"]  #: features of masked pixels above the model
    blend_gain: Float[np.ndarray, " N"]  #: decrease of chi2 by a second star, in units of the misfit
    second_gain: Float[np.ndarray, " N"]  #: the same by one at another velocity
    too_broad: Bool[np.ndarray, " N"]  #: whether lines are as broad as the fit allows, or broader
    outside: Float[np.ndarray, " N"]  #: probability that the star lies outside the cells of the mixture
    at_edge: Bool[np.ndarray, " N"]  #: whether a label lies at the edge of the grid
    fitted: Bool[np.ndarray, " N"]
    flux: Float[np.ndarray, "N P"]  #: on the pixels of the grid, scaled to a median of about 0.5
    flux_error: Float[np.ndarray, "N P"]
    model: Float[np.ndarray, "N P"]  #: the fit
    used: Int[np.ndarray, "N P"]  #: 1 where a pixel was used, 0 where it stands out, -1 where the file masks it

    def flags(self) -> dict[str, Bool[np.ndarray, " N"]]:
        """Which stars have which flag.

        A misfit is a poor fit where it matters: where it leaves log g uncertain, or drove a label to the edge of the grid. So are
        lines that are broader than the fit knows.
        """
        misfit = (self.scale_chi2 > LIMITS).any(axis=1)
        matters = self.at_edge | (self.plain_error > TOO_UNCERTAIN)
        return {
            POOR_FIT: self.fitted & ((misfit & matters) | self.too_broad | (self.chi2 > ABSURD)),
            BLENDED: self.fitted & ((self.blend_gain > SECOND_STAR) | (self.second_gain > SECOND_VELOCITY)),
            OUTSIDE_CELLS: self.fitted & (self.outside > SURELY),
            EMISSION_LINES: self.fitted & (self.n_emission >= EMISSIONS),
            VELOCITY_UNCERTAIN: self.fitted & (self.contrast < UNIQUE),
            NOT_A_STAR: self.fitted & (self.contrast < NO_STAR),
        }


def fit_robustly(spectra: MaskedSpectra, wave: Float[AnyArray, " Q"], resolution: float = GRID_RESOLUTION) -> RobustFit:
    """Fits the model grid to spectra as a telescope gives them.

    Args:
        spectra: on any scale; where errors are not known, they are taken as a hundredth of the median flux.
        wave: their wavelengths, vacuum Angstrom.
        resolution: of the spectra. Sharper ones than the grid's are degraded to its resolution; how blurred the others are is
            fitted.
    """
    width = broadening_width(resolution, GRID_RESOLUTION)
    same = not width and len(wave) == len(WAVE) and np.allclose(wave, WAVE, rtol=0, atol=1e-3)
    overlap = scipy.sparse.identity(len(WAVE), format="csr") if same else overlaps(wave, WAVE, width)
    median = _typical(spectra.flux, spectra.good)
    fitted = median > 0
    scale = np.where(fitted, 2 * median, 1.0)[:, None]
    error = np.where(np.isnan(spectra.error), 0.005, spectra.error / scale)
    scaled = MaskedSpectra(spectra.flux / scale, np.where(spectra.good, error, 0.0), spectra.good)
    flux, error, good = scaled if same else resample(*scaled, overlap, WAVE)
    stated = 2 * _typical(error, good)
    fitted &= (good.mean(axis=1) >= _LEAST_GOOD) & (stated > _STATED[0]) & (stated < _STATED[1])
    flux, error = (np.where(fitted[:, None] & good, array, fill).astype(np.float32) for array, fill in ((flux, 0.5), (error, 1.0)))
    expected = expected_chi2(overlap)
    fit, used_error, ratio = _fit_and_doubt(flux, error, good, fitted, expected)
    unknown = ~np.isfinite(fit.chi2)
    fitted &= ~unknown
    fit.covariance[unknown] = np.eye(4)
    fit = LabelFit(*(leaf if leaf.dtype == bool else np.nan_to_num(leaf, copy=False) for leaf in fit))  # of no use, but finite
    ratio = np.where(unknown[:, None], 0.0, ratio)
    out = good & ~fit.good
    # Not the surroundings that were masked with a band.
    out &= flux - fit.flux > 3 * used_error * np.sqrt(np.maximum(fit.chi2, 1.0))[:, None]
    bright = in_a_row(out)
    n_emission = (bright[:, 1:] & ~bright[:, :-1]).sum(axis=1)
    widening = fit.chi2 * np.maximum(ratio, 1.0).max(axis=1) * expected[-1]
    _, plain = add_prior(fit.labels, fit.covariance * widening[:, None, None])
    labels, covariance = allow_rare(fit, widening, np.array(RARE) * [0.5, 1.0, 0.5])
    labels, covariance = add_prior(labels, covariance)
    variance = np.diagonal(covariance, axis1=1, axis2=2)

    def known(values: AnyArray) -> np.ndarray:
        return np.where(fitted.reshape(-1, *[1] * (values.ndim - 1)), values, np.nan)

    return RobustFit(
        labels=known(labels),
        error=known(np.sqrt(variance)),
        plain_error=known(np.sqrt(plain[:, 1, 1])),
        velocity=known(fit.velocity),
        velocity_error=known(fit.velocity_error * np.sqrt(widening)),
        chi2=known(fit.chi2),
        scale_chi2=known(ratio),
        contrast=known(fit.velocity_contrast),
        n_masked=np.where(fitted, fit.n_masked, 0),
        n_emission=n_emission,
        blend_gain=known(fit.blend_gain / np.maximum(widening, 1e-30)),
        second_gain=known(fit.second_gain / np.maximum(widening, 1e-30)),
        outside=known(outside_cells(labels, np.sqrt(variance))),
        too_broad=fit.broadening >= BROADEST,
        at_edge=np.logical_or.reduce(fit.at_edge, axis=1),
        fitted=fitted,
        flux=flux,
        flux_error=error,
        model=np.asarray(fit.flux),
        used=np.where(good, fit.good.astype(np.int8), np.int8(-1)),
    )


def _typical(values: Float[np.ndarray, "N P"], good: Bool[np.ndarray, "N P"]) -> Float[np.ndarray, " N"]:
    """Median of every fourth pixel, to a per cent; of all pixels where few of these are good."""
    medians = good_medians(values[:, ::4], good[:, ::4])
    rest = 8 * np.count_nonzero(good[:, ::4], axis=1) < np.count_nonzero(good, axis=1)
    medians[rest] = good_medians(values[rest], good[rest])
    return medians


def _fit_and_doubt(
    flux: np.ndarray, error: np.ndarray, good: np.ndarray, fitted: np.ndarray, expected: np.ndarray
) -> tuple[LabelFit, np.ndarray, np.ndarray]:
    """Fits, and fits once more where something is wrong with a spectrum that can be put right.

    Where many pixels stand out, their surroundings are masked too. Where a constant is beyond doubt, it is fitted. Where emission
    in the cores of the calcium triplet is, and more so than a constant, which looks alike, these are masked. Where the
    residuals are independent, but larger in some regions, the errors are scaled in each region. Where residuals hang together,
    two explanations are tried: a richer continuum, and bands of the Earth's atmosphere. One that explains them all is believed.

    Returns:
        The fits, the errors that they used, and ``scale_ratio``.
    """
    fit = fit_labels(flux, error, good)
    ratio, n_masked = scale_ratio(fit, flux, error, expected), fit.n_masked
    local = local_chi2((flux - fit.flux) / error, fit.good)
    uneven = (ratio < LIMITS).all(axis=1) & (local.max(axis=1) > _UNEVEN * local.min(axis=1))
    if uneven.any():
        local = np.repeat(np.where(uneven[:, None], local, 1.0), _REGION, axis=1)
        error = (error * np.sqrt(local)).astype(np.float32)
    with np.errstate(invalid="ignore"):
        seen = fit.rare / (fit.rare_error * np.sqrt(np.maximum(fit.chi2, 1.0))[:, None])
    constant, filled = np.abs(seen[:, 0]) > _CERTAIN, (seen[:, 2] > _CERTAIN) & (seen[:, 2] > np.abs(seen[:, 0]))
    cores = np.zeros(flux.shape, bool)
    cores[filled] = in_calcium_cores(np.asarray(fit.velocity)[filled])

    def refit(chosen: np.ndarray, keep: Callable[[np.ndarray], np.ndarray], n_continuum: int, doubtful: bool) -> None:
        """Fits some stars again, with those pixels that ``keep`` makes of the masked ones."""
        rows = np.flatnonzero(fitted & chosen)
        if not len(rows):
            return
        kept = good[rows] & keep(good[rows] & ~fit.good[rows]) & ~cores[rows]
        other = fit_labels(flux[rows], error[rows], kept, n_continuum=n_continuum, additive=constant[rows])
        other.n_masked[:] = (good[rows] & ~other.good).sum(axis=1)
        new_ratio = scale_ratio(other, flux[rows], error[rows], expected)
        put = (new_ratio < LIMITS).all(axis=1) if doubtful else np.ones(len(rows), bool)
        ratio[rows[put]] = new_ratio[put]
        for name, leaf in other._asdict().items():
            if name != "continuum":
                getattr(fit, name)[rows[put]] = leaf[put]

    def without_rows(out: np.ndarray) -> np.ndarray:  # which may have been masked since the continuum was wrong
        return np.logical_or(~out, in_a_row(out))

    refit((n_masked > _MANY_MASKED) | constant | filled | uneven, lambda out: ~grow(out), N_CONTINUUM, doubtful=False)
    refit(ratio[:, 1] > LIMITS[1], without_rows, N_WAVY, doubtful=True)
    misfit = np.flatnonzero((ratio > LIMITS).any(axis=1))
    absorbed, bands = np.zeros(len(flux), bool), in_telluric_bands()
    absorbed[misfit] = local_excess((flux - fit.flux)[misfit] / error[misfit], fit.good[misfit], bands) > _UNEVEN
    refit(absorbed, lambda out: without_rows(out) & ~bands, N_CONTINUUM, doubtful=True)
    return fit, error, ratio


def allow_rare(
    fit: LabelFit, widening: Float[np.ndarray, " N"], width: Float[np.ndarray, " R"]
) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N 4 4"]]:
    """Mean and covariance of the labels if each rare thing is there with probability 1/2, of a normal distribution.

    These have the standard deviations ``width``; ``widening`` is a factor on all variances of the fit. Two of them can look alike,
    as an added constant and filled cores do. So all combinations are compared by their evidence.
    """
    deviation = np.sqrt(np.maximum(fit.rare_error**2 * widening[:, None], 1e-12 * width**2)) / width
    score, eye = fit.rare / width / deviation**2, np.eye(len(width))
    alike = fit.rare_correlation * np.where(eye, 0.0, 0.999)  # float32 may make it singular
    information = (alike + eye) / (deviation[:, :, None] * deviation[:, None, :])
    means, squares, evidences = [], [], []
    for there in itertools.product((0.0, 1.0), repeat=len(width)):
        both = np.outer(there, there)
        inner = eye + both * information
        variance, known = both * np.linalg.inv(inner), score * there
        mean = np.einsum("nij,nj->ni", variance, known)
        means.append(mean)
        squares.append(variance + mean[:, :, None] * mean[:, None, :])
        evidences.append(0.5 * np.sum(mean * known, axis=1) - 0.5 * np.linalg.slogdet(inner)[1])
    probability = scipy.special.softmax(evidences, axis=0)
    mean, square = (np.einsum("cn,cn...->n...", probability, np.array(moments)) for moments in (means, squares))
    slope = fit.rare_slope * width[:, None]
    spread = square - mean[:, :, None] * mean[:, None, :]
    low, high = grid_range()
    labels = np.clip(fit.labels + np.einsum("nk,nki->ni", mean, slope), low, high)
    return labels, fit.covariance * widening[:, None, None] + np.einsum("nki,nkl,nlj->nij", slope, spread, slope)


def outside_cells(labels: Float[np.ndarray, "N 4"], error: Float[np.ndarray, "N 4"]) -> Float[np.ndarray, " N"]:
    """Probability that labels with normal errors, and within the grid, lie outside the cells of T_eff and [M/H]."""
    inside = np.ones(len(labels))
    for i, edges in ((0, T_EFF_EDGES), (2, M_H_EDGES)):
        box = np.stack([grid_range()[:, i], [edges[0], edges[-1]]])
        below = scipy.special.ndtr((box[..., None] - labels[:, i]) / np.maximum(error[:, i], 1e-6))
        in_grid, in_cells = below[:, 1] - below[:, 0]
        inside *= np.where(in_grid > 0, in_cells / np.where(in_grid > 0, in_grid, 1.0), 1.0)
    return 1 - inside


@functools.cache
def grid_range() -> Float[np.ndarray, "2 4"]:
    """Lowest and highest labels of the grid."""
    return np.array([(axis[0], axis[-1]) for axis in default_model().axes]).T


def add_prior(
    labels: Float[AnyArray, "N 4"], covariance: Float[AnyArray, "N 4 4"]
) -> tuple[Float[np.ndarray, "N 4"], Float[np.ndarray, "N 4 4"]]:
    """Mean and covariance of the labels given a fit, if they are known to be drawn as those of the simulated surveys.

    The prior is a normal distribution with the mean and the variance of the survey's uniform ones.
    """
    low, high = np.array([LABEL_LATTICE[name][:2] for name in LABEL_UNITS]).T
    unit = (high - low) / np.sqrt(12.0)
    eye = np.eye(len(unit))
    information = np.linalg.inv(covariance.astype(np.float64) / np.outer(unit, unit) + 1e-9 * eye)
    posterior = np.linalg.inv(information + eye)
    offset = (labels - (low + high) / 2) / unit
    return (low + high) / 2 + unit * np.einsum("nij,njk,nk->ni", posterior, information, offset), posterior * np.outer(unit, unit)


def grow(out: Bool[np.ndarray, "N P"]) -> Bool[np.ndarray, "N P"]:
    """Masked pixels with the surroundings of those that lie in a row: the wings of a line, the edges of a band."""
    return np.logical_or(out, scipy.ndimage.binary_dilation(in_a_row(out), np.ones((1, 2 * _GROWTH + 1), bool)))


def in_a_row(out: Bool[np.ndarray, "N P"]) -> Bool[np.ndarray, "N P"]:
    """Those of the masked pixels that lie in a row of at least ``_RUN``."""
    rows = out.sum(axis=1) >= _RUN  # most spectra have none
    found = np.zeros_like(out)
    found[rows] = scipy.ndimage.binary_opening(out[rows], np.ones((1, _RUN), bool))
    return found


def local_chi2(residual: Float[np.ndarray, "N P"], good: Bool[AnyArray, "N P"]) -> Float[np.ndarray, "N R"]:
    """chi2 of each region of ``_REGION`` pixels in units of that of the spectrum; of a region with few pixels, near 1."""
    square = np.where(good, residual, 0.0) ** 2
    mean = square.sum(axis=1, keepdims=True) / np.maximum(good.sum(axis=1, keepdims=True), 1)
    total, number = (x.reshape(len(good), -1, _REGION).sum(axis=2) for x in (square, good))
    return (total / np.maximum(mean, 1e-30) + _FEW) / (number + _FEW)


def local_excess(
    residual: Float[np.ndarray, "N P"], good: Bool[AnyArray, "N P"], inside: Bool[np.ndarray, " P"]
) -> Float[np.ndarray, " N"]:
    """chi2 of the pixels inside over that of the others; 0 where all of either are masked."""
    square = np.where(good, residual, 0.0) ** 2
    mean = [square[:, part].sum(axis=1) / np.maximum(good[:, part].sum(axis=1), 1) for part in (inside, ~inside)]
    return mean[0] / np.maximum(mean[1], 1e-30)


def in_calcium_cores(velocity: Float[np.ndarray, " N"]) -> Bool[np.ndarray, "N P"]:
    """Whether a pixel, as observed, lies in the core of a line of the calcium triplet."""
    at_rest = WAVE / (1 + velocity[:, None] / LIGHT_SPEED)
    half_width = 2 * GRID_WIDTH / LIGHT_SPEED
    return np.logical_or.reduce([np.abs(at_rest / line - 1) < half_width for line in CALCIUM])


def in_telluric_bands() -> Bool[np.ndarray, " P"]:
    """Whether a pixel, as observed, lies in a strong band of the Earth's atmosphere."""
    return np.logical_or.reduce([(low <= WAVE) & (high >= WAVE) for low, high in TELLURIC])


def scale_ratio(
    fit: LabelFit, flux: Float[np.ndarray, "N P"], error: Float[np.ndarray, "N P"], expected: Float[np.ndarray, " 2"]
) -> Float[np.ndarray, "N 2"]:
    """``scale_chi2`` of fits, in units of that of noise and of the chi2 of single pixels; NaN where there is no fit."""
    residual = (flux - np.asarray(fit.flux)) / error
    return scale_chi2(residual, fit.good) / expected[None, :] / np.maximum(fit.chi2, 1e-30)[:, None]


def scale_chi2(residual: Float[np.ndarray, "N P"], good: Bool[AnyArray, "N P"]) -> Float[np.ndarray, "N 2"]:
    """Mean square of the residuals' sums over SCALES pixels, in units of that of independent residuals."""
    columns, width = [], 1
    total, number = np.where(good, residual, 0.0), np.asarray(good, np.int16)
    for scale in SCALES:
        step, width = scale // width, scale
        total, number = rebin(total, step), rebin(number, step)
        enough = number > scale / 2
        columns.append(np.where(enough, total**2 / np.maximum(number, 1), 0).sum(axis=1) / np.maximum(enough.sum(axis=1), 1))
    return np.stack(columns, axis=1)


def expected_chi2(overlap: scipy.sparse.csr_matrix) -> Float[np.ndarray, " 2"]:
    """``scale_chi2`` of noise: 1, or more after resampling to finer pixels, which share noise."""
    independent = scipy.sparse.csr_matrix(overlap.multiply(1.0 / np.maximum(np.asarray(overlap.sum(axis=1)), 1e-30)))
    total = float(independent.power(2).sum())
    sums = (
        scipy.sparse.kron(scipy.sparse.identity(len(WAVE) // scale), np.ones((1, scale)), format="csr") @ independent
        for scale in SCALES
    )
    return np.array([max(1.0, float(summed.power(2).sum()) / total) for summed in sums])
