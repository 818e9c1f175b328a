"""The committed notebooks, read as a learner and a maintainer would: whole, short, executed, and up to date."""

import copy
import re
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402

TAGS = {"parameters", "nbval-check-output", "handoff"}
MACHINE_PATH = re.compile(r"/(?:root|home|Users|tmp|work|content)/\w")
SECRET = re.compile(r"\b(?:hf_[A-Za-z0-9]{8,}|sk-[A-Za-z0-9]{8,})")


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell):
    """All that a cell shows, as text."""
    parts = []
    for output in cell.outputs:
        parts += [output.get("text", ""), "\n".join(output.get("traceback", []))]
        parts += [str(value) for kind, value in output.get("data", {}).items() if kind.startswith("text/")]
    return "\n".join(parts)


def problems_of(notebook, name):
    """Everything that is wrong with one chapter, a line each."""
    found = []
    nbformat.validate(notebook)
    cells, prose = code_cells(notebook), [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = [line for text in prose for line in text.splitlines() if line.startswith("# ")]
    if len(headings) != 1 or not prose[0].startswith("# "):
        found.append("one H1, at the top")
    badge = f"https://colab.research.google.com/github/{build.repository()}/blob/main/notebooks/{name}"
    if badge not in prose[0]:
        found.append(f"badge to {badge}")
    if len(cells) > 25:
        found.append(f"{len(cells)} code cells, more than 25")
    if [cell.source for cell in cells if "parameters" in cell.metadata.get("tags", [])] != [cells[1].source]:
        found.append("the second code cell, and only it, sets the parameters")
    if cells[0].source.strip() != (ROOT / "notebooks/src/setup_cell.py").read_text(encoding="utf-8").strip():
        found.append("the first code cell is the setup cell")
    if set(notebook.metadata) - set(build.METADATA):
        found.append(f"metadata: {set(notebook.metadata) - set(build.METADATA)}")
    if notebook.cells[-1].cell_type != "markdown" or "On your own" not in prose[-1]:
        found.append("the last cell says what to try on your own")
    for link in re.findall(r"\]\(([^)h][^)]*)\)", "\n".join(prose)):
        if not (build.NOTEBOOKS / link).exists():
            found.append(f"link to {link}")
    for cell in cells:
        first = cell.source.splitlines()[0]
        if set(cell.metadata) - set(build.CELL_METADATA) or set(cell.metadata.get("tags", [])) - TAGS:
            found.append(f"metadata of `{first}`")
        if len(cell.source.splitlines()) > 15:
            found.append(f"{len(cell.source.splitlines())} lines in `{first}`")
        if max(map(len, cell.source.splitlines())) > 115:
            found.append(f"a line of over 115 characters in `{first}`")
        if re.search(r"if (False|0)\b|%%capture", cell.source):
            found.append(f"dead or hidden code in `{first}`")
        if "nbval-check-output" in cell.metadata.get("tags", []) and not cell.outputs:
            found.append(f"nothing recorded to compare with in `{first}`")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"an error in `{first}`")
        if any("widget" in kind for output in cell.outputs for kind in output.get("data", {})):
            found.append(f"a widget view in `{first}`")
        for what, pattern in (("a path of somebody's machine", MACHINE_PATH), ("a secret", SECRET)):
            if match := pattern.search(printed(cell)):
                found.append(f"{what}, {match.group()!r}, in the output of `{first}`")
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("outputs that are not recorded from one run, top to bottom: run `make record`")
    if not re.search(r"^Result: .", printed(cells[-1]), re.MULTILINE):
        found.append("no `Result: …` in the last code cell")
    return found


CHAPTERS = [path for _, _, path in build.targets()]


@pytest.fixture(scope="module")
def good():
    return build.read_notebook(build.NOTEBOOKS / "03_data.ipynb")


@pytest.mark.parametrize("path", CHAPTERS, ids=lambda path: str(path.relative_to(build.NOTEBOOKS)))
def test_chapter(path):
    assert problems_of(build.read_notebook(path), path.name) == []


def test_all_six_chapters_are_there():
    from helpers.series import CHAPTERS as NAMES

    assert tuple(path.stem for path in CHAPTERS if path.parent == build.NOTEBOOKS) == NAMES


def test_built_notebooks_are_up_to_date():
    done = subprocess.run([sys.executable, "notebooks/build.py", "--check"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def first_with_output(notebook):
    return next(cell for cell in code_cells(notebook) if cell.outputs)


def checked(notebook):
    return next(cell for cell in code_cells(notebook) if "nbval-check-output" in cell.metadata.get("tags", []))


FAULTS = {
    "one H1": lambda n: n.cells.append(nbformat.v4.new_markdown_cell("# Another title")),
    "badge": lambda n: n.cells[0].update(source=n.cells[0].source.replace("/03_data", "/04_train")),
    "more than 25": lambda n: n.cells.extend(copy.deepcopy(code_cells(n)) * 2),
    "sets the parameters": lambda n: code_cells(n)[1].metadata.pop("tags"),
    "the setup cell": lambda n: code_cells(n)[0].update(source="import helpers"),
    "metadata:": lambda n: n.metadata.update(widgets={}),
    "on your own": lambda n: n.cells.pop(),
    "link to": lambda n: n.cells[0].update(source=n.cells[0].source + "\n[next](07_more.ipynb)"),
    "metadata of": lambda n: code_cells(n)[2].metadata.update(scrolled=True),
    "lines in": lambda n: code_cells(n)[2].update(source="x = 1\n" * 16),
    "over 115": lambda n: code_cells(n)[2].update(source="x = '" + "y" * 120 + "'"),
    "dead or hidden": lambda n: code_cells(n)[2].update(source="if False:\n    save()"),
    "nothing recorded": lambda n: checked(n).update(outputs=[]),
    "an error in": lambda n: checked(n).outputs.append(
        nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])
    ),
    "a widget view": lambda n: checked(n).outputs.append(
        nbformat.v4.new_output("display_data", data={"application/vnd.jupyter.widget-view+json": {}})
    ),
    "a path of": lambda n: checked(n).outputs.append(nbformat.v4.new_output("stream", text="in /home/me/x")),
    "a secret": lambda n: checked(n).outputs.append(nbformat.v4.new_output("stream", text="hf_" + "a" * 20)),
    "one run": lambda n: code_cells(n)[3].update(execution_count=99),
    "no `Result": lambda n: code_cells(n)[-1].update(outputs=[]),
}


@pytest.mark.parametrize("said", FAULTS)
def test_the_lint_finds(said, good):
    notebook = copy.deepcopy(good)
    FAULTS[said](notebook)
    assert any(said.lower() in problem.lower() for problem in problems_of(notebook, "03_data.ipynb"))
