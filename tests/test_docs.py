"""The tutorial runs and its notebook has the same cells, the reference is whole, and the list of experiments is complete."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import matplotlib as mpl
import nbformat
import pytest

from experiments.__main__ import COMMANDS, first_line
from experiments.__main__ import main as list_experiments

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[1]
PAGES = ROOT / ".docs/pages"


@pytest.fixture(scope="module")
def make_notebook():
    """The module of .docs/make_notebook.py."""
    spec = importlib.util.spec_from_file_location("make_notebook", ROOT / ".docs/make_notebook.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def cells(make_notebook):
    return make_notebook.read_cells(make_notebook.PAGE.read_text())


@pytest.mark.slow
def test_the_tutorial_runs(cells, tmp_path, monkeypatch, capsys):
    code = [source for kind, source in cells if kind == "code"]
    assert len(code) >= 8
    mpl.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for source in code:
        exec(compile(source, "tutorial.md", "exec"), names)
    assert "no PCA" in capsys.readouterr().out
    assert len(names["plt"].get_fignums()) >= 2
    names["plt"].close("all")
    assert names["fit"].train_loss.shape == (200,)


def test_the_tutorial_is_as_short_as_its_headings_say(cells):
    for heading, lines in (
        ("An ablation in ten lines", 12),
        ("A gate of your own in fifteen", 15),
        ("your own numbers in five", 5),
    ):
        number = next(i for i, (_, source) in enumerate(cells) if f"{heading}\n" in source)
        assert len([line for line in cells[number + 1][1].splitlines() if line.strip()]) <= lines, heading


def test_the_notebook_is_made_from_the_page(make_notebook, cells):
    notebook = nbformat.read(make_notebook.NOTEBOOK, as_version=4)
    nbformat.validate(notebook)
    assert [(cell.cell_type, cell.source) for cell in notebook.cells] == cells, "run: python .docs/make_notebook.py"
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 2
    assert {output.output_type for output in outputs} == {"display_data", "stream"}
    links = [link for kind, source in cells if kind == "markdown" for link in re.findall(r"\]\(([^)#\s]+)\)", source)]
    assert links
    for link in links:
        assert (make_notebook.NOTEBOOK.parent / link).exists(), link


def test_the_reference_is_built_without_a_network(tmp_path):
    """With every proxy pointing nowhere: whatever the build would fetch, it could not."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / ".docs/mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere)
    assert done.returncode == 0, done.stderr[-3000:]
    assert {path.relative_to(tmp_path).with_suffix(".md") for path in tmp_path.rglob("*.html")} - {Path("404.md")} == {
        path.relative_to(PAGES) for path in PAGES.rglob("*.md")
    }
    pages = {path.stem: path.read_text() for path in tmp_path.glob("api/*.html")}
    modules = [path.relative_to(ROOT).with_suffix("") for path in (ROOT / "moe_jax").rglob("*.py") if path.stem != "__init__"]
    assert len(modules) >= 30
    for module in modules:
        folder = module.parts[1] if len(module.parts) > 2 else "mixture"
        assert f'id="{".".join(module.parts)}"' in pages[folder], module
    assert "fit_ridge" in pages["experts"]
    assert not re.findall(r"(?:src|href)=\"https?://(?:fonts|unpkg|cdn)", "".join(pages.values()))


def test_the_list_of_experiments():
    done = subprocess.run([sys.executable, "-m", "experiments"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    commands = {path.stem for path in (ROOT / "experiments").glob("*.py")} - {"__init__", "__main__"}
    calling = {path for path in (ROOT / "experiments").rglob("*.py") if re.search(r"(?<!def )run_command\(", path.read_text())}
    assert len(commands) >= 15
    assert set(COMMANDS) == commands == {path.stem for path in calling}
    for name in COMMANDS:
        assert name in done.stdout
        assert 20 < len(first_line(name)) < 160, name


def test_a_word_after_the_list_names_the_way(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["experiments", "predict", "model"])
    with pytest.raises(SystemExit, match="found 'predict', expected nothing: run python -m experiments.predict"):
        list_experiments()


def test_help_teaches():
    """--help of an experiment begins with what it does and how to call it, and says what each option is."""
    done = subprocess.run([sys.executable, "-m", "experiments.predict", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "python -m experiments.predict" in done.stdout
    assert first_line("predict").split(".")[0][:30] in done.stdout
