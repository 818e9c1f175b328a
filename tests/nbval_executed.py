"""A pytest plugin: notebooks that were executed before against the committed ones, by nbval's own comparator.

    PYTHONPATH=tests python -m pytest -p nbval_executed notebooks/*.ipynb --executed-in runs/cpu/executed \
        --nbval-sanitize-with tests/nbval_sanitize.cfg

nbval itself executes each notebook that it compares. `make run` has executed them already, so here no kernel starts:
the outputs of every cell tagged `nbval-check-output` are read from the executed notebook of the same name, cleaned as
recording cleans them (no stderr, no widgets, no path of this machine), and handed to nbval's comparison. Where an
output has a plain text, that is compared and its HTML is not, which may show measured numbers beside it. Cells are
matched by id, and a notebook's code must be the committed one, but for the parameters that papermill puts in.
"""

import copy
import functools
import importlib.util
import sys
from collections import defaultdict
from pathlib import Path

# Two slow imports that are of no use here: with the first jsonschema checks international addresses, which no notebook
# has, with the second ipykernel offers its kernels to a debugger. None makes an import fail, which both allow for.
sys.modules.setdefault("rfc3987_syntax", None)
sys.modules.setdefault("ipykernel.debugger", None)

import nbformat  # noqa: E402
import pytest  # noqa: E402
from nbval.plugin import (  # noqa: E402
    IPyNbCell,
    IPyNbFile,
    NbCellError,
    coalesce_streams,
    find_comment_markers,
    find_metadata_tags,
)

ROOT = Path(__file__).resolve().parent.parent


def pytest_addoption(parser):
    parser.addoption("--executed-in", type=Path, metavar="DIR", help="compare notebooks with those executed in DIR")


def pytest_collect_file(file_path, parent):
    if parent.config.option.executed_in is not None and file_path.suffix == ".ipynb":
        return ExecutedNotebook.from_parent(parent, path=file_path)
    return None


def pytest_itemcollected(item):
    """nbval's own cells, which it executes, are cleaned too: `datasets` shows progress only where nothing is cached."""
    if isinstance(item, IPyNbCell) and not isinstance(item, ExecutedCell):
        compare, clean = item.compare_outputs, read_build().clean
        item.compare_outputs = lambda test, ref: compare(clean(test), clean(ref))


@functools.cache
def read_build():
    """`notebooks/build.py`, which knows how recorded outputs are cleaned (`notebooks` is no package)."""
    spec = importlib.util.spec_from_file_location("build", ROOT / "notebooks" / "build.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def code_cells(notebook):
    """The code cells, without what papermill put in."""
    return [
        cell
        for cell in notebook.cells
        if cell.cell_type == "code" and "injected-parameters" not in cell.metadata.get("tags", [])
    ]


class ExecutedNotebook(IPyNbFile):
    """A committed notebook; its items compare it with the executed one."""

    def setup(self):
        self.setup_sanitize_files()  # and no kernel

    def collect(self):
        self.nb = nbformat.read(self.path, as_version=4)
        file = self.config.option.executed_in / self.path.name
        executed = nbformat.read(file, as_version=4) if file.is_file() else nbformat.v4.new_notebook()
        cells = {cell.id: cell for cell in code_cells(executed)}
        clean = read_build().clean
        yield SameCode.from_parent(self, name="code", committed=self.nb, executed=executed, file=file)
        for number, cell in enumerate(code_cells(self.nb)):
            options = defaultdict(
                bool, {**dict(find_metadata_tags(cell.metadata)), **dict(find_comment_markers(cell.source))}
            )
            if options["check"]:
                names = {"name": f"Cell {number}", "cell_num": number}
                item = ExecutedCell.from_parent(self, **names, cell=cell, options=options)
                item.executed, item.clean = cells.get(cell.id), clean
                yield item


class ExecutedCell(IPyNbCell):
    """One tagged cell: what it showed when it was executed, against what is committed."""

    def runtest(self):
        if self.cell.execution_count is None or not self.cell.outputs:
            self.raise_cell_error("The committed cell has nothing recorded to compare with")
        if self.executed is None or self.executed.execution_count is None:
            self.raise_cell_error("The cell was not executed: the run ended before it")
        executed, committed = (self.prepare(cell.outputs) for cell in (self.executed, self.cell))
        if not self.compare_outputs(executed, committed):
            self.raise_cell_error("Cell outputs differ", "\n".join(self.comparison_traceback))

    def prepare(self, outputs):
        outputs = coalesce_streams(self.clean(copy.deepcopy(outputs)))
        for output in outputs:
            data = output.get("data", {})
            if not data.get("text/plain", "<").startswith("<"):  # as in "<IPython.core.display.HTML object>"
                data.pop("text/html", None)
        return outputs

    def repr_failure(self, excinfo):
        """nbval would say "execution failed", which it did not."""
        error = excinfo.value
        if not isinstance(error, NbCellError):
            return super(IPyNbCell, self).repr_failure(excinfo)
        where = f"{self.path.name}, code cell {self.cell_num + 1}"
        return f"{where}: {error}\n\n{error.source}\n\n{error.inner_traceback or ''}"


class SameCode(pytest.Item):
    """The executed notebook ran to its end without an error, and ran the committed code."""

    def __init__(self, *, committed, executed, file, **kwargs):
        super().__init__(**kwargs)
        self.committed, self.executed, self.file = committed, executed, file

    def runtest(self):
        ours, theirs = code_cells(self.committed), code_cells(self.executed)
        if not theirs:
            raise DifferentCode(f"{self.file}: not executed. Run `make run` first, and see where it stopped.")
        for number, cell in enumerate(theirs, 1):
            for output in cell.outputs:
                if output.output_type == "error":
                    raise DifferentCode(f"{self.file.name}, code cell {number}: {output.ename}: {output.evalue}")
        if None in (last := [cell.execution_count for cell in theirs]):
            number = last.index(None) + 1
            raise DifferentCode(f"{self.file.name}, code cell {number}: not executed. The run ended before it.")
        if [(cell.id, cell.source) for cell in ours] != [(cell.id, cell.source) for cell in theirs]:
            known = {(cell.id, cell.source) for cell in theirs}
            other = next((cell for cell in ours if (cell.id, cell.source) not in known), ours[-1])
            raise DifferentCode(
                f"{self.file.name}: another notebook was executed than the committed one. The first cell that "
                f"differs:\n{other.source}\nRun `make run` again."
            )

    def repr_failure(self, excinfo):
        return str(excinfo.value) if isinstance(excinfo.value, DifferentCode) else super().repr_failure(excinfo)

    def reportinfo(self):
        return self.path, 0, f"{self.path.name}::code"


class DifferentCode(Exception):
    """The executed notebook is not a whole run of the committed one."""
