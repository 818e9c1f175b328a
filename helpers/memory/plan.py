"""How much memory a training step will take, and which way to form its batches is the fastest that fits.

GiB are 2**30 bytes.
"""

import bisect
import functools
import itertools
import math
import operator
import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.base import InputError, Table
from helpers.memory.stats import GIB
from helpers.messages import _

T4_GIB = 14.748
MARGIN = 0.1  # of the card: what the prediction may be wrong by
# (16-bit matrix FLOP/s, dense; memory bytes/s) by compute capability, from NVIDIA's data sheets: T4, A100, L4, H100.
# Half of the FLOP/s is assumed to be reached, as Unsloth does (unsloth/utils/padding_choice.py).
SPEEDS = {(7, 5): (65e12, 320e9), (8, 0): (312e12, 1555e9), (8, 9): (121e12, 300e9), (9, 0): (990e12, 3350e9)}
REACHED = 0.5
# Launching one pass through one layer keeps the host busy for so long, whatever the batch, measured on an H100 host:
# padded 0.36 s a step in 1 micro-batch x 28 layers x 3 passes, padding-free 1.37 s in 4 x 28 x 2 (without xformers each
# conversation has an attention call of its own).
PADDED_HOST_SECONDS, PADDING_FREE_HOST_SECONDS = 0.0043, 0.0061
OFFLOAD_BYTES_PER_SECOND = 12e9  # PCIe 3, 16 lanes, as reached
ROWS = 5  # of the plan that are shown


def predict_peak(
    config: Any,
    *,
    tokens: int,
    lora_rank: int,
    use_gradient_checkpointing: bool | str,
    checkpointed_layers: int | None = None,
    compiled: bool = False,
    triton_loss: bool = False,
    load_in_4bit: bool = True,
) -> float:
    """The most memory that a training step reserves, in GiB, for a Llama-like model with LoRA on all seven matrices.

    Args:
        config: the model's configuration (`AutoConfig`, or `model.config`).
        tokens: those of the largest micro-batch, padding included.
        lora_rank: LoRA's r.
        use_gradient_checkpointing: False, True or "unsloth".
        checkpointed_layers: with True, only the first so many layers are checkpointed; None: all of them.
        compiled: Unsloth compiles each layer, as it does for padded batches unless UNSLOTH_BLOCK_COMPILE=0.
        triton_loss: the loss runs in Triton kernels, as it does unless UNSLOTH_FUSED_LINEAR_TRITON=0.
        load_in_4bit: NF4 with double quantisation; else 16 bits.

    With H the hidden size, I the intermediate size, L layers, V the vocabulary, T tokens, and W = 2HI bytes (one MLP
    matrix, dequantised), in bytes:

        fixed      2VH + 0.516 a weight of the layers (NF4: 4 bits, and 8 bits + a little for each 64 weights; Dettmers
                   et al. 2023, arXiv:2305.14314) + 10.1 a LoRA parameter (4 itself, 4 its gradient, 2 8-bit AdamW)
        kept       T * L * 2H with checkpointing (each layer's input; Chen et al. 2016, arXiv:1604.06174), T * 8H when
                   it is offloaded, T * L * (4I + 15.8H) without
        loss       T * 5H + 3W + 29.7V for each token of a chunk (4V with Triton's kernels): the logits come in chunks
                   of 512 tokens or more (`fused_linear_rows` in unsloth_zoo/fused_losses/fused_linear.py)
        one layer  T * (6.3I + 14.8H) + 5.3W, again while its gradient is taken (compiled, it is half as much more)

        peak = 1.02 * (fixed + kept + max(loss, one layer))

    Where only the first layers are checkpointed, what the others keep is gone when those are computed again, because
    gradients are taken from the last layer to the first: it adds to the loss alone.

    Form after those sources; the factors are fitted to 91 measured configurations of Llama 3.2 1B and 3B with Triton's
    loss (one H100 capped to a T4's memory, Unsloth 2026.10.9, 2026-11-24; tests/benchmarks/results/planner.csv), none
    of which is off by more than 5 %, and the loss without Triton to the runs in tests/benchmarks/results/training.csv.
    `python tests/benchmarks/planner.py` measures them again; 54 others, measured later, are within 5.8 %.

    Raises:
        InputError: the configuration is not that of a Llama-like model.

    Example: 3B, 8 conversations of 1,792 tokens, rank 16, True -> 6.94 (measured: 6.94)
    """
    hidden, intermediate, layers, vocabulary, attention, kv = _shape(config)
    lora = lora_rank * layers * (2 * (hidden + attention) + 2 * (hidden + kv) + 3 * (hidden + intermediate))
    embeddings = 2 * vocabulary * hidden * (1 if config.tie_word_embeddings else 2)
    fixed = embeddings + _linear_weights(config) * (0.516 if load_in_4bit else 2) + 0.032 * GIB + 10.1 * lora
    matrix = 2 * hidden * intermediate
    again = layers if use_gradient_checkpointing and checkpointed_layers is None else checkpointed_layers or 0
    inputs = (4 if use_gradient_checkpointing == "unsloth" else again) * 2 * hidden
    whole = (layers - again) * (4 * intermediate + 15.8 * hidden)
    chunk = min(tokens, max(512, 2 ** int(math.log2(512 * 151_936 / vocabulary))))
    loss = tokens * 5 * hidden + 3 * matrix + chunk * vocabulary * (4 if triton_loss else 29.7)
    products = (2.2 if compiled else 5.3) * matrix
    layer = tokens * (1.5 if compiled else 1.0) * (6.3 * intermediate + 14.8 * hidden) + products if again else 0
    return 1.02 * (fixed + tokens * inputs + max(tokens * whole + max(loss, products), layer)) / GIB


@dataclass(frozen=True)
class BatchOption:
    """One way to make a step of the effective batch.

    Attributes:
        micro_batch, accumulation: conversations at once, and how often in a step.
        checkpointing: False; True, in only as many layers as a micro-batch's memory needs; or "unsloth".
        padding_free: conversations one after the other in one long row; False: side by side, padded.
        predicted_gib: the peak that `predict_peak` gives for the longest conversations.
        seconds: an estimate for one step, to compare options by; not a promise.
        fits: whether the prediction lies below the limit.
    """

    micro_batch: int
    accumulation: int
    checkpointing: bool | str
    padding_free: bool
    predicted_gib: float
    seconds: float
    fits: bool

    def __str__(self) -> str:
        return (
            f"MICRO_BATCH = {self.micro_batch}, ACCUMULATION = {self.accumulation}, "
            f"CHECKPOINTING = {self.checkpointing!r}, PADDING_FREE = {self.padding_free}"
        )


@dataclass(frozen=True, repr=False)
class BatchPlan(Table):
    """The reader's own option beside the fastest that fit.

    Attributes:
        yours: what the reader chose.
        fitting: all that fit, the fastest first.
        limit_gib: what a step may take.
        device: whose memory and speed were planned for.
        most_tokens: those that fit into a micro-batch with 0, 1, 2, … layers checkpointed, up to all.
    """

    yours: BatchOption
    fitting: tuple[BatchOption, ...]
    limit_gib: float
    device: str
    most_tokens: tuple[int, ...]

    @property
    def fastest(self) -> BatchOption:
        return self.fitting[0]

    def checkpointed_layers(self, tokens: int) -> int:
        """In how many layers, from the first, a micro-batch of so many tokens (padding included) is checkpointed."""
        if self.yours.checkpointing is True:
            return _fewest_layers(self.most_tokens, tokens)
        return len(self.most_tokens) - 1 if self.yours.checkpointing else 0

    def raise_if_failed(self) -> None:
        """Raises InputError where the reader's own option does not fit."""
        if not self.yours.fits:
            raise InputError(
                _("MICRO_BATCH and CHECKPOINTING"),
                found=_("{gib:.1f} GiB needed", gib=self.yours.predicted_gib),
                expected=_("at most {gib:.1f} GiB", gib=self.limit_gib),
                fix=_("copy into Choices: {choices}", choices=self.fastest),
            )

    def _table(self) -> tuple[tuple[str, ...], list[list[object]]]:
        choices = ("MICRO_BATCH", "ACCUMULATION", "CHECKPOINTING", "PADDING_FREE")
        headers = (*choices, "GiB", _("s/step (estimate)"), "")
        shown = list(self.fitting[:ROWS])
        shown += [self.yours] if self.yours not in shown else []
        return headers, [
            [
                option.micro_batch,
                option.accumulation,
                str(option.checkpointing),
                str(option.padding_free),
                f"{option.predicted_gib:.1f}",
                f"{option.seconds:.2f}",
                _("← yours") if option == self.yours else "",
            ]
            for option in shown
        ]

    def _notes(self) -> list[str]:
        values = dict(device=self.device, gib=self.limit_gib, choices=self.fastest)
        gain = self.yours.seconds / self.fastest.seconds
        if not self.yours.fits:
            note = _("For {device}: at most {gib:.1f} GiB. Yours does not fit. Copy into Choices: {choices}", **values)
        elif gain < 1.005:
            note = _("For {device}: at most {gib:.1f} GiB. Nothing that fits is faster than yours.", **values)
        else:
            note = _(
                "For {device}: at most {gib:.1f} GiB. {gain:.2f} times as fast as yours, by estimate: {choices}",
                **values,
                gain=gain,
            )
        return [note]


def plan_batch(
    config: Any,
    *,
    lengths: Sequence[int],
    micro_batch: int,
    accumulation: int,
    checkpointing: bool | str,
    padding_free: bool,
    lora_rank: int,
    load_in_4bit: bool = True,
    memory_gib: float | None = None,
    capability: tuple[int, int] | None = None,
) -> BatchPlan:
    """Hold one way to form batches against all others of the same effective batch: what fits, and what is fastest.

    Args:
        config: the model's configuration.
        lengths: tokens of each conversation that will be trained, 1 or more.
        micro_batch, accumulation, checkpointing, padding_free: the reader's choice, see `BatchOption`.
        lora_rank, load_in_4bit: see `predict_peak`.
        memory_gib: what this process may use; None: what is free on the GPU, and what PyTorch has reserved there and
            not allocated, so plan before the model is loaded. Without a GPU the plan is for a T4.
        capability: the GPU's compute capability; None: this GPU's, or a T4's.

    The plan is for Unsloth without compiled layers (UNSLOTH_BLOCK_COMPILE=0, as chapter 04 sets it). Conversations are
    drawn at random where none is padded, and grouped by length where they are.

    A micro-batch is planned for the longest conversations there are, with a margin of 10 % of the memory. Its time is
    estimated as the longer of what the GPU needs (2 FLOP a weight and token, padding included, and each 4-bit weight
    read, written in 16 bits and read again; for the forward pass, the recomputation and the backward pass; and the
    logits with their gradient) and what the host needs to launch it (`PADDED_HOST_SECONDS` or
    `PADDING_FREE_HOST_SECONDS` a layer and pass), plus copying where activations are offloaded. So padding pays where
    the host is what takes the time; elsewhere it is wasted.

    Of 20 runs with a T4's arithmetic (the options in `tests/benchmarks/results/t4_arithmetic.csv`) each estimate is
    within 16 % of the time that was measured, and the first of the plan is the fastest of five, for 1B and 3B and two
    kinds of rows. The logits were added after those runs.

    Checkpointing (`True`) looks at each micro-batch: the memory that the longest one leaves no room in has room for
    what most layers of an ordinary one keep, and those are not computed again. `fit_into_memory` does it.

    Raises:
        InputError: not even one conversation at a time fits, a number makes no sense, or the configuration is not that
            of a Llama-like model.

    Example:
        >>> plan = plan_batch(config, lengths=lengths, micro_batch=2, accumulation=4, checkpointing=False, …)
        >>> plan.fastest.micro_batch
        8
    """
    _check_plan(lengths, effective_batch_size=micro_batch * accumulation, memory_gib=memory_gib)
    memory_gib, capability, device = _device(memory_gib, capability)
    longest = sorted(lengths, reverse=True)
    costs = _Costs(
        config,
        longest=longest,
        effective_batch_size=micro_batch * accumulation,
        lora_rank=lora_rank,
        load_in_4bit=load_in_4bit,
        limit_gib=memory_gib * (1 - MARGIN),
        capability=capability,
    )
    options = _options(costs)
    fitting = tuple(option for option in options if option.fits)
    if not fitting:
        smallest = min(options, key=lambda option: option.predicted_gib)
        raise InputError(
            _("the longest conversation ({tokens} tokens)", tokens=longest[0]),
            found=_("{gib:.1f} GiB needed for it alone", gib=smallest.predicted_gib),
            expected=_("at most {gib:.1f} GiB", gib=costs.limit_gib),
            fix=_("choose a smaller model, a smaller MAX_SEQ_LENGTH or a smaller LoRA rank"),
        )
    yours = costs.option(micro_batch, checkpointing, padding_free)
    return BatchPlan(yours, fitting, costs.limit_gib, device, costs.most_tokens)


def _check_plan(lengths: Sequence[int], *, effective_batch_size: int, memory_gib: float | None) -> None:
    for where, wrong, found, expected in (
        ("lengths", not lengths, _("no conversations"), _("at least one")),
        ("lengths", min(lengths, default=1) < 1, _("a conversation without tokens"), _("1 token or more in each")),
        ("MICRO_BATCH × ACCUMULATION", effective_batch_size < 1, str(effective_batch_size), _("1 or more")),
        ("memory_gib", memory_gib is not None and not memory_gib > 0, str(memory_gib), _("more than 0")),
    ):
        if wrong:
            raise InputError(where, found=found, expected=expected, fix=_("correct it, or check the data set"))


def _device(memory_gib: float | None, capability: tuple[int, int] | None) -> tuple[float, tuple[int, int], str]:
    """Memory, compute capability and name of what is planned for: as given, else this GPU's, else a T4's."""
    import torch

    gpu = torch.cuda.is_available()
    if capability is None:
        capability = torch.cuda.get_device_capability() if gpu else (7, 5)
    if memory_gib is not None:
        return memory_gib, capability, f"{memory_gib:.1f} GiB"
    if not gpu:
        return T4_GIB, capability, _("a T4 (there is no GPU here)")
    free = torch.cuda.mem_get_info()[0]
    memory_gib = (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / GIB
    return memory_gib, capability, torch.cuda.get_device_name()


@dataclass(frozen=True, kw_only=True)
class _Costs:
    """What one way to form micro-batches costs, in memory and time; see `plan_batch`."""

    config: Any = field(kw_only=False)
    longest: Sequence[int]  # tokens of each conversation, the longest first
    effective_batch_size: int
    lora_rank: int
    load_in_4bit: bool
    limit_gib: float
    capability: tuple[int, int]

    def peak(self, tokens: int, mode: bool | str, checkpointed_layers: int | None = None) -> float:
        return predict_peak(
            self.config,
            tokens=tokens,
            lora_rank=self.lora_rank,
            load_in_4bit=self.load_in_4bit,
            use_gradient_checkpointing=mode,
            checkpointed_layers=checkpointed_layers,
            triton_loss=os.environ.get("UNSLOTH_FUSED_LINEAR_TRITON", "1") != "0",
        )

    @functools.cached_property
    def shuffled(self) -> list[int]:
        """The lengths in an order like that of a training."""
        return random.Random(0).sample(self.longest, len(self.longest))

    @functools.cached_property
    def most_tokens(self) -> tuple[int, ...]:
        """See `BatchPlan.most_tokens`: what fits with 0, 1, … checkpointed layers."""
        fitting = range(self.effective_batch_size * self.longest[0] + 1)
        return tuple(
            bisect.bisect_right(fitting, self.limit_gib, key=functools.partial(self._peak_with, layers)) - 1
            for layers in range(self.config.num_hidden_layers + 1)
        )

    def _peak_of(self, tokens: int, mode: bool | str) -> float:
        return self.peak(tokens, mode, _fewest_layers(self.most_tokens, tokens) if mode is True else None)

    def _peak_with(self, checkpointed_layers: int, tokens: int) -> float:
        return self.peak(tokens, True, checkpointed_layers)

    def option(self, micro_batch: int, mode: bool | str, padding_free: bool) -> BatchOption:
        layers, weights = self.config.num_hidden_layers, _linear_weights(self.config)
        flops, bytes_per_second = SPEEDS.get(tuple(self.capability), SPEEDS[7, 5])
        lengths = self.shuffled if padding_free else self.longest
        batches = [lengths[i : i + micro_batch] for i in range(0, len(lengths), micro_batch)]
        sizes = [sum(batch) if padding_free else len(batch) * batch[0] for batch in batches]
        again = [_fewest_layers(self.most_tokens, size) if mode is True else layers for size in sizes]
        passes = [2 + (count / layers if mode else 0) for count in again]
        # The head's product, and its gradient, which the loss takes in the forward pass.
        head = 4 * self.config.vocab_size * self.config.hidden_size * sum(sizes)
        gpu = (2 * weights * sum(map(operator.mul, sizes, passes)) + head) / (flops * REACHED)
        gpu += sum(passes) * weights * (4.5 if self.load_in_4bit else 2) / bytes_per_second
        host = sum(passes) * layers * (PADDING_FREE_HOST_SECONDS if padding_free else PADDED_HOST_SECONDS)
        # Offloaded, each layer's input goes to the host and comes back.
        copied = 2 * sum(sizes) * layers * 2 * self.config.hidden_size if mode == "unsloth" else 0
        steps = len(self.longest) / self.effective_batch_size
        seconds = (max(gpu, host) + copied / OFFLOAD_BYTES_PER_SECOND) / steps
        longest = self.longest[:micro_batch]
        largest = sum(longest) if padding_free else len(longest) * longest[0]
        peak = max(self._peak_of(size, mode) for size in {largest, *sizes})
        accumulation = self.effective_batch_size // micro_batch
        return BatchOption(micro_batch, accumulation, mode, padding_free, peak, seconds, peak <= self.limit_gib)


def _options(costs: _Costs) -> list[BatchOption]:
    """All ways to form micro-batches, the fastest first."""
    whole = costs.effective_batch_size
    micro_batches = [size for size in range(1, whole + 1) if whole % size == 0]
    ways = itertools.product(micro_batches, (False, True, "unsloth"), (True, False))
    options = [costs.option(*way) for way in ways]
    kept = {(each.micro_batch, each.padding_free) for each in options if each.fits and not each.checkpointing}
    # Where all can be kept, nothing has to be computed again: True is False once more.
    options = [
        each for each in options if each.checkpointing is not True or (each.micro_batch, each.padding_free) not in kept
    ]
    return sorted(options, key=lambda each: (each.seconds, each.accumulation))


def _fewest_layers(most_tokens: Sequence[int], tokens: int) -> int:
    """See `BatchPlan.most_tokens`; all layers where even these are too few."""
    return min(bisect.bisect_left(most_tokens, tokens), len(most_tokens) - 1)


def _shape(config: Any) -> tuple[int, int, int, int, int, int]:
    """(hidden, intermediate, layers, vocabulary, width of the queries, width of the keys)."""
    needed = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    if missing := [name for name in (*needed, "vocab_size") if not getattr(config, name, None)]:
        raise InputError(
            type(config).__name__,
            found=_("a configuration without {names}", names=", ".join(missing)),
            expected=_("one of a Llama-like model"),
            fix=_("choose such a model, or set the batch by hand (of a model that sees, try config.get_text_config())"),
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return (
        config.hidden_size,
        config.intermediate_size,
        config.num_hidden_layers,
        config.vocab_size,
        head * config.num_attention_heads,
        head * config.num_key_value_heads,
    )


def _linear_weights(config: Any) -> int:
    """The weights of all layers' matrices. Example: Llama 3.2 3B -> 2,818,572,288."""
    hidden, intermediate, layers, _, attention, kv = _shape(config)
    return layers * (2 * hidden * attention + 2 * hidden * kv + 3 * hidden * intermediate)
