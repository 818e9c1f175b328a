"""Check conversations before anything is rendered or tokenized: what is wrong in which row, and which rows are fit."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from helpers.base import InputError, Table

# the names that Unsloth's standardize_sharegpt knows; it ignores case and spaces around them
_ROLES = {"system": "system", "user": "user", "human": "user", "input": "user"}
_ROLES |= {"assistant": "assistant", "gpt": "assistant", "output": "assistant"}
_FORMATS = {"ShareGPT": ("from", "value"), "role/content": ("role", "content")}
_SPECIAL = re.compile(r"<\|\w+\|>")
SMALLEST = 5  # conversations: of fewer, none can be held out

MEANINGS = {
    "wrong_nesting": "not a list of messages",
    "empty_conversation": "no messages",
    "mixed_format": "ShareGPT and role/content in one dataset",
    "unknown_role": "a role that is none of system, user (human), assistant (gpt)",
    "missing_content": "a message without text",
    "content_not_text": "text that is a number, a list or anything else",
    "empty_content": "text that is empty or white space",
    "invalid_unicode": "half a character (a lone surrogate)",
    "special_token": "a special token in the text, which would begin or end a turn",
    "late_system": "a system message behind the first message",
    "starts_with_assistant": "an answer before the first question",
    "repeated_user": "two questions in a row",
    "repeated_assistant": "two answers in a row",
    "ends_with_user": "a last question without an answer",
    "no_answer": "nothing to train on",
    "duplicate": "the same conversation as an earlier row's",
    "refused": "the chat template does not accept it",
    "too_long": "more tokens than max_tokens",
}


class Problem(NamedTuple):
    """One problem of one row; a row may have several."""

    row: int
    code: str
    message: str


@dataclass(frozen=True, repr=False)
class ConversationReport(Table):
    """What `validate_conversations` found; `rows` is always `len(valid_rows) + len(dropped_rows)`.

    Attributes:
        rows: how many rows were read.
        problems: every problem of every row, in the order of the rows.
        valid_rows: the numbers of the rows to keep: `dataset.select(report.valid_rows)`.
        dropped_rows: the numbers of the others.
    """

    rows: int
    problems: tuple[Problem, ...]
    valid_rows: tuple[int, ...]
    dropped_rows: tuple[int, ...]

    @property
    def ok(self) -> bool:
        """Whether every row can be kept."""
        return not self.dropped_rows

    def raise_if_failed(self) -> None:
        """Raises InputError where fewer than `SMALLEST` rows are left: none of them could be held out."""
        if len(self.valid_rows) < SMALLEST:
            found = f"{len(self.valid_rows)} of {self.rows} conversations that can be trained on"
            fix = "correct what the table names, add conversations, or raise MAX_SEQ_LENGTH"
            raise InputError("DATASET", found=found, expected=f"{SMALLEST} or more", fix=fix)

    def _title(self) -> str:
        return f"Conversations: {self.rows:,} rows, {len(self.valid_rows):,} fit, {len(self.dropped_rows):,} to drop"

    def _table(self) -> tuple[list[str], list[list[object]]]:
        found: dict[str, list[int]] = {}
        for row, code, _ in self.problems:
            found.setdefault(code, []).append(row)
        table = []
        for code in sorted(found, key=list(MEANINGS).index):
            rows = list(dict.fromkeys(found[code]))
            first = ", ".join(map(str, rows[:3])) + (", …" if len(rows) > 3 else "")
            table.append([code, f"{len(rows):,}", first, MEANINGS[code]])
        return ["problem", "rows", "which", "what it means"], table


def validate_conversations(dataset, *, tokenizer=None, max_tokens: int | None = None) -> ConversationReport:
    """Read every conversation and say what is wrong with it.

    Args:
        dataset: a `datasets.Dataset` or a list of dicts with a column `conversations` (or `messages`): lists of
            `{"from": "human", "value": "Hi"}` (ShareGPT) or of `{"role": "user", "content": "Hi"}`.
        tokenizer: its special tokens are looked for in the texts; without it whatever looks like `<|word|>` is.
        max_tokens: rows that render to more tokens than this are `too_long`; needs the tokenizer.

    Example:
        >>> report = validate_conversations([{"conversations": [{"from": "human", "value": "Hi"}]}])
        >>> report.problems[0]
        Problem(row=0, code='ends_with_user', message='the last message is a question')
        >>> report.valid_rows
        ()
    """
    from tqdm import tqdm

    if max_tokens is not None and tokenizer is None:
        expected = "the tokenizer that counts them"
        raise InputError("max_tokens", found="no tokenizer", expected=expected, fix="pass tokenizer=")
    special = _special_pattern(tokenizer)
    found: list[list[tuple[str, str]]] = []  # of each row
    forms: list[str | None] = []
    seen: dict[bytes, int] = {}
    # nothing is shown for what takes less than two seconds, so that recorded outputs stay as they are
    rows = tqdm(_conversations(dataset), total=len(dataset), desc="Validating", unit=" rows", delay=2, leave=False)
    for row, conversation in enumerate(rows):
        problems = list(_problems(conversation, special))
        messages = _plain(conversation)
        forms.append(_form_of_all(conversation) if messages else None)
        if messages:
            first_row = seen.setdefault(_digest(messages), row)
            if first_row != row:
                problems.append(("duplicate", f"the same as row {first_row}"))
            if max_tokens is not None and not problems:
                problems += _length_problems(messages, tokenizer, max_tokens)
        found.append(problems)
    usual = max(_FORMATS, key=forms.count)
    for problems, form in zip(found, forms, strict=True):
        if form not in (None, usual):
            problems.append(("mixed_format", f"{form}, where most rows are {usual}"))
    dropped = tuple(row for row, problems in enumerate(found) if problems)
    return ConversationReport(
        rows=len(found),
        problems=tuple(Problem(row, *problem) for row, problems in enumerate(found) for problem in problems),
        valid_rows=tuple(sorted(set(range(len(found))) - set(dropped))),
        dropped_rows=dropped,
    )


def _special_pattern(tokenizer) -> re.Pattern:
    if tokenizer is None:
        return _SPECIAL
    tokens = [token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()]
    # longest first; with no special tokens at all nothing matches
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def _conversations(dataset) -> Iterator[object]:
    """Each row's conversation, whatever it is; a row that is no dict comes as a text, which is no conversation."""
    if hasattr(dataset, "column_names"):  # a datasets.Dataset: a thousand rows at a time is ten times faster
        column = next((name for name in ("conversations", "messages") if name in dataset.column_names), None)
        if column is None:
            raise InputError(
                "dataset",
                found=f"the columns {dataset.column_names}",
                expected="a column 'conversations' or 'messages'",
                fix="rename the column that holds the conversations",
            )
        for first in range(0, len(dataset), 1000):
            yield from dataset[first : first + 1000][column]
    else:
        for row in dataset:
            if isinstance(row, Mapping):
                yield row["conversations"] if "conversations" in row else row.get("messages")
            else:
                yield _quote(row)


def _format_of(message: Mapping) -> str | None:
    """Which of the two forms a message has; Arrow gives absent keys as None."""
    return next((name for name, keys in _FORMATS.items() if any(message.get(key) is not None for key in keys)), None)


def _plain(conversation: object) -> list[dict] | None:
    """The conversation as role and content; None where that cannot be done."""
    if not isinstance(conversation, Sequence) or not conversation:
        return None
    messages = []
    for message in conversation:
        form = _format_of(message) if isinstance(message, Mapping) else None
        if form is None:
            return None
        role_key, text_key = _FORMATS[form]
        role, text = message.get(role_key), message.get(text_key)
        role = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        if role is None or not isinstance(text, str):
            return None
        messages.append({"role": role, "content": text})
    return messages


def _problems(conversation: object, special: re.Pattern) -> Iterator[tuple[str, str]]:
    """What is wrong with a conversation by itself."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str | bytes):
        yield "wrong_nesting", f"{_quote(conversation)} in place of a list of messages"
        return
    if not conversation:
        yield "empty_conversation", "the list of messages is empty"
        return
    roles = []
    for number, message in enumerate(conversation):
        if not isinstance(message, Mapping):
            yield "wrong_nesting", f"message {number} is {_quote(message)}"
            return
        form = _format_of(message)
        role_key, text_key = _FORMATS[form or "role/content"]
        role, text = message.get(role_key), message.get(text_key)
        known = _ROLES.get(role.strip().lower()) if isinstance(role, str) else None
        roles.append(known)
        if known is None:
            yield "unknown_role", f"message {number} has the role {_quote(role)}"
        yield from ((code, f"message {number} {what}") for code, what in _text_problems(text, special))
    yield from _order_problems(roles)


def _text_problems(text: object, special: re.Pattern) -> Iterator[tuple[str, str]]:
    if text is None:
        yield "missing_content", "has no text"
    elif not isinstance(text, str):
        yield "content_not_text", f"holds {_quote(text)}"
    elif not text or text.isspace():
        yield "empty_content", f"is {text!r}"
    else:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            yield "invalid_unicode", f"holds {text[error.start]!a} at character {error.start}"
        match = special.search(text)
        if match:
            yield "special_token", f"holds {match[0]} at character {match.start()}"


def _order_problems(roles: list[str | None]) -> Iterator[tuple[str, str]]:
    for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False)):
        if role == "system" and number:
            yield "late_system", f"message {number} is a system message"
        elif role is not None and role == before:
            yield f"repeated_{role}", f"messages {number - 1} and {number} are both from the {role}"
    talk = [role for role in roles if role != "system"]
    if talk and talk[0] == "assistant":
        yield "starts_with_assistant", "the first message is an answer"
    if talk and talk[-1] == "user":
        yield "ends_with_user", "the last message is a question"
    if "assistant" not in talk and None not in talk:
        yield "no_answer", "there is no assistant message"


def _form_of_all(conversation: Sequence[Mapping]) -> str:
    return " and ".join(sorted({_format_of(message) for message in conversation}))


def _digest(messages: list[dict]) -> bytes:
    text = "\0".join(f"{message['role']}\1{message['content']}" for message in messages)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def _length_problems(messages: list[dict], tokenizer, max_tokens: int) -> Iterator[tuple[str, str]]:
    from helpers.template.check import training_text

    try:
        text = training_text(tokenizer, messages)
    except Exception as error:  # a template raises whatever it likes
        yield "refused", f"the chat template says {type(error).__name__}: {error}"
        return
    tokens = len(tokenizer(text).input_ids)
    if tokens > max_tokens:
        yield "too_long", f"{tokens:,} tokens, {tokens - max_tokens:,} more than {max_tokens:,}"


def _quote(value: object, width: int = 40) -> str:
    text = ascii(value)
    return text if len(text) <= width else text[:width] + "…"
