"""The table of the chapters, and a chapter that is added to a copy of the project."""

import os
import shutil
import subprocess
import sys
import tomllib

import nbformat
import pytest

from helpers.base import ROOT
from helpers.chapters import CHAPTERS, producer_of

ROW = '    Chapter("99_extra", "Count to three", needs=("dataset",), writes=("count.json",)),\n'
SOURCE = """\
# %% [markdown] lang="en"
# # Count to three
#
# [![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://colab.research.google.com/github/OWNER/NAME/blob/main/notebooks/99_extra.ipynb)
#
# {{budget}}

# %%
# include: setup_cell.py

# %% [markdown] lang="en"
# `LAST` is the number to count to.

# %% tags=["parameters"]
# @title Choices · 选项
LAST = 3  # @param {type:"integer"}

# %%
print(f"Result: {', '.join(map(str, range(1, LAST + 1)))}")

# %% [markdown] lang="en"
# On your own: count to four.
#
# <details><summary>Solution</summary>
#
# ```python
# print(*range(1, LAST + 2))
# ```
#
# One number more.
#
# </details>
#
# {{next}}
"""


def test_each_artefact_has_one_producer_that_comes_before_who_needs_it():
    writers = {artefact: number for number, chapter in enumerate(CHAPTERS) for artefact in chapter.writes}
    assert len(writers) == sum(len(chapter.writes) for chapter in CHAPTERS)
    for number, chapter in enumerate(CHAPTERS):
        assert all(writers[artefact] < number for artefact in chapter.needs), chapter.name
    assert producer_of("adapter").name == "04_train" and producer_of("nobody's").name == CHAPTERS[-1].name


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the project with one more chapter: its source, and its row in the table."""
    folder = tmp_path_factory.mktemp("project") / "copy"
    ignored = shutil.ignore_patterns("__pycache__", "_unsloth*", "unsloth_compiled_cache")
    for name in ("helpers", "notebooks", "tests/maintain"):
        shutil.copytree(ROOT / name, folder / name, ignore=ignored)
    for name in ("README.md", "pyproject.toml", "requirements-colab.txt", "tests/__init__.py"):
        shutil.copy(ROOT / name, folder / name)
    url = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]["Repository"]
    source = SOURCE.replace("OWNER/NAME", url.removeprefix("https://github.com/"))
    (folder / "notebooks/src/99_extra.py").write_text(source, encoding="utf-8")
    return folder


def run(folder, *command):
    return subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, env={**os.environ})


def add_row(folder):
    table = folder / "helpers/chapters.py"
    text = table.read_text(encoding="utf-8")
    if ROW not in text:
        table.write_text(text.replace(")\nCHAPTER_NAMES", ROW + ")\nCHAPTER_NAMES"), encoding="utf-8")


def test_a_source_without_a_row_is_refused(copy):
    done = run(copy, "notebooks/build.py")
    assert done.returncode and "found 99_extra.py in one place alone" in done.stderr and "add the row" in done.stderr


def test_a_chapter_is_built_run_and_linted_with_no_other_file_touched(copy):
    add_row(copy)
    done = run(copy, "notebooks/build.py")
    assert done.returncode == 0, done.stderr
    notebook = nbformat.read(copy / "notebooks/99_extra.ipynb", as_version=4)
    assert "**Outputs**: not measured yet." in notebook.cells[0].source
    assert "[99 Count to three](notebooks/99_extra.ipynb)" in (copy / "README.md").read_text(encoding="utf-8")
    before = nbformat.read(copy / f"notebooks/{CHAPTERS[-1].name}.ipynb", as_version=4)
    assert "Next: [Count to three →](99_extra.ipynb)" in before.cells[-1].source
    chinese = nbformat.read(copy / f"notebooks/zh-CN/{CHAPTERS[-1].name}.ipynb", as_version=4)
    assert "下一章：[Count to three →](../99_extra.ipynb)" in chinese.cells[-1].source  # it has no Chinese text yet
    done = run(copy, "notebooks/lint.py")
    assert done.returncode and "99_extra.ipynb: outputs that are not recorded" in done.stdout
    done = run(copy, "-m", "tests.maintain.series", "99_extra", "-p", "LAST", "4", "-p", "RUN_DIR", str(copy / "run"))
    assert done.returncode, "a parameter that the chapter does not have"
    done = run(copy, "-m", "tests.maintain.series", "99_extra", "-p", "LAST", "4")
    assert done.returncode == 0 and "1, 2, 3, 4" in done.stdout, done.stdout + done.stderr
    done = run(copy, "notebooks/build.py", "--outputs-from", "runs/llama/executed")
    assert done.returncode == 0, done.stderr
    lines = [line for line in run(copy, "notebooks/lint.py").stdout.splitlines() if "99_extra" in line]
    assert lines == []
