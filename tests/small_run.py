"""The run that most tests share: everything, on a few stars. Runs of its sizes share its compiled programs."""

import dataclasses
from unittest import mock

from experiments import regress_gate
from experiments.pipeline.calibration import CalibrationConfig
from moe_jax import GateConfig


def with_options(config, **options):
    """A configuration in which some options are others, each in the group where it stands, as on the command line."""
    groups = {field.name: getattr(config, field.name) for field in dataclasses.fields(config) if field.name not in options}
    known = {field.name for field in dataclasses.fields(config)}
    changes = {name: options.pop(name) for name in known & set(options)}
    for name, group in groups.items():
        if dataclasses.is_dataclass(group):
            names = option_names(group) & set(options)
            changes[name] = with_options(group, **{inner: options.pop(inner) for inner in names})
    assert not options, f"{type(config).__name__} has no options {options}"
    return dataclasses.replace(config, **changes)


def option_names(group):
    """Names of the options of a group and of the groups within it."""
    names = {field.name for field in dataclasses.fields(group)}
    inner = (getattr(group, name) for name in names)
    return names.union(*(option_names(value) for value in inner if dataclasses.is_dataclass(value)))


SMALL = with_options(
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


def run_without_figures(config):
    """Runs ``regress_gate``, but writes no figures: on few stars they take most of the time."""
    from matplotlib import pyplot

    with mock.patch("experiments.report.results.save_figure", lambda figure, path: pyplot.close(figure)):
        regress_gate.main(config)
