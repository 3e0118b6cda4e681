"""The notebook runs as it stands; its committed outputs are small and name no machine."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="needs the extra test")
nbclient = pytest.importorskip("nbclient", reason="needs the extra test")
pytest.importorskip("ipykernel", reason="needs the extra test")

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "quickstart.ipynb"
MAX_BYTES = 100_000


def kinds(notebook):
    """What each code cell put out: streams, values, pictures."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [[sorted(out.get("data", {"text": 0})) for out in cell.outputs] for cell in cells]


def test_the_notebook_runs_and_puts_out_what_is_committed(tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    committed = kinds(notebook)
    client = nbclient.NotebookClient(
        notebook,
        timeout=600,
        kernel_name="python3",
        resources={"metadata": {"path": str(tmp_path)}},
    )
    client.execute()
    assert kinds(notebook) == committed
    shown = [out["data"]["text/plain"] for cell in notebook.cells if cell.cell_type == "code"
             for out in cell.outputs if out.output_type == "execute_result"]  # fmt: skip
    assert int(shown[1]) > 50 and shown[2] == "True"
    assert not list(tmp_path.iterdir())


def test_committed_outputs_are_there_and_small():
    text = NOTEBOOK.read_text()
    notebook = nbformat.reads(text, as_version=4)
    nbformat.validate(notebook)
    assert len(text.encode()) < MAX_BYTES
    assert sum("image/png" in kind for cell in kinds(notebook) for kind in cell) == 1
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert all(cell.outputs for cell in cells)
    assert not any(word in text for word in ("/home/", "/work/", "/tmp/", "Warning"))
