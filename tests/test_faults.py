"""The planted faults: cheap ones are caught, each in its own way; none where nothing is planted; all can be planted."""

import importlib.util
import subprocess
import sys

import faults
import pytest
from faults import FAULTS, ROOT, differing_cell, main, noticed, plant

from helpers.series import CHAPTERS

PARAMETERS = ROOT / "tests/profiles/cpu.yaml"
CHAPTER = "02_load_and_lora"


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A good run of the cheapest chapter that trains nothing."""
    run_dir = tmp_path_factory.mktemp("faults") / "good"
    options = [CHAPTER, "-f", str(PARAMETERS), "-p", "RUN_DIR", str(run_dir)]
    subprocess.run([sys.executable, "-m", "helpers.series", *options], cwd=ROOT, check=True, capture_output=True)
    return run_dir


def contents(folder):
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fault", "way", "said"),
    [
        ("no_lora", "claim", "code cell"),
        ("fewer_modules", "output", "`trainable`"),
        ("lora_seed_ignored", "output", "The first A begins with"),
        ("four_bit_off", "output and band", "linear layers"),
    ],
)
def test_a_fault_is_caught(good, tmp_path, fault, way, said):
    before = contents(good)
    caught = plant(fault, good=good, work=tmp_path, parameters=PARAMETERS)
    assert (caught.chapter, caught.way) == (CHAPTER, way)
    assert said in caught.what
    assert contents(good) == before  # the good run's files are linked, and must not be written through a link


@pytest.mark.slow
def test_nothing_is_noticed_in_a_good_run(good):
    assert noticed(CHAPTER, run_dir=good, good=good) == ("", "")


@pytest.mark.slow
def test_a_fault_whose_code_never_runs_does_not_count_as_caught(good, tmp_path, monkeypatch):
    """The learning rate is of no use to chapter 02, so an outcome of that chapter says nothing about it."""
    monkeypatch.setattr(faults, "CHAPTERS", (CHAPTER,))
    monkeypatch.setitem(FAULTS, "learning_rate_x100", (CHAPTER, ""))
    caught = plant("learning_rate_x100", good=good, work=tmp_path, parameters=PARAMETERS)
    assert caught.way == "" and "NOT PLANTED" in caught.what


def test_every_fault_has_its_code_and_a_chapter():
    spec = importlib.util.spec_from_file_location("planted", ROOT / "tests/planted/sitecustomize.py")
    planted = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(planted)
    assert set(planted.FAULTS) == {*FAULTS, *faults.BEFORE.values()}
    assert {chapter for chapter, _ in FAULTS.values()} <= set(CHAPTERS)
    assert len(FAULTS) >= 15


def test_an_unknown_fault_is_refused(capsys):
    with pytest.raises(SystemExit):
        main(["none"])
    assert "no fault none" in capsys.readouterr().err


def test_the_cell_that_differs_is_named():
    how = "03_data.ipynb, code cell 5: Cell outputs differ\n\nx = 1\nprint(x)\n\n mismatch 'stdout'\n  assert"
    assert differing_cell(how) == "code cell 5, `print(x)`"
