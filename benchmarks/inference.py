"""Tokens per second on a GPU: Unsloth's inference mode against plain Transformers, Llama 3.2's 1B and 3B shapes.

    python benchmarks/inference.py [--shapes 1B 3B] [--batches 1 8] [--tokens 128] [--out FILE]

The weights are random and made here (speed does not depend on them), so nothing is downloaded. Each library and shape
has a process of its own, which generates three times with each batch; the first one warms up. A prompt has 256 tokens,
decoding is greedy, and no end token stops it.
"""

import argparse
import json
import pathlib
import sys
import tempfile
import time

sys.path[:0] = [str(pathlib.Path(__file__).resolve().parent.parent), str(pathlib.Path(__file__).resolve().parent)]

from in_turns import make_models, run_in_turns, wait_for_turn  # noqa: E402

PROMPT_TOKENS = 256
LIBRARIES = ("Transformers 16-bit", "Unsloth 16-bit", "Transformers 4-bit", "Unsloth 4-bit")


def measure(job: dict) -> list[dict]:
    """Load, and for each batch size warm up and time two generations; peak memory is the allocator's."""
    library, folder, tokens = job["library"], job["folder"], job["tokens"]
    if library.startswith("Unsloth"):
        from unsloth import FastLanguageModel

        wait_for_turn(job)
        options = dict(max_seq_length=1024, dtype=None, load_in_4bit=library.endswith("4-bit"))
        model, _ = FastLanguageModel.from_pretrained(folder, **options)
        FastLanguageModel.for_inference(model)
    else:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        wait_for_turn(job)
        options = dict(dtype=torch.bfloat16, device_map="auto")
        if library.endswith("4-bit"):
            four_bit = dict(bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
            options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **four_bit)
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    import torch

    gpu, results = torch.cuda.is_available(), []
    for batch in job["batches"]:
        torch.manual_seed(0)
        ids = torch.randint(1000, 20_000, (batch, PROMPT_TOKENS), device=model.device)
        prompt = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=3, do_sample=False)
        seconds = []
        if gpu:
            torch.cuda.reset_peak_memory_stats()
        for _ in range(3):
            start = time.perf_counter()
            with torch.inference_mode():
                output = model.generate(**prompt, min_new_tokens=tokens, max_new_tokens=tokens)
            if gpu:
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
        assert output.shape == (batch, PROMPT_TOKENS + tokens)
        peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
        speed = batch * tokens / min(seconds[1:])
        results.append({"batch": batch, "tokens_a_second": speed, "first_s": seconds[0], "peak_gib": peak})
    return results


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B"])
    parser.add_argument("--batches", nargs="+", default=[1, 8], type=int)
    parser.add_argument("--tokens", default=128, type=int)
    parser.add_argument("--models", help="a folder to keep the random models in")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("inference.jsonl"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(measure(json.loads(options.one))))
        return 0
    from helpers.tables import text_table

    rows = []
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(options.shapes, options.models or folder)
        jobs = [
            {"shape": shape, "library": library, "folder": models[shape], "batches": options.batches}
            | {"tokens": options.tokens}
            for shape in options.shapes
            for library in LIBRARIES
        ]
        for job, results in run_in_turns(__file__, jobs, ahead=len(jobs)):
            for result in [results] if "failed" in results else results:
                with open(options.out, "a") as file:
                    file.write(json.dumps(job | result) + "\n")
                figures = [f"{result[key]:.1f}" for key in ("tokens_a_second", "first_s", "peak_gib") if key in result]
                rows.append([job["shape"], result.get("batch", ""), job["library"], *(figures or ["failed", "", ""])])
                print(*rows[-1], result.get("failed", ""), flush=True)
    print("\n" + text_table(["shape", "batch", "library", "tokens/s", "first run, s", "peak GiB"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
