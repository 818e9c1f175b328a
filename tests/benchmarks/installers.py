"""How long the setup cell's install takes with uv and with pip: same lock, same machine, no cache, new environments.

python tests/benchmarks/installers.py [ROUNDS]

Both download from the package index. pip compiles bytecode as it installs, uv leaves that to the first import; that is
how the setup cell uses them.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from helpers.base import text_table  # noqa: E402
from tests.maintain.lock import LOCK, find_uv  # noqa: E402


def seconds_to_install(installer: str) -> float:
    """Wall seconds of one install into a new virtual environment."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        python = str(Path(folder, "bin", "python"))
        command = {
            "uv": [find_uv(), "pip", "install", "--quiet", "--no-cache", "--python", python],
            "pip": [python, "-m", "pip", "install", "--quiet", "--no-cache-dir"],
        }[installer]
        start = time.perf_counter()
        subprocess.run([*command, "--no-deps", "--require-hashes", "-r", str(LOCK)], check=True)
        return time.perf_counter() - start


def main(rounds: int) -> None:
    """Print each installer's times in turn, their medians, and the ratio."""
    times: dict[str, list[float]] = {"uv": [], "pip": []}
    for _ in range(rounds):
        for installer, seconds in times.items():
            seconds.append(seconds_to_install(installer))
    medians = {installer: statistics.median(seconds) for installer, seconds in times.items()}
    rows = [[i, f"{medians[i]:.1f}", ", ".join(f"{s:.1f}" for s in seconds)] for i, seconds in times.items()]
    print(text_table(["installer", "median seconds", "each round"], rows))
    print(f"pip takes {medians['pip'] / medians['uv']:.1f} times as long as uv.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rounds", nargs="?", type=int, default=3)
    main(parser.parse_args().rounds)
