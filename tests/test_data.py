"""The support conversations: made by their script, split by question, and judged by a function that can say no."""

import importlib.util
import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.conversations import validate_conversations

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
DATA = NOTEBOOKS / "data"
GENERAL = [json.loads(line) for line in (DATA / "general_questions.jsonl").read_text(encoding="utf-8").splitlines()]
FILES = {"en": "support_conversations.jsonl", "zh": "support_conversations_zh.jsonl"}
ALL_ROWS = {
    lang: [json.loads(line) for line in (DATA / file).read_text(encoding="utf-8").splitlines()]
    for lang, file in FILES.items()
}
ROWS = ALL_ROWS["en"]


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


def rows_of(split, lang="en"):
    return [row for row in ALL_ROWS[lang] if row["split"] == split]


def questions(row):
    """(text, topic) of the user turns whose answer gives help."""
    asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
    return [(text, topic) for text, topic in zip(asked, row["topics"], strict=True) if topic]


def answers(row):
    """(reply, right help) of the assistant turns that give help."""
    replies = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
    return [(reply, right) for reply, right in zip(replies, row["right_help"], strict=True) if right]


def test_the_files_are_what_the_script_makes():
    command = [sys.executable, "make_support_conversations.py", "--check"]
    assert subprocess.run(command, cwd=DATA, capture_output=True).returncode == 0


def test_the_script_writes_the_same_bytes_anew(tmp_path):
    shutil.copy(DATA / "make_support_conversations.py", tmp_path)
    subprocess.run([sys.executable, "make_support_conversations.py"], cwd=tmp_path, check=True, capture_output=True)
    assert {file.name for file in tmp_path.glob("*.jsonl")} == set(FILES.values())
    assert all((tmp_path / file).read_bytes() == (DATA / file).read_bytes() for file in FILES.values())


@pytest.mark.parametrize("changed", FILES.values())
def test_the_check_notices_a_changed_file(tmp_path, changed):
    for name in ("make_support_conversations.py", *FILES.values()):
        shutil.copy(DATA / name, tmp_path)
    text = (DATA / changed).read_text(encoding="utf-8")
    (tmp_path / changed).write_text(text.replace("Mossbell", "Mosbell", 1), encoding="utf-8")
    command = [sys.executable, "make_support_conversations.py", "--check"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, encoding="utf-8")
    assert done.returncode != 0 and f"{changed} is not what this script makes" in done.stderr


def test_every_row_is_a_valid_conversation():
    report = validate_conversations(ROWS)
    assert report.ok and 300 <= report.rows <= 1000


def test_every_chinese_row_is_a_valid_conversation():
    assert validate_conversations(ALL_ROWS["zh"]).ok
    assert [len(rows_of(split, "zh")) for split in ("train", "held_out")] == [48, 12]
    assert {tuple(row) for row in ALL_ROWS["zh"]} == {tuple(row) for row in ROWS}  # the same columns


def test_no_chinese_conversation_is_there_twice():
    asked = [tuple(t["value"] for t in row["conversations"] if t["from"] == "human") for row in ALL_ROWS["zh"]]
    assert len(set(asked)) == len(asked) == 60


@pytest.mark.parametrize("lang", FILES)
def test_no_held_out_question_was_seen(lang):
    trained_pairs = {(row["product"], topic) for row in rows_of("train", lang) for _, topic in questions(row)}
    trained_texts = {text for row in rows_of("train", lang) for text, _ in questions(row)}
    for row in rows_of("held_out", lang):
        for text, topic in questions(row):
            assert (row["product"], topic) not in trained_pairs
            assert text not in trained_texts


def language(lang):
    """The script's tables of one language."""
    spec = importlib.util.spec_from_file_location("make", DATA / "make_support_conversations.py")
    make = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(make)
    return {"en": make.ENGLISH, "zh": make.CHINESE}[lang]


def wordings(split, lang):
    """The customers' sentences with the product taken out and what is said before and after cut off."""
    tables = language(lang)
    known = {sentence for topic in tables.topics.values() for sentence in topic["questions"]} | set(tables.greetings)
    used = set()
    for row in rows_of(split, lang):
        for turn in row["conversations"]:
            if turn["from"] == "human":
                things = [tables.it, *(thing.format(product=row["product"]) for thing in tables.things)]
                said = turn["value"].lower()
                found = {w for w in known if any(w.format(it=thing).lower() in said for thing in things)}
                assert found, turn
                used |= found
    return used


@pytest.mark.parametrize(("lang", "held_out"), [("en", 20), ("zh", 10)])
def test_no_held_out_wording_was_seen(lang, held_out):
    assert not wordings("train", lang) & wordings("held_out", lang)
    assert len(wordings("held_out", lang)) >= held_out


@pytest.mark.parametrize("lang", FILES)
def test_no_question_holds_its_own_help(lang):
    """A model that repeats the question must not pass for one that helps."""
    for row in ALL_ROWS[lang]:
        asked = [turn["value"] for turn in row["conversations"] if turn["from"] == "human"]
        for text, right in zip(asked, row["right_help"], strict=True):
            assert not judged(text, product=row["product"], right_help=right)[1]


@pytest.mark.parametrize(("lang", "new"), [("en", 4), ("zh", 2)])
def test_some_held_out_products_are_new(lang, new):
    trained = {row["product"] for row in rows_of("train", lang)}
    assert len({row["product"] for row in rows_of("held_out", lang)} - trained) >= new


@pytest.mark.parametrize("lang", FILES)
def test_shapes_are_mixed(lang):
    rows = ALL_ROWS[lang]
    turns = {len([turn for turn in row["conversations"] if turn["from"] == "gpt"]) for row in rows}
    assert turns == {1, 2}
    with_system = sum(row["conversations"][0]["from"] == "system" for row in rows)
    assert 0.3 < with_system / len(rows) < 0.7


@pytest.mark.parametrize("lang", FILES)
def test_there_are_several_right_answers(lang):
    steps = {}
    for row in ALL_ROWS[lang]:
        replies = [turn["value"] for turn in row["conversations"] if turn["from"] == "gpt"]
        for topic, reply in zip(row["topics"], replies, strict=True):
            if topic:
                steps.setdefault(topic, set()).add(reply.split("\n")[1])
    assert {len(different) for different in steps.values()} <= ({4} if lang == "en" else {3, 4})


@pytest.mark.parametrize("split", ["train", "held_out"])
def test_every_answer_passes_its_own_judge(split):
    for row in rows_of(split):
        for reply, right in answers(row):
            assert judged(reply, product=row["product"], right_help=right) == (True, True)


def test_every_chinese_answer_has_the_house_style():
    for row in ALL_ROWS["zh"]:
        topics = [topic for topic in row["topics"] if topic]
        for topic, (reply, right) in zip(topics, answers(row), strict=True):
            first, second, last = reply.split("\n")
            assert first == f"关于：{row['product']}，{topic}"
            assert second.startswith("下一步：") and second.endswith("。")
            assert last.endswith(" — Mossbell 客服") and last != " — Mossbell 客服"
            assert sum(words in second for words in right) == 1 and len(right) == 2
            assert judged(reply, product=row["product"], right_help=right) == (True, True)
            assert judged(reply.replace("下一步：", ""), product=row["product"], right_help=right) == (False, True)
            assert judged(reply, product="另一台", right_help=["别的词"]) == (False, False)


@pytest.mark.parametrize(("lang", "topics"), [("en", 10), ("zh", 8)])
def test_the_help_of_another_topic_is_not_right(lang, topics):
    """Each topic's answers, judged by every other topic's help: never both."""
    rows = ALL_ROWS[lang]
    help_of = {
        topic: right for row in rows for topic, right in zip(row["topics"], row["right_help"], strict=True) if topic
    }
    replies = {topic: reply for row in rows for reply, _ in answers(row) for topic in row["topics"][-1:] if topic}
    assert len(help_of) >= topics
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
