"""Training speed and memory on a GPU, Llama 3.2's 1B and 3B shapes: the popular notebook's settings, plain
Transformers + PEFT + TRL, and this series' settings.

    python tests/benchmarks/training.py [--out FILE]     (--help: shapes, types, rows, lengths, and another card's plan)

Each row runs in a process of its own with empty compilation caches. Some processes at a time import their libraries
side by side; then, once all of these have, they take turns, so that only one of them uses the machine. The GPU's memory
is capped to a T4's. A row is 60 steps from cold, the second half of which counts as settled, then the held-out loss.
"""

import argparse
import contextlib
import dataclasses
import gc
import json
import math
import pathlib
import re
import signal
import statistics
import sys
import tempfile
import time

PROCESS_START = time.perf_counter()
ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

from in_turns import device_and_versions, make_models, run_jobs, wait_for_turn, write_csv  # noqa: E402

from helpers.memory.plan import T4_GIB  # noqa: E402

LIMIT_SECONDS = 300
STEPS, EFFECTIVE_BATCH = 60, 8
EQUAL = 0.005  # what held-out losses of the same rows may differ by
COMMON = dict(library="unsloth", dtype="bfloat16", batch=8, accumulation=1, checkpointing=True)
COMMON |= dict(args={}, env={}, lora={}, lengths="conversations")
ROWS = {
    "a": (
        "the popular notebook: 2 × 4, offloaded checkpointing",
        dict(batch=2, accumulation=4, checkpointing="unsloth"),
    ),
    # 8 × 1 does not fit: the logits of a long batch alone are over 3 GiB.
    "b": ("plain Transformers + PEFT + TRL: 4 × 2", dict(library="hf", batch=4, accumulation=2)),
    "c": (
        "this series: the fastest of plan_batch, nothing compiled first, longest batch rehearsed",
        dict(planned=0, env={"UNSLOTH_BLOCK_COMPILE": "0"}),
    ),
    "q": (
        "the quickstart: 4 × 2, nothing checkpointed, no helper; its rows are short, compare with --lengths short",
        dict(batch=4, accumulation=2, checkpointing=False, args={"padding_free": True}, lengths="short"),
    ),
}
KINDS = {"NF4 unpacking": "nf4|dequant", "attention": "flash|sdpa|fmha|attention", "products": "nvjet|gemm|cutlass"}
KINDS |= {"loss": "cross_entropy|logprob|_ce_|fused_linear|softmax", "optimiser": "ptimizer|adam|Adam"}
KINDS |= {"norms, SwiGLU, positions": "norm|glu|rope|silu", "copies": "Memcpy|copy|Cat", "element-wise": "elementwise"}
# The columns of the CSV file, and what they are called in a result.
COLUMNS = {"shape": "shape", "dtype": "dtype", "row": "row", "steps": "steps", "lengths": "lengths"}
COLUMNS |= {"micro_batch": "batch", "accumulation": "accumulation", "checkpointing": "checkpointing"}
COLUMNS |= {"padding_free": "padding_free", "seconds_a_step": "settled_s", "tokens_a_second": "settled_tokens_per_s"}
COLUMNS |= {name: name for name in ("peak_reserved_gib", "predicted_gib", "first_step_s", "load_s", "cold_s")}
COLUMNS |= {name: name for name in ("import_s", "held_out_loss", "loss", "rehearsal_s", "splits", "device", "name")}
COLUMNS |= {"estimated_s_a_step": "estimate_s", "multiprocessors": "multiprocessors", "failed": "failed"}


# (mean before the longest are cut, most) tokens of a conversation; "short" is what the quickstart keeps.
LENGTHS = {"conversations": (512, 1722), "long": (1080, 2000), "short": (512, 1024)}


def make_rows(count: int, *, lengths: str, seed: int) -> list[dict]:
    """Tokenised conversations: log-normal lengths (of `LENGTHS`), or all of one length ("1024").

    Turns alternate: 30 tokens of a user, which are not trained, then 90 of an assistant. Tokens follow a noisy cycle,
    so that a model with random weights has something to learn.
    """
    import numpy

    random = numpy.random.default_rng(seed)
    mean, most = LENGTHS.get(lengths, (0, 0))
    sigma = 0.6
    rows = []
    for _ in range(count):
        drawn = random.lognormal(numpy.log(mean or 1) - sigma**2 / 2, sigma)
        length = int(min(max(drawn, 48), most)) if mean else int(lengths)
        tokens = 10 + (random.integers(0, 2000) + 7 * numpy.arange(length)) % 2000
        noise = random.random(length) < 0.2
        tokens = numpy.where(noise, 10 + random.integers(0, 2000, length), tokens)
        trained = numpy.arange(length) % 120 >= 30
        rows.append({"input_ids": tokens.tolist(), "labels": numpy.where(trained, tokens, -100).tolist()})
    return rows


def load(job: dict):
    """The model with LoRA, as each library's own documentation says."""
    import torch

    dtype = getattr(torch, job["dtype"])
    lora = dict(r=16, lora_alpha=16, lora_dropout=0, bias="none")
    lora["target_modules"] = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    if job["library"] == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            job["folder"], max_seq_length=2048, dtype=dtype, load_in_4bit=job.get("load_in_4bit", True)
        )
        model = FastLanguageModel.get_peft_model(
            model, **lora, use_gradient_checkpointing=job["checkpointing"], random_state=3407, **job["lora"]
        )
        return model, tokenizer, None
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

    four_bit = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    options = dict(dtype=dtype, device_map={"": 0}, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_pretrained(job["folder"], quantization_config=four_bit, **options)
    return model, AutoTokenizer.from_pretrained(job["folder"]), LoraConfig(task_type="CAUSAL_LM", **lora)


def measure(job: dict) -> dict:
    """One row: see the module's docstring."""
    import torch

    if job["library"] == "unsloth":
        import unsloth  # noqa: F401
    from datasets import Dataset
    from transformers import DataCollatorForSeq2Seq, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    planned = job.get("planned")
    if planned is not None:
        gc.freeze()  # as chapter 04
    import_s = time.perf_counter() - PROCESS_START
    wait_for_turn(job)
    signal.alarm(LIMIT_SECONDS)
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(T4_GIB * 2**30 / total)
    torch.set_float32_matmul_precision("high")
    start = time.perf_counter()
    steps = job.get("steps", STEPS)
    rows = make_rows(steps * EFFECTIVE_BATCH, lengths=job["lengths"], seed=1)
    if planned is not None:
        from transformers import AutoConfig

        from helpers.memory.fit import fit_into_memory
        from helpers.memory.plan import plan_batch

        lengths, config = [len(row["input_ids"]) for row in rows], AutoConfig.from_pretrained(job["folder"])
        card = dict(memory_gib=T4_GIB, capability=job.get("capability") or torch.cuda.get_device_capability())
        whole = dict(micro_batch=EFFECTIVE_BATCH, accumulation=1, checkpointing=True, padding_free=True)
        card |= dict(load_in_4bit=job.get("load_in_4bit", True))
        if isinstance(planned, dict):
            plan = plan_batch(config, lengths=lengths, lora_rank=16, **planned, **card)
        else:
            plan = plan_batch(config, lengths=lengths, lora_rank=16, **whole, **card)
            plan = dataclasses.replace(plan, yours=plan.fitting[planned])  # as a reader who copies it
        job |= dict(checkpointing=plan.yours.checkpointing, batch=plan.yours.micro_batch)
        order = "random" if plan.yours.padding_free else "group_by_length"  # as chapter 04
        batches = dict(padding_free=plan.yours.padding_free, train_sampling_strategy=order)
        job |= dict(accumulation=plan.yours.accumulation, args=batches | job["args"])
        estimate_s = plan.yours.seconds

    class Clock(TrainerCallback):
        def __init__(self):
            self.at = []

        def on_step_begin(self, args, state, control, **kwargs):
            if not self.at:
                torch.cuda.synchronize()
                self.at.append(time.perf_counter())

        def on_step_end(self, args, state, control, **kwargs):
            torch.cuda.synchronize()
            self.at.append(time.perf_counter())

    model, tokenizer, peft_config = load(job)
    load_s = time.perf_counter() - start
    held_out = make_rows(32, lengths=job["lengths"], seed=2)

    def trainer_of(max_steps: int, clock: Clock):
        settings = (
            dict(
                per_device_train_batch_size=job["batch"],
                gradient_accumulation_steps=job["accumulation"],
                max_steps=max_steps,
                warmup_steps=5,
                learning_rate=2e-4,
                lr_scheduler_type="linear",
                optim="adamw_8bit",
                weight_decay=0.01,
                fp16=job["dtype"] == "float16",
                bf16=job["dtype"] == "bfloat16",
                max_length=2048,
                per_device_eval_batch_size=2,
                logging_steps=1,
                save_strategy="no",
                report_to="none",
                seed=3407,
                output_dir=job["scratch"],
                disable_tqdm=True,
                include_num_input_tokens_seen="non_padding",
                gradient_checkpointing=bool(job["checkpointing"]),
            )
            | job["args"]
        )
        if job["library"] == "unsloth":
            settings.pop("gradient_checkpointing")
        given = dict(model=model if max_steps == steps else trainer.model, processing_class=tokenizer)
        given |= dict(train_dataset=Dataset.from_list(rows), eval_dataset=Dataset.from_list(held_out))
        given |= dict(peft_config=peft_config if max_steps == steps else None, callbacks=[clock])
        made = SFTTrainer(**given, args=SFTConfig(**settings))
        if job["library"] == "unsloth" and not made.args.padding_free:  # what train_on_responses_only puts there
            width = settings.get("pad_to_multiple_of")
            made.data_collator = DataCollatorForSeq2Seq(tokenizer, pad_to_multiple_of=width)
        return made

    clock = Clock()
    trainer = trainer_of(steps, clock)
    train_start = time.perf_counter()
    if "cap_gib" in job:
        torch.cuda.empty_cache()
        torch.cuda.set_per_process_memory_fraction(job["cap_gib"] * 2**30 / total)
    fit = contextlib.nullcontext() if planned is None else fit_into_memory(trainer, plan.checkpointed_layers)
    with fit as fitting:
        trainer.train()
    torch.cuda.synchronize()
    end = time.perf_counter()
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    step_s = [later - earlier for earlier, later in zip(clock.at, clock.at[1:], strict=False)]
    tokens, half = sum(len(row["input_ids"]) for row in rows), steps // 2
    seen, settled_s = [entry["num_input_tokens_seen"] for entry in log], sum(step_s[half:])
    result = {
        "settled_s": settled_s / (steps - half),
        "settled_tokens_per_s": (seen[-1] - seen[half - 1]) / settled_s,
        "import_s": import_s,
        "load_s": load_s,
        "cold_s": end - start,
        "train_s": end - train_start,
        "first_step_s": step_s[0],
        "steps_s": [round(s, 3) for s in step_s],
        "steps": steps,
        "cold_tokens_per_s": tokens / (end - train_start),
        "loss": sum(entry["loss"] for entry in log[-10:]) / len(log[-10:]),
        "peak_reserved_gib": torch.cuda.max_memory_reserved() / 2**30,
        "peak_allocated_gib": torch.cuda.max_memory_allocated() / 2**30,
        "padding_free": bool(trainer.args.padding_free),
        "predicted_gib": None if planned is None else plan.yours.predicted_gib,
        "estimate_s": None if planned is None else estimate_s,
        "multiprocessors": torch.cuda.get_device_properties(0).multi_processor_count,
        "splits": fitting.splits if fitting else None,
        "tokens_at_once": fitting.tokens_at_once if fitting else None,
        "rehearsal_s": fitting.rehearsal.seconds if fitting else None,
        "losses": [entry["loss"] for entry in log],
        "batch": job["batch"],
        "accumulation": job["accumulation"],
        "checkpointing": job["checkpointing"],
        "args": job["args"],
        "model": type(trainer.model).__name__,
        **device_and_versions(),
        "tokens_seen": int(trainer.state.num_input_tokens_seen),
        "tokens": tokens,
    }
    counters = torch._dynamo.utils.counters
    result["graphs"] = dict(counters["stats"])
    if job.get("profile"):
        from torch.profiler import ProfilerActivity, profile

        prof = profile(activities=[ProfilerActivity.CUDA, ProfilerActivity.CPU])

        class Profiler(Clock):  # steps 2 to 4
            def on_step_begin(self, args, state, control, **kwargs):
                if state.global_step == 1:
                    torch.cuda.synchronize()
                    prof.start()
                super().on_step_begin(args, state, control)

            def on_step_end(self, args, state, control, **kwargs):
                super().on_step_end(args, state, control)
                if state.global_step == 4:
                    prof.stop()

        profiler = Profiler()
        probe = trainer_of(4, profiler)
        with contextlib.nullcontext() if planned is None else fit_into_memory(probe, plan.checkpointed_layers):
            probe.train()
        wall = profiler.at[4] - profiler.at[1]
        events = sorted(prof.key_averages(), key=lambda event: -event.self_device_time_total)
        kernels = [event for event in events if event.self_device_time_total and not event.self_cpu_time_total]
        result["profile"] = {
            "wall_s": wall,
            "gpu_s": sum(event.self_device_time_total for event in kernels) / 1e6,
            "launches": sum(event.count for event in kernels),
            "kinds": kernels_by_kind(kernels),
            "top": [(e.key[:70], round(e.self_device_time_total / 1e3, 1), e.count) for e in kernels[:14]],
            "cpu_top": [
                (e.key[:50], round(e.self_cpu_time_total / 1e3, 1), e.count)
                for e in sorted(prof.key_averages(), key=lambda event: -event.self_cpu_time_total)[:12]
            ],
        }
    if not job.get("skip_eval"):
        result["held_out_loss"] = trainer.evaluate()["eval_loss"]
    return result


def kernels_by_kind(kernels: list) -> dict[str, float]:
    """Seconds on the GPU, by what the kernels do; told by their names."""
    seconds = dict.fromkeys([*KINDS, "other"], 0.0)
    for kernel in kernels:
        kind = next((kind for kind, pattern in KINDS.items() if re.search(pattern, kernel.key)), "other")
        seconds[kind] += kernel.self_device_time_total / 1e6
    return {kind: round(figure, 3) for kind, figure in seconds.items()}


def mark_unequal(rows: list[dict]) -> None:
    """A row whose held-out loss is not finite, or 0.5 % off the median of its like, has computed something else."""
    for row in (row for row in rows if "held_out_loss" in row):
        like = [other["held_out_loss"] for other in rows if "held_out_loss" in other and alike(row, other)]
        finite = [loss for loss in like if math.isfinite(loss)]
        if not finite or not abs(row["held_out_loss"] / statistics.median(finite) - 1) <= EQUAL:
            row["failed"] = f"no result: a held-out loss of {row['held_out_loss']:.4f}, where others have {like}"


def alike(row: dict, other: dict) -> bool:
    return all(row[name] == other[name] for name in ("shape", "dtype", "lengths", "steps"))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B"])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float16"])
    parser.add_argument("--rows", nargs="+", default=list(ROWS))
    parser.add_argument("--lengths", default="conversations", help="or one length, such as 1024")
    parser.add_argument("--steps", type=int, default=STEPS)
    card = ("MAJOR", "MINOR")
    parser.add_argument("--capability", nargs=2, type=int, metavar=card, help="plan row c for this card: 7 5 is a T4")
    parser.add_argument(
        "--jobs",
        help="a JSON file with a list of rows of your own instead: keys as in COMMON and ROWS, name, shape, steps, "
        "cap_gib (after loading), skip_eval, profile (three more steps under PyTorch's profiler)",
    )
    parser.add_argument("--models", help="a folder to keep the random models in")
    parser.add_argument("--ahead", type=int, default=6, help="processes that import at the same time")
    parser.add_argument("--multiprocessors", type=int, help="of the GPU, for each row, with two CPU cores: 8 is a T4's")
    parser.add_argument("--at-once", type=int, default=8, help="rows side by side, with --multiprocessors")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("training.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(measure(json.loads(options.one))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(options.shapes, options.models or folder)
        if options.jobs:
            jobs = json.loads(pathlib.Path(options.jobs).read_text())
        else:
            jobs = [
                {"name": f"{shape} {dtype} {row}", "shape": shape, "dtype": dtype, "row": row}
                | {"lengths": options.lengths, "steps": options.steps, "capability": options.capability}
                | ROWS[row][1]
                for shape in options.shapes
                for dtype in options.dtypes
                for row in options.rows
            ]
        jobs = [COMMON | job | {"folder": models[job["shape"]]} for job in jobs]
        done = []
        given = dict(multiprocessors=options.multiprocessors, ahead=options.ahead, at_once=options.at_once)
        for job, result in run_jobs(__file__, jobs, **given):
            done.append(job | result)
            with open(options.out, "a") as file:
                file.write(json.dumps(done[-1]) + "\n")
            write_csv(options.out.with_suffix(".csv"), done, COLUMNS)
            keys = ("settled_s", "settled_tokens_per_s", "peak_reserved_gib", "first_step_s", "cold_s", "held_out_loss")
            figures = {key: round(result[key], 2) for key in keys if key in result}
            print(job["name"], figures, result.get("failed", ""), flush=True)
        mark_unequal(done)
        write_csv(options.out.with_suffix(".csv"), done, COLUMNS)
        print(*(f"{row['name']}: {row['failed']}" for row in done if row.get("failed")), sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
