"""Around the trainer: curves that grow while it trains, and evidence that the model learned."""

import csv
import io
import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import InputError, html_table, replace_file, text_table
from helpers.divergence import allowed_overflows
from helpers.figures import MARK, TRAINED, as_image
from helpers.memory import memory_stats

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import TrainerCallback

# More of the palette of helpers.figures, and a grey that is dark enough for lines.
GREEN, PURPLE, SLATE = "#009e73", "#cc79a7", "#5f6368"
MEASURES = ("loss", "held_out_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "seconds")
LOGGED = {"loss": "loss", "eval_loss": "held_out_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
DRAWING_SHARE, WRITING_SHARE = 0.02, 0.005  # of the run's time, at most
RESAMPLES = 2000
CONFIDENCE = 0.95
LOGITS_AT_ONCE = 2**26  # numbers: 256 MiB in float32
OVERFIT_TOLERANCE = 0.01  # of the best held-out loss; the trainer's average depends this much on how rows are batched
RATE_TOLERANCE = 1e-6  # of the learning rate; a schedule's factor is exactly 1 at its peak


class EvidenceError(InputError):
    """Training left no trace, or a trace that it must not leave."""


class CurvesError(InputError):
    """The folder for the curves cannot be used."""


@dataclass(frozen=True)
class Curves:
    """What a run logged, as far as it has come.

    Attributes:
        rows: one for each step that was logged, in order: "step" and `MEASURES`, None where nothing was measured.
            "seconds" is wall time since the first step began, all sessions of the run together; "memory_gib" the peak
            that was reserved on the card (without one: this process's memory); "tokens_per_second" counts no padding,
            evaluating, saving or drawing.
        max_steps: the length of the run.
        is_gpu, total_gib: whether the memory is the card's, and the card's (or the machine's) size.
    """

    rows: tuple[Mapping[str, float | None], ...]
    max_steps: int
    is_gpu: bool = False
    total_gib: float = 0.0

    def column(self, name: str) -> tuple[list[int], list[float]]:
        """(steps, values) of one measure, without the steps at which it was not measured."""
        points = [(row["step"], row[name]) for row in self.rows if row[name] is not None]
        return [step for step, _ in points], [value for _, value in points]

    @property
    def seconds_left(self) -> float:
        """The steps still to go, by the pace of the last 20 rows (with their pauses to evaluate and save)."""
        steps, seconds = self.column("seconds")
        steps, seconds = [0, *steps][-21:], [0.0, *seconds][-21:]
        return (seconds[-1] - seconds[0]) / max(steps[-1] - steps[0], 1) * (self.max_steps - steps[-1])

    @property
    def title(self) -> str:
        """How far the run is. Example: "step 31 of 60, about 4 min 10 s left"."""
        steps, seconds = self.column("seconds")
        if not steps:
            return f"step 0 of {self.max_steps}"
        if steps[-1] >= self.max_steps:
            return f"{steps[-1]} steps in {duration(seconds[-1])}"
        return f"step {steps[-1]} of {self.max_steps}, about {duration(self.seconds_left)} left"

    def as_csv(self) -> str:
        """One line a step, with a header; empty where nothing was measured."""
        text = io.StringIO()
        table = csv.DictWriter(text, ("step", *MEASURES), lineterminator="\n")
        table.writeheader()
        table.writerows(self.rows)
        return text.getvalue()

    def as_json(self) -> dict[str, Any]:
        """The same as plain JSON values; what is not finite becomes null, because JSON has no word for it."""
        rows = [{name: _finite(value) for name, value in row.items()} for row in self.rows]
        return {"max_steps": self.max_steps, "is_gpu": self.is_gpu, "total_gib": self.total_gib, "rows": rows}


def duration(seconds: float) -> str:
    """Seconds as people say them. Example: 250 -> "4 min 10 s", 4000 -> "1 h 6 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    return f"{whole // 60} min {whole % 60} s" if whole < 3600 else f"{whole // 3600} h {whole % 3600 // 60} min"


def draw_curves(curves: Curves) -> "Figure":
    """Losses on top; learning rate, speed and memory below; how far the run is in the title."""
    import matplotlib
    from matplotlib.figure import Figure

    memory = "memory, peak GiB" if curves.is_gpu else "memory of this process, GiB"
    panels = [
        ("learning_rate", "learning rate", SLATE),
        ("tokens_per_second", "tokens a second, no padding", GREEN),
        ("memory_gib", memory, PURPLE),
    ]
    with matplotlib.rc_context({"font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left"}):
        figure = Figure(figsize=(7.4, 4.6), layout="constrained", facecolor="white")
        figure.suptitle(curves.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = figure.add_gridspec(2, 3, height_ratios=[1.7, 1])
        losses = figure.add_subplot(grid[0, :])
        for column, label, colour, style in (
            ("loss", "training", TRAINED, "-"),
            ("held_out_loss", "held-out (never trained)", MARK, "o--"),
        ):
            points = _finite_points(curves.column(column))
            losses.plot(*points, style, color=colour, label=label, markersize=5, clip_on=False)
        losses.set(title="loss on the answers, nats a token", xlabel="step")
        losses.legend(frameon=False, loc="upper right")
        _finish(losses, curves, ticks=6)
        for place, (column, title, colour) in enumerate(panels):
            axes = figure.add_subplot(grid[1, place])
            points = _finite_points(curves.column(column))
            axes.plot(*points, color=colour, linewidth=1.8, marker="o" if len(points[0]) == 1 else None)
            axes.set(title=title)
            _finish(axes, curves, ticks=4)
            if not points[0] and column == "tokens_per_second":
                wanted = 'not counted: set\ninclude_num_input_tokens_seen\n= "non_padding"'
                axes.text(0.5, 0.5, wanted, transform=axes.transAxes, ha="center", va="center", fontsize=8)
                axes.set_yticks([])
            elif column == "learning_rate":
                axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
            elif column == "memory_gib" and curves.is_gpu:
                axes.axhline(curves.total_gib, color=SLATE, linestyle="--", linewidth=1)
                axes.text(0, curves.total_gib * 1.02, f" the card has {curves.total_gib:.1f}", fontsize=8, va="bottom")
                axes.set_ylim(0, curves.total_gib * 1.2)
    return figure


def _finish(axes: Any, curves: Curves, *, ticks: int) -> None:
    top = max((max(line.get_ydata(), default=0) for line in axes.get_lines()), default=0)
    axes.set(xlim=(0, max(curves.max_steps, 1)), ylim=(0, top * 1.08 or 1))
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25, linewidth=0.6)
    axes.locator_params(axis="x", integer=True, nbins=ticks)
    axes.locator_params(axis="y", nbins=ticks)


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


def _finite_points(points: tuple[list[int], list[float]]) -> tuple[list[int], list[float]]:
    kept = [(step, value) for step, value in zip(*points, strict=True) if math.isfinite(value)]
    return [step for step, _ in kept], [value for _, value in kept]


class _Paced:
    """Says when to do something again so that it takes no more than a share of the time, and not too often."""

    def __init__(self, *, share: float, at_least: float) -> None:
        self.share, self.at_least = share, at_least
        self.next = -math.inf

    def due(self) -> bool:
        return time.monotonic() >= self.next

    def done(self, began: float) -> None:
        now = time.monotonic()
        self.next = now + max(self.at_least, (now - began) / self.share)


def live_plot(*, folder: str | Path) -> "TrainerCallback":
    """A trainer callback that draws the run into one picture, updated in place, and writes it as CSV and JSON.

    Losses, learning rate, tokens per second, memory, and the time left. In Jupyter, in Colab and headless (papermill)
    alike the notebook ends up with one stored PNG on one display handle. Drawing takes at most 2 % of the time and
    writing 0.5 %, so that neither slows short steps down; `curves.csv` and `curves.json` are replaced whole, so that a
    run that is killed keeps its curves. They are also in each checkpoint (in its `trainer_state.json`): a run that is
    resumed, on this machine or another, shows its earlier points again. The callback's `curves` are a `Curves`.

    Tokens are those that Transformers counts: give the trainer `include_num_input_tokens_seen="non_padding"`.

    Args:
        folder: where `curves.csv`, `curves.json` and, at the end, `curves.png` are written; made if it does not exist.

    Raises:
        CurvesError: the folder cannot be made.

    Example:
        >>> trainer.add_callback(live_plot(folder=run.path / "curves"))
    """
    from transformers import TrainerCallback

    folder = Path(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        found = error.strerror or str(error)
        raise CurvesError(str(folder), found=found, expected="a folder", fix="give another one") from None
    return type("LivePlot", (_LivePlot, TrainerCallback), {})(folder)


class _LivePlot:
    """What `live_plot` returns, but for its base class, which would import Transformers with this module."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.rows: dict[int, dict[str, float | None]] = {}
        self.max_steps = 0
        self.handle = None
        self.drawing = _Paced(share=DRAWING_SHARE, at_least=2)
        self.writing = _Paced(share=WRITING_SHARE, at_least=0.5)
        self.can_write = True
        self.running = False

    @property
    def curves(self) -> Curves:
        memory = memory_stats()
        rows = tuple({"step": step} | self.rows[step] for step in sorted(self.rows))
        return Curves(rows, self.max_steps, memory.is_gpu, memory.total_gib)

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        saved = state.stateful_callbacks.get("LivePlot", {}).get("rows", {})  # in JSON the steps are strings
        rows = {int(step): dict(row) for step, row in saved.items()} | self.rows
        self.rows = {step: row for step, row in rows.items() if step <= state.global_step}
        # Written into each checkpoint with the trainer's state, as the rows are by then.
        state.stateful_callbacks["LivePlot"] = {"args": {}, "attributes": {}, "rows": self.rows}
        for entry in state.log_history:
            self.record(entry["step"], entry)
        self.max_steps, self.running = state.max_steps, True
        self.seconds_before = max((row["seconds"] or 0.0 for row in self.rows.values()), default=0.0)
        self.tokens = state.num_input_tokens_seen
        self.start_clock()
        if state.global_step:
            self.draw()

    def start_clock(self) -> None:
        self.clock_started = False
        self.began = self.since = self.paused_since = time.monotonic()
        self.paused = 0.0

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        if not self.clock_started:  # what other callbacks did before the first step (a rehearsal) was no training
            self.start_clock()
            self.clock_started = True

    def record(self, step: int, logs: Mapping[str, Any]) -> dict[str, float | None]:
        row = self.rows.setdefault(step, dict.fromkeys(MEASURES))
        row.update({column: float(logs[name]) for name, column in LOGGED.items() if name in logs})
        return row

    def on_step_end(self, args, state, control, **kwargs) -> None:
        self.paused_since = time.monotonic()

    def on_log(self, args, state, control, logs=None, **kwargs) -> None:
        if not LOGGED.keys() & logs.keys():
            return
        row = self.record(state.global_step, logs)
        if not self.max_steps:  # before training: the picture belongs where training is, the files may be resumed
            return
        if "loss" in logs:  # the GPU has just been waited for, so this is the time that the steps took
            now = self.paused_since = time.monotonic()
            tokens, seconds = state.num_input_tokens_seen - self.tokens, now - self.since - self.paused
            row["tokens_per_second"] = tokens / seconds if tokens and seconds > 0 else None
            row["memory_gib"] = memory_stats().peak_reserved_gib
            row["seconds"] = self.seconds_before + now - self.began
            self.since, self.tokens, self.paused = now, state.num_input_tokens_seen, 0.0
        if self.writing.due() or not self.running:
            self.write()
        if self.drawing.due() or not self.running:
            self.draw()
        self.count_pause()

    def count_pause(self) -> None:
        if self.running:
            now = time.monotonic()
            self.paused, self.paused_since = self.paused + now - self.paused_since, now

    def on_evaluate(self, args, state, control, **kwargs) -> None:
        self.count_pause()

    def on_save(self, args, state, control, **kwargs) -> None:
        self.count_pause()

    def on_train_end(self, args, state, control, **kwargs) -> None:
        self.running = False
        self.write()
        self.draw()

    def draw(self) -> None:
        from IPython.display import display

        began = time.monotonic()
        picture = as_image(draw_curves(self.curves))
        if self.handle is None:
            self.handle = display(picture, display_id=True)
        else:
            self.handle.update(picture)
        if not self.running:
            self.try_writing("curves.png", picture.data)
        self.drawing.done(began)

    def write(self) -> None:
        began, curves = time.monotonic(), self.curves
        self.try_writing("curves.csv", curves.as_csv().encode())
        self.try_writing("curves.json", json.dumps(curves.as_json()).encode())
        self.writing.done(began)

    def try_writing(self, name: str, content: bytes) -> None:
        try:
            replace_file(self.folder / name, content, durable=False)
        except OSError as error:  # a full disk must not end the training
            if self.can_write:
                print(f"The curves are not written any more: {self.folder / name}: {error.strerror}. Training goes on.")
            self.can_write = False


@dataclass(frozen=True)
class HeldOutLosses:
    """How well a model predicts each held-out conversation's answers.

    Attributes:
        sums: for each conversation, the negative log-likelihood of its answer tokens, summed, in nats.
        tokens: for each conversation, how many answer tokens were predicted.
    """

    sums: tuple[float, ...]
    tokens: tuple[int, ...]

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
        return (
            f"{len(self.sums)} held-out conversations, {sum(self.tokens):,} answer tokens: loss {self.loss:.3f} "
            f"(95 % interval {low:.3f} to {high:.3f}), perplexity {self.perplexity:.2f}"
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
        EvidenceError: they are not of the same rows.
    """
    if before.tokens != after.tokens:
        found = f"{len(before.tokens)} and {len(after.tokens)} conversations, or answers of other lengths"
        raise EvidenceError("before and after", found=found, expected="the same rows", fix="measure the same dataset")
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
        EvidenceError: there are no rows, no labels, or no answer tokens in any row.

    Example:
        >>> held_out_losses(model, trainer.eval_dataset)
        48 held-out conversations, 1,203 answer tokens: loss 4.893 (95 % interval 4.75 to 5.03), perplexity 133.35
    """
    import torch

    rows = [(list(row["input_ids"]), list(row["labels"])) if "labels" in row else None for row in dataset]
    if not rows or None in rows or all(label == -100 for _, labels in rows for label in labels[1:]):
        found = "no rows" if not rows else "no labels" if None in rows else "labels that are all -100"
        fix = "pass trainer.eval_dataset after train_on_responses_only"
        raise EvidenceError("held-out rows", found=found, expected="rows with labels on the answers", fix=fix)
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
    return HeldOutLosses(tuple(sums), tuple(tokens))


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


def frozen_checksum(model: Any) -> int:
    """A checksum over every weight that is not trained: equal before and after training.

    It is a sum over all bits, as 32-bit numbers, so that it does not notice when such numbers change places. Of a 4-bit
    weight it covers the scales too (bitsandbytes' `quant_state`), without which the 4 bits mean nothing.
    """
    import torch

    total = 0
    for tensor in _frozen_tensors(model):
        data = tensor.detach().contiguous().flatten().view(torch.uint8)
        words = data[: data.numel() // 4 * 4].view(torch.int32)
        total += int(words.sum(dtype=torch.int64)) + int(data[data.numel() // 4 * 4 :].sum(dtype=torch.int64))
    return total


def _frozen_tensors(model: Any) -> Iterator[Any]:
    """The weights that are not trained, and the scales of those that are in 4 bits."""
    for parameter in model.parameters():
        if not parameter.requires_grad:
            yield parameter
            state = getattr(parameter, "quant_state", None)
            if state is not None:
                yield state.absmax
                if state.nested:  # the scales are quantised themselves ("double quantisation")
                    yield from (state.state2.absmax, state.offset)


@dataclass(frozen=True)
class Evidence:
    """Claims about a training run and whether each holds: rows of (claim, what was seen, holds), and a warning."""

    rows: tuple[tuple[str, str, bool], ...]
    warning: str = ""

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return all(holds for _, _, holds in self.rows)

    def raise_if_failed(self) -> None:
        """Raises EvidenceError naming the first claim that does not hold."""
        for claim, seen, holds in self.rows:
            if not holds:
                fix = "do not use this adapter; check the learning rate, the mask and the target modules"
                raise EvidenceError("training", found=seen, expected=claim, fix=fix)

    def __repr__(self) -> str:
        lines = [f"{claim}: {holds}" for claim, _, holds in self.rows]
        return "\n".join([*lines, f"Warning: {self.warning}"] if self.warning else lines)

    def _repr_html_(self) -> str:
        table = html_table(["claim", "seen", "holds"], self.rows)
        return f"{table}<p><b>Warning:</b> {self.warning}</p>" if self.warning else table


def check_evidence(
    model: Any,
    *,
    log: Sequence[Mapping[str, Any]],
    frozen_before: int,
    before: HeldOutLosses,
    after: HeldOutLosses,
    float16: bool = False,
    learning_rate: float | None = None,
) -> Evidence:
    """Did training do what it should, and only that?

    The held-out loss must have fallen by more than its uncertainty: the lower end of the paired 95 % interval of the
    fall (`bootstrap_interval` of the differences, conversation by conversation) is above 0.

    A gradient norm that is infinite or not a number is a fault, but for float16, whose scaler skips such a step: as
    many are allowed as `stop_on_divergence` lets pass (`allowed_overflows`), but not every step. (Transformers replaces
    a loss that is not a number by the average before it logs it, unless `logging_nan_inf_filter=False`: the gradient
    norm is what tells.)

    The highest learning rate of the log must be the one that was set, to `RATE_TOLERANCE`. With each step logged that
    is exact for Transformers' schedules with warm-up: step k has the factor (k - 1) / warmup_steps, which is 1 at step
    warmup_steps + 1, so a run must be longer than its warm-up. (Steps that float16 skips do not move the schedule.)

    Args:
        model: the trained PEFT model.
        log: `trainer.state.log_history`; with held-out losses in it, overfitting is named too.
        frozen_before: `frozen_checksum(model)` from before training.
        before, after: `held_out_losses` of the same rows.
        float16: whether it was trained in float16 (`trainer.args.fp16`).
        learning_rate: the one that was chosen (not the trainer's own, which is what is checked); None makes no claim.

    Raises:
        EvidenceError: `before` and `after` are not of the same rows.
    """
    changed, total = count_changed_adapters(model)
    norms = [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    few = skipped <= allowed_overflows(len(norms), fp16=float16) and skipped < len(norms)
    finite = all(map(math.isfinite, losses)) and few
    highest = max((norm for norm in norms if math.isfinite(norm)), default=math.nan)
    norms_seen = f"norms up to {highest:.2f}"
    if skipped:
        norms_seen += f", not finite in {skipped} of {len(norms)} steps"
    low, high = fall_interval(before, after)
    fall = (
        f"{before.loss:.3f} -> {after.loss:.3f}, a fall of {before.loss - after.loss:.3f} (95 % interval {low:.3f} to "
        f"{high:.3f}, {len(before.sums)} conversations); perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}"
    )
    untouched = frozen_checksum(model) == frozen_before
    rows = []
    if learning_rate is not None:  # first, because a wrong one explains what else may fail
        rates = [float(entry["learning_rate"]) for entry in log if "learning_rate" in entry]
        peak = max(rates, default=math.nan)
        as_set = math.isclose(peak, learning_rate, rel_tol=RATE_TOLERANCE)
        seen = f"up to {peak:.3g} in {len(rates)} logged steps, {learning_rate:.3g} was set"
        rows.append(("the learning rate peaked where it was set", seen, as_set))
    rows += [
        ("every LoRA matrix B left zero", f"{changed} of {total}", 0 < total == changed),
        ("loss and gradient norm stayed finite", norms_seen, finite),
        ("the base weights are untouched", "checksum over all frozen weights", untouched),
        ("held-out loss fell by more than its uncertainty", fall, low > 0),
    ]
    return Evidence(tuple(rows), describe_overfitting(log))


def describe_overfitting(log: Sequence[Mapping[str, Any]]) -> str:
    """One sentence where the held-out loss ended more than 1 % above its best, else "".

    Args:
        log: `trainer.state.log_history`.

    Example: held-out losses 2.0, 1.0, 1.5 at the steps 10, 20, 30 ->
        "held-out loss rose after step 20 (best 1.000 there, 1.500 at step 30): it overfits; stop earlier or …"
    """
    measured = [(entry["eval_loss"], entry["step"]) for entry in log if "eval_loss" in entry]
    if not measured:
        return ""
    (best, best_step), (last, last_step) = min(measured), measured[-1]
    if last <= best * (1 + OVERFIT_TOLERANCE):
        return ""
    seen = f"best {best:.3f} there, {last:.3f} at step {last_step}"
    return f"held-out loss rose after step {best_step} ({seen}): it overfits; stop earlier or use fewer epochs"


def count_changed_adapters(model: Any) -> tuple[int, int]:
    """(how many LoRA B matrices are not zero, how many there are). All are zero before training."""
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    return sum(bool(parameter.detach().any()) for parameter in matrices), len(matrices)


@dataclass(frozen=True)
class TrainableParameters:
    """What LoRA added, by kind of module: rows of (module, layers, frozen shape, rank, trainable parameters)."""

    rows: tuple[tuple[str, int, str, int, int], ...]
    total: int
    trainable: int

    _headers = ("module", "layers", "frozen shape", "rank", "trainable")

    def _summary(self) -> str:
        return (
            f"{self.trainable:,} of {self.total:,} parameters are trained ({100 * self.trainable / self.total:.2f} %)"
        )

    def _rows(self) -> list[list[object]]:
        return [[name, layers, shape, rank, f"{count:,}"] for name, layers, shape, rank, count in self.rows]

    def __repr__(self) -> str:
        return text_table(self._headers, self._rows()) + "\n" + self._summary()

    def _repr_html_(self) -> str:
        return html_table(self._headers, self._rows()) + f"<p>{self._summary()}</p>"


def count_trainable(model: Any) -> TrainableParameters:
    """Count a PEFT model's trainable parameters by kind of module.

    A linear layer of shape (out, in) gets A (r, in) and B (out, r): r · (in + out) parameters (Hu et al. 2021,
    arXiv:2106.09685). Example: q_proj of Llama 3.2 1B, (2048, 2048), r = 16 -> 65,536 a layer.

    A 4-bit weight stores two parameters a byte, so the total counts what the layers compute with, not the bytes.

    Raises:
        EvidenceError: the model has no LoRA matrices.
    """
    found: dict[str, list[tuple[int, int, int]]] = {}
    adapters = 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        rank, shape = module.r["default"], (module.out_features, module.in_features)
        count = sum(p.numel() for p in (*module.lora_A.parameters(), *module.lora_B.parameters()) if p.requires_grad)
        found.setdefault(name.rsplit(".", 1)[-1], []).append((rank, shape, count))
        adapters += count
    rows = tuple(
        (kind, len(layers), f"{layers[0][1][0]} × {layers[0][1][1]}", layers[0][0], sum(count for *_, count in layers))
        for kind, layers in found.items()
    )
    if not rows:
        fix = "call get_peft_model first; if you did, check target_modules"
        raise EvidenceError("model", found="no LoRA matrices", expected="a PEFT model with LoRA", fix=fix)
    trainable, total = model.get_nb_trainable_parameters()
    return TrainableParameters(rows, total, trainable)
