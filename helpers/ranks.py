"""Several processes train one model together: they meet, agree, and end with one message that names who failed.

A *rank* is one of these processes, numbered from 0. In a single process every function here does what is asked of it,
and nothing else.
"""

import contextlib
import json
import os
import socket
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from datetime import timedelta
from typing import Any

from helpers.base import InputError, reason

MEETING_SECONDS = 60
# What PyTorch says of a rank that has gone: the gloo, NCCL and store back ends, each in its own words.
GONE = ("connection closed by peer", "connection reset by peer", "broken pipe", "connection was likely closed")
GONE += ("read error", "gloo", "nccl", "tcpstore", "remote process exited")
ENDED_BY_OTHERS_SECONDS = 30


class RankError(InputError):
    """A rank is missing, or is not like the others."""


def rank_and_size() -> tuple[int, int]:
    """(this process's number, how many there are), as torchrun and Accelerate say in the environment."""
    return int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))


def meet_ranks(facts: Mapping[str, Any], *, seconds: float = MEETING_SECONDS) -> Any:
    """Wait for all ranks, see that they are alike, and join them; gives Accelerate's `PartialState`.

    It comes before anything that takes long: whoever is missing, or would compute something else, is named now.

    Args:
        facts: what must be the same on every rank, such as `library_versions()`.
        seconds: how long to wait for the others.

    Raises:
        RankError: a rank did not come, or has other facts than rank 0.

    Example:
        >>> meet_ranks(library_versions()).num_processes
        2
    """
    rank, size = rank_and_size()
    if size > 1:
        from torch.distributed import TCPStore

        # torchrun's own store, through which the ranks will also find each other.
        place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = TCPStore(*place, is_master=False, timeout=timedelta(seconds=seconds))
        attempt = f"{os.environ.get('TORCHELASTIC_RUN_ID', '')}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}"
        mine = {"host": socket.gethostname(), "facts": dict(facts)}
        store.set(f"meeting/{attempt}/{rank}", json.dumps(mine))
        _require_alike([_read(store, f"meeting/{attempt}/{other}", other, seconds) for other in range(size)])
    import torch
    from accelerate import PartialState

    if torch.cuda.is_available():
        return PartialState()
    # Accelerate would call it "cpu:0", a place that torch.load does not know.
    os.environ.setdefault("ACCELERATE_TORCH_DEVICE", "cpu")
    return PartialState(cpu=True)  # else processes without GPUs would not see each other


def _read(store: Any, key: str, rank: int, seconds: float) -> dict[str, Any]:
    """What a rank brought to the meeting."""
    from torch.distributed import DistStoreError

    try:
        return json.loads(store.get(key))
    except DistStoreError:
        found, fix = f"no sign of it within {seconds:.0f} s", "start it too, or start fewer processes"
        raise RankError(f"rank {rank}", found=found, expected="all ranks, to begin together", fix=fix) from None


def _require_alike(ranks: list[dict[str, Any]]) -> None:
    """Raises RankError for the first rank that has other facts than rank 0."""
    first = ranks[0]["facts"]
    for number, other in enumerate(ranks):
        for name, value in first.items():
            if (its := other["facts"].get(name)) != value:
                raise RankError(
                    f"rank {number} on {other['host']}",
                    found=f"{name} {str(its)[:80]}",
                    expected=f"{name} {str(value)[:80]}, as rank 0 on {ranks[0]['host']} has it",
                    fix="make the hosts alike: the same lock installed, the same run folder",
                )


def on_first(compute: Callable[[], Any]) -> Any:
    """What `compute` returns on rank 0, given to all; the others wait for it, and compute nothing."""
    if rank_and_size()[1] == 1:
        return compute()
    from accelerate import PartialState
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([compute() if PartialState().is_main_process else None])[0]


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
            raise RankError(f"rank {rank}", found=f"{what} {other}", expected=f"{values[0]}, as on rank 0", fix=fix)


@contextlib.contextmanager
def one_message() -> Iterator[None]:
    """An error in this block ends the process with one line, which names the rank; torchrun's summary quotes it.

    Where one rank goes, the others' next exchange fails too. They wait to be ended by torchrun, so that the first
    message, or the signal that ended a rank, is what remains to be read.
    """
    try:
        yield
    except Exception as error:
        rank, size = rank_and_size()
        if size == 1 and not isinstance(error, InputError):
            raise
        follows = size > 1 and not isinstance(error, InputError) and any(word in str(error).lower() for word in GONE)
        if follows:
            time.sleep(ENDED_BY_OTHERS_SECONDS)
        where = f"rank {rank} of {size} on {socket.gethostname()}: " if size > 1 else ""
        what = str(error) if isinstance(error, InputError) else f"{type(error).__name__}: {reason(error)}"
        line = f"{where}{'another rank has gone: ' if follows else ''}{what}"
        print(line, file=sys.stderr, flush=True)
        if summary := os.environ.get("TORCHELASTIC_ERROR_FILE"):
            with contextlib.suppress(OSError), open(summary, "w", encoding="utf-8") as file:
                json.dump({"message": line, "timestamp": str(int(time.time()))}, file)
        sys.stdout.flush()
        os._exit(1)  # not through the interpreter's end, which would wait for ranks that are gone
