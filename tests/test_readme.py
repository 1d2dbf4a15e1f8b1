"""README's Python examples run as they stand, and its figures are those of the committed results."""

import re
from pathlib import Path

import pandas as pd
import pytest

from moe_jax.report import load_published, overall_markdown

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
EXAMPLES = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_there_are_examples():
    assert len(EXAMPLES) >= 4


@pytest.mark.parametrize("example", EXAMPLES, ids=[example.split("\n")[0] for example in EXAMPLES])
def test_examples_run(example, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    exec(compile(example, "README.md", "exec"), {})


def test_the_table_is_that_of_the_committed_run():
    overall = pd.read_csv(ROOT / "results/regress_gate/default/overall.csv", keep_default_na=False)
    assert overall_markdown(overall, load_published()) in README


def test_the_map_names_every_module():
    for path in [*ROOT.glob("moe_jax/*.py"), *ROOT.glob("experiments/*.py")]:
        if path.name != "__init__.py":
            assert f"`{path.stem}`" in README, path.name
