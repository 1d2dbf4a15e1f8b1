"""How good predictions are: R2, MAE, RMSE, overall and by group.

R2 is NaN, without a warning, where it is not defined: for fewer than two stars, or a constant target.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, without_offset
from moe_jax.core.convert import convert_arguments


class GroupScores(NamedTuple):
    """R2 in each of G groups of stars."""

    r2: Float[jax.Array, " G"]  #: NaN where it is not defined
    n: Int[jax.Array, " G"]  #: stars in the group
    defined: Bool[jax.Array, " G"]  #: whether the group has two stars with different targets


@convert_arguments()
def r2_score(y: Float[AnyArray, " N"], prediction: Float[AnyArray, " N"]) -> Float[jax.Array, ""]:
    """Coefficient of determination, 1 - sum (y - prediction)^2 / sum (y - mean y)^2; NaN for a constant y.

    Raises:
        InputError: if the shapes disagree.
    """
    return _r2_score(*without_offset(y, prediction))


@jax.jit
def _r2_score(y: jax.Array, prediction: jax.Array) -> jax.Array:
    d = y - jnp.mean(y)
    total = jnp.sum((d - jnp.mean(d)) ** 2)  # centred twice, as the mean of a y with a large offset is rounded
    defined = jnp.max(y) > jnp.min(y)  # exact; the sum of squares of a constant y is rounding error, not 0
    return jnp.where(defined, 1.0 - jnp.sum((y - prediction) ** 2) / jnp.where(defined, total, 1.0), jnp.nan)


_mae = jax.jit(lambda y, prediction: jnp.mean(jnp.abs(y - prediction)))
_rmse = jax.jit(lambda y, prediction: jnp.sqrt(jnp.mean((y - prediction) ** 2)))


@convert_arguments()
def mae(y: Float[AnyArray, " N"], prediction: Float[AnyArray, " N"]) -> Float[jax.Array, ""]:
    """Mean absolute error, in the unit of y."""
    return _mae(*without_offset(y, prediction))


@convert_arguments()
def rmse(y: Float[AnyArray, " N"], prediction: Float[AnyArray, " N"]) -> Float[jax.Array, ""]:
    """Root of the mean squared error, in the unit of y."""
    return _rmse(*without_offset(y, prediction))


@convert_arguments()
def r2_by_group(
    y: Float[AnyArray, " N"], prediction: Float[AnyArray, " N"], groups: Int[AnyArray, " N"], n_groups: int
) -> GroupScores:
    """R2 within each group, relative to the group's own mean. Stars whose group is not 0 .. n_groups - 1 are left out."""
    return _r2_by_group(*without_offset(y, prediction), groups, n_groups)


@functools.partial(jax.jit, static_argnames="n_groups")
def _r2_by_group(y: jax.Array, prediction: jax.Array, groups: jax.Array, n_groups: int) -> GroupScores:
    member = groups[None, :] == jnp.arange(n_groups)[:, None]
    total = jnp.sum(center_groups(y, member) ** 2, axis=1)
    residual = jnp.sum(jnp.where(member, (y - prediction)[None, :], 0.0) ** 2, axis=1)
    defined = varies(y, member)
    r2 = jnp.where(defined, 1.0 - residual / jnp.where(defined, total, 1.0), jnp.nan)
    return GroupScores(r2, jnp.sum(member, axis=1), defined)


def center_groups(y: Float[jax.Array, " N"], member: Bool[jax.Array, "G N"]) -> Float[jax.Array, "G N"]:
    """Y less its mean over the members of each group, 0 for others. Centred twice, as the first mean is rounded."""
    size = jnp.maximum(jnp.sum(member, axis=1), 1)
    d = jnp.broadcast_to(y, member.shape)
    for _ in range(2):
        d = jnp.where(member, d - (jnp.sum(jnp.where(member, d, 0.0), axis=1) / size)[:, None], 0.0)
    return d


def varies(y: Float[jax.Array, " N"], member: Bool[jax.Array, "G N"]) -> Bool[jax.Array, " G"]:
    """Whether y takes more than one value among the members of each group, without rounding."""
    highest = jnp.max(jnp.where(member, y[None, :], -jnp.inf), axis=1)
    return highest > jnp.min(jnp.where(member, y[None, :], jnp.inf), axis=1)


def retention(r2: float, r2_global: float, r2_oracle: float) -> float:
    """Oracle-gain retention, rho = (R2 - R2_global) / (R2_oracle - R2_global), all on the same stars; NaN if the gain is 0."""
    gain = r2_oracle - r2_global
    return (r2 - r2_global) / gain if gain != 0 else float("nan")
