"""Curves, held-out losses and evidence: real trainers on small models, and for each claim a run that must fail it."""

import copy
import csv
import json
import math
import os
import re
import shutil
import subprocess
import sys
import time
from dataclasses import replace
from types import SimpleNamespace

import pytest

from helpers.base import InputError
from helpers.memory.fit import undo_emulated_bfloat16
from helpers.training.curves import MEASURES, Curves, CurvesError, draw_curves, duration, live_plot
from helpers.training.divergence import find_divergence
from helpers.training.evidence import (
    Evidence,
    EvidenceError,
    _schedule,
    check_evidence,
    describe_overfitting,
    likely_cause,
)
from helpers.training.held_out import HeldOutLosses, bootstrap_interval, fall_interval, held_out_losses
from helpers.training.weights import count_changed_adapters, frozen_checksum
from tests.maintain.series import AT_THE_END, with_new_ports

LEARNING_RATE = 1e-4
LOG = [{"loss": 2.0, "grad_norm": 1.0}, {"loss": 1.0, "grad_norm": 0.5}, {"eval_loss": 1.0, "step": 2}]
TOKENS = (4, 2, 6, 3)
BEFORE = HeldOutLosses((8.4, 4.2, 12.1, 5.9), TOKENS)
AFTER = HeldOutLosses((4.1, 2.2, 5.8, 3.1), TOKENS)
PNG = b"\x89PNG"


def small_model(**settings):
    """A small Llama with LoRA on two kinds of layers, every B trained a little."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    base = LlamaForCausalLM(LlamaConfig(**sizes, num_key_value_heads=2, initializer_range=0.3, **settings))
    tuned = get_peft_model(base, LoraConfig(r=4, target_modules=["q_proj", "down_proj"]))
    with torch.no_grad():
        for name, parameter in tuned.named_parameters():
            if "lora_B" in name:
                parameter.fill_(0.1)
    return tuned


def small_rows(count=10):
    """Rows of 6 to 24 tokens; the second half of each is an answer, of the fourth one only its last token."""
    import random

    rows, draw = [], random.Random(1)
    for number in range(count):
        ids = [draw.randrange(2, 50) for _ in range(draw.randrange(6, 25))]
        masked = len(ids) - 1 if number == 3 else len(ids) // 2
        rows.append({"input_ids": ids, "labels": [-100] * masked + ids[masked:]})
    return rows


def collate(rows):
    import torch

    width = max(len(row["input_ids"]) for row in rows)
    padded = {"input_ids": 0, "labels": -100}
    batch = {name: [row[name] + [pad] * (width - len(row[name])) for row in rows] for name, pad in padded.items()}
    batch["attention_mask"] = [[1] * len(row["input_ids"]) + [0] * (width - len(row["input_ids"])) for row in rows]
    return {name: torch.tensor(values) for name, values in batch.items()}


def small_trainer(folder, *, callbacks=(), model=None, **settings):
    from transformers import Trainer, TrainingArguments

    defaults = dict(max_steps=4, logging_steps=1, save_strategy="no", report_to="none", use_cpu=True, disable_tqdm=True)
    defaults |= dict(per_device_train_batch_size=2, per_device_eval_batch_size=16, learning_rate=1e-2)
    defaults |= dict(include_num_input_tokens_seen="non_padding")
    args = TrainingArguments(output_dir=folder, **(defaults | settings))
    rows = small_rows(16)
    return Trainer(
        model=model or small_model(),
        args=args,
        data_collator=collate,
        train_dataset=rows,
        eval_dataset=rows[:10],
        callbacks=list(callbacks),
    )


def read_curves(path):
    """The rows of a `curves.csv`."""
    with open(path, newline="") as file:
        header, *lines = csv.reader(file)
    assert tuple(header) == ("step", *MEASURES)
    rows = [[float(value) if value else None for value in line] for line in lines]
    return [{"step": int(step)} | dict(zip(MEASURES, values, strict=True)) for step, *values in rows]


@pytest.fixture
def model():
    return small_model()


# Held-out losses


def losses_one_by_one(model, rows):
    """The definition: each row alone, all logits, in float32."""
    import torch

    sums = []
    for row in rows:
        ids, labels = torch.tensor([row["input_ids"]]), torch.tensor(row["labels"])
        with torch.no_grad():
            logits = model.eval()(input_ids=ids).logits[0].float()
        wanted = labels[1:] != -100
        sums.append(float(-logits[:-1].log_softmax(-1)[wanted, labels[1:][wanted]].sum()))
    return sums


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_held_out_losses_are_those_of_each_answer(model, batch_size, monkeypatch):
    monkeypatch.setattr("helpers.training.held_out.LOGITS_AT_ONCE", 50 * 7)  # seven tokens at once
    rows = small_rows()
    measured = held_out_losses(model.train(), rows, batch_size=batch_size)
    assert measured.sums == pytest.approx(losses_one_by_one(model, rows), rel=1e-5)
    assert measured.tokens == tuple(sum(label != -100 for label in row["labels"]) for row in rows)
    assert measured.tokens[3] == 1
    assert measured.loss == pytest.approx(sum(measured.sums) / sum(measured.tokens))
    assert measured.perplexity == pytest.approx(math.exp(measured.loss))
    assert measured.frozen_checksum == frozen_checksum(model)
    assert f"{len(rows)} held-out conversations" in repr(measured) and "checksum" not in repr(measured)


def test_held_out_losses_leave_the_model_as_it_was(model):
    held_out_losses(model.train(), small_rows(2))
    assert model.training
    assert not model.get_base_model().get_decoder()._forward_hooks
    held_out_losses(model.eval(), small_rows(2))
    assert not model.training


def test_held_out_losses_see_the_adapter_and_the_labels(model):
    rows, other = small_rows(), copy.deepcopy(small_rows())
    tuned = held_out_losses(model, rows)
    with model.disable_adapter():
        assert held_out_losses(model, rows).loss != pytest.approx(tuned.loss, rel=1e-3)
    other[0]["labels"] = [-100] + other[0]["input_ids"][1:]
    changed = held_out_losses(model, other)
    assert changed.tokens[0] > tuned.tokens[0] and changed.sums[0] > tuned.sums[0]
    assert changed.sums[1:] == pytest.approx(tuned.sums[1:])


@pytest.mark.parametrize("kind", ["float16", "bfloat16"])
def test_held_out_losses_in_half_precision(kind):
    import torch

    dtype, rows = getattr(torch, kind), small_rows()
    exact = held_out_losses(small_model(), rows)
    whole = held_out_losses(small_model().to(dtype), rows)
    assert whole.loss == pytest.approx(exact.loss, rel=0.02) and whole.loss != exact.loss


def test_held_out_losses_of_a_model_that_caps_its_logits():
    import torch
    from transformers import Gemma2Config, Gemma2ForCausalLM

    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    config = Gemma2Config(
        **sizes, num_key_value_heads=2, head_dim=8, final_logit_softcapping=1.0, initializer_range=0.3
    )
    model = Gemma2ForCausalLM(config)
    assert held_out_losses(model, small_rows()).sums == pytest.approx(losses_one_by_one(model, small_rows()), rel=1e-4)


def test_held_out_loss_agrees_with_the_trainer(model, tmp_path):
    """One batch: the same number. Several: Transformers averages the batches' means, each weighted by its rows."""
    rows = small_rows()
    measured = held_out_losses(model, rows)
    one = small_trainer(tmp_path, model=model).evaluate()["eval_loss"]
    assert one == pytest.approx(measured.loss, rel=1e-5)
    several = small_trainer(tmp_path, model=model, per_device_eval_batch_size=4).evaluate()["eval_loss"]
    batches = [slice(0, 4), slice(4, 8), slice(8, 10)]
    means = [sum(measured.sums[batch]) / sum(measured.tokens[batch]) for batch in batches]
    assert several == pytest.approx((4 * means[0] + 4 * means[1] + 2 * means[2]) / 10, rel=1e-5)
    assert several != pytest.approx(measured.loss, rel=1e-3)


@pytest.mark.parametrize(
    ("rows", "found"),
    [
        ([], "no rows"),
        ([{"input_ids": [1, 2, 3]}], "no labels"),
        ([{"input_ids": [1, 2, 3], "labels": [5, -100, -100]}], "labels that are all -100"),
    ],
)
def test_rows_that_cannot_be_measured(model, rows, found):
    with pytest.raises(InputError, match=f"held-out rows: found {found}.*train_on_responses_only"):
        held_out_losses(model, rows)


UNSLOTH = """
import sys, torch
from unsloth import FastLanguageModel, is_bfloat16_supported
from transformers import AutoTokenizer, DataCollatorForSeq2Seq, Trainer, TrainingArguments
from helpers.training.held_out import held_out_losses
from tests.maintain.smollm2 import prepare_smollm2
source = str(prepare_smollm2())
model, _ = FastLanguageModel.from_pretrained(source, max_seq_length=128, dtype=None, load_in_4bit=True)
model = FastLanguageModel.get_peft_model(model, r=4, target_modules=["q_proj"], use_gradient_checkpointing=False)
tokenizer = AutoTokenizer.from_pretrained(source)
rows = []
for text in ("The capital of France is Paris.", "Water boils at one hundred degrees, at sea level, if it is clean."):
    ids = tokenizer(text).input_ids
    rows.append({"input_ids": ids, "labels": [-100] * 3 + ids[3:]})
half = dict(fp16=not is_bfloat16_supported(), bf16=is_bfloat16_supported())
args = TrainingArguments(output_dir=sys.argv[1], report_to="none", per_device_eval_batch_size=2, **half)
trainer = Trainer(model, args, data_collator=DataCollatorForSeq2Seq(tokenizer), eval_dataset=rows)
print("RESULT", trainer.evaluate()["eval_loss"], held_out_losses(model, rows).loss)
FastLanguageModel.for_inference(model)
print("RESULT", held_out_losses(model, rows).loss, held_out_losses(model, rows, batch_size=1).loss)
sys.path.insert(0, "tests")
from train_once import make_chapter_trainer
chapter = make_chapter_trainer(f"{sys.argv[1]}/checkpoints", tokenizer)
rows = chapter.train_dataset
print("CHAPTER", chapter.evaluate(rows)["eval_loss"], held_out_losses(chapter.model, rows).loss)
chapter.train()
print("CHAPTER", chapter.evaluate(rows)["eval_loss"], held_out_losses(chapter.model, rows).loss)
"""


@pytest.mark.slow
def test_held_out_losses_of_an_unsloth_model(tmp_path):
    command = [sys.executable, "-c", UNSLOTH, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | {"PYTHONPATH": os.getcwd()})
    lines = [line.split() for line in done.stdout.splitlines()]
    results = [float(number) for kind, *rest in filter(None, lines) if kind == "RESULT" for number in rest]
    assert len(results) == 4, done.stderr[-2000:]
    assert results == pytest.approx([results[0]] * 4, rel=0.01) and 0.5 < results[0] < 8  # bfloat16 or float16
    # The chapter's rows, in three batches of several lengths, before and after training.
    pairs = [(float(line[1]), float(line[2])) for line in lines if line[:1] == ["CHAPTER"]]
    assert len(pairs) == 2, done.stderr[-2000:]
    for trainers, ours in pairs:
        assert trainers == pytest.approx(ours, rel=0.01)


# Their uncertainty


def test_a_bootstrap_by_hand():
    assert bootstrap_interval([2, 4], [2, 2]) == (1.0, 2.0)
    assert bootstrap_interval([3, 6, 3], [3, 6, 3]) == (1.0, 1.0)  # a ratio of sums, not a mean of sums


def test_an_interval_holds_the_truth_about_as_often_as_it_says():
    """Of 300 samples of 30 conversations of unequal length, around 95 % of the intervals hold the true mean a token."""
    import numpy as np

    draw, held = np.random.default_rng(3), 0
    for _ in range(300):
        tokens = draw.integers(5, 60, 30)
        sums = tokens * (2 + draw.normal(0, 0.5, 30))  # a conversation's tokens are easy or hard together
        low, high = bootstrap_interval(sums.tolist(), tokens.tolist())
        held += low < 2 < high
    assert 0.88 < held / 300 < 0.98


def test_a_paired_interval_is_narrower():
    """Conversations differ by far more than training changed them; the difference is certain all the same."""
    before = HeldOutLosses(tuple(float(10 * n) for n in range(1, 21)), (10,) * 20)
    after = HeldOutLosses(tuple(each - 1 for each in before.sums), before.tokens)
    low, high = fall_interval(before, after)
    assert low == pytest.approx(0.1) and high == pytest.approx(0.1)
    assert before.interval[1] - before.interval[0] > 1


def test_intervals_that_cannot_be_told():
    assert bootstrap_interval([2.0], [2]) == (-math.inf, math.inf)
    assert all(map(math.isnan, bootstrap_interval([2.0, math.nan], [2, 2])))


def test_before_and_after_must_be_the_same_rows():
    with pytest.raises(InputError, match="before and after: found 4 and 3 conversations"):
        fall_interval(BEFORE, HeldOutLosses(AFTER.sums[:3], TOKENS[:3]))


# Evidence


def evidence_of(model, log=LOG, *, frozen=None, before=BEFORE, after=AFTER, float16=False, rated=True):
    """Evidence of a made-up run; `rated`: its log has the learning rate that was set where an entry has none."""
    from transformers import TrainingArguments

    now = frozen_checksum(model)
    numbered = [{"step": number} | entry for number, entry in enumerate(log, 1)]
    log = [{"learning_rate": LEARNING_RATE} | entry for entry in numbered] if rated else numbered
    args = TrainingArguments(max_steps=4000, lr_scheduler_type="constant", learning_rate=LEARNING_RATE, use_cpu=True)
    args.fp16 = float16  # a CPU does not take it as an argument
    return check_evidence(
        SimpleNamespace(model=model, args=args, state=SimpleNamespace(log_history=log), train_dataset=small_rows()),
        before=replace(before, frozen_checksum=now if frozen is None else frozen),
        after=replace(after, frozen_checksum=now),
        learning_rate=LEARNING_RATE,
    )


def seen_of(evidence, claim):
    return next(seen for each, seen, _ in evidence.rows if each == claim)


def failed(evidence):
    return [claim for claim, _, holds in evidence.rows if not holds]


RATE = "the learning rate followed its schedule"
FINITE = "loss and gradient norm stayed finite"
FELL = "held-out loss fell by more than its uncertainty"


def test_a_good_run(model):
    evidence = evidence_of(model)
    assert evidence.ok
    evidence.raise_if_failed()
    assert repr(evidence).count("True") == 6 and not any(digit in repr(evidence) for digit in "0123456789")
    assert "2.040 -&gt; 1.013, a fall of 1.027 (95 % interval" in evidence._repr_html_()
    assert "perplexity 7.69 -&gt; 2.75" in evidence._repr_html_()


@pytest.mark.parametrize(
    ("passes", "rows", "said"),
    [(36, 2, "seen 36 times.*2 held-out rows"), (36, 4, "seen 36 times"), (1, 3, "3 held-out rows")],
)
def test_a_loss_that_did_not_fall_names_the_likely_cause(model, passes, rows, said):
    log = [entry | {"epoch": passes} for entry in LOG]
    few = HeldOutLosses(BEFORE.sums[:rows], TOKENS[:rows])
    worse = HeldOutLosses(tuple(2 * each for each in few.sums), few.tokens)
    with pytest.raises(EvidenceError, match=said):
        evidence_of(model, log, before=few, after=worse).raise_if_failed()


def test_no_cause_is_named_where_the_numbers_show_none():
    assert likely_cause(1.2, 48) == "" == likely_cause(1.2, 48, [2.0, 1.9, 1.8, 1.7, 1.6])


@pytest.mark.parametrize(
    ("losses", "said"),
    [
        ([2.0, 5.0, 9.0, 20.0, 30.0], "a third of LEARNING_RATE .*from 2.00 to 30.00"),
        ([2.0, 1.0, 1.0, 1.0, math.nan], "a third of LEARNING_RATE"),
        ([2.0, 2.01, 2.0, 1.99, 1.99], "three times the LEARNING_RATE, or more steps"),
        ([2.0, 1.0, 0.5, 0.3, 0.2], "the mask and the template"),
    ],
)
def test_the_training_losses_say_what_the_cause_is(model, losses, said):
    assert re.search(said, likely_cause(1.2, 48, losses))
    log = [entry | {"loss": losses[step]} for step, entry in enumerate(LOG[:5])]
    worse = HeldOutLosses(tuple(2 * each for each in BEFORE.sums), TOKENS)
    evidence = evidence_of(model, log, before=BEFORE, after=worse)
    assert "Likely fix: " in str(evidence._notes())


def test_a_held_out_loss_that_rose_again_is_told_to_stop_earlier():
    losses = [2.0, 1.0, 0.5, 0.3, 0.2]
    assert "EPOCHS = 3 or KEEP_BEST = True" in likely_cause(8.6, 14, losses, True)
    assert "a third of LEARNING_RATE" in likely_cause(8.6, 14, losses[::-1], True)  # it did not learn by heart


def test_a_run_that_learned_is_told_no_cause(model):
    assert "Likely fix" not in str(evidence_of(model)._notes())


def test_an_adapter_that_was_not_trained_is_found(model):
    import torch

    name, parameter = next((n, p) for n, p in model.named_parameters() if "lora_B" in n)
    with torch.no_grad():
        parameter.zero_()
    assert failed(evidence_of(model)) == ["every LoRA matrix B left zero"]
    assert count_changed_adapters(model) == (3, 4)


def test_no_adapter_at_all_is_found(model):
    assert "every LoRA matrix B left zero" in failed(evidence_of(model.unload()))


@pytest.mark.parametrize(
    "log", [[{"loss": math.nan, "grad_norm": 1.0}], [{"loss": 1.0, "grad_norm": math.inf}], [{"loss": 1.0}]]
)
def test_a_run_that_was_not_finite_is_found(model, log):
    assert failed(evidence_of(model, log=log)) == [FINITE]


def test_a_run_that_logged_nothing_is_found(model):
    assert failed(evidence_of(model, log=[])) == [RATE, FINITE]


def steps(*norms):
    return [{"loss": 1.0, "grad_norm": norm} for norm in norms]


def stops(log, float16):
    """Whether `stop_on_divergence` would have ended such a run before its end."""
    return any(find_divergence(log[:end], fp16=float16) for end in range(1, len(log) + 1))


@pytest.mark.parametrize(
    "norms",
    [
        (math.nan, math.inf, 1.0, 0.9),
        (1.0, 0.9, math.inf, 0.8),
        (1.0, 0.9, math.inf),
        (1.0, math.nan, math.nan, 0.9),
        (math.inf,) * 16 + (1.0,),
        (1.0,) * 5 + (math.inf,) * 16,
        (math.inf,) * 16 + (1.0,) * 1984 + (math.inf,),  # doubled once
    ],
)
def test_the_scaler_of_float16_may_back_off(model, norms):
    """And what `stop_on_divergence` lets run to its end does not fail its evidence there."""
    evidence = evidence_of(model, log=steps(*norms), float16=True)
    assert evidence.ok and not stops(steps(*norms[-100:]), True)
    skipped = sum(not math.isfinite(norm) for norm in norms)
    assert f"not finite in {skipped} of {len(norms)} steps" in seen_of(evidence, FINITE)
    assert failed(evidence_of(model, log=steps(*norms))) == [FINITE]  # in bfloat16 nothing backs off


@pytest.mark.parametrize("norms", [(math.inf,) * 17 + (1.0,), (math.inf, 1.0) * 17, (math.inf,) * 3])
def test_float16_that_does_not_recover_is_found(model, norms):
    assert failed(evidence_of(model, log=steps(*norms), float16=True)) == [FINITE]
    assert stops(steps(*norms), True) or all(map(math.isinf, norms))  # a run of 3 steps may still have recovered


def test_float16_excuses_no_loss_that_is_not_finite(model):
    log = [{"loss": math.nan, "grad_norm": math.nan}, {"loss": 1.0, "grad_norm": 1.0}]
    assert failed(evidence_of(model, log=log, float16=True)) == [FINITE]


@pytest.mark.parametrize("steps", [1, 2, 5, 30])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant_with_warmup"])
def test_a_real_run_follows_the_schedule_that_was_set_and_no_other(tmp_path, steps, schedule):
    """With the chapter's warm-up, which is never as long as the run."""
    given = dict(max_steps=steps, warmup_steps=min(5, steps // 4), lr_scheduler_type=schedule, learning_rate=2e-4)
    trainer = small_trainer(tmp_path, **given)
    trainer.train()

    def follows(rate, chosen):
        settings = {"lr_scheduler_type": chosen}
        evidence = check_evidence(trainer, before=BEFORE, after=AFTER, learning_rate=rate, settings=settings)
        return RATE not in failed(evidence)

    assert follows(2e-4, schedule) and not follows(2.001e-4, schedule)
    if steps == 30:
        others = {"linear", "cosine", "constant_with_warmup", "constant"} - {schedule}
        assert not any(follows(2e-4, other) for other in others)


@pytest.mark.parametrize("schedule", ["linear", "constant"])
def test_a_step_that_float16_skips_does_not_move_the_schedule_on(schedule):
    from transformers import TrainingArguments

    args = TrainingArguments(max_steps=10, lr_scheduler_type=schedule, learning_rate=1e-3, use_cpu=True)
    rates = [1e-3, 1e-3, 9e-4, 8e-4] if schedule == "linear" else [1e-3] * 4
    norms = [math.inf, 1.0, 1.0, 1.0]
    log = [dict(step=n, learning_rate=r, grad_norm=g) for n, r, g in zip((1, 2, 3, 4), rates, norms, strict=True)]
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(log_history=log))
    assert _schedule(trainer, 1e-3, "")[2]
    log[3]["learning_rate"] = 9.5e-4
    assert not _schedule(trainer, 1e-3, "")[2]


def test_a_schedule_that_depends_on_the_loss_is_held_to_its_peak():
    from transformers import TrainingArguments

    measured = dict(eval_strategy="steps", eval_steps=1, lr_scheduler_type="reduce_lr_on_plateau")
    args = TrainingArguments(max_steps=3, learning_rate=1e-3, use_cpu=True, **measured)
    log = [{"step": step, "learning_rate": rate} for step, rate in ((1, 1e-3), (2, 1e-4))]
    trainer = SimpleNamespace(args=args, state=SimpleNamespace(log_history=log))
    assert _schedule(trainer, 1e-3, "")[2] and not _schedule(trainer, 9e-4, "")[2]


@pytest.mark.parametrize("factor", [100, 0.01])
def test_another_learning_rate_than_was_set_is_found(model, factor):
    log = [entry | {"learning_rate": rate * factor} for entry, rate in zip(LOG, (1e-4, 1e-4), strict=False)]
    evidence = evidence_of(model, log=log)
    assert failed(evidence) == [RATE]
    seen = f"constant, up to {1e-4 * factor:.3g} in 2 logged steps, 0.0001 was set; step 1 had {1e-4 * factor:.3g}"
    assert seen_of(evidence, RATE) == f"{seen} instead of 0.0001"


def test_a_log_without_a_learning_rate_is_found(model):
    assert failed(evidence_of(model, rated=False)) == [RATE]


def test_a_touched_base_weight_is_found(model):
    import torch

    before = frozen_checksum(model)
    frozen = next(parameter for parameter in model.parameters() if not parameter.requires_grad)
    with torch.no_grad():
        frozen.view(-1)[3] += 0.01
    assert failed(evidence_of(model, frozen=before)) == ["the base weights are untouched"]


@pytest.mark.parametrize("nested", [False, True])
def test_a_touched_scale_of_a_4_bit_weight_is_found(nested):
    from bitsandbytes.nn import Params4bit
    from torch import nn, rand

    weight = Params4bit(rand(64, 64), requires_grad=False, quant_type="nf4", compress_statistics=nested).to("cpu")
    holder = nn.Module()
    holder.register_parameter("weight", weight)
    state, before = weight.quant_state, frozen_checksum(holder)
    assert state is not None and state.nested == nested
    for scales in [state.absmax, *([state.state2.absmax, state.offset] if nested else [])]:
        scales += 1
        assert frozen_checksum(holder) != before
        scales -= 1
    weight.data[3] ^= 1
    assert frozen_checksum(holder) != before


@pytest.mark.parametrize(
    "sums",
    [
        BEFORE.sums,
        tuple(each + 1 for each in BEFORE.sums),
        (math.nan, *AFTER.sums[1:]),
        (8.5, 4.3, 9.5, 6.0),  # lower in all, but by one conversation alone
    ],
)
def test_a_loss_that_did_not_surely_fall_is_found(model, sums):
    evidence = evidence_of(model, after=HeldOutLosses(sums, TOKENS))
    assert failed(evidence) == [FELL]
    with pytest.raises(EvidenceError, match=FELL):
        evidence.raise_if_failed()


def measured(*losses):
    return [{"eval_loss": loss, "step": 10 * number} for number, loss in enumerate(losses, 1)]


def test_overfitting_is_named(model):
    log = [*LOG[:2], *measured(2.0, 1.0, 1.5)]
    evidence = evidence_of(model, log=log)
    said = "held-out loss rose after step 20 (best 1.000 there, 1.500 at step 30): it overfits; stop earlier"
    assert evidence.ok and said in repr(evidence) and said in evidence._repr_html_()


@pytest.mark.parametrize("log", [[], measured(1.0), measured(2.0, 1.5, 1.0), measured(2.0, 1.0, 1.005)])
def test_no_overfitting_where_the_loss_does_not_rise(log):
    assert describe_overfitting(log) == ""


def test_evidence_stops_at_the_first_false_claim():
    with pytest.raises(EvidenceError, match="found b, expected second"):
        Evidence((("first", "a", True), ("second", "b", False))).raise_if_failed()


# Curves


def some_curves(**changes):
    row = dict(step=1, loss=3.0, held_out_loss=None, learning_rate=1e-4, grad_norm=1.0, tokens_per_second=None)
    row |= dict(memory_gib=1.5, seconds=10.0)
    return Curves((row, row | {"step": 2, "seconds": 12.0, "held_out_loss": 2.5}), **({"max_steps": 60} | changes))


def shown_text(figure):
    """Everything that is written in a figure."""
    from matplotlib.text import Text

    return "\n".join(text.get_text() for text in figure.findobj(Text))


def test_the_time_left_follows_the_recent_pace():
    curves = some_curves()
    assert curves.seconds_left == pytest.approx(12 / 2 * 58)
    rows = tuple(curves.rows[0] | {"step": step, "seconds": 500.0 + 2 * step} for step in range(1, 41))
    assert Curves(rows, 60).seconds_left == pytest.approx(2 * 20)  # the slow start is forgotten
    assert Curves(rows, 60).title == "step 40 of 60, about 40 s left"
    assert Curves(rows, 40).title == "40 steps in 9 min 40 s"
    assert Curves((), 60).title == "step 0 of 60"
    assert [duration(seconds) for seconds in (0.4, 59.6, 250, 4000)] == ["0 s", "1 min 0 s", "4 min 10 s", "1 h 6 min"]


def test_the_picture_says_what_it_shows():
    text = shown_text(draw_curves(some_curves(is_gpu=True, total_gib=14.7)))
    for words in ("about 5 min 48 s left", "held-out", "learning rate", "the card has 14.7", "non_padding"):
        assert words in text
    rows = tuple(row | {"tokens_per_second": 800.0} for row in some_curves().rows)
    text = shown_text(draw_curves(Curves(rows, 60)))
    assert "memory of this process" in text and "non_padding" not in text and "the card" not in text


def test_curves_as_files(tmp_path):
    curves = some_curves()
    (tmp_path / "curves.csv").write_text(curves.as_csv())
    assert tuple(read_curves(tmp_path / "curves.csv")) == curves.rows
    infinite = Curves((curves.rows[0] | {"grad_norm": math.inf},), 60)
    assert json.loads(json.dumps(infinite.as_json(), allow_nan=False))["rows"][0]["grad_norm"] is None
    assert draw_curves(infinite)


def test_a_run_draws_and_writes_its_curves(tmp_path):
    plot = live_plot(folder=tmp_path / "curves")
    trainer = small_trainer(tmp_path, callbacks=[plot], max_steps=5, eval_strategy="steps", eval_steps=2)
    held_out = trainer.evaluate()["eval_loss"]
    assert plot.handle is None  # the picture belongs to the cell that trains
    trainer.train()
    rows = read_curves(tmp_path / "curves" / "curves.csv")
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4, 5]
    assert rows[0]["held_out_loss"] == held_out
    assert [row["step"] for row in rows if row["held_out_loss"] is not None] == [0, 2, 4, 5]
    for row, logged in zip(rows[1:], [entry for entry in trainer.state.log_history if "loss" in entry], strict=True):
        assert (row["loss"], row["learning_rate"]) == (logged["loss"], logged["learning_rate"])
        assert row["tokens_per_second"] > 0 and row["memory_gib"] > 0.05 and row["grad_norm"] == logged["grad_norm"]
    assert json.loads((tmp_path / "curves" / "curves.json").read_text()) == plot.curves.as_json()
    assert (tmp_path / "curves" / "curves.png").read_bytes().startswith(PNG)
    trainer.evaluate()  # after training it is the last point
    assert read_curves(tmp_path / "curves" / "curves.csv")[-1]["held_out_loss"] < held_out


def test_tokens_are_counted_without_padding_and_without_pauses(tmp_path):
    """Evaluations that take much longer than the steps do not lower the speed; padding does not raise it."""
    from transformers import TrainerCallback

    class Slow(TrainerCallback):
        def on_prediction_step(self, args, state, control, **kwargs):
            time.sleep(0.3)

    plot = live_plot(folder=tmp_path / "curves")
    trainer = small_trainer(tmp_path, callbacks=[Slow(), plot], eval_strategy="steps", eval_steps=1)
    trainer.train()
    trained = trainer.state.num_input_tokens_seen
    rows = plot.curves.rows
    seconds = [row["seconds"] for row in rows]
    assert trained < 8 * 24  # the rows' own tokens: padded to the longest of two they would be more
    assert seconds[-1] - seconds[0] > 0.9
    spent = sum(trained / len(rows) / row["tokens_per_second"] for row in rows)
    assert spent < seconds[-1] - 0.6


def test_without_a_count_of_tokens_there_is_no_speed(tmp_path):
    plot = live_plot(folder=tmp_path / "curves")
    small_trainer(tmp_path, callbacks=[plot], include_num_input_tokens_seen="no").train()
    assert plot.curves.column("tokens_per_second") == ([], []) and len(plot.curves.column("loss")[0]) == 4


def stop_after(step):
    from transformers import TrainerCallback

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step >= step

    return Stop()


def test_a_resumed_run_shows_its_earlier_points(tmp_path):
    saving = dict(max_steps=8, save_strategy="steps", save_steps=3)
    first = live_plot(folder=tmp_path / "curves")
    small_trainer(tmp_path, callbacks=[first, stop_after(5)], **saving).train()
    assert [row["step"] for row in read_curves(tmp_path / "curves" / "curves.csv")] == [1, 2, 3, 4, 5]
    again = live_plot(folder=tmp_path / "curves")
    shown = []
    trainer = small_trainer(tmp_path, callbacks=[again, stop_after(4)], **saving)
    again.on_step_end = lambda args, state, control, **kwargs: shown.append(len(again.curves.rows))
    trainer.evaluate()  # before it is resumed: this must not overwrite the curves
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))
    assert shown[0] == 4  # at once, and without the two that came after the checkpoint
    rows = again.curves.rows
    assert [row["step"] for row in rows] == [0, 1, 2, 3, 4]
    assert rows[1:4] == first.curves.rows[:3]  # speed and memory too, which the trainer does not log
    assert rows[4]["seconds"] > rows[3]["seconds"]


def test_a_run_resumed_on_a_new_machine_shows_its_earlier_points(tmp_path):
    """From the checkpoint alone; a curves.csv of another run, or of none, is not mixed in."""
    saving = dict(max_steps=4, save_strategy="steps", save_steps=2)
    first, again = live_plot(folder=tmp_path / "curves"), live_plot(folder=tmp_path / "new" / "curves")
    small_trainer(tmp_path, callbacks=[first], **saving).train()
    (tmp_path / "new" / "curves" / "curves.csv").write_text("no curves")
    small_trainer(tmp_path, callbacks=[again], **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert again.curves.rows[:2] == first.curves.rows[:2] and again.curves.column("memory_gib")[0] == [1, 2, 3, 4]
    assert tuple(read_curves(tmp_path / "new" / "curves" / "curves.csv")) == again.curves.rows


def test_two_plots_of_one_trainer(tmp_path):
    """As where the cell that trains is run once more after Stop."""
    saving = dict(max_steps=4, save_strategy="steps", save_steps=2)
    first, second = live_plot(folder=tmp_path / "curves"), live_plot(folder=tmp_path / "curves")
    stop = stop_after(3)
    trainer = small_trainer(tmp_path, callbacks=[first, stop], **saving)
    trainer.train()
    trainer.add_callback(second)
    trainer.remove_callback(stop)
    trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert len(second.curves.rows) == 4 and all(row["seconds"] > 0 for row in second.curves.rows)
    kept = json.loads((tmp_path / "checkpoint-4" / "trainer_state.json").read_text())["stateful_callbacks"]["LivePlot"]
    assert sorted(kept["rows"]) == ["1", "2", "3", "4"]


def test_a_checkpoint_without_curves_shows_what_the_trainer_logged(tmp_path):
    saving = dict(max_steps=4, save_strategy="steps", save_steps=2)
    small_trainer(tmp_path, **saving).train()
    plot = live_plot(folder=tmp_path / "curves")
    small_trainer(tmp_path, callbacks=[plot], **saving).train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert (tmp_path / "checkpoint-4" / "trainer_state.json").read_text().count('"LivePlot"') == 1
    assert plot.curves.column("loss")[0] == [1, 2, 3, 4] and plot.curves.column("memory_gib")[0] == [3, 4]


def test_what_comes_before_the_first_step_is_no_training(tmp_path):
    """As `fit_into_memory`'s rehearsal, which begins after the plot has heard that training begins."""
    from transformers import TrainerCallback

    class Rehearsal(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            time.sleep(2)

    plot = live_plot(folder=tmp_path / "curves")
    trainer = small_trainer(tmp_path, callbacks=[plot, Rehearsal()])
    began = time.monotonic()
    trainer.train()
    spent = time.monotonic() - began
    first = plot.curves.rows[0]
    assert trainer.state.num_input_tokens_seen / 4 / first["tokens_per_second"] < spent - 1.9
    assert plot.curves.rows[-1]["seconds"] < spent - 1.9


def test_a_new_run_forgets_the_curves_of_the_one_before(tmp_path):
    small_trainer(tmp_path, callbacks=[live_plot(folder=tmp_path / "curves")]).train()
    small_trainer(tmp_path, callbacks=[live_plot(folder=tmp_path / "curves")], max_steps=2).train()
    assert [row["step"] for row in read_curves(tmp_path / "curves" / "curves.csv")] == [1, 2]


def test_training_goes_on_where_curves_cannot_be_written(tmp_path, capsys):
    from transformers import TrainerCallback

    class LoseFolder(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs):
            shutil.rmtree(tmp_path / "curves")

    plot = live_plot(folder=tmp_path / "curves")
    trainer = small_trainer(tmp_path, callbacks=[plot, LoseFolder()])
    trainer.train()
    assert trainer.state.global_step == 4 and len(plot.curves.rows) == 4
    assert capsys.readouterr().out.count("The curves are not written any more") == 1


def test_a_folder_that_cannot_be_made_is_refused_at_once(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CurvesError, match="file/curves: found Not a directory"):
        live_plot(folder=tmp_path / "file" / "curves")


def test_drawing_keeps_to_its_share():
    from helpers.training.curves import _Paced

    pace = _Paced(share=0.02, at_least=2)
    assert pace.due()
    for took, waits in ((0.01, 2), (1.0, 50)):
        now = time.monotonic()
        pace.done(now - took)
        assert pace.next - now == pytest.approx(waits, abs=1) and not pace.due()


def test_a_killed_run_keeps_its_curves(tmp_path):
    """SIGKILL at the fourth step: what is on disk is whole."""
    code = (
        "import os, signal, sys; sys.path[:0] = ['tests', '.']\n"
        "from test_training import live_plot, small_trainer, stop_after\n"
        "kill = stop_after(99); folder = sys.argv[1]\n"
        "def on_step_end(args, state, control, **_):\n"
        "    if state.global_step == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "kill.on_step_end = on_step_end\n"
        "small_trainer(folder, callbacks=[live_plot(folder=folder + '/curves'), kill]).train()\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert done.returncode == -9, done.stderr[-2000:]
    rows = read_curves(tmp_path / "curves" / "curves.csv")
    assert rows and rows[0]["loss"] > 0
    assert json.loads((tmp_path / "curves" / "curves.json").read_text())["rows"] == rows


NOTEBOOK = """
import sys; sys.path[:0] = ["tests", "."]
from test_training import live_plot, small_trainer
plot = live_plot(folder=FOLDER + "/curves")
trainer = small_trainer(FOLDER, callbacks=[plot], max_steps=6, eval_strategy="steps", eval_steps=2)
trainer.evaluate();
"""


def test_a_notebook_ends_up_with_one_picture(tmp_path):
    """Headless, as papermill runs it: many drawings, one stored PNG, in the cell that trains."""
    import nbformat
    from nbclient import NotebookClient

    sources = [f"FOLDER = {str(tmp_path)!r}\n{NOTEBOOK}", "plot.drawing.at_least = plot.drawing.share = 1e-9"]
    sources[1] += "\ntrainer.train();"
    sources.append("trainer.evaluate();")
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
    kernel = nbformat.from_dict({"name": "python3", "display_name": "Python 3", "language": "python"})
    notebook.metadata.kernelspec = kernel
    options = dict(resources={"metadata": {"path": os.getcwd()}}, **AT_THE_END)
    with_new_ports(lambda: NotebookClient(notebook, **options).execute())
    stored = [
        number
        for number, cell in enumerate(notebook.cells)
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert stored == [1]


def test_tensorboard_still_gets_its_numbers(tmp_path, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "logs"))
    small_trainer(tmp_path, callbacks=[live_plot(folder=tmp_path / "curves")], report_to="tensorboard").train()
    events = EventAccumulator(str(tmp_path / "logs"))
    events.Reload()
    assert [event.step for event in events.Scalars("train/loss")] == [1, 2, 3, 4]


@pytest.mark.parametrize(("dtype", "turned"), [("float32", 1), ("bfloat16", 0)])
def test_trained_weights_are_in_bfloat16_only_where_the_model_is(dtype, turned):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = dict(hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, vocab_size=32)
    model = LlamaForCausalLM(LlamaConfig(**sizes)).to(getattr(torch, dtype))
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    trained = model.model.layers[0].mlp.up_proj.weight
    trained.data = trained.data.to(torch.bfloat16)
    trained.requires_grad_(True)
    assert undo_emulated_bfloat16(model) == turned
    assert trained.dtype == getattr(torch, dtype) and model.dtype == getattr(torch, dtype)
