"""The notebook runs from first to last, and so does the code in the answers of its exercises."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

NOTEBOOK = Path(__file__).parents[2] / "experiments/walkthrough/walkthrough.ipynb"
STATIONS = 14
LARGEST = 3_000_000  # bytes, with the stored outputs


@pytest.fixture
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def join_text(notebook):
    return "\n\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def list_answers(notebook):
    """Code of each hidden answer, in order."""
    hidden = re.findall(r"<details>.*?</details>", join_text(notebook), re.DOTALL)
    return [code for text in hidden for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL)]


def find_errors(cells):
    outputs = [output for cell in cells for output in cell.get("outputs", ())]
    return [output.evalue for output in outputs if output.output_type == "error"]


def check_stations(cells):
    """Check that each station but the exercises has a figure and printed text."""
    sections = re.split(r"^## Station \d+", "\n".join(describe(cells)), flags=re.MULTILINE)
    assert len(sections) == STATIONS + 1
    for number, section in enumerate(sections[1:-1], start=1):
        assert "<figure>" in section, f"station {number} has no figure"
        assert "<text>" in section, f"station {number} prints nothing"


def describe(cells):
    """Text of each cell, with a mark for each figure and each printed text."""
    for cell in cells:
        yield cell.source if cell.cell_type == "markdown" else ""
        for output in cell.get("outputs", ()):
            yield "<text>" if output.output_type == "stream" else ""
            yield "<figure>" if "image/png" in output.get("data", {}) else ""


def test_each_station_is_there_once_and_in_order(notebook):
    found = re.findall(r"^## Station (\d+): \w", join_text(notebook), re.MULTILINE)
    assert [int(number) for number in found] == list(range(1, STATIONS + 1))


def test_each_exercise_has_a_hidden_answer_with_code(notebook):
    exercises = re.findall(r"^\*\*\d+\.\*\* ", join_text(notebook), re.MULTILINE)
    assert len(list_answers(notebook)) == len(exercises) > 0


def test_its_outputs_are_stored_without_errors(notebook):
    check_stations(notebook.cells)
    assert not find_errors(notebook.cells)
    assert NOTEBOOK.stat().st_size < LARGEST


def test_its_stored_outputs_come_from_the_command_in_its_source(notebook):
    (cell,) = [cell for cell in notebook.cells if "options = [" in cell.source]
    options = re.findall(r'^    "(.*)",$', cell.source, re.MULTILINE)
    printed = cell.outputs[0].text.splitlines()[0].split()
    assert printed == ["vqvae-pipeline", *options, "hydra.run.dir=walkthrough_run"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # warnings of Jupyter
@pytest.mark.usefixtures("cold")
def test_the_notebook_and_its_answers_run(notebook, tmp_path):
    own = len(notebook.cells)
    notebook.cells += [nbformat.v4.new_code_cell(code) for code in list_answers(notebook)]
    place = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=3600, kernel_name="python3", resources=place).execute()
    assert not find_errors(notebook.cells)
    check_stations(notebook.cells[:own])
