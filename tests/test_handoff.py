"""The hand-off: whole or not at all, verified when read, and an error that names the file and the chapter."""

import contextlib
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.base import ROOT, replace_file, set_aside, sha256_of
from helpers.chapters import Chapter
from helpers.handoff.run import (
    MANIFEST,
    HandoffError,
    fingerprint,
    fingerprint_rows,
    is_on_drive,
    missing_chapters,
    open_run,
)


@pytest.fixture
def run(tmp_path):
    return open_run(tmp_path / "run", base_model="owner/base")


def needing(*artefacts):
    return Chapter("test", "", needs=artefacts)


def write_adapter(run, text="weights"):
    with run.write("adapter", template="t", steps=5) as folder:
        (folder / "deep").mkdir(parents=True)
        (folder / "a.bin").write_text(text)
        (folder / "deep" / "b.bin").write_text("more")


def test_what_was_written_is_read(run):
    write_adapter(run)
    assert (run.artefact("adapter") / "deep" / "b.bin").read_text() == "more"
    facts = run.facts("adapter")
    assert (facts["chapter"], facts["base_model"], facts["template"]) == ("04_train", "base", "t")
    assert facts["steps"] == 5
    assert set(facts["files"]) == {"a.bin", "deep/b.bin"}
    assert "transformers" in facts["versions"]


def test_json_round_trip(run):
    content = {"losses": [1.5, None], "模型": {"r": 16}}
    assert run.write_json("report.json", content) == run.path / "report.json"
    assert run.read_json("report.json") == content


@pytest.mark.parametrize(
    ("damage", "named"),
    [
        (lambda folder: (folder / "a.bin").write_text("other"), "a.bin"),
        (lambda folder: (folder / "deep" / "b.bin").unlink(), "b.bin"),
    ],
    ids=["altered", "deleted"],
)
def test_damage_is_refused_by_name(run, damage, named):
    write_adapter(run)
    damage(run.path / "adapter")
    with pytest.raises(HandoffError) as caught:
        run.artefact("adapter")
    assert named in str(caught.value)
    assert "04_train" in str(caught.value)


def test_altered_json_is_refused(run):
    run.write_json("report.json", {"steps": 5})
    (run.path / "report.json").write_text("{}")
    with pytest.raises(HandoffError, match="report.json.*04_train"):
        run.read_json("report.json")


def test_what_a_chapter_measured_is_a_file_of_its_own_and_no_artefact(run):
    run.record("03_data", train_rows=480)
    run.record("05_infer", replies=4, by_temperature={"0.3": 1.5})
    run.record("03_data", train_rows=470, all_finite=True)
    numbers = {path.name: json.loads(path.read_text()) for path in (run.path / "numbers").iterdir()}
    assert numbers == {
        "03_data.json": {"train_rows": 470, "all_finite": True},
        "05_infer.json": {"replies": 4, "by_temperature": {"0.3": 1.5}},
    }
    assert not (run.path / MANIFEST).exists()


def test_a_drive_that_dropped_out_leaves_the_run_folder_whole(tmp_path, capsys):
    run = open_run(tmp_path / "run", drive=tmp_path / "drive")
    (tmp_path / "drive").rmdir()
    (tmp_path / "drive").write_text("no folder any more")
    write_adapter(run)
    run.artefact("adapter")
    assert "NO COPY of adapter in DRIVE_DIR" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("base_model", "fits"),
    [
        ("", True),
        ("base", True),
        ("another/base", None),
        ("/data/base", True),
        ("/cache/models/owner--base/snapshots/master", True),
        ("owner/other", False),
        ("base/other", False),
    ],
)
def test_another_base_model_is_refused(run, base_model, fits, capsys):
    write_adapter(run)
    if fits:
        open_run(run.path, base_model=base_model, chapter=needing("adapter"))
        assert "adapter: from the run folder" in capsys.readouterr().out
        return
    another_owner = "trained on owner/base, expected another/base. Fix: set MODEL_NAME to the model that"
    another_name = "made for the base model owner/base, expected other. Fix: set MODEL_NAME to owner/base, or run"
    said = another_name if fits is False else another_owner
    with pytest.raises(HandoffError, match=said):
        open_run(run.path, base_model=base_model, chapter=needing("adapter"))


def test_the_message_for_a_missing_artefact_is_the_line_that_makes_it(run):
    with pytest.raises(HandoffError) as caught:
        open_run(run.path, chapter=needing("adapter"))
    assert str(caught.value) == (
        f"{run.path}/adapter: found nothing, expected what chapter 04_train writes. Fix: run "
        f"`!python -m tests.maintain.series 03_data 04_train -p RUN_DIR {run.path} -p DATASET YOUR_FILE` in a new "
        "cell, with your other choices as further -p NAME VALUE; or, where DRIVE_DIR is a choice, set it to the folder "
        "on Drive that holds it."
    )
    run.write_json("dataset", {})
    with pytest.raises(HandoffError, match=f"series 04_train -p RUN_DIR {run.path}` in a new cell"):
        open_run(run.path, chapter=needing("dataset", "report.json"))


def test_a_missing_artefact_names_drive_only_where_none_is_chosen(run, tmp_path):
    with pytest.raises(HandoffError) as caught:
        open_run(run.path, base_model="owner/base", chapter=needing("adapter"), drive=tmp_path / "drive")
    assert "or set DRIVE_DIR" not in str(caught.value)
    assert f"-p MODEL_NAME owner/base -p DRIVE_DIR {tmp_path / 'drive'} -p DATASET YOUR_FILE`" in str(caught.value)


def test_the_line_that_makes_an_artefact_can_be_typed_whatever_the_folder_is_called(tmp_path):
    folder = tmp_path / "it's my run"
    with pytest.raises(HandoffError) as caught:
        open_run(folder, chapter=needing("dataset"))
    command = shlex.split(re.search("`!python -m (.*)` in a new cell", str(caught.value))[1])
    more = ["-p", "DATASET", "YOUR_FILE"]
    assert command == ["tests.maintain.series", "03_data", "-p", "RUN_DIR", str(folder), *more]


@pytest.mark.parametrize("damage", ["altered", "gone"])
def test_an_altered_artefact_is_refused_and_never_replaced(tmp_path, damage):
    """Also where Drive has a good copy: what a reader changed is not overwritten without being asked."""
    run = open_run(tmp_path / "run", drive=tmp_path / "drive")
    write_adapter(run)
    file = run.path / "adapter" / "a.bin"
    file.write_text("mine") if damage == "altered" else file.unlink()
    with pytest.raises(HandoffError, match=f"{file}: found .* Fix: run chapter 04_train .again. with this RUN_DIR"):
        open_run(run.path, chapter=needing("adapter"), drive=tmp_path / "drive")
    assert (file.read_text() if file.exists() else "gone") == ("mine" if damage == "altered" else "gone")


def test_a_file_that_has_changed_since_it_was_read_is_noticed(run, tmp_path, capsys):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("old")
    for name in ("dataset", "adapter"):
        with run.write(name, source={str(rows): sha256_of(rows)} if name == "dataset" else {}) as folder:
            folder.mkdir()
            (folder / "part").write_text("rows")
    open_run(run.path, chapter=needing("dataset"))
    rows.write_text("corrected")
    with pytest.raises(HandoffError, match="rows.jsonl: found .* has changed .* run chapter 03_data again"):
        open_run(run.path, chapter=needing("dataset"))
    open_run(run.path, chapter=needing("dataset", "adapter"))  # what was trained is there and can be used
    assert "rows.jsonl has changed since" in capsys.readouterr().out
    rows.unlink()  # another machine, where it never was
    open_run(run.path, chapter=needing("dataset"))


def test_folder_without_entry_is_refused(run):
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "a.bin").write_text("looks finished")
    with pytest.raises(HandoffError, match="no chapter finished"):
        run.artefact("adapter")


def test_failed_write_keeps_the_old_artefact(run):
    write_adapter(run, "old")
    with pytest.raises(RuntimeError), run.write("adapter") as folder:
        folder.mkdir()
        (folder / "a.bin").write_text("half")
        raise RuntimeError
    assert (run.artefact("adapter") / "a.bin").read_text() == "old"
    assert not list((run.path / "new").iterdir())


def test_what_lies_in_new_is_kept_whole(run):
    for text in ("old", "new"):
        (run.path / "new" / "merged").mkdir(parents=True)
        (run.path / "new" / "merged" / f"{text}.bin").write_text(text)
        assert run.keep("merged", template="t", steps=5) == run.path / "merged"
        assert [file.name for file in run.artefact("merged").iterdir()] == [f"{text}.bin"]
        assert not (run.path / "new" / "merged").exists()
    assert run.facts("merged")["steps"] == 5 and run.facts("merged")["template"] == "t"
    assert not list(run.path.glob("merged.previous-*"))


def test_a_chat_template_is_noted_by_its_fingerprint(run):
    for template in ("{{ messages }}", "{{ messages }} "):
        (run.path / "new" / "adapter").mkdir(parents=True)
        (run.path / "new" / "adapter" / "a.bin").write_text("a")
        run.keep("adapter", chat_template=template)
        assert run.facts("adapter")["template"] == fingerprint(template)


def test_nothing_is_kept_where_nothing_was_written_and_what_was_there_stays(run):
    write_adapter(run, "old")
    for missing in (lambda folder: None, lambda folder: folder.mkdir(parents=True)):
        missing(run.path / "new" / "adapter")
        with pytest.raises(HandoffError, match="new/adapter: found no file, .* Fix: run the cell above again"):
            run.keep("adapter")
    assert (run.artefact("adapter") / "a.bin").read_text() == "old"


def test_what_an_interrupted_chapter_left_in_new_is_not_kept_by_the_next_one(run):
    torn = run.path / "new" / "gguf" / "model-q4_k_m.gguf"
    torn.parent.mkdir(parents=True)
    torn.write_text("half of a fi")
    again = open_run(run.path, chapter=Chapter("test", "", writes=("gguf",)))
    assert not torn.exists()
    torn.parent.mkdir(parents=True)
    (torn.parent / "model-q8_0.gguf").write_text("a whole file")
    assert [file.name for file in again.keep("gguf").iterdir()] == ["model-q8_0.gguf"]


def test_empty_write_is_refused(run):
    with pytest.raises(HandoffError, match="new/adapter: found no file"), run.write("adapter") as folder:
        folder.mkdir()


KILLED = """
import sys
from helpers.handoff.run import open_run
run = open_run(sys.argv[1])
round = 0
while True:
    round += 1
    with run.write("adapter", round=round) as folder:
        folder.mkdir()
        for name in range(20):
            (folder / str(name)).write_text(str(round) * 5000)
    print("wrote", flush=True)
"""


def test_a_killed_writer_never_leaves_an_artefact_that_loads_half(run):
    """SIGKILL at ten moments: what verifies afterwards is whole (one round's files), else it is refused."""
    for attempt in range(10):
        writer = subprocess.Popen(
            [sys.executable, "-c", KILLED, str(run.path)], cwd=ROOT, stdout=subprocess.PIPE, text=True
        )
        while writer.stdout.readline().strip() != "wrote":
            pass
        time.sleep(0.003 * attempt)
        writer.send_signal(signal.SIGKILL)
        writer.wait()
        with contextlib.suppress(HandoffError):
            run.artefact("adapter")
            contents = {path.read_text() for path in (run.path / "adapter").iterdir()}
            assert len(contents) == 1
            assert len(list((run.path / "adapter").iterdir())) == 20
        write_adapter(run)  # and the folder can be used again
        run.artefact("adapter")


def test_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HandoffError, match="RUN_DIR .*a folder that can be written"):
        open_run(tmp_path / "file" / "run")


def test_drive_folder_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(HandoffError, match="DRIVE_DIR .*a folder that can be written"):
        open_run(tmp_path / "run", drive=tmp_path / "file" / "drive")


@pytest.fixture
def mounted(tmp_path, monkeypatch):
    """This machine's mounts as they would be with the folder `my drive` as a Google Drive: returns that folder."""
    drive, proc = tmp_path / "my drive", tmp_path / "proc"
    (drive / "disk").mkdir(parents=True)
    (proc / "self").mkdir(parents=True)
    at = str(drive).replace(" ", "\\040")
    lines = f"overlay / overlay rw 0 0\ndrive {at} fuse.drive rw,nosuid 0 0\n/dev/sda1 {at}/disk ext4 rw 0 0\n"
    (proc / "self" / "mounts").write_text(lines)
    monkeypatch.setattr(psutil, "PROCFS_PATH", str(proc))
    return drive


def test_a_run_folder_on_drive_is_refused(mounted, tmp_path):
    (tmp_path / "link").symlink_to(mounted)
    for folder in (mounted / "run", tmp_path / "link" / "run"):
        with pytest.raises(HandoffError, match="RUN_DIR .*found a folder on Google Drive") as caught:
            open_run(folder)
        assert f'DRIVE_DIR = "{mounted / "run"}"' in str(caught.value)
    assert not (mounted / "run").exists()


def test_a_run_folder_beside_drive_with_its_copy_there(mounted, tmp_path):
    write_adapter(open_run(tmp_path / "run", drive=mounted / "run"))
    assert (mounted / "run" / "adapter" / "a.bin").exists()
    open_run(mounted / "disk" / "run")  # another disk, mounted below


@pytest.mark.parametrize(
    ("folder", "on_drive"),
    [("/content/drive/MyDrive/run", True), ("/content/drive", True), ("/content/drives/run", False), ("/", False)],
)
def test_colabs_place_for_drive_counts_before_it_is_mounted(folder, on_drive):
    assert is_on_drive(Path(folder)) == on_drive


@pytest.mark.parametrize("content", ["{", "[]", '{"schema": 1}', '{"schema": 1, "artefacts": 5}', '{"schema": 99}'])
def test_unreadable_manifest(run, content):
    (run.path / MANIFEST).write_text(content)
    with pytest.raises(HandoffError, match="handoff.json"):
        run.facts("adapter")


def test_drive_keeps_a_copy_and_gives_it_back(tmp_path, capsys):
    drive = tmp_path / "drive"
    write_adapter(open_run(tmp_path / "first", drive=drive))
    again = open_run(tmp_path / "second", chapter=needing("adapter"), drive=drive)
    assert f"adapter: copied from {drive}" in capsys.readouterr().out
    assert (again.artefact("adapter") / "a.bin").read_text() == "weights"
    assert again.facts("adapter") == open_run(tmp_path / "first").facts("adapter")


def test_a_torn_copy_on_drive_is_not_used(tmp_path):
    drive = tmp_path / "drive"
    write_adapter(open_run(tmp_path / "first", drive=drive))
    (drive / "adapter" / "a.bin").write_text("torn")
    with pytest.raises(HandoffError, match=f"{drive}/adapter/a.bin: found sha256 .*04_train"):
        open_run(tmp_path / "second", chapter=needing("adapter"), drive=drive)
    assert not (tmp_path / "second" / "adapter").exists()


def test_a_copy_on_drive_that_belongs_to_another_model_is_not_used(tmp_path):
    drive = tmp_path / "drive"
    write_adapter(open_run(tmp_path / "first", base_model="owner/base", drive=drive))
    with pytest.raises(HandoffError, match="made for the base model owner/base, expected other"):
        open_run(tmp_path / "second", base_model="owner/other", chapter=needing("adapter"), drive=drive)
    assert not (tmp_path / "second" / "adapter").exists()


def test_missing_chapters_in_order(run):
    assert missing_chapters(run, "dataset") == ["03_data"]
    assert missing_chapters(run, "adapter") == ["03_data", "04_train"]
    assert missing_chapters(run, "merged") == ["03_data", "04_train", "06_save"]
    write_adapter(run)
    run.write_json("dataset", {})
    assert missing_chapters(run, "report.json") == ["04_train"]


def test_fingerprint_tells_templates_apart():
    assert fingerprint("a") == fingerprint("a") != fingerprint("b")


def test_manifest_is_replaced_in_one_step(run):
    write_adapter(run)
    before = json.loads((run.path / MANIFEST).read_text())
    inode = os.stat(run.path / MANIFEST).st_ino
    write_adapter(run, "new")
    assert os.stat(run.path / MANIFEST).st_ino != inode
    assert before["schema"] == 1


def test_a_fingerprint_changes_with_any_token_label_or_order():
    from datasets import Dataset

    def print_of(rows, **columns):
        return fingerprint_rows(Dataset.from_list([row | columns for row in rows]))

    rows = [{"input_ids": [1, 2, 3], "labels": [-100, 2, 3]}, {"input_ids": [4, 5], "labels": [-100, 5]}]
    other_label = [rows[0] | {"labels": [-100, -100, 3]}, rows[1]]
    other_token = [rows[0] | {"input_ids": [1, 2, 4]}, rows[1]]
    other_border = [{"input_ids": [1, 2], "labels": [-100, 2]}, {"input_ids": [3, 4, 5], "labels": [3, -100, 5]}]
    assert re.fullmatch("[0-9a-f]{16}", print_of(rows))
    assert print_of(rows) == print_of(rows, text="of no account")
    assert len(set(map(print_of, (rows, rows[::-1], rows[:1], other_label, other_token, other_border)))) == 6


@pytest.mark.parametrize("durable", [True, False])
def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, durable):
    (tmp_path / "x").write_bytes(b"old")
    with pytest.raises(TypeError):
        replace_file(tmp_path / "x", ["not", "bytes"], durable=durable)
    assert (tmp_path / "x").read_bytes() == b"old" and [file.name for file in tmp_path.iterdir()] == ["x"]
    replace_file(tmp_path / "x", b"new", durable=durable)
    assert (tmp_path / "x").read_bytes() == b"new"


def test_what_is_set_aside_is_never_lost(tmp_path):
    for number in (1, 2):
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "kept").write_text(str(number))
        assert set_aside(tmp_path / "run") == tmp_path / f"run.previous-{number}"
    assert [(tmp_path / f"run.previous-{number}" / "kept").read_text() for number in (1, 2)] == ["1", "2"]
    with pytest.raises(FileNotFoundError):
        set_aside(tmp_path / "run")
