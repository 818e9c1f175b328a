"""A run that goes on when memory runs out: nothing that it computes changes."""

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from test_training import small_rows, small_trainer

from helpers.memory.fit import DoesNotFit, _rehearse, fit_into_memory, longest
from helpers.memory.stats import track_memory

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
LOGGED = ("step", "loss", "grad_norm", "eval_loss", "num_tokens", "mean_token_accuracy", "entropy")


def plain_trainer(folder, *, most, when=lambda model: model.training, **settings):
    """A small model and Transformers' own trainer, in which more than `most` tokens at once do not fit."""
    import torch
    from datasets import Dataset
    from transformers import set_seed

    set_seed(1)
    trainer = small_trainer(folder, per_device_train_batch_size=4, **settings)
    trainer.train_dataset, trainer.eval_dataset = (Dataset.from_list(rows) for rows in (small_rows(16), small_rows(4)))

    def refuse(model, args, given):
        if when(model) and given["input_ids"].numel() > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    trainer.model.register_forward_pre_hook(refuse, with_kwargs=True)
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def test_halves_add_up_to_the_same_step(tmp_path):
    whole, split = plain_trainer(tmp_path, most=1000), plain_trainer(tmp_path, most=50)
    for trainer, splits in ((whole, False), (split, True)):
        with fit_into_memory(trainer) as fitting:
            trainer.train()
        assert bool(fitting.splits) == splits and (fitting.tokens_at_once is None) != splits
        assert fitting.rehearsal.seconds > 0
    assert losses_of(split) == pytest.approx(losses_of(whole), rel=1e-3)


def test_a_trainer_that_does_not_count_its_tokens_is_refused_not_split(tmp_path):
    trainer = plain_trainer(tmp_path, most=50)
    trainer.model_accepts_loss_kwargs = False
    with pytest.raises(DoesNotFit, match="does not count the answer tokens of a step"), fit_into_memory(trainer):
        trainer.train()
    assert trainer.state.global_step == 0


def test_such_a_trainer_trains_where_everything_fits(tmp_path):
    trainer = plain_trainer(tmp_path, most=1000)
    trainer.model_accepts_loss_kwargs = False
    with fit_into_memory(trainer) as fitting:
        trainer.train()
    assert trainer.state.global_step == 4 and not fitting.splits


def held_out_of(trainer):
    return [entry["eval_loss"] for entry in trainer.state.log_history if "eval_loss" in entry]


EVALUATING = dict(eval_strategy="steps", eval_steps=2, per_device_eval_batch_size=3)


@pytest.mark.parametrize("late", [False, True])
def test_an_evaluation_that_does_not_fit_is_split_and_has_the_same_loss(tmp_path, capsys, late):
    """In the rehearsal, or later: then the optimiser's averages take room too."""
    steps = []
    when = lambda model: not model.training and (not late or bool(steps))  # noqa: E731
    whole, split = (plain_trainer(tmp_path, most=most, when=when, **EVALUATING) for most in (1000, 30))
    for trainer in (whole, split):
        steps.clear()
        trainer.optimizer_step_ended = trainer.callback_handler.on_step_end
        trainer.callback_handler.on_step_end = lambda *given, t=trainer: (
            steps.append(1) or t.optimizer_step_ended(*given)
        )
        # One row of a batch without labels: its part has no mean loss.
        rows = [dict(row, labels=[-100] * len(row["labels"])) if n == 1 else row for n, row in enumerate(small_rows(4))]
        trainer.eval_dataset = trainer.eval_dataset.from_list(rows)
        with fit_into_memory(trainer) as fitting:
            trainer.train()
    assert len(held_out_of(split)) == 2 and held_out_of(split) == pytest.approx(held_out_of(whole), rel=1e-5)
    assert losses_of(split) == losses_of(whole)
    assert fitting.evaluated_at_once <= 30 and fitting.tokens_at_once is None
    assert split.args.per_device_eval_batch_size == 3
    assert capsys.readouterr().out.count("Memory ran out in the evaluation") <= 2
    assert "prediction_step" not in vars(split)


def test_an_evaluation_that_cannot_be_split_is_refused(tmp_path):
    asked = dict(when=lambda model: not model.training)
    trainer = plain_trainer(tmp_path, most=5, **asked, **EVALUATING)
    with pytest.raises(DoesNotFit, match="not enough memory to evaluate it alone"), fit_into_memory(trainer):
        trainer.train()
    trainer = plain_trainer(tmp_path, most=30, **asked, **EVALUATING)
    trainer.compute_metrics = lambda predictions: {}
    with pytest.raises(DoesNotFit, match="smaller per_device_eval_batch_size"), fit_into_memory(trainer):
        trainer.evaluate()


def test_other_errors_of_an_evaluation_are_passed_on(tmp_path):
    trainer = plain_trainer(tmp_path, most=1000)
    trainer.eval_dataset = trainer.eval_dataset.map(lambda row: {"input_ids": [1000] * len(row["input_ids"])})
    with pytest.raises(IndexError), fit_into_memory(trainer):
        trainer.evaluate()


def test_the_rehearsal_changes_nothing(tmp_path):
    """Weights and losses are those of a run outside `fit_into_memory`, to the bit; dropout draws in each step."""
    import torch
    from train_once import digest_of, make_trainer, small_tokenizer

    seen, tokenizer = [], small_tokenizer()
    for name in ("rehearsed", "alone"):
        trainer = make_trainer(tmp_path / name, tokenizer, max_steps=3, eval_steps=2)
        torch.manual_seed(5)
        with fit_into_memory(trainer) if name == "rehearsed" else contextlib.nullcontext() as fitting:
            trainer.train()
        assert fitting is None or fitting.rehearsal.seconds > 0
        log = [{name: entry[name] for name in entry if name in LOGGED} for entry in trainer.state.log_history]
        seen.append((digest_of(trainer.model), log))
    assert seen[0] == seen[1]
    assert set(LOGGED) == {name for entry in seen[0][1] for name in entry}


def test_the_rehearsed_batch_is_on_the_device_before_its_tokens_are_counted():
    """Over NCCL what is on the processor cannot be counted up; the device here is one that every computer has."""
    import torch
    from datasets import Dataset

    counted = []

    def count(batches, *_):
        counted.extend(batches)
        return counted, None

    args = SimpleNamespace(device=torch.device("meta"), per_device_train_batch_size=2, eval_strategy="no")
    model = torch.nn.Linear(1, 1)
    trainer = SimpleNamespace(args=args, model_wrapped=model, eval_dataset=None, get_batch_samples=count)
    trainer.train_dataset = Dataset.from_dict({"input_ids": [[1, 2, 3], [4, 5, 6]]})
    trainer.data_collator = lambda rows: {"input_ids": torch.tensor([row["input_ids"] for row in rows])}
    trainer.training_step = lambda *_: None
    _rehearse(SimpleNamespace(trainer=trainer, peaks_beyond=lambda tokens: True))
    assert [batch["input_ids"].device.type for batch in counted] == ["meta"]


@pytest.mark.parametrize(
    ("count", "most", "padded", "expected"),
    [
        (8, 1000, False, [50, 40, 30, 20, 10]),
        (3, 1000, False, [50, 40, 30]),
        (8, 100, False, [50, 40, 10]),  # what would be too much is passed over
        (8, 100, True, [50, 40]),  # each as wide as the longest
        (8, 20, False, [50]),  # the longest in any case
    ],
)
def test_the_longest_rows_are_rehearsed_as_far_as_nothing_needs_checkpointing(count, most, padded, expected):
    from datasets import Dataset

    rows = Dataset.from_list([{"input_ids": [1] * length} for length in (30, 10, 50, 20, 40)])
    chosen = longest(rows, count, lambda tokens: tokens <= most, padded=padded)
    assert [len(row["input_ids"]) for row in chosen] == expected


def test_where_nothing_is_trained_the_rehearsal_and_the_first_step_took_no_time(tmp_path):
    with fit_into_memory(plain_trainer(tmp_path, most=1000)) as fitting:
        pass  # as where a complete run is loaded
    assert "rehearsal of the longest: 0.0 s" in repr(fitting.rehearsal) and "first step: 0.0 s" in repr(
        fitting.first_step
    )


def test_the_first_step_of_a_session_is_measured_alone(tmp_path):
    trainer = plain_trainer(tmp_path, most=1000, max_steps=4)
    with track_memory("training") as training, fit_into_memory(trainer) as fitting:
        trainer.train()
    assert trainer.state.global_step == 4 and fitting.first_step.label == "first step"
    assert 0 < fitting.first_step.seconds < training.seconds - fitting.rehearsal.seconds
    assert 0 < fitting.first_step.peak_reserved_gib <= training.peak_reserved_gib


def test_a_first_step_that_fails_is_measured_to_its_end(tmp_path):
    trainer = plain_trainer(tmp_path, most=1000)
    trainer.model.register_forward_pre_hook(lambda *_: broken() if fitting.rehearsal.seconds else None)

    def broken():
        raise ValueError("a bad row")

    with pytest.raises(ValueError, match="a bad row"), fit_into_memory(trainer) as fitting:
        trainer.train()
    assert fitting.first_step.after is not None and fitting.first_step.seconds > 0


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    script, folder = ROOT / "tests" / "train_without_memory.py", tmp_path_factory.mktemp("memory")
    done = subprocess.run([sys.executable, script, folder], cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1]) | {"printed": done.stdout}


@pytest.mark.slow
@pytest.mark.parametrize("run", ["split", "late"])
def test_a_batch_that_does_not_fit_is_split_and_no_step_is_lost(trained, run):
    whole, split = trained["whole"], trained[run]
    assert split["steps"] == whole["steps"] == 4
    assert split["held_out"] == pytest.approx(whole["held_out"], rel=0.01)
    # The halves' gradients are added in bfloat16, in another order: 3 significant digits.
    assert split["losses"] == pytest.approx(whole["losses"], rel=0.01)
    assert split["norms"] == pytest.approx(whole["norms"], rel=0.05)
    assert (whole["splits"], whole["tokens_at_once"]) == (0, None)
    assert split["splits"] > 3 and split["tokens_at_once"] <= 150
    assert "No step is lost" in trained["printed"]


@pytest.mark.slow
def test_without_checkpointing_no_layer_is_computed_twice(trained):
    assert all(set(computed) == {1} for _, computed in trained["whole"]["batches"])


@pytest.mark.slow
def test_only_the_planned_layers_are_computed_twice_and_nothing_else_changes(trained):
    needed = trained["as needed"]
    for tokens, computed in needed["batches"]:
        count = 4 if tokens > 150 else 1
        assert computed == [2] * count + [1] * (6 - count)
    assert {tokens > 150 for tokens, _ in needed["batches"]} == {False, True}
    for name in ("losses", "norms", "held_out", "weights"):
        assert needed[name] == trained["whole"][name]
    assert all(needed["flags"]) and not needed["all_checkpointed"]


@pytest.mark.slow
def test_where_too_few_layers_are_checkpointed_all_are_from_then_on(trained):
    """Memory runs out at the first micro-batch that spares 5 layers; 2 were spared before."""
    few, whole = trained["too few"], trained["whole"]
    assert few["all_checkpointed"] and few["splits"] == 0 and few["steps"] == whole["steps"]
    spared = [computed.count(1) for _, computed in few["batches"]]
    assert set(spared) == {0, 2} and spared == sorted(spared, reverse=True)
    assert (few["losses"], few["weights"]) == (whole["losses"], whole["weights"])
    assert "from here on every layer is checkpointed" in trained["printed"]


@pytest.mark.slow
def test_the_rehearsal_changes_nothing_and_is_measured(trained):
    whole, alone = trained["whole"], trained["alone"]
    assert whole["rehearsed_gib"] > 0
    for name in ("losses", "norms", "held_out", "weights"):
        assert whole[name] == alone[name]
    assert trained["late"]["losses"][:2] == whole["losses"][:2]


@pytest.mark.slow
def test_one_conversation_that_does_not_fit_ends_the_run(trained):
    assert "not enough memory to train on it alone" in trained["refused"]
