"""The run that most tests share: everything, on a few stars. Runs of its sizes share its compiled programs."""

import dataclasses

from experiments import regress_gate
from experiments.pipeline.calibration import CalibrationConfig
from moe_jax import GateConfig

SMALL = dataclasses.replace(
    regress_gate.PRESETS["smoke"],
    n_train=900,
    n_test=300,
    n_folds=2,
    alphas=(10.0,),
    global_alphas=(10.0,),
    C_grid=(10.0,),
    n_resamples=40,
    gate=GateConfig(epochs=3),
    calibration=CalibrationConfig(n_stars=600, n_training=900),
)
# The same on the command line.
ARGUMENTS = [
    *("--preset", "smoke", "--n-train", "900", "--n-test", "300", "--n-folds", "2", "--alphas", "10", "--global-alphas", "10"),
    *("--C-grid", "10", "--n-resamples", "40", "--gate.epochs", "3"),
    *("--calibration.n-stars", "600", "--calibration.n-training", "900"),
]
