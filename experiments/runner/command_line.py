"""What all experiments share at the rim: presets on the command line, timed stages, errors in one sentence."""

from __future__ import annotations

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import jax
import tyro

from moe_jax.core.arrays import InputError

EXIT_BAD_INPUT = 2
COMPILED_PROGRAMS = Path(".cache/moe_jax/compiled")


class HasPreset(Protocol):
    """A configuration that knows which preset it started from."""

    @property
    def preset(self) -> str:
        """Name of the preset."""


Config = TypeVar("Config", bound=HasPreset)


def parse_config(presets: dict[str, Config], description: str | None, arguments: Sequence[str]) -> Config:
    """The configuration of a command line: the preset that it names, with what else it sets.

    A preset's numbers of stars are for simulated surveys: where a survey file is given without a number, all its stars are read.
    """
    name = "default"
    for i, argument in enumerate(arguments):
        if argument == "--preset" and i + 1 < len(arguments):
            name = arguments[i + 1]
        elif argument.startswith("--preset="):
            name = argument.partition("=")[2]
    default = presets.get(name, presets["default"])  # tyro rejects a name that is no preset
    config: Config = tyro.cli(type(default), default=default, description=description, args=list(arguments))
    options = {argument.partition("=")[0].replace("_", "-") for argument in arguments}
    whole = {f"n_{part}": 0 for part in ("train", "test") if f"--{part}-file" in options and f"--n-{part}" not in options}
    changed: Config = dataclasses.replace(config, **whole)  # type: ignore[type-var]
    return changed


@dataclass(frozen=True)
class Cluster:
    """Several processes that share the work, each with its own devices."""

    join: bool = False
    """Whether this process is one of several; under SLURM and on Cloud TPU the rest is found from the environment."""
    coordinator: str | None = None
    """HOST:PORT of the first process."""
    n_processes: int | None = None
    """How many there are."""
    process_id: int | None = None
    """Which of them this is, from 0."""

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
    """Keeps what XLA compiles on disk, so that the next run starts at once; JAX_COMPILATION_CACHE_DIR puts it elsewhere."""
    if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
        jax.config.update("jax_compilation_cache_dir", str(COMPILED_PROGRAMS))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def use_all_cores() -> None:
    """Makes each core of a CPU a device, among which gates of many seeds are divided; before JAX looks for devices."""
    if "xla_force_host_platform_device_count" not in os.environ.get("XLA_FLAGS", ""):
        jax.config.update("jax_num_cpu_devices", os.cpu_count() or 1)


def run_command(main: Callable[[Any], object], presets: dict[str, Any] | type, description: str | None) -> None:
    """Runs an experiment from the command line; bad input ends in one sentence and exit code 2, without a traceback.

    Args:
        main: takes the configuration.
        presets: configurations by name, or the type of one that has no presets.
        description: what ``--help`` says first: the docstring of the experiment.
    """
    try:
        if isinstance(presets, dict):
            config = parse_config(presets, description, sys.argv[1:])
        else:
            config = tyro.cli(presets, description=description)
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
