"""How fast the checks are: the masks of 10,000 rows of 512 tokens, and 100,000 short conversations.

    python tests/benchmarks/check_speed.py

Prints the seconds, on one core, and the most memory that this process ever held (the rows lie in a file, as those of
`datasets` do); exits with 1 where a limit is passed. The tokenizer is SmolLM2's, the masks are Unsloth's.
"""

import argparse
import os
import pathlib
import random
import resource
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

ROWS, TOKENS, MASK_LIMIT_S, MEMORY_LIMIT_GIB = 10_000, 512, 10.0, 1.0
CONVERSATIONS, CONVERSATIONS_LIMIT_S = 100_000, 20.0
WORDS = "the time people way day man thing world life hand part child eye woman place work week case point".split()


def make_rows(folder: str) -> None:
    """Save rows of exactly `TOKENS` tokens, three questions and answers each, masked by Unsloth."""
    import datasets
    from transformers import AutoTokenizer
    from unsloth.chat_templates import train_on_responses_only

    from helpers.template.check import training_text
    from tests.maintain.smollm2 import prepare_smollm2

    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    mask = train_on_responses_only(
        None,
        tokenizer=tokenizer,
        instruction_part="<|im_start|>user\n",
        response_part="<|im_start|>assistant\n",
        return_function=True,
    )
    rng = random.Random(0)

    def talk(last: int) -> list[dict]:
        lengths = [rng.randint(20, 60) for _ in range(5)] + [last]
        roles = ("user", "assistant") * 3
        texts = [" ".join(rng.choices(WORDS, k=length)) for length in lengths]
        return [{"role": role, "content": text} for role, text in zip(roles, texts, strict=True)]

    def tokenize(talks: list[list[dict]]) -> list[list[int]]:
        return tokenizer([training_text(tokenizer, talk) for talk in talks]).input_ids

    talks = [talk(1) for _ in range(ROWS)]
    for each, ids in zip(talks, tokenize(talks), strict=True):  # each word is a token: fill up the last answer
        each[-1]["content"] += "".join(f" {word}" for word in rng.choices(WORDS, k=TOKENS - len(ids)))
    ids = tokenize(talks)
    assert {len(row) for row in ids} == {TOKENS}
    dataset = datasets.Dataset.from_dict({"input_ids": ids})
    dataset.map(mask, batched=True).save_to_disk(folder)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", help=argparse.SUPPRESS)  # a folder: make them, in a process of their own
    if folder := parser.parse_args().rows:
        make_rows(folder)
        return 0
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})  # one core, whatever numpy and Arrow would like
    import datasets
    from transformers import AutoTokenizer

    from helpers.conversations import validate_conversations
    from helpers.masking.check import check_masking
    from tests.maintain.smollm2 import prepare_smollm2

    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, __file__, "--rows", folder], check=True, stdout=subprocess.DEVNULL)
        dataset = datasets.load_from_disk(folder)
        tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
        before = time.perf_counter()
        report = check_masking(dataset, tokenizer=tokenizer)
        mask_s = time.perf_counter() - before
        peak_gib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20  # Linux counts KiB
        assert report.ok and report.rows == ROWS, report

        talks = [
            [{"from": "human", "value": f"How do I open door {i}?"}, {"from": "gpt", "value": f"Turn key {i}. " * 4}]
            for i in range(CONVERSATIONS)
        ]
        conversations = datasets.Dataset.from_dict({"conversations": talks})
        before = time.perf_counter()
        validated = validate_conversations(conversations, tokenizer=tokenizer)
        validate_s = time.perf_counter() - before
        assert validated.ok and validated.rows == CONVERSATIONS, validated

    print(f"masks of {ROWS:,} rows of {TOKENS} tokens: {mask_s:.1f} s (limit {MASK_LIMIT_S:.0f} s)")
    print(f"memory of the process at its peak: {peak_gib:.2f} GiB (limit {MEMORY_LIMIT_GIB:.0f} GiB)")
    print(f"{CONVERSATIONS:,} conversations: {validate_s:.1f} s (limit {CONVERSATIONS_LIMIT_S:.0f} s)")
    return int(mask_s > MASK_LIMIT_S or peak_gib > MEMORY_LIMIT_GIB or validate_s > CONVERSATIONS_LIMIT_S)


if __name__ == "__main__":
    sys.exit(main())
