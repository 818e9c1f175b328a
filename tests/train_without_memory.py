"""Train as chapter 04 does while memory "runs out" above some number of tokens; prints JSON. Run by test_out_of_memory.

python train_without_memory.py FOLDER
"""

import json
import sys

import unsloth  # noqa: F401  (before transformers)

# isort: split
import torch
from train_once import make_chapter_trainer
from transformers import AutoTokenizer

from helpers.memory import GIB
from helpers.out_of_memory import DoesNotFit, fit_into_memory
from helpers.smollm2 import prepare_smollm2


def train(folder, tokenizer, *, most, from_step=0):
    """Losses and the Fitting of a run in which more than `most` tokens at once do not fit, from a step on."""
    trainer = make_chapter_trainer(folder, tokenizer)

    def refuse(module, args, given):
        ids = given.get("input_ids", args[0] if args else None)
        if module.training and trainer.state.global_step >= from_step and ids.numel() > most:
            raise torch.OutOfMemoryError(f"no room for {ids.numel()} tokens")

    trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
    with fit_into_memory(trainer) as fitting:
        trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    norms = [entry["grad_norm"] for entry in trainer.state.log_history if "grad_norm" in entry]
    seen = dict(losses=losses, norms=norms, steps=trainer.state.global_step, splits=fitting.splits)
    return seen | dict(tokens_at_once=fitting.tokens_at_once, rehearsed_gib=fitting.rehearsal.peak_reserved_gib)


def main(folder):
    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    saw = {"whole": train(folder, tokenizer, most=GIB), "split": train(folder, tokenizer, most=150)}
    saw["late"] = train(folder, tokenizer, most=150, from_step=3)
    try:
        train(folder, tokenizer, most=10)
    except DoesNotFit as error:
        saw["refused"] = str(error)
    print("\n" + json.dumps(saw))


if __name__ == "__main__":
    main(sys.argv[1])
