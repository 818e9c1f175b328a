"""Survive a disconnect: a training run that saves itself by the clock, and goes on where it was when it is run again.

The checkpoints are Transformers' own (adapter, optimiser, learning rate, scaler, random numbers, trainer state). What
is added here: *when* they are written, a manifest that says whether one is whole, the settings that it belongs to, a
copy on Drive, and an order of the rows that does not depend on what ran before.

    checkpoints/
      checkpoint-37/    as Transformers writes it, and manifest.json (sizes, sha256, run, step, settings): made first,
                        empty, and filled last
      checkpoint-31/    the one before it; older ones are deleted
      checkpoint-37.previous-1/    set aside by START_AFRESH
      handed_over       the runs whose adapter the chapter has handed on: the next run starts at step 0
      .lock             held while a process trains here; the system releases it when that process ends, however it ends

The copies on Drive are called the same. A run that was interrupted is resumed, one that is complete is loaded and not
trained further, and one that is handed over makes room for a new one. Where checkpoints of two runs lie (two machines
with one Drive folder), training does not start, and nothing is deleted. A `checkpoint-…` without a manifest, which a
plain trainer wrote, never is. Steps order checkpoints, no clock does.

On a CPU a run that was killed and resumed ends with the same bits as one that was not: rows, learning rate, optimiser
and random numbers all continue. On a GPU kernels that add in no fixed order (atomics) can make even two uninterrupted
runs differ in the last bits; tests/benchmarks/README.md has runs that ended with the same bits there too.
"""

import contextlib
import functools
import json
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from helpers.base import InputError, reason, replace_file, set_aside
from helpers.environment.hub import base_name
from helpers.handoff.run import fingerprint_rows
from helpers.messages import _
from helpers.ranks import first_failure, on_all, on_first, rank_and_size
from helpers.training.order import seeded_sampler, whole_rounds
from helpers.training.saved import (
    HANDED_OVER,
    MANIFEST,
    Copier,
    Saved,
    begin,
    copy_whole,
    delete_unfinished,
    handed_over,
    names_in,
    newest_good,
    prune,
    remove,
    saved_in,
    write_manifest,
)

# What decides the result of a run, of all that Transformers and TRL let one set. The batch is compared as a whole: how
# it is split into micro-batches changes the last bits only.
DECIDING = (
    "max_steps num_train_epochs learning_rate lr_scheduler_type lr_scheduler_kwargs warmup_steps optim optim_args "
    "weight_decay adam_beta1 adam_beta2 adam_epsilon max_grad_norm label_smoothing_factor neftune_noise_alpha fp16 "
    "bf16 train_sampling_strategy dataloader_drop_last max_length packing seed"
).split()
DECIDING_LORA = (
    "r lora_alpha lora_dropout target_modules modules_to_save layers_to_transform bias use_rslora use_dora "
    "init_lora_weights"
).split()


class CheckpointError(InputError):
    """Training cannot go on from what is in the folder, or the folder is in use or cannot be written."""


class _AlreadyComplete(Exception):
    """Leaves `trainer.train` before its first step: the checkpoint that it has loaded is the last one."""


class Checkpoints:
    """Keeps a trainer's checkpoints while a `with` block trains, in the trainer's `output_dir`.

    Args:
        trainer: a Transformers or TRL trainer that has not trained yet; its `save_strategy` may be "no".
        mirror: a folder on Drive or another disk that checkpoints are copied to in the background, and fetched from
            where the trainer's folder has none as far. Training never waits for it and never fails because of it.
        every_seconds: at most so much work is lost when the machine goes away (or one step, if that takes longer).
        start_afresh: set aside what is there, here and in the mirror, and start at step 0.

    Attributes:
        step: where training began in this session, once the block is entered: 0, or that of the checkpoint.

    Entering the block gives what `trainer.train(resume_from_checkpoint=...)` takes, and says which step that is. Inside
    it Ctrl-C and Colab's Stop let the step end, save, and then raise KeyboardInterrupt; a second one does not wait.
    A checkpoint that cannot be written (a full disk) is a warning: training goes on, and the older ones stay.

    Raises:
        CheckpointError: other settings than those of the interrupted run, checkpoints of another run, a folder that
            another process trains in or that cannot be written, a disk without room for the mirror's checkpoint, a
            mirror that cannot be read, or a trainer that has trained already. In the block, before the first step:
            `trainer.train` was not given what the block gave, and would train another run into the folder.

    Example:
        >>> checkpoints = Checkpoints(trainer, mirror=run.mirror)
        >>> with checkpoints as last:
        ...     trainer.train(resume_from_checkpoint=last)
        Resumed from step 37 of 60
        >>> checkpoints.hand_over()  # once the adapter is saved: running the chapter again trains anew
    """

    def __init__(
        self, trainer: Any, *, mirror: str | Path | None = None, every_seconds: float = 300, start_afresh: bool = False
    ) -> None:
        self.trainer, self.every_seconds, self.start_afresh = trainer, every_seconds, start_afresh
        self.folder = Path(trainer.args.output_dir)
        self.mirror = Path(mirror) / self.folder.name if mirror else None
        self.run = ""
        self.over: set[str] = set()  # the runs that are handed over
        self.settings: dict[str, Any] = {}
        self.step = 0  # where training is to begin
        self.interrupted = False
        self.is_first = rank_and_size()[0] == 0  # of several processes only the first one writes

    def __enter__(self) -> str | None:
        with contextlib.ExitStack() as stack:
            if self.is_first:
                stack.enter_context(_locked(self.folder))
            self.settings = settings_of(self.trainer)
            last = on_first(self._find_last)
            self.run = last.run if last else datetime.now(UTC).isoformat()
            self.step = last.step if last else 0
            self._guard(stack)
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
                replace_file(folder / HANDED_OVER, "\n".join(sorted({*handed_over(folder), self.run})).encode())
            except OSError as error:
                said = _(
                    "{folder}: could not note that this run is handed over ({error}); it would be loaded once more.",
                    folder=folder,
                    error=error,
                )
                print(said)

    def _find_last(self) -> Saved | None:
        """The checkpoint to go on from, verified and lying in the trainer's folder; says what was found."""
        with _writing(self.folder):
            delete_unfinished(self.folder)
            here, there, self.over = saved_in(self.folder), [], handed_over(self.folder)
        if self.mirror:
            with self._reading_the_mirror():
                there, self.over = saved_in(self.mirror), self.over | handed_over(self.mirror)
        here, there = ([each for each in saved if each.run not in self.over] for saved in (here, there))
        if self.start_afresh:
            told = _("Starting at step 0: START_AFRESH is set. Unset it, or the next run starts at step 0 as well")
            self._begin([*here, *there], told)
            return None
        self._require_one_run([*here, *there])
        last, damaged = newest_good(here)
        with self._reading_the_mirror():
            copy, damaged_copies = newest_good([each for each in there if last is None or each.step > last.step])
        if last is None and copy is None:
            told = _("Starting at step 0: the run before is handed over") if self.over else _("Starting at step 0")
            self._begin([*damaged, *damaged_copies], told)
            return None
        self._require_same_settings(copy or last)
        last = self._fetch(copy) if copy else last
        where = dict(step=last.step, max_steps=last.max_steps)
        told = _("Resumed from step {step} of {max_steps}", **where)
        if last.step >= last.max_steps:
            told = _(
                "Nothing to train: this run is complete, loading step {step} of {max_steps} "
                "(START_AFRESH = True trains anew)",
                **where,
            )
        print(told)
        for each in (*damaged, *damaged_copies):  # they must not count among the furthest, which are kept
            if each.path != last.path:  # where a good copy has just replaced it
                with contextlib.suppress(OSError):
                    print(_("{name} is kept as {kept}", name=each.path.name, kept=set_aside(each.path).name))
        return last

    def _begin(self, saved: Sequence[Saved], told: str) -> None:
        """Start at step 0, which is told, with what was saved set aside."""
        if steps := self.trainer.state.global_step:
            raise CheckpointError(
                "trainer",
                found=_("a model that has been trained for {steps} steps in this session", steps=steps),
                expected=_("a fresh model to start at step 0"),
                fix=_("run the chapter from its top, so that the model is loaded again"),
            )
        for each in saved:
            with self._reading_the_mirror() if each.path.parent == self.mirror else _writing(self.folder):
                print(_("Set aside: {path}", path=set_aside(each.path)))
        print(told)

    def _require_one_run(self, saved: Sequence[Saved]) -> None:
        for other in saved:
            if other.run != saved[0].run:
                facts = dict(step=other.step, run=other.run)
                raise CheckpointError(
                    str(other.path),
                    found=_("step {step} of a run that began {run}, perhaps on another machine", **facts),
                    expected=_("checkpoints of one run, here of that which began {run}", run=saved[0].run),
                    fix=self._ways_out(other),
                )

    def _require_same_settings(self, last: Saved) -> None:
        if differences := compare_settings(last.settings, self.settings):
            where = dict(folder=last.path.parent, step=last.step, max_steps=last.max_steps)
            raise CheckpointError(
                _("{folder}, a run that is at step {step} of {max_steps}", **where),
                found=_("; ").join(differences),
                expected=_("the settings that it was started with"),
                fix=_("set them back to go on, or {otherwise}", otherwise=self._ways_out(last)),
            )

    def _ways_out(self, saved: Saved) -> str:
        if saved.path.parent != self.mirror:
            return _("set START_AFRESH = True to set that run aside and start at step 0")
        return _(
            "set DRIVE_DIR to another folder, or set START_AFRESH = True to set that run aside and start at step 0"
        )

    def _fetch(self, copy: Saved) -> Saved:
        """The mirror's checkpoint, copied into the trainer's folder."""
        with self._reading_the_mirror():
            try:
                path = copy_whole(copy.path, self.folder / copy.path.name, {copy.run, *self.over})
            except OSError as error:
                if copy.damage():  # reads it once more, and raises OSError itself where the mirror cannot be read
                    raise
                facts = dict(mib=sum(file["bytes"] for file in copy.files.values()) / 2**20, folder=self.mirror)
                raise CheckpointError(
                    str(self.folder),
                    found=reason(error),
                    expected=_("room for {mib:,.0f} MiB, the checkpoint that is in {folder}", **facts),
                    fix=_("free disk space, or set RUN_DIR to a folder on another disk"),
                ) from None
        print(_("Fetched {name} from {folder}", name=path.name, folder=self.mirror))
        return replace(copy, path=path)

    def _reading_the_mirror(self) -> contextlib.AbstractContextManager:
        expected = _("a folder to copy checkpoints to, which may hold those of an interrupted run")
        return _refusing(self.mirror, expected, _('mount Drive again, or set DRIVE_DIR = "" to train without it'))

    def _guard(self, stack: contextlib.ExitStack) -> None:
        """Hook into the trainer until the stack closes: when to save, how, in which order the rows come, and Ctrl-C."""
        from transformers import set_seed

        trainer = self.trainer
        mirror = self.mirror if self.is_first else None
        self.copier = stack.enter_context(Copier(mirror, self.run, {self.run, *self.over}))
        _replace(stack, trainer, "_save_checkpoint", self._save)
        _replace(stack, trainer, "_load_from_checkpoint", self._load)
        count = len(trainer.train_dataset)
        _replace(
            stack, trainer, "_get_train_sampler", lambda make, rows: seeded_sampler(make, rows, count, trainer.args)
        )
        _replace(stack, trainer, "get_train_dataloader", lambda make: whole_rounds(make, trainer))
        set_seed(trainer.args.seed)  # else dropout would depend on what ran before in this session
        callback = _callback(self)
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

    def _save(self, write: Callable, model: Any, trial: Any) -> None:
        """Write a checkpoint whole, or say why not and train on."""
        step, runs = self.trainer.state.global_step, self.copier.runs
        path = self.folder / f"checkpoint-{step}"
        stopped = _("stopped after step {step}; run the chapter again to go on", step=step)
        facts = dict(run=self.run, step=step, max_steps=self.trainer.state.max_steps, settings=self.settings)
        # With several processes each phase begins when the last one has ended on all of them. A rank writes its random
        # numbers alone, the first one all the rest.
        phases = [lambda: write(model, trial)]
        if self.is_first:
            phases = [lambda: begin(path, runs), *phases, lambda: write_manifest(path, **facts)]
        else:
            phases = [lambda: None, *phases, lambda: None]
        failure = next(filter(None, map(first_failure, phases)), "")
        if failure:
            if self.is_first:
                self._give_up(path, failure)
            stopped = _(
                "stopped after step {step}, which could not be saved; run the chapter again to go on from an "
                "older checkpoint, or from step 0 where there is none",
                step=step,
            )
        elif self.is_first:
            self.copier.put(path)
            with contextlib.suppress(OSError):  # one that cannot be deleted does no harm
                prune(self.folder, self.run, runs, keep=self.copier.busy)
        if self.interrupted:
            raise KeyboardInterrupt(stopped)

    def _give_up(self, path: Path, failure: str) -> None:
        with contextlib.suppress(OSError):
            if MANIFEST in names_in(path):
                remove(path)
        facts = dict(name=path.name, failure=failure)
        if self.interrupted:
            print(_("{name} could not be saved ({failure}): older checkpoints stay", **facts))
        else:
            print(_("{name} could not be saved ({failure}): training goes on, older checkpoints stay", **facts))

    def _load(self, read: Callable, *args: Any) -> None:
        # PEFT turns half-precision adapters into float32 as it loads them; Unsloth may train them as bfloat16.
        dtypes = {name: parameter.dtype for name, parameter in self.trainer.model.named_parameters()}
        read(*args)
        for name, parameter in self.trainer.model.named_parameters():
            parameter.data = parameter.data.to(dtypes[name])


def settings_of(trainer: Any) -> dict[str, Any]:
    """What decides the result of a trainer's run: base model, LoRA, data, batch and training arguments.

    Example: {"base model": "unsloth/Llama-3.2-3B-Instruct", "LoRA r": 16, "data": "480 rows, 9f3c…", "seed": 3407, …}
    """
    args = trainer.args.to_dict()
    effective = args["per_device_train_batch_size"] * args["gradient_accumulation_steps"] * trainer.args.world_size
    rows = trainer.train_dataset
    settings = {"data": f"{len(rows)} rows, {fingerprint_rows(rows)}", "effective batch": effective}
    config = getattr(trainer.model, "peft_config", {}).get("default")
    if config is not None:
        name = config.base_model_name_or_path or ""
        settings["base model"] = base_name(name) if Path(name).is_dir() else name
        settings["4-bit"] = bool(getattr(trainer.model, "is_loaded_in_4bit", False))
        settings |= {f"LoRA {name}": getattr(config, name, None) for name in DECIDING_LORA}
        if config.lora_dropout and trainer.args.world_size > 1:  # each process draws its own random numbers
            settings["processes"] = trainer.args.world_size
    settings |= {name: args[name] for name in DECIDING if name in args}
    return json.loads(json.dumps(settings, default=_as_json))  # as it will be read back: tuples are lists


def _as_json(value: Any) -> Any:
    return sorted(value) if isinstance(value, set) else str(value)


def compare_settings(was: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What differs, one line each. Example: ["LoRA r was 16, is 8"]"""
    names = [*was, *(name for name in now if name not in was)]
    changed = (name for name in names if was.get(name) != now.get(name))
    return [_("{name} was {was}, is {now}", name=name, was=was.get(name), now=now.get(name)) for name in changed]


def _callback(checkpoints: Checkpoints) -> Any:
    from transformers import TrainerCallback

    trainer, trained = checkpoints.trainer, checkpoints.trainer.state.global_step

    class SaveByTheClock(TrainerCallback):
        def on_train_begin(self, args, state, control, **kwargs) -> None:
            if state.global_step != checkpoints.step:
                found, expected = state.global_step, _("step 0, for which None was given to pass on")
                if checkpoints.step:
                    expected = _("step {step}, whose checkpoint was given to pass on", step=checkpoints.step)
                state.global_step = max(found, trained)  # the model is still one that has trained so far
                trainer.is_in_train = False
                raise CheckpointError(
                    f"{checkpoints.folder}, trainer.train",
                    found=_("a start at step {step}", step=found),
                    expected=expected,
                    fix=_(
                        "call trainer.train(resume_from_checkpoint=last) in `with checkpoints as last:`; to begin "
                        "anew instead, set START_AFRESH = True"
                    ),
                )
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
            # All ranks save in the same step: the first one's clock counts, and whoever was interrupted.
            ranks = on_all((due, checkpoints.interrupted))
            due = ranks[0][0]
            checkpoints.interrupted = any(interrupted for _, interrupted in ranks)
            if due or checkpoints.interrupted or state.global_step >= state.max_steps:
                control.should_save = True
                self.saved = now
            checkpoints.copier.tell()

    return SaveByTheClock()


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    from filelock import FileLock, Timeout

    lock = FileLock(folder / ".lock")
    with _writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            raise CheckpointError(
                str(folder),
                found=_("another process that trains into it"),
                expected=_("one run at a time"),
                fix=_("wait for it or stop it (in Jupyter: shut its kernel down), or set RUN_DIR to another folder"),
            ) from None
    try:
        yield
    finally:
        lock.release()


@contextlib.contextmanager
def _refusing(folder: Path | None, expected: str, fix: str) -> Iterator[None]:
    """An OSError in this block is a CheckpointError about a folder."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(str(folder), found=reason(error), expected=expected, fix=fix) from None


def _writing(folder: Path) -> contextlib.AbstractContextManager:
    return _refusing(folder, _("a folder that can be written"), _("set RUN_DIR to a folder of your own"))


def _replace(stack: contextlib.ExitStack, thing: Any, name: str, function: Callable) -> None:
    """Put a function in place of this one object's method until the stack closes. Its first argument is the method."""
    setattr(thing, name, functools.partial(function, getattr(thing, name)))
    stack.callback(delattr, thing, name)
