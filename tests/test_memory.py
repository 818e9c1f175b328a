"""Memory and time of a block, and the six lines that are made of them."""

import time

import pytest

from helpers.memory.stats import GIB, MemoryReport, MemoryStats, Stage, memory_stats, stage_table, track_memory


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


def test_the_articles_six_lines():
    stage = Stage("training", 479.5, card(2.2, 2.635, 2.635), card(2.4, 6.4, 6.4))
    assert repr(MemoryReport(stage)).splitlines() == [
        "Device = Tesla T4. Max memory = 14.748 GiB.",
        "2.635 GiB of memory reserved before.",
        "479.5 seconds used for training.",
        "7.99 minutes used for training.",
        "Peak reserved memory = 6.400 GiB (43.4 % of max memory).",
        "Peak reserved memory for training = 3.765 GiB (25.5 % of max memory).",
    ]


def test_without_a_gpu_it_says_so():
    stats = MemoryStats("CPU (process memory)", False, 16.0, 1.0, 1.0, 1.5)
    assert "There is no GPU" in repr(MemoryReport(Stage("training", 1.0, stats, stats)))


def test_the_table_adds_no_facts_in_html():
    table = stage_table([Stage("load", 2.0, card(0, 0, 0), card(2.0, 2.5, 3.0))])
    for fact in ("load", "2.0", "2.50", "3.00", "20"):
        assert fact in repr(table)
        assert fact in table._repr_html_()


def test_gib_are_binary():
    assert GIB == 1024**3
