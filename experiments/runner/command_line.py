"""What all commands share: options in groups, presets, errors in one sentence.

A command's configuration is a frozen dataclass. Options that several commands have are dataclasses of their own, and fields of
it, made by ``group``.
"""

from __future__ import annotations

import argparse
import atexit
import dataclasses
import functools
import gc
import math
import operator
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax
import platformdirs
import tyro
from tyro.constructors import ConstructorRegistry, StructConstructorSpec, StructTypeInfo

from moe_jax.core.arrays import InputError

EXIT_BAD_INPUT = 2
MOST_COMPILED = 2**30  # bytes of compiled programs that are kept; those not used for longest go first
Group = TypeVar("Group")


@dataclass(frozen=True)
class PresetConfig:
    """A configuration that starts from one of a command's presets."""

    preset: str = "default"
    """Preset from which the other options start."""


Config = TypeVar("Config", bound=PresetConfig)


def group(default: Group, *, prefix: bool = False, without: tuple[str, ...] = ()) -> Group:
    """A field that is a group of options, a frozen dataclass; with a prefix they begin with its name, as in ``--gate.epochs``.

    The options ``without`` are not offered, as the command sets them itself or does not use them.
    """
    field: Group = dataclasses.field(default=default, kw_only=True, metadata={"prefix": prefix, "without": without})
    return field


def require(config: object, expected: str, holds: Callable[[Any], bool], *names: str) -> None:
    """Raises an ``InputError`` unless the named options are as expected: each a number, None, or a tuple of one or more numbers."""
    for name in names:
        value = getattr(config, name)
        numbers = value if isinstance(value, tuple) else (value,)
        if not numbers or not all(number is None or holds(number) for number in numbers):
            raise InputError(f"{name} is {value}, expected {expected}")


def require_at_least(config: object, **least: float) -> None:
    """Raises an ``InputError`` where a number is too small, or of several numbers one is or none is given."""
    for name, smallest in least.items():
        require(config, f"at least {smallest}", functools.partial(operator.le, smallest), name)


def require_positive(config: object, *names: str) -> None:
    """Raises an ``InputError`` unless all numbers are positive and finite."""
    require(config, "positive numbers", lambda number: 0 < number < math.inf, *names)


def require_fraction(config: object, *names: str) -> None:
    """Raises an ``InputError`` unless all numbers are parts of a whole."""
    require(config, "a number above 0, at most 1", lambda number: 0 < number <= 1, *names)


def require_seed(config: object, *names: str) -> None:
    """Raises an ``InputError`` unless all numbers can be seeds of JAX, NumPy and scikit-learn."""
    require(config, f"0 to {2**32 - 1}", lambda number: 0 <= number < 2**32, *names)


def parse_config(presets: Mapping[str, Config], description: str | None, arguments: Sequence[str]) -> Config:
    """The configuration of a command line: the preset that it names, with what else it sets.

    A preset's numbers of stars are for simulated surveys. Where a survey file is given without a number, all its stars are read.
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--preset", nargs="?", default="default")
    name = parser.parse_known_args(arguments)[0].preset
    default = presets.get(name, presets["default"])  # tyro rejects a name that is no preset
    with _shown_options(presets, default):
        config: Any = tyro.cli(type(default), prog=_program(), default=default, description=description, args=list(arguments))
    options = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    whole = {f"n_{part}": 0 for part in ("train", "test") if f"--{part}-file" in options and f"--n-{part}" not in options}
    parsed: Config = dataclasses.replace(config, data=dataclasses.replace(config.data, **whole)) if whole else config
    return parsed


def _program() -> str:
    """How this command was called, as help shows it."""
    return f"python -m experiments.{Path(sys.argv[0]).stem}"


def _groups(config: Any, without: tuple[str, ...] = ()) -> Iterator[tuple[type, Any, tuple[str, ...]]]:
    """Type, value and left-out options of a configuration and of all dataclasses within it."""
    yield type(config), config, without
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if dataclasses.is_dataclass(value):
            yield from _groups(value, without + field.metadata.get("without", ()))


def _shown_options(presets: Mapping[str, Config], default: Config) -> ConstructorRegistry:
    """How tyro shows options: with the values of other presets, and without the options that a ``group`` leaves out."""
    values = {name: {kind: value for kind, value, _ in _groups(config)} for name, config in presets.items()}
    without = {kind: names for kind, _, names in _groups(default)}
    registry, in_progress = ConstructorRegistry(), set()

    @registry.struct_rule
    def show(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type not in without or info.type in in_progress:
            return None
        in_progress.add(info.type)
        spec = ConstructorRegistry.get_struct_spec(info)
        in_progress.remove(info.type)
        assert isinstance(spec, StructConstructorSpec)
        fields = []
        metadata = {field.name: field.metadata for field in dataclasses.fields(info.type)}
        for field in spec.fields:
            text = " ".join(((field.helptext() if callable(field.helptext) else field.helptext) or "").split())
            for name, groups in values.items():
                value = getattr(groups[info.type], field.name)
                if name != default.preset and field.name != "preset" and not dataclasses.is_dataclass(value):
                    text += f" (preset {name}: {as_typed(value)})" * (value != field.default)
            markers = [tyro.conf.Suppress] if field.name in without[info.type] else []
            markers += [tyro.conf.OmitArgPrefixes] if metadata[field.name].get("prefix") is False else []
            kind: Any = tyro.extras.literal_type_from_choices(presets) if field.name == "preset" else field.type
            for marker in markers:
                kind = Annotated[kind, marker]
            fields.append(dataclasses.replace(field, helptext=text or None, type=kind))
        return dataclasses.replace(spec, fields=tuple(fields))

    return registry


def as_typed(value: Any) -> str:
    """A value as one types it."""
    return " ".join(shlex.quote(str(part)) for part in (value if isinstance(value, tuple) else (value,)))


@dataclass(frozen=True)
class Cluster:
    """Several processes that share the work, each with its own devices."""

    join: bool = False
    """Join other processes; under SLURM and on Cloud TPU the options below are found from the environment."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    n_processes: int | None = None
    """Number of processes."""
    process_id: int | None = None
    """Number of this process, from 0."""

    def __post_init__(self) -> None:
        given = (self.coordinator, self.n_processes, self.process_id)
        if not self.join and any(value is not None for value in given):
            raise InputError("coordinator, n_processes or process_id was given without join, expected --cluster.join")
        if None in given and given != (None, None, None):
            raise InputError(f"coordinator, n_processes and process_id are {given}, expected all three or none")

    def start(self) -> None:
        """Joins the other processes.

        Raises:
            InputError: where they cannot be found.
        """
        if not self.join:
            return
        try:
            jax.distributed.initialize(self.coordinator, self.n_processes, self.process_id)
        except (ValueError, RuntimeError) as reason:
            raise InputError(f"--cluster.join: the other processes were not found ({str(reason).splitlines()[0]})") from reason


_compilation = {"seconds": 0.0}


def _count_compilation(event: str, duration_secs: float, **_: str | int) -> None:
    if event.startswith("/jax/core/compile/"):
        _compilation["seconds"] += duration_secs


def compile_seconds() -> float:
    """Seconds of this process so far in tracing, lowering and compiling."""
    return _compilation["seconds"]


def keep_compiled_programs() -> None:
    """Keeps compiled programs on disk for the next run, among the user's caches or in JAX_COMPILATION_CACHE_DIR."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(platformdirs.user_cache_path("moe_jax") / "compiled"))
        jax.config.update("jax_compilation_cache_max_size", MOST_COMPILED)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def use_all_cores() -> None:
    """Makes each core of a CPU a device, so that gates of many seeds share the cores. Call it before JAX looks for devices."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def run_command(main: Callable[[Any], object], presets: Mapping[Any, Any] | type, description: str | None) -> None:
    """Runs an experiment from the command line; bad input ends in one sentence and exit code 2, without a traceback.

    ``presets`` are configurations by name, or the type of one that has no presets. ``--help`` begins with the description.
    """
    atexit.register(gc.freeze)  # else Python looks for cycles among all objects before it ends, for a quarter of a second
    try:
        if isinstance(presets, Mapping):
            config = parse_config(presets, description, sys.argv[1:])
        else:
            config = tyro.cli(presets, prog=_program(), description=description)
        use_all_cores()
        keep_compiled_programs()
        jax.monitoring.register_event_duration_secs_listener(_count_compilation)
        main(config)
    except (InputError, OSError, ModuleNotFoundError) as reason:
        print(f"error: {reason}", file=sys.stderr)
        sys.exit(EXIT_BAD_INPUT)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        sys.exit(130)
