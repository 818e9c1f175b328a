"""The quickstart's size, and its data cells run as they stand in its source: three formats, one BOS, the right labels."""

import copy
import csv
import json
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402

CELLS = build.read_cells(ROOT / "notebooks/src/00_quickstart.py")
CODE = [cell.source for cell in CELLS if cell.cell_type == "code"]
PROSE = [cell.source for cell in CELLS if cell.cell_type == "markdown"]
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def run(part, **names):
    """What the one cell that holds `part` makes of these names."""
    [source] = [source for source in CODE if part in source]
    exec(source, names)
    return names


def to_messages():
    return run("def to_messages")["to_messages"]


@pytest.fixture
def to_text(request, shared_tokenizer):
    """(the cell's function, the tokenizer that it uses) for (name of a tokenizer, CHAT_TEMPLATE)."""
    name, template = request.param
    tokenizer = copy.deepcopy(shared_tokenizer(name))
    made = run("def to_text", tokenizer=tokenizer, CHAT_TEMPLATE=template, to_messages=to_messages())
    return made["to_text"], made["tokenizer"]


def test_it_is_short_and_needs_no_helper():
    lines = [line for source in CODE for line in source.splitlines()]
    assert 12 <= len(CODE) <= 14
    assert len(lines) <= 120
    assert sum(len(text.split()) for text in PROSE) <= 600
    assert "helpers" not in "\n".join(CODE)


def test_each_code_cell_has_its_text_and_all_but_the_choices_say_why():
    for before, cell in zip(CELLS, CELLS[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert "parameters" in cell.metadata.get("tags", []) or re.search(r"know:\s+\[chapter 0\d\]", before.source)


def test_the_code_in_its_texts_is_python():
    blocks = re.findall(r"```python\n(.*?)```", "\n".join(PROSE), re.DOTALL)
    assert len(blocks) == 2
    for block in blocks:
        compile(block, "a text cell", "exec")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": " Why?\n"}, {"from": "gpt", "value": "\nBecause. "}]},
        {"messages": [QUESTION, ANSWER], "conversations": None, "prompt": 3},
        {"messages": [QUESTION | {"from": None, "value": None}, ANSWER | {"weight": 1}]},
        {"question": "Why?", "answer": "Because."},
        {"output": "Because.", "instruction": "Why?", "input": ""},
        {"prompt": "Why?", "completion": "Because.", "system": None},
    ],
)
def test_a_row_of_each_format_is_read(row):
    assert to_messages()(row) == [QUESTION, ANSWER]


def test_the_parts_of_a_question_and_the_system_column_are_kept():
    system = {"role": "system", "content": "Be brief."}
    row = {"system": "Be brief.", "instruction": "Translate.", "input": "oui", "output": "yes"}
    asked = {"role": "user", "content": "Translate.\n\noui"}
    assert to_messages()(row) == [system, asked, {"role": "assistant", "content": "yes"}]
    assert to_messages()({"system": "Be brief.", "messages": [QUESTION, ANSWER]}) == [system, QUESTION, ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Why? Because."},
        {"question": "Why?", "answer": ""},
        {"messages": [QUESTION, {"role": "assistant", "content": " "}]},
        {"messages": [QUESTION, ANSWER, {"role": "tool", "content": "42"}]},
    ],
)
def test_a_row_that_cannot_be_trained_is_shown(row):
    with pytest.raises(ValueError, match=r"^Found \{.*, expected conversations, messages, or a question"):
        to_messages()(row)


@pytest.mark.parametrize("to_text", [("llama-3.1", "llama-3.1"), ("smollm2", "")], indirect=True)
def test_a_text_begins_once_and_only_its_answers_are_trained(to_text):
    from unsloth.chat_templates import train_on_responses_only

    function, tokenizer = to_text
    made = function({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]})
    ids = tokenizer(made["text"]).input_ids
    assert made["tokens"] == len(ids)
    if tokenizer("").input_ids:  # Llama's begins with a BOS; SmolLM2's names one that it does not add
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    mask = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    [labels] = mask({"input_ids": [ids]})["labels"]
    trained = tokenizer.decode([label for label in labels if label != -100])
    assert re.sub(r"\s", "", trained) == f"Because.{tokenizer.eos_token}" * 2


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("to_text", [("smollm2", "")], indirect=True)
def test_a_file_is_split_and_long_rows_are_left_out(ending, to_text, tmp_path):
    rows = [{"question": f"Why {number}?", "answer": "Because. " * (1 + 99 * (number == 7))} for number in range(40)]
    path = tmp_path / f"rows.{ending}"
    with path.open("w", newline="") as file:
        if ending == "csv":
            table = csv.DictWriter(file, ["question", "answer"])
            table.writeheader()
            table.writerows(rows)
        else:
            file.write(json.dumps(rows) if ending == "json" else "\n".join(map(json.dumps, rows)))
    sizes = dict(DATASET=str(path), MAX_STEPS=5, EVAL_ROWS=4, MAX_SEQ_LENGTH=64)
    made = run("train_test_split", to_text=to_text[0], **sizes)
    assert (len(made["train_dataset"]), len(made["eval_dataset"])) == (35, 4)
    texts = made["train_dataset"]["text"] + made["eval_dataset"]["text"]
    assert len(set(texts)) == 39 and not any("Why 7?" in text for text in texts)
