"""The support conversations: made by their script, split by question, and judged by a function that can say no."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.conversations import validate_conversations

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
DATA = NOTEBOOKS / "data"
GENERAL = [json.loads(line) for line in (DATA / "general_questions.jsonl").read_text(encoding="utf-8").splitlines()]
ROWS = [json.loads(line) for line in (DATA / "support_conversations.jsonl").read_text(encoding="utf-8").splitlines()]


def chapters_judge():
    """The function `judge` that chapter 04 shows its readers."""
    cells = (NOTEBOOKS / "src" / "04_train.py").read_text(encoding="utf-8").split("# %%")
    [source] = [cell for cell in cells if "def judge(reply, row):" in cell]
    names = {}
    exec(source.partition("\ncounted = ")[0], names)
    return names["judge"]


JUDGE = chapters_judge()


def judged(reply, *, product, right_help):
    """(in house style, right help)"""
    return JUDGE(reply, {"product": product, "right_help": [["an earlier turn's"], right_help]})


def rows_of(split):
    return [row for row in ROWS if row["split"] == split]


def questions(row):
    """(text, topic) of the user turns whose answer gives help."""
    asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
    return [(text, topic) for text, topic in zip(asked, row["topics"], strict=True) if topic]


def answers(row):
    """(reply, right help) of the assistant turns that give help."""
    replies = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    return [(reply, right) for reply, right in zip(replies, row["right_help"], strict=True) if right]


def test_the_file_is_what_the_script_makes():
    command = [sys.executable, "make_support_conversations.py", "--check"]
    assert subprocess.run(command, cwd=DATA, capture_output=True).returncode == 0


def test_the_check_notices_a_changed_file(tmp_path):
    (tmp_path / "make.py").write_text((DATA / "make_support_conversations.py").read_text(encoding="utf-8"))
    text = (DATA / "support_conversations.jsonl").read_text(encoding="utf-8")
    (tmp_path / "support_conversations.jsonl").write_text(text.replace("Mossbell", "Mosbell", 1), encoding="utf-8")
    assert subprocess.run([sys.executable, "make.py", "--check"], cwd=tmp_path, capture_output=True).returncode != 0


def test_every_row_is_a_valid_conversation():
    report = validate_conversations(ROWS)
    assert report.ok and 300 <= report.rows <= 1000


def test_no_held_out_question_was_seen():
    trained_pairs = {(row["product"], topic) for row in rows_of("train") for _, topic in questions(row)}
    trained_texts = {text for row in rows_of("train") for text, _ in questions(row)}
    for row in rows_of("held_out"):
        for text, topic in questions(row):
            assert (row["product"], topic) not in trained_pairs
            assert text not in trained_texts


def wordings(split):
    """The customers' sentences with the product taken out and what is said before and after cut off."""
    spec = importlib.util.spec_from_file_location("make", DATA / "make_support_conversations.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    known = {sentence for topic in make.TOPICS.values() for sentence in topic["questions"]} | set(make.GREETINGS)
    used = set()
    for row in rows_of(split):
        for turn in row["conversations"]:
            if turn["from"] == "human":
                things = ["it", *(f"{whose} {row['product']}" for whose in ("my", "our", "the"))]
                said = turn["value"].lower()
                found = {w for w in known if any(w.format(it=thing).lower() in said for thing in things)}
                assert found, turn
                used |= found
    return used


def test_no_held_out_wording_was_seen():
    assert not wordings("train") & wordings("held_out")
    assert len(wordings("held_out")) >= 20


def test_no_question_holds_its_own_help():
    """A model that repeats the question must not pass for one that helps."""
    for row in ROWS:
        asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        for text, right in zip(asked, row["right_help"], strict=True):
            assert not judged(text, product=row["product"], right_help=right)[1]


def test_some_held_out_products_are_new():
    trained = {row["product"] for row in rows_of("train")}
    assert len({row["product"] for row in rows_of("held_out")} - trained) >= 4


def test_shapes_are_mixed():
    turns = {len([turn for turn in row["conversations"] if turn["from"] == "gpt"]) for row in ROWS}
    assert turns == {1, 2}
    with_system = sum(row["conversations"][0]["from"] == "system" for row in ROWS)
    assert 0.3 < with_system / len(ROWS) < 0.7


def test_there_are_several_right_answers():
    steps = {}
    for row in ROWS:
        replies = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        for topic, reply in zip(row["topics"], replies, strict=True):
            if topic:
                steps.setdefault(topic, set()).add(reply.split("\n")[1])
    assert {len(different) for different in steps.values()} == {4}


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_answer_passes_its_own_judge(split):
    for row in rows_of(split):
        for reply, right in answers(row):
            assert judged(reply, product=row["product"], right_help=right) == (True, True)


def test_the_help_of_another_topic_is_not_right():
    """Each topic's answers, judged by every other topic's help: never both."""
    help_of = {
        topic: right for row in ROWS for topic, right in zip(row["topics"], row["right_help"], strict=True) if topic
    }
    replies = {topic: reply for row in ROWS for reply, _ in answers(row) for topic in row["topics"][-1:] if topic}
    assert len(help_of) >= 10
    for topic, reply in replies.items():
        last = [t for t, right in help_of.items() if judged(reply, product="", right_help=right)[1]]
        assert last, topic
        assert len(last) == 1, (topic, last)


REPLY = "Re: Solvi lamp, wifi\nNext step: restart your router.\nHave a good day. — Mossbell Care"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (REPLY, (True, True)),
        (REPLY.replace("router", "toaster"), (True, False)),
        (REPLY.replace("Solvi", "Tarn"), (False, True)),
        (REPLY.replace("Next step: ", ""), (False, True)),
        (REPLY.replace(" — Mossbell Care", ""), (False, True)),
        (REPLY + "\nAnd more.", (False, True)),
        ("Please restart your router.", (False, True)),
        ("", (False, False)),
    ],
)
def test_the_judge(reply, verdict):
    assert judged(reply, product="Solvi lamp", right_help=["router", "2.4 GHz"]) == verdict


def test_the_general_questions_that_are_held_out_are_in_no_training():
    held_out = [row for row in GENERAL if row["split"] == "held_out"]
    mixed_in = [row for row in GENERAL if row["split"] == "train"]
    assert (len(held_out), len(mixed_in)) == (20, 48) and len({row["question"] for row in GENERAL}) == 68
    assert not {row["answer"] for row in held_out} & {row["answer"] for row in mixed_in}
    assert all(row["wrong"] == "" for row in mixed_in)
    for row in held_out:  # of one form: as long, within three words, and not the right one
        right, wrong = row["answer"].split(), row["wrong"].split()
        assert wrong != right and abs(len(right) - len(wrong)) <= 3, row["question"]
