"""Train through a batch that does not fit: find it before step 1, and split it wherever it turns up."""

import contextlib
import copy
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from helpers.base import InputError
from helpers.memory.stats import Stage, memory_stats, track_memory
from helpers.messages import N_, _
from helpers.ranks import rank_and_size

REHEARSAL, FIRST_STEP = N_("rehearsal of the longest"), N_("first step")


class DoesNotFit(InputError):
    """One conversation alone needs more memory than there is, or a batch that does not fit cannot be split."""


@dataclass
class Fitting:
    """How a run got by with its memory; complete once training has begun.

    Attributes:
        rehearsal: the longest conversations, trained and evaluated; no seconds where nothing was left to train.
        first_step: this session's first, which sets up the optimiser, and on a GPU the libraries.
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
    are dropped and random numbers put back. They are as many as go through without checkpointing, and one at least:
    for more of them a plan that checkpoints as needed stays below its limit. Where a micro-batch does not fit, there
    or later, and layers are spared, every layer is checkpointed from then on. If it still does not fit, it is halved
    until it does, and later ones of that size are from the start. No step is lost: the halves' gradients add up to
    the same step, because each is divided by the answer tokens of the whole step. A batch of an evaluation is split
    likewise, and has the same loss: its parts' means, weighted by their answer tokens. On a processor without
    bfloat16 the trained weights are turned back into 32 bits first, see `undo_emulated_bfloat16`.

    Of several processes none can split alone, because all add their gradients up together: there a micro-batch that
    does not fit ends the run.

    Args:
        trainer: a Transformers or TRL trainer; its rows hold `input_ids` (and `labels`, or its collator makes them).
        checkpointed_layers: such as `BatchPlan.checkpointed_layers`: in how many layers, from the first, a micro-batch
            of so many tokens is checkpointed, of a model that was loaded with gradient checkpointing; None: in all.

    Raises:
        DoesNotFit: one conversation alone is too much; or a batch is that cannot be split, because the trainer does not
            count the step's answer tokens (its `num_items_in_batch` is None), because an evaluation asks for more
            than a loss (`compute_metrics`), or because other processes train along.

    Example:
        >>> with fit_into_memory(trainer, plan.checkpointed_layers) as fitting:
        ...     trainer.train()
        >>> fitting.rehearsal.peak_reserved_gib
        3.66
    """
    undo_emulated_bfloat16(trainer.model)
    steps = _Steps(trainer, checkpointed_layers)
    measure = _measure(steps)
    trainer.training_step, trainer.prediction_step = steps.train, steps.evaluate
    trainer.add_callback(measure)
    try:
        yield steps.fitting
    finally:
        measure.first_step.close()  # open where the first step failed
        for layer, flag in steps.flags:
            layer.gradient_checkpointing = flag
        trainer.remove_callback(measure)
        del trainer.training_step, trainer.prediction_step


def undo_emulated_bfloat16(model: Any) -> int:
    """Trained weights in the 32 bits that the rest of the model computes in, on a processor without bfloat16.

    TRL's SFTTrainer turns the trained weights of every 4-bit model into bfloat16. A processor that has no instructions
    for it emulates them: LoRA's small products then took more than half of a step (8.8 s, now 4 to 5; SmolLM2, 4
    conversations, an AMD EPYC with AVX2). On a GPU, and where the model computes in 16 bits, nothing is changed.

    Returns:
        How many weights were turned back.
    """
    import torch

    if model.device.type != "cpu" or model.dtype != torch.float32:
        return 0
    emulated = [each for each in model.parameters() if each.requires_grad and each.dtype == torch.bfloat16]
    for parameter in emulated:
        parameter.data = parameter.data.float()
    return len(emulated)


class _Steps:
    """A trainer's `training_step` and `prediction_step`, each of as many parts as the memory needs."""

    def __init__(self, trainer: Any, checkpointed_layers: Callable[[int], int] | None) -> None:
        stats = memory_stats()
        nothing = Stage(REHEARSAL, 0.0, stats, stats)  # stands where a run is complete, so that nothing is rehearsed
        self.trainer, self.checkpointed_layers = trainer, checkpointed_layers
        self.fitting = Fitting(nothing, replace(nothing, label=FIRST_STEP))
        self.train_whole, self.evaluate_whole = trainer.training_step, trainer.prediction_step
        self.flags: list[tuple[Any, Any]] = []  # (layer, its flag) of each layer that is checkpointed
        self.spared = 0  # how many of them are not, in the part that was computed last

    def train(self, model: Any, inputs: Any, num_items_in_batch: Any = None, *rest: Any, **named: Any) -> Any:
        alone = rank_and_size()[1] == 1  # else nothing is tried again
        kept = [(p, p.grad.clone()) for p in model.parameters() if alone and p.grad is not None]
        parts: list[Any] = []

        def attempt() -> Any:
            parts[:] = _split(inputs, None if num_items_in_batch is None else self.fitting.tokens_at_once)
            losses = []
            for part in parts:
                self._spare_layers(part)
                losses.append(self.train_whole(model, part, num_items_in_batch, *rest, **named))
            self.fitting.splits += len(parts) > 1
            return sum(losses)

        def make_smaller() -> None:
            _require_alone(inputs, self.trainer.args, "train")
            _drop_gradients(model, kept)
            if self.spared:
                self.fitting.all_checkpointed = True
                print(_("Memory ran out: from here on every layer is checkpointed. No step is lost."))
                return
            counted = num_items_in_batch is not None
            cannot = "" if counted else _("this trainer does not count the answer tokens of a step")
            most = self.fitting.tokens_at_once = _halve(inputs, parts, "train", cannot=cannot)
            told = _(
                "Memory ran out: from here on at most {tokens:,} tokens are trained on at once. No step is lost.",
                tokens=most,
            )
            print(told)

        return _until_it_fits(attempt, make_smaller)

    def evaluate(self, model: Any, inputs: Any, prediction_loss_only: bool, *rest: Any, **named: Any) -> Any:
        can_split = prediction_loss_only and "labels" in inputs
        parts: list[Any] = []

        def attempt() -> Any:
            parts[:] = _split(inputs, self.fitting.evaluated_at_once if can_split else None)
            # Copies, because TRL adds to what it is given.
            done = [self.evaluate_whole(model, dict(part), prediction_loss_only, *rest, **named) for part in parts]
            return done[0] if len(done) == 1 else (_mean_loss(done, parts), None, None)

        def make_smaller() -> None:
            _require_alone(inputs, self.trainer.args, "eval")
            _empty_cache()
            cannot = "" if can_split else _("more is asked for than the loss of its labels")
            most = self.fitting.evaluated_at_once = _halve(inputs, parts, "eval", cannot=cannot)
            told = _(
                "Memory ran out in the evaluation: from here on at most {tokens:,} tokens at once, with the same loss.",
                tokens=most,
            )
            print(told)

        return _until_it_fits(attempt, make_smaller)

    def peaks_beyond(self, tokens: int) -> bool:
        """Whether a micro-batch of more than so many tokens takes more memory than what is planned for."""
        if not self.flags or self.checkpointed_layers is None or self.checkpointed_layers(1):
            return True
        return self.checkpointed_layers(tokens) == 0

    def _spare_layers(self, part: Any) -> None:
        """Checkpoint only the first layers, as many as a part needs."""
        count = len(self.flags)
        if self.checkpointed_layers and not self.fitting.all_checkpointed:
            count = self.checkpointed_layers(part["input_ids"].numel())
        for number, (layer, flag) in enumerate(self.flags):
            layer.gradient_checkpointing = flag if number < count else False
        self.spared = max(len(self.flags) - count, 0)


def _until_it_fits(attempt: Callable[[], Any], make_smaller: Callable[[], None]) -> Any:
    """What `attempt` returns; each time that memory runs out, `make_smaller` decides how it is tried again."""
    while True:
        try:
            return attempt()
        except Exception as error:
            if not is_out_of_memory(error):
                raise
        make_smaller()  # behind the `except`: the error holds on to the tensors that did not fit


def _measure(steps: _Steps) -> Any:
    """The callback that rehearses as training begins, and measures it and the first step."""
    from transformers import TrainerCallback

    class Measure(TrainerCallback):
        first_step = contextlib.ExitStack()

        def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            steps.flags[:] = _checkpointing_flags(steps.trainer.model)  # the trainer has just switched them on
            with track_memory(REHEARSAL) as steps.fitting.rehearsal:
                _rehearse(steps)
            self.is_first = True

        def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            if self.is_first:
                steps.fitting.first_step = self.first_step.enter_context(track_memory(FIRST_STEP))
                self.is_first = False

        def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            self.first_step.close()

    return Measure()


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


def _halve(inputs: Any, parts: list[Any], kind: str, *, cannot: str) -> int:
    """Half as many tokens as the largest part has.

    Args:
        kind: "train" or "eval".
        cannot: why the batch cannot be split; "": it can.

    Raises:
        DoesNotFit: it cannot be split, or each part is one row already.
    """
    if cannot:
        setting = f"per_device_{kind}_batch_size"
        raise DoesNotFit(
            setting,
            found=_("a batch that does not fit and cannot be split: {why}", why=cannot),
            expected=_("a batch that fits"),
            fix=_("set a smaller {setting}", setting=setting),
        )
    largest = max(part["input_ids"].numel() for part in parts)
    if len(_split(inputs, largest // 2)) == len(parts):
        found = _("not enough memory to evaluate it alone")
        if kind == "train":
            found = _("not enough memory to train on it alone")
        raise DoesNotFit(
            _("a conversation of {tokens} tokens", tokens=largest),
            found=found,
            expected=_("room for the longest conversation"),
            fix=_("set a smaller MAX_SEQ_LENGTH, a smaller model, or restart the session if other work fills it"),
        )
    return largest // 2


def _require_alone(inputs: Any, args: Any, kind: str) -> None:
    """Raises DoesNotFit where other processes train along: they may have begun to add this batch's gradients up."""
    rank, size = rank_and_size()
    if size > 1:
        setting = f"per_device_{kind}_batch_size"
        raise DoesNotFit(
            _("{setting} {value} on rank {rank}", setting=setting, value=getattr(args, setting), rank=rank),
            found=_("a batch of {tokens:,} tokens that does not fit", tokens=inputs["input_ids"].numel()),
            expected=_("one that fits on every device"),
            fix=_("set MICRO_BATCH below it, with a larger ACCUMULATION, or a smaller MAX_SEQ_LENGTH"),
        )


def _mean_loss(done: list[Any], parts: list[Any]) -> Any:
    """The loss of a whole batch, from its parts' (loss, …), each the mean over the labels that are predicted."""
    counts = [(part["labels"][..., 1:] != -100).sum() for part in parts]
    # A part without such tokens has no mean (0 / 0), and no part in the whole.
    sums = [loss * count.to(loss.device) for (loss, *_), count in zip(done, counts, strict=True) if count]
    return sum(sums) / sum(counts).to(done[0][0].device)


def _rehearse(steps: _Steps) -> None:
    """Train and evaluate the longest rows, and leave everything as it was but the memory's high-water mark."""
    import torch
    from accelerate.utils import send_to_device

    trainer = steps.trainer
    args, model = trainer.args, trainer.model_wrapped
    kept = [name for name in ("_metrics", "_total_train_tokens") if name in vars(trainer)]
    metrics = {name: copy.deepcopy(vars(trainer)[name]) for name in kept}
    devices = [torch.cuda.current_device()] if torch.cuda.is_available() else []
    with torch.random.fork_rng(devices):
        padded = not getattr(args, "padding_free", False)
        rows = longest(trainer.train_dataset, args.per_device_train_batch_size, steps.peaks_beyond, padded=padded)
        # On the device, as the trainer's own loader puts it: with several processes its tokens are counted over NCCL.
        batch = send_to_device(trainer.data_collator(rows), args.device)
        batches, items = trainer.get_batch_samples(iter([batch]), 1, args.device)
        model.train()
        trainer.current_gradient_accumulation_steps = 1  # the trainer sets it for each step, and not before the first
        trainer.training_step(model, batches[0], items)
        _drop_gradients(model, [])
        if trainer.eval_dataset is not None and args.eval_strategy != "no":
            model.eval()  # as the trainer's own loop does, and prediction_step alone does not
            rows = longest(trainer.eval_dataset, args.per_device_eval_batch_size, lambda tokens: True, padded=padded)
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


def longest(dataset: Any, count: int, fits: Callable[[int], bool], *, padded: bool) -> list[dict[str, Any]]:
    """The longest row, and then the next longest ones, up to so many, with which the tokens of all of them fit."""
    lengths = [len(ids) for ids in dataset["input_ids"]]
    first, *others = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    chosen, tokens = [first], lengths[first]
    for row in others:
        more = lengths[first] if padded else lengths[row]
        if len(chosen) < count and fits(tokens + more):
            chosen.append(row)
            tokens += more
    rows = [dataset[row] for row in chosen]
    return [{name: row[name] for name in ("input_ids", "labels") if name in row} for row in rows]


def _drop_gradients(model: Any, kept: list[tuple[Any, Any]]) -> None:
    """Throw away what an unfinished step left, put back what was there before it, and free the cache."""
    model.zero_grad(set_to_none=True)
    for parameter, gradient in kept:
        parameter.grad = gradient.clone()  # the next attempt adds to it
    _empty_cache()


def _empty_cache() -> None:
    import gc

    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
