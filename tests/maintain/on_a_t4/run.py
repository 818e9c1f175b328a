# @title Run the chapters, and pack what they made
import json
import os
import subprocess
import sys
import tarfile


def run(*command, check=True):
    """Show what a command says while it says it."""
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "0", "HF_HUB_OFFLINE": "0"}  # one T4, where Kaggle has two
    options = dict(stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=place, env=environment)  # noqa: F821
    process = subprocess.Popen(command, **options)
    for line in process.stdout:
        print(line, end="", flush=True)
    if process.wait() and check:
        raise SystemExit(f"{command} ended with status {process.returncode}")


job = json.loads((place / "job.json").read_text(encoding="utf-8"))  # noqa: F821 (the cell before this one)
try:
    run("nvidia-smi")
    run(sys.executable, "-c", "from helpers.environment import set_up; print(set_up())")
    run(sys.executable, "-m", "tests.maintain.series", *job["chapters"], "-f", f"{job['profile']}.toml", check=False)
finally:
    with tarfile.open(job["archive"], "w:gz") as archive:
        for pattern in ("*.json", "numbers/*", "executed/*"):
            for path in (place / "run").glob(pattern):  # noqa: F821
                archive.add(path, path.relative_to(place / "run"))  # noqa: F821
