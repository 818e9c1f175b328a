"""The whole series on the cpu profile, as a test: `make test` runs it beside the others, `make unit` does not."""

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent


def test_every_chapter_runs_to_its_end():
    command = [sys.executable, "-m", "helpers.series", "--fresh", "-p", "PROFILE", "cpu"]
    done = subprocess.run([*command, "-p", "RUN_DIR", str(ROOT / "runs" / "test")], cwd=ROOT)
    assert done.returncode == 0
