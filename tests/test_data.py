"""The support conversations: made by their script, split by question, and judged by a function that can say no."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.conversations import validate_conversations
from helpers.house_style import Verdict, judge_reply

DATA = Path(__file__).resolve().parent.parent / "notebooks" / "data"
ROWS = [json.loads(line) for line in (DATA / "support_conversations.jsonl").read_text(encoding="utf-8").splitlines()]


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


def test_some_held_out_products_are_new():
    trained = {row["product"] for row in rows_of("train")}
    assert len({row["product"] for row in rows_of("held_out")} - trained) >= 4


def test_shapes_are_mixed():
    turns = {len([turn for turn in row["conversations"] if turn["from"] == "gpt"]) for row in ROWS}
    assert turns == {1, 2}
    with_system = sum(row["conversations"][0]["from"] == "system" for row in ROWS)
    assert 0.3 < with_system / len(ROWS) < 0.7


def test_there_are_several_right_answers():
    for topic in {topic for row in ROWS for topic in row["topics"] if topic}:
        given = {
            reply.split("\n")[1] for row in ROWS for reply, right in answers(row) if topic in row["topics"] and right
        }
        assert len(given) >= 4


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_answer_passes_its_own_judge(split):
    for row in rows_of(split):
        for reply, right in answers(row):
            assert judge_reply(reply, product=row["product"], right_help=right) == Verdict(True, True)


def test_the_help_of_another_topic_is_not_right():
    """Each topic's answers, judged by every other topic's help: never both."""
    help_of = {
        topic: right for row in ROWS for topic, right in zip(row["topics"], row["right_help"], strict=True) if topic
    }
    replies = {topic: reply for row in ROWS for reply, _ in answers(row) for topic in row["topics"][-1:] if topic}
    assert len(help_of) >= 10
    for topic, reply in replies.items():
        last = [t for t, right in help_of.items() if judge_reply(reply, product="", right_help=right).right_help]
        assert last, topic
        assert len(last) == 1, (topic, last)


REPLY = "Re: Solvi lamp, wifi\nNext step: restart your router.\nHave a good day. — Mossbell Care"


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [
        (REPLY, Verdict(True, True)),
        (REPLY.replace("router", "toaster"), Verdict(True, False)),
        (REPLY.replace("Solvi", "Tarn"), Verdict(False, True)),
        (REPLY.replace("Next step: ", ""), Verdict(False, True)),
        (REPLY.replace(" — Mossbell Care", ""), Verdict(False, True)),
        (REPLY + "\nAnd more.", Verdict(False, True)),
        ("Please restart your router.", Verdict(False, True)),
        ("", Verdict(False, False)),
    ],
)
def test_the_judge(reply, verdict):
    assert judge_reply(reply, product="Solvi lamp", right_help=["router", "2.4 GHz"]) == verdict
