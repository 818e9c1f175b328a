"""Train through a batch that does not fit: find it before step 1, and split it wherever it turns up."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from helpers.base import InputError
from helpers.memory.stats import Stage, track_memory

REHEARSAL, FIRST_STEP = "rehearsal of the longest", "first step"


class DoesNotFit(InputError):
    """One conversation alone needs more memory than there is, or a batch that does not fit cannot be split."""


@dataclass
class Fitting:
    """How a run got by with its memory; complete once training has begun.

    Attributes:
        rehearsal: the seconds and the memory of the rehearsal: the longest conversations, trained and evaluated. No
            seconds where there was nothing left to train.
        first_step: those of this session's first step, which sets up the optimiser, and on a GPU the libraries.
        all_checkpointed: memory ran out where only some layers were checkpointed, and since then all are.
        tokens_at_once: the largest micro-batch that still fits; None: all of them did.
        splits: micro-batches that were split.
        evaluated_at_once: as `tokens_at_once`, for the evaluation.
    """

    rehearsal: Stage
    first_step: Stage
    all_checkpointed: bool = False
    tokens_at_once: int | None = None
    splits: int = 0
    evaluated_at_once: int | None = None


@contextlib.contextmanager
def fit_into_memory(trainer: Any, checkpointed_layers: Callable[[int], int] | None = None) -> Iterator[Fitting]:
    """Inside this block `trainer.train()` rehearses its longest batches, and survives when memory runs out.

    Before the first step the longest conversations are trained once and evaluated once, without any effect: gradients
    are dropped and random numbers put back. Where a micro-batch does not fit, there or later, and layers are spared,
    every layer is checkpointed from then on. If it still does not fit, it is halved until it does; the halves'
    gradients add up to the same step, because each is divided by the answer tokens of the whole step. So no step is
    lost, and every later micro-batch of that size is split from the start. It says so when it happens. A batch of an
    evaluation is split likewise, and has the same loss: its parts' means, weighted by their answer tokens.

    Args:
        trainer: a Transformers or TRL trainer; its rows hold `input_ids` (and `labels`, or its collator makes them).
        checkpointed_layers: such as `BatchPlan.checkpointed_layers`: in how many layers, from the first, a micro-batch
            of so many tokens is checkpointed, of a model that was loaded with gradient checkpointing; None: in all.
            Once memory has run out, it is in all of them. The gradients are the same.

    Raises:
        DoesNotFit: one conversation alone is too much, or a batch is and the trainer does not count the step's answer
            tokens (its `num_items_in_batch` is None), without which the halves would add up to another step; or a batch
            of an evaluation is of which more than a loss is asked for (`compute_metrics`).

    Example:
        >>> with fit_into_memory(trainer, plan.checkpointed_layers) as fitting:
        ...     trainer.train()
        >>> fitting.rehearsal.peak_reserved_gib
        3.66
    """
    from transformers import TrainerCallback

    with track_memory(REHEARSAL) as nothing:  # stands where a run is complete, so that nothing is rehearsed
        pass
    fitting, step = Fitting(nothing, replace(nothing, label=FIRST_STEP)), contextlib.ExitStack()
    train_whole, evaluate_whole = trainer.training_step, trainer.prediction_step
    flags: list[tuple[Any, Any]] = []

    def training_step(model: Any, inputs: Any, num_items_in_batch: Any = None, *rest: Any, **named: Any) -> Any:
        while True:
            chunks = _split(inputs, None if num_items_in_batch is None else fitting.tokens_at_once)
            kept = [(p, p.grad.clone()) for p in model.parameters() if p.grad is not None]
            try:
                losses = []
                for chunk in chunks:
                    spared = _spare_layers(flags, chunk, None if fitting.all_checkpointed else checkpointed_layers)
                    losses.append(train_whole(model, chunk, num_items_in_batch, *rest, **named))
                fitting.splits += len(chunks) > 1
                return sum(losses)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            _drop_gradients(model, kept)
            if spared:
                fitting.all_checkpointed = True
                print("Memory ran out: from here on every layer is checkpointed. No step is lost.")
                continue
            if num_items_in_batch is None:
                raise DoesNotFit(
                    "training",
                    found="a batch that does not fit, of a trainer that does not count the answer tokens of a step",
                    expected="a batch that fits, or num_items_in_batch, by which it could be split",
                    fix="set a smaller per_device_train_batch_size",
                )
            fitting.tokens_at_once = _halve(inputs, chunks, what="train on")
            print(
                f"Memory ran out: from here on at most {fitting.tokens_at_once:,} tokens are trained on at once. "
                "No step is lost."
            )

    def prediction_step(model: Any, inputs: Any, prediction_loss_only: bool, *rest: Any, **named: Any) -> Any:
        can_split = prediction_loss_only and "labels" in inputs
        while True:
            chunks = _split(inputs, fitting.evaluated_at_once if can_split else None)
            try:
                # Copies, because TRL adds to what it is given.
                parts = [evaluate_whole(model, dict(part), prediction_loss_only, *rest, **named) for part in chunks]
                return parts[0] if len(parts) == 1 else (_mean_loss(parts, chunks), None, None)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
            _empty_cache()
            if not can_split:
                raise DoesNotFit(
                    "the evaluation",
                    found="a batch that does not fit, of which more than the loss of its labels is asked for",
                    expected="a batch that fits, or prediction_loss_only and labels, by which it could be split",
                    fix="set a smaller per_device_eval_batch_size",
                )
            fitting.evaluated_at_once = _halve(inputs, chunks, what="evaluate")
            print(
                f"Memory ran out in the evaluation: from here on at most {fitting.evaluated_at_once:,} tokens at once. "
                "Its loss is the same."
            )

    class Measure(TrainerCallback):
        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            flags[:] = _checkpointing_flags(trainer.model)  # now, because the trainer switches them on as it begins
            with track_memory(REHEARSAL) as fitting.rehearsal:
                _rehearse(trainer)
            self.is_first = True

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.is_first:
                fitting.first_step = step.enter_context(track_memory(FIRST_STEP))
                self.is_first = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            step.close()

    measure = Measure()
    trainer.training_step, trainer.prediction_step = training_step, prediction_step
    trainer.add_callback(measure)
    try:
        yield fitting
    finally:
        step.close()  # open where the first step failed
        for layer, flag in flags:
            layer.gradient_checkpointing = flag
        trainer.remove_callback(measure)
        del trainer.training_step, trainer.prediction_step


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: the GPU's (CUDA, cuBLAS) or the machine's."""
    import torch
    from accelerate.utils.memory import should_reduce_batch_size

    return isinstance(error, torch.OutOfMemoryError) or should_reduce_batch_size(error)


def _checkpointing_flags(model: Any) -> list[tuple[Any, Any]]:
    """(layer, its flag) of each layer that is checkpointed now, from the first to the last."""
    from transformers.modeling_layers import GradientCheckpointingLayer

    layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
    return [(layer, layer.gradient_checkpointing) for layer in layers if layer.gradient_checkpointing]


def _spare_layers(flags: list[tuple[Any, Any]], chunk: Any, checkpointed_layers: Callable[[int], int] | None) -> int:
    """Checkpoint only the first layers, as many as a part needs; returns how many are spared."""
    count = len(flags) if checkpointed_layers is None else checkpointed_layers(chunk["input_ids"].numel())
    for number, (layer, flag) in enumerate(flags):
        layer.gradient_checkpointing = flag if number < count else False
    return max(len(flags) - count, 0)


def _alone(tokens: int, what: str) -> DoesNotFit:
    return DoesNotFit(
        f"a conversation of {tokens} tokens",
        found=f"not enough memory to {what} it alone",
        expected="room for the longest conversation",
        fix="set a smaller MAX_SEQ_LENGTH, a smaller model, or restart the session if other work fills it",
    )


def _halve(inputs: Any, chunks: list[Any], *, what: str) -> int:
    """Half as many tokens as the largest part has. Raises DoesNotFit where that splits no part: each is one row."""
    largest = max(chunk["input_ids"].numel() for chunk in chunks)
    if len(_split(inputs, largest // 2)) == len(chunks):
        raise _alone(largest, what)
    return largest // 2


def _mean_loss(parts: list[Any], chunks: list[Any]) -> Any:
    """The loss of a whole batch, from its parts' (loss, …), each the mean over the labels that are predicted."""
    counts = [(chunk["labels"][..., 1:] != -100).sum() for chunk in chunks]
    # A part without such tokens has no mean (0 / 0), and no part in the whole.
    sums = [loss * count.to(loss.device) for (loss, *_), count in zip(parts, counts, strict=True) if count]
    return sum(sums) / sum(counts).to(parts[0][0].device)


def _rehearse(trainer: Any) -> None:
    """Train and evaluate the longest rows, and leave everything as it was but the memory's high-water mark."""
    import torch

    args, model = trainer.args, trainer.model_wrapped
    metrics = {
        name: copy.deepcopy(vars(trainer)[name])
        for name in ("_metrics", "_total_train_tokens")
        if name in vars(trainer)
    }
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        rows = _longest(trainer.train_dataset, args.per_device_train_batch_size)
        batches, items = trainer.get_batch_samples(iter([trainer.data_collator(rows)]), 1, args.device)
        model.train()
        trainer.current_gradient_accumulation_steps = 1  # the trainer sets it for each step, and not before the first
        trainer.training_step(model, batches[0], items)
        _drop_gradients(model, [])
        if trainer.eval_dataset is not None and args.eval_strategy != "no":
            model.eval()  # as the trainer's own loop does, and prediction_step alone does not
            rows = _longest(trainer.eval_dataset, args.per_device_eval_batch_size)
            trainer.prediction_step(model, trainer.data_collator(rows), prediction_loss_only=True)
        model.train()
    vars(trainer).update(metrics)


def _split(inputs: Any, tokens_at_once: int | None) -> list[Any]:
    """A collated batch as parts of at most so many tokens, between conversations; a single one stays whole."""
    if tokens_at_once is None:
        return [inputs]
    if "position_ids" in inputs or "packed_seq_lengths" in inputs:  # padding-free: (1, all tokens)
        from unsloth.utils.token_budget import split_batch_by_token_budget  # imports on a GPU only, as such batches are

        return split_batch_by_token_budget(inputs, tokens_at_once)
    rows = max(1, tokens_at_once // inputs["input_ids"].shape[1])
    starts = range(0, len(inputs["input_ids"]), rows)
    return [{name: value[start : start + rows] for name, value in inputs.items()} for start in starts]


def _longest(dataset: Any, count: int) -> list[dict[str, Any]]:
    lengths = [len(ids) for ids in dataset["input_ids"]]
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])[:count]
    rows = [dataset[row] for row in order]
    return [{name: row[name] for name in ("input_ids", "labels") if name in row} for row in rows]


def _drop_gradients(model: Any, kept: list[tuple[Any, Any]]) -> None:
    """Throw away what an unfinished step left, put back what was there before it, and free the cache."""
    model.zero_grad(set_to_none=True)
    for parameter, gradient in kept:
        parameter.grad = gradient
    _empty_cache()


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
