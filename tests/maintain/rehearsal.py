"""Rehearse Colab: its Python, packages and kernel, an empty folder, and the setup cell (`make colab-rehearsal`).

python -m tests.maintain.rehearsal [--image FOLDER] [--keep FOLDER] [CHAPTER ...]

With `--image` it starts from another freeze, such as one that `make future` wrote: the setup cell then has to bring
back what has moved on.

What this cannot show: a GPU, Colab's own build of torch (the package index has another CUDA build of the same version),
and Colab's front end. What is cloned are these files as they are, served from disk under their published address.
"""

import argparse
import itertools
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from helpers.base import ROOT, InputError, text_table
from helpers.chapters import CHAPTER_NAMES
from helpers.environment.requirements import public, read_lock, requirement_name
from tests.maintain.image import FREEZE, LOCK, METADATA, OS_INFO, read_freeze, read_metadata, read_os_info
from tests.maintain.lock import IMAGE, find_uv
from tests.maintain.regress import cell_texts
from tests.maintain.series import chapter_parameters, read_parameter_file, read_result, resolved

CHAPTERS = CHAPTER_NAMES[1:5]  # the quickstart installs without the setup cell
SETUP_CELL = ROOT / "notebooks" / "src" / "setup_cell.py"
# What a Colab kernel and the helpers use, beside what the lock's packages ask for.
KERNEL = ("ipykernel", "ipython", "ipywidgets", "matplotlib", "pip", "psutil", "setuptools", "tabulate", "torchvision")
CHOICES = ROOT / "tests" / "profiles" / "cpu.toml"


class RehearsalError(InputError):
    """A step of the rehearsal failed."""


def run(command: Sequence[str | Path], *, what: str, **options) -> str:
    """Run a command; its output, or RehearsalError with the end of it."""
    done = subprocess.run(
        [str(part) for part in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    if done.returncode:
        raise RehearsalError(what, found=done.stdout[-3000:], expected="success", fix="see the message")
    return done.stdout


def find_python(version: str) -> Path | None:
    """An interpreter of this minor version, on the path or under pyenv. Example: `find_python("3.13")`."""
    root = Path(os.environ.get("PYENV_ROOT", Path.home() / ".pyenv"))
    candidates = [shutil.which(f"python{version}"), *sorted(root.glob(f"versions/{version}.*/bin/python"))]
    for candidate in filter(None, candidates):
        done = subprocess.run([candidate, "--version"], capture_output=True, text=True)
        if done.returncode == 0 and f"Python {version}." in done.stdout:  # a pyenv shim may be there and refuse
            return Path(candidate)
    return None


def image_packages(names: Iterable[str], *, image: dict[str, str | None]) -> list[str]:
    """`name==version`, as the image has it, for those of `names` that the image holds."""
    return [f"{name}=={public(image[name])}" for name in sorted(set(names)) if image.get(name)]


def make_image(folder: Path, *, image: Mapping[str, str | None], python: Path, uv: str) -> Path:
    """A virtual environment with an image's versions of everything that the series touches; its interpreter.

    The packages of the lock's own image are resolved first. What another image has in another version is then put over
    them without resolving, because an image may break requirements of its own packages, as Colab's does.
    """
    base, pins = read_freeze(IMAGE / FREEZE), read_lock(LOCK)
    metadata = read_metadata(METADATA)
    asked = {requirement_name(text) for pin in pins for text in metadata[f"{pin.name}=={pin.version}"].requires}
    names = {*asked, *KERNEL, *(pin.name for pin in pins)}
    # The index's torch brings its own CUDA packages; Colab leaves jedi out of IPython 7.
    held = [row for row in image_packages(base, image=base) if not re.match(r"nvidia-|cuda-|torch|triton", row)]
    (folder / "image.txt").write_text("\n".join(held), encoding="utf-8")
    (folder / "without.txt").write_text('jedi ; python_version < "3"\n', encoding="utf-8")
    run([uv, "venv", "--quiet", "--python", python, folder / "venv"], what="uv venv")
    interpreter = folder / "venv" / "bin" / "python"
    install = [uv, "pip", "install", "--quiet", "--compile-bytecode", "--python", interpreter]
    limits = ["--constraints", folder / "image.txt", "--overrides", folder / "without.txt"]
    run([*install, *image_packages(names, image=base), *limits], what="the packages of the lock's image")
    moved = sorted(set(image_packages(names, image=image)) - set(image_packages(names, image=base)))
    if moved:
        run([*install, "--no-deps", *moved], what="the packages that moved on")
    return interpreter


def make_mirror(folder: Path) -> dict[str, str]:
    """These files under their published address and tag; the git settings that make `git clone` find them there."""
    tag, repository = re.search(r"-b (\S+) (\S+) series", SETUP_CELL.read_text(encoding="utf-8")).groups()
    mirror = folder / "mirror"
    files = run(
        ["git", "-C", ROOT, "ls-files", "-z", "--cached", "--others", "--exclude-standard"], what="git ls-files"
    )
    for name in filter(None, files.split("\0")):
        if (ROOT / name).is_file():
            (mirror / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, mirror / name)
    git = ["git", "-C", mirror, "-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost"]
    for command in (["init", "--quiet"], ["add", "."], ["commit", "--quiet", "--message=rehearsal"], ["tag", tag]):
        run([*git, *command], what="git")
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{mirror}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository,
    }


def kernel_settings(folder: Path, *, interpreter: Path, uv: str, git: dict[str, str]) -> dict[str, str]:
    """A kernel named `colab` that starts as Colab's does; the environment in which papermill finds it."""
    spec = folder / "jupyter" / "kernels" / "colab"
    spec.mkdir(parents=True)
    kernel = {
        "argv": [str(interpreter), "-m", "ipykernel_launcher", "-f", "{connection_file}"],
        "display_name": "Colab",
        "language": "python",
        "env": {
            "COLAB_RELEASE_TAG": "rehearsal",
            "PATH": os.pathsep.join([str(Path(uv).parent), "/usr/local/bin", "/usr/bin", "/bin"]),
            **git,
        },
    }
    (spec / "kernel.json").write_text(json.dumps(kernel), encoding="utf-8")
    dropped = ("VIRTUAL_ENV", "PYTHONPATH", "PYTHONHOME", "PYTHONDONTWRITEBYTECODE")
    kept = {name: value for name, value in os.environ.items() if name not in dropped}
    return {**kept, "JUPYTER_PATH": str(folder / "jupyter"), "PYDEVD_DISABLE_FILE_VALIDATION": "1"}


def write_setup_notebook(path: Path, *, model: str) -> None:
    """The setup cell twice, and the preflight: what chapter 01 opens with."""
    import nbformat

    v4 = nbformat.v4
    cell = SETUP_CELL.read_text(encoding="utf-8")
    check = f"from helpers.environment import check_environment\n\nreport = check_environment({model!r})\nprint(report)"
    cells = [v4.new_code_cell(source) for source in (cell, cell, check + "\nreport.raise_if_failed()")]
    nbformat.write(v4.new_notebook(cells=cells), path)


def rehearse(folder: Path, *, image: Path, chapters: Sequence[str]) -> list[list[object]]:
    """All steps, in `folder`; one row (step, seconds, what was seen) each."""
    rows: list[list[object]] = []

    def step(name: str, start: float, seen: str) -> None:
        rows.append([name, round(time.perf_counter() - start, 1), seen])
        print(f"{name}: {rows[-1][1]} s. {seen}", flush=True)

    uv, version = find_uv(), read_os_info(image / OS_INFO).rpartition(".")[0]
    python = find_python(version)
    if python is None:
        print(f"colab-rehearsal: skipped, there is no Python {version} on this machine (Colab's image has it)")
        return rows
    start = time.perf_counter()
    interpreter = make_image(folder, image=read_freeze(image / FREEZE), python=python, uv=uv)
    step("image", start, f"Python {version} with the packages of the image {image.name}")

    content = folder / "content"
    content.mkdir()
    environment = kernel_settings(folder, interpreter=interpreter, uv=uv, git=make_mirror(folder))
    papermill = [sys.executable, "-m", "papermill", "--kernel", "colab", "--cwd", content, "--no-progress-bar"]
    start = time.perf_counter()
    choices = resolved(read_parameter_file(CHOICES)) | {"RUN_DIR": str(folder / "run")}
    write_setup_notebook(folder / "setup.ipynb", model=choices["MODEL_NAME"])
    run([*papermill, folder / "setup.ipynb", folder / "setup.out.ipynb"], what="setup cell", env=environment)
    first, second, preflight = (text for _, text in cell_texts(folder / "setup.out.ipynb"))
    print(first, second, preflight, sep="\n\n")
    if "nothing to install" not in second or "RESTART" in first:
        raise RehearsalError(
            "setup cell", found=second, expected="nothing to do the second time, no restart", fix="see it"
        )
    step("setup cell", start, first.strip().splitlines()[-1])

    for chapter in chapters:
        start = time.perf_counter()
        source = content / "series" / "notebooks" / f"{chapter}.ipynb"
        out = folder / f"{chapter}.ipynb"
        given = [("-p", name, str(choices[name])) for name in sorted(chapter_parameters(chapter) & choices.keys())]
        run([*papermill, source, out, *itertools.chain(*given)], what=chapter, env=environment)
        step(chapter, start, read_result(out) or "ran to its end")
    return rows


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where all steps passed or Python 3.13 is missing, else 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.maintain.rehearsal", description=__doc__.splitlines()[0])
    parser.add_argument("chapters", nargs="*", default=list(CHAPTERS), help="default: 01 to 04")
    parser.add_argument("--image", type=Path, default=IMAGE, metavar="FOLDER", help="with its freeze and system line")
    parser.add_argument("--keep", metavar="FOLDER", help="work in this new folder and leave it there (7 GB)")
    options = parser.parse_args(arguments)
    folder = Path(options.keep or tempfile.mkdtemp(prefix="colab-rehearsal-")).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = rehearse(folder, image=options.image, chapters=options.chapters)
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    finally:
        if not options.keep:
            shutil.rmtree(folder, ignore_errors=True)
    if rows:
        print("\n" + text_table(["step", "seconds", "seen"], rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
