"""Locks and requirements: reading them, and what does not hold among the versions that are installed."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.base import InputError
from helpers.messages import _

NEED = "#: "  # how a lock's line begins that says what the image must have
NOTHING = "nothing"  # in the place of a version, where a package is not there


@dataclass(frozen=True)
class Pin:
    """One row of a lock: `trl==0.29.1`, and the reason written above it."""

    name: str
    version: str
    reason: str = ""


@dataclass(frozen=True)
class Change:
    """What the lock does to one package of the image."""

    package: str
    before: str
    after: str
    reason: str


@dataclass(frozen=True)
class Conflict:
    """A requirement that does not hold once the lock is installed."""

    package: str
    requires: str
    found: str


@dataclass(frozen=True)
class Need:
    """What locked packages ask of one of the image's. Example: `Need("torch>=2.4,<2.15", "unsloth, xformers")`."""

    requirement: str
    askers: str


def normal_name(name: str) -> str:
    """A package's name as indexes compare it. Example: `unsloth_zoo` -> `unsloth-zoo`."""
    return re.sub(r"[-_.]+", "-", name).lower()


def public(version: str) -> str:
    """A version without its build label. Example: `2.11.0+cu128` -> `2.11.0`."""
    return version.partition("+")[0]


def read_text(path: Path) -> str:
    """A text file, with or without a byte order mark."""
    if not path.is_file():
        raise InputError(str(path), found=_("no such file"), expected=_("a text file"), fix=_("check the path"))
    try:
        return path.read_text(encoding="utf-8-sig")  # with or without the mark that Windows puts in front
    except UnicodeDecodeError:
        raise InputError(
            str(path), found=_("bytes that are not UTF-8"), expected=_("a text file"), fix=_("save it as UTF-8")
        ) from None


def read_lock(path: str | Path) -> list[Pin]:
    """The rows of a requirements file in which every package is pinned; a comment line above a row is its reason
    (less the image's version in parentheses, which `make lock` writes behind it).
    """
    pins, reason = [], ""
    for line in read_text(Path(path)).splitlines():
        if line.startswith(NEED):
            continue
        if line.startswith("#"):
            reason = re.sub(r" \((not in the image|image: \S+)\)$", "", line[1:].strip())
        elif line.strip() and not line.startswith(" "):
            row = re.match(r"([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", line)
            if row is None:
                raise InputError(
                    str(path),
                    found=repr(line),
                    expected=_("name==version"),
                    fix=_("run `make lock` to make the file anew"),
                )
            pins.append(Pin(normal_name(row[1]), row[2], reason))
            reason = ""
    if not pins:
        raise InputError(str(path), found=_("no package"), expected=_("name==version rows"), fix=_("run `make lock`"))
    return pins


def read_needs(path: str | Path) -> list[Need]:
    """What a lock's packages ask of the image, from the lines that `make lock` wrote for it."""
    lines = [line for line in read_text(Path(path)).splitlines() if line.startswith(NEED)]
    return [Need(*line.removeprefix(NEED).split("  ", 1)) for line in lines]


def requirement_name(requirement: str) -> str:
    """The package that a requirement is about. Example: `unsloth_zoo[x]>=2 ; python_version > "3"` -> `unsloth-zoo`."""
    return normal_name(re.match(r"[A-Za-z0-9._-]+", requirement)[0])


def applicable(requires: Sequence[str], *, python: str) -> list:
    """The requirements that hold on Linux x86_64 under this Python, without extras, as `packaging` reads them."""
    from packaging.requirements import Requirement

    place = {"python_version": ".".join(python.split(".")[:2]), "python_full_version": python, "extra": ""}
    place |= {"sys_platform": "linux", "platform_system": "Linux", "os_name": "posix", "platform_machine": "x86_64"}
    place |= {"implementation_name": "cpython", "platform_python_implementation": "CPython"}
    requirements = map(Requirement, requires)
    return [r for r in requirements if r.marker is None or r.marker.evaluate(place)]


def unmet(requires: Sequence[str], versions: Mapping[str, str | None], *, python: str) -> list[tuple[str, str]]:
    """The requirements that do not hold among `versions` on Linux x86_64, each with what is there instead.

    Extras are not followed. A package whose version is None (installed from an address) passes.

    Example: `unmet(["datasets!=4.0.*"], {"datasets": "4.0.0"}, python="3.13.15")` -> `[("datasets!=4.0.*", "4.0.0")]`.
    """
    broken = []
    for requirement in applicable(requires, python=python):
        version = versions.get(normal_name(requirement.name), NOTHING)
        if version == NOTHING or (version and not requirement.specifier.contains(version, prereleases=True)):
            broken.append((f"{requirement.name}{requirement.specifier}", version))
    return broken


def name_and_version(name: str, version: str) -> str:
    """What is installed, as a reader is told. Example: `trl 0.29.1`, and `trl nothing` where it is not there."""
    return _("{package} nothing", package=name) if version == NOTHING else f"{name} {version}"
