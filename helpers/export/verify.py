"""Is what was saved the model that was trained? Every form is asked in a process that has nothing but its files."""

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.base import html_table, text_table
from helpers.export.plan import ExportError
from helpers.export.probe import END, FIRST_TOKENS, Probe, reply_tokens

TIE = 0.5  # logits: bfloat16 rounds those of the best tokens, 16 to 32, to steps of 0.125, and every layer rounds too
PERPLEXITY_LIMITS = {"q8_0": 0.01, "q4_k_m": 0.10}  # how far perplexity may be off; other quantised files: the latter


@dataclass(frozen=True)
class ExportCheck:
    """One form against the model in memory.

    Attributes:
        form: such as "merged" or "GGUF q8_0".
        same_replies, near_ties, replies: how many replies are the same text; how many part from it where the model in
            memory itself found two tokens as good as equal; of how many.
        same_first_tokens: the share of the first tokens that are the same.
        mean_difference, largest_difference: between the log-probabilities of the held-out answers' tokens.
        divergence: the mean Kullback-Leibler divergence, in nats; None where there are no whole distributions.
        perplexity, perplexity_change: on the held-out answers, and relative to the model in memory.
        styled: how many replies are in house style; None where that is not defined.
        faults: what misses its limit.
    """

    form: str
    same_replies: int
    near_ties: int
    replies: int
    same_first_tokens: float
    mean_difference: float
    largest_difference: float
    divergence: float | None
    perplexity: float
    perplexity_change: float
    styled: int | None
    faults: tuple[str, ...]

    @property
    def verdict(self) -> str:
        """Either "ok" or "MISSED"; "not judged" where nothing of this form has a limit."""
        unlimited = on_4_bit_base(self.form) and self.styled is None
        return "MISSED" if self.faults else "not judged" if unlimited else "ok"


@dataclass(frozen=True)
class ExportReport:
    """Every form of the model against the one in memory."""

    checks: tuple[ExportCheck, ...]
    perplexity: float
    styled: int | None

    @property
    def ok(self) -> bool:
        return not any(check.faults for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raises ExportError: a form misses a limit; the message names every form that does."""
        if faults := [f"{check.form}: {fault}" for check in self.checks for fault in check.faults]:
            fix = "save again, write other GGUF types, or train longer: what has hardly learned suffers from rounding"
            expected = "forms that answer as the model in memory"
            raise ExportError("saved forms", found="; ".join(faults), expected=expected, fix=fix)

    def _rows(self) -> tuple[list[str], list[list[str]]]:
        head = ["form", "same replies", "first tokens", "mean Δ", "largest Δ", "KL", "perplexity", "change"]
        rows = [["in memory", "", "", "", "", "", f"{self.perplexity:.4f}", ""]]
        for check in self.checks:
            ties = f" (+{check.near_ties} near ties)" if check.near_ties else ""
            values = [check.form, f"{check.same_replies} of {check.replies}{ties}", f"{check.same_first_tokens:.1%}"]
            values += [f"{check.mean_difference:.4f}", f"{check.largest_difference:.3f}"]
            values += ["" if check.divergence is None else f"{check.divergence:.5f}"]
            rows.append([*values, f"{check.perplexity:.4f}", f"{check.perplexity_change:+.2%}"])
        if self.styled is not None:
            head.append("house style")
            for row, styled in zip(rows, (self.styled, *(check.styled for check in self.checks)), strict=True):
                row.append(str(styled))
        for row, verdict in zip(rows, ("", *(check.verdict for check in self.checks)), strict=True):
            row.append(verdict)
        return [*head, "verdict"], rows

    def _faults(self) -> list[str]:
        return [f"MISSED, {check.form}: {fault}" for check in self.checks for fault in check.faults]

    def __repr__(self) -> str:
        return "\n".join([text_table(*self._rows()), *self._faults()])

    def _repr_html_(self) -> str:
        import html

        faults = "".join(f"<p><b style='color:#b00'>{html.escape(fault)}</b></p>" for fault in self._faults())
        return html_table(*self._rows()) + faults


def compare_exports(
    reference: Probe,
    probes: Mapping[str, Probe],
    *,
    tokenizer: Any,
    in_style: Callable[[int, str], bool] | None = None,
) -> ExportReport:
    """Hold every form against the model in memory.

    A form with rounded weights may change replies, and perplexity within `PERPLEXITY_LIMITS`; every other one must give
    the same replies (but for near ties) and keep perplexity within 1 %. As many replies as in memory must have the
    house style. Of the adapter on the 4-bit base, perplexity is only shown: its files are those of "adapter", and what
    rounding the base costs hangs on how long was trained on it. (A perplexity that is no number is a fault there too.)

    Args:
        reference: `probe_model` of the model in memory.
        probes: {form: what it said}; forms with rounded weights are named "GGUF …" or "… 4-bit base".
        in_style: whether a reply to the conversation of this number is in house style.
    """

    def count(replies: Sequence[str]) -> int | None:
        return sum(in_style(row, reply) for row, reply in enumerate(replies)) if in_style else None

    styled = count(reference.replies)
    checks = []
    for form, probe in probes.items():
        same, ties, first = _compare_replies(reference, probe.replies, tokenizer)
        pairs = [
            ours - theirs
            for ours_of_answer, theirs_of_answer in zip(reference.log_probs, probe.log_probs, strict=True)
            for ours, theirs in zip(ours_of_answer, theirs_of_answer, strict=True)
        ]
        change = probe.perplexity / reference.perplexity - 1
        kept, faults = count(probe.replies), []
        rounded = form.startswith("GGUF ") or on_4_bit_base(form)
        limit = PERPLEXITY_LIMITS.get(form.removeprefix("GGUF "), 0.10) if rounded else 0.01
        limit = math.inf if on_4_bit_base(form) else limit
        if not rounded and same + ties < len(probe.replies):
            faults.append(
                f"{len(probe.replies) - same - ties} of {len(probe.replies)} replies differ by more than a tie"
            )
        if not abs(change) <= limit:  # or no number
            faults.append(f"perplexity changed by {change:+.2%}" + (f", more than {limit:.0%}" if limit < 1 else ""))
        if styled is not None and kept < styled:
            faults.append(f"{kept} replies in house style, {styled} in memory")
        sizes, divergence = [abs(pair) for pair in pairs], _divergence(reference, probe)
        row = (form, same, ties, len(probe.replies), first, sum(sizes) / len(sizes), max(sizes), divergence)
        checks.append(ExportCheck(*row, probe.perplexity, change, kept, tuple(faults)))
    return ExportReport(tuple(checks), reference.perplexity, styled)


def on_4_bit_base(form: str) -> bool:
    """Whether it is the adapter on the base that was rounded to 4 bits: no files of its own, no limit to perplexity."""
    return form.endswith("4-bit base")


def _compare_replies(reference: Probe, replies: Sequence[str], tokenizer: Any) -> tuple[int, int, float]:
    """(same texts, texts that part at a near tie, share of the first tokens that are the same)."""
    same = ties = equal = total = 0
    for row, (expected, found) in enumerate(zip(reference.replies, replies, strict=True)):
        ours, theirs = reply_tokens(tokenizer, expected), reply_tokens(tokenizer, found)
        total += min(max(len(ours), len(theirs)), FIRST_TOKENS)
        equal += sum(a == b for a, b in zip(ours[:FIRST_TOKENS], theirs, strict=False))
        if expected == found:
            same += 1
            continue
        ours, theirs = [*ours, END], [*theirs, END]  # one may stop where the other goes on
        part = next((i for i, pair in enumerate(zip(ours, theirs, strict=False)) if pair[0] != pair[1]), None)
        if part is not None:
            ties += reference.rivals[row][part].get(theirs[part], TIE + 1) <= TIE
    return same, ties, equal / max(total, 1)


def _divergence(reference: Probe, probe: Probe) -> float | None:
    """Mean KL(in memory || form) over the scored tokens, in nats: sum p (log p - log q)."""
    import numpy as np

    if not probe.distributions:
        return None
    each = [
        (np.exp(ours) * (ours - theirs)).sum(-1)
        for ours, theirs in zip(reference.distributions, probe.distributions, strict=True)
    ]
    return max(float(np.concatenate(each).mean()), 0.0)
