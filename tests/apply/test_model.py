import json

import jax
import numpy as np
import pytest

import moe_jax
from moe_jax import InputError, LinearGate, MLPGate, load_model, predict_model, save_model
from moe_jax.apply.conformal import Calibration
from moe_jax.apply.model import LocalModel, Model
from moe_jax.apply.model_file import ARRAYS, MEANING
from moe_jax.spectra.grid import GRID_RESOLUTION


@pytest.fixture(scope="module", params=[LinearGate(), MLPGate(16)], ids=["linear", "MLP"])
def model(request, survey, noisy_flux):
    """A model of few stars and nine experts; what it predicts need not be good."""
    flux, log_g = noisy_flux[:300], np.asarray(survey.labels.log_g)[:300]
    cell, folds = np.arange(300) % 9, np.arange(300) // 9 % 2
    experts = moe_jax.fit_experts(flux, log_g, cell, np.array([10.0]), folds)
    features = moe_jax.fit_features(jax.random.key(0), flux, survey.wave)
    params = request.param.init(jax.random.key(1), 13, 9)
    classification = LinearGate().init(jax.random.key(2), 13, 9)
    whole = moe_jax.fit_global(flux, log_g, np.array([10.0]), folds).ridge
    return Model(np.asarray(survey.wave), experts.ridge, whole, features, request.param, params, classification, {"seed": 3})


def test_round_trip_is_bit_exact(model, tmp_path):
    save_model(tmp_path / "model", model)
    loaded = load_model(tmp_path / "model")
    assert (loaded.gate, loaded.provenance) == (model.gate, {"seed": 3})
    for ours, theirs in zip(jax.tree.leaves(model[:4]), jax.tree.leaves(loaded[:4]), strict=True):
        assert np.asarray(ours).dtype == np.asarray(theirs).dtype
        np.testing.assert_array_equal(ours, theirs)
    for ours, theirs in zip(model[5:7], loaded[5:7], strict=True):
        jax.tree.map(np.testing.assert_array_equal, ours, theirs)
    assert sorted(path.name for path in (tmp_path / "model").iterdir()) == [MEANING, ARRAYS]
    save_model(tmp_path / "again", loaded)
    assert (tmp_path / "again" / ARRAYS).read_bytes() == (tmp_path / "model" / ARRAYS).read_bytes()


def test_resolution_is_written_and_read(model, tmp_path):
    save_model(tmp_path, model._replace(resolution=2500.0))
    assert load_model(tmp_path).resolution == 2500
    spoil_json(resolution=None)(tmp_path)  # as models were written before
    assert load_model(tmp_path).resolution == GRID_RESOLUTION
    spoil_json(resolution="high")(tmp_path)
    with pytest.raises(InputError, match="model.json: resolution: found 'high', expected a positive number"):
        load_model(tmp_path)
    save_model(tmp_path, model._replace(resolution=np.float32(2500)))
    assert load_model(tmp_path).resolution == 2500
    for wrong in (np.nan, 0, -1.0, True, None):
        with pytest.raises(InputError, match=f"resolution: found {wrong}, expected a positive number"):
            save_model(tmp_path / "other", model._replace(resolution=wrong))
    assert not (tmp_path / "other").exists()


def test_predictions_are_those_of_the_pieces(model, noisy_flux, survey, tmp_path):
    save_model(tmp_path, model)
    flux = noisy_flux[300:340]
    ours = predict_model(load_model(tmp_path), flux)
    features = moe_jax.compute_features(model.features, flux, survey.wave)
    weights = np.asarray(model.gate.apply(model.gate_params, features))
    predictions = flux.astype(float) @ np.asarray(model.experts.coef, float).T + np.asarray(model.experts.intercept)
    np.testing.assert_allclose(ours.weights, weights, rtol=1e-5, atol=1e-7)
    np.testing.assert_allclose(ours.log_g, np.sum(weights * predictions, axis=1), rtol=1e-4)
    np.testing.assert_allclose(ours.global_log_g, moe_jax.predict_ridge(model.global_ridge, flux), rtol=1e-6)
    with pytest.raises(InputError, match=r"flux has shape \(40, 100\), expected \(N, 4096\)"):
        predict_model(model, flux[:, :100])


def test_local_experts_are_written_read_and_asked(model, noisy_flux, survey, tmp_path):
    rows = slice(0, 300)
    error = np.asarray(survey.error)[rows]
    labels = np.stack([np.asarray(survey.labels.T_eff), np.asarray(survey.labels.log_g)], axis=1)[rows]
    mixture = moe_jax.fit_local(noisy_flux[rows], error, labels, labels[:, 1], n_cells=20, degree=2, n_components=(3,))
    quantiles = np.arange(9 * 3, dtype=np.float32).reshape(9, 3)
    calibration = Calibration(np.array([0.68, 0.9, 0.95], np.float32), quantiles, np.ones(9, np.float32))
    save_model(tmp_path / "model", model._replace(local=LocalModel(mixture, calibration)))
    loaded = load_model(tmp_path / "model")
    jax.tree.map(np.testing.assert_array_equal, loaded.local, LocalModel(mixture, calibration))
    flux, error = noisy_flux[300:340], np.asarray(survey.error)[300:340]
    predicted = predict_model(loaded, flux, error)
    expected = moe_jax.predict_local(mixture, flux, moe_jax.median_error(error))
    np.testing.assert_array_equal(predicted.local.log_g, expected.y)
    np.testing.assert_allclose(
        predicted.local.half_width, quantiles[predicted.cell] * np.asarray(expected.sigma)[:, None], rtol=1e-6
    )
    assert predict_model(model, flux, error).local is None


def spoil_json(**changes):
    def change(folder):
        meaning = json.loads((folder / MEANING).read_text()) | changes
        (folder / MEANING).write_text(json.dumps({name: value for name, value in meaning.items() if value is not None}))

    return change


def cut(name):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-50])


def foreign(folder):
    import hashlib

    (folder / ARRAYS).write_bytes(b"no tensors at all")
    spoil_json(arrays_sha256=hashlib.sha256(b"no tensors at all").hexdigest())(folder)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: (folder / MEANING).unlink(), "model.json: found no such file"),
        (lambda folder: (folder / ARRAYS).unlink(), "model.safetensors: found no such file"),
        (cut(ARRAYS), "it is truncated, or belongs to another model"),
        (cut(MEANING), "found a file that is not JSON"),
        (lambda folder: (folder / MEANING).write_bytes(b"\x80\x04"), "found a file that is not JSON"),
        (lambda folder: (folder / MEANING).write_text("[1, 2]"), "schema_version: found None, expected 3: this is not a model"),
        (spoil_json(schema_version=4), "schema_version: found 4, expected 3: make the model again"),
        (spoil_json(schema_version=2), "schema_version: found 2, expected 3: make the model again"),
        (spoil_json(gate={"form": "Tree"}), "gate: found {'form': 'Tree'}, expected a LinearGate or an MLPGate"),
        (spoil_json(features=["depth"]), r"features: found \['depth'\], expected"),
        (spoil_json(provenance=None), "provenance: found nothing, expected it in schema 3"),
        (foreign, "found a file that is not safetensors"),
    ],
)
def test_what_is_no_model_ends_in_one_sentence(model, tmp_path, spoil, message):
    save_model(tmp_path, model)
    spoil(tmp_path)
    with pytest.raises(InputError, match=message) as raised:
        load_model(tmp_path)
    assert "\n" not in str(raised.value)


def test_a_gate_of_ones_own_cannot_be_saved(model, tmp_path):
    with pytest.raises(InputError, match="expected a LinearGate or an MLPGate"):
        save_model(tmp_path / "model", model._replace(gate=object()))
    assert not (tmp_path / "model").exists()


def test_a_model_that_could_not_be_loaded_is_not_written(model, tmp_path):
    coef = np.asarray(model.experts.coef).copy()
    coef[0, 0] = np.nan
    for spoilt, message in (
        (model._replace(experts=model.experts._replace(coef=coef)), "experts/coef holds numbers that are not finite"),
        (model._replace(experts=model.experts._replace(coef=coef.T)), "experts/coef has shape"),
    ):
        with pytest.raises(InputError, match=message):
            save_model(tmp_path / "model", spoilt)
    assert not (tmp_path / "model").exists()


def test_what_a_model_cannot_be_applied_to(model, noisy_flux):
    """Negative errors were taken by their size, or as no noise at all; whole numbers and lists ended in a traceback."""
    flux = np.asarray(noisy_flux[:3])
    error = np.full_like(flux, 0.1)
    for arguments, message in (
        ((flux.astype(str),), "flux holds values of type <U32, expected real numbers"),
        ((flux[:0],), r"flux has shape \(0, 4096\), expected at least one row"),
        ((flux, -error), "error holds -0.1, expected no negative errors"),
        ((flux, error, np.full(flux.shape, 0.5)), "good holds values of type float64, expected True and False"),
        ((flux, error, None, np.zeros(2)), r"scale_error has shape \(2,\), expected \(3,\)"),
    ):
        with pytest.raises(InputError, match=message):
            predict_model(model, *arguments)
    counts = np.round(1e4 * flux).astype(int)
    np.testing.assert_array_equal(predict_model(model, counts).log_g, predict_model(model, counts.astype(np.float32)).log_g)
    np.testing.assert_array_equal(predict_model(model, flux.tolist()).log_g, predict_model(model, flux).log_g)
