"""The pages as a reader meets them: what can be copied, how much is to be read, and how it is written."""

import ast
import json
import os
import re
import subprocess
import sys

import pytest

from helpers.base import ROOT
from helpers.chapters import CHAPTER_NAMES

sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402

TAUGHT = [source for source in build.sources() if not source.stem.startswith("00_")]
MOST_NAMES, PLAIN_SHARE, MOST_WORDS_BEFORE_A_STEP = 30, 0.60, 3000
MOST_WORDS_IN_A_PARAGRAPH, MOST_WORDS_IN_A_SENTENCE, LONG_SENTENCES = 60, 30, 0.03
# A word of the trade and the mark that stands where it is explained: in italics, or in bold.
EXPLAINED = (
    "tokens",
    "weights",
    "tokenizer",
    "gradients",
    "adapter",
    "loss",
    "perplexity",
    "label",
    "greedy",
    "padding-free",
)


def cells_of(source):
    return [cell for cell in build.read_cells(source) if cell.metadata.get("lang") != "zh"]


def code_of(source):
    """The code cells, without the lines that only IPython understands."""
    cells = [cell.source for cell in cells_of(source) if cell.cell_type == "code"]
    return [re.sub(r"^[%!].*$", "pass", code, flags=re.MULTILINE) for code in cells]


def names_from_helpers(source):
    nodes = (node for code in code_of(source) for node in ast.walk(ast.parse(code)))
    imports = (node for node in nodes if isinstance(node, ast.ImportFrom) and node.module.startswith("helpers"))
    return {alias.name for node in imports for alias in node.names}


def paragraphs_of(source):
    """The running text of a source: without headings, lists, tables, badges, formulas and code."""
    for cell in cells_of(source):
        if cell.cell_type == "markdown":
            text = re.sub(r"```.*?```", "", cell.source, flags=re.DOTALL)
            for block in re.split(r"\n\s*\n", re.sub(r"^(- |  ).*$", "", text, flags=re.MULTILINE)):
                if block.strip() and not re.match(r"\s*(#|\||\[!|\{\{|</?details)", block):
                    yield " ".join(re.sub(r"\$[^$]*\$|`[^`]*`|\]\([^)]*\)", "x", block).split())


def sentences_of(paragraph):
    return re.split(r"(?<=[.!?:;])\s+(?=[A-Z*`x\[\d])", paragraph)


def words(text):
    return len(re.findall(r"[\w’'-]+", text))


def test_few_names_are_taken_from_helpers():
    names = set().union(*map(names_from_helpers, TAUGHT))
    assert len(names) <= MOST_NAMES, sorted(names)


def test_the_quickstart_takes_none():
    assert names_from_helpers(build.sources()[0]) == set()


def test_little_is_to_be_read_before_the_first_step():
    count = 0
    for source in TAUGHT:
        for cell in cells_of(source):
            if cell.cell_type == "code" and "trainer.train(" in cell.source:
                assert count <= MOST_WORDS_BEFORE_A_STEP
                return
            # Nobody reads the address of a link, or has to unfold a solution.
            text = re.sub(r"\]\([^)]*\)|<details>.*?</details>", "]", cell.source, flags=re.DOTALL)
            count += words(text) if cell.cell_type == "markdown" else 0
    raise AssertionError("no step is trained")


@pytest.mark.parametrize("source", build.sources(), ids=lambda path: path.stem)
def test_paragraphs_and_sentences_are_short(source):
    paragraphs = list(paragraphs_of(source))
    assert [text for text in paragraphs if words(text) > MOST_WORDS_IN_A_PARAGRAPH] == []
    sentences = [sentence for text in paragraphs for sentence in sentences_of(text)]
    long = [sentence for sentence in sentences if words(sentence) > MOST_WORDS_IN_A_SENTENCE]
    assert len(long) <= LONG_SENTENCES * len(sentences), long


def test_a_long_paragraph_and_a_long_sentence_are_seen(tmp_path):
    source = tmp_path / "01_long.py"
    source.write_text('# %% [markdown] lang="en"\n# # Title\n#\n# ' + "word " * 70 + "end.\n", encoding="utf-8")
    [paragraph] = paragraphs_of(source)
    assert words(paragraph) == 71 and [words(each) for each in sentences_of(paragraph)] == [71]
    assert sentences_of("One is short. Two is as well: it has `x`.") == ["One is short.", "Two is as well: it has `x`."]


def unexplained(texts):
    """The words of `EXPLAINED` that a row of texts uses before it explains them."""
    missing = []
    for word in EXPLAINED:
        pattern = re.compile(rf"(?<![\w`_.-]){word}(?![\w`_-])", re.IGNORECASE)
        for text in texts:
            if pattern.search(text):
                if not re.search(rf"\*+{word}\*+", text, re.IGNORECASE):
                    missing.append(word)
                break
    return missing


def test_a_word_is_explained_where_it_is_first_used():
    assert unexplained([paragraph for source in TAUGHT for paragraph in paragraphs_of(source)]) == []


def test_a_word_that_is_used_before_it_is_explained_is_seen():
    assert unexplained(["The gradients grow.", "A *gradient* is a direction: these are *gradients*."]) == ["gradients"]
    assert unexplained(["Directions are *gradients* here.", "The gradients grow."]) == []


RUN_PLAINLY = """
import json, os, sys
cells, choices, folder = json.load(open(sys.argv[1])), json.loads(sys.argv[2]), sys.argv[3]
from unsloth import FastLanguageModel
model, tokenizer = FastLanguageModel.from_pretrained(choices["MODEL_NAME"], max_seq_length=256, load_in_4bit=True)
from datasets import load_dataset
from unsloth.chat_templates import standardize_sharegpt
# with roles, as templates want it: a plain notebook reads its own rows in its own way
dataset = standardize_sharegpt(load_dataset("json", data_files=choices["DATASET"], split="train[:40]"))
names = {"model": model, "tokenizer": tokenizer, "dataset": dataset, "display": print}
plain = []
for chapter, number, source in cells:
    if "helpers" in source:
        if "trainer.train(" in source:  # a plain notebook trains as well, with this line alone
            names["trainer"].train()
        continue
    try:
        exec(compile(source, f"{chapter}, cell {number}", "exec"), names)
    except Exception as error:
        print(f"{chapter}, cell {number}: {type(error).__name__}: {str(error)[:120]}", file=sys.stderr)
        continue
    names |= {name: value for name, value in choices.items() if name in names}
    plain.append([chapter, number])
    new = f"{choices['RUN_DIR']}/new"
    for name in os.listdir(new) if os.path.isdir(new) else ():  # a plain notebook would have written there at once
        if not os.path.exists(f"{choices['RUN_DIR']}/{name}"):
            os.rename(f"{new}/{name}", f"{choices['RUN_DIR']}/{name}")
print(json.dumps(plain))
"""


@pytest.mark.slow
def test_most_cells_run_in_a_plain_notebook(tmp_path):
    from tests.maintain.smollm2 import prepare_smollm2

    cells = [[source.stem, number, code] for source in TAUGHT for number, code in enumerate(code_of(source))]
    (tmp_path / "cells.json").write_text(json.dumps(cells), encoding="utf-8")
    choices = {
        "MODEL_NAME": str(prepare_smollm2()),
        "CHAT_TEMPLATE": "",
        "DATASET": str(ROOT / "notebooks/data/support_conversations.jsonl"),
        "ROWS": 528,
        "EVAL_ROWS": 2,
        "GENERAL": str(ROOT / "notebooks/data/general_questions.jsonl"),
        "MAX_SEQ_LENGTH": 256,
        "MAX_STEPS": 2,
        "LEARNING_RATE": 0.05,  # so that two steps change the replies
        "MAX_NEW_TOKENS": 2,
        "MICRO_BATCH": 2,
        "PADDING_FREE": False,
        "GGUF": [],
        "RUN_DIR": str(tmp_path / "run"),
    }
    command = [sys.executable, "-c", RUN_PLAINLY, str(tmp_path / "cells.json"), json.dumps(choices), str(tmp_path)]
    environment = os.environ | {"PYTHONPATH": "", "MPLBACKEND": "agg", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    plain = json.loads(done.stdout.splitlines()[-1])
    share = len(plain) / len(cells)
    failed = "\n".join(line for line in done.stderr.splitlines() if ", cell " in line)
    assert share >= PLAIN_SHARE, f"{len(plain)} of {len(cells)}\n{failed}"
    assert {chapter for chapter, _ in plain} == {name for name in CHAPTER_NAMES if name != "00_quickstart"}
