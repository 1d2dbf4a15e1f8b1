"""The choice of a ridge penalty: the smallest cross-validated error on a grid, which may be extended."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError
from moe_jax.core.convert import convert_arguments

Tree = TypeVar("Tree")


class AlphaChoice(NamedTuple):
    """The alpha of the smallest cross-validated error."""

    alpha: Float[jax.Array, ""]
    position: Int[jax.Array, ""]  #: its place among the alphas
    at_edge: Bool[jax.Array, ""]  #: it is the smallest or the largest of several, so the best may lie outside the grid


@convert_arguments()
def select_alpha(alphas: Float[AnyArray, " A"], mse: Float[AnyArray, " A"]) -> AlphaChoice:
    """The alpha with the smallest error. A tie goes to the larger alpha, and an error of NaN is never chosen.

    Raises:
        InputError: no alphas, or only errors of NaN.
    """
    if len(alphas) == 0:
        raise InputError("alphas is empty, expected at least one positive number")
    if not isinstance(mse, jax.core.Tracer) and np.isnan(np.asarray(mse)).all():
        raise InputError(f"mse is NaN at all {len(alphas)} alphas, expected a number at one of them at least")
    return _select(jnp.asarray(alphas), jnp.asarray(mse))


@jax.jit
def _select(alphas: jax.Array, mse: jax.Array) -> AlphaChoice:
    position = jnp.argmax(jnp.where(mse == jnp.nanmin(mse), alphas, -jnp.inf))
    alpha, failed = alphas[position], jnp.isnan(mse)
    smallest, largest = jnp.min(jnp.where(failed, jnp.inf, alphas)), jnp.max(jnp.where(failed, -jnp.inf, alphas))
    return AlphaChoice(alpha, position, ((alpha == smallest) | (alpha == largest)) & (len(alphas) > 1))


def search_alphas(
    alphas: Float[jax.Array, " A"],
    evaluate: Callable[[Float[jax.Array, " n"]], tuple[Float[jax.Array, " n"], Tree]],
    extend_decades: int,
) -> tuple[AlphaChoice, Float[jax.Array, " D"], Float[jax.Array, " D"], Tree]:
    """Evaluates a grid, and extends it while the best alpha lies at an end: each time by one alpha, ten times beyond that end.

    Args:
        alphas: the grid. A grid of one alpha has no ends and is not extended.
        evaluate: takes n alphas and gives their n errors, and arrays whose first dimension is n.
        extend_decades: how many alphas may be added; with 0, the function works under ``jit``.

    Returns:
        The choice; the D = A + extend_decades alphas, those of the grid first, and their errors, NaN where none was added; and
        the arrays at the chosen alpha.
    """
    n_most = len(alphas) + extend_decades
    mse, arrays = evaluate(alphas)
    choice = select_alpha(alphas, mse)
    while len(alphas) < n_most and choice.at_edge:
        smallest, largest = jnp.min(alphas), jnp.max(alphas)
        if choice.alpha not in (smallest, largest):  # the alphas beyond it failed
            break
        beyond = (smallest / 10 if choice.alpha == smallest else largest * 10)[None]
        more = (beyond, *evaluate(beyond))
        alphas, mse, arrays = jax.tree.map(lambda old, new: jnp.concatenate([old, new]), (alphas, mse, arrays), more)
        choice = select_alpha(alphas, mse)
    alphas_tried, errors = (jnp.pad(array, (0, n_most - len(alphas)), constant_values=jnp.nan) for array in (alphas, mse))
    best: Tree = jax.tree.map(lambda array: array[choice.position], arrays)
    return choice, alphas_tried, errors, best


def require_positive(alpha: ArrayLike) -> None:
    """Raises an ``InputError`` unless there are penalties and all are positive; tracers are not checked."""
    if isinstance(alpha, jax.core.Tracer):
        return
    values = np.asarray(alpha)
    if values.size == 0 or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"alpha is {alpha}, expected positive numbers")
