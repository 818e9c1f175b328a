"""Around an export: does it fit, does the adapter fit its base, which files stay, how they are published."""

import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.errors import InputError
from helpers.tables import html_table, text_table

GIB = 2**30
# Bytes a parameter takes. Quantised files keep some tensors at more bits, small models more of them.
BYTES_PER_PARAMETER = {"16-bit": 2.0, "q8_0": 1.1, "q4_k_m": 0.8, "other": 1.1}
PROCESS_GIB = 1.5  # Python, torch and the libraries


class ExportError(InputError):
    """A model cannot be saved here, does not load, or does not answer as the one that was saved."""


@dataclass(frozen=True)
class ExportPlan:
    """What an export needs against what is free, in GiB; rows of (step, disk while it runs, disk kept, memory)."""

    rows: tuple[tuple[str, float, float, float], ...]
    free_disk_gib: float
    free_memory_gib: float

    @property
    def needed_disk_gib(self) -> float:
        """What the steps before a step keep, and what that step takes: at its highest."""
        kept = [sum(row[2] for row in self.rows[:number]) for number in range(len(self.rows))]
        return max((before + row[1] for before, row in zip(kept, self.rows, strict=True)), default=0.0)

    @property
    def needed_memory_gib(self) -> float:
        return max((row[3] for row in self.rows), default=0.0)

    @property
    def ok(self) -> bool:
        return self.needed_disk_gib <= self.free_disk_gib and self.needed_memory_gib <= self.free_memory_gib

    def raise_if_failed(self) -> None:
        """Raises ExportError: it does not fit; the message says what would."""
        gguf = any(row[0].startswith("GGUF") for row in self.rows)
        smaller = "leave GGUF empty, or " if gguf else ""
        for what, needed, free, fix in (
            ("disk", self.needed_disk_gib, self.free_disk_gib, "free some, or set RUN_DIR to a larger disk"),
            ("memory", self.needed_memory_gib, self.free_memory_gib, "restart the kernel, or take a smaller model"),
        ):
            if needed > free:
                found, expected = f"{free:.1f} GiB free", f"{needed:.1f} GiB, as predicted from the model's size"
                kept = "the adapter is saved already, and with its base model it is the whole of your work"
                raise ExportError(what, found=found, expected=expected, fix=f"{smaller}{fix}; {kept}")

    def _rows(self) -> list[list[str]]:
        rows = [[name, *(f"{value:.2f}" for value in values)] for name, *values in self.rows]
        rows.append(["needed", f"{self.needed_disk_gib:.2f}", "", f"{self.needed_memory_gib:.2f}"])
        return [*rows, ["free", f"{self.free_disk_gib:.2f}", "", f"{self.free_memory_gib:.2f}"]]

    def __repr__(self) -> str:
        return text_table(["step", "disk while it runs", "disk kept", "memory"], self._rows()) + "\n(all in GiB)"

    def _repr_html_(self) -> str:
        head = ["step", "disk while it runs", "disk kept", "memory"]
        return html_table(head, self._rows()) + "<p>(all in GiB)</p>"


def plan_export(parameters: int, *, folder: str | Path, quantization: Sequence[str] = ()) -> ExportPlan:
    """Predict from the model's size what its export takes, and look at what is free.

    Args:
        parameters: how many the whole model has.
        folder: where it will be written.
        quantization: the GGUF files wanted, such as ("q4_k_m", "q8_0").

    Example: 1,235,814,400 parameters, q4_k_m and q8_0 ->
        step       disk while it runs    disk kept    memory
        merge                    2.30         2.30      3.80
        GGUF                     6.80         2.19      3.80
        …
    """
    import psutil

    size = parameters / GIB
    whole = size * BYTES_PER_PARAMETER["16-bit"]
    files = sum(size * BYTES_PER_PARAMETER.get(name, BYTES_PER_PARAMETER["other"]) for name in quantization)
    rows = [("merge", whole, whole, whole + PROCESS_GIB)]
    if quantization:  # Unsloth merges again and converts to a 16-bit GGUF file, and quantises that one
        rows.append((f"GGUF {', '.join(quantization)}", 2 * whole + files, files, whole + PROCESS_GIB))
    rows.append(("reload and ask", 0.0, 0.0, whole + PROCESS_GIB))
    free_memory = psutil.virtual_memory().available / GIB
    return ExportPlan(tuple(rows), shutil.disk_usage(folder).free / GIB, free_memory)


def count_parameters(model: Any) -> int:
    """How many parameters a model has without its adapter's.

    Raises:
        ExportError: its weights are quantised, so that a merge would keep their rounding errors.
    """
    if getattr(model.config, "quantization_config", None):
        fix = "load it with load_in_4bit=False"
        raise ExportError("the model", found="quantised weights", expected="16-bit ones to merge into", fix=fix)
    return sum(value.numel() for name, value in model.named_parameters() if "lora_" not in name)


def _plain_name(base_model: str | Path) -> str:
    """The model's name without its owner and its quantised edition.

    Example: "unsloth/Llama-3.2-1B-Instruct-unsloth-bnb-4bit" -> "llama-3.2-1b-instruct"
    """
    return re.sub(r"(-unsloth)?-bnb-4bit$", "", Path(base_model).name.lower())


def check_adapter(folder: str | Path, base_model: str | Path) -> str:
    """Look whether an adapter fits its base model, from the files' headers alone; returns one sentence.

    Args:
        folder: what `save_pretrained` wrote for the adapter and its tokenizer.
        base_model: the folder or Hub name that `from_pretrained` will load it on.

    Raises:
        ExportError: a file is missing; another base model, another rank or a shape that the base model does not have.
    """
    import torch
    from safetensors import safe_open
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = Path(folder)
    for name in ("adapter_config.json", "adapter_model.safetensors", "tokenizer.json", "tokenizer_config.json"):
        if not (folder / name).is_file():
            fix = "run chapter 04_train again, which writes it"
            raise ExportError(f"{folder.name}/{name}", found="no such file", expected="a saved adapter", fix=fix)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    where, named = f"{folder.name}/adapter_config.json", str(config["base_model_name_or_path"])
    if _plain_name(named) != _plain_name(base_model):
        fix = "set MODEL_NAME to the model that the adapter was trained on"
        raise ExportError(where, found=f"base model {named}", expected=str(base_model), fix=fix)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(str(base_model)))
    shapes = {name: tuple(value.shape) for name, value in base.named_parameters()}
    matrices = 0
    with safe_open(folder / "adapter_model.safetensors", "pt") as file:
        for key in file.keys():  # noqa: SIM118, not a dict
            name, _, side = key.removeprefix("base_model.model.").partition(".lora_")
            if side[:1] not in ("A", "B"):
                continue
            matrices += 1
            rows, columns = shapes.get(f"{name}.weight", (0, 0))
            rank = config.get("rank_pattern", {}).get(name, config["r"])
            expected = (rank, columns) if side[0] == "A" else (rows, rank)
            found = tuple(file.get_slice(key).get_shape())
            if found != expected:
                fix = "load the adapter on the model that it was trained on, with the rank of its configuration"
                raise ExportError(f"{folder.name}, {key}", found=f"shape {found}", expected=str(expected), fix=fix)
    if not matrices:
        raise ExportError(where, found="no LoRA matrices", expected="some", fix="run chapter 04_train again")
    return f"{matrices} LoRA matrices of rank {config['r']}, and each fits its weight in {Path(named).name}"


def keep_gguf(folder: str | Path, *, name: str) -> list[Path]:
    """Bring what `save_pretrained_gguf` wrote into order: the GGUF files as `NAME-q8_0.gguf`, and nothing else.

    Unsloth writes them beside a 16-bit copy of the model, which was needed only to make them, and a 16-bit GGUF file.

    Args:
        folder: where it wrote to; everything in it but the quantised files is deleted.

    Returns:
        The files, largest first.

    Raises:
        ExportError: there are none.
    """
    folder = Path(folder)
    found = [path for path in folder.rglob("*.gguf") if not path.stem.upper().endswith(("BF16", "F16", "F32"))]
    if not found:
        fix = "read what Unsloth printed, and run the cell again"
        raise ExportError(folder.name, found="no quantised GGUF file", expected="at least one", fix=fix)
    kept = []
    for path in found:
        target = folder / f"{name}-{path.stem.rpartition('.')[2].lower()}.gguf"
        kept.append(path.rename(target))
    for path in folder.iterdir():
        if path not in kept:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    return sorted(kept, key=lambda path: -path.stat().st_size)


@dataclass(frozen=True)
class FileList:
    """Files and their sizes."""

    rows: tuple[tuple[str, float], ...]

    def __repr__(self) -> str:
        return "\n".join(f"{size:9.2f} MiB  {name}" for name, size in self.rows)


def list_files(folder: str | Path) -> FileList:
    """What a folder holds, with sizes in MiB."""
    paths = sorted(path for path in Path(folder).rglob("*") if path.is_file())
    return FileList(tuple((str(path.relative_to(folder)), path.stat().st_size / 2**20) for path in paths))


def hub_token() -> str:
    """The Hugging Face token, from the environment, `hf auth login` or Colab's secrets; it is never printed.

    Raises:
        ExportError: there is none.
    """
    from huggingface_hub import get_token

    token = get_token()
    if not token:
        fix = "create one with write access in your Hub settings and store it there, or run `hf auth login`"
        raise ExportError("HF_TOKEN", found="no token", expected="one in the environment or Colab's secrets", fix=fix)
    return token
