"""Additive sufficient statistics of a ridge regression: those of parts are added, and a part is held out by subtraction."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Float

from moe_jax.core.arrays import matmul
from moe_jax.core.cholesky import cho_solve, shifted_cholesky
from moe_jax.experts.ridge import Ridge, jitter

Tree = TypeVar("Tree")


class Sums(NamedTuple):
    """Sums over stars, in any leading dimensions."""

    n: Float[jax.Array, "*g"]  #: number of stars
    x: Float[jax.Array, "*g P"]
    y: Float[jax.Array, "*g"]
    xx: Float[jax.Array, "*g P P"]
    xy: Float[jax.Array, "*g P"]
    yy: Float[jax.Array, "*g"]


class Moments(NamedTuple):
    """Means of the stars, and their sums of products about the means."""

    x_mean: Float[jax.Array, " P"]
    y_mean: Float[jax.Array, ""]
    xx: Float[jax.Array, "P P"]
    xy: Float[jax.Array, " P"]


def sum_stars(x: jax.Array, y: jax.Array, mask: jax.Array) -> Sums:
    """Sums of stars; rows of mask 0 must be 0 in x and y.

    Uncentred sums of squares cancel digits; pass roughly centred x and y.
    """
    return Sums(jnp.sum(mask), jnp.sum(x, axis=0), jnp.sum(y), matmul(x.T, x), matmul(x.T, y[:, None])[:, 0], jnp.sum(y**2))


def sum_parts(by_part: Sums) -> Sums:
    """Sums of all parts together; the first dimension counts the parts."""
    return jax.tree.map(lambda leaf: jnp.sum(leaf, axis=0), by_part)


def moments(sums: Sums) -> Moments:
    """Means, and sums of products about them."""
    n = jnp.maximum(sums.n, 1.0)
    x_mean, y_mean = sums.x / n, sums.y / n
    return Moments(x_mean, y_mean, sums.xx - n * jnp.outer(x_mean, x_mean), sums.xy - n * y_mean * x_mean)


def solve_moments(train: Moments, alpha: jax.Array) -> Ridge:
    """The ridge regression of the stars."""
    coef = cho_solve(shifted_cholesky(train.xx, alpha, jitter(train.xx)), train.xy[:, None])[:, 0]
    return Ridge(coef, train.y_mean - jnp.sum(train.x_mean * coef))


def hold_out_each(evaluate: Callable[..., Tree], by_part: Sums, *more: jax.Array) -> Tree:
    """Holds out each part in turn, by subtraction from the sums of all parts.

    Args:
        evaluate: takes the sums of one part, those of all other parts, and the part's row of each of ``more``.
        by_part: sums of each part.
        *more: arrays whose first dimension counts the parts.

    Returns:
        What ``evaluate`` gives, stacked over the parts.
    """
    total = sum_parts(by_part)

    def hold_out(arguments: tuple[Sums, *tuple[jax.Array, ...]]) -> Tree:
        part, *rows = arguments
        return evaluate(part, jax.tree.map(jnp.subtract, total, part), *rows)

    results: Tree = lax.map(hold_out, (by_part, *more))
    return results
