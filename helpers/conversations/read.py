"""One door for conversations: any common file, form or data set becomes rows of `role` and `content`, or is told."""

import os
from collections.abc import Sequence
from typing import Any

from helpers.base import InputError, hash_files
from helpers.conversations.forms import Form, Turn, Unfit, find_form, grouped, turns_of
from helpers.conversations.source import Row, find_path, read_rows
from helpers.conversations.validate import (
    ConversationReport,
    Problem,
    digest,
    problems_of,
    special_pattern,
    template_problems,
)
from helpers.messages import _


def read_conversations(
    source: Any,
    *,
    columns: str | Sequence[str] = (),
    keep_columns: Sequence[str] = (),
    rows: int | None = None,
    tokenizer: Any = None,
    max_tokens: int | None = None,
) -> tuple[Any, ConversationReport]:
    """Read conversations of any common form; what is wrong with a row drops that row, and the report says why.

    Args:
        source: a file (.json, .jsonl, .ndjson, .csv, .tsv, .parquet, also with .gz), a folder of them, a name on the
            Hub (`owner/name` or `owner/name:split`), a `datasets.Dataset`, or a list of rows.
        columns: where the form is not clear, one name, of the column with the conversations; or those of the question
            and, last, of the answer. A text holds them between commas.
        keep_columns: columns to keep beside the conversations, of those that the rows have.
        rows: read only so many, from the top.
        tokenizer: its special tokens are looked for in the texts, and its chat template has to accept each row;
            without it whatever looks like `<|word|>` counts as a special token.
        max_tokens: rows that render to more tokens than this are `too_long`; needs the tokenizer.

    Returns:
        A `datasets.Dataset` of the fit rows, in order, with the column `conversations`: lists of
        `{"role": "user", "content": "Hi"}`, roles system, user and assistant, every text as it stood in the source;
        and the report.

    Raises:
        InputError: there is no such source, it cannot be read as a whole, or its form is unknown or not clear.

    Example:
        >>> dataset, report = read_conversations([{"question": "Hi?", "reply": "Hello!"}])
        >>> dataset[0]["conversations"]
        [{'role': 'user', 'content': 'Hi?'}, {'role': 'assistant', 'content': 'Hello!'}]
        >>> report.notes
        ('Read as questions and answers: `question`, `reply`.',)
    """
    import pyarrow
    from datasets import Dataset

    if max_tokens is not None and tokenizer is None:
        expected = _("the tokenizer that counts them")
        raise InputError("max_tokens", found=_("no tokenizer"), expected=expected, fix=_("pass tokenizer="))
    named = isinstance(source, str | os.PathLike)
    where = f"DATASET {source}" if named else "dataset"
    found, note = read_rows(source)
    if isinstance(columns, str):
        columns = [name.strip() for name in columns.split(",") if name.strip()]
    form = find_form(found, where=where, columns=columns, keep=keep_columns) if found else Form("turns")
    found = grouped(found, form, where=where) if form.kind == "spread" else found
    cut = ""
    if rows is not None and rows < len(found):
        cut = _("The first {rows:,} of {all:,} were read.", rows=rows, all=len(found))
    found = found[:rows]
    conversations, problems = _conversations(found, form, tokenizer=tokenizer, max_tokens=max_tokens)
    dropped = {problem.row for problem in problems}
    valid = [number for number in range(len(found)) if number not in dropped]
    report = ConversationReport(
        rows=len(found),
        problems=tuple(problems),
        valid_rows=tuple(valid),
        dropped_rows=tuple(sorted(dropped)),
        notes=tuple(filter(None, (note, form.title, cut))),
        source=_checksums(os.fspath(source)) if named else {},
    )
    turns = pyarrow.list_(pyarrow.struct([("role", pyarrow.string()), ("content", pyarrow.string())]))
    content = {"conversations": pyarrow.array([conversations[number] for number in valid], turns)}
    content |= _kept_columns([found[number] for number in valid], keep_columns, where=where)
    return Dataset.from_dict(content), report


def validate_conversations(dataset: Any, **options: Any) -> ConversationReport:
    """The report of `read_conversations` alone, which takes the same arguments."""
    return read_conversations(dataset, **options)[1]


def _checksums(source: str) -> dict[str, str]:
    """{path: sha256} of a file, or of all files of a folder; of a name on the Hub nothing."""
    path = find_path(source)
    if path is None:
        return {}
    folder = path if path.is_dir() else path.parent
    return {str(folder / name): sha256 for name, sha256 in hash_files(path).items()}


def _conversations(
    rows: Sequence[Row], form: Form, *, tokenizer: Any, max_tokens: int | None
) -> tuple[list[list[dict]], list[Problem]]:
    """Each row as messages, and every problem; of a row with problems the messages are worth nothing."""
    from tqdm import tqdm

    special = special_pattern(tokenizer)
    conversations, found, seen = [], [], {}
    # nothing is shown for what takes less than two seconds, so that recorded outputs stay as they are
    for number, row in enumerate(tqdm(rows, desc=_("Reading"), unit=_(" rows"), delay=2, leave=False)):
        turns: list[Turn] = []
        try:
            turns = turns_of(row.value, form)
            problems = list(problems_of(turns, special))
        except Unfit as unfit:
            problems = [(unfit.code, unfit.message)]
        messages = [{"role": turn.role, "content": turn.text} for turn in turns]
        if messages and all(turn.role and isinstance(turn.text, str) for turn in turns):
            first = seen.setdefault(digest(messages), row.place)
            if first != row.place:
                problems.append(("duplicate", _("the same as {place}", place=first)))
            if tokenizer is not None and not problems:
                problems += template_problems(messages, tokenizer, max_tokens)
        conversations.append(messages)
        found += [Problem(number, code, message, row.place) for code, message in problems]
    return conversations, found


def _kept_columns(rows: Sequence[Row], names: Sequence[str], *, where: str) -> dict[str, list]:
    import pyarrow

    there = {name for row in rows if isinstance(row.value, dict) for name in row.value}
    kept = {name: [row.value.get(name) for row in rows] for name in names if name in there}
    for name, values in kept.items():
        try:
            pyarrow.array(values)
        except pyarrow.ArrowException as error:
            place = _("{where}, column {name}", where=where, name=name)
            found = _("values of several kinds ({error})", error=str(error).splitlines()[0][:80])
            fix = _("make them of one kind")
            raise InputError(place, found=found, expected=_("one kind"), fix=fix) from None
    return kept
