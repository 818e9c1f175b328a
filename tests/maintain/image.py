"""Read a freeze of Colab's image, and say whether the lock installs cleanly on it, without installing anything.

python -m tests.maintain.image FOLDER [--fetch] [--resolve] [--json]      `make drift IMAGE=FOLDER`
"""

import argparse
import html
import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path

from helpers.base import ROOT, InputError, html_table, text_table
from helpers.environment.requirements import (
    Change,
    Conflict,
    Pin,
    applicable,
    normal_name,
    public,
    read_lock,
    read_text,
    requirement_name,
    unmet,
)

IMAGES = ROOT / "tests" / "colab-image"
METADATA = IMAGES / "metadata.json"
LOCK = ROOT / "requirements-colab.txt"
FREEZE, OS_INFO = "pip-freeze.gpu.txt", "os-info-gpu.txt"  # as Google names them
# Packages whose own build is in the image: the package index has another CUDA build of the same version, which asks for
# other NVIDIA packages. Their requirements are the image's affair: they count as having none.
BUILT_FOR_THE_IMAGE = ("torch", "torchvision", "torchaudio", "triton")
PIP_BATCH = 40  # pip stops at the first package without a wheel, so a lost batch must be cheap to repeat
PIPS_AT_ONCE = 4  # they wait for the package index most of their time


@dataclass(frozen=True)
class Metadata:
    """What one version of a package asks for.

    `wheels` are the Python versions that have a wheel for Colab's platform (known for the lock's packages only).
    """

    requires: tuple[str, ...]
    requires_python: str = ""
    wheels: tuple[str, ...] = ()


@dataclass(frozen=True)
class ImageReport:
    """What the lock would do to one image. Example: `report.ok` is False where `report.conflicts` is not empty.

    Attributes:
        python: the image's Python.
        torch: the image's torch.
        torch_limits: what the lock's packages ask of torch, and whether the image's meets it, one a line.
        added: packages that the image does not have.
        changed: packages of which it has another version.
        conflicts: what the series itself would miss.
        hurt: what packages would miss that the image has and the series does not import.
        unread: how many of the image's packages have no requirements on record, so that they may be hurt unseen.
    """

    python: str
    torch: str
    torch_limits: tuple[str, ...]
    added: tuple[Change, ...]
    changed: tuple[Change, ...]
    conflicts: tuple[Conflict, ...]
    hurt: tuple[Conflict, ...]
    unread: int

    @property
    def ok(self) -> bool:
        """True where nothing that the series needs conflicts."""
        return not self.conflicts

    def _rows(self) -> list[list[str]]:
        rows = [["CONFLICT", c.package, f"asks for {c.requires}, finds {c.found}", ""] for c in self.conflicts]
        rows += [
            [kind, c.package, f"{c.before} -> {c.after}", c.reason]
            for kind in ("added", "changed")
            for c in getattr(self, kind)
        ]
        rows += [["hurt", c.package, f"asks for {c.requires}, finds {c.found}", "not imported here"] for c in self.hurt]
        return rows + [["torch", *limit.split(" ", 1), ""] for limit in self.torch_limits]

    def _verdict(self) -> str:
        counts = ", ".join(f"{len(getattr(self, kind))} {kind}" for kind in ("added", "changed", "hurt"))
        number = len(self.conflicts)
        counted = "1 conflict" if number == 1 else f"{number} conflicts"
        verdict = "installs cleanly" if self.ok else f"does not install cleanly: {counted}"
        note = (
            f" Of {self.unread} of the image's packages it is not known whether they need another version of a package "
            "that the lock changes (`--fetch` asks the package index, which knows those that come as wheels)."
            if self.unread
            else ""
        )
        return f"Python {self.python}, torch {self.torch}: the lock {verdict} ({counts}).{note}"

    def __repr__(self) -> str:
        return text_table(["what", "package", "versions", "reason"], self._rows()) + "\n" + self._verdict()

    def _repr_html_(self) -> str:
        verdict = f"<p>{html.escape(self._verdict())}</p>"
        return html_table(["what", "package", "versions", "reason"], self._rows()) + verdict

    def as_json(self) -> dict:
        """The report as plain data, with `ok`."""
        return {"ok": self.ok, **asdict(self)}


def read_freeze(path: str | Path) -> dict[str, str | None]:
    """The packages of a `pip freeze`, by normal name; None where the row gives an address instead of a version.

    Example: `Jinja2==3.1.6` and `google-colab @ file:///x.tar.gz` -> `{"jinja2": "3.1.6", "google-colab": None}`.

    Raises:
        InputError: a line is neither of the two, or there is none.
    """
    packages: dict[str, str | None] = {}
    for number, line in enumerate(read_text(Path(path)).splitlines(), start=1):
        line = line.strip()
        if not line or line.startswith("#"):
            continue
        row = re.fullmatch(r"([A-Za-z0-9][A-Za-z0-9._-]*)(?:==(\S+)| @ \S+)", line)
        if row is None:
            raise InputError(
                f"{path}, line {number}",
                found=repr(line),
                expected="name==version or name @ address",
                fix="give the output of `pip freeze`",
            )
        if row[2] and not _is_version(row[2]):
            raise InputError(
                f"{path}, line {number}", found=row[2], expected="a version", fix="give the output of `pip freeze`"
            )
        packages[normal_name(row[1])] = row[2]
    if not packages:
        raise InputError(str(path), found="no package", expected="the output of `pip freeze`", fix="check the file")
    return packages


def _is_version(text: str) -> bool:
    from packaging.version import InvalidVersion, Version

    try:
        Version(text)
    except InvalidVersion:
        return False
    return True


def read_os_info(path: str | Path) -> str:
    """The Python version in a system line file: `Python 3.13.15` -> `3.13.15`.

    Raises:
        InputError: no such line.
    """
    row = re.search(r"^Python (\d+\.\d+\.\d+)$", read_text(Path(path)), flags=re.MULTILINE)
    if row is None:
        raise InputError(
            str(path), found="no Python version", expected="a line `Python X.Y.Z`", fix="give os-info-gpu.txt"
        )
    return row[1]


def read_reasons(path: str | Path) -> dict[str, str]:
    """The text behind `#`, by package. Example: `trl==0.29.1  # SFTTrainer` -> `{"trl": "SFTTrainer"}`."""
    reasons = {}
    for line in read_text(Path(path)).splitlines():
        requirement, _, reason = line.partition("#")
        if requirement.strip():
            reasons[normal_name(re.split(r"[=<>!~ ;\[]", requirement.strip())[0])] = reason.strip()
    return reasons


def read_metadata(path: str | Path = METADATA) -> dict[str, Metadata]:
    """What `make lock` put on record, by `name==version`."""
    try:
        rows = json.loads(read_text(Path(path)))
        return {
            key: Metadata(tuple(row["requires"]), row.get("requires_python", ""), tuple(row.get("wheels", ())))
            for key, row in rows.items()
        }
    except (json.JSONDecodeError, KeyError, TypeError, AttributeError) as error:
        raise InputError(
            str(path), found=repr(error), expected="what `make lock` writes", fix="run `make lock`"
        ) from None


def fetch_metadata(pins: Sequence[Pin], *, python: str) -> dict[str, Metadata]:
    """Each package's own requirements, from the package index, by `name==version`; nothing is installed.

    Packages that have no wheel for this Python on Colab's platform (Linux, x86_64, glibc 2.35) are left out.

    Raises:
        InputError: pip failed for another reason, such as no network; the message is pip's own.
    """
    batches = [pins[start : start + PIP_BATCH] for start in range(0, len(pins), PIP_BATCH)]
    with ThreadPoolExecutor(PIPS_AT_ONCE) as pool:
        records = list(pool.map(lambda batch: _fetch_batch(batch, python=python), batches))
    return {key: row for record in records for key, row in record.items()}


def _fetch_batch(pins: Sequence[Pin], *, python: str) -> dict[str, Metadata]:
    batch = {normal_name(pin.name): f"{pin.name}=={public(pin.version)}" for pin in pins}
    while batch:
        with tempfile.TemporaryDirectory() as folder:
            done = subprocess.run([*_dry_run(folder, python=python), *batch.values()], capture_output=True, text=True)
            if done.returncode == 0:
                items = json.loads(Path(folder, "r").read_text(encoding="utf-8"))["install"]
                abouts = [item["metadata"] for item in items]
                return {
                    f"{normal_name(about['name'])}=={about['version']}": Metadata(
                        without_extras(about.get("requires_dist", ())), about.get("requires_python", "")
                    )
                    for about in abouts
                }
        lost = re.search(r"No matching distribution found for ([A-Za-z0-9._-]+)==", done.stderr)
        if lost is None or "Retrying" in done.stderr:
            lines = [
                line.strip() for line in done.stderr.splitlines() if not line.startswith(("WARNING", "DEPRECATION"))
            ]
            said = " ".join(filter(None, lines))[-600:]
            raise InputError("pip", found=said, expected="an answer", fix="see pip's message, or check the network")
        del batch[normal_name(lost[1])]
    return {}


def _dry_run(folder: str, *, python: str) -> list[str]:
    platforms = [f"manylinux_2_{minor}_x86_64" for minor in range(35, 4, -1)]
    platforms += ["manylinux2014_x86_64", "manylinux2010_x86_64", "manylinux1_x86_64", "linux_x86_64"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--dry-run", "--no-deps"]
    command += ["--ignore-installed", "--ignore-requires-python", "--only-binary=:all:"]
    command += ["--target", folder, "--report", f"{folder}/r"]
    command += ["--python-version", ".".join(python.split(".")[:2])]
    return [*command, *(f"--platform={platform}" for platform in platforms)]


def without_extras(requires: Iterable[str]) -> tuple[str, ...]:
    """The requirements that hold without any extra. Example: `['pytest; extra == "dev"', "rich"]` -> `("rich",)`."""
    return tuple(text for text in requires if not re.search(r"\bextra\s*==", text))


def check_image(
    freeze: str | Path, os_info: str | Path | None = None, *, requirements: str | Path, fetch: bool = False
) -> ImageReport:
    """Whether a lock installs cleanly on the image that a freeze describes; nothing is installed.

    Args:
        freeze: the image's `pip freeze`; a metadata.json beside it, as `make future` writes it, is read too.
        os_info: the image's system line; without it the Python of the lock's own image is assumed.
        requirements: the lock.
        fetch: read the requirements of packages that are not on record from the package index (minutes).

    Raises:
        InputError: a file cannot be read, or the index does not answer.
    """
    image, pins, metadata = read_freeze(freeze), read_lock(requirements), read_metadata()
    if "torch" not in image:
        fix = "give the whole output of `pip freeze`"
        raise InputError(str(freeze), found="no torch", expected="a freeze of Colab's GPU image", fix=fix)
    beside = Path(freeze).with_name(METADATA.name)
    metadata = {**(read_metadata(beside) if beside.is_file() else {}), **metadata}
    python = read_os_info(os_info) if os_info else _python_of(requirements)
    if fetch:
        locked = {pin.name for pin in pins}
        rows = [Pin(name, public(version)) for name, version in image.items() if version and name not in locked]
        unread = [pin for pin in rows if f"{pin.name}=={pin.version}" not in metadata]
        metadata |= fetch_metadata(unread, python=python)
    return compare_image(image, python=python, pins=pins, metadata=metadata)


def _python_of(requirements: str | Path) -> str:
    row = re.search(r"^# .*Python (\d+\.\d+\.\d+)", read_text(Path(requirements)), flags=re.MULTILINE)
    if row is None:
        raise InputError(
            str(requirements), found="no Python version", expected="it in the head", fix="give --os OS.txt"
        )
    return row[1]


def compare_image(
    image: Mapping[str, str | None], *, python: str, pins: Sequence[Pin], metadata: Mapping[str, Metadata]
) -> ImageReport:
    """What installing `pins` without dependency resolution would do to an image, and what would then not fit.

    A conflict is a requirement that does not hold afterwards: of a locked package, or of one that a locked package
    needs, also where the image itself breaks it. A package that nothing here needs is only hurt, and only where its
    requirement held before.

    Args:
        image: name -> version, from `read_freeze`.
        python: the image's Python, `3.13.15`.
        metadata: each package's own requirements, from `read_metadata` or `fetch_metadata`.

    Raises:
        InputError: the metadata of a locked package is not on record.
    """
    locked = {pin.name: pin.version for pin in pins}
    after = {**image, **locked}
    requires = {}
    for name, version in after.items():
        row = metadata.get(f"{name}=={public(version)}") if version else None
        if row is None and name in locked:
            raise InputError(
                f"{name}=={version}", found="no metadata", expected="a record of it", fix="run `make lock`"
            )
        if row is not None:
            requires[name] = () if name in BUILT_FOR_THE_IMAGE else row.requires
    needed = needed_packages(locked, requires, python=python)
    conflicts, hurt = [], []
    for pin in pins:
        conflicts += unfit(pin, metadata[f"{pin.name}=={pin.version}"], python=python)
        conflicts += [Conflict(_label(pin), *broken) for broken in unmet(requires[pin.name], after, python=python)]
    for name in sorted(set(requires) - set(locked)):
        broken = [Conflict(f"{name} {image[name]}", *pair) for pair in unmet(requires[name], after, python=python)]
        if name in needed:
            conflicts += broken
        else:
            before = {requirement_name(text) for text, _ in unmet(requires[name], image, python=python)}
            hurt += [c for c in broken if requirement_name(c.requires) not in before]
    changes = [
        Change(p.name, image.get(p.name) or ("none" if p.name not in image else "unknown"), p.version, p.reason)
        for p in pins
    ]
    return ImageReport(
        python=python,
        torch=image.get("torch") or "none",
        torch_limits=_torch_limits(image.get("torch"), {name: requires[name] for name in locked}, python=python),
        added=tuple(c for c in changes if c.before == "none"),
        changed=tuple(c for c in changes if c.before not in ("none", c.after)),
        conflicts=tuple(conflicts),
        hurt=tuple(hurt),
        unread=sum(name not in requires for name in image),
    )


def unfit(pin: Pin, record: Metadata, *, python: str) -> list[Conflict]:
    """The conflict of a package that does not run on this Python, or has no wheel for it; else nothing."""
    from packaging.specifiers import SpecifierSet

    if not SpecifierSet(record.requires_python).contains(python):
        return [Conflict(_label(pin), f"Python {record.requires_python}", python)]
    if ".".join(python.split(".")[:2]) not in record.wheels:
        return [Conflict(_label(pin), "a wheel for this Python", f"wheels for {', '.join(record.wheels)}")]
    return []


def _label(pin: Pin) -> str:
    return f"{pin.name} {pin.version}"


def _torch_limits(version: str | None, requires: Mapping[str, Sequence[str]], *, python: str) -> tuple[str, ...]:
    rows = []
    for name, texts in sorted(requires.items()):
        for requirement in applicable(texts, python=python):
            if normal_name(requirement.name) == "torch" and requirement.specifier:
                fits = bool(version) and requirement.specifier.contains(version, prereleases=True)
                rows.append(f"{name} asks for torch{requirement.specifier}: {'met' if fits else 'NOT met'}")
    return tuple(rows)


def needed_packages(roots: Iterable[str], requires: Mapping[str, Sequence[str]], *, python: str) -> set[str]:
    """`roots` and all that they require, directly or through others.

    Example: `needed_packages(["trl"], {"trl": ["datasets"], "datasets": ["dill"]}, python="3.13.1")` ->
    `{"trl", "datasets", "dill"}`.
    """
    needed, waiting = set(), list(roots)
    while waiting:
        name = waiting.pop()
        if name not in needed:
            needed.add(name)
            waiting += [normal_name(r.name) for r in applicable(requires.get(name, ()), python=python)]
    return needed


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 where the lock installs cleanly, 1 where it conflicts, 2 for bad input."""
    parser = argparse.ArgumentParser(prog="python -m tests.maintain.image", description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, help="with pip-freeze.gpu.txt and os-info-gpu.txt")
    parser.add_argument("--requirements", type=Path, default=LOCK, help="the lock")
    parser.add_argument("--fetch", action="store_true", help="read what is not on record from the package index")
    parser.add_argument("--resolve", action="store_true", help="ask uv too whether the lock's versions fit the image")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    options = parser.parse_args(arguments)
    freeze, os_info = options.folder / FREEZE, options.folder / OS_INFO
    try:
        report = check_image(freeze, os_info, requirements=options.requirements, fetch=options.fetch)
        data = report.as_json()
        if options.resolve:
            from tests.maintain.lock import resolve_conflict

            pins = read_lock(options.requirements)
            data["resolve"] = resolve_conflict(pins, image=read_freeze(freeze), python=report.python)
    except InputError as error:
        print(error, file=sys.stderr)
        return 2
    print(json.dumps(data, indent=1) if options.json else report)
    if options.resolve and not options.json:
        print(f"uv pip compile: {data['resolve'] or 'the same versions resolve'}")
    return 0 if report.ok else 1


if __name__ == "__main__":
    sys.exit(main())
