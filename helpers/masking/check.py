"""Prove that a masked dataset trains on the answers and on nothing else.

The ground truth is read from the tokenizer's own chat template (`helpers.template.turns`), never from the marker
strings that `train_on_responses_only` was given: a wrong marker cannot fool the check as well. Every token is one of
- *must be trained*: the answer's text and its end-of-turn token;
- *must be masked*: everything else, headers and the BOS token included;
- *either*: what the template writes behind the end-of-turn token (ChatML's newline), an EOS token appended there by
  the trainer, the space that SentencePiece puts in front of an answer, and a token that holds the last of the header
  and the first white space of the answer.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from helpers.base import InputError, html_table, text_table
from helpers.masking.rows import Rows, RowsError, ids_of, read_rows
from helpers.template.turns import Answers, TokenBytes, Turns, find_answers, read_turns

_UNKNOWN = np.iinfo(np.int64).max  # the length that an answer would need, where the row was cut
_MASKED, _TRAINED, _EITHER = 0, 1, 2  # what a token has to be
_WHOLE, _QUESTION, _CUT, _FOREIGN = 0, 1, 2, 3  # how a row ends
# In the order in which they are blamed: each may cause those behind it.
_CHECKS = {
    "no_template": ("rows", "no answer of this chat template in any row"),
    "label_mismatch": ("tokens", "trained labels that differ from their input ids"),
    "double_bos": ("rows", "more than one BOS token, or none where the template has one"),
    "leaked": ("tokens", "trained, but not part of an answer"),
    "only_last": ("rows", "only the last of several answers is trained"),
    "fully_masked": ("rows", "nothing is trained"),
    "missed": ("tokens", "part of an answer, but masked"),
    "missing_end": ("answers", "end-of-turn token masked or absent: the model never learns to stop"),
    "pad_trained": ("tokens", "padding is trained"),
    "truncated": ("rows", "cut off by the length limit"),
}


class MaskingError(InputError):
    """The mask is wrong: names the row, the tokens, what was expected and the fix."""


@dataclass(frozen=True)
class Finding:
    """One kind of fault. `first_rows` are row numbers of the dataset; `found` quotes the first one."""

    code: str
    count: int
    unit: str
    rows: int
    first_rows: tuple[int, ...]
    where: str
    found: str
    expected: str
    fix: str


@dataclass(frozen=True)
class MaskReport:
    """What `check_masking` found. A count is 0 where all is well; `ok` is true only if all are.

    Attributes:
        rows, tokens, trained_tokens, answers: totals; padding is not counted.
        leaked, missed, pad_trained, label_mismatch: tokens.
        missing_end: answers. fully_masked, only_last, double_bos, truncated: rows.
        tokens_per_row: median, 95th percentile and maximum.
        histogram: rows in eight equal steps of length, from the shortest row to the longest.
        length_for_99_percent: tokens a row needs so that 99 % of the answers are whole; None where the rows were cut
            and cannot tell.
        findings: the faults, the likeliest cause first.
    """

    rows: int
    tokens: int
    trained_tokens: int
    answers: int
    tokens_per_row: tuple[int, int, int]
    shortest: int
    histogram: tuple[int, ...]
    length_for_99_percent: int | None
    findings: tuple[Finding, ...]

    @property
    def ok(self) -> bool:
        return not self.findings

    def _count(self, code: str) -> int:
        return next((finding.count for finding in self.findings if finding.code == code), 0)

    leaked = property(lambda self: self._count("leaked"))
    missed = property(lambda self: self._count("missed"))
    missing_end = property(lambda self: self._count("missing_end"))
    only_last = property(lambda self: self._count("only_last"))
    fully_masked = property(lambda self: self._count("fully_masked"))
    double_bos = property(lambda self: self._count("double_bos"))
    truncated = property(lambda self: self._count("truncated"))
    pad_trained = property(lambda self: self._count("pad_trained"))
    label_mismatch = property(lambda self: self._count("label_mismatch"))

    def raise_if_failed(self) -> None:
        """Raise `MaskingError` about the likeliest cause; do nothing where `ok`."""
        if self.ok:
            return
        first, *others = self.findings
        also = f" (also found: {', '.join(f'{other.code} {other.count}' for other in others)})" if others else ""
        raise MaskingError(first.where, found=first.found, expected=first.expected, fix=first.fix + also)

    def _table(self) -> tuple[str, list[str], list[list[str]]]:
        median, p95, longest = self.tokens_per_row
        peak = max(self.histogram)
        bars = "".join("▁▂▃▄▅▆▇█"[7 * n // peak] if n else "·" for n in self.histogram)
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        enough = self.length_for_99_percent
        rows = [
            ["rows, answers", f"{self.rows:,}, {self.answers:,}"],
            ["tokens trained", f"{self.trained_tokens:,} of {self.tokens:,} ({share:.1f} %)"],
            ["tokens per row", f"median {median:,}, 95 % {p95:,}, max {longest:,}"],
            ["rows by length", f"{self.shortest:,} {bars} {longest:,}"],
            ["99 % of the answers are whole in rows of", "unknown" if enough is None else f"{enough:,} tokens"],
        ]
        for each in self.findings:
            first = ", ".join(map(str, each.first_rows)) + (", …" if each.rows > len(each.first_rows) else "")
            rows.append([each.code, f"{each.count:,} {each.unit}, in row {first}: {each.found}"])
        verdict = "NOT fit to train on" if self.findings else "every answer is trained, and nothing else"
        return f"Mask check: {verdict}", ["measure", "value"], rows

    def __repr__(self) -> str:
        title, headers, rows = self._table()
        return f"{title}\n{text_table(headers, rows)}"

    def _repr_html_(self) -> str:
        title, headers, rows = self._table()
        return f"<p><b>{title}</b></p>{html_table(headers, rows)}"


def check_masking(dataset, *, tokenizer, ignore_index: int = -100, texts: Iterable[str] | None = None) -> MaskReport:
    """Check the labels of every row.

    Args:
        dataset: rows with `input_ids` and `labels` (and, where padded, `attention_mask`): a `datasets.Dataset`, a
            list of dicts, or a padded batch (a dict of arrays of shape `(rows, tokens)`). A row holds one
            conversation from its start, or several one after the other.
        tokenizer: the one that made the ids, with its chat template.
        ignore_index: the label of a masked token.
        texts: the rendered conversations before they were cut; read only if rows are cut, to say what length would
            keep 99 % of the answers whole. (Fully masked rows are dropped in training, so these need not be the same
            rows.)

    Raises:
        RowsError: there are no rows, or one cannot be read: no labels, or not as many as ids, or unknown ids.
        TurnsError: the chat template cannot be checked.

    Example:
        >>> check_masking(trainer.train_dataset, tokenizer=tokenizer).raise_if_failed()
    """
    table = TokenBytes(tokenizer)
    turns = read_turns(tokenizer, table)
    parts = [
        _examine(chunk, tokenizer, table, turns, ignore_index)
        for chunk in read_rows(dataset, ids_below=table.row_end_id)
    ]
    if not parts:
        raise RowsError("dataset", found="no rows", expected="rows with input_ids and labels", fix="pass other rows")
    rows = _PerRow(*(np.concatenate([getattr(part.rows, name) for part in parts]) for name in _PerRow._fields))
    cut = _cut_rows(rows)
    needed = np.concatenate([part.needed for part in parts] + [np.full((cut & ~rows.answer_cut).sum(), _UNKNOWN)])
    enough = _length_for_99_percent(needed)
    if enough is None and texts is not None:
        enough = _length_for_99_percent(_needed_by(texts, tokenizer, table, turns))
    shortest, longest = int(rows.tokens.min()), int(rows.tokens.max())
    return MaskReport(
        rows=len(rows.tokens),
        tokens=int(rows.tokens.sum()),
        trained_tokens=int(rows.trained.sum()),
        answers=sum(len(part.needed) for part in parts),
        tokens_per_row=(*np.percentile(rows.tokens, [50, 95], method="inverted_cdf").astype(int).tolist(), longest),
        shortest=shortest,
        histogram=tuple(np.histogram(rows.tokens, bins=8, range=(shortest, longest + 1))[0].tolist()),
        length_for_99_percent=enough,
        findings=tuple(_findings(_spans(parts, rows, cut), rows, cut, dataset, tokenizer, table, turns, enough)),
    )


class _PerRow(NamedTuple):
    """What is known of each row: arrays of shape `(rows,)`."""

    width: np.ndarray  # tokens, padding among them
    tokens: np.ndarray  # without padding
    trained: np.ndarray
    answers: np.ndarray  # of which at least one token is there
    ending: np.ndarray  # _WHOLE, _QUESTION, _CUT or _FOREIGN
    answer_cut: np.ndarray  # an answer has begun and is cut
    only_last: np.ndarray


@dataclass(frozen=True)
class _Part:
    """One chunk's results. `spans[code]` has a line a span: row, first token, the token behind the last."""

    rows: _PerRow
    spans: dict[str, np.ndarray]
    needed: np.ndarray


@dataclass(frozen=True)
class _Truth:
    """Where a chunk's answers are. `first`, `last`, `row` and `found` have an entry an answer, `expected` one a token.

    Tokens are counted through the chunk; `last` is the token behind the end-of-turn token. `row_bytes[r]` is where row
    r begins and ends in `data`, its padding left out.
    """

    found: Answers
    first: np.ndarray
    last: np.ndarray
    row: np.ndarray
    expected: np.ndarray
    data: bytes
    row_bytes: np.ndarray


def _examine(chunk: Rows, tokenizer, table: TokenBytes, turns: Turns, ignore_index: int) -> _Part:
    rows, row_of, starts = len(chunk.lengths), chunk.row_of, chunk.starts
    pad = _padding(chunk, tokenizer, turns)
    trained = chunk.labels != ignore_index
    truth = _locate(chunk, pad, tokenizer, table, turns)
    closed, must = truth.found.closed, truth.expected == _TRAINED
    is_end = np.zeros(len(chunk.ids), bool)
    is_end[truth.last[closed] - 1] = True

    def numbered(row: np.ndarray, first: np.ndarray, last: np.ndarray) -> np.ndarray:
        return np.column_stack([row + chunk.first_row, first - starts[row], last - starts[row]])

    def runs(flagged: np.ndarray) -> np.ndarray:
        at = np.flatnonzero(flagged)
        new = np.append(True, (np.diff(at) != 1) | (np.diff(row_of[at]) != 0))[: len(at)]
        return numbered(row_of[at[new]], at[new], at[np.roll(new, -1)] + 1)

    def per_row(row: np.ndarray) -> np.ndarray:
        return np.bincount(row, minlength=rows)

    missed, open_ended = must & ~trained, ~closed & ~truth.found.cut
    spans = {
        "label_mismatch": runs(trained & (chunk.labels != chunk.ids)),
        "double_bos": runs(_wrong_bos(chunk, pad, truth.expected, is_end, tokenizer, turns, table)),
        "leaked": runs(trained & (truth.expected == _MASKED) & ~pad),
        "missed": runs(missed & ~is_end),
        "missing_end": np.concatenate(
            [runs(missed & is_end), numbered(truth.row[open_ended], truth.first[open_ended], truth.last[open_ended])]
        ),
        "pad_trained": runs(trained & pad),
    }
    there = _between(must, truth) > 0
    answers = per_row(truth.row[there])
    spoken = _between(must & trained, truth)[there] > 0
    last_spoken = np.zeros(rows, bool)
    last_spoken[answers > 0] = spoken[(np.cumsum(answers) - 1)[answers > 0]]
    found = _PerRow(
        width=chunk.lengths,
        tokens=per_row(row_of[~pad]),
        trained=per_row(row_of[trained & ~pad]),
        answers=answers,
        ending=_endings(truth, turns, table, tokenizer),
        answer_cut=per_row(truth.row[truth.found.cut]) > 0,
        only_last=(answers > 1) & (per_row(truth.row[there][spoken]) == 1) & last_spoken,
    )
    return _Part(found, spans, np.where(closed, truth.last - starts[truth.row], _UNKNOWN))


def _locate(chunk: Rows, pad: np.ndarray, tokenizer, table: TokenBytes, turns: Turns) -> _Truth:
    """Find the answers and say for each token whether it has to be trained."""
    rows = np.arange(len(chunk.lengths))
    place = np.arange(len(chunk.ids)) + chunk.row_of  # a ROW_END stands behind each row
    spaced = np.full(len(chunk.ids) + len(rows), table.row_end_id, np.int64)
    spaced[place] = np.where(pad, table.row_end_id, chunk.ids)
    data, offsets = table.join(spaced)
    found = find_answers(data, turns)
    first, last, after = (np.searchsorted(offsets, edge) for edge in (found.start, found.stop, found.after))
    # the trainer may append an EOS token behind a finished answer
    after += found.closed & (spaced[np.minimum(after, len(spaced) - 1)] == tokenizer.eos_token_id)
    expected = _TRAINED * _covered(first, last, len(spaced)) + _EITHER * _covered(last, after, len(spaced))
    # SentencePiece may put a space in front of an answer's text, as a token of its own or in the first word's
    spaces = len(turns.answer_start) - len(turns.answer_start.rstrip(b" "))
    expected[_covered(np.searchsorted(offsets, found.start - spaces), first, len(spaced))] = _EITHER
    for i in np.flatnonzero(offsets[first] > found.start):
        # one token holds the end of the header and the start of the answer: newline and `Hi` has to be trained,
        # newline and newline may be
        header = data[offsets[first[i] - 1] : found.start[i]]
        answer = data[found.start[i] : offsets[first[i]]]
        first[i] -= 1
        expected[first[i]] = _TRAINED if answer.strip() and not header.strip() else _EITHER
    row = np.searchsorted(chunk.starts + rows, first, side="right") - 1
    kept_stop = np.maximum.reduceat(np.append(np.where(pad, -1, place), -1), chunk.starts) + 1
    kept_stop = np.where(chunk.lengths, np.maximum(kept_stop, chunk.starts + rows), chunk.starts + rows)
    row_bytes = np.column_stack([offsets[chunk.starts + rows], offsets[kept_stop]])
    return _Truth(found, first - row, last - row, row, expected[place], data, row_bytes)


def _covered(first: np.ndarray, last: np.ndarray, size: int) -> np.ndarray:
    """True from each `first` up to its `last`; the spans do not overlap."""
    edges = np.bincount(first, minlength=size + 1) - np.bincount(last, minlength=size + 1)
    return np.cumsum(edges[:size]) > 0


def _between(flagged: np.ndarray, truth: _Truth) -> np.ndarray:
    """How many tokens of each answer are flagged."""
    total = np.append(0, np.cumsum(flagged))
    return total[truth.last] - total[truth.first]


def _padding(chunk: Rows, tokenizer, turns: Turns) -> np.ndarray:
    """True for padding: where the attention mask is 0, and runs of the pad token at either end of a row.

    Where the pad token is also one that a row may end (or begin) with, the one next to the text is text.
    """
    if tokenizer.pad_token_id is None:
        return ~chunk.attended
    at = np.arange(len(chunk.ids))
    text = np.append(chunk.ids != tokenizer.pad_token_id, False)
    last = np.maximum.reduceat(np.where(text, np.append(at, -1), -1), chunk.starts)
    first = np.minimum.reduceat(np.where(text, np.append(at, 0), len(at)), chunk.starts)
    first = first - (tokenizer.pad_token_id == tokenizer.bos_token_id)
    last = last + (tokenizer.pad_token_id in (tokenizer.eos_token_id, turns.end_token_id))
    return ~chunk.attended | (at < first[chunk.row_of]) | (at > last[chunk.row_of])


def _endings(truth: _Truth, turns: Turns, table: TokenBytes, tokenizer) -> np.ndarray:
    """How each row ends: behind an answer, behind a question, in the middle of a turn, or in another template."""
    done, stop = truth.row_bytes[:, 0].copy(), truth.row_bytes[:, 1]
    np.maximum.at(done, truth.row, truth.found.after)
    answers = np.bincount(truth.row, minlength=len(stop))
    endings = np.full(len(stop), _WHOLE)
    endings[truth.row[truth.found.cut]] = _CUT
    eos = table.pieces[tokenizer.eos_token_id] if tokenizer.eos_token_id is not None else b""
    for row in np.flatnonzero((endings != _CUT) & (done < stop)):
        rest = truth.data[done[row] : stop[row]]
        if not answers[row] and not any(mark in rest for mark in turns.marks):
            endings[row] = _FOREIGN
        elif turns.user_end and rest.endswith(turns.user_end):
            endings[row] = _QUESTION
        elif rest != eos:  # which a trainer may have appended
            endings[row] = _CUT
    return endings


def _cut_rows(rows: _PerRow) -> np.ndarray:
    """The rows that the length limit has cut: in a turn, or behind a question where other rows show the limit."""
    cut = rows.ending == _CUT
    limit = rows.tokens[cut].max() if cut.any() else _UNKNOWN
    return cut | ((rows.ending == _QUESTION) & (rows.tokens >= limit))


def _wrong_bos(chunk, pad, expected, is_end, tokenizer, turns: Turns, table: TokenBytes) -> np.ndarray:
    """True for a BOS token too many, and for a row's first token where it should be one and is not."""
    if tokenizer.bos_token_id is None:
        return np.zeros(len(chunk.ids), bool)
    bos = (chunk.ids == tokenizer.bos_token_id) & ~pad
    opens = ~pad & np.append(True, pad[:-1] | (np.diff(chunk.row_of) != 0))[: len(pad)]
    follows_bos = np.append(False, bos[:-1])[: len(bos)] & ~opens
    wrong = bos & follows_bos
    code = table.pieces[tokenizer.bos_token_id]
    if not any(code in mark for mark in turns.marks):  # in the middle of a row only where a new conversation starts
        behind_answer = np.append(False, (is_end | (expected == _EITHER))[:-1])[: len(bos)]
        wrong |= bos & ~opens & ~behind_answer
    return wrong | (opens & ~bos) if turns.renders_bos else wrong


def _length_for_99_percent(needed: np.ndarray) -> int | None:
    """The tokens a row needs so that 99 % of the answers fit; None where that many were cut that nobody can say."""
    if not len(needed):
        return None
    length = int(np.percentile(needed, 99, method="inverted_cdf"))
    return None if length == _UNKNOWN else length


def _needed_by(texts: Iterable[str], tokenizer, table: TokenBytes, turns: Turns) -> np.ndarray:
    """The tokens that each answer of `texts` needs, counted from its row's start."""
    rows = ({"input_ids": ids, "labels": ids} for ids in tokenizer(list(texts)).input_ids)
    parts = [
        _examine(chunk, tokenizer, table, turns, -100) for chunk in read_rows(list(rows), ids_below=table.row_end_id)
    ]
    return np.concatenate([part.needed for part in parts])


def _spans(parts: list[_Part], rows: _PerRow, cut: np.ndarray) -> dict[str, np.ndarray]:
    """All faults by code: lines of row, first token, the token behind the last."""
    spans = {code: np.concatenate([part.spans[code] for part in parts]) for code in parts[0].spans}
    for code, flagged in {
        "no_template": rows.ending == _FOREIGN,
        "only_last": rows.only_last,
        "fully_masked": rows.trained == 0,
        "truncated": cut,
    }.items():
        row = np.flatnonzero(flagged)
        spans[code] = np.column_stack([row, np.zeros_like(row), rows.width[row]])
    return spans


def _findings(
    spans, rows: _PerRow, cut, dataset, tokenizer, table: TokenBytes, turns: Turns, enough
) -> Iterator[Finding]:
    """The faults in the order of `_CHECKS`, each with one row quoted and the fix that fits."""
    fixes = _fixes(table, turns, int(rows.tokens.max()), enough)
    for code, (unit, meaning) in _CHECKS.items():
        lines = spans[code]
        if not len(lines):
            continue
        lines = lines[np.lexsort((lines[:, 1], lines[:, 0]))]
        numbers = np.unique(lines[:, 0])
        shown, cause = lines[0], code
        if code == "fully_masked":  # the worst cause first: wrong markers, then no answer to train, then the length
            answered, short = rows.answers[lines[:, 0]] > 0, cut[lines[:, 0]]
            order = np.lexsort((short, ~answered))
            shown = lines[order[0]]
            cause = "fully_masked" if answered.any() else "no_answer" if not short.all() else "truncated"
        row, first, last = map(int, shown)
        text = tokenizer.decode(ids_of(dataset, row)[first:last])
        expected, fix = fixes[cause]
        yield Finding(
            code=code,
            count={"tokens": int((lines[:, 2] - lines[:, 1]).sum()), "rows": len(numbers), "answers": len(lines)}[unit],
            unit=unit,
            rows=len(numbers),
            first_rows=tuple(numbers[:3].tolist()),
            where=f"row {row}, tokens {first} to {last - 1}" if last > first else f"row {row}",
            found=f"{meaning}: {_quote(text, from_end=code == 'truncated')}",
            expected=expected,
            fix=fix,
        )


def _fixes(table: TokenBytes, turns: Turns, longest: int, enough: int | None) -> dict[str, tuple[str, str]]:
    """What was expected and what to do, by cause."""
    instruction, response = (table.text(mark).strip(" ") for mark in (turns.user_start, turns.answer_start))
    end = table.text(turns.answer_end)
    markers = (
        "give train_on_responses_only this template's own markers, "
        f"instruction_part={instruction!r} and response_part={response!r}"
    )
    merged = f"{markers}; if it has them, strip the answers: a leading newline merges with the marker's"
    length = f"raise max_seq_length above {longest:,} (texts= tells by how much)"
    if enough:
        length = f"set max_seq_length to {enough:,}, which keeps 99 % of the answers whole"
    return {
        "no_template": ("rows made with this tokenizer's chat template", "use one tokenizer to format and to check"),
        "label_mismatch": (
            "labels equal to their input ids: the model itself shifts them",
            "leave the labels in place",
        ),
        "double_bos": ("one BOS token where a conversation starts", "render the rows with format_conversations"),
        "leaked": ("everything outside an answer masked", markers),
        "only_last": ("every answer trained", f"leave out last_response_only; if it is not set: {merged}"),
        "fully_masked": ("at least one answer trained", merged),
        "no_answer": ("an answer in each row", "keep the valid rows of validate_conversations only"),
        "missed": ("the whole answer trained", merged),
        "missing_end": (f"each answer's {end!r} in the text and trained", merged),
        "pad_trained": ("padding masked", "label padding with -100, and pad with a token that is not the EOS token"),
        "truncated": (f"answers that end with {end!r}", f"the markers are not to blame: {length}"),
    }


def _quote(text: str, *, from_end: bool, width: int = 60) -> str:
    short = text if len(text) <= width else "…" + text[-width:] if from_end else text[:width] + "…"
    return repr(short)
