"""Does a GPU give what the CPU gives, in float32 without TF32, and how much of its speed is used?

    python -m experiments.check_gpu                  the pieces, then the whole default run on both; about three minutes
    python -m experiments.check_gpu --preset smoke   small
    python -m experiments.check_gpu --any-device     the checks on whatever JAX finds, if only to see that they work

Prints one line a check, with its tolerance; exit code 1 where one fails. Results go to results/check_gpu/PRESET.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd

from experiments.pipeline.config import OutputOptions, StudyConfig
from experiments.report.markdown import table_markdown
from experiments.report.results import Results, Study
from experiments.runner.command_line import group, run_command
from experiments.runner.stages import Stages, console
from experiments.timing.rows import seconds_of
from moe_jax.core.arrays import InputError, matmul
from moe_jax.evaluate.bootstrap import bootstrap_delta_r2
from moe_jax.experts.fit import fit_global
from moe_jax.experts.ridge import predict_ridge
from moe_jax.gates.networks import MLPGate
from moe_jax.gates.training import GateConfig, fit_gate
from moe_jax.spectra.simulate import simulate_survey
from moe_jax.spectra.survey import add_noise


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


PRESETS = {
    "default": CheckConfig(),
    "smoke": CheckConfig(preset="smoke", n_stars=300, n_matmul=512, n_gates=4, run_preset="smoke"),
}


@dataclass
class Checks:
    """The lines of the table."""

    rows: list[dict[str, Any]]

    def add(self, name: str, found: float, tolerance: float | None = None, unit: str = "") -> None:
        """A check, or with no tolerance a measurement."""
        fine = None if tolerance is None else bool(found <= tolerance)
        self.rows.append({"check": name, "found": found, "tolerance": tolerance, "unit": unit, "fine": fine})
        verdict = "" if fine is None else f", tolerance {tolerance:g}: {'fine' if fine else 'FAILED'}"
        console.print(f"{name}: {found:.4g} {unit}{verdict}", highlight=False)


def shortest(call: Callable[[], Any], n_calls: int = 3) -> float:
    """Seconds of the shortest of a few calls after the first."""
    seconds_of(call)
    return min(seconds_of(call) for _ in range(n_calls))


def check_pieces(config: CheckConfig, checks: Checks) -> None:
    """Gram matrix, expert, gates and bootstrap on the default device, against float64 or the CPU."""
    host = jax.devices("cpu")[0]
    survey = simulate_survey(jax.random.key(0), config.n_stars)
    x = np.asarray(add_noise(jax.random.key(1), survey.flux, survey.error, 0.2))
    y, folds = np.asarray(survey.labels.log_g), np.arange(config.n_stars) % 5
    alphas = np.array([0.1, 1.0, 10.0], np.float32)

    gram = jax.jit(lambda x: matmul(x, x.T))
    exact = x.astype(np.float64) @ x.T.astype(np.float64)
    error = np.max(np.abs(np.asarray(gram(x), np.float64) - exact)) / np.max(np.abs(exact))
    checks.add("Gram matrix: largest error against float64 (TF32 would leave 1e-4 or more)", error, 5e-6, "of the largest element")

    def expert() -> Any:
        return fit_global(x, y, alphas, folds)

    ours = expert()
    with jax.default_device(host):
        theirs = fit_global(jax.device_put(x, host), jax.device_put(y, host), alphas, folds)
    spread = np.std(np.asarray(predict_ridge(ours.ridge, x)) - np.asarray(predict_ridge(theirs.ridge, x))) / np.std(y)
    checks.add("expert: difference of its predictions from the CPU's", spread, 1e-4, "of the spread of log g")
    checks.add("expert: difference of the chosen alpha", abs(float(ours.alpha) - float(theirs.alpha)), 0.0)

    rng = np.random.default_rng(0)
    n = 2 * config.n_stars
    features, target = rng.normal(size=(n, 13)).astype(np.float32), rng.normal(size=n).astype(np.float32)
    predictions = (target[:, None] + rng.normal(size=(n, 9))).astype(np.float32)
    data, training = (features, predictions, target), GateConfig(patience=100)

    def last_loss(key: jax.Array) -> jax.Array:
        return fit_gate(key, MLPGate(64), *data, training).validation_loss[-1]

    fit = jax.jit(last_loss)
    keys = jax.random.split(jax.random.key(0), config.n_gates)
    ours_loss = float(fit(keys[0]))
    with jax.default_device(host):
        theirs_loss = float(last_loss(jax.device_put(keys[0], host)))
    checks.add("gate: difference of its last validation loss from the CPU's", abs(ours_loss / theirs_loss - 1), 1e-2, "of the loss")

    def bootstrap() -> Any:
        return bootstrap_delta_r2(jax.random.key(0), target, predictions[:, 0], predictions[:, 1])

    ours_samples = np.asarray(bootstrap().overall.samples)
    with jax.default_device(host):
        theirs_samples = np.asarray(bootstrap().overall.samples)
    checks.add("bootstrap: largest difference of a resample from the CPU's", np.max(np.abs(ours_samples - theirs_samples)), 1e-4)

    a = jnp.ones((config.n_matmul, config.n_matmul), jnp.float32)
    product = jax.jit(matmul)
    rate = 2 * config.n_matmul**3 / shortest(lambda: product(a, a)) / 1e12
    on_device = jax.device_put(x)
    gram_rate = 2 * len(x) ** 2 * x.shape[1] / shortest(lambda: gram(on_device)) / 1e12
    checks.add("rate of a large float32 product, precision highest", rate, unit="Tflop/s")
    checks.add("Gram matrix: part of that rate", gram_rate / rate)
    checks.add(f"expert of {len(x):,} stars, 3 alphas, 5 folds", shortest(expert), unit="s")
    checks.add(f"one MLP gate, 100 epochs, {n:,} stars", shortest(lambda: fit(keys[0])), unit="s")
    many = jax.jit(jax.vmap(last_loss))
    checks.add(f"each of {len(keys)} gates in one call", shortest(lambda: many(keys), 1) / len(keys), unit="s")
    checks.add(f"bootstrap: 1,000 resamples of {n:,} stars", shortest(bootstrap), unit="s")


def check_run(preset: str, checks: Checks) -> None:
    """The whole experiment on the default device and on the CPU."""
    tables, seconds = {}, {}
    with tempfile.TemporaryDirectory() as folder:
        for name in ("device", "CPU"):
            environment = {"JAX_PLATFORMS": "cpu"} if name == "CPU" else {}
            out = Path(folder) / name
            command = [sys.executable, "-m", "experiments.regress_gate", "--preset", preset, "--no-use-cache"]
            start = time.perf_counter()
            done = subprocess.run(
                [*command, "--output-dir", str(out)], env=os.environ | environment, capture_output=True, text=True, check=False
            )
            if done.returncode:
                raise InputError(f"regress_gate on the {name}: found exit code {done.returncode}, {done.stderr.strip()[-300:]}")
            seconds[name] = time.perf_counter() - start
            tables[name] = pd.read_csv(out / "overall.csv")
    for name, table in tables.items():
        checks.add(f"regress_gate, preset {preset}, on the {name}", seconds[name], unit=f"s ({len(table)} methods)")
    difference = (tables["device"]["r2"] - tables["CPU"]["r2"]).abs()
    trained = tables["CPU"]["method"].str.startswith("regress")
    checks.add("regress_gate: largest difference of R2, closed forms", float(difference[~trained].max()), 5e-4)
    checks.add("regress_gate: largest difference of R2, trained gates", float(difference[trained].max()), 5e-3)


def compute(config: CheckConfig, stages: Stages) -> Results:
    """Runs all checks."""
    device = jax.devices()[0]
    if device.platform == "cpu" and not config.any_device:
        raise InputError(
            f"JAX found only {device.device_kind}, expected a GPU (pip install -e '.[cuda]'); --any-device goes on without one"
        )
    checks = Checks([])
    console.print(f"{device.platform}: {device.device_kind}", highlight=False)
    with stages("pieces"):
        check_pieces(config, checks)
    if config.run_preset is not None:
        with stages("whole runs"):
            check_run(config.run_preset, checks)
    table = pd.DataFrame(checks.rows)
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
