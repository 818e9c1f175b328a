"""Training on 1, 2, 4, … GPUs of one host: tokens a second, and what the gradients' way from GPU to GPU takes.

    python tests/benchmarks/scaling.py [--gpus 1 2 4] [--multiprocessors 8] [--out FILE]
    python tests/benchmarks/scaling.py --paper     (no GPU: the same by calculation, for 1 to 64 of them)

Each row is a run under torchrun, with Llama 3.2's shapes and random weights, and chapter 04's settings for one GPU's
share, with a T4's memory. *Weak* scaling gives each GPU eight conversations, *strong* scaling shares eight out. The
second half of the steps counts. The all-reduce is timed alone as well, with as many numbers as LoRA has. Without a GPU
the processes are the CPU's, for a dry run: `--shapes tiny --gpus 1 2 --steps 4`.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from in_turns import device_and_versions, make_models, write_csv  # noqa: E402
from multiprocessors import multiprocessors_each  # noqa: E402

from helpers.base import markdown_table  # noqa: E402

EACH = 8  # conversations a step, of one GPU (weak) or of all together (strong)
# (bytes a second that one GPU sends, seconds to begin): NVLink 4 as an H200 has it, PCIe 3 and 4 with 16 lanes as
# reached, Ethernet by its name.
LINKS = {"NVLink": (300e9, 10e-6), "PCIe 4": (20e9, 20e-6), "PCIe 3": (10e9, 20e-6)}
LINKS |= {"Ethernet 100 Gbit/s": (12.5e9, 30e-6), "Ethernet 10 Gbit/s": (1.25e9, 50e-6)}
LINKS |= {"Ethernet 1 Gbit/s": (0.125e9, 100e-6)}
LORA = {"1B": 11_272_192, "3B": 24_313_856}  # numbers that rank 16 trains in all seven matrices
STEP_SECONDS = {"1B": 0.65, "3B": 1.5}  # of eight conversations with a T4's arithmetic, results/t4_arithmetic.csv
COLUMNS = ("shape", "dtype", "scaling", "gpus", "multiprocessors", "micro_batch", "tokens_a_second", "seconds_a_step")
COLUMNS += ("all_reduce_ms", "megabytes", "efficiency", "loss", "device", "torch", "unsloth", "failed")


def all_reduce_seconds(count: int, *, gpus: int, link: str) -> float:
    """How long so many gradients of 4 bytes take to be added up on all GPUs, in a ring.

    Each GPU sends and receives 2 (N - 1) / N of all bytes, in 2 (N - 1) parts (Patarasuk and Yuan 2009, Bandwidth
    optimal all-reduce algorithms for clusters of workstations).

    Example: 24,313,856 numbers, 2 GPUs, PCIe 3 -> 0.0098
    """
    bandwidth, latency = LINKS[link]
    return 2 * (gpus - 1) / gpus * 4 * count / bandwidth + 2 * (gpus - 1) * latency


def on_paper(shape: str) -> str:
    """The share of a T4-like step that is left for computing, if nothing is sent while the GPU computes."""
    sizes = (2, 4, 8, 16, 32, 64)
    rows = []
    for link in LINKS:
        seconds = [all_reduce_seconds(LORA[shape], gpus=size, link=link) for size in sizes]
        rows.append([link, *(f"{STEP_SECONDS[shape] / (STEP_SECONDS[shape] + each):.1%}" for each in seconds)])
    return markdown_table([f"{shape}, weak scaling", *(f"{size} GPUs" for size in sizes)], rows)


def measure(job: dict) -> dict | None:
    """One process of a run; rank 0 returns the row."""
    import torch
    import unsloth  # noqa: F401
    from datasets import Dataset
    from training import load, make_rows
    from transformers import AutoConfig, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    from helpers.memory.fit import fit_into_memory
    from helpers.memory.plan import T4_GIB, plan_batch
    from helpers.ranks import meet_ranks

    state, gpu = meet_ranks({}), torch.cuda.is_available()
    if gpu:
        torch.cuda.set_per_process_memory_fraction(
            T4_GIB * 2**30 / torch.cuda.get_device_properties(state.device).total_memory
        )
    whole = job["micro_batch"] * job["gpus"]
    rows = make_rows(job["steps"] * whole, lengths="conversations" if gpu else "64", seed=1)
    plan = plan_batch(
        AutoConfig.from_pretrained(job["folder"]),
        lengths=[len(row["input_ids"]) for row in rows],
        micro_batch=job["micro_batch"],
        accumulation=1,
        checkpointing=True,
        padding_free=gpu,
        lora_rank=16,
        memory_gib=T4_GIB,
    )
    model, tokenizer, _ = load(job | {"library": "unsloth", "checkpointing": True, "lora": {}})
    trainer = SFTTrainer(
        model=model,
        processing_class=tokenizer,
        train_dataset=Dataset.from_list(rows),
        args=SFTConfig(
            output_dir=job["scratch"],
            max_steps=job["steps"],
            per_device_train_batch_size=job["micro_batch"],
            learning_rate=2e-4,
            warmup_steps=2,
            optim="adamw_8bit",
            fp16=gpu and job["dtype"] == "float16",
            bf16=gpu and job["dtype"] == "bfloat16",
            max_length=2048,
            padding_free=gpu,
            logging_steps=1,
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            include_num_input_tokens_seen="non_padding",
            ddp_find_unused_parameters=False,
            seed=3407,
        ),
    )
    at = []

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if gpu:
                torch.cuda.synchronize()
            at.append((time.perf_counter(), state.num_input_tokens_seen))

    trainer.add_callback(Clock())
    with fit_into_memory(trainer, plan.checkpointed_layers):
        trainer.train()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    alone = time_all_reduce(count, state)
    if not state.is_main_process:
        return None
    half = job["steps"] // 2
    seconds, tokens = (last - first for first, last in zip(at[half - 1], at[-1], strict=True))
    return {
        "tokens_a_second": tokens / seconds,
        "seconds_a_step": seconds / (job["steps"] - half),
        "all_reduce_ms": 1000 * alone,
        "megabytes": 4 * count / 1e6,
        "loss": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry][0],
        **device_and_versions(),
    }


def time_all_reduce(count: int, state: object, *, times: int = 20) -> float:
    """Seconds that so many 4-byte numbers take to be added up on all devices, once; 0 for a single one."""
    import torch

    if state.num_processes == 1:
        return 0.0
    numbers = torch.ones(count, device=state.device)
    for number in range(times + 3):
        if number == 3:  # the first ones set the connections up
            state.wait_for_everyone()
            start = time.perf_counter()
        torch.distributed.all_reduce(numbers)
        numbers.div_(state.num_processes)
    if numbers.is_cuda:
        torch.cuda.synchronize()
    return (time.perf_counter() - start) / times


def run(job: dict, *, env: dict) -> dict:
    """A job under torchrun: what its rank 0 said in its last line."""
    with tempfile.TemporaryDirectory() as scratch:
        launch = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={job['gpus']}"]
        command = [*launch, __file__, "--one", json.dumps(job | {"scratch": scratch})]
        settings = {"UNSLOTH_BLOCK_COMPILE": "0", "HF_HUB_OFFLINE": "1"}
        done = subprocess.run(command, env=os.environ | settings | env, capture_output=True, text=True)
    if done.returncode:
        said = [line for line in done.stderr.splitlines() if line.startswith("rank ")] or done.stderr.splitlines()
        return {"failed": said[0][:300] if said else "nothing was said"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--shapes", nargs="+", default=["3B", "1B"])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--multiprocessors", type=int, help="of each GPU: 8 of an H200's are a T4's")
    parser.add_argument("--models", help="a folder to keep the random models in")
    parser.add_argument("--paper", action="store_true", help="print the calculation alone")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("scaling.csv"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.paper:
        print(*map(on_paper, LORA), sep="\n\n")
        return 0
    if options.one:
        from helpers.ranks import one_message

        with one_message():
            row = measure(json.loads(options.one))
        print("\n" + json.dumps(row) if row else "", flush=True)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        models, rows = make_models(options.shapes, options.models or folder), []
        jobs = [
            {"shape": shape, "dtype": dtype, "scaling": scaling, "gpus": gpus, "steps": options.steps}
            | {"micro_batch": EACH if scaling == "weak" else max(1, EACH // gpus), "folder": models[shape]}
            for shape in options.shapes
            for dtype in options.dtypes
            for scaling in ("weak", "strong")
            for gpus in options.gpus
            if scaling == "weak" or gpus > 1  # on one GPU they are the same
        ]
        measure_all(jobs, rows, options)
    return int(any("failed" in row for row in rows))


def measure_all(jobs: list[dict], rows: list[dict], options: argparse.Namespace) -> None:
    """Run the jobs one after the other, with a line and a row of the CSV file for each."""
    import contextlib

    part = multiprocessors_each(options.multiprocessors) if options.multiprocessors else contextlib.nullcontext({})
    with part as env:
        for job in jobs:
            row = job | {"multiprocessors": options.multiprocessors} | run(job, env=env)
            alone = [each for each in rows if each["gpus"] == 1 and "failed" not in each]
            alone = [each for each in alone if (each["shape"], each["dtype"]) == (row["shape"], row["dtype"])]
            if alone and "tokens_a_second" in row:
                row["efficiency"] = row["tokens_a_second"] / row["gpus"] / alone[0]["tokens_a_second"]
            rows.append(row)
            named = ("shape", "dtype", "scaling", "gpus", "tokens_a_second", "efficiency", "all_reduce_ms", "failed")
            shown = {name: row[name] for name in named if name in row}
            print({name: round(v, 3) if isinstance(v, float) else v for name, v in shown.items()}, flush=True)
            write_csv(options.out, rows, dict(zip(COLUMNS, COLUMNS, strict=True)))


if __name__ == "__main__":
    sys.exit(main())
