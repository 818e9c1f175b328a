"""Make `requirements-colab.txt`: what has to be added to Colab's image, or kept in it, and nothing else (`make lock`).

python -m tests.maintain.lock [--image FOLDER] [--out FILE]       a lock for another image, written elsewhere
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from helpers.base import InputError
from helpers.environment.requirements import NEED, Pin, applicable, normal_name, public, read_lock
from tests.maintain.image import (
    BUILT_FOR_THE_IMAGE,
    FREEZE,
    IMAGES,
    LOCK,
    METADATA,
    OS_INFO,
    Metadata,
    fetch_metadata,
    read_freeze,
    read_os_info,
    read_reasons,
)

IMAGE = IMAGES / "2026-08"  # the image that the lock is made for
WANTED = IMAGES / "wanted.in"
WHEELS_FOR = ("3.11", "3.12", "3.13", "3.14")  # the Pythons for which it is put on record whether a wheel exists

# Never pinned, whoever limits them: built for the image, or read by half of it in a form that another version breaks.
THE_IMAGES_OWN = (*BUILT_FOR_THE_IMAGE, "numpy", "protobuf", "pyarrow", "sentencepiece")
# What asks for one of these belongs to PyTorch's stack. Its packages are released together and break each other.
STACK = ("torch", "transformers", "huggingface-hub")


def find_uv() -> str:
    """uv beside this interpreter, else the one on the path.

    Raises:
        InputError: there is none.
    """
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise InputError(
            "uv", found="no program of this name", expected="uv", fix="run `make setup`, or `pip install uv`"
        )
    return uv


def resolve(
    wanted: Sequence[str],
    *,
    image: Mapping[str, str | None],
    python: str,
    previous: Path | None = None,
    hashes: bool = True,
) -> str:
    """uv's resolve of `wanted` for Colab with every other package held at the image's version.

    Args:
        wanted: requirements, such as `trl==0.29.1`.
        image: name -> version, from `read_freeze`.
        python: `3.13` or `3.13.15`.
        previous: an earlier lock, whose versions are kept where they still fit, so that running again changes nothing.
        hashes: give each row the hashes of its files.

    Raises:
        InputError: uv is missing, or nothing fits; the message is uv's own.
    """
    uv = find_uv()
    free = {normal_name(requirement.name) for requirement in applicable(wanted, python=python)}
    held = {name: public(version) for name, version in image.items() if version and name not in free}
    with tempfile.TemporaryDirectory() as folder:
        names = ("wanted.txt", "image.txt", "uv.toml", "lock.txt")
        asked, constraints, config, out = (Path(folder, name) for name in names)
        asked.write_text("\n".join(wanted), encoding="utf-8")
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()), encoding="utf-8")
        config.write_text(
            "".join(
                f'[[dependency-metadata]]\nname = "{name}"\nversion = "{held[name]}"\nrequires-dist = []\n'
                for name in BUILT_FOR_THE_IMAGE
                if name in held
            ),
            encoding="utf-8",
        )
        if previous and previous.is_file():
            shutil.copy(previous, out)
        command = [uv, "pip", "compile", "--quiet", str(asked), "--output-file", str(out)]
        command += ["--constraints", str(constraints), "--config-file", str(config)]
        command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
        command += ["--annotation-style", "split", "--no-header", *(["--generate-hashes"] if hashes else [])]
        command += ["--no-python-downloads"]  # uv would fetch the image's Python; it resolves for it without having it
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                "uv pip compile",
                found=done.stderr.strip(),
                expected="versions that fit the image",
                fix="change the pins",
            )
        return out.read_text(encoding="utf-8")


def resolve_conflict(pins: Sequence[Pin], *, image: Mapping[str, str | None], python: str) -> str:
    """Why uv cannot fit the lock's versions to an image, in its own words; "" where it can.

    It is the second opinion on `tests.maintain.image.compare_image`. A package that the image lacks and the lock does
    not have is a conflict too, because the setup cell resolves nothing.
    """
    try:
        text = resolve([f"{p.name}=={p.version}" for p in pins], image=image, python=python, hashes=False)
    except InputError as error:
        if error.where == "uv":
            raise
        return error.found
    lacking = set(read_resolved(text)) - set(image) - {pin.name for pin in pins}
    return f"the image has no {', '.join(sorted(lacking))}" if lacking else ""


def read_resolved(text: str) -> dict[str, tuple[str, list[str], list[str]]]:
    """uv's rows: name -> (version, the packages that ask for it, its hashes)."""
    rows = {}
    for block in re.split(r"\n(?=[a-z0-9])", text.strip()):
        name, version = re.match(r"([^=\s]+)==([^\s\\;]+)", block).groups()
        askers = re.findall(r"^    #(?: via)?\s+([A-Za-z0-9_.-]+)$", block, flags=re.MULTILINE)
        rows[normal_name(name)] = (version, [a for a in askers if a != "via"], re.findall(r"--hash=\S+", block))
    return rows


def limits(
    roots: Iterable[str], *, versions: Mapping[str, str], requires: Mapping[str, Sequence[str]], python: str
) -> dict[str, str]:
    """The packages that must stay at their version, each with the reason; `roots` themselves are left out.

    A package is limited where a locked one excludes a version newer than the present one. So is one of PyTorch's stack
    that a locked one asks for: its next version may ask for more than the others here, because they move together. To
    that stack belongs what asks for one of `STACK`, and, where a least version is asked for, what nothing else needs.
    What is limited is locked, and its own requirements count in turn. `THE_IMAGES_OWN` are never limited.

    Args:
        roots: names of what is locked already.
        versions: name -> version of all that is installed once the lock is.
        requires: name -> its requirements, of all that is installed.

    Example: with `requires={"unsloth": ["trl>=0.18,<=1.15"]}` and `versions={"trl": "0.29.1"}` ->
    `{"trl": "unsloth asks for trl<=1.15"}`.
    """
    asked = {name: applicable(texts, python=python) for name, texts in requires.items()}
    roots, askers = set(roots), {}
    for name, requirements in asked.items():
        for requirement in requirements:
            askers.setdefault(normal_name(requirement.name), set()).add(name)
    stack = set(STACK).union(*(askers.get(name, set()) for name in STACK))
    locked, limited, waiting = set(roots), {}, sorted(roots)
    while waiting:
        name = waiting.pop(0)
        for requirement in asked.get(name, ()):
            other = normal_name(requirement.name)
            if other in roots or other in THE_IMAGES_OWN:
                continue
            newest = [str(s) for s in requirement.specifier if excludes_newer(s, versions[other])]
            of_stack = other in stack or (requirement.specifier and askers[other] <= stack)
            if newest and limited.get(other, "moves").startswith("moves"):
                limited[other] = f"{name} asks for {other}{','.join(newest)}"
            elif of_stack and other not in locked:
                limited[other] = f"moves together with {name}"
            if other in limited and other not in locked:
                locked.add(other)
                waiting.append(other)
    return limited


def excludes_newer(bound: Any, version: str) -> bool:
    """Does one bound of a specifier exclude a version that is newer than this one?

    Example: `excludes_newer(Specifier("<2"), "1.5")` -> True; `excludes_newer(Specifier("!=1.0"), "1.5")` -> False.
    """
    from packaging.version import Version

    if bound.operator == "!=":
        return Version(bound.version.removesuffix(".*")) > Version(version)
    return bound.operator in ("<", "<=", "==", "~=", "===")


def tightest(bounds: Iterable[Any]) -> str:
    """The bounds that say all that many say. Example: those of `>=1.17`, `>=2,<3` and `<4` -> `"<3,>=2"`."""
    from packaging.version import Version

    least: dict[str, Any] = {}
    for bound in bounds:
        kind = bound.operator[0] if bound.operator in ("<", "<=", ">", ">=") else str(bound)
        present = least.get(kind)
        if present is None or (Version(bound.version) > Version(present.version)) == (kind == ">"):
            least[kind] = bound
    return ",".join(sorted(map(str, least.values())))


def lock_text(
    resolved: str,
    *,
    image: Mapping[str, str | None],
    reasons: Mapping[str, str],
    records: Mapping[str, Metadata],
    python: str,
    title: str,
) -> str:
    """The lock: the rows that the image lacks, has in another version, or could move out of a limit.

    Args:
        resolved: what `resolve` gave.
        reasons: name -> why it is wanted, from `read_reasons`.
        records: the requirements of the image's and of the resolved packages, by `name==version`.
        title: the first lines of the file.
    """
    rows = read_resolved(resolved)
    versions = {name: version for name, (version, *_) in rows.items()}
    installed = {**{name: public(version) for name, version in image.items() if version}, **versions}
    requires = {
        name: records[f"{name}=={version}"].requires
        for name, version in installed.items()
        if f"{name}=={version}" in records
    }
    wrong = [name for name in versions if name in reasons or public(image.get(name) or "") != versions[name]]
    limited = limits(wrong, versions=versions, requires=requires, python=python)
    names = sorted({*wrong, *limited})
    pythons = {name: records[f"{name}=={versions[name]}"].requires_python for name in names}
    asks = {name: [*requires[name], *([f"python{pythons[name]}"] if pythons[name] else [])] for name in names}
    parts = [title, *needs_lines(asks, python=python)]
    for name in names:
        version, askers, hashes = rows[name]
        reason = reasons.get(name) or limited.get(name) or "needed by " + ", ".join(askers)
        seen = f"image: {image[name]}" if image.get(name) else "not in the image"
        parts.append("\n    ".join([f"# {reason} ({seen})\n{name}=={version} \\", *(f"{h} \\" for h in hashes)])[:-2])
    return "\n".join(parts) + "\n"


def needs_lines(requires: Mapping[str, Sequence[str]], *, python: str) -> list[str]:
    """What the locked packages ask of the image's: a comment line a package, which the setup cell checks first.

    Behind the bounds stand those who ask for just these, or all where any version will do.

    Args:
        requires: name -> its requirements, of what is locked; one of them may be about `python`.

    Example: `needs_lines({"unsloth": ["torch<2.15"]}, python="3.13.1")` -> `["#: torch<2.15  unsloth"]`.
    """
    asked: dict[str, dict[str, list[Any]]] = {}
    for name, texts in requires.items():
        for requirement in applicable(texts, python=python):
            other = normal_name(requirement.name)
            if other not in requires:
                asked.setdefault(other, {}).setdefault(name, []).extend(requirement.specifier)
    lines = []
    for other, bounds in sorted(asked.items()):
        tight = tightest(bound for some in bounds.values() for bound in some)
        binding = [name for name, some in bounds.items() if {*map(str, some)} & {*tight.split(",")}]
        lines.append(f"{NEED}{other}{tight}  {', '.join(binding or bounds)}")
    return lines


def metadata_text(records: Mapping[str, Metadata], *, pins: Sequence[Pin], python: str) -> str:
    """What the lock's and the image's packages ask for, one JSON row a package; of the lock's also their wheels."""
    rows = {key: {"requires": row.requires} for key, row in records.items()}
    for minor in WHEELS_FOR:
        for key, row in fetch_metadata(pins, python=minor).items():
            kept = rows.setdefault(key, {"requires": row.requires})
            kept.setdefault("requires_python", row.requires_python)
            kept.setdefault("wheels", []).append(minor)
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())) + "\n}\n"


def make_lock(folder: Path, records: Mapping[str, Metadata]) -> str:
    """The lock for the image in `folder`.

    Args:
        folder: it holds pip-freeze.gpu.txt and os-info-gpu.txt.
        records: the requirements of the image's packages, by `name==version`; what is missing is fetched.

    Raises:
        InputError: a file cannot be read, the package index does not answer, or nothing fits the image.
    """
    image, python = read_freeze(folder / FREEZE), read_os_info(folder / OS_INFO)
    wanted = [line.partition("#")[0].strip() for line in WANTED.read_text(encoding="utf-8").splitlines()]
    minor = python.rpartition(".")[0]
    resolved = resolve([w for w in wanted if w], image=image, python=minor, previous=LOCK)
    rows = [Pin(name, version) for name, (version, *_) in read_resolved(resolved).items()]
    missing = [pin for pin in rows if f"{pin.name}=={pin.version}" not in records]
    title = (
        "# What has to be added to Colab's image, changed in it or kept, for this series: nothing else is touched.\n"
        f"# Resolved against the image of {folder.name}: Python {python}, torch {image['torch']}.\n"
        "# Made by `make lock`; the setup cell installs it with --no-deps and --require-hashes.\n"
        f"# What these packages ask of the image, with who asks; a line a package, after `{NEED.strip()}`:"
    )
    return lock_text(
        resolved,
        image=image,
        reasons=read_reasons(WANTED),
        records={**records, **fetch_metadata(missing, python=python)},
        python=python,
        title=title,
    )


def main(arguments: Sequence[str] | None = None) -> int:
    """Write the lock and `tests/colab-image/metadata.json`; with `--out`, a lock for another image and nothing else."""
    parser = argparse.ArgumentParser(prog="python -m tests.maintain.lock", description=__doc__.splitlines()[0])
    parser.add_argument("--image", type=Path, default=IMAGE, metavar="FOLDER", help="with its freeze and system line")
    parser.add_argument("--out", type=Path, metavar="FILE", help="write the lock there, and nothing else")
    options = parser.parse_args(arguments)
    try:
        image, python = (
            read_freeze(options.image / FREEZE),
            read_os_info(options.image / OS_INFO),
        )
        print("Reading what the image's packages ask for (2 to 7 minutes) ...", flush=True)
        records = fetch_metadata([Pin(name, version) for name, version in image.items() if version], python=python)
        lock = make_lock(options.image, records)
        (options.out or LOCK).write_text(lock, encoding="utf-8")
        pins = read_lock(options.out or LOCK)
        if not options.out:
            METADATA.write_text(metadata_text(records, pins=pins, python=python), encoding="utf-8")
    except InputError as error:
        print(error, file=sys.stderr)
        return 1
    print(f"{options.out or LOCK.name}: {len(pins)} packages.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
