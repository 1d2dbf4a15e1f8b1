"""Lists the experiments: python -m experiments."""

from __future__ import annotations

import ast
import json
import sys
from pathlib import Path

from rich.table import Table

from experiments.runner.stages import console

HERE = Path(__file__).parent
#: In the order in which one would meet them.
COMMANDS = (
    *("regress_gate", "predict", "calibrate_uncertainty", "converge_gate", "measure_leakage", "replicate", "calibrate_bootstrap"),
    *("control_gate", "compare_methods", "ablate_gate", "train_jointly", "cover_all", "scale", "findings", "compare_tabular"),
    *("benchmark", "compare_rvspecfit", "stress_predict", "check_gpu", "make_survey", "build_lte_grid", "measure_interpolation"),
)


def first_line(name: str) -> str:
    """What the docstring of an experiment says first."""
    docstring = ast.get_docstring(ast.parse((HERE / f"{name}.py").read_text())) or ""
    return docstring.split("\n\n")[0].replace("\n", " ")


def run_time(name: str) -> str:
    """How long the committed run took; empty where none is at hand."""
    for folder in (HERE.parent / "results" / name / "default", HERE.parent / "results" / name):
        if (folder / "run.json").exists():
            total = json.loads((folder / "run.json").read_text())["seconds"]["total"]
            return f"{total:.0f} s" if total < 100 else f"{total / 60:.0f} min"
    return ""


def main() -> None:
    """Prints the list, or an error if a word follows."""
    if words := [word for word in sys.argv[1:] if word not in ("-h", "--help")]:
        name = words[0] if words[0] in COMMANDS else "NAME"
        sys.exit(f"experiments: found {words[0]!r}, expected nothing: run python -m experiments.{name}")
    table = Table(title="python -m experiments.NAME [--preset smoke] [--help]")
    table.add_column("NAME", no_wrap=True)
    table.add_column("question")
    table.add_column("time", justify="right", no_wrap=True)
    for name in COMMANDS:
        table.add_row(name, first_line(name), run_time(name))
    console.print(table)
    console.print(
        "time: of the last run in results/ (as cloned, the committed one), stages that were cached left out, on two CPU cores",
    )


if __name__ == "__main__":
    main()
