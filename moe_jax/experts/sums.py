"""Additive sufficient statistics of a ridge regression: those of parts are added, and a part is held out by subtraction."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
from jaxtyping import Float

from moe_jax.core.arrays import AnyArray, map_rows, matmul, namespace
from moe_jax.core.cholesky import cholesky_solver
from moe_jax.experts.ridge import Ridge, jitter

Tree = TypeVar("Tree")


class Sums(NamedTuple):
    """Sums over stars, in any leading dimensions."""

    n: Float[AnyArray, "*g"]  #: number of stars
    x: Float[AnyArray, "*g P"]
    y: Float[AnyArray, "*g"]
    xx: Float[AnyArray, "*g P P"]
    xy: Float[AnyArray, "*g P"]
    yy: Float[AnyArray, "*g"]


class Moments(NamedTuple):
    """Means of the stars, and their sums of products about the means."""

    x_mean: Float[AnyArray, " P"]
    y_mean: Float[AnyArray, ""]
    xx: Float[AnyArray, "P P"]
    xy: Float[AnyArray, " P"]


def sum_stars(x: AnyArray, y: AnyArray, mask: AnyArray) -> Sums:
    """Sums of stars; rows of mask 0 must be 0 in x and y.

    Uncentred sums of squares cancel digits; pass roughly centred x and y.
    """
    return Sums(mask.sum(), x.sum(axis=0), y.sum(), matmul(x.T, x), matmul(x.T, y[:, None])[:, 0], (y**2).sum())


def sum_parts(by_part: Sums) -> Sums:
    """Sums of all parts together; the first dimension counts the parts."""
    return jax.tree.map(lambda leaf: leaf.sum(axis=0), by_part)


def moments(sums: Sums) -> Moments:
    """Means, and sums of products about them."""
    xp = namespace(sums.xx)
    n = xp.maximum(sums.n, xp.ones_like(sums.n))
    x_mean, y_mean = sums.x / n, sums.y / n
    return Moments(x_mean, y_mean, sums.xx - n * xp.outer(x_mean, x_mean), sums.xy - n * y_mean * x_mean)


def solve_moments(train: Moments, alpha: Any) -> Ridge:
    """The ridge regression of the stars."""
    coef = cholesky_solver(train.xx, alpha, jitter(train.xx))(train.xy[:, None])[:, 0]
    return Ridge(coef, train.y_mean - (train.x_mean * coef).sum())


def hold_out_each(evaluate: Callable[[Sums, Sums], Tree], by_part: Sums) -> Tree:
    """Holds out each part in turn, by subtraction from the sums of all parts; stacks what ``evaluate`` gives.

    ``evaluate`` takes the sums of one part, and those of all other parts.
    """
    total = sum_parts(by_part)
    return map_rows(lambda part: evaluate(part, jax.tree.map(operator.sub, total, part)), by_part)
