"""What executed notebooks show, against the recorded ones: by nbval's own comparator, and no kernel starts.

nbval itself executes each notebook that it compares. `make run` has executed them already: the outputs of every cell
tagged `nbval-check-output` are read from the executed notebook, cleaned as recording cleans them (no stderr, no
widgets, no path of this machine), passed through `tests/nbval_sanitize.cfg`, and handed to nbval's comparison. Where an
output has a plain text, that is compared and its HTML is not, which may show measured numbers beside it. A notebook's
code must be the recorded one, but for the choices that papermill puts in.
"""

import copy
import difflib
import functools
import importlib.util
import os
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from helpers.base import ROOT, InputError

SANITIZER = ROOT / "tests" / "nbval_sanitize.cfg"
# nbval passes over the first row too; the second has what only a live kernel can show, and pictures.
IGNORED = ("metadata", "traceback", "prompt_number", "output_type", "name", "execution_count")
IGNORED += ("application/vnd.jupyter.widget-view+json", "image/png", "image/jpeg")


@dataclass(frozen=True)
class Shown:
    """What the comparison of one chapter found."""

    compared: int = 0  # tagged cells
    stopped: str = ""  # or why the executed notebook is no whole run of the recorded code; then no cell is compared
    differences: tuple[tuple[str, str], ...] = ()  # (which cell, how it differs) each


def compare_notebook(executed: Path, recorded: Path, *, code_only: bool = False) -> Shown:
    """Compare an executed notebook with a recorded one; `code_only`: whether its code ran to the end, and no output."""
    if not executed.is_file():
        return Shown(stopped="not executed: run `make run` first, and see where it stopped")
    ours, theirs = read_code_cells(recorded), read_code_cells(executed)
    if stopped := _why_not_whole(ours, theirs):
        return Shown(stopped=stopped)
    compared, differences = 0, []
    for number, (our, their) in enumerate(zip(ours, theirs, strict=True), 1):
        if "nbval-check-output" in our.metadata.get("tags", []) and not code_only:
            compared += 1
            if how := _difference(our, their):
                differences.append((f"code cell {number}, `{our.source.splitlines()[-1]}`", how))
    return Shown(compared, "", tuple(differences))


def read_code_cells(notebook: Path) -> list[Any]:
    """The code cells, without what papermill put in; InputError where the file is no notebook, or half of one."""
    import nbformat

    try:
        cells = nbformat.read(notebook, as_version=4).cells
    except (ValueError, AttributeError):
        raise half_written(notebook) from None
    code = [cell for cell in cells if cell.cell_type == "code"]
    return [cell for cell in code if "injected-parameters" not in cell.metadata.get("tags", [])]


def half_written(path: Path) -> InputError:
    fix = "run the series again"
    return InputError(str(path), found="no JSON, or half of it", expected="what a whole run wrote", fix=fix)


def _why_not_whole(ours: list[Any], theirs: list[Any]) -> str:
    """Why an executed notebook is no whole run of the recorded code; "" where it is one."""
    for number, cell in enumerate(theirs, 1):
        for output in cell.outputs:
            if output.output_type == "error":
                return f"code cell {number}: {output.ename}: {output.evalue}"
        if cell.execution_count is None:
            return f"code cell {number}: not executed, the run ended before it"
    known = {(cell.id, cell.source) for cell in theirs}
    if [(cell.id, cell.source) for cell in ours] == [(cell.id, cell.source) for cell in theirs]:
        return ""
    other = next((cell.source for cell in ours if (cell.id, cell.source) not in known), "(it has more cells)")
    return f"another notebook was executed than the recorded one, run `make run` again. The first difference:\n{other}"


def _difference(recorded: Any, executed: Any) -> str:
    """How the outputs of a cell differ; "" where they do not."""
    if recorded.execution_count is None or not recorded.outputs:
        return "nothing is recorded to compare with"
    comparator = object.__new__(_comparator())
    if comparator.compare_outputs(_prepared(executed.outputs), _prepared(recorded.outputs)):
        return ""
    return "\n".join(["the output differs", *comparator.comparison_traceback]).strip()


@functools.cache
def _comparator() -> type:
    """nbval's comparison alone: a cell with what it asks of the pytest item and the file around it, and no more."""
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else nbval's import prints four lines about it
    from nbval.plugin import IPyNbCell, get_sanitize_patterns, nocolors

    patterns = dict(get_sanitize_patterns(SANITIZER.read_text(encoding="utf-8")))
    parent = SimpleNamespace(skip_compare=IGNORED, sanitize_patterns=patterns)
    ihook = SimpleNamespace(pytest_assertrepr_compare=lambda config, op, left, right: [_line_by_line(left, right)])
    return type("Comparator", (IPyNbCell,), dict(parent=parent, ihook=ihook, colors=nocolors, config=None))


def _prepared(outputs: list[Any]) -> list[Any]:
    from nbval.plugin import coalesce_streams

    outputs = coalesce_streams(_read_build().clean(copy.deepcopy(outputs)))
    for data in (output.get("data", {}) for output in outputs):
        if not data.get("text/plain", "<").startswith("<"):  # as in "<IPython.core.display.HTML object>"
            data.pop("text/html", None)
    return outputs


def _line_by_line(recorded: Any, executed: Any) -> list[str]:
    texts = str(recorded).splitlines(), str(executed).splitlines()
    return list(difflib.unified_diff(*texts, "recorded", "executed", lineterm=""))


@functools.cache
def _read_build() -> Any:
    """`notebooks/build.py`, which knows how recorded outputs are cleaned (`notebooks` is no package)."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
