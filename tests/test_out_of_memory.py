"""A plan for the memory, checked against what was measured; and a run that goes on when memory runs out."""

import contextlib
import csv
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from test_training import small_rows, small_trainer

from helpers.memory.fit import DoesNotFit, fit_into_memory
from helpers.memory.plan import PlanError, plan_batch, predict_peak
from helpers.memory.stats import stage_table, track_memory

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
MEASURED = list(csv.DictReader((ROOT / "tests/benchmarks/results/planner.csv").read_text().splitlines()))
ENVIRONMENT = os.environ | {"PYTHONPATH": str(ROOT)}
LOGGED = ("step", "loss", "grad_norm", "eval_loss", "num_tokens", "mean_token_accuracy", "entropy")
MODES = {"True": True, "False": False, "unsloth": "unsloth"}


@pytest.fixture(scope="module")
def configs():
    from llama_shapes import llama_config

    return {shape: llama_config(shape) for shape in ("1B", "3B")}


def predicted(row, configs):
    return predict_peak(
        configs[row["shape"]],
        tokens=int(row["batch"]) * int(row["length"]),
        lora_rank=int(row["rank"]),
        use_gradient_checkpointing=MODES[row["checkpointing"]],
        compiled=row["padded"] == "True",
        triton_loss=True,
    )


def test_the_formula_is_within_a_tenth_of_every_measured_peak(configs):
    fitting = [row for row in MEASURED if row["out_of_memory"] == "False"]
    assert len(fitting) >= 12
    for row in fitting:
        assert predicted(row, configs) == pytest.approx(float(row["peak_reserved_gib"]), rel=0.1), row


def test_the_formula_without_tritons_loss_is_within_a_tenth_of_chapter_04s_peaks(configs):
    rows = list(csv.DictReader((ROOT / "tests/benchmarks/results/training.csv").read_text().splitlines()))
    ours = [row for row in rows if row["row"] == "c"]
    assert len(ours) == 4
    for row in ours:
        asked = dict(tokens=8 * 1792, lora_rank=16, use_gradient_checkpointing=True)  # the longest: 1,722 in 256s
        peak = float(row["peak_reserved_gib"])
        assert predict_peak(configs[row["shape"]], **asked) == pytest.approx(peak, rel=0.1), row
        assert predict_peak(configs[row["shape"]], **asked, triton_loss=True) < 0.93 * peak, row


@pytest.mark.parametrize("file, fitted, failed", [("planner_chapter04", 54, 1), ("planner_t4", 16, 2)])
def test_the_formula_holds_where_it_was_not_fitted(configs, file, fitted, failed):
    rows = list(csv.DictReader((ROOT / f"tests/benchmarks/results/{file}.csv").read_text().splitlines()))
    assert [sum(row["out_of_memory"] == text for row in rows) for text in ("False", "True")] == [fitted, failed]
    for row in rows:
        asked = dict(tokens=int(row["batch"]) * int(row["length"]), lora_rank=int(row["rank"]))
        asked |= dict(use_gradient_checkpointing=MODES[row["checkpointing"]])
        peak = predict_peak(configs[row["shape"]], **asked)
        if row["out_of_memory"] == "True":
            assert peak > 14.748, row
        else:
            assert peak == pytest.approx(float(row["peak_reserved_gib"]), rel=0.1), row


def test_the_formula_holds_where_only_some_layers_are_checkpointed(configs):
    rows = list(csv.DictReader((ROOT / "tests/benchmarks/results/planner_as_needed.csv").read_text().splitlines()))
    assert [sum(row["out_of_memory"] == text for row in rows) for text in ("False", "True")] == [37, 3]
    for row in rows:
        asked = dict(tokens=int(row["batch"]) * int(row["length"]), lora_rank=int(row["rank"]))
        asked |= dict(use_gradient_checkpointing=True, checkpointed_layers=int(row["checkpointed_layers"]))
        peak = predict_peak(configs[row["shape"]], **asked)
        if row["out_of_memory"] == "True":
            assert peak > 14.748, row
        else:
            assert peak == pytest.approx(float(row["peak_reserved_gib"]), rel=0.1), row


def test_the_peaks_of_the_plans_that_were_trained_are_as_predicted(configs):
    files = [ROOT / f"tests/benchmarks/results/training_2026-11-{day}.csv" for day in (25, 26)]
    rows = [row for file in files for row in csv.DictReader(file.read_text().splitlines())]
    planned = [row for row in rows if row["predicted_gib"]]
    assert len(planned) == 7 + 35
    for row in planned:
        assert float(row["peak_reserved_gib"]) == pytest.approx(float(row["predicted_gib"]), rel=0.1), row


def test_what_ran_out_of_memory_was_predicted_to(configs):
    failed = [row for row in MEASURED if row["out_of_memory"] == "True"]
    assert failed
    assert all(predicted(row, configs) > 14.748 for row in failed)


def test_the_plan_keeps_the_effective_batch_and_the_fastest_that_fits(configs):
    plan = plan_batch(configs["3B"], lengths=[1500] * 480, effective_batch_size=8, lora_rank=16, memory_gib=14.748)
    assert all(option.micro_batch * option.accumulation == 8 for option in plan.options)
    assert plan.chosen.fits and plan.chosen.predicted_gib <= plan.limit_gib < 14.748
    assert plan.chosen.seconds == min(option.seconds for option in plan.options if option.fits)
    assert not all(option.fits for option in plan.options)


def test_less_memory_means_a_smaller_micro_batch_or_checkpointing(configs):
    asked = dict(lengths=[1500] * 100, effective_batch_size=8, lora_rank=16)
    large, small = (plan_batch(configs["3B"], **asked, memory_gib=gib).chosen for gib in (14.748, 5.5))
    assert small.predicted_gib <= 4.95 < large.predicted_gib and small.seconds > large.seconds
    with pytest.raises(PlanError, match="needed for it alone"):
        plan_batch(configs["3B"], **asked, memory_gib=2.5)


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(lengths=[]), "lengths: found no conversations"),
        (dict(lengths=[512, 0]), "lengths: found a conversation without tokens"),
        (dict(effective_batch_size=0), "effective_batch_size: found 0"),
        (dict(memory_gib=0), "memory_gib: found 0"),
        (dict(memory_gib=-3.5), "memory_gib: found -3.5"),
        (dict(memory_gib=float("nan")), "memory_gib: found nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(configs, asked, said):
    with pytest.raises(PlanError) as caught:
        plan_batch(configs["3B"], **(dict(lengths=[512], effective_batch_size=8, lora_rank=16) | asked))
    assert str(caught.value).startswith(said)


def test_a_model_of_another_kind_is_refused():
    from transformers import GPT2Config

    with pytest.raises(PlanError, match="GPT2Config: found a configuration without intermediate_size, num_key_value"):
        plan_batch(GPT2Config(), lengths=[512], effective_batch_size=8, lora_rank=16)


@pytest.fixture(scope="module")
def conversations():
    import training

    return [len(row["input_ids"]) for row in training.make_rows(480, lengths="conversations", seed=1)]


@pytest.mark.parametrize(("shape", "batch", "gib"), [("3B", (4, 2), 12.8), ("1B", (8, 1), 13.1)])
def test_a_t4_gets_the_plan_that_the_benchmarks_readme_estimates(configs, conversations, shape, batch, gib):
    asked = dict(lengths=conversations, effective_batch_size=8, lora_rank=16, memory_gib=14.6, capability=(7, 5))
    plan = plan_batch(configs[shape], **asked)
    assert (plan.chosen.micro_batch, plan.chosen.accumulation) == batch and plan.chosen.padding_free
    assert plan.chosen.as_needed
    assert plan.chosen.predicted_gib == pytest.approx(gib, abs=0.05)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_as_many_layers_are_checkpointed_as_a_micro_batch_needs(configs, conversations, capability):
    """The longest in nearly all layers, one of usual length in hardly any; one layer fewer would not fit."""
    asked = dict(lengths=conversations, effective_batch_size=8, lora_rank=16, memory_gib=14.748)
    plan = plan_batch(configs["3B"], **asked, capability=capability)
    assert plan.chosen.as_needed
    counts = [plan.checkpointed_layers(tokens) for tokens in range(0, 8 * 1792, 100)]
    assert counts == sorted(counts) and counts[0] == 0 and 20 <= counts[-1] < 28
    assert plan.checkpointed_layers(4096) <= 1 and plan.checkpointed_layers(10**6) == 28
    for tokens in (5000, 8192, 12_000):
        settings = dict(tokens=tokens, lora_rank=16, use_gradient_checkpointing=True)
        count = plan.checkpointed_layers(tokens)
        assert predict_peak(configs["3B"], **settings, checkpointed_layers=count) <= plan.limit_gib
        assert predict_peak(configs["3B"], **settings, checkpointed_layers=count - 1) > plan.limit_gib
    found = {(o.micro_batch, o.use_gradient_checkpointing, o.as_needed, o.padding_free): o for o in plan.options}
    key = (plan.chosen.micro_batch, True, False, plan.chosen.padding_free)
    assert plan.chosen.seconds < found[key].seconds and plan.chosen.predicted_gib > found[key].predicted_gib


@pytest.mark.parametrize(("lengths", "memory_gib", "count"), [([20] * 8, 5.0, 0), ([1200] * 8, 5.2, 28)])
def test_a_plan_without_choice_checkpoints_no_layer_or_all(configs, lengths, memory_gib, count):
    plan = plan_batch(configs["3B"], lengths=lengths, effective_batch_size=1, lora_rank=16, memory_gib=memory_gib)
    assert plan.chosen.as_needed == bool(count) and plan.checkpointed_layers(1200) == count
    assert plan.settings["gradient_checkpointing"] == bool(count)


def test_padding_where_the_host_is_the_slower_one(configs):
    asked = dict(lengths=[512] * 100, effective_batch_size=8, lora_rank=16, memory_gib=14.748)
    assert plan_batch(configs["3B"], **asked, capability=(7, 5)).chosen.padding_free
    fast = plan_batch(configs["3B"], **asked, capability=(9, 0))
    assert fast.settings["padding_free"] is False and fast.settings["pad_to_multiple_of"] == 128


def test_each_padding_is_among_the_alternatives_and_its_cost_in_sight(configs):
    lengths = [100] * 96 + [1700, 1000, 600, 300]
    plan = plan_batch(configs["3B"], lengths=lengths, effective_batch_size=4, lora_rank=16, memory_gib=14.748)
    found = {(o.micro_batch, (o.use_gradient_checkpointing, o.as_needed), o.padding_free): o for o in plan.options}
    assert len(found) == len(plan.options) == 3 * 3 * 2 + 1
    for (micro_batch, mode, padding_free), option in found.items():
        if padding_free and micro_batch > 1 and not mode[1]:  # padded, the short ones are as wide as the longest
            assert option.predicted_gib < found[micro_batch, mode, False].predicted_gib
    text = repr(plan)
    assert (text.count(" none "), text.count(f" to {plan.padded_to}s ")) == (9, 10)
    assert text.count(" as needed ") == 1  # where not everything can be kept: 4 × 1, padded


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


def test_where_nothing_is_trained_the_rehearsal_and_the_first_step_took_no_time(tmp_path):
    with fit_into_memory(plain_trainer(tmp_path, most=1000)) as fitting:
        pass  # as where a complete run is loaded
    shown = repr(stage_table([fitting.rehearsal, fitting.first_step]))
    assert re.search(r"rehearsal of the longest +0\.0 ", shown) and re.search(r"first step +0\.0 ", shown)


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
