"""Run chapters headlessly with papermill: `python -m tests.maintain.series` runs all of them and prints one table.

python -m tests.maintain.series -f tests/profiles/cpu.toml     the series, as `make run` does
python -m tests.maintain.series 05_infer -p MAX_STEPS 5        some chapters, with choices of theirs
python -m tests.maintain.series --open -f tests/profiles/cpu.toml     prepare them with these choices, to be opened
python -m tests.maintain.series --solutions 05_infer      the solutions to its exercises too, which are not measured

A choice that both -f and -p name is taken from -p. Without either, a chapter has the values of its page: a T4's.
"""

import argparse
import ast
import contextlib
import itertools
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
import tomllib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from helpers.base import ROOT, InputError, replace_file, set_aside, short_path, text_table
from helpers.chapters import CHAPTER_NAMES
from helpers.environment import check_choices
from helpers.environment.choices import bare, shown
from helpers.export.gguf import bound_process, find_llama_cpp
from helpers.handoff.folder import check_writable, one_line
from tests.maintain.lanes import fork, in_lanes, lanes_here, threads_each
from tests.maintain.smollm2 import NAME as SMOLLM2
from tests.maintain.smollm2 import prepare_smollm2

NOTEBOOKS = ROOT / "notebooks"
RUN_DIR = "runs/llama"  # where the pages write to, unless a choice says otherwise
# Colab's ipykernel 6.17 hangs each second time it is asked to end: it flushes into a thread that it has stopped. After
# 2.5 seconds it is killed; so kill it, and its children, at once. The chapters leave nothing to be done at that point.
AT_THE_END = {"shutdown_kernel": "immediate"}
STOPPED = "a cell that Ctrl-C or SIGTERM stopped"
TO_WRITE = ("room and permission to write", "free disk space, or set RUN_DIR to a folder of your own")
RESULT = re.compile(r"^Result: (.+)$", re.MULTILINE)
# What chapters 00, 04 and 05 print of a held-out question, up to the line below it.
ASKED = re.compile(r"^QUESTION  .+?^(?:TRAINED|AFTER|TUNED)  .+?(?=\n—)", re.MULTILINE | re.DOTALL)
# Python's own way to write what JSON has too. Not "1_000", "0x10", "1j", "b'x'", "(1, 2)": those stay text.
SCALAR = r"""(True|False|None|[-+]?(\d+(\.\d*)?|\.\d+)([eE][-+]?\d+)?|'[^'\\]*'|"[^"\\]*")"""
PLAIN = re.compile(rf"\s*({SCALAR}|\[\s*({SCALAR}\s*(,\s*{SCALAR}\s*)*(,\s*)?)?\])\s*", re.ASCII)


class SeriesError(InputError):
    """A wrong command line or parameter file, a folder that cannot be used, or a kernel that does not start."""


@dataclass(frozen=True)
class ChapterRun:
    """One executed chapter.

    Attributes:
        chapter: its name, such as "04_train".
        seconds: wall time, kernel start included.
        failure: "" or which cell failed and why.
        result: its key figure, from the line `Result: …` that its last code cell prints.
        asked: "" or a question with the untouched model's answer and the tuned one's, as the chapter prints them.
        executed: the executed notebook.
        peak_gib: the most memory that the chapter's kernel and its children held together, sampled.
    """

    chapter: str
    seconds: float
    failure: str
    result: str
    executed: Path
    peak_gib: float
    asked: str = ""


def chapter_parameters(chapter: str) -> set[str]:
    """The names that a chapter's parameters cell sets."""
    import papermill

    if chapter not in CHAPTER_NAMES:
        expected = f"one of {', '.join(CHAPTER_NAMES)}"
        raise SeriesError("chapter", found=bare(chapter), expected=expected, fix="name one of these")
    if not (NOTEBOOKS / f"{chapter}.ipynb").is_file():
        where = f"notebooks/{chapter}.ipynb"
        raise SeriesError(where, found="no such file", expected="a built notebook", fix="run `make notebooks`")
    return set(papermill.inspect_notebook(str(NOTEBOOKS / f"{chapter}.ipynb")))


def check_parameters(chapters: Iterable[str], parameters: Mapping[str, Any]) -> None:
    """Raises SeriesError for a parameter that no chapter has (papermill would only warn and run without it)."""
    of = {chapter: chapter_parameters(chapter) for chapter in chapters}
    for name, value in parameters.items():
        table = isinstance(value, dict) and name in of
        names, known = (value, of[name]) if table else ([name], set().union(*of.values()))
        for unknown in (name for name in names if name not in known):
            expected = f"one of {', '.join(sorted(known))}"
            raise SeriesError("parameter", found=bare(unknown), expected=expected, fix="correct it")


def of_chapter(chapter: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What one chapter takes of the series' parameters; a table that bears its name goes before the rest.

    Example: {"MAX_STEPS": 72, "00_quickstart": {"MAX_STEPS": 12}} -> {"MAX_STEPS": 12} for 00_quickstart
    """
    known, own = chapter_parameters(chapter), parameters.get(chapter, {})
    return {name: value for name, value in {**parameters, **own}.items() if name in known}


def run_chapter(
    chapter: str,
    *,
    executed_dir: str | Path,
    parameters: Mapping[str, Any] | None = None,
    progress_bar: bool = True,
    solutions: bool = False,
) -> ChapterRun:
    """Execute one chapter; the executed notebook is written to `executed_dir`, also when a cell fails.

    Args:
        chapter: a name of `CHAPTER_NAMES`.
        executed_dir: where the executed notebook goes.
        parameters: values for names that the chapter's parameters cell sets; names that only other chapters have are
            left out, so that one set serves the series.
        solutions: whether the solutions to its exercises run after its last cell. What they print is written to
            a file beside the executed notebook; they count neither in the time nor in the memory.
    """
    import papermill
    from nbclient.exceptions import DeadKernelError
    from papermill.exceptions import PapermillExecutionError

    from tests.maintain.solutions import SolutionError, read_solutions, use_engine

    given = of_chapter(chapter, parameters or {})
    source = NOTEBOOKS / f"{chapter}.ipynb"
    executed = Path(executed_dir) / source.name
    start, failure, ended, said = time.perf_counter(), "", [], []
    with peak_of_children() as peak:
        try:
            shown = progress_bar and sys.stderr.isatty()
            options = dict(kernel_name="python3", cwd=ROOT, progress_bar=shown, **AT_THE_END)
            if solutions:
                codes, end = read_solutions(source), lambda: ended.append((time.perf_counter(), peak[0]))
                options["engine_name"] = use_engine(codes, chapter_ended=end, said=said)
            with one_line(short_path(executed), *TO_WRITE):
                executed.parent.mkdir(parents=True, exist_ok=True)
                # papermill fills in what stands between braces
                paths = [re.sub("([{}])", r"\1\1", str(path)) for path in (source, executed)]
                with_new_ports(lambda: papermill.execute_notebook(*paths, given, **options))
        except PapermillExecutionError as error:
            first_line = error.source.strip().splitlines()[0]
            failure = f"code cell [{error.exec_count}] `{first_line}`: {error.ename}: {error.evalue}"
        except SolutionError as error:
            failure = str(error)
        except DeadKernelError:
            failure = "a cell that ended the kernel: out of memory, or a crash of a library"
        except InputError as error:
            failure = str(error)
        except KeyboardInterrupt:
            failure = STOPPED
    end, peak_gib = ended[-1] if ended else (time.perf_counter(), peak[0])
    if said and not failure:
        replace_file(executed.with_suffix(".solutions.json"), json.dumps(said, ensure_ascii=False).encode())
    result, asked = ("", "") if failure else (read_result(executed), read_asked(executed))
    return ChapterRun(chapter, end - start, failure, result, executed, peak_gib, asked)


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
    figures = RESULT.findall(printed_in(executed))
    return figures[-1] if figures else ""


def read_asked(executed: Path) -> str:
    """The first held-out question that a chapter shows with the untouched model's answer and the tuned one's, or ""."""
    asked = ASKED.search(printed_in(executed))
    return asked[0] if asked else ""


def printed_in(executed: Path) -> str:
    import nbformat

    cells = nbformat.read(executed, as_version=4).cells
    return "\n".join(output.get("text", "") for cell in cells for output in cell.get("outputs", ()))


def run_chapters(
    chapters: Iterable[str],
    *,
    executed_dir: str | Path,
    parameters: Mapping[str, Any] | None = None,
    lanes: int = 1,
    solutions: bool = False,
) -> list[ChapterRun]:
    """Run chapters with a line when each starts and ends; none starts after one has failed.

    Args:
        lanes: how many run at once, each with its share of the cores; a chapter waits for those whose artefacts it
            needs. 1: in the order in which they are given.
        solutions: as for `run_chapter`.
    """
    chapters, parameters = list(chapters), resolved(parameters or {})
    find_llama_cpp()  # the quickstart has no line for it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see `set_up`, which the quickstart does not call
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else each kernel start prints four lines about it
    given = {"HEADLESS": "1"}  # Colab's kernel does not know that nobody reads along
    given |= {"OMP_NUM_THREADS": threads_each(lanes)} if lanes > 1 else {}
    run, before = run_chapter if lanes == 1 else run_in_process, {name: os.environ.get(name) for name in given}
    os.environ |= given
    try:
        options = dict(executed_dir=executed_dir, parameters=parameters, solutions=solutions)
        runs = in_lanes(chapters, lambda name: run(name, **options), lanes)
    finally:
        for name, value in before.items():
            os.environ.pop(name)
            os.environ |= {} if value is None else {name: value}
    return sorted(runs, key=lambda run: chapters.index(run.chapter))


def run_in_process(
    chapter: str, *, executed_dir: str | Path, parameters: Mapping[str, Any], solutions: bool = False
) -> ChapterRun:
    """As `run_chapter`, in a process of its own, so that several can run at once and each be measured."""
    job = dict(chapter=chapter, executed_dir=str(executed_dir), parameters=parameters, notebooks=str(NOTEBOOKS))
    job["solutions"] = solutions
    command = [sys.executable, "-m", "tests.maintain.series", "--job", json.dumps(job)]
    # A session of its own: Ctrl-C reaches this process alone, which passes it on.
    options = dict(cwd=ROOT, stdout=subprocess.PIPE, text=True, start_new_session=True)
    with bound_process(command, **options) as process:
        last = process.communicate()[0].strip().splitlines()[-1:]
    if process.returncode or not last:
        why = "out of memory, or killed" if process.returncode < 0 else "what it said is further up"
        failure = f"its process, which ended with status {process.returncode}: {why}"
        failure = STOPPED if process.returncode in (130, -signal.SIGTERM) else failure
        return ChapterRun(chapter, 0.0, failure, "", Path(executed_dir) / f"{chapter}.ipynb", 0.0)
    run = ChapterRun(**json.loads(last[0]))
    return replace(run, executed=Path(run.executed))


def run_job(job: Mapping[str, Any]) -> int:
    """What `run_in_process` starts: one chapter, and what came of it as JSON in the last line."""
    global NOTEBOOKS
    NOTEBOOKS = Path(job["notebooks"])
    options = {name: job[name] for name in ("executed_dir", "parameters", "solutions")}
    run = run_chapter(job["chapter"], **options, progress_bar=False)  # two bars would overwrite each other
    print("\n" + json.dumps(asdict(run) | {"executed": str(run.executed)}))
    return 0


def resolved(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with paths as seen from here, and the small model's name as the folder that it is prepared in.

    Folders that may have to be made are paths in any case, files and models where there is such a file or folder.

    Example, in /home/me with a file my.jsonl: {"DATASET": "my.jsonl"} -> {"DATASET": "/home/me/my.jsonl"}
    """
    folders = ("RUN_DIR", "SCALED_DIR", "DRIVE_DIR", "OUTPUT_DIR")
    made = {name: str(parameters[name]) for name in folders if parameters.get(name)}
    given = {name: str(parameters[name]) for name in ("DATASET", "MODEL_NAME", "REQUIREMENTS") if parameters.get(name)}
    present = {name: path for name, path in given.items() if os.path.exists(os.path.expanduser(path))}
    paths = {name: os.path.realpath(os.path.expanduser(path)) for name, path in (made | present).items()}
    if given.get("MODEL_NAME") == SMOLLM2 and "MODEL_NAME" not in present:
        paths["MODEL_NAME"] = str(prepare_smollm2())
    return {**parameters, **paths}


def prepare_chapters(chapters: Iterable[str], *, folder: Path, parameters: Mapping[str, Any]) -> list[Path]:
    """Write both editions of the chapters with these choices put in and without outputs, to be opened in JupyterLab.

    Returns:
        Their paths; those of the Chinese edition lie in a folder `zh-CN`.
    """
    import nbformat
    import papermill

    given, paths = resolved(parameters), []
    for edition, chapter in itertools.product((".", "zh-CN"), chapters):
        if not (NOTEBOOKS / edition / f"{chapter}.ipynb").is_file():
            continue  # no Chinese text yet
        values = of_chapter(chapter, given)
        paths.append(folder / edition / f"{chapter}.ipynb")
        source = re.sub("([{}])", r"\1\1", str(NOTEBOOKS / edition / paths[-1].name))
        notebook = papermill.execute_notebook(source, None, values, prepare_only=True, progress_bar=False)
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            cell.outputs, cell.execution_count = [], None
        with one_line(short_path(paths[-1]), *TO_WRITE):
            paths[-1].parent.mkdir(parents=True, exist_ok=True)
            nbformat.write(notebook, paths[-1])
    return paths


def save_measures(
    runs: Iterable[ChapterRun], path: Path, *, profile: str, choices: Mapping[str, Any], lanes: int = 1
) -> None:
    """Write what the README, the budget lines and the regression quote: time, memory, choices, and where it was.

    Chapters that an earlier run of the same profile on the same machine measured, and this one left out, are kept.
    """
    import torch

    gpu = torch.cuda.is_available()
    # Losses depend on a CPU's kind, not on how many cores it has: the regression asks for this name.
    capability = torch.backends.cpu.get_cpu_capability()
    kind = torch.cuda.get_device_name(0) if gpu else f"{capability} CPU"
    used = threads_each(lanes) if lanes > 1 else os.environ.get("OMP_NUM_THREADS", "")
    device = kind if gpu else f"{f'{used} of ' if used else ''}{os.cpu_count()} CPU cores with {capability}"
    where = {"profile": profile, "device": device, "kind": kind}
    kept: dict[str, Any] = {}
    with contextlib.suppress(OSError, ValueError, AttributeError):  # none, or one that was cut off
        before = json.loads(path.read_text(encoding="utf-8"))
        kept = before if all(before.get(name) == where[name] for name in ("profile", "kind")) else {}
    chapters = {
        run.chapter: {"minutes": round(run.seconds / 60, 1), "peak_gib": round(run.peak_gib, 1)} for run in runs
    }
    seconds = {run.chapter: round(run.seconds, 1) for run in runs}
    measured = where | {
        "date": time.strftime("%Y-%m-%d"),
        "choices": dict(choices),
        "chapters": dict(sorted((kept.get("chapters", {}) | chapters).items())),
        "seconds": dict(sorted((kept.get("seconds", {}) | seconds).items())),
    }
    with one_line(short_path(path), *TO_WRITE):
        replace_file(path, (json.dumps(measured, indent=2) + "\n").encode())


def read_value(text: str) -> Any:
    """A choice as typed on a command line: a JSON value or a `PLAIN` one of Python, else the text itself.

    Example: "60" -> 60, "1e-4" -> 0.0001, "True" and "true" -> True, "cpu" -> "cpu", "1_000" -> "1_000"
    """
    with contextlib.suppress(ValueError, RecursionError):
        return json.loads(text, parse_constant=int)  # int refuses NaN and Infinity, which are no JSON
    if PLAIN.fullmatch(text):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(text)
    return text


def read_parameter_file(path: str | Path) -> dict[str, Any]:
    """The parameters in a TOML file: one `NAME = value` a line, and tables for single chapters, such as [05_infer].

    Raises:
        SeriesError: no such file, not TOML, or a value that holds several.

    Example: `LEARNING_RATE = 1e-4` -> {"LEARNING_RATE": 0.0001}
    """
    where, expected = f"parameter file {bare(str(path), most=500)}", "one `NAME = value` a line"
    try:
        values = tomllib.loads(Path(path).read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise SeriesError(where, found=str(error.strerror), expected="a TOML file", fix="correct the path") from None
    except (ValueError, RecursionError) as error:  # not TOML, or not UTF-8
        found = bare(str(error), most=200)
        raise SeriesError(where, found=found, expected=f"TOML, {expected}", fix="correct it") from None
    for name, value in values.items():
        if isinstance(value, dict) and name not in CHAPTER_NAMES:
            raise SeriesError(f"{where}, {bare(name)}", found=shown(value), expected=expected, fix="write it so")
    return values


def read_choices(
    file: Path | None, typed: Iterable[tuple[str, str]], *, chapters: Sequence[str] = CHAPTER_NAMES
) -> dict[str, Any]:
    """The choices of a parameter file and of a command line, which goes before it; all of them checked.

    Raises:
        InputError: the file cannot be read, or a name or a value is unknown, wrong or there twice.
    """
    if twice := [chapter for chapter in CHAPTER_NAMES if chapters.count(chapter) > 1]:
        raise SeriesError("chapter", found=f"{twice[0]} twice", expected="each chapter once", fix="leave one out")
    parameters = read_parameter_file(file) if file else {}
    check_parameters(CHAPTER_NAMES, parameters)  # a file is for the series, whatever part of it runs now
    values: dict[str, Any] = {}
    for name, value in ((name, read_value(text)) for name, text in typed):
        if name in values:
            found = f"{shown(values[name])} and {shown(value)}"
            raise SeriesError(f"-p {bare(name)}", found=found, expected="one value", fix="leave one out")
        values[name] = value
    check_parameters(chapters, values)
    parameters = {name: without(value, values) for name, value in parameters.items()} | values
    for choices in (parameters, *(value for value in parameters.values() if isinstance(value, dict))):
        check_choices(choices)
    return parameters


def as_toml(parameters: Mapping[str, Any]) -> str:
    """A parameter file's text, tables of single chapters last. Example: {"MAX_STEPS": 5} -> `MAX_STEPS = 5`."""
    tables = {name: value for name, value in parameters.items() if isinstance(value, dict)}
    lines = [
        f"{name} = {json.dumps(value, ensure_ascii=False)}" for name, value in parameters.items() if name not in tables
    ]
    return "\n".join(lines) + "\n" + "".join(f"[{name}]\n{as_toml(table)}" for name, table in tables.items())


def without(value: Any, typed: Mapping[str, Any]) -> Any:
    """A chapter's table without what was typed, which goes before it; any other value as it is."""
    return {name: own for name, own in value.items() if name not in typed} if isinstance(value, dict) else value


def set_run_aside(run_dir: Path) -> None:
    """Rename the last run's folder; SeriesError where it is not a run's alone, or another process has it open.

    A link to it stays, and leads to the next run, since `resolved` follows links.
    """
    from filelock import FileLock, Timeout

    if not run_dir.exists() or (run_dir.is_dir() and not any(run_dir.iterdir())):
        return
    where, fix = f"RUN_DIR {short_path(run_dir)}", "set RUN_DIR to another folder"
    of_a_run = (run_dir / "handoff.json").is_file() or (run_dir / "executed").is_dir()
    if not of_a_run or any(place.is_relative_to(run_dir) for place in (ROOT, Path.cwd(), Path.home().resolve())):
        expected = "only a run, which is what --fresh sets aside: a folder with handoff.json or executed/"
        raise SeriesError(where, found="files of another kind", expected=expected, fix=fix)
    for lock in (*run_dir.glob(".*.lock"), *run_dir.glob("checkpoints/.lock")):
        try:
            FileLock(lock, timeout=0).acquire().lock.release()
        except Timeout:
            found, fix = "another process that has it open", f"end that process, or {fix}"
            raise SeriesError(where, found=found, expected="one at a time", fix=fix) from None
    print(f"The run that was there is now {short_path(set_aside(run_dir))}")


def main(arguments: list[str] | None = None) -> int:
    """The command: 0 where all chapters ran, 1 where one failed, 2 for bad input, 130 for Ctrl-C or SIGTERM."""
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form, allow_abbrev=False)
    parser.add_argument("chapters", nargs="*", default=list(CHAPTER_NAMES), metavar="CHAPTER", help="default: all")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a choice")
    parser.add_argument("-f", type=Path, action="append", default=[], metavar="FILE", help="a TOML file of choices")
    parser.add_argument("--fresh", action="store_true", help="set the run folder aside first, under a number")
    parser.add_argument("--open", action="store_true", help="write the chapters with the choices in them, run nothing")
    parser.add_argument("--solutions", action="store_true", help="run the solutions to the exercises too")
    parser.add_argument("--job", type=json.loads, help=argparse.SUPPRESS)

    def refuse(message: str) -> None:
        raise SeriesError("command line", found=bare(message), expected="what --help lists", fix="correct it")

    parser.error = refuse
    before = {each: signal.signal(each, signal.default_int_handler) for each in (signal.SIGTERM, signal.SIGHUP)}
    try:
        options = parser.parse_args(arguments)
        if len(options.f) > 1:
            refuse(f"{len(options.f)} times -f")
        options.f = options.f[0] if options.f else None
        return run_series(options)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("Stopped by Ctrl-C or SIGTERM.", file=sys.stderr)
        return 130
    finally:
        for each, handler in before.items():
            signal.signal(each, handler)


def run_series(options: argparse.Namespace) -> int:
    """What the command line asks for: prepare the chapters, or run them and print one table."""
    os.environ["LANGUAGE"] = "en"  # programs read what the chapters say
    if options.job:
        return run_job(options.job)
    parameters = read_choices(options.f, options.p, chapters=options.chapters)
    if options.open:
        paths = prepare_chapters(options.chapters, folder=ROOT / "runs" / "open", parameters=parameters)
        print(f"Prepared: {', '.join(map(short_path, paths))}")
        return 0
    given = resolved(parameters)
    run_dir = Path(given.get("RUN_DIR", os.path.realpath(ROOT / RUN_DIR)))
    if options.fresh:
        with one_line(f"RUN_DIR {short_path(run_dir)}", *TO_WRITE):
            set_run_aside(run_dir)
    check_writable(run_dir / "executed", setting="RUN_DIR")
    start, lanes = time.perf_counter(), lanes_here() if fork(options.chapters) else 1
    how = dict(executed_dir=run_dir / "executed", lanes=lanes, solutions=options.solutions)
    runs = run_chapters(options.chapters, parameters=given, **how)
    profile, seconds = options.f.stem if options.f else run_dir.name, time.perf_counter() - start
    return _report(runs, seconds=seconds, lanes=lanes, run_dir=run_dir, profile=profile, choices=parameters)


def _report(
    runs: list[ChapterRun], *, seconds: float, lanes: int, run_dir: Path, profile: str, choices: Mapping[str, Any]
) -> int:
    """Print one table, keep the measures; the status to exit with."""
    rows = [
        [run.chapter, round(run.seconds), f"{run.peak_gib:.1f}", "FAILED" if run.failure else "ok", run.result]
        for run in runs
    ]
    failed, peak = [run for run in runs if run.failure], max(run.peak_gib for run in runs)
    rows.append(["in all", round(seconds), f"{peak:.1f}" if lanes == 1 else "", "FAILED" if failed else "ok", ""])
    print("\n" + text_table(["chapter", "seconds", "peak GiB", "verdict", "key figure"], rows))
    if asked := [run.asked for run in runs if run.asked]:
        print(f"\n{asked[0]}")
    for run in failed:
        print(f"\n{run.chapter} failed in {run.failure}\nExecuted notebook: {short_path(run.executed)}")
    save_measures(runs, run_dir / "executed" / "measured.json", profile=profile, choices=choices, lanes=lanes)
    return 130 if any(run.failure == STOPPED for run in failed) else int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
