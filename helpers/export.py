"""Is what was saved the model that was trained? Ask it from a fresh process, which has nothing but the files."""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.errors import InputError

ROOT = Path(__file__).resolve().parent.parent


class ExportError(InputError):
    """A saved model does not load, or does not answer as the one that was saved."""


@dataclass(frozen=True)
class Agreement:
    """How many replies are the same text; `differing` holds (expected, found) of the others."""

    what: str
    same: int
    total: int
    differing: tuple[tuple[str, str], ...]

    def __repr__(self) -> str:
        lines = [f"{self.what}: {self.same} of {self.total} replies are the same"]
        for expected, found in self.differing[:2]:
            lines.append(f"  expected: {expected!r}\n  found:    {found!r}")
        return "\n".join(lines)


def compare_answers(what: str, expected: Sequence[str], found: Sequence[str]) -> Agreement:
    """Compare two lists of greedy replies to the same prompts.

    Example: compare_answers("merged", ["a", "b"], ["a", "c"]) -> merged: 1 of 2 replies are the same …
    """
    differing = tuple((a, b) for a, b in zip(expected, found, strict=True) if a != b)
    return Agreement(what, len(expected) - len(differing), len(expected), differing)


def ask_in_fresh_process(
    folder: str | Path,
    conversations: Sequence[Sequence[dict[str, str]]],
    *,
    library: str = "unsloth",
    load_in_4bit: bool = False,
    max_new_tokens: int = 96,
    timeout_seconds: float = 900,
) -> list[str]:
    """Load a saved model in a new Python process and answer each conversation greedily.

    Args:
        folder: what `save_pretrained` or `save_pretrained_merged` wrote.
        conversations: lists of {"role", "content"}, each ending with a user's turn.
        library: "unsloth" (also for an adapter) or "transformers" (a whole model, without Unsloth).

    Raises:
        ExportError: the process failed; its last words are in the message.
    """
    job = {"folder": str(folder), "conversations": list(conversations), "max_new_tokens": max_new_tokens}
    job |= {"library": library, "load_in_4bit": load_in_4bit}
    done = subprocess.run(
        [sys.executable, "-m", "helpers.export"],
        input=json.dumps(job),
        capture_output=True,
        text=True,
        cwd=ROOT,
        timeout=timeout_seconds,
        env={**os.environ, "PYTHONIOENCODING": "utf-8"},
    )
    if done.returncode:
        last_words = done.stderr.strip().splitlines()[-1:] or ["nothing"]
        fix = "save it again; the process's own message is quoted here"
        raise ExportError(str(folder), found=last_words[0], expected="a model that loads and answers", fix=fix)
    return json.loads(done.stdout.splitlines()[-1])


def hub_token() -> str:
    """The Hugging Face token, from the environment variable HF_TOKEN or Colab's secrets; it is never printed.

    Raises:
        ExportError: there is none.
    """
    token = os.environ.get("HF_TOKEN", "")
    if not token and "google.colab" in sys.modules:
        from google.colab import userdata

        token = userdata.get("HF_TOKEN")
    if not token:
        fix = "create one with write access in your Hub settings and store it there"
        raise ExportError("HF_TOKEN", found="no token", expected="one in the environment or Colab's secrets", fix=fix)
    return token


def _answer(job: dict) -> list[str]:
    """The fresh process's work: load, answer."""
    from helpers.chat import batch_replies

    if job["library"] == "unsloth":
        from unsloth import FastLanguageModel

        model, tokenizer = FastLanguageModel.from_pretrained(
            job["folder"], max_seq_length=2048, dtype=None, load_in_4bit=job["load_in_4bit"]
        )
        FastLanguageModel.for_inference(model)
    else:
        import torch
        from transformers import AutoModelForCausalLM, AutoTokenizer

        device = "cuda" if torch.cuda.is_available() else "cpu"
        model = AutoModelForCausalLM.from_pretrained(job["folder"], dtype="auto").to(device).eval()
        tokenizer = AutoTokenizer.from_pretrained(job["folder"])
    return batch_replies(model, tokenizer, job["conversations"], max_new_tokens=job["max_new_tokens"])


def main() -> None:
    argparse.ArgumentParser(description="Answer the conversations of a JSON job on standard input.").parse_args()
    print("\n" + json.dumps(_answer(json.load(sys.stdin))))


if __name__ == "__main__":
    main()
