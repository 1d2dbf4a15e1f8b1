"""The rows of the benchmark: each of ours and its peer, timed in turns."""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import scipy

from experiments.pipeline.config import OutputOptions, StudyConfig
from experiments.runner.command_line import group, require_at_least
from experiments.runner.provenance import peak_memory
from experiments.runner.stages import console
from experiments.timing import peers
from moe_jax.core.arrays import InputError, matmul
from moe_jax.evaluate.bootstrap import bootstrap_delta_r2
from moe_jax.experts.cells import N_CELLS, assign_cells
from moe_jax.experts.fit import assign_folds, fit_experts, fit_global
from moe_jax.gates import GateConfig, MLPGate, fit_gate, fit_gates
from moe_jax.spectra import add_noise, simulate_survey

N_GATE_STARS = 5_300
N_TEST_STARS = 816


@dataclass(frozen=True)
class BenchmarkConfig(StudyConfig):
    """What is timed."""

    quick: bool = False
    """The same as --preset quick."""
    start: bool = False
    """Time imports, help, compilation and a short prediction instead, in turns with those of another commit."""
    before: str = "b2772b7"
    """The commit that ``--start`` compares with."""
    rows: tuple[str, ...] = ("experts", "folds", "gates", "bootstrap", "large_bootstrap", "pipeline")
    """Groups of rows."""
    n_train: int = 32_000
    """Training stars of the experts and of the pipeline."""
    n_gates: int = 256
    """Gates in one call."""
    n_pairs: int = 3
    """Pairs of a row, but for the experts (one a cell) and the pipeline (one)."""
    output: OutputOptions = group(OutputOptions(), without=("cache_dir", "use_cache"))

    def __post_init__(self) -> None:
        require_at_least(self, n_train=1, n_gates=1, n_pairs=1)
        for name in self.rows:
            if name not in GROUPS:
                raise InputError(f"rows holds {name!r}, expected some of {', '.join(GROUPS)}")


@dataclass
class Row:
    """One comparison."""

    name: str
    peer: str
    target: float | None = None  #: ratio to reach
    pairs: list[tuple[float, float]] = field(default_factory=list)  #: seconds of ours and of the peer
    floors: list[float] = field(default_factory=list)
    compile_s: float = 0.0
    per: int = 1  #: things that one call of ours does, where the peer does one
    note: str = ""

    def record(self) -> dict[str, Any]:
        """The row of the table."""
        ours, theirs = np.array(self.pairs).T
        ours = ours / self.per
        ratios, floors = theirs / ours, np.array(self.floors or [np.nan] * len(ours))
        return {
            "row": self.name,
            "ours_s": np.median(ours),
            "compile_s": self.compile_s,
            "peer": self.peer,
            "peer_s": np.median(theirs),
            "ratio": np.median(ratios),
            "ratio_low": ratios.min(),
            "ratio_high": ratios.max(),
            "pairs": len(ratios),
            "target": self.target,
            "reached": None if self.target is None else bool(np.median(ratios) >= self.target),
            "floor_s": np.median(floors),
            "over_floor": np.median(ours / floors),
            "note": self.note,
        }


def seconds_of(call: Callable[[], Any]) -> float:
    """Wall time of a call, its result waited for."""
    start = time.perf_counter()
    jax.block_until_ready(call())
    return time.perf_counter() - start


def compare(row: Row, ours: Callable[[], Any], theirs: Callable[[], Any], n_pairs: int) -> Row:
    """Times both in turns, after a first call of ours that compiles."""
    first = seconds_of(ours)
    row.pairs += [(seconds_of(ours), seconds_of(theirs)) for _ in range(n_pairs)]
    row.compile_s = max(first - float(np.median([pair[0] for pair in row.pairs])), 0.0)
    return row


def has(module: str) -> bool:
    """Whether a peer's package is installed."""
    installed = importlib.util.find_spec(module) is not None
    if not installed:
        console.print(f"{module} is not installed: its rows are left out (pip install -e '.[benchmark]')")
    return installed


@functools.cache
def cells_of(n_train: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """Noisy flux and log g of the stars of each cell of the default run."""
    survey = simulate_survey(jax.random.key(0), n_train)
    flux = np.asarray(add_noise(jax.random.key(1), survey.flux, survey.error, 0.2))
    cell, log_g = np.asarray(assign_cells(survey.labels.T_eff, survey.labels.M_H)), np.asarray(survey.labels.log_g)
    return [(flux[cell == k], log_g[cell == k]) for k in range(N_CELLS)]


def floor_of_experts(x: np.ndarray, n_alphas: int) -> float:
    """Seconds of half a float32 Gram matrix (syrk), and per alpha one potrf and one potri, by SciPy's BLAS and LAPACK."""
    lapack = scipy.linalg.lapack
    start = time.perf_counter()
    kernel = scipy.linalg.blas.ssyrk(1.0, x.T, trans=1, lower=1)
    total = time.perf_counter() - start
    kernel[np.diag_indices(len(x))] += 10
    for _ in range(n_alphas):
        work = kernel.copy(order="F")
        start = time.perf_counter()
        factor, _ = lapack.spotrf(work, lower=1, overwrite_a=1, clean=0)
        lapack.spotri(factor, lower=1, overwrite_c=1)
        total += time.perf_counter() - start
    return total


def time_experts(config: BenchmarkConfig) -> Iterator[Row]:
    """The nine cells, six alphas, exact five-fold cross-validation."""
    row = Row("experts: a cell, 6 alphas, 5 folds", "GridSearchCV(Ridge(), cv=5)", 7.0)
    alphas = np.array(peers.ALPHAS, np.float32)
    for x, y in cells_of(config.n_train):
        cell = np.zeros(len(y), int)
        folds = np.asarray(assign_folds(jax.random.key(2), cell, 5))
        ours = functools.partial(fit_experts, x, y, cell, alphas, folds, n_experts=1)
        row.compile_s += seconds_of(ours)
        row.floors.append(floor_of_experts(x, len(alphas)))
        theirs = functools.partial(peers.grid_search_ridge, x, y, peers.ALPHAS, 5)
        row.pairs.append((seconds_of(ours), seconds_of(theirs)))
        row.compile_s -= row.pairs[-1][0]
    total = np.array(row.pairs).sum(axis=0)
    row.note = f"{len(row.pairs)} cells together: {total[0]:.1f} s against {total[1]:.1f} s, {total[1] / total[0]:.1f}x"
    yield row


def time_folds(config: BenchmarkConfig) -> Iterator[Row]:
    """Other numbers of folds, on one cell."""
    from sklearn.linear_model import RidgeCV

    x, y = cells_of(config.n_train)[4]
    alphas = np.array(peers.ALPHAS, np.float32)
    ten, one = np.asarray(assign_folds(jax.random.key(2), np.zeros(len(y), int), 10)), np.arange(len(y))
    grid_search = functools.partial(peers.grid_search_ridge, x, y, peers.ALPHAS, 10)
    leave_one_out = functools.partial(RidgeCV(alphas=peers.ALPHAS).fit, x, y)
    for name, folds, peer, theirs, target, n_pairs in (
        ("10 folds", ten, "GridSearchCV(Ridge(), cv=10)", grid_search, None, 1),
        ("leave-one-out", one, "RidgeCV (leave-one-out)", leave_one_out, 3.0, config.n_pairs),
    ):
        ours = functools.partial(fit_global, x, y, alphas, folds)
        yield compare(Row(f"experts: a cell of {len(y):,}, {name}", peer, target), ours, theirs, n_pairs)


def gate_data(n_stars: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Features, expert predictions and a target of the sizes of the default run."""
    rng = np.random.default_rng(0)
    features, y = rng.normal(size=(n_stars, 13)).astype(np.float32), rng.normal(size=n_stars).astype(np.float32)
    return features, (y[:, None] + rng.normal(size=(n_stars, 9))).astype(np.float32), y


def floor_of_gate() -> float:
    """Multiplications of the training of a gate with 64 hidden units for 100 epochs, over the matmul rate measured now."""
    a = jnp.ones((2_048, 2_048), jnp.float32)
    product = jax.jit(matmul)
    product(a, a).block_until_ready()
    rate = 2 * 2_048**3 / min(seconds_of(lambda: product(a, a)) for _ in range(5))
    return 3 * 2 * 0.8 * N_GATE_STARS * 100 * (13 * 64 + 64 * 9) / rate


def time_gates(config: BenchmarkConfig) -> Iterator[Row]:
    """One MLP gate, and many in one vectorised call."""
    if not has("torch"):
        return
    data, gate, training = gate_data(N_GATE_STARS), MLPGate(64), GateConfig(patience=100)
    one = functools.partial(fit_gate, jax.random.key(0), gate, *data, training)
    many = functools.partial(fit_gates, jax.random.split(jax.random.key(0), config.n_gates), gate, *data, training)
    torch_gate = functools.partial(peers.torch_gate, *data, hidden=64, epochs=100, patience=100)
    name = f"one MLP gate, 100 epochs, {N_GATE_STARS:,} stars"
    for row, ours, use_loader in (
        (Row(name, "PyTorch, DataLoader", 15.0), one, True),
        (Row(name, "PyTorch, slices", 6.0), one, False),
        (Row(f"the same, each of {config.n_gates} in one call", "PyTorch, DataLoader", 40.0, per=config.n_gates), many, True),
    ):
        compare(row, ours, functools.partial(torch_gate, use_loader=use_loader), config.n_pairs)
        row.floors = [floor_of_gate() for _ in row.pairs]
        yield row


def bootstrap_data(n_stars: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Target, two predictions and cells."""
    rng = np.random.default_rng(0)
    y = rng.uniform(1, 5, n_stars)
    ours, theirs = y + rng.normal(0, 0.30, n_stars), y + rng.normal(0, 0.33, n_stars)
    return y.astype(np.float32), ours.astype(np.float32), theirs.astype(np.float32), np.arange(n_stars) % N_CELLS


def time_bootstrap(config: BenchmarkConfig) -> Iterator[Row]:
    """The 1,000 resamples of the default run."""
    y, prediction, baseline, cell = bootstrap_data(N_TEST_STARS)
    ours = functools.partial(bootstrap_delta_r2, jax.random.key(0), y, prediction, baseline, groups=cell, method="percentile")
    name = f"bootstrap: 1,000 resamples of {N_TEST_STARS} stars, 9 cells"
    rivals: list[tuple[str, Callable[..., Any], float | None]] = [
        ("loop over r2_score", peers.loop_bootstrap, 200.0),
        ("scipy.stats.bootstrap, vectorised, same resamples for all cells", peers.scipy_joint_bootstrap, 10.0),
        ("scipy.stats.bootstrap, vectorised, a call for each cell", peers.scipy_bootstrap, 5.0),
    ]
    if has("arch"):
        rivals.append(("arch.bootstrap", peers.arch_bootstrap, None))
    for peer, call, target in rivals:
        theirs = functools.partial(call, y, prediction, baseline, cell, 1_000)
        n_pairs = config.n_pairs if call is peers.loop_bootstrap else 5 * config.n_pairs  # the others take milliseconds
        yield compare(Row(name, peer, target), ours, theirs, n_pairs)


def time_large_bootstrap(config: BenchmarkConfig) -> Iterator[Row]:
    """Many stars, many resamples: in pairs with fewer resamples, as the peers take too long, and whole by ours alone."""
    for n_stars, n_resamples, in_pair, batch in ((1_000_000, 1_000, 200, 1), (N_TEST_STARS, 1_000_000, 20_000, 1_000)):
        y, prediction, baseline, cell = bootstrap_data(n_stars)
        ours = functools.partial(
            bootstrap_delta_r2, jax.random.key(0), y, prediction, baseline, groups=cell, n_resamples=in_pair, method="percentile"
        )
        theirs = functools.partial(peers.scipy_bootstrap, y, prediction, baseline, cell, in_pair, batch=batch)
        name = f"bootstrap: {in_pair:,} resamples of {n_stars:,} stars, 9 cells"
        row = compare(Row(name, "scipy.stats.bootstrap, vectorised, a call for each cell"), ours, theirs, 1)
        alone = f"from experiments.timing.rows import bootstrap_alone; print(bootstrap_alone({n_stars}, {n_resamples}))"
        row.note = f"{n_resamples:,} resamples: " + run_python("-c", alone).stdout.splitlines()[-1]
        yield row


def bootstrap_alone(n_stars: int, n_resamples: int) -> str:
    """Seconds of a bootstrap, and the memory of the process, which does nothing else."""
    y, *arrays, cell = bootstrap_data(n_stars)
    resample = functools.partial(bootstrap_delta_r2, groups=cell, method="percentile")
    resample(jax.random.key(1), y, *arrays, n_resamples=16)
    before = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    seconds = seconds_of(lambda: resample(jax.random.key(0), y, *arrays, n_resamples=n_resamples))
    peak, before_gib = peak_memory() / 2**30, before / 2**30
    return f"{seconds:.1f} s, peak {peak:.2f} GiB of the whole process, of which {before_gib:.2f} GiB were there before"


def run_python(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a Python command and keeps what it prints.

    Raises:
        InputError: where it fails.
    """
    command, variables = [sys.executable, *arguments], os.environ | environment
    done = subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, check=False)
    if done.returncode:
        what = " ".join(arguments)[:60] if cwd is None else f"{cwd}: python {' '.join(arguments)}"
        raise InputError(f"{what}: found exit code {done.returncode} ({done.stderr.strip()[-200:]}), expected 0")
    return done


def time_pipeline(config: BenchmarkConfig) -> Iterator[Row]:
    """Whole commands on the same HDF5 files: without and with compiled programs of an earlier run, against the peers' pipeline."""
    if not has("torch"):
        return
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        run_python("-m", "experiments.make_survey", "--n-train", str(config.n_train), "--output-dir", str(folder))
        files = [str(folder / "train.h5"), str(folder / "test.h5")]
        command = ["-m", "experiments.regress_gate", "--train-file", files[0], "--test-file", files[1], "--no-use-cache"]
        command += ["--n-train", str(config.n_train), "--output-dir", str(folder / "out")]
        runs = {}
        for label, options in (("", []), (" without local experts", ["--local.n-training", "0"])):
            for turn in ("first run", "second run"):
                start = time.perf_counter()
                run_python(*command, *options, JAX_COMPILATION_CACHE_DIR=str(folder / f"compiled{label}"))
                runs[turn + label] = time.perf_counter() - start, json.loads((folder / "out" / "run.json").read_text())
        start = time.perf_counter()
        peer = json.loads(run_python("-m", "experiments.timing.peers", *files).stdout.splitlines()[-1])
        theirs = time.perf_counter() - start
        imported = seconds_of(lambda: run_python("-c", "import experiments.regress_gate"))
    for label, (seconds, run) in runs.items():
        target = 5.0 if label.startswith("first") else 7.0
        name = f"regress_gate on files of {config.n_train:,} stars, {label}"
        row = Row(name, "scikit-learn and PyTorch", target, [(seconds, theirs)], compile_s=run["compile_seconds"])
        stages = ", ".join(f"{stage} {value:.1f}" for stage, value in run["seconds"].items() if stage != "total")
        row.note = f"import {imported:.1f} s + compilation {row.compile_s:.1f} s; {stages}"
        if label == list(runs)[-1]:
            row.note += "; the peer: " + ", ".join(f"{stage} {value:.1f}" for stage, value in peer["seconds"].items())
        yield row


GROUPS: dict[str, Callable[[BenchmarkConfig], Iterator[Row]]] = {
    "experts": time_experts,
    "folds": time_folds,
    "gates": time_gates,
    "bootstrap": time_bootstrap,
    "large_bootstrap": time_large_bootstrap,
    "pipeline": time_pipeline,
}
