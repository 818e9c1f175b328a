"""What one chapter hands to the next: a run folder whose artefacts are written whole and verified when read.

    RUN_DIR/
      handoff.json    what is here: chapter, base model, template fingerprint, versions, sha256 of every file
      dataset/        chapter 03
      adapter/ checkpoints/ report.json     chapter 04
      merged/ …       chapter 06
      numbers/        what each chapter measured, as JSON

`handoff.json` is replaced in one step after its artefact is complete, so a run that is killed at any moment leaves
either the old artefact, or the new one, or one that is refused.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from helpers.base import InputError, hash_files, replace_file, sha256_of, short_path
from helpers.chapters import producer_of
from helpers.environment.hub import base_name

SCHEMA_VERSION = 1
MANIFEST = "handoff.json"
RECORDED_PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")


class HandoffError(InputError):
    """An artefact is missing, unfinished, altered, or made for another model."""


def fingerprint(text: str) -> str:
    """A short name for a chat template (or any text): the first 16 digits of its sha256."""
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def fingerprint_rows(dataset: Any) -> str:
    """The first 16 digits of a sha256 over every row's tokens and labels, in order: other data, other fingerprint.

    (A data set's own fingerprint names the functions that made it, not what is in it.)
    """
    digest = hashlib.sha256()
    names = [name for name in ("input_ids", "labels") if name in dataset.column_names]
    for table in dataset.select_columns(names).with_format("arrow").iter(1000):
        for name in names:
            column = table[name].combine_chunks()
            digest.update(column.value_lengths().to_numpy(zero_copy_only=False).astype("int64").tobytes())
            digest.update(column.flatten().to_numpy(zero_copy_only=False).astype("int64").tobytes())
    return digest.hexdigest()[:16]


def library_versions() -> dict[str, str]:
    """The versions of the libraries that decide what a run computes; those that are not installed are left out."""
    versions = {}
    for package in RECORDED_PACKAGES:
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[package] = metadata.version(package)
    return versions


@dataclass(frozen=True)
class Run:
    """A run folder. Make one with `open_run`.

    Attributes:
        base_model: the name of the model that its artefacts belong to; "": any.
        mirror: a folder that gets a copy of what is written, such as one on Drive.
    """

    path: Path
    base_model: str = ""
    mirror: Path | None = field(default=None, repr=False)

    def artefact(self, name: str) -> Path:
        """The path of an artefact such as "adapter", where it is whole, unaltered and made for this base model."""
        entry = self.facts(name)
        path = self.path / name
        found = hash_files(path) if path.exists() else {}
        for file, expected in entry["files"].items():
            shown = path if path.is_file() else path / file
            if file not in found:
                raise _refused(name, str(shown), "no such file", "the file that chapter wrote")
            if found[file] != expected:
                raise _refused(name, str(shown), f"sha256 {found[file][:12]}…", f"sha256 {expected[:12]}…")
        if self.base_model and entry["base_model"] != self.base_model:
            raise _refused(name, str(path), f"made for the base model {entry['base_model']}", self.base_model)
        return path

    def facts(self, name: str) -> dict[str, Any]:
        """What `handoff.json` says of an artefact: chapter, base_model, template, versions, files, written."""
        entry = self._read().get(name)
        if entry is None:
            raise _missing(self, name)
        return entry

    def keep(self, name: str, *, template: str = "", chat_template: str = "", **facts: Any) -> Path:
        """Take what was written to `RUN_DIR/new/NAME` into the run folder, whole; returns its path there.

        Args:
            name: a folder or a file in `new`.
            template: the chat template's fingerprint, where one matters.
            chat_template: the template itself, in place of its fingerprint.
            facts: anything else worth handing on, JSON-serialisable.
        """
        target, new = self.path / name, self.path / "new" / name
        files = hash_files(new) if new.exists() else {}
        if not files:
            raise HandoffError(str(new), found="no file", expected="what is to be kept", fix="run the cell above again")
        entry = {
            "chapter": producer_of(name).name,
            "base_model": self.base_model,
            "template": fingerprint(chat_template) if chat_template else template,
            "versions": library_versions(),
            "written": datetime.now(UTC).isoformat(timespec="seconds"),
            **facts,
            "files": files,
        }
        _remove(target)
        os.replace(new, target)
        replace_file(self.path / MANIFEST, _dump({**self._read(), name: entry}))
        if self.mirror is not None:
            try:
                _copy_artefact(self.path, self.mirror, name, entry)
            except OSError as error:  # Drive drops out now and then; what is in the run folder is whole
                reason = error.strerror or str(error)
                print(f"NO COPY of {name} in DRIVE_DIR {self.mirror} ({reason}): mount it, copy RUN_DIR there")
        return target

    @contextlib.contextmanager
    def write(self, name: str, *, template: str = "", **facts: Any) -> Iterator[Path]:
        """`keep` for what one block writes: yields the path to write to (create a folder or a file there).

        A block that fails leaves nothing.
        """
        new = self.path / "new" / name
        new.parent.mkdir(exist_ok=True)
        _remove(new)
        try:
            yield new
            self.keep(name, template=template, **facts)
        finally:
            _remove(new)

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """`write` for a JSON file; returns its path."""
        with self.write(name) as path:
            path.write_bytes(_json(content))
        return self.path / name

    def read_json(self, name: str) -> dict[str, Any]:
        """The verified content of a JSON artefact."""
        return json.loads(self.artefact(name).read_text(encoding="utf-8"))

    def record(self, chapter: str, **numbers: Any) -> None:
        """Keep what a chapter measured, for the regression: numbers, claims, or {name: number} of several.

        Example: `run.record("03_data", train_rows=480)` writes numbers/03_data.json
        """
        (self.path / "numbers").mkdir(exist_ok=True)
        replace_file(self.path / "numbers" / f"{chapter}.json", _json(numbers))

    def _read(self) -> dict[str, Any]:
        path = self.path / MANIFEST
        if not path.exists():
            return {}
        fix = f"delete {self.path} and run the chapters again"
        try:
            content = json.loads(path.read_text(encoding="utf-8"))
            schema = content["schema"]
            if schema == SCHEMA_VERSION:
                return dict(content["artefacts"])
        except (ValueError, KeyError, TypeError) as error:
            raise HandoffError(str(path), found="not a hand-off file", expected="JSON", fix=fix) from error
        raise HandoffError(str(path), found=f"schema {schema}", expected=f"schema {SCHEMA_VERSION}", fix=fix)


def open_run(path: str | Path, *, base_model: str = "", needs: tuple[str, ...] = (), drive: str | Path = "") -> Run:
    """Open a run folder and make sure that it holds what a chapter needs; prints where each artefact came from.

    Args:
        path: the run folder; made if it does not exist. What an interrupted chapter left in its `new` is removed.
        base_model: the model that its artefacts belong to, a name on the hub or a folder; only its last part counts.
        needs: names of artefacts, such as ("dataset", "adapter"). What is not in the run folder is fetched from Drive.
        drive: a folder that artefacts are looked for in, and copied to once they are written.

    Raises:
        HandoffError: the folder lies on Google Drive or cannot be written; or an artefact is missing, and then the
            message names the command that makes it; or one was altered or belongs to another model; or a file that
            one was made from has changed, and nothing is trained yet.
    """
    folder = Path(path).expanduser().resolve()
    if is_on_drive(folder):
        raise HandoffError(
            f"RUN_DIR {folder}",
            found="a folder on Google Drive, which drops out now and then while training writes to it",
            expected="a folder on the machine's own disk",
            fix=f'set RUN_DIR = "{Path.home() / folder.name}" and DRIVE_DIR = "{folder}", which then keeps a copy',
        )
    _check_writable(folder, setting="RUN_DIR")
    _remove(folder / "new")
    mirror = Path(drive).expanduser().resolve() if drive else None
    if mirror is not None:
        _mount_drive(mirror)
        _check_writable(mirror, setting="DRIVE_DIR")
    run = Run(folder, base_name(base_model) if base_model else "", mirror)
    print(f"Run folder: {short_path(folder)}")
    for name in needs:
        print(f"  {name}: {_fetch(run, name)}")
        if changed := changed_source(run.facts(name)):
            found, expected = "a file that has changed since it was read", "the rows that were read"
            fix = f"run chapter {producer_of(name).name} again, which reads it as it is now"
            if "adapter" not in needs:  # else it was trained on already, and judged on the rows as they were
                raise HandoffError(changed, found=found, expected=expected, fix=fix)
            print(f"    {short_path(changed)} has changed since; the adapter was trained on it as it was")
    return run


def changed_source(entry: Mapping[str, Any]) -> str:
    """The first file, of those that an artefact was made from and that are still there, that has changed; else ""."""
    sources = ((Path(name), sha256) for name, sha256 in entry.get("source", {}).items())
    return next((str(path) for path, sha256 in sources if path.is_file() and sha256_of(path) != sha256), "")


def _fetch(run: Run, name: str) -> str:
    """Make one artefact present; returns where it came from."""
    copies = Run(run.mirror, run.base_model) if run.mirror is not None else None
    if name not in run._read() and copies is not None and name in copies._read():
        copies.artefact(name)
        _copy_artefact(copies.path, run.path, name, copies.facts(name))
        run.artefact(name)
        return f"copied from {short_path(copies.path)}"
    run.artefact(name)
    return "from the run folder"


def missing_chapters(run: Run, name: str) -> list[str]:
    """The chapters to run, in order, for an artefact to be there.

    Example: in an empty run folder "adapter" -> ["03_data", "04_train"]
    """
    producer, chapters = producer_of(name), []
    for need in producer.needs:
        if need not in run._read():
            chapters += [chapter for chapter in missing_chapters(run, need) if chapter not in chapters]
    return [*chapters, producer.name]


def _refused(name: str, where: str, found: str, expected: str) -> HandoffError:
    chapter = producer_of(name).name
    return HandoffError(where, found=found, expected=expected, fix=f"run chapter {chapter} (again) with this RUN_DIR")


def _missing(run: Run, name: str) -> HandoffError:
    """An artefact that is nowhere, with the one line that makes it here: on Colab each notebook has its own machine."""
    where = run.path / name
    state = "a folder or file that no chapter finished" if where.exists() else "nothing"
    words = ["python", "-m", "tests.maintain.series", *missing_chapters(run, name), "-p", "RUN_DIR", str(run.path)]
    fix = f"run `!{shlex.join(words)}` in a new cell, with the other choices as further -p NAME VALUE"
    fix = f"{fix}; or set DRIVE_DIR to the folder on Drive that holds it" if run.mirror is None else fix
    return HandoffError(str(where), found=state, expected=f"what chapter {producer_of(name).name} writes", fix=fix)


def is_on_drive(folder: Path) -> bool:
    """Whether a folder (made or not, without symbolic links) lies on Google Drive.

    Colab mounts it as the file system type `fuse.drive`, at any place; `/content/drive` counts before it is mounted
    too. Other programs' types are called such as `fuse.google-drive-ocamlfuse`.
    """
    import psutil

    mounts = {Path(mount.mountpoint): mount.fstype for mount in psutil.disk_partitions(all=True)}
    on = next((mounts[parent] for parent in (folder, *folder.parents) if parent in mounts), "")
    return "drive" in on or folder.is_relative_to("/content/drive")


def _mount_drive(folder: Path) -> None:
    """On Colab, mount Google Drive if the folder lies on it; Colab asks the reader for permission."""
    if folder.is_relative_to("/content/drive") and not Path("/content/drive/MyDrive").exists():
        with contextlib.suppress(ImportError):  # elsewhere there is nothing to mount
            from google.colab import drive

            drive.mount("/content/drive")


def _check_writable(folder: Path, *, setting: str) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe = folder / f".probe-{os.getpid()}"
        probe.write_text("")
        probe.unlink()
    except OSError as error:
        raise HandoffError(
            f"{setting} {folder}",
            found=error.strerror or str(error),
            expected="a folder that can be written",
            fix=f"set {setting} to a folder of your own",
        ) from None


def _copy_artefact(source: Path, target: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Copy an artefact between run folders under the same rule: its entry appears after its files."""
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f".unfinished-{name}"
    _remove(unfinished)
    (shutil.copytree if (source / name).is_dir() else shutil.copy2)(source / name, unfinished)
    _remove(target / name)
    os.replace(unfinished, target / name)
    replace_file(target / MANIFEST, _dump({**Run(target)._read(), name: entry}))


def _dump(artefacts: Mapping[str, Any]) -> bytes:
    return _json({"schema": SCHEMA_VERSION, "artefacts": artefacts})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()


def _remove(path: Path) -> None:
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
