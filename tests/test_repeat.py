"""The repeatability table: which runs pass, what is kept when it is cut off, and what it refuses to mix."""

import json

import pytest

from helpers.base import InputError
from helpers.handoff.run import HandoffError, open_run
from tests.maintain import repeat
from tests.maintain.regress import Metrics, make_baseline
from tests.maintain.repeat import as_markdown, code_fingerprint, copy_needs, problems, spread

OF = {
    "profile": "cpu",
    "device": "AVX512 CPU",
    "model": "SmolLM2-135M-Instruct",
    "steps": 8,
    "versions": {"torch": "2.13.0"},
}
VALUES = {"04 held_out_loss_before": 4.0, "04 held_out_loss_after": 2.0, "04 steps": 8, "04 learned": True}
VALUES |= {"04 seconds": 9.0}
BASELINE = make_baseline(Metrics(OF, VALUES | {"02 weights_mib": 100}))


def result(**changes):
    """What is kept of one run of chapter 04; `changes` are other values, by the last part of their names."""
    values = {name: changes.get(name.split("_")[-1].split()[-1], value) for name, value in VALUES.items()}
    kept = {"of": OF, "date": "2026-01-01", "failed": False, "another_cpu": False}
    kept |= {"chapter": code_fingerprint(repeat.CHAPTER)}
    return kept | {"values": {name: value for name, value in values.items() if value is not None}}


@pytest.fixture
def source(tmp_path):
    """A run folder with what chapter 03 hands on, a chapter 04 that was run there, and a cache."""
    run = open_run(tmp_path / "cpu", base_model="SmolLM2-135M-Instruct")
    for name in ("dataset", "adapter"):
        with run.write(name) as folder:
            (folder / "train").mkdir(parents=True)
            (folder / "train" / "rows.arrow").write_text("rows")
    run.record("04_train", steps=8)
    (run.path / "dataset" / "train" / "cache-1.arrow").write_text("tokens")
    (run.path / "executed").mkdir()
    measured = {"profile": "cpu", "kind": "AVX512 CPU", "seconds": {}, "chapters": {}}
    (run.path / "executed" / "measured.json").write_text(json.dumps(measured))
    return run.path


@pytest.fixture
def baselines(source, tmp_path):
    folder = tmp_path / "baselines"
    folder.mkdir()
    of = repeat.collect_metrics(source).of
    (folder / "cpu-avx512-cpu.json").write_text(json.dumps(BASELINE | {"of": of}))
    return folder


def keep(work, source, **results):
    """Put results of runs there, as if they had been done."""
    work.mkdir(exist_ok=True)
    of = repeat.collect_metrics(source).of
    for number, kept in enumerate(results.values(), 1):
        (work / f"{number:02}.json").write_text(json.dumps(kept | {"of": of}))


def test_a_run_passes_by_the_metrics_of_its_chapter_alone():
    assert problems(result(), BASELINE) == []  # it has no `02 weights_mib`
    assert problems(result(after=2.05), BASELINE) == []


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (dict(after=2.2), "04 held_out_loss_after is 2.2, was 2, allowed 1.9 … 2.1"),
        (dict(learned=False), "04 learned is False, was True, allowed True"),
        (dict(steps=None), "04 steps is missing, was 8, allowed 8"),
    ],
)
def test_a_run_that_leaves_a_band_does_not_pass(changed, said):
    assert problems(result(**changed), BASELINE) == [said]
    text = as_markdown([result(), result(**changed)], BASELINE)
    assert "1 of 2 runs lie in all bands" in text and f"- run 2: {said}" in text


def test_a_run_that_fails_or_belongs_elsewhere_does_not_pass():
    assert problems(result() | {"failed": True}, BASELINE) == ["the chapter did not run to its end"]
    assert problems(result() | {"of": OF | {"device": "T4"}}, BASELINE) == ["device is T4, was AVX512 CPU"]
    assert problems(result(after=float("nan")), BASELINE)


def test_the_table_says_how_much_of_a_band_is_used():
    text = as_markdown([result(after=1.98), result(after=2.05) | {"another_cpu": True}], BASELINE)
    assert "2 of 2 runs lie in all bands. Computed as on another CPU: 1 (`ONEDNN" in text
    assert "- device: AVX512 CPU, profile cpu, model SmolLM2-135M-Instruct, 8 steps\n" in text
    assert "- versions: torch 2.13.0\n- date: 2026-01-01\n" in text
    assert "| 04 held_out_loss_after | 1.98 | 2.05 | 1.9 … 2.1 | 50 % |" in text
    assert "| 04 steps | 8 | 8 | 8 | exact |" in text and "| 04 learned | True | True | True |  |" in text
    assert "04 seconds" not in text and "02 weights" not in text  # not judged; not of this chapter
    assert spread([], was=2, allowed=[1, 3]) == "missing | missing | 1 … 3 | "


def test_runs_that_are_kept_are_not_done_again(source, baselines, tmp_path):
    keep(tmp_path / "work", source, a=result(), b=result(after=2.05))
    table, ok = repeat.repeat(source, runs=2, work=tmp_path / "work", baselines=baselines)
    assert ok and table == baselines / "repeatability-cpu-avx512-cpu.md"
    assert "2 of 2 runs" in table.read_text()
    keep(tmp_path / "work", source, a=result(), b=result(after=3.0))
    assert not repeat.repeat(source, runs=2, work=tmp_path / "work", baselines=baselines)[1]


def test_runs_of_another_chapter_are_not_mixed_in(source, baselines, tmp_path):
    keep(tmp_path / "work", source, a=result() | {"chapter": "another"})
    with pytest.raises(InputError, match="01.json: found a run of another chapter 04.*--fresh"):
        repeat.repeat(source, runs=1, work=tmp_path / "work", baselines=baselines)
    assert not list(baselines.glob("*.md"))


def test_a_run_that_has_no_bands_is_refused(source, tmp_path):
    with pytest.raises(InputError, match="none is recorded for cpu on AVX512 CPU"):
        repeat.repeat(source, runs=1, work=tmp_path / "work", baselines=tmp_path / "none")


def test_a_run_starts_from_what_was_handed_on_alone(source, tmp_path):
    copy_needs(source, tmp_path / "run")
    run = open_run(tmp_path / "run", chapter="04_train")
    assert not (run.path / "adapter").exists() and not list((tmp_path / "run").rglob("cache-*"))
    assert not (tmp_path / "run" / "numbers").exists()
    (source / "dataset" / "train" / "rows.arrow").write_text("other")
    with pytest.raises(HandoffError, match="rows.arrow"):
        copy_needs(source, tmp_path / "again")


@pytest.mark.slow
def test_a_chapter_that_fails_is_a_run_that_does_not_pass(source, tmp_path):
    """These rows are no dataset."""
    kept = repeat.run_once(source, tmp_path / "run", log=tmp_path / "log.txt", another_cpu=False)
    assert kept["failed"] and problems(kept, BASELINE) and "04_train failed in" in (tmp_path / "log.txt").read_text()
    assert json.loads(json.dumps(kept)) == kept
