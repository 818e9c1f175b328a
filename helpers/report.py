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
from helpers.handoff import fingerprint_rows, library_versions
from helpers.training import Curves, HeldOutLosses, draw_curves, duration, fall_interval

if TYPE_CHECKING:
    from helpers.chat import Comparison
    from helpers.masking import MaskReport
    from helpers.memory import Stage
    from helpers.training import Evidence

SECTIONS = ("settings", "environment", "data", "mask", "memory", "curves", "evidence", "replies")


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
    return environment.from_string(PAGE).render(
        report,
        style=STYLE,
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


STYLE = """
:root { color-scheme: light; --ink: #1f2328; --soft: #59636e; --line: #d8dee4; --tint: #f6f8fa; --blue: #0072b2;
  --good: #00664a; --bad: #a63c00; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1.5rem 1.25rem 3rem; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", "Noto Sans", sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0 0 .2rem; }
h2 { font-size: 1.05rem; margin: 2rem 0 .6rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
p { margin: .3rem 0; }
.soft { color: var(--soft); font-size: .87rem; }
.figures { display: flex; flex-wrap: wrap; gap: .7rem; margin: 1.1rem 0; }
.figures div { flex: 1 1 9.5rem; background: var(--tint); border-radius: 8px; padding: .65rem .8rem; }
.figures b { display: block; font-size: 1.18rem; white-space: nowrap; font-variant-numeric: tabular-nums; }
.figures span { color: var(--soft); font-size: .8rem; display: block; line-height: 1.3; }
.verdict { border-left: 4px solid var(--good); background: #eef8f4; padding: .55rem .8rem; border-radius: 0 6px 6px 0;
  margin: .5rem 0; }
.verdict.bad { border-color: var(--bad); background: #fdf1ea; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; font-variant-numeric: tabular-nums; }
th { text-align: left; font-weight: 600; color: var(--soft); font-size: .8rem; }
th, td { padding: .32rem .7rem .32rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td:last-child, th:last-child { padding-right: 0; }
.right { text-align: right; }
.yes { color: var(--good); font-weight: 600; white-space: nowrap; }
.no { color: var(--bad); font-weight: 600; white-space: nowrap; }
.bar { background: var(--line); height: .55rem; border-radius: 3px; min-width: 6rem; margin-top: .45rem;
  overflow: hidden; }
.bar i { display: block; height: 100%; background: var(--blue); }
img { max-width: 100%; height: auto; display: block; }
.pair { display: grid; grid-template-columns: 1fr 1fr; gap: .7rem; margin: .3rem 0 1.1rem; }
.pair div { background: var(--tint); border-radius: 8px; padding: .55rem .8rem; overflow-wrap: anywhere;
  font-size: .92rem; }
.pair div + div { background: #eaf4fb; }
.text { white-space: pre-wrap; margin: 0; }
.prompt { font-weight: 600; white-space: pre-wrap; overflow-wrap: anywhere; margin: 0; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(19rem, 1fr)); column-gap: 2rem; }
.facts section { min-width: 0; }
.facts td { overflow-wrap: anywhere; }
.facts td:first-child { color: var(--soft); width: 54%; font-size: .85rem; }
@media (max-width: 34rem) { body { padding: 1rem .8rem 2rem; } .pair { grid-template-columns: 1fr; }
  .figures { gap: .5rem; } .figures div { flex-basis: 8rem; } .figures b { font-size: 1.05rem; }
  .facts { grid-template-columns: minmax(0, 1fr); } }
@media print { @page { size: A4; margin: 12mm; } body { font-size: 9.5px; line-height: 1.35; max-width: none;
  padding: 0; -webkit-print-color-adjust: exact; print-color-adjust: exact; }
  h2 { margin-top: .8rem; break-after: avoid; } tr, .pair, .figures, img { break-inside: avoid; }
  img { max-height: 68mm; } .facts { grid-template-columns: 1fr 1fr; } .scroll { overflow: visible; } }
"""

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Training report: {{ base_model }}</title>
<style>{{ style|safe }}</style>
</head>
<body>
<h1>Training report</h1>
<p class="soft">{{ base_model }} · {{ data.dataset }} · {{ device }} · {{ written[:16]|replace("T", " ") }} UTC</p>
<div class="figures">
{% for name, value, what in figures %}
<div><span>{{ name }}</span><b>{{ value }}</b><span>{{ what }}</span></div>
{% endfor %}
</div>
{% set claims = evidence.rows|length %}
<p class="verdict{{ '' if held == claims else ' bad' }}"><b>{{ held }} of {{ claims }} claims hold.</b>
{{ 'It learned, and changed nothing else.' if held == claims else 'Do not use this adapter.' }}</p>
{% if evidence.warning %}
<p class="verdict bad"><b>Warning:</b> {{ evidence.warning }}</p>
{% endif %}

<h2>Evidence</h2>
<div class="scroll"><table>
<tr><th>claim</th><th>seen</th><th>holds</th></tr>
{% for claim, seen, holds in evidence.rows %}
<tr><td>{{ claim }}</td><td>{{ seen }}</td>
<td class="{{ 'yes' if holds else 'no' }}">{{ '✓ yes' if holds else '✗ no' }}</td></tr>
{% endfor %}
</table></div>
<p class="soft">Held-out loss: {{ held_out_loss.conversations }} conversations that were never trained on, their
{{ '{:,}'.format(held_out_loss.answer_tokens) }} answer tokens only; 95 % intervals by bootstrap over
conversations. Before
{{ held_out_loss.before_interval[0]|number }} to {{ held_out_loss.before_interval[1]|number }}, after
{{ held_out_loss.after_interval[0]|number }} to {{ held_out_loss.after_interval[1]|number }}.</p>

<h2>Curves</h2>
<img alt="Training and held-out loss, learning rate, tokens per second and memory by step"
src="data:image/png;base64,{{ plot }}">
{% if replies %}

<h2>The same prompts, before and after</h2>
{% for prompt, first, second in replies %}
<p class="prompt">{{ prompt }}</p>
<div class="pair"><div><span class="soft">before</span><p class="text">{{ first }}</p></div>
<div><span class="soft">after</span><p class="text">{{ second }}</p></div></div>
{% endfor %}
{% endif %}

<h2>Time and memory</h2>
<div class="scroll"><table>
<tr><th>stage</th><th class="right">seconds</th><th class="right">allocated GiB</th><th class="right">reserved GiB</th>
<th class="right">peak GiB</th><th>of {{ '%.1f'|format(memory[0].total_gib) }} GiB</th></tr>
{% for stage in memory %}
<tr><td>{{ stage.stage }}</td><td class="right">{{ '%.1f'|format(stage.seconds) }}</td>
<td class="right">{{ '%.2f'|format(stage.allocated_gib) }}</td>
<td class="right">{{ '%.2f'|format(stage.reserved_gib) }}</td><td class="right">{{ '%.2f'|format(stage.peak_gib) }}</td>
<td><div class="bar"><i style="width: {{ '%.1f'|format(100 * stage.peak_gib / stage.total_gib) }}%"></i></div></td></tr>
{% endfor %}
</table></div>
{% if resumed_from %}
<p class="soft">Training went on from step {{ resumed_from }}: these times and figures are the last session's.</p>
{% endif %}

<div class="facts">
<section><h2>Data</h2><table>
{% for name, value in data.items() %}
<tr><td>{{ name }}</td><td>{{ value|shown }}</td></tr>
{% endfor %}
</table></section>
<section><h2>Mask</h2>
<p class="{{ 'yes' if mask.ok else 'no' }}">{{ '✓ Every answer is trained, and nothing else.' if mask.ok
else '✗ Not fit to train on.' }}</p><table>
<tr><td>rows, answers</td><td>{{ '{:,}, {:,}'.format(mask.rows, mask.answers) }}</td></tr>
<tr><td>tokens trained</td><td>{{ '{:,} of {:,}'.format(mask.trained_tokens, mask.tokens) }}</td></tr>
<tr><td>tokens per row</td><td>median {{ mask.tokens_per_row[0] }}, 95 % {{ mask.tokens_per_row[1] }},
max {{ mask.tokens_per_row[2] }}</td></tr>
{% for finding in mask.findings %}
<tr><td class="no">fault</td><td>{{ finding }}</td></tr>
{% endfor %}
</table></section>
<section><h2>Settings</h2><table>
{% for name, value in settings.items() %}
<tr><td>{{ name }}</td><td>{{ value|shown }}</td></tr>
{% endfor %}
</table></section>
<section><h2>Environment</h2><table>
{% for name, value in environment.items() %}
<tr><td>{{ name }}</td><td>{{ value|shown }}</td></tr>
{% endfor %}
</table></section>
</div>
</body>
</html>
"""
