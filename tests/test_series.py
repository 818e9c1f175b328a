"""The headless runner: what it reports, where it stops, what it refuses."""

import nbformat
import pytest

from helpers import series
from helpers.handoff import open_run
from helpers.series import SeriesError, check_parameters, main, read_value, run_chapter, run_chapters


def write_chapter(folder, name, *cells):
    parameters = nbformat.v4.new_code_cell("STEPS = 1\nRUN_DIR = ''", metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    """Three small chapters, the second of which fails."""
    write_chapter(tmp_path, "01_install", "print(f'Result: {STEPS} steps')")
    write_chapter(tmp_path, "02_load_and_lora", "import os", "x = {}[\n  'nothing']")
    write_chapter(tmp_path, "03_data", "print('Result: reached')")
    monkeypatch.setattr(series, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(series, "CHAPTERS", ("01_install", "02_load_and_lora", "03_data"))
    return tmp_path


def test_a_chapter_that_runs(chapters):
    run = run_chapter("01_install", executed_dir=chapters / "executed", parameters={"STEPS": 7})
    assert (run.failure, run.result) == ("", "7 steps")
    assert run.executed.exists()
    assert 0 < run.seconds and 0 < run.peak_gib < 1


def test_a_chapter_that_fails_names_its_cell(chapters):
    run = run_chapter("02_load_and_lora", executed_dir=chapters / "executed")
    assert run.failure == "code cell [3] `x = {}[`: KeyError: 'nothing'"
    assert run.executed.exists()
    assert run.result == ""


def test_it_stops_at_the_first_failure(chapters):
    runs = run_chapters(["01_install", "02_load_and_lora", "03_data"], executed_dir=chapters / "executed")
    assert [bool(run.failure) for run in runs] == [False, True]
    assert not (chapters / "executed" / "03_data.ipynb").exists()


def test_main_fails_with_the_cell_and_the_notebook(chapters, capsys):
    assert main(["-p", "RUN_DIR", str(chapters / "run")]) == 1
    printed = capsys.readouterr().out
    assert "02_load_and_lora failed in code cell [4]" in printed  # one more: the cell with the given parameters
    assert "executed/02_load_and_lora.ipynb" in printed
    assert "FAILED" in printed


def test_main_succeeds(chapters, capsys):
    assert main(["01_install", "03_data", "-p", "RUN_DIR", str(chapters / "run")]) == 0
    assert "reached" in capsys.readouterr().out


def test_fresh_sets_the_last_run_aside(chapters):
    run = open_run(chapters / "run")
    (run.path / "kept").write_text("")
    assert main(["01_install", "--fresh", "-p", "RUN_DIR", str(run.path)]) == 0
    assert (chapters / "run.previous" / "kept").exists()
    assert not (run.path / "kept").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "STEP", "5"], "parameter: found STEP"),
        (["07_more"], "chapter: found 07_more"),
        (["-p", "PROFILE", "gpu"], "found "),
    ],
)
def test_main_refuses(chapters, capsys, arguments, said):
    assert main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (chapters / "executed").exists()


def test_unknown_parameters_are_an_error():
    with pytest.raises(SeriesError, match="MAX_STEP,"):
        check_parameters(["04_train"], {"MAX_STEP": 5})
    check_parameters(["04_train"], {"MAX_STEPS": 5})


@pytest.mark.parametrize(("text", "value"), [("60", 60), ("1e-4", 1e-4), ("true", True), ("cpu", "cpu"), ("", "")])
def test_values_from_a_command_line(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)
