"""Stop a run whose loss is not a number or explodes, with an explanation, instead of paying for the rest of it."""

import math
import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from helpers.base import InputError
from helpers.messages import _

if TYPE_CHECKING:
    from transformers import TrainerCallback

WINDOW = 5
WORSE_THAN_BEFORE = 2.5
LOST_AGAIN = 3
# Of torch.amp.GradScaler: init_scale=2**16, backoff_factor=0.5, growth_interval=2000.
BACKOFFS, GROWTH_INTERVAL = 16, 2000


class DivergenceError(InputError):
    """Training has destroyed the model or is about to; going on would not repair it."""


def allowed_overflows(steps: int, *, fp16: bool) -> int:
    """How many gradients that are not finite are normal in so many steps: none, but for float16.

    There PyTorch's scaler multiplies the loss by 65536 = 2**16. At each overflow it skips the step and halves that
    factor; after 2,000 steps without one it doubles it, to try. So 16 overflows, and one more for each doubling, bring
    it down to 1: an overflow after that is not the scaler's doing, wherever in the run it comes. (The doublings are
    counted as one for each 2,000 steps, the most that there can be.)

    Example: 60 steps of float16 -> 16; 4,000 -> 18
    """
    return BACKOFFS + steps // GROWTH_INTERVAL if fp16 else 0


def find_divergence(log: Sequence[Mapping[str, Any]], *, fp16: bool) -> tuple[str, str] | None:
    """What is wrong at the end of a training log and what was expected, or None.

    Three things count:
    - a loss that is NaN or infinite;
    - an explosion. Single batches are noisy, so the median of the last 5 losses is what counts. It must not exceed
      2.5 times the loss of the start; and once it had come down to a third, it must not be back above that. The start
      is the first loss, measured before the first update and so no part of an explosion.
    - a gradient that is NaN or infinite. In float16 it costs one step, and some are normal, in the first steps above
      all: see `allowed_overflows`. In bfloat16 and float32 nothing would stop it from making every weight NaN.

    Args:
        log: `trainer.state.log_history`: entries with "loss", "grad_norm" and "step"; others are skipped.
        fp16: whether a gradient scaler is at work, as `trainer.args.fp16` says.

    Example:
        >>> find_divergence([{"step": 1, "loss": 2.0}, {"step": 2, "loss": math.nan}], fp16=False)
        ('a loss of nan at step 2', 'a number')
    """
    entries = [entry for entry in log if "loss" in entry]
    if not entries:
        return None
    last, losses = entries[-1], [float(entry["loss"]) for entry in entries]
    step = last.get("step", len(entries))
    if not math.isfinite(losses[-1]):
        return _("a loss of {loss} at step {step}", loss=losses[-1], step=step), _("a number")
    norms = [float(entry.get("grad_norm", 0.0)) for entry in entries]
    overflows, allowed = sum(not math.isfinite(norm) for norm in norms), allowed_overflows(len(norms), fp16=fp16)
    if overflows > allowed and not math.isfinite(norms[-1]):
        if fp16:
            found = _("{count} float16 overflows up to step {step}", count=overflows, step=step)
            return found, _("at most {count}", count=allowed)
        facts = dict(norm=norms[-1], step=step, loss=losses[-1])
        return _("a gradient norm of {norm} at step {step} (the loss is {loss:.3g})", **facts), _("a number")
    medians = [statistics.median(losses[end - WINDOW : end]) for end in range(WINDOW, len(losses) + 1)]
    if not medians:
        return None
    # The first batch may have been an easy one: the next ones may raise what counts as the start, by half at most,
    # because an explosion may be among them.
    start = max(losses[0], min(medians[0], 1.5 * losses[0]))
    now, lowest = medians[-1], min(medians)
    found = _("a loss of {loss:.3g} at step {step} (the median of {count})", loss=now, step=step, count=WINDOW)
    if now > WORSE_THAN_BEFORE * start:
        return found, _("less than {times} times the {start:.3g} of its start", times=WORSE_THAN_BEFORE, start=start)
    if now > start and now > LOST_AGAIN * lowest:
        return found, _(
            "no way back from {lowest:.3g} to above the {start:.3g} of its start", lowest=lowest, start=start
        )
    return None


def stop_on_divergence() -> "TrainerCallback":
    """A trainer callback that ends training with a DivergenceError as soon as `find_divergence` finds something.

    Needs `logging_steps=1` to be quick. Checkpoints from before stay as they are.

    Raises:
        DivergenceError: out of `trainer.train()`.
    """
    from transformers import TrainerCallback

    class StopOnDivergence(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            args.logging_nan_inf_filter = False  # by default a NaN is logged as the mean of the losses before it

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if "loss" not in (logs or {}):
                return
            divergence = find_divergence(state.log_history, fp16=args.fp16)
            if divergence is not None:
                found, expected = divergence
                rate = args.learning_rate
                fix = _("set START_AFRESH = True and a smaller learning rate than {rate:g}", rate=rate)
                raise DivergenceError(_("training"), found=found, expected=expected, fix=fix)

    return StopOnDivergence()
