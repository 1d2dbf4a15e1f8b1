"""Runs that are killed, disks that are full, folders that cannot be written to."""

import multiprocessing
import re
import signal
import subprocess
import sys

import numpy as np
import pandas as pd
import pytest
from small_run import ARGUMENTS, SMALL, with_options

from experiments import regress_gate
from experiments.runner.command_line import parse_config, use_all_cores
from moe_jax import InputError

MOMENTS = ("early", "stage", "early", "stage", "early", "results")  # of the kills


def test_the_command_line_gives_the_small_run():
    assert parse_config(regress_gate.PRESETS, None, ARGUMENTS) == SMALL


def run_forked(config):
    use_all_cores()
    regress_gate.main(config)


@pytest.mark.slow
def test_kills_leave_no_partial_file(trained, tmp_path):
    """SIGKILL at random moments of a small run; the next run completes, and gives what an undisturbed one gives.

    The processes are forked from one that has imported everything, so that a moment is one of the run. Three are killed within its
    first two seconds, two when they begin to write one of the two stages into the cache, and one while it writes its results.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["experiments.regress_gate"])
    files = {path.relative_to(trained) for path in trained.rglob("*")}
    config = with_options(SMALL, output_dir=tmp_path / "out", cache_dir=tmp_path / "cache")
    killed, rng = 0, np.random.default_rng(0)
    for moment in MOMENTS:
        before = set(tmp_path.glob("cache/*"))
        process = context.Process(target=run_forked, args=(config,))
        process.start()
        if moment == "results":
            while process.is_alive() and not list(tmp_path.glob(f".out.*.{process.pid}.partial")):
                process.join(0.01)
            process.join(rng.uniform(0.0, 1.5))
        elif moment == "stage":
            while process.is_alive() and set(tmp_path.glob("cache/*")) <= before:
                process.join(0.002)
        else:
            process.join(rng.uniform(0.1, 2.0))
        process.kill()
        process.join()
        killed += process.exitcode == -signal.SIGKILL
        if (tmp_path / "out").exists():
            # Files are renamed into place one by one, each of them whole.
            for path in (tmp_path / "out").rglob("*.csv"):
                assert path.read_bytes() == (trained / path.relative_to(tmp_path / "out")).read_bytes()
            assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")} <= files
    assert killed >= len(MOMENTS) - 1
    assert len(list(tmp_path.glob("cache/*.npz"))) >= 2
    process = context.Process(target=run_forked, args=(config,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert {path.relative_to(tmp_path / "out") for path in (tmp_path / "out").rglob("*")} == files
    assert not list(tmp_path.rglob("*.partial"))
    undisturbed, again = (pd.read_csv(folder / "predictions.csv") for folder in (trained, tmp_path / "out"))
    pd.testing.assert_frame_equal(undisturbed, again)


@pytest.mark.slow
def test_a_disk_that_is_full(trained, tmp_path):
    """A limit on the size of files stands in for the disk: writing fails with an errno of its own, in the middle of a file."""
    limited = "import resource, signal, sys; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); "
    limited += "resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000)); "
    limited += "import runpy; runpy.run_module('experiments.regress_gate', run_name='__main__', alter_sys=True)"
    arguments = [*ARGUMENTS, "--output-dir", str(tmp_path / "out"), "--cache-dir", str(trained.parent / "cache")]
    done = subprocess.run([sys.executable, "-c", limited, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 2, done.stderr[-2000:]
    assert done.stderr.splitlines()[-1].startswith("error: ")
    assert "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists() or not list((tmp_path / "out").iterdir())
    assert not [path for path in tmp_path.rglob("*.partial") if path.is_file()]


@pytest.mark.parametrize("place", ["file/out", "/proc/out", "/sys/out"])
def test_a_folder_that_cannot_be_written_to(tmp_path, place, capsys):
    """One sentence at once, not after the run; /proc and /sys are closed to the superuser too."""
    (tmp_path / "file").write_text("")
    output = tmp_path / place
    if not output.parent.exists():
        pytest.skip("not on this system")
    with pytest.raises(InputError, match=re.escape(str(output))) as caught:
        regress_gate.main(with_options(SMALL, output_dir=output, use_cache=False))
    assert "\n" not in str(caught.value)
    assert "surveys" not in capsys.readouterr().out
