"""Before an export: does it fit this machine, and does the adapter fit its base?"""

import json
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from helpers.base import InputError, Table
from helpers.environment.hub import base_name
from helpers.export.gguf import require_llama_cpp
from helpers.handoff.run import Run
from helpers.messages import N_, _

GIB = 2**30
# Bytes a parameter takes. Quantised files keep some tensors at more bits, small models more of them.
BYTES_PER_PARAMETER = {"16-bit": 2.0, "q8_0": 1.1, "q4_k_m": 0.8, "other": 1.1}
PROCESS_GIB = 1.5  # Python, torch and the libraries; without CUDA, Unsloth's took 1.1, and 0.3 a process that waits
GPU_PROCESS_GIB = 1.0  # CUDA's own, and a batch's cache and logits: an estimate
# Without a GPU, times the weights in float32; measured with 0.75 billion parameters: 2.27, 2.93 and 1.09.
CPU_MEMORY = {"merge": 2.3, "GGUF": 3.0, "reload": 1.1}


class ExportError(InputError):
    """A model cannot be saved here, does not load, or does not answer as the one that was saved."""


@dataclass(frozen=True, repr=False)
class ExportPlan(Table):
    """What an export needs against what is free, in GiB.

    Attributes:
        rows: (step, disk while it runs, disk kept, memory).
        free_disk_gib, free_memory_gib: what is free now.
        gpu_gib: (needed, free) of the GPU's memory; None without a GPU.
        drive_gib: (needed, free) in DRIVE_DIR; None without one, or where it is on the run folder's own disk.
        fit: one sentence on the adapter and its base.
    """

    rows: tuple[tuple[str, float, float, float], ...]
    free_disk_gib: float
    free_memory_gib: float
    gpu_gib: tuple[float, float] | None = None
    drive_gib: tuple[float, float] | None = None
    fit: str = ""

    @property
    def needed_disk_gib(self) -> float:
        """What the steps before a step keep, and what that step takes: at its highest."""
        kept = [sum(row[2] for row in self.rows[:number]) for number in range(len(self.rows))]
        return max((before + row[1] for before, row in zip(kept, self.rows, strict=True)), default=0.0)

    @property
    def needed_memory_gib(self) -> float:
        return max((row[3] for row in self.rows), default=0.0)

    @property
    def limits(self) -> dict[str, tuple[float, float]]:
        """{what: (needed, free)} of everything that has to fit."""
        limits = {N_("disk"): (self.needed_disk_gib, self.free_disk_gib)}
        limits[N_("memory")] = (self.needed_memory_gib, self.free_memory_gib)
        limits |= {N_("GPU memory"): self.gpu_gib} if self.gpu_gib else {}
        return limits | ({"DRIVE_DIR": self.drive_gib} if self.drive_gib else {})

    @property
    def ok(self) -> bool:
        return all(needed <= free for needed, free in self.limits.values())

    def raise_if_failed(self) -> None:
        """Raises ExportError: it does not fit; the message says what would."""
        fixes = {
            "disk": _("free some, or set RUN_DIR to a larger disk"),
            "DRIVE_DIR": _("free some, or leave DRIVE_DIR empty and copy what you need yourself"),
        }
        if any(row[0].startswith("GGUF") for row in self.rows):  # of no help to memory: a merge needs about as much
            fixes = {what: _("set GGUF to [], or {fix}", fix=fix) for what, fix in fixes.items()}
        for what, (needed, free) in self.limits.items():
            if needed > free:
                found = _("{free:.1f} GiB free", free=free)
                expected = _("{needed:.1f} GiB, as predicted from the model's size", needed=needed)
                fix = fixes.get(what, _("restart the kernel, or take a smaller model"))
                kept = _("the adapter is saved already, and with its base model it is the whole of your work")
                raise ExportError(_(what), found=found, expected=expected, fix=_("{fix}; {kept}", fix=fix, kept=kept))

    def _table(self) -> tuple[list[str], list[list[str]]]:
        more = [name for name in self.limits if name not in ("disk", "memory")]
        rows = [[_(name), *(f"{value:.2f}" for value in values), *[""] * len(more)] for name, *values in self.rows]
        for number, name in enumerate((_("needed"), _("free"))):
            shown = {what: f"{both[number]:.2f}" for what, both in self.limits.items()}
            rows.append([name, shown["disk"], "", shown["memory"], *(shown[what] for what in more)])
        return [_("step"), _("disk while it runs"), _("disk kept"), _("memory"), *map(_, more)], rows

    def _notes(self) -> list[str]:
        return [_("{fit}. All in GiB.", fit=self.fit) if self.fit else _("All in GiB.")]


def plan_export(run: Run, base_model: str, *, gguf: Sequence[str] = (), push_to: str = "") -> ExportPlan:
    """What would only fail at the end, asked before the weights are loaded: does the adapter fit its base, the export
    this machine, and is everything there that it needs?

    Args:
        run: holds the adapter, and gets the exports.
        base_model: the folder or Hub name that the adapter will be loaded on.
        gguf: the types of GGUF files wanted, such as ("q4_k_m", "q8_0").
        push_to: the repository to publish in; "" for none.

    Raises:
        ExportError: the adapter does not fit its base model; or there is no token to publish with.
        GgufError: no llama.cpp, and no network to fetch one.
    """
    if gguf:
        require_llama_cpp()
    if push_to:
        _require_token()
    import unsloth  # noqa: F401 (before transformers, which it patches; after llama.cpp, which it looks for now)

    fit = check_adapter(run.artefact("adapter"), base_model)
    plan = predict_export(count_parameters(base_model), folder=run.path, quantization=gguf, drive=run.mirror)
    return replace(plan, fit=fit)


def _require_token() -> None:
    from huggingface_hub import get_token

    if not get_token():
        fix = _("create one with write access in your Hub settings; on Colab store it under the key icon, Secrets")
        raise ExportError("HF_TOKEN", found=_("no token"), expected=_("one to publish with"), fix=fix)


def predict_export(
    parameters: int, *, folder: str | Path, quantization: Sequence[str] = (), drive: str | Path | None = None
) -> ExportPlan:
    """Predict from the model's size what its export takes, and look at what is free: before its weights are loaded.

    Args:
        parameters: how many the whole model has; see `count_parameters`.
        folder: where it will be written.
        quantization: the GGUF files wanted, such as ("q4_k_m", "q8_0").
        drive: the run's `mirror`, a folder that gets a copy of what is kept.

    Example: 1,235,814,400 parameters, q4_k_m and q8_0, on a GPU ->
        step                 disk while it runs    disk kept    memory    GPU memory
        merge                              2.30         2.30      3.80
        GGUF q4_k_m, q8_0                  6.79         2.19      3.80
        …
    """
    import psutil
    import torch

    on_gpu = torch.cuda.is_available()
    size = parameters / GIB
    whole = size * BYTES_PER_PARAMETER["16-bit"]
    files = sum(size * BYTES_PER_PARAMETER.get(name, BYTES_PER_PARAMETER["other"]) for name in quantization)
    on_same_disk = drive is not None and os.stat(drive).st_dev == os.stat(folder).st_dev
    copies = 2 if on_same_disk else 1
    # Unsloth merges again for GGUF, converts to a 16-bit GGUF file, and quantises that one.
    merged = whole if on_gpu else 2 * whole  # without a GPU Unsloth computes in float32, and so merges for GGUF
    gguf_disk = merged + whole + files * copies

    def memory(step: str) -> float:
        return (whole if on_gpu else CPU_MEMORY[step] * merged) + PROCESS_GIB

    rows = [(N_("merge"), whole * copies, whole * copies, memory("merge"))]
    if quantization:
        rows.append((f"GGUF {', '.join(quantization)}", gguf_disk, files * copies, memory("GGUF")))
    rows.append((N_("reload and ask"), 0.0, 0.0, memory("reload")))
    kept = whole + files
    drive_gib = (kept, shutil.disk_usage(drive).free / GIB) if drive is not None and not on_same_disk else None
    gpu_gib = (whole + GPU_PROCESS_GIB, _free_gpu_gib()) if on_gpu else None
    free_memory = psutil.virtual_memory().available / GIB
    return ExportPlan(tuple(rows), shutil.disk_usage(folder).free / GIB, free_memory, gpu_gib, drive_gib)


def _free_gpu_gib() -> float:
    """What the card has free, and what this process has reserved of it without using it."""
    import torch

    free, _ = torch.cuda.mem_get_info()
    return (free + torch.cuda.memory_reserved() - torch.cuda.memory_allocated()) / GIB


def count_parameters(base_model: str | Path) -> int:
    """How many parameters a model has, from its configuration: no weights are loaded."""
    return sum(value.numel() for value in _without_weights(base_model).parameters())


def _without_weights(base_model: str | Path) -> Any:
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(base_model)))


def _plain_name(base_model: str | Path) -> str:
    """The model's name without its owner and its quantised edition.

    Example: "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit" -> "llama-3.2-1b-instruct"
    """
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", base_name(base_model).lower())


def check_adapter(folder: str | Path, base_model: str | Path) -> str:
    """Look whether an adapter fits its base model, from the files' headers alone; returns one sentence.

    Args:
        folder: what `save_pretrained` wrote for the adapter and its tokenizer.
        base_model: the folder or Hub name that `from_pretrained` will load it on.

    Raises:
        ExportError: a file is missing; another base model, another rank or a shape that the base model does not have.
    """
    from safetensors import safe_open

    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            found, expected = _("no such file"), _("a saved adapter")
            fix = _("run chapter 04_train again, which writes it")
            raise ExportError(f"{folder.name}/{name}", found=found, expected=expected, fix=fix)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    where, named = f"{folder.name}/adapter_config.json", str(config["base_model_name_or_path"])
    if _plain_name(named) != _plain_name(base_model):
        fix = _("set MODEL_NAME to the model that the adapter was trained on")
        raise ExportError(where, found=_("base model {name}", name=named), expected=str(base_model), fix=fix)
    shapes = {name: tuple(value.shape) for name, value in _without_weights(base_model).named_parameters()}
    matrices = 0
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118, not a dict
            name, dot, side = key.removeprefix("base_model.model.").partition(".lora_")
            if side[:1] not in ("A", "B"):
                continue
            matrices += 1
            rows, columns = shapes.get(f"{name}.weight", (0, 0))
            rank = config.get("rank_pattern", {}).get(name, config["r"])
            expected = (rank, columns) if side[0] == "A" else (rows, rank)
            shape = tuple(file.get_slice(key).get_shape())
            if shape != expected:
                found = _("shape {shape}", shape=shape)
                fix = _("load the adapter on the model that it was trained on, with the rank of its configuration")
                raise ExportError(f"{folder.name}, {key}", found=found, expected=str(expected), fix=fix)
    if not matrices:
        fix = _("run chapter 04_train again")
        raise ExportError(where, found=_("no LoRA matrices"), expected=_("some"), fix=fix)
    told = dict(matrices=matrices, rank=config["r"], base=base_name(named))
    return _("{matrices} LoRA matrices of rank {rank}, and each fits its weight in {base}", **told)
