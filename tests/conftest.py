"""JAX flags and the data that the tests share."""

import os
import tempfile
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
# Most of the suite's time is compilation; programs that run once need no optimisation.
os.environ.setdefault("XLA_FLAGS", "--xla_backend_optimization_level=0 --xla_llvm_disable_expensive_passes=true")

# Programs that several tests, workers or child processes need are compiled once.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    run = os.environ.get("PYTEST_XDIST_TESTRUNUID", str(os.getpid()))
    os.environ["JAX_COMPILATION_CACHE_DIR"] = str(Path(tempfile.gettempdir()) / f"moe_jax_compiled_{run}")

import jax
import numpy as np
import pytest

import moe_jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.2)


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
