"""One conversion at the door: what a public function is given becomes the arrays that its annotations name, or one sentence.

Lists, pandas objects and integers become floating arrays where the annotation is ``Float[...]``, whole numbers become integers
where it is ``Int[...]``, 0 and 1 become ``False`` and ``True`` where it is ``Bool[...]``, and keys of the old style become typed
keys. Arrays that are right already are handed on as they are.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable
from typing import Any, ParamSpec, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from moe_jax.core.arrays import InputError

P = ParamSpec("P")
Result = TypeVar("Result")
_ANNOTATION = re.compile(r"(Float|Int|Bool|Key)\[[\w.]+, '([^']*)'\]|PRNGKeyArray")


def convert_arguments(*concrete: str, finite: tuple[str, ...] = ()) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Decorator: converts the arguments whose annotations say arrays or keys.

    Args:
        *concrete: arguments whose values set shapes or are checked, so that they must not be traced by ``jit`` or ``vmap``.
        finite: arguments that must not hold NaN or infinity, unless they are traced.

    Raises:
        InputError: by the decorated function, where an argument is None, text, ragged, masked, complex or no array at all, holds
            fractions where whole numbers are expected, has not the dimensions of a table, is not finite, or is traced though it
            must be concrete.
    """

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        signature = inspect.signature(function)
        kinds = {name: _ANNOTATION.search(str(parameter.annotation)) for name, parameter in signature.parameters.items()}

        @functools.wraps(function)
        def converted(*args: P.args, **kwargs: P.kwargs) -> Result:
            given = signature.bind(*args, **kwargs)
            for name, value in given.arguments.items():
                if name in concrete and any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
                    raise InputError(f"{name} is traced, expected concrete values: give it from outside jit, vmap or grad")
                if value is None and kinds[name] is not None and "None" not in str(signature.parameters[name].annotation):
                    raise InputError(f"{name} is None, expected an array, or a key")
                if (kind := kinds[name]) is not None and value is not None:
                    given.arguments[name] = array = _convert(name, value, kind[1], kind[2])
                    if name in finite and not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
                        raise InputError(f"{name} holds numbers that are not finite, expected finite ones")
            return function(*given.args, **given.kwargs)

        return converted

    return decorate


def _convert(name: str, value: Any, kind: str | None, dimensions: str | None) -> Any:
    if kind is None or kind == "Key":
        return _key(name, value)
    if np.ma.is_masked(value):
        raise InputError(f"{name} has {np.ma.count_masked(value)} masked values, expected none: fill them, or leave their rows out")
    value = np.ma.getdata(value) if isinstance(value, np.ma.MaskedArray) else value
    array = value if isinstance(value, jax.Array | np.ndarray) else _array(name, value)
    dtype = array.dtype
    if kind == "Float" and not (jnp.issubdtype(dtype, jnp.floating) and dtype.itemsize >= 4):
        if not (jnp.issubdtype(dtype, jnp.number) or dtype.kind == "b") or jnp.issubdtype(dtype, jnp.complexfloating):
            raise InputError(f"{name} holds values of type {dtype}, expected real numbers")
        half = jnp.issubdtype(dtype, jnp.floating)
        array = array.astype(jnp.float32 if half else jnp.result_type(float))
    elif kind == "Int" and not jnp.issubdtype(dtype, jnp.integer):
        fraction = not jnp.issubdtype(dtype, jnp.floating) or isinstance(array, jax.core.Tracer)
        if dtype.kind != "b" and (fraction or not (np.asarray(array) == np.round(np.asarray(array))).all()):
            raise InputError(f"{name} holds values of type {dtype}, expected whole numbers")
        array = array.astype(np.int32)
    elif kind == "Bool" and dtype.kind != "b" and not isinstance(array, jax.core.Tracer):
        if dtype.kind not in "iuf" or not np.isin(np.asarray(array), (0, 1)).all():
            raise InputError(f"{name} holds values of type {dtype}, expected True and False")
        array = array.astype(bool)
    n_dimensions = len((dimensions or "").split())
    if n_dimensions > 1 and "*" not in str(dimensions) and "..." not in str(dimensions) and array.ndim != n_dimensions:
        raise InputError(f"{name} has shape {array.shape}, expected ({', '.join(str(dimensions).split())})")
    return array


def _array(name: str, value: Any) -> np.ndarray:
    try:
        array = np.asarray(value)
    except ValueError as reason:
        raise InputError(f"{name} is ragged ({reason}), expected an array of numbers") from reason
    if array.dtype == object:  # a table with columns of several types, or text
        try:
            array = array.astype(float)
        except (TypeError, ValueError) as reason:
            raise InputError(f"{name} holds values of type {type(value).__name__}, expected numbers") from reason
    return array


def _key(name: str, value: Any) -> Any:
    if isinstance(value, jax.Array | np.ndarray):
        if jnp.issubdtype(value.dtype, jax.dtypes.prng_key):
            return value
        if value.dtype == np.uint32 and value.ndim and value.shape[-1] == 2:
            return jax.random.wrap_key_data(jnp.asarray(value), impl="threefry2x32")
    raise InputError(f"{name} is {type(value).__name__}, expected a random key: jax.random.key(seed)")
