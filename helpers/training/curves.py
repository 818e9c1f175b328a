"""Curves that grow while a run trains, drawn and written as it goes."""

import csv
import io
import json
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import InputError, replace_file
from helpers.figures import MARK, TRAINED, as_image, families, label
from helpers.memory.stats import memory_stats
from helpers.messages import _

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from transformers import TrainerCallback


# More of the palette of helpers.figures, and a grey that is dark enough for lines.
GREEN, PURPLE, SLATE = "#009e73", "#cc79a7", "#5f6368"
MEASURES = ("loss", "held_out_loss", "learning_rate", "grad_norm", "tokens_per_second", "memory_gib", "seconds")
LOGGED = {"loss": "loss", "eval_loss": "held_out_loss", "learning_rate": "learning_rate", "grad_norm": "grad_norm"}
DRAWING_SHARE, WRITING_SHARE = 0.02, 0.005  # of the run's time, at most


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
            return label("step 0 of {steps}", steps=self.max_steps)
        if steps[-1] >= self.max_steps:
            return label("{steps} steps in {duration}", steps=steps[-1], duration=duration(seconds[-1]))
        left = duration(self.seconds_left)
        return label("step {step} of {steps}, about {left} left", step=steps[-1], steps=self.max_steps, left=left)

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
        return label("{seconds} s", seconds=whole)
    if whole < 3600:
        return label("{minutes} min {seconds} s", minutes=whole // 60, seconds=whole % 60)
    return label("{hours} h {minutes} min", hours=whole // 3600, minutes=whole % 3600 // 60)


def draw_curves(curves: Curves) -> "Figure":
    """Losses on top; learning rate, speed and memory below; how far the run is in the title."""
    import matplotlib
    from matplotlib.figure import Figure

    memory = label("memory, peak GiB") if curves.is_gpu else label("memory of this process, GiB")
    panels = [
        ("learning_rate", label("learning rate"), SLATE),
        ("tokens_per_second", label("tokens a second, no padding"), GREEN),
        ("memory_gib", memory, PURPLE),
    ]
    style = {"font.family": families(), "font.size": 9, "axes.titlesize": 9, "axes.titlelocation": "left"}
    with matplotlib.rc_context(style):
        figure = Figure(figsize=(7.4, 4.6), layout="constrained", facecolor="white")
        figure.suptitle(curves.title, x=0.01, ha="left", fontsize=11, fontweight="bold")
        grid = figure.add_gridspec(2, 3, height_ratios=[1.7, 1])
        losses = figure.add_subplot(grid[0, :])
        for column, name, colour, line in (
            ("loss", label("training"), TRAINED, "-"),
            ("held_out_loss", label("held-out (never trained)"), MARK, "o--"),
        ):
            points = _finite_points(curves.column(column))
            losses.plot(*points, line, color=colour, label=name, markersize=5, clip_on=False)
        losses.set(title=label("loss on the answers, nats a token"), xlabel=label("step"))
        losses.legend(frameon=False, loc="upper right")
        _finish(losses, curves, ticks=6)
        for place, (column, title, colour) in enumerate(panels):
            axes = figure.add_subplot(grid[1, place])
            points = _finite_points(curves.column(column))
            axes.plot(*points, color=colour, linewidth=1.8, marker="o" if len(points[0]) == 1 else None)
            axes.set(title=title)
            _finish(axes, curves, ticks=4)
            if not points[0] and column == "tokens_per_second":
                wanted = label("not counted: set\n{setting}", setting='include_num_input_tokens_seen\n= "non_padding"')
                axes.text(0.5, 0.5, wanted, transform=axes.transAxes, ha="center", va="center", fontsize=8)
                axes.set_yticks([])
            elif column == "learning_rate":
                axes.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
            elif column == "memory_gib" and curves.is_gpu:
                axes.axhline(curves.total_gib, color=SLATE, linestyle="--", linewidth=1)
                size = label("the card has {size:.1f}", size=curves.total_gib)
                axes.text(0, curves.total_gib * 1.02, f" {size}", fontsize=8, va="bottom")
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
        raise CurvesError(str(folder), found=found, expected=_("a folder"), fix=_("give another one")) from None
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
        from IPython.core.interactiveshell import InteractiveShell
        from IPython.display import display

        shown = InteractiveShell.initialized()
        if self.running and not shown:  # a script: only the file is looked at
            return
        began = time.monotonic()
        picture = as_image(draw_curves(self.curves))
        if not shown:
            pass
        elif self.handle is None:
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
                said = _(
                    "The curves are not written any more: {path}: {error}. Training goes on.",
                    path=self.folder / name,
                    error=error.strerror,
                )
                print(said)
            self.can_write = False
