"""The notebooks of examples/, executed from the first cell to the last as a user would: a kernel, a real search, pictures as output."""

from __future__ import annotations

import os
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(1500)]

EXAMPLES = Path(__file__).parents[2] / "examples"
ROOT = EXAMPLES.parent


def executed(name: str, folder: Path, monkeypatch) -> list[str]:
    """Texts of all outputs, one a cell; the kernel works in `folder`."""
    for variable in [one for one in os.environ if one.startswith(("RAY_", "MLFLOW_"))]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")]))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    book = nbformat.read(EXAMPLES / name, as_version=4)
    assert all(not cell.get("outputs") for cell in book.cells), "notebooks are kept without outputs"
    for cell in book.cells:  # the same search, shorter
        cell.source = cell.source.replace('"search.trials=2",', '"search.trials=2", "training.max_steps=5", "ray.lanes=1",')
    NotebookClient(book, timeout=1200, resources={"metadata": {"path": str(folder)}}).execute()
    cells = [cell for cell in book.cells if cell.cell_type == "code"]
    return ["\n".join(_texts(output) for output in cell.outputs) for cell in cells]


def _texts(output) -> str:
    data = output.get("data", {})
    return "\n".join([output.get("text", ""), str(data.get("text/plain", "")), *(kind for kind in data)])


def test_the_laptop_notebook_runs_from_end_to_end(tmp_path, monkeypatch):
    _, ran, shown, picture, chosen, more = executed("laptop.ipynb", tmp_path, monkeypatch)
    assert "untouched model" in ran and "t0001" in ran and "report:" in ran, "progress is shown"
    assert "image/png" in picture and "task score" in chosen and "t0002" in shown
    assert int(re.search(r"^(\d+) trials; \w+", more, re.MULTILINE)[1]) >= 3
    assert (tmp_path / "outputs" / "notebook" / "report.html").is_file()


def test_the_cluster_notebook_runs_from_end_to_end(tmp_path, monkeypatch):
    _, ran, shown, picture, more = executed("ray_cluster.ipynb", tmp_path, monkeypatch)
    assert "lane 0 is up" in ran and "t0002" in shown and "image/png" in picture and more.strip()
    assert len(list((tmp_path / "outputs" / "notebook-cluster" / "trials").glob("t*/result.json"))) >= 3
