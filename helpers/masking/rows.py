"""Read tokenized rows from whatever holds them, and lay them end to end as numpy arrays."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np

from helpers.base import InputError
from helpers.messages import _

_TOKENS_AT_ONCE = 1_000_000  # some 300 MiB while they are checked
_ROWS_AT_ONCE = 128
_COLUMNS = ("input_ids", "labels", "attention_mask")


class MaskingError(InputError):
    """The mask is wrong, or a row cannot be read: no labels, not as many as ids, or an unknown id."""


@dataclass(frozen=True)
class Rows:
    """Rows laid end to end: `starts` and `lengths` have an entry a row, all other arrays one a token."""

    first_row: int
    ids: np.ndarray
    labels: np.ndarray
    attended: np.ndarray
    row_of: np.ndarray
    starts: np.ndarray
    lengths: np.ndarray


def read_rows(dataset, *, ids_below: int) -> Iterator[Rows]:
    """Yield the rows of a `datasets.Dataset`, a list of dicts or a padded batch, about a million tokens at a time.

    Example: rows of ids [5, 6] and [7] -> `Rows(ids=[5, 6, 7], row_of=[0, 0, 1], starts=[0, 2], lengths=[2, 1], ...)`.
    """
    first_row, waiting, size = 0, [], 0
    for block in _blocks(dataset):
        waiting.append(block)
        size += len(block[0])
        if size >= _TOKENS_AT_ONCE:
            rows = _lay_out(first_row, waiting, ids_below)
            yield rows
            first_row, waiting, size = first_row + len(rows.lengths), [], 0
    if waiting:
        yield _lay_out(first_row, waiting, ids_below)


def ids_of(dataset, row: int) -> list[int]:
    """One row's input ids."""
    return flat(dataset["input_ids"][row] if isinstance(dataset, Mapping) else dataset[row]["input_ids"]).tolist()


def flat(values) -> np.ndarray:
    """A list, an array or a tensor on any device as an int64 array; None as an empty one."""
    values = values.cpu() if hasattr(values, "cpu") else values
    return np.asarray([] if values is None else values, np.int64)


def need_columns(names, where: str) -> None:
    """Raise `MaskingError` where `names` lacks `input_ids` or `labels`."""
    for name in _COLUMNS[:2]:
        if name not in names:
            raise MaskingError(
                where,
                found=_("no {name!r} among {names}", name=name, names=sorted(names)),
                expected=_("tokenized and masked rows"),
                fix=_("call train_on_responses_only first, and pass trainer.train_dataset"),
            )


def _lay_out(first_row: int, blocks: list[tuple[np.ndarray, ...]], ids_below: int) -> Rows:
    ids, labels, attended, lengths, label_lengths = (np.concatenate(column) for column in zip(*blocks, strict=True))
    wrong = np.flatnonzero(lengths != label_lengths)
    if len(wrong):
        raise MaskingError(
            _("row {number}", number=first_row + wrong[0]),
            found=_("{labels} labels for {ids} input ids", labels=label_lengths[wrong[0]], ids=lengths[wrong[0]]),
            expected=_("one label a token"),
            fix=_("make the labels anew from the row's input ids"),
        )
    starts = np.cumsum(lengths) - lengths
    row_of = np.repeat(np.arange(len(lengths)), lengths)
    wrong = np.flatnonzero((ids < 0) | (ids >= ids_below))
    if len(wrong):
        row = row_of[wrong[0]]
        raise MaskingError(
            _("row {row}, token {token}", row=first_row + row, token=wrong[0] - starts[row]),
            found=_("input id {number}", number=ids[wrong[0]]),
            expected=_("an id of this tokenizer, 0 to {last}", last=ids_below - 1),
            fix=_("pass the tokenizer that made the rows"),
        )
    return Rows(first_row, ids, labels, attended.astype(bool), row_of, starts, lengths)


def _blocks(dataset) -> Iterator[tuple[np.ndarray, ...]]:
    """Some rows at a time: their ids, labels and attention, and the numbers of ids and of labels in each row."""
    if hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        yield from _arrow_blocks(dataset)
        return
    if isinstance(dataset, Mapping):
        need_columns(dataset, _("batch"))
        columns = {name: dataset[name] for name in _COLUMNS if name in dataset}
        dataset = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
    where = _("row {number}")
    for row, values in enumerate(dataset):
        need_columns(values, where.format(number=row))
        ids, labels = flat(values["input_ids"]), flat(values["labels"])
        attended = flat(values["attention_mask"]) if "attention_mask" in values else np.ones_like(ids)
        yield ids, labels, attended, np.array([len(ids)]), np.array([len(labels)])


def _arrow_blocks(dataset) -> Iterator[tuple[np.ndarray, ...]]:
    import pyarrow.compute as pc

    need_columns(dataset.column_names, "dataset")
    names = [name for name in _COLUMNS if name in dataset.column_names]
    arrow = dataset.select_columns(names).with_format("arrow")
    for first in range(0, len(dataset), _ROWS_AT_ONCE):
        table = arrow[first : first + _ROWS_AT_ONCE]
        columns = [pc.list_flatten(table[name]).to_numpy().astype(np.int64) for name in names]
        if len(names) == 2:
            columns.append(np.ones_like(columns[0]))
        lengths = [pc.fill_null(pc.list_value_length(table[name]), 0).to_numpy() for name in names[:2]]
        yield *columns, *lengths
