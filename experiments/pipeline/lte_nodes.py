"""Spectra of the model grid, node by node; resumable."""

from __future__ import annotations

import multiprocessing
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

import numpy as np
from rich.progress import Progress

from experiments.runner.stages import console
from moe_jax.core.files import atomic_path
from moe_jax.spectra.synthesis import Node, NodeSpectrum, synthesize_node


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
