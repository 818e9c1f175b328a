"""Is what was saved the model that was trained? Every form is asked in a process that has nothing but its files."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.base import Table
from helpers.chat.replies import Message
from helpers.export.plan import ExportError
from helpers.export.probe import (
    END,
    FIRST_TOKENS,
    Probe,
    SavedForm,
    probe_gguf,
    probe_in_fresh_processes,
    reply_tokens,
)
from helpers.messages import N_, _

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

    @property
    def faults(self) -> list[str]:
        """What misses its limit."""
        faults, rounded = [], self.form.startswith("GGUF ") or on_4_bit_base(self.form)
        differ = self.replies - self.same_replies - self.near_ties
        if not rounded and differ:
            faults.append(
                _("{differ} of {replies} replies differ by more than a tie", differ=differ, replies=self.replies)
            )
        limit = PERPLEXITY_LIMITS.get(self.form.removeprefix("GGUF "), 0.10) if rounded else 0.01
        limit = math.inf if on_4_bit_base(self.form) else limit
        if not abs(self.perplexity_change) <= limit:  # or no number
            message = N_("perplexity changed by {change:+.2%}, more than {limit:.0%}")
            message = message if limit < 1 else N_("perplexity changed by {change:+.2%}")
            faults.append(_(message, change=self.perplexity_change, limit=limit))
        return faults

    @property
    def verdict(self) -> str:
        """Either "ok" or "MISSED"; "not judged" where nothing of this form has a limit."""
        return N_("MISSED") if self.faults else N_("not judged") if on_4_bit_base(self.form) else N_("ok")


@dataclass(frozen=True, repr=False)
class ExportReport(Table):
    """Every form of the model against the one in memory."""

    checks: tuple[ExportCheck, ...]
    perplexity: float

    @property
    def ok(self) -> bool:
        return not any(check.faults for check in self.checks)

    def raise_if_failed(self) -> None:
        """Raises ExportError: a form misses a limit; the message names every form that does."""
        faults = [_("{form}: {fault}", form=each.form, fault=fault) for each in self.checks for fault in each.faults]
        if faults:
            fix = _(
                "save again, write other GGUF types, or train longer: what has hardly learned suffers from rounding"
            )
            expected = _("forms that answer as the model in memory")
            raise ExportError(_("saved forms"), found=_("; ").join(faults), expected=expected, fix=fix)

    def _table(self) -> tuple[list[str], list[list[str]]]:
        rows = []
        for check in self.checks:
            counts = dict(same=check.same_replies, replies=check.replies, ties=check.near_ties)
            ties = N_("{same} of {replies} (+{ties} near ties)")
            same = _(ties if check.near_ties else N_("{same} of {replies}"), **counts)
            rows.append([check.form, same, f"{check.perplexity_change:+.2%}", _(check.verdict)])
        return [_("form"), _("same replies"), _("change in perplexity"), _("verdict")], rows

    def _notes(self) -> list[str]:
        return [
            _("MISSED, {form}: {fault}", form=each.form, fault=fault) for each in self.checks for fault in each.faults
        ]

    def _folded(self) -> tuple[str, list[str], list[list[str]]]:
        headers = [_("form"), _("first tokens"), _("mean Δ"), _("largest Δ"), "KL", _("perplexity")]
        rows = [[_("in memory"), "", "", "", "", f"{self.perplexity:.4f}"]]
        for check in self.checks:
            divergence = "" if check.divergence is None else f"{check.divergence:.5f}"
            sizes = [f"{check.mean_difference:.4f}", f"{check.largest_difference:.3f}", divergence]
            rows.append([check.form, f"{check.same_first_tokens:.1%}", *sizes, f"{check.perplexity:.4f}"])
        return _("the statistics"), headers, rows


def verify_exports(
    in_memory: Probe, forms: Mapping[str, str | Path], conversations: Sequence[Sequence[Message]], *, tokenizer: Any
) -> ExportReport:
    """Ask every saved form in a process of its own, and hold its answers against the model in memory.

    Args:
        in_memory: `probe_model` of the model that was saved.
        forms: {name: its folder or .gguf file}. A folder with an adapter is loaded by Unsloth, and under a name that
            ends with "4-bit base" on the base in 4 bits; any other folder by plain Transformers; a GGUF file is served
            by llama-server.
        conversations: those that `in_memory` was asked, each ending with an answer.
        tokenizer: the one that the model was trained with.

    Raises:
        ExportError, GgufError: a form does not load or does not answer.
    """
    files = {name: Path(path) for name, path in forms.items()}
    folders = {name: _saved_form(name, path) for name, path in files.items() if path.suffix != ".gguf"}
    probes = probe_in_fresh_processes(folders, conversations)
    for name, path in files.items():
        if name not in folders:
            probes[name] = probe_gguf(path, conversations, tokenizer=tokenizer, model_stops=in_memory.stops)
    return compare_exports(in_memory, {name: probes[name] for name in files}, tokenizer=tokenizer)


def _saved_form(name: str, folder: Path) -> SavedForm:
    adapter = (folder / "adapter_config.json").is_file()
    return SavedForm(folder, "unsloth" if adapter else "transformers", load_in_4bit=on_4_bit_base(name))


def compare_exports(reference: Probe, probes: Mapping[str, Probe], *, tokenizer: Any) -> ExportReport:
    """Hold every form against the model in memory.

    A form with rounded weights may change replies, and perplexity within `PERPLEXITY_LIMITS`; every other one must give
    the same replies (but for near ties) and keep perplexity within 1 %. Of the adapter on the 4-bit base, perplexity is
    only shown: its files are those of "adapter", and what rounding the base costs hangs on how long was trained on it.
    (A perplexity that is no number is a fault there too.)

    Args:
        reference: `probe_model` of the model in memory.
        probes: {form: what it said}; forms with rounded weights are named "GGUF …" or "… 4-bit base".
    """
    return ExportReport(
        tuple(_check(form, probe, reference, tokenizer) for form, probe in probes.items()), reference.perplexity
    )


def _check(form: str, probe: Probe, reference: Probe, tokenizer: Any) -> ExportCheck:
    same, ties, first = _compare_replies(reference, probe.replies, tokenizer)
    sizes = [
        abs(ours - theirs)
        for ours_of_answer, theirs_of_answer in zip(reference.log_probs, probe.log_probs, strict=True)
        for ours, theirs in zip(ours_of_answer, theirs_of_answer, strict=True)
    ]
    change = probe.perplexity / reference.perplexity - 1
    row = (form, same, ties, len(probe.replies), first, sum(sizes) / len(sizes), max(sizes))
    return ExportCheck(*row, _divergence(reference, probe), probe.perplexity, change)


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
