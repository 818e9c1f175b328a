"""Chapters side by side, on a machine whose cores would otherwise wait."""

import os
from collections.abc import Callable, Container, Sequence
from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
from typing import Any

from helpers.chapters import chapter_of, producer_of

ENOUGH_GIB = 12  # of main memory: two chapters hold up to 7 together


def lanes_here() -> int:
    """How many chapters to run at once: two where no GPU computes, unless somebody has shared the cores out already.

    A small model hardly gains from a second core: with one, chapter 04 took 302 s, with both 379 s (two cores with
    AVX2, 2026-11-29).
    """
    import psutil
    import torch

    if torch.cuda.is_available() or "OMP_NUM_THREADS" in os.environ:
        return 1
    return 2 if (os.cpu_count() or 1) > 1 and psutil.virtual_memory().total >= ENOUGH_GIB * 2**30 else 1


def threads_each(lanes: int) -> str:
    """The threads that a chapter computes with, for OMP_NUM_THREADS."""
    return str(max(1, (os.cpu_count() or 1) // lanes))


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
    waiting, running = list(chapters), set()
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
                    done, running = wait(running, return_when=FIRST_COMPLETED)
                except KeyboardInterrupt:
                    waiting.clear()
                    _stop_processes()
                    continue
                for future in done:
                    end(future.result())
                if any(run.failure for run in runs):
                    waiting.clear()
        except BaseException:
            _stop_processes()  # the pool waits for what runs in it
            raise


def _stop_processes() -> None:
    import psutil

    for process in psutil.Process().children():
        process.terminate()


def ready(waiting: Sequence[str], unfinished: Container[str]) -> list[str]:
    """The chapters that need nothing of an unfinished one. Example: 04_train waits for 03_data, 07 for none."""
    return [
        name
        for name in waiting
        if not any(producer_of(artefact).name in unfinished for artefact in chapter_of(name).needs)
    ]
