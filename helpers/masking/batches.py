"""Are the rows that reach the loss those that were checked, and is none left out?

A mask is checked in the data set. What is trained is what comes out of the sampler, the collator and the trainer's own
preparation, so every batch is read once more at the model's door.
"""

import hashlib
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from helpers.masking.rows import MaskingError, flat
from helpers.messages import _
from helpers.ranks import on_all, rank_and_size

if TYPE_CHECKING:
    from transformers import TrainerCallback

FIRST_TOKENS = 12  # of a row that is quoted


def row_key(ids: np.ndarray) -> int:
    """Names a row by its token ids, the same in every process."""
    return _key(np.asarray(ids, np.int64))


def label_key(labels: np.ndarray) -> int:
    """Names a row's labels. The first predicts nothing, and collators without padding mask it."""
    return _key(np.asarray(labels, np.int64)[1:])


def _key(numbers: np.ndarray) -> int:
    return int.from_bytes(hashlib.blake2b(numbers.tobytes(), digest_size=8).digest())


class Batches:
    """The rows that a trainer trains, counted and held against those that were checked. Made by `MaskReport.watch`.

    Attributes:
        labels: {row: its labels} of the rows that were checked, by `row_key` and `label_key`.
        counts: how often each row was checked: more than once where rows are the same.
        trained: how often each row was trained in this session.
        faults: what was wrong with the passes over the data.
    """

    def __init__(self, rows: Mapping[int, tuple[int, int]]):
        self.labels = {row: labels for row, (labels, count) in rows.items()}
        self.counts = Counter({row: count for row, (labels, count) in rows.items()})
        self.trained: Counter[int] = Counter()
        self.faults: list[str] = []

    @property
    def holds(self) -> bool:
        return not self.faults

    def __str__(self) -> str:
        rows, times = {"seen": len(self.trained), "all": len(self.labels)}, sorted(self.trained.values())
        if not times:
            seen = _("in this session {seen:,} of {all:,} rows", **rows)
        elif times[-1] == 1:
            seen = _("in this session {seen:,} of {all:,} rows, each once", **rows)
        else:
            least, most = times[0], times[-1]
            seen = _(
                "in this session {seen:,} of {all:,} rows, each {least} to {most} times", least=least, most=most, **rows
            )
        return _("; ").join([seen, *self.faults])

    def check(self, inputs: Mapping[str, Any], *, step: int, tokenizer: Any) -> set[int]:
        """The rows of one batch, each as it was checked.

        Raises:
            MaskingError: a row is none of those that were checked, or has other labels.
        """
        rows = set()
        for ids, labels in rows_of(inputs):
            if rank_and_size()[1] > 1 and (labels == -100).all():  # it fills a round up, see `Checkpoints`
                continue
            row = row_key(ids)
            if self.labels.get(row) != label_key(labels):
                text = tokenizer.decode(ids[:FIRST_TOKENS]) if tokenizer is not None else str(ids[:FIRST_TOKENS])
                raise MaskingError(
                    _("step {step}, the row that begins {text!r}", step=step, text=text),
                    found=_("other labels than those that were checked")
                    if row in self.labels
                    else _("none of the rows that were checked"),
                    expected=_("a row of trainer.train_dataset as check_masking read it"),
                    fix=_("look for what changes the rows after the check: a collator, a callback, another data set"),
                )
            rows.add(row)
        return rows

    def pass_ended(self, seen: Mapping[int, int], *, whole: bool) -> None:
        """Judge one pass over the data; `whole`: it went from the first row to the last."""
        twice = sum(times > self.counts[row] for row, times in seen.items())
        if twice:
            self.faults.append(_("{rows:,} rows came twice in one pass", rows=twice))
        if whole and (missing := len(self.labels) - len(seen)):
            self.faults.append(_("a pass left {rows:,} rows out", rows=missing))


def rows_of(inputs: Mapping[str, Any]) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """(ids, labels) of each conversation in a batch: padded, of shape (rows, tokens), or end to end, (1, all tokens).

    Example: ids [[5, 6, 7]] with position_ids [[0, 1, 0]] -> [5, 6] and [7]
    """
    ids, labels = inputs["input_ids"].cpu().numpy(), inputs["labels"].cpu().numpy()
    if "packed_seq_lengths" in inputs:
        ends = np.cumsum(flat(inputs["packed_seq_lengths"]))
    elif inputs.get("position_ids") is not None:
        starts = np.flatnonzero(flat(inputs["position_ids"]).reshape(-1) == 0)
        ends = np.append(starts[1:], ids.size)
    else:
        mask = inputs.get("attention_mask")
        attended = np.ones(ids.shape, bool) if mask is None else mask.cpu().numpy().astype(bool)
        yield from ((row[kept], of_row[kept]) for row, of_row, kept in zip(ids, labels, attended, strict=True))
        return
    yield from zip(np.split(ids.reshape(-1), ends[:-1]), np.split(labels.reshape(-1), ends[:-1]), strict=True)


def _require_apart(batches: Batches, held_out: Any) -> None:
    """Raises MaskingError where a held-out row is among those to train on, by its content."""
    both = [number for number, row in enumerate(held_out or ()) if row_key(row["input_ids"]) in batches.labels]
    if both:
        raise MaskingError(
            _("row {row} of the held-out rows", row=both[0]),
            found=_("a row that is also trained on, as {some} of {all} are", some=len(both), all=len(held_out)),
            expected=_("rows that are never trained on"),
            fix=_("run chapter 03 again, whose data are in two parts, and take both as they are"),
        )


def watch_batches(batches: Batches, trainer: Any) -> "TrainerCallback":
    """The callback that reads each batch at the model's door, and counts it when its step is done.

    A row is counted once a step: where memory runs out, a batch goes in again, in parts. Of several processes each
    counts its own, and all are added up at the end of a pass and of the run.
    """
    from transformers import TrainerCallback

    class Watch(TrainerCallback):
        hook = None

        def on_train_begin(self, args, state, control, **kwargs) -> None:
            self.close()
            _require_apart(batches, trainer.eval_dataset)
            self.step_rows: set[int] = set()
            self.pass_rows: Counter[int] = Counter()

            def read(model, args, inputs) -> None:
                if model.training and inputs.get("labels") is not None:
                    step = state.global_step + 1
                    self.step_rows |= batches.check(inputs, step=step, tokenizer=trainer.processing_class)

            self.hook = trainer.model.register_forward_pre_hook(read, with_kwargs=True)

        def on_epoch_begin(self, args, state, control, **kwargs) -> None:
            self.pass_rows = Counter()
            self.from_the_first = float(state.epoch or 0).is_integer()  # a resumed run begins within a pass

        def on_step_begin(self, args, state, control, **kwargs) -> None:
            self.step_rows = set()  # without what was rehearsed

        def on_step_end(self, args, state, control, **kwargs) -> None:
            self.pass_rows.update(self.step_rows)
            batches.trained.update(self.step_rows)

        def on_epoch_end(self, args, state, control, **kwargs) -> None:
            ended = abs(state.epoch - round(state.epoch)) < 1e-6  # else the run ended within the pass
            seen = sum(on_all(self.pass_rows), Counter())
            batches.pass_ended(seen, whole=ended and self.from_the_first and not args.dataloader_drop_last)

        def on_train_end(self, args, state, control, **kwargs) -> None:
            self.close()
            batches.trained = sum(on_all(batches.trained), Counter())

        def close(self) -> None:
            if self.hook is not None:
                self.hook.remove()
                self.hook = None

    return Watch()
