"""Checkpoints on a disk: which are whole, which is the newest, how they are copied and pruned."""

import contextlib
import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.base import hash_files, sha256_of

MANIFEST = "manifest.json"
HANDED_OVER = "handed_over"
UNFINISHED, DELETED = ".unfinished-", ".deleted-"  # prefixes of what is being begun or copied, and deleted
KEPT = 2


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has a manifest.

    Attributes:
        path: its folder.
        run: when its run began, in UTC: names the run, and sorts.
        step, max_steps: where the run was, and where it ends.
        settings: what the run was started with, see `settings_of`.
        files: {name: {"bytes": size, "sha256": digits}}.
    """

    path: Path
    run: str
    step: int
    max_steps: int
    settings: dict[str, Any]
    files: dict[str, dict[str, Any]]

    @property
    def age(self) -> tuple[str, int]:
        """Sorts checkpoints from the oldest to the newest, over all runs."""
        return self.run, self.step

    def damage(self) -> str:
        """What is wrong with its files, "" where nothing is. Reads every byte.

        Example: "optimizer.pt: 1200 bytes instead of 4096"
        """
        for name, expected in self.files.items():
            file = self.path / name
            if not file.is_file():
                return f"{name}: missing"
            if file.stat().st_size != expected["bytes"]:
                return f"{name}: {file.stat().st_size} bytes instead of {expected['bytes']}"
        for name, expected in self.files.items():
            if sha256_of(self.path / name) != expected["sha256"]:
                return f"{name}: other content than was written (sha256)"
        return ""


def _names_in(folder: Path) -> list[str]:
    """What lies in a folder; nothing where there is none. Raises OSError where it cannot be read.

    (Since Python 3.12 `Path.glob` finds nothing there: a Drive that drops would look as if it held no checkpoints.)
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _checkpoints_in(folder: Path) -> list[Path]:
    """The checkpoints that were written here, whole or unfinished: those with a manifest."""
    names = [name for name in _names_in(folder) if name.startswith("checkpoint-")]
    paths = [folder / name for name in names if name.rpartition("-")[2].isdecimal()]
    return [path for path in paths if MANIFEST in _names_in(path)]


def _leftovers_in(folder: Path) -> list[Path]:
    """What was being begun, copied or deleted when its process ended."""
    started = (f"{UNFINISHED}checkpoint-", f"{DELETED}checkpoint-")
    return [folder / name for name in _names_in(folder) if name.startswith(started)]


def _copy_name(run: str, step: int | str) -> str:
    """The name of a copy in the mirror. Example: "checkpoint-20261125T101502123456+0000-37"."""
    return f"checkpoint-{_stamp(run)}-{step}"


def _stamp(run: str) -> str:
    return run.replace("-", "").replace(":", "").replace(".", "")


def _handed_over(folder: Path) -> set[str]:
    """The runs whose result is saved elsewhere."""
    try:
        return set((folder / HANDED_OVER).read_text(encoding="utf-8", errors="replace").split())
    except (FileNotFoundError, NotADirectoryError):
        return set()


def _read_manifest(path: Path) -> Saved | None:
    """A checkpoint by its manifest; None where it has none: it is unfinished."""
    try:
        content = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        return Saved(path=path, **content)
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError):
        return None


def _saved_in(folder: Path) -> list[Saved]:
    """The checkpoints of a folder that have a manifest, the newest last."""
    found = [_read_manifest(path) for path in _checkpoints_in(folder)]
    return sorted(filter(None, found), key=lambda saved: saved.age)


def _delete_unfinished(folder: Path) -> None:
    for path in _checkpoints_in(folder):
        if _read_manifest(path) is None:
            print(f"{path.name} is unfinished and not used (the run ended while it was saved)")
            _remove(path)


def _newest_good(saved: Sequence[Saved]) -> tuple[Saved | None, list[Saved]]:
    """The newest checkpoint that is whole, and the newer ones, which are damaged. Says what is wrong with them."""
    damaged: list[Saved] = []
    for each in reversed(saved):
        damage = each.damage()
        if not damage:
            return each, damaged
        print(f"{each.path} is damaged and not used ({damage})")
        damaged.append(each)
    return None, damaged


def _write_manifest(path: Path, **facts: Any) -> None:
    """Make a checkpoint whole: its files on the disk first, then the manifest that says what they are."""
    sha256 = {name: digits for name, digits in hash_files(path).items() if name != MANIFEST}
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": digits} for name, digits in sha256.items()}
    for name in files:
        _sync(path / name)
    with open(path / MANIFEST, "w", encoding="utf-8") as file:
        json.dump({**facts, "files": files}, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _sync(path)
    _sync(path.parent)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _copy_whole(source: Path, target: Path) -> Path:
    """Copy a checkpoint, which appears whole or not at all; returns its path."""
    unfinished = target.with_name(UNFINISHED + target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        with contextlib.suppress(FileNotFoundError):
            shutil.rmtree(unfinished)
        shutil.copytree(source, unfinished, copy_function=shutil.copyfile)
        for name in hash_files(unfinished):
            _sync(unfinished / name)
        _make_room(target)
        os.replace(unfinished, target)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)  # on a full disk it would leave no room for the next one
        raise
    return target


def _prune(folder: Path, *, keep: Path | None = None) -> None:
    """Delete all but the newest checkpoints, and but the one that is being copied."""
    kept = {saved.path for saved in _saved_in(folder)[-KEPT:]} | {keep}
    for path in _checkpoints_in(folder):
        if path not in kept:
            _remove(path)
    for path in _leftovers_in(folder):
        shutil.rmtree(path)


def _prune_copies(mirror: Path, run: str) -> None:
    """In the mirror, delete all but the newest of this run, and what older runs left that are handed over.

    What else is there may be another machine's, which still trains.
    """
    saved, over = _saved_in(mirror), {each for each in _handed_over(mirror) if each < run}
    older = [each for each in saved if each.run == run][:-KEPT]
    for each in [*older, *(each for each in saved if each.run in over)]:
        _remove(each.path)
    ours = tuple(f"checkpoint-{_stamp(each)}-" for each in {run, *over})
    for path in _leftovers_in(mirror):
        if path.name.removeprefix(UNFINISHED).removeprefix(DELETED).startswith(ours):
            shutil.rmtree(path)


def _make_room(path: Path) -> None:
    """Delete our checkpoint of this name. One that is not ours, as of a plain trainer, is renamed."""
    if MANIFEST in _names_in(path):
        _remove(path)
    elif os.path.lexists(path):
        other = path.with_name(f"{path.name}-other")
        os.replace(path, other)
        print(f"{path} has no {MANIFEST}, so another program wrote it: kept as {other.name}")


def _remove(path: Path) -> None:
    """Delete a checkpoint, renamed first, so that one that is half deleted is not taken for one of another program."""
    deleted = path.with_name(DELETED + path.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(deleted)  # what an earlier deletion left
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, deleted)
        shutil.rmtree(deleted)


def _reason(error: Exception) -> str:
    """The first line of what went wrong, as short as the system says it."""
    if isinstance(error, shutil.Error):  # copytree's list of (source, target, message)
        return str(error.args[0][0][2]).partition(": '")[0]
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # its own words name a line of its source
        return "PyTorch could not write a file to its end: is the disk full?"
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)
