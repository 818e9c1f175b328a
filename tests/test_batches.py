"""What reaches the loss is held against what was checked: real trainers, and for each claim one that must fail it."""

import json
import math
from types import SimpleNamespace

import pytest
from test_training import collate, small_model, small_rows, small_trainer

from helpers.masking.batches import Batches, label_key, row_key, rows_of, watch_batches
from helpers.masking.check import check_masking
from helpers.masking.rows import MaskingError
from helpers.memory.fit import fit_into_memory
from helpers.training.evidence import SAVED, SETTINGS, STOPPED, TRAINED, UNSEEN, check_evidence
from helpers.training.held_out import HeldOutLosses, held_out_losses
from helpers.training.loaded import same_adapter, same_loss, same_tokenizer


def batches_of(rows):
    keys = {}
    for row in rows:
        key = row_key(row["input_ids"])
        keys[key] = (label_key(row["labels"]), keys.get(key, (0, 0))[1] + 1)
    return Batches(keys)


def trainer_of(folder, **settings):
    """A small trainer whose held-out rows are none of those to train on."""
    trainer = small_trainer(folder, **settings)
    trainer.eval_dataset = small_rows(30)[20:]
    return trainer


def watched(trainer):
    batches = batches_of(trainer.train_dataset)
    trainer.add_callback(watch_batches(batches, trainer))
    return batches


@pytest.mark.parametrize("settings", [{}, {"max_steps": 20}, {"max_steps": 8}, {"gradient_accumulation_steps": 2}])
def test_every_row_of_a_good_run_is_counted(tmp_path, settings):
    """16 rows, 2 a batch: half a pass, two passes and a half, one whole pass, and two batches a step."""
    from datasets import Dataset

    trainer = trainer_of(tmp_path, eval_strategy="steps", eval_steps=2, **settings)
    trainer.train_dataset, trainer.eval_dataset = map(Dataset.from_list, (small_rows(16), small_rows(30)[20:]))
    batches = watched(trainer)
    with fit_into_memory(trainer):  # which rehearses the longest rows, that nobody counts
        trainer.train()
    rows = 2 * trainer.args.max_steps * trainer.args.gradient_accumulation_steps
    assert batches.holds and sum(batches.trained.values()) == rows
    times = "once" if rows <= 16 else f"{rows // 16} to {-(-rows // 16)} times"
    assert str(batches) == f"in this session {min(rows, 16)} of 16 rows, each {times}"
    assert not trainer.model._forward_pre_hooks


def test_the_same_row_twice_in_the_data_is_no_fault(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=8)
    trainer.train_dataset = small_rows(8) * 2
    batches = watched(trainer)
    trainer.train()
    assert batches.holds


def relabelled(rows):
    """A collator that trains the questions too."""
    return collate([{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows])


def without_ends(rows):
    return collate([{**row, "labels": [*row["labels"][:-1], -100]} for row in rows])


def of_another_row(rows):
    batch = collate(rows)
    return batch | {"labels": batch["labels"].flip(0)}


def with_another_row(rows):
    return collate([*rows[1:], {"input_ids": [7, 8, 9], "labels": [-100, 8, 9]}])


@pytest.mark.parametrize(
    ("collator", "said"),
    [
        (relabelled, "other labels than those that were checked"),
        (without_ends, "other labels than those that were checked"),
        (of_another_row, "other labels than those that were checked"),
        (with_another_row, "none of the rows that were checked"),
    ],
)
def test_a_batch_that_is_not_what_was_checked_stops_the_run(tmp_path, collator, said):
    trainer = trainer_of(tmp_path)
    trainer.data_collator = collator
    watched(trainer)
    with pytest.raises(MaskingError, match=f"step 1, the row that begins .*: found {said}"):
        trainer.train()


def test_labels_that_are_changed_behind_the_collator_stop_the_run(tmp_path):
    trainer = trainer_of(tmp_path)
    prepare = trainer._prepare_inputs
    trainer._prepare_inputs = lambda inputs: (found := prepare(inputs)) | {"labels": found["labels"].roll(-1, -1)}
    watched(trainer)
    with pytest.raises(MaskingError, match="other labels"):
        trainer.train()


def test_a_held_out_row_among_those_to_train_on_stops_the_run(tmp_path):
    trainer = trainer_of(tmp_path)
    trainer.eval_dataset = [*small_rows(30)[20:], trainer.train_dataset[5]]
    watched(trainer)
    with pytest.raises(MaskingError, match="row 10 of the held-out rows: found a row that is also trained on, as 1 of"):
        trainer.train()


@pytest.mark.parametrize(("steps", "passes"), [(11, 2), (12, 3)])
def test_rows_that_a_sampler_leaves_out_are_noticed(tmp_path, steps, passes):
    """In each pass that was completed, the last step's too."""
    trainer = trainer_of(tmp_path, max_steps=steps)
    trainer._get_train_sampler = lambda *rows: [*range(8)]
    batches = watched(trainer)
    trainer.train()
    assert batches.faults == ["a pass left 8 rows out"] * passes


def test_rows_that_a_sampler_repeats_are_noticed(tmp_path):
    trainer = trainer_of(tmp_path, max_steps=6)
    trainer._get_train_sampler = lambda *rows: [*range(6), *range(6), 6, 7, 8, 9]
    batches = watched(trainer)
    trainer.train()
    assert batches.faults == ["6 rows came twice in one pass"]


def test_conversations_end_to_end_are_taken_apart():
    import torch

    ids, labels = torch.tensor([[5, 6, 7, 8, 9]]), torch.tensor([[-100, 6, -100, 8, 9]])
    parts = [[5, 6], [7, 8, 9]]
    for more in ({"position_ids": torch.tensor([[0, 1, 0, 1, 2]])}, {"packed_seq_lengths": torch.tensor([2, 3])}):
        assert [ids.tolist() for ids, _ in rows_of({"input_ids": ids, "labels": labels, **more})] == parts
    padded = {"input_ids": torch.tensor([[5, 6, 0]]), "labels": torch.tensor([[-100, 6, -100]])}
    mask = {"attention_mask": torch.tensor([[1, 1, 0]])}
    assert [ids.tolist() for ids, _ in rows_of(padded | mask)] == [[5, 6]]
    assert label_key([5, 6, 7]) == label_key([-100, 6, 7]) != label_key([-100, -100, 7])


def test_a_mask_report_knows_the_rows_that_it_read(shared_tokenizer):
    tokenizer = shared_tokenizer("smollm2")
    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}]
    ids = tokenizer.apply_chat_template(talk, return_dict=True)["input_ids"]
    rows = [{"input_ids": ids, "labels": [-100, *ids[1:]]}] * 2
    report = check_masking(rows, tokenizer=tokenizer)
    assert report.keys == {row_key(ids): (label_key(ids), 2)}
    trainer = SimpleNamespace(callbacks=[], processing_class=tokenizer, model=small_model())
    trainer.add_callback = trainer.callbacks.append
    assert report.watch(trainer).counts == {row_key(ids): 2} and len(trainer.callbacks) == 1


# What the evidence makes of it


@pytest.fixture
def run(tmp_path):
    """(trainer, its batches, held-out losses before) of a good run on rows that are not held out."""
    trainer = trainer_of(tmp_path, max_steps=8)
    before = held_out_losses(trainer.model, trainer.eval_dataset)
    batches = watched(trainer)
    trainer.train()
    return trainer, batches, before


def failed(run, **more):
    trainer, batches, before = run
    given = {"before": before, "after": before, "learning_rate": 1e-2, "batches": batches} | more
    claims = {claim: seen for claim, seen, holds in check_evidence(trainer, **given).rows if not holds}
    return {name: claims[name] for name in (SETTINGS, TRAINED, UNSEEN, SAVED) if name in claims}


def test_a_good_run_fails_none_of_the_claims(run):
    settings = {"max_steps": 8, "per_device_train_batch_size": 2, "lr_scheduler_type": "linear"}
    assert failed(run, rows=16, settings=settings) == {}


def test_settings_that_are_not_in_force_are_named(run):
    chosen = {"max_steps": 16, "lr_scheduler_type": "constant"}
    said = "max_steps is 8, not 16; lr_scheduler_type is linear, not constant"
    assert failed(run, settings=chosen) == {SETTINGS: said}
    run[0].state.global_step = 4
    assert failed(run, settings={"max_steps": 8}) == {SETTINGS: "4 of 8 steps were made"}
    run[0].state.log_history.append({STOPPED: 4, "step": 4})  # as `keep_best` ends a run
    assert failed(run, settings={"max_steps": 8}) == {}


def test_half_of_the_rows_is_not_all(run):
    assert "16 rows in the trainer, 32 to train on" in failed(run, rows=32)[TRAINED]


def test_held_out_rows_among_those_trained_are_noticed(run):
    trainer, batches, before = run
    trainer.train_dataset = [*trainer.train_dataset, trainer.eval_dataset[3]]
    assert failed((trainer, batches, before)) == {UNSEEN: "1 of 10 are among the rows to train on"}


# What was saved, and what was loaded


@pytest.fixture
def saved(tmp_path):
    model = small_model()
    model.save_pretrained(tmp_path)
    return model, tmp_path


def test_a_saved_adapter_is_the_model_s(saved):
    assert same_adapter(*saved) == ("8 of 8 matrices", True)


def halve_the_layers(model):
    for name, parameter in model.named_parameters():
        if "lora_B" in name and "layers.1" in name:
            parameter.data.zero_()


def halve_the_scale(model):
    for module in model.modules():
        if isinstance(getattr(module, "scaling", None), dict):
            module.scaling["default"] /= 2


def train_on(model):
    next(parameter for name, parameter in model.named_parameters() if "lora_A" in name).data.add_(1e-3)


@pytest.mark.parametrize(
    ("harm", "seen"),
    [
        (halve_the_layers, "6 of 8 matrices"),
        (halve_the_scale, "8 of 8 matrices, scaled by 1 instead of 2"),
        (train_on, "7 of 8 matrices"),
    ],
)
def test_another_adapter_is_noticed(saved, harm, seen):
    model, folder = saved
    harm(model)
    assert same_adapter(model, folder) == (seen, False)


def test_a_model_without_the_adapter_is_noticed(saved):
    model, folder = saved
    assert same_adapter(model.unload(), folder) == ("0 of 8 matrices, scaled by nothing instead of 2", False)


def test_a_tokenizer_with_two_ids_swapped_is_noticed(shared_tokenizer, tmp_path):
    tokenizer = shared_tokenizer("smollm2")
    tokenizer.save_pretrained(tmp_path)
    assert same_tokenizer(tokenizer, tmp_path) == ("49,152 tokens, 0 with another id", True)
    file = tmp_path / "tokenizer.json"
    content = json.loads(file.read_text(encoding="utf-8"))
    vocabulary = content["model"]["vocab"]
    vocabulary["Ġcat"], vocabulary["Ġdog"] = vocabulary["Ġdog"], vocabulary["Ġcat"]
    file.write_text(json.dumps(content), encoding="utf-8")
    assert same_tokenizer(tokenizer, tmp_path) == ("49,152 tokens, 2 with another id", False)


@pytest.mark.parametrize(
    ("sums", "in_4bit", "holds"),
    [
        ((1.0, 3.0), True, True),
        ((1.2, 3.1), True, True),
        ((1.5, 3.1), True, False),
        ((1.5, 3.1), False, True),
        ((3.0, 4.5), False, False),
        ((math.nan, 3.0), False, False),
    ],
)
def test_another_held_out_loss_is_noticed(sums, in_4bit, holds):
    then = HeldOutLosses((1.0, 3.0), (2, 2))
    assert same_loss(HeldOutLosses(sums, (2, 2)), then, in_4bit=in_4bit)[1] is holds


def test_a_loss_of_other_answers_or_of_none_does_not_agree():
    now = HeldOutLosses((1.0, 3.0), (2, 2))
    assert same_loss(now, HeldOutLosses((1.0, 3.0), (2, 3)), in_4bit=True) == (
        "answers of 4 tokens, where chapter 04 had 5",
        False,
    )
    assert (
        same_loss(now, HeldOutLosses((None, 3.0), (2, 2)), in_4bit=True)[0]
        == "a loss that was not finite in chapter 04"
    )
