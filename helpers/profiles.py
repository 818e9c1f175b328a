"""The two sets of choices that the same cells run with: `t4` on a CUDA GPU, `cpu` without one."""

import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.base import ROOT, InputError, html_table, short_path, text_table
from helpers.environment.hub import download_from_modelscope, missing_files, require_hub, uses_modelscope

SMOLLM2 = "SmolLM2-135M-Instruct"


class ProfileError(InputError):
    """A choice that cannot be used: an unknown profile or setting, a folder or file that is not what it should be."""


@dataclass(frozen=True)
class Profile:
    """The choices that differ between a T4 and a laptop, or that a reader may want to change.

    Attributes:
        name: "t4" or "cpu".
        why: why this one was picked.
        model_name: a Hub repository or a folder with a Hugging Face model.
        dataset: a Hub data set or a .json/.jsonl file in ShareGPT format.
        max_seq_length: tokens a conversation may have.
        effective_batch_size: conversations that a step averages over.
        use_gradient_checkpointing: False, True, or "unsloth" (offloaded); chapter 04 plans it anew.
        max_steps: optimiser steps.
        learning_rate: the peak learning rate.
        eval_rows: held-out conversations that are never trained on.
        reply_rows: how many of those are answered before and after training.
        run_dir: where the chapters hand their results to each other.
        overridden: the names of the values that are not the profile's own.
    """

    name: str
    why: str
    model_name: str
    dataset: str
    max_seq_length: int
    effective_batch_size: int
    use_gradient_checkpointing: bool | str
    max_steps: int
    learning_rate: float
    eval_rows: int
    reply_rows: int
    run_dir: Path
    overridden: tuple[str, ...] = ()

    @property
    def train_rows(self) -> int:
        """Conversations that `max_steps` steps train on, when each is seen at most once."""
        return self.max_steps * self.effective_batch_size

    @property
    def dataset_name(self) -> str:
        """What the data set is recorded as: its name on the Hub, or the name of its file without folders."""
        return Path(self.dataset).name if self.dataset.endswith((".json", ".jsonl")) else self.dataset

    def _rows(self) -> list[list[object]]:
        hidden = ("name", "why", "overridden")
        fields = [field.name for field in dataclasses.fields(self) if field.name not in hidden]
        return [
            [name, _one_line(getattr(self, name)), "yours" if name in self.overridden else self.name] for name in fields
        ]

    def __repr__(self) -> str:
        return f"Profile {self.name}: {self.why}\n" + text_table(["setting", "value", "from"], self._rows())

    def _repr_html_(self) -> str:
        title = f"<p>Profile <b>{self.name}</b>: {self.why}</p>"
        return title + html_table(["setting", "value", "from"], self._rows())


PROFILES: dict[str, dict[str, Any]] = {
    "t4": {
        "model_name": "unsloth/Llama-3.2-3B-Instruct",
        "dataset": "mlabonne/FineTome-100k",
        "max_seq_length": 2048,
        "effective_batch_size": 8,
        "use_gradient_checkpointing": True,
        "max_steps": 60,
        "learning_rate": 2e-4,
        "eval_rows": 64,
        "reply_rows": 4,
    },
    "cpu": {
        "model_name": SMOLLM2,
        "dataset": str(ROOT / "notebooks" / "data" / "support_conversations.jsonl"),
        "max_seq_length": 256,
        "effective_batch_size": 4,
        "use_gradient_checkpointing": False,
        "max_steps": 72,
        "learning_rate": 4e-3,
        "eval_rows": 48,
        "reply_rows": 24,
    },
}


@dataclass(frozen=True)
class ChatTemplate:
    """How a model's conversations are written, and how training finds the answers in them.

    Attributes:
        name: a name that Unsloth's `get_chat_template` knows, or "" to keep the model's own template.
        instruction_part: the marker that opens a user's turn.
        response_part: the marker that opens an assistant's turn.
        known_by: the special token that only this family of templates has.
    """

    name: str
    instruction_part: str
    response_part: str
    known_by: str


CHAT_TEMPLATES = (
    ChatTemplate(
        "llama-3.1",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>",
    ),
    ChatTemplate("", "<|im_start|>user\n", "<|im_start|>assistant\n", "<|im_start|>"),
    ChatTemplate("", "<start_of_turn>user\n", "<start_of_turn>model\n", "<start_of_turn>"),
)


def choose_profile(name: str = "auto", **overrides: Any) -> Profile:
    """Pick the profile and apply the reader's own values.

    Args:
        name: "t4", "cpu", or "auto": `t4` where a CUDA GPU is present.
        overrides: any field of `Profile`; None and "" mean the profile's own value. Numbers may come as text.

    Raises:
        ProfileError: an unknown profile or setting, a value of the wrong kind, or a number that is not above 0.

    Example:
        >>> choose_profile("cpu", max_steps=5).max_steps
        5
    """
    if name == "auto":
        import torch

        if torch.cuda.is_available():
            name, why = "t4", f"a CUDA GPU is present ({torch.cuda.get_device_name(0)})"
        else:
            name, why = "cpu", "no CUDA GPU is present"
    else:
        why = "you chose it"
    if name not in PROFILES:
        expected = '"auto", "t4" or "cpu"'
        raise ProfileError("PROFILE", found=repr(name), expected=expected, fix=f"set PROFILE to {expected}")
    values = {**PROFILES[name], "run_dir": ROOT / "runs" / name}
    given = {key: value for key, value in overrides.items() if value is not None and value != ""}
    for key, value in given.items():
        if key not in values:
            raise ProfileError("setting", found=key, expected=f"one of {', '.join(sorted(values))}", fix="correct it")
        values[key] = _read_as(key, value, values[key])
    return Profile(name=name, why=why, **values, overridden=tuple(given))


def _read_as(key: str, value: Any, default: Any) -> Any:
    """A reader's value in the type of the profile's own value."""
    where = key.upper()
    if isinstance(default, Path):
        return Path(str(value)).expanduser().resolve()  # papermill makes a number of `-p RUN_DIR 5`
    if isinstance(default, str):
        return str(value)
    if key == "use_gradient_checkpointing":
        choices = {"true": True, "false": False, "unsloth": "unsloth"}
        if str(value).lower() not in choices:
            raise ProfileError(where, found=repr(value), expected='True, False or "unsloth"', fix="use one of these")
        return choices[str(value).lower()]
    kind = "a number above 0" if isinstance(default, float) else "a whole number, 1 or more"
    try:
        number = type(default)(str(value))
    except ValueError:
        number = 0
    if isinstance(value, bool) or not 0 < number < math.inf:
        raise ProfileError(where, found=repr(value), expected=kind, fix=f"set {where} to {kind}, such as {default}")
    return number


def model_source(model_name: str, *, weights: bool = True) -> str:
    """What `from_pretrained` is to load: a folder that holds a model, or a Hub repository that can be reached.

    Where `choose_hub` chose ModelScope, it is the folder into which the model has been downloaded from there.

    Args:
        model_name: a folder, a name on the hub, or the `cpu` profile's own model.
        weights: False where only the tokenizer or the configuration is loaded, so that no weights are downloaded.

    Raises:
        ProfileError: the folder holds no model, or the Hub has no such repository or cannot be reached.
        HubError: ModelScope has no such model, cannot be reached, or its client is not installed.
        SmolLM2Error: the `cpu` profile's own model cannot be prepared.
    """
    if model_name == SMOLLM2:
        from helpers.smollm2 import prepare_smollm2

        return str(prepare_smollm2())
    folder = Path(model_name).expanduser()
    if folder.is_dir():
        if missing := missing_files(folder):
            raise ProfileError(
                f"MODEL_NAME {folder}",
                found=f"a folder without {', '.join(missing)}",
                expected="a Hugging Face model folder",
                fix="give the folder that save_pretrained wrote, or the name of a Hub repository",
            )
        return str(folder.absolute())  # "models/mine" looks like a name on the Hub, which Unsloth asks GitHub about
    if uses_modelscope():
        return download_from_modelscope(model_name, weights=weights)
    require_hub(model_name, setting="MODEL_NAME", repo_type="model")
    return model_name


def data_source(dataset: str) -> dict[str, str]:
    """The first arguments of `datasets.load_dataset`, once it is sure that they can work.

    Returns:
        {"path": "json", "data_files": FILE} for a .json or .jsonl file, {"path": NAME} for a Hub data set.

    Raises:
        ProfileError: the file is missing, empty, not UTF-8, not JSON(L) or not ShareGPT; or the Hub cannot give the
            data set.
    """
    if not dataset.endswith((".json", ".jsonl")):
        require_hub(dataset, setting="DATASET", repo_type="dataset")
        return {"path": dataset}
    file = Path(dataset).expanduser()
    where, fix = f"DATASET {file}", "give a file with one ShareGPT conversation a line"
    if not file.is_file():
        raise ProfileError(where, found="no such file", expected="a .json or .jsonl file", fix="correct the path")
    try:
        text = file.read_text(encoding="utf-8").strip()
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8, at {error.start}"
        raise ProfileError(where, found=found, expected="text in UTF-8", fix="save the file as UTF-8") from None
    lines = text.split("\n")  # splitlines would also split at U+2028 and U+0085, which may stand inside a text
    try:
        rows = json.loads(text) if text.startswith("[") else [json.loads(line) for line in lines if line.strip()]
    except ValueError as error:
        raise ProfileError(where, found=f"not JSON ({error})", expected="JSON or JSON Lines", fix=fix) from None
    if not rows:
        raise ProfileError(where, found="an empty file", expected="conversations", fix=fix)
    expected = 'rows like {"conversations": [{"from": "human", "value": "…"}, …]}'
    for number, row in enumerate(rows, 1):
        turns = row.get("conversations") if isinstance(row, dict) else None
        if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
            found = json.dumps(row, ensure_ascii=False)[:80]
            raise ProfileError(f"{where}, row {number}", found=found, expected=expected, fix=fix)
    return {"path": "json", "data_files": str(file)}


def choose_template(tokenizer: Any) -> ChatTemplate:
    """The chat template to train with, by the special tokens that the model was taught.

    Llama 3 gets Unsloth's `llama-3.1`, because the base models come without a template; every other known family
    keeps its own: a model never learned the tokens of a foreign one.

    Raises:
        ProfileError: the tokenizer belongs to none of the known families.
    """
    vocabulary = tokenizer.get_vocab()
    for template in CHAT_TEMPLATES:
        if template.known_by in vocabulary and (template.name or tokenizer.chat_template):
            return template
    raise ProfileError(
        "chat template",
        found=f"a tokenizer with none of {', '.join(template.known_by for template in CHAT_TEMPLATES)}",
        expected="a chat model of the Llama 3, ChatML or Gemma family",
        fix="choose an -Instruct model, or add its markers to CHAT_TEMPLATES in helpers/profiles.py",
    )


def _one_line(value: object) -> object:
    return short_path(value) if isinstance(value, Path) or (isinstance(value, str) and value.startswith("/")) else value
