"""Survive a disconnect: a training run that saves itself by the clock, and goes on where it was when it is run again.

The checkpoints are Transformers' own (adapter, optimiser, learning rate, scaler, random numbers, trainer state). What
is added here: *when* they are written, a manifest that says whether one is whole, the settings that it belongs to, a
copy on Drive, and an order of the rows that does not depend on what ran before.

    checkpoints/
      checkpoint-37/    as Transformers writes it, and manifest.json (sizes, sha256, run, step, settings): made first,
                        empty, and filled last
      checkpoint-31/    the one before it; older ones are deleted
      handed_over       the runs whose adapter the chapter has handed on: the next run starts at step 0
      .lock             held while a process trains here; the system releases it when that process ends, however it ends

The copies on Drive bear their run in their name (checkpoint-20261125T101502…-37): no lock reaches from one machine to
another, and two that train into one Drive folder must not replace each other's. A `checkpoint-…` without a manifest is
not ours (a plain trainer wrote it) and is never deleted.

A run that was interrupted is resumed, one that is complete is loaded and not trained further, and one that is complete
and handed over makes room for a new one.

How equal the result is: on a CPU a run that was killed and resumed ends with the same bits as one that was not, because
rows, learning rate, optimiser and random numbers all continue from the checkpoint. On a GPU kernels that add in no
fixed order (atomics) can make even two uninterrupted runs differ in the last bits; tests/benchmarks/README.md has runs
that ended with the same bits there too.
"""

import contextlib
import json
import os
import queue
import shutil
import signal
import threading
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.base import InputError, replace_file
from helpers.environment.hub import base_name
from helpers.handoff.run import fingerprint_rows
from helpers.training.saved import (
    HANDED_OVER,
    MANIFEST,
    UNFINISHED,
    Saved,
    _checkpoints_in,
    _copy_name,
    _copy_whole,
    _delete_unfinished,
    _handed_over,
    _leftovers_in,
    _make_room,
    _names_in,
    _newest_good,
    _prune,
    _prune_copies,
    _read_manifest,
    _reason,
    _remove,
    _saved_in,
    _write_manifest,
)

MIRROR_WAIT_SECONDS = 60
# What decides the result of a run, of all that Transformers and TRL let one set. The batch is compared as a whole: how
# it is split into micro-batches changes the last bits only.
DECIDING = (
    "max_steps",
    "num_train_epochs",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "optim",
    "optim_args",
    "weight_decay",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "max_grad_norm",
    "label_smoothing_factor",
    "neftune_noise_alpha",
    "fp16",
    "bf16",
    "train_sampling_strategy",
    "dataloader_drop_last",
    "max_length",
    "packing",
    "seed",
)
DECIDING_LORA = (
    "r",
    "lora_alpha",
    "lora_dropout",
    "target_modules",
    "modules_to_save",
    "layers_to_transform",
    "bias",
    "use_rslora",
    "use_dora",
    "init_lora_weights",
)


class CheckpointError(InputError):
    """Training cannot go on from what is in the folder, or the folder is in use or cannot be written."""


class _AlreadyComplete(Exception):
    """Leaves `trainer.train` before its first step: the checkpoint that it has loaded is the last one."""


class Checkpoints:
    """Keeps a trainer's checkpoints while a `with` block trains, in the trainer's `output_dir`.

    Args:
        trainer: a Transformers or TRL trainer that has not trained yet; its `save_strategy` may be "no".
        mirror: a folder on Drive or another disk that checkpoints are copied to in the background, and fetched from
            where the trainer's folder has none as new. Training never waits for it and never fails because of it.
        every_seconds: at most so much work is lost when the machine goes away (or one step, if that takes longer).
        start_afresh: delete what is there, here and in the mirror, and start at step 0.

    Attributes:
        step: where training began in this session, once the block is entered: 0, or that of the checkpoint.

    Entering the block gives what `trainer.train(resume_from_checkpoint=...)` takes, and says which step that is. Inside
    it Ctrl-C and Colab's Stop let the step end, save, and then raise KeyboardInterrupt; a second one does not wait.
    A checkpoint that cannot be written (a full disk) is a warning: training goes on, and the older ones stay.

    Raises:
        CheckpointError: other settings than those of the interrupted run, a folder that another process trains in or
            that cannot be written, a disk without room for the mirror's checkpoint, a mirror that cannot be read, or a
            trainer that has trained already. In the block, before the first step: `trainer.train` was not given what
            the block gave, and would train another run into the folder.

    Example:
        >>> checkpoints = Checkpoints(trainer, mirror=run.mirror)
        >>> with checkpoints as last:
        ...     trainer.train(resume_from_checkpoint=last)
        Resumed from step 37 of 60
        >>> checkpoints.hand_over()  # once the adapter is saved: running the chapter again trains anew
    """

    def __init__(
        self,
        trainer: Any,
        *,
        mirror: str | Path | None = None,
        every_seconds: float = 300,
        start_afresh: bool = False,
    ) -> None:
        self.trainer, self.every_seconds, self.start_afresh = trainer, every_seconds, start_afresh
        self.folder = Path(trainer.args.output_dir)
        self.mirror = Path(mirror) / self.folder.name if mirror else None
        self.run = ""
        self.step = 0  # where training is to begin
        self.interrupted = False

    def __enter__(self) -> str | None:
        with contextlib.ExitStack() as stack:
            stack.enter_context(_locked(self.folder))
            settings = settings_of(self.trainer)
            last = self._find_last(settings)
            self.run = last.run if last else datetime.now(UTC).isoformat()
            self.step = last.step if last else 0
            self._guard(stack, settings)
            self._stack = stack.pop_all()
        return str(last.path) if last else None

    def __exit__(self, kind: type | None, error: BaseException | None, traceback: Any) -> bool:
        self._stack.close()
        if self.interrupted and kind in (None, _AlreadyComplete):  # pressed when no step was left
            raise KeyboardInterrupt
        return kind is _AlreadyComplete

    def hand_over(self) -> None:
        """Note that the run's result is saved elsewhere: the next run starts at step 0 instead of loading this one."""
        for folder in filter(None, (self.folder, self.mirror)):
            try:
                replace_file(folder / HANDED_OVER, "\n".join(sorted({*_handed_over(folder), self.run})).encode())
            except OSError as error:
                print(f"{folder}: could not note that this run is handed over ({error}); it would be loaded once more.")

    def _find_last(self, settings: Mapping[str, Any]) -> Saved | None:
        """The checkpoint to go on from, verified and lying in the trainer's folder; says what was found."""
        if self.start_afresh:
            self._require_untrained()
            self._discard()
            print("Starting at step 0: START_AFRESH is set. Unset it, or the next run starts at step 0 as well.")
            return None
        _delete_unfinished(self.folder)
        last, damaged = _newest_good(_saved_in(self.folder))
        with _readable(self.mirror):
            last, damaged_copies = self._fetch(last)
        if last is None:
            self._require_untrained()
            print("Starting at step 0")
            return None
        if self._is_handed_over(last):
            self._require_untrained()
            print(f"Starting at step 0: the run before this one is complete (step {last.step}) and handed over")
            return None
        where = f"step {last.step} of {last.max_steps}"
        differences = compare_settings(last.settings, settings)
        if differences:
            raise CheckpointError(
                f"{self.folder}, a run that is at {where}",
                found="; ".join(differences),
                expected="the settings that it was started with",
                fix="set them back to go on, or set START_AFRESH = True to delete that run and start at step 0",
            )
        if last.step >= last.max_steps:
            print(f"Nothing to train: this run is complete, loading {where} (START_AFRESH = True trains anew)")
        else:
            print(f"Resumed from {where}")
        # They must not count among the newest, which are kept. (In the mirror, those of other runs are not ours.)
        for each in [*damaged, *(copy for copy in damaged_copies if copy.run == last.run)]:
            if each.path != last.path:  # where a good copy has just replaced it
                with contextlib.suppress(OSError):
                    _remove(each.path)
        return last

    def _require_untrained(self) -> None:
        if self.trainer.state.global_step:
            raise CheckpointError(
                "trainer",
                found=f"a model that has been trained for {self.trainer.state.global_step} steps in this session",
                expected="a fresh model to start at step 0",
                fix="run the chapter from its top, so that the model is loaded again",
            )

    def _fetch(self, last: Saved | None) -> tuple[Saved | None, list[Saved]]:
        """The newest good one of `last` and the mirror's (copied into the folder); and damaged ones of the mirror."""
        copies = _saved_in(self.mirror) if self.mirror else []
        good, damaged = _newest_good([copy for copy in copies if last is None or copy.age > last.age])
        if good is None:
            return last, damaged
        path = self._copy_here(good)
        print(f"Fetched {path.name} from {self.mirror}")
        return _read_manifest(path), damaged

    def _copy_here(self, copy: Saved) -> Path:
        try:
            return _copy_whole(copy.path, self.folder / f"checkpoint-{copy.step}")
        except OSError as error:
            if copy.damage():  # reads it once more, and raises OSError itself where the mirror cannot be read
                raise
            mib = sum(file["bytes"] for file in copy.files.values()) / 2**20
            raise CheckpointError(
                str(self.folder),
                found=_reason(error),
                expected=f"room for {mib:,.0f} MiB, the checkpoint that is in {self.mirror}",
                fix="free disk space, or set RUN_DIR to a folder on another disk",
            ) from None

    def _is_handed_over(self, last: Saved) -> bool:
        for folder in filter(None, (self.folder, self.mirror)):
            with contextlib.suppress(OSError):
                if last.run in _handed_over(folder):
                    return True
        return False

    def _discard(self) -> None:
        for folder in filter(None, (self.folder, self.mirror)):
            try:
                for path in _checkpoints_in(folder):
                    _remove(path)
                for path in _leftovers_in(folder):
                    shutil.rmtree(path)
            except OSError as error:
                print(f"{folder}: could not delete the old checkpoints ({error})")

    def _guard(self, stack: contextlib.ExitStack, settings: Mapping[str, Any]) -> None:
        """Hook into the trainer until the stack closes: when to save, how, in which order the rows come, and Ctrl-C."""
        trainer = self.trainer
        copier = stack.enter_context(_Copier(self.mirror, self.run))
        write = trainer._save_checkpoint

        def save(model: Any, trial: Any) -> None:
            step, max_steps = trainer.state.global_step, trainer.state.max_steps
            path = self.folder / f"checkpoint-{step}"
            stopped = f"stopped after step {step}; run the chapter again to go on"
            try:
                _make_room(path)
                begun = path.with_name(UNFINISHED + path.name)
                begun.mkdir(exist_ok=True)
                (begun / MANIFEST).touch()
                os.replace(begun, path)  # from its first moment it is known as ours, and unfinished
                write(model, trial)
                _write_manifest(path, run=self.run, step=step, max_steps=max_steps, settings=settings)
            except Exception as error:  # each writer has its own: OSError, RuntimeError (torch), SafetensorError
                with contextlib.suppress(OSError):
                    if MANIFEST in _names_in(path):
                        _remove(path)
                goes_on = "" if self.interrupted else "training goes on, "
                print(f"{path.name} could not be saved ({_reason(error)}): {goes_on}older checkpoints stay")
                stopped = (
                    f"stopped after step {step}, which could not be saved; run the chapter again to go on from an "
                    "older checkpoint, or from step 0 where there is none"
                )
            else:
                copier.put(path)
                with contextlib.suppress(OSError):  # one that cannot be deleted does no harm
                    _prune(self.folder, keep=copier.busy)
            if self.interrupted:
                raise KeyboardInterrupt(stopped)

        read = trainer._load_from_checkpoint

        def load(*args: Any) -> None:
            # PEFT turns half-precision adapters into float32 as it loads them; Unsloth may train them as bfloat16.
            dtypes = {name: parameter.dtype for name, parameter in trainer.model.named_parameters()}
            read(*args)
            for name, parameter in trainer.model.named_parameters():
                parameter.data = parameter.data.to(dtypes[name])

        _replace(stack, trainer, "_save_checkpoint", save)
        _replace(stack, trainer, "_load_from_checkpoint", load)
        sampler = trainer._get_train_sampler
        _replace(stack, trainer, "_get_train_sampler", lambda *rows: _ordered(sampler(*rows), trainer.args.seed))
        from transformers import set_seed

        set_seed(trainer.args.seed)  # else dropout would depend on what ran before in this session
        callback = _callback(self, copier)
        trainer.add_callback(callback)
        stack.callback(trainer.remove_callback, callback)
        self.interrupted = False
        if threading.current_thread() is threading.main_thread():  # only there may Python set a handler
            previous = signal.signal(signal.SIGINT, self._interrupt)
            stack.callback(signal.signal, signal.SIGINT, previous)

    def _interrupt(self, number: int, frame: Any) -> None:
        if self.interrupted:
            raise KeyboardInterrupt
        self.interrupted = True


def settings_of(trainer: Any) -> dict[str, Any]:
    """What decides the result of a trainer's run: base model, LoRA, data, batch and training arguments.

    Example: {"base model": "unsloth/Llama-3.2-3B-Instruct", "LoRA r": 16, "data": "480 rows, 9f3c…", "seed": 3407, …}
    """
    args = trainer.args.to_dict()
    effective = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"]
    rows = trainer.train_dataset
    settings = {"data": f"{len(rows)} rows, {fingerprint_rows(rows)}", "effective batch": effective}
    config = getattr(trainer.model, "peft_config", {}).get("default")
    if config is not None:
        name = config.base_model_name_or_path or ""
        settings["base model"] = base_name(name) if Path(name).is_dir() else name
        settings["4-bit"] = bool(getattr(trainer.model, "is_loaded_in_4bit", False))
        settings |= {f"LoRA {name}": getattr(config, name, None) for name in DECIDING_LORA}
    settings |= {name: args[name] for name in DECIDING if name in args}
    return json.loads(json.dumps(settings, default=_as_json))  # as it will be read back: tuples are lists


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def compare_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one line each. Example: ["LoRA r was 16, is 8"]"""
    names = [*was, *(name for name in now if name not in was)]
    return [f"{name} was {was.get(name)}, is {now.get(name)}" for name in names if was.get(name) != now.get(name)]


def _ordered(sampler: Any, seed: int) -> Any:
    """The sampler, with an order that seed and epoch alone decide.

    Transformers shuffles by a generator that it seeds with the state of the global one, which depends on all that ran
    before, and which a resumed run would begin at its first epoch again.
    """
    import torch

    if not hasattr(sampler, "generator"):  # a sequential one
        return sampler

    class Ordered(torch.utils.data.Sampler):
        epoch = 0

        def set_epoch(self, epoch: int) -> None:
            self.epoch = epoch

        def __len__(self) -> int:
            return len(sampler)

        def __iter__(self) -> Any:
            sampler.generator = torch.Generator().manual_seed(seed + self.epoch)
            return iter(sampler)

    return Ordered()


def _callback(checkpoints: Checkpoints, copier: "_Copier") -> Any:
    from transformers import TrainerCallback

    trained = checkpoints.trainer.state.global_step

    class SaveByTheClock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            trainer = checkpoints.trainer
            if state.global_step != checkpoints.step:
                error = _not_passed_on(state.global_step, checkpoints)
                state.global_step = max(state.global_step, trained)  # the model is still one that has trained so far
                trainer.is_in_train = False
                raise error
            if 0 < state.max_steps <= state.global_step:
                # Transformers would train one more step before it looked. The other callbacks hear that it is over.
                trainer.callback_handler.on_train_end(args, state, control)
                trainer.is_in_train = False
                raise _AlreadyComplete
            self.saved = self.stepped = time.monotonic()
            self.longest = 0.0

        def on_step_end(self, args, state, control, **kwargs) -> None:
            now = time.monotonic()
            self.longest, self.stepped = max(self.longest, now - self.stepped), now
            # The next chance to save is a step away: save now if that would be too late.
            due = now - self.saved + self.longest >= checkpoints.every_seconds
            if due or checkpoints.interrupted or state.global_step >= state.max_steps:
                control.should_save = True
                self.saved = now
            copier.tell()

    return SaveByTheClock()


def _not_passed_on(found: int, checkpoints: Checkpoints) -> CheckpointError:
    """Training is about to begin at another step than that of the checkpoint that the block gave."""
    given = f"step {checkpoints.step}, whose checkpoint" if checkpoints.step else "step 0, for which None"
    return CheckpointError(
        f"{checkpoints.folder}, trainer.train",
        found=f"a start at step {found}",
        expected=f"{given} was given to pass on",
        fix="call trainer.train(resume_from_checkpoint=last) in `with checkpoints as last:`; to begin anew instead, "
        "set START_AFRESH = True",
    )


class _Copier(contextlib.AbstractContextManager):
    """Copies a run's checkpoints to the mirror in a thread. What it has to say it says once, by `tell`."""

    def __init__(self, mirror: Path | None, run: str) -> None:
        self.mirror, self.run, self.busy = mirror, run, None
        self.failure = self.rival = ""
        self.told: set[str] = set()
        self.waiting: queue.SimpleQueue = queue.SimpleQueue()
        # A daemon: a Drive that hangs must not keep the process from ending.
        self.thread = threading.Thread(target=self._work, daemon=True)
        if mirror is not None:
            self.thread.start()

    def put(self, path: Path) -> None:
        if self.mirror is not None:
            self.waiting.put(path)

    def tell(self) -> None:
        failed = f"No copy in {self.mirror} ({self.failure}): training goes on, its checkpoints are in the run folder"
        shared = (
            f"{self.mirror} holds checkpoints of a run that began after this one ({self.rival}), perhaps on another "
            "machine, and what goes on from there is the newest run. Give each machine a DRIVE_DIR of its own"
        )
        for happened, line in ((self.failure, failed), (self.rival, shared)):
            if happened and line not in self.told:
                self.told.add(line)
                print(line)

    def _work(self) -> None:
        while (path := self.waiting.get()) is not None:
            self.busy = path
            try:
                _copy_whole(path, self.mirror / _copy_name(self.run, path.name.rpartition("-")[2]))
                _prune_copies(self.mirror, self.run)
                newest = max((saved.run for saved in _saved_in(self.mirror)), default="")
                self.rival = self.rival or (newest if newest > self.run else "")
            except Exception as error:
                if (path / MANIFEST).exists():  # else newer ones have replaced it meanwhile: no failure
                    self.failure = self.failure or _reason(error)
            self.busy = None

    def __exit__(self, *error: Any) -> None:
        if self.mirror is not None:
            self.waiting.put(None)
            self.thread.join(MIRROR_WAIT_SECONDS)
            if self.thread.is_alive():
                self.failure = self.failure or f"still not copied after {MIRROR_WAIT_SECONDS} s"
            self.tell()


@contextlib.contextmanager
def _locked(folder: Path) -> Any:
    from filelock import FileLock, Timeout

    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = FileLock(folder / ".lock")
        lock.acquire(timeout=0)
    except Timeout:
        raise CheckpointError(
            str(folder),
            found="another process that trains into it",
            expected="one run at a time",
            fix="wait for it or stop it (in Jupyter: shut its kernel down), or set RUN_DIR to another folder",
        ) from None
    except OSError as error:
        raise CheckpointError(
            str(folder),
            found=error.strerror or str(error),
            expected="a folder that can be written",
            fix="set RUN_DIR to a folder of your own",
        ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _readable(mirror: Path | None) -> Any:
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            str(mirror),
            found=_reason(error),
            expected="a folder to copy checkpoints to, which may hold those of an interrupted run",
            fix='mount Drive again, or set DRIVE_DIR = "" to train without it',
        ) from None


def _replace(stack: contextlib.ExitStack, thing: Any, name: str, function: Any) -> None:
    """Put a function in place of a method of this one object until the stack closes."""
    setattr(thing, name, function)
    stack.callback(delattr, thing, name)
