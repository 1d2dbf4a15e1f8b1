"""What one waits for before and around the work: imports, help, compilation, a short prediction; beside an older commit."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pandas as pd

from experiments.runner.cache import ROOT
from experiments.runner.provenance import git
from experiments.runner.stages import Stages
from experiments.timing.rows import run_python
from moe_jax.core.arrays import InputError

N_PREDICTED = 35


class Checkout(NamedTuple):
    """The commands of one checkout, each run as a process of its own."""

    root: Path
    scratch: Path  #: folder of its compiled programs and results

    def run(self, *arguments: str, **environment: str) -> tuple[float, str]:
        """Wall time of a Python process, and what it logs.

        Raises:
            InputError: where it fails.
        """
        start = time.perf_counter()
        done = run_python(*arguments, cwd=self.root, PYTHONPATH=str(self.root), **environment)
        return time.perf_counter() - start, done.stderr

    @property
    def compiled(self) -> dict[str, str]:
        """The environment in which compiled programs are kept."""
        return {"JAX_COMPILATION_CACHE_DIR": str(self.scratch / "compiled")}

    def default_run(self, name: str) -> dict[str, float]:
        """The default run without cached stages; the first one finds no compiled programs."""
        out = self.scratch / "out"
        command = ("-m", "experiments.regress_gate", "--no-use-cache", "--output-dir", str(out))
        seconds, log = self.run(*command, **self.compiled, JAX_LOG_COMPILES="1")
        run = json.loads((out / "run.json").read_text())
        times = {f"{name}, s": seconds, f"{name}: tracing and compiling, s": run["compile_seconds"]}
        compiled = {"default run: programs compiled": float(log.count("Finished XLA compilation of"))}
        return times | (compiled if "first" in name else {})

    def short_runs(self, survey: Path) -> dict[str, float]:
        """Imports, help, and the prediction of a file of stars."""
        model, table = "results/regress_gate/default/model", str(self.scratch / "predicted.csv")
        commands = {
            "import jax, s": ("-c", "import jax"),
            "import moe_jax, s": ("-c", "import moe_jax"),
            "python -m experiments, s": ("-m", "experiments"),
            "regress_gate --help, s": ("-m", "experiments.regress_gate", "--help"),
            "predict --help, s": ("-m", "experiments.predict", "--help"),
            f"predict {N_PREDICTED} stars, compiled before, s": ("-m", "experiments.predict", model, str(survey), "-o", table),
        }
        return {name: self.run(*command, **self.compiled)[0] for name, command in commands.items()}


@contextmanager
def checkout_of(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout of an older commit, which is removed again.

    Raises:
        InputError: where git has no such commit.
    """
    try:
        git("worktree", "add", "--detach", str(folder), commit)
    except subprocess.CalledProcessError as reason:
        raise InputError(f"--before {commit}: git worktree: {reason.stderr.strip().splitlines()[-1]}") from reason
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def time_start(before: str, n_pairs: int, stages: Stages) -> pd.DataFrame:
    """Median of each measure, of the older commit and of this checkout, measured in turns."""
    with tempfile.TemporaryDirectory() as scratch, checkout_of(before, Path(scratch) / "tree") as tree:
        folder = Path(scratch)
        checkouts = {"before": Checkout(tree, folder / "before"), "now": Checkout(ROOT, folder / "now")}
        measured: dict[str, list[dict[str, float]]] = {}
        for label, checkout in checkouts.items():
            checkout.scratch.mkdir()
            measured[label] = []
        make = ("-m", "experiments.make_survey", "--n-train", "1", "--n-test", str(N_PREDICTED), "--noise-level", "0.2")
        checkouts["now"].run(*make, "--output-dir", str(folder))
        for name in ("default run, first start", "default run, second start"):
            with stages(name):
                for label, checkout in checkouts.items():
                    measured[label].append(checkout.default_run(name))
        for i in stages.each("imports, help and predictions", range(n_pairs + 1)):
            for label, checkout in checkouts.items():
                times = checkout.short_runs(folder / "test.h5")
                measured[label] += [times] * (i > 0)  # the first call compiles
    medians = {label: pd.DataFrame(rows).median() for label, rows in measured.items()}
    table = pd.DataFrame(medians).rename_axis("measure").reset_index()
    table["before / now"] = table["before"] / table["now"]
    reference = float(medians["now"]["import jax, s"])
    table["now / import jax"] = np.where(table["measure"].str.endswith(", s"), table["now"] / reference, np.nan)
    return table
