"""Surveys chunk by chunk: the same results as in memory, after a kill, and from two processes."""

import signal
import socket
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest
from small_run import SMALL, run_without_figures, with_options

from experiments import regress_gate
from experiments.pipeline.stream import SavedSums, load_sums
from experiments.runner.command_line import Cluster
from experiments.runner.provenance import command_of
from experiments.runner.stages import Stages
from moe_jax import InputError, Survey, save_survey, simulate_survey
from moe_jax.core.trees import save_tree
from moe_jax.experts.streaming import device_mesh, empty_sums

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def surveys(common, once):
    """Options: surveys of 512 pixels, so that Gram matrices are small, in chunks of 200 stars."""

    def make(folder):
        folder.mkdir()
        for name, n_stars in (("train", 900), ("test", 300)):
            whole = simulate_survey(jax.random.key(len(name)), n_stars)
            save_survey(folder / f"{name}.h5", Survey(whole.wave[::8], whole.flux[:, ::8], whole.error[:, ::8], whole.labels))

    folder = common / "pixels_512"
    once(folder, make)
    return {"train_file": folder / "train.h5", "test_file": folder / "test.h5", "chunk_stars": 200, "alphas": (3.0, 30.0)}


def run(options, folder):
    """Predictions of a run in this process."""
    run_without_figures(with_options(SMALL, **options, output_dir=folder / "out", cache_dir=folder / "cache"))
    return pd.read_csv(folder / "out" / "predictions.csv")


def start(options, folder, *arguments):
    """The same in a process of its own."""
    command = command_of("regress_gate", with_options(SMALL, **options), regress_gate.PRESETS).split()[1:]
    places = ["--output-dir", str(folder / "out"), "--cache-dir", str(folder / "cache")]
    return subprocess.Popen(
        [sys.executable, *command, *arguments, *places], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def chunked(surveys, common, once):
    """Predictions of a run in chunks."""
    folder = common / "chunked"
    once(folder, lambda folder: run(surveys, folder))
    assert not list((folder / "cache").glob("sums-*"))
    return pd.read_csv(folder / "out" / "predictions.csv")


@pytest.mark.slow
def test_in_chunks_as_in_memory(surveys, chunked, tmp_path):
    memory = run(surveys | {"chunk_stars": 0}, tmp_path)
    np.testing.assert_allclose(chunked[["global", "oracle", "classify"]], memory[["global", "oracle", "classify"]], atol=0.01)
    np.testing.assert_allclose(chunked, memory, atol=0.05)
    assert np.sqrt(np.mean((chunked["global"] - memory["global"]) ** 2)) < 1e-3


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_chunk(surveys, chunked, tmp_path, capsys):
    process = start(surveys, tmp_path)
    deadline = time.monotonic() + 200
    while not list((tmp_path / "cache").glob("sums-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "cache").glob("sums-*.npz"))
    predictions = run(surveys, tmp_path)
    assert "goes on after" in " ".join(capsys.readouterr().out.split())
    pd.testing.assert_frame_equal(predictions, chunked)


def test_sums_on_disk_that_cannot_be_read_are_made_again(tmp_path, capsys):
    """What was cut off is not taken for sums; what is whole is."""
    mesh, stages, path = device_mesh(), Stages(), tmp_path / "sums.npz"
    assert load_sums(None, mesh, stages) is None
    assert load_sums(path, mesh, stages) is None
    sums = empty_sums(2, 3, mesh)
    save_tree(path, SavedSums(4, sums._replace(y=jnp.ones((1, 2)))))
    n_chunks, found = load_sums(path, mesh, stages)
    assert (n_chunks, found.y.tolist()) == (4, [[1.0, 1.0]])
    assert found.xx.sharding == sums.xx.sharding
    path.write_bytes(path.read_bytes()[:-100])
    assert load_sums(path, mesh, stages) is None
    assert "cannot be read" in " ".join(capsys.readouterr().out.split())


@pytest.mark.slow
def test_two_processes_as_one(surveys, chunked, tmp_path):
    """Two real processes over the loopback address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    cluster = ["--cluster.join", "--cluster.coordinator", address, "--cluster.n-processes", "2", "--cluster.process-id"]
    processes = [start(surveys, tmp_path, *cluster, str(i)) for i in range(2)]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors
    ours = pd.read_csv(tmp_path / "out" / "predictions.csv")
    np.testing.assert_allclose(ours[["global", "oracle", "classify"]], chunked[["global", "oracle", "classify"]], atol=0.01)
    np.testing.assert_allclose(ours, chunked, atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"coordinator": "a:1"}, "without join"),
        ({"join": True, "n_processes": 2}, "expected all three or none"),
    ],
)
def test_bad_cluster(arguments, message):
    with pytest.raises(InputError, match=message):
        Cluster(**arguments)


def test_processes_need_chunks():
    with pytest.raises(InputError, match="without --chunk-stars"):
        regress_gate.RegressGateConfig(cluster=Cluster(join=True))
