"""The whole public API in one table: what each function does with lists, integers, pandas, NaN, text, ``jit``, ``vmap``, ``grad``.

The numbers are whole, so that integers and floats are the same input and must give the same result.
"""

import functools
from dataclasses import dataclass, field
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pandas as pd
import pytest

import moe_jax as mj
from moe_jax import InputError

N, K = 24, 2
CONFIG = mj.GateConfig(epochs=2, batch_size=8)
rng = np.random.default_rng(0)
X = rng.integers(-3, 4, (N, 3)).astype(np.float32)
DATA = {
    "x": X,
    "y": X @ np.array([1, 2, -1], np.float32) + rng.integers(0, 3, N).astype(np.float32),
    "prediction": X @ np.array([1, 2, -1], np.float32),
    "predictions": rng.integers(-4, 5, (N, K)).astype(np.float32),
    "weights": np.eye(K, dtype=np.float32)[rng.integers(0, K, N)],
    "sample_weight": rng.integers(1, 4, N).astype(np.float32),
    "cell": np.arange(N) % K,
    "folds": np.arange(N) // 2 % 3,
    "values": rng.integers(0, 9, (2, 2, 2, 2)).astype(np.float32),
    "alphas": np.array([1.0, 8.0], np.float32),
    "mse": np.array([3.0, 2.0], np.float32),
    "T_eff": np.linspace(3800, 5900, N).round().astype(np.float32),
    "M_H": np.full(N, -1.0, np.float32),
}
KEY = jax.random.key(3)
GATE = mj.LinearGate()
PARAMS = mj.linear_params(np.ones((3, K), np.float32), np.zeros(K, np.float32))


@dataclass(frozen=True)
class Case:
    """A function of some of the arrays, and what it does with them."""

    call: object  #: takes the arrays
    arrays: str  #: their names
    concrete: str = ""  #: those that must not be traced
    derivative: str = ""  #: the array in which the result can be differentiated
    nan: str = "refused"  #: what becomes of NaN in the first array: refused, or "spreads" to the result
    names: list = field(init=False)

    def __post_init__(self):
        object.__setattr__(self, "names", self.arrays.split())


def fitted(x, y, cell):
    return mj.fit_moe(KEY, x, y, cell, n_folds=2, alphas=(1.0,), gate=GATE, config=CONFIG)


MIXTURE = fitted(DATA["x"], DATA["y"], DATA["cell"])
RIDGE = mj.Ridge(jnp.asarray([[1.0, 2, 3], [0, 1, 0]]), jnp.ones(2))
EXPERTS = mj.CrossValidatedRidge(RIDGE, *[None] * 5)
NETWORK = mj.fit_mlp_regressor(KEY, DATA["x"], DATA["y"], hidden=4, config=CONFIG)[0]
LOCAL = mj.fit_local(X, np.ones_like(X), DATA["predictions"], DATA["y"], n_cells=2, degree=1, n_components=(1,))
CASES = {
    "fit_ridge": Case(lambda x, y: mj.fit_ridge(x, y, 1.0), "x y", derivative="x"),
    "fit_weighted_ridge": Case(lambda *a: mj.fit_weighted_ridge(*a, 1.0), "x y sample_weight", derivative="sample_weight"),
    "predict_ridge": Case(lambda x: mj.predict_ridge(RIDGE, x), "x", derivative="x", nan="spreads"),
    "predict_experts": Case(lambda x: mj.predict_experts(EXPERTS, x), "x", derivative="x", nan="spreads"),
    "cross_validate_ridge": Case(mj.cross_validate_ridge, "x y alphas folds", "folds", derivative="y"),
    "fit_experts": Case(lambda *a: mj.fit_experts(*a, n_experts=K), "x y cell alphas folds", "x y cell alphas folds"),
    "fit_global": Case(lambda *a: mj.fit_global(*a), "x y alphas folds", "folds"),
    "assign_folds": Case(lambda cell: mj.assign_folds(KEY, cell, 3), "cell"),
    "cross_fitted_predictions": Case(mj.cross_fitted_predictions, "predictions y cell", derivative="y", nan=""),
    "select_alpha": Case(mj.select_alpha, "alphas mse", nan=""),
    "assign_cells": Case(mj.assign_cells, "T_eff M_H", nan=""),
    "nearest_cells": Case(mj.nearest_cells, "T_eff M_H", nan=""),
    "fit_mixture_experts": Case(lambda *a: mj.fit_mixture_experts(*a, 1.0), "x y weights", derivative="y"),
    "ridge_leverage": Case(lambda x: mj.ridge_leverage(x, 1.0, x), "x", derivative="x"),
    "calibrate": Case(lambda *a: mj.calibrate(*a, K, levels=(0.5,)), "sample_weight cell", "sample_weight cell"),
    "r2_score": Case(mj.r2_score, "y prediction", derivative="prediction", nan="spreads"),
    "mae": Case(mj.mae, "y prediction", derivative="prediction", nan="spreads"),
    "rmse": Case(mj.rmse, "y prediction", derivative="prediction", nan="spreads"),
    "r2_by_group": Case(lambda *a: mj.r2_by_group(*a, K), "y prediction cell", derivative="prediction", nan="spreads"),
    "variance_components": Case(mj.variance_components, "values", "values"),
    "bootstrap_delta_r2": Case(
        lambda y, p, b, cell: mj.bootstrap_delta_r2(KEY, y, p, b, groups=cell, n_groups=K, n_resamples=5).groups,
        "y prediction sample_weight cell",
    ),
    "bootstrap_gain": Case(lambda *a: mj.bootstrap_gain(KEY, *a, n_resamples=5).overall, "y prediction"),
    "paired_bootstrap": Case(
        lambda y, p: mj.paired_bootstrap(KEY, mj.mae, (jnp.asarray(y), jnp.asarray(p)), 5), "y prediction", nan="spreads"
    ),
    "route_soft": Case(mj.route_soft, "weights predictions", derivative="weights", nan="spreads"),
    "route_hard": Case(mj.route_hard, "weights predictions", derivative="predictions", nan=""),
    "route_fallback": Case(mj.route_fallback, "weights predictions y", derivative="predictions", nan=""),
    "route_oracle": Case(mj.route_oracle, "cell predictions", derivative="predictions"),
    "sharpen": Case(lambda weights: mj.sharpen(weights, 0.5), "weights", nan="spreads"),
    "fit_classifier": Case(lambda *a: mj.fit_classifier(*a, n_folds=2).params, "x cell", "x cell"),
    "simplex_weights": Case(mj.simplex_weights, "predictions y", "predictions y"),
    "fit_temperature": Case(mj.fit_temperature, "weights predictions y", "weights predictions y"),
    "fit_mlp_regressor": Case(lambda *a: mj.fit_mlp_regressor(KEY, *a, hidden=4, config=CONFIG)[0].params, "x y"),
    "predict_mlp_regressor": Case(lambda x: mj.predict_mlp_regressor(NETWORK, x), "x", derivative="x", nan="spreads"),
    "mixture_loss": Case(lambda *a: mj.mixture_loss(GATE, PARAMS, *a), "x predictions y", derivative="y", nan="spreads"),
    "fit_gate": Case(lambda *a: mj.fit_gate(KEY, GATE, *a, CONFIG), "x predictions y"),
    "fit_gates": Case(lambda *a: mj.fit_gates(jax.random.split(KEY, 2), GATE, *a, CONFIG).params, "x predictions y"),
    "fit_moe": Case(fitted, "x y cell", "x y cell"),
    "linear_params": Case(mj.linear_params, "predictions alphas", derivative="alphas", nan="spreads"),
    "predict_local": Case(lambda x, s: mj.predict_local(LOCAL, x, s), "x sample_weight", nan="spreads"),
    "predict_moe": Case(lambda x: mj.predict_moe(MIXTURE, x), "x", derivative="x", nan="spreads"),
}
#: They take files, spectra of the grid, or plain numbers, and have tests of their own.
ELSEWHERE = {
    "load_model", "save_model", "predict_model", "load_grid", "interpolate_grid", "simulate_survey", "load_survey",
    "save_survey", "cramer_rao", "fit_features", "compute_features", "retention", "required_stars", "fit_labels", "fit_local",
    "add_noise", "median_error", "tangent_vectors",
}  # fmt: skip

NOT_OF_STARS = {"linear_params", "paired_bootstrap", "select_alpha", "variance_components"}


def table(function):
    return pytest.mark.parametrize("case", CASES.values(), ids=CASES)(function)


def leaves(result):
    return [np.asarray(leaf) for leaf in jax.tree.leaves(result)]


def assert_same(ours, theirs, rtol=1e-4):
    for a, b in zip(leaves(ours), leaves(theirs), strict=True):
        np.testing.assert_allclose(a, b, rtol=rtol, atol=rtol)


def test_every_public_function_is_here():
    public = {name for name in mj.__all__ if callable(getattr(mj, name)) and not isinstance(getattr(mj, name), type)}
    assert public - ELSEWHERE == set(CASES)


@table
def test_lists_integers_and_pandas_are_the_arrays_that_they_stand_for(case):
    arrays = [DATA[name] for name in case.names]
    expected = case.call(*arrays)
    integers = [array if name in ("alphas", "mse") else array.astype(int) for name, array in zip(case.names, arrays, strict=True)]
    assert_same(case.call(*integers), expected)
    assert_same(case.call(*(array.tolist() for array in arrays)), expected)
    if all(array.ndim <= 2 for array in arrays):
        frames = [
            pd.DataFrame(array).astype(object) if array.ndim == 2 else pd.Series(array, index=np.arange(len(array)) + 7)
            for array in arrays
        ]
        assert_same(case.call(*frames), expected)


@table
def test_jit_and_vmap(case):
    """All arrays that need not be concrete are traced; one that must be ends in a sentence."""
    traced = [name for name in case.names if name not in case.concrete.split()]

    def call(*arrays):
        return case.call(*((DATA | dict(zip(traced, arrays, strict=True)))[name] for name in case.names))

    if traced:
        twice = [np.stack([DATA[name]] * 2) for name in traced]
        for result in zip(*leaves(jax.jit(jax.vmap(call))(*twice)), strict=True):
            assert_same(list(result), case.call(*(DATA[name] for name in case.names)), 2e-3)
            break
    for name in case.concrete.split():
        with pytest.raises(InputError, match="is traced, expected concrete values"):
            jax.jit(lambda array, name=name: case.call(*((DATA | {name: array})[n] for n in case.names)))(DATA[name])


@table
def test_derivatives_and_float64(case, x64):
    """Float64 goes in and comes out; a derivative is that of finite differences."""
    arrays = {n: DATA[n].astype(float) if DATA[n].dtype == np.float32 else DATA[n] for n in case.names}
    result = case.call(*arrays.values())
    assert all(leaf.dtype != np.float32 for leaf in leaves(result))
    if case.derivative:

        def total(array):
            parts = jax.tree.leaves(case.call(*(arrays | {case.derivative: array}).values()))
            return sum(jnp.sum(jnp.sin(part)) for part in parts if jnp.issubdtype(part.dtype, jnp.floating))

        at = arrays[case.derivative] + 0.1
        direction, step = np.cos(np.arange(at.size)).reshape(at.shape), 1e-6
        slope = (total(at + step * direction) - total(at - step * direction)) / (2 * step)
        assert np.sum(jax.grad(total)(jnp.asarray(at)) * direction) == pytest.approx(float(slope), rel=1e-4, abs=1e-7)


@table
def test_nan_and_text(case):
    arrays = {name: DATA[name] for name in case.names}
    first = case.names[0]
    if case.nan and arrays[first].dtype == np.float32:
        spoilt = arrays[first].copy()
        spoilt.flat[0] = np.nan
        if case.nan == "refused":
            with pytest.raises(InputError):
                case.call(*(arrays | {first: spoilt}).values())
        else:
            result = leaves(case.call(*(arrays | {first: spoilt}).values()))
            assert any(np.isnan(leaf).any() for leaf in result if leaf.dtype.kind == "f")
    if case is not CASES["paired_bootstrap"]:
        text = np.full(arrays[first].shape, "a").tolist()
        with pytest.raises(InputError, match=r"expected (real|whole)? ?numbers"):
            case.call(*(arrays | {first: text}).values())


def test_what_is_no_table_or_no_key():
    x, y = DATA["x"], DATA["y"]
    for bad, message in (
        (x[:, 0], r"x has shape \(24,\), expected \(N, P\)"),
        ([[1.0], [1.0, 2.0]], "x is ragged"),
        (np.ma.array(np.ones((2, 1)), mask=[[True], [False]]), "x has 1 masked values, expected none"),
        (None, "x is None, expected an array"),
        (x + 1j, "x holds values of type complex64, expected real numbers"),
    ):
        with pytest.raises(InputError, match=message):
            mj.fit_ridge(bad, y, 1.0)
    with pytest.raises(InputError, match="cell holds values of type float64, expected whole numbers"):
        mj.fit_moe(KEY, x, y, DATA["cell"] + 0.5)
    with pytest.raises(InputError, match="cell is -1 for all 24 rows"):
        mj.fit_moe(KEY, x, y, np.full(N, -1))
    with pytest.raises(InputError, match=r"key is int, expected a random key: jax.random.key\(seed\)"):
        mj.fit_moe(3, x, y, DATA["cell"])
    with pytest.raises(InputError, match="n_groups is None, expected a number where groups is traced"):
        jax.jit(lambda groups: mj.bootstrap_gain(KEY, y, x[:, 0], groups=groups))(DATA["cell"])
    with pytest.raises(InputError, match="alphas? is"):
        mj.cross_validate_ridge(x, y, [], DATA["folds"])


@pytest.mark.parametrize("name", [name for name in CASES if name not in NOT_OF_STARS])
def test_shapes(name):
    """No stars, one star less, and a column in place of a vector: nothing is broadcast."""
    case = CASES[name]
    arrays = {name: DATA[name] for name in case.names}
    of_stars = [name for name, array in arrays.items() if len(array) == N]
    spoilt = [{name: arrays[name][:0] for name in of_stars}]
    spoilt += [{name: arrays[name][..., None]} for name in of_stars]
    if len(of_stars) > 1:
        spoilt += [{name: arrays[name][1:]} for name in of_stars]
    for change in spoilt:
        with pytest.raises(InputError, match=r"has shape .*, expected"):
            case.call(*(arrays | change).values())


def test_half_precision_and_old_keys():
    x, y = jnp.asarray(DATA["x"]), DATA["y"]
    assert_same(mj.fit_ridge(x.astype(jnp.bfloat16), y, 1.0), mj.fit_ridge(x, y, 1.0))
    assert mj.fit_ridge(x.astype(jnp.bfloat16), y, 1.0).coef.dtype == jnp.float32
    old = mj.fit_mlp_regressor(jax.random.PRNGKey(3), x, y, hidden=4, config=CONFIG)[0]
    assert_same(old.params, NETWORK.params)


def test_integers_do_not_truncate_the_penalties():
    mixture = mj.fit_moe(KEY, DATA["x"].astype(int), DATA["y"], DATA["cell"], n_folds=2, alphas=(0.5, 0.25), config=CONFIG)
    assert set(np.asarray(mixture.alpha)) <= {0.5, 0.25}


def test_a_mixture_is_a_pytree():
    x = DATA["x"]
    assert_same(jax.jit(mj.predict_moe)(MIXTURE, x), mj.predict_moe(MIXTURE, x))
    doubled = jax.tree.map(lambda leaf: 2 * leaf, MIXTURE)
    assert doubled.gate == GATE
    np.testing.assert_allclose(doubled.experts.coef, 2 * np.asarray(MIXTURE.experts.coef))


@pytest.mark.slow
def test_a_model_stays_outside_of_jit():
    model = mj.load_model(Path(__file__).parents[1] / "results/regress_gate/default/model")
    survey = mj.simulate_survey(KEY, 4)
    expected = mj.predict_model(model, survey.flux, survey.error)
    traced = jax.jit(functools.partial(mj.predict_model, model))(survey.flux, survey.error)
    np.testing.assert_allclose(traced.log_g, expected.log_g, atol=1e-3)
    np.testing.assert_allclose(traced.weights, expected.weights, atol=1e-3)


def test_a_gate_that_returns_logits_is_refused():
    class Logits:
        """A linear gate without its softmax."""

        init, from_linear, apply = GATE.init, GATE.from_linear, GATE.logits

    with pytest.raises(InputError, match="expected weights >= 0 of sum 1: end with a softmax"):
        mj.fit_moe(KEY, DATA["x"], DATA["y"], DATA["cell"], n_folds=2, gate=Logits(), config=CONFIG)
