"""Options in groups: what a command offers, what --help says of it, and the command line that run.json holds."""

import dataclasses
import shlex
from pathlib import Path

import pytest
from small_run import with_options

from experiments import (
    ablate_gate,
    calibrate_bootstrap,
    compare_methods,
    compare_tabular,
    converge_gate,
    cover_all,
    findings,
    predict,
    regress_gate,
    replicate,
    scale,
    stress_predict,
)
from experiments.report.results import tree_of
from experiments.runner.command_line import parse_config
from experiments.runner.provenance import command_of
from experiments.runner.stages import Stages, console
from moe_jax.apply import application


def help_of(module, capsys, *arguments):
    with pytest.raises(SystemExit):
        parse_config(module.PRESETS, module.__doc__, [*arguments, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize(
    ("module", "option"),
    [
        (scale, "--n-train"),
        (scale, "--noise-level"),
        (scale, "--interval-method"),
        (scale, "--train-file"),
        (replicate, "--test-seed"),
        (replicate, "--n-resamples"),
        (calibrate_bootstrap, "--test-file"),
        (calibrate_bootstrap, "--confidence-level"),
        (findings, "--confidence-level"),
        (cover_all, "--coverage"),
        (compare_tabular, "--cache-dir"),
        (stress_predict, "--use-cache"),
        (compare_methods, "--chunk-stars"),
        (calibrate_bootstrap, "--n-test"),
        (converge_gate, "--gate.optimizer"),
        (converge_gate, "--gate.init"),
        (scale, "--gate.optimizer"),
        (ablate_gate, "--gate.optimizer"),
    ],
)
def test_an_option_that_would_be_ignored_is_refused(module, option, capsys):
    assert f"{option} " not in help_of(module, capsys)
    with pytest.raises(SystemExit) as stopped:
        parse_config(module.PRESETS, None, [option, "1"])
    assert stopped.value.code == 2
    assert option in capsys.readouterr().err


def test_help_keeps_lines_and_shows_groups_and_presets(capsys):
    text = help_of(regress_gate, capsys)
    for line in regress_gate.__doc__.splitlines():
        if line.startswith("    python"):
            assert line in text.splitlines() or len(line) > 80
    for group in ("options", "data options", "data.experts options", "gate options", "bootstrap options", "output options"):
        assert f" {group} " in text
    words = " ".join(text.replace("│", " ").split())
    assert "(preset smoke: 1200) (default: 32000)" in words
    assert "(preset smoke: 30) (default: 100)" in words
    words = " ".join(help_of(regress_gate, capsys, "--preset", "smoke").replace("│", " ").split())
    assert "(preset default: 32000) (preset large_test: 32000) (default: 1200)" in words


def test_the_command_makes_the_configuration_again():
    changes = {
        **{"n_train": 5, "alphas": (1.0, 2.0), "n_folds": 3, "test_seed": 4, "train_file": Path("my stars.h5"), "hidden": 7},
        **{"n_resamples": 10, "in_sample_fraction": 0.5, "gate": dataclasses.replace(regress_gate.PRESETS["smoke"].gate, epochs=9)},
    }
    config = with_options(regress_gate.PRESETS["smoke"], **changes)
    elsewhere = with_options(config, output_dir=Path("out"), cache_dir=Path("cache"), use_cache=False)
    command = command_of("regress_gate", elsewhere, regress_gate.PRESETS)
    name, *arguments = shlex.split(command.removeprefix("python -m experiments."))
    assert (name, arguments[:2]) == ("regress_gate", ["--preset", "smoke"])
    assert parse_config(regress_gate.PRESETS, None, arguments) == config
    assert command_of("regress_gate", regress_gate.PRESETS["default"], regress_gate.PRESETS) == "python -m experiments.regress_gate"


def test_predict_explains_each_column_and_flag():
    names = ["star", "log_g", "uncertainty", "half_width_90", "half_width_95", "weight_0", "distance", "n_masked", "flags"]
    for name in [*names, application.UNLIKE_TRAINING, application.MANY_MASKED, application.NOT_PREDICTED]:
        assert f"\n    {name} " in predict.__doc__ or f"\n      {name} " in predict.__doc__


def test_written_files_are_a_tree(tmp_path):
    for name in ("report.md", "a.csv", "b.csv", "older.csv", "model/model.json"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    with console.capture() as captured:
        console.print(tree_of(tmp_path, {"report.md", "a.csv", "b.csv"}))
    lines = captured.get().splitlines()
    assert sorted(line[4:].strip() for line in lines[-3:]) == ["a.csv, b.csv", "model/: model.json", "report.md"]


def test_names_in_brackets_are_shown_as_they_are(capsys):
    Stages().note("data[night]/[/x].h5: 3 stars")
    assert capsys.readouterr().out == "data[night]/[/x].h5: 3 stars\n"


def test_long_stages_say_what_is_left(monkeypatch, capsys):
    monkeypatch.setattr("experiments.runner.stages.SECONDS_BETWEEN_NOTES", 0.0)
    with Stages().steps("gates", 3) as advance:
        for _ in range(3):
            advance()
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(",")[0].strip() for line in lines[:2]] == ["gates: 1 of 3", "gates: 2 of 3"]
    assert lines[0].endswith("s left")
