"""The notebooks run from top to bottom, and say again what they were committed with."""

import copy
import os
import re
from pathlib import Path
from typing import Any

import pytest

nbformat = pytest.importorskip("nbformat")
nbclient = pytest.importorskip("nbclient")
pytest.importorskip("ipykernel")

FOLDER = Path(__file__).parents[1] / "examples" / "notebooks"
NAMES = sorted(path.stem for path in FOLDER.glob("*.ipynb"))


def code_cells(notebook: Any) -> list[Any]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def kinds(cell: Any) -> set[str]:
    """What a cell shows: text, pictures, errors."""
    return {kind for out in cell.outputs for kind in out.get("data", [out.get("name", out.output_type)])}


def said(notebook: Any) -> str:
    return "".join(output.get("text", "") for cell in code_cells(notebook) for output in cell.outputs)


def run(committed: Any, folder: Path) -> Any:
    """The notebook after it has run, in a new kernel."""
    notebook = copy.deepcopy(committed)
    for cell in code_cells(notebook):
        cell.outputs, cell.execution_count = [], None
    environment = os.environ | {"MPLBACKEND": "module://matplotlib_inline.backend_inline"}
    resources = {"metadata": {"path": str(folder)}}
    nbclient.NotebookClient(notebook, timeout=300, resources=resources).execute(env=environment)
    return notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_says_again_what_was_committed(name: str, tmp_path: Path) -> None:
    committed = nbformat.read(FOLDER / f"{name}.ipynb", nbformat.NO_CONVERT)
    ran = run(committed, tmp_path)
    nbformat.validate(committed)
    assert [cell.execution_count for cell in code_cells(committed)] == list(range(1, len(code_cells(committed)) + 1))
    for before, after in zip(code_cells(committed), code_cells(ran), strict=True):
        assert kinds(after) == kinds(before), after.source
        assert kinds(after) <= {"stdout", "image/png", "text/plain"}, after.outputs
    assert any("image/png" in kinds(cell) for cell in code_cells(ran))
    assert (FOLDER / f"{name}.ipynb").stat().st_size < 200_000
    CHECKS[name](said(ran))


def check_first_steps(printed: str) -> None:
    results = {
        name: (float(accuracy), int(state))
        for name, accuracy, state in re.findall(r"^(.+?) +(\S+) % test accuracy, +(\d+) bytes", printed, re.MULTILINE)
    }
    assert list(results) == ["AdamW", "SignSGD", "SignSGD, 8-bit momentum"]
    assert all(accuracy > 93 for accuracy, _ in results.values())
    assert results["AdamW"][1] == 2 * results["SignSGD"][1] > 7 * results["SignSGD, 8-bit momentum"][1]
    assert "phase 'sgd', 9" in printed
    assert "without the monitor ends at the same accuracy: True" in printed
    assert "the same bits: True" in printed


def check_what_dither_does(printed: str) -> None:
    (difference,) = re.findall(r"largest difference from the law: (\S+)", printed)
    assert float(difference) < 0.02
    (clean,) = (float(each) for each in re.findall(r"no dither (\S+) %", printed))
    relative = {
        float(s): float(a) for s, a in re.findall(r"([\d.]+): (\S+) %", printed.split("relative")[1].split("\n")[0])
    }
    assert max(abs(relative[s] - clean) for s in (0.25, 0.5, 1)) < 2
    assert relative[64] < relative[8] < clean - 3
    papers = [float(a) for a in re.findall(r": (\S+) %", printed.split("the paper's α")[1])]
    assert papers[0] < papers[1] < papers[2] < clean - 2


CHECKS = {"first_steps": check_first_steps, "what_dither_does": check_what_dither_does}
