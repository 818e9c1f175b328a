"""`handoff.json`: what a run folder holds, read with care, because a folder may come from somebody else."""

import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from helpers.base import InputError, hash_files, sha256_of
from helpers.chapters import producer_of
from helpers.messages import _

SCHEMA_VERSION = 1
MANIFEST = "handoff.json"
TEXTS = (
    "chapter",
    "base_model",
    "template",
    "identity",
    "base",
    "weights",
)  # facts that are text, where they are there


class HandoffError(InputError):
    """An artefact is missing, unfinished, altered, or made for another model; or a folder cannot be used."""


def fingerprint(text: str) -> str:
    """A short name for a chat template (or any text): the first 16 digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def identity_of(files: Mapping[str, str]) -> str:
    """A short name for what an artefact holds, from {file: sha256}. Data sets' own state files do not count.

    (They name the functions that made a data set, and differ between two runs with the same rows.)
    """
    lines = sorted(f"{name} {sha256}" for name, sha256 in files.items() if not name.endswith("/state.json"))
    return fingerprint("\n".join(lines))


def read_entries(folder: Path) -> dict[str, dict[str, Any]]:
    """{artefact: its entry} of a run folder; nothing where it has no manifest.

    Raises:
        HandoffError: it is not what a chapter writes, for one because a file's name leads out of the folder.
    """
    path = folder / MANIFEST
    fix = _("delete {path}, and run the chapters again", path=path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    except (OSError, ValueError, RecursionError):
        content = None
    schema = content.get("schema") if isinstance(content, dict) else None
    if isinstance(schema, int) and schema != SCHEMA_VERSION:
        found, expected = _("schema {number}", number=schema), _("schema {number}", number=SCHEMA_VERSION)
        raise HandoffError(str(path), found=found, expected=expected, fix=fix)
    entries = content.get("artefacts") if schema == SCHEMA_VERSION else None
    if not isinstance(entries, dict):
        raise HandoffError(str(path), found=_("not a hand-off file"), expected=_("what a chapter writes"), fix=fix)
    for name, entry in entries.items():
        if not (_is_inside(name) and "/" not in name and _is_entry(entry)):
            found = _("an entry {name!r} that no chapter writes", name=name[:80])
            raise HandoffError(str(path), found=found, expected=_("names, and files with their sha256"), fix=fix)
    return entries


def _is_entry(entry: Any) -> bool:
    files = entry.get("files") if isinstance(entry, dict) else None
    if not isinstance(files, dict) or not files:
        return False
    sums = all(isinstance(sha256, str) and re.fullmatch("[0-9a-f]{64}", sha256) for sha256 in files.values())
    texts = all(isinstance(entry.get(name, ""), str) for name in TEXTS)
    pairs = all(_is_texts(entry.get(name, {})) for name in ("source", "made_from", "versions"))
    return sums and texts and pairs and all(map(_is_inside, files))


def _is_texts(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(each, str) for each in value.values())


def _is_inside(name: str) -> bool:
    """Whether a file's name stays in its folder. Example: "a/b.bin" -> True, "../b.bin" and "/b.bin" -> False."""
    parts = PurePosixPath(name).parts
    return bool(parts) and name.isprintable() and "\\" not in name and not {"..", "/"} & set(parts)


def entry_files(path: Path, entry: Mapping[str, Any]) -> list[tuple[Path, str, str]]:
    """(file, its name, its sha256) of an artefact, which is a folder or one file."""
    one = list(entry["files"]) == [path.name] and not path.is_dir()
    return [(path if one else path / name, name, sha256) for name, sha256 in entry["files"].items()]


def difference(path: Path, entry: Mapping[str, Any]) -> tuple[str, str, str] | None:
    """(file, what is there, what should be) of the first file that is not as its entry says; None: all are.

    A symbolic link is not followed: it may lead anywhere, and be another file in the next moment.
    """
    for file, name, sha256 in entry_files(path, entry):
        if any(part.is_symlink() for part in (path, file, *file.parents[: len(PurePosixPath(name).parts) - 1])):
            return str(file), _("a symbolic link"), _("the file itself")
        if not file.is_file():
            expected = _("the file that chapter {chapter} wrote", chapter=entry.get("chapter", ""))
            return str(file), _("no such file"), expected
        if (digits := sha256_of(file)) != sha256:
            found = _("sha256 {digits}…, other content than was written", digits=digits[:12])
            return str(file), found, f"sha256 {sha256[:12]}…"
    return None


def weights_of(base_model: str) -> str:
    """A short name for the weights in a model's folder, from all bytes of them; "" for a name on the hub.

    It takes a second for each GiB or two.
    """
    folder = Path(base_model).expanduser()
    if not base_model or not folder.is_dir():
        return ""
    sums = hash_files(folder, pattern="*.safetensors") or hash_files(folder, pattern="*.bin")
    return fingerprint("\n".join(sorted(sums.values()))) if sums else ""


def stale_need(entry: Mapping[str, Any], entries: Mapping[str, Mapping[str, Any]]) -> str:
    """The first artefact that another was made from and that has been replaced since; "": none has.

    Example: a report of an adapter that a later run replaced -> "adapter"
    """
    made_from = entry.get("made_from", {})
    return next((need for need, name in made_from.items() if need in entries and identity(entries[need]) != name), "")


def identity(entry: Mapping[str, Any]) -> str:
    """An entry's `identity_of` when it was written."""
    return entry.get("identity") or identity_of(entry["files"])


def needs_of(name: str, entries: Mapping[str, Mapping[str, Any]]) -> dict[str, str]:
    """{artefact: identity} of what an artefact is made from: what its chapter needs, and wrote before it."""
    producer = producer_of(name)
    before = producer.writes[: producer.writes.index(name)] if name in producer.writes else ()
    return {need: identity(entries[need]) for need in (*producer.needs, *before) if need in entries}
