"""The whole series with a laptop's choices, as a test: `make test` runs it beside the others, `make unit` does not."""

import subprocess
import sys

from helpers.base import ROOT


def test_every_chapter_runs_to_its_end():
    command = [sys.executable, "-m", "tests.maintain.series", "--fresh", "-f", "tests/profiles/cpu.toml"]
    elsewhere = ["-p", "RUN_DIR", "runs/test", "-p", "OUTPUT_DIR", "runs/test/quickstart"]
    elsewhere += ["-p", "SCALED_DIR", "runs/test/scaled"]
    done = subprocess.run([*command, *elsewhere], cwd=ROOT)
    assert done.returncode == 0
