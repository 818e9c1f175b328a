"""Bounds for code that came with a model: how long it may take, and how much memory."""

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any


class Late(BaseException):
    """The time is up. No `Exception`: Jinja goes on after those that are raised while it compiles a template."""


@contextlib.contextmanager
def limits(*, seconds: float, more_bytes: int) -> Iterator[None]:
    """Raise `Late` in a block that takes longer, and MemoryError where it asks for so much more than the process has.

    Both hold in the main thread alone: Python handles signals there, and two threads would take back each other's
    bound. The memory is bounded on Linux alone. What was there before, a timer, its handler and a bound, is there again
    afterwards.
    """
    if threading.current_thread() is not threading.main_thread() or not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: Any) -> None:
        raise Late

    with _limited_memory(more_bytes):
        handler, start = signal.signal(signal.SIGALRM, stop), time.monotonic()
        left, interval = signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            try:
                yield
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
        finally:
            signal.signal(signal.SIGALRM, signal.SIG_DFL if handler is None else handler)
            if left:
                signal.setitimer(signal.ITIMER_REAL, max(left - (time.monotonic() - start), 0.001), interval)


@contextlib.contextmanager
def _limited_memory(more_bytes: int) -> Iterator[None]:
    """The bound is the process's: its other threads have it too, as long as the block takes."""
    import resource

    pages = Path("/proc/self/statm")
    if not pages.exists():  # macOS
        yield
        return
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    bound = int(pages.read_text().split()[0]) * os.sysconf("SC_PAGE_SIZE") + more_bytes
    lowest = min(each for each in (soft, hard, bound) if each != resource.RLIM_INFINITY)
    resource.setrlimit(resource.RLIMIT_AS, (lowest, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
