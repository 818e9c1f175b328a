"""Is the model that was loaded the one that was trained?"""

import contextlib
import io
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.base import InputError, Table
from helpers.handoff.run import Run
from helpers.messages import N_, _
from helpers.template.check import check_template
from helpers.training.held_out import HeldOutLosses, held_out_losses

ROWS = 8  # held-out conversations whose loss is measured again
LOSS_TOLERANCE = 0.10  # nats a token, on a base model in 4 bits, as in training
LOSS = N_("the held-out loss is close to chapter 04's")
ROUNDING = 0.25  # of the loss: what 16 bits in place of 4 may change besides, most where little was trained
SAMPLE = "Order 1024 from São Paulo — 模型, naïve façade: 3.14 €\n\tWhy?"  # what a tokenizer may get wrong


class LoadedError(InputError):
    """The model or the tokenizer is not the one that was trained."""


@dataclass(frozen=True, repr=False)
class Claims(Table):
    """Claims and whether each holds: rows of (claim, what was seen, holds). A claim is translated where it is shown."""

    rows: tuple[tuple[str, str, bool], ...]

    @property
    def ok(self) -> bool:
        """Whether every claim holds."""
        return all(holds for _, _, holds in self.rows)

    def _table(self) -> tuple[list[str], list[list[object]]]:
        return [_("claim"), _("seen"), _("holds")], [[_(claim), seen, holds] for claim, seen, holds in self.rows]

    def __repr__(self) -> str:
        """The claims alone: what was seen differs from run to run."""
        lines = [_("{claim}: {holds}", claim=_(claim), holds=holds) for claim, seen, holds in self.rows]
        return "\n".join([*lines, *self._notes()])


@dataclass(frozen=True, repr=False)
class LoadedReport(Claims):
    """Claims about a loaded model."""

    def raise_if_failed(self) -> None:
        """Raises LoadedError about the first claim that does not hold."""
        for claim, seen, holds in self.rows:
            if not holds:
                fix = _("restart the session and run this chapter from its top; if it stays so, run chapter 04 again")
                raise LoadedError(_("the loaded model"), found=seen, expected=_(claim), fix=fix)


def check_loaded(run: Run, model: Any, tokenizer: Any) -> LoadedReport:
    """Hold a model that was loaded from the run's adapter against its files, and against what was measured of it.

    Four claims: each LoRA matrix is that of the file, and scaled as in training; the tokenizer is the one that the data
    were made with; its chat template too, and generation stops where an answer ends; and the loss on the first held-out
    conversations is what chapter 04 measured, to `LOSS_TOLERANCE`, and `ROUNDING` where the base is not in 4 bits.

    Args:
        run: holds `dataset`, `adapter` and `report.json`.

    Raises:
        LoadedError, TemplateError: a claim does not hold.
    """
    adapter, dataset, template = run.artefact("adapter"), run.artefact("dataset"), run.facts("adapter")["template"]
    check_template(tokenizer, model=model, expected=template).raise_if_failed()
    rows = [
        (N_("the chat template is that of the training"), template, True),
        (N_("every LoRA matrix is that of the file"), *same_adapter(model, adapter)),
        (N_("the tokenizer is that of the data"), *same_tokenizer(tokenizer, dataset / "tokenizer")),
        (LOSS, *_same_loss(run, model, tokenizer)),
    ]
    report = LoadedReport(tuple(rows))
    report.raise_if_failed()
    return report


def same_adapter(model: Any, folder: Path) -> tuple[str, bool]:
    """Whether a model's LoRA matrices, and their scaling, are those that a folder holds; what was seen comes first.

    Example: ("420 matrices, scaled by 1", True)
    """
    from peft import PeftConfig, get_peft_model_state_dict
    from safetensors.torch import load_file

    saved = load_file(folder / "adapter_model.safetensors")
    loaded = get_peft_model_state_dict(model) if hasattr(model, "peft_config") else {}
    same = [name for name in saved if name in loaded and _equal(saved[name], loaded[name])]
    config = PeftConfig.from_pretrained(folder)
    scaling = config.lora_alpha / (config.r**0.5 if config.use_rslora else config.r)
    by_module = (getattr(module, "scaling", None) for module in model.modules())
    scales = {each["default"] for each in by_module if isinstance(each, dict) and "default" in each}
    if config.rank_pattern or config.alpha_pattern:  # each module has its own
        scaling, scales = 0.0, {0.0}
    counts = dict(same=len(same), saved=len(saved))
    seen = _("{same} of {saved} matrices", **counts)
    if not scales:
        seen = _("{same} of {saved} matrices, scaled by nothing instead of {right:g}", right=scaling, **counts)
    elif scales != {scaling}:
        found = ", ".join(f"{scale:g}" for scale in sorted(scales))
        facts = dict(found=found, right=scaling, **counts)
        seen = _("{same} of {saved} matrices, scaled by {found} instead of {right:g}", **facts)
    return seen, saved.keys() == loaded.keys() and len(same) == len(saved) and scales == {scaling}


def _equal(saved: Any, loaded: Any) -> bool:
    """Whether a saved matrix is a loaded one, but for the rounding to the other's number format."""
    import torch

    loaded = loaded.detach().cpu()
    return saved.shape == loaded.shape and torch.equal(saved.to(loaded.dtype), loaded)


def same_tokenizer(tokenizer: Any, folder: Path) -> tuple[str, bool]:
    """Whether a tokenizer has the vocabulary of a saved one, and cuts text as that does; what was seen comes first.

    Example: ("49,152 tokens, 0 with another id", True)
    """
    from transformers import AutoTokenizer

    saved = AutoTokenizer.from_pretrained(folder)
    ours, theirs = tokenizer.get_vocab(), saved.get_vocab()
    moved = sum(theirs.get(token) != number for token, number in ours.items())
    text = SAMPLE + "".join(saved.all_special_tokens)
    alike = tokenizer(text).input_ids == saved(text).input_ids
    counts = dict(tokens=len(ours), moved=moved)
    seen = _("{tokens:,} tokens, {moved:,} with another id", **counts)
    if not alike:
        seen = _("{tokens:,} tokens, {moved:,} with another id, and text is cut another way", **counts)
    return seen, not moved and len(ours) == len(theirs) and alike


def _same_loss(run: Run, model: Any, tokenizer: Any) -> tuple[str, bool]:
    report = run.read_json("report.json")
    before = report["held_out_loss"].get("by_row") or {}
    then = HeldOutLosses(tuple(before.get("sums", ())[:ROWS]), tuple(before.get("tokens", ())[:ROWS]))
    now = held_out_losses(model, held_out_rows(run, tokenizer, report["settings"].get("max_length")))
    return same_loss(now, then, in_4bit=getattr(model, "is_loaded_in_4bit", False))


def same_loss(now: HeldOutLosses, then: HeldOutLosses, *, in_4bit: bool) -> tuple[str, bool]:
    """Whether two losses of the same answers agree, to `LOSS_TOLERANCE` and `ROUNDING`; what was seen comes first.

    Example: ("0.229 on the first 8 conversations, 0.229 in chapter 04; may differ by 0.10", True)
    """
    if None in then.sums:
        return _("a loss that was not finite in chapter 04"), False
    if now.tokens != then.tokens:
        counts = dict(now=sum(now.tokens), then=sum(then.tokens))
        return _("answers of {now} tokens, where chapter 04 had {then}", **counts), False
    tolerance = LOSS_TOLERANCE if in_4bit else LOSS_TOLERANCE + ROUNDING * then.loss
    seen = _(
        "{now:.3f} on the first {count} conversations, {then:.3f} in chapter 04; may differ by {tolerance:.2f}",
        now=now.loss,
        count=len(now.sums),
        then=then.loss,
        tolerance=tolerance,
    )
    return seen, abs(now.loss - then.loss) <= tolerance


def held_out_rows(run: Run, tokenizer: Any, max_length: int | None) -> list[Mapping[str, list[int]]]:
    """The first held-out conversations as chapter 04's trainer masks them."""
    from datasets import load_from_disk
    from unsloth.chat_templates import train_on_responses_only

    texts = load_from_disk(str(run.path / "dataset"))["held_out"][:ROWS]["text"]
    ids = tokenizer(texts, truncation=max_length is not None, max_length=max_length).input_ids
    with contextlib.redirect_stdout(io.StringIO()):  # it prints the markers that chapter 04 showed
        mask = train_on_responses_only(None, tokenizer=tokenizer, return_function=True)
    return [
        {"input_ids": i, "labels": labels} for i, labels in zip(ids, mask({"input_ids": ids})["labels"], strict=True)
    ]
