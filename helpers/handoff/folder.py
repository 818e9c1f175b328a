"""The folder of a run on its disk: found, writable, not on Drive, and one process at a time."""

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from helpers.base import reason
from helpers.chapters import Chapter
from helpers.handoff.manifest import HandoffError
from helpers.messages import _

LOCK_SECONDS = 60  # for another process that is just writing `handoff.json`


def find_folder(path: str | Path, *, setting: str) -> Path:
    """The folder that a choice names, without symbolic links."""
    try:
        return Path(path).expanduser().resolve()
    except (OSError, RuntimeError, ValueError) as error:  # nobody's home, links in a circle, a null byte
        found, fix = str(error).splitlines()[0], _("set {setting} to a folder of your own", setting=setting)
        raise HandoffError(f"{setting} {path!r}", found=found, expected=_("a folder"), fix=fix) from None


def is_on_drive(folder: Path) -> bool:
    """Whether a folder (made or not, without symbolic links) lies on Google Drive.

    Colab mounts it as the file system type `fuse.drive`, at any place; `/content/drive` counts before it is mounted
    too. Other programs' types are called such as `fuse.google-drive-ocamlfuse`.
    """
    import psutil

    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    on = next((mounts[parent] for parent in (folder, *folder.parents) if parent in mounts), "")
    return "drive" in on or folder.is_relative_to("/content/drive")


def mount_drive(folder: Path) -> None:
    """On Colab, mount Google Drive if the folder lies on it; Colab asks the reader for permission."""
    if folder.is_relative_to("/content/drive") and not Path("/content/drive/MyDrive").exists():
        with contextlib.suppress(ImportError):  # elsewhere there is nothing to mount
            from google.colab import drive

            drive.mount("/content/drive")


def check_writable(folder: Path, *, setting: str) -> None:
    if setting == "DRIVE_DIR":
        fix = _("mount Drive again or make room there, or set DRIVE_DIR to another folder")
    else:
        fix = _("free disk space, or set {setting} to a folder of your own", setting=setting)
    with one_line(f"{setting} {folder}", _("a folder that can be written"), fix):
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()


@contextlib.contextmanager
def one_line(where: str | Path, expected: str, fix: str) -> Iterator[None]:
    """An OSError in this block, such as that of a full disk, is one clear line."""
    try:
        yield
    except OSError as error:
        raise HandoffError(str(where), found=reason(error), expected=expected, fix=fix) from None


def lock_chapter(folder: Path, chapter: Chapter) -> Any:
    """A lock that is held until this process ends or forgets it: two at once would write into each other's files."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / f".{chapter.name}.lock", is_singleton=True)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise HandoffError(
            f"RUN_DIR {folder}",
            found=_("another process that has chapter {chapter} open in it", chapter=chapter.name),
            expected=_("one at a time"),
            fix=_("shut that notebook's kernel down, which holds the folder even when its cells are done"),
        ) from None
    return lock


@contextlib.contextmanager
def writing(folder: Path) -> Iterator[None]:
    """Alone while `handoff.json` is read and replaced; a folder on Drive may have no locks, and goes without."""
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".handoff.lock")
    try:
        lock.acquire(timeout=LOCK_SECONDS)
    except Timeout:
        found = _("another process that has been writing for {seconds} s", seconds=LOCK_SECONDS)
        fix = _("wait for it, or end it")
        raise HandoffError(str(folder), found=found, expected=_("one at a time"), fix=fix) from None
    except NotImplementedError:
        pass
    try:
        yield
    finally:
        lock.release()


def remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
