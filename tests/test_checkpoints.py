"""Runs that are killed, stopped, starved of disk and damaged: each goes on and ends with the bits of one that was not.

Every training here is a process of its own, forked from one that has imported the libraries (`train_once.py`).
"""

import fcntl
import itertools
import json
import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from helpers.base import reason
from helpers.training.checkpoints import CheckpointError, Checkpoints, compare_settings
from helpers.training.order import seeded_sampler
from helpers.training.saved import copy_whole, delete_unfinished, handed_over, newest_good, read_saved, saved_in

STEPS = 12
ROOT = Path(__file__).resolve().parent.parent


class Trainings:
    """The process that trains in forks of itself."""

    def __init__(self, folder, *options):
        command = [sys.executable, str(ROOT / "tests" / "train_once.py"), *options]
        environment = os.environ | {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment)
        self.log = open(folder / "server.txt", "w")
        self.process = subprocess.Popen(command, stderr=self.log, **pipes)
        self.folder, self.numbers = folder, itertools.count()

    def start(self, path, every_seconds=0, mirror=None, start_afresh=False, **job):
        """Begin a training into `path`; returns it as a `Training`."""
        checkpoints = dict(every_seconds=every_seconds, mirror=mirror and str(mirror), start_afresh=start_afresh)
        training = Training(self, Path(path), self.folder / str(next(self.numbers)))
        files = {name: str(training.file(name)) for name in ("output", "result", "progress")}
        request = dict(folder=str(path), checkpoints=checkpoints, **files, **job)
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        training.pid = self.read_number()
        return training

    def run(self, path, **job):
        """A whole training; returns it with its `code`."""
        return self.start(path, **job).wait()

    def read_number(self):
        line = self.process.stdout.readline()
        assert line.strip().lstrip("-").isdecimal(), (self.folder / "server.txt").read_text()[-2000:]
        return int(line)

    def close(self):
        self.process.stdin.close()
        self.process.wait()
        self.log.close()


class Training:
    def __init__(self, server, folder, stem):
        self.server, self.folder, self.stem, self.pid, self.code = server, folder, stem, 0, None

    def file(self, name):
        return self.stem.with_suffix("." + name)

    def wait(self):
        self.code = self.server.read_number()
        return self

    def wait_for(self, condition):
        """Until the condition holds or the process has ended."""
        while not condition() and not self.file("result").exists() and Path(f"/proc/{self.pid}").exists():
            time.sleep(0.0005)
            state = Path(f"/proc/{self.pid}/stat")
            if not state.exists() or state.read_text().rpartition(")")[2].split()[0] == "Z":
                return

    def kill(self):
        os.kill(self.pid, signal.SIGKILL)
        return self.wait()

    @property
    def output(self):
        return self.file("output").read_text()

    @property
    def steps_done(self):
        return len(self.file("progress").read_text().split()) if self.file("progress").exists() else 0

    @property
    def result(self):
        assert self.code == 0, self.output[-3000:]
        return json.loads(self.file("result").read_text())

    @property
    def began_at(self):
        """The step that it says it began at."""
        if "Starting at step 0" in self.output:
            return 0
        return int(self.output.split("Resumed from step ")[1].split()[0])


@pytest.fixture(scope="module")
def trainings(tmp_path_factory):
    server = Trainings(tmp_path_factory.mktemp("trainings"))
    yield server
    server.close()


@pytest.fixture(scope="module")
def whole(trainings, tmp_path_factory):
    """The result of a run that nothing happened to."""
    training = trainings.run(tmp_path_factory.mktemp("whole"), every_seconds=1000)
    assert training.began_at == 0
    return training.result


@pytest.fixture(scope="module")
def stopped(trainings, tmp_path_factory):
    """The folder of a run that was stopped after step 6, with the checkpoints of steps 5 and 6."""
    folder = tmp_path_factory.mktemp("stopped")
    assert trainings.run(folder, interrupt_at=6).code == 130
    return folder


@pytest.fixture(scope="module")
def trainer_of():
    """`trainer_of(folder, **settings)`: the trainer of these tests, in this process."""
    from train_once import make_trainer, small_tokenizer

    tokenizer = small_tokenizer()
    return lambda folder, **settings: make_trainer(folder, tokenizer, **settings)


@pytest.fixture
def folder(stopped, tmp_path):
    """A copy of `stopped` to do harm to."""
    return Path(shutil.copytree(stopped, tmp_path / "checkpoints"))


def steps_in(folder):
    return [saved.step for saved in saved_in(folder)]


def set_aside_in(folder):
    """The steps that were set aside, as {their number: steps}."""
    steps = {}
    for path in sorted(folder.glob("checkpoint-*.previous-*")):
        name, _, number = path.name.rpartition(".previous-")
        steps.setdefault(int(number), []).append(int(name.removeprefix("checkpoint-")))
    return steps


def test_the_clock_decides_when_to_save(trainings, whole, tmp_path):
    each_step = trainings.run(tmp_path / "a", every_seconds=0)
    assert steps_in(tmp_path / "a") == [11, 12]  # the older ones are deleted
    assert trainings.run(tmp_path / "b", every_seconds=1000).result == each_step.result == whole
    assert steps_in(tmp_path / "b") == [12]  # the end is always saved


@pytest.mark.parametrize(
    ("seconds", "every_seconds", "saved"),
    [
        ([10] * 12, 35, [3, 6, 9, 12]),  # after the fourth it would be too late
        ([10] * 12, 40, [3, 6, 9, 12]),
        ([10] * 12, 45, [4, 8, 12]),
        ([10, 10, 40] + [10] * 9, 60, [3, 5, 7, 9, 11, 12]),  # once a step has taken 40 s, the next one may
        ([10] * 12, 1000, [12]),
        ([10] * 12, 5, list(range(1, 13))),
    ],
)
def test_never_more_than_one_interval_is_lost(trainer_of, tmp_path, monkeypatch, seconds, every_seconds, saved):
    """By a clock that only steps move."""
    from transformers import TrainerCallback

    clock, saves = [0], [(0, 0)]

    class Clock(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            clock[0] += seconds[state.global_step - 1]

        def on_save(self, args, state, control, **kwargs):
            saves.append((state.global_step, clock[0]))

    monkeypatch.setattr("helpers.training.checkpoints.time", SimpleNamespace(monotonic=lambda: clock[0]))
    trainer = trainer_of(tmp_path, eval_strategy="no")
    trainer.add_callback(Clock())
    with Checkpoints(trainer, every_seconds=every_seconds) as last:
        trainer.train(resume_from_checkpoint=last)
    assert [step for step, _ in saves[1:]] == saved
    lost = [after - before for (_, before), (_, after) in itertools.pairwise(saves)]
    assert max(lost) <= max(every_seconds, *seconds)


def test_the_order_of_the_rows_is_that_of_seed_and_epoch():
    import torch
    from torch.utils.data import RandomSampler, SequentialSampler
    from transformers.trainer_pt_utils import LengthGroupedSampler

    lengths = [number % 7 + 1 for number in range(40)]

    def in_order(sampler, seed):
        return seeded_sampler(lambda rows: sampler, lengths, 40, SimpleNamespace(seed=seed, world_size=1))

    def order(seed, epoch, *, grouped):
        torch.rand(seed + epoch)  # as after other work
        sampler = LengthGroupedSampler(4, lengths=lengths) if grouped else RandomSampler(lengths)
        rows = in_order(sampler, seed)
        assert len(rows) == 40
        first = list(rows)
        rows.set_epoch(epoch)
        assert (list(rows) == first) == (epoch == 0)
        return list(rows)

    for grouped in (False, True):
        orders = [order(seed, epoch, grouped=grouped) for seed, epoch in ((1, 0), (1, 1), (1, 2), (9, 0))]
        assert len({tuple(each) for each in orders}) == 4
        assert all(sorted(each) == list(range(40)) for each in orders)
        assert orders == [order(seed, epoch, grouped=grouped) for seed, epoch in ((1, 0), (1, 1), (1, 2), (9, 0))]
    assert list(in_order(SequentialSampler(lengths), 1)) == list(range(40))


def test_the_rows_are_read_once_at_the_start(trainer_of, folder, monkeypatch):
    """Their fingerprint goes through all of them."""
    from helpers.handoff.run import fingerprint_rows

    seen = []
    monkeypatch.setattr(
        "helpers.training.checkpoints.fingerprint_rows", lambda rows: seen.append(1) or fingerprint_rows(rows)
    )
    with Checkpoints(trainer_of(folder)) as last:
        assert last.endswith("checkpoint-6")
    assert seen == [1]


def test_another_seed_is_another_run(trainings, whole, tmp_path):
    """The comparison of weights can fail."""
    assert trainings.run(tmp_path, settings={"seed": 1}).result["weights"] != whole["weights"]


def unfinished_in(folder):
    return [path for path in folder.glob("checkpoint-*") if read_saved(path) is None]


def test_twenty_kills(trainings, whole, tmp_path):
    """SIGKILL at random moments, half of them in the middle of a save; every fourth machine is lost with its disk."""
    torn, began = 0, []
    for trial in range(20):
        chance, folder, mirror = random.Random(trial), tmp_path / f"{trial}", tmp_path / f"{trial}-mirror"
        training, step = trainings.start(folder, mirror=mirror), chance.randint(1, STEPS - 1)
        if trial % 2:
            training.wait_for(lambda: unfinished_in(folder) and training.steps_done >= step)  # noqa: B023
            time.sleep(chance.uniform(0, 0.02))
        else:
            training.wait_for(lambda: training.steps_done >= step)  # noqa: B023
            time.sleep(chance.uniform(0, 0.1))
        assert training.kill().code == -signal.SIGKILL, training.output[-2000:]
        done = training.steps_done
        torn += bool(unfinished_in(folder))
        copies = saved_in(mirror / folder.name)
        assert not any(saved.damage() for saved in copies)
        assert not unfinished_in(mirror / folder.name), "a copy appears whole or not at all"
        if trial % 4 == 3:
            shutil.rmtree(folder)
            safe = copies[-1].step if copies else 0
        else:
            safe = done - 1  # saved at each step: the last may have been on its way
        resumed = trainings.run(folder, mirror=mirror, every_seconds=1000)
        assert resumed.result == whole, f"trial {trial}"
        assert not unfinished_in(folder), "an unfinished checkpoint is known as ours, and deleted"
        assert safe <= resumed.began_at <= done
        began.append(resumed.began_at)
    assert torn >= 3, "too few kills in the middle of a save"
    assert max(began) > 6
    print(f"{torn} of 20 kills in the middle of a save; resumed from steps {began}")


def test_a_run_killed_before_it_marks_a_checkpoint_leaves_none(trainer_of, tmp_path, monkeypatch):
    """An empty `checkpoint-1` would be nobody's, and stay."""

    class Killed(BaseException):
        pass

    def touch(path):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Path, "touch", touch)
        trainer = trainer_of(tmp_path)
        with pytest.raises(Killed), Checkpoints(trainer, every_seconds=0) as last:
            trainer.train(resume_from_checkpoint=last)
    assert not list(tmp_path.glob("checkpoint-*"))
    trainer = trainer_of(tmp_path)
    with Checkpoints(trainer, every_seconds=0) as last:
        trainer.train(resume_from_checkpoint=last)
    assert steps_in(tmp_path) == [11, 12] and not list(tmp_path.glob(".unfinished-*"))


def truncate(path):
    os.truncate(path / "optimizer.pt", 1000)


def flip_a_byte(path):
    file = path / "adapter_model.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def lose_a_file(path):
    (path / "rng_state.pth").unlink()


def tear_the_manifest(path):
    os.truncate(path / "manifest.json", 100)


@pytest.mark.parametrize(
    ("harm", "line"),
    [
        (truncate, "optimizer.pt: 1000 bytes instead of"),
        (flip_a_byte, "adapter_model.safetensors: other content than was written"),
        (lose_a_file, "rng_state.pth: missing"),
        (tear_the_manifest, "checkpoint-6 has a manifest that cannot be read: kept as checkpoint-6.previous-1"),
    ],
)
def test_a_damaged_checkpoint_is_not_used(trainings, whole, folder, harm, line):
    harm(folder / "checkpoint-6")
    resumed = trainings.run(folder)
    assert resumed.began_at == 5 and line in resumed.output
    assert resumed.result == whole
    assert (folder / "checkpoint-6.previous-1").is_dir()  # nothing trained is deleted


@pytest.mark.parametrize(
    "changed",
    [
        {"step": "6"},
        {"step": True},
        {"settings": None},
        {"files": []},
        {"files": {"../../x": {"bytes": 1, "sha256": ""}}},
        {"files": {"x": "abc"}},
        {"more": 1},
    ],
)
def test_a_damaged_or_hostile_manifest_is_set_aside(folder, changed, capsys):
    path = folder / "checkpoint-6" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    delete_unfinished(folder)
    assert "manifest that cannot be read: kept as checkpoint-6.previous-1" in capsys.readouterr().out
    assert [saved.step for saved in saved_in(folder)] == [5]


def test_a_manifest_that_is_as_it_was_stays(folder):
    delete_unfinished(folder)
    assert [saved.step for saved in saved_in(folder)] == [5, 6]


def test_all_damaged(trainings, whole, folder):
    for path in folder.glob("checkpoint-*"):
        truncate(path)
    resumed = trainings.run(folder)
    assert resumed.began_at == 0 and resumed.output.count("is damaged and not used") == 2
    assert resumed.result == whole
    assert set_aside_in(folder) == {1: [5, 6]} and steps_in(folder) == [11, 12]


def test_a_damaged_checkpoint_does_not_count_among_those_kept(trainings, whole, folder):
    truncate(folder / "checkpoint-6")
    assert trainings.run(folder, every_seconds=1000, interrupt_at=7).code == 130
    assert steps_in(folder) == [5, 7]
    truncate(folder / "checkpoint-7")
    resumed = trainings.run(folder)
    assert resumed.began_at == 5 and resumed.result == whole


def test_nor_does_one_in_the_mirror(trainings, whole, tmp_path):
    folder, mirror = tmp_path / "run", tmp_path / "drive"
    trainings.run(folder, mirror=mirror, interrupt_at=6)
    truncate(saved_in(mirror / "run")[-1].path)
    shutil.rmtree(folder)
    assert trainings.run(folder, mirror=mirror, every_seconds=1000, interrupt_at=7).code == 130
    assert steps_in(mirror / "run") == steps_in(folder) == [5, 7]
    truncate(saved_in(mirror / "run")[-1].path)
    shutil.rmtree(folder)
    resumed = trainings.run(folder, mirror=mirror)
    assert resumed.began_at == 5 and resumed.result == whole


def test_a_damaged_checkpoint_that_the_mirror_has_whole_is_fetched(trainings, whole, folder, tmp_path):
    mirror = tmp_path / "drive" / folder.name
    for step in (5, 6):
        copy_whole(folder / f"checkpoint-{step}", mirror / f"checkpoint-{step}", ())
    truncate(folder / "checkpoint-6")
    resumed = trainings.run(folder, mirror=tmp_path / "drive", every_seconds=1000, interrupt_at=7)
    assert resumed.began_at == 6 and "Fetched checkpoint-6 from" in resumed.output
    assert steps_in(folder) == steps_in(mirror) == [6, 7]
    assert not any(saved.damage() for saved in saved_in(folder))


def plain_checkpoint(path):
    """As Transformers writes one by itself."""
    path.mkdir()
    (path / "trainer_state.json").write_text("{}")
    return path


@pytest.mark.parametrize("start_afresh", [False, True])
def test_checkpoints_of_another_program_stay(trainings, whole, folder, start_afresh):
    for step in (3, 7):
        plain_checkpoint(folder / f"checkpoint-{step}")
    training = trainings.run(folder, start_afresh=start_afresh)
    assert training.began_at == (0 if start_afresh else 6) and training.result == whole
    assert steps_in(folder) == [11, 12]
    for step, was_in_the_way in ((3, start_afresh), (7, True)):
        plain = folder / f"checkpoint-{step}"
        plain = plain.with_name(f"{plain.name}.previous-1") if was_in_the_way else plain
        assert (plain / "trainer_state.json").read_text() == "{}"
    assert "checkpoint-7 is not of this run: kept as checkpoint-7.previous-1" in training.output


def test_what_an_ended_process_left_is_deleted(trainings, folder):
    for name in (".unfinished-checkpoint-3", ".deleted-checkpoint-4"):
        plain_checkpoint(folder / name)
    trainings.run(folder, interrupt_at=8)
    names = sorted(path.name for path in folder.iterdir() if "checkpoint" in path.name)
    assert names == ["checkpoint-7", "checkpoint-8"]


def test_stop_saves_first(trainings, whole, tmp_path):
    stopped = trainings.run(tmp_path, every_seconds=1000, interrupt_at=6)
    assert stopped.code == 130 and steps_in(tmp_path) == [6]
    assert "stopped after step 6; run the chapter again to go on" in stopped.output
    resumed = trainings.run(tmp_path, every_seconds=1000)
    assert resumed.began_at == 6 and resumed.result == whole


def test_train_again_in_the_same_session(trainings, whole, tmp_path):
    training = trainings.run(tmp_path, every_seconds=1000, interrupt_at=6, again={})
    assert "Resumed from step 6 of 12" in training.output
    assert training.result == whole


def test_a_trained_model_does_not_start_at_step_0(trainings, tmp_path):
    training = trainings.run(tmp_path, every_seconds=1000, interrupt_at=6, again={"start_afresh": True})
    assert training.code == 1 and "found a model that has been trained for 6 steps in this session" in training.output


@pytest.mark.parametrize(
    ("settings", "difference"),
    [
        ({"rank": 8}, "LoRA r was 4, is 8"),
        ({"learning_rate": 1e-3}, "learning_rate was 0.01, is 0.001"),
        ({"max_steps": 20}, "max_steps was 12, is 20"),
        ({"seed": 1}, "seed was 3407, is 1"),
        ({"texts": ["Other words."] * 20}, "data was 20 rows,"),
        ({"base_name": "someone/other"}, "base model was , is someone/other"),
    ],
)
def test_other_settings_are_refused(trainings, folder, settings, difference):
    refused = trainings.run(folder, settings=settings)
    assert refused.code == 1 and difference in refused.output and "START_AFRESH = True" in refused.output
    assert steps_in(folder) == [5, 6] and newest_good(saved_in(folder))[0].step == 6


def test_other_settings_of_a_run_on_drive_are_refused_before_it_is_fetched(trainings, folder, tmp_path):
    """Else another machine's run would lie in this one's folder, where no other DRIVE_DIR helps."""
    mirror = tmp_path / "drive" / folder.name
    shutil.move(folder, mirror)
    before = contents(mirror)
    refused = trainings.run(folder, mirror=mirror.parent, settings={"seed": 1})
    assert refused.code == 1 and f"{mirror}, a run that is at step 6 of 12: found seed was" in refused.output
    assert "or set DRIVE_DIR to another folder, or set START_AFRESH = True" in refused.output
    assert contents(mirror) == before and not steps_in(folder)


def test_other_settings_afresh(trainings, folder):
    settings = {"learning_rate": 1e-3}
    before = {str(path): content for path, content in contents(folder, "checkpoint-*/*").items()}
    afresh = trainings.run(folder, settings=settings, start_afresh=True, every_seconds=1000)
    assert afresh.began_at == 0 and steps_in(folder) == [12]
    after = contents(folder, "checkpoint-*.previous-1/*")
    assert {str(path).replace(".previous-1", ""): content for path, content in after.items()} == before
    assert afresh.result == trainings.run(folder.with_name("new"), settings=settings).result


def test_another_split_of_the_batch_goes_on(trainings, whole, folder):
    """As after a fallback to smaller micro-batches: the same rows in each step, and sums in another order."""
    resumed = trainings.run(folder, settings={"micro_batch": 1})
    assert resumed.began_at == 6
    assert resumed.result["losses"] == pytest.approx(whole["losses"], rel=0.02)  # dropout draws other masks


def test_a_complete_run_is_loaded_and_not_trained_further(trainings, whole, tmp_path):
    trainings.run(tmp_path)
    loaded = trainings.run(tmp_path)
    assert "Nothing to train: this run is complete, loading step 12 of 12" in loaded.output
    assert loaded.result == whole and loaded.steps_done == 0


def test_a_complete_run_that_is_handed_over_makes_room(trainings, whole, tmp_path):
    folder, mirror = tmp_path / "run", tmp_path / "mirror"
    trainings.run(folder, mirror=mirror, hand_over=True)
    shutil.rmtree(folder)  # the mirror knows it too
    anew = trainings.run(folder, mirror=mirror, every_seconds=0, interrupt_at=3)
    assert anew.began_at == 0 and "the run before is handed over" in anew.output
    assert steps_in(mirror / "run") == [2, 3], "the copies of the run before go when the new one's are there"
    shutil.rmtree(folder)
    resumed = trainings.run(folder, mirror=mirror)  # the new run's step 3, not the old one's step 12
    assert resumed.began_at == 3 and resumed.result == whole
    assert trainings.run(folder, settings={"rank": 8}).code == 1  # complete, but not handed over
    assert len(handed_over(mirror / "run")) == 1
    trainings.run(folder, mirror=mirror, hand_over=True)
    assert len(handed_over(folder)) == 1 and len(handed_over(mirror / "run")) == 2
    assert "is handed over" in trainings.run(folder, interrupt_at=1).output


def contents(folder, pattern="**/*"):
    paths = [path for path in folder.glob(pattern) if path.is_file() and path.name != ".lock"]
    return {path.relative_to(folder): path.read_bytes() for path in paths}


def test_a_checkpoint_that_is_not_passed_on_is_refused(trainings, whole, folder):
    before = contents(folder)
    refused = trainings.run(folder, resume_from=None)
    assert refused.code == 1 and refused.steps_done == 0
    assert "found a start at step 0, expected step 6, whose checkpoint was given to pass on" in refused.output
    assert contents(folder) == before
    assert trainings.run(folder).result == whole


def test_a_checkpoint_that_is_not_passed_on_can_still_be(trainings, whole, folder):
    """In the same session, with the same trainer."""
    assert trainings.run(folder, resume_from=None, again={}).result == whole


def test_a_checkpoint_that_was_not_given_is_refused(trainings, folder):
    """The weights are loaded by then, so that this trainer does not start at step 0 either."""
    trainings.run(folder, hand_over=True)
    before = contents(folder)
    refused = trainings.run(folder, resume_from=True, again={"start_afresh": True})
    assert refused.code == 1 and refused.steps_done == 0
    assert "found a start at step 12, expected step 0, for which None was given" in refused.output
    assert "found a model that has been trained for 12 steps" in refused.output
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("room", "said"),
    [
        (20_000, "PyTorch could not write a file to its end: is the disk full?"),
        (8_000, "Error while serializing: I/O error: File too large (os error 27)"),
    ],
    ids=["for the adapter, not the optimiser", "not for the adapter"],
)
def test_a_full_disk_is_a_warning(trainings, whole, tmp_path, room, said):
    full = trainings.run(tmp_path, fill_at=4, room=room, interrupt_at=8)
    assert full.code == 130 and full.steps_done == 8
    assert f"checkpoint-4 could not be saved ({said}): training goes on" in full.output
    last = next(line for line in full.output.splitlines() if line.startswith("checkpoint-8 could not be saved"))
    assert last.endswith("older checkpoints stay") and "training goes on" not in last
    assert "stopped after step 8, which could not be saved; run the chapter again to go on from an older" in full.output
    assert steps_in(tmp_path) == [2, 3] and not unfinished_in(tmp_path)
    resumed = trainings.run(tmp_path)
    assert resumed.began_at == 3 and resumed.result == whole


def test_a_folder_that_cannot_be_written(trainings, folder):
    folder.chmod(0o555)
    refused = trainings.run(folder, as_nobody=True)
    folder.chmod(0o755)
    assert refused.code == 1 and "CheckpointError" in refused.output
    assert "found Permission denied, expected a folder that can be written" in refused.output
    assert steps_in(folder) == [5, 6]


def test_two_runs_in_one_folder(trainings, whole, folder):
    with open(folder / ".lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        refused = trainings.run(folder)
        assert refused.code == 1 and "found another process that trains into it" in refused.output
        assert steps_in(folder) == [5, 6]
    assert trainings.run(folder).result == whole


def test_a_mirror_that_drops_is_said_once(trainings, whole, tmp_path):
    (tmp_path / "drive").mkdir()
    (tmp_path / "drive" / "run").write_text("a file where the folder should go")
    training = trainings.run(tmp_path / "run", mirror=tmp_path / "drive")
    assert training.output.count("training goes on") == 1 and "No copy in" in training.output
    assert training.result == whole


def test_a_mirror_that_cannot_be_read_is_not_an_empty_one(trainings, whole, folder, tmp_path):
    """Else a run would begin anew, and its copies would replace the old run's once Drive is back."""
    drive = tmp_path / "drive"
    drive.mkdir()
    (drive / folder.name).symlink_to(folder.name)  # a loop: even root cannot read it
    shutil.rmtree(folder)
    refused = trainings.run(folder, mirror=drive)
    assert refused.code == 1 and refused.steps_done == 0
    assert f"{drive / folder.name}: found Too many levels of symbolic links" in refused.output
    assert "mount Drive again" in refused.output
    (drive / folder.name).unlink()
    assert trainings.run(folder, mirror=drive).result == whole


def test_a_full_disk_is_not_the_mirrors_fault(trainings, whole, folder, tmp_path):
    mirror = tmp_path / "drive" / folder.name
    copy_whole(folder / "checkpoint-6", mirror / "checkpoint-6", ())
    shutil.rmtree(folder)
    refused = trainings.run(folder, mirror=tmp_path / "drive", fill_at=0)
    assert refused.code == 1 and refused.steps_done == 0
    assert f"CheckpointError: {folder}: found [Errno 27] File too large, expected room for" in refused.output
    assert "Fetched" not in refused.output and "mount Drive" not in refused.output
    assert not [path for path in folder.iterdir() if path.name != ".lock"]
    assert trainings.run(folder, mirror=tmp_path / "drive").result == whole


def test_a_mirror_that_drops_while_it_is_read_is(trainer_of, folder, tmp_path, monkeypatch):
    mirror = tmp_path / "drive" / folder.name
    copy_whole(folder / "checkpoint-6", mirror / "checkpoint-6", ())
    shutil.rmtree(folder)

    def drop(source, target, runs):
        shutil.rmtree(mirror)
        raise OSError(5, "Input/output error")

    monkeypatch.setattr("helpers.training.checkpoints.copy_whole", drop)
    with pytest.raises(CheckpointError, match="drive.*found Input/output error.*mount Drive again") as caught:
        with Checkpoints(trainer_of(folder), mirror=tmp_path / "drive"):
            pass
    assert str(caught.value).startswith(str(mirror))


def test_a_slow_mirror_is_not_waited_for(trainer_of, tmp_path, monkeypatch, capsys):
    """What is being copied is kept meanwhile, and copied in the end."""
    folder, mirror, go_on = tmp_path / "run", tmp_path / "drive", threading.Event()

    def copy_slowly(*given):
        assert go_on.wait(600)
        return copy_whole(*given)

    monkeypatch.setattr("helpers.training.saved.copy_whole", copy_slowly)
    monkeypatch.setattr("helpers.training.saved.MIRROR_WAIT_SECONDS", 0.2)
    trainer, began = trainer_of(folder), time.monotonic()
    with Checkpoints(trainer, mirror=mirror, every_seconds=0) as last:
        trainer.train(resume_from_checkpoint=last)
    assert time.monotonic() - began < 500 and trainer.state.global_step == 12
    assert steps_in(folder) == [1, 11, 12] and not mirror.exists()
    assert capsys.readouterr().out.count("No copy in") == 1
    go_on.set()
    deadline = time.monotonic() + 300
    while (not mirror.exists() or steps_in(mirror / "run") != [11, 12]) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert steps_in(mirror / "run") == [11, 12] and not any(saved.damage() for saved in saved_in(mirror / "run"))


OTHER = "2999-01-01T00:00:00.5+00:00"  # began later, by its machine's clock


def claim(path, run):
    """Make a checkpoint another run's."""
    content = json.loads((path / "manifest.json").read_text()) | {"run": run}
    (path / "manifest.json").write_text(json.dumps(content))
    return path


def plant(source, folder, run):
    """A copy as a run of another machine leaves it."""
    return claim(Path(shutil.copytree(source, folder / source.name)), run)


@pytest.mark.parametrize("run", [OTHER, "2000-01-01T00:00:00.5+00:00"])
@pytest.mark.parametrize("harm", [None, truncate])
def test_another_run_on_drive_is_refused_and_nothing_is_deleted(trainer_of, stopped, folder, tmp_path, run, harm):
    mirror = tmp_path / "drive" / folder.name
    theirs = plant(stopped / "checkpoint-5", mirror, run)
    if harm:
        harm(theirs)
    before = contents(folder), contents(mirror)
    trainer = trainer_of(folder)
    with pytest.raises(CheckpointError) as caught, Checkpoints(trainer, mirror=tmp_path / "drive"):
        pass
    assert caught.value.where == str(theirs) and f"step 5 of a run that began {run}" in caught.value.found
    assert saved_in(folder)[0].run in caught.value.expected
    assert caught.value.fix.startswith("set DRIVE_DIR to another folder, or set START_AFRESH = True to set that run")
    assert (contents(folder), contents(mirror)) == before
    with Checkpoints(trainer, mirror=tmp_path / "other") as last:
        assert last.endswith("checkpoint-6")
    with Checkpoints(trainer, mirror=tmp_path / "drive", start_afresh=True) as last:
        assert last is None
    assert set_aside_in(folder) == {1: [5, 6]} and set_aside_in(mirror) == {1: [5]}
    assert steps_in(folder) == steps_in(mirror) == []


def test_two_runs_on_drive_are_refused_where_there_is_none_here(trainer_of, stopped, tmp_path):
    mirror = tmp_path / "drive" / "run"
    shutil.copytree(stopped / "checkpoint-6", mirror / "checkpoint-6")
    plant(stopped / "checkpoint-5", mirror, OTHER)
    with pytest.raises(CheckpointError, match="set DRIVE_DIR to another folder"):
        with Checkpoints(trainer_of(tmp_path / "run"), mirror=tmp_path / "drive"):
            pass
    (mirror / "handed_over").write_text(OTHER)
    with Checkpoints(trainer_of(tmp_path / "run"), mirror=tmp_path / "drive") as last:
        assert last.endswith("checkpoint-6")


def test_another_machine_that_copies_to_the_mirror_meanwhile(trainer_of, stopped, tmp_path, capsys):
    """Nobody's checkpoints are deleted or replaced; training goes on."""
    from transformers import TrainerCallback

    folder, mirror, theirs = tmp_path / "run", tmp_path / "drive" / "run", []

    class OtherMachine(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 3:
                theirs.append(plant(stopped / "checkpoint-6", mirror, OTHER))
                theirs.append(contents(theirs[0]))

    trainer = trainer_of(folder)
    trainer.add_callback(OtherMachine())
    keeper = Checkpoints(trainer, mirror=tmp_path / "drive", every_seconds=0)
    with keeper as last:
        trainer.train(resume_from_checkpoint=last)
    assert trainer.state.global_step == 12 and steps_in(folder) == [11, 12]
    assert contents(theirs[0]) == theirs[1]
    assert all(saved.step <= 3 for saved in saved_in(mirror) if saved.run == keeper.run)
    printed = capsys.readouterr().out
    assert printed.count(f"No copy in {mirror} (checkpoint-6 there is of a run that began {OTHER}: give each") == 1
    keeper.hand_over()
    assert handed_over(mirror) == {keeper.run}


def test_a_copy_never_replaces_another_runs(stopped, tmp_path, capsys):
    theirs = plant(stopped / "checkpoint-6", tmp_path, OTHER)
    before = contents(theirs)
    assert copy_whole(stopped / "checkpoint-6", theirs, {"ours"}) == theirs
    assert contents(tmp_path / "checkpoint-6.previous-1") == before and steps_in(tmp_path) == [6]
    assert "checkpoint-6 is not of this run: kept as checkpoint-6.previous-1" in capsys.readouterr().out


def test_a_clock_that_is_wrong_costs_nothing(trainings, whole, folder):
    """Runs that the clock puts into the future: one goes on, and a new one behind it keeps its own checkpoints."""
    for path in folder.glob("checkpoint-*"):
        claim(path, OTHER)
    resumed = trainings.run(folder, hand_over=True)
    assert resumed.began_at == 6 and resumed.result == whole
    assert [saved.run for saved in saved_in(folder)] == [OTHER, OTHER] and handed_over(folder) == {OTHER}
    assert trainings.run(folder, interrupt_at=3).began_at == 0
    assert steps_in(folder) == [2, 3]
    again = trainings.run(folder)
    assert again.began_at == 3 and again.result == whole


def test_each_fresh_start_sets_aside_under_a_number_of_its_own(trainings, folder, tmp_path):
    mirror = tmp_path / "drive"
    for _ in range(3):
        afresh = trainings.run(folder, mirror=mirror, start_afresh=True, every_seconds=1000, interrupt_at=2)
        assert afresh.began_at == 0 and steps_in(folder) == steps_in(mirror / folder.name) == [2]
    assert f"Set aside: {folder / 'checkpoint-2.previous-2'}" in afresh.output
    assert set_aside_in(folder) == {1: [2, 5, 6], 2: [2]} and set_aside_in(mirror / folder.name) == {1: [2], 2: [2]}
    assert trainings.run(folder, mirror=mirror, interrupt_at=4).began_at == 2


def test_a_copy_that_was_broken_off_does_not_hold_the_last_room(folder, tmp_path):
    mirror = tmp_path / "mirror"
    mirror.mkdir()
    plain_checkpoint(mirror / ".unfinished-checkpoint-4")
    copy_whole(folder / "checkpoint-6", mirror / "checkpoint-6", ())
    assert [path.name for path in mirror.iterdir()] == ["checkpoint-6"]


def test_a_mirror_that_is_full_keeps_no_rest(folder, tmp_path):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        with pytest.raises(OSError) as caught:
            copy_whole(folder / "checkpoint-6", tmp_path / "mirror" / "checkpoint-6", ())
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert reason(caught.value) == "[Errno 27] File too large"
    assert list((tmp_path / "mirror").iterdir()) == []
    assert copy_whole(folder / "checkpoint-6", tmp_path / "mirror" / "copy", ()).name == "copy"


def test_differences():
    assert compare_settings({"a": 1, "b": [2]}, {"a": 1, "b": [2]}) == []
    assert compare_settings({"a": 1, "b": 2}, {"a": 3, "c": 4}) == [
        "a was 1, is 3",
        "b was 2, is None",
        "c was None, is 4",
    ]


@pytest.mark.slow
def test_a_kill_with_unsloth(tmp_path):
    """As in chapter 04: 4-bit, `train_on_responses_only`, Unsloth's own training loop."""
    server = Trainings(tmp_path, "--unsloth")
    whole = server.run(tmp_path / "whole", every_seconds=1000).result
    training = server.start(tmp_path / "killed")
    training.wait_for(lambda: training.steps_done >= 2)
    assert training.kill().code == -signal.SIGKILL
    resumed = server.run(tmp_path / "killed")
    assert 1 <= resumed.began_at <= 2
    assert resumed.result == whole
    server.close()
