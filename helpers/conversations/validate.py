"""Check conversations before anything is rendered or tokenized: what is wrong in which row, and which rows are fit."""

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from helpers.base import InputError, Table
from helpers.conversations.forms import Turn, quoted
from helpers.messages import N_, _

_SPECIAL = re.compile(r"<\|\w+\|>")
SMALLEST = 5  # conversations: of fewer, none can be held out
SHOWN = 5  # rows that a report quotes

MEANINGS = {
    "unreadable": N_("a line that cannot be read"),
    "wrong_nesting": N_("not a list of messages"),
    "empty_conversation": N_("no messages"),
    "tool_call": N_("functions that are offered or called: only text is trained"),
    "two_systems": N_("one system prompt in a column, another in the conversation"),
    "unknown_role": N_("a role that is none of system, user (human), assistant (gpt)"),
    "missing_content": N_("a message without text"),
    "content_not_text": N_("text that is a number, a list or anything else"),
    "empty_content": N_("text that is empty or white space"),
    "invalid_unicode": N_("a byte that is not UTF-8, or half a character"),
    "special_token": N_("a special token in the text, which would begin or end a turn"),
    "late_system": N_("a system message behind the first message"),
    "starts_with_assistant": N_("an answer before the first question"),
    "repeated_user": N_("two questions in a row"),
    "repeated_assistant": N_("two answers in a row"),
    "ends_with_user": N_("a last question without an answer"),
    "no_answer": N_("nothing to train on"),
    "duplicate": N_("the same conversation as an earlier row's"),
    "refused": N_("the chat template does not accept it"),
    "too_long": N_("more tokens than max_tokens"),
}
# What helps where most rows are dropped for one of these; "": where none is dropped.
FIXES = {
    "": N_("add conversations"),
    "too_long": N_("raise MAX_SEQ_LENGTH, or shorten the conversations"),
    "tool_call": N_("take conversations without function calls"),
    "unknown_role": N_("rename the roles to user and assistant"),
    "refused": N_("change what the template does not accept, or take another CHAT_TEMPLATE"),
    "duplicate": N_("add conversations that differ"),
    "invalid_unicode": N_("save the file again as UTF-8 (in Excel: CSV UTF-8)"),
}
USUAL_FIX = N_("correct what the table names")


class Problem(NamedTuple):
    """One problem of one row; a row may have several. `place` is where it stands: "line 4" of a file, or "row 3"."""

    row: int
    code: str
    message: str
    place: str


@dataclass(frozen=True, repr=False)
class ConversationReport(Table):
    """What became of every row; `rows` is always `len(valid_rows) + len(dropped_rows)`.

    Attributes:
        rows: how many rows were read.
        problems: every problem of every row, in the order of the rows.
        valid_rows: the numbers of the rows that are kept, from 0.
        dropped_rows: the numbers of the others.
        notes: how the rows were read, in sentences.
        source: {path: sha256} of the file or the files that were read; of others nothing.
    """

    rows: int
    problems: tuple[Problem, ...]
    valid_rows: tuple[int, ...]
    dropped_rows: tuple[int, ...]
    notes: tuple[str, ...] = ()
    source: Mapping[str, str] = field(default_factory=dict)

    @property
    def ok(self) -> bool:
        """Whether every row can be kept."""
        return not self.dropped_rows

    def raise_if_failed(self) -> None:
        """Raises InputError, below the table, where fewer than `SMALLEST` rows are left: none could be held out.

        So it does where more rows are no UTF-8 than are left: then the file is in another encoding.
        """
        codes = [problem.code for problem in self.problems]
        if len(self.valid_rows) < SMALLEST or codes.count("invalid_unicode") > len(self.valid_rows):
            print(self, flush=True)
            fit, usual = len(self.valid_rows), max(codes, key=codes.count, default="")
            found = _("{fit} of {rows} conversations that can be trained on", fit=fit, rows=self.rows)
            expected = _("{smallest} or more", smallest=SMALLEST)
            raise InputError("DATASET", found=found, expected=expected, fix=_(FIXES.get(usual, USUAL_FIX)))

    def _title(self) -> str:
        return _(
            "Conversations: {rows:,} rows, {fit:,} fit, {dropped:,} to drop",
            rows=self.rows,
            fit=len(self.valid_rows),
            dropped=len(self.dropped_rows),
        )

    def _table(self) -> tuple[list[str], list[list[object]]]:
        places: dict[str, dict[str, None]] = {}  # of each code, in order and once
        for problem in self.problems:
            places.setdefault(problem.code, {})[problem.place] = None
        table = []
        for code in sorted(places, key=list(MEANINGS).index):
            first = ", ".join(list(places[code])[:3]) + (", …" if len(places[code]) > 3 else "")
            table.append([code, f"{len(places[code]):,}", first, _(MEANINGS[code])])
        return [_("problem"), _("rows"), _("which"), _("what it means")], table

    def _notes(self) -> list[str]:
        firsts: dict[str, Problem] = {}
        for problem in self.problems:
            firsts.setdefault(problem.code, problem)
        shown = list(firsts.values())[:SHOWN]
        told = [_("{place}: {message}.", place=problem.place, message=problem.message) for problem in shown]
        return [*told, *self.notes]


def special_pattern(tokenizer) -> re.Pattern:
    if tokenizer is None:
        return _SPECIAL
    added = tokenizer.added_tokens_decoder.values()  # one that is not special, such as Qwen's <think>, is text
    tokens = [token.content for token in added if token.special and token.content.strip()]
    # longest first; with no special tokens at all nothing matches
    return re.compile("|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or "(?!)")


def problems_of(turns: Sequence[Turn], special: re.Pattern) -> Iterator[tuple[str, str]]:
    """(code, message) of what is wrong with one conversation by itself."""
    for turn in turns:
        if turn.role is None:
            yield "unknown_role", _("{turn} has the role {role}", turn=turn.name, role=quoted(turn.said))
        yield from _text_problems(turn, special)
    yield from _order_problems([turn.role for turn in turns])


def _text_problems(turn: Turn, special: re.Pattern) -> Iterator[tuple[str, str]]:
    text = turn.text
    if text is None:
        yield "missing_content", _("{turn} has no text", turn=turn.name)
    elif not isinstance(text, str):
        yield "content_not_text", _("{turn} holds {value}", turn=turn.name, value=quoted(text))
    elif not text or text.isspace():
        yield "empty_content", _("{turn} is {text!r}", turn=turn.name, text=text)
    else:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            value, at = ascii(text[error.start]), error.start
            yield "invalid_unicode", _("{turn} holds {value} at character {at}", turn=turn.name, value=value, at=at)
        match = special.search(text)
        if match:
            value, at = match[0], match.start()
            yield "special_token", _("{turn} holds {value} at character {at}", turn=turn.name, value=value, at=at)


def _order_problems(roles: list[str | None]) -> Iterator[tuple[str, str]]:
    for number, (before, role) in enumerate(zip([None, *roles], roles, strict=False)):
        if role == "system" and number:
            yield "late_system", _("message {number} is a system message", number=number)
        elif role is not None and role == before:
            message = _("messages {one} and {two} are both from the {role}", one=number - 1, two=number, role=role)
            yield f"repeated_{role}", message
    talk = [role for role in roles if role != "system"]
    if talk and talk[0] == "assistant":
        yield "starts_with_assistant", _("the first message is an answer")
    if talk and talk[-1] == "user":
        yield "ends_with_user", _("the last message is a question")
    if "assistant" not in talk and None not in talk:
        yield "no_answer", _("there is no assistant message")


def digest(messages: Sequence[Mapping[str, str]]) -> bytes:
    """Equal for conversations that are equal but for white space around a message, which is not trained."""
    text = "\0".join(f"{message['role']}\1{message['content'].strip()}" for message in messages)
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def template_problems(messages: list[dict], tokenizer: Any, max_tokens: int | None) -> Iterator[tuple[str, str]]:
    """What the chat template, where there is one, and the tokenizer say to a conversation."""
    from helpers.template.check import training_text

    if not tokenizer.chat_template:
        return
    try:
        text = training_text(tokenizer, messages)
    except Exception as error:  # a template raises whatever it likes
        kind = type(error).__name__
        yield "refused", _("the chat template says {kind}: {error}", kind=kind, error=error)
        return
    if max_tokens is None or len(text.encode()) + 2 <= max_tokens:  # a token but BOS and EOS holds a byte
        return
    tokens = len(tokenizer(text).input_ids)
    if tokens > max_tokens:
        message = _(
            "{tokens:,} tokens, {more:,} more than {limit:,}", tokens=tokens, more=tokens - max_tokens, limit=max_tokens
        )
        yield "too_long", message
