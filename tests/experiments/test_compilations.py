"""How many programs a run compiles, which is most of what a first run waits for; they lie among the user's caches."""

import os
import subprocess
import sys

import pytest

MOST = 60
SIZES = ["--preset", "smoke", "--n-train", "900", "--n-test", "300", "--alphas", "1", "--global-alphas", "10"]
SIZES += ["--gate.epochs", "2", "--n-resamples", "20", "--calibration.n-stars", "150", "--no-use-cache"]


@pytest.mark.slow
def test_a_run_compiles_few_programs(tmp_path):
    environment = os.environ | {"JAX_LOG_COMPILES": "1", "XDG_CACHE_HOME": str(tmp_path)}
    del environment["JAX_COMPILATION_CACHE_DIR"]
    command = [sys.executable, "-m", "experiments.regress_gate", *SIZES, "--output-dir", str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr[-2000:]
    assert 20 < done.stderr.count("Finished XLA compilation") <= MOST
    if sys.platform == "linux":
        assert len(list((tmp_path / "moe_jax" / "compiled").iterdir())) > 20
