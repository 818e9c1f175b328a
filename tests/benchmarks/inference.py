"""Tokens per second on a GPU in the ways that chapters 05 and 06 offer, with Llama 3.2's 1B and 3B shapes.

    python tests/benchmarks/inference.py [--shapes 1B 3B] [--batches 1 8] [--tokens 128] [--out FILE]

The weights are random and made here (speed does not depend on them), so nothing is downloaded. Each way and shape has a
process of its own; these import side by side and then take turns. With each batch it reads prompts of 256 tokens
and writes, greedily, to the last token that was asked for. The first round warms up; of three more the median counts:
seconds to the first token (reading the prompts), and tokens a second after it, over the whole batch. All compute in the
16-bit type that the card has for it (`--dtype`), 4-bit weights are NF4 with double quantisation in both libraries. The
adapter is one of rank 16 on all seven matrices, beside the weights; merged, there is none.
"""

import argparse
import json
import pathlib
import signal
import statistics
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parents[2]), str(pathlib.Path(__file__).resolve().parent)]

from in_turns import device_and_versions, make_models, run_jobs, wait_for_turn, write_csv  # noqa: E402

PROMPT_TOKENS = 256
ROUNDS, LIMIT_SECONDS = 3, 240
WAYS = ("Unsloth, adapter on 4 bits", "Transformers, adapter on 4 bits", "Unsloth, adapter on 16 bits")
WAYS += ("Transformers, adapter on 16 bits", "Transformers, merged in 16 bits", "Unsloth, merged in 4 bits")
LORA = dict(r=16, lora_alpha=16, lora_dropout=0, bias="none")
LORA |= dict(target_modules=["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"])
COLUMNS = ("shape", "way", "dtype", "batch", "first_token_s", "tokens_a_second", "warm_up_s", "peak_gib")


def load(job: dict):
    """The model, as each library's own documentation says."""
    import torch

    dtype, four_bit, adapter = getattr(torch, job["dtype"]), "4 bits" in job["way"], "adapter" in job["way"]
    if job["way"].startswith("Unsloth"):
        from unsloth import FastLanguageModel

        options = dict(max_seq_length=1024, dtype=dtype, load_in_4bit=four_bit)
        model, _ = FastLanguageModel.from_pretrained(job["folder"], **options)
        if adapter:
            model = FastLanguageModel.get_peft_model(model, **LORA)
        FastLanguageModel.for_inference(model)
        return model
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig

    options = dict(dtype=dtype, device_map="auto")
    if four_bit:
        nf4 = dict(bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype)
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **nf4)
    model = AutoModelForCausalLM.from_pretrained(job["folder"], **options)
    return (get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA)) if adapter else model).eval()


def measure(job: dict) -> list[dict]:
    """One way and shape: see the module's docstring. A batch that fails does not take the others with it."""
    import torch

    if job["way"].startswith("Unsloth"):
        import unsloth  # noqa: F401
    import transformers  # noqa: F401

    wait_for_turn(job)
    signal.alarm(LIMIT_SECONDS)
    model, results = load(job), []
    for batch in job["batches"]:
        try:
            figures = measure_batch(model, batch, tokens=job["tokens"])
        except torch.OutOfMemoryError as error:
            figures = {"failed": str(error).partition(".")[0]}
        results.append({"batch": batch} | figures | device_and_versions())
    return results


def measure_batch(model, batch: int, *, tokens: int) -> dict[str, float]:
    """Seconds to the first token, and tokens a second after it."""
    import torch

    gpu = torch.cuda.is_available()
    torch.manual_seed(0)
    ids = torch.randint(1000, 20_000, (batch, PROMPT_TOKENS), device=model.device)
    prompt = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=3, do_sample=False)

    def seconds_for(new_tokens: int) -> float:
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(**prompt, min_new_tokens=new_tokens, max_new_tokens=new_tokens)
        if gpu:
            torch.cuda.synchronize()
        if output.shape != (batch, PROMPT_TOKENS + new_tokens):
            raise RuntimeError(f"{output.shape[1] - PROMPT_TOKENS} new tokens instead of {new_tokens}")
        return time.perf_counter() - start

    if gpu:
        torch.cuda.reset_peak_memory_stats()
    warm_up = seconds_for(tokens)
    first = statistics.median(seconds_for(1) for _ in range(ROUNDS))
    whole = statistics.median(seconds_for(tokens) for _ in range(ROUNDS))
    return {
        "first_token_s": first,
        "tokens_a_second": batch * (tokens - 1) / (whole - first),
        "warm_up_s": warm_up,
        "peak_gib": torch.cuda.max_memory_allocated() / 2**30 if gpu else None,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B"])
    parser.add_argument("--ways", nargs="+", default=WAYS, choices=WAYS)
    parser.add_argument("--multiprocessors", type=int, help="of the GPU, for each way, with two CPU cores: 8 is a T4's")
    parser.add_argument("--batches", nargs="+", default=[1, 8], type=int)
    parser.add_argument("--tokens", default=128, type=int, help="2 or more")
    parser.add_argument("--dtype", default="float16", choices=["float16", "bfloat16", "float32"])
    parser.add_argument("--models", help="a folder to keep the random models in")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("inference.csv"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(measure(json.loads(options.one))))
        return 0
    rows, failed = [], False
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(options.shapes, options.models or folder)
        jobs = [
            {"shape": shape, "way": way, "folder": models[shape], "batches": options.batches}
            | {"tokens": options.tokens, "dtype": options.dtype}
            for shape in options.shapes
            for way in options.ways
        ]
        for job, results in run_jobs(__file__, jobs, ahead=len(jobs), multiprocessors=options.multiprocessors):
            for result in [results] if isinstance(results, dict) else results:
                rows.append(job | result)
                columns = {name: name for name in (*COLUMNS, *device_and_versions(), "failed")}
                write_csv(options.out, rows, columns)
                figures = {name: round(result[name], 3) for name in COLUMNS[4:] if result.get(name)}
                failed = failed or "failed" in result
                print(job["shape"], job["way"], result.get("batch", ""), figures, result.get("failed", ""), flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
