"""Breaks one thing in the libraries, in every Python process that has this folder on PYTHONPATH (`make faults`).

PLANTED_FAULT names the fault; `none` and `resumed` break nothing, and must go unnoticed. It is planted when `unsloth`
has been imported, because Unsloth replaces functions of the other libraries at that moment and would undo anything
earlier. Each fault writes its name to the file PLANTED_LOG when its broken code runs, so that a fault whose target is
never called cannot pass for one that was caught.
"""

import functools
import importlib.abc
import importlib.util
import os
import sys


def fires():
    with open(os.environ["PLANTED_LOG"], "a", encoding="utf-8") as log:
        log.write(os.environ["PLANTED_FAULT"] + "\n")


def wrap(owner, name, make):
    """Replace `owner.name` by `make(original)`; methods stay what they are, static or not."""
    original = getattr(owner, name)
    changed = functools.wraps(original)(make(original))
    static = isinstance(owner, type) and isinstance(owner.__dict__.get(name), staticmethod)
    setattr(owner, name, staticmethod(changed) if static else changed)


def after_settings(change):
    """Change the trainer's settings once they are complete."""
    from transformers import TrainingArguments

    def make(original):
        def post_init(self):
            original(self)
            change(self)
            fires()

        return post_init

    wrap(TrainingArguments, "__post_init__", make)


def learning_rate(factor):
    def change(settings):
        settings.learning_rate *= factor

    after_settings(change)


def truncation():
    def change(settings):
        settings.max_length = 64

    after_settings(change)


def markers(change):
    """Another mask: `change(tokenizer, labels)` returns the labels of a row."""
    import unsloth.chat_templates as module

    def make(original):
        def train_on_responses_only(trainer, *args, **kwargs):
            result = original(trainer, *args, **kwargs)
            if trainer is None:
                return result
            for name in ("train_dataset", "eval_dataset"):
                rows = getattr(result, name)
                setattr(result, name, rows.map(lambda row: {"labels": change(row["input_ids"], row["labels"])}))
            fires()
            return result

        return train_on_responses_only

    wrap(module, "train_on_responses_only", make)


def wrong_marker():
    import unsloth.chat_templates as module

    def make(original):
        def train_on_responses_only(trainer, *args, **kwargs):
            fires()
            return original(trainer, *args, **{**kwargs, "response_part": kwargs["response_part"].rstrip("\n")})

        return train_on_responses_only

    wrap(module, "train_on_responses_only", make)


def question_trained():
    def change(input_ids, labels):
        return list(input_ids)

    markers(change)


def end_not_trained():
    def change(input_ids, labels):
        last = max(i for i, label in enumerate(labels) if label != -100)  # the end token: what follows it is masked
        return [label if i != last else -100 for i, label in enumerate(labels)]

    markers(change)


def tokenizers(change):
    """Change every tokenizer that is loaded."""
    from transformers import AutoTokenizer

    original = AutoTokenizer.from_pretrained.__func__

    def from_pretrained(cls, *args, **kwargs):
        tokenizer = original(cls, *args, **kwargs)
        change(tokenizer)
        fires()
        return tokenizer

    AutoTokenizer.from_pretrained = classmethod(from_pretrained)


def template_swapped():
    template = (
        "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}{{ eos_token }}\n{% endfor %}"
        "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
    )

    def change(tokenizer):
        tokenizer.chat_template = template

    tokenizers(change)


def pad_is_eos():
    def change(tokenizer):
        tokenizer.pad_token = tokenizer.eos_token

    tokenizers(change)


def template_not_saved():
    from transformers import PreTrainedTokenizerBase

    def make(original):
        def save_pretrained(self, *args, **kwargs):
            template, self.chat_template = self.chat_template, None
            try:
                fires()
                return original(self, *args, **kwargs)
            finally:
                self.chat_template = template

        return save_pretrained

    wrap(PreTrainedTokenizerBase, "save_pretrained", make)


def peft_models(change):
    """Change what `get_peft_model` returns."""
    from unsloth import FastLanguageModel

    def make(original):
        def get_peft_model(model, *args, **kwargs):
            fires()
            return change(original, model, args, kwargs)

        return get_peft_model

    wrap(FastLanguageModel, "get_peft_model", make)


def no_lora():
    peft_models(lambda original, model, args, kwargs: model)


def fewer_modules():
    """The feed-forward modules are left out, whatever was asked for."""

    def change(original, model, args, kwargs):
        return original(model, *args, **{**kwargs, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"]})

    peft_models(change)


def lora_seed_ignored():
    def change(original, model, args, kwargs):
        return original(model, *args, **{**kwargs, "random_state": any_seed()})

    peft_models(change)


def a_frozen():
    """Only the matrices B are trained. Planted when training begins: counting before it sees nothing."""

    def change(model):
        for name, parameter in model.named_parameters():
            if "lora_A" in name:
                parameter.requires_grad_(False)

    when_training(change)


def half_frozen():
    def change(model):
        adapters = [parameter for name, parameter in model.named_parameters() if "lora_" in name]
        for parameter in adapters[: len(adapters) // 2]:
            parameter.requires_grad_(False)

    when_training(change)


def embedding_trained():
    def change(model):
        model.get_input_embeddings().weight.requires_grad_(True)

    when_training(change)


def when_training(change):
    from transformers import Trainer

    def make(original):
        def create_optimizer(self, *args, **kwargs):
            change(self.model)
            fires()
            return original(self, *args, **kwargs)

        return create_optimizer

    wrap(Trainer, "create_optimizer", make)


def labels_shifted():
    import torch
    from transformers import Trainer

    def make(original):
        def prepare(self, inputs):
            inputs = original(self, inputs)
            inputs["labels"] = torch.roll(inputs["labels"], -1, dims=-1)
            fires()
            return inputs

        return prepare

    wrap(Trainer, "_prepare_inputs", make)


def data_order():
    from torch.utils.data import SequentialSampler
    from transformers import Trainer

    def make(original):
        def sampler(self, train_dataset=None):
            fires()
            return SequentialSampler(train_dataset if train_dataset is not None else self.train_dataset)

        return sampler

    wrap(Trainer, "_get_train_sampler", make)


def any_seed():
    return int.from_bytes(os.urandom(3), "big")


def seed_ignored():
    def change(settings):
        settings.seed = any_seed()

    after_settings(change)


def loaded_models(change_arguments=None, change_model=None):
    from unsloth import FastLanguageModel

    def make(original):
        def from_pretrained(*args, **kwargs):
            if change_arguments:
                kwargs = {**kwargs, **change_arguments}
                fires()
            model, tokenizer = original(*args, **kwargs)
            if change_model:
                change_model(model)
            return model, tokenizer

        return from_pretrained

    wrap(FastLanguageModel, "from_pretrained", make)


def four_bit_off():
    loaded_models({"load_in_4bit": False})


def adapter_not_loaded():
    def change(model):
        if hasattr(model, "peft_config"):
            blank(model)
            fires()

    loaded_models(change_model=change)


def blank(model):
    """Put zeros into the matrices B, as if the adapter were new; returns what was there."""
    import torch

    kept = {name: p.detach().clone() for name, p in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name in kept:
                parameter.zero_()
    return kept


def saves_the_base(method):
    """The base model's weights are written instead of the tuned ones."""

    def change(model):
        import torch

        original = getattr(model, method, None)
        if original is None:
            return

        def save(*args, **kwargs):
            kept = blank(model)
            fires()
            try:
                return original(*args, **kwargs)
            finally:
                with torch.no_grad():
                    for name, parameter in model.named_parameters():
                        if name in kept:
                            parameter.copy_(kept[name])

        setattr(model, method, save)

    loaded_models(change_model=change)


def interrupted():
    """Not a fault but the way to one: somebody presses Stop in the fifth step."""
    import signal

    from transformers import Trainer

    def make(original):
        def training_step(self, *args, **kwargs):
            if self.state.global_step == 4:
                fires()
                os.kill(os.getpid(), signal.SIGINT)
            return original(self, *args, **kwargs)

        return training_step

    wrap(Trainer, "training_step", make)


def checkpoint_not_resumed():
    from transformers import Trainer

    def make(original):
        def train(self, resume_from_checkpoint=None, *args, **kwargs):
            if resume_from_checkpoint:
                fires()
            return original(self, None, *args, **kwargs)

        return train

    wrap(Trainer, "train", make)


def silent(name):
    """A fault of the module beside this one."""

    def plant():
        import silent as faults

        getattr(faults, name)()

    return plant


SILENT = (
    "collator_relabels labels_of_another_row ends_untrained_in_multi_turn held_out_trained evaluated_on_training "
    "half_of_the_rows constant_schedule adapter_of_half_the_steps ids_swapped flat_answer_key layers_not_loaded "
    "half_scale another_base"
).split()
FAULTS = {
    "none": fires,
    "resumed": fires,
    "wrong_marker": wrong_marker,
    "question_trained": question_trained,
    "end_not_trained": end_not_trained,
    "template_swapped": template_swapped,
    "pad_is_eos": pad_is_eos,
    "template_not_saved": template_not_saved,
    "no_lora": no_lora,
    "fewer_modules": fewer_modules,
    "lora_seed_ignored": lora_seed_ignored,
    "four_bit_off": four_bit_off,
    "learning_rate_x100": lambda: learning_rate(100),
    "learning_rate_x0.01": lambda: learning_rate(0.01),
    "truncation_64": truncation,
    "labels_shifted": labels_shifted,
    "data_order": data_order,
    "seed_ignored": seed_ignored,
    "a_frozen": a_frozen,
    "half_frozen": half_frozen,
    "embedding_trained": embedding_trained,
    "adapter_not_loaded": adapter_not_loaded,
    "merged_of_the_base": lambda: saves_the_base("save_pretrained_merged"),
    "gguf_of_the_base": lambda: saves_the_base("save_pretrained_gguf"),
    "interrupted": interrupted,
    "checkpoint_not_resumed": checkpoint_not_resumed,
    **{name: silent(name) for name in SILENT},
}


class PlantAfterUnsloth(importlib.abc.MetaPathFinder):
    """Lets `unsloth` be imported as ever, and plants the fault when that is done."""

    def find_spec(self, name, path=None, target=None):
        if name != "unsloth":
            return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        execute = spec.loader.exec_module

        def execute_and_plant(module):
            execute(module)
            FAULTS[os.environ["PLANTED_FAULT"]]()

        spec.loader.exec_module = execute_and_plant
        return spec


if os.environ.get("PLANTED_FAULT"):
    sys.meta_path.insert(0, PlantAfterUnsloth())
