"""Tokens per second on a GPU: Unsloth's inference mode against plain Transformers, Llama 3.2's 1B and 3B shapes.

    python benchmarks/inference.py [--shapes 1B 3B] [--batches 1 8] [--tokens 128]

The weights are random and made here (speed does not depend on them), so nothing is downloaded. Each row is measured in
a process of its own, after one warm-up; a prompt has 256 tokens, decoding is greedy, and no end token stops it.
"""

import argparse
import json
import os
import pathlib
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

PROMPT_TOKENS = 256
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2, num_attention_heads=8, head_dim=32),
    "1B": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32, head_dim=64),
    "3B": dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128),
}


def make_model(shape: str, folder: str) -> None:
    """Save a model of Llama 3.2's shape with random bfloat16 weights, and a tokenizer."""
    import torch
    from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM

    from helpers.smollm2 import prepare_smollm2

    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    config = LlamaConfig(
        **SHAPES[shape],
        num_key_value_heads=8,
        vocab_size=128_256,
        tie_word_embeddings=True,
        max_position_embeddings=131_072,
        rope_parameters={"rope_type": "default", "rope_theta": 500_000.0},
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    torch.set_default_dtype(torch.bfloat16)
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure(folder: str, library: str, batch: int, tokens: int) -> dict:
    """Load, warm up, and time one generation; peak memory is the allocator's."""
    if library.startswith("Unsloth"):
        from unsloth import FastLanguageModel

        model, _ = FastLanguageModel.from_pretrained(
            folder, max_seq_length=1024, dtype=None, load_in_4bit=library.endswith("4-bit")
        )
        FastLanguageModel.for_inference(model)
    else:
        import torch
        from transformers import AutoModelForCausalLM, BitsAndBytesConfig

        options = dict(dtype=torch.bfloat16, device_map="auto")
        if library.endswith("4-bit"):
            options["quantization_config"] = BitsAndBytesConfig(
                load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16
            )
        model = AutoModelForCausalLM.from_pretrained(folder, **options).eval()
    import torch

    torch.manual_seed(0)
    ids = torch.randint(1000, 40_000, (batch, PROMPT_TOKENS), device=model.device)
    prompt = dict(input_ids=ids, attention_mask=torch.ones_like(ids), pad_token_id=0, do_sample=False)
    gpu = torch.cuda.is_available()
    seconds = []
    for _ in range(3):  # the first one warms up
        start = time.perf_counter()
        with torch.inference_mode():
            output = model.generate(**prompt, min_new_tokens=tokens, max_new_tokens=tokens)
        if gpu:
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
    assert output.shape == (batch, PROMPT_TOKENS + tokens)
    peak = torch.cuda.max_memory_allocated() / 2**30 if gpu else 0.0
    return {"tokens_per_second": batch * tokens / min(seconds[1:]), "first_s": seconds[0], "peak_gib": peak}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B"], choices=SHAPES)
    parser.add_argument("--batches", nargs="+", default=[1, 8], type=int)
    parser.add_argument("--tokens", default=128, type=int)
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print("\n" + json.dumps(measure(**json.loads(options.one))))
        return 0
    from helpers.tables import text_table

    rows = []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            make_model(shape, folder)
            for batch in options.batches:
                for library in ("Transformers 16-bit", "Unsloth 16-bit", "Transformers 4-bit", "Unsloth 4-bit"):
                    job = {"folder": folder, "library": library, "batch": batch, "tokens": options.tokens}
                    command = [sys.executable, __file__, "--one", json.dumps(job)]
                    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ)
                    if done.returncode:
                        rows.append([shape, batch, library, "failed", done.stderr.strip().splitlines()[-1][:60], ""])
                        continue
                    said = json.loads(done.stdout.splitlines()[-1])
                    figures = [f"{said[key]:.1f}" for key in ("tokens_per_second", "first_s", "peak_gib")]
                    rows.append([shape, batch, library, *figures])
                    print(*rows[-1], flush=True)
    print("\n" + text_table(["shape", "batch", "library", "tokens/s", "first run, s", "peak GiB"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
