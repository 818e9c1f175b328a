"""The loss on rows that are never trained on, with how much it might differ by chance."""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from helpers.base import InputError
from helpers.masking.batches import row_key
from helpers.messages import _
from helpers.training.weights import frozen_checksum

RESAMPLES = 2000
CONFIDENCE = 0.95
LOGITS_AT_ONCE = 2**26  # numbers: 256 MiB in float32


@dataclass(frozen=True)
class HeldOutLosses:
    """How well a model predicts each held-out conversation's answers.

    Attributes:
        sums: for each conversation, the negative log-likelihood of its answer tokens, summed, in nats.
        tokens: for each conversation, how many answer tokens were predicted.
        frozen_checksum: `frozen_checksum` of the model at that moment.
        rows: for each conversation, what `row_key` calls it.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]
    frozen_checksum: int = field(default=0, repr=False)
    rows: tuple[int, ...] = field(default=(), repr=False, compare=False)

    @property
    def loss(self) -> float:
        """The mean over all answer tokens, nats a token: a long answer counts more than a short one."""
        return math.fsum(self.sums) / sum(self.tokens)

    @property
    def perplexity(self) -> float:
        """exp(loss): among so many equally likely tokens the model is, on average, in doubt."""
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of `loss`, see `bootstrap_interval`."""
        return bootstrap_interval(self.sums, self.tokens)

    def __repr__(self) -> str:
        low, high = self.interval
        return _(
            "{conversations} held-out conversations, {tokens:,} answer tokens: loss {loss:.3f} "
            "(95 % interval {low:.3f} to {high:.3f}), perplexity {perplexity:.2f}",
            conversations=len(self.sums),
            tokens=sum(self.tokens),
            loss=self.loss,
            low=low,
            high=high,
            perplexity=self.perplexity,
        )


def bootstrap_interval(sums: Sequence[float], tokens: Sequence[int]) -> tuple[float, float]:
    """A 95 % interval for a mean over tokens, when what was drawn at random were conversations.

    Percentile bootstrap (Efron and Tibshirani 1993, An Introduction to the Bootstrap, chapter 13) of the ratio
    sum(sums) / sum(tokens): conversations are drawn anew, with replacement, as many as there are, 2,000 times; the
    interval holds the middle 95 % of the ratios. The tokens of one conversation are not independent, hence whole
    conversations (as clustered errors: Miller 2024, arXiv:2411.00640). Differences of two models on the same
    conversations, as `sums`, give the paired interval. It is too narrow for fewer than about 20 conversations. The
    seed is fixed: the same numbers give the same interval.

    Args:
        sums, tokens: one each a conversation.

    Returns:
        (low, high); (-inf, inf) for fewer than two conversations, (nan, nan) where a sum is not finite.

    Example: sums [2, 4], tokens [2, 2] -> (1.0, 2.0): half of the draws are mixed, a quarter is all the first
    """
    import numpy as np

    if len(sums) < 2:
        return -math.inf, math.inf
    if not all(map(math.isfinite, sums)):
        return math.nan, math.nan
    size = len(sums)
    drawn = np.random.default_rng(0).multinomial(size, np.full(size, 1 / size), size=RESAMPLES)
    counts = drawn @ np.asarray(tokens, float)
    ratios = (drawn @ np.asarray(sums, float))[counts > 0] / counts[counts > 0]
    low, high = np.quantile(ratios, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return float(low), float(high)


def fall_interval(before: HeldOutLosses, after: HeldOutLosses) -> tuple[float, float]:
    """The paired 95 % interval of `before.loss - after.loss`, see `bootstrap_interval`.

    Raises:
        InputError: they are not of the same rows.
    """
    if before.tokens != after.tokens:
        counts = dict(before=len(before.tokens), after=len(after.tokens))
        found = _("{before} and {after} conversations, or answers of other lengths", **counts)
        fix = _("measure the same dataset")
        raise InputError(_("before and after"), found=found, expected=_("the same rows"), fix=fix)
    falls = [earlier - later for earlier, later in zip(before.sums, after.sums, strict=True)]
    return bootstrap_interval(falls, before.tokens)


def held_out_losses(model: Any, dataset: Any, *, batch_size: int = 8) -> HeldOutLosses:
    """Measure a model on the answers of conversations that it was not trained on, one by one.

    `loss` equals the trainer's `eval_loss` where that sees all rows in one batch. With several, Transformers averages
    the batches' means, each weighted by its rows, so that a token counts more in a batch with short answers; and with
    `train_sampling_strategy="group_by_length"` the batches themselves are drawn at random. This mean has neither
    effect.

    Memory: the logits are computed for answer tokens alone, at most `LOGITS_AT_ONCE` numbers at a time. (All logits of
    one row of 2,048 tokens over 128,256 words are 1 GiB in float32; Unsloth returns none where labels are given.)

    Args:
        model: a causal language model, plain, PEFT or Unsloth; its mode is restored.
        dataset: rows with `input_ids` and `labels`, -100 where a token is no part of an answer.
        batch_size: conversations at once; similar lengths are grouped to save padding.

    Raises:
        InputError: there are no rows, no labels, or no answer tokens in any row.

    Example:
        >>> held_out_losses(model, trainer.eval_dataset)
        48 held-out conversations, 1,203 answer tokens: loss 4.893 (95 % interval 4.75 to 5.03), perplexity 133.35
    """
    import torch

    rows = [(list(row["input_ids"]), list(row["labels"])) if "labels" in row else None for row in dataset]
    if not rows or None in rows or all(label == -100 for _, labels in rows for label in labels[1:]):
        found = _("no rows") if not rows else _("no labels") if None in rows else _("labels that are all -100")
        expected = _("rows with labels on the answers")
        fix = _("pass trainer.eval_dataset after train_on_responses_only")
        raise InputError(_("held-out rows"), found=found, expected=expected, fix=fix)
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    head, device = base.get_output_embeddings(), next(base.parameters()).device
    dtype = head.weight.dtype
    half = torch.autocast(device.type, dtype=dtype, enabled=dtype in (torch.float16, torch.bfloat16))
    sums, tokens = [0.0] * len(rows), [sum(label != -100 for label in labels[1:]) for _, labels in rows]
    order = sorted(range(len(rows)), key=lambda number: len(rows[number][0]))
    # The output layer's input is caught on its way, so that the model runs just as it does in training.
    caught: list[Any] = []
    hook = base.get_decoder().register_forward_hook(lambda _, given, output: caught.append(output[0]))
    was_training = model.training
    model.eval()
    try:
        for start in range(0, len(rows), batch_size):
            numbers = order[start : start + batch_size]
            batch = _pad([rows[number] for number in numbers], device)
            with torch.no_grad(), half:
                ids, mask = batch["input_ids"], batch["attention_mask"]
                model(input_ids=ids, attention_mask=mask, logits_to_keep=1, use_cache=False)
                row_sums = _sum_losses(head, caught.pop(), batch["labels"], base.config)
            for number, row_sum in zip(numbers, row_sums.tolist(), strict=True):
                sums[number] = row_sum
    finally:
        hook.remove()
        model.train(was_training)
    return HeldOutLosses(tuple(sums), tuple(tokens), frozen_checksum(model), tuple(row_key(ids) for ids, _ in rows))


def _pad(rows: Sequence[tuple[list[int], list[int]]], device: Any) -> dict[str, Any]:
    """Rows of (ids, labels) as tensors of shape (rows, longest), padded on the right."""
    import torch

    width = max(len(ids) for ids, _ in rows)
    columns = {
        "input_ids": [ids + [0] * (width - len(ids)) for ids, _ in rows],
        "labels": [labels + [-100] * (width - len(labels)) for _, labels in rows],
        "attention_mask": [[1] * len(ids) + [0] * (width - len(ids)) for ids, _ in rows],
    }
    return {name: torch.tensor(values, device=device) for name, values in columns.items()}


def _sum_losses(head: Any, hidden: Any, labels: Any, config: Any) -> Any:
    """(rows,): the losses of each row's answer tokens, summed, from the last hidden states (rows, tokens, width)."""
    import torch

    hidden, labels = hidden[:, :-1], labels[:, 1:].to(hidden.device)
    row, place = torch.nonzero(labels != -100, as_tuple=True)
    sums = torch.zeros(len(labels), dtype=torch.float64, device=hidden.device)
    at_once = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
    cap = getattr(config, "final_logit_softcapping", None)  # Gemma 2
    for chunk, at in zip(row.split(at_once), place.split(at_once), strict=True):
        logits = head(hidden[chunk, at].to(head.weight.dtype)).float()
        logits = torch.tanh(logits / cap) * cap if cap else logits
        losses = torch.nn.functional.cross_entropy(logits, labels[chunk, at], reduction="none")
        sums.index_add_(0, chunk, losses.double())
    return sums
