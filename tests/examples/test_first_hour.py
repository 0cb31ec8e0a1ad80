"""The notebook of the first hour runs from its first cell to its last."""

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.tiny_pairs import REPO

NOTEBOOK = REPO / "examples" / "first_hour.ipynb"


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path) -> None:
    (tmp_path / "examples").symlink_to(REPO / "examples")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    # It raises at the first cell that does; the cells themselves hold the record against the metrics.
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    steps = next(cell for cell in notebook.cells if "examples.tiny algorithm" in cell.source)
    *lines, result = [output.get("text") or output["data"]["text/plain"] for output in steps.outputs]
    assert "".join(lines).count("distill/reverse_kl") == len(eval(result)) == 6
    assert (tmp_path / "outputs/tiny/run/view.html").is_file()
