"""Around the trainer: a loss plot that grows while it trains, and evidence that the model learned."""

import math
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from helpers.errors import InputError
from helpers.figures import MARK, TRAINED, as_image
from helpers.tables import html_table, text_table

if TYPE_CHECKING:
    from transformers import TrainerCallback


class EvidenceError(InputError):
    """Training left no trace, or a trace that it must not leave."""


def loss_plot(*, max_steps: int) -> "TrainerCallback":
    """A trainer callback that draws training and held-out loss into one picture, updated in place.

    Args:
        max_steps: the length of the run, for the horizontal axis.

    Headless (papermill) and in Colab alike the notebook ends up with one stored PNG. It is drawn at most every two
    seconds, so that drawing does not slow short steps down.
    """
    from IPython.display import display
    from matplotlib.figure import Figure
    from transformers import TrainerCallback

    class LossPlot(TrainerCallback):
        def __init__(self) -> None:
            self.train: dict[int, float] = {}
            self.held_out: dict[int, float] = {}
            self.handle = None
            self.drawn = -math.inf

        def on_log(self, args, state, control, logs=None, **kwargs) -> None:
            if "loss" in logs:
                self.train[state.global_step] = float(logs["loss"])
            if "eval_loss" in logs:
                self.held_out[state.global_step] = float(logs["eval_loss"])
            if time.monotonic() - self.drawn > 2 or "eval_loss" in logs or state.global_step >= max_steps:
                self.draw()
                self.drawn = time.monotonic()

        def draw(self) -> None:
            figure = Figure(figsize=(7, 3.2), layout="constrained")
            axes = figure.subplots()
            axes.plot(list(self.train), list(self.train.values()), color=TRAINED, label="training")
            axes.plot(
                list(self.held_out),
                list(self.held_out.values()),
                "o--",
                color=MARK,
                label="held-out (never trained)",
            )
            axes.set(xlabel="step", ylabel="loss on the answers", xlim=(0, max_steps), ylim=(0, None))
            axes.grid(alpha=0.3)
            axes.legend(frameon=False)
            if self.handle is None:
                self.handle = display(as_image(figure), display_id=True)
            else:
                self.handle.update(as_image(figure))

    return LossPlot()


def frozen_checksum(model: Any) -> int:
    """A checksum over every weight that is not trained (all bits, order matters little): equal before and after."""
    import torch

    total = 0
    for parameter in model.parameters():
        if not parameter.requires_grad:
            data = parameter.detach().contiguous().view(torch.uint8).flatten()
            words = data[: data.numel() // 4 * 4].view(torch.int32)
            total += int(words.sum(dtype=torch.int64)) + int(data[data.numel() // 4 * 4 :].sum(dtype=torch.int64))
    return total


@dataclass(frozen=True)
class Evidence:
    """Claims about a training run and whether each holds: rows of (claim, what was seen, holds)."""

    rows: tuple[tuple[str, str, bool], ...]

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
        return "\n".join(f"{claim}: {holds}" for claim, _, holds in self.rows)

    def _repr_html_(self) -> str:
        return html_table(["claim", "seen", "holds"], self.rows)


def check_evidence(
    model: Any, *, log: list[dict], frozen_before: int, loss_before: float, loss_after: float
) -> Evidence:
    """Did training do what it should, and only that?

    Args:
        model: the trained PEFT model.
        log: `trainer.state.log_history`.
        frozen_before: `frozen_checksum(model)` from before training.
        loss_before, loss_after: held-out loss, nats a token.
    """
    changed, total = count_changed_adapters(model)
    norms = [float(entry["grad_norm"]) for entry in log if "grad_norm" in entry]
    losses = [float(entry["loss"]) for entry in log if "loss" in entry]
    finite = bool(norms) and all(map(math.isfinite, norms + losses))
    return Evidence(
        (
            ("every LoRA matrix B left zero", f"{changed} of {total}", 0 < total == changed),
            ("loss and gradient norm stayed finite", f"norms up to {max(norms, default=math.nan):.2f}", finite),
            (
                "the base weights are untouched",
                "checksum over all frozen weights",
                frozen_checksum(model) == frozen_before,
            ),
            ("held-out loss fell", f"{loss_before:.3f} -> {loss_after:.3f}", loss_after < loss_before),
        )
    )


def count_changed_adapters(model: Any) -> tuple[int, int]:
    """(how many LoRA B matrices are not zero, how many there are). All are zero before training."""
    matrices = [parameter for name, parameter in model.named_parameters() if "lora_B" in name]
    return sum(bool(parameter.detach().any()) for parameter in matrices), len(matrices)


@dataclass(frozen=True)
class TrainableParameters:
    """What LoRA added, by kind of module: rows of (module, layers, frozen shape, rank, trainable parameters)."""

    rows: tuple[tuple[str, int, str, int, int], ...]
    total: int
    trainable: int

    _headers = ("module", "layers", "frozen shape", "rank", "trainable")

    def _summary(self) -> str:
        return (
            f"{self.trainable:,} of {self.total:,} parameters are trained ({100 * self.trainable / self.total:.2f} %)"
        )

    def _rows(self) -> list[list[object]]:
        return [[name, layers, shape, rank, f"{count:,}"] for name, layers, shape, rank, count in self.rows]

    def __repr__(self) -> str:
        return text_table(self._headers, self._rows()) + "\n" + self._summary()

    def _repr_html_(self) -> str:
        return html_table(self._headers, self._rows()) + f"<p>{self._summary()}</p>"


def count_trainable(model: Any) -> TrainableParameters:
    """Count a PEFT model's trainable parameters by kind of module.

    A linear layer of shape (out, in) gets A (r, in) and B (out, r): r · (in + out) parameters (Hu et al. 2021,
    arXiv:2106.09685). Example: q_proj of Llama 3.2 1B, (2048, 2048), r = 16 -> 65,536 a layer.

    A 4-bit weight stores two parameters a byte, so the total counts what the layers compute with, not the bytes.
    """
    found: dict[str, list[tuple[int, int, int]]] = {}
    adapters = 0
    for name, module in model.named_modules():
        if not hasattr(module, "lora_A") or "default" not in module.lora_A:
            continue
        rank, shape = module.r["default"], (module.out_features, module.in_features)
        count = sum(p.numel() for p in (*module.lora_A.parameters(), *module.lora_B.parameters()) if p.requires_grad)
        found.setdefault(name.rsplit(".", 1)[-1], []).append((rank, shape, count))
        adapters += count
    rows = tuple(
        (kind, len(layers), f"{layers[0][1][0]} × {layers[0][1][1]}", layers[0][0], sum(count for *_, count in layers))
        for kind, layers in found.items()
    )
    trainable, total = model.get_nb_trainable_parameters()
    return TrainableParameters(rows, total, trainable)
