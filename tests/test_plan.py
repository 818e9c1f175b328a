"""A plan for the memory, checked against what was measured."""

import csv
import sys
from pathlib import Path

import pytest

from helpers.memory.plan import PlanError, plan_batch, predict_peak

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests" / "benchmarks"))
MEASURED = list(csv.DictReader((ROOT / "tests/benchmarks/results/planner.csv").read_text().splitlines()))
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
