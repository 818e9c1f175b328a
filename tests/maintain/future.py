"""Colab's image as it may be on another day: a freeze with the newest versions that the package index had by then.

make future DATE=2026-11-28 OUT=runs/future                          all that the series touches, but torch
make future DATE=2026-11-28 OUT=runs/future ONLY="numpy pandas"      only these
make future DATE=2026-11-28 OUT=runs/future ONLY=torch==2.14.1       this version

Then `make drift IMAGE=runs/future` judges the lock there.
"""

import argparse
import datetime
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from helpers.base import InputError
from helpers.environment.requirements import Pin, applicable, normal_name, read_lock
from tests.maintain.image import (
    BUILT_FOR_THE_IMAGE,
    FREEZE,
    LOCK,
    METADATA,
    OS_INFO,
    Metadata,
    fetch_metadata,
    read_freeze,
    read_metadata,
    read_os_info,
)
from tests.maintain.lock import IMAGE, find_uv, read_resolved


def touched_packages(
    image: Mapping[str, str | None], *, pins: Sequence[Pin], metadata: Mapping[str, Metadata], python: str
) -> list[str]:
    """The image's packages that the lock pins, or that a locked package asks for; torch and its like are left out."""
    names = {pin.name for pin in pins}
    for pin in pins:
        row = metadata.get(f"{pin.name}=={pin.version}")
        names |= {normal_name(r.name) for r in applicable(row.requires, python=python)} if row else set()
    return sorted(name for name in names - set(BUILT_FOR_THE_IMAGE) if image.get(name))


def newest_versions(wanted: Iterable[str], *, date: str, python: str) -> dict[str, str]:
    """The newest version of each package on the index at the end of a day, each for itself, pre-releases left out.

    Args:
        wanted: names, or `name==version`.
        date: `2026-11-28`.
        python: the Python that it has to run on, `3.13`.

    Raises:
        InputError: the date is none, or uv found no version; the message is uv's own.
    """
    try:
        future = datetime.date.fromisoformat(date) > datetime.date.today()
    except ValueError:
        future = True
    if future:
        raise InputError("DATE", found=repr(date), expected="a day up to today, such as 2026-11-28", fix="write it so")
    with tempfile.TemporaryDirectory() as folder:
        names = Path(folder, "names.txt")
        names.write_text("\n".join(wanted), encoding="utf-8")
        command = [find_uv(), "pip", "compile", "--quiet", "--no-deps", "--no-header", "--no-annotate", "--no-config"]
        command += ["--exclude-newer", date, "--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
        done = subprocess.run([*command, "--no-python-downloads", str(names)], capture_output=True, text=True)
    if done.returncode:
        raise InputError(
            "uv pip compile", found=done.stderr.strip(), expected="a version of each by that day", fix="see the message"
        )
    return {name: version for name, (version, *_) in read_resolved(done.stdout).items()}


def change_freeze(text: str, versions: Mapping[str, str]) -> str:
    """A freeze with other versions of some packages; one that it does not have is added.

    Example: `change_freeze("Jinja2==3.1.6\n", {"jinja2": "3.2"})` -> `"Jinja2==3.2\n"`.
    """
    lines, left = [], dict(versions)
    for line in text.splitlines():
        name = re.split(r"==| @ ", line, maxsplit=1)[0]
        version = left.pop(normal_name(name), None)
        lines.append(f"{name}=={version}" if version else line)
    return "\n".join([*lines, *(f"{name}=={version}" for name, version in left.items())]) + "\n"


def make_future(folder: Path, *, date: str, out: Path, only: Sequence[str] = ()) -> dict[str, str]:
    """Write an image's freeze and system line anew, with the versions of another day and what those ask for.

    Returns:
        `old -> new` of each package, by name.

    Raises:
        InputError: a file cannot be read, or a version cannot be had.
    """
    freeze, system = folder / FREEZE, folder / OS_INFO
    image, python = read_freeze(freeze), read_os_info(system)
    wanted = only or touched_packages(image, pins=read_lock(LOCK), metadata=read_metadata(), python=python)
    versions = newest_versions(wanted, date=date, python=python.rpartition(".")[0])
    asked = [Pin(name, version) for name, version in versions.items() if name not in BUILT_FOR_THE_IMAGE]
    records = fetch_metadata(asked, python=python)
    out.mkdir(parents=True, exist_ok=True)
    (out / freeze.name).write_text(change_freeze(freeze.read_text(encoding="utf-8"), versions), encoding="utf-8")
    shutil.copy(system, out / system.name)
    rows = {key: {"requires": row.requires} for key, row in records.items()}
    (out / METADATA.name).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return {name: f"{image.get(name) or 'none'} -> {version}" for name, version in versions.items()}


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0, or 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tests.maintain.future", description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=IMAGE, metavar="FOLDER", help="the image to start from")
    parser.add_argument("--date", required=True, help="such as 2026-11-28")
    parser.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="where the new freeze is written")
    parser.add_argument(
        "only", nargs="*", help="names, or name==version; default: all that the series touches, but torch"
    )
    options = parser.parse_args(arguments)
    try:
        changes = make_future(options.image, date=options.date, out=options.out, only=options.only)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    moved = {name: change for name, change in changes.items() if len(set(change.split(" -> "))) > 1}
    print("\n".join(f"{name} {change}" for name, change in moved.items()))
    print(f"{options.out}: {options.image.name} of {options.date}, {len(moved)} of {len(changes)} packages moved on.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
