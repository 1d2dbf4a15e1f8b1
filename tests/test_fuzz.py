"""Readers on damaged files: what they give is whole, or an ``InputError`` of one sentence; nothing else, and no crash."""

import hashlib
import json
import subprocess
import sys

import h5py
import numpy as np
import pytest

from moe_jax import InputError, load_model
from moe_jax.apply.model_file import ARRAYS, MEANING

pytestmark = pytest.mark.slow

READER = """
import sys, pathlib, warnings
warnings.simplefilter("ignore")
import numpy as np
from moe_jax import InputError, load_survey
from moe_jax.spectra.telescope_file import TelescopeFile

def observed(path):
    file = TelescopeFile(path)
    return file.read(0, min(file.n_stars, 100))

data, seed, kind = pathlib.Path(sys.argv[1]).read_bytes(), int(sys.argv[2]), sys.argv[3]
rng, folder, refused = np.random.default_rng(seed), pathlib.Path(sys.argv[4]), 0
for i in range(int(sys.argv[5])):
    spoilt = bytearray(data)
    if i % 4 == 0:
        del spoilt[rng.integers(len(data)):]
    else:  # most of a file is numbers: half of the damage goes to its first and last kilobytes, where its structure lies
        n = int(rng.integers(1, 30))
        places = rng.integers(0, len(data), n)
        places[: n // 2 + 1] = rng.integers(-4096, 4096, n // 2 + 1)
        for place in places:
            spoilt[int(place) % len(data)] = int(rng.integers(256))
    path = folder / ("in.fits" if kind == "fits" else "in.h5")
    path.write_bytes(bytes(spoilt))
    try:
        (load_survey if kind == "survey" else observed)(path)
    except InputError as reason:
        refused += 1
        assert "\\n" not in str(reason), reason
print(refused)
"""


@pytest.fixture(scope="module")
def small(tmp_path_factory, small_survey):
    """Small whole files."""
    import jax
    from astropy.io import fits

    from moe_jax import save_survey
    from moe_jax.spectra.survey_file import FLUX_FIELD, WAVE_FIELD

    folder = tmp_path_factory.mktemp("small")
    few = jax.tree.map(lambda a: a[:3], small_survey.labels)
    survey = small_survey._replace(
        wave=small_survey.wave[:50], flux=small_survey.flux[:3, :50], error=small_survey.error[:3, :50], labels=few
    )
    save_survey(folder / "survey.h5", survey)
    with h5py.File(folder / "observed.h5", "w") as file:
        file[WAVE_FIELD], file[FLUX_FIELD] = np.arange(50.0), np.ones((3, 50), "f4")
    images = [fits.ImageHDU(np.arange(50.0), name="WAVE"), fits.ImageHDU(np.ones((3, 50), "f4"), name="FLUX")]
    fits.HDUList([fits.PrimaryHDU(), *images]).writeto(folder / "fits.fits")
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "name"), [("observed", "observed.h5"), ("fits", "fits.fits"), ("survey", "survey.h5")])
def test_damaged_files(small, tmp_path, kind, name):
    """In a process of its own, so that a crash of a library below would be seen as one."""
    arguments = [str(small / name), "1", kind, str(tmp_path), "150"]
    done = subprocess.run([sys.executable, "-c", READER, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert int(done.stdout) > 30  # every fourth is cut short


def refuses(folder):
    """Whether a model is refused, in one sentence."""
    try:
        load_model(folder)
    except InputError as reason:
        return "\n" not in str(reason)
    return False


def test_damaged_models(trained, tmp_path):
    """Damage to the arrays with a hash to match, and to the description."""
    rng = np.random.default_rng(0)
    arrays, meaning = (trained / "model" / ARRAYS).read_bytes(), (trained / "model" / MEANING).read_bytes()
    length = int.from_bytes(arrays[:8], "little")
    refused = 0
    for i in range(120):
        data, text = bytearray(arrays), bytearray(meaning)
        if i % 3 == 0:
            data[int(rng.integers(8 + length))] = int(rng.integers(256))
        elif i % 3 == 1:
            del data[int(rng.integers(len(data))) :]
        else:
            for place in rng.integers(0, len(text), 3):
                text[place] = int(rng.integers(32, 127))
        (tmp_path / ARRAYS).write_bytes(bytes(data))
        if i % 3 < 2:
            text = bytearray(json.dumps(json.loads(meaning) | {"arrays_sha256": hashlib.sha256(data).hexdigest()}).encode())
        (tmp_path / MEANING).write_bytes(bytes(text))
        refused += refuses(tmp_path)
    assert refused > 60
