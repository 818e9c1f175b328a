"""Evidence that training did what it should, and only that."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import InputError
from helpers.masking.batches import row_key
from helpers.messages import N_, _
from helpers.training.divergence import allowed_overflows
from helpers.training.held_out import HeldOutLosses, fall_interval
from helpers.training.loaded import Claims, same_adapter, same_tokenizer
from helpers.training.weights import count_changed_adapters

if TYPE_CHECKING:
    from helpers.masking.batches import Batches

OVERFIT_TOLERANCE = 0.01  # of the best held-out loss; the trainer's average depends this much on how rows are batched
OFTEN, FEW = 10, 10  # passes over the data that small sets are learned by heart in; held-out rows that tell little
FELL = N_("held-out loss fell by more than its uncertainty")
SCHEDULE = N_("the learning rate followed its schedule")
SETTINGS = N_("the settings in force are those that were chosen")
TRAINED = N_("only checked rows were trained, and no pass left any out")
UNSEEN = N_("no held-out row was trained")
SAVED = N_("the saved adapter and tokenizer are the trained ones")
RESTORED = "restored_step"  # in the log of a run that went back to its best weights
STOPPED = "stopped_step"  # in the log of a run that ended early on purpose
ROSE, HARDLY_MOVED, FELL_FAR = 1.1, 0.02, 0.5  # shares of the first training losses, see `likely_cause`
RATE_TOLERANCE = 1e-6  # of the learning rate; a schedule's factor is exactly 1 at its peak
FIXES = {
    SCHEDULE: N_("give SFTConfig and check_evidence the same rate and schedule; else look for what changes them"),
    SETTINGS: N_("change them in Choices and not in SFTConfig; else look for what changes them, and train anew"),
    TRAINED: N_("look for what leaves rows out, a sampler or a filter, and train anew"),
    UNSEEN: N_("run chapter 03 again, whose data are in two parts, and train anew"),
    SAVED: N_("save it again: run the cells from Save the adapter on"),
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
                other = N_("do not use this adapter; check the learning rate, the mask and the target modules")
                fix = self.cause if claim == FELL and self.cause else _(FIXES.get(claim, other))
                raise EvidenceError(_("training"), found=seen, expected=_(claim), fix=fix)

    def _notes(self) -> list[str]:
        notes = [_("Warning: {warning}", warning=self.warning)] if self.warning else []
        fell = all(holds for claim, seen, holds in self.rows if claim == FELL)
        return notes if fell or not self.cause else [*notes, _("Likely fix: {fix}", fix=self.cause)]


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
        (
            N_("every LoRA matrix B left zero"),
            _("{changed} of {total}", changed=changed, total=total),
            0 < total == changed,
        ),
        (N_("loss and gradient norm stayed finite"), seen, finite),
        (N_("the base weights are untouched"), _("checksum over all frozen weights"), untouched),
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
    while len(rates) < steps:
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
    facts = dict(schedule=schedule, peak=peak, steps=len(rates), rate=learning_rate)
    seen = _("{schedule}, up to {peak:.3g} in {steps} logged steps, {rate:.3g} was set", **facts)
    skipped = 0
    for entry, rate in zip(entries, rates, strict=True):
        place = entry["step"] - 1
        possible = expected[max(0, place - skipped) : place + 1]
        if expected and not any(math.isclose(rate, each, rel_tol=RATE_TOLERANCE, abs_tol=1e-15) for each in possible):
            facts = dict(seen=seen, step=place + 1, rate=rate, right=expected[place])
            return SCHEDULE, _("{seen}; step {step} had {rate:.3g} instead of {right:.3g}", **facts), False
        skipped += not math.isfinite(float(entry.get("grad_norm", 0.0)))
    return SCHEDULE, seen, bool(rates) and peak <= learning_rate * (1 + RATE_TOLERANCE)


def _settings(trainer: Any, chosen: Mapping[str, Any]) -> tuple[str, str, bool]:
    in_force = {name: getattr(trainer.args, name) for name in chosen}
    in_force = {name: getattr(value, "value", value) for name, value in in_force.items()}
    wrong = [
        _("{name} is {value}, not {chosen}", name=name, value=in_force[name], chosen=value)
        for name, value in chosen.items()
        if in_force[name] != value
    ]
    steps, most = trainer.state.global_step, trainer.args.max_steps
    if steps < most and not any(STOPPED in entry for entry in trainer.state.log_history):
        wrong.append(_("{steps} of {most} steps were made", steps=steps, most=most))
    right = _("{settings} settings, {steps} steps", settings=len(chosen), steps=steps)
    return SETTINGS, _("; ").join(wrong) or right, not wrong


def _trained(trainer: Any, batches: "Batches", rows: int | None) -> tuple[str, str, bool]:
    present = len(trainer.train_dataset)
    if rows is None or present == rows:
        return TRAINED, str(batches), batches.holds
    facts = dict(seen=batches, present=present, rows=rows)
    return TRAINED, _("{seen}; {present:,} rows in the trainer, {rows:,} to train on", **facts), False


def _unseen(trainer: Any, before: HeldOutLosses) -> tuple[str, str, bool]:
    """By content, whatever the two parts are called."""
    trained = {row_key(row["input_ids"]) for row in trainer.train_dataset}
    both = len(trained & set(before.rows))
    seen = _("{both} of {rows} are among the rows to train on", both=both, rows=len(before.rows))
    return UNSEEN, seen, not both


def _saved(trainer: Any, folder: Path) -> tuple[str, str, bool]:
    (matrices, same), (tokens, alike) = (
        same_adapter(trainer.model, folder),
        same_tokenizer(trainer.processing_class, folder),
    )
    return SAVED, _("; ").join([matrices, tokens]), same and alike


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
        seen = _("the training loss went from {first:.2f} to {last:.2f}", first=first, last=last)
        if not last <= ROSE * first:  # also where it is not a number
            return _("train anew with a third of LEARNING_RATE ({seen})", seen=seen)
        if last >= (1 - HARDLY_MOVED) * first:
            return _("train anew with three times the LEARNING_RATE, or more steps ({seen})", seen=seen)
        if last <= FELL_FAR * first and overfitting:
            return _(
                "train anew with EPOCHS = 3 or KEEP_BEST = True ({seen}, and the held-out loss rose again)", seen=seen
            )
        if last <= FELL_FAR * first and passes < OFTEN and held_out >= FEW:
            return _(
                "look at the mask and the template, and whether the held-out rows are of the same kind ({seen})",
                seen=seen,
            )
    if passes >= OFTEN:
        fewer = _("train for fewer steps or on more conversations (each row was seen {times:.0f} times)", times=passes)
        causes.append(fewer)
    if held_out < FEW:
        more = _(
            "hold back {enough} or more, which takes {rows} conversations ({few} held-out rows can tell little)",
            enough=2 * FEW,
            rows=10 * FEW,
            few=held_out,
        )
        causes.append(more)
    return _("; ").join(causes)


def _norms(log: Sequence[Mapping[str, Any]], *, float16: bool) -> tuple[str, bool]:
    """What the gradient norms were, and whether they and the losses stayed finite (see `check_evidence`)."""
    norms = [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    skipped = sum(not math.isfinite(norm) for norm in norms)
    few = skipped <= allowed_overflows(len(norms), fp16=float16) and skipped < len(norms)
    highest = max((norm for norm in norms if math.isfinite(norm)), default=math.nan)
    seen = _("norms up to {highest:.2f}", highest=highest)
    if skipped:
        facts = dict(highest=highest, skipped=skipped, steps=len(norms))
        seen = _("norms up to {highest:.2f}, not finite in {skipped} of {steps} steps", **facts)
    return seen, all(map(math.isfinite, losses)) and few


def _fall(before: HeldOutLosses, after: HeldOutLosses) -> tuple[str, str, bool]:
    low, high = fall_interval(before, after)
    seen = _(
        "{before:.3f} -> {after:.3f}, a fall of {fall:.3f} (95 % interval {low:.3f} to {high:.3f}, "
        "{conversations} conversations); perplexity {perplexity_before:.2f} -> {perplexity_after:.2f}",
        before=before.loss,
        after=after.loss,
        fall=before.loss - after.loss,
        low=low,
        high=high,
        conversations=len(before.sums),
        perplexity_before=before.perplexity,
        perplexity_after=after.perplexity,
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
    return _(
        "held-out loss rose after step {best_step} (best {best:.3f} there, {last:.3f} at step {last_step}): "
        "it overfits; stop earlier or use fewer epochs",
        best=best,
        best_step=best_step,
        last=last,
        last_step=last_step,
    )
