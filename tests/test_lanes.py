"""Chapters side by side: what waits for what, and what one that fails or is stopped leaves."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest
from test_series import ROOT, write_chapter

from tests.maintain import series
from tests.maintain.lanes import cores_here, fork, ready
from tests.maintain.series import run_chapters

NAMES = ("03_data", "04_train", "07_when_it_goes_wrong")


@pytest.fixture
def chapters(tmp_path, monkeypatch):
    """Three chapters that write when they began and ended, the second of which needs the first."""
    for name in NAMES:
        write_chapter(tmp_path, name, *times(tmp_path / name))
    monkeypatch.setattr(series, "NOTEBOOKS", tmp_path)
    return tmp_path


def times(path):
    begin = f"import os, pathlib, time\nfile = pathlib.Path({str(path)!r}).with_suffix('.times')"
    return f"{begin}\nbegan = time.time()", "time.sleep(3)\nfile.write_text(f'{began} {time.time()}')"


def when(folder, name):
    return tuple(map(float, (folder / f"{name}.times").read_text().split()))


def test_what_needs_nothing_runs_beside_and_what_needs_something_waits(chapters, capsys, monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    write_chapter(chapters, NAMES[0], *times(chapters / NAMES[0]), "print('Result:', os.environ['OMP_NUM_THREADS'])")
    runs = run_chapters(NAMES, executed_dir=chapters / "executed", lanes=2)
    assert [(run.chapter, run.failure) for run in runs] == [(name, "") for name in NAMES]
    assert runs[0].result == str(max(1, cores_here() // 2)) and "OMP_NUM_THREADS" not in os.environ
    data, train, other = (when(chapters, name) for name in NAMES)
    assert train[0] > data[1] and other[0] < data[1]
    assert all(run.peak_gib > 0.02 and run.seconds > 3 and run.executed.exists() for run in runs)
    assert capsys.readouterr().out.splitlines()[0] == "[1/3] 03_data …"


def test_none_starts_after_one_that_failed_and_what_runs_ends(chapters):
    write_chapter(chapters, NAMES[0], "1 / 0")
    runs = run_chapters(NAMES, executed_dir=chapters / "executed", lanes=2)
    assert [run.chapter for run in runs] == [NAMES[0], NAMES[2]]
    assert "ZeroDivisionError" in runs[0].failure and not runs[1].failure
    assert not (chapters / "executed" / f"{NAMES[1]}.ipynb").exists()


def test_a_process_that_is_killed_is_a_failure_of_its_chapter_alone(chapters):
    write_chapter(chapters, NAMES[2], "import os, signal, psutil", "psutil.Process().parent().kill()\nimport time")
    runs = run_chapters(NAMES, executed_dir=chapters / "executed", lanes=2)
    assert [bool(run.failure) for run in runs] == [run.chapter == NAMES[2] for run in runs]
    assert "status -9" in runs[-1].failure


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda number: number.name)
def test_a_signal_ends_every_process(chapters, number):
    source = "import os, pathlib, subprocess, time\nchild = subprocess.Popen(['sleep', '600'], stdout=-3, stderr=-3)"
    for name in (NAMES[0], NAMES[2]):
        file = str(chapters / f"{name}.pid")
        write_chapter(
            chapters, name, f"{source}\npathlib.Path({file!r}).write_text(f'{{os.getpid()}}')", "time.sleep(600)"
        )
    code = (
        "import pathlib, sys\nfrom tests.maintain import series\n"
        f"series.NOTEBOOKS, series.CHAPTER_NAMES = pathlib.Path({str(chapters)!r}), {NAMES!r}\n"
        "series.lanes_here = lambda: 2\n"
        f"sys.exit(series.main([*{NAMES!r}, '-p', 'RUN_DIR', {str(chapters / 'run')!r}]))"
    )
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    with subprocess.Popen([sys.executable, "-c", code], **options) as runner:
        files = [chapters / f"{name}.pid" for name in (NAMES[0], NAMES[2])]
        while not all(file.exists() and file.read_text() for file in files):
            assert runner.poll() is None, runner.communicate()
            time.sleep(0.1)
        below = psutil.Process(runner.pid).children(recursive=True)
        runner.send_signal(number)
        printed, error = runner.communicate(timeout=60)
    if number != signal.SIGKILL:
        assert (runner.returncode, error) == (130, "")
        assert printed.count("failed in a cell that Ctrl-C or SIGTERM stopped") == 2
    _, alive = psutil.wait_procs(below, timeout=15)
    # Whose kernel nobody could end in an orderly way has left what a cell started itself.
    assert not alive or (number == signal.SIGKILL and {process.name() for process in alive} == {"sleep"})
    for process in alive:
        process.kill()


@pytest.mark.parametrize(
    ("waiting", "unfinished", "expected"),
    [
        (["04_train", "07_when_it_goes_wrong"], {"03_data", "04_train"}, ["07_when_it_goes_wrong"]),
        (["04_train", "05_infer"], {"04_train", "05_infer"}, ["04_train"]),
        (["05_infer", "06_save"], {"05_infer", "06_save"}, ["05_infer", "06_save"]),
        (["06_save"], {"03_data"}, []),
    ],
)
def test_a_chapter_waits_for_those_whose_artefacts_it_needs(waiting, unfinished, expected):
    assert ready(waiting, unfinished) == expected


@pytest.mark.parametrize(
    ("chapters", "forks"),
    [(("03_data", "04_train"), False), (("04_train", "05_infer", "06_save"), True), (NAMES, True)],
)
def test_a_chain_of_chapters_keeps_all_cores(chapters, forks):
    assert fork(chapters) is forks
