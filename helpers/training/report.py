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

from helpers.figures import as_image
from helpers.handoff.run import Run, fingerprint_rows, library_versions
from helpers.messages import N_, _
from helpers.training.curves import Curves, draw_curves, duration
from helpers.training.held_out import HeldOutLosses, fall_interval

if TYPE_CHECKING:
    from helpers.masking.check import MaskReport
    from helpers.memory.stats import Stage
    from helpers.training.evidence import Evidence

LORA_SETTINGS = ("r", "lora_alpha", "lora_dropout", "bias", "target_modules", "use_rslora")
SETTINGS = ("per_device_train_batch_size", "gradient_accumulation_steps", "gradient_checkpointing", "padding_free")
SETTINGS += ("train_sampling_strategy", "max_steps", "warmup_steps", "learning_rate", "lr_scheduler_type", "optim")
SETTINGS += ("weight_decay", "max_length", "fp16", "bf16", "seed")

COUNTS = N_("{rows:,} conversations, {tokens:,} tokens, {answers:,} of them in answers")
FINDINGS = {
    "tokens": N_("{code}: {count} tokens, {found}"),
    "rows": N_("{code}: {count} rows, {found}"),
    "answers": N_("{code}: {count} answers, {found}"),
}
PAGE = Path(__file__).with_name("report.html")  # in Jinja's language


def write_report(
    run: Run,
    trainer: Any,
    *,
    stages: Sequence["Stage"],
    curves: Curves,
    mask_report: "MaskReport",
    held_out: tuple[HeldOutLosses, HeldOutLosses],
    evidence: "Evidence",
    replies: Sequence[tuple[str, str, str]] = (),
    counted: Mapping[str, Mapping[str, float]] | None = None,
    resumed_from: int = 0,
) -> dict[str, Any]:
    """Write `report.json` and `report.html` into the run folder: all that is known of a training run.

    The settings are those in force, read from the model and the trainer. What is not finite becomes null.

    Args:
        run: holds the data set that was trained on.
        trainer: after training.
        stages: what `track_memory` measured; the last one is the training.
        curves: the live plot's.
        mask_report: `check_masking`'s.
        held_out: `held_out_losses` before and after training.
        evidence: `check_evidence`'s.
        replies: (prompt, reply before, reply after).
        counted: {"house_style": {"before": 0.0, "after": 1.0}, …}, shares of replies; empty where nothing was judged.
        resumed_from: the step at which this session went on with the run (`Checkpoints.step`), 0 for a run of one
            session. The report's "seconds" are those of all sessions, which the curves keep.

    Returns:
        What `report.json` holds.
    """
    counts = {
        N_("training rows"): _count_rows(trainer.train_dataset),
        N_("held-out rows"): _count_rows(trainer.eval_dataset),
    }
    report = _plain(
        {
            "base_model": run.base_model,
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            **_losses(*held_out),
            "house_style": {},
            "right_help": {},
            **(counted or {}),
            "steps": trainer.state.global_step,
            "seconds": max([stages[-1].seconds, *curves.column("seconds")[1][-1:]]),
            "resumed_from_step": resumed_from,
            "peak_reserved_gib": stages[-1].peak_reserved_gib,
            "device": stages[-1].after.device,
            "settings": settings_in_force(trainer),
            "environment": _environment(trainer, stages[-1]),
            "data": _data(trainer, str(run.facts("dataset").get("dataset", "")), counts),
            "mask": _mask(mask_report),
            "memory": [_memory(stage) for stage in stages],
            "curves": curves.as_json(),
            "evidence": {"ok": evidence.ok, "rows": evidence.rows, "warning": evidence.warning},
            "replies": replies,
            "log": trainer.state.log_history,
        }
    )
    run.write_json("report.json", report)
    run.record("04_train", **_numbers(report))
    with run.write("report.html") as page:
        page.write_text(_render(report, curves, counts), encoding="utf-8")
    return report


def _numbers(report: Mapping[str, Any]) -> dict[str, Any]:
    """What the regression judges, besides the log of the steps."""
    numbers = {f"held_out_loss_{when}": report["held_out_loss"][when] for when in ("before", "after")}
    for name in ("house_style", "right_help"):
        numbers |= {f"{name}_{when}": share for when, share in report[name].items()}
    tokens = report["mask"]["trained_tokens"]
    return numbers | {
        "tokens_trained": tokens,
        "steps": report["steps"],
        "peak_gib": report["peak_reserved_gib"],
        "seconds": report["seconds"],
    }


def settings_in_force(trainer: Any) -> dict[str, Any]:
    """LoRA's and the trainer's settings, whatever was typed. Example: {"r": 16, "learning_rate": 2e-4, …}"""
    lora = trainer.model.peft_config["default"]
    settings = {name: getattr(lora, name) for name in LORA_SETTINGS}
    settings["target_modules"] = sorted(settings["target_modules"] or ())
    return settings | {name: getattr(trainer.args, name) for name in SETTINGS if hasattr(trainer.args, name)}


def _losses(before: HeldOutLosses, after: HeldOutLosses) -> dict[str, Any]:
    loss = {
        "before": before.loss,
        "after": after.loss,
        "before_interval": before.interval,
        "after_interval": after.interval,
        "fall_interval": fall_interval(before, after),
        "conversations": len(before.sums),
        "answer_tokens": sum(before.tokens),
        "by_row": {"sums": after.sums, "tokens": after.tokens},
    }
    return {"held_out_loss": loss, "perplexity": {"before": before.perplexity, "after": after.perplexity}}


def _environment(trainer: Any, training: "Stage") -> dict[str, Any]:
    return {
        N_("device"): f"{training.after.device}, {training.after.total_gib:.1f} GiB",
        N_("precision"): "float16" if trainer.args.fp16 else "bfloat16" if trainer.args.bf16 else "float32",
        "python": platform.python_version(),
        **library_versions(),
    }


def _data(trainer: Any, dataset: str, counts: Mapping[str, Mapping[str, int]]) -> dict[str, Any]:
    return {
        N_("dataset"): dataset,
        **{name: COUNTS.format(**count) for name, count in counts.items()},
        N_("fingerprint of the training rows"): fingerprint_rows(trainer.train_dataset),
    }


def _mask(report: "MaskReport") -> dict[str, Any]:
    facts = {
        field.name: getattr(report, field.name) for field in fields(report) if field.name not in ("findings", "keys")
    }
    findings = [_(FINDINGS[each.unit], code=each.code, count=each.count, found=each.found) for each in report.findings]
    return {"ok": report.ok, **facts, "findings": findings}


def _memory(stage: "Stage") -> dict[str, Any]:
    return {
        "stage": stage.label,
        "seconds": stage.seconds,
        "allocated_gib": stage.after.allocated_gib,
        "reserved_gib": stage.after.reserved_gib,
        "peak_gib": stage.peak_reserved_gib,
        "total_gib": stage.after.total_gib,
    }


def _render(report: Mapping[str, Any], curves: Curves, counts: Mapping[str, Mapping[str, int]]) -> str:
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters |= {"shown": _shown, "number": _number}
    environment.globals["_"] = _
    held = sum(row[2] for row in report["evidence"]["rows"])
    data = report["data"] | {name: _(COUNTS, **count) for name, count in counts.items()}
    plot = base64.b64encode(as_image(draw_curves(curves)).data).decode()
    page = environment.from_string(PAGE.read_text(encoding="utf-8"))
    return page.render(report | {"data": data}, figures=_figures(report, curves), held=held, plot=plot)


def _figures(report: Mapping[str, Any], curves: Curves) -> list[tuple[str, str, str]]:
    """The numbers at the top of the page: (name, value, what it is)."""
    loss, perplexity = report["held_out_loss"], report["perplexity"]
    low, high = loss["fall_interval"]
    shown = [
        (
            _("Held-out loss"),
            f"{_number(loss['before'])} → {_number(loss['after'])}",
            _("fell by {low} to {high} (95 %)", low=_number(low), high=_number(high)),
        ),
        (_("Perplexity"), f"{_number(perplexity['before'])} → {_number(perplexity['after'])}", _("exp(loss)")),
    ]
    for key, name in (("house_style", _("House style")), ("right_help", _("Right help"))):
        if report[key]:
            shares = f"{report[key]['before']:.0%} → {report[key]['after']:.0%}"
            shown.append((name, shares, _("of the replies")))
    steps, resumed = report["steps"], report["resumed_from_step"]
    length = _("{steps} steps, resumed from step {step}", steps=steps, step=resumed)
    length = length if resumed else _("{steps} steps", steps=steps)
    shown.append((_("Training"), duration(report["seconds"]), length))
    speeds = curves.column("tokens_per_second")[1]
    if speeds:
        shown.append((_("Speed"), f"{median(speeds):,.0f}", _("tokens a second, median, no padding")))
    memory = report["memory"][-1]
    size = _("of {total:.1f} GiB", total=memory["total_gib"])
    return [*shown, (_("Peak memory"), f"{memory['peak_gib']:.2f} GiB", size)]


def _count_rows(dataset: Any) -> dict[str, int]:
    rows = tokens = answers = 0
    for row in dataset:
        rows, tokens = rows + 1, tokens + len(row["input_ids"])
        answers += sum(label != -100 for label in row["labels"])
    return {"rows": rows, "tokens": tokens, "answers": answers}


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
        return _("not finite")
    if value and not 1e-3 < abs(value) < 1e6:
        return f"{value:.2e}"
    return f"{value:,.{max(0, 2 - math.floor(math.log10(abs(value)))) if value else 0}f}"


def _shown(value: Any) -> str:
    if isinstance(value, list):
        return ", ".join(map(_shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value)
