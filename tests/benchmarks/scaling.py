"""Training on 1, 2, 4, … GPUs of one host: tokens a second, and what the gradients' way from GPU to GPU takes.

    python tests/benchmarks/scaling.py [--gpus 1 2 4] [--multiprocessors 8] [--without-p2p] [--out FILE]
    python tests/benchmarks/scaling.py --paper     (no GPU: the same by calculation, for 1 to 64 of them)

Each row is a run under torchrun, with Llama 3.2's shapes and random weights, and chapter 04's settings for one GPU's
share, with a T4's memory. *Weak* scaling gives each GPU eight conversations, *strong* scaling shares eight out. Rows
are dealt out evenly, as `Checkpoints` does it, or as drawn. The second half of the steps counts. *Balance* is the
GPUs' tokens as a share of what they would be if each had as many as the fullest. The all-reduce is timed alone as well,
with as many numbers as LoRA has. With `--multiprocessors` the runs go side by side, each process on two CPU cores of
its own. `--without-p2p` sends through the computer's memory, as between Kaggle's T4s. Without a GPU the processes are
the CPU's, for a dry run: `--shapes tiny --gpus 1 2 --steps 4`.
"""

import argparse
import json
import os
import pathlib
import queue
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

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
COLUMNS = ("shape", "dtype", "scaling", "shares", "gpus", "p2p", "multiprocessors", "micro_batch", "tokens_a_second")
COLUMNS += ("seconds_a_step", "efficiency", "balance", "all_reduce_ms", "megabytes", "loss", "gradient_norm")
COLUMNS += ("last_loss", "device", "torch", "transformers", "unsloth", "bitsandbytes", "failed")


def all_reduce_seconds(count: int, *, gpus: int, link: str) -> float:
    """How long so many gradients of 4 bytes take to be added up on all GPUs, in a ring.

    Each GPU sends and receives 2 (N - 1) / N of all bytes, in 2 (N - 1) parts (Patarasuk and Yuan 2009, Bandwidth
    optimal all-reduce algorithms for clusters of workstations).

    Example: 24,313,856 numbers, 2 GPUs, PCIe 3 -> 0.0098
    """
    bandwidth, latency = LINKS[link]
    return 2 * (gpus - 1) / gpus * 4 * count / bandwidth + 2 * (gpus - 1) * latency


def balance_on_paper(gpus: int, *, even: bool) -> float:
    """Tokens of all GPUs as a share of what they would be if each had as many as the fullest, in weak scaling."""
    from training import make_rows

    from helpers.training.order import even_shares

    lengths = [len(row["input_ids"]) for row in make_rows(20 * EACH * 64, lengths="conversations", seed=1)]
    rows = even_shares(range(len(lengths)), lengths, batch=EACH, processes=gpus) if even else range(len(lengths))
    shares = [sum(lengths[row] for row in rows[begin : begin + EACH]) for begin in range(0, len(rows), EACH)]
    return sum(shares) / sum(gpus * max(shares[begin : begin + gpus]) for begin in range(0, len(shares), gpus))


def on_paper(shape: str) -> str:
    """What is left of a T4-like step: of waiting for the fullest GPU, and of sending where nothing is computed then."""
    sizes = (2, 4, 8, 16, 32, 64)
    rows = [
        [name, *(f"{balance_on_paper(size, even=even):.1%}" for size in sizes)]
        for name, even in (("rows as drawn", False), ("rows dealt out evenly", True))
    ]
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
    from helpers.ranks import meet_ranks, on_all
    from helpers.training import order

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
    at, mine = [], []  # of each step: when it ended, and the tokens until then; and this process's tokens of each

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if gpu:
                torch.cuda.synchronize()
            at.append((time.perf_counter(), state.num_input_tokens_seen))

    trainer.add_callback(Clock())
    if job["shares"] == "drawn":
        order.even_shares = lambda drawn, *_, **__: drawn
    draw = trainer._get_train_sampler
    trainer._get_train_sampler = lambda data: order.seeded_sampler(draw, data, len(rows), trainer.args)
    with fit_into_memory(trainer, plan.checkpointed_layers):
        compute = trainer.training_step

        def counted(model, inputs, *others):
            mine.append(inputs["input_ids"].numel())
            return compute(model, inputs, *others)

        trainer.training_step = counted
        trainer.train()
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    alone, half = time_all_reduce(count, state), job["steps"] // 2
    each = on_all(mine[half:])  # [tokens of each counted step] of each process
    if not state.is_main_process:
        return None
    seconds, tokens = (last - first for first, last in zip(at[half - 1], at[-1], strict=True))
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    return {
        "tokens_a_second": tokens / seconds,
        "seconds_a_step": seconds / (job["steps"] - half),
        "all_reduce_ms": 1000 * alone,
        "megabytes": 4 * count / 1e6,
        "balance": sum(map(sum, each)) / sum(job["gpus"] * max(step) for step in zip(*each, strict=True)),
        "loss": log[0]["loss"],
        "gradient_norm": log[0]["grad_norm"],
        "last_loss": log[-1]["loss"],
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


def run(job: dict, *, env: Mapping[str, str], before: Sequence[str] = ()) -> dict:
    """A job under torchrun: what its rank 0 said in its last line."""
    with socket.socket() as free:
        free.bind(("", 0))
        port = free.getsockname()[1]
    env = os.environ | {"UNSLOTH_BLOCK_COMPILE": "0", "HF_HUB_OFFLINE": "1"} | env
    if not job["p2p"]:
        env |= {"NCCL_P2P_DISABLE": "1"}
    with tempfile.TemporaryDirectory() as scratch:
        launch = [*before, sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={job['gpus']}"]
        command = [*launch, f"--master_port={port}", __file__, "--one", json.dumps(job | {"scratch": scratch})]
        done = subprocess.run(command, env=env, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.splitlines()
        said = [line for line in lines if line.startswith("rank ")] or [line for line in lines if "Error: " in line]
        return {"failed": said[0][:300] if said else f"exit status {done.returncode}"}
    return json.loads(done.stdout.strip().splitlines()[-1])


def run_all(jobs: Sequence[dict], *, multiprocessors: int | None) -> Iterator[dict]:
    """Each job's row, when it is there: whole GPUs one job after the other, parts of them side by side."""
    if multiprocessors is None:
        yield from (job | run(job, env={}) for job in jobs)
        return
    pairs: queue.SimpleQueue[str] = queue.SimpleQueue()
    for first in range(0, os.cpu_count() or 2, 2):
        pairs.put(f"{first},{first + 1}")
    taking = threading.Lock()  # who has taken some of its pairs waits for the rest before anyone else takes one

    def run_on_own_cores(job: dict) -> dict:
        with taking:
            mine = [pairs.get() for _ in range(min(job["gpus"], (os.cpu_count() or 2) // 2))]
        try:
            before = ["taskset", "-c", ",".join(mine)]
            return job | {"multiprocessors": multiprocessors} | run(job, env=env, before=before)
        finally:
            for pair in mine:
                pairs.put(pair)

    with multiprocessors_each(multiprocessors) as env, ThreadPoolExecutor(len(jobs)) as pool:
        for future in as_completed([pool.submit(run_on_own_cores, job) for job in jobs]):
            yield future.result()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gpus", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--shapes", nargs="+", default=["3B", "1B"])
    parser.add_argument("--dtypes", nargs="+", default=["float16", "bfloat16"])
    parser.add_argument("--shares", nargs="+", default=["even"], help="even, or drawn, or both")
    parser.add_argument("--without-p2p", action="store_true", help="and the same without a direct way between GPUs")
    parser.add_argument("--steps", type=int, default=24)
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
            {"shape": shape, "dtype": dtype, "scaling": scaling, "shares": shares, "gpus": gpus, "p2p": p2p}
            | {"micro_batch": EACH if scaling == "weak" else max(1, EACH // gpus)}
            | {"steps": options.steps, "folder": models[shape]}
            for shape in options.shapes
            for dtype in options.dtypes
            for gpus in options.gpus
            for scaling in ("weak", "strong")
            for shares in options.shares
            for p2p in (True, False)[: 1 + options.without_p2p]
            # On one GPU all are the same, and the way of sending has no part in how rows are dealt out.
            if (gpus > 1 or (scaling, shares, p2p) == ("weak", options.shares[0], True))
            and (p2p or shares == options.shares[0])
        ]
        for row in run_all(jobs, multiprocessors=options.multiprocessors):
            rows.append(row)
            add_efficiency(rows)
            named = ("shape", "dtype", "scaling", "shares", "gpus", "p2p", "tokens_a_second", "efficiency", "balance")
            shown = {name: row.get(name) for name in (*named, "all_reduce_ms", "loss", "last_loss", "failed")}
            print({name: round(v, 3) if isinstance(v, float) else v for name, v in shown.items()}, flush=True)
            write_csv(options.out, rows, dict(zip(COLUMNS, COLUMNS, strict=True)))
    return int(any("failed" in row for row in rows))


def add_efficiency(rows: Sequence[dict]) -> None:
    """Tokens a second of each GPU, as a share of what one alone does, in the rows for which that is known."""
    measured = [row for row in rows if "failed" not in row]
    alone = {(row["shape"], row["dtype"]): row["tokens_a_second"] for row in measured if row["gpus"] == 1}
    for row in measured:
        if one := alone.get((row["shape"], row["dtype"])):
            row["efficiency"] = row["tokens_a_second"] / row["gpus"] / one


if __name__ == "__main__":
    sys.exit(main())
