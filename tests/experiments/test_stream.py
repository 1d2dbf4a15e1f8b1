"""Surveys chunk by chunk: the same results as in memory, after a kill, and from two processes."""

import os
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

from experiments import regress_gate
from experiments.pipeline.stream import SavedSums, load_sums
from experiments.runner.command_line import Cluster
from experiments.runner.stages import Stages
from moe_jax import InputError, Survey, save_survey, simulate_survey
from moe_jax.core.trees import save_tree
from moe_jax.experts.streaming import device_mesh, empty_sums

pytestmark = pytest.mark.slow

SIZES = ["--preset", "smoke", "--n-train", "900", "--n-test", "300", "--alphas", "1", "10", "--gate.epochs", "3"]


@pytest.fixture(scope="module")
def surveys(tmp_path_factory):
    """Surveys of 512 pixels, so that Gram matrices are small."""
    folder = tmp_path_factory.mktemp("surveys")
    for name, n_stars in (("train", 900), ("test", 300)):
        whole = simulate_survey(jax.random.key(len(name)), n_stars)
        save_survey(folder / f"{name}.h5", Survey(whole.wave[::8], whole.flux[:, ::8], whole.error[:, ::8], whole.labels))
    return ["--train-file", str(folder / "train.h5"), "--test-file", str(folder / "test.h5")]


def start(arguments, folder, cache, **environment):
    command = [sys.executable, "-m", "experiments.regress_gate", *SIZES, *arguments, "--output-dir", str(folder)]
    return subprocess.Popen(
        [*command, "--cache-dir", str(cache)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | environment,
    )


def finish(process):
    output, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors
    return output


@pytest.fixture(scope="module")
def chunked(surveys, tmp_path_factory):
    """Predictions of a run in chunks of 200 stars."""
    folder = tmp_path_factory.mktemp("chunked")
    finish(start([*surveys, "--chunk-stars", "200"], folder / "out", folder / "cache"))
    assert not list((folder / "cache").glob("sums-*"))
    return pd.read_csv(folder / "out" / "predictions.csv")


@pytest.mark.slow
def test_in_chunks_as_in_memory(surveys, chunked, tmp_path):
    finish(start(surveys, tmp_path / "out", tmp_path / "cache"))
    memory = pd.read_csv(tmp_path / "out" / "predictions.csv")
    np.testing.assert_allclose(chunked[["global", "oracle", "classify"]], memory[["global", "oracle", "classify"]], atol=0.01)
    np.testing.assert_allclose(chunked, memory, atol=0.05)
    assert np.sqrt(np.mean((chunked["global"] - memory["global"]) ** 2)) < 1e-3


@pytest.mark.slow
def test_a_killed_run_goes_on_from_its_last_chunk(surveys, chunked, tmp_path):
    arguments = [*surveys, "--chunk-stars", "200"]
    process = start(arguments, tmp_path / "out", tmp_path / "cache")
    deadline = time.monotonic() + 200
    while not list((tmp_path / "cache").glob("sums-*.npz")) and time.monotonic() < deadline:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out").exists()
    assert list((tmp_path / "cache").glob("sums-*.npz"))
    output = finish(start(arguments, tmp_path / "out", tmp_path / "cache"))
    assert "goes on after" in output
    pd.testing.assert_frame_equal(pd.read_csv(tmp_path / "out" / "predictions.csv"), chunked)


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
    processes = [
        start([*surveys, "--chunk-stars", "200", *cluster, str(i)], tmp_path / "out", tmp_path / "cache") for i in range(2)
    ]
    for process in processes:
        finish(process)
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
