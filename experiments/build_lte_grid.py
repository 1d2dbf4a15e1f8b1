"""Computes the grid of LTE model spectra that ships with the package.

    pip install -e '.[synthesis]'
    python -m experiments.build_lte_grid

5 to 10 s a node on one idle core, 720 nodes by default: about an hour on two cores. Every node is written to
``--nodes-dir`` as it is finished, so that a run that was stopped goes on where it was. The last step compresses the nodes
into ``--output`` and prints how well they are reconstructed from it.
"""

from __future__ import annotations

import itertools
import multiprocessing
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from rich.progress import Progress

from experiments.command_line import console, run_command
from moe_jax.files import atomic_path
from moe_jax.grid import GRID_FILE, compress_grid, reconstruct_nodes, save_grid
from moe_jax.synthesis import Node, NodeSpectrum, is_available, synthesize_node


@dataclass(frozen=True)
class BuildConfig:
    """Axes of the grid and where its files go."""

    preset: Literal["default", "smoke"] = "default"
    T_eff: tuple[float, ...] = (3750.0, 4000.0, 4500.0, 5000.0, 5500.0, 6000.0)
    """Effective temperatures, K."""
    log_g: tuple[float, ...] = (1.0, 2.0, 3.0, 4.0, 5.0)
    M_H: tuple[float, ...] = (-2.5, -2.0, -1.5, -1.0, -0.5, 0.0, 0.5, 0.75)
    a_M: tuple[float, ...] = (-0.25, 0.125, 0.5)
    n_components: int = 320
    """Principal components that are kept of the normalised flux."""
    jobs: int = os.cpu_count() or 1
    """Nodes computed at the same time."""
    nodes_dir: Path = Path(".cache/lte_grid")
    """Where each finished node is kept."""
    output: Path = GRID_FILE


PRESETS: dict[str, BuildConfig] = {
    "default": BuildConfig(),
    "smoke": BuildConfig(
        preset="smoke", T_eff=(4500.0, 5000.0), log_g=(2.0, 3.0), M_H=(-0.5, 0.0), a_M=(-0.25, 0.5), n_components=12,
        output=Path(".cache/lte_grid_smoke.npz"),
    ),
}  # fmt: skip


def node_file(folder: Path, node: Node) -> Path:
    """Where a finished node is kept."""
    return folder / f"t{node.T_eff:.0f}_g{node.log_g:+.2f}_m{node.M_H:+.3f}_a{node.a_M:+.3f}.npz"


def read_node(path: Path) -> NodeSpectrum:
    """Reads a node that was computed before."""
    with np.load(path) as arrays:
        return NodeSpectrum(arrays["norm"], arrays["log_continuum"])


def compute_node(folder: Path, node: Node) -> None:
    """Computes one node and writes it; a process that is killed leaves no half-written node."""
    spectrum = synthesize_node(node)
    with atomic_path(node_file(folder, node)) as path, open(path, "wb") as file:
        np.savez(file, norm=spectrum.norm, log_continuum=spectrum.log_continuum)


def compute_nodes(folder: Path, nodes: list[Node], jobs: int) -> None:
    """Computes the nodes that ``folder`` does not hold yet, ``jobs`` at a time."""
    folder.mkdir(parents=True, exist_ok=True)
    missing = [node for node in nodes if not node_file(folder, node).exists()]
    if not missing:
        return
    import pysme  # noqa: F401  -- creates its settings folder once, before several processes would

    context = multiprocessing.get_context("spawn")
    with Progress(console=console) as progress, ProcessPoolExecutor(jobs, mp_context=context) as pool:
        task = progress.add_task("LTE spectra", total=len(nodes), completed=len(nodes) - len(missing))
        for future in as_completed([pool.submit(compute_node, folder, node) for node in missing]):
            future.result()
            progress.advance(task)


def main(config: BuildConfig) -> None:
    """Computes what is missing, compresses, writes the grid."""
    if not is_available():
        raise ModuleNotFoundError("the packages of the extra 'synthesis' are missing: pip install -e '.[synthesis]'")
    axes = (config.T_eff, config.log_g, config.M_H, config.a_M)
    nodes = [Node(*labels) for labels in itertools.product(*axes)]
    compute_nodes(config.nodes_dir, nodes, config.jobs)
    spectra = [read_node(node_file(config.nodes_dir, node)) for node in nodes]
    shape = tuple(len(axis) for axis in axes)
    norm = np.stack([spectrum.norm for spectrum in spectra]).reshape(*shape, -1)
    log_continuum = np.stack([spectrum.log_continuum for spectrum in spectra]).reshape(*shape, -1)
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
