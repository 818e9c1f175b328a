"""Faults that change no output: what is trained, saved or loaded is not what the page says. See `sitecustomize`."""

import json
import pathlib

import sitecustomize as planted


def when_trained(change):
    """Change the trainer when `trainer.train` is called: after every check of its data set."""
    from transformers import Trainer

    def make(original):
        def train(self, *args, **kwargs):
            change(self)
            planted.fires()
            return original(self, *args, **kwargs)

        return train

    planted.wrap(Trainer, "train", make)


def collated(change):
    """Change each batch as it leaves the collator."""

    def change_trainer(trainer):
        collate = trainer.data_collator

        def changed(rows):
            batch = collate(rows)
            batch["labels"] = change(batch)
            return batch

        trainer.data_collator = changed

    when_trained(change_trainer)


def collator_relabels():
    def change(batch):
        return batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)

    collated(change)


def labels_of_another_row():
    collated(lambda batch: batch["labels"].flip(0))


def ends_untrained_in_multi_turn():
    def change(batch):
        labels = batch["labels"].clone()
        for row in labels:
            trained = row != -100
            ends = [i for i in range(len(row)) if trained[i] and (i + 1 == len(row) or not trained[i + 1])]
            if len(ends) > 1:
                row[ends] = -100
        return labels

    collated(change)


def trainers(change):
    """Change what an SFTTrainer is made of."""
    import trl

    def make(original):
        def init(self, *args, **kwargs):
            change(kwargs)
            planted.fires()
            return original(self, *args, **kwargs)

        return init

    planted.wrap(trl.SFTTrainer, "__init__", make)


def held_out_trained():
    def change(kwargs):
        from datasets import concatenate_datasets

        kwargs["train_dataset"] = concatenate_datasets([kwargs["train_dataset"], kwargs["eval_dataset"]])

    trainers(change)


def evaluated_on_training():
    def change(kwargs):
        kwargs["eval_dataset"] = kwargs["train_dataset"].select(range(len(kwargs["eval_dataset"])))

    trainers(change)


def half_of_the_rows():
    from torch.utils.data import SubsetRandomSampler
    from transformers import Trainer

    def make(original):
        def sampler(self, train_dataset=None):
            planted.fires()
            return SubsetRandomSampler(range(len(self.train_dataset) // 2))

        return sampler

    planted.wrap(Trainer, "_get_train_sampler", make)


def constant_schedule():
    from transformers import Trainer, get_scheduler

    def make(original):
        def create_scheduler(self, num_training_steps, optimizer=None):
            planted.fires()
            self.lr_scheduler = get_scheduler("constant", optimizer or self.optimizer)
            return self.lr_scheduler

        return create_scheduler

    planted.wrap(Trainer, "create_scheduler", make)


def adapter_of_half_the_steps():
    """What is handed on are the weights of the run's middle."""
    from peft import PeftModel
    from transformers import Trainer

    middle = {}

    def make_step(original):
        def training_step(self, model, *args, **kwargs):
            if self.state.global_step == self.state.max_steps // 2:
                middle.update({n: p.detach().clone() for n, p in model.named_parameters() if "lora_" in n})
            return original(self, model, *args, **kwargs)

        return training_step

    def make_save(original):
        def save_pretrained(self, folder, *args, **kwargs):
            if "/new/" not in str(folder):
                return original(self, folder, *args, **kwargs)
            last = {name: parameter.detach().clone() for name, parameter in self.named_parameters() if name in middle}
            put(self, middle)
            try:
                planted.fires()
                return original(self, folder, *args, **kwargs)
            finally:
                put(self, last)

        return save_pretrained

    planted.wrap(Trainer, "training_step", make_step)
    planted.wrap(PeftModel, "save_pretrained", make_save)


def put(model, weights):
    for name, parameter in model.named_parameters():
        if name in weights:
            parameter.data.copy_(weights[name])


def ids_swapped():
    """Two words change their ids in the saved tokenizer."""
    from transformers import PreTrainedTokenizerBase

    def make(original):
        def save_pretrained(self, folder, *args, **kwargs):
            saved = original(self, folder, *args, **kwargs)
            file = pathlib.Path(folder) / "tokenizer.json"
            content = json.loads(file.read_text(encoding="utf-8"))
            vocabulary = content["model"]["vocab"]
            vocabulary["Ġthe"], vocabulary["Ġand"] = vocabulary["Ġand"], vocabulary["Ġthe"]
            file.write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
            planted.fires()
            return saved

        return save_pretrained

    planted.wrap(PreTrainedTokenizerBase, "save_pretrained", make)


def flat_answer_key():
    """The words that a right answer holds, not one list of them an answer."""
    import datasets

    def make(original):
        def load_from_disk(*args, **kwargs):
            parts = original(*args, **kwargs)
            planted.fires()
            words = {name: [row[-1] for row in part["right_help"]] for name, part in parts.items()}
            for name, part in parts.items():
                parts[name] = part.remove_columns("right_help").add_column("right_help", words[name])
            return parts

        return load_from_disk

    # The method, because chapter 04 has imported the function `load_from_disk` when this is planted.
    planted.wrap(datasets.DatasetDict, "load_from_disk", make)


def layers_not_loaded():
    """The adapter's upper half is missing."""

    def change(model):
        half = model.config.num_hidden_layers // 2
        for name, parameter in model.named_parameters():
            if "lora_B" in name and int(name.partition(".layers.")[2].partition(".")[0]) >= half:
                parameter.data.zero_()
                planted.fires()

    planted.loaded_models(change_model=change)


def half_scale():
    def change(model):
        for module in model.modules():
            if isinstance(getattr(module, "scaling", None), dict):
                module.scaling = {name: scale / 2 for name, scale in module.scaling.items()}
                planted.fires()

    planted.loaded_models(change_model=change)


def another_base():
    """Nothing is planted: the harness chooses a folder of the same name, whose weights are 3 % off."""
    planted.fires()
