"""Evidence that training did what it should, and only that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import InputError
from helpers.masking.batches import row_key
from helpers.training.divergence import allowed_overflows
from helpers.training.held_out import HeldOutLosses, fall_interval
from helpers.training.loaded import Claims, same_adapter, same_tokenizer
from helpers.training.weights import count_changed_adapters

if TYPE_CHECKING:
    from helpers.masking.batches import Batches

OVERFIT_TOLERANCE = 0.01  # of the best held-out loss; the trainer's average depends this much on how rows are batched
OFTEN, FEW = 10, 10  # passes over the data that small sets are learned by heart in; held-out rows that tell little
FELL = "held-out loss fell by more than its uncertainty"
SCHEDULE, SETTINGS = "the learning rate followed its schedule", "the settings in force are those that were chosen"
TRAINED, UNSEEN = "only checked rows were trained, and no pass left any out", "no held-out row was trained"
SAVED = "the saved adapter and tokenizer are the trained ones"
RESTORED = "restored_step"  # in the log of a run that went back to its best weights
STOPPED = "stopped_step"  # in the log of a run that ended early on purpose
ROSE, HARDLY_MOVED, FELL_FAR = 1.1, 0.02, 0.5  # shares of the first training losses, see `likely_cause`
RATE_TOLERANCE = 1e-6  # of the learning rate; a schedule's factor is exactly 1 at its peak
FIXES = {
    SCHEDULE: "give SFTConfig and check_evidence the same rate and schedule; else look for what changes them",
    SETTINGS: "change them in Choices and not in SFTConfig; else look for what changes them, and train anew",
    TRAINED: "look for what leaves rows out, a sampler or a filter, and train anew",
    UNSEEN: "run chapter 03 again, whose data are in two parts, and train anew",
    SAVED: "save it again: run the cells from Save the adapter on",
}


class EvidenceError(InputError):
    """Training left no trace, or a trace that it must not leave."""


@dataclass(frozen=True, repr=False)
class Evidence(Claims):
    """Claims about a training run, and a warning.

    `cause` is what the run's numbers make the likely cause of a held-out loss that did not fall, or "".
    """

    warning: str = ""
    cause: str = ""

    def raise_if_failed(self) -> None:
        """Raises EvidenceError naming the first claim that does not hold."""
        for claim, seen, holds in self.rows:
            if not holds:
                other = "do not use this adapter; check the learning rate, the mask and the target modules"
                fix = FIXES.get(claim, other)
                fix = self.cause if claim == FELL and self.cause else fix
                raise EvidenceError("training", found=seen, expected=claim, fix=fix)

    def _notes(self) -> list[str]:
        notes = [f"Warning: {self.warning}"] if self.warning else []
        fell = all(holds for claim, _, holds in self.rows if claim == FELL)
        return notes if fell or not self.cause else [*notes, f"Likely fix: {self.cause}"]


def check_evidence(
    trainer: Any,
    *,
    before: HeldOutLosses,
    after: HeldOutLosses,
    learning_rate: float,
    settings: Mapping[str, Any] | None = None,
    rows: int | None = None,
    batches: "Batches | None" = None,
    adapter: str | Path = "",
) -> Evidence:
    """Did training do what it should, and only that?

    The held-out loss must have fallen by more than its uncertainty: the lower end of the paired 95 % interval of the
    fall (`bootstrap_interval` of the differences, conversation by conversation) is above 0.

    A gradient norm that is infinite or not a number is a fault, but for float16, whose scaler skips such a step: as
    many are allowed as `stop_on_divergence` lets pass (`allowed_overflows`), but not every step. (Transformers replaces
    a loss that is not a number by the average before it logs it, unless `logging_nan_inf_filter=False`: the gradient
    norm is what tells.)

    Every logged learning rate must be the one that the schedule gives for that step, see `scheduled_rates`.

    Args:
        trainer: after training; its log names overfitting too, where held-out losses are in it.
        before, after: `held_out_losses` of the same rows, which also hold a checksum of the frozen weights.
        learning_rate: the one that was chosen (not the trainer's own, which is what is checked).
        settings: others that were chosen, under SFTConfig's names, such as {"max_steps": 60}.
        rows: how many there are to train on.
        batches: what `MaskReport.watch` counted.
        adapter: the folder that the adapter and its tokenizer were saved in.

    Raises:
        EvidenceError: `before` and `after` are not of the same rows.
    """
    log, chosen = trainer.state.log_history, dict(settings or {})
    changed, total = count_changed_adapters(trainer.model)
    seen, finite = _norms(log, float16=trainer.args.fp16)
    untouched = before.frozen_checksum == after.frozen_checksum
    claims = [_schedule(trainer, learning_rate, chosen.get("lr_scheduler_type", ""))]  # it explains what else fails
    claims += [_settings(trainer, chosen)] if chosen else []
    claims += [
        ("every LoRA matrix B left zero", f"{changed} of {total}", 0 < total == changed),
        ("loss and gradient norm stayed finite", seen, finite),
        ("the base weights are untouched", "checksum over all frozen weights", untouched),
    ]
    claims += [_trained(trainer, batches, rows)] if batches is not None else []
    claims += [_unseen(trainer, before), *([_saved(trainer, Path(adapter))] if adapter else []), _fall(before, after)]
    passes = max((entry.get("epoch") or 0 for entry in log), default=0)
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    overfitting = describe_overfitting(log)
    return Evidence(tuple(claims), overfitting, likely_cause(passes, len(after.sums), losses, bool(overfitting)))


def scheduled_rates(args: Any, schedule: str, learning_rate: float, *, steps: int) -> list[float]:
    """The learning rate in each of the first steps, as Transformers' schedule of that name gives it; [] where it
    depends on what is measured ("reduce_lr_on_plateau").

    Args:
        args: `trainer.args`: warm-up, and how many steps the schedule is for.
    """
    import torch
    from transformers import get_scheduler

    optimizer, rates = torch.optim.SGD([torch.zeros(1)], lr=learning_rate), []
    lengths = (args.get_warmup_steps(args.max_steps), args.max_steps)
    options = args.lr_scheduler_kwargs or {}
    scheduler = get_scheduler(schedule, optimizer, *lengths, scheduler_specific_kwargs=options)
    if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
        return []
    for _ in range(steps):
        rates.append(float(optimizer.param_groups[0]["lr"]))
        optimizer.step()
        scheduler.step()
    return rates


def _schedule(trainer: Any, learning_rate: float, schedule: str) -> tuple[str, str, bool]:
    """Every logged rate against the schedule. A step that float16 skips does not move it on."""
    args, entries = trainer.args, [e for e in trainer.state.log_history if "learning_rate" in e]
    schedule = str(getattr(schedule or args.lr_scheduler_type, "value", schedule or args.lr_scheduler_type))
    rates = [float(entry["learning_rate"]) for entry in entries]
    expected = scheduled_rates(args, schedule, learning_rate, steps=max((e["step"] for e in entries), default=0))
    peak = max(rates, default=math.nan)
    seen = f"{schedule}, up to {peak:.3g} in {len(rates)} logged steps, {learning_rate:.3g} was set"
    skipped = 0
    for entry, rate in zip(entries, rates, strict=True):
        place = entry["step"] - 1
        possible = expected[max(0, place - skipped) : place + 1]
        if expected and not any(math.isclose(rate, each, rel_tol=RATE_TOLERANCE, abs_tol=1e-15) for each in possible):
            return SCHEDULE, f"{seen}; step {place + 1} had {rate:.3g} instead of {expected[place]:.3g}", False
        skipped += not math.isfinite(float(entry.get("grad_norm", 0.0)))
    return SCHEDULE, seen, bool(rates) and peak <= learning_rate * (1 + RATE_TOLERANCE)


def _settings(trainer: Any, chosen: Mapping[str, Any]) -> tuple[str, str, bool]:
    in_force = {name: getattr(trainer.args, name) for name in chosen}
    in_force = {name: getattr(value, "value", value) for name, value in in_force.items()}
    wrong = [f"{name} is {in_force[name]}, not {value}" for name, value in chosen.items() if in_force[name] != value]
    steps, most = trainer.state.global_step, trainer.args.max_steps
    if steps < most and not any(STOPPED in entry for entry in trainer.state.log_history):
        wrong.append(f"{steps} of {most} steps were made")
    return SETTINGS, "; ".join(wrong) or f"{len(chosen)} settings, {steps} steps", not wrong


def _trained(trainer: Any, batches: "Batches", rows: int | None) -> tuple[str, str, bool]:
    present = len(trainer.train_dataset)
    missing = "" if rows is None or present == rows else f"; {present:,} rows in the trainer, {rows:,} to train on"
    return TRAINED, f"{batches}{missing}", batches.holds and not missing


def _unseen(trainer: Any, before: HeldOutLosses) -> tuple[str, str, bool]:
    """By content, whatever the two parts are called."""
    trained = {row_key(row["input_ids"]) for row in trainer.train_dataset}
    both = len(trained & set(before.rows))
    return UNSEEN, f"{both} of {len(before.rows)} are among the rows to train on", not both


def _saved(trainer: Any, folder: Path) -> tuple[str, str, bool]:
    (matrices, same), (tokens, alike) = (
        same_adapter(trainer.model, folder),
        same_tokenizer(trainer.processing_class, folder),
    )
    return SAVED, f"{matrices}; {tokens}", same and alike


def likely_cause(passes: float, held_out: int, losses: Sequence[float] = (), overfitting: bool = False) -> str:
    """What to do about a held-out loss that did not fall, from the run's own numbers.

    Args:
        passes: how often each row was seen.
        held_out: how many rows were held out.
        losses: the training losses, in order. The means of their first and last fifth are compared.
        overfitting: whether the held-out loss rose again.

    Example: (36, 2) -> "train for fewer steps or on more conversations (each row was seen 36 times); hold back …"
    """
    causes = []
    if len(losses) >= 5:
        count = len(losses) // 5
        first, last = (math.fsum(part) / count for part in (losses[:count], losses[-count:]))
        seen = f"the training loss went from {first:.2f} to {last:.2f}"
        if not last <= ROSE * first:  # also where it is not a number
            return f"train anew with a third of LEARNING_RATE ({seen})"
        if last >= (1 - HARDLY_MOVED) * first:
            return f"train anew with three times the LEARNING_RATE, or more steps ({seen})"
        if last <= FELL_FAR * first and overfitting:
            return f"train anew with EPOCHS = 3 or KEEP_BEST = True ({seen}, and the held-out loss rose again)"
        if last <= FELL_FAR * first and passes < OFTEN and held_out >= FEW:
            return f"look at the mask and the template, and whether the held-out rows are of the same kind ({seen})"
    if passes >= OFTEN:
        causes.append(f"train for fewer steps or on more conversations (each row was seen {passes:.0f} times)")
    if held_out < FEW:
        enough = f"hold back {2 * FEW} or more, which takes {10 * FEW} conversations"
        causes.append(f"{enough} ({held_out} held-out rows can tell little)")
    return "; ".join(causes)


def _norms(log: Sequence[Mapping[str, Any]], *, float16: bool) -> tuple[str, bool]:
    """What the gradient norms were, and whether they and the losses stayed finite (see `check_evidence`)."""
    norms = [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    few = skipped <= allowed_overflows(len(norms), fp16=float16) and skipped < len(norms)
    highest = max((norm for norm in norms if math.isfinite(norm)), default=math.nan)
    seen = f"norms up to {highest:.2f}"
    if skipped:
        seen += f", not finite in {skipped} of {len(norms)} steps"
    return seen, all(map(math.isfinite, losses)) and few


def _fall(before: HeldOutLosses, after: HeldOutLosses) -> tuple[str, str, bool]:
    low, high = fall_interval(before, after)
    seen = (
        f"{before.loss:.3f} -> {after.loss:.3f}, a fall of {before.loss - after.loss:.3f} (95 % interval {low:.3f} to "
        f"{high:.3f}, {len(before.sums)} conversations); perplexity {before.perplexity:.2f} -> {after.perplexity:.2f}"
    )
    return FELL, seen, low > 0


def describe_overfitting(log: Sequence[Mapping[str, Any]]) -> str:
    """One sentence where the held-out loss ended more than 1 % above its best, else "".

    A run that went back to its best weights (`helpers.training.best`) ended with the best loss.

    Args:
        log: `trainer.state.log_history`.

    Example: held-out losses 2.0, 1.0, 1.5 at the steps 10, 20, 30 ->
        "held-out loss rose after step 20 (best 1.000 there, 1.500 at step 30): it overfits; stop earlier or …"
    """
    measured = [(entry["eval_loss"], entry["step"]) for entry in log if "eval_loss" in entry]
    if not measured or any(RESTORED in entry for entry in log):
        return ""
    (best, best_step), (last, last_step) = min(measured), measured[-1]
    if last <= best * (1 + OVERFIT_TOLERANCE):
        return ""
    seen = f"best {best:.3f} there, {last:.3f} at step {last_step}"
    return f"held-out loss rose after step {best_step} ({seen}): it overfits; stop earlier or use fewer epochs"
