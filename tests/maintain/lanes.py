"""Chapters side by side, on a machine whose cores would otherwise wait."""

import contextlib
import os
from collections.abc import Callable, Container, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from helpers.chapters import chapter_of, producer_of

ENOUGH_GIB = 8  # of free main memory: two chapters hold up to 7 together


def lanes_here() -> int:
    """How many chapters to run at once: two where no GPU computes, unless somebody has shared the cores out already.

    A small model gains nothing from a second core. On two cores with AVX2 (2026-11-29, one run each) chapters 04 to 06
    took 724 s with two threads and 602 s with one; 02 to 06 with one thread 630 s alone, 677 s beside another such run.
    """
    import psutil
    import torch

    if torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ:
        return 1
    return 2 if cores_here() > 1 and psutil.virtual_memory().available >= ENOUGH_GIB * 2**30 else 1


def cores_here() -> int:
    """The CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def threads_each(lanes: int) -> str:
    """The threads that a chapter computes with, for OMP_NUM_THREADS."""
    return str(max(1, cores_here() // lanes))


def fork(chapters: Sequence[str]) -> bool:
    """Whether two of these chapters can ever run side by side. Example: 03_data and 04_train cannot."""
    return any(len(ready(chapters[first:], chapters[first:])) > 1 for first in range(len(chapters)))


def in_lanes(chapters: Sequence[str], run: Callable[[str], Any], lanes: int) -> list[Any]:
    """A `ChapterRun` of `run` for each chapter that could be run, those first that were done first."""
    runs: list[Any] = []

    def begin(chapter: str) -> Any:
        print(f"[{chapters.index(chapter) + 1}/{len(chapters)}] {chapter} …", flush=True)
        return run(chapter)

    def end(done: Any) -> None:
        where = f"[{chapters.index(done.chapter) + 1}/{len(chapters)}] {done.chapter}"
        print(f"{where}: {done.seconds:.0f} s, {done.failure or done.result}", flush=True)
        runs.append(done)

    if lanes == 1:  # in this thread, which is where Ctrl-C arrives
        for chapter in chapters:
            end(begin(chapter))
            if runs[-1].failure:
                break
        return runs
    waiting, running, told = list(chapters), set(), None  # told: the processes that were asked to stop
    with ThreadPoolExecutor(lanes) as pool:
        try:
            while True:
                unfinished = {name for name in chapters if name not in {run.chapter for run in runs}}
                for chapter in ready(waiting, unfinished)[: lanes - len(running)]:
                    waiting.remove(chapter)
                    running.add(pool.submit(begin, chapter))
                if not running:
                    return runs
                try:
                    done, running = wait(running, timeout=None if told is None else 1, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    waiting, told, done = [], set(), ()
                for future in done:
                    end(future.result())
                if any(run.failure for run in runs):
                    waiting = []
                if told is not None:
                    _stop_processes(told)
        except BaseException:
            _stop_processes(set())  # the pool waits for what runs in it
            raise


def _stop_processes(told: set[int]) -> None:
    """Ask this process's children to end, each once: a second signal would break off how it ends."""
    import psutil

    for process in psutil.Process().children():
        if process.pid not in told:
            told.add(process.pid)
            with contextlib.suppress(psutil.Error):
                process.terminate()


def ready(waiting: Sequence[str], unfinished: Container[str]) -> list[str]:
    """The chapters that need nothing of an unfinished one. Example: 04_train waits for 03_data, 07 for none."""
    return [
        name
        for name in waiting
        if not any(producer_of(artefact).name in unfinished for artefact in chapter_of(name).needs)
    ]
