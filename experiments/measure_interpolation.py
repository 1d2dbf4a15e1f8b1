"""How far spectra interpolated in the shipped grid are from spectra that are computed at the same labels.

    pip install -e '.[synthesis]'
    python -m experiments.measure_interpolation

Computes twelve spectra between the nodes (a minute or two on two cores; each is kept in ``--nodes-dir``) and writes the
differences to results/interpolation/. The labels are half-way between nodes of the grid in one to four of its axes.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.lte_nodes import node_spectra
from experiments.runner.command_line import require_at_least, run_command
from experiments.runner.stages import console
from moe_jax.core.files import atomic_folder
from moe_jax.gates.features import LINE_WINDOWS
from moe_jax.spectra.grid import interpolate_grid, load_grid
from moe_jax.spectra.pixels import WAVE
from moe_jax.spectra.synthesis import Node

BETWEEN = (
    Node(4250.0, 2.5, -0.25, 0.125),
    Node(4750.0, 3.5, -1.25, 0.125),
    Node(5250.0, 4.5, -1.75, 0.125),
    Node(5750.0, 1.5, 0.25, 0.125),
    Node(4250.0, 4.5, 0.25, 0.3125),
    Node(4750.0, 1.5, -2.25, -0.0625),
    Node(5250.0, 2.5, -0.75, 0.3125),
    Node(5750.0, 3.5, -0.25, -0.0625),
    Node(4000.0, 3.5, 0.0, 0.125),
    Node(5000.0, 2.0, -0.25, 0.125),
    Node(5250.0, 3.0, 0.0, 0.125),
    Node(5500.0, 1.5, 0.0, 0.125),
)


@dataclass(frozen=True)
class InterpolationConfig:
    """Where the computed spectra are kept and the table goes."""

    jobs: int = os.cpu_count() or 1
    """Spectra computed at the same time."""
    nodes_dir: Path = Path(".cache/lte_grid")
    """Folder of the computed spectra."""
    output_dir: Path = Path("results/interpolation")
    """Folder of the table."""

    def __post_init__(self) -> None:
        require_at_least(self, jobs=1)


def main(config: InterpolationConfig) -> pd.DataFrame:
    """Computes what is missing, compares, writes the table."""
    spectra = node_spectra(config.nodes_dir, BETWEEN, config.jobs)
    interpolated = interpolate_grid(load_grid(), jnp.array(BETWEEN, jnp.float32))
    in_window = np.any([(low <= WAVE) & (high >= WAVE) for low, high in LINE_WINDOWS.values()], axis=0)
    rows = []
    for i, (node, computed) in enumerate(zip(BETWEEN, spectra, strict=True)):
        difference = np.asarray(interpolated.norm[i]) - computed.norm
        rows.append(
            node._asdict()
            | {
                "rms": np.sqrt(np.mean(difference**2)),
                "rms_line_windows": np.sqrt(np.mean(difference[in_window] ** 2)),
                "max": np.abs(difference).max(),
                "max_at_wave": WAVE[np.abs(difference).argmax()],
                "max_log_continuum": np.abs(np.asarray(interpolated.log_continuum[i]) - computed.log_continuum).max(),
            }
        )
    table = pd.DataFrame(rows)
    with atomic_folder(config.output_dir) as folder:
        table.to_csv(folder / "interpolation.csv", index=False, float_format="%.4g")
    console.print(table.to_string(index=False, float_format="%.4g"))
    console.print(f"median rms {table['rms'].median():.1e}, largest {table['rms'].max():.1e} of the continuum")
    return table


if __name__ == "__main__":
    run_command(main, InterpolationConfig, __doc__)
