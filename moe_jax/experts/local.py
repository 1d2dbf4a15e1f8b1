"""Many local linear experts and their gate, both in closed form: a linear model of the spectra, turned round by Bayes' theorem.

The nine ridges regress log g on noisy pixels. Here the regression first runs from labels to flux, as in The Cannon (Ness et al.
2015): the flux of each pixel is a polynomial in the labels, fitted with the stars' inverse variances. Thousands of stars share
its few hundred terms, so that it is nearly free of noise. The fitted spectra span few components (reduced-rank regression,
Izenman 1975). In these components a star is z = h + s e, with its clean spectrum h, its noise level s and e ~ N(0, I).

The training stars are divided into K cells of similar labels. In cell k, h and the target y are taken as jointly normal. Their
moments are those of the fitted spectra: means m_k and y_k, leading variances v_kr along the axes V_k, and the covariance c_kr
of each axis with y. So an expert is linear in z, and the gate is the probability of the cell:

    E[y | z, k] = y_k + sum_r c_kr u_kr / (v_kr + s^2)   with u_k = V_k' (z - m_k),
    p(k | z) ~ n_k N(z; m_k, V_k diag(v_k) V_k' + s^2 I).

Both depend on the noise of the star. A faint star is drawn to the mean of its cell, and its weights spread over more cells.
The variance of y given z is that of a mixture of normal distributions: the mean variance of the experts' answers, with
Var[y | z, k] = w_k - sum_r c_kr^2 / (v_kr + s^2) and w_k the variance of y in the cell, plus the variance between them.
"""

from __future__ import annotations

import functools
from itertools import combinations_with_replacement
from typing import NamedTuple

import jax
import jax.numpy as jnp
import jax.scipy.linalg as jsl
import numpy as np
from jax import lax
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, InputError, by_numpy, map_blocks, matmul, require_whole, to_device
from moe_jax.core.cholesky import shifted_cholesky
from moe_jax.core.convert import convert_arguments

PENALTY = 1e-3  # of the polynomial's coefficients, per unit of weight: for the rounding of float32 more than for the fit
N_COMPONENTS = (10, 14, 20, 28)
_LEAST_VARIANCE = 1e-6  # of an expert's answer, in units of the variance between experts: a cell of few stars may have none
_LEAST_NOISE = 1e-10  # of a star, in units of the spread of the clean spectra: the square of less may be 0 in float32
_BATCH = 128  # stars that are predicted at a time


class FluxModel(NamedTuple):
    """Spectra as polynomials in the labels, in C components: clean flux = mean + template * (h @ components)."""

    mean: Float[AnyArray, " P"]  #: weighted mean flux of the training stars
    template: Float[AnyArray, " P"]  #: error of each pixel in units of a star's noise level
    components: Float[AnyArray, "C P"]  #: unit vectors of flux / template, the strongest first
    term_mean: Float[AnyArray, " M"]  #: weighted mean of the polynomial's terms
    coef: Float[AnyArray, "M C"]  #: h = (terms - term_mean) @ coef


class LocalExperts(NamedTuple):
    """Local linear experts, and what their gate needs."""

    mean: Float[AnyArray, "K C"]
    axes: Float[AnyArray, "K R C"]  #: unit vectors
    variance: Float[AnyArray, "K R"]  #: of the clean spectra along the axes
    y: Float[AnyArray, " K"]
    y_variance: Float[AnyArray, " K"]
    covariance: Float[AnyArray, "K R"]  #: of the clean spectra along the axes with y
    log_count: Float[AnyArray, " K"]  #: of the training stars


class LocalPrediction(NamedTuple):
    """What a mixture of local linear experts says of N stars."""

    y: Float[jax.Array, " N"]
    sigma: Float[jax.Array, " N"]  #: standard deviation of y given the spectrum; it knows of noise and cells, not of misfit


class LocalMixture(NamedTuple):
    """A fitted mixture of local linear experts."""

    model: FluxModel
    experts: LocalExperts
    tried: Float[np.ndarray, " T"]  #: mean squared error on the held-out stars, for each number of components tried


@convert_arguments()
def median_error(error: Float[AnyArray, "N P"]) -> Float[jax.Array, " N"]:
    """Median error of each star, from every 16th pixel.

    One number for a star: its brightness. The errors of single pixels would give its lines away, since its own photon noise
    imprints them.
    """
    if isinstance(error, jax.core.Tracer):
        return jnp.median(error[:, ::16], axis=1)
    return jax.device_put(np.median(np.asarray(error)[:, ::16], axis=1))  # NumPy selects where XLA sorts


@functools.partial(jax.jit, static_argnames="degree")
def polynomial_terms(labels: Float[AnyArray, "N L"], degree: int) -> Float[jax.Array, "N M"]:
    """Products of Legendre polynomials of the labels, of total degree 1 to ``degree``, each with mean square 1 on [-1, 1]^L."""
    x = jnp.asarray(labels)
    legendre = [jnp.ones_like(x), x]
    for n in range(1, degree):
        legendre.append(((2 * n + 1) * x * legendre[n] - n * legendre[n - 1]) / (n + 1))
    values = jnp.stack([p * (2 * n + 1) ** 0.5 for n, p in enumerate(legendre)])  # (degree + 1, N, L)
    n_labels = x.shape[1]
    chosen = [c for d in range(1, degree + 1) for c in combinations_with_replacement(range(n_labels), d)]
    powers = np.array([np.bincount(c, minlength=n_labels) for c in chosen])
    return functools.reduce(jnp.multiply, [values[powers[:, j], :, j] for j in range(n_labels)]).T


@functools.partial(jax.jit, static_argnames="n_components")
def fit_flux_model(
    terms: Float[AnyArray, "N M"],
    flux: Float[AnyArray, "N P"],
    noise: Float[AnyArray, " N"],
    template: Float[AnyArray, " P"],
    n_components: int,
    used: Float[AnyArray, " N"],
) -> FluxModel:
    """Reduced-rank ridge regression of the flux on the terms, with weights 1 / noise^2 and pixels in units of their error.

    With the weighted scatter G of the terms plus the penalty, G = L L', and the scatter R of terms with flux, the coefficients
    are L'^-1 (L^-1 R). The components are the right singular vectors of L^-1 R / template. ``template`` is the error of each
    pixel in units of a star's noise level; ``used`` is 1 for the stars to fit, 0 for those to hold out.
    """
    terms, flux = jnp.asarray(terms), jnp.asarray(flux)
    weight = jnp.asarray(used, flux.dtype) / jnp.asarray(noise) ** 2
    weight /= jnp.sum(weight)
    weighted = terms * weight[:, None]
    mean, term_mean = matmul(weight[None, :], flux)[0], jnp.sum(weighted, axis=0)
    factor = shifted_cholesky(matmul(weighted.T, terms) - jnp.outer(term_mean, term_mean), PENALTY)
    scatter = matmul(weighted.T, flux) - jnp.outer(term_mean, mean)
    left, strength, components = jnp.linalg.svd(
        jsl.solve_triangular(factor, scatter / template[None, :], lower=True), full_matrices=False
    )
    coef = jsl.solve_triangular(factor, left[:, :n_components] * strength[None, :n_components], lower=True, trans=1)
    return FluxModel(mean, jnp.asarray(template), components[:n_components], term_mean, coef)


@functools.partial(jax.jit, static_argnames=("n_cells", "rank"))
def fit_local_experts(
    h: Float[AnyArray, "N C"], y: Float[AnyArray, " N"], cell: Int[AnyArray, " N"], n_cells: int, rank: int
) -> LocalExperts:
    """The moments of clean spectra and target by cell, of the ``rank`` leading axes: the labels move a spectrum along as many.

    A star of cell -1 is left out; a cell without stars has no weight.
    """
    h, y = jnp.asarray(h), jnp.asarray(y)
    cell = jnp.where(cell < 0, n_cells, cell)  # segment_sum drops what lies beyond the last segment

    def mean(values: jax.Array) -> jax.Array:
        return jax.ops.segment_sum(values, cell, n_cells) / count.reshape(-1, *[1] * (values.ndim - 1))

    n_stars = jax.ops.segment_sum(jnp.ones_like(y), cell, n_cells)
    count = jnp.maximum(n_stars, 1)
    h_mean, y_mean = mean(h), mean(y)
    h_centred, y_centred = h - h_mean[cell], y - y_mean[cell]
    variance, axes = jnp.linalg.eigh(mean(h_centred[:, :, None] * h_centred[:, None, :]))
    axes = jnp.swapaxes(axes, 1, 2)[:, ::-1][:, :rank]
    covariance = jnp.einsum("krc,kc->kr", axes, mean(h_centred * y_centred[:, None]), precision=lax.Precision.HIGHEST)
    variance = jnp.maximum(variance[:, ::-1][:, :rank], 0)
    return LocalExperts(h_mean, axes, variance, y_mean, mean(y_centred**2), covariance, jnp.log(n_stars))


@by_numpy
def project_flux(model: FluxModel, flux: Float[AnyArray, "N P"]) -> Float[AnyArray, "N C"]:
    """Components z of noisy spectra; where the errors follow the template, their noise is that of the star's level in each."""
    projection = (model.components / model.template[None, :]).T
    return matmul(flux, projection) - matmul(model.mean[None, :], projection)


def predict_local_experts(experts: LocalExperts, z: Float[AnyArray, "N C"], noise: Float[AnyArray, " N"]) -> LocalPrediction:
    """Predictions of the mixture from components."""
    noise = _at_least(noise, experts.mean, experts.variance)
    return map_blocks(functools.partial(_predict_block, experts), (z, noise), 0, len(z), _BATCH)


@by_numpy
def _at_least(noise: AnyArray, mean: AnyArray, variance: AnyArray) -> AnyArray:
    """The noise, or that at which predictions have reached their limit for no noise at all."""
    return noise.clip(_LEAST_NOISE * ((mean**2).max() + variance.max()) ** 0.5)


@jax.jit
def _predict_block(experts: LocalExperts, stars: tuple[jax.Array, jax.Array]) -> LocalPrediction:
    """``predict_local_experts`` of some stars. Sums over axes are written out: a CPU then needs one pass over (N, K) numbers."""
    z, s2 = stars[0], stars[1][:, None] ** 2
    k, r, c = experts.axes.shape
    axes = jnp.swapaxes(experts.axes, 0, 1)
    u = matmul(z, axes.reshape(r * k, c).T)
    u_mean = jnp.sum(axes * experts.mean[None], axis=2)
    # |z|^2 and log s^2 are the same for all cells.
    square = jnp.sum(experts.mean**2, axis=1)[None, :] - 2 * matmul(z, experts.mean.T)
    logs, slopes, explained = (jnp.zeros_like(square) for _ in range(3))
    for j in range(r):
        u_j = u[:, j * k : (j + 1) * k] - u_mean[j][None, :]
        ratio = 1 + jnp.divide(experts.variance[:, j][None, :], s2)  # in units of s^2
        square -= u_j**2 * (1 - 1 / ratio)
        logs += jnp.log(ratio)
        slope = experts.covariance[:, j][None, :] / ratio
        slopes += slope * u_j
        explained += slope * experts.covariance[:, j][None, :]
    weights = jax.nn.softmax(experts.log_count[None, :] - 0.5 * (square / s2 + logs), axis=1)
    answer = experts.y[None, :] + slopes / s2
    y = jnp.sum(weights * answer, axis=1)
    within = jnp.maximum(experts.y_variance[None, :] - explained / s2, _LEAST_VARIANCE * jnp.var(experts.y))
    return LocalPrediction(y, jnp.sqrt(jnp.sum(weights * (within + (answer - y[:, None]) ** 2), axis=1)))


@convert_arguments()
def predict_local(mixture: LocalMixture, flux: Float[AnyArray, "N P"], noise: Float[AnyArray, " N"]) -> LocalPrediction:
    """Predictions for noisy spectra with their noise levels; for a noise of 0, the limit of a small one.

    Raises:
        InputError: shapes that disagree.
    """
    if flux.shape[1] != len(mixture.model.mean):
        raise InputError(f"flux has shape {flux.shape}, expected (N, {len(mixture.model.mean)}) as in the fit")
    return predict_local_experts(mixture.experts, project_flux(mixture.model, flux), noise)


@convert_arguments("flux", "error", "labels", "y", finite=("flux", "error", "labels", "y"))
def fit_local(
    flux: Float[AnyArray, "N P"],
    error: Float[AnyArray, "N P"],
    labels: Float[AnyArray, "N L"],
    y: Float[AnyArray, " N"],
    *,
    n_cells: int = 1024,
    degree: int = 7,
    n_components: tuple[int, ...] = N_COMPONENTS,
    seed: int = 0,
) -> LocalMixture:
    """Fits the flux model and the experts; the number of components is that of the lowest error on a held-out fifth of the stars.

    The cells are clusters (k-means) of the labels, each in units of its range. The stars must be in random order.

    Args:
        flux: noisy flux.
        error: standard deviation of the flux, > 0.
        labels: of the training stars: all that shape the spectra, the target among them.
        y: target.
        n_cells: K.
        degree: total degree of the polynomial.
        n_components: numbers of components to choose from.
        seed: of the clusters' start.

    Raises:
        InputError: shapes that disagree, fewer stars than cells, errors that are not positive or of an extreme size, and numbers
            that are not finite.
    """
    from sklearn.cluster import KMeans

    n, n_components = len(y), tuple(np.ravel(n_components).tolist())
    for name, number in (("n_cells", n_cells), ("degree", degree), *(("n_components", number) for number in n_components)):
        require_whole(name, number, 1)
    require_whole("seed", seed, 0)
    if n < 2 * n_cells:
        raise InputError(f"found {n} stars for {n_cells} cells, expected at least 2 in each on average")
    flux, error, y, labels, noise_level = map(np.asarray, (flux, error, y, labels, median_error(error)))
    if not error.min() > 0:
        raise InputError(f"error holds {error.min():g}, expected positive numbers")
    if not 1e-8 < np.median(noise_level) < 1e8:
        raise InputError(
            f"error is {np.median(noise_level):g} in the median, expected 1e-8 to 1e8: divide flux and error by a constant"
        )
    if not n_components or not labels.shape[1]:
        raise InputError(f"n_components is {n_components}, labels has shape {labels.shape}, expected at least 1 of both")
    low, high = labels.min(axis=0), labels.max(axis=0)
    scaled = (2 * (labels - low) / np.maximum(high - low, np.finfo(np.float32).tiny) - 1).astype(noise_level.dtype)
    terms = np.asarray(polynomial_terms(scaled, degree))
    template = np.asarray(error_template(error, noise_level))
    if not np.isfinite(template).all():
        raise InputError(f"error holds {error.max():g}, expected numbers below 1e18 times the median of the star's errors")
    cell = KMeans(n_cells, n_init=1, max_iter=30, random_state=seed).fit(scaled).labels_
    present, cell = np.unique(cell.astype(np.int32), return_inverse=True)  # with fewer different labels than cells, some stay empty
    n_cells = len(present)
    most = max(n_components)
    rank = min(labels.shape[1], most)
    held = np.arange(n) % 5 == 0

    def fit(used: np.ndarray) -> tuple[FluxModel, np.ndarray]:
        """The flux model of some stars with the most components, and the clean spectra of all."""
        model = jax.tree.map(np.asarray, fit_flux_model(terms, flux, noise_level, template, most, used.astype(noise_level.dtype)))
        return model, matmul(terms - model.term_mean[None, :], model.coef)

    model, clean = fit(~held)
    z = np.asarray(project_flux(model, flux[held]))
    tried = []
    for number in n_components:
        few = np.arange(clean.shape[1]) < number  # the others are set to zero, so that all numbers share one program
        experts = fit_local_experts(clean * few, y, np.where(held, -1, cell), n_cells, rank)
        tried.append(np.mean((np.asarray(predict_local_experts(experts, z * few, noise_level[held]).y) - y[held]) ** 2))
    number = n_components[int(np.argmin(tried))]
    model, clean = fit(np.ones(n, bool))
    experts = jax.tree.map(np.asarray, fit_local_experts(clean * (np.arange(clean.shape[1]) < number), y, cell, n_cells, rank))
    model = model._replace(components=model.components[:number], coef=model.coef[:, :number])
    experts = experts._replace(mean=experts.mean[:, :number], axes=experts.axes[:, :, :number])
    return LocalMixture(to_device(model), to_device(experts), np.array(tried, noise_level.dtype))


@by_numpy
def error_template(error: Float[AnyArray, "N P"], noise: Float[AnyArray, " N"]) -> Float[AnyArray, " P"]:
    """Root mean square error of each pixel, in units of the stars' noise levels."""
    return ((error / noise[:, None]) ** 2).mean(axis=0) ** 0.5
