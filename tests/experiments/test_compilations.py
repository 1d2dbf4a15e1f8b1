"""How many programs a run compiles, which is most of what a first run waits for; and where they are kept."""

import os
import subprocess
import sys

import pytest
from small_run import ARGUMENTS

MOST = 60


def run(*arguments, **environment):
    environment = {name: value for name, value in (os.environ | environment).items() if value}
    command = [sys.executable, "-m", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stderr


@pytest.mark.slow
def test_a_run_compiles_few_programs_and_uses_no_random_key_twice(trained, tmp_path):
    """A whole run with JAX's own check of keys. Programs are counted wherever they come from: here, from the shared run's cache."""
    debug = {"JAX_LOG_COMPILES": "1", "JAX_DEBUG_KEY_REUSE": "1"}
    log = run("experiments.regress_gate", *ARGUMENTS, "--no-use-cache", "--output-dir", tmp_path / "out", **debug)
    assert 20 < log.count("Finished XLA compilation") <= MOST


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the caches of a user lie elsewhere")
def test_programs_are_kept_among_the_users_caches(tmp_path):
    sizes = ["--n-train", "2", "--n-test", "2", "--output-dir", tmp_path / "out"]
    run("experiments.make_survey", *sizes, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR="")
    assert len(list((tmp_path / "moe_jax" / "compiled").iterdir())) > 5
