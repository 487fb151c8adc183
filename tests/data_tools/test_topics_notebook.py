"""data_tools/notebooks/neurips_topics.ipynb runs from its first cell to its last."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOK = ROOT / "data_tools" / "notebooks" / "neurips_topics.ipynb"
PAPERS = ROOT.parent / "shared" / "data" / "neurips-2022" / "papers.csv"


def test_the_notebook_runs(tmp_path, monkeypatch):
    nbformat = pytest.importorskip("nbformat", reason='pip install -e ".[tests]"')
    nbclient = pytest.importorskip("nbclient", reason='pip install -e ".[tests]"')
    pytest.importorskip("ipykernel", reason='pip install -e ".[tests]"')
    if not PAPERS.is_file():
        pytest.skip(f"{PAPERS} is not there")
    monkeypatch.setenv("NEURIPS_PAPERS", str(PAPERS))
    monkeypatch.setenv("NEURIPS_LIMIT", "200")
    monkeypatch.setenv("NEURIPS_OUT", str(tmp_path))
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    assert not any(cell.get("outputs") for cell in notebook.cells)  # the papers are not the project's to publish
    client = nbclient.NotebookClient(notebook, timeout=300, kernel_name="python3",
                                     resources={"metadata": {"path": str(tmp_path)}})  # fmt: skip
    client.execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert sum("image/png" in output.get("data", {}) for output in outputs) == 2
    tables = [output["data"]["text/markdown"] for output in outputs if "text/markdown" in output.get("data", {})]
    assert len(tables) == 2 and all(len(table.splitlines()) == 12 for table in tables)
    said = "".join(output.get("text", "") for output in outputs)
    assert "topics have the highest c_npmi" in said and said.rstrip().endswith("%")
    assert (tmp_path / "gensim/topics.html").is_file() and (tmp_path / "numbers/num_topics.csv").is_file()
