"""Evidence that training did what it should, and only that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from helpers.base import InputError, html_table
from helpers.training.divergence import allowed_overflows
from helpers.training.held_out import HeldOutLosses, fall_interval
from helpers.training.weights import count_changed_adapters, frozen_checksum

OVERFIT_TOLERANCE = 0.01  # of the best held-out loss; the trainer's average depends this much on how rows are batched
RATE_TOLERANCE = 1e-6  # of the learning rate; a schedule's factor is exactly 1 at its peak


class EvidenceError(InputError):
    """Training left no trace, or a trace that it must not leave."""


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
