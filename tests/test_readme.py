"""README's Python examples run as they stand, and its figures are those of the committed results."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from experiments.benchmark import summary
from experiments.report.markdown import load_published, overall_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.split("\n")[0] for example in EXAMPLES])
def test_examples_run(example, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


def test_the_table_is_that_of_the_committed_run():
    overall = pd.read_csv(ROOT / "results/regress_gate/default/overall.csv", keep_default_na=False)
    assert overall_markdown(overall, load_published()) in README


def test_the_ratios_are_those_of_the_committed_benchmark():
    assert summary(pd.read_csv(ROOT / "results/benchmark/default/benchmark.csv")) in README


def test_the_million_is_that_of_the_committed_run():
    folder = ROOT / "results/regress_gate/million"
    run, overall = json.loads((folder / "run.json").read_text()), pd.read_csv(folder / "overall.csv", keep_default_na=False)
    assert run["command"] in README
    assert f"{run['seconds']['total'] / 60:.1f} minutes and {run['peak_memory_gib']:.1f} GiB" in README
    mlp = overall[(overall["method"] == "regress_mlp") & (overall["protocol"] == "cross-fitted")]["r2"].iloc[0]
    assert f"R2 {mlp:.4f}" in README


def test_uncertainties_and_other_data_are_those_of_the_committed_runs():
    text = " ".join(README.split())
    coverage = pd.read_csv(ROOT / "results/calibrate_uncertainty/default/coverage.csv")
    for row in coverage[coverage["by"] == "all"].to_dict("records"):
        assert f"{row['coverage']:.1%}".replace("%", " % where") in text
    floor = pd.read_csv(ROOT / "results/calibrate_uncertainty/default/floor.csv").set_index("mag").loc["all"]
    for name in ("floor", "MLP gate", "classification gate"):
        assert f"{floor[name]:.3f}" in text
    tabular = pd.read_csv(ROOT / "results/compare_tabular/default/variants.csv")
    for row in tabular[tabular["variant"].isin(["ridge mixture, MLP gate", "HistGradientBoosting"])].to_dict("records"):
        assert "R2 {r2:.3f} ({delta_r2:+.3f} [{low:+.3f}, {high:+.3f}])".format(**row) in text


def test_the_map_names_every_module():
    for path in [*ROOT.glob("moe_jax/*.py"), *ROOT.glob("experiments/*.py")]:
        if path.stem not in ("__init__", "__main__"):
            assert f"`{path.stem}`" in README, path.name


def test_the_findings_are_those_of_the_committed_tables():
    findings = (ROOT / "results/FINDINGS.md").read_text()

    def row(experiment, variant):
        table = pd.read_csv(ROOT / f"results/{experiment}/default/variants.csv").set_index("variant")
        return "{delta_r2:+.4f} [{low:+.4f}, {high:+.4f}]".format(**table.loc[variant, ["delta_r2", "low", "high"]])

    for protocol in ("in-sample", "cross-fitted"):
        assert row("converge_gate", f"linear, {protocol}, L-BFGS, warm") in findings
    assert row("control_gate", "MLP on features + expert predictions") in findings
    repeated = pd.read_csv(ROOT / "results/replicate/default/intervals.csv").set_index("gate").loc["MLP, cross-fitted"]
    assert "{mean:+.4f} [{mean_low:+.4f}, {mean_high:+.4f}]".format(**repeated) in findings
    for path in re.findall(r"\]\(([\w/]+\.(?:md|png|csv|json))\)", findings):
        assert (ROOT / "results" / path).is_file(), path
