"""Several processes train one model together: they meet, agree, and end with one message that names who failed.

A *rank* is one of these processes, numbered from 0. In a single process every function here does what is asked of it,
and nothing else.
"""

import contextlib
import hashlib
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

from helpers.base import ROOT, InputError, hash_files, reason
from helpers.messages import N_, _

MEETING_SECONDS = 60
# What PyTorch says of a rank that has gone, over gloo, NCCL and its store.
GONE = re.compile(
    "connection closed by peer|connection reset by peer|broken pipe|connection was likely closed"
    "|remote process exited|nccl communicator was aborted",
    re.IGNORECASE,
)
ENDED_BY_OTHERS_SECONDS = 30
STOPPED = 130  # the exit status of a process that Ctrl-C ended
TALK = re.compile(r"torch/distributed/elastic/.* failed \(exitcode")  # the launcher's first line about a failure
# A rank writes these lines in the language of the process that started it, which reads them again; see `cause_of`.
FAILED = N_("rank {rank} of {size} on {host}: {what}")
FOLLOWED = N_("rank {rank} of {size} on {host}: another rank has gone: {what}")

_store: Any = None  # torchrun's, once the ranks have met
_numbers = itertools.count()  # of what was computed by rank 0 alone, the same on every rank


class RankError(InputError):
    """A rank is missing, failed, or is not like the others."""


def rank_and_size() -> tuple[int, int]:
    """(this process's number, how many there are), as torchrun and Accelerate say in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet_ranks(facts: Mapping[str, Any], *, seconds: float = MEETING_SECONDS) -> Any:
    """Wait for all ranks, see that they are alike, and join them; gives Accelerate's `PartialState`.

    It comes before anything that takes long: whoever is missing, or would compute something else, is named now.

    Args:
        facts: what must be the same on every rank, such as `library_versions()`. The kind of GPU and this series' own
            code are added.
        seconds: how long to wait for the others.

    Raises:
        RankError: a rank did not come, has no GPU where there are some, or has other facts than rank 0.

    Example:
        >>> meet_ranks(library_versions()).num_processes
        2
    """
    global _store
    rank, size = rank_and_size()
    if size > 1:
        store = _open_store(seconds)
        attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        mine = {"host": socket.gethostname(), "facts": {**facts, "GPU": _gpu(), "code": _code()}}
        store.set(f"meeting/{attempt}/{rank}", json.dumps(mine))
        _require_alike([_read(store, f"meeting/{attempt}/{other}", other, seconds) for other in range(size)])
        _store = store
    import torch
    from accelerate import PartialState

    if torch.cuda.is_available():
        return PartialState()
    # Accelerate would call it "cpu:0", a place that torch.load does not know.
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    return PartialState(cpu=True)  # else processes without GPUs would not see each other


def _open_store(seconds: float) -> Any:
    """torchrun's own store, through which the ranks will also find each other."""
    from torch.distributed import TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    try:
        return TCPStore(host, port, is_master=False, timeout=timedelta(seconds=seconds))
    except RuntimeError as error:
        expected = _("the first host's launcher")
        fix = _("give each launcher the first host's address, and open the port to the others")
        raise RankError(f"{host}:{port}", found=reason(error), expected=expected, fix=fix) from None


def _gpu() -> str:
    """What kind of GPU this rank computes on: cards of two kinds would compute in other types.

    It stays English, because the ranks' answers are compared.
    """
    import torch

    if not torch.cuda.is_available():
        return "none"
    number, count = int(os.environ.get("LOCAL_RANK", 0)), torch.cuda.device_count()
    if number >= count:
        found = _("{count} GPUs for more processes", count=count)
        fix = _("start {count} processes on this host", count=count)
        raise RankError(socket.gethostname(), found=found, expected=_("a GPU for each process"), fix=fix)
    return "compute capability {}.{}".format(*torch.cuda.get_device_capability(number))


def _code() -> str:
    """Names this series' own files, which another host may have in another version."""
    files = hash_files(ROOT / "helpers", pattern="*.py") | hash_files(ROOT / "notebooks" / "scale_up.py")
    return hashlib.sha256("".join(files.values()).encode()).hexdigest()[:12]


def _read(store: Any, key: str, rank: int, seconds: float) -> dict[str, Any]:
    """What a rank brought to the meeting."""
    from torch.distributed import DistStoreError

    try:
        return json.loads(store.get(key))
    except DistStoreError:
        found = _("no sign of it within {seconds:.0f} s", seconds=seconds)
        expected, fix = _("all ranks, to begin together"), _("start it too, or start fewer processes")
        raise RankError(_("rank {rank}", rank=rank), found=found, expected=expected, fix=fix) from None


def _require_alike(ranks: list[dict[str, Any]]) -> None:
    """Raises RankError for the first rank that has other facts than rank 0."""
    first = ranks[0]["facts"]
    for number, other in enumerate(ranks):
        for name, value in first.items():
            if (its := other["facts"].get(name)) != value:
                raise RankError(
                    _("rank {rank} on {host}", rank=number, host=other["host"]),
                    found=f"{name} {str(its)[:80]}",
                    expected=_(
                        "{name} {value}, as rank 0 on {host} has it",
                        name=name,
                        value=str(value)[:80],
                        host=ranks[0]["host"],
                    ),
                    fix=_("make the hosts alike: the same lock installed, the same series, the same run folder"),
                )


def on_first(compute: Callable[[], Any]) -> Any:
    """What `compute` returns on rank 0, given to all; the others wait for it, and compute nothing.

    They wait at torchrun's store: NCCL gives up after ten minutes, and checking many rows may take longer.
    """
    if rank_and_size()[1] == 1:
        return compute()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    is_first, key, result = PartialState().is_main_process, f"computed/{next(_numbers)}", None
    if is_first:
        result = compute()
    if _store is not None:
        if is_first:
            _store.set(key, "")
        _store.wait([key], timedelta(days=1))
    return broadcast_object_list([result])[0]


def on_all(value: Any) -> list[Any]:
    """Every rank's value, rank 0's first."""
    if rank_and_size()[1] == 1:
        return [value]
    from accelerate.utils import gather_object

    return gather_object([value])


def first_failure(attempt: Callable[[], Any]) -> str:
    """Try something on every rank: "" where it worked on all, else what went wrong on the first where it did not.

    No rank goes on alone: all get the same answer.
    """
    failure = ""
    try:
        attempt()
    except Exception as error:  # each writer has its own: OSError, RuntimeError (torch), SafetensorError
        failure = reason(error)
    return next(filter(None, on_all(failure)), "")


def require_equal(what: str, value: Any, *, fix: str) -> None:
    """Raises RankError where a rank has another value than rank 0. Example: the adapter's checksum, after training"""
    values = on_all(value)
    for rank, other in enumerate(values):
        if other != values[0]:
            expected = _("{value}, as on rank 0", value=values[0])
            raise RankError(_("rank {rank}", rank=rank), found=f"{what} {other}", expected=expected, fix=fix)


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """An error in this block ends the process with one line, which names the rank; torchrun's summary quotes it.

    Where one rank goes, the others' next exchange fails too. They wait to be ended by torchrun, so that the first
    message, or the signal that ended a rank, is what remains to be read. Ctrl-C, which reaches all, is told by one.
    """
    rank, size = rank_and_size()
    try:
        yield
    except KeyboardInterrupt as error:
        if rank == 0:
            print(str(error) or _("stopped"), file=sys.stderr, flush=True)
        sys.stdout.flush()
        os._exit(STOPPED)
    except Exception as error:
        if size == 1 and not isinstance(error, InputError):
            raise
        met, known = _store is not None, isinstance(error, InputError)
        follows = met and not known and GONE.search(str(error))
        if follows:
            time.sleep(ENDED_BY_OTHERS_SECONDS)
        line = str(error) if known else f"{type(error).__name__}: {reason(error)}"
        if size > 1:
            message = _(FOLLOWED) if follows else _(FAILED)
            line = message.format(rank=rank, size=size, host=socket.gethostname(), what=line)
        print(line, file=sys.stderr, flush=True)
        if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with contextlib.suppress(OSError), open(summary, "w", encoding="utf-8") as file:
                json.dump({"message": line, "timestamp": str(int(time.time()))}, file)
        sys.stdout.flush()
        os._exit(1)  # not through the interpreter's end, which would wait for ranks that are gone


def start(command: str) -> None:
    """Run a program and its arguments as a terminal would, and show what it prints, up to the first failure.

    Stop, or Ctrl-C, is passed on, and the processes have time to save. Programs of this Python's environment are
    found, whether it is activated or not.

    Raises:
        RankError: it failed; its own message, or the signal that ended a rank, is in this one.

    Example:
        >>> start("torchrun --nproc_per_node=2 notebooks/scale_up.py runs/scaled")
    """
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")])
    environment = os.environ | {"PATH": path, "PYTHONUNBUFFERED": "1"}
    options = dict(env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace")
    lines, talks, stopped, words = [], False, False, shlex.split(command)
    if shutil.which(words[0], path=path) is None:
        found = _("no such program beside {python}", python=sys.executable)
        fix = _("install this series' packages into this Python, or start its kernel")
        raise RankError(words[0], found=found, expected=_("such a program"), fix=fix)
    # A session of its own: a signal to this one's processes would reach it a second time.
    with subprocess.Popen(words, start_new_session=True, **options) as process:
        while True:
            try:
                for line in process.stdout:
                    lines.append(line)
                    talks = talks or bool(TALK.search(line))
                    if not talks:
                        print(line, end="", flush=True)
                break
            except KeyboardInterrupt:
                stopped = True
                process.send_signal(signal.SIGINT)
    if process.returncode and stopped:
        raise KeyboardInterrupt(_("stopped; run the cell again to go on"))
    if process.returncode:
        fix = _("mend that and run the cell again: it goes on from the last checkpoint")
        raise RankError(words[0], found=cause_of(lines), expected=_("a run to its end"), fix=fix)


def cause_of(lines: list[str]) -> str:
    """What a launcher's output says of the rank that failed first.

    Example: the message that begins "rank 1 of 2 on host: …", or else "rank 1, ended by SIGKILL"
    """
    failed, followed = (re.sub(r"\\{\w+\\}", r"\\S+", re.escape(_(message))) for message in (FAILED, FOLLOWED))
    messages = [line.strip() for line in lines if re.match(failed, line)]
    if own := [message for message in messages if not re.match(followed, message)]:
        return own[0].removesuffix(".").removesuffix("。")
    summary = "".join(lines).partition("Root Cause")[2]
    if ended := re.search(r"rank +: (\d+).*?exitcode +: -\d+ \(pid: \d+\) +\((\w+)\)", summary, re.DOTALL):
        return _("rank {rank}, ended by {signal}", rank=ended[1], signal=ended[2])
    said = [line.strip() for line in lines if line.strip()]
    return (messages or said[-1:] or [_("no message")])[0].removesuffix(".").removesuffix("。")
