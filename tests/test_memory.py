"""Memory and time of a block, the line that is made of them, and a reader's batch beside the fastest (test_plan.py)."""

import re
import time

import pytest

from helpers.base import InputError
from helpers.memory.plan import ROWS, BatchOption, plan_batch
from helpers.memory.stats import GIB, MemoryStats, Stage, memory_stats, track_memory


def test_now_is_within_the_machine():
    stats = memory_stats()
    assert 0 < stats.allocated_gib <= stats.reserved_gib <= stats.total_gib


def test_a_block_is_measured():
    with track_memory("a block") as stage:
        held = bytearray(300 * 2**20)
        time.sleep(0.2)
    assert len(held) == 300 * 2**20
    assert 0.2 <= stage.seconds < 5
    if not stage.after.is_gpu:
        assert 0.25 < stage.added_gib < 0.6


def test_a_peak_that_is_gone_at_the_end_still_counts():
    with track_memory("a spike") as stage:
        held = bytearray(300 * 2**20)
        time.sleep(0.2)
        del held
    if not stage.after.is_gpu:
        assert stage.peak_reserved_gib > stage.after.reserved_gib + 0.2


def test_a_peak_in_a_block_inside_counts_for_the_one_around_it():
    with track_memory("outer") as outer:
        held = bytearray(300 * 2**20)
        time.sleep(0.2)
        del held
        with track_memory("inner") as inner:
            pass
    assert outer.peak_reserved_gib >= inner.peak_reserved_gib
    if not outer.after.is_gpu:
        assert outer.added_gib > 0.2 > inner.added_gib


def test_an_error_in_the_block_passes_through():
    with pytest.raises(KeyError), track_memory("fails") as stage:
        raise KeyError
    assert stage.after is not None


def card(allocated, reserved, peak):
    return MemoryStats("Tesla T4", True, 14.748, allocated, reserved, peak)


def test_the_line_of_a_gpu():
    stage = Stage("training", 479.5, card(2.2, 2.635, 2.635), card(2.4, 6.4, 6.4))
    said = "training: 479.5 s, at most 6.40 of Tesla T4's 14.7 GiB (43 %), 3.77 more than before"
    assert (repr(stage), stage.peak_reserved_gib) == (said, 6.4)


def test_the_line_without_a_gpu():
    stats = MemoryStats("CPU (process memory)", False, 16.0, 1.0, 1.0, 1.5)
    said = "loading: 1.0 s, at most 1.50 of this machine's 16.0 GiB (9 %), 0.50 more than before"
    assert repr(Stage("loading", 1.0, stats, stats)) == said


def test_a_block_says_at_its_end_what_it_took(capsys):
    with track_memory("outer") as outer:
        assert repr(outer) == "outer: not at its end yet"
        with track_memory("inner") as inner:
            pass
        assert capsys.readouterr().out == f"{inner}\n"
    assert capsys.readouterr().out == f"{outer}\n"


def test_gib_are_binary():
    assert GIB == 1024**3


LENGTHS = [100, 300, 500, 700] * 20 + [1500]


def plan_of(micro_batch, accumulation, checkpointing=False, padding_free=True, *, memory_gib=14.748, lengths=LENGTHS):
    """The plan for a model of Llama 3.2 3B's shape on a T4."""
    from transformers import LlamaConfig

    sizes = dict(hidden_size=3072, intermediate_size=8192, num_hidden_layers=28, num_attention_heads=24, head_dim=128)
    config = LlamaConfig(**sizes, num_key_value_heads=8, vocab_size=128_256, tie_word_embeddings=True)
    yours = dict(micro_batch=micro_batch, accumulation=accumulation, checkpointing=checkpointing)
    card = dict(lora_rank=16, memory_gib=memory_gib, capability=(7, 5))
    return plan_batch(config, lengths=lengths, padding_free=padding_free, **yours, **card)


def test_the_readers_batch_stands_beside_the_fastest_of_its_size():
    plan = plan_of(1, 8, "unsloth")
    assert (plan.yours.micro_batch, plan.yours.accumulation, plan.yours.checkpointing) == (1, 8, "unsloth")
    plan.raise_if_failed()
    assert plan.yours in plan.fitting and all(option.fits for option in plan.fitting)
    assert all(option.micro_batch * option.accumulation == 8 for option in plan.fitting)
    assert plan.fastest.seconds == min(option.seconds for option in plan.fitting) < plan.yours.seconds
    lines = repr(plan).splitlines()
    assert len(lines) == 2 + ROWS + 1 + 1  # headers, the fastest, yours below them, and what it comes to
    assert lines[-2].endswith("← yours") and repr(plan).count("← yours") == 1
    gain = plan.yours.seconds / plan.fastest.seconds
    assert (
        lines[-1] == f"For 14.7 GiB: at most 13.3 GiB. {gain:.2f} times as fast as yours, by estimate: {plan.fastest}"
    )
    assert "← yours" in plan._repr_html_() and str(plan.fastest) in plan._repr_html_().replace("&#x27;", "'")


def test_the_fastest_as_text_can_be_copied_into_choices():
    names, fastest = {}, plan_of(1, 8, "unsloth").fastest
    exec(str(fastest).replace(", ", "\n"), names)
    chosen = [names[name] for name in ("MICRO_BATCH", "ACCUMULATION", "CHECKPOINTING", "PADDING_FREE")]
    again = plan_of(*chosen)
    assert again.yours == again.fastest == fastest
    assert repr(again).count("\n") == 2 + ROWS and "Nothing that fits is faster than yours." in repr(again)
    assert str(BatchOption(1, 8, "unsloth", False, 5.0, 1.0, True)).endswith(
        "CHECKPOINTING = 'unsloth', PADDING_FREE = False"
    )


def test_checkpointing_that_nothing_needs_is_no_slower():
    plan = plan_of(1, 1, True, padding_free=False, lengths=[20] * 8)
    assert plan.yours != plan.fastest and "Nothing that fits is faster than yours." in repr(plan)


def test_a_batch_that_does_not_fit_is_refused_with_one_that_does():
    plan = plan_of(8, 1, padding_free=False, memory_gib=8)
    assert not plan.yours.fits and plan.yours not in plan.fitting and plan.fastest.fits
    assert "Yours does not fit. Copy into Choices: " in repr(plan) and "← yours" in repr(plan)
    said = f"MICRO_BATCH and CHECKPOINTING: found {plan.yours.predicted_gib:.1f} GiB needed, expected at most 7.2 GiB"
    with pytest.raises(InputError, match=re.escape(f"{said}. Fix: copy into Choices: {plan.fastest}")):
        plan.raise_if_failed()


def test_the_readers_checkpointing_says_how_many_layers():
    assert [plan_of(8, 1, False).checkpointed_layers(tokens) for tokens in (100, 10**6)] == [0, 0]
    assert [plan_of(8, 1, "unsloth").checkpointed_layers(tokens) for tokens in (100, 10**6)] == [28, 28]
    needed = [plan_of(8, 1, True).checkpointed_layers(tokens) for tokens in (100, 8000, 10**6)]
    assert needed[0] == 0 < needed[1] < needed[2] == 28
