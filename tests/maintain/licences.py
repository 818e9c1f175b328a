"""Count Unsloth's files by the licence in their header, or list those under the AGPL that a training run imports.

python -m tests.maintain.licences          the counts
python -m tests.maintain.licences --run    one step of training as in chapter 04, then the imported files (a minute)
"""

import argparse
import importlib.util
import itertools
import os
import re
import sys
import tempfile
from pathlib import Path

PACKAGES = ("unsloth", "unsloth_zoo")
# Unsloth's headers have the long notice, the SPDX line, or both.
AGPL = re.compile(r"GNU Affero General Public License|SPDX-License-Identifier: AGPL-3\.0")


def read_header(path: Path) -> str:
    """The comment lines at the beginning of a file, before its docstring and its code."""
    with path.open(encoding="utf-8", errors="replace") as lines:
        return "".join(itertools.takewhile(lambda line: line.startswith("#") or not line.strip(), lines))


def is_agpl(path: Path) -> bool:
    """Does a file's header put it under the GNU Affero General Public License?"""
    return bool(AGPL.search(read_header(path)))


def count_agpl(folder: Path) -> tuple[int, int]:
    """How many .py files in a folder and all below it are under the AGPL by their header, and how many there are."""
    files = list(folder.rglob("*.py"))
    return sum(map(is_agpl, files)), len(files)


def find_package(name: str) -> Path:
    """The folder of an installed package, which is not imported."""
    return Path(importlib.util.find_spec(name).origin).parent


def imported_agpl() -> list[str]:
    """The files under the AGPL that this process has imported, as `unsloth/kernels/nf4.py`."""
    sites = find_package("unsloth").parent
    paths = {Path(module.__file__) for module in list(sys.modules.values()) if getattr(module, "__file__", None)}
    found = [path for path in paths if path.suffix == ".py" and path.is_file() and is_agpl(path)]
    return sorted(str(path.relative_to(sites) if path.is_relative_to(sites) else path) for path in found)


def train_one_step() -> None:
    """Load the prepared SmolLM2, add LoRA, train one step on the answers only, generate: chapter 04's calls."""
    os.environ.update(UNSLOTH_BLOCK_COMPILE="0", UNSLOTH_FUSED_LINEAR_TRITON="0")
    os.environ |= {"HF_HUB_OFFLINE": "1", "UNSLOTH_DISABLE_STATISTICS": "1"}
    from datasets import Dataset
    from unsloth import FastLanguageModel, is_bfloat16_supported  # before transformers, peft and trl
    from unsloth.chat_templates import train_on_responses_only

    from helpers.memory.fit import undo_emulated_bfloat16
    from tests.maintain.smollm2 import prepare_smollm2

    folder = str(prepare_smollm2())
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=256, dtype=None, load_in_4bit=True)
    model = FastLanguageModel.get_peft_model(model, r=8, lora_alpha=8, use_gradient_checkpointing=True)

    from trl import SFTConfig, SFTTrainer

    question = {"role": "user", "content": "How do I switch it off?"}
    turns = [question, {"role": "assistant", "content": "Hold the button for five seconds."}]
    data = Dataset.from_dict({"text": [tokenizer.apply_chat_template(turns, tokenize=False)] * 2})
    settings = dict(dataset_text_field="text", dataset_num_proc=1, max_length=256, max_steps=1, optim="adamw_8bit")
    settings |= dict(fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported(), report_to="none")
    settings |= dict(per_device_train_batch_size=2, save_strategy="no", output_dir=tempfile.mkdtemp())
    trainer = SFTTrainer(model=model, processing_class=tokenizer, train_dataset=data, args=SFTConfig(**settings))
    undo_emulated_bfloat16(model)
    markers = dict(instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n")
    trainer = train_on_responses_only(trainer, **markers)
    FastLanguageModel.for_training(model)
    trainer.train()
    FastLanguageModel.for_inference(model)
    asked = dict(add_generation_prompt=True, return_tensors="pt", return_dict=True)
    model.generate(**tokenizer.apply_chat_template([question], **asked).to(model.device), max_new_tokens=4)


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m tests.maintain.licences", description=__doc__.splitlines()[0])
    parser.add_argument("--run", action="store_true", help="train one step and list the imported files")
    if parser.parse_args().run:
        train_one_step()
        files = imported_agpl()
        print(*files, f"{len(files)} imported files are under the AGPL by their header.", sep="\n")
        return
    for name in PACKAGES:
        agpl, files = count_agpl(find_package(name))
        print(f"{name}: {agpl} of {files} .py files are under the AGPL by their header.")


if __name__ == "__main__":
    main()
