"""What one waits for before and around the work: imports, help, compilation, a short prediction; beside an older commit."""

from __future__ import annotations

import json
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pandas as pd

from experiments.runner.stages import Stages
from experiments.timing.rows import run_python
from moe_jax.core.arrays import InputError

ROOT = Path(__file__).resolve().parents[2]
N_PREDICTED = 35


class Checkout:
    """The commands of one checkout, each run as a process of its own, with a folder for its compiled programs."""

    def __init__(self, root: Path, scratch: Path) -> None:
        self.root, self.scratch = root, scratch
        scratch.mkdir()

    def seconds(self, *arguments: str, **environment: str) -> float:
        """Wall time of a Python process.

        Raises:
            InputError: where it fails.
        """
        return self._run(arguments, environment)[0]

    def default_run(self, *, first: bool) -> dict[str, float]:
        """The default run without cached stages; the first one finds no compiled programs."""
        out, compiled = self.scratch / "out", self.scratch / "compiled"
        command = ("-m", "experiments.regress_gate", "--no-use-cache", "--output-dir", str(out))
        seconds, log = self._run(command, {"JAX_COMPILATION_CACHE_DIR": str(compiled), "JAX_LOG_COMPILES": "1"})
        run = json.loads((out / "run.json").read_text())
        label = "first" if first else "second"
        times = {
            f"default run, {label} start, s": seconds,
            f"default run, {label} start: tracing and compiling, s": run["compile_seconds"],
        }
        return times | ({"default run: programs compiled": float(log.count("Finished XLA compilation of"))} if first else {})

    def _run(self, arguments: tuple[str, ...], environment: dict[str, str]) -> tuple[float, str]:
        start = time.perf_counter()
        done = run_python(*arguments, cwd=self.root, PYTHONPATH=str(self.root), **environment)
        return time.perf_counter() - start, done.stderr


@contextmanager
def checkout_of(commit: str, folder: Path) -> Iterator[Path]:
    """A checkout of an older commit, which is removed again.

    Raises:
        InputError: where git has no such commit.
    """

    def git(*arguments: str) -> None:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=False)
        if done.returncode:
            raise InputError(f"--before {commit}: git {arguments[0]}: {done.stderr.strip().splitlines()[-1]}")

    git("worktree", "add", "--detach", str(folder), commit)
    try:
        yield folder
    finally:
        git("worktree", "remove", "--force", str(folder))


def time_start(before: str, n_pairs: int, stages: Stages) -> pd.DataFrame:
    """Median of each measure, of the older commit and of this checkout, measured in turns."""
    with tempfile.TemporaryDirectory() as name, checkout_of(before, Path(name) / "tree") as tree:
        folder = Path(name)
        checkouts = {"before": Checkout(tree, folder / "before"), "now": Checkout(ROOT, folder / "now")}
        make = ("-m", "experiments.make_survey", "--n-train", "1", "--n-test", str(N_PREDICTED), "--noise-level", "0.2")
        checkouts["now"].seconds(*make, "--output-dir", str(folder))
        predict = ("-m", "experiments.predict", "results/regress_gate/default/model", str(folder / "test.h5"), "-o")

        def once(checkout: Checkout) -> dict[str, float]:
            compiled = {"JAX_COMPILATION_CACHE_DIR": str(checkout.scratch / "compiled")}
            return {
                "import jax, s": checkout.seconds("-c", "import jax"),
                "import moe_jax, s": checkout.seconds("-c", "import moe_jax"),
                "python -m experiments, s": checkout.seconds("-m", "experiments"),
                "regress_gate --help, s": checkout.seconds("-m", "experiments.regress_gate", "--help"),
                "predict --help, s": checkout.seconds("-m", "experiments.predict", "--help"),
                f"predict {N_PREDICTED} stars, compiled before, s": checkout.seconds(
                    *predict, str(checkout.scratch / "predicted.csv"), **compiled
                ),
            }

        measured: dict[str, list[dict[str, float]]] = {label: [] for label in checkouts}

        def take_turns(measure: Callable[[Checkout], dict[str, float]]) -> None:
            for label, checkout in checkouts.items():
                measured[label].append(measure(checkout))

        with stages("default run, first start"):
            take_turns(lambda checkout: checkout.default_run(first=True))
        with stages("default run, second start"):
            take_turns(lambda checkout: checkout.default_run(first=False))
        with stages.steps("imports, help and predictions", n_pairs + 1) as advance:
            for i in range(n_pairs + 1):
                for label, checkout in checkouts.items():
                    times = once(checkout)
                    measured[label] += [times] * (i > 0)  # the first call compiles
                advance()
    medians = {label: pd.DataFrame(rows).median() for label, rows in measured.items()}
    table = pd.DataFrame(medians).rename_axis("measure").reset_index()
    table["before / now"] = table["before"] / table["now"]
    reference = float(medians["now"]["import jax, s"])
    table["now / import jax"] = np.where(table["measure"].str.endswith(", s"), table["now"] / reference, np.nan)
    return table
