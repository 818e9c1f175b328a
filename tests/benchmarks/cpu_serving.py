"""A GGUF file on the CPU, Llama 3.2's shapes: seconds to convert and quantise it, then tokens a second of llama-server.

    python tests/benchmarks/cpu_serving.py [--shapes 1B 3B] [--tokens 64] [--out FILE]

The weights are random and made here, the tokenizer is SmolLM2's (`make model`), llama.cpp is the one that
`make llama-cpp` builds. The prompt has 256 tokens; one question at a time, as `serve_gguf` serves. The first reply
warms up; of three more the median counts. Needs 16 GB of memory for the 3B, and twice its size on the disk.
"""

import argparse
import contextlib
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import httpx

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "benchmarks")]

from in_turns import write_csv  # noqa: E402
from llama_shapes import llama_config  # noqa: E402

from helpers.export.gguf import cached_llama_cpp, serve_gguf  # noqa: E402
from tests.maintain.smollm2 import prepare_smollm2  # noqa: E402

PROMPT_TOKENS, ROUNDS, PROMPTS, KIND = 256, 3, 40, "q4_k_m"
COLUMNS = ("shape", "kind", "size_gib", "convert_s", "quantise_s", "first_token_s", "tokens_a_second", "cores")


def save_model(shape: str, folder: pathlib.Path) -> None:
    """A model of random 16-bit weights with SmolLM2's tokenizer; the ids that this lacks have no text."""
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(llama_config(shape))
    torch.set_default_dtype(torch.float32)
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(prepare_smollm2()).save_pretrained(folder)


def measure(shape: str, folder: pathlib.Path, *, tokens: int) -> dict:
    save_model(shape, folder / "model")
    llama_cpp, whole, small = cached_llama_cpp(), folder / "whole.gguf", folder / f"{KIND}.gguf"
    convert = [sys.executable, llama_cpp / "convert_hf_to_gguf.py", folder / "model", "--outtype", "bf16"]
    convert_s = seconds_of([*convert, "--outfile", whole])
    quantise_s = seconds_of([llama_cpp / "llama-quantize", whole, small, KIND])
    whole.unlink()
    seen = []
    with serve_gguf(small, context_tokens=2 * (PROMPT_TOKENS + tokens)) as server:
        # A reply of random tokens may be no UTF-8, which the server answers with 500: then the next prompt is asked.
        for number in range(PROMPTS):
            # Another beginning each time, or the server would know the prompt from the time before.
            prompt = [1000 + number, *(1000 + 7 * place % 20_000 for place in range(PROMPT_TOKENS - 1))]
            asked = dict(prompt=prompt, n_predict=tokens, temperature=0, ignore_eos=True, cache_prompt=False)
            with contextlib.suppress(httpx.HTTPStatusError):
                seen.append(server.post("/completion", asked)["timings"])
            if len(seen) > ROUNDS:
                break
        else:
            raise SystemExit(f"{shape}: {len(seen)} of {PROMPTS} prompts were answered, {ROUNDS + 1} are needed")
    return {
        "shape": shape,
        "kind": KIND,
        "size_gib": small.stat().st_size / 2**30,
        "convert_s": convert_s,
        "quantise_s": quantise_s,
        "first_token_s": statistics.median(each["prompt_ms"] for each in seen[1:]) / 1000,
        "tokens_a_second": statistics.median(each["predicted_per_second"] for each in seen[1:]),
        "cores": os.cpu_count(),
    }


def seconds_of(command: list) -> float:
    start = time.perf_counter()
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(done.stdout[-1000:])
    return time.perf_counter() - start


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", default=["1B", "3B"])
    parser.add_argument("--tokens", type=int, default=64)
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("cpu_serving.csv"))
    options = parser.parse_args()
    rows = []
    for shape in options.shapes:
        with tempfile.TemporaryDirectory() as folder:
            rows.append(measure(shape, pathlib.Path(folder), tokens=options.tokens))
        print({name: round(value, 2) if isinstance(value, float) else value for name, value in rows[-1].items()})
        write_csv(options.out, rows, dict(zip(COLUMNS, COLUMNS, strict=True)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
