"""The model card, from what the run recorded, and the files as the Hub gets them."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from helpers.base import InputError, text_table
from helpers.handoff.run import Run
from helpers.smollm2 import GGUF_FILE, NAME, PACKAGE

# A base model's name begins with this -> (its licence on the Hub, what its licence asks of your card)
LICENCES = {
    "llama-3.2": ("llama3.2", "Built with Llama. The Llama 3.2 Community License applies, and its use policy."),
    "llama-3.1": ("llama3.1", "Built with Llama. The Llama 3.1 Community License applies, and its use policy."),
    "smollm2": ("apache-2.0", "The base model is under the Apache License 2.0."),
}
HUB_NAMES = {NAME: f"HuggingFaceTB/{NAME}"}
SMOLLM2_ORIGIN = (  # what `helpers.smollm2` makes of it
    f"In training, the base weights were those of {GGUF_FILE} (package {PACKAGE}), 4 bits each, turned into 16 bits: "
    "on the original weights an adapter may answer differently."
)
# What the card says of `report.json`'s settings, besides the batch, the steps and the precision.
SETTINGS = ("r", "lora_alpha", "lora_dropout", "target_modules", "use_rslora", "learning_rate", "lr_scheduler_type")
SETTINGS += ("warmup_steps", "optim", "weight_decay", "max_length", "seed")
USE = {
    "adapter": """from unsloth import FastLanguageModel

model, tokenizer = FastLanguageModel.from_pretrained("{name}", load_in_4bit=True)""",
    "merged": """from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained("{name}", dtype="auto")
tokenizer = AutoTokenizer.from_pretrained("{name}")""",
    "gguf": """ollama create my-model -f Modelfile
ollama run my-model""",
}


class CardError(InputError):
    """A model card that the Hub would refuse."""


def hub_name(base_model: str) -> str:
    """The base model's name on the Hub, or "" where it is a folder of your own.

    Example: "SmolLM2-135M-Instruct" -> "HuggingFaceTB/SmolLM2-135M-Instruct"
    """
    if known := HUB_NAMES.get(Path(base_model).name):
        return known
    folder = base_model.startswith(("/", ".", "~")) or Path(base_model).is_dir()
    return base_model if base_model.count("/") == 1 and not folder else ""


def make_model_card(run: Run, *, form: str, name: str, base_model: str, exports: Any = None) -> str:
    """The card's text: base model and licence, data, settings, versions, metrics, how to use it, limits.

    Data, settings and metrics are those of the training, from `report.json`, not those of the present form fields.

    Args:
        run: holds `adapter` and `report.json`.
        form: "adapter", "merged" or "gguf": how the card says to load it.
        name: `owner/name` on the Hub; or a name of your own, and then the card loads the form's folder.
        base_model: as in the profile; of a folder only its name is written.
        exports: the `ExportReport` of chapter 06.

    Raises:
        CardError: the card does not pass `check_model_card`.
    """
    from huggingface_hub import EvalResult, ModelCardData

    base, report = Path(base_model).name, run.read_json("report.json")
    licence, terms = next(
        (both for start, both in LICENCES.items() if base.lower().startswith(start)),
        ("other", "The base model's licence applies; look it up before you publish."),
    )
    origin = f" {SMOLLM2_ORIGIN}" if base_model == NAME else ""
    recorded = report["data"]["dataset"]
    is_file = recorded.endswith((".json", ".jsonl"))
    data_name = Path(recorded).name if is_file else recorded
    on_hub = data_name.count("/") == 1
    metrics = [("held-out loss", report["held_out_loss"]["before"], report["held_out_loss"]["after"])]
    metrics += [
        (label, report[key]["before"], report[key]["after"])
        for label, key in (("replies in house style", "house_style"), ("replies with the right help", "right_help"))
        if report.get(key)
    ]
    results = [
        EvalResult(
            task_type="text-generation",
            dataset_type=data_name,
            dataset_name=f"{data_name}, held out",
            metric_type=label.replace(" ", "_").replace("-", "_"),
            metric_value=round(after, 4),
        )
        for label, _, after in metrics
    ]
    data = ModelCardData(
        model_name=name.rpartition("/")[2],
        base_model=hub_name(base_model) or None,
        datasets=[data_name] if on_hub else None,
        library_name={"adapter": "peft", "merged": "transformers", "gguf": "llama.cpp"}[form],
        license=licence,
        license_name="see-the-base-model" if licence == "other" else None,
        language=["en"],
        pipeline_tag="text-generation",
        tags=["unsloth", "lora", "conversational"],
        eval_results=results,
    )
    place = name if "/" in name else f"./{form}"
    table = [[label, f"{before:.3f}", f"{after:.3f}"] for label, before, after in metrics]
    parts = [
        f"---\n{data.to_yaml()}\n---\n\n# {name.rpartition('/')[2]}",
        f"{base}, fine-tuned with LoRA and Unsloth on conversations; this is its {form} form. {terms}{origin}",
        f"## Data\n\n{data_name}. Trained on: {report['data']['training rows']}. "
        f"Held out: {report['data']['held-out rows']}.",
        f"## Settings\n\n{_code(_lines(_settings(report)))}",
        f"## Results\n\n{_code(text_table(['', 'before', 'after'], table))}",
    ]
    if exports is not None:
        parts.append(f"Each saved form against the model in memory:\n\n{_code(repr(exports))}")
    parts += [
        f"## How to use it\n\n```\n{USE[form].format(name=place)}\n```",
        "## Limits\n\nIt answers in the manner of its training conversations, also where that does not fit. What it "
        "says may be wrong: check it before you rely on it. It was measured on held-out conversations of the same kind "
        "and on nothing else.",
        f"## Versions\n\n{_code(_lines(run.facts('adapter')['versions']))}",
    ]
    return check_model_card("\n\n".join(parts) + "\n")


def _settings(report: Mapping[str, Any]) -> dict[str, Any]:
    given = report["settings"]
    chosen = {name: given[name] for name in SETTINGS if name in given}
    if "target_modules" in chosen:
        chosen["target_modules"] = ", ".join(chosen["target_modules"])
    batch = given.get("per_device_train_batch_size", 1) * given.get("gradient_accumulation_steps", 1)
    computed = {"precision": report["environment"]["precision"], "steps": report["steps"]}
    return chosen | {"conversations a step": batch} | computed


def check_model_card(text: str) -> str:
    """Read a card as `huggingface_hub` does, its results included; returns it unchanged.

    The Hub's own check of the header needs a connection: `publish` asks it before it uploads.

    Raises:
        CardError: the header cannot be read, or has no licence.
    """
    from huggingface_hub import ModelCard

    fix = "correct the header between the two lines of ---"
    try:
        card = ModelCard(text, ignore_metadata_errors=False)
        header = card.data.to_dict()
    except Exception as error:  # yaml's errors, and the client's own
        raise CardError("model card", found=f"{error}".splitlines()[0], expected="a header", fix=fix) from None
    if not header.get("license"):
        raise CardError("model card", found="no licence", expected="license: …", fix=fix)
    return text


def hub_files(folder: str | Path, *, card: str, base_model: str) -> dict[str, Path | bytes]:
    """{name in the repository: file or content} of what `publish` uploads.

    The card is ours in place of the library's empty form, and an adapter names its base model as the Hub does instead
    of by the folder that it was loaded from.
    """
    folder = Path(folder)
    files: dict[str, Path | bytes] = {
        path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*")) if path.is_file()
    }
    files["README.md"] = card.encode()
    if "adapter_config.json" in files:
        config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        config["base_model_name_or_path"] = hub_name(base_model) or Path(base_model).name
        files["adapter_config.json"] = json.dumps(config, indent=2).encode()
    return files


def publish(folder: str | Path, *, repository: str, card: str, base_model: str, token: str) -> str:
    """Upload a verified artefact to the Hub in one commit; returns the commit's address.

    Before it uploads, the client lets the Hub check the card's header.

    Args:
        repository: `owner/name`; made, as a private one, if it does not exist.
        token: one with write access; it is handed to the Hub's client and kept nowhere.

    Raises:
        ValueError: the Hub refuses the card; nothing was uploaded.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    api = HfApi(token=token)
    api.create_repo(repository, private=True, exist_ok=True)
    files = hub_files(folder, card=card, base_model=base_model)
    operations = [CommitOperationAdd(name, content) for name, content in files.items()]
    return api.create_commit(repository, operations, commit_message="Upload the tuned model").commit_url


def _lines(facts: Mapping[str, Any]) -> str:
    return "\n".join(f"{name}: {value}" for name, value in facts.items())


def _code(text: str) -> str:
    return f"```\n{text}\n```"
