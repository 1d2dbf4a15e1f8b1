"""Principal components of spectra: by a randomised decomposition, or from their scatter matrix."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float, PRNGKeyArray

from moe_jax.core.arrays import AnyArray, InputError, matmul

_OVERSAMPLING = 28

_POWER_ITERATIONS = 9


class PCA(NamedTuple):
    """Principal components of spectra."""

    mean: Float[jax.Array, " P"]
    components: Float[jax.Array, "C P"]  #: unit vectors, the strongest first; the largest element of each is positive


def fit_pca(key: PRNGKeyArray, x: Float[AnyArray, "N P"], n_components: int) -> PCA:
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
def fit_pca_scatter(key: PRNGKeyArray, mean: Float[jax.Array, " P"], scatter: Float[jax.Array, "P P"], n_components: int) -> PCA:
    """``fit_pca`` from the mean of the stars and the sum of their products about it."""
    return PCA(mean, _components(key, lambda vectors: matmul(scatter, vectors), mean, n_components, len(scatter)))


@functools.partial(jax.jit, static_argnames="n_components")
def _fit_pca(key: jax.Array, x: jax.Array, n_components: int) -> PCA:
    mean = jnp.mean(x, axis=0)

    def scatter(vectors: jax.Array) -> jax.Array:
        """(X - mean)' (X - mean) V without a centred copy of X."""
        projected = matmul(x, vectors) - matmul(mean[None, :], vectors)
        return matmul(x.T, projected) - jnp.outer(mean, jnp.sum(projected, axis=0))

    return PCA(mean, _components(key, scatter, mean, n_components, len(x)))


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
