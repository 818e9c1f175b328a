"""The planted faults: cheap ones are caught, each in its own way; nothing where none is; all can be planted."""

import importlib.util
import json
import shutil
import subprocess
import sys

import nbformat
import pytest

from helpers.base import markdown_table
from helpers.chapters import CHAPTER_NAMES
from tests.maintain import faults, repeat
from tests.maintain.faults import (
    CONTROLS,
    FAULTS,
    ROOT,
    Caught,
    HarnessError,
    as_markdown,
    good_fingerprint,
    how_it_stopped,
    is_whole,
    main,
    noticed,
    one_line,
    own_errors,
    plant,
    summary,
    verdict,
)

PARAMETERS = ROOT / "tests/profiles/cpu.toml"
CHAPTER = "02_load_and_lora"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good run of the cheapest chapter that trains nothing."""
    folder = tmp_path_factory.mktemp("faults")
    run_dir = folder / "good"
    options = [CHAPTER, "-f", str(faults.write_choices(PARAMETERS, folder, RUN_DIR=str(run_dir)))]
    subprocess.run([sys.executable, "-m", "tests.maintain.series", *options], cwd=ROOT, check=True, capture_output=True)
    return run_dir


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "way", "said"),
    [
        ("no_lora", "crash", "get_nb_trainable_parameters"),
        ("four_bit_off", "output", "linear layers"),
    ],
)
def test_a_fault_is_caught(good, tmp_path, fault, way, said):
    before = contents(good)
    caught = plant(fault, good=good, work=tmp_path, parameters=PARAMETERS)
    assert caught.chapter == CHAPTER and caught.way.startswith(way) and said in caught.what, caught
    assert contents(good) == before  # the good run's files are linked, and must not be written through a link


@pytest.mark.slow
def test_nothing_is_noticed_where_nothing_is_broken(good, tmp_path, monkeypatch):
    """The same way through a new kernel as the faults' above, and with as much planted: a line in the log."""
    monkeypatch.setattr(faults, "CHAPTER_NAMES", (CHAPTER,))
    outcome = plant("none", good=good, work=tmp_path, parameters=PARAMETERS)
    assert (outcome.way, outcome.what) == ("", "")
    assert (tmp_path / "none.log").read_text() == "none\n"


@pytest.mark.slow
def test_a_fault_whose_code_never_runs_does_not_count_as_caught(good, tmp_path, monkeypatch):
    """The chapter is as in the good run, and left no line in the log."""

    def run_unbroken(fault, chapter, *, run_dir, **rest):
        shutil.copy(good / "executed" / f"{chapter}.ipynb", run_dir / "executed")

    monkeypatch.setattr(faults, "CHAPTER_NAMES", (CHAPTER,))
    monkeypatch.setattr(faults, "run_chapter_with", run_unbroken)
    caught = plant("no_lora", good=good, work=tmp_path, parameters=PARAMETERS)
    assert (caught.way, caught.what) == ("", "NOT PLANTED: its code never ran (nothing noticed)")


def test_a_linked_run_can_train_beside_others(tmp_path):
    good, copies = tmp_path / "good", [tmp_path / "a", tmp_path / "b"]
    for file in ("executed/measured.json", "checkpoints/.lock", "dataset/cache-1.arrow", "adapter/weights"):
        (good / file).parent.mkdir(parents=True, exist_ok=True)
        (good / file).write_text(file)
    for copy in copies:
        faults.link_run(good, copy)
        (copy / "executed/measured.json").write_text("another")
        assert sorted(path.name for path in copy.rglob("*") if path.is_file()) == ["measured.json", "weights"]
        assert (copy / "adapter/weights").samefile(good / "adapter/weights")
    assert (good / "executed/measured.json").read_text() == "executed/measured.json"


def test_every_fault_has_its_code_and_a_chapter():
    spec = importlib.util.spec_from_file_location("planted", ROOT / "tests/planted/sitecustomize.py")
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    assert set(planted.FAULTS) == {*FAULTS, *CONTROLS, *faults.BEFORE.values()}
    assert {chapter for chapter, _ in (FAULTS | CONTROLS).values()} <= set(CHAPTER_NAMES)
    assert len(FAULTS) >= 15
    assert {"03_data", "04_train", "05_infer", "06_save"} == faults.LINKED  # no fault of theirs is sought in chapter 07


def test_an_unknown_fault_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["no_such"])
    assert "no fault no_such" in capsys.readouterr().err


def write_run(folder, *, shown, **numbers):
    """A run of one chapter: a tagged cell, and what it recorded."""
    cells = [code(1, "x = 1"), code(2, "y = 2\nprint(y)")]
    cells[1].outputs = [nbformat.v4.new_output("stream", text=shown)]
    cells[1].metadata.tags = ["nbval-check-output"]
    write_notebook(folder / "executed" / f"{CHAPTER}.ipynb", *cells)
    measured = {"profile": "cpu", "kind": "CPU", "seconds": {}, "chapters": {CHAPTER: {"peak_gib": len(folder.name)}}}
    (folder / "executed" / "measured.json").write_text(json.dumps(measured))
    (folder / "numbers").mkdir()
    (folder / "numbers" / f"{CHAPTER}.json").write_text(json.dumps(numbers))


@pytest.mark.parametrize(
    ("shown", "weights_mib", "way", "what"),
    [
        ("2", 159, "", ""),
        ("2", 318, "band", "02 weights_mib is 318, was 159, allowed 158.21 … 159.79"),
        ("3", 318, "output and band", "code cell 2, `print(y)`, and 1 more"),
    ],
)
def test_an_output_and_a_band_notice(tmp_path, shown, weights_mib, way, what):
    write_run(tmp_path / "good", shown="2", weights_mib=159)
    write_run(tmp_path / "with another peak of memory", shown=shown, weights_mib=weights_mib)
    run_dir = tmp_path / "with another peak of memory"
    assert noticed(CHAPTER, run_dir=run_dir, good=tmp_path / "good") == (way, what)


def test_a_good_run_is_used_again_only_while_it_comes_from_what_is_here(tmp_path, monkeypatch):
    assert not is_whole(tmp_path)
    (tmp_path / "whole").touch()  # as an earlier version of this harness left it
    assert not is_whole(tmp_path)
    (tmp_path / "whole").write_text(good_fingerprint())
    assert is_whole(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "library_versions", lambda: {"torch": "0"})
        assert not is_whole(tmp_path)
    with monkeypatch.context() as patch:
        patch.setattr(faults, "STEPS", 3)
        assert not is_whole(tmp_path)
    for chapter in CHAPTER_NAMES:
        shutil.copy(repeat.NOTEBOOKS / f"{chapter}.ipynb", tmp_path)
    monkeypatch.setattr(repeat, "NOTEBOOKS", tmp_path)
    assert is_whole(tmp_path)
    write_notebook(tmp_path / "06_save.ipynb", code(1, "another = True"))
    assert not is_whole(tmp_path)


def code(number, source, error=None):
    outputs = [nbformat.v4.new_output("error", ename=error, evalue="no", traceback=[])] if error else []
    return nbformat.v4.new_code_cell(source, id=f"cell-{number}-{len(source)}", execution_count=number, outputs=outputs)


def write_notebook(path, *cells):
    path.parent.mkdir(parents=True, exist_ok=True)
    nbformat.write(nbformat.v4.new_notebook(cells=list(cells)), path)
    return path


@pytest.mark.parametrize(
    ("cells", "way"),
    [
        ([code(1, "check()", "EvidenceError")], "claim"),
        ([code(1, "check()", "InputError")], "claim"),
        ([code(1, "if not differing:\n    raise RuntimeError('all the same')", "RuntimeError")], "claim"),
        ([code(1, "trainer.train()", "RuntimeError")], "crash"),
        ([code(1, "count()", "AttributeError")], "crash"),
        ([code(1, "x = 1"), code(None, "trainer.train()")], "crash"),  # the kernel died
        ([code(1, "x = 1"), code(2, "y = 2")], ""),
    ],
)
def test_a_claim_is_told_from_a_crash(cells, way, tmp_path):
    assert how_it_stopped(write_notebook(tmp_path / "02.ipynb", *cells)) == way


def test_the_projects_own_errors_are_known():
    assert {"InputError", "EvidenceError", "MaskingError", "HandoffError"} <= own_errors()
    assert not {"ValueError", "RuntimeError"} & own_errors()


@pytest.mark.parametrize(("executed", "said"), [(None, "not executed"), ("y = 2", "another notebook was executed")])
def test_a_run_of_another_notebook_or_of_none_is_no_catch(executed, said, tmp_path):
    name = f"executed/{CHAPTER}.ipynb"
    write_notebook(tmp_path / "good" / name, code(1, "x = 1"))
    (tmp_path / "run").mkdir()
    if executed:
        write_notebook(tmp_path / "run" / name, code(1, executed))
    with pytest.raises(HarnessError, match=said):
        noticed(CHAPTER, run_dir=tmp_path / "run", good=tmp_path / "good")


def test_a_run_that_was_not_interrupted_is_not_resumed(tmp_path, monkeypatch):
    monkeypatch.setattr(faults, "run_chapter_with", lambda *arguments, **more: None)
    write_notebook(tmp_path / "good" / "executed" / "04_train.ipynb", code(1, "x = 1"))
    (tmp_path / "good" / "executed" / "measured.json").touch()
    (tmp_path / "interrupted.log").touch()  # of an earlier fault
    with pytest.raises(HarnessError, match="04_train was not interrupted"):
        plant("resumed", good=tmp_path / "good", work=tmp_path, parameters=PARAMETERS)


def test_a_run_that_was_stopped_goes_on_where_it_was(tmp_path, monkeypatch, capsys):
    """The faults themselves are replaced; the good run is a folder with its measures."""
    ran, good, baselines = [], tmp_path / "work" / "good", tmp_path / "baselines"
    (good / "executed").mkdir(parents=True)
    baselines.mkdir()
    measured = {"profile": "cpu", "kind": "AVX512 CPU", "seconds": {}, "chapters": {}}
    (good / "executed" / "measured.json").write_text(json.dumps(measured))
    monkeypatch.setattr(faults, "WORK", tmp_path / "work")
    monkeypatch.setattr(faults, "BASELINES", baselines)
    monkeypatch.setattr(faults, "ROOT", tmp_path)
    monkeypatch.setattr(faults, "planted_fingerprint", lambda: "one")
    monkeypatch.setattr(faults, "make_good", lambda work: good)

    def plant_until(last):
        def plant(fault, **more):
            if fault == last:
                raise KeyboardInterrupt
            ran.append(fault)
            if fault == "seed_ignored" and ran.count(fault) == 1:
                raise HarnessError("the disk was full")
            return Caught(fault, CHAPTER, "" if fault in faults.CONTROLS else "claim", "", 1.0)

        monkeypatch.setattr(faults, "plant", plant)

    plant_until("a_frozen")
    with pytest.raises(KeyboardInterrupt):
        main([])
    assert len(ran) > 10 and not list(baselines.iterdir())
    plant_until("nothing")
    assert main([]) == 0
    everything = [*faults.CONTROLS, *faults.FAULTS]
    assert sorted(ran) == sorted([*everything, "seed_ignored"])  # this one twice: its first run said nothing
    [table] = baselines.iterdir()
    assert f"{len(faults.FAULTS)} of {len(faults.FAULTS)} faults were caught, 2 of 2 controls" in table.read_text()
    assert main(["no_lora"]) == 0 and ran[-1] == "no_lora"  # named, it runs again

    def plant_beside_another(fault, **more):
        theirs = {"pad_is_eos": Caught("pad_is_eos", CHAPTER, "crash", "theirs", 1.0)}
        faults.keep_outcomes(tmp_path / "work", faults.kept_outcomes(tmp_path / "work") | theirs)
        return Caught(fault, CHAPTER, "claim", "ours", 1.0)

    monkeypatch.setattr(faults, "plant", plant_beside_another)
    main(["no_lora"])
    kept = faults.kept_outcomes(tmp_path / "work")
    assert (kept["no_lora"].what, kept["pad_is_eos"].what) == ("ours", "theirs")
    monkeypatch.setattr(faults, "planted_fingerprint", lambda: "another")
    assert faults.kept_outcomes(tmp_path / "work") == {}


OUTCOMES = {
    Caught("no_lora", CHAPTER, "claim", "code cell 7: EvidenceError: a | b", 19.6): "claim",
    Caught("data_order", "06_save", "", "", 60.0): "NOT CAUGHT",
    Caught("seed_ignored", "06_save", "", "NOT PLANTED", 60.0): "NOT CAUGHT",
    Caught("none", "06_save", "", "", 90.0): "nothing",
    Caught("resumed", "04_train", "band", "04 loss, step 8: 9, allowed 1 … 2", 90.0): "FALSE ALARM",
    Caught("none", "06_save", "", "NOT PLANTED", 90.0): "FALSE ALARM",
    Caught("resumed", "", "", "NOT RUN", 0.0): "FALSE ALARM",
}


def test_faults_have_to_be_noticed_and_controls_not():
    assert {outcome: verdict(outcome) for outcome in OUTCOMES} == OUTCOMES
    assert summary(list(OUTCOMES)) == "1 of 3 faults were caught, 1 of 4 controls passed"


def test_the_table_says_where_and_of_what_it_holds():
    of = {
        "profile": "cpu",
        "device": "AVX512 CPU",
        "model": "SmolLM2-135M-Instruct",
        "steps": 24,
        "versions": {"torch": "2.13.0"},
    }
    text = as_markdown(list(OUTCOMES), of=of)
    assert "1 of 3 faults were caught" in text and "- versions: torch 2.13.0\n- date: 2" in text
    row = f"| no_lora | LoRA is added to no module | {CHAPTER} | claim | code cell 7: EvidenceError: a \\| b | 20 |"
    assert row in text


def test_a_cell_of_a_markdown_table_is_one_line_of_text():
    assert markdown_table(["a", "b"], [["<b>|\n", 1]]).splitlines()[2:] == ["| &lt;b&gt;\\| | 1 |"]


def test_what_noticed_is_one_line_without_this_machines_folders():
    assert one_line(f"in {ROOT}/runs/x\n  no file") == "in runs/x no file"
    assert len(one_line("x" * 500)) == faults.MOST_CHARACTERS
