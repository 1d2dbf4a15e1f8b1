"""A study: the frame that checks the folder, computes, and writes tables, figures, report.md and run.json, all or nothing."""

from __future__ import annotations

import json
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import jax
import numpy as np
import pandas as pd
from rich.tree import Tree

from experiments.pipeline.config import StudyConfig
from experiments.report.figures import Figure, save_figure
from experiments.runner.cache import require_writable
from experiments.runner.provenance import command_of, describe_run
from experiments.runner.stages import Stages, console
from moe_jax.core.files import atomic_folder

Config = TypeVar("Config", bound=StudyConfig)


@dataclass(frozen=True)
class Results:
    """What a study found, before it is written."""

    title: str
    sections: Sequence[str]
    """Paragraphs of report.md, after the title and the command."""
    tables: Mapping[str, pd.DataFrame]
    figures: Mapping[str, Figure] = field(default_factory=dict)
    fields: Mapping[str, Any] = field(default_factory=dict)
    """Further fields of run.json."""
    write_more: Callable[[Path, dict[str, Any]], None] | None = None
    """Writes further files, given the folder and what run.json holds."""


@dataclass(frozen=True)
class Study(Generic[Config]):
    """A command that computes results from a configuration; calling it runs it and writes them."""

    name: str
    presets: Mapping[str, Config]
    compute: Callable[[Config, Stages], Results]
    folder: Callable[[Config], Path] | None = None
    """Where the results of a configuration without ``output_dir`` go; by default to results/NAME/PRESET."""

    def __call__(self, config: Config) -> Results:
        """Computes and writes; of several processes, the first writes."""
        default = Path("results") / self.name / config.preset if self.folder is None else self.folder(config)
        folder, stages = config.output.output_dir or default, Stages()
        require_writable(folder, "the results")
        results = self.compute(config, stages)
        command = command_of(self.name, config, self.presets)
        if jax.process_index() == 0:
            write_results(folder, results, command, describe_run(command, config, stages.seconds, **results.fields))
        return results


def write_results(folder: Path, results: Results, command: str, run: dict[str, Any]) -> None:
    """Writes tables, figures, report.md and run.json, all of them or none, and shows their names."""
    with atomic_folder(folder) as temporary:
        for name, table in results.tables.items():
            table.to_csv(temporary / f"{name}.csv", index=False, float_format="%.7g")
        for name, figure in results.figures.items():
            save_figure(figure, temporary / f"{name}.png")
        report = "\n\n".join([f"# {results.title}", f"Made by `{command}`.", *results.sections])
        (temporary / "report.md").write_text(report + "\n")
        (temporary / "run.json").write_text(json.dumps(run, indent=2, default=_plain) + "\n")
        if results.write_more is not None:
            results.write_more(folder, run)
        names = {path.name for path in temporary.iterdir()}
    console.print(tree_of(folder, names))


def tree_of(folder: Path, names: Collection[str]) -> Tree:
    """Those files of a folder that were written: a line for each suffix, and for each folder within. It may hold older ones."""
    tree = Tree(f"written: {folder}")
    files = sorted(path for path in folder.iterdir() if path.name in names)
    for suffix in sorted({path.suffix for path in files}):
        tree.add(", ".join(path.name for path in files if path.suffix == suffix))
    for inner in sorted(path for path in folder.iterdir() if path.is_dir()):
        tree.add(f"{inner.name}/: " + ", ".join(sorted(path.name for path in inner.iterdir())))
    return tree


def _plain(value: Any) -> Any:
    return value.tolist() if isinstance(value, np.ndarray | np.generic | jax.Array) else str(value)
