"""README and the pages of .docs: their Python blocks run, their links resolve, their numbers are those of the committed results."""

import json
import re
from pathlib import Path

import pandas as pd
import pytest

from experiments.__main__ import COMMANDS
from experiments.compare_rvspecfit import PEERS
from experiments.report.markdown import load_published, overall_markdown, table_markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "results"
README = (ROOT / "README.md").read_text()
PAGES = {str(path.relative_to(ROOT / ".docs/pages")): path for path in sorted((ROOT / ".docs/pages").rglob("*.md"))}
TEXTS = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    ROOT / ".github/CONTRIBUTING.md",
    RESULTS / "FINDINGS.md",
    *PAGES.values(),
]
# The tutorial's blocks share their names; tests/test_docs.py runs them.
EXAMPLES = [
    pytest.param(block, id=f"{path.stem}-{number}")
    for path in TEXTS
    if path.name != "tutorial.md"
    for number, block in enumerate(re.findall(r"```python\n(.*?)```", path.read_text(), flags=re.DOTALL))
]


def page(name):
    """The text of a page, with line breaks as spaces."""
    return " ".join(PAGES[name].read_text().split())


def read(path):
    return pd.read_csv(RESULTS / path, keep_default_na=False)


def interval(row, names=("delta_r2", "low", "high"), form="+.4f"):
    estimate, low, high = (row[name] for name in names)
    return f"{estimate:{form}} [{low:{form}}, {high:{form}}]"


def test_readme_is_short_and_its_second_command_is_that_of_ci():
    assert len(README.encode()) <= 8192
    assert len(re.findall(r"^pip install .* && pytest", README, flags=re.MULTILINE)) == 1
    assert "pip install .* && pytest" in (ROOT / ".ci/run").read_text()


def test_there_are_examples():
    found = [example.id for example in EXAMPLES]
    assert len(found) >= 11
    assert {name.rpartition("-")[0] for name in found} >= {"README", "any_data", "pieces", "spectra", "streaming"}


@pytest.mark.slow
@pytest.mark.parametrize("example", EXAMPLES)
def test_examples_run(example, tmp_path, monkeypatch):
    (tmp_path / "results").symlink_to(RESULTS)
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "example", "exec"), {})


def anchors(path):
    """Anchors of a Markdown file's headings, as GitHub and MkDocs make them."""
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    headings = re.findall(r"^#+ (.*)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path):
    text = re.sub(r"```.*?```", "", path.read_text(), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if "://" not in link:
            target, _, anchor = link.partition("#")
            file = (path.parent / target) if target else path
            assert file.exists(), f"{path.name}: {link}"
            if anchor:
                assert anchor in anchors(file), f"{path.name}: {link}"


def test_readme_and_start_page_link_to_every_page():
    assert len(PAGES) >= 18
    linked = re.findall(r"\]\(([\w/]+\.md)", PAGES["index.md"].read_text())
    assert set(linked) | {"index.md"} == set(PAGES)
    in_readme = set(re.findall(r"\]\(\.docs/pages/([\w/]+\.md)", README))
    assert in_readme == {name for name in PAGES if not name.startswith("api/")} - {"index.md"}


def test_the_map_names_every_folder():
    packages = {path.parent for package in ("moe_jax", "experiments") for path in (ROOT / package).rglob("*.py")}
    folders = {str(folder.relative_to(ROOT)) for folder in packages}
    assert len(folders) >= 12
    for folder in folders:
        assert f"| `{folder}`" in README, folder
    for path in re.findall(r"`((?:moe_jax|experiments|tests)/[\w/.]+)`", README):
        assert (ROOT / path).exists(), path


def test_the_page_of_the_experiment_names_every_command():
    for command in COMMANDS:
        assert f"python -m experiments.{command}`" in PAGES["experiment.md"].read_text(), command


def test_the_five_rows_are_those_of_the_committed_run():
    overall = read("regress_gate/default/overall.csv").set_index(["method", "protocol"])
    bootstrap = read("regress_gate/default/bootstrap.csv").set_index("comparison")
    published = load_published()["overall"]

    def row(name, trained_on, method, protocol="", comparison=None):
        difference = interval(bootstrap.loc[comparison], ("estimate", "low", "high")) if comparison else ""
        report = "" if protocol == "cross-fitted" else f"{published[method]['r2']:.4f}"
        return [name, trained_on, f"{overall.loc[(method, protocol), 'r2']:.4f}", difference, report]

    rows = [
        row("one ridge for all stars", "", "global", comparison="global - classify"),
        row("classification gate", "cells", "classify"),
        *(
            row(f"{form} regression gate", protocol, method, protocol, f"{method} - classify ({protocol})")
            for form, method, protocol in (
                ("linear", "regress_linear", "in-sample"),
                ("MLP", "regress_mlp", "in-sample"),
                ("MLP", "regress_mlp", "cross-fitted"),
            )
        ),
    ]
    header = ["method", "trained on", "R2", "Delta R2", "report R2"]
    assert table_markdown(pd.DataFrame(rows, columns=header)) in README


def test_the_answer_is_that_of_the_committed_studies():
    repeated = read("replicate/default/intervals.csv").set_index("gate")
    answer = " ".join(README.split("**The answer.**")[1].split("\n\n")[0].split())
    for gate in ("MLP, in-sample 20 %", "MLP, cross-fitted"):
        assert interval(repeated.loc[gate], ("mean", "mean_low", "mean_high")) in answer
    controls = read("control_gate/default/variants.csv").set_index("variant")
    network, mixture = (controls.loc[name] for name in ("MLP on features + expert predictions", "mixture, MLP regression gate"))
    methods = read("compare_methods/default/methods.csv").drop_duplicates("variant").set_index("variant")
    ours, theirs, best = (
        methods.loc[name]
        for name in ("nine ridges, MLP gate (the mixture)", "MLP on components", "local linear experts (the new mixture)")
    )
    assert f"R2 {theirs['r2']:.4f} where the mixture has {ours['r2']:.4f}" in answer
    assert f"has {best['r2']:.4f}, a difference of {interval(best)}" in answer
    questions = page("open_questions.md")
    assert f"They have R2 {best['r2']:.4f}, a difference of {interval(best)}" in questions
    assert f"reaches R2 {network['r2']:.4f}. The mixture with an MLP gate reaches {mixture['r2']:.4f}" in questions
    assert interval(network) in questions
    treatments = read("cover_all/default/variants.csv")
    best = treatments.loc[treatments["r2"].idxmax()]
    assert f"The best reaches R2 {best['r2_outside']:.4f} on these stars, against {best['r2_covered']:.4f}" in questions


def test_each_bullet_of_the_open_questions_has_the_numbers_of_its_table():
    bullets = [" ".join(bullet.split()) for bullet in re.split(r"^- ", PAGES["open_questions.md"].read_text(), flags=re.MULTILINE)]
    folders = sorted(folder.name for folder in (RESULTS / "compare_methods").iterdir())
    section = [text for text in bullets[1:] if "control_gate" not in text]
    for folder in folders:
        here = [text for text in section if f"compare_methods/{folder}/report.md" in text]
        if folder == "default":
            here = [text for text in section if "/report.md" not in text]
        numbers = re.findall(r"(?<![-+])0\.\d{4}", " ".join(here))
        assert len(numbers) >= 3
        tables = [read(f"compare_methods/{folder}/{name}.csv")["r2"] for name in ("methods", "floor")]
        assert set(numbers) <= {f"{r2:.4f}" for table in tables for r2 in table}, folder


def test_the_claims_are_those_of_the_findings():
    findings = (RESULTS / "FINDINGS.md").read_text()
    claims = re.findall(r"^\| (\d[ab]?\. .*?) \| .*? \| .*? \| (.*?) \| ", findings, flags=re.MULTILINE)
    assert len(claims) == 10
    for claim, verdict in claims:
        assert f"| {claim} | {verdict.replace('**', '')} |" in README


def test_the_experiment_is_the_committed_run():
    text = page("experiment.md")
    overall, bootstrap = (read(f"regress_gate/default/{name}.csv") for name in ("overall", "bootstrap"))
    assert overall_markdown(overall, load_published()) in PAGES["experiment.md"].read_text()
    differences = bootstrap.set_index("comparison")
    for form, method in (("MLP", "regress_mlp"), ("linear", "regress_linear")):
        rows = (differences.loc[f"{method} - classify ({protocol})"] for protocol in ("in-sample", "cross-fitted"))
        assert f"| {form} | " + " | ".join(interval(row, ("estimate", "low", "high")) for row in rows) + " |" in text
        assert interval(differences.loc[f"{method}: cross-fitted - in-sample"], ("estimate", "low", "high")) in text
    run = json.loads((RESULTS / "regress_gate/default/run.json").read_text())
    data = run["config"]["data"]
    assert f"`{run['command']}` simulates {data['n_train']:,} training and {data['n_test']:,} test stars" in text
    seconds, compilation = run["seconds"]["total"], run["compile_seconds"]
    took = f"took {seconds:.0f} s, of which {compilation:.0f} s were compilation, and {run['peak_memory_gib']:.1f} GiB"
    assert took in text


def test_the_ratios_are_those_of_the_committed_benchmark():
    rows = [
        {
            "row": row["row"],
            "ours": f"{row['ours_s']:.3g} s",
            "against": f"{row['peer']}, {row['peer_s']:.3g} s",
            "times faster": f"{row['ratio']:.3g} ({row['ratio_low']:.3g} to {row['ratio_high']:.3g})",
            "target": "" if pd.isna(row["target"]) else f"{row['target']:g}",
        }
        for row in pd.read_csv(RESULTS / "benchmark/default/benchmark.csv").to_dict("records")
    ]
    assert table_markdown(pd.DataFrame(rows)) in PAGES["speed.md"].read_text()


def test_the_fit_beside_rvspecfit_is_that_of_the_committed_run():
    text = page("spectra.md")
    table = pd.read_csv(RESULTS / "compare_rvspecfit/default/fits.csv").set_index(["noise_level", "method"])
    at = {noise: [table.loc[noise, method] for method in ("fit_labels", *PEERS)] for noise in (0.2, 1.0)}
    for noise, (ours, linear, splines) in at.items():
        names = f"by itself, {splines['rms_log_g']:.2f} with the grid's splines and {ours['rms_log_g']:.2f} for the fit"
        covered = "{:.0f}, {:.0f} and {:.0f} %".format(*(100 * method["coverage_log_g"] for method in (linear, splines, ours)))
        assert f"{linear['rms_log_g']:.2f} {names}; {covered} of the errors" in text
        assert f"At noise {noise:g} " in text
    (ours, linear, splines), (faint, _, faint_splines) = at.values()
    worse = [100 * method["worse"] for method in (splines, faint_splines, ours, faint)]
    assert (
        "in {:.0f} % of the stars at noise 0.2 and in {:.0f} % at noise 1. The fit's is in {:.0f} % and in {:.0f} %".format(*worse)
        in text
    )
    wrong = f"{faint['rms_velocity']:.1f} km/s for the fit, where it is {faint_splines['rms_velocity']:.1f} km/s"
    assert wrong in text
    seconds = [method["cpu_seconds"] for method in (linear, splines)] + [1000 * ours["cpu_seconds"]]
    assert "takes {:.2f} s of a star, with the splines {:.2f} s, and the fit {:.1f} ms".format(*seconds) in text


def test_the_million_is_that_of_the_committed_run():
    run, overall = json.loads((RESULTS / "regress_gate/million/run.json").read_text()), read("regress_gate/million/overall.csv")
    text = page("streaming.md")
    assert run["command"] in text
    assert f"{run['seconds']['total'] / 60:.1f} minutes and {run['peak_memory_gib']:.1f} GiB" in text
    r2 = overall.set_index(["method", "protocol"])["r2"]
    mlp, classify = r2["regress_mlp", "cross-fitted"], r2["classify", ""]
    assert f"R2 {mlp:.4f} with the cross-fitted MLP gate against {classify:.4f}" in text
    bootstrap = read("regress_gate/million/bootstrap.csv").set_index("comparison")
    assert interval(bootstrap.loc["regress_mlp - classify (cross-fitted)"], ("estimate", "low", "high")) in text


def test_uncertainties_are_those_of_the_committed_runs():
    text = page("uncertainties.md")
    coverage = pd.read_csv(RESULTS / "calibrate_uncertainty/default/coverage.csv")
    for row in coverage[coverage["by"] == "all"].to_dict("records"):
        assert f"{row['coverage']:.1%}".replace("%", " % where") in text
        assert f"{row['n']:,} test stars" in text
    at_68 = 100 * coverage[coverage["level"] == 0.68].groupby("by")["coverage"].agg(["min", "max"])
    assert "{min:.1f} to {max:.1f} % by magnitude".format(**at_68.loc["mag"]) in text
    assert "{min:.1f} to {max:.1f} % by true cell".format(**at_68.loc["cell"]) in text
    again = pd.read_csv(RESULTS / "calibrate_uncertainty/seed_1/coverage.csv")
    assert "{:.1f}, {:.1f} and {:.1f} %".format(*(100 * again[again["by"] == "all"]["coverage"])) in text
    outside = 100 * pd.read_csv(RESULTS / "calibrate_uncertainty/default/outside.csv").set_index("level")["coverage"]
    assert f"{outside[0.68]:.1f} % where they promise 68, and {outside[0.95]:.1f} % where 95" in text
    floor = pd.read_csv(RESULTS / "calibrate_uncertainty/default/floor.csv").set_index("mag").loc["all"]
    for name in ("floor", "MLP gate", "classification gate"):
        assert f"{floor[name]:.3f}" in text


def test_other_data_are_those_of_the_committed_run():
    tabular = pd.read_csv(RESULTS / "compare_tabular/default/variants.csv").set_index("variant")
    names = [name for name in tabular.index if name in ("ridge mixture, MLP gate", "HistGradientBoosting") or "stack" in name]
    assert len(names) == 3
    for name in names:
        row = tabular.loc[name]
        assert f"R2 {row['r2']:.3f} ({interval(row, form='+.3f')})" in page("any_data.md")
    assert f"A global ridge has R2 {tabular.iloc[0]['r2']:.3f}" in page("any_data.md")


def test_the_interpolation_error_is_the_committed_one():
    table = pd.read_csv(RESULTS / "interpolation/interpolation.csv")
    text = page("physics.md")
    assert len(table) == 12
    rms = table["rms"]
    assert f"by an rms of {rms.median():.1e} of the continuum (median; {rms.max():.1e} at worst)" in text
    assert f"differ by up to {table['max'].max():.3f}" in text


def test_the_findings_are_those_of_the_committed_tables():
    findings = (RESULTS / "FINDINGS.md").read_text()

    def row(experiment, variant):
        return interval(pd.read_csv(RESULTS / f"{experiment}/default/variants.csv").set_index("variant").loc[variant])

    for protocol in ("in-sample", "cross-fitted"):
        assert row("converge_gate", f"linear, {protocol}, L-BFGS, warm") in findings
    assert row("control_gate", "MLP on features + expert predictions") in findings
    repeated = pd.read_csv(RESULTS / "replicate/default/intervals.csv").set_index("gate").loc["MLP, cross-fitted"]
    assert interval(repeated, ("mean", "mean_low", "mean_high")) in findings
