"""The headless runner: what it reports, where it stops, what it refuses."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client.connect
import nbformat
import psutil
import pytest
from filelock import FileLock

from helpers.base import ROOT, InputError
from helpers.environment import check_choices
from tests.maintain import series
from tests.maintain.series import (
    ChapterRun,
    SeriesError,
    check_parameters,
    main,
    prepare_chapters,
    read_parameter_file,
    read_value,
    resolved,
    run_chapter,
    run_chapters,
    save_measures,
    set_run_aside,
)
from tests.maintain.smollm2 import NAME as SMOLLM2


def write_chapter(folder, name, *cells):
    source = "MAX_STEPS = 1\nGGUF = []\nRUN_DIR = 'runs/llama'"
    parameters = nbformat.v4.new_code_cell(source, metadata={"tags": ["parameters"]})
    notebook = nbformat.v4.new_notebook(cells=[parameters, *map(nbformat.v4.new_code_cell, cells)])
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, folder / f"{name}.ipynb")


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    """Three small chapters, the second of which fails."""
    write_chapter(tmp_path, "01_install", "print(f'Result: {MAX_STEPS} steps')")
    write_chapter(tmp_path, "02_load_and_lora", "import os", "x = {}[\n  'nothing']")
    write_chapter(tmp_path, "03_data", "print('Result: reached')")
    monkeypatch.setattr(series, "NOTEBOOKS", tmp_path)
    monkeypatch.setattr(series, "CHAPTER_NAMES", ("01_install", "02_load_and_lora", "03_data"))
    return tmp_path


def test_a_chapter_that_runs(chapters):
    run = run_chapter("01_install", executed_dir=chapters / "executed", parameters={"MAX_STEPS": 7})
    assert (run.failure, run.result) == ("", "7 steps")
    assert run.executed.exists()
    assert 0 < run.seconds and 0 < run.peak_gib < 1


def test_a_chapter_runs_in_the_series_root_where_nobody_reads_along(chapters, monkeypatch):
    monkeypatch.delenv("HEADLESS", raising=False)
    monkeypatch.chdir(chapters)
    write_chapter(chapters, "03_data", "import os", "print('Result:', os.getcwd(), os.environ.get('HEADLESS'))")
    [run] = run_chapters(["03_data"], executed_dir=chapters / "executed")
    assert run.result == f"{ROOT} 1" and "HEADLESS" not in os.environ


def test_a_chapter_that_fails_names_its_cell(chapters):
    run = run_chapter("02_load_and_lora", executed_dir=chapters / "executed")
    assert run.failure == "code cell [3] `x = {}[`: KeyError: 'nothing'"
    assert run.executed.exists()
    assert run.result == ""


def add_solution(folder, name, code):
    notebook = nbformat.read(folder / f"{name}.ipynb", as_version=4)
    text = f"<details><summary>Solution</summary>\n\n```python\n{code}\n```\n\nIt is so.\n\n</details>"
    notebook.cells.append(nbformat.v4.new_markdown_cell(f"On your own: try it.\n\n{text}"))
    nbformat.write(notebook, folder / f"{name}.ipynb")


def test_a_solution_runs_below_the_chapter_and_leaves_its_notebook_and_measures_alone(chapters):
    add_solution(chapters, "01_install", "import time\ntime.sleep(5)\nprint('Result: twice', 2 * MAX_STEPS)")
    run = run_chapter("01_install", executed_dir=chapters / "executed", solutions=True)
    assert (run.failure, run.result) == ("", "1 steps")
    assert run.seconds < json.loads(run.executed.read_text())["metadata"]["papermill"]["duration"] - 4
    assert [cell.cell_type for cell in nbformat.read(run.executed, 4).cells] == ["code", "code", "markdown"]
    assert json.loads(run.executed.with_suffix(".solutions.json").read_text()) == ["Result: twice 2\n"]


def test_a_solution_that_raises_is_a_failure_that_names_it(chapters, capsys):
    add_solution(chapters, "01_install", "print(\n    MAX_STEPS + 'x')")
    assert main(["01_install", "--solutions", "-p", "RUN_DIR", str(chapters / "run")]) == 1
    assert "01_install failed in solution 1 `print(`: TypeError: unsupported operand" in capsys.readouterr().out


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


@pytest.fixture
def run(tmp_path, monkeypatch):
    """A run folder in an otherwise empty place, where the series, the home and the working directory are too."""
    for name in ("series", "home", "here", "run"):
        (tmp_path / "place" / name).mkdir(parents=True)
    monkeypatch.setattr(series, "ROOT", tmp_path / "place/series")
    monkeypatch.setenv("HOME", str(tmp_path / "place/home"))
    monkeypatch.chdir(tmp_path / "place/here")
    (tmp_path / "place/run/handoff.json").write_text("{}")
    return tmp_path / "place/run"


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize("mark", ["handoff.json", "executed/01_install.ipynb"])
def test_the_last_run_is_set_aside(run, mark):
    (run / "handoff.json").unlink()
    (run / mark).parent.mkdir(exist_ok=True)
    (run / mark).write_text("kept")
    (run / ".03_data.lock").write_text("")  # held by nobody
    set_run_aside(run)
    assert not run.exists() and (run.with_name("run.previous-1") / mark).read_text() == "kept"


def test_fresh_of_a_link_sets_aside_what_it_leads_to_and_the_link_leads_to_the_next_run(chapters, run):
    (run.parent / "link").symlink_to(run)
    assert main(["01_install", "--fresh", "-p", "RUN_DIR", str(run.parent / "link")]) == 0
    assert names_in(run.parent / "run.previous-1") == ["handoff.json"]
    assert (run.parent / "link").readlink() == run and names_in(run) == ["executed"]


def test_without_a_run_nothing_is_renamed(run):
    (run.parent / "empty").mkdir()
    for name in ("empty", "none"):
        set_run_aside(run.parent / name)
    assert names_in(run.parent) == ["empty", "here", "home", "run", "series"]


@pytest.mark.parametrize("name", ["photos", "photos/a.jpg", "link", "..", "../series", "~", ".", "../run/.."])
@pytest.mark.parametrize("marked", [False, True])
def test_fresh_refuses_what_is_no_run_or_holds_more_than_one(chapters, run, capsys, monkeypatch, name, marked):
    monkeypatch.setattr(series, "set_aside", lambda path: pytest.fail(f"{path} was renamed"))
    (run.parent / "here" / "photos").mkdir()
    (run.parent / "here" / "photos" / "a.jpg").write_text("")
    (run.parent / "here" / "link").symlink_to("photos")
    for each in ("", "series", "home", "here"):
        (run.parent / each / "mine").write_text("")
        if marked:  # somebody ran the series right there
            (run.parent / each / "handoff.json").write_text("{}")
    assert main(["01_install", "--fresh", "-p", "RUN_DIR", name]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "found files of another kind, expected only a run" in line


@pytest.mark.parametrize("name", [".03_data.lock", ".04_train.lock", ".handoff.lock", "checkpoints/.lock"])
def test_a_run_that_another_process_has_open_is_not_set_aside_until_it_has_ended(run, name):
    (run / "checkpoints").mkdir()
    with FileLock(run / name), pytest.raises(SeriesError, match="found another process that has it open, expected one"):
        set_run_aside(run)
    assert names_in(run.parent) == ["here", "home", "run", "series"]
    set_run_aside(run)
    assert names_in(run.parent) == ["here", "home", "run.previous-1", "series"]


@pytest.mark.parametrize(
    "typed",
    [
        ["MAX_STEPS", "0"],
        ["GGUF", "[8]"],
        ["RUN_DIR", "other"],
        ["MAX_STEP", "5"],
        ["MAX_STEPS", "5", "-p", "MAX_STEPS", "6"],
        ["MAX_STEPS", "5", "-f", "none.toml"],
    ],
)
def test_fresh_sets_nothing_aside_for_a_command_that_is_refused(chapters, run, typed):
    assert main(["01_install", "--fresh", "-p", "RUN_DIR", str(run), "-p", *typed]) == 2
    assert names_in(run.parent) == ["here", "home", "run", "series"] and names_in(run) == ["handoff.json"]


def test_fresh_of_a_name_that_gets_too_long_is_one_line(chapters, run, capsys):
    longest = run.rename(run.with_name("x" * 250))
    assert main(["01_install", "--fresh", "-p", "RUN_DIR", str(longest)]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert "found File name too long" in line and (longest / "handoff.json").exists()


@pytest.mark.parametrize("name", ["file", "file/run", "loop", "/proc/run", "/dev/null"])
def test_a_folder_that_cannot_be_written_is_one_line(chapters, run, capsys, name):
    Path("file").write_text("")
    Path("loop").symlink_to("loop")
    assert main(["01_install", "-p", "RUN_DIR", name]) == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("RUN_DIR ") and "expected a folder that can be written. Fix: " in line


def test_a_full_disk_is_a_failure_in_one_line(chapters, run, capsys):
    executed = run / "executed" / "01_install.ipynb"
    executed.parent.mkdir()
    executed.symlink_to("/dev/full")
    assert main(["01_install", "-p", "RUN_DIR", str(run)]) == 1
    printed = capsys.readouterr()
    assert f"01_install failed in {executed}: found No space left on device, expected room" in printed.out
    assert printed.err == "" and not psutil.Process().children(recursive=True)


def test_measures_that_cannot_be_written_are_one_line_below_the_table(chapters, run, capsys):
    (run / "executed").mkdir()
    (run / "executed" / ".unfinished-measured.json").symlink_to("/dev/full")
    (run / "executed" / "measured.json").write_text('{"profile": "ru')  # as an earlier one left it
    assert main(["01_install", "-p", "RUN_DIR", str(run)]) == 2
    printed = capsys.readouterr()
    [line] = printed.err.splitlines()
    assert "measured.json: found No space left on device" in line and "1 steps" in printed.out
    assert main(["01_install", "-p", "RUN_DIR", str(run)]) == 0
    assert json.loads((run / "executed/measured.json").read_text())["profile"] == "run"


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["SIGINT", "SIGTERM"])
def test_a_signal_ends_the_kernel_and_shows_what_ran(chapters, number):
    write_chapter(
        chapters,
        "03_data",
        "import os, pathlib, subprocess, time",
        "child = subprocess.Popen(['sleep', '600'])",
        "pathlib.Path(RUN_DIR, 'kernel').write_text(f'{os.getpid()} {child.pid} ')\ntime.sleep(600)",
    )
    given = ["01_install", "03_data", "-p", "RUN_DIR", str(chapters / "run")]
    code = (
        "import pathlib, sys\nfrom tests.maintain import series\n"
        f"series.NOTEBOOKS, series.CHAPTER_NAMES = pathlib.Path({str(chapters)!r}), {series.CHAPTER_NAMES!r}\n"
        f"sys.exit(series.main({given!r}))"
    )
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **options) as runner:
        pids = chapters / "run" / "kernel"
        while not (pids.exists() and pids.read_text().endswith(" ")):
            assert runner.poll() is None, runner.communicate()
            time.sleep(0.1)
        runner.send_signal(number)
        printed, error = runner.communicate(timeout=60)
    assert (runner.returncode, error) == (130, "")
    assert "1 steps" in printed and "03_data failed in a cell that Ctrl-C or SIGTERM stopped" in printed
    assert not [pid for pid in map(int, pids.read_text().split()) if is_alive(pid)]


def is_alive(pid):
    return psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE


def test_a_run_folder_with_braces_is_taken_as_it_is(chapters):
    assert main(["01_install", "-p", "RUN_DIR", str(chapters / "{MAX_STEPS} {x")]) == 0
    assert (chapters / "{MAX_STEPS} {x" / "executed" / "01_install.ipynb").exists()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["-p", "STEP", "5"], "parameter: found STEP"),
        (["-p", "PROFILE", "cpu"], "parameter: found PROFILE"),
        (["07_more"], "chapter: found 07_more"),
        (["-p", "MAX_STEPS", "0"], "MAX_STEPS: found 0, expected a whole number"),
        (["-p", "MAX_STEPS", "True"], "MAX_STEPS: found True"),
        (["-p", "MAX_STEPS", "many"], "MAX_STEPS: found 'many'"),
        (["-p", "RUN_DIR", "5"], "RUN_DIR: found 5"),
        (["-p", "RUN_DIR", "gs://bucket"], "RUN_DIR: found 'gs://bucket'"),
        (["-p", "GGUF", "q8_0"], "GGUF: found 'q8_0'"),
        (["-p", "GGUF", "['q8_0', 'q8_0']"], "GGUF: found ['q8_0', 'q8_0']"),
        (["-p", "MAX_STEPS", "1_000"], "MAX_STEPS: found '1_000'"),
        (["-p", "RUN_DIR", "~nobody-here/run"], "RUN_DIR: found '~nobody-here/run'"),
        (["-p", "RUN_DIR", '"a\\u0000b"'], r"RUN_DIR: found 'a\x00b'"),
        (["-p", "RUN_DIR", "a\nb"], r"RUN_DIR: found 'a\nb'"),
        (["-p", "RUN_DIR", "x" * 256], "(256 characters), expected a folder"),
        (["-p", "MAX_STEPS", "5", "-p", "MAX_STEPS", "6"], "-p MAX_STEPS: found 5 and 6, expected one value"),
        (["-p", "GGUF", "[]", "-p", "GGUF", "[]"], "-p GGUF: found [] and []"),
        (["-p", "", "5"], "parameter: found ''"),
        (["-p", "A\nB", "5"], r"parameter: found 'A\nB'"),
        (["-p", "01_install", "5"], "parameter: found 01_install"),
        (["01_install", "-p", "03_data", '{"MAX_STEPS": 5}'], "parameter: found 03_data"),
        (["-p", "03_data", '{"03_data": {"MAX_STEPS": 5}}'], "parameter: found 03_data"),
        ([""], "chapter: found ''"),
        (["a\nb"], r"chapter: found 'a\nb'"),
        (["03_data", "01_install", "03_data"], "chapter: found 03_data twice"),
        (["-f", "/"], "parameter file /: found Is a directory"),
        (["-f", sys.executable], "found 'utf-8' codec can't decode"),
        (["-f", "/none.toml"], "parameter file /none.toml: found No such file"),
        (["-f", "/none.toml", "-f", "/other.toml"], "command line: found 2 times -f"),
        (["-p", "MAX_STEPS"], "command line: found argument -p: expected 2 arguments"),
        (["--fres"], "command line: found unrecognized arguments: --fres"),
        (["--open", "-p", "MAX_STEPS", "0"], "MAX_STEPS: found 0"),
    ],
)
def test_main_refuses(chapters, capsys, monkeypatch, arguments, said):
    monkeypatch.setattr("papermill.execute_notebook", lambda *arguments, **given: pytest.fail("a chapter was run"))
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Fix: " in error and len(error.splitlines()) == 1 and len(error) < 800


def test_a_file_is_refused_for_a_value_that_is_out_of_range(chapters, tmp_path, capsys):
    (tmp_path / "some.toml").write_text("MAX_STEPS = 1.5\n")
    assert main(["-f", str(tmp_path / "some.toml")]) == 2
    assert "MAX_STEPS: found 1.5, expected a whole number" in capsys.readouterr().err


def test_unknown_parameters_are_an_error():
    with pytest.raises(SeriesError, match="MAX_STEP,"):
        check_parameters(["04_train"], {"MAX_STEP": 5})
    check_parameters(["04_train"], {"MAX_STEPS": 5})


def test_a_file_of_parameters_is_for_the_series_and_a_typed_one_for_the_chapters_named(chapters, tmp_path, capsys):
    notebook = nbformat.read(chapters / "03_data.ipynb", 4)
    notebook.cells[0].source = "ROWS = 5\nRUN_DIR = 'runs/llama'"
    notebook.cells[1].source = "print('Result: reached')"
    nbformat.write(notebook, chapters / "03_data.ipynb")
    file = tmp_path / "parameters.toml"
    file.write_text(f"ROWS = 9\nMAX_STEPS = 2\nRUN_DIR = '{tmp_path / 'run'}'\n")
    assert main(["03_data", "-f", str(file)]) == 0
    assert main(["03_data", "-f", str(file), "-p", "MAX_STEPS", "2"]) == 2
    assert "found MAX_STEPS" in capsys.readouterr().err
    file.write_text("ROWS = 9\nSTEP = 2\n")
    assert main(["03_data", "-f", str(file)]) == 2
    assert "found STEP," in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "value"),
    [
        *[("60", 60), ("1e-4", 1e-4), ("true", True), ("False", False), ("None", None), ("cpu", "cpu"), ("", "")],
        *[("[]", []), ('["q8_0"]', ["q8_0"]), ("['q8_0', 'q4_0']", ["q8_0", "q4_0"]), ("'5'", "5")],
        *[("my rows.jsonl", "my rows.jsonl"), ("a/b", "a/b"), ("[q8_0]", "[q8_0]"), ("5 6", "5 6"), ("(" * 999,) * 2],
        *[("__import__('os')", "__import__('os')"), ("1\0", "1\0"), (" 5", 5)],
        *[(".5", 0.5), ("5.", 5.0), ("+5", 5), ("-5", -5), ("1E-4", 1e-4), ("null", None), ('{"a": 1}', {"a": 1})],
        *[("['q8_0',]", ["q8_0"]), ("[ 'q8_0' , 5, True ]", ["q8_0", 5, True]), ('"5"', "5"), ("0", 0)],
        *[(text, text) for text in ("1_000", "0x10", "0b1", "0o7", "1j", "b'x'", "(1,2)", "(5)", "{1}", "{'a': 1}")],
        *[
            (text, text)
            for text in ("1_0e-4", "[1_000]", "[{1}]", "1,2", "'a', 'b'", "'a' 'b'", "['a' 'b']", "[1], [2]")
        ],
        *[
            (text, text)
            for text in ("٦٠", "6٠", "NaN", "Infinity", "-Infinity", "nan", "inf", "FALSE", "no", "9" * 5000)
        ],
        *[(text, text) for text in ("[" * 10**5, "{" * 10**5, "'" * 10**5, "[" + " " * 10**5, "1" * 10**5 + "x")],
    ],
    ids=lambda given: ascii(given)[:30],
)
def test_values_from_a_command_line(text, value):
    assert read_value(text) == value
    assert type(read_value(text)) is type(value)


def test_parameters_from_a_file(chapters, capsys):
    (chapters / "some.toml").write_text("# a comment\nMAX_STEPS = 3\n", encoding="utf-8")
    options = ["01_install", "-f", str(chapters / "some.toml"), "-p", "RUN_DIR", str(chapters / "run")]
    assert main(options) == 0
    assert "3 steps" in capsys.readouterr().out
    assert main([*options, "-p", "MAX_STEPS", "4"]) == 0
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
        ("['q8_0']", ["q8_0"]),
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
        ("A = " + "[" * 10**5, "recursion"),
        ("A = " + "9" * 5000, "digits"),
    ],
)
def test_files_that_are_refused(tmp_path, text, said):
    (tmp_path / "file.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SeriesError, match=f"file.toml: .*{said}"):
        read_parameter_file(tmp_path / "file.toml")


@pytest.mark.parametrize("text", ["A = {b = 1}\n", "[A]\nb = 1\n", "A.b = 1\n"])
def test_a_value_that_is_no_single_one_is_refused_by_its_name(tmp_path, text):
    (tmp_path / "file.toml").write_text(text, encoding="utf-8")
    with pytest.raises(SeriesError, match="file.toml, A: found .*`NAME = value`"):
        read_parameter_file(tmp_path / "file.toml")


def test_a_file_that_is_missing_or_empty(tmp_path):
    with pytest.raises(SeriesError, match="No such file"):
        read_parameter_file(tmp_path / "none.toml")
    (tmp_path / "file.toml").write_text("# nothing\n", encoding="utf-8")
    assert read_parameter_file(tmp_path / "file.toml") == {}
    (tmp_path / "file.toml").write_text("ROWS = 9\n", encoding="utf-8-sig")  # as Windows' editor writes it
    assert read_parameter_file(tmp_path / "file.toml") == {"ROWS": 9}


@pytest.mark.parametrize("profile", ["cpu", "quickstart", "t4", "t4-smollm2"])
def test_the_profiles_files_name_parameters_that_exist(profile):
    parameters = read_parameter_file(Path(__file__).parent / "profiles" / f"{profile}.toml")
    check_parameters(series.CHAPTER_NAMES, parameters)
    check_choices(parameters)
    assert (parameters["RUN_DIR"], parameters["OUTPUT_DIR"]) == (f"runs/{profile}", f"runs/{profile}/quickstart")
    files = [parameters[name] for name in ("DATASET", "REQUIREMENTS") if name in parameters]
    assert all((ROOT / file).is_file() for file in files) and parameters["REQUIREMENTS"] in files


def test_measures_of_a_part_are_added_to_those_of_the_same_profile(tmp_path):
    path = tmp_path / "measured.json"

    def measure(chapter, profile="cpu", **choices):
        run = ChapterRun(chapter, 90.0, "", "", tmp_path, 1.26)
        save_measures([run], path, profile=profile, choices=choices)
        return json.loads(path.read_text(encoding="utf-8"))

    measure("03_data", MAX_STEPS=9)
    both = measure("02_load_and_lora", MAX_STEPS=5, GGUF=[])
    assert both["choices"] == {"MAX_STEPS": 5, "GGUF": []}
    assert list(both["chapters"]) == ["02_load_and_lora", "03_data"]
    assert both["chapters"]["03_data"] == {"minutes": 1.5, "peak_gib": 1.3}
    assert both["seconds"]["03_data"] == 90.0
    assert list(measure("04_train", profile="t4")["chapters"]) == ["04_train"]


def test_paths_are_seen_from_where_the_command_is_typed(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my rows.jsonl").write_text("")
    given = {"DATASET": "my rows.jsonl", "RUN_DIR": "run", "DRIVE_DIR": "", "MODEL_NAME": "owner/name", "MAX_STEPS": 5}
    expected = {"DATASET": f"{tmp_path}/my rows.jsonl", "RUN_DIR": f"{tmp_path}/run"}
    assert resolved(given) == given | expected
    (tmp_path / "lock.txt").write_text("")
    assert resolved({"REQUIREMENTS": "lock.txt"}) == {"REQUIREMENTS": f"{tmp_path}/lock.txt"}
    assert resolved({"DATASET": "owner/rows", "OUTPUT_DIR": "~/out"}) == {
        "DATASET": "owner/rows",
        "OUTPUT_DIR": str(Path.home().resolve() / "out"),
    }


def test_the_small_models_name_is_the_folder_that_it_is_prepared_in(tmp_path, monkeypatch):
    monkeypatch.setattr(series, "prepare_smollm2", lambda: tmp_path / "prepared")
    monkeypatch.chdir(tmp_path)
    assert resolved({"MODEL_NAME": SMOLLM2}) == {"MODEL_NAME": str(tmp_path / "prepared")}
    (tmp_path / SMOLLM2).mkdir()  # a folder of the reader's own comes first
    assert resolved({"MODEL_NAME": SMOLLM2}) == {"MODEL_NAME": str(tmp_path / SMOLLM2)}


def test_a_run_folder_and_its_executed_notebooks_are_one_wherever_the_command_is_typed(chapters, monkeypatch):
    elsewhere = chapters / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    write_chapter(chapters, "03_data", "print('Result:', RUN_DIR)")
    assert main(["03_data", "-p", "RUN_DIR", "my run"]) == 0
    measured = json.loads((elsewhere / "my run/executed/measured.json").read_text(encoding="utf-8"))
    assert (measured["profile"], measured["choices"]) == ("my run", {"RUN_DIR": "my run"})
    assert series.read_result(elsewhere / "my run/executed/03_data.ipynb") == str(elsewhere / "my run")


def test_chapters_are_prepared_to_be_opened_with_the_choices_and_without_outputs(
    chapters, tmp_path, capsys, monkeypatch
):
    notebook = nbformat.read(chapters / "01_install.ipynb", 4)
    notebook.cells[1].execution_count = 2
    notebook.cells[1].outputs = [nbformat.v4.new_output("stream", text="Result: recorded\n")]
    nbformat.write(notebook, chapters / "01_install.ipynb")
    (chapters / "zh-CN").mkdir()
    nbformat.write(notebook, chapters / "zh-CN" / "01_install.ipynb")
    parameters = {"MAX_STEPS": 7, "GGUF": ["q8_0"], "RUN_DIR": "run", "ROWS": 5}
    monkeypatch.chdir(tmp_path)
    paths = prepare_chapters(["01_install", "03_data"], folder=tmp_path / "open", parameters=parameters)
    places = [path.relative_to(tmp_path / "open").as_posix() for path in paths]
    assert places == ["01_install.ipynb", "03_data.ipynb", "zh-CN/01_install.ipynb"]
    assert not (tmp_path / "run").exists()
    for path in paths:
        code = nbformat.read(path, 4).cells
        assert [(cell.outputs, cell.execution_count) for cell in code] == [([], None)] * len(code)
        choices = {}
        exec("\n".join(cell.source for cell in code[:2]), choices)
        del choices["__builtins__"]
        assert choices == {"MAX_STEPS": 7, "GGUF": ["q8_0"], "RUN_DIR": str(tmp_path / "run")}
    monkeypatch.setattr(series, "ROOT", tmp_path)
    assert main(["03_data", "--open", "-p", "MAX_STEPS", "9"]) == 0
    [prepared] = (tmp_path / "runs" / "open").iterdir()
    assert "Prepared: " in capsys.readouterr().out and "MAX_STEPS = 9" in prepared.read_text(encoding="utf-8")


TABLED = {"MAX_STEPS": 72, "DATASET": "a.jsonl", "MAX_NEW_TOKENS": 9, "00_quickstart": {"MAX_STEPS": 16}}


def test_a_chapters_own_table_goes_before_the_rest_and_what_is_typed_before_both(tmp_path):
    file = tmp_path / "choices.toml"
    file.write_text(series.as_toml(TABLED), encoding="utf-8")
    choices = series.read_choices(file, [])
    assert choices == TABLED
    assert series.of_chapter("00_quickstart", choices) == {"MAX_STEPS": 16, "DATASET": "a.jsonl"}
    assert series.of_chapter("04_train", choices) == {"MAX_STEPS": 72}
    typed = series.read_choices(file, [("MAX_STEPS", "5")])
    assert series.of_chapter("00_quickstart", typed)["MAX_STEPS"] == 5 == typed["MAX_STEPS"]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("[00_quickstart]\nMAX_STEPS = 0\n", "MAX_STEPS: found 0"),
        ("[00_quickstart]\nMICRO_BATCH = 2\n", "parameter: found MICRO_BATCH"),
        ("[07_other]\nMAX_STEPS = 5\n", "07_other"),
        ("[04_train]\nRUN_DIR = '~nobody-here'\n", "RUN_DIR: found '~nobody-here'"),
        ("[04_train.05_infer]\nMAX_STEPS = 5\n", "parameter: found 05_infer"),
        ("[04_train.04_train]\nMAX_STEPS = 5\n", "parameter: found 04_train"),
    ],
)
def test_a_table_is_checked_like_the_rest(tmp_path, text, said):
    file = tmp_path / "choices.toml"
    file.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        series.read_choices(file, [])
