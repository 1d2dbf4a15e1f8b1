import os
import socket
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from sklearn.linear_model import Ridge

import moe_jax
from moe_jax.experts.streaming import Blocks, add_block, collect, device_mesh, empty_sums, fit_sums

N_CELLS, N_FOLDS = 2, 3
ALPHAS = np.array([0.1, 1.0, 10.0])


def draw(dtype=float):
    """Stars of two cells and of none, more in a cell's fold than there are pixels."""
    rng = np.random.default_rng(0)
    cell = rng.integers(-1, N_CELLS, 400)
    x = (rng.normal(size=(400, 24)) + 0.5).astype(dtype)
    y = (x @ rng.normal(size=24) + cell + rng.normal(size=400)).astype(dtype)
    folds = np.asarray(moe_jax.assign_folds(jax.random.key(0), cell, N_FOLDS))
    return x, y, cell, folds


def group_of(cell, folds):
    return np.where(cell < 0, N_CELLS, cell) * N_FOLDS + folds


def add_up(x, y, group, mesh, parts=7, n_rows=32):
    sums = empty_sums((N_CELLS + 1) * N_FOLDS, x.shape[1], mesh, x.dtype)
    blocks = Blocks(n_rows, x.shape[1], x.dtype)
    for rows in np.array_split(np.arange(len(x)), parts):
        for block in blocks.add(x[rows], y[rows], group[rows]):
            sums = add_block(sums, block, mesh)
    for block in blocks.flush():
        sums = add_block(sums, block, mesh)
    return sums


@pytest.mark.parametrize("parts", [1, 7, 50])
def test_sums_against_numpy(parts, x64):
    x, y, cell, folds = draw()
    group = group_of(cell, folds)
    sums = collect(add_up(x, y, group, device_mesh(), parts), np.arange(9)[:, None])
    for g in range(9):
        own = group == g
        expected = (own.sum(), x[own].sum(0), y[own].sum(), x[own].T @ x[own], x[own].T @ y[own], (y[own] ** 2).sum())
        for field, value in zip(sums, expected, strict=True):
            np.testing.assert_allclose(field[g], value, rtol=1e-12, atol=1e-12)
    over_cells = collect(add_up(x, y, group, device_mesh()), np.arange(9).reshape(3, 3).T)
    np.testing.assert_allclose(over_cells.xx[1], x[folds == 1].T @ x[folds == 1], atol=1e-10)


@pytest.mark.parametrize("offset", [0.0, 3.0])
def test_experts_are_those_of_the_fit_in_memory(offset, dtype):
    """Coefficients, errors and out-of-fold predictions of ``fit_experts`` and ``fit_global``, which read the stars themselves."""
    x, y, cell, folds = draw(dtype)
    x_offset, y_offset = np.full(24, offset, dtype), dtype.type(offset)
    sums = add_up(x - x_offset, y - y_offset, group_of(cell, folds), device_mesh())
    tolerance = {"rtol": 1e-9, "atol": 1e-9} if dtype == np.float64 else {"rtol": 2e-3, "atol": 2e-3}
    memory = moe_jax.fit_experts(x, y, cell, ALPHAS, folds, n_experts=N_CELLS)
    for k in range(N_CELLS):
        ours, by_fold = fit_sums(collect(sums, np.arange(3)[:, None] + 3 * k), jnp.asarray(ALPHAS, dtype), x_offset, y_offset)
        assert ours.ridge.coef.dtype == dtype
        theirs = jax.tree.map(lambda leaf, k=k: leaf[k], memory._replace(out_of_fold=None))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, **tolerance), ours._replace(out_of_fold=None), theirs)
        held = np.sum(x * np.asarray(by_fold.coef)[folds], axis=1) + np.asarray(by_fold.intercept)[folds]
        np.testing.assert_allclose(held[cell == k], memory.out_of_fold[cell == k], **tolerance)
    whole, _ = fit_sums(collect(sums, np.arange(9).reshape(3, 3).T), jnp.asarray(ALPHAS, dtype), x_offset, y_offset)
    expected = moe_jax.fit_global(x, y, ALPHAS, folds)
    np.testing.assert_allclose(whole.ridge.coef, expected.ridge.coef, **tolerance)
    np.testing.assert_allclose(whole.mse, expected.mse, **tolerance)


def test_a_grid_is_extended_as_in_memory(x64):
    """The best alpha lies above a grid of small ones; extending finds that of a grid that holds it."""
    x, y, _, folds = draw()
    y = np.random.default_rng(1).normal(size=len(y))
    sums = collect(add_up(x, y, folds, device_mesh()), np.arange(3)[:, None])
    ours, by_fold = fit_sums(sums, np.array([1.0, 10.0]), np.zeros(24), np.zeros(()), extend_decades=5)
    memory = moe_jax.fit_global(x, y, np.array([1.0, 10.0]), folds, extend_decades=5)
    assert float(ours.alpha) > 10.0
    without_stars = [fit._replace(out_of_fold=None) for fit in (ours, memory)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), *without_stars)
    for fold in range(3):
        oracle = Ridge(alpha=float(ours.alpha)).fit(x[folds != fold], y[folds != fold])
        np.testing.assert_allclose(by_fold.coef[fold], oracle.coef_, atol=1e-9)


def test_blocks_lose_no_star_and_never_mix_groups(rng):
    x, group = rng.normal(size=(100, 3)), rng.integers(0, 4, 100)
    blocks = Blocks(8, 3, float)
    given = [block for rows in np.array_split(np.arange(100), 9) for block in blocks.add(x[rows], x[rows, 0], group[rows])]
    given += blocks.flush()
    assert not list(blocks.flush())
    for g in range(4):
        rows = np.concatenate([block.x[block.mask > 0] for block in given if block.group == g])
        np.testing.assert_array_equal(rows, x[group == g])
    assert all(block.x.shape == (8, 3) and not block.x[block.mask == 0].any() for block in given)


PROCESS = """
import sys
import numpy as np, jax
sys.path.insert(0, {tests!r})
from test_streaming import add_up, draw, group_of
from moe_jax.experts.streaming import collect, device_mesh
n_processes, rank, address, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
jax.config.update("jax_enable_x64", True)
if n_processes > 1:
    jax.distributed.initialize(address, n_processes, rank)
assert jax.process_count() == n_processes
mesh = device_mesh(jax.local_devices())
assert mesh.size == {devices}, mesh
x, y, cell, folds = draw()
own = slice(rank, None, n_processes)
sums = add_up(x[own], y[own], group_of(cell, folds)[own], mesh)
np.savez(out, *collect(sums, np.arange(9)[:, None]))
"""


def run(folder, n_processes, devices):
    """The sums of real processes, with so many virtual devices each."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    flags = f"{os.environ['XLA_FLAGS']} --xla_force_host_platform_device_count={devices}"
    environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
    code = PROCESS.format(tests=str(Path(__file__).parent), devices=devices)
    outputs = [folder / f"{n_processes}-{devices}-{rank}.npz" for rank in range(n_processes)]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", code, str(n_processes), str(rank), address, str(out)], env=environment, stderr=subprocess.PIPE
        )
        for rank, out in enumerate(outputs)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=300)
        assert process.returncode == 0, errors.decode()
    return [list(np.load(out).values()) for out in outputs]


@pytest.mark.slow
def test_many_devices_and_processes_add_up_to_the_same(tmp_path, x64):
    """Eight devices in one process, and two processes of two devices over the loopback address, against one device."""
    x, y, cell, folds = draw()
    expected = collect(add_up(x, y, group_of(cell, folds), device_mesh()), np.arange(9)[:, None])
    for n_processes, devices in ((1, 8), (2, 2)):
        for sums in run(tmp_path, n_processes, devices):
            for ours, field in zip(sums, expected, strict=True):
                np.testing.assert_allclose(ours, field, rtol=1e-12, atol=1e-12)
