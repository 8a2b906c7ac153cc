"""Every notebook runs from top to bottom, and is what its text twin says."""

from pathlib import Path

import pytest

pytest.importorskip("ipykernel")
pytest.importorskip("jupytext")
pytest.importorskip("nbclient")
import jupytext
import nbformat
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[1] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def cells(notebook: nbformat.NotebookNode) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


def test_the_notebooks_are_found() -> None:
    assert [path.stem for path in NOTEBOOKS] == [
        "01_quickstart",
        "02_finetune_with_optax",
        "03_port_your_weights",
        "04_two_paths",
        "05_explain",
        "06_change_the_block",
        "07_dense_prediction",
        "08_scaling",
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_text_and_notebook_agree(path: Path) -> None:
    assert cells(jupytext.read(path)) == cells(jupytext.read(path.with_suffix(".py")))


@pytest.mark.slow
@pytest.mark.notebook
@pytest.mark.optimized
@pytest.mark.filterwarnings("ignore")  # of the Jupyter machinery; the notebook runs in a process of its own
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
@pytest.mark.usefixtures("timm_models")  # they start from timm's weights
def test_notebook_runs(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("sklearn")
    monkeypatch.setenv("PYTHONPATH", str(FOLDER.parent))
    notebook = jupytext.read(path)
    NotebookClient(notebook, timeout=900, kernel_name="python3", resources={"metadata": {"path": FOLDER}}).execute()
    figures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert len(figures) >= 2
