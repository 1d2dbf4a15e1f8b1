"""Makes the tutorial as a notebook, with its outputs and plots, from the tutorial's page.

python .docs/make_notebook.py        runs every block of .docs/pages/tutorial.md; writes .docs/tutorial.ipynb; about a minute

The page is the only source: each of its python blocks becomes a code cell, the text between two blocks a Markdown cell.
Needs the extra ``docs``.
"""

from __future__ import annotations

import re
from pathlib import Path

import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
PAGE, NOTEBOOK = HERE / "pages" / "tutorial.md", HERE / "tutorial.ipynb"
BLOCK = re.compile(r"^```python\n(.*?)\n```$", flags=re.DOTALL | re.MULTILINE)


def read_cells(page: str) -> list[tuple[str, str]]:
    """("markdown" or "code", source) of each cell of a page.

    Links of the page are relative to the folder ``pages``; in the cells they are relative to the notebook, one folder above.
    """
    parts = BLOCK.split(page)  # text, code, text, code, ..., text
    cells = [("code" if number % 2 else "markdown", part.strip("\n")) for number, part in enumerate(parts)]
    return [(kind, _move_links(source) if kind == "markdown" else source) for kind, source in cells if source]


def _move_links(text: str) -> str:
    text = re.sub(r"\]\((?!\w+:|#|\.\./)", "](pages/", text)
    return text.replace("](../", "](")


def make_notebook(cells: list[tuple[str, str]]) -> nbformat.NotebookNode:
    """A notebook without outputs; cells are numbered, so that the same page makes the same file."""
    make = {"markdown": nbformat.v4.new_markdown_cell, "code": nbformat.v4.new_code_cell}
    notebook = nbformat.v4.new_notebook(
        cells=[make[kind](source, id=f"cell-{number}") for number, (kind, source) in enumerate(cells)]
    )
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    return notebook


def main() -> None:
    """Runs the page's blocks and writes the notebook."""
    notebook = make_notebook(read_cells(PAGE.read_text()))
    options = {"timeout": 600, "record_timing": False, "coalesce_streams": True, "resources": {"metadata": {"path": str(HERE)}}}
    NotebookClient(notebook, **options).execute()
    notebook.metadata.pop("language_info", None)  # the version of Python that ran it
    for cell in notebook.cells:
        if cell.cell_type == "code":  # warnings of the machine that ran it are no part of the tutorial
            cell.outputs = [output for output in cell.outputs if output.get("name") != "stderr"]
    nbformat.write(notebook, NOTEBOOK)
    print(f"written: {NOTEBOOK}")


if __name__ == "__main__":
    main()
