"""The gate's features: depths and equivalent widths of the Ca II triplet and Na I, and four principal components.

Over the window of a line, depth = 1 - min(f / c) and EW = sum(1 - f / c), where c is the median flux of the line's two sidebands.
The report does not say where its sidebands are; here they are the ``SIDEBAND`` Angstrom on either side of each window.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, by_numpy, matmul, mean_and_scale, namespace, scale_columns
from moe_jax.core.convert import convert_arguments
from moe_jax.core.pca import PCA, fit_pca

#: First and last wavelength of each line's window, vacuum Angstrom.
LINE_WINDOWS = {"8498": (8490.0, 8510.0), "8542": (8530.0, 8555.0), "8662": (8650.0, 8675.0), "Na": (8180.0, 8200.0)}
SIDEBAND = 15.0  # Angstrom
N_COMPONENTS = 4
FEATURE_NAMES = (
    "depth_8498", "EW_8498", "depth_8542", "EW_8542", "depth_8662", "EW_8662", "EW_CaT", "depth_Na", "EW_Na",
    "PCA1", "PCA2", "PCA3", "PCA4",
)  # fmt: skip
N_FEATURES = len(FEATURE_NAMES)


class LinePixels(NamedTuple):
    """Indices of the pixels of one line."""

    window: np.ndarray
    sidebands: np.ndarray  #: both sidebands


class FeatureModel(NamedTuple):
    """Components and standardisation, both fitted to the training stars."""

    pca: PCA
    mean: Float[AnyArray, " F"]  #: mean of the raw features
    scale: Float[AnyArray, " F"]  #: standard deviation of the raw features


def line_pixels(wave: AnyArray, source: str = "wave") -> dict[str, LinePixels]:
    """Pixels of the window and the sidebands of each line, from concrete vacuum wavelengths in Angstrom.

    Raises:
        InputError: fewer pixels than features, or a wavelength range that misses a window; it starts with ``source``.
    """
    wave = np.asarray(wave, np.float64)
    if len(wave) < N_FEATURES:
        raise InputError(f"{source}: found {len(wave)} pixels, expected at least {N_FEATURES}, the number of gate features")
    pixels = {}
    for name, (low, high) in LINE_WINDOWS.items():
        blue = np.flatnonzero((wave >= low - SIDEBAND) & (wave < low))
        window = np.flatnonzero((wave >= low) & (wave <= high))
        red = np.flatnonzero((wave > high) & (wave <= high + SIDEBAND))
        spans = wave[0] <= low - SIDEBAND + 1.0 and wave[-1] >= high + SIDEBAND - 1.0
        if not spans or min(map(len, (blue, window, red))) < 2:
            raise InputError(
                f"{source}: found {wave[0]:g} to {wave[-1]:g} Angstrom in {len(wave)} pixels, expected at least two pixels "
                f"in the window of line {name} ({low:g} to {high:g}) and in the {SIDEBAND:g} Angstrom on either side of it"
            )
        pixels[name] = LinePixels(window, np.concatenate([blue, red]))
    return pixels


def line_features(flux: Float[AnyArray, "N P"], pixels: dict[str, LinePixels]) -> Float[AnyArray, "N 9"]:
    """The nine features of the lines, in the order of ``FEATURE_NAMES``; EW in pixels.

    Where the continuum of a line is not positive, its depth and EW are 0, as if there were no line.
    """
    (depth, width), xp = ({}, {}), namespace(flux)
    for name, (window, sidebands) in pixels.items():
        continuum = xp.median(flux[:, sidebands], axis=1, keepdims=True)
        positive = continuum > 0
        zero, one = xp.zeros_like(continuum), xp.ones_like(continuum)
        absorbed = xp.where(positive, one - flux[:, window] / xp.where(positive, continuum, one), zero)
        depth[name], width[name] = absorbed.max(axis=1), absorbed.sum(axis=1)
    triplet = width["8498"] + width["8542"] + width["8662"]
    columns = [column for name in ("8498", "8542", "8662") for column in (depth[name], width[name])]
    return xp.stack([*columns, triplet, depth["Na"], width["Na"]], axis=1)


@by_numpy
def raw_features(flux: Float[AnyArray, "N P"], pixels: dict[str, LinePixels], pca: PCA) -> Float[AnyArray, "N F"]:
    """The 13 features of N stars before standardisation, in the order of ``FEATURE_NAMES``."""
    scores = matmul(flux, pca.components.T) - matmul(pca.mean[None, :], pca.components.T)
    return namespace(flux).concatenate([line_features(flux, pixels), scores], axis=1)


@convert_arguments("wave")
def fit_features(key: PRNGKeyArray, flux: Float[AnyArray, "N P"], wave: AnyArray) -> FeatureModel:
    """Fits the components, and the mean and scale of each raw feature, to the training stars."""
    pca = fit_pca(key, flux, N_COMPONENTS)
    return FeatureModel(pca, *mean_and_scale(raw_features(flux, line_pixels(wave), pca)))


@convert_arguments("wave")
def compute_features(model: FeatureModel, flux: Float[AnyArray, "N P"], wave: AnyArray) -> Float[AnyArray, "N F"]:
    """The 13 features of any stars, standardised by the mean and scale of the training stars."""
    return features_of_pixels(model, flux, line_pixels(wave))


def features_of_pixels(model: FeatureModel, flux: Float[AnyArray, "N P"], pixels: dict[str, LinePixels]) -> Float[AnyArray, "N F"]:
    """``compute_features`` given ``line_pixels(wave)``; may be traced."""
    return scale_columns(raw_features(flux, pixels, model.pca), model.mean, model.scale)
