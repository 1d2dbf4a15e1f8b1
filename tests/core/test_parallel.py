import subprocess
import sys
import threading

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from moe_jax import GateConfig, MLPGate, fit_gate, fit_gates
from moe_jax.core.parallel import map_devices, one_ahead

pytestmark = pytest.mark.slow


def test_is_a_vmap(rng, dtype):
    matrices, shared = rng.normal(size=(5, 3, 3)).astype(dtype), rng.normal(size=3).astype(dtype)
    ours = map_devices(lambda m, v: (jnp.tanh(m) @ v, jnp.sum(m)), matrices, shared)
    np.testing.assert_allclose(ours[0], np.tanh(matrices) @ shared, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(ours[1], matrices.sum(axis=(1, 2)), rtol=1e-5, atol=1e-6)


def test_items_are_made_one_ahead_and_in_order():
    made = []

    def make():
        for i in range(4):
            made.append((i, threading.get_ident()))
            yield i
        raise OSError("the file ends")

    seen = []
    with pytest.raises(OSError, match="the file ends"):
        for item in one_ahead(make()):
            seen.append(item)
            assert len(made) <= item + 2
    assert seen == [0, 1, 2, 3]
    assert threading.get_ident() not in [thread for _, thread in made]
    assert not any("ThreadPool" in thread.name for thread in threading.enumerate())


def gates_and_single_runs(n_devices):
    """Validation losses of seven gates trained in one call, and of the same keys one by one."""
    assert len(jax.local_devices()) == n_devices
    rng = np.random.default_rng(0)
    features, y = rng.normal(size=(300, 4)).astype(np.float32), rng.normal(size=300).astype(np.float32)
    predictions = (y[:, None] + rng.normal(size=(300, 3))).astype(np.float32)
    keys, config = jax.random.split(jax.random.key(0), 7), GateConfig(epochs=5, batch_size=64)
    committed = jax.device_put(features, jax.local_devices()[0])  # as what LAPACK's results touch is
    many = fit_gates(keys, MLPGate(16), committed, predictions, y, config)
    assert (MLPGate(16).apply(jax.tree.map(lambda leaf: leaf[0], many.params), committed) >= 0).all()
    single = [fit_gate(key, MLPGate(16), features, predictions, y, config) for key in keys]
    return np.asarray(many.validation_loss), np.stack([fit.validation_loss for fit in single]), many, single


def test_gates_of_one_call_are_those_of_single_runs():
    losses, single_losses, many, single = gates_and_single_runs(len(jax.local_devices()))
    np.testing.assert_allclose(losses, single_losses, rtol=1e-4)
    for i, fit in enumerate(single):
        for ours, alone in zip(jax.tree.leaves(many.params), jax.tree.leaves(fit.params), strict=True):
            np.testing.assert_allclose(ours[i], alone, rtol=1e-3, atol=1e-5)


@pytest.mark.slow
def test_on_several_devices():
    """Seven gates among three devices: padded, divided, and put together again."""
    code = """
import sys, jax, numpy as np
jax.config.update("jax_num_cpu_devices", 3)
sys.path.insert(0, "tests/core")
from test_parallel import gates_and_single_runs
losses, single, many, _ = gates_and_single_runs(3)
assert losses.shape == (7, 5) and len(many.best_epoch.sharding.device_set) == 1
np.testing.assert_allclose(losses, single, rtol=1e-4)
from experiments.pipeline.gates import train_gates
from experiments.pipeline.stars import Stars
import jax.numpy as jnp
from moe_jax import GateConfig, LinearGate
first = jax.local_devices()[0]
x, y = (jax.device_put(jnp.asarray(np.random.default_rng(0).normal(size=s), jnp.float32), first) for s in ((90, 13), (90,)))
stars = Stars(x, jnp.stack([y + 1, y], axis=1), y, y, jnp.zeros(90, int))
params = LinearGate().init(jax.random.key(0), 13, 2)
sweep = train_gates(jax.random.split(jax.random.key(0), 4), params, stars, stars, LinearGate(), GateConfig(epochs=2, batch_size=16))
assert sweep.predictions.shape == (4, 90) and np.isfinite(sweep.loss).all()
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
