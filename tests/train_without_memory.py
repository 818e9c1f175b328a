"""Train as chapter 04 does while memory "runs out" above some number of tokens; prints JSON. Run by test_fit.

python train_without_memory.py FOLDER
"""

import contextlib
import gc
import json
import sys

import unsloth  # noqa: F401  (before transformers)

# isort: split
import torch
from train_once import digest_of, make_chapter_trainer
from transformers import AutoTokenizer
from transformers.modeling_layers import GradientCheckpointingLayer

from helpers.memory.fit import DoesNotFit, fit_into_memory, undo_emulated_bfloat16
from helpers.memory.stats import GIB
from tests.maintain.smollm2 import prepare_smollm2


def train(folder, tokenizer, *, most, from_step=0, checkpointed_layers=None, most_spared=100):
    """Losses and the Fitting of a run in which more than `most` tokens at once do not fit, from a step on.

    `most=None`: a run outside `fit_into_memory`. `checkpointed_layers`: how many for so many tokens, of a model with
    gradient checkpointing, in which no more than `most_spared` fit without; what each micro-batch did is recorded.
    """
    trainer = make_chapter_trainer(folder, tokenizer, checkpointing=checkpointed_layers is not None)
    undo_emulated_bfloat16(trainer.model)  # as inside the block, so that the two can be compared
    layers = [module for module in trainer.model.modules() if isinstance(module, GradientCheckpointingLayer)]
    batches = []  # [tokens, [how often each layer was computed]]

    def refuse(module, args, given):
        ids = given.get("input_ids", args[0] if args else None)
        if trainer.state.global_step >= from_step and ids.numel() > most:
            raise torch.OutOfMemoryError(f"no room for {ids.numel()} tokens")
        spared = sum(not layer.gradient_checkpointing for layer in layers)
        if checkpointed_layers is not None and module.training and spared > most_spared:
            raise torch.OutOfMemoryError(f"no room for what {spared} layers keep")
        if module.training:
            batches.append([ids.numel(), [0] * len(layers)])

    def count(number):
        def add(module, args):
            if trainer.model.training:
                batches[-1][1][number] += 1

        return add

    if most is not None:
        trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
        for number, layer in enumerate(layers):
            layer.mlp.down_proj.lora_A.default.register_forward_pre_hook(count(number))
    fit = contextlib.nullcontext() if most is None else fit_into_memory(trainer, checkpointed_layers)
    with fit as fitting:
        trainer.train()
    log = trainer.state.log_history
    names = dict(losses="loss", norms="grad_norm", held_out="eval_loss")
    seen = {key: [entry[name] for entry in log if name in entry] for key, name in names.items()}
    seen |= dict(steps=trainer.state.global_step, weights=digest_of(trainer.model))
    if fitting is not None:
        seen |= dict(splits=fitting.splits, tokens_at_once=fitting.tokens_at_once)
        seen |= dict(rehearsed_gib=fitting.rehearsal.peak_reserved_gib, all_checkpointed=fitting.all_checkpointed)
        seen |= dict(batches=batches, flags=[bool(layer.gradient_checkpointing) for layer in layers])
    return seen


def main(folder):
    gc.freeze()  # as chapter 04
    tokenizer = AutoTokenizer.from_pretrained(prepare_smollm2())
    saw = {"alone": train(folder, tokenizer, most=None), "whole": train(folder, tokenizer, most=GIB)}
    saw["split"] = train(folder, tokenizer, most=150)
    saw["late"] = train(folder, tokenizer, most=150, from_step=2)
    as_needed = dict(most=GIB, checkpointed_layers=lambda tokens: 4 if tokens > 150 else 1)
    saw["as needed"] = train(folder, tokenizer, **as_needed)
    saw["too few"] = train(folder, tokenizer, **as_needed, most_spared=3)
    try:
        train(folder, tokenizer, most=10)
    except DoesNotFit as error:
        saw["refused"] = str(error)
    print("\n" + json.dumps(saw))


if __name__ == "__main__":
    main(f"{sys.argv[1]}/checkpoints")
