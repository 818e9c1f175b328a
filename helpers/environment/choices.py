"""The reader's choices, each held against what it may be, before anything is loaded."""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from helpers.base import InputError

# Written by Unsloth and llama-quantize under these names, with fewer bits than 16 and without an importance matrix.
GGUF_TYPES = ("q2_k", "q3_k_s", "q3_k_m", "q3_k_l", "q4_0", "q4_1", "q4_k_s", "q4_k_m", "q5_0", "q5_1", "q5_k_s")
GGUF_TYPES += ("q5_k_m", "q6_k", "q8_0")
FORMS = ("adapter", "merged", "gguf")


@dataclass(frozen=True)
class Rule:
    """What a choice may be, in words and as a test."""

    expected: str
    holds: Callable[[Any], bool]


def _whole(smallest: int, largest: int) -> Rule:
    def holds(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and smallest <= value <= largest

    return Rule(f"a whole number from {smallest:,} to {largest:,}", holds)


def _one_of(*values: Any) -> Rule:
    def holds(value: Any) -> bool:
        return any(type(value) is type(each) and value == each for each in values)

    return Rule(" or ".join(map(repr, values)), holds)


def _is_rate(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 < value <= 1


def _is_epochs(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1000


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and value.isprintable() and value == value.strip()


def _is_name(value: Any) -> bool:
    return _is_text(value) and value != ""


def _is_folder(value: Any) -> bool:
    elsewhere = re.compile(r"[A-Za-z][\w+.-]*:")  # gs://bucket, s3://bucket, C:\folder
    return _is_name(value) and len(value) < 1000 and not elsewhere.match(value)


RULES: dict[str, Rule] = {
    "MODEL_NAME": Rule("a name on the hub, such as 'unsloth/Llama-3.2-3B-Instruct', or a folder", _is_name),
    "CHAT_TEMPLATE": Rule("a name that Unsloth knows, such as 'llama-3.1', or '' for the model's own", _is_text),
    "DATASET": Rule("a name on the hub, such as 'mlabonne/FineTome-100k', or a file", _is_name),
    "COLUMNS": Rule("names of columns, such as 'question, answer', or ''", _is_text),
    "GENERAL": Rule("a file of questions and answers", _is_name),
    "ROWS": _whole(5, 10_000_000),
    "EVAL_ROWS": _whole(1, 100_000),
    "MAX_SEQ_LENGTH": _whole(16, 131_072),
    "MAX_STEPS": _whole(1, 1_000_000),
    "EPOCHS": Rule("a number from 0 to 1,000", _is_epochs),
    "KEEP_BEST": _one_of(False, True),
    "MICRO_BATCH": _whole(1, 1_024),
    "ACCUMULATION": _whole(1, 1_024),
    "CHECKPOINTING": _one_of(False, True, "unsloth"),
    "PADDING_FREE": _one_of(False, True),
    "LEARNING_RATE": Rule("a number above 0 and at most 1, such as 2e-4", _is_rate),
    "MAX_NEW_TOKENS": _whole(1, 8_192),
    "START_AFRESH": _one_of(False, True),
    "USE_MODELSCOPE": _one_of(False, True),
    "HF_ENDPOINT": Rule("an address such as 'https://hf-mirror.com', or ''", _is_text),
    "RUN_DIR": Rule("a folder, such as 'runs/llama'", _is_folder),
    "DRIVE_DIR": Rule(
        "a folder, such as '/content/drive/MyDrive/llama', or ''", lambda value: value == "" or _is_folder(value)
    ),
    "GGUF": Rule(
        f"a list of types out of {', '.join(GGUF_TYPES)}, or []",
        lambda value: isinstance(value, list) and all(each in GGUF_TYPES for each in value),
    ),
    "PUSH_TO": Rule(
        "'your-name/your-model', or ''",
        lambda value: value == "" or (isinstance(value, str) and bool(re.fullmatch(r"[\w.-]+/[\w.-]{1,96}", value))),
    ),
    "PUSH_FORM": _one_of(*FORMS),
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
            found = repr(names[name])
            found = found if len(found) <= 80 else f"{found[:80]}…"
            raise InputError(name, found=found, expected=rule.expected, fix=f"correct {name} in Choices")
