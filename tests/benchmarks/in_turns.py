"""Jobs in processes of their own that import their libraries side by side and then use the GPU one after the other."""

import csv
import json
import os
import pathlib
import queue
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from importlib import metadata
from typing import Any

from multiprocessors import multiprocessors_each

ROOT = pathlib.Path(__file__).resolve().parents[2]


def run_jobs(
    script: str, jobs: Sequence[dict], *, multiprocessors: int | None, ahead: int = 6, at_once: int = 8
) -> Iterator[tuple[dict, dict]]:
    """`run_in_turns` with the whole GPU, or `run_side_by_side` with so many of its multiprocessors for each job."""
    if multiprocessors is None:
        yield from run_in_turns(script, jobs, ahead=ahead)
        return
    with multiprocessors_each(multiprocessors) as env:
        yield from run_side_by_side(script, jobs, at_once=at_once, env=env)


def run_in_turns(script: str, jobs: Sequence[dict], *, ahead: int = 6) -> Iterator[tuple[dict, dict]]:
    """Run `script --one JOB` for each job; yields (job, what its last line of output said) in order.

    Each process has empty compilation caches and a folder `job["scratch"]` of its own, and calls `wait_for_turn(job)`
    when it has imported what it needs. Groups of `ahead` processes import side by side, and only when all of a group
    have does its first one go, so that nobody is timed while others import. A job that fails yields {"failed": …}.
    """
    with tempfile.TemporaryDirectory() as scratch:
        for begin in range(0, len(jobs), ahead):
            group = [_start(script, job, tempfile.mkdtemp(dir=scratch)) for job in jobs[begin : begin + ahead]]
            while not all(
                pathlib.Path(job["scratch"], "ready").exists() or run.poll() is not None for job, run in group
            ):
                time.sleep(0.2)
            for job, process in group:
                yield job, _result(job, process)


def run_side_by_side(
    script: str, jobs: Sequence[dict], *, at_once: int, env: Mapping[str, str]
) -> Iterator[tuple[dict, dict]]:
    """As `run_in_turns`, but so many at once, each on two CPU cores of its own; the first done comes first."""
    cores: queue.SimpleQueue[str] = queue.SimpleQueue()
    for number in range(at_once):
        cores.put(f"{2 * number},{2 * number + 1}")

    def run(job: dict) -> tuple[dict, dict]:
        mine = cores.get()
        with tempfile.TemporaryDirectory() as scratch:
            job, process = _start(script, job, scratch, env=env, before=["taskset", "-c", mine])
            result = _result(job, process)
        cores.put(mine)
        return job, result

    with ThreadPoolExecutor(at_once) as pool:
        for future in as_completed([pool.submit(run, job) for job in jobs]):
            yield future.result()


def wait_for_turn(job: dict) -> None:
    """In the process of a job: say that everything is imported, and wait until the others are done."""
    pathlib.Path(job["scratch"], "ready").touch()
    while not _has(job, "go"):
        time.sleep(0.05)


def device_and_versions() -> dict[str, str]:
    """What a figure belongs to: the GPU, and the versions of what computes."""
    import torch

    device = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "CPU"
    packages = ("torch", "transformers", "unsloth", "bitsandbytes")
    return {"device": device} | {name: metadata.version(name) for name in packages}


def write_csv(path: pathlib.Path, rows: Sequence[Mapping[str, Any]], columns: Mapping[str, str]) -> None:
    """Write {heading: key} of each row; floats get four decimals, what a row lacks stays empty."""
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.writer(file, lineterminator="\n")
        table.writerow(columns)
        for row in rows:
            values = [row.get(key) for key in columns.values()]
            table.writerow([round(value, 4) if isinstance(value, float) else value for value in values])


def make_models(shapes: Sequence[str], folder: str) -> dict[str, str]:
    """{shape: folder of a model of random weights}; what `folder` has already is kept."""
    folder = os.path.abspath(folder)  # the processes work in folders of their own
    for shape in shapes:
        if not pathlib.Path(folder, shape, "tokenizer_config.json").exists():
            code = f"from llama_shapes import save_model; save_model({shape!r}, {f'{folder}/{shape}'!r})"
            subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT / "tests" / "benchmarks")
    return {shape: f"{folder}/{shape}" for shape in shapes}


def _has(job: dict, mark: str) -> bool:
    return pathlib.Path(job["scratch"], mark).exists()


def _result(job: dict, process: subprocess.Popen[Any]) -> dict:
    """Let a job go, and read the last line that it says."""
    pathlib.Path(job["scratch"], "go").touch()
    process.wait()
    said = pathlib.Path(job["scratch"], "log").read_text(errors="replace").strip().splitlines() or [""]
    return {"failed": said[-1][:300]} if process.returncode else json.loads(said[-1])


def _start(
    script: str, job: dict, own: str, *, env: Mapping[str, str] | None = None, before: Sequence[str] = ()
) -> tuple[dict, subprocess.Popen[Any]]:
    job = job | {"scratch": own}
    caches = {
        "TORCHINDUCTOR_CACHE_DIR": "inductor",
        "TRITON_CACHE_DIR": "triton",
        "UNSLOTH_COMPILE_LOCATION": "unsloth",
    }
    env = os.environ | {name: f"{own}/{folder}" for name, folder in caches.items()} | (env or {}) | job.get("env", {})
    with open(f"{own}/log", "w") as log:
        command = [*before, sys.executable, script, "--one", json.dumps(job)]
        return job, subprocess.Popen(command, stdout=log, stderr=log, cwd=own, env=env)
