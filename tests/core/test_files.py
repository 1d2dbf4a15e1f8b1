import os
import signal
import socket
import subprocess
import sys

import pytest

from moe_jax import InputError, load_model, load_survey
from moe_jax.core.files import atomic_folder, atomic_path
from moe_jax.spectra.spectrum_files import open_spectra

DEAD = 2**22 + 1  # above the largest number of a process


def test_the_file_appears_at_the_end(tmp_path):
    target = tmp_path / "deep" / "a.txt"
    with atomic_path(target) as temporary:
        temporary.write_text("new")
        assert not target.exists()
    assert target.read_text() == "new"
    assert list(target.parent.iterdir()) == [target]


def test_a_failure_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    with pytest.raises(RuntimeError), atomic_path(target) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_killed_process_leaves_the_old_file(tmp_path):
    target = tmp_path / "a.txt"
    target.write_text("old")
    program = f"""
import time
from moe_jax.core.files import atomic_path
with atomic_path({str(target)!r}) as temporary, open(temporary, "w") as file:
    file.write("half" * 1000)
    file.flush()
    print("writing", flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "writing\n"
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert target.read_text() == "old"
    assert len(list(tmp_path.glob(".a.txt.*.partial"))) == 1
    with atomic_path(target) as temporary:
        temporary.write_text("new")
    assert list(tmp_path.iterdir()) == [target]


def test_what_others_are_writing_stays(tmp_path):
    """Of another machine, and of a process that is running; not what a killed one of this process's number left."""
    mark = f".results.{socket.gethostname()}"
    others = [
        f".results.elsewhere.{DEAD}.partial",
        f"{mark}.{os.getppid()}.partial",
        f"{mark}.mine.partial",
        f".more{mark}.1.partial",
    ]
    for name in [*others, f"{mark}.{DEAD}.partial", f"{mark}.{os.getpid()}.partial"]:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a.txt").write_text("half")
    with atomic_folder(tmp_path / "results") as temporary:
        assert not list(temporary.iterdir())
        (temporary / "a.txt").write_text("new")
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted([*others, "results"])


def test_a_folder_keeps_what_it_held(tmp_path):
    target = tmp_path / "results"
    target.mkdir()
    (target / "mine.txt").write_text("mine")
    with atomic_folder(target) as temporary:
        (temporary / "a.txt").write_text("new")
    assert sorted(path.name for path in target.iterdir()) == ["a.txt", "mine.txt"]
    with pytest.raises(RuntimeError), atomic_folder(target) as temporary:
        (temporary / "a.txt").write_text("half")
        raise RuntimeError
    assert (target / "a.txt").read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_a_file_that_the_system_does_not_let_us_read(tmp_path):
    """A name that is too long stands for a missing permission, which an administrator never lacks."""
    for read in (open_spectra, load_survey, load_model):
        with pytest.raises(InputError, match=r"xxx.* found that it cannot be read \(File name too long\), expected"):
            read(tmp_path / ("x" * 300))
