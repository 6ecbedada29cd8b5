"""The notebook of the examples runs from its first cell to its last on the shipped model."""

from __future__ import annotations

from pathlib import Path

import nbformat
from nbclient import NotebookClient

EXAMPLES = Path(__file__).parents[1] / "examples"


def test_the_notebook_runs_and_ends_in_llama_cpp():
    book = nbformat.read(EXAMPLES / "teach.ipynb", as_version=4)
    NotebookClient(book, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(EXAMPLES)}}).execute()
    said = [output.get("text", "") for cell in book.cells for output in cell.get("outputs", [])]
    assert "with the adapter:" in said[-1] and "<SOLUTION>" in said[-1]
