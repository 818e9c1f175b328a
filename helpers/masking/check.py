"""Prove that a masked dataset trains on the answers and on nothing else.

The ground truth is read from the tokenizer's own chat template (`helpers.template.turns`), never from the marker
strings that `train_on_responses_only` was given: a wrong marker cannot fool the check as well. Every token is one of
- *must be trained*: the answer's text and its end-of-turn token;
- *must be masked*: everything else, headers and the BOS token included;
- *either*: what the template writes behind the end-of-turn token (ChatML's newline), an EOS token appended there by
  the trainer, the space that SentencePiece puts in front of an answer, and a token that holds the last of the header
  and the first white space of the answer.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from helpers.base import Table
from helpers.masking.batches import Batches, label_key, row_key, watch_batches
from helpers.masking.findings import IN_ROWS, Finding, find_faults, fixes_of
from helpers.masking.rows import MaskingError, Rows, read_rows
from helpers.messages import _
from helpers.template.turns import Answers, TokenBytes, Turns, find_answers, read_turns

_UNKNOWN = np.iinfo(np.int64).max  # the length that an answer would need, where the row was cut
_MASKED, _TRAINED, _EITHER = 0, 1, 2  # what a token has to be
_WHOLE, _QUESTION, _CUT, _FOREIGN = 0, 1, 2, 3  # how a row ends


@dataclass(frozen=True, repr=False)
class MaskReport(Table):
    """What `check_masking` found.

    Attributes:
        rows, tokens, trained_tokens, answers: totals; padding is not counted.
        tokens_per_row: median, 95th percentile and maximum.
        histogram: rows in eight equal steps of length, from the shortest row to the longest.
        length_for_99_percent: tokens a row needs so that 99 % of the answers are whole; None where the rows were cut
            and cannot tell.
        findings: the faults, the likeliest cause first.
        keys: {row: (its labels, how often it is there)}, named as in `helpers.masking.batches`.
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
    keys: Mapping[int, tuple[int, int]] = field(default_factory=dict, repr=False, compare=False)

    @property
    def ok(self) -> bool:
        return not self.findings

    def count(self, code: str) -> int:
        """How many of one of `helpers.masking.findings.CHECKS`; 0 where all is well."""
        return next((finding.count for finding in self.findings if finding.code == code), 0)

    def raise_if_failed(self) -> None:
        """Raise `MaskingError` about the likeliest cause; do nothing where `ok`."""
        if self.ok:
            return
        first, *others = self.findings
        fix, also = first.fix, ", ".join(f"{other.code} {other.count}" for other in others)
        fix = _("{fix} (also found: {others})", fix=fix, others=also) if others else fix
        raise MaskingError(first.where, found=first.found, expected=first.expected, fix=fix)

    def watch(self, trainer: Any) -> Batches:
        """Read every batch that reaches the model, and count its rows: each must be one of those that were checked.

        Raises:
            MaskingError: in `trainer.train`, at the first row that is not.
        """
        batches = Batches(self.keys)
        trainer.add_callback(watch_batches(batches, trainer))
        return batches

    def _title(self) -> str:
        if self.ok:
            return _("Mask check: every answer is trained, and nothing else")
        return _("Mask check: NOT fit to train on")

    def _table(self) -> tuple[list[str], list[list[str]]]:
        median, p95, longest = self.tokens_per_row
        peak = max(self.histogram)
        bars = "".join("▁▂▃▄▅▆▇█"[7 * n // peak] if n else "·" for n in self.histogram)
        share = 100 * self.trained_tokens / max(self.tokens, 1)
        enough = self.length_for_99_percent
        rows = [
            [_("rows, answers"), f"{self.rows:,}, {self.answers:,}"],
            [
                _("tokens trained"),
                _("{some:,} of {all:,} ({share:.1f} %)", some=self.trained_tokens, all=self.tokens, share=share),
            ],
            [
                _("tokens per row"),
                _("median {median:,}, 95 % {p95:,}, max {longest:,}", median=median, p95=p95, longest=longest),
            ],
            [_("rows by length"), f"{self.shortest:,} {bars} {longest:,}"],
            [
                _("99 % of the answers are whole in rows of"),
                _("unknown") if enough is None else _("{count:,} tokens", count=enough),
            ],
        ]
        for each in self.findings:
            first = ", ".join(map(str, each.first_rows)) + (", …" if each.rows > len(each.first_rows) else "")
            rows.append([each.code, _(IN_ROWS[each.unit], count=each.count, rows=first, found=each.found)])
        return [_("measure"), _("value")], rows


def check_masking(dataset, *, tokenizer) -> MaskReport:
    """Check the labels of every row; -100 is masked.

    Args:
        dataset: rows with `input_ids` and `labels` (and, where padded, `attention_mask`): a `datasets.Dataset`, a
            list of dicts, or a padded batch (a dict of arrays of shape `(rows, tokens)`). A row holds one
            conversation from its start, or several one after the other.
        tokenizer: the one that made the ids, with its chat template.

    Raises:
        MaskingError: there are no rows, or one cannot be read: no labels, or not as many as ids, or unknown ids.
        TurnsError: the chat template cannot be checked.

    Example:
        >>> check_masking(trainer.train_dataset, tokenizer=tokenizer).raise_if_failed()
    """
    table = TokenBytes(tokenizer)
    turns = read_turns(tokenizer, table)
    chunks = read_rows(dataset, ids_below=table.row_end_id)
    parts = [_examine(chunk, tokenizer, table, turns) for chunk in chunks]
    if not parts:
        expected, fix = _("rows with input_ids and labels"), _("pass other rows")
        raise MaskingError("dataset", found=_("no rows"), expected=expected, fix=fix)
    rows = _PerRow(*(np.concatenate([getattr(part.rows, name) for part in parts]) for name in _PerRow._fields))
    cut = _cut_rows(rows)
    needed = np.concatenate([part.needed for part in parts] + [np.full((cut & ~rows.answer_cut).sum(), _UNKNOWN)])
    enough = int(np.percentile(needed, 99, method="inverted_cdf")) if len(needed) else _UNKNOWN
    enough = None if enough == _UNKNOWN else enough  # so many were cut that nobody can say
    shortest, longest = int(rows.tokens.min()), int(rows.tokens.max())
    fixes = fixes_of(table, turns, longest, enough)
    told = dict(answers=rows.answers, cut=cut, dataset=dataset, tokenizer=tokenizer, fixes=fixes)
    return MaskReport(
        rows=len(rows.tokens),
        tokens=int(rows.tokens.sum()),
        trained_tokens=int(rows.trained.sum()),
        answers=sum(len(part.needed) for part in parts),
        tokens_per_row=(*np.percentile(rows.tokens, [50, 95], method="inverted_cdf").astype(int).tolist(), longest),
        shortest=shortest,
        histogram=tuple(np.histogram(rows.tokens, bins=8, range=(shortest, longest + 1))[0].tolist()),
        length_for_99_percent=enough,
        findings=tuple(find_faults(_spans(parts, rows, cut), **told)),
        keys=_count_keys(key for part in parts for key in part.keys),
    )


def _count_keys(keys: Iterable[tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """{row: (its labels, how often it is there)}; of rows with the same ids and other labels, the last one's."""
    counted: dict[int, tuple[int, int]] = {}
    for row, labels in keys:
        counted[row] = (labels, counted.get(row, (0, 0))[1] + 1)
    return counted


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
    keys: list[tuple[int, int]]


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


def _examine(chunk: Rows, tokenizer, table: TokenBytes, turns: Turns) -> _Part:
    rows, row_of, starts = len(chunk.lengths), chunk.row_of, chunk.starts
    pad = _padding(chunk, tokenizer, turns)
    trained = chunk.labels != -100
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
    needed = np.where(closed, truth.last - starts[truth.row], _UNKNOWN)
    return _Part(found, spans, needed, _keys(chunk))


def _keys(chunk: Rows) -> list[tuple[int, int]]:
    """(row, its labels) of each row, as a batch's attention mask leaves it."""
    ends = np.cumsum(chunk.lengths)[:-1]
    columns = (np.split(column, ends) for column in (chunk.ids, chunk.labels, chunk.attended))
    return [(row_key(i[kept]), label_key(labels[kept])) for i, labels, kept in zip(*columns, strict=True)]


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
