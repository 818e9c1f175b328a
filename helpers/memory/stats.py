"""How much memory and time a stage took: the GPU's where there is one, else this process's.

GiB are 2**30 bytes.
"""

import contextlib
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from helpers.messages import N_, _

N_("training")  # a label that chapter 04 gives
GIB = 2**30
SAMPLE_SECONDS = 0.02
_open_peaks: list[list[float]] = []  # GiB, of the `track_memory` blocks that have not ended; a list of one item each


@dataclass(frozen=True)
class MemoryStats:
    """Memory at one moment.

    Attributes:
        device: the GPU's name, or "CPU (process memory)".
        is_gpu: False: the figures are those of this process, and `total_gib` is the machine's memory.
        total_gib: the card's (or the machine's) memory.
        allocated_gib: held by tensors (CPU: resident memory of the process).
        reserved_gib: taken from the driver by PyTorch, tensors and cache (CPU: the same as allocated).
        peak_reserved_gib: the most that was reserved since the process or the last `track_memory` began (CPU: now).
    """

    device: str
    is_gpu: bool
    total_gib: float
    allocated_gib: float
    reserved_gib: float
    peak_reserved_gib: float


@dataclass(repr=False)
class Stage:
    """What `track_memory` measured; `after` is None until its block has ended. Seconds are wall time, memory is GiB."""

    label: str
    seconds: float = 0.0
    before: MemoryStats | None = None
    after: MemoryStats | None = None

    @property
    def peak_reserved_gib(self) -> float:
        """The most that was reserved inside the block."""
        return self.after.peak_reserved_gib

    @property
    def added_gib(self) -> float:
        """The peak of the block above what was reserved when it began."""
        return max(0.0, self.after.peak_reserved_gib - self.before.reserved_gib)

    def __repr__(self) -> str:
        if self.after is None:
            return _("{label}: not at its end yet", label=_(self.label))
        peak, total = self.peak_reserved_gib, self.after.total_gib
        values = dict(label=_(self.label), seconds=self.seconds, peak=peak, total=total, share=100 * peak / total)
        if self.after.is_gpu:
            return _(
                "{label}: {seconds:.1f} s, at most {peak:.2f} of {device}'s {total:.1f} GiB ({share:.0f} %), "
                "{added:.2f} more than before",
                **values,
                device=self.after.device,
                added=self.added_gib,
            )
        return _(
            "{label}: {seconds:.1f} s, at most {peak:.2f} of this machine's {total:.1f} GiB ({share:.0f} %), "
            "{added:.2f} more than before",
            **values,
            added=self.added_gib,
        )


def memory_stats() -> MemoryStats:
    """Memory now. On a GPU from PyTorch's allocator, without one from the operating system."""
    import torch

    if torch.cuda.is_available():
        properties = torch.cuda.get_device_properties(torch.cuda.current_device())
        return MemoryStats(
            device=properties.name,
            is_gpu=True,
            total_gib=properties.total_memory / GIB,
            allocated_gib=torch.cuda.memory_allocated() / GIB,
            reserved_gib=torch.cuda.memory_reserved() / GIB,
            peak_reserved_gib=torch.cuda.max_memory_reserved() / GIB,
        )
    resident = _resident_gib()
    return MemoryStats("CPU (process memory)", False, _machine_gib(), resident, resident, resident)


@contextlib.contextmanager
def track_memory(label: str) -> Iterator[Stage]:
    """Measure a block: its seconds and its peak memory; prints one line at its end.

    On a GPU the allocator's peak is reset when the block begins; without one the process is sampled every 20 ms, so a
    shorter spike can be missed. Blocks may lie inside each other: the outer one's peak counts all that was in it. A
    label of this series' own is marked with `N_`; it is translated where it is printed.

    Example:
        with track_memory("loading the model") as load:
            model, tokenizer = FastLanguageModel.from_pretrained(...)
        load.seconds, load.peak_reserved_gib
    """
    import torch

    gpu = torch.cuda.is_available()
    if gpu:
        torch.cuda.synchronize()
        for outer in _open_peaks:  # the reset would make the blocks around this one forget theirs
            outer[0] = max(outer[0], memory_stats().peak_reserved_gib)
        torch.cuda.reset_peak_memory_stats()
    stage = Stage(label, before=memory_stats())
    peak, done = [stage.before.reserved_gib], threading.Event()
    _open_peaks.append(peak)

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak[0] = max(peak[0], _resident_gib())

    sampler = None if gpu else threading.Thread(target=sample, daemon=True)
    if sampler:
        sampler.start()
    start = time.perf_counter()
    try:
        yield stage
    finally:
        if gpu:
            torch.cuda.synchronize()
        stage.seconds = time.perf_counter() - start
        done.set()
        if sampler:
            sampler.join()
        _open_peaks[:] = [each for each in _open_peaks if each is not peak]
        now = memory_stats()
        stage.after = replace(now, peak_reserved_gib=max(peak[0], now.peak_reserved_gib))
        print(stage)


def _resident_gib() -> float:
    import psutil

    return psutil.Process().memory_info().rss / GIB


def _machine_gib() -> float:
    import psutil

    return psutil.virtual_memory().total / GIB
