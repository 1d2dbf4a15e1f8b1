"""Spectra of the model grid, node by node; each is kept, so that a run that was stopped goes on where it was."""

from __future__ import annotations

import multiprocessing
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from pathlib import Path

from rich.progress import Progress

from experiments.runner.stages import console
from moe_jax.core.trees import load_tree, save_tree
from moe_jax.spectra.synthesis import Node, NodeSpectrum, synthesize_node


def node_file(folder: Path, node: Node) -> Path:
    """Where a finished node is kept."""
    return folder / f"t{node.T_eff:.0f}_g{node.log_g:+.2f}_m{node.M_H:+.3f}_a{node.a_M:+.3f}.npz"


def compute_node(folder: Path, node: Node) -> None:
    """Computes one node and writes it; a process that is killed leaves no half-written node."""
    save_tree(node_file(folder, node), synthesize_node(node))


def node_spectra(folder: Path, nodes: Sequence[Node], jobs: int) -> list[NodeSpectrum]:
    """The spectra of the nodes; those that ``folder`` does not hold yet are computed, ``jobs`` at a time."""
    missing = [node for node in nodes if not node_file(folder, node).exists()]
    if missing:
        import pysme  # noqa: F401  -- creates its settings folder once, before several processes would

        context = multiprocessing.get_context("spawn")
        with Progress(console=console) as progress, ProcessPoolExecutor(jobs, mp_context=context) as pool:
            task = progress.add_task("LTE spectra", total=len(nodes), completed=len(nodes) - len(missing))
            for future in as_completed([pool.submit(compute_node, folder, node) for node in missing]):
                future.result()
                progress.advance(task)
    return [load_tree(node_file(folder, node), NodeSpectrum) for node in nodes]
