"""JAX flags and the data that the tests share."""

import fcntl
import os
import tempfile
from importlib.metadata import version
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation; programs that run once need little optimisation (at level 0 XLA 0.10 miscompiles
# the gradient of a mixture). The last two save a third of it; an XLA that no longer knew one of them would abort.
os.environ.setdefault(
    "XLA_FLAGS",
    "--xla_backend_optimization_level=1 --xla_llvm_disable_expensive_passes=true"
    + " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"
    * version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")),
)

# The workers keep the cores busy: further threads of BLAS would wait for each other, and double its time.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# Programs that several tests, workers or child processes need are compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"moe_jax_compiled_{run}")

os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")

import jax
import numpy as np
import pytest

import moe_jax
from experiments.runner.command_line import use_all_cores

use_all_cores()  # as in a command, so that both share compiled programs
jax.config.update("jax_numpy_rank_promotion", "raise")


def pytest_collection_modifyitems(items):
    """The slow tests first, so that none of them is left to one worker at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


@pytest.fixture(autouse=True)
def few_programs():
    """Forgets compiled programs before a worker holds too many: each takes a dozen memory mappings, and at 65,530 jaxlib aborts."""
    yield
    maps = Path("/proc/self/maps")
    if maps.exists() and maps.read_bytes().count(b"\n") > 30_000:
        jax.clear_caches()


@pytest.fixture(params=["float32", "float64"])
def dtype(request):
    """Runs the test in both precisions; float64 with JAX's x64 mode on."""
    with jax.enable_x64(request.param == "float64"):
        yield np.dtype(request.param)


@pytest.fixture
def x64():
    """Runs the test in float64."""
    with jax.enable_x64(True):
        yield


@pytest.fixture
def rng():
    return np.random.default_rng(0)


@pytest.fixture(scope="session")
def survey():
    """3,000 simulated stars."""
    return moe_jax.simulate_survey(jax.random.key(1), 3_000)


@pytest.fixture(scope="session")
def noisy_flux(survey):
    return np.asarray(moe_jax.add_noise(jax.random.key(2), survey.flux, survey.error, 0.2))


@pytest.fixture(scope="session")
def small_survey():
    """400 simulated stars."""
    return moe_jax.simulate_survey(jax.random.key(3), 400)


@pytest.fixture(scope="session")
def spectra(survey, noisy_flux):
    """The real size of a cell: 3,000 spectra of 4,096 pixels."""
    return noisy_flux, np.asarray(survey.labels.log_g)


@pytest.fixture(scope="session")
def common(tmp_path_factory):
    """A folder that all workers share."""
    folder = tmp_path_factory.getbasetemp()
    return folder.parent if "PYTEST_XDIST_WORKER" in os.environ else folder


@pytest.fixture(scope="session")
def once():
    """A function that calls ``make(folder)`` in one of the workers; the others wait for it."""

    def call(folder, make):
        with open(folder.with_suffix(".lock"), "a+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            lock.seek(0)
            if not lock.read():
                make(folder)
                lock.write("made")

    return call


@pytest.fixture(scope="session")
def trained(common, once):
    """The results of the small run; its stages lie in cache/ beside it, and observed.h5, its test stars as observed."""
    once(common / "small", train)
    return common / "small" / "run"


def train(folder):
    from small_run import SMALL, with_options

    from experiments import make_survey, regress_gate

    regress_gate.main(with_options(SMALL, output_dir=folder / "run", cache_dir=folder / "cache"))
    make_survey.main(make_survey.MakeSurveyConfig(n_train=1, n_test=300, noise_level=0.2, output_dir=folder / "surveys"))
    (folder / "surveys" / "test.h5").rename(folder / "observed.h5")
