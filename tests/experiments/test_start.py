"""How little is loaded before a command knows what it is asked to do: nobody waits for packages that help does not need."""

import json
import subprocess
import sys

import pytest

from experiments.__main__ import COMMANDS

#: Modules that only a run needs.
HEAVY = (
    "pandas.core",
    "sklearn",
    "flax",
    "optax._src",
    "matplotlib.pyplot",
    "scipy.stats",
    "scipy.optimize",
    "h5py._hl",
    "astropy",
)
LIST = (
    "import sys, json, importlib; [importlib.import_module(name) for name in sys.argv[1:]]; print(json.dumps(sorted(sys.modules)))"
)


def loaded_by(*modules):
    """Names of the modules that Python has loaded after an import of some."""
    done = subprocess.run([sys.executable, "-c", LIST, *modules], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.parametrize("modules", [["moe_jax"], [f"experiments.{name}" for name in COMMANDS]], ids=["library", "commands"])
def test_an_import_loads_no_heavy_package(modules):
    loaded = loaded_by(*modules)
    assert set(modules) <= set(loaded)
    assert not [name for name in loaded for heavy in HEAVY if name == heavy or name.startswith(heavy + ".")]


def test_the_library_adds_few_modules_to_those_of_jax():
    assert len(loaded_by("moe_jax")) - len(loaded_by("jax", "lazy_loader")) <= 5


def test_a_package_that_is_loaded_when_used_is_the_package_itself():
    code = "import experiments, pandas as pd, scipy; assert pd.DataFrame({'a': [1]}).a.sum() == 1; print(scipy.stats.norm.ppf(0.5))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (0, "0.0"), done.stderr
