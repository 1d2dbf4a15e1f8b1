"""Additive sufficient statistics of a ridge regression: those of parts are added, and a part is held out by subtraction."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Float

from moe_jax.core.arrays import matmul
from moe_jax.experts.ridge import cho_solve, cholesky


class Sums(NamedTuple):
    """Sums over stars, in any leading dimensions."""

    n: Float[jax.Array, "*g"]  #: number of stars
    x: Float[jax.Array, "*g P"]
    y: Float[jax.Array, "*g"]
    xx: Float[jax.Array, "*g P P"]
    xy: Float[jax.Array, "*g P"]
    yy: Float[jax.Array, "*g"]


class Moments(NamedTuple):
    """What a ridge regression needs of its stars."""

    x_mean: Float[jax.Array, " P"]
    y_mean: Float[jax.Array, ""]
    xx: Float[jax.Array, "P P"]  #: scatter matrix about the mean
    xy: Float[jax.Array, " P"]


def sum_stars(x: jax.Array, y: jax.Array, mask: jax.Array) -> Sums:
    """Sums of stars; rows of mask 0 must be 0 in x and y.

    Sums of squares lose what the square of the mean exceeds them by, so x and y should have a mean near 0.
    """
    return Sums(jnp.sum(mask), jnp.sum(x, axis=0), jnp.sum(y), matmul(x.T, x), matmul(x.T, y[:, None])[:, 0], jnp.sum(y**2))


def moments(sums: Sums) -> Moments:
    """Means, and sums of products about them."""
    n = jnp.maximum(sums.n, 1.0)
    x_mean, y_mean = sums.x / n, sums.y / n
    return Moments(x_mean, y_mean, sums.xx - n * jnp.outer(x_mean, x_mean), sums.xy - n * y_mean * x_mean)


def solve_moments(train: Moments, alpha: jax.Array) -> jax.Array:
    """(P,) coefficients of the ridge regression."""
    mean_eigenvalue = jnp.trace(train.xx) / len(train.xx)
    return cho_solve(cholesky(train.xx, alpha, mean_eigenvalue), train.xy[:, None])[:, 0]
