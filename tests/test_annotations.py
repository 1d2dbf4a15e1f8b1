"""The shapes and types in the annotations are those of the arrays: the public functions run with jaxtyping's checks on."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.slow

PROGRAM = """
from jaxtyping import install_import_hook
install_import_hook("moe_jax", "beartype.beartype")  # for good: modules are imported when they are first used
import functools
import moe_jax
import jax, numpy as np
jax.config.update("jax_numpy_rank_promotion", "raise")
trace = jax.eval_shape  # the checks are made while JAX traces a function; what is not needed below is not compiled
keys = jax.random.split(jax.random.key(0), 9)
survey = moe_jax.simulate_survey(keys[0], 300)
flux = moe_jax.add_noise(keys[1], survey.flux, survey.error, 0.2)
y, cell = survey.labels.log_g, moe_jax.assign_cells(survey.labels.T_eff, survey.labels.M_H)
folds = np.asarray(moe_jax.assign_folds(keys[2], cell, 2))
alphas = np.array([1.0, 10.0])
moe_jax.predict_ridge(moe_jax.fit_ridge(flux, y, 1.0), flux)
moe_jax.fit_ridge(flux, y, 1.0, tangents=moe_jax.tangent_vectors(survey.wave, survey.flux, velocity=9.0))
moe_jax.cross_validate_ridge(flux, y, alphas, folds)
moe_jax.fit_global(flux, y, alphas, folds)
experts = moe_jax.fit_experts(flux, y, cell, alphas, folds)
yhat = moe_jax.predict_experts(experts, flux)
covered = np.flatnonzero(cell >= 0)
features = moe_jax.compute_features(moe_jax.fit_features(keys[3], flux, survey.wave), flux, survey.wave)[covered]
yhat = moe_jax.cross_fitted_predictions(yhat, experts.out_of_fold, cell)[covered]
y, cell = y[covered], cell[covered]
config = moe_jax.GateConfig(epochs=2)
gate = moe_jax.MLPGate(8)
fit = moe_jax.fit_gate(keys[4], gate, features, yhat, y, config)
moe_jax.mixture_loss(gate, fit.params, features, yhat, y)
trace(lambda *arrays: moe_jax.fit_gates(keys[:2], gate, *arrays, config), features, yhat, y)
logistic = moe_jax.fit_classifier(features, cell, n_folds=2).params
config = moe_jax.GateConfig(optimizer="lbfgs", init="logistic", max_iterations=3)
wide = moe_jax.MLPGate(26)
trace(lambda *arrays: moe_jax.fit_gate(keys[4], wide, *arrays, config, logistic=logistic), features, yhat, y)
config = moe_jax.GateConfig(epochs=2)
trace(lambda *arrays: moe_jax.fit_mlp_regressor(keys[4], *arrays, config=config)[0].params, features, y)
weights = gate.apply(fit.params, features)
moe_jax.fit_temperature(weights, yhat, y)
moe_jax.simplex_weights(yhat + 0.1 * weights, y)
moe_jax.fit_weighted_ridge(features, y, weights[:, 0], 1.0)
moe_jax.fit_mixture_experts(features, y, weights, 1.0)
labels = np.stack([survey.labels.T_eff, survey.labels.log_g, survey.labels.M_H, survey.labels.a_M], axis=1)
local = moe_jax.fit_local(flux, survey.error, labels, survey.labels.log_g, n_cells=32, degree=2)
moe_jax.predict_local(local, flux, moe_jax.median_error(survey.error))
prediction = moe_jax.route_soft(weights, yhat)
baseline = moe_jax.route_fallback(weights, yhat, moe_jax.route_oracle(cell, yhat))
moe_jax.fit_classifier(features, cell, n_folds=2)
moe_jax.bootstrap_delta_r2(keys[5], y, prediction, moe_jax.route_hard(weights, yhat), groups=cell, n_resamples=5)
for method in ("basic", "percentile", "bca", "studentized"):
    gain = functools.partial(moe_jax.bootstrap_gain, keys[5], n_resamples=5, method=method, n_groups=9)
    trace(lambda y, gain_of_star, groups: gain(y, gain_of_star, groups=groups), y, y - prediction, cell)
moe_jax.variance_components(np.random.default_rng(0).normal(size=(2, 2, 2, 2)))
moe_jax.paired_bootstrap(keys[5], moe_jax.rmse, (y, baseline), 5)
moe_jax.ridge_leverage(features, 1.0, features[:5])
moe_jax.cramer_rao(jax.tree.map(lambda label: label[:3], survey.labels), survey.error[:3])
moe_jax.calibrate(np.linspace(0, 1, 50), np.arange(50) % 2, 2)
config = moe_jax.GateConfig(epochs=2)
mixture = moe_jax.fit_moe(keys[6], features, y, np.arange(len(y)) % 2, alphas=(1.0,), n_folds=2, config=config)
moe_jax.predict_moe(mixture, features)
from moe_jax.experts.streaming import Blocks, add_block, collect, device_mesh, empty_sums, fit_sums
mesh, blocks, thin = device_mesh(), Blocks(64, 40), np.asarray(flux)[:, :40]
sums = empty_sums(2, 40, mesh)
for block in [*blocks.add(thin, np.asarray(survey.labels.log_g), folds), *blocks.flush()]:
    sums = add_block(sums, block, mesh)
fit_sums(collect(sums, np.arange(2)[:, None]), alphas, np.zeros(40), np.zeros(()))
try:
    moe_jax.evaluate.metrics.center_groups(y, cell)
except TypeError:
    print("checked")
"""


def test_annotations_hold_at_run_time():
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout == "checked\n"
