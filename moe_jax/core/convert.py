"""One conversion at the door: what a public function is given becomes the arrays that its annotations name, or one sentence.

Lists, pandas objects and integers become floating arrays where the annotation is ``Float[...]``, whole numbers become integers
where it is ``Int[...]``, 0 and 1 become ``False`` and ``True`` where it is ``Bool[...]``, and keys of the old style become typed
keys. Arrays that are right already are handed on as they are. Then their shapes are checked: a dimension such as ``N`` has one
size in all arguments of a function.
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
_ANNOTATION = re.compile(r"(Float|Int|Bool|Key)\[|PRNGKeyArray")


def convert_arguments(*concrete: str, finite: tuple[str, ...] = ()) -> Callable[[Callable[P, Result]], Callable[P, Result]]:
    """Decorator: converts the arguments whose annotations say arrays or keys, and checks that their shapes go together.

    Args:
        *concrete: arguments whose values set shapes or are checked, so that they must not be traced by ``jit`` or ``vmap``.
        finite: arguments that must not hold NaN or infinity, unless they are traced.

    Raises:
        InputError: by the decorated function, where an argument is None, text, ragged, masked, complex or no array at all, holds
            fractions where whole numbers are expected, has not the dimensions of its annotation, has no rows, is not finite, or
            is traced though it must be concrete.
    """

    def decorate(function: Callable[P, Result]) -> Callable[P, Result]:
        signature = inspect.signature(function)
        annotations = {name: str(parameter.annotation) for name, parameter in signature.parameters.items()}
        kinds = {name: _ANNOTATION.search(annotation) for name, annotation in annotations.items()}
        dimensions = {name: _dimensions(annotation) for name, annotation in annotations.items()}

        @functools.wraps(function)
        def converted(*args: P.args, **kwargs: P.kwargs) -> Result:
            given = signature.bind(*args, **kwargs)
            for name, value in given.arguments.items():
                if name in concrete and any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(value)):
                    raise InputError(f"{name} is traced, expected concrete values: give it from outside jit, vmap or grad")
                if value is None and kinds[name] is not None and "None" not in annotations[name]:
                    raise InputError(f"{name} is None, expected an array, or a key")
                if (kind := kinds[name]) is not None and value is not None:
                    given.arguments[name] = _convert(name, value, kind[1])
            arrays = {name: array for name, array in given.arguments.items() if array is not None}
            _require_shapes({name: (array, dimensions[name]) for name, array in arrays.items() if dimensions[name]})
            for name, array in arrays.items():
                if name in finite and not isinstance(array, jax.core.Tracer) and not np.isfinite(np.asarray(array)).all():
                    raise InputError(f"{name} holds numbers that are not finite, expected finite ones")
            return function(*given.args, **given.kwargs)

        return converted

    return decorate


def _dimensions(annotation: str) -> list[str]:
    """Names of an array's dimensions; none where they are not all named, or where something else than an array will do."""
    named = re.fullmatch(r"\w+\[[\w.]+, '([\w ]+)'\]( \| None)?", annotation)
    return named[1].split() if named else []


def _require_shapes(arrays: dict[str, tuple[Any, list[str]]]) -> None:
    """Raises an ``InputError`` unless arrays have the dimensions that are named, those of one name one size, and N at least 1."""
    sizes: dict[str, int] = {}
    shapes: dict[str, str] = {}  # the first array that has a dimension, with its shape
    for name, (array, dimensions) in arrays.items():
        found = dict(zip(dimensions, array.shape, strict=False)) | sizes
        if array.ndim != len(dimensions) or array.shape != tuple(found[dimension] for dimension in dimensions):
            expected = ", ".join(str(sizes.get(dimension, dimension)) for dimension in dimensions)
            beside = next((f" beside {shapes[dimension]}" for dimension in dimensions if dimension in shapes), "")
            raise InputError(f"{name} has shape {array.shape}, expected ({expected}{',' * (len(dimensions) == 1)}){beside}")
        if dimensions[0] == "N" and not len(array):
            raise InputError(f"{name} has shape {array.shape}, expected at least one row")
        sizes, shapes = found, dict.fromkeys(dimensions, f"{name} {array.shape}") | shapes


def _convert(name: str, value: Any, kind: str | None) -> Any:
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
