"""Where a result came from: command line, commit, versions, machine."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import jax

from experiments.runner.cache import ROOT
from experiments.runner.command_line import PresetConfig, as_typed, compile_seconds

#: Options that say where things lie, and change no result.
PLACES = ("output", "cluster", "results_dir")


def command_of(name: str, config: PresetConfig, presets: Mapping[str, Any]) -> str:
    """The command line that makes the same results: the preset, and the options that differ from the preset's."""
    preset = [f"--preset {config.preset}"] * (config.preset != "default")
    return " ".join([f"python -m experiments.{name}", *preset, *_options(config, presets[config.preset])])


def _options(value: Any, start: Any, prefix: str = "") -> Iterator[str]:
    """The options that turn one configuration, or group of options, into another of its type."""
    for field in dataclasses.fields(value):
        name, new, old = field.name, getattr(value, field.name), getattr(start, field.name)
        if new == old or name in ("preset", *PLACES):
            continue
        if dataclasses.is_dataclass(new):
            yield from _options(new, old, f"{prefix}{name}." if field.metadata["prefix"] else prefix)
        elif isinstance(new, bool):
            yield f"--{prefix}{'' if new else 'no-'}{name}".replace("_", "-")
        else:
            yield f"--{prefix}{name} ".replace("_", "-") + as_typed(new)


def git(*arguments: str) -> str:
    """What git answers in the folder of this project."""
    return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()


def git_commit() -> str | None:
    """The commit of the code, marked where the working tree differs; None outside a checkout."""
    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "experiments", "moe_jax", "pyproject.toml")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_run(command: str, config: PresetConfig, seconds: Mapping[str, float], **results: Any) -> dict[str, Any]:
    """What run.json holds: all that is needed to repeat the run and to judge it."""
    settings = {name: value for name, value in dataclasses.asdict(config).items() if name not in PLACES}
    device = jax.devices()[0]
    packages = ("moe_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "pandas", "h5py")
    return {
        "command": command,
        "config": json.loads(json.dumps(settings, default=str)),
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_cores": os.cpu_count(),
        "precision": f"{jax.dtypes.canonicalize_dtype(float)}, matmul precision highest (no TF32)",
        "compile_seconds": round(compile_seconds(), 3),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
        "seconds": dict(seconds) | {"total": round(sum(seconds.values()), 3)},
    } | results


def peak_memory() -> int:
    """Most bytes of memory that this process has held. /proc comes first, as ``ru_maxrss`` of a child starts at its parent's."""
    status = Path("/proc/self/status")
    if status.exists():
        kibibytes = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if kibibytes:
            return int(kibibytes[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
