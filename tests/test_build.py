"""The build: stable ids, shared code, and no output that is older than its code."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402

SOURCE = """\
# %% [markdown] lang="en"
# # Title

# %% [markdown] lang="zh"
# # 标题

# %% tags=["parameters"]
x = 1

# %%
print(x)

# %%
print(x + 1)
"""


@pytest.fixture
def source(tmp_path):
    path = tmp_path / "03_data.py"
    path.write_text(SOURCE, encoding="utf-8")
    return path


def executed(notebook):
    """The notebook as a run would leave it."""
    donor = copy.deepcopy(notebook)
    for count, cell in enumerate((cell for cell in donor.cells if cell.cell_type == "code"), 1):
        cell.execution_count = count
        cell.outputs = [nbformat.v4.new_output("stream", name="stdout", text=f"{count}\n")]
    return donor


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_editions_share_their_code(source):
    english, chinese = build.build(source, "en"), build.build(source, "zh")
    assert [(c.id, c.source) for c in code(english)] == [(c.id, c.source) for c in code(chinese)]
    assert english.cells[0].source == "# Title"
    assert chinese.cells[0].source == "# 标题"
    assert "parameters" in code(english)[0].metadata.tags


def test_ids_survive_a_new_cell_and_change_with_their_own(source):
    before = [cell.id for cell in build.build(source, "en").cells]
    source.write_text(SOURCE.replace("# %%\nprint(x)\n", "# %%\ny = 2\n\n# %%\nprint(x)\n"), encoding="utf-8")
    after = [cell.id for cell in build.build(source, "en").cells]
    assert len(after) == len(before) + 1
    assert [id for id in after if id in before] == before
    source.write_text(SOURCE.replace("print(x)\n", "print( x )\n"), encoding="utf-8")
    assert sum(id not in before for id in [cell.id for cell in build.build(source, "en").cells]) == 1


def test_outputs_are_kept_up_to_the_first_changed_cell(source):
    donor = executed(build.build(source, "en"))
    same = build.build(source, "en")
    assert build.keep_outputs(same, donor) == 3
    assert [cell.execution_count for cell in code(same)] == [1, 2, 3]
    source.write_text(SOURCE.replace("print(x)\n", "print(-x)\n"), encoding="utf-8")
    changed = build.build(source, "en")
    assert build.keep_outputs(changed, donor) == 1
    assert [cell.execution_count for cell in code(changed)] == [1, None, None]
    assert code(changed)[2].outputs == []


def test_an_output_carried_over_to_new_code_by_hand_is_not_kept(source):
    donor = executed(build.build(source, "en"))
    code(donor)[1].source = "print(-x)"  # as `jupytext --update` would do: new source, old id, old output
    source.write_text(SOURCE.replace("print(x)\n", "print(-x)\n"), encoding="utf-8")
    changed = build.build(source, "en")
    assert build.keep_outputs(changed, donor) == 1


@pytest.mark.parametrize(("tags", "counts"), [(["injected-parameters"], [1, 2, 3]), ([], [1, None, None])])
def test_the_cell_that_papermill_puts_in_is_passed_over_and_no_other(source, tags, counts):
    donor = build.build(source, "en")
    donor.cells.insert(2, nbformat.v4.new_code_cell("x = 1", metadata={"tags": tags}))
    notebook = build.build(source, "en")
    build.keep_outputs(notebook, executed(donor))
    assert [cell.execution_count for cell in code(notebook)] == counts
    shown = ["1\n", "3\n", "4\n"]  # what the donor's first, third and fourth cell showed
    assert [cell.outputs[0].text for cell in code(notebook) if cell.outputs] == shown[: 3 - counts.count(None)]


def test_warnings_and_widgets_are_not_recorded():
    outputs = [
        nbformat.v4.new_output("stream", name="stderr", text="warning"),
        nbformat.v4.new_output(
            "display_data", data={"application/vnd.jupyter.widget-view+json": {}, "text/plain": "0%"}
        ),
        nbformat.v4.new_output("stream", name="stdout", text="kept"),
    ]
    assert [output.text for output in build.clean(outputs)] == ["kept"]


def test_a_streamed_reply_is_recorded_as_one_block():
    words = [nbformat.v4.new_output("stream", name="stdout", text=word) for word in ("It ", "is ", "4.")]
    assert [output.text for output in build.clean(words)] == ["It is 4."]


def test_paths_of_the_machine_are_not_recorded():
    shown = f"PosixPath('{build.ROOT}/runs/cpu') {Path.home()}/.cache"
    outputs = [
        nbformat.v4.new_output("stream", name="stdout", text=shown),
        nbformat.v4.new_output("execute_result", data={"text/plain": shown, "text/html": shown}),
    ]
    stream, result = build.clean(outputs)
    assert stream.text == result.data["text/plain"] == result.data["text/html"] == "PosixPath('runs/cpu') ~/.cache"


@pytest.fixture
def copy_of_project(tmp_path):
    copied = tmp_path / "project"
    ignored = shutil.ignore_patterns(".git", ".venv*", ".gpu", "runs", "__pycache__", ".*_cache")
    shutil.copytree(ROOT, copied, ignore=ignored)
    return copied


def run_build(project, *arguments):
    command = [sys.executable, "notebooks/build.py", *arguments]
    return subprocess.run(command, cwd=project, capture_output=True, text=True)


def test_check_fails_on_a_changed_source_and_names_it(copy_of_project):
    assert run_build(copy_of_project, "--check").returncode == 0
    source = copy_of_project / "notebooks/src/03_data.py"
    source.write_text(source.read_text() + "\n# %%\nprint('more')\n")
    done = run_build(copy_of_project, "--check")
    assert done.returncode == 1
    assert "notebooks/03_data.ipynb" in done.stderr


def test_moving_the_series_rewrites_every_mention_and_keeps_every_output(copy_of_project):
    before = build.read_notebook(copy_of_project / "notebooks/03_data.ipynb")
    assert run_build(copy_of_project, "--location", "somebody/else").returncode == 0
    left = subprocess.run(
        ["grep", "-rlF", build.repository(), "."], cwd=copy_of_project, capture_output=True, text=True
    )
    assert left.stdout == ""
    assert "(https://somebody.github.io/else/zh-CN/)" in (copy_of_project / "README.zh-CN.md").read_text("utf-8")
    after = build.read_notebook(copy_of_project / "notebooks/03_data.ipynb")
    assert "somebody/else" in after.cells[0].source
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]
    assert [cell.get("outputs") for cell in after.cells] == [cell.get("outputs") for cell in before.cells]
    assert run_build(copy_of_project, "--check").returncode == 0


def test_a_location_that_is_none_is_refused(copy_of_project):
    done = run_build(copy_of_project, "--location", "elsewhere")
    assert done.returncode != 0
    assert "expected owner/name" in done.stderr


def test_notebooks_are_stored_as_the_build_writes_them():
    for _, _, path in build.targets():
        text = path.read_text(encoding="utf-8")
        assert text == nbformat.writes(nbformat.reads(text, as_version=4)) + "\n"
        assert json.loads(text)["nbformat_minor"] == 5


def test_the_glossary_has_a_heading_for_each_link_and_no_code():
    for lang in build.EDITIONS:
        notebook = build.glossary(lang)
        headings = [cell.source.splitlines()[0].removeprefix("## ") for cell in notebook.cells[1:]]
        assert [name.lower().replace(" ", "-") for name in headings] == [term.anchor for term in build.terms()]
        assert code(notebook) == [] and len({cell.id for cell in notebook.cells}) == len(notebook.cells)
        assert all(
            term.names["zh"] in cell.source for term, cell in zip(build.terms(), notebook.cells[1:], strict=True)
        )


def test_check_fails_on_a_glossary_that_was_changed_by_hand(copy_of_project):
    page = copy_of_project / "notebooks/zh-CN/glossary.ipynb"
    page.write_text(page.read_text(encoding="utf-8").replace("词元", "令牌"), encoding="utf-8")
    done = run_build(copy_of_project, "--check")
    assert done.returncode == 1 and "zh-CN/glossary.ipynb" in done.stderr


def shown(*outputs):
    """A notebook of one cell that shows these."""
    return nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("x", outputs=list(outputs), execution_count=1)])


def printed(text):
    return nbformat.v4.new_output("stream", name="stdout", text=text)


def test_the_first_picture_of_a_chapter_is_found():
    pictures = [nbformat.v4.new_output("display_data", data={"image/png": data}) for data in ("Zmlyc3Q=", "c2Vjb25k")]
    assert build.first_picture(shown(printed("text"), *pictures)) == b"first"
    assert build.first_picture(shown(printed("text"))) == b""


def test_the_readmes_picture_is_the_recorded_one():
    picture = build.first_picture(build.read_notebook(build.PICTURED))
    assert picture.startswith(b"\x89PNG") and picture == build.PICTURE.read_bytes()


@pytest.fixture
def taken(monkeypatch):
    """What was measured of a run; a chapter that is not in it was not measured."""
    choices = {"RUN_DIR": "runs/cpu", "MODEL_NAME": "Small", "PADDING_FREE": False, "LEARNING_RATE": 4e-3}
    measured = {"device": "2 CPU cores", "date": "2026-11-28", "choices": choices}
    measured["chapters"] = {"03_data": {"minutes": 0.6, "peak_gib": 1.3}}
    monkeypatch.setattr(build, "measured", lambda: measured)


def test_each_edition_leads_to_the_other(source):
    badge = "[![Open in Colab](https://colab.research.google.com/assets/colab-badge.svg)](https://example.org)"
    source.write_text(
        SOURCE.replace("# # Title", f"# # Title\n#\n# {badge}").replace("# # 标题", f"# # 标题\n#\n# {badge}")
    )
    english, chinese = (build.build(source, lang).cells[0].source for lang in ("en", "zh"))
    assert english.endswith(f"{badge} [简体中文](zh-CN/03_data.ipynb)")
    assert chinese.endswith(f"{badge} [English](../03_data.ipynb)\n\n{build.SPEAK_CHINESE}")
    alone = SOURCE.replace('lang="zh"', 'lang="en"').replace("# # Title", f"# # Title\n#\n# {badge}")
    source.write_text(alone, encoding="utf-8")
    assert build.build(source, "en").cells[0].source.endswith(badge)


def test_the_line_on_outputs_says_when_where_and_with_which_choices_they_were_recorded(taken):
    assert build.budget("03_data", "en") == (
        "**Outputs**: recorded on 2026-11-28 with 2 CPU cores and no GPU, `MODEL_NAME = 'Small'`. "
        "That took 0.6 minutes and 1.3 GiB of memory. On a T4: not measured."
    )
    assert "`MODEL_NAME = 'Small'`；0.6 分钟" in build.budget("03_data", "zh")
    assert build.budget("04_train", "en") == "**Outputs**: not measured yet."


def test_measuring_again_changes_no_id(source, taken):
    source.write_text(SOURCE.replace("# # Title", "# # Title\n#\n# {{budget}}"), encoding="utf-8")
    before = build.build(source, "en")
    assert "0.6 minutes" in before.cells[0].source
    build.measured()["chapters"]["03_data"]["minutes"] = 0.7
    after = build.build(source, "en")
    assert "0.7 minutes" in after.cells[0].source
    assert [cell.id for cell in after.cells] == [cell.id for cell in before.cells]


RUN = """\
QUESTION  Why | how?

BEFORE    It is
broken.

AFTER     Hold the
button.
————————
"""


def test_the_readme_shows_one_question_of_the_recorded_run_and_its_result(taken):
    lines = build.run_lines(shown(printed(f"{RUN}\nResult: held-out loss 3 → 2")))
    assert lines[2:5] == [
        "| asked | Why &#124; how? |",
        "| before | It is broken. |",
        "| after | Hold the<br>button. |",
    ]
    assert "held-out loss 3 → 2." in lines[-1] and "2 CPU cores, 2026-11-28" in lines[-1]


@pytest.mark.parametrize("text", ["", RUN, "Result: held-out loss 3 → 2"])
def test_the_readme_says_so_where_half_of_it_or_nothing_is_recorded(text):
    assert build.run_lines(shown(printed(text))) == ["Nothing is recorded yet."]


def test_what_stands_between_two_marks_is_replaced():
    assert build.between("a [x] b [y] c", "[x]", "[y]", "[x] new [y]") == "a [x] new [y] c"
    with pytest.raises(ValueError):
        build.between("a [x] b", "[y]", "[x]", "new")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("很好，\n我们", "很好，我们"),
        ("很好\n我们", "很好我们"),
        ("很好，\n`x`", "很好，`x`"),
        ("用\n`x`", "用\n`x`"),
        ("有：\n- 一", "有：\n- 一"),
        ("有：\n1. 一", "有：\n1. 一"),
        ("有：\n```python\nx\n```", "有：\n```python\nx\n```"),
        ("很好。\n\n我们", "很好。\n\n我们"),
    ],
)
def test_a_line_of_chinese_goes_on_without_a_space(text, shown):
    assert build.LINE_BREAK.sub("", text) == shown
