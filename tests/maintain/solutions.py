"""The solutions to a chapter's exercises, run as a reader would: below its last cell, in the same kernel."""

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import nbformat
from nbclient.exceptions import CellExecutionError
from papermill.clientwrap import PapermillNotebookClient
from papermill.engines import NBClientEngine, papermill_engines

from helpers.base import ROOT

NAME = "with solutions"  # of the engine, for papermill


class SolutionError(Exception):
    """A solution that raised: which one, its first line, and what it raised."""


def read_solutions(notebook: Path) -> list[str]:
    """The code of a built chapter's solutions, in their order."""
    sys.path.insert(0, str(ROOT / "notebooks"))
    from lint import solutions_of  # here: what runs a chapter elsewhere has no lint beside it

    texts = [cell.source for cell in nbformat.read(notebook, as_version=4).cells if cell.cell_type == "markdown"]
    return [code for text in texts for code in solutions_of(text)]


def use_engine(solutions: Sequence[str], *, chapter_ended: Callable[[], None], said: list[str]) -> str:
    """Register an engine that runs a chapter and then solutions; the name by which papermill finds it.

    Args:
        chapter_ended: called in between, so that time and memory are measured without the solutions.
        said: gets what each solution printed. The notebook does not: it stays the chapter that was recorded.
    """

    class Client(PapermillNotebookClient):
        def papermill_execute_cells(self) -> None:
            super().papermill_execute_cells()
            chapter_ended()
            failed = any(cell.metadata.get("papermill", {}).get("exception") for cell in self.nb.cells)
            for number, code in enumerate([] if failed else solutions, 1):
                said.append(self.run_solution(number, code))

        def run_solution(self, number: int, code: str) -> str:
            """What a solution prints; its cell stands in the notebook only while it runs."""
            cell = nbformat.v4.new_code_cell(code)
            self.nb.cells.append(cell)
            try:
                self.execute_cell(cell, len(self.nb.cells) - 1)
            except CellExecutionError as error:
                raise SolutionError(
                    f"solution {number} `{code.splitlines()[0]}`: {error.ename}: {error.evalue}"
                ) from None
            finally:
                self.nb.cells.pop()
            return "".join(output.get("text", "") for output in cell.outputs)

    class Engine(NBClientEngine):
        @classmethod
        def execute_managed_notebook(cls, nb_man: Any, kernel_name: str, *, shutdown_kernel: str, **_: Any) -> Any:
            return Client(nb_man, kernel_name=kernel_name, shutdown_kernel=shutdown_kernel).execute()

    papermill_engines.register(NAME, Engine)
    return NAME
