"""Runs that are killed and resumed on a GPU, in float16 as on a T4, against runs that are left alone.

    python tests/benchmarks/resume.py [--kills 4] [--steps 24] [--out FILE]

Every run trains SmolLM2 on this series' conversations in a process of its own, all side by side, since nothing is
timed. Two are left alone: how far they end apart is what the GPU's kernels do that add in no fixed order. Each of the
others is killed (SIGKILL) at a random moment after its second step, and started again by `Checkpoints`.
Without a GPU the precision is the CPU's own, and all runs end with the same bits.
"""

import argparse
import json
import os
import pathlib
import random
import re
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
SAVE_SECONDS = 1.0
ROWS = 64


def train(job: dict) -> dict:
    """Train once, from the newest checkpoint in the job's folder; the trained weights go into a file beside it."""
    from unsloth import FastLanguageModel  # before trl, whose trainer it patches
    from unsloth.chat_templates import standardize_sharegpt, train_on_responses_only

    # isort: split
    import torch
    from datasets import load_dataset
    from transformers import TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from helpers.template.check import training_text
    from helpers.training.checkpoints import Checkpoints
    from tests.maintain.smollm2 import prepare_smollm2

    class Progress(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            with open(f"{job['folder']}/progress", "a") as file:
                file.write(f"{state.global_step}\n")

    gpu = torch.cuda.is_available()
    dtype = torch.float16 if gpu else None
    model, tokenizer = FastLanguageModel.from_pretrained(
        str(prepare_smollm2()), max_seq_length=512, dtype=dtype, load_in_4bit=True
    )
    modules = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    model = FastLanguageModel.get_peft_model(
        model, r=16, lora_alpha=16, target_modules=modules, use_gradient_checkpointing=True, random_state=3407
    )
    file = str(ROOT / "notebooks" / "data" / "support_conversations.jsonl")
    rows = standardize_sharegpt(load_dataset("json", data_files=file, split=f"train[:{ROWS}]"), num_proc=1)
    rows = rows.map(lambda row: {"text": training_text(tokenizer, row["conversations"])})
    batch = dict(per_device_train_batch_size=4, gradient_accumulation_steps=2, optim="adamw_8bit")
    steps = dict(max_steps=job["steps"], warmup_steps=3, learning_rate=1e-3, logging_steps=1, save_strategy="no")
    precision = dict(fp16=gpu, train_sampling_strategy="group_by_length", padding_free=False)
    data = dict(max_length=512, dataset_text_field="text", dataset_num_proc=1, report_to="none", disable_tqdm=True)
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=rows,
        eval_dataset=rows.select(range(16)),
        args=SFTConfig(output_dir=f"{job['folder']}/checkpoints", seed=3407, **batch, **steps, **precision, **data),
    )
    parts = dict(instruction_part="<|im_start|>user\n", response_part="<|im_start|>assistant\n")
    trainer = train_on_responses_only(trainer, **parts)
    trainer.add_callback(Progress())
    with Checkpoints(trainer, every_seconds=SAVE_SECONDS) as last:
        trainer.train(resume_from_checkpoint=last)
    weights = {name: value.detach().float().cpu() for name, value in model.named_parameters() if value.requires_grad}
    torch.save(weights, f"{job['folder']}/weights.pt")
    scaler = trainer.accelerator.scaler
    losses = {str(entry["step"]): entry["loss"] for entry in trainer.state.log_history if "loss" in entry}
    rate = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry][-1]
    return {
        "device": torch.cuda.get_device_name() if gpu else "CPU",
        "steps": trainer.state.global_step,
        "losses": losses,
        "last_learning_rate": rate,
        "loss_scale": scaler.get_scale() if scaler else None,
        "held_out": trainer.evaluate()["eval_loss"],
    }


def run_once(folder: pathlib.Path, *, steps: int, kill_after: int | None = None, delay_s: float = 0) -> dict:
    """Start a run in `folder`; kill it `delay_s` after step `kill_after`, and start it again."""
    folder.mkdir(exist_ok=True)
    job, progress = json.dumps({"folder": str(folder), "steps": steps}), folder / "progress"
    command = [sys.executable, __file__, "--one", job]
    environment = os.environ | {"UNSLOTH_COMPILE_LOCATION": str(folder / "unsloth"), "PYTHONUNBUFFERED": "1"}
    environment |= {"LANGUAGE": "en", "UNSLOTH_BLOCK_COMPILE": "0", "UNSLOTH_FUSED_LINEAR_TRITON": "0"}
    said = {"killed_after": None, "resumed_from": None}
    if kill_after is not None:
        with open(folder / "killed.log", "w") as log:
            process = subprocess.Popen(command, stdout=log, stderr=log, cwd=folder, env=environment)
        while process.poll() is None and _steps_done(progress) < kill_after:
            time.sleep(0.01)
        time.sleep(delay_s)
        process.kill()
        if process.wait() != -9:
            raise RuntimeError(f"{folder}: the run ended before it was killed, see killed.log")
        said["killed_after"] = _steps_done(progress)
    with open(folder / "log", "w") as log:
        subprocess.run(command, stdout=log, stderr=log, cwd=folder, env=environment, check=True)
    text = (folder / "log").read_text(errors="replace")
    if found := re.search(r"Resumed from step (\d+)", text):
        said["resumed_from"] = int(found[1])
    return said | json.loads(text.strip().splitlines()[-1])


def _steps_done(progress: pathlib.Path) -> int:
    return len(progress.read_text().split()) if progress.exists() else 0


def compare(folder: pathlib.Path, other: pathlib.Path) -> float:
    """How far the trained weights of two runs lie apart: the norm of their difference over that of the first."""
    import torch

    first, second = (torch.load(path / "weights.pt", weights_only=True) for path in (folder, other))
    apart = sum(((first[name] - second[name]) ** 2).sum().item() for name in first)
    return (apart / sum((value**2).sum().item() for value in first.values())) ** 0.5


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=4)
    parser.add_argument("--steps", type=int, default=24)
    parser.add_argument("--seed", type=int, default=1, help="of the moments to kill at")
    parser.add_argument("--at-once", type=int, default=6, help="processes side by side")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("resume.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(train(json.loads(options.one))))
        return 0
    from helpers.base import text_table

    moments = random.Random(options.seed)
    kills = [(moments.randrange(2, options.steps - 2), moments.uniform(0, 0.5)) for _ in range(options.kills)]
    table, first = [], None
    with tempfile.TemporaryDirectory() as scratch, ThreadPoolExecutor(options.at_once) as pool:
        folders = [pathlib.Path(scratch, f"run{number}") for number in range(2 + options.kills)]
        whens = [{}, {}, *({"kill_after": step, "delay_s": delay} for step, delay in kills)]
        running = [
            pool.submit(run_once, folder, steps=options.steps, **when)
            for folder, when in zip(folders, whens, strict=True)
        ]
        for folder, run in zip(folders, running, strict=True):
            try:
                result = run.result()
            except Exception as error:
                logs = [path.read_text(errors="replace")[-600:] for path in folder.glob("*log")]
                print(folder.name, error, *logs, flush=True)
                continue
            first = first or result
            result["weights_apart"] = compare(folders[0], folder)
            pairs = [(result["losses"][step], loss) for step, loss in first["losses"].items()]
            result["loss_apart"] = max(abs(ours - loss) / loss for ours, loss in pairs)
            with open(options.out, "a") as file:
                file.write(json.dumps(result) + "\n")
            killed = "left alone" if result["killed_after"] is None else result["killed_after"]
            figures = [f"{result['loss_apart']:.2%}", f"{result['held_out']:.4f}", f"{result['weights_apart']:.2%}"]
            table.append([killed, result["resumed_from"] or "", *figures, result["loss_scale"] or ""])
    headers = ["killed after step", "resumed from", "largest loss difference", "held-out loss", "weights apart"]
    headers += ["loss scale"]
    print(text_table(headers, table))
    return 0


if __name__ == "__main__":
    sys.exit(main())
