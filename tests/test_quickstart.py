"""The quickstart's size, and its data cells, run as they stand in its source."""

import copy
import json
import re
import sys

import pytest

from helpers.base import ROOT

sys.path.insert(0, str(ROOT / "notebooks"))
import build  # noqa: E402

CELLS = [
    cell for cell in build.read_cells(ROOT / "notebooks/src/00_quickstart.py") if cell.metadata.get("lang") != "zh"
]
CODE = [cell.source for cell in CELLS if cell.cell_type == "code"]
PROSE = [cell.source for cell in CELLS if cell.cell_type == "markdown"]
QUESTION, ANSWER = {"role": "user", "content": "Why?"}, {"role": "assistant", "content": "Because."}


def run(part, **names):
    """What the one cell that holds `part` makes of these names."""
    [source] = [source for source in CODE if part in source]
    exec(source, names)
    return names


to_messages = run("def to_messages")["to_messages"]


@pytest.fixture
def text_cell(request, shared_tokenizer):
    """What the cell makes for (name of a tokenizer, CHAT_TEMPLATE)."""
    tokenizer = copy.deepcopy(shared_tokenizer(request.param[0]))
    return run("def to_text", tokenizer=tokenizer, CHAT_TEMPLATE=request.param[1], to_messages=to_messages)


def test_it_is_short_and_needs_no_helper():
    assert 12 <= len(CODE) <= 14
    assert sum(len(source.splitlines()) for source in CODE) <= 120
    assert sum(len(text.split()) for text in PROSE) <= 600
    assert "helpers" not in "\n".join(CODE)


def test_each_code_cell_has_its_text_and_all_but_the_choices_say_why():
    for before, cell in zip(CELLS, CELLS[1:], strict=False):
        if cell.cell_type == "code":
            assert before.cell_type == "markdown", cell.source
            assert "parameters" in cell.metadata.get("tags", []) or re.search(
                r"know:\s+\[chapter\s+0\d\]", before.source
            )


def test_the_code_in_its_texts_is_python():
    adapter, client = re.findall(r"```python\n(.*?)```", "\n".join(PROSE), re.DOTALL)
    compile(adapter + client, "text cells", "exec")


@pytest.mark.parametrize(
    "row",
    [
        {"conversations": [{"from": "human", "value": " Why?\n"}, {"from": "gpt", "value": "\nBecause. "}]},
        {"messages": [QUESTION, ANSWER], "conversations": None, "prompt": 3},
        {"messages": [QUESTION | {"from": None, "value": None}, ANSWER | {"weight": 1}]},
        {"output": "Because.", "instruction": "Why?", "input": ""},
    ],
)
def test_a_row_of_each_format_is_read(row):
    assert to_messages(row) == [QUESTION, ANSWER]


def test_the_parts_of_a_question_and_the_system_column_are_kept():
    system = {"role": "system", "content": "Be brief."}
    row = {"system": "Be brief.", "instruction": "Translate:", "input": "why", "output": "Because."}
    assert to_messages(row) == [system, {"role": "user", "content": "Translate:\n\nwhy"}, ANSWER]
    assert to_messages({"system": "Be brief.", "messages": [QUESTION, ANSWER]}) == [system, QUESTION, ANSWER]


@pytest.mark.parametrize(
    "row",
    [
        {"text": "Why? Because."},
        {"question": "Why?", "answer": " "},
        {"messages": [QUESTION, ANSWER, {"role": "tool", "content": "42"}]},
    ],
)
def test_a_row_that_cannot_be_trained_gives_nothing(row):
    assert to_messages(row) == []


@pytest.mark.parametrize("text_cell", [("llama-3.1", "llama-3.1"), ("smollm2", "")], indirect=True)
def test_a_text_begins_once_and_only_its_answers_are_trained(text_cell):
    from unsloth.chat_templates import train_on_responses_only

    tokenizer = text_cell["tokenizer"]
    made = text_cell["to_text"]({"messages": [QUESTION, ANSWER, QUESTION, ANSWER]})
    ids = tokenizer(made["text"]).input_ids
    assert made["tokens"] == len(ids)
    if tokenizer("").input_ids:  # Llama's begins with a BOS; SmolLM2's names one that it does not add
        assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id
    masked = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)({"input_ids": [ids]})
    trained = tokenizer.decode([label for label in masked["labels"][0] if label != -100])
    assert re.sub(r"\s", "", trained) == f"Because.{tokenizer.eos_token}" * 2


@pytest.mark.parametrize("ending", ["jsonl", "json", "csv"])
@pytest.mark.parametrize("text_cell", [("smollm2", "")], indirect=True)
def test_a_file_is_split_and_what_cannot_be_used_is_left_out(ending, text_cell, tmp_path, monkeypatch):
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    answers = {7: "Because. " * 100, 8: ""}  # too long, and none
    rows = [{"question": f"Why {number}?", "answer": answers.get(number, "Because.")} for number in range(40)]
    forms = {"json": json.dumps(rows), "jsonl": "\n".join(map(json.dumps, rows))}
    forms["csv"] = "\n".join(["question,answer", *(f"{row['question']},{row['answer']}" for row in rows)])
    (tmp_path / f"rows.{ending}").write_text(forms[ending], encoding="utf-8")
    choices = dict(DATASET=f"{tmp_path}/rows.{ending}", MAX_STEPS=5, MAX_SEQ_LENGTH=64, to_text=text_cell["to_text"])
    made = run("train_test_split", EVAL_ROWS=4, **choices)
    assert (len(made["train_dataset"]), len(made["eval_dataset"])) == (34, 4)
    texts = [*made["train_dataset"]["text"], *made["eval_dataset"]["text"]]
    assert len(set(texts)) == 38 and not any("Why 7?" in text or "Why 8?" in text for text in texts)
    with pytest.raises(
        ValueError, match=r"^Found 38 usable rows. Fix: a lower EVAL_ROWS, or rows unlike \{'question': 'Why"
    ):
        run("train_test_split", EVAL_ROWS=38, **choices)
