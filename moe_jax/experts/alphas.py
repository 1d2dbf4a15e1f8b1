"""The choice of a ridge penalty: the smallest cross-validated error on a grid, which may be extended."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import jax
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Bool, Float, Int

from moe_jax.core.arrays import AnyArray, InputError, jit_off_host, namespace, require_whole
from moe_jax.core.convert import convert_arguments

Tree = TypeVar("Tree")


class AlphaChoice(NamedTuple):
    """The alpha of the smallest cross-validated error."""

    alpha: Float[AnyArray, ""]
    position: Int[AnyArray, ""]  #: its place among the alphas
    at_edge: Bool[AnyArray, ""]  #: it is the smallest or the largest of several, so the best may lie outside the grid


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
    return _select(alphas, mse)


@jit_off_host
def _select(alphas: AnyArray, mse: AnyArray) -> AlphaChoice:
    xp = namespace(alphas, mse)
    position = xp.argmax(xp.where(mse == xp.nanmin(mse), alphas, -xp.inf))
    alpha, failed = alphas[position], xp.isnan(mse)
    smallest, largest = xp.min(xp.where(failed, xp.inf, alphas)), xp.max(xp.where(failed, -xp.inf, alphas))
    return AlphaChoice(alpha, position, ((alpha == smallest) | (alpha == largest)) & (len(alphas) > 1))


def search_alphas(
    alphas: Float[AnyArray, " A"],
    evaluate: Callable[[Any], tuple[Any, Tree]],
    extend_decades: int,
) -> tuple[AlphaChoice, Float[AnyArray, " D"], Float[AnyArray, " D"], Tree]:
    """Evaluates a grid, and extends it while the best alpha lies at an end: each time by one alpha, ten times beyond that end.

    ``evaluate`` takes n alphas and gives their n errors, and arrays whose first dimension is n. A grid of one alpha has no ends
    and is not extended. With 0 ``extend_decades``, the most alphas that may be added, the function works under ``jit``.

    Returns:
        The choice; the D = A + extend_decades alphas, those of the grid first, and their errors, NaN where none was added; and
        the arrays at the chosen alpha.
    """
    require_whole("extend_decades", extend_decades, 0)
    n_most = len(alphas) + extend_decades
    mse, arrays = evaluate(alphas)
    xp = namespace(alphas, mse)
    choice = select_alpha(alphas, mse)
    while len(alphas) < n_most and choice.at_edge:
        smallest, largest = xp.min(alphas), xp.max(alphas)
        if choice.alpha not in (smallest, largest):  # the alphas beyond it failed
            break
        beyond = (smallest / 10 if choice.alpha == smallest else largest * 10)[None]
        more = (beyond, *evaluate(beyond))
        alphas, mse, arrays = jax.tree.map(lambda old, new: xp.concatenate([old, new]), (alphas, mse, arrays), more)
        choice = select_alpha(alphas, mse)
    tried, errors = (xp.pad(array, (0, n_most - len(alphas)), constant_values=xp.nan) for array in (alphas, mse))
    return choice, tried, errors, jax.tree.map(lambda array: array[choice.position], arrays)


def require_positive(alpha: ArrayLike) -> None:
    """Raises an ``InputError`` unless there are penalties and all are positive; tracers are not checked."""
    if isinstance(alpha, jax.core.Tracer):
        return
    values = np.asarray(alpha)
    if values.size == 0 or values.dtype.kind not in "biuf" or not (np.isfinite(values) & (values > 0)).all():
        raise InputError(f"alpha is {alpha}, expected positive numbers")
