"""Keep the weights with the lowest held-out loss, and stop a run that has begun to learn by heart.

`load_best_model_at_end` needs the trainer's own checkpoints; those of `helpers.training.checkpoints` are written by the
clock. So the best weights are one more file beside them.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import replace_file
from helpers.messages import _
from helpers.training.evidence import RESTORED, STOPPED

if TYPE_CHECKING:
    from transformers import TrainerCallback

FILE = "best.safetensors"


class BestWeights:
    """What `keep_best` keeps.

    Attributes:
        path: the file with the trained weights of the best step, which names the step and its loss.
    """

    def __init__(self, trainer: Any):
        self.trainer, self.path = trainer, Path(trainer.args.output_dir) / FILE

    def measured(self) -> list[tuple[float, int]]:
        """(held-out loss, step) of every measurement, in order."""
        return [(entry["eval_loss"], entry["step"]) for entry in self.trainer.state.log_history if "eval_loss" in entry]

    def save(self) -> None:
        """Write the trained weights as they are now: those of the last measurement."""
        from safetensors.torch import save

        loss, step = self.measured()[-1]
        weights = {name: weight.detach().cpu().contiguous() for name, weight in self._trained()}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        replace_file(self.path, save(weights, metadata={"step": str(step), "eval_loss": repr(loss)}))

    def restore(self) -> None:
        """Give the model the weights of its best step; says which step that is.

        Where the file is of another run or gone, the last weights stay, and that is said.
        """
        from safetensors import SafetensorError, safe_open

        if not self.measured():
            print(_("The held-out loss was never measured: these are the last weights"))
            return
        (best, best_step), (last, last_step) = min(self.measured()), self.measured()[-1]
        if best == last:
            print(_("The held-out loss was lowest at the end, {loss:.3f}", loss=last))
            return
        steps = dict(best=best, best_step=best_step, last=last, last_step=last_step)
        seen = _("{best:.3f} at step {best_step}, {last:.3f} at step {last_step}", **steps)
        try:
            with safe_open(self.path, "pt") as file:
                if file.metadata() != {"step": str(best_step), "eval_loss": repr(best)}:
                    raise FileNotFoundError
                for name, weight in self._trained():
                    weight.data.copy_(file.get_tensor(name))
        except (OSError, SafetensorError):
            print(_("The best weights are not on this machine ({seen}): these are the last ones", seen=seen))
            return
        self.trainer.state.log_history.append({RESTORED: best_step, "step": self.trainer.state.global_step})
        print(_("Back to the lowest held-out loss: {seen}", seen=seen))

    def _trained(self) -> list[tuple[str, Any]]:
        return [(name, weight) for name, weight in self.trainer.model.named_parameters() if weight.requires_grad]


def keep_best(trainer: Any, *, patience: int = 2) -> BestWeights:
    """Keep the weights of the lowest held-out loss while a trainer trains, and stop it in time.

    It is measured every `eval_steps`. The loss of the best step is a little too good as a judge of the model: it was
    chosen for being low on these rows.

    Args:
        trainer: with `eval_strategy="steps"`; a callback is added to it.
        patience: so many measurements in a row without a new best end the run.

    Example:
        >>> best = keep_best(trainer)
        >>> trainer.train()
        >>> best.restore()
        Back to the lowest held-out loss: 1.546 at step 12, 1.764 at step 24
    """
    best = BestWeights(trainer)
    trainer.add_callback(_callback(best, patience))
    return best


def _stopped(state: Any) -> bool:
    """Whether the run was ended already: a later `trainer.evaluate()` is no measurement of it."""
    return any(STOPPED in entry for entry in state.log_history)


def _callback(best: BestWeights, patience: int) -> "TrainerCallback":
    from transformers import TrainerCallback

    class KeepBest(TrainerCallback):
        def on_evaluate(self, args, state, control, metrics=None, **kwargs) -> None:
            measured = best.measured()
            if "eval_loss" not in (metrics or {}) or not measured:
                return
            since = len(measured) - 1 - measured.index(min(measured))
            if since == 0:
                best.save()
            elif since >= patience and state.global_step < state.max_steps and not _stopped(state):
                said = _(
                    "Stopped at step {step}: {since} measurements in a row without a new best",
                    step=state.global_step,
                    since=since,
                )
                print(said)
                control.should_training_stop = True
                state.log_history.append({STOPPED: state.global_step, "step": state.global_step})

    return KeepBest()
