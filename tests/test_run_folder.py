"""A run folder in an unkind world: nothing trained is lost, what belongs together stays together, one at a time."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys

import pytest

from helpers.base import ROOT
from helpers.chapters import Chapter
from helpers.handoff.manifest import difference
from helpers.handoff.run import MANIFEST, HandoffError, open_run

NEEDED = Chapter("test", "", needs=("adapter",))


@pytest.fixture
def base(tmp_path):
    """A base model's folder."""
    folder = tmp_path / "models" / "base"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_text("weights")
    return folder


@pytest.fixture
def run(tmp_path, base):
    return open_run(tmp_path / "run", base_model=str(base))


def write(run, name="adapter", text="trained"):
    with run.write(name) as folder:
        folder.mkdir()
        config = {"base_model_name_or_path": run.base, "r": 16}
        (folder / "adapter_config.json").write_text(json.dumps(config))
        (folder / "a.bin").write_text(text)


def texts(folder, name):
    """The content of all that is called so or was, as {folder: text of a.bin}."""
    return {path.name: (path / "a.bin").read_text() for path in folder.glob(f"{name}*")}


@pytest.mark.parametrize("place", ["run", "drive"])
def test_what_took_training_is_set_aside_and_never_deleted(run, base, tmp_path, place):
    run = open_run(run.path, base_model=str(base), drive=tmp_path / "drive")
    for text in ("first", "second", "second", "third"):
        write(run, text=text)
    kept = {"adapter": "third", "adapter.previous-1": "first", "adapter.previous-2": "second"}
    assert texts(tmp_path / place, "adapter") == kept


@pytest.mark.parametrize("place", ["run", "drive"])
@pytest.mark.parametrize("entry", ["altered", "without an entry"])
def test_what_is_not_as_it_was_written_is_set_aside(run, base, tmp_path, place, entry):
    run = open_run(run.path, base_model=str(base), drive=tmp_path / "drive")
    write(run, "merged", "first")
    (tmp_path / place / "merged" / "a.bin").write_text("mine")
    if entry != "altered":
        (tmp_path / place / MANIFEST).unlink()
    write(run, "merged", "second")
    assert texts(tmp_path / place, "merged") == {"merged": "second", "merged.previous-1": "mine"}
    write(run, "merged", "third")  # what can be made again, and is whole, does not pile up
    assert texts(tmp_path / place, "merged") == {"merged": "third", "merged.previous-1": "mine"}


def test_a_report_of_another_adapter_is_refused(run):
    """Killed between the two: the new adapter and the old report."""
    write(run)
    run.write_json("report.json", {"loss": 1})
    run.artefact("report.json")
    write(run, text="trained anew")
    with pytest.raises(HandoffError, match="report.json: found made from another adapter.* run chapter 04_train"):
        run.read_json("report.json")
    run.write_json("report.json", {"loss": 2})
    assert run.read_json("report.json") == {"loss": 2}


def test_an_adapter_of_other_data_is_refused(run):
    write(run, "dataset", "rows")
    write(run)
    write(run, "dataset", "rows")  # the same rows once more
    run.artefact("adapter")
    write(run, "dataset", "other rows")
    with pytest.raises(HandoffError, match="adapter: found made from another dataset"):
        run.artefact("adapter")


def test_a_report_of_another_adapter_is_not_fetched_from_drive(run, base, tmp_path):
    there = open_run(tmp_path / "elsewhere", base_model=str(base), drive=tmp_path / "drive")
    write(there, text="theirs")
    there.write_json("report.json", {})
    write(run, text="ours")
    with pytest.raises(HandoffError, match="drive/report.json: found made from another adapter"):
        open_run(run.path, chapter=Chapter("test", "", needs=("report.json",)), drive=tmp_path / "drive")
    assert not (run.path / "report.json").exists()


def test_an_adapter_goes_on_the_chosen_base_model_where_the_weights_are_the_same(run, base, tmp_path, capsys):
    write(run)
    run.write_json("report.json", {})
    shutil.copytree(base, tmp_path / "another home" / "base")
    shutil.rmtree(base)
    moved = open_run(run.path, base_model=str(tmp_path / "another home" / "base"), chapter=NEEDED)
    config = json.loads((moved.artefact("adapter") / "adapter_config.json").read_text())
    assert config == {"base_model_name_or_path": str(tmp_path / "another home" / "base"), "r": 16}
    assert f"its base model is {tmp_path}/another home/base, and was {base}" in capsys.readouterr().out
    moved.artefact("report.json")  # it is still this adapter's


def test_other_weights_under_the_same_name_are_refused(run, base, tmp_path):
    write(run)
    other = tmp_path / "another home" / "base"
    shutil.copytree(base, other)
    (other / "model.safetensors").write_text("weights, three per cent off")
    before = (run.path / "adapter" / "adapter_config.json").read_bytes()
    with pytest.raises(HandoffError, match=f"trained on other weights than those in {other}.* set MODEL_NAME"):
        open_run(run.path, base_model=str(other), chapter=NEEDED)
    assert (run.path / "adapter" / "adapter_config.json").read_bytes() == before


def test_only_what_the_manifest_names_is_copied(run, base, tmp_path):
    write(run)
    for name in (".env", "extra/.git"):
        (run.path / "adapter" / name).parent.mkdir(exist_ok=True)
        (run.path / "adapter" / name).write_text("secret")
    shutil.copytree(run.path, tmp_path / "drive")
    second = open_run(tmp_path / "second", base_model=str(base), chapter=NEEDED, drive=tmp_path / "drive")
    assert sorted(path.name for path in second.artefact("adapter").rglob("*")) == ["a.bin", "adapter_config.json"]


@pytest.mark.parametrize("linked", ["a.bin", ""], ids=["a file", "the folder"])
def test_a_symbolic_link_is_not_followed(run, base, tmp_path, linked):
    write(run)
    shutil.copytree(run.path, tmp_path / "drive")
    place = tmp_path / "drive" / "adapter" / linked
    place.rename(tmp_path / "elsewhere")
    place.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(HandoffError, match="found a symbolic link, expected the file itself"):
        open_run(tmp_path / "second", base_model=str(base), chapter=NEEDED, drive=tmp_path / "drive")
    assert not (tmp_path / "second" / "adapter").exists()


def test_a_symbolic_link_is_not_kept(run):
    (run.path / "new" / "adapter").mkdir(parents=True)
    (run.path / "new" / "adapter" / "a.bin").symlink_to("/etc/hostname")
    with pytest.raises(HandoffError, match="a.bin: found a symbolic link"):
        run.keep("adapter")


SUM = "0" * 64
HOSTILE = {
    "not JSON": "{",
    "not UTF-8": b"\xff\xfe",
    "nested": "[" * 100_000,
    "a list": "[]",
    "a number for a schema": '{"schema": "1", "artefacts": {}}',
    "artefacts as a list": '{"schema": 1, "artefacts": []}',
    "an entry that is a number": {"adapter": 5},
    "no files": {"adapter": {"files": {}}},
    "files as a list": {"adapter": {"files": ["a.bin"]}},
    "a sum that is none": {"adapter": {"files": {"a.bin": "abc"}}},
    "a file above": {"adapter": {"files": {"../../a.bin": SUM}}},
    "a file elsewhere": {"adapter": {"files": {"/etc/hostname": SUM}}},
    "a null byte": {"adapter": {"files": {"a\0.bin": SUM}}},
    "an artefact above": {"..": {"files": {"a.bin": SUM}}},
    "an artefact elsewhere": {"/tmp": {"files": {"a.bin": SUM}}},
    "an artefact below": {"adapter/deep": {"files": {"a.bin": SUM}}},
    "a base model that is a list": {"adapter": {"files": {"a.bin": SUM}, "base_model": []}},
    "a source that is a text": {"adapter": {"files": {"a.bin": SUM}, "source": "x"}},
    "made from numbers": {"adapter": {"files": {"a.bin": SUM}, "made_from": {"dataset": 5}}},
}


@pytest.mark.parametrize("content", HOSTILE.values(), ids=HOSTILE)
@pytest.mark.parametrize("place", ["run", "drive"])
def test_a_damaged_or_hostile_manifest_is_one_line(tmp_path, base, content, place):
    (tmp_path / place).mkdir(exist_ok=True)
    if isinstance(content, dict):
        content = json.dumps({"schema": 1, "artefacts": content})
    content = content if isinstance(content, bytes) else content.encode()
    (tmp_path / place / MANIFEST).write_bytes(content)
    with pytest.raises(HandoffError, match=f"{place}/handoff.json: found"):
        open_run(tmp_path / "run", base_model=str(base), chapter=NEEDED, drive=tmp_path / "drive")
    assert (tmp_path / place / MANIFEST).read_bytes() == content


def test_a_manifest_that_names_what_is_there_is_taken(run):
    """The neighbour of the hostile ones."""
    write(run)
    content = json.loads((run.path / MANIFEST).read_text())
    content["artefacts"]["adapter"] = {"files": content["artefacts"]["adapter"]["files"], "base_model": "base"}
    (run.path / MANIFEST).write_text(json.dumps(content))
    open_run(run.path, chapter=NEEDED)


@pytest.mark.parametrize("content", ["[]", "{", "5"])
def test_a_report_that_is_no_object_is_one_line(run, content):
    with run.write("report.json") as path:
        path.write_text(content)
    with pytest.raises(HandoffError, match="report.json: found no JSON object"):
        run.read_json("report.json")


@pytest.mark.parametrize("name", ["~nobody-of-that-name/run", "a\0b", "x" * 300, "y/" * 3000])
@pytest.mark.parametrize("setting", ["RUN_DIR", "DRIVE_DIR"])
def test_a_name_that_is_no_folder_is_one_line(tmp_path, name, setting, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folders = {"path": tmp_path / "run"} | ({"path": name} if setting == "RUN_DIR" else {"drive": name})
    with pytest.raises(HandoffError, match=setting):
        open_run(**folders)


OPENER = """
import sys, time
from helpers.handoff import open_run
run = open_run(sys.argv[1], chapter=sys.argv[2])
print("open", flush=True)
time.sleep(60)
"""


def opened_elsewhere(folder, chapter):
    process = subprocess.Popen([sys.executable, "-c", OPENER, folder, chapter], cwd=ROOT, stdout=-1, text=True)
    while process.stdout.readline().strip() != "open":
        pass
    return process


def test_a_chapter_is_open_in_one_process_at_a_time(tmp_path, base):
    other = opened_elsewhere(tmp_path / "run", "03_data")
    torn = tmp_path / "run" / "new" / "dataset"
    torn.mkdir(parents=True)
    with pytest.raises(HandoffError, match="another process that has chapter 03_data open in it.* shut that notebook"):
        open_run(tmp_path / "run", chapter="03_data")
    assert torn.exists()  # what the other one is writing
    open_run(tmp_path / "run", chapter=Chapter("05_infer", ""))  # one that writes nothing, and another folder
    open_run(tmp_path / "another", chapter="03_data")
    other.send_signal(signal.SIGKILL)
    other.wait()
    run = open_run(tmp_path / "run", chapter="03_data")
    assert run.lock.is_locked
    assert not torn.exists()
    open_run(tmp_path / "run", chapter="03_data")  # the cell is run again


def test_data_that_were_replaced_while_a_chapter_ran_are_noticed(run, base):
    write(run, "dataset", "rows")
    training = open_run(run.path, base_model=str(base), chapter=Chapter("test", "", needs=("dataset",)))
    write(run, "dataset", "other rows")
    with pytest.raises(HandoffError, match="dataset: found another dataset than when this chapter began.*03_data was"):
        write(training)
    write(run, "dataset", "rows")
    write(training)


def test_a_chapter_that_is_none_is_refused(tmp_path):
    with pytest.raises(KeyError):
        open_run(tmp_path, chapter="04_trian")


WRITER = """
import sys
from helpers.handoff.run import open_run
run = open_run(sys.argv[1])
sys.stdin.readline()
for number in range(25):
    with run.write(sys.argv[2]) as folder:
        folder.mkdir()
        (folder / "a.bin").write_text(str(number))
"""


def test_two_processes_that_write_at_once_lose_no_entry(tmp_path):
    names = ("merged", "gguf", "dataset")
    command = [sys.executable, "-c", WRITER, tmp_path / "run"]
    writers = [subprocess.Popen([*command, name], cwd=ROOT, stdin=subprocess.PIPE, text=True) for name in names]
    for writer in writers:
        writer.stdin.write("go\n")
        writer.stdin.flush()
    assert [writer.wait() for writer in writers] == [0, 0, 0]
    run = open_run(tmp_path / "run")
    # Not `artefact`: it refuses one that was made from an older dataset, and which was written last is chance.
    assert all((run.path / name / "a.bin").read_text() == "24" for name in names)
    assert [difference(run.path / name, run.facts(name)) for name in names] == [None] * len(names)


def test_a_full_disk_is_one_line_and_leaves_what_was_there(run, base, tmp_path):
    write(run, text="old")
    drive = tmp_path / "drive"
    write(open_run(tmp_path / "there", base_model=str(base), drive=drive), text="x" * 50_000)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    previous = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(HandoffError, match="report.json: found File too large, expected room .* free disk space"):
            run.write_json("report.json", {"text": "x" * 50_000})
        with pytest.raises(HandoffError, match="numbers: found File too large, expected room"):
            run.record("04_train", **{f"n{n}": n for n in range(5000)})
        with pytest.raises(HandoffError, match="second/adapter: found File too large.* free disk space"):
            open_run(tmp_path / "second", base_model=str(base), chapter=NEEDED, drive=drive)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, previous)
    assert (run.artefact("adapter") / "a.bin").read_text() == "old"
    assert not [path for folder in (run.path, tmp_path / "second") for path in folder.glob(".unfinished-*")]


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_an_artefact_that_cannot_be_read_is_one_line(run):
    write(run)
    (run.path / "adapter" / "a.bin").chmod(0)
    with pytest.raises(HandoffError, match="expected an artefact that can be read"):
        run.artefact("adapter")
