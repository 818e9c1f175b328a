"""A plan for the memory, checked against what was measured."""

import csv
import sys
from pathlib import Path

import pytest

from helpers.base import InputError
from helpers.memory.plan import ROWS, plan_batch, predict_peak

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


def planned(config, lengths, *, batch=(2, 4), checkpointing=False, padding_free=True, memory_gib=14.748, **given):
    batch = dict(zip(("micro_batch", "accumulation"), batch, strict=True))
    chosen = dict(checkpointing=checkpointing, padding_free=padding_free, lora_rank=16)
    return plan_batch(config, lengths=lengths, memory_gib=memory_gib, **batch, **chosen, **given)


def test_the_plan_keeps_the_effective_batch_and_the_fastest_that_fits(configs):
    plan = planned(configs["3B"], [1500] * 480)
    assert all(option.micro_batch * option.accumulation == 8 for option in plan.fitting)
    assert all(option.fits and option.predicted_gib <= plan.limit_gib < 14.748 for option in plan.fitting)
    assert plan.fastest.seconds == min(option.seconds for option in plan.fitting)
    assert not any(option.micro_batch == 8 and not option.checkpointing for option in plan.fitting)


def test_less_memory_means_a_smaller_micro_batch_or_checkpointing(configs):
    large, small = (planned(configs["3B"], [1500] * 100, memory_gib=gib).fastest for gib in (14.748, 5.5))
    assert small.predicted_gib <= 4.95 < large.predicted_gib and small.seconds > large.seconds
    with pytest.raises(InputError, match="needed for it alone"):
        planned(configs["3B"], [1500] * 100, memory_gib=2.5)


def test_what_the_reader_chose_is_refused_where_it_does_not_fit_and_what_to_copy_is_said(configs):
    plan = planned(configs["3B"], [1500] * 100, memory_gib=5.5)
    assert not plan.yours.fits and plan.yours not in plan.fitting
    copied = f"MICRO_BATCH = {plan.fastest.micro_batch}, ACCUMULATION = {plan.fastest.accumulation}"
    with pytest.raises(InputError, match=rf"expected at most 5.0 GiB. Fix: copy into Choices: {copied}, CHECKPOINTING"):
        plan.raise_if_failed()
    assert f"Yours does not fit. Copy into Choices: {copied}" in repr(plan) and repr(plan).count("← yours") == 1
    planned(configs["3B"], [1500] * 100).raise_if_failed()  # the same choice, on a whole T4


@pytest.mark.parametrize(
    ("batch", "memory_gib", "rows"), [((8, 1), 14.6, ROWS), ((2, 4), 14.6, ROWS), ((1, 8), 14.6, ROWS + 1)]
)
def test_five_rows_are_shown_and_the_readers_own(configs, conversations, batch, memory_gib, rows):
    asked = dict(batch=batch, checkpointing=batch == (8, 1), memory_gib=memory_gib, capability=(7, 5))
    plan = planned(configs["3B"], conversations, **asked)
    lines = repr(plan).splitlines()
    assert len(plan.fitting) > ROWS and len(lines) == 2 + rows + 1
    [own] = [number for number, line in enumerate(lines) if "← yours" in line]
    assert lines[own].split()[:2] == [str(number) for number in batch]
    assert ("Nothing that fits is faster than yours." in lines[-1]) == (plan.yours == plan.fastest) == (batch == (8, 1))
    assert (str(plan.fastest) in lines[-1]) == (batch != (8, 1))


@pytest.mark.parametrize(
    ("asked", "said"),
    [
        (dict(lengths=[]), "lengths: found no conversations"),
        (dict(lengths=[512, 0]), "lengths: found a conversation without tokens"),
        (dict(batch=(0, 8)), "MICRO_BATCH × ACCUMULATION: found 0"),
        (dict(memory_gib=0), "memory_gib: found 0"),
        (dict(memory_gib=-3.5), "memory_gib: found -3.5"),
        (dict(memory_gib=float("nan")), "memory_gib: found nan"),
    ],
)
def test_numbers_that_make_no_sense_are_refused(configs, asked, said):
    with pytest.raises(InputError) as caught:
        planned(configs["3B"], **(dict(lengths=[512]) | asked))
    assert str(caught.value).startswith(said)


def test_a_model_of_another_kind_is_refused():
    from transformers import GPT2Config

    with pytest.raises(InputError, match="GPT2Config: found a configuration without intermediate_size, num_key_value"):
        planned(GPT2Config(), [512])


@pytest.fixture(scope="module")
def conversations():
    import training

    return [len(row["input_ids"]) for row in training.make_rows(480, lengths="conversations", seed=1)]


def with_a_t4s_arithmetic():
    """The options of two shapes and two kinds of rows that were measured: {(shape, lengths): their rows}."""
    lines = (ROOT / "tests/benchmarks/results/t4_arithmetic.csv").read_text().splitlines()
    groups = {}
    for row in csv.DictReader(lines):
        if row["row"] == "option":
            groups.setdefault((row["shape"], row["lengths"]), []).append(row)
    return groups


@pytest.mark.parametrize("shape", ["1B", "3B"])
@pytest.mark.parametrize("lengths", ["conversations", "long"])
def test_the_plan_of_a_t4_is_the_fastest_that_was_measured_and_costs_what_was_estimated(configs, shape, lengths):
    import training

    rows = with_a_t4s_arithmetic()[shape, lengths]
    assert len(rows) == 5
    tokens = [len(row["input_ids"]) for row in training.make_rows(8 * int(rows[0]["steps"]), lengths=lengths, seed=1)]
    measured, estimated = {}, {}
    for row in rows:
        batch, padding_free = (int(row["micro_batch"]), int(row["accumulation"])), row["padding_free"] == "True"
        chosen = dict(batch=batch, checkpointing=MODES[row["checkpointing"]], padding_free=padding_free)
        option = planned(configs[shape], tokens, **chosen, capability=(7, 5)).yours
        seconds = sum(tokens) / int(row["steps"]) / float(row["tokens_a_second"])
        assert option.seconds == pytest.approx(seconds, rel=0.16), row
        assert float(row["peak_reserved_gib"]) < 1.03 * option.predicted_gib and row["splits"] == "0", row
        measured[batch, padding_free], estimated[batch, padding_free] = seconds, option.seconds
    best = planned(configs[shape], tokens, batch=(8, 1), checkpointing=True, capability=(7, 5)).fastest
    chosen = (best.micro_batch, best.accumulation), best.padding_free
    assert chosen == min(estimated, key=estimated.get) == min(measured, key=measured.get)


def test_equal_losses_of_ten_runs_with_a_part_of_the_gpu_and_one_with_all_of_it():
    rows = list(csv.DictReader((ROOT / "tests/benchmarks/results/t4_arithmetic.csv").read_text().splitlines()))
    losses = {row["name"]: (row["multiprocessors"], float(row["last_loss"])) for row in rows if row["row"] == "equal"}
    whole = losses.pop("unrestricted")
    assert whole[0] == "132" and len(losses) == 10
    assert all(few == "8" and loss == pytest.approx(whole[1], rel=2e-5) for few, loss in losses.values())


@pytest.mark.parametrize(
    ("capability", "batch", "padding_free"), [((7, 5), (8, 1), True), ((9, 0), (8, 1), False)], ids=["T4", "H100"]
)
def test_as_many_layers_are_checkpointed_as_a_micro_batch_needs(
    configs, conversations, capability, batch, padding_free
):
    """The longest in most layers, one of usual length in hardly any; one layer fewer would not fit."""
    asked = dict(batch=batch, checkpointing=True, padding_free=padding_free, capability=capability)
    plan = planned(configs["3B"], conversations, **asked)
    assert plan.yours == plan.fastest
    counts = [plan.checkpointed_layers(tokens) for tokens in range(0, max(plan.most_tokens), 100)]
    assert counts == sorted(counts) and counts[0] == 0 and 20 <= counts[-1] <= 28
    assert plan.checkpointed_layers(4096) <= 1 and plan.checkpointed_layers(10**6) == 28
    for tokens in (5000, 8192, 12_000):
        settings = dict(tokens=tokens, lora_rank=16, use_gradient_checkpointing=True, triton_loss=True)
        count = plan.checkpointed_layers(tokens)
        assert predict_peak(configs["3B"], **settings, checkpointed_layers=count) <= plan.limit_gib
        assert predict_peak(configs["3B"], **settings, checkpointed_layers=count - 1) > plan.limit_gib
    offloaded = planned(configs["3B"], conversations, **(asked | dict(checkpointing="unsloth"))).yours
    assert plan.yours.seconds < offloaded.seconds and plan.yours.predicted_gib > offloaded.predicted_gib


@pytest.mark.parametrize(("checkpointing", "count"), [(False, 0), ("unsloth", 28)])
def test_without_checkpointing_as_needed_it_is_no_layer_or_all(configs, conversations, checkpointing, count):
    plan = planned(configs["3B"], conversations, checkpointing=checkpointing)
    assert [plan.checkpointed_layers(tokens) for tokens in (20, 1200, 10**6)] == [count] * 3


@pytest.mark.parametrize(("lengths", "memory_gib", "kept"), [([20] * 8, 5.0, True), ([1200] * 8, 3.4, False)])
def test_checkpointing_is_left_out_where_all_can_be_kept(configs, lengths, memory_gib, kept):
    plan = planned(configs["3B"], lengths, batch=(1, 1), checkpointing=True, memory_gib=memory_gib)
    assert {option.checkpointing for option in plan.fitting} == {"unsloth", not kept}
    assert plan.checkpointed_layers(lengths[0]) == (0 if kept else 28) and (plan.yours in plan.fitting) == (not kept)


def test_padding_where_the_host_is_the_slower_one(configs):
    assert planned(configs["3B"], [512] * 100, capability=(7, 5)).fastest.padding_free
    assert not planned(configs["3B"], [512] * 100, capability=(9, 0)).fastest.padding_free


def test_each_padding_is_among_the_options_and_its_cost_in_sight(configs):
    plan = planned(configs["3B"], [100] * 96 + [1700, 1000, 600, 300], batch=(2, 2))
    found = {(option.micro_batch, option.checkpointing, option.padding_free): option for option in plan.fitting}
    assert len(found) == len(plan.fitting) == 3 * 2 * 2  # not kept and padded, 4 x 1 does not fit: as needed instead
    assert (4, False, False) not in found and (4, True, False) in found and (4, True, True) not in found
    for (micro_batch, checkpointing, padding_free), option in found.items():
        padded = found.get((micro_batch, checkpointing, False))
        if padding_free and micro_batch > 1 and padded:  # padded, the short ones are as wide as the longest
            assert option.predicted_gib < padded.predicted_gib
    one = planned(
        configs["3B"], [300] * 8, batch=(1, 1)
    )  # one at a time is as wide as it is long, whatever the padding
    assert len({option.predicted_gib for option in one.fitting if option.checkpointing is False}) == 1
