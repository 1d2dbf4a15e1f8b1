"""Runs that are killed, disks that are full, folders that cannot be written to, keys that are used twice."""

import os
import signal
import subprocess
import sys
import time

import numpy as np
import pandas as pd
import pytest

SMALL = ["--preset", "smoke", "--n-train", "900", "--n-test", "200", "--n-folds", "2", "--alphas", "10", "--global-alphas", "10"]
SMALL += ["--C-grid", "10", "--gate.epochs", "3", "--n-resamples", "20", "--calibration.n-stars", "300"]


def start(*arguments, **environment):
    command = [sys.executable, "-m", "experiments.regress_gate", *SMALL, *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=os.environ | environment)


def run(*arguments, **environment):
    process = start(*arguments, **environment)
    output, errors = process.communicate(timeout=300)
    return process.returncode, output, errors


@pytest.mark.slow
def test_twenty_kills_leave_no_partial_file(tmp_path):
    """SIGKILL at 20 random moments of a small run; the next run completes, and gives what an undisturbed one gives."""
    code, _, errors = run("--output-dir", tmp_path / "whole", "--cache-dir", tmp_path / "cache")
    assert code == 0, errors
    expected = sorted(path.relative_to(tmp_path / "whole") for path in (tmp_path / "whole").rglob("*"))
    killed = 0
    for i, seconds in enumerate(np.random.default_rng(0).uniform(0.5, 8.0, 20)):
        # Every fourth run starts from nothing; the others find their stages in the cache, and die where files are written.
        cache = ["--no-use-cache"] if i % 4 == 0 else ["--cache-dir", tmp_path / "cache"]
        process = start("--output-dir", tmp_path / "out", *cache)
        time.sleep(seconds)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        if (tmp_path / "out").exists():
            # Files are renamed into place one by one, each of them whole.
            for path in (tmp_path / "out").rglob("*.csv"):
                assert path.read_bytes() == (tmp_path / "whole" / path.relative_to(tmp_path / "out")).read_bytes()
            for path in (tmp_path / "out").rglob("*"):
                assert path.relative_to(tmp_path / "out") in expected
    assert killed >= 5
    code, _, errors = run("--output-dir", tmp_path / "out", "--cache-dir", tmp_path / "cache")
    assert code == 0, errors
    assert sorted(path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")) == expected
    whole, again = (pd.read_csv(tmp_path / name / "predictions.csv") for name in ("whole", "out"))
    pd.testing.assert_frame_equal(whole, again)


def test_a_disk_that_is_full(tmp_path):
    """A limit on the size of files stands in for the disk: writing fails with an errno of its own, in the middle of a file."""
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    limited += "import runpy; runpy.run_module('experiments.regress_gate', run_name='__main__', alter_sys=True)"
    arguments = [*SMALL, "--output-dir", str(tmp_path / "out"), "--no-use-cache"]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert not [path for path in tmp_path.rglob("*.partial") if path.is_file()]


@pytest.mark.parametrize("place", ["file/out", "/proc/out", "/sys/out"])
def test_a_folder_that_cannot_be_written_to(tmp_path, place):
    """One sentence at once, not after the run; /proc and /sys are closed to the superuser too."""
    (tmp_path / "file").write_text("")
    output = tmp_path / place
    if not output.parent.exists():
        pytest.skip("not on this system")
    code, printed, errors = run("--output-dir", output, "--no-use-cache")
    assert code == 2
    assert errors.count("\n") == 1
    assert str(output) in errors
    assert "surveys" not in printed


def test_no_random_key_is_used_twice(tmp_path):
    """The whole run with JAX's own check of keys."""
    code, _, errors = run("--output-dir", tmp_path / "out", "--no-use-cache", JAX_DEBUG_KEY_REUSE="1")
    assert code == 0, errors[-2000:]
