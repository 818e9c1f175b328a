"""What one chapter hands to the next: a run folder whose artefacts are written whole and verified when read.

    RUN_DIR/
      handoff.json    what is here: chapter, base model, template fingerprint, versions, sha256 of every file
      dataset/        chapter 03
      adapter/ checkpoints/ report.json     chapter 04
      merged/ …       chapter 06
      numbers/        what each chapter measured, as JSON
      new/            what a chapter is writing
      .04_train.lock  held while a process has chapter 04 open in this folder

`handoff.json` is replaced in one step after its artefact is complete, so a run that is killed at any moment leaves
either the old artefact, or the new one, or one that is refused. Each entry names what its artefact was made from, so
that a report never passes for that of another adapter. What took training, and what is not as it was written, is set
aside under a number and never deleted.
"""

import contextlib
import hashlib
import json
import os
import shlex
import shutil
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime
from importlib import metadata
from pathlib import Path
from typing import Any

from helpers.base import hash_files, reason, replace_file, set_aside, sha256_of, short_path
from helpers.chapters import Chapter, chapter_of, producer_of
from helpers.environment.hub import base_name, hub_name
from helpers.handoff.folder import (
    check_writable,
    find_folder,
    is_on_drive,
    lock_chapter,
    mount_drive,
    one_line,
    remove,
    writing,
)
from helpers.handoff.manifest import (
    MANIFEST,
    SCHEMA_VERSION,
    HandoffError,
    difference,
    entry_files,
    fingerprint,
    identity,
    identity_of,
    needs_of,
    read_entries,
    stale_need,
    weights_of,
)
from helpers.messages import N_, _
from helpers.ranks import start

RECORDED_PACKAGES = ("unsloth", "unsloth_zoo", "torch", "transformers", "trl", "peft", "bitsandbytes", "datasets")
WRITABLE = N_("room and permission to write")
ROOM = N_("free disk space, or set RUN_DIR to a folder on another disk")


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
        base: the model as it was chosen, a name on the hub or a folder.
        lock: keeps another process from opening the same chapter here.
        needs: {artefact: its identity} of what the chapter that opened it was given.
    """

    path: Path
    base_model: str = ""
    mirror: Path | None = field(default=None, repr=False)
    base: str = field(default="", repr=False)
    lock: Any = field(default=None, repr=False, compare=False)
    needs: Mapping[str, str] = field(default_factory=dict, repr=False)

    def artefact(self, name: str) -> Path:
        """The path of an artefact such as "adapter", where it is whole, unaltered and made for this base model."""
        entry = self.facts(name)
        with one_line(self.path / name, _("an artefact that can be read"), _("run the cell again")):
            differs = difference(self.path / name, entry)
        if differs:
            raise _refused(name, *differs)
        if need := stale_need(entry, self._read()):
            found = _("made from another {need}", need=need)
            expected = _("made from the {need} that is here", need=need)
            raise _refused(name, str(self.path / name), found, expected)
        if self.base_model and entry.get("base_model") != self.base_model:
            made_for = dict(model=entry.get("base") or entry.get("base_model"), chapter=producer_of(name).name)
            found = _("made for the base model {model}", **made_for)
            fix = _("set MODEL_NAME to {model}, or run chapter {chapter} again for this one", **made_for)
            raise HandoffError(str(self.path / name), found=found, expected=self.base_model, fix=fix)
        return self.path / name

    def facts(self, name: str) -> dict[str, Any]:
        """What `handoff.json` says of an artefact: chapter, base_model, template, versions, files, written."""
        entry = self._read().get(name)
        if entry is None:
            raise _missing(self, name)
        return entry

    def keep(self, name: str, *, template: str = "", chat_template: str = "", **facts: Any) -> Path:
        """Take what was written to `RUN_DIR/new/NAME` into the run folder, whole; returns its path there.

        What it replaces is set aside where it took training, or is not as it was written.

        Args:
            name: a folder or a file in `new`.
            template: the chat template's fingerprint, where one matters.
            chat_template: the template itself, in place of its fingerprint.
            facts: anything else worth handing on, JSON-serialisable.
        """
        target, new = self.path / name, self.path / "new" / name
        with one_line(new, _(WRITABLE), _(ROOM)):
            files = hash_files(new) if new.exists() else {}
            if not files:
                fix = _("run the cell above again")
                raise HandoffError(str(new), found=_("no file"), expected=_("what is to be kept"), fix=fix)
            if link := next((file for file in (new, *new.rglob("*")) if file.is_symlink()), None):
                found, fix = _("a symbolic link"), _("write the file itself")
                raise HandoffError(str(link), found=found, expected=_("a file"), fix=fix)
            with writing(self.path):
                entries = self._read()
                self._require_the_same_needs(entries)
                entry = {
                    "chapter": producer_of(name).name,
                    "base_model": self.base_model,
                    "base": hub_name(self.base),
                    "weights": weights_of(self.base) if _is_trained(name) else "",
                    "template": fingerprint(chat_template) if chat_template else template,
                    "versions": library_versions(),
                    "written": datetime.now(UTC).isoformat(timespec="seconds"),
                    "identity": identity_of(files),
                    "made_from": needs_of(name, entries),
                    **facts,
                    "files": files,
                }
                _clear(target, entries.get(name), files=files)
                os.replace(new, target)
                replace_file(self.path / MANIFEST, _dump({**entries, name: entry}))
        if self.mirror is not None:
            try:
                _copy_artefact(self.path, self.mirror, name, entry)
            except (OSError, HandoffError) as error:  # Drive drops out; what is in the run folder is whole
                values = dict(name=name, drive=self.mirror, why=reason(error), run=self.path)
                told = _(
                    "NO COPY of {name} in DRIVE_DIR {drive} ({why}): "
                    "make room there or mount it again, then `!cp -r {run}/. {drive}`",
                    **values,
                )
                print(told)
        return target

    @contextlib.contextmanager
    def write(self, name: str, *, template: str = "", **facts: Any) -> Iterator[Path]:
        """`keep` for what one block writes: yields the path to write to (create a folder or a file there).

        A block that fails leaves nothing.
        """
        new = self.path / "new" / name
        with one_line(new, _(WRITABLE), _(ROOM)):
            new.parent.mkdir(exist_ok=True)
            remove(new)
            try:
                yield new
                self.keep(name, template=template, **facts)
            finally:
                remove(new)

    def write_json(self, name: str, content: Mapping[str, Any]) -> Path:
        """`write` for a JSON file; returns its path."""
        with self.write(name) as path:
            path.write_bytes(_json(content))
        return self.path / name

    def read_json(self, name: str) -> dict[str, Any]:
        """The verified content of a JSON artefact."""
        return _read_object(self.artefact(name), name)

    def start(self, command: str) -> None:
        """Run a command line that trains into this folder, as a terminal would; see `helpers.ranks.start`."""
        start(command)

    def record(self, chapter: str, **numbers: Any) -> None:
        """Keep what a chapter measured, for the regression: numbers, claims, or {name: number} of several.

        Example: `run.record("03_data", train_rows=480)` writes numbers/03_data.json
        """
        with one_line(self.path / "numbers", _(WRITABLE), _(ROOM)):
            (self.path / "numbers").mkdir(exist_ok=True)
            replace_file(self.path / "numbers" / f"{chapter}.json", _json(numbers))

    def _read(self) -> dict[str, Any]:
        return read_entries(self.path)

    def _require_the_same_needs(self, entries: Mapping[str, Any]) -> None:
        """Raises HandoffError where what the chapter was given was replaced while it ran."""
        for name, was in self.needs.items():
            if name in entries and identity(entries[name]) != was:
                found = _("another {name} than when this chapter began", name=name)
                expected, chapter = _("the same until it ends"), producer_of(name).name
                fix = _("run this chapter again from its top: chapter {chapter} was run meanwhile", chapter=chapter)
                raise HandoffError(str(self.path / name), found=found, expected=expected, fix=fix)


def open_run(path: str | Path, *, chapter: str | Chapter = "", base_model: str = "", drive: str | Path = "") -> Run:
    """Open a run folder and make sure that it holds what a chapter needs; prints where each artefact came from.

    Args:
        path: the run folder; made if it does not exist.
        chapter: the one that opens it, such as "04_train". What it needs is verified, or fetched from Drive where it
            is not in the run folder. What an interrupted run of it left in `new` is removed.
        base_model: the model that its artefacts belong to, a name on the hub or a folder. An adapter is put on it,
            whatever folder it was trained from, where the weights there are the same.
        drive: a folder that artefacts are looked for in, and copied to once they are written.

    Raises:
        HandoffError: the folder lies on Google Drive or cannot be written; another process has this chapter open
            in it; an artefact is missing, and then the message names the command that makes it; one was altered, was
            made from something that has been replaced, or belongs to another model; or a file that one was made from
            has changed, and nothing is trained yet.
    """
    chapter = chapter_of(chapter) if isinstance(chapter, str) else chapter
    folder = find_folder(path, setting="RUN_DIR")
    if is_on_drive(folder):
        own = Path.home() / folder.name
        raise HandoffError(
            f"RUN_DIR {folder}",
            found=_("a folder on Google Drive, which drops out now and then while training writes to it"),
            expected=_("a folder on the machine's own disk"),
            fix=_('set RUN_DIR = "{own}" and DRIVE_DIR = "{drive}", which then keeps a copy', own=own, drive=folder),
        )
    check_writable(folder, setting="RUN_DIR")
    lock = lock_chapter(folder, chapter) if chapter.writes else None
    for name in chapter.writes:
        remove(folder / "new" / name)
    mirror = find_folder(drive, setting="DRIVE_DIR") if drive else None
    if mirror is not None:
        mount_drive(mirror)
        check_writable(mirror, setting="DRIVE_DIR")
    run = Run(folder, base_name(base_model) if base_model else "", mirror, str(base_model), lock)
    print(_("Run folder: {folder}", folder=short_path(folder)))
    for name in chapter.needs:
        print(f"  {name}: {_fetch(run, name)}")
        if _is_trained(name) and base_model:
            _require_base(run, name)
            _put_on_base(run, name)
        _require_source(run, name, trained="adapter" in chapter.needs)
    return replace(run, needs={name: identity(run.facts(name)) for name in chapter.needs})


def _is_trained(name: str) -> bool:
    """Whether an artefact is what a chapter trained, and not what it says of that."""
    producer = producer_of(name)
    return producer.trains and name == producer.writes[0]


def _require_source(run: Run, name: str, *, trained: bool) -> None:
    """Refuse what was made from a file that has changed since; of what is trained already, say so."""
    changed = changed_source(run.facts(name))
    if changed and not trained:
        found, expected = _("a file that has changed since it was read"), _("the rows that were read")
        fix = _("run chapter {chapter} again, which reads it as it is now", chapter=producer_of(name).name)
        raise HandoffError(changed, found=found, expected=expected, fix=fix)
    if changed:
        told = _("{file} has changed since; the adapter was trained on it as it was", file=short_path(changed))
        print(f"    {told}")


def changed_source(entry: Mapping[str, Any]) -> str:
    """The first file, of those that an artefact was made from and that are still there, that has changed; else ""."""
    sources = ((Path(name), sha256) for name, sha256 in entry.get("source", {}).items())
    return next((str(path) for path, sha256 in sources if path.is_file() and sha256_of(path) != sha256), "")


def _require_base(run: Run, name: str) -> None:
    """Refuse what was trained on another base model: on other weights, or under another name on the hub."""
    entry, now = run.facts(name), weights_of(run.base)
    then = entry.get("weights", "")
    fix = _("set MODEL_NAME to the model that it was trained on, or run chapter 04 again")
    if then and now and then != now:
        found = _("trained on other weights than those in {folder}", folder=run.base)
        raise HandoffError(str(run.path / name), found=found, expected=_("the weights it was trained on"), fix=fix)
    named, chosen = entry.get("base", ""), hub_name(run.base)
    if named and chosen and named.lower() != chosen.lower():
        raise HandoffError(str(run.path / name), found=_("trained on {model}", model=named), expected=chosen, fix=fix)


def _put_on_base(run: Run, name: str) -> None:
    """Let an adapter's configuration name the base model that was chosen, in place of a folder of another machine.

    Only a folder's path is replaced, in the configuration and in the manifest; a name on the hub stays.
    """
    path = run.path / name / "adapter_config.json"
    if not path.is_file():
        return
    config = _read_object(path, name)
    named = str(config.get("base_model_name_or_path", ""))
    if named == run.base or (hub_name(named) and hub_name(run.base)):
        return
    config["base_model_name_or_path"] = run.base
    with one_line(path, _(WRITABLE), _(ROOM)), writing(run.path):
        entries = run._read()
        replace_file(path, json.dumps(config, indent=2, sort_keys=True).encode())
        entries[name]["files"][path.name] = sha256_of(path)
        replace_file(run.path / MANIFEST, _dump(entries))
    told = _("its base model is {model}, and was {before}", model=short_path(run.base), before=named)
    print(f"    {told}")


def _fetch(run: Run, name: str) -> str:
    """Make one artefact present; returns where it came from."""
    copies = replace(run, path=run.mirror, mirror=None) if run.mirror is not None else None
    if name not in run._read() and copies is not None and name in copies._read():
        copies.artefact(name)
        entry = copies.facts(name)
        if need := stale_need(entry, run._read()):
            found = _("made from another {need}", need=need)
            expected = _("made from the {need} in {folder}", need=need, folder=run.path)
            raise _refused(name, str(copies.path / name), found, expected)
        expected = _("room for the copy in {folder}, and Drive to answer", folder=copies.path)
        fix = _("mount Drive again, or free disk space, or set RUN_DIR to a folder on another disk")
        with one_line(run.path / name, expected, fix):
            _copy_artefact(copies.path, run.path, name, entry)
        run.artefact(name)
        return _("copied from {folder}", folder=short_path(copies.path))
    run.artefact(name)
    return _("from the run folder")


def missing_chapters(run: Run, name: str) -> list[str]:
    """The chapters to run, in order, for an artefact to be there.

    Example: in an empty run folder "adapter" -> ["03_data", "04_train"]
    """
    producer, chapters = producer_of(name), []
    for need in producer.needs:
        if need not in run._read():
            chapters += [chapter for chapter in missing_chapters(run, need) if chapter not in chapters]
    return [*chapters, producer.name]


def _read_object(path: Path, name: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        content = None
    if not isinstance(content, dict):
        raise _refused(name, str(path), _("no JSON object"), _("what that chapter writes"))
    return content


def _refused(name: str, where: str, found: str, expected: str) -> HandoffError:
    fix = _("run chapter {chapter} (again) with this RUN_DIR", chapter=producer_of(name).name)
    return HandoffError(where, found=found, expected=expected, fix=fix)


def _missing(run: Run, name: str) -> HandoffError:
    """An artefact that is nowhere, with the one line that makes it here: on Colab each notebook has its own machine."""
    where = run.path / name
    state = _("a folder or file that no chapter finished") if where.exists() else _("nothing")
    chapters = missing_chapters(run, name)
    words = ["python", "-m", "tests.maintain.series", *chapters, "-p", "RUN_DIR", str(run.path)]
    words += ["-p", "MODEL_NAME", run.base] if run.base else []
    words += ["-p", "DRIVE_DIR", str(run.mirror)] if run.mirror is not None else []
    words += ["-p", "DATASET", "YOUR_FILE"] if "03_data" in chapters else []
    command, expected = shlex.join(words), _("what chapter {chapter} writes", chapter=producer_of(name).name)
    fix = _("run `!{command}` in a new cell, with your other choices as further -p NAME VALUE", command=command)
    if run.mirror is None:
        fix = _(
            "run `!{command}` in a new cell, with your other choices as further -p NAME VALUE; "
            "or, where DRIVE_DIR is a choice, set it to the folder on Drive that holds it",
            command=command,
        )
    return HandoffError(str(where), found=state, expected=expected, fix=fix)


def _clear(target: Path, entry: Mapping[str, Any] | None, *, files: Mapping[str, str]) -> None:
    """Make room for an artefact: what took training or is not as it was written is set aside, the rest is deleted."""
    if not os.path.lexists(target):
        return
    whole = entry is not None and difference(target, entry) is None
    if whole and (entry["files"] == files or not producer_of(target.name).trains):
        remove(target)
    else:
        print(_("The {name} that was here is kept as {path}", name=target.name, path=short_path(set_aside(target))))


def _copy_artefact(source: Path, target: Path, name: str, entry: Mapping[str, Any]) -> None:
    """Copy an artefact's own files, and no others, between run folders: its entry appears after its files."""
    target.mkdir(parents=True, exist_ok=True)
    unfinished = target / f".unfinished-{name}"
    remove(unfinished)  # it may hold the last of the room
    try:
        for file, inside, _ in entry_files(source / name, entry):
            copy = unfinished if file == source / name else unfinished / inside
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy, follow_symlinks=False)
        with writing(target):
            entries = read_entries(target)
            _clear(target / name, entries.get(name), files=entry["files"])
            os.replace(unfinished, target / name)
            replace_file(target / MANIFEST, _dump({**entries, name: entry}))
    finally:
        with contextlib.suppress(OSError):
            remove(unfinished)


def _dump(artefacts: Mapping[str, Any]) -> bytes:
    return _json({"schema": SCHEMA_VERSION, "artefacts": artefacts})


def _json(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=2, ensure_ascii=False) + "\n").encode()
