"""The gate's features: depths and equivalent widths of the Ca II triplet and Na I, and four principal components.

depth = 1 - min(f / c) and EW = sum(1 - f / c) over a line's window, c the median flux of its two sidebands. The report does
not say where its sidebands lie; here they are the ``SIDEBAND`` Angstrom on either side of each window.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Float, PRNGKeyArray

from moe_jax.arrays import AnyArray, InputError
from moe_jax.ridge import matmul

#: First and last wavelength of each line's window, vacuum Angstrom.
LINE_WINDOWS = {"8498": (8490.0, 8510.0), "8542": (8530.0, 8555.0), "8662": (8650.0, 8675.0), "Na": (8180.0, 8200.0)}
SIDEBAND = 15.0  # Angstrom
N_COMPONENTS = 4
FEATURE_NAMES = (
    "depth_8498", "EW_8498", "depth_8542", "EW_8542", "depth_8662", "EW_8662", "EW_CaT", "depth_Na", "EW_Na",
    "PCA1", "PCA2", "PCA3", "PCA4",
)  # fmt: skip
N_FEATURES = len(FEATURE_NAMES)

_OVERSAMPLING = 28
_POWER_ITERATIONS = 9


class LinePixels(NamedTuple):
    """Pixels of one line."""

    window: np.ndarray  #: indices of the window
    sidebands: np.ndarray  #: indices of both sidebands


class PCA(NamedTuple):
    """Principal components of spectra."""

    mean: Float[jax.Array, " P"]
    components: Float[jax.Array, "C P"]  #: unit vectors, the strongest first; the largest element of each is positive


class FeatureModel(NamedTuple):
    """What the features take from the training stars: components and standardisation."""

    pca: PCA
    mean: Float[jax.Array, " F"]  #: of the raw features
    scale: Float[jax.Array, " F"]  #: standard deviation of the raw features


def line_pixels(wave: AnyArray, source: str = "wave") -> dict[str, LinePixels]:
    """Pixels of the window and the sidebands of each line; ``wave`` must be concrete.

    Raises:
        InputError: in the name of ``source``, for fewer pixels than features, or a wavelength range that misses a window.
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


def line_features(flux: Float[AnyArray, "N P"], pixels: dict[str, LinePixels]) -> Float[jax.Array, "N 9"]:
    """The nine features that come from lines, in the order of ``FEATURE_NAMES``; EW in pixels.

    Where a star's continuum is not positive, its features of that line are those of no line at all: 0.
    """
    depth, width = {}, {}
    for name, (window, sidebands) in pixels.items():
        continuum = jnp.median(flux[:, sidebands], axis=1, keepdims=True)
        positive = continuum > 0
        absorbed = jnp.where(positive, 1.0 - flux[:, window] / jnp.where(positive, continuum, 1.0), 0.0)
        depth[name], width[name] = jnp.max(absorbed, axis=1), jnp.sum(absorbed, axis=1)
    triplet = width["8498"] + width["8542"] + width["8662"]
    columns = [column for name in ("8498", "8542", "8662") for column in (depth[name], width[name])]
    return jnp.stack([*columns, triplet, depth["Na"], width["Na"]], axis=1)


def fit_pca(key: PRNGKeyArray, x: Float[AnyArray, "N P"], n_components: int = N_COMPONENTS) -> PCA:
    """Principal components by randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4).

    With 28 extra vectors and nine iterations the components of stellar spectra are those of a full decomposition to
    float32's rounding, for a fraction of its time.

    Args:
        key: random key of the start; it does not show in the result beyond rounding.
        x: noisy flux of the training stars.
        n_components: C.

    Raises:
        InputError: for more components than stars or pixels.
    """
    if not 0 < n_components <= min(x.shape):
        raise InputError(f"n_components is {n_components}, expected 1 to {min(x.shape)} for data of shape {x.shape}")
    return _fit_pca(key, jnp.asarray(x), n_components)


@functools.partial(jax.jit, static_argnames="n_components")
def _fit_pca(key: jax.Array, x: jax.Array, n_components: int) -> PCA:
    mean = jnp.mean(x, axis=0)

    def scatter(vectors: jax.Array) -> jax.Array:
        """(X - mean)' (X - mean) V without a centred copy of X."""
        projected = matmul(x, vectors) - matmul(mean[None, :], vectors)
        return matmul(x.T, projected) - jnp.outer(mean, jnp.sum(projected, axis=0))

    return PCA(mean, _components(key, scatter, mean, n_components, len(x)))


@functools.partial(jax.jit, static_argnames="n_components")
def fit_pca_scatter(
    key: PRNGKeyArray, mean: Float[jax.Array, " P"], scatter: Float[jax.Array, "P P"], n_components: int = N_COMPONENTS
) -> PCA:
    """``fit_pca`` from the mean of the stars and the sum of their products about it."""
    return PCA(mean, _components(key, lambda vectors: matmul(scatter, vectors), mean, n_components, len(scatter)))


def _components(
    key: jax.Array, scatter: Callable[[jax.Array], jax.Array], mean: jax.Array, n_components: int, n_most: int
) -> jax.Array:
    """The first eigenvectors of the scatter matrix that ``scatter`` multiplies by."""
    p = len(mean)
    start = jax.random.normal(key, (p, min(n_components + _OVERSAMPLING, n_most, p)), mean.dtype)
    basis = lax.fori_loop(0, _POWER_ITERATIONS, lambda _, vectors: scatter(jnp.linalg.qr(vectors)[0]), start)
    basis = jnp.linalg.qr(basis)[0]
    _, rotation = jnp.linalg.eigh(matmul(basis.T, scatter(basis)))
    components = matmul(basis, rotation[:, ::-1][:, :n_components]).T
    largest = jnp.take_along_axis(components, jnp.argmax(jnp.abs(components), axis=1)[:, None], axis=1)
    return components * jnp.sign(largest)


def raw_features(flux: Float[AnyArray, "N P"], wave: AnyArray, pca: PCA) -> Float[jax.Array, "N F"]:
    """The 13 features of N stars before standardisation, in the order of ``FEATURE_NAMES``.

    Args:
        flux: noisy flux.
        wave: vacuum wavelengths, Angstrom; concrete.
        pca: components of the training stars.

    Raises:
        InputError: where the wavelengths miss a line window.
    """
    return _raw_features(jnp.asarray(flux), tuple(line_pixels(wave).values()), pca)


@jax.jit
def _raw_features(flux: jax.Array, pixels: tuple[LinePixels, ...], pca: PCA) -> jax.Array:
    lines = line_features(flux, dict(zip(LINE_WINDOWS, pixels, strict=True)))
    scores = matmul(flux, pca.components.T) - matmul(pca.mean[None, :], pca.components.T)
    return jnp.concatenate([lines, scores], axis=1)


def fit_features(key: PRNGKeyArray, flux: Float[AnyArray, "N P"], wave: AnyArray) -> FeatureModel:
    """Fits what the features take from training stars: the components, and the mean and scale of each raw feature."""
    pca = fit_pca(key, flux)
    return standardize(pca, raw_features(flux, wave, pca))


def standardize(pca: PCA, raw: Float[AnyArray, "N F"]) -> FeatureModel:
    """The feature model with these components, given the raw features of the training stars."""
    return FeatureModel(pca, *mean_and_scale(raw))


@jax.jit
def mean_and_scale(raw: Float[AnyArray, "N F"]) -> tuple[Float[jax.Array, " F"], Float[jax.Array, " F"]]:
    """Mean and standard deviation of each column; 1 for that of a constant one."""
    scale = jnp.std(raw, axis=0)
    return jnp.mean(raw, axis=0), jnp.where(scale > 0, scale, 1.0)


def compute_features(model: FeatureModel, flux: Float[AnyArray, "N P"], wave: AnyArray) -> Float[jax.Array, "N F"]:
    """The 13 standardised features of any stars, by the statistics of the training stars."""
    return scale_features(model, raw_features(flux, wave, model.pca))


def features_of_pixels(
    model: FeatureModel, flux: Float[AnyArray, "N P"], pixels: tuple[LinePixels, ...]
) -> Float[jax.Array, "N F"]:
    """``compute_features`` with the pixels of the lines already found, so that it may be traced; in the order of the lines."""
    return scale_features(model, _raw_features(jnp.asarray(flux), pixels, model.pca))


def scale_features(model: FeatureModel, raw: Float[AnyArray, "N F"]) -> Float[jax.Array, "N F"]:
    """Raw features, standardised."""
    return scale_columns(raw, model.mean, model.scale)


@jax.jit
def scale_columns(
    raw: Float[AnyArray, "N F"], mean: Float[AnyArray, " F"], scale: Float[AnyArray, " F"]
) -> Float[jax.Array, "N F"]:
    """Columns less their mean, in units of their scale."""
    return (jnp.asarray(raw) - mean[None, :]) / scale[None, :]
