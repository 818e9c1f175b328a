"""The lint of the committed notebooks: they pass, and each rule refuses a notebook that breaks it."""

import copy
import json
import shutil
import subprocess
import sys
from pathlib import Path

import nbformat
import pytest
from nbval.plugin import comment_markers as nbval_comments

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402
import lint  # noqa: E402

CHAPTERS = [lint.Chapter(*target) for target in build.targets()]
THIRD = next(chapter for chapter in CHAPTERS if chapter.path == build.NOTEBOOKS / "03_data.ipynb")


@pytest.fixture(scope="module")
def good():
    return build.read_notebook(THIRD.path)


@pytest.mark.parametrize("chapter", CHAPTERS, ids=lambda chapter: f"{chapter.path.stem}-{chapter.lang}")
def test_chapter(chapter):
    assert lint.problems_of(build.read_notebook(chapter.path), chapter) == []


@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_every_text_has_its_partner_in_the_other_language(source):
    assert lint.problems_of_source(build.read_cells(source)) == []


def test_the_chapters_are_those_of_the_table():
    from helpers.chapters import CHAPTERS as TABLE

    sources = [(path.stem, build.title(path)) for path in build.sources()]
    assert sources == [(chapter.name, chapter.title) for chapter in TABLE]


def code(notebook, number):
    return lint.code_cells(notebook)[number]


def checked(notebook):
    return next(cell for cell in lint.code_cells(notebook) if "nbval-check-output" in lint.tags_of(cell))


def show(notebook, text="", **data):
    """Let a cell show something more."""
    make = nbformat.v4.new_output
    output = make("display_data", data=data) if data else make("stream", text=text)
    checked(notebook).outputs.append(output)


def error_output():
    return nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])


def swap(notebook, before, after, cells=None):
    for cell in cells or notebook.cells:
        cell.source = cell.source.replace(before, after)


FAULTS = {
    "not valid nbformat": lambda n: n.cells[0].pop("source"),
    "cells without an id": lambda n: n.update(nbformat_minor=4, cells=[drop_id(cell) for cell in n.cells]),
    "ids that occur twice": lambda n: n.cells[2].update(id=n.cells[1].id),
    "ids that the build does not give": lambda n: n.cells[2].update(id="another-id"),
    "not up to date with 03_data.py": lambda n: code(n, 4).update(source=code(n, 4).source + "  # changed by hand"),
    "notebook metadata that is not allowed: widgets": lambda n: n.metadata.update(widgets={}),
    "metadata or tags that are not allowed, of `print": lambda n: code(n, -1).metadata.update(scrolled=True),
    "metadata or tags that are not allowed, of `from": lambda n: code(n, 2).metadata.update(tags=["skip"]),
    "one H1": lambda n: n.cells.append(nbformat.v4.new_markdown_cell("# Another title")),
    "one H1, at the top": lambda n: n.cells.insert(0, nbformat.v4.new_markdown_cell("Before the title")),
    "badge to": lambda n: swap(n, "/notebooks/03_data", "/notebooks/04_train", n.cells[:1]),
    "link to 07_more.ipynb": lambda n: n.cells[0].update(source=n.cells[0].source + "\n[next](07_more.ipynb)"),
    "no link to the next chapter, 04_train.ipynb": lambda n: swap(n, "(04_train.ipynb)", "(05_infer.ipynb)"),
    "on your own": lambda n: n.cells.pop(),
    "no solution to an exercise": lambda n: swap(n, "details>", "p>", n.cells[-1:]),
    "another form than <details>": lambda n: swap(n, "Solution", "Look here", n.cells[-1:]),
    "in the solution `too_long": lambda n: swap(n, "too_long = ", "too_long = \n" + "x\n" * 15, n.cells[-1:]),
    "parameters that no text cell explains": lambda n: swap(n, "DATASET", "UNKNOWN", [code(n, 1)]),
    "more than 25": lambda n: n.cells.extend(copy.deepcopy(lint.code_cells(n)) * 2),
    "second code cell, and only it": lambda n: code(n, 1).metadata.pop("tags"),
    "first code cell is the setup cell": lambda n: code(n, 0).update(source="import helpers"),
    "16 lines": lambda n: code(n, 2).update(source="x = 1\n" * 16),
    "over 120 characters": lambda n: code(n, 2).update(source="x = '" + "y" * 120 + "'"),
    "dead or hidden code in `if": lambda n: code(n, 2).update(source="if False:\n    save()"),
    "dead or hidden code in `%%": lambda n: code(n, 2).update(source="%%capture\n!pip install x"),
    "not recorded from one run": lambda n: code(n, 3).update(execution_count=99),
    "run `make record`": lambda n: code(n, 3).update(execution_count=None),
    "nothing recorded to compare": lambda n: checked(n).update(outputs=[]),
    "an error in the output": lambda n: checked(n).outputs.append(error_output()),
    "a widget view": lambda n: show(n, **{"application/vnd.jupyter.widget-view+json": {}}),
    "machine, '/home/m'": lambda n: show(n, "in /home/me/x"),
    "machine, '/Users/m'": lambda n: show(n, **{"text/html": "<p>/Users/me</p>"}),
    "machine, 'C:": lambda n: show(n, "in C:\\Users\\me"),
    "the comment NBVAL_IGNORE_OUTPUT": lambda n: swap(n, checked(n).source, "# NBVAL_IGNORE_OUTPUT\n", [checked(n)]),
    "no `Result": lambda n: code(n, -1).update(outputs=[]),
}


def drop_id(cell):
    cell.pop("id")
    return cell


@pytest.mark.parametrize("said", FAULTS)
def test_the_lint_refuses(said, good):
    notebook = copy.deepcopy(good)
    before = lint.problems_of(notebook, THIRD)
    FAULTS[said](notebook)
    new = [problem for problem in lint.problems_of(notebook, THIRD) if problem not in before]
    assert any(said.lower() in problem.lower() for problem in new), new


def test_each_comment_that_nbval_obeys_is_refused():
    for marker in nbval_comments:
        assert lint.NBVAL_COMMENT.findall(f"x = 1\n  # {marker} \nprint(x)") == [marker]
    assert not lint.NBVAL_COMMENT.findall("x = 1  # NBVAL_SKIP\n# NBVAL_SKIP is not used here")  # nor does nbval obey


@pytest.mark.parametrize(
    "path",
    [
        *(f"/{folder}/me" for folder in lint.MACHINE_FOLDERS.split("|")),
        "/usr/share/huggingface",
        "file:///home/me/series",
        "PosixPath('/mnt/disk/x')",
        "RUN_DIR=/data/me",
        "cache:/opt/x",
        "<td>/var/lib</td>",
        "D:\\series\\run",
        "Z:\\\\runs\\\\cpu",  # as JSON shows it
    ],
)
def test_a_path_of_a_machine_is_found(path, good):
    notebook = copy.deepcopy(good)
    show(notebook, f"in {path}")
    assert any("a path of somebody's machine" in problem for problem in lint.of_outputs(notebook, THIRD))


@pytest.mark.parametrize(
    "text",
    [
        "https://example.org/home/page?next=/data/x",
        "notebooks/data/rows.jsonl",
        "runs/cpu/tmp/x, ./var/x and ~/.cache",
        "<p>one</p><data/>",
        "either/or, Answer:\nQ:\\n",
    ],
)
def test_what_only_looks_like_a_path_of_a_machine_passes(text, good):
    notebook = copy.deepcopy(good)
    show(notebook, text)
    assert lint.of_outputs(notebook, THIRD) == lint.of_outputs(good, THIRD)


def test_the_sanitizer_and_the_lint_know_the_same_folders():
    assert f"(?:{lint.MACHINE_FOLDERS})" in (ROOT / "tests/nbval_sanitize.cfg").read_text(encoding="utf-8")


# In halves, so that no scanner of this repository takes them for real ones.
TOKENS = {
    "Hugging Face": ["hf_", "AbCdEfGhIjKlMnOpQrStUvWxYzAbCdEfGh"],
    "OpenAI, Anthropic": ["sk-", "ant-api03-AbCdEfGhIjKlMnOp"],
    "GitHub": ["ghp_", "AbCdEfGhIjKlMnOpQrStUvWxYz0123456789"],
    "AWS": ["AKIA", "IOSFODNN7EXAMPLE"],
    "Google": ["AIza", "SyA1234567890abcdefghijklmnopqrstuv"],
    "Weights & Biases": ["wandb: ", "0123456789abcdef" * 2 + "01234567"],
    "Kaggle": ['{"username":"me","key":', '"0123456789abcdef0123456789abcdef"}'],
    "Slack": ["xoxb-", "123456789012-abcdefghij"],
    "private key": ["-----BEGIN RSA PRIVATE", " KEY-----"],
}


def test_each_kind_of_secret_is_tried():
    assert set(TOKENS) == set(lint.SECRETS)


@pytest.mark.parametrize("issuer", TOKENS)
@pytest.mark.parametrize("place", ["stream", "html", "json", "traceback", "text cell", "code"])
def test_a_secret_is_found_and_not_repeated(issuer, place, good):
    notebook, secret = copy.deepcopy(good), "".join(TOKENS[issuer])
    if place == "stream":
        show(notebook, f"token {secret}")
    elif place == "html":
        show(notebook, **{"text/html": f"<code>{secret}</code>"})
    elif place == "json":
        show(notebook, **{"application/json": json.loads(secret) if secret[0] == "{" else {"token": secret}})
    elif place == "traceback":
        checked(notebook).outputs.append(nbformat.v4.new_output("error", traceback=[secret]))
    else:
        cell = code(notebook, 2) if place == "code" else notebook.cells[1]
        cell.source += f"\n# {secret}"
    found = lint.of_secrets(notebook, THIRD)
    assert len(found) == 1 and f"a secret ({issuer})" in found[0]
    assert TOKENS[issuer][1] not in found[0].partition("` ")[2]


HEX = "0123456789abcdef"
OTHER_FORMS = (
    ("Weights & Biases", "wandb login ", HEX * 2 + HEX[:8]),
    ("Weights & Biases", "wandb.login(relogin=True, key='", HEX * 2 + HEX[:8]),
    ("Kaggle", "{'username': 'me', 'key': '", HEX * 2),
    ("Kaggle", "{&quot;username&quot;: &quot;me&quot;, &quot;key&quot;: &quot;", HEX * 2),
    ("Kaggle", "{&#39;key&#39;:&#39;", HEX * 2),
    ("Kaggle", '"{\\"username\\": \\"me\\", \\"key\\": \\"', HEX * 2),  # JSON in JSON
    ("Kaggle", "export KAGGLE_KEY=", HEX * 2),
)


@pytest.mark.parametrize(("issuer", "before", "secret"), OTHER_FORMS)
def test_a_secret_is_found_in_its_other_forms(issuer, before, secret, good):
    notebook = copy.deepcopy(good)
    show(notebook, before + secret)
    [found] = lint.of_secrets(notebook, THIRD)
    assert f"a secret ({issuer})" in found


@pytest.mark.parametrize(
    "text",
    [
        "commit 1ff2e9d1c7a0a4c0a2c7a0b1a9f9b0c7d1e2f3a4",  # a git hash, a key of another kind would look like it
        "hf_transfer, sk-learn and AKIA",
        "Template fingerprint: 0123456789abcdef0123456789abcdef",
        "Paste your hf_… token",
        "wandb: off\ncommit 1ff2e9d1c7a0a4c0a2c7a0b1a9f9b0c7d1e2f3a4",  # on another line
        "'monkey': '0123456789abcdef0123456789abcdef'",
    ],
)
def test_what_only_looks_like_a_secret_passes(text, good):
    notebook = copy.deepcopy(good)
    show(notebook, text)
    assert lint.of_secrets(notebook, THIRD) == []


def source_cells(*spoken):
    return [nbformat.v4.new_markdown_cell(f"text {n}", metadata={"lang": lang}) for n, lang in enumerate(spoken)]


@pytest.mark.parametrize(
    ("spoken", "problems"),
    [
        (["en", "en"], []),
        (["en", "zh", "en", "zh"], []),
        (["en", "zh", "en"], ["no Chinese partner of `text 2`"]),
        (["en", "en", "zh"], ["no Chinese partner of `text 0`"]),
        (["en", "zh", "zh"], ["no English partner of `text 2`"]),
        (["en", "de"], ['no lang="en" or lang="zh" on `text 1`']),
    ],
)
def test_partners_of_the_two_languages(spoken, problems):
    assert lint.problems_of_source(source_cells(*spoken)) == problems


def pair(english, chinese):
    texts = {"en": english, "zh": chinese}
    return [nbformat.v4.new_markdown_cell(text, metadata={"lang": lang}) for lang, text in texts.items()]


@pytest.mark.parametrize(
    ("english", "chinese", "problem"),
    [
        ("Set `MAX_STEPS` to 60, see [04](04_train.ipynb).", "把 `MAX_STEPS` 设为 60，见[04](04_train.ipynb)。", ""),
        ("1,000 rows, 24 million numbers", "1000 行，2400 万个数", ""),
        ("24 million numbers", "24 万个数", "numbers that the two texts do not share, 240000, 24000000"),
        ("![x](images/chat.png)", "![x](../images/chat.png)", ""),
        ("Set `MAX_STEPS`.", "设置步数。", "code spans that the two texts do not share, `MAX_STEPS`"),
        ("60 steps", "6 步", "numbers that the two texts do not share, 6, 60"),
        ("see [04](04_train.ipynb)", "见 04", "links that the two texts do not share, 04_train.ipynb"),
        ("## Plan\n\ntext", "计划", "headings that the two texts do not share, ## "),
        ("| a |\n|---|", "| 甲 |", "rows of tables that the two texts do not share, |"),
        ("```python\nx\n```", "```python\nx\n```", ""),
        ("```\nx\n```", "```\ny\n```", "blocks of code that the two texts do not share, ```\nx\n```, ```\ny\n```"),
        ("[loss](glossary.ipynb#loss)", "损失", "links that the two texts do not share, glossary.ipynb#loss"),
    ],
)
def test_what_a_text_and_its_translation_must_share(english, chinese, problem):
    assert [found.partition(", of")[0] for found in lint.problems_of_pairs(pair(english, chinese))] == [problem] * bool(
        problem
    )


def test_a_chinese_text_uses_the_words_of_the_table_of_terms():
    assert lint.problems_of_terms(pair("The loss of a token.", "一个词元的损失。")) == []
    assert lint.problems_of_terms(pair("The loss of a token.", "一个令牌的损耗。")) == [
        "令牌 instead of 词元 in `一个令牌的损耗。`",
        "损耗 instead of 损失 in `一个令牌的损耗。`",
    ]
    assert lint.problems_of_terms(pair("令牌", "词元")) == []  # the English text is not its concern


@pytest.mark.parametrize(
    ("english", "problem"),
    [
        ("The [loss](glossary.ipynb#loss) falls, and the loss rises.", ""),
        ("# Loss\n\n`loss`\n\n| loss |\n\n[*Losses*](glossary.ipynb#loss) fall.", ""),  # no running text before it
        ("The loss falls. The [loss](glossary.ipynb#loss) rises.", "behind the first use of the word"),
        ("The [fall](glossary.ipynb#loss) ends.", "on other words, 'fall'"),
        ("The [moss](glossary.ipynb#moss) grows.", "glossary.ipynb#moss, which the glossary does not explain"),
    ],
)
def test_a_link_to_the_glossary_stands_at_the_words_first_use(english, problem):
    found = lint.problems_of_words(pair(english, "文字"))
    assert len(found) == bool(problem) and all(problem in one for one in found)


def test_each_word_of_the_glossary_is_linked_in_both_languages(monkeypatch):
    loss = next(term for term in build.terms() if term.anchor == "loss")
    monkeypatch.setattr(build, "terms", lambda: [loss])
    english, chinese = "The [loss](glossary.ipynb#loss).", "[损失](glossary.ipynb#loss)"
    assert lint.problems_of_glossary([pair(english, chinese)]) == []
    assert lint.problems_of_glossary([pair(english, "损失")]) == ["no link to loss, zh"]
    wordy = loss._replace(meanings=loss.meanings | {"en": "word " * 31})
    monkeypatch.setattr(build, "terms", lambda: [wordy])
    assert lint.problems_of_glossary([pair(english, chinese)]) == ["more than 30 words for loss"]


def test_the_two_readmes_share_links_numbers_and_code():
    texts = {lang: build.READMES[lang].read_text(encoding="utf-8") for lang in build.READMES}
    texts = {lang: build.between(text, build.RUN_START, build.RUN_END, "") for lang, text in texts.items()}
    texts["en"] = texts["en"].replace("English · [简体中文](README.zh-CN.md)", "")
    texts["zh"] = texts["zh"].replace("[English](README.md) · 简体中文", "")
    for lang in texts:
        texts[lang] = build.between(texts[lang], build.TABLE_START, build.TABLE_END, "")
    assert lint.problems_of_pairs(pair(*(texts[lang] for lang in ("en", "zh")))) == []
    assert lint.problems_of_terms(pair(*(texts[lang] for lang in ("en", "zh")))) == []


def test_a_chinese_notebook_whose_code_drifted_is_refused(tmp_path):
    source = tmp_path / "03_data.py"
    chinese = '\n# %% [markdown] lang="zh"\n# 文字\n\n# %%'
    text = THIRD.source.read_text(encoding="utf-8")
    source.write_text(text.replace("\n# %%", chinese, 1) if 'lang="zh"' not in text else text, encoding="utf-8")
    (tmp_path / "setup_cell.py").write_text((THIRD.source.parent / "setup_cell.py").read_text(encoding="utf-8"))
    chapter = lint.Chapter(source, "zh", build.EDITIONS["zh"] / "03_data.ipynb")
    notebook = build.build(source, "zh")
    assert lint.of_identity(notebook, chapter) == []
    code(notebook, 3).source += "\n# changed"
    assert lint.of_identity(notebook, chapter) == ["not up to date with 03_data.py: run `make notebooks`"]


def test_the_command_names_notebook_and_problem(tmp_path):
    shutil.copytree(build.NOTEBOOKS, tmp_path / "notebooks", ignore=shutil.ignore_patterns("data", "__pycache__"))
    shutil.copytree(ROOT / "helpers", tmp_path / "helpers", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    broken = build.read_notebook(THIRD.path)
    broken.metadata.widgets = {}
    nbformat.write(broken, tmp_path / "notebooks/03_data.ipynb")
    (tmp_path / "notebooks/04_train.ipynb").rename(tmp_path / "notebooks/09_old.ipynb")
    done = subprocess.run([sys.executable, tmp_path / "notebooks/lint.py"], capture_output=True, text=True)
    assert done.returncode == 1, done.stderr
    assert "03_data.ipynb: notebook metadata that is not allowed: widgets\n" in done.stdout
    assert "04_train.ipynb: does not exist" in done.stdout
    assert "09_old.ipynb: has no source" in done.stdout
