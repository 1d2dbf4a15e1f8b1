"""Does a GPU give what the CPU gives, in float32 without TF32, and how much of its speed is used?

    python -m experiments.check_gpu                  the pieces, then the whole default run on both; about three minutes
    python -m experiments.check_gpu --preset smoke   small
    python -m experiments.check_gpu --any-device     the checks on whatever JAX finds, if only to see that they work

Prints one line a check, with its tolerance; exit code 1 where one fails. Results go to results/check_gpu/PRESET.
"""

from __future__ import annotations

import functools
import os
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import OutputOptions, StudyConfig
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, require_at_least, run_command
from experiments.runner.stages import Stages, console
from experiments.timing.rows import gate_data, run_python, seconds_of
from moe_jax.core.arrays import InputError, matmul
from moe_jax.evaluate.bootstrap import bootstrap_delta_r2
from moe_jax.experts import fit_global, predict_ridge
from moe_jax.gates import GateConfig, MLPGate, fit_gate
from moe_jax.spectra import add_noise, simulate_survey


@dataclass(frozen=True)
class CheckConfig(StudyConfig):
    """Sizes of the checks."""

    n_stars: int = 3_000
    """Training stars of the expert; gates get twice as many."""
    n_matmul: int = 8_192
    """Side of the matrices whose product gives the device's rate."""
    n_gates: int = 256
    """Gates in one call."""
    run_preset: Literal["default", "smoke"] | None = "default"
    """Preset of regress_gate that is run on the device and on the CPU; None: the pieces only."""
    any_device: bool = False
    """Run the checks even where JAX finds only a CPU."""
    output: OutputOptions = group(OutputOptions(), without=("cache_dir", "use_cache"))

    def __post_init__(self) -> None:
        require_at_least(self, n_stars=10, n_matmul=1, n_gates=1)


PRESETS = {
    "default": CheckConfig(),
    "smoke": CheckConfig(preset="smoke", n_stars=300, n_matmul=512, n_gates=4, run_preset="smoke"),
}


def check(name: str, value: float, tolerance: float | None = None, unit: str = "") -> dict[str, Any]:
    """A row of the table, which is also printed: a check, or with no tolerance a measurement."""
    fine = None if tolerance is None else bool(value <= tolerance)
    verdict = "" if fine is None else f", tolerance {tolerance:g}: {'fine' if fine else 'FAILED'}"
    console.print(f"{name}: {value:.4g} {unit}{verdict}")
    return {"check": name, "found": value, "tolerance": tolerance, "unit": unit, "fine": fine}


def shortest(call: Callable[[], Any], n_calls: int = 3) -> float:
    """Seconds of the shortest of a few calls after the first."""
    seconds_of(call)
    return min(seconds_of(call) for _ in range(n_calls))


def check_pieces(config: CheckConfig) -> Iterator[dict[str, Any]]:
    """Gram matrix, expert, gates and bootstrap on the default device, against float64 or the CPU."""
    host = jax.devices("cpu")[0]

    def on_host(call: Callable[[], Any]) -> Any:
        with jax.default_device(host):
            return call()

    survey = simulate_survey(jax.random.key(0), config.n_stars)
    x = np.asarray(add_noise(jax.random.key(1), survey.flux, survey.error, 0.2))
    y = np.asarray(survey.labels.log_g)
    alphas, folds = np.array([0.1, 1.0, 10.0], np.float32), np.arange(config.n_stars) % 5

    gram = jax.jit(lambda x: matmul(x, x.T))
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    error = np.max(np.abs(np.asarray(gram(x), np.float64) - exact)) / np.max(np.abs(exact))
    yield check("Gram matrix: largest error against float64 (TF32 would leave 1e-4 or more)", error, 5e-6, "of the largest element")

    def expert() -> Any:
        return fit_global(x, y, alphas, folds)

    ours, theirs = expert(), on_host(expert)
    spread = np.std(np.asarray(predict_ridge(ours.ridge, x)) - np.asarray(predict_ridge(theirs.ridge, x))) / np.std(y)
    yield check("expert: difference of its predictions from the CPU's", spread, 1e-4, "of the spread of log g")
    yield check("expert: difference of the chosen alpha", abs(float(ours.alpha) - float(theirs.alpha)), 0.0)

    data = gate_data(2 * config.n_stars)
    _, predictions, target = data

    def last_loss(key: jax.Array) -> jax.Array:
        return fit_gate(key, MLPGate(64), *data, GateConfig(patience=100)).validation_loss[-1]

    fit = jax.jit(last_loss)
    keys = jax.random.split(jax.random.key(0), config.n_gates)
    ratio = float(fit(keys[0])) / float(on_host(lambda: last_loss(jax.device_put(keys[0], host))))
    yield check("gate: difference of its last validation loss from the CPU's", abs(ratio - 1), 1e-2, "of the loss")

    def bootstrap() -> Any:
        return bootstrap_delta_r2(jax.random.key(0), target, predictions[:, 0], predictions[:, 1])

    samples, theirs = (np.asarray(result.overall.samples) for result in (bootstrap(), on_host(bootstrap)))
    yield check("bootstrap: largest difference of a resample from the CPU's", np.max(np.abs(samples - theirs)), 1e-4)

    a = jnp.ones((config.n_matmul, config.n_matmul), jnp.float32)
    product = jax.jit(matmul)
    rate = 2 * config.n_matmul**3 / shortest(lambda: product(a, a)) / 1e12
    on_device = jax.device_put(x)
    gram_rate = 2 * len(x) ** 2 * x.shape[1] / shortest(lambda: gram(on_device)) / 1e12
    yield check("rate of a large float32 product, precision highest", rate, unit="Tflop/s")
    yield check("Gram matrix: part of that rate", gram_rate / rate)
    yield check(f"expert of {len(x):,} stars, 3 alphas, 5 folds", shortest(expert), unit="s")
    yield check(f"one MLP gate, 100 epochs, {len(target):,} stars", shortest(lambda: fit(keys[0])), unit="s")
    many = jax.jit(jax.vmap(last_loss))
    yield check(f"each of {len(keys)} gates in one call", shortest(lambda: many(keys), 1) / len(keys), unit="s")
    yield check(f"bootstrap: 1,000 resamples of {len(target):,} stars", shortest(bootstrap), unit="s")


def check_run(preset: str) -> Iterator[dict[str, Any]]:
    """The whole experiment on the default device and on the CPU."""
    r2 = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, platforms in (("device", os.environ.get("JAX_PLATFORMS", "")), ("CPU", "cpu")):
            command = ("-m", "experiments.regress_gate", "--preset", preset, "--no-use-cache", "--output-dir", f"{folder}/{name}")
            seconds = seconds_of(functools.partial(run_python, *command, JAX_PLATFORMS=platforms))
            table = pd.read_csv(f"{folder}/{name}/overall.csv")
            r2[name] = table["r2"]
            yield check(f"regress_gate, preset {preset}, on the {name}", seconds, unit=f"s ({len(table)} methods)")
    difference, trained = (r2["device"] - r2["CPU"]).abs(), table["method"].str.startswith("regress")
    yield check("regress_gate: largest difference of R2, closed forms", float(difference[~trained].max()), 5e-4)
    yield check("regress_gate: largest difference of R2, trained gates", float(difference[trained].max()), 5e-3)


def compute(config: CheckConfig, stages: Stages) -> Results:
    """Runs all checks."""
    device = jax.devices()[0]
    if device.platform == "cpu" and not config.any_device:
        raise InputError(
            f"JAX found only {device.device_kind}, expected a GPU (pip install -e '.[cuda]'); --any-device goes on without one"
        )
    console.print(f"{device.platform}: {device.device_kind}")
    with stages("pieces"):
        rows = list(check_pieces(config))
    if config.run_preset is not None:
        with stages("whole runs"):
            rows += check_run(config.run_preset)
    table = pd.DataFrame(rows)
    sections = [f"On {device.platform}: {device.device_kind}.", table_markdown(table, {"found": ".4g", "tolerance": ".4g"})]
    return Results("Checks of a device", sections, {"checks": table})


STUDY = Study("check_gpu", PRESETS, compute)


def main(config: CheckConfig) -> Results:
    """Runs all checks and writes the results; exits with code 1 where a check fails."""
    results = STUDY(config)
    if not all(fine in (None, True) for fine in results.tables["checks"]["fine"]):
        sys.exit(1)
    return results


if __name__ == "__main__":
    run_command(main, PRESETS, __doc__)
