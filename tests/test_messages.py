"""The helpers' messages in both languages: none is missing, none is lost on the way, and plots can draw them."""

import warnings

import pytest
import wcwidth
from babel.messages.catalog import Message

from helpers import figures, messages
from helpers.base import InputError, text_table
from helpers.messages import N_, _, _n
from helpers.training.curves import Curves, draw_curves
from tests.maintain.messages import problems, problems_of, translations, unextracted, unmarked


@pytest.fixture
def reader(monkeypatch):
    """`reader(LANGUAGE=…)` sets the variables that say which language is read, and clears the others."""

    def variables(**values):
        for name in ("LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG", messages.PAGE):
            monkeypatch.delenv(name, raising=False)
        for name, value in values.items():
            monkeypatch.setenv(name, value)

    return variables


def test_every_message_is_there_in_both_languages():
    assert problems() == []
    assert len(translations()) > 900


@pytest.mark.parametrize(
    ("message", "translation", "problem"),
    [
        ("{rows} rows", "{rows} 行", ""),
        ("{rows} rows", "", "no translation"),
        ("{rows} rows", "行", "other places for values, rows"),
        ("{rows} rows", "{rows} 行，{columns} 列", "other places for values, columns"),
        ("{rows} rows", "{rows 行", "expected '}'"),
        (("{count} row", "{count} rows"), ("",), "no translation"),
        ("a base model", "一个基础模型", "基础模型 instead of 基座模型"),
    ],
)
def test_a_faulty_entry_is_seen(message, translation, problem):
    seen = list(problems_of(Message(message, translation), {"基础模型": "基座模型"}))
    assert len(seen) == bool(problem) and problem in "".join(seen)


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('raise InputError(where, found="no file", expected=x, fix=y)', 1),
        ('raise InputError(where, found=_("no file"), expected=x, fix=y)', 0),
        ('print(f"{n} rows")', 1),
        ('print(_n("{count} row", "{count} rows", n))', 0),
        ('def notes(self):\n    return ["The curves are not written any more."]', 1),
        ('NOTE = N_("The curves are not written any more.")', 0),
        ('"""A docstring of many words."""', 0),
    ],
)
def test_a_text_that_nothing_marks_is_seen(source, count):
    assert len(list(unmarked(source))) == count


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ('_("no file")', 0),
        ("f\"{_('no such word')}\"", 1),
        ('_(f"{n} rows")', 1),
        ('_("no " + word)', 1),
        ("_(FIXES[code])", 0),
    ],
)
def test_a_marked_text_that_is_not_extracted_is_seen(source, count):
    assert len(list(unextracted(source, {"no file"}))) == count


@pytest.mark.parametrize(
    ("variables", "chinese"),
    [
        ({}, False),
        ({"LANGUAGE": "zh_CN"}, True),
        ({"LANG": "zh_CN.UTF-8"}, True),
        ({"LANG": "zh_CN.UTF-8", "LANGUAGE": "en"}, False),
        ({"LANGUAGE": "de"}, False),
        ({messages.PAGE: "/home/me/notebooks/zh-CN/04_train.ipynb", "LANGUAGE": "en_US"}, True),
        ({messages.PAGE: "fileId=https%3A%2F%2Fgithub.com%2Fnotebooks%2Fzh-CN%2F04_train.ipynb"}, True),
        ({messages.PAGE: "/home/me/notebooks/04_train.ipynb"}, False),
    ],
)
def test_the_page_or_the_variables_say_the_language(reader, variables, chinese):
    reader(**variables)
    line = str(InputError("MAX_STEPS", found="0", expected="1", fix="x"))
    assert line == (
        "MAX_STEPS：实际：0；应为：1。解决办法：x。" if chinese else "MAX_STEPS: found 0, expected 1. Fix: x."
    )


def test_values_take_their_places_and_braces_in_values_stay(reader):
    reader()
    assert _("{rows:,} of {name!r}", rows=1200, name="{x}") == "1,200 of '{x}'"
    assert _n("{count} row", "{count} rows", 1) == "1 row" and _n("{count} row", "{count} rows", 2) == "2 rows"
    assert _("{a brace") == N_("{a brace") == "{a brace"


def picture_problems(draw):
    """What Matplotlib says of letters for which it has no font."""
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        figures.as_image(draw())
    return [str(each.message) for each in said if "missing from font" in str(each.message)]


def test_chinese_pictures_have_all_their_letters(reader, monkeypatch):
    reader(LANGUAGE="zh_CN")
    rows = ({"step": 1, **dict.fromkeys(("loss", "learning_rate", "memory_gib", "seconds"), 1.0)},)
    row = dict.fromkeys(("held_out_loss", "grad_norm", "tokens_per_second"), None) | rows[0]
    curves = Curves((row,), max_steps=60, is_gpu=True, total_gib=14.6)
    assert "第 1 步" in curves.title
    assert picture_problems(lambda: draw_curves(curves)) == []
    monkeypatch.setattr("helpers.training.curves.families", lambda: ["DejaVu Sans"])
    assert picture_problems(lambda: draw_curves(curves))


def test_without_a_chinese_font_pictures_are_in_english(reader, monkeypatch):
    reader(LANGUAGE="zh_CN")
    assert figures.label("{steps} steps in {duration}", steps=2, duration="3 s") == "2 步，用时 3 s"
    monkeypatch.setattr(figures, "families", lambda: ["sans-serif"])
    assert figures.label("{steps} steps in {duration}", steps=2, duration="3 s") == "2 steps in 3 s"


@pytest.mark.parametrize("cells", [("加载", "training"), ("生成 64 个词元", "ok")])
def test_columns_of_chinese_words_are_aligned(cells):
    """A Chinese letter takes two columns: tabulate counts so where wcwidth is installed, as on Colab."""
    lines = text_table(["阶段", "GiB"], [[cells[0], "2.50"], [cells[1], "12.00"]]).splitlines()
    assert {wcwidth.wcswidth(line) for line in lines} == {wcwidth.wcswidth(lines[1])}
    assert len({len(line) for line in lines}) > 1  # counted in letters they would not be
