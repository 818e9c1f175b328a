"""Build the notebooks from their sources in `src/`: `python notebooks/build.py`.

A source is one py:percent file a chapter. Markdown cells carry `lang="en"` or `lang="zh"`; code cells are shared, so
the editions differ in prose alone. A code cell that reads `# include: FILE` is replaced by that file of `src/`.

Recorded outputs live in the built notebooks. They are kept up to the first code cell that changed and cleared from
there on, because everything below a changed cell may depend on it. `--outputs-from DIR` takes them from the executed
notebooks of a run instead, and `--check` writes nothing and fails where a notebook differs from its source.
"""

import argparse
import hashlib
import sys
import tomllib
from collections import Counter
from pathlib import Path

import jupytext
import nbformat
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent
EDITIONS = {"en": NOTEBOOKS, "zh": NOTEBOOKS / "zh-CN"}
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
CELL_METADATA = ("tags", "lang")
INCLUDE = "# include: "


def repository() -> str:
    """`owner/name` on GitHub: the one constant, from pyproject.toml."""
    project = tomllib.loads((NOTEBOOKS.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def sources() -> list[Path]:
    """The chapters' sources in order."""
    return sorted(path for path in (NOTEBOOKS / "src").glob("[0-9][0-9]_*.py"))


def read_cells(source: Path) -> list[NotebookNode]:
    """The cells of a source, every language, includes resolved."""
    cells = jupytext.read(source, fmt="py:percent").cells
    for cell in cells:
        if cell.cell_type == "code" and cell.source.startswith(INCLUDE):
            cell.source = (
                (source.parent / cell.source.removeprefix(INCLUDE).strip()).read_text(encoding="utf-8").strip()
            )
    return cells


def build(source: Path, lang: str) -> NotebookNode:
    """One edition of one chapter, without outputs.

    A cell's id is a hash of its own source: the same in every build and in both editions, whatever is added around it,
    and a different one as soon as the cell changes. The repository's name does not count, so that moving the series
    changes no id.
    """
    seen: Counter[str] = Counter()
    cells = []
    for cell in read_cells(source):
        if cell.cell_type == "markdown" and cell.metadata.get("lang") != lang:
            continue
        text = f"{source.stem}\n{cell.cell_type}\n{cell.source}".replace(repository(), "")
        seen[text] += 1
        metadata = {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cell_id = hashlib.sha256(f"{text}\n{seen[text]}".encode()).hexdigest()[:12]
        cells.append(make(cell.source, id=cell_id, metadata=metadata))
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    notebook.nbformat_minor = 5
    return notebook


def keep_outputs(notebook: NotebookNode, donor: NotebookNode) -> int:
    """Copy the donor's outputs up to the first code cell that it does not have; returns how many cells got theirs."""
    ours = [cell for cell in notebook.cells if cell.cell_type == "code"]
    theirs = [cell for cell in donor.cells if cell.cell_type == "code"]
    kept = 0
    for cell, recorded in zip(ours, theirs, strict=False):
        if (cell.id, cell.source) != (recorded.id, recorded.source) or recorded.execution_count is None:
            break
        cell.outputs, cell.execution_count = [clean(output) for output in recorded.outputs], recorded.execution_count
        kept += 1
    return kept


def clean(output: NotebookNode) -> NotebookNode:
    """An output without widget views: their state is not stored, so they would render as a broken box."""
    if "data" in output:
        output.data.pop("application/vnd.jupyter.widget-view+json", None)
    return output


def read_notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def targets() -> list[tuple[Path, str, Path]]:
    """(source, language, notebook) of everything that is built; the Chinese edition where a chapter has one."""
    found = []
    for source in sources():
        spoken = {cell.metadata.get("lang") for cell in read_cells(source) if cell.cell_type == "markdown"}
        found += [(source, lang, EDITIONS[lang] / f"{source.stem}.ipynb") for lang in EDITIONS if lang in spoken]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs-from", type=Path, metavar="DIR", help="take the outputs of the run executed in DIR")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a notebook is out of date")
    arguments = parser.parse_args()
    stale = []
    for source, lang, path in targets():
        notebook = build(source, lang)
        donor = arguments.outputs_from / path.name if arguments.outputs_from else path
        if donor.exists():
            keep_outputs(notebook, read_notebook(donor))
        text = nbformat.writes(notebook) + "\n"
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(path.relative_to(NOTEBOOKS.parent))
            if not arguments.check:
                path.parent.mkdir(exist_ok=True)
                path.write_text(text, encoding="utf-8")
    if arguments.check and stale:
        print("Out of date: " + ", ".join(map(str, stale)) + ". Run `make notebooks`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
