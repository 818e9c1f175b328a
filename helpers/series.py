"""Run chapters headlessly with papermill: `python -m helpers.series` runs all of them and prints one table.

python -m helpers.series                              the series, as `make run` does
python -m helpers.series 05_infer -p MAX_STEPS 5      some chapters, with parameters of theirs
python -m helpers.series -f tests/profiles/t4.toml    parameters from a file; one that -p names too is taken from -p
"""

import argparse
import contextlib
import itertools
import json
import os
import re
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.base import InputError, short_path, text_table
from helpers.chapters import CHAPTER_NAMES

NOTEBOOKS = Path(__file__).resolve().parent.parent / "notebooks"
# Colab's ipykernel 6.17 hangs each second time it is asked to end: it flushes into a thread that it has stopped. After
# 2.5 seconds it is killed; so kill it, and its children, at once. The chapters leave nothing to be done at that point.
AT_THE_END = {"shutdown_kernel": "immediate"}
RESULT = re.compile(r"^Result: (.+)$", re.MULTILINE)


class SeriesError(InputError):
    """No such chapter or parameter, a parameter file that cannot be read, or a kernel that does not start."""


@dataclass(frozen=True)
class ChapterRun:
    """One executed chapter.

    Attributes:
        chapter: its name, such as "04_train".
        seconds: wall time, kernel start included.
        failure: "" or which cell failed and why.
        result: its key figure, from the line `Result: …` that its last code cell prints.
        executed: the executed notebook.
        peak_gib: the most memory that the chapter's kernel and its children held together, sampled.
    """

    chapter: str
    seconds: float
    failure: str
    result: str
    executed: Path
    peak_gib: float


def chapter_parameters(chapter: str) -> set[str]:
    """The names that a chapter's parameters cell sets."""
    import papermill

    if chapter not in CHAPTER_NAMES:
        expected = f"one of {', '.join(CHAPTER_NAMES)}"
        raise SeriesError("chapter", found=chapter, expected=expected, fix="name one of these")
    if not (NOTEBOOKS / f"{chapter}.ipynb").is_file():
        where = f"notebooks/{chapter}.ipynb"
        raise SeriesError(where, found="no such file", expected="a built notebook", fix="run `make notebooks`")
    return set(papermill.inspect_notebook(str(NOTEBOOKS / f"{chapter}.ipynb")))


def check_parameters(chapters: Iterable[str], parameters: Mapping[str, Any]) -> None:
    """Raises SeriesError for a parameter that no chapter has (papermill would only warn and run without it)."""
    known = set().union(*(chapter_parameters(chapter) for chapter in chapters))
    for name in parameters:
        if name not in known:
            raise SeriesError("parameter", found=name, expected=f"one of {', '.join(sorted(known))}", fix="correct it")


def run_chapter(chapter: str, *, executed_dir: str | Path, parameters: Mapping[str, Any] | None = None) -> ChapterRun:
    """Execute one chapter; the executed notebook is written to `executed_dir`, also when a cell fails.

    Args:
        chapter: a name of `CHAPTER_NAMES`.
        executed_dir: where the executed notebook goes.
        parameters: values for names that the chapter's parameters cell sets; names that only other chapters have are
            left out, so that one set serves the series.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    known = chapter_parameters(chapter)
    source = NOTEBOOKS / f"{chapter}.ipynb"
    executed = Path(executed_dir) / source.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    given = {name: value for name, value in (parameters or {}).items() if name in known}
    start, failure = time.perf_counter(), ""
    with peak_of_children() as peak:
        try:
            options = dict(kernel_name="python3", cwd=NOTEBOOKS, progress_bar=sys.stderr.isatty(), **AT_THE_END)
            with_new_ports(lambda: papermill.execute_notebook(source, executed, given, **options))
        except PapermillExecutionError as error:
            first_line = error.source.strip().splitlines()[0]
            failure = f"code cell [{error.exec_count}] `{first_line}`: {error.ename}: {error.evalue}"
        except DeadKernelError:
            failure = "a cell that ended the kernel: out of memory, or a crash of a library"
        except SeriesError as error:
            failure = str(error)
    seconds, result = time.perf_counter() - start, "" if failure else read_result(executed)
    return ChapterRun(chapter, seconds, failure, result, executed, peak[0])


def with_new_ports(execute: Callable[[], Any], *, starts: int = 3) -> Any:
    """What `execute` returns, which starts a kernel and runs a notebook; called again while the kernel does not start.

    Jupyter chooses a kernel's ports some time before the kernel opens them: another program can be faster. The kernel
    then ends before its first cell, so nothing runs twice.

    Raises:
        SeriesError: it did not start so many times. The kernel's own message is on the standard error output.
    """
    for _ in range(starts):
        try:
            return execute()
        except RuntimeError as error:
            if "Kernel died before replying" not in str(error):
                raise
    found, fix = f"{starts} kernels that ended while they started", "read the kernel's own message, further up"
    raise SeriesError("Jupyter's kernel python3", found=found, expected="one that starts", fix=fix)


@contextlib.contextmanager
def peak_of_children() -> Iterator[list[float]]:
    """Sample this process's descendants twice a second; yields a list whose one item is their peak so far, in GiB."""
    import psutil

    peak, done = [0.0], threading.Event()

    def sample() -> None:
        while not done.wait(0.5):
            total = 0
            for child in psutil.Process().children(recursive=True):
                with contextlib.suppress(psutil.Error):
                    total += child.memory_info().rss
            peak[0] = max(peak[0], total / 2**30)

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()


def read_result(executed: Path) -> str:
    """The chapter's key figure: what its last `Result: …` line says."""
    import nbformat

    printed = "\n".join(
        output.get("text", "")
        for cell in nbformat.read(executed, as_version=4).cells
        if cell.cell_type == "code"
        for output in cell.outputs
    )
    found = RESULT.findall(printed)
    return found[-1] if found else ""


def run_chapters(
    chapters: Iterable[str], *, executed_dir: str | Path, parameters: Mapping[str, Any] | None = None
) -> list[ChapterRun]:
    """Run chapters in order, with a line when each starts and ends; stops after the first that fails.

    Inside a chapter catch-up is off: the chapters before it have just run, so what is missing is a fault of theirs.
    """
    chapters, runs, parameters = list(chapters), [], absolute_paths(parameters or {})
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else each kernel start prints four lines about it
    before = {name: os.environ.get(name) for name in ("CATCH_UP", "HEADLESS")}
    os.environ |= {"CATCH_UP": "0", "HEADLESS": "1"}  # HEADLESS: Colab's kernel does not know that nobody reads along
    try:
        for number, chapter in enumerate(chapters, 1):
            print(f"[{number}/{len(chapters)}] {chapter} …", flush=True)
            run = run_chapter(chapter, executed_dir=executed_dir, parameters=parameters)
            runs.append(run)
            print(f"[{number}/{len(chapters)}] {chapter}: {run.seconds:.0f} s, {run.failure or run.result}", flush=True)
            if run.failure:
                break
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}
    return runs


def absolute_paths(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with paths as seen from here, because chapters run in the folder `notebooks`.

    Folders that may have to be made are paths in any case, data sets and models where there is such a file or folder.

    Example, in /home/me with a file my.jsonl: {"DATASET": "my.jsonl"} -> {"DATASET": "/home/me/my.jsonl"}
    """
    made = {name: str(parameters[name]) for name in ("RUN_DIR", "DRIVE_DIR") if parameters.get(name)}
    given = {name: str(parameters[name]) for name in ("DATASET", "MODEL_NAME") if parameters.get(name)}
    found = {name: path for name, path in given.items() if Path(path).expanduser().exists()}
    return {**parameters, **{name: str(Path(path).expanduser().resolve()) for name, path in (made | found).items()}}


def save_measures(runs: Iterable[ChapterRun], path: Path, *, profile: str) -> None:
    """Write what the README, the budget lines and the regression quote: time and memory, and where they were measured.

    Chapters that an earlier run of the same profile on the same machine measured, and this one left out, are kept.
    """
    import torch

    gpu = torch.cuda.is_available()
    # Losses depend on a CPU's kind, not on how many cores it has: the regression asks for this name.
    capability = torch.backends.cpu.get_cpu_capability()
    kind = torch.cuda.get_device_name(0) if gpu else f"{capability} CPU"
    device = kind if gpu else f"{os.cpu_count()} CPU cores with {capability}"
    where = {"profile": profile, "device": device, "kind": kind}
    before = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    kept = before if all(before.get(name) == value for name, value in where.items()) else {}
    chapters = {
        run.chapter: {"minutes": round(run.seconds / 60, 1), "peak_gib": round(run.peak_gib, 1)} for run in runs
    }
    seconds = {run.chapter: round(run.seconds, 1) for run in runs}
    measured = where | {
        "date": time.strftime("%Y-%m-%d"),
        "chapters": dict(sorted((kept.get("chapters", {}) | chapters).items())),
        "seconds": dict(sorted((kept.get("seconds", {}) | seconds).items())),
    }
    path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def read_value(text: str) -> Any:
    """A parameter's value as typed on a command line: JSON where it is JSON, else the string itself.

    Example: "60" -> 60, "1e-4" -> 0.0001, "true" -> True, "cpu" -> "cpu"
    """
    try:
        return json.loads(text)
    except ValueError:
        return text


def read_parameter_file(path: str | Path) -> dict[str, Any]:
    """The parameters in a TOML file: one `NAME = value` a line.

    Raises:
        SeriesError: no such file, not TOML, or a value that holds several.

    Example: `LEARNING_RATE = 1e-4` -> {"LEARNING_RATE": 0.0001}
    """
    where, expected = f"parameter file {path}", "one `NAME = value` a line"
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise SeriesError(where, found=str(error.strerror), expected="a TOML file", fix="correct the path") from None
    except ValueError as error:  # not TOML, or not UTF-8
        raise SeriesError(where, found=str(error), expected=f"TOML, {expected}", fix="correct that line") from None
    for name, value in values.items():
        if not isinstance(value, str | int | float | bool):
            raise SeriesError(f"{where}, {name}", found=repr(value), expected=expected, fix="write it so")
    return values


def set_aside(folder: Path) -> Path:
    """Rename a folder so that nothing in it is lost; its new place.

    Example: runs/cpu -> runs/cpu.previous-1, or -2 where that is there already
    """
    numbers = (folder.with_name(f"{folder.name}.previous-{number}") for number in itertools.count(1))
    return folder.rename(next(place for place in numbers if not place.exists()))


def main(arguments: list[str] | None = None) -> int:
    from helpers.profiles import choose_profile

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", default=list(CHAPTER_NAMES), metavar="CHAPTER", help="default: all")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a parameter")
    parser.add_argument("-f", type=Path, metavar="FILE", help="a TOML file of parameters")
    parser.add_argument("--fresh", action="store_true", help="set the run folder aside first, under a number")
    options = parser.parse_args(arguments)
    try:
        parameters = read_parameter_file(options.f) if options.f else {}
        check_parameters(CHAPTER_NAMES, parameters)  # a file is for the series, whatever part of it runs now
        typed = {name: read_value(value) for name, value in options.p}
        check_parameters(options.chapters, typed)
        parameters |= typed
        profile = choose_profile(parameters.get("PROFILE", "auto"), run_dir=parameters.get("RUN_DIR"))
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    if options.fresh and profile.run_dir.exists():
        print(f"The run that was there is now {short_path(set_aside(profile.run_dir))}")
    runs = run_chapters(options.chapters, executed_dir=profile.run_dir / "executed", parameters=parameters)
    verdict = "FAILED" if runs[-1].failure else "ok"
    rows = [
        [run.chapter, round(run.seconds), f"{run.peak_gib:.1f}", "FAILED" if run.failure else "ok", run.result]
        for run in runs
    ]
    total, peak = sum(run.seconds for run in runs), max(run.peak_gib for run in runs)
    rows.append(["in all", round(total), f"{peak:.1f}", verdict, ""])
    print("\n" + text_table(["chapter", "seconds", "peak GiB", "verdict", "key figure"], rows))
    save_measures(runs, profile.run_dir / "executed" / "measured.json", profile=profile.name)
    if runs[-1].failure:
        print(f"\n{runs[-1].chapter} failed in {runs[-1].failure}\nExecuted notebook: {short_path(runs[-1].executed)}")
    return 1 if runs[-1].failure else 0


if __name__ == "__main__":
    sys.exit(main())
