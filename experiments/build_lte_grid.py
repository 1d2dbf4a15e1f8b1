"""Computes the grid of LTE model spectra that ships with the package.

    pip install -e '.[synthesis]'
    python -m experiments.build_lte_grid

5 to 10 s a node on one idle core, 720 nodes by default: about an hour on two cores. Every node is written to
``--nodes-dir`` as it is finished, so that a run that was stopped goes on where it was. The last step compresses the nodes
into ``--output`` and prints how well they are reconstructed from it.
"""

from __future__ import annotations

import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from experiments.pipeline.lte_nodes import node_spectra
from experiments.runner.command_line import PresetConfig, require_at_least, run_command
from experiments.runner.stages import console
from moe_jax.spectra.grid import GRID_FILE, compress_grid, reconstruct_nodes, save_grid
from moe_jax.spectra.synthesis import Node, is_available


@dataclass(frozen=True)
class BuildConfig(PresetConfig):
    """Axes of the grid and where its files go."""

    T_eff: tuple[float, ...] = (3750.0, 4000.0, 4500.0, 5000.0, 5500.0, 6000.0)
    """Effective temperatures, K."""
    log_g: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    """Surface gravities, log10 of cm / s^2."""
    M_H: tuple[float, ...] = (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 0.75)
    """Metallicities, dex."""
    a_M: tuple[float, ...] = (-0.25, 0.125, 0.5)
    """Alpha enhancements [alpha/M], dex."""
    n_components: int = 320
    """Principal components of the normalised flux."""
    jobs: int = os.cpu_count() or 1
    """Nodes computed at the same time."""
    nodes_dir: Path = Path(".cache/lte_grid")
    """Folder of the finished nodes."""
    output: Path = GRID_FILE
    """File of the grid."""

    def __post_init__(self) -> None:
        require_at_least(self, n_components=1, jobs=1)


PRESETS: dict[str, BuildConfig] = {
    "default": BuildConfig(),
    "smoke": BuildConfig(
        preset="smoke", T_eff=(4500.0, 5000.0), log_g=(2.0, 3.0), M_H=(-0.5, 0.0), a_M=(-0.25, 0.5), n_components=12,
        output=Path(".cache/lte_grid_smoke.npz"),
    ),
}  # fmt: skip


def main(config: BuildConfig) -> None:
    """Computes what is missing, compresses, writes the grid."""
    if not is_available():
        raise ModuleNotFoundError("the packages of the extra 'synthesis' are missing: pip install -e '.[synthesis]'")
    axes = (config.T_eff, config.log_g, config.M_H, config.a_M)
    nodes = [Node(*labels) for labels in itertools.product(*axes)]
    spectra = node_spectra(config.nodes_dir, nodes, config.jobs)
    norm, log_continuum = (np.stack(part).reshape(*map(len, axes), -1) for part in zip(*spectra, strict=True))
    grid = compress_grid(axes, norm, log_continuum, n_components=config.n_components)
    save_grid(config.output, grid)
    rebuilt = reconstruct_nodes(grid)
    rms = np.sqrt(np.mean((np.asarray(rebuilt.norm) - norm) ** 2, axis=-1))
    worst_continuum = np.abs(np.asarray(rebuilt.log_continuum) - log_continuum).max()
    console.print(
        f"{len(nodes)} nodes, {config.output} ({config.output.stat().st_size / 1e6:.1f} MB): "
        f"rms of the reconstruction {rms.mean():.1e} of the continuum, worst node {rms.max():.1e}; "
        f"log continuum within {worst_continuum:.1e}"
    )


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
