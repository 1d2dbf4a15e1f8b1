"""Where a result came from: command line, commit, versions, machine."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from experiments.runner.command_line import HasPreset, compile_seconds

#: Options that say where things lie, and change no result.
PLACES = ("output_dir", "cache_dir", "use_cache", "results_dir", "cluster")


class Run(HasPreset, Protocol):
    """A configuration, a dataclass, that knows where its results go."""

    @property
    def output_dir(self) -> Path | None:
        """results/EXPERIMENT/PRESET by default."""


def command_of(experiment: str, config: Run, presets: Mapping[str, Any]) -> str:
    """The command line that makes the same results, with the options that differ from the preset's."""
    given = [f"python -m experiments.{experiment}"]
    start = presets[config.preset]
    if config.preset != "default":
        given.append(f"--preset {config.preset}")
    for field in dataclasses.fields(config):  # type: ignore[arg-type]
        value = getattr(config, field.name)
        if value == getattr(start, field.name) or field.name in ("preset", *PLACES):
            continue
        given += _options(field.name, value, getattr(start, field.name))
    return " ".join(given)


def _options(name: str, value: Any, start: Any) -> list[str]:
    """The options that turn one value of a field into another."""
    if dataclasses.is_dataclass(value):
        fields = [field.name for field in dataclasses.fields(value) if getattr(value, field.name) != getattr(start, field.name)]
        return [option for field in fields for option in _options(f"{name}.{field}", getattr(value, field), getattr(start, field))]
    shown = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
    option = name.replace("_", "-")
    if isinstance(value, bool):
        head, dot, last = option.rpartition(".")
        return [f"--{head}{dot}{'' if value else 'no-'}{last}"]
    return [f"--{option} {shown}"]


def git_commit() -> str | None:
    """The commit of the code, marked where the working tree differs; None outside a checkout."""
    folder = Path(__file__).resolve().parents[2]

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", "experiments", "moe_jax", "pyproject.toml")
        return git("rev-parse", "HEAD") + (" with changes" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def describe_run(command: str, config: Run, seconds: Mapping[str, float], **found: Any) -> dict[str, Any]:
    """What run.json holds: all that is needed to repeat the run and to judge it."""
    settings = json.loads(json.dumps(dataclasses.asdict(config), default=str))  # type: ignore[call-overload]
    kept = {name: value for name, value in settings.items() if name not in PLACES}
    total = {"total": round(sum(seconds.values()), 3)}
    return {"command": command, "config": kept} | describe_machine() | {"seconds": dict(seconds) | total} | found


def describe_machine() -> dict[str, Any]:
    """Code, versions, device, and what this process has taken so far."""
    device = jax.devices()[0]
    packages = ("moe_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "pandas", "h5py")
    return {
        "git_commit": git_commit(),
        "versions": {"python": platform.python_version()} | {name: version(name) for name in packages},
        "device": f"{device.platform}: {device.device_kind}",
        "cpu_cores": os.cpu_count(),
        "precision": f"{jnp.zeros(0).dtype}, matmul precision highest (no TF32)",
        "compile_seconds": round(compile_seconds(), 3),
        "peak_memory_gib": round(peak_memory() / 2**30, 2),
    }


def peak_memory() -> int:
    """Bytes of memory that this process held at most. A child's ``ru_maxrss`` starts at its parent's, so /proc comes first."""
    status = Path("/proc/self/status")
    if status.exists():
        found = [line.split()[1] for line in status.read_text().splitlines() if line.startswith("VmHWM:")]
        if found:
            return int(found[0]) * 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
