"""The hand-off: whole or not at all, verified when read, and an error that names the file and the chapter."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from helpers.base import replace_file
from helpers.handoff.run import (
    MANIFEST,
    HandoffError,
    fingerprint,
    fingerprint_rows,
    is_on_drive,
    missing_chapters,
    open_run,
)

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setenv("CATCH_UP", "0")
    return open_run(tmp_path / "run")


def write_adapter(run, text="weights", base_model="base"):
    with run.write("adapter", base_model=base_model, template="t") as folder:
        (folder / "deep").mkdir(parents=True)
        (folder / "a.bin").write_text(text)
        (folder / "deep" / "b.bin").write_text("more")


def test_what_was_written_is_read(run):
    write_adapter(run)
    assert (run.artefact("adapter", base_model="base") / "deep" / "b.bin").read_text() == "more"
    facts = run.facts("adapter")
    assert facts["chapter"] == "04_train"
    assert facts["base_model"] == "base"
    assert set(facts["files"]) == {"a.bin", "deep/b.bin"}
    assert "transformers" in facts["versions"]


def test_json_round_trip(run):
    run.write_json("lora.json", {"lora": {"r": 16}}, base_model="base")
    assert run.read_json("lora.json", base_model="base") == {"lora": {"r": 16}}


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
    run.write_json("lora.json", {"lora": {}}, base_model="base")
    (run.path / "lora.json").write_text("{}")
    with pytest.raises(HandoffError, match="lora.json.*02_load_and_lora"):
        run.read_json("lora.json")


def test_another_data_set_is_refused(run):
    with run.write("dataset", base_model="base", dataset="mine.jsonl") as folder:
        folder.mkdir()
        (folder / "rows").write_text("rows")
    assert run.artefact("dataset", base_model="base", dataset="mine.jsonl").is_dir()
    with pytest.raises(HandoffError, match="made of mine.jsonl, expected a/b. Fix: set DATASET to that"):
        run.artefact("dataset", base_model="base", dataset="a/b")


def test_a_drive_that_dropped_out_leaves_the_run_folder_whole(tmp_path, capsys):
    run = open_run(tmp_path / "run", drive=tmp_path / "drive")
    (tmp_path / "drive").rmdir()
    (tmp_path / "drive").write_text("no folder any more")
    write_adapter(run)
    assert run.has("adapter")
    assert "NO COPY of adapter in DRIVE_DIR" in capsys.readouterr().out


def test_another_base_model_is_refused(run):
    write_adapter(run)
    with pytest.raises(HandoffError, match="made for the base model base, expected other"):
        run.artefact("adapter", base_model="other")


def test_missing_artefact_names_the_chapter(run):
    with pytest.raises(HandoffError, match="run chapter 04_train"):
        open_run(run.path, needs=("adapter",))


def test_folder_without_entry_is_refused(run):
    (run.path / "adapter").mkdir()
    (run.path / "adapter" / "a.bin").write_text("looks finished")
    with pytest.raises(HandoffError, match="no chapter finished"):
        run.artefact("adapter")


def test_failed_write_keeps_the_old_artefact(run):
    write_adapter(run, "old")
    with pytest.raises(RuntimeError), run.write("adapter", base_model="base") as folder:
        folder.mkdir()
        (folder / "a.bin").write_text("half")
        raise RuntimeError
    assert (run.artefact("adapter") / "a.bin").read_text() == "old"
    assert not list(run.path.glob(".unfinished*"))


def test_empty_write_is_refused(run):
    with pytest.raises(HandoffError, match="no file written"), run.write("adapter", base_model="base") as folder:
        folder.mkdir()


KILLED = """
import sys
from helpers.handoff.run import open_run
run = open_run(sys.argv[1])
round = 0
while True:
    round += 1
    with run.write("adapter", base_model="base", round=round) as folder:
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
        if run.has("adapter"):
            contents = {path.read_text() for path in (run.path / "adapter").iterdir()}
            assert len(contents) == 1
            assert len(list((run.path / "adapter").iterdir())) == 20
        write_adapter(run)  # and the folder can be used again
        assert run.has("adapter")


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


def test_drive_keeps_a_copy_and_gives_it_back(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("CATCH_UP", "0")
    drive = tmp_path / "drive"
    write_adapter(open_run(tmp_path / "first", drive=drive))
    again = open_run(tmp_path / "second", needs=("adapter",), drive=drive)
    assert "copied from" in capsys.readouterr().out
    assert (again.artefact("adapter") / "a.bin").read_text() == "weights"


def test_a_torn_copy_on_drive_is_not_used(tmp_path, monkeypatch):
    monkeypatch.setenv("CATCH_UP", "0")
    drive = tmp_path / "drive"
    write_adapter(open_run(tmp_path / "first", drive=drive))
    (drive / "adapter" / "a.bin").write_text("torn")
    with pytest.raises(HandoffError, match="04_train"):
        open_run(tmp_path / "second", needs=("adapter",), drive=drive)


def test_missing_chapters_in_order(run):
    assert missing_chapters(run, "adapter") == ["02_load_and_lora", "03_data", "04_train"]
    run.write_json("lora.json", {}, base_model="base")
    assert missing_chapters(run, "adapter") == ["03_data", "04_train"]


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
