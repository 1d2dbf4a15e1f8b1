"""Principal components of spectra: by a randomised decomposition, or from their scatter matrix."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, matmul, namespace, to_device, to_host

_OVERSAMPLING = 28
_POWER_ITERATIONS = 9


class PCA(NamedTuple):
    """Principal components of spectra."""

    mean: Float[AnyArray, " P"]
    components: Float[AnyArray, "C P"]  #: unit vectors, the strongest first; the largest element of each is positive


def fit_pca(key: PRNGKeyArray, x: Float[AnyArray, "N P"], n_components: int) -> PCA:
    """Principal components by randomised subspace iteration (Halko, Martinsson & Tropp 2011, algorithm 4.4).

    With 28 extra vectors and nine iterations the components of stellar spectra are those of a full decomposition to
    float32's rounding, for a fraction of its time. So the key of the start does not show in the result.

    Raises:
        InputError: for more components than stars or pixels.
    """
    if not 0 < n_components <= min(x.shape):
        raise InputError(f"n_components is {n_components}, expected 1 to {min(x.shape)} for data of shape {x.shape}")
    (x,) = to_host(x)
    mean, xp = x.mean(axis=0), namespace(x)

    def scatter(vectors: Any) -> Any:
        """(X - mean)' (X - mean) V without a centred copy of X."""
        projected = matmul(x, vectors) - matmul(mean[None, :], vectors)
        return matmul(x.T, projected) - xp.outer(mean, projected.sum(axis=0))

    return _fit(key, scatter, mean, n_components, len(x))


def fit_pca_scatter(key: PRNGKeyArray, mean: Float[AnyArray, " P"], scatter: Float[AnyArray, "P P"], n_components: int) -> PCA:
    """``fit_pca`` from the mean of the stars and the sum of their products about it."""
    mean, scatter = to_host(mean, scatter)
    return _fit(key, lambda vectors: matmul(scatter, vectors), mean, n_components, len(scatter))


def _fit(key: jax.Array, scatter: Callable[[Any], Any], mean: AnyArray, n_components: int, n_most: int) -> PCA:
    """The first eigenvectors of the scatter matrix that ``scatter`` multiplies by."""
    p, xp = len(mean), namespace(mean)
    shape = (p, min(n_components + _OVERSAMPLING, n_most, p))
    if xp is np:
        vectors: Any = np.random.default_rng(np.asarray(jax.random.key_data(key))).standard_normal(shape, mean.dtype)
    else:
        vectors = jax.random.normal(key, shape, mean.dtype)
    for _ in range(_POWER_ITERATIONS):
        vectors = scatter(xp.linalg.qr(vectors)[0])
    basis = xp.linalg.qr(vectors)[0]
    _, rotation = xp.linalg.eigh(matmul(basis.T, scatter(basis)))
    components = matmul(basis, rotation[:, ::-1][:, :n_components]).T
    largest = xp.take_along_axis(components, xp.argmax(xp.abs(components), axis=1)[:, None], axis=1)
    return to_device(PCA(mean, components * xp.sign(largest)))
