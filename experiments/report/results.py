"""What the experiments share: configuration, provenance, and results that are written whole or not at all."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from experiments.report.figures import save_figure
from experiments.runner.provenance import Run
from experiments.runner.stages import console
from moe_jax.core.arrays import InputError
from moe_jax.core.files import atomic_folder


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
