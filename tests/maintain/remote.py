"""Run the series on a T4 that is not here, on Kaggle or on Colab, and judge what comes back.

python -m tests.maintain.remote kaggle             all chapters; the account is the one in KAGGLE_USERNAME
python -m tests.maintain.remote colab 03_data -p MAX_STEPS 5

One notebook is made of the files as they are here, committed or not, and sent. There it installs the lock, runs the
chapters with papermill, and packs the executed notebooks; here they take the place of a run on this machine, so that
`make regress` judges them like any other. Neither service's exit status tells whether a cell failed: the executed
notebooks do.
"""

import argparse
import base64
import io
import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from helpers.base import ROOT, InputError, text_table
from helpers.chapters import CHAPTER_NAMES
from tests.maintain.series import as_toml, read_choices, read_result

if TYPE_CHECKING:
    from nbformat import NotebookNode

# What a chapter needs to run; neither the recorded outputs nor the sources travel.
SENT = (
    "helpers/**/*.py",
    "helpers/locale/**/*.mo",
    "helpers/**/*.html",
    "helpers/**/*.md",
    "notebooks/*.ipynb",
    "notebooks/scale_up.py",
    "notebooks/data/*",
    "tests/__init__.py",
    "tests/maintain/__init__.py",
    "tests/maintain/lanes.py",
    "tests/maintain/series.py",
    "tests/maintain/smollm2.py",
    "tests/maintain/solutions.py",
    "requirements-colab.txt",
    "pyproject.toml",
)
ARCHIVE = "executed.tar.gz"
SLUG = "llama-series-on-a-t4"
MOST_HOURS, POLL_SECONDS, KAGGLE_LIMIT = 3, 60, 2**20
COMMANDS = {"kaggle": "kaggle==2.2.5", "colab": "google-colab-cli==0.7.5"}
PROGRAMS = Path(__file__).with_name("on_a_t4")  # what runs there: a cell each
JOB = "job.json"  # in the bundle: what to run


class RemoteError(InputError):
    """The service's command is missing or failed, or nothing came back."""


def make_bundle(chapters: Sequence[str], parameters: Mapping[str, Any], *, profile: str = "t4") -> bytes:
    """The job, its choices, and the files of `SENT` as they are now, as a tar.xz; notebooks without their outputs.

    Args:
        profile: the name under which the run's measures are judged.
    """
    buffer, job = io.BytesIO(), {"chapters": list(chapters), "profile": profile, "archive": ARCHIVE}
    with tarfile.open(fileobj=buffer, mode="w:xz") as bundle:
        for path in sorted(path for pattern in SENT for path in ROOT.glob(pattern) if path.is_file()):
            content = _without_outputs(path) if path.suffix == ".ipynb" else path.read_bytes()
            _add(bundle, path.relative_to(ROOT).as_posix(), content)
        _add(bundle, JOB, json.dumps(job, ensure_ascii=False).encode())
        _add(bundle, f"{profile}.toml", as_toml({**parameters, "RUN_DIR": "run"}).encode())  # beside the job
    return buffer.getvalue()


def _add(bundle: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(content)
    bundle.addfile(entry, io.BytesIO(content))


def _without_outputs(path: Path) -> bytes:
    notebook = json.loads(path.read_text(encoding="utf-8"))
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            cell["outputs"], cell["execution_count"] = [], None
    return json.dumps(notebook, ensure_ascii=False).encode()


def make_driver(bundle: bytes) -> "NotebookNode":
    """The one notebook that is sent: it unpacks the series, runs it, and packs the executed notebooks."""
    from nbformat.v4 import new_code_cell, new_notebook

    unpack, run = ((PROGRAMS / name).read_text(encoding="utf-8") for name in ("unpack.py", "run.py"))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    cells = [new_code_cell(f'BUNDLE = "{base64.b64encode(bundle).decode()}"\n{unpack}'), new_code_cell(run)]
    return new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run_on_kaggle(folder: Path, *, owner: str) -> None:
    """Push `folder/series.ipynb` as a private kernel with a T4, wait for it, and fetch the archive into `folder`.

    Raises:
        RemoteError: the push was refused, or the kernel is not done after `MOST_HOURS`.
    """
    size = (folder / "series.ipynb").stat().st_size
    if size > KAGGLE_LIMIT:
        raise RemoteError("series.ipynb", found=f"{size:,} bytes", expected="1 MiB, Kaggle's limit", fix="send less")
    metadata = {
        "id": f"{owner}/{SLUG}",
        "title": SLUG.replace("-", " "),
        "code_file": "series.ipynb",
        "language": "python",
        "kernel_type": "notebook",
        "is_private": True,
        "enable_gpu": True,
        "enable_internet": True,
    }
    (folder / "kernel-metadata.json").write_text(json.dumps(metadata, indent=1), encoding="utf-8")
    limit = ("--timeout", str(MOST_HOURS * 3600))
    said = call("kaggle", "kernels", "push", "--path", folder, "--accelerator", "NvidiaTeslaT4", *limit)
    pushed = re.search(r"[Vv]ersion (\d+) successfully", said)
    if not pushed:  # a refusal ends with status 0 too
        raise RemoteError("kaggle kernels push", found=said.strip(), expected="a new version", fix="see its message")
    kernel, deadline = f"{owner}/{SLUG}/{pushed[1]}", time.monotonic() + MOST_HOURS * 3600
    state = ""
    while state not in ("complete", "error", "cancel_acknowledged"):
        if time.monotonic() > deadline:
            raise RemoteError(kernel, found=state, expected=f"an end within {MOST_HOURS} h", fix="look at it on Kaggle")
        time.sleep(POLL_SECONDS if state else 0)
        found = re.search(r'status "(?:\w+\.)?(\w+)"', call("kaggle", "kernels", "status", kernel))
        state = found[1].lower() if found else "unknown"
    call("kaggle", "kernels", "output", kernel, "--path", folder, "--force")


def run_on_colab(folder: Path) -> None:
    """Rent a Colab machine with a T4, run `folder/series.ipynb` there, fetch the archive, and give the machine back.

    Raises:
        RemoteError: the run ended with an error, a time-out perhaps (the archive is fetched all the same, if there is
            one), or there was no machine, or no archive.
    """
    session = f"series-{os.getpid()}"
    call("colab", "new", "--session", session, "--gpu", "T4")
    try:
        limit = ("--timeout", str(MOST_HOURS * 3600))
        ended = attempt("colab", "exec", "--session", session, "--file", folder / "series.ipynb", *limit)
        fetched = attempt("colab", "download", "--session", session, f"/content/{ARCHIVE}", folder / ARCHIVE)
    finally:
        call("colab", "stop", "--session", session)
    if failure := ended or fetched:
        raise failure


def run_there(service: str, folder: Path, *, owner: str) -> str:
    """Run `folder/series.ipynb` on a service; returns "", or what went wrong although executed notebooks came back.

    Raises:
        RemoteError: it went wrong, and nothing came back.
    """
    try:
        run_on_kaggle(folder, owner=owner) if service == "kaggle" else run_on_colab(folder)
    except RemoteError as error:
        if not (folder / ARCHIVE).is_file():
            raise
        return str(error)
    return ""


def attempt(*command: str | Path) -> RemoteError | None:
    """`call`, but an error is returned, so that what has to follow is done first."""
    try:
        call(*command)
    except RemoteError as error:
        return error
    return None


def call(*command: str | Path) -> str:
    """Run a service's command, show what it says, and return it.

    Raises:
        RemoteError: it is not installed, or it ended with an error.
    """
    name = str(command[0])
    if shutil.which(name) is None:
        fix = f"uv tool install --python 3.13 {COMMANDS[name]}, and sign in"
        raise RemoteError(name, found="no such command", expected=f"the one of {COMMANDS[name]}", fix=fix)
    lines = []
    process = subprocess.Popen(
        [str(part) for part in command],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        stdin=subprocess.DEVNULL,
        text=True,
    )
    for line in process.stdout:
        print(line, end="", flush=True)
        lines.append(line)
    if process.wait():
        where = " ".join(map(str, command[:3]))
        raise RemoteError(where, found=f"exit status {process.returncode}", expected="success", fix="see its message")
    return "".join(lines)


def unpack(archive: Path, into: Path) -> None:
    """Put what came back where a run on this machine would be; a run that was there becomes `NAME.previous`.

    Raises:
        RemoteError: nothing came back.
    """
    if not archive.is_file():
        fix = "read the run's own log above: it ended before the first chapter"
        raise RemoteError(ARCHIVE, found="no such file", expected="the executed notebooks", fix=fix)
    fresh = into.with_name(into.name + ".part")
    shutil.rmtree(fresh, ignore_errors=True)
    with tarfile.open(archive) as opened:
        opened.extractall(fresh, filter="data")
    if into.exists():
        previous = into.with_name(into.name + ".previous")
        shutil.rmtree(previous, ignore_errors=True)
        into.rename(previous)
    fresh.rename(into)


def failure_of(executed: Path) -> str:
    """What is wrong with an executed notebook, or "": missing, an error, cells that did not run, no result."""
    import nbformat

    if not executed.is_file():
        return "did not run"
    cells = [cell for cell in nbformat.read(executed, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        first_line = cell.source.strip().partition("\n")[0]
        for output in cell.outputs:
            if output.output_type == "error":
                return f"code cell [{cell.execution_count}] `{first_line}`: {output.ename}: {output.evalue}"
        if cell.execution_count is None:
            return f"stopped before `{first_line}`"
    return "" if read_result(executed) else "its last cell printed no `Result: …`"


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("service", choices=COMMANDS)
    parser.add_argument("chapters", nargs="*", metavar="CHAPTER", help="default: all")
    parser.add_argument("-f", type=Path, default=ROOT / "tests/profiles/t4.toml", metavar="FILE", help="choices")
    parser.add_argument("-p", nargs=2, action="append", default=[], metavar=("NAME", "VALUE"), help="a choice")
    parser.add_argument("--into", type=Path, default=ROOT / "runs/t4", metavar="FOLDER", help="where the result goes")
    options = parser.parse_args(arguments)
    chapters, owner = options.chapters or list(CHAPTER_NAMES), os.environ.get("KAGGLE_USERNAME", "")
    try:
        parameters = read_choices(options.f, options.p, chapters=chapters)
        if options.service == "kaggle" and not owner:
            fix = "set it to your account's name"
            raise RemoteError("KAGGLE_USERNAME", found="nothing", expected="the account to run as", fix=fix)
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            driver = make_driver(make_bundle(chapters, parameters, profile=options.f.stem))
            (folder / "series.ipynb").write_text(json.dumps(driver), encoding="utf-8")
            trouble = run_there(options.service, folder, owner=owner)
            unpack(folder / ARCHIVE, options.into)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    executed = [options.into / "executed" / f"{chapter}.ipynb" for chapter in chapters]
    failures = [failure_of(path) for path in executed]
    rows = [
        [path.stem, "FAILED" if failure else "ok", failure or read_result(path)]
        for path, failure in zip(executed, failures, strict=True)
    ]
    print("\n" + text_table(["chapter", "verdict", "key figure"], rows))
    if trouble:
        print(f"\n{trouble}", file=sys.stderr)
    return 1 if trouble or any(failures) else 0


if __name__ == "__main__":
    sys.exit(main())
