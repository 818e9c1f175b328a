"""Checkpoints on a disk: which are whole, which is the newest, how they are copied and pruned.

Names count for nothing but the step: the manifest says whose a checkpoint is.
"""

import contextlib
import json
import os
import queue
import re
import shutil
import threading
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from helpers.base import hash_files, reason, replace_file, set_aside, sha256_of
from helpers.messages import _

MANIFEST = "manifest.json"
HANDED_OVER = "handed_over"
UNFINISHED, DELETED = ".unfinished-", ".deleted-"  # prefixes of what is being begun or copied, and deleted
KEPT = 2
MIRROR_WAIT_SECONDS = 60


@dataclass(frozen=True)
class Saved:
    """A checkpoint that has a manifest.

    Attributes:
        path: its folder.
        run: when its run began by that machine's clock: a name, not an order.
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

    def damage(self) -> str:
        """What is wrong with its files, "" where nothing is. Reads every byte.

        Example: "optimizer.pt: 1200 bytes instead of 4096"
        """
        for name, expected in self.files.items():
            file = self.path / name
            if not file.is_file():
                return _("{name}: missing", name=name)
            if (size := file.stat().st_size) != expected["bytes"]:
                return _("{name}: {size} bytes instead of {right}", name=name, size=size, right=expected["bytes"])
            if sha256_of(file) != expected["sha256"]:
                return _("{name}: other content than was written (sha256)", name=name)
        return ""


def read_saved(path: Path) -> Saved | None:
    """A checkpoint by its manifest; None where it has none, or one that is unfinished or damaged."""
    try:
        saved = Saved(path=path, **json.loads((path / MANIFEST).read_text(encoding="utf-8")))
    except (FileNotFoundError, NotADirectoryError, ValueError, TypeError, RecursionError):
        return None
    kinds = {"run": str, "step": int, "max_steps": int, "settings": dict, "files": dict}
    right = all(type(getattr(saved, name)) is kind for name, kind in kinds.items())
    return saved if right and all(map(_is_file, saved.files.items())) else None


def _is_file(item: tuple[str, Any]) -> bool:
    """Whether an entry of `Saved.files` is one of a file in the checkpoint's folder."""
    name, facts = item
    inside = "\0" not in name and not Path(name).is_absolute() and ".." not in Path(name).parts
    return inside and isinstance(facts, dict) and facts.keys() >= {"bytes", "sha256"}


def saved_in(folder: Path) -> list[Saved]:
    """The checkpoints of a folder that have a manifest, the furthest last."""
    found = [read_saved(path) for path in _marked_in(folder)]
    return sorted(filter(None, found), key=lambda saved: saved.step)


def handed_over(folder: Path) -> set[str]:
    """The runs whose result is saved elsewhere."""
    try:
        return set((folder / HANDED_OVER).read_text(encoding="utf-8", errors="replace").split())
    except (FileNotFoundError, NotADirectoryError):
        return set()


def newest_good(saved: Sequence[Saved]) -> tuple[Saved | None, list[Saved]]:
    """The furthest checkpoint that is whole, and those beyond it, which are damaged. Says what is wrong with them."""
    damaged: list[Saved] = []
    for each in reversed(saved):
        damage = each.damage()
        if not damage:
            return each, damaged
        print(_("{path} is damaged and not used ({damage})", path=each.path, damage=damage))
        damaged.append(each)
    return None, damaged


def delete_unfinished(folder: Path) -> None:
    """Delete what a process that ended was saving, copying or deleting."""
    _delete_leftovers(folder)
    for path in _marked_in(folder):
        if read_saved(path) is None and (path / MANIFEST).stat().st_size:
            said = _(
                "{name} has a manifest that cannot be read: kept as {kept}, and not used",
                name=path.name,
                kept=set_aside(path).name,
            )
            print(said)
        elif read_saved(path) is None:
            print(_("{name} is unfinished and not used (the run ended while it was saved)", name=path.name))
            with contextlib.suppress(OSError):
                remove(path)


def begin(path: Path, runs: Collection[str]) -> None:
    """Make an empty checkpoint that is known as ours, and unfinished, from its first moment. `runs`: see `prune`."""
    _make_room(path, runs)
    begun = path.with_name(UNFINISHED + path.name)
    begun.mkdir(exist_ok=True)
    (begun / MANIFEST).touch()
    os.replace(begun, path)


def write_manifest(path: Path, **facts: Any) -> None:
    """Make a checkpoint whole: its files on the disk first, then the manifest that says what they are."""
    sha256 = {name: digits for name, digits in hash_files(path).items() if name != MANIFEST}
    files = {name: {"bytes": (path / name).stat().st_size, "sha256": digits} for name, digits in sha256.items()}
    for name in files:
        _sync(path / name)
    replace_file(path / MANIFEST, json.dumps({**facts, "files": files}, indent=1).encode())
    _sync(path)
    _sync(path.parent)


def copy_whole(source: Path, target: Path, runs: Collection[str]) -> Path:
    """Copy a checkpoint, which appears whole or not at all; returns its path. `runs`: see `prune`."""
    unfinished = target.with_name(UNFINISHED + target.name)
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        _delete_leftovers(target.parent)  # they may hold the last of the room
        shutil.copytree(source, unfinished, copy_function=shutil.copyfile)
        for name in hash_files(unfinished):
            _sync(unfinished / name)
        _make_room(target, runs)
        os.replace(unfinished, target)
    except OSError:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
    return target


def prune(folder: Path, run: str, runs: Collection[str], *, keep: Path | None = None) -> None:
    """Delete all checkpoints of `runs` but the furthest of `run`.

    Args:
        run: the run that trains.
        runs: that run and those handed over: what may be deleted. Any other's stays.
        keep: one that is being copied, and stays.
    """
    saved = [each for each in saved_in(folder) if each.run in runs]
    kept = {each.path for each in [each for each in saved if each.run == run][-KEPT:]} | {keep}
    for each in saved:
        if each.path not in kept:
            remove(each.path)


def remove(path: Path) -> None:
    """Delete a checkpoint, renamed first, so that one that is half deleted is not taken for one of another program."""
    deleted = path.with_name(DELETED + path.name)
    with contextlib.suppress(FileNotFoundError):
        shutil.rmtree(deleted)  # what an earlier deletion left
    with contextlib.suppress(FileNotFoundError):
        os.replace(path, deleted)
        shutil.rmtree(deleted)


class Copier(contextlib.AbstractContextManager):
    """Copies a run's checkpoints to the mirror in a thread. The first failure is said, by `tell`, and once.

    Args:
        mirror: the folder on Drive; None: nothing is copied.
        run, runs: as for `prune`.
    """

    def __init__(self, mirror: Path | None, run: str, runs: Collection[str]) -> None:
        self.mirror, self.run, self.runs, self.busy = mirror, run, runs, None
        self.failure, self.told = "", False
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        # A daemon: a Drive that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._work, daemon=True)
        if mirror is not None:
            self.thread.start()

    def put(self, path: Path) -> None:
        if self.mirror is not None:
            self.waiting.put(path)

    def tell(self) -> None:
        if self.failure and not self.told:
            self.told = True
            facts = dict(folder=self.mirror, failure=self.failure)
            said = _(
                "No copy in {folder} ({failure}): training goes on, its checkpoints are in the run folder", **facts
            )
            print(said)

    def _work(self) -> None:
        while (path := self.waiting.get()) is not None:
            self.busy = path
            try:
                self._require_alone()
                copy_whole(path, self.mirror / path.name, self.runs)
                prune(self.mirror, self.run, self.runs)
            except Exception as error:
                if (path / MANIFEST).exists():  # else newer ones have replaced it meanwhile: no failure
                    self.failure = self.failure or reason(error)
            self.busy = None

    def _require_alone(self) -> None:
        """No lock reaches from one machine to another: whoever copied first keeps the mirror."""
        for each in saved_in(self.mirror):
            if each.run not in self.runs:
                said = _(
                    "{name} there is of a run that began {run}: give each machine a DRIVE_DIR of its own",
                    name=each.path.name,
                    run=each.run,
                )
                raise RuntimeError(said)

    def __exit__(self, *error: Any) -> None:
        if self.mirror is not None:
            self.waiting.put(None)
            self.thread.join(MIRROR_WAIT_SECONDS)
            if self.thread.is_alive():
                self.failure = self.failure or _("still not copied after {seconds} s", seconds=MIRROR_WAIT_SECONDS)
            self.tell()


def names_in(folder: Path) -> list[str]:
    """What lies in a folder; nothing where there is none. Raises OSError where it cannot be read.

    (Since Python 3.12 `Path.glob` finds nothing there: a Drive that drops would look as if it held no checkpoints.)
    """
    try:
        return sorted(os.listdir(folder))
    except (FileNotFoundError, NotADirectoryError):
        return []


def _marked_in(folder: Path) -> list[Path]:
    """The checkpoints that were written here, whole or unfinished: those with a manifest."""
    paths = [folder / name for name in names_in(folder) if re.fullmatch(r"checkpoint-\d+", name)]
    return [path for path in paths if MANIFEST in names_in(path)]


def _delete_leftovers(folder: Path) -> None:
    for name in names_in(folder):
        if name.startswith((f"{UNFINISHED}checkpoint-", f"{DELETED}checkpoint-")):
            shutil.rmtree(folder / name, ignore_errors=True)


def _make_room(path: Path, runs: Collection[str]) -> None:
    """Delete the checkpoint of this name if it belongs to `runs`; another run's or program's is renamed."""
    found = read_saved(path)
    if found and found.run in runs:
        remove(path)
    elif os.path.lexists(path):
        print(_("{path} is not of this run: kept as {kept}", path=path, kept=set_aside(path).name))


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
