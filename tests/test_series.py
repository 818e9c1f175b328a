"""The headless runner: what it reports, where it stops, what it refuses."""

import json
import socket
from pathlib import Path

import jupyter_client.connect
import nbformat
import pytest

from helpers import series
from helpers.handoff.run import open_run
from helpers.series import (
    ChapterRun,
    SeriesError,
    absolute_paths,
    check_parameters,
    main,
    read_parameter_file,
    read_value,
    run_chapter,
    run_chapters,
    save_measures,
)


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
    monkeypatch.setattr(series, "CHAPTER_NAMES", ("01_install", "02_load_and_lora", "03_data"))
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


def test_a_chapter_whose_kernel_dies(chapters):
    write_chapter(chapters, "03_data", "import os", "os._exit(9)")
    [run] = run_chapters(["03_data"], executed_dir=chapters / "executed")
    assert "ended the kernel" in run.failure
    assert run.executed.exists()


def test_a_port_that_was_taken_meanwhile_is_no_failure(chapters, monkeypatch):
    """Another program takes a port of the first kernel between Jupyter's choice and the kernel's start."""
    choose, taken = jupyter_client.connect.write_connection_file, []

    def choose_and_lose(*arguments, **given):
        file, chosen = choose(*arguments, **given)
        if not taken:
            taken.append(socket.create_server(("127.0.0.1", chosen["shell_port"])))
        return file, chosen

    monkeypatch.setattr(jupyter_client.connect, "write_connection_file", choose_and_lose)
    run = run_chapter("01_install", executed_dir=chapters / "executed")
    taken.pop().close()
    assert (run.failure, run.result) == ("", "1 steps")


def test_a_kernel_that_never_starts_is_a_failure_and_another_error_is_passed_on(chapters, monkeypatch):
    died, other, raised = RuntimeError("Kernel died before replying to kernel_info"), RuntimeError("no"), []

    def execute(*arguments, **given):
        raised.append(1)
        raise died

    monkeypatch.setattr("papermill.execute_notebook", execute)
    run = run_chapter("01_install", executed_dir=chapters / "executed")
    assert "kernel python3: found 3 kernels that ended while they started" in run.failure and len(raised) == 3
    died = other
    with pytest.raises(RuntimeError, match="^no$"):
        run_chapter("01_install", executed_dir=chapters / "executed")


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
    assert (chapters / "run.previous-1" / "kept").exists()
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


def test_a_file_of_parameters_is_for_the_series_and_a_typed_one_for_the_chapters_named(chapters, tmp_path, capsys):
    notebook = nbformat.read(chapters / "03_data.ipynb", 4)
    notebook.cells[0].source = "PROFILE = ''\nRUN_DIR = ''"
    notebook.cells[1].source = "print('Result: reached')"
    nbformat.write(notebook, chapters / "03_data.ipynb")
    file = tmp_path / "parameters.toml"
    file.write_text(f"PROFILE = 'cpu'\nSTEPS = 2\nRUN_DIR = '{tmp_path / 'run'}'\n")
    assert main(["03_data", "-f", str(file)]) == 0
    assert main(["03_data", "-f", str(file), "-p", "STEPS", "2"]) == 2
    assert "found STEPS" in capsys.readouterr().err
    file.write_text("PROFILE = 'cpu'\nSTEP = 2\n")
    assert main(["03_data", "-f", str(file)]) == 2
    assert "found STEP," in capsys.readouterr().err


@pytest.mark.parametrize(("text", "value"), [("60", 60), ("1e-4", 1e-4), ("true", True), ("cpu", "cpu"), ("", "")])
def test_values_from_a_command_line(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_parameters_from_a_file(chapters, capsys):
    (chapters / "some.toml").write_text("# a comment\nSTEPS = 3\n", encoding="utf-8")
    options = ["01_install", "-f", str(chapters / "some.toml"), "-p", "RUN_DIR", str(chapters / "run")]
    assert main(options) == 0
    assert "3 steps" in capsys.readouterr().out
    assert main([*options, "-p", "STEPS", "4"]) == 0
    assert "4 steps" in capsys.readouterr().out
    (chapters / "some.toml").write_text("STEP = 3\n", encoding="utf-8")
    assert main(options) == 2
    assert "parameter: found STEP" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("1.0e-4", 1e-4),
        ("2E+3", 2000.0),
        ("60", 60),
        ("1.5", 1.5),
        ("true", True),
        ("false", False),
        ('"on"', "on"),
        ("'1e-4'", "1e-4"),
        ('"cpu"', "cpu"),
        ("''", ""),
    ],
)
def test_values_from_a_file(tmp_path, text, value):
    (tmp_path / "file.toml").write_text(f"NAME = {text}\n", encoding="utf-8")
    found = read_parameter_file(tmp_path / "file.toml")["NAME"]
    assert found == value
    assert type(found) is type(value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("A = 1\nB = 2\nA = 3\n", "found Cannot overwrite a value .at line 3"),
        ("A = cpu\n", "found Invalid value .at line 1"),
        ("A: 1\n", "line 1"),
        ("just words\n", "line 1"),
    ],
)
def test_files_that_are_refused(tmp_path, text, said):
    (tmp_path / "file.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SeriesError, match=f"file.toml: .*{said}"):
        read_parameter_file(tmp_path / "file.toml")


@pytest.mark.parametrize("text", ["A = [1]\n", "A = {b = 1}\n", "[A]\nb = 1\n", "A = 2026-11-28\n"])
def test_a_value_that_is_no_single_one_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "file.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SeriesError, match="file.toml, A: found .*`NAME = value`"):
        read_parameter_file(tmp_path / "file.toml")


def test_a_file_that_is_missing_or_empty(tmp_path):
    with pytest.raises(SeriesError, match="No such file"):
        read_parameter_file(tmp_path / "none.toml")
    (tmp_path / "file.toml").write_text("# nothing\n", encoding="utf-8")
    assert read_parameter_file(tmp_path / "file.toml") == {}


@pytest.mark.parametrize("profile", ["cpu", "t4", "t4-smollm2"])
def test_the_profiles_files_name_parameters_that_exist(profile):
    parameters = read_parameter_file(Path(__file__).parent / "profiles" / f"{profile}.toml")
    check_parameters(series.CHAPTER_NAMES, parameters)
    assert parameters["PROFILE"] == profile.partition("-")[0]


def test_measures_of_a_part_are_added_to_those_of_the_same_profile(tmp_path):
    path = tmp_path / "measured.json"

    def measure(chapter, profile="cpu"):
        save_measures([ChapterRun(chapter, 90.0, "", "", tmp_path, 1.26)], path, profile=profile)
        return json.loads(path.read_text(encoding="utf-8"))

    measure("03_data")
    both = measure("02_load_and_lora")
    assert list(both["chapters"]) == ["02_load_and_lora", "03_data"]
    assert both["chapters"]["03_data"] == {"minutes": 1.5, "peak_gib": 1.3}
    assert both["seconds"]["03_data"] == 90.0
    assert list(measure("04_train", profile="t4")["chapters"]) == ["04_train"]


def test_paths_are_seen_from_where_the_command_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").write_text("")
    given = {"DATASET": "my rows.jsonl", "RUN_DIR": "run", "DRIVE_DIR": "", "MODEL_NAME": "owner/name", "MAX_STEPS": 5}
    expected = {"DATASET": f"{tmp_path}/my rows.jsonl", "RUN_DIR": f"{tmp_path}/run"}
    assert absolute_paths(given) == given | expected
