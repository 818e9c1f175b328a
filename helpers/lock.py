"""Make `requirements-colab.txt`: what has to be added to Colab's image, and nothing else (`make lock`)."""

import json
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from helpers.errors import InputError
from helpers.image import (
    Pin,
    fetch_metadata,
    normal_name,
    public,
    read_freeze,
    read_lock,
    read_os_info,
    read_reasons,
    requirement_name,
)

ROOT = Path(__file__).resolve().parent.parent
IMAGES = ROOT / "colab-image"
IMAGE = IMAGES / "2026-08"  # the image that the lock is made for
LOCK = ROOT / "requirements-colab.txt"
WHEELS_FOR = ("3.11", "3.12", "3.13", "3.14")  # the Pythons for which it is put on record whether a wheel exists

# Packages whose own build is in the image: the package index has another CUDA build of the same version, which asks for
# other NVIDIA packages. Their requirements are the image's affair, so the resolver is told that they have none.
BUILT_FOR_THE_IMAGE = ("torch", "torchvision", "torchaudio", "triton")


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


def resolve(wanted: Path, *, overrides: Path, image: dict[str, str | None], python: str, previous: Path) -> str:
    """uv's resolve of `wanted` for Colab with every other package held at the image's version.

    Args:
        previous: an earlier lock, whose versions are kept where they still fit, so that running again changes nothing.

    Raises:
        InputError: uv is missing, or nothing fits; the message is uv's own.
    """
    uv = find_uv()
    free = set(read_reasons(wanted))
    held = {name: public(version) for name, version in image.items() if version and name not in free}
    with tempfile.TemporaryDirectory() as folder:
        constraints, config, out = (Path(folder, name) for name in ("image.txt", "uv.toml", "lock.txt"))
        constraints.write_text("".join(f"{name}=={version}\n" for name, version in held.items()), encoding="utf-8")
        config.write_text(
            "".join(
                f'[[dependency-metadata]]\nname = "{name}"\nversion = "{held[name]}"\nrequires-dist = []\n'
                for name in BUILT_FOR_THE_IMAGE
                if name in held
            ),
            encoding="utf-8",
        )
        if previous.is_file():
            shutil.copy(previous, out)
        command = [uv, "pip", "compile", "--quiet", str(wanted), "--output-file", str(out)]
        command += ["--constraints", str(constraints), "--overrides", str(overrides), "--config-file", str(config)]
        command += ["--python-version", python, "--python-platform", "x86_64-manylinux_2_35"]
        command += ["--generate-hashes", "--annotation-style", "split", "--no-header"]
        command += ["--no-python-downloads"]  # uv would fetch the image's Python; it resolves for it without having it
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            raise InputError(
                str(wanted), found=done.stderr.strip(), expected="versions that fit the image", fix="change the pins"
            )
        return out.read_text(encoding="utf-8")


def lock_text(resolved: str, *, image: dict[str, str | None], reasons: dict[str, str], title: str) -> str:
    """The resolved rows that the image does not already have, each under a comment that says why it is there."""
    parts = [title]
    for block in re.split(r"\n(?=[a-z0-9])", resolved.strip()):
        name, version = re.match(r"([^=\s]+)==([^\s\\;]+)", block).groups()
        name = normal_name(name)
        if public(image.get(name) or "") == version:
            continue
        via = re.findall(r"^    #(?: via)?\s+([A-Za-z0-9_.-]+)$", block, flags=re.MULTILINE)
        reason = reasons.get(name) or "needed by " + ", ".join(v for v in via if v != "via")
        found = f"image: {image[name]}" if image.get(name) else "not in the image"
        hashes = re.findall(r"--hash=\S+", block)
        parts.append("\n    ".join([f"# {reason} ({found})\n{name}=={version} \\", *(f"{h} \\" for h in hashes)])[:-2])
    return "\n".join(parts) + "\n"


def metadata_text(pins: Sequence[Pin], *, image: dict[str, str | None], python: str) -> str:
    """What the lock's packages ask for, and what the image's packages ask of the lock's, one JSON row a package."""
    locked = {pin.name for pin in pins}
    wheels = {minor: fetch_metadata(pins, python=minor) for minor in WHEELS_FOR}
    rows = {}
    for key, row in wheels[python.rpartition(".")[0]].items():
        found_for = [minor for minor, found in wheels.items() if key in found]
        rows[key] = {"requires": row.requires, "requires_python": row.requires_python, "wheels": found_for}
    others = [Pin(name, version) for name, version in image.items() if version and name not in locked]
    for key, row in fetch_metadata(others, python=python).items():
        rows[key] = {"requires": [text for text in row.requires if requirement_name(text) in locked]}
    return "{\n" + ",\n".join(f"{json.dumps(key)}: {json.dumps(row)}" for key, row in sorted(rows.items())) + "\n}\n"


def main() -> None:
    """Write the lock and `colab-image/metadata.json`."""
    image = read_freeze(IMAGE / "pip-freeze.gpu.txt")
    python = read_os_info(IMAGE / "os-info-gpu.txt")
    wanted, overrides = IMAGES / "wanted.in", IMAGES / "overrides.txt"
    title = (
        "# What has to be added to Colab's image, or changed in it, for this series: nothing else is touched.\n"
        f"# Resolved against the image of {IMAGE.name}: Python {python}, torch {image['torch']}.\n"
        "# Made by `make lock` from colab-image/; the setup cell installs it with --no-deps and --require-hashes."
    )
    resolved = resolve(wanted, overrides=overrides, image=image, python=python.rpartition(".")[0], previous=LOCK)
    LOCK.write_text(lock_text(resolved, image=image, reasons=read_reasons(wanted), title=title), encoding="utf-8")
    pins = read_lock(LOCK)
    print(
        f"{LOCK.name}: {len(pins)} packages. Reading what the image's packages ask for (about 4 minutes) ...",
        flush=True,
    )
    (IMAGES / "metadata.json").write_text(metadata_text(pins, image=image, python=python), encoding="utf-8")


if __name__ == "__main__":
    main()
