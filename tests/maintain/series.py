"""Run chapters headlessly with papermill: `python -m tests.maintain.series` runs all of them and prints one table.

python -m tests.maintain.series -f tests/profiles/cpu.toml     the series, as `make run` does
python -m tests.maintain.series 05_infer -p MAX_STEPS 5        some chapters, with choices of theirs
python -m tests.maintain.series --open -f tests/profiles/cpu.toml     prepare them with these choices, to be opened

A choice that both -f and -p name is taken from -p. Without either, a chapter has the values of its page: a T4's.
"""

import argparse
import ast
import contextlib
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

from helpers.base import ROOT, InputError, set_aside, short_path, text_table
from helpers.chapters import CHAPTER_NAMES
from helpers.environment import check_choices
from helpers.export.gguf import find_llama_cpp
from tests.maintain.smollm2 import NAME as SMOLLM2
from tests.maintain.smollm2 import prepare_smollm2

NOTEBOOKS = ROOT / "notebooks"
RUN_DIR = "runs/llama"  # where the pages write to, unless a choice says otherwise
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
    for name, value in parameters.items():
        if isinstance(value, dict) and name in CHAPTER_NAMES:
            check_parameters([name], value)
        elif name not in known:
            raise SeriesError("parameter", found=name, expected=f"one of {', '.join(sorted(known))}", fix="correct it")


def of_chapter(chapter: str, parameters: Mapping[str, Any]) -> dict[str, Any]:
    """What one chapter takes of the series' parameters; a table that bears its name goes before the rest.

    Example: {"MAX_STEPS": 72, "00_quickstart": {"MAX_STEPS": 12}} -> {"MAX_STEPS": 12} for 00_quickstart
    """
    known, own = chapter_parameters(chapter), parameters.get(chapter, {})
    return {name: value for name, value in {**parameters, **own}.items() if name in known}


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

    given = of_chapter(chapter, parameters or {})
    source = NOTEBOOKS / f"{chapter}.ipynb"
    executed = Path(executed_dir) / source.name
    executed.parent.mkdir(parents=True, exist_ok=True)
    start, failure = time.perf_counter(), ""
    with peak_of_children() as peak:
        try:
            options = dict(kernel_name="python3", cwd=ROOT, progress_bar=sys.stderr.isatty(), **AT_THE_END)
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
    """Run chapters in order, with a line when each starts and ends; stops after the first that fails."""
    chapters, runs, parameters = list(chapters), [], resolved(parameters or {})
    find_llama_cpp()  # the quickstart has no line for it
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see `set_up`, which the quickstart does not call
    os.environ.setdefault("PYDEVD_DISABLE_FILE_VALIDATION", "1")  # else each kernel start prints four lines about it
    before = os.environ.get("HEADLESS")
    os.environ["HEADLESS"] = "1"  # Colab's kernel does not know that nobody reads along
    try:
        for number, chapter in enumerate(chapters, 1):
            print(f"[{number}/{len(chapters)}] {chapter} …", flush=True)
            run = run_chapter(chapter, executed_dir=executed_dir, parameters=parameters)
            runs.append(run)
            print(f"[{number}/{len(chapters)}] {chapter}: {run.seconds:.0f} s, {run.failure or run.result}", flush=True)
            if run.failure:
                break
    finally:
        os.environ.pop("HEADLESS")
        os.environ |= {} if before is None else {"HEADLESS": before}
    return runs


def resolved(parameters: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters with paths as seen from here, and the small model's name as the folder that it is prepared in.

    Folders that may have to be made are paths in any case, files and models where there is such a file or folder.

    Example, in /home/me with a file my.jsonl: {"DATASET": "my.jsonl"} -> {"DATASET": "/home/me/my.jsonl"}
    """
    made = {name: str(parameters[name]) for name in ("RUN_DIR", "DRIVE_DIR", "OUTPUT_DIR") if parameters.get(name)}
    given = {name: str(parameters[name]) for name in ("DATASET", "MODEL_NAME", "REQUIREMENTS") if parameters.get(name)}
    present = {name: path for name, path in given.items() if Path(path).expanduser().exists()}
    paths = {name: str(Path(path).expanduser().resolve()) for name, path in (made | present).items()}
    if given.get("MODEL_NAME") == SMOLLM2 and "MODEL_NAME" not in present:
        paths["MODEL_NAME"] = str(prepare_smollm2())
    return {**parameters, **paths}


def prepare_chapters(chapters: Iterable[str], *, folder: Path, parameters: Mapping[str, Any]) -> list[Path]:
    """Write the chapters with these choices put in and without outputs, to be opened in JupyterLab; their paths."""
    import nbformat
    import papermill

    given, paths = resolved(parameters), []
    folder.mkdir(parents=True, exist_ok=True)
    for chapter in chapters:
        values = of_chapter(chapter, given)
        paths.append(folder / f"{chapter}.ipynb")
        source = NOTEBOOKS / paths[-1].name
        notebook = papermill.execute_notebook(source, None, values, prepare_only=True, progress_bar=False)
        for cell in (cell for cell in notebook.cells if cell.cell_type == "code"):
            cell.outputs, cell.execution_count = [], None
        nbformat.write(notebook, paths[-1])
    return paths


def save_measures(runs: Iterable[ChapterRun], path: Path, *, profile: str, choices: Mapping[str, Any]) -> None:
    """Write what the README, the budget lines and the regression quote: time, memory, choices, and where it was.

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
        "choices": dict(choices),
        "chapters": dict(sorted((kept.get("chapters", {}) | chapters).items())),
        "seconds": dict(sorted((kept.get("seconds", {}) | seconds).items())),
    }
    path.write_text(json.dumps(measured, indent=2) + "\n", encoding="utf-8")


def read_value(text: str) -> Any:
    """A choice as typed on a command line: a Python or JSON value where it is one, else the text itself.

    Example: "60" -> 60, "1e-4" -> 0.0001, "True" and "true" -> True, "cpu" -> "cpu"
    """
    for read in (json.loads, ast.literal_eval):
        with contextlib.suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return read(text)
    return text


def read_parameter_file(path: str | Path) -> dict[str, Any]:
    """The parameters in a TOML file: one `NAME = value` a line, and tables for single chapters, such as [05_infer].

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
        if isinstance(value, dict) and name not in CHAPTER_NAMES:
            raise SeriesError(f"{where}, {name}", found=repr(value), expected=expected, fix="write it so")
    return values


def read_choices(
    file: Path | None, typed: Iterable[tuple[str, str]], *, chapters: Iterable[str] = CHAPTER_NAMES
) -> dict[str, Any]:
    """The choices of a parameter file and of a command line, which goes before it; all of them checked.

    Raises:
        InputError: the file cannot be read, no chapter has such a name, or a choice cannot be used.
    """
    parameters = read_parameter_file(file) if file else {}
    check_parameters(CHAPTER_NAMES, parameters)  # a file is for the series, whatever part of it runs now
    values = {name: read_value(value) for name, value in typed}
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


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("chapters", nargs="*", default=list(CHAPTER_NAMES), metavar="CHAPTER", help="default: all")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a choice")
    parser.add_argument("-f", type=Path, metavar="FILE", help="a TOML file of choices")
    parser.add_argument("--fresh", action="store_true", help="set the run folder aside first, under a number")
    parser.add_argument("--open", action="store_true", help="write the chapters with the choices in them, run nothing")
    options = parser.parse_args(arguments)
    try:
        parameters = read_choices(options.f, options.p, chapters=options.chapters)
        if options.open:
            paths = prepare_chapters(options.chapters, folder=ROOT / "runs" / "open", parameters=parameters)
            print(f"Prepared: {', '.join(map(short_path, paths))}")
            return 0
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    run_dir = Path(resolved({"RUN_DIR": parameters.get("RUN_DIR", ROOT / RUN_DIR)})["RUN_DIR"])
    if options.fresh and run_dir.exists():
        print(f"The run that was there is now {short_path(set_aside(run_dir))}")
    runs = run_chapters(options.chapters, executed_dir=run_dir / "executed", parameters=parameters)
    return _report(runs, run_dir=run_dir, profile=options.f.stem if options.f else run_dir.name, choices=parameters)


def _report(runs: list[ChapterRun], *, run_dir: Path, profile: str, choices: Mapping[str, Any]) -> int:
    """Print one table, keep the measures; 1 where a chapter failed, else 0."""
    rows = [
        [run.chapter, round(run.seconds), f"{run.peak_gib:.1f}", "FAILED" if run.failure else "ok", run.result]
        for run in runs
    ]
    last, total, peak = runs[-1], sum(run.seconds for run in runs), max(run.peak_gib for run in runs)
    rows.append(["in all", round(total), f"{peak:.1f}", "FAILED" if last.failure else "ok", ""])
    print("\n" + text_table(["chapter", "seconds", "peak GiB", "verdict", "key figure"], rows))
    save_measures(runs, run_dir / "executed" / "measured.json", profile=profile, choices=choices)
    if last.failure:
        print(f"\n{last.chapter} failed in {last.failure}\nExecuted notebook: {short_path(last.executed)}")
    return 1 if last.failure else 0


if __name__ == "__main__":
    sys.exit(main())
