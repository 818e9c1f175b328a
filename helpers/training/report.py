"""What a training run was, did and proved: as plain data for `report.json`, and as one page to read, print and send."""

import base64
import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import fields
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

from helpers.base import InputError, replace_file
from helpers.figures import as_image
from helpers.handoff.run import fingerprint_rows, library_versions
from helpers.training.curves import Curves, draw_curves, duration
from helpers.training.held_out import HeldOutLosses, fall_interval

if TYPE_CHECKING:
    from helpers.chat.replies import Comparison
    from helpers.masking.check import MaskReport
    from helpers.memory.stats import Stage
    from helpers.training.evidence import Evidence

SECTIONS = ("settings", "environment", "data", "mask", "memory", "curves", "evidence", "replies")

PAGE = Path(__file__).with_name("report.html")  # in Jinja's language


class ReportError(InputError):
    """A report that cannot be made, or content that is no report."""


def make_report(
    trainer: Any,
    *,
    base_model: str,
    dataset: str,
    settings: Mapping[str, Any],
    stages: Sequence["Stage"],
    curves: Curves,
    mask_report: "MaskReport",
    held_out: tuple[HeldOutLosses, HeldOutLosses],
    evidence: "Evidence",
    replies: "Comparison | None" = None,
    counted: Mapping[str, Mapping[str, float]] | None = None,
    resumed_from: int = 0,
) -> dict[str, Any]:
    """All that is known of a run, as plain JSON values: what is not finite becomes null.

    Args:
        trainer: after training.
        base_model, dataset: as in the profile; of a folder or file only its name is kept.
        settings: LoRA's and the trainer's settings, as the chapter wrote them.
        stages: what `track_memory` measured; the last one is the training.
        curves: the live plot's.
        mask_report: `check_masking`'s.
        held_out: `held_out_losses` before and after training.
        evidence: `check_evidence`'s.
        replies: the same prompts answered before and after.
        counted: {"house_style": {"before": 0.0, "after": 1.0}, …}, shares of replies; empty where nothing was judged.
        resumed_from: the step at which this session went on with the run (`Checkpoints.step`), 0 for a run of one
            session. The report's "seconds" are those of all sessions, which the curves keep.

    Raises:
        ReportError: no stage was measured.

    Example:
        >>> run.write_json("report.json", make_report(trainer, …), base_model=profile.model_name)
    """
    if not stages:
        raise ReportError("stages", found="none", expected="at least the training", fix="use track_memory")
    before, after = held_out
    training = stages[-1]
    facts = {
        "base_model": _name(base_model),
        "written": datetime.now(UTC).isoformat(timespec="seconds"),
        "held_out_loss": {
            "before": before.loss,
            "after": after.loss,
            "before_interval": before.interval,
            "after_interval": after.interval,
            "fall_interval": fall_interval(before, after),
            "conversations": len(before.sums),
            "answer_tokens": sum(before.tokens),
        },
        "perplexity": {"before": before.perplexity, "after": after.perplexity},
        "house_style": {},
        "right_help": {},
        **(counted or {}),
        "steps": trainer.state.global_step,
        "seconds": max([training.seconds, *curves.column("seconds")[1][-1:]]),
        "resumed_from_step": resumed_from,
        "peak_reserved_gib": training.peak_reserved_gib,
        "device": training.after.device,
        "settings": settings,
        "environment": {
            "device": f"{training.after.device}, {training.after.total_gib:.1f} GiB",
            "precision": "float16" if trainer.args.fp16 else "bfloat16" if trainer.args.bf16 else "float32",
            "python": platform.python_version(),
            **library_versions(),
        },
        "data": {
            "dataset": _name(dataset),
            "training rows": _count_rows(trainer.train_dataset),
            "held-out rows": _count_rows(trainer.eval_dataset),
            "fingerprint of the training rows": fingerprint_rows(trainer.train_dataset),
        },
        "mask": {"ok": mask_report.ok}
        | {field.name: getattr(mask_report, field.name) for field in fields(mask_report) if field.name != "findings"}
        | {"findings": [f"{each.code}: {each.count} {each.unit}, {each.found}" for each in mask_report.findings]},
        "memory": [
            {
                "stage": stage.label,
                "seconds": stage.seconds,
                "allocated_gib": stage.after.allocated_gib,
                "reserved_gib": stage.after.reserved_gib,
                "peak_gib": stage.peak_reserved_gib,
                "total_gib": stage.after.total_gib,
            }
            for stage in stages
        ],
        "curves": curves.as_json(),
        "evidence": {"rows": evidence.rows, "warning": evidence.warning},
        "replies": replies.rows if replies else (),
        "log": trainer.state.log_history,
    }
    return _plain(facts)


def write_report(report: Mapping[str, Any], path: str | Path) -> Path:
    """Write the report as one HTML file that needs nothing beside it; whole or not at all. Returns its path.

    Args:
        report: `make_report`'s, or the content of `report.json`.
        path: the file.

    Raises:
        ReportError: a part of the report is missing; or the file cannot be written.
    """
    path = Path(path)
    missing = [name for name in ("held_out_loss", "steps", "seconds", *SECTIONS) if name not in report]
    if missing:
        fix = "run chapter 04 again"
        raise ReportError("report", found=f"no {', '.join(missing)}", expected="what make_report returns", fix=fix)
    content = _render(report).encode()
    try:
        replace_file(path, content)
    except OSError as error:
        found = error.strerror or str(error)
        raise ReportError(str(path), found=found, expected="a file that can be written", fix="give another") from None
    return path


def _render(report: Mapping[str, Any]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": _shown, "number": _number}
    rows = tuple(report["curves"]["rows"])
    curves = Curves(rows, report["curves"]["max_steps"], report["curves"]["is_gpu"], report["curves"]["total_gib"])
    png = as_image(draw_curves(curves)).data
    held = sum(holds for _, _, holds in report["evidence"]["rows"])
    return environment.from_string(PAGE.read_text(encoding="utf-8")).render(
        report,
        resumed_from=report.get("resumed_from_step", 0),
        figures=_figures(report, curves),
        held=held,
        plot=base64.b64encode(png).decode(),
    )


def _figures(report: Mapping[str, Any], curves: Curves) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: (name, value, what it is)."""
    loss, perplexity = report["held_out_loss"], report["perplexity"]
    low, high = loss["fall_interval"]
    shown = [
        (
            "Held-out loss",
            f"{_number(loss['before'])} → {_number(loss['after'])}",
            f"fell by {_number(low)} to {_number(high)} (95 %)",
        ),
        ("Perplexity", f"{_number(perplexity['before'])} → {_number(perplexity['after'])}", "exp(loss)"),
    ]
    for key, name in (("house_style", "House style"), ("right_help", "Right help")):
        if report.get(key):
            shares = f"{report[key]['before']:.0%} → {report[key]['after']:.0%}"
            shown.append((name, shares, "of the replies"))
    resumed = f", resumed from step {report['resumed_from_step']}" if report.get("resumed_from_step") else ""
    shown.append(("Training", duration(report["seconds"]), f"{report['steps']} steps{resumed}"))
    speeds = curves.column("tokens_per_second")[1]
    if speeds:
        shown.append(("Speed", f"{median(speeds):,.0f}", "tokens a second, median, no padding"))
    memory = report["memory"][-1]
    shown.append(("Peak memory", f"{memory['peak_gib']:.2f} GiB", f"of {memory['total_gib']:.1f} GiB"))
    return shown


def _name(model_or_dataset: str) -> str:
    """A name to publish: of a path on this machine only its last part."""
    path = Path(model_or_dataset).expanduser()
    return path.name if path.is_absolute() or path.exists() else model_or_dataset


def _count_rows(dataset: Any) -> str:
    rows = tokens = answers = 0
    for row in dataset:
        rows, tokens = rows + 1, tokens + len(row["input_ids"])
        answers += sum(label != -100 for label in row["labels"])
    return f"{rows:,} conversations, {tokens:,} tokens, {answers:,} of them in answers"


def _plain(value: Any) -> Any:
    """The same as JSON's own kinds of values."""
    if isinstance(value, Mapping):
        return {str(name): _plain(each) for name, each in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_plain(each) for each in value]
    if hasattr(value, "item"):  # numpy's and torch's numbers
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, (bool, int, str)) else str(value)


def _number(value: float | None) -> str:
    """Three digits that count. Example: 138.74 -> "139", 4.9328 -> "4.93", 0.2 -> "0.200"."""
    if value is None:
        return "not finite"
    if value and not 1e-3 < abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0}f}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
