"""Routing combines gate weights and expert predictions into one prediction for each star."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike
from jaxtyping import Float, Int

from moe_jax.core.arrays import AnyArray, by_numpy, namespace
from moe_jax.core.convert import convert_arguments

FALLBACK_THRESHOLD = 0.5


@convert_arguments()
@by_numpy
def route_soft(weights: Float[AnyArray, "N K"], expert_predictions: Float[AnyArray, "N K"]) -> Float[AnyArray, " N"]:
    """The mixture, sum over k of weights * expert_predictions."""
    return (weights * expert_predictions).sum(axis=1)


@convert_arguments()
@by_numpy
def route_hard(weights: Float[AnyArray, "N K"], expert_predictions: Float[AnyArray, "N K"]) -> Float[AnyArray, " N"]:
    """The prediction of the expert with the largest weight; the first of several equal ones."""
    return select_expert(expert_predictions, weights.argmax(axis=1))


@convert_arguments()
@functools.partial(jax.jit, static_argnames="threshold")
def route_fallback(
    weights: Float[AnyArray, "N K"],
    expert_predictions: Float[AnyArray, "N K"],
    global_prediction: Float[AnyArray, " N"],
    threshold: float = FALLBACK_THRESHOLD,
) -> Float[AnyArray, " N"]:
    """The mixture, but the global model's prediction for stars whose largest weight is below ``threshold``."""
    unsure = jnp.max(jnp.asarray(weights), axis=1) < threshold
    return jnp.where(unsure, global_prediction, route_soft(weights, expert_predictions))


@convert_arguments()
@by_numpy
def sharpen(weights: Float[AnyArray, "N K"], temperature: ArrayLike) -> Float[AnyArray, "N K"]:
    """Weights at another temperature, proportional to weights^(1 / temperature): sharper below 1, more uniform above."""
    xp = namespace(weights)
    logits = xp.log(xp.maximum(weights, xp.finfo(weights.dtype).tiny)) / temperature
    sharp = xp.exp(logits - logits.max(axis=1, keepdims=True))
    return sharp / sharp.sum(axis=1, keepdims=True)


@convert_arguments()
@by_numpy
def route_oracle(cell: Int[AnyArray, " N"], expert_predictions: Float[AnyArray, "N K"]) -> Float[AnyArray, " N"]:
    """The prediction of the true cell's expert; NaN for a star that no cell covers (cell -1), or whose cell has no expert."""
    xp = namespace(cell, expert_predictions)
    has_expert = (cell >= 0) & (cell < expert_predictions.shape[1])
    prediction = select_expert(expert_predictions, xp.where(has_expert, cell, 0))
    return xp.where(has_expert, prediction, xp.full_like(prediction, xp.nan))


@by_numpy
def select_expert(expert_predictions: Float[AnyArray, "N K"], expert: Int[AnyArray, " N"]) -> Float[AnyArray, " N"]:
    """The prediction of one given expert for each star."""
    return namespace(expert_predictions).take_along_axis(expert_predictions, expert[:, None], axis=1)[:, 0]
