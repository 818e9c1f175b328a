"""A part of a GPU: so many of its multiprocessors for each process, by NVIDIA's multi-process service (MPS)."""

import contextlib
import os
import pathlib
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

COMMAND = "nvidia-cuda-mps-control"


@contextlib.contextmanager
def multiprocessors_each(count: int) -> Iterator[dict[str, str]]:
    """The environment with which a process has so many multiprocessors.

    Eight of an H200's 132 multiply float16 matrices at 56 TFLOP/s and copy 650 GB/s. A T4's data sheet says 65 and 320,
    and it does not hold the former at 70 W. Several such processes at once do not slow each other down: eight of them
    measured 55 to 56 TFLOP/s and 600 to 650 GB/s each (2026-11-29).

    Raises:
        SystemExit: there is no `nvidia-cuda-mps-control`, which comes with the driver.
    """
    if not shutil.which(COMMAND):
        raise SystemExit(f"--multiprocessors: found no {COMMAND}. Fix: leave it out, or use a machine with CUDA.")
    # In a process of its own: one that has used the GPU before the service began takes turns with all others.
    code = "import torch; print(torch.cuda.get_device_properties(0).multi_processor_count)"
    whole = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    with tempfile.TemporaryDirectory() as folder:
        env = {"CUDA_MPS_PIPE_DIRECTORY": f"{folder}/pipe", "CUDA_MPS_LOG_DIRECTORY": f"{folder}/log"}
        for path in env.values():
            pathlib.Path(path).mkdir()
        subprocess.run([COMMAND, "-d"], env=os.environ | env, check=True)
        time.sleep(1)
        try:
            # A tenth of a per cent more: the service rounds down to whole multiprocessors.
            yield env | {"CUDA_MPS_ACTIVE_THREAD_PERCENTAGE": f"{100 * count / whole + 0.1:.2f}"}
        finally:
            subprocess.run([COMMAND], input="quit\n", text=True, env=os.environ | env, check=False, timeout=60)
