"""The reader's choices, each held against what it may be, before anything is loaded."""

import math
import os
import re
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from helpers.base import InputError
from helpers.environment.hub import read_endpoint
from helpers.messages import N_, _

# Written by Unsloth and llama-quantize under these names, with fewer bits than 16 and without an importance matrix.
GGUF_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s")
GGUF_TYPES += ("q5_k_m", "q6_k", "q8_0")
FORMS = ("adapter", "merged", "gguf")
# As the Hub has it: letters, digits, "_", "-" and "."; no "--", no "..", and a word's character at both ends.
REPOSITORY = re.compile(r"(?!.*(--|\.\.|\.git$))\w([\w.-]*\w)?/\w([\w.-]{0,94}\w)?", re.ASCII)
ELSEWHERE = re.compile(r"[A-Za-z][\w+.-]*:|.*\\")  # gs://bucket, s3://bucket, C:\folder, \\server\folder
MOST_SHOWN = 80  # characters of a value that is refused


@dataclass(frozen=True)
class Rule:
    """What a choice may be, in words and as a test, which calls no method of an object of an unknown type."""

    message: str
    holds: Callable[[Any], bool]
    values: Mapping[str, Any] = field(default_factory=dict)  # for the message's places

    @property
    def expected(self) -> str:
        return _(self.message, **self.values)


def _whole(smallest: int, largest: int) -> Rule:
    message = N_("a whole number from {smallest:,} to {largest:,}")
    values = {"smallest": smallest, "largest": largest}
    return Rule(message, lambda value: type(value) is int and smallest <= value <= largest, values)


def _one_of(*values: Any) -> Rule:
    def holds(value: Any) -> bool:
        return any(type(value) is type(each) and value == each for each in values)

    message = N_("{a!r} or {b!r}") if len(values) == 2 else N_("{a!r} or {b!r} or {c!r}")
    return Rule(message, holds, dict(zip("abc", values, strict=False)))


def _or_nothing(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: type(value) is str and (value == "" or holds(value))


def _is_rate(value: Any) -> bool:
    return type(value) in (int, float) and 0 < value <= 1


def _is_epochs(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value <= 1000 and math.copysign(1, value) == 1


def _is_name(value: Any) -> bool:
    """One line of text without characters that are not seen, such as zero-width ones."""
    return type(value) is str and 0 < len(value) < 1000 and value.isprintable() and value == value.strip()


def _are_columns(value: Any) -> bool:
    return _is_name(value) and all(name.strip() for name in value.split(","))


def _is_path(value: Any) -> bool:
    """A name, or a path that the system takes: it and its parts are not too long, and a `~user` is known."""
    if not _is_name(value) or os.path.expanduser(value).startswith("~"):
        return False
    return len(os.fsencode(value)) < 1000 and all(len(os.fsencode(part)) <= 255 for part in value.split("/"))


def _is_folder(value: Any) -> bool:
    return _is_path(value) and not ELSEWHERE.match(value)


def _folder(example: str) -> Rule:
    return Rule(N_("a folder of this machine, such as {example!r}"), _is_folder, {"example": example})


def _is_endpoint(value: Any) -> bool:
    try:
        return _is_name(value) and read_endpoint(value) != ""
    except InputError:
        return False


def _are_types(value: Any) -> bool:
    names = type(value) is list and all(type(each) is str for each in value)
    return names and set(value) <= set(GGUF_TYPES) and len(set(value)) == len(value)


RULES: dict[str, Rule] = {
    "MODEL_NAME": Rule(N_("a name on the hub, such as 'unsloth/Llama-3.2-3B-Instruct', or a folder"), _is_path),
    "CHAT_TEMPLATE": Rule(
        N_("a name that Unsloth knows, such as 'llama-3.1', or '' for the model's own"), _or_nothing(_is_name)
    ),
    "DATASET": Rule(N_("a name on the hub, such as 'mlabonne/FineTome-100k', or a file"), _is_path),
    "COLUMNS": Rule(N_("names of columns, such as 'question, answer', or ''"), _or_nothing(_are_columns)),
    "GENERAL": Rule(N_("a file of questions and answers"), _is_path),
    "ROWS": _whole(5, 10_000_000),
    "EVAL_ROWS": _whole(1, 100_000),
    "MAX_SEQ_LENGTH": _whole(16, 131_072),
    "MAX_STEPS": _whole(1, 1_000_000),
    "EPOCHS": Rule(N_("a number from 0 to 1,000"), _is_epochs),
    "KEEP_BEST": _one_of(False, True),
    "MICRO_BATCH": _whole(1, 1_024),
    "ACCUMULATION": _whole(1, 1_024),
    "CHECKPOINTING": _one_of(False, True, "unsloth"),
    "PADDING_FREE": _one_of(False, True),
    "LEARNING_RATE": Rule(N_("a number above 0 and at most 1, such as 2e-4"), _is_rate),
    "MAX_NEW_TOKENS": _whole(1, 8_192),
    "PROCESSES": _whole(0, 1_024),
    "GROW_BATCH": _one_of(False, True),
    "START_AFRESH": _one_of(False, True),
    "USE_MODELSCOPE": _one_of(False, True),
    "HF_ENDPOINT": Rule(N_("an address such as 'https://hf-mirror.com', or ''"), _or_nothing(_is_endpoint)),
    "RUN_DIR": _folder("runs/llama"),
    "SCALED_DIR": _folder("runs/scaled"),
    "DRIVE_DIR": Rule(
        N_("a folder of this machine, such as '/content/drive/MyDrive/llama', or ''"), _or_nothing(_is_folder)
    ),
    "GGUF": Rule(N_("a list of types out of {types}, each once, or []"), _are_types, {"types": ", ".join(GGUF_TYPES)}),
    "PUSH_TO": Rule(N_("'your-name/your-model', or ''"), _or_nothing(lambda value: bool(REPOSITORY.fullmatch(value)))),
    "PUSH_FORM": _one_of(*FORMS),
    "LOAD_IN_4BIT": _one_of(False, True),  # this and the next two: the quickstart's, which the headless runner checks
    "OUTPUT_DIR": _folder("quickstart"),
    "REQUIREMENTS": Rule(N_("an address, or a file of packages"), _is_path),
}


def check_choices(names: Mapping[str, Any]) -> None:
    """Hold every choice against its rule.

    Args:
        names: {name: value}, such as `globals()`; names without a rule are passed over.

    Example:
        >>> check_choices({"MAX_STEPS": 0})
        InputError: MAX_STEPS: found 0, expected a whole number from 1 to 1,000,000. Fix: correct MAX_STEPS in
        Choices.
    """
    for name, rule in RULES.items():
        if name in names and not rule.holds(names[name]):
            fix = _("correct {name} in Choices", name=name)
            raise InputError(name, found=shown(names[name]), expected=rule.expected, fix=fix)


def shown(value: Any) -> str:
    """Any value as one line says it: cut, with codes for what is not seen, and without an address's password.

    Example: "a\\u200bb" -> "'a\\\\u200bb'", and a number of 5,000 digits -> "a value of type int"
    """
    short, size = reprlib.Repr(), 0
    short.maxstring = short.maxother = short.maxlong = MOST_SHOWN
    if type(value) is str:
        size = len(value)
        value = re.sub("//[^/]*@", "//…@", value)
    try:
        text = short.repr(value)
    except Exception:
        return _("a value of type {type}", type=type(value).__name__)
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    text = text if len(text) <= MOST_SHOWN else f"{text[:MOST_SHOWN]}…"
    return _("{text} ({size:,} characters)", text=text, size=size) if size > MOST_SHOWN else text


def bare(name: str, *, most: int = MOST_SHOWN) -> str:
    """A name without quotes where it is one line of at most so many letters, all seen, else as `shown` says it."""
    return name if name.isprintable() and 0 < len(name.strip()) and len(name) <= most else shown(name)
