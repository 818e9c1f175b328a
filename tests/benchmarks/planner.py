"""Peak memory on a GPU against the planner's prediction (`helpers.memory.plan.predict_peak`), over many configurations.

    python tests/benchmarks/planner.py [--only chapter04|t4|as_needed] [--out FILE]

Nothing is timed, so four processes at a time share the GPU, each capped to a T4's memory. A configuration is three
steps of rows of one length; the peak is the allocator's, over all three.
"""

import argparse
import gc
import json
import os
import pathlib
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))

from in_turns import make_models, write_csv  # noqa: E402

from helpers.memory.plan import T4_GIB  # noqa: E402

AT_ONCE = 4  # processes; five of them could run each other out of memory
# (batch, tokens of each row)
SIZES = [
    (1, 512),
    (2, 512),
    (2, 1024),
    (4, 512),
    (4, 1024),
    (8, 512),
    (8, 1024),
    (2, 2048),
    (16, 512),
    (4, 2048),
    (8, 2048),
]
GROUPS = [
    dict(shape="3B", checkpointing=True, dtype="bfloat16", rank=16),
    dict(shape="3B", checkpointing="unsloth", dtype="bfloat16", rank=16),
    dict(shape="3B", checkpointing=False, dtype="bfloat16", rank=16),
    dict(shape="1B", checkpointing=True, dtype="bfloat16", rank=16),
    dict(shape="1B", checkpointing="unsloth", dtype="bfloat16", rank=16),
    dict(shape="1B", checkpointing=False, dtype="bfloat16", rank=16),
    dict(shape="3B", checkpointing=True, dtype="float16", rank=16),
    dict(shape="3B", checkpointing=True, dtype="bfloat16", rank=64),
    dict(shape="3B", checkpointing=True, dtype="bfloat16", rank=16, padded=True),
    # As chapter 04 trains: nothing compiled first.
    dict(shape="3B", checkpointing=True, dtype="float16", rank=16, padded=True, eager=True),
    dict(shape="3B", checkpointing="unsloth", dtype="float16", rank=16, padded=True, eager=True),
    dict(shape="1B", checkpointing=True, dtype="float16", rank=16, padded=True, eager=True),
    dict(shape="1B", checkpointing=False, dtype="bfloat16", rank=64, padded=True, eager=True),
    dict(shape="1B", checkpointing=True, dtype="bfloat16", rank=16, eager=True),
    # What plan_batch chooses on a T4: padding-free, nothing recomputed, several micro-batches a step.
    dict(shape="3B", checkpointing=False, dtype="float16", rank=16, accumulation=4, eager=True),
    dict(shape="1B", checkpointing=False, dtype="float16", rank=16, accumulation=2, eager=True),
    # Only the first layers are checkpointed, as where it is done as needed.
    dict(shape="3B", checkpointing=True, checkpointed_layers=7, dtype="float16", rank=16, padded=True, eager=True),
    dict(shape="3B", checkpointing=True, checkpointed_layers=20, dtype="bfloat16", rank=16, padded=True, eager=True),
    dict(shape="1B", checkpointing=True, checkpointed_layers=5, dtype="float16", rank=16, padded=True, eager=True),
    dict(shape="3B", checkpointing=True, checkpointed_layers=14, dtype="float16", rank=16, eager=True),
]
KINDS = {"chapter04": "eager", "t4": "accumulation", "as_needed": "checkpointed_layers"}
EAGER = {"UNSLOTH_BLOCK_COMPILE": "0", "UNSLOTH_FUSED_LINEAR_TRITON": "0"}
COLUMNS = ("shape", "dtype", "rank", "checkpointing", "padded", "accumulation", "batch", "length")
COLUMNS += ("peak_reserved_gib", "out_of_memory", "checkpointed_layers")


def measure(group: dict, folder: str) -> None:
    """Print one JSON line for each size; stops at the first size that does not fit."""
    from unsloth import FastLanguageModel  # before trl, whose trainer it patches

    # isort: split
    import torch
    from datasets import Dataset
    from transformers import TrainerCallback
    from transformers.modeling_layers import GradientCheckpointingLayer
    from trl import SFTConfig, SFTTrainer

    class Spare(TrainerCallback):
        def on_train_begin(self, args, state, control, model, **kwargs):
            layers = [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]
            for layer in layers[group.get("checkpointed_layers", len(layers)) :]:
                layer.gradient_checkpointing = False

    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction(T4_GIB * 2**30 / total)
    dtype = getattr(torch, group["dtype"])
    model, tokenizer = FastLanguageModel.from_pretrained(folder, max_seq_length=2048, dtype=dtype, load_in_4bit=True)
    loaded = torch.cuda.memory_allocated()
    model = FastLanguageModel.get_peft_model(
        model,
        r=group["rank"],
        lora_alpha=16,
        target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"],
        use_gradient_checkpointing=group["checkpointing"],
        random_state=3407,
    )
    with_lora = torch.cuda.memory_allocated()
    accumulation = group.get("accumulation", 1)
    for batch, length in SIZES:
        tokens = list(range(10, 10 + length))
        rows = Dataset.from_list([{"input_ids": tokens, "labels": tokens}] * batch * accumulation * 3)
        settings = dict(per_device_train_batch_size=batch, gradient_accumulation_steps=accumulation, max_steps=3)
        settings |= dict(learning_rate=1e-5, optim="adamw_8bit", max_length=2048)
        settings |= dict(fp16=group["dtype"] == "float16", bf16=group["dtype"] == "bfloat16", report_to="none")
        settings |= dict(save_strategy="no", disable_tqdm=True, output_dir=tempfile.mkdtemp())
        if group.get("padded"):
            settings |= dict(padding_free=False)
        gc.collect()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        result = group | {"batch": batch, "length": length, "loaded": loaded, "with_lora": with_lora}
        try:
            given = dict(processing_class=tokenizer, train_dataset=rows, callbacks=[Spare()])
            trainer = SFTTrainer(model=model, args=SFTConfig(**settings), **given)
            trainer.train()
        except torch.OutOfMemoryError:
            result["out_of_memory"] = True
        result["peak_allocated"] = torch.cuda.max_memory_allocated()
        result["peak_reserved_gib"] = torch.cuda.max_memory_reserved() / 2**30
        result["after"] = torch.cuda.memory_allocated()
        trainer = None
        model.zero_grad(set_to_none=True)
        print("RESULT " + json.dumps(result), flush=True)
        if "out_of_memory" in result:
            return


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("planner.jsonl"))
    parser.add_argument("--only", choices=KINDS, help="see KINDS: as chapter 04 trains, a T4's plans, …")
    parser.add_argument("--models", help="a folder to keep the random models in")
    parser.add_argument("--seconds", type=int, default=300, help="a group's limit")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        measure(*json.loads(options.one))
        return 0
    groups = [group for group in GROUPS if not options.only or group.get(KINDS[options.only])]
    done = []
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(sorted({group["shape"] for group in groups}), options.models or folder)
        with open(options.out, "w") as out:
            for begin in range(0, len(groups), AT_ONCE):
                processes = []
                for group in groups[begin : begin + AT_ONCE]:
                    own = pathlib.Path(tempfile.mkdtemp(dir=folder))
                    env = os.environ | {
                        "TORCHINDUCTOR_CACHE_DIR": f"{own}/inductor",
                        "UNSLOTH_COMPILE_LOCATION": f"{own}/unsloth",
                    }
                    env |= EAGER if group.get("eager") else {}
                    command = ["timeout", str(options.seconds), sys.executable, __file__, "--one"]
                    log = open(own / "log", "w+")
                    command += [json.dumps([group, models[group["shape"]]])]
                    processes.append((group, log, subprocess.Popen(command, stdout=log, stderr=log, cwd=own, env=env)))
                for group, log, process in processes:
                    process.wait()
                    log.seek(0)
                    text = log.read()
                    found = [line[7:] for line in text.splitlines() if line.startswith("RESULT ")]
                    out.writelines(line + "\n" for line in found)
                    out.flush()
                    done += [{"padded": False, "out_of_memory": False} | json.loads(line) for line in found]
                    write_csv(options.out.with_suffix(".csv"), done, dict(zip(COLUMNS, COLUMNS, strict=True)))
                    print(group, len(found), "sizes", "" if process.returncode == 0 else text[-300:], flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
