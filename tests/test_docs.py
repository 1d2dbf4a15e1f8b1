"""The tutorial runs as it stands, the reference is built without a network, and the list of experiments is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

from experiments.__main__ import COMMANDS, first_line

ROOT = Path(__file__).parents[1]


def test_the_tutorial_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / ".docs/pages/tutorial.md").read_text(), flags=re.DOTALL)
    assert len(blocks) >= 6
    (tmp_path / "results").symlink_to(ROOT / "results")
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    for block in blocks:
        exec(compile(block, "tutorial.md", "exec"), names)
    printed = capsys.readouterr().out
    assert "no PCA" in printed
    # What the tutorial promises of a line count.
    code = [[line for line in block.splitlines() if line.strip()] for block in blocks]
    assert len(code[1]) <= 12
    assert len(code[2]) <= 15
    assert len(code[3]) <= 5
    assert names["fit"].train_loss.shape == (200,)


def test_the_reference_is_built_without_a_network(tmp_path):
    """With every proxy pointing nowhere: whatever the build would fetch, it could not."""
    nowhere = dict.fromkeys(("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY"), "http://127.0.0.1:9")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(ROOT / ".docs/mkdocs.yml"), "-d", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | nowhere)
    assert done.returncode == 0, done.stderr[-3000:]
    pages = {path.stem: path.read_text() for path in tmp_path.glob("api/*.html")}
    everything = "".join(pages.values())
    for path in (ROOT / "moe_jax").glob("*.py"):
        if path.stem != "__init__":
            assert f'id="moe_jax.{path.stem}"' in everything, path.stem
    assert "fit_ridge" in pages["mixture"]
    assert not re.findall(r"(?:src|href)=\"https?://(?:fonts|unpkg|cdn)", everything)


def test_the_list_of_experiments():
    done = subprocess.run([sys.executable, "-m", "experiments"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    listed = {path.stem for path in (ROOT / "experiments").glob("*.py") if "run_command(" in path.read_text()} - {"command_line"}
    assert set(COMMANDS) == listed
    for name in COMMANDS:
        assert name in done.stdout
        assert 20 < len(first_line(name)) < 160, name


def test_help_teaches():
    """--help of an experiment begins with what it does and how to call it, and says what each option is."""
    done = subprocess.run([sys.executable, "-m", "experiments.predict", "--help"], capture_output=True, text=True)
    assert done.returncode == 0
    assert "python -m experiments.predict" in done.stdout
    assert first_line("predict").split(".")[0][:30] in done.stdout
