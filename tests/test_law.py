"""The law of the house: which folder may import which. It is read from the imports of every module."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
WINGS = {"core", "spectra", "experts", "gates", "evaluate"}
#: For each folder (or module at the top) of moe_jax: what it may import besides itself.
LIBRARY = {
    "core": set(),
    **{wing: {"core"} for wing in WINGS - {"core"}},
    "apply": WINGS,
    "mixture": WINGS,
    "estimator": WINGS | {"mixture"},
}
#: Likewise of experiments; all of them may import moe_jax.
EXPERIMENTS = {
    "runner": set(),
    "pipeline": {"runner"},
    "report": {"runner", "pipeline"},
    "timing": {"runner", "pipeline", "report"},
}


def imports(path):
    """(package, place) of each import of ours in a file; the place is a folder or a module at the top of the package."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: expected absolute imports"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        for name in names:
            package, *rest = name.split(".")
            if package in ("moe_jax", "experiments"):
                yield package, rest[0] if rest else ""


def modules(package):
    """(place, path) of each module of a package."""
    for path in sorted((ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT / package).with_suffix("").parts
        if parts != ("__init__",):
            yield parts[0], path


@pytest.mark.parametrize(("place", "path"), list(modules("moe_jax")), ids=lambda value: getattr(value, "stem", value))
def test_a_module_of_the_library_imports_only_what_stands_below_it(place, path):
    assert place in LIBRARY, f"{path}: a folder without a place in the house"
    for package, imported in imports(path):
        assert package == "moe_jax", f"{path} imports {package}"
        assert imported in LIBRARY[place] | {place}, f"{path} imports moe_jax.{imported}"


def test_experiments_stand_on_the_library_and_commands_on_all():
    for place, path in modules("experiments"):
        command = path.parent == ROOT / "experiments"
        assert command or place in EXPERIMENTS, f"{path}: a folder without a place in the house"
        for package, imported in imports(path):
            if package == "moe_jax" or command:
                continue
            assert imported in EXPERIMENTS[place] | {place}, f"{path} imports experiments.{imported}"


def test_there_are_only_commands_at_the_top_of_experiments():
    for path in (ROOT / "experiments").glob("*.py"):
        if not path.stem.startswith("__"):
            assert "run_command(" in path.read_text(), path
