"""What the experiments share: configuration, provenance, and results that are written whole or not at all."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.cache import DEFAULT_FOLDER, Cache
from experiments.command_line import HasPreset, Stages, compile_seconds, console
from experiments.prepared import DataConfig, draw_keys
from moe_jax.arrays import AnyArray, InputError
from moe_jax.bootstrap import DEFAULT_METHOD
from moe_jax.evaluation import compare_variants
from moe_jax.figures import interval_plot, save_figure
from moe_jax.files import atomic_folder
from moe_jax.intervals import IntervalMethod
from moe_jax.report import markdown_table


@dataclass(frozen=True)
class StudyConfig(DataConfig):
    """An experiment: its data, and where its results go."""

    preset: str = "default"
    """What the other options start from."""
    hidden: int = 64
    """Hidden units of the MLP gate."""
    n_resamples: int = 1_000
    """Bootstrap resamples."""
    confidence_level: float = 0.95
    interval_method: IntervalMethod = DEFAULT_METHOD
    """Of the bootstrap intervals; "percentile" is the report's."""
    output_dir: Path | None = None
    """Where the results go; results/EXPERIMENT/PRESET by default."""
    cache_dir: Path = DEFAULT_FOLDER
    """Where the stages that experiments share are kept."""
    use_cache: bool = True
    """Whether they are."""

    def __post_init__(self) -> None:
        super().__post_init__()
        checks = {
            "hidden": (self.hidden >= 1, "at least 1"),
            "n_resamples": (self.n_resamples >= 1, "at least 1"),
            "confidence_level": (0 < self.confidence_level < 1, "a number between 0 and 1"),
        }
        for name, (fine, expected) in checks.items():
            if not fine:
                raise InputError(f"{name} is {getattr(self, name)}, expected {expected}")

    @property
    def data(self) -> DataConfig:
        """What the prepared stages depend on."""
        return DataConfig(**{field.name: getattr(self, field.name) for field in dataclasses.fields(DataConfig)})

    @property
    def cache(self) -> Cache:
        """The cache of the stages."""
        return Cache(self.cache_dir if self.use_cache else None)


#: The data of a smoke preset.
SMALL: dict[str, Any] = {"n_train": 1_200, "n_test": 1_200, "alphas": (1.0,), "global_alphas": (10.0,), "C_grid": (10.0,)}
#: Options that say where things lie, and change no result.
PLACES = ("output_dir", "cache_dir", "use_cache", "results_dir", "cluster")


class Run(HasPreset, Protocol):
    """A configuration, a dataclass, that knows where its results go."""

    @property
    def output_dir(self) -> Path | None:
        """results/EXPERIMENT/PRESET by default."""


def output_folder(config: Run, experiment: str) -> Path:
    """Where the results go.

    Raises:
        InputError: where a file is in the way, or nothing can be written there: now, and not when the run is over.
    """
    folder = config.output_dir or Path("results") / experiment / config.preset
    if folder.exists() and not folder.is_dir():
        raise InputError(f"{folder}: found a file, expected a folder for the results")
    existing = next(parent for parent in (folder, *folder.absolute().parents) if parent.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as reason:
        why = f"{existing} is not a folder" if not existing.is_dir() else reason.strerror
        raise InputError(
            f"{folder}: found that nothing can be written there ({why}), expected a folder for the results"
        ) from reason
    return folder


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
    folder = Path(__file__).parent

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=folder, capture_output=True, text=True, check=True).stdout.strip()

    try:
        changed = git("status", "--porcelain", "--untracked-files=no", "--", ".", "../moe_jax", "../pyproject.toml")
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
    packages = ("moe_jax", "jax", "jaxlib", "flax", "optax", "numpy", "scipy", "scikit-learn", "pandas", "h5py", "tables")
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


def write_results(
    folder: Path, tables: Mapping[str, pd.DataFrame], drawn: Mapping[str, Figure], report: str, run: Mapping[str, Any]
) -> None:
    """Writes tables, figures, report.md and run.json, all of them or none, and says where; of several processes, the first."""
    if jax.process_index() > 0:
        return
    with atomic_folder(folder) as temporary:
        for name, table in tables.items():
            table.to_csv(temporary / f"{name}.csv", index=False, float_format="%.7g")
        for name, figure in drawn.items():
            save_figure(figure, temporary / f"{name}.png")
        (temporary / "report.md").write_text(report)
        (temporary / "run.json").write_text(json.dumps(run, indent=2, default=_plain) + "\n")
    console.print("written: " + " ".join(str(path) for path in sorted(folder.iterdir())), highlight=False, soft_wrap=True)


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else str(value)


def compare_by(config: StudyConfig, y: AnyArray, variants: Mapping[str, AnyArray], baseline: AnyArray) -> pd.DataFrame:
    """``compare_variants`` with the resamples, level and method of a configuration."""
    return compare_variants(
        draw_keys(config.seed).bootstrap,
        y,
        variants,
        baseline,
        n_resamples=config.n_resamples,
        confidence_level=config.confidence_level,
        method=config.interval_method,
    )


def write_variants(
    experiment: str,
    title: str,
    config: StudyConfig,
    presets: Mapping[str, Any],
    stages: Stages,
    table: pd.DataFrame,
    *,
    setup: str,
    against: str,
    groups: Sequence[str] | None = None,
    sections: Sequence[str] = (),
    tables: Mapping[str, pd.DataFrame] | None = None,
    found: Mapping[str, Any] | None = None,
) -> None:
    """Writes the results of an experiment that compares variants with one baseline: table, figure, report.md, run.json.

    Args:
        experiment: name of its module.
        title: of the report.
        config: of the run.
        presets: of the experiment.
        stages: timed.
        table: of ``moe_jax.evaluation.compare_variants``, with any further columns.
        setup: what was compared on what, in the report.
        against: name of the baseline.
        groups: kind of each variant, for colours.
        sections: Markdown after the table.
        tables: further tables to write.
        found: further fields of run.json.
    """
    command = command_of(experiment, config, presets)
    label = f"$\\Delta R^2$ against {against}, {100 * config.confidence_level:g} % intervals"
    estimate, low, high = (table[column].to_numpy() for column in ("delta_r2", "low", "high"))
    figure = interval_plot(list(table["variant"]), estimate, low, high, label, groups=groups)
    shown = table.drop(columns=["standard_error", "low", "high"]).rename(columns={"delta_r2": f"delta R2 against {against}"})
    shown[f"delta R2 against {against}"] = [interval(row["delta_r2"], row["low"], row["high"]) for row in table.to_dict("records")]
    intervals = (
        f"Intervals: {100 * config.confidence_level:g} %, {config.interval_method} bootstrap over the test stars "
        f"({config.n_resamples:,} resamples) of the mean over seeds; they speak of other test stars only."
    )
    text = [f"# {title}", f"Made by `{command}`.", setup, table_markdown(shown, _FORMATS), intervals]
    report = "\n\n".join([*text, "![Differences of R2](delta_r2.png)", *sections]) + "\n"
    run = describe_run(command, config, stages.seconds, **(found or {}))
    for row in table.to_dict("records"):
        difference = interval(row["delta_r2"], row["low"], row["high"])
        console.print(f"{row['variant']:<56} R2 {row['r2']:.4f}  {difference}", highlight=False)
    write_results(output_folder(config, experiment), {"variants": table, **(tables or {})}, {"delta_r2": figure}, report, run)


_FORMATS = {"gradient_norm": ".1e", "loss": ".5f", "validation_loss": ".5f", "best_epoch": ".0f", "converged": ".0%"}


def table_markdown(table: pd.DataFrame, formats: Mapping[str, str] | None = None) -> str:
    """A table in Markdown; floats with four decimals where ``formats`` has nothing else for their column."""
    formats = formats or {}

    def show(column: str, value: Any) -> str:
        if isinstance(value, float | np.floating):
            return "" if value != value else format(float(value), formats.get(column, ".4f"))
        return str(value)

    rows = [[show(str(column), value) for column, value in row.items()] for row in table.to_dict("records")]
    return markdown_table([str(column).replace("_", " ") for column in table.columns], rows)


def interval(estimate: float, low: float, high: float, form: str = "+.4f") -> str:
    """An estimate with its interval, as it stands in reports."""
    return f"{float(estimate):{form}} [{float(low):{form}}, {float(high):{form}}]"
