"""The lock itself, how it is made, and the workflow that watches Colab's image, step by step."""

import json
import os
import re
import shutil
import subprocess
import sys

import pytest
import yaml

from helpers.errors import InputError
from helpers.image import OVERRIDES, ROOT, public, read_freeze, read_lock, read_metadata, read_os_info, read_reasons
from helpers.lock import IMAGE, IMAGES, LOCK, find_uv, lock_text, resolve

RESOLVED = """\
datasets==3.6.0 \\
    --hash=sha256:aa \\
    --hash=sha256:bb
    # via
    #   -r wanted.in
    #   trl
numpy==2.1.3 \\
    --hash=sha256:cc
    # via datasets
torch==2.11.0 \\
    --hash=sha256:dd
    # via trl
trl==0.29.1 \\
    --hash=sha256:ee
    # via -r wanted.in
tyro==1.0.17 \\
    --hash=sha256:ff
    # via
    #   trl
    #   unsloth
"""


def test_a_lock_keeps_only_what_the_image_lacks_and_says_why_each_row_is_there():
    image = {"datasets": "4.0.0", "numpy": "2.1.3", "torch": "2.11.0+cu128"}
    reasons = {"datasets": "too new", "trl": "the trainer"}
    assert lock_text(RESOLVED, image=image, reasons=reasons, title="# head").splitlines() == [
        "# head",
        "# too new (image: 4.0.0)",
        "datasets==3.6.0 \\",
        "    --hash=sha256:aa \\",
        "    --hash=sha256:bb",
        "# the trainer (not in the image)",
        "trl==0.29.1 \\",
        "    --hash=sha256:ee",
        "# needed by trl, unsloth (not in the image)",
        "tyro==1.0.17 \\",
        "    --hash=sha256:ff",
    ]


def test_every_row_of_the_lock_has_a_reason_hashes_and_a_record():
    text = LOCK.read_text(encoding="utf-8")
    pins, metadata = read_lock(LOCK), read_metadata()
    assert all(pin.reason for pin in pins)
    for block in re.split(r"\n(?=# )", text)[3:]:
        assert re.search(r"^\S+==\S+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\\n|\n?$))+", block, re.MULTILINE), block
    assert {f"{pin.name}=={pin.version}" for pin in pins} <= set(metadata)
    assert f"Python {read_os_info(IMAGE / 'os-info-gpu.txt')}" in text and IMAGE.name in text
    assert f"torch {read_freeze(IMAGE / 'pip-freeze.gpu.txt')['torch']}" in text


def test_the_lock_names_no_place_to_fetch_from():
    for name in (
        "requirements-colab.txt",
        "requirements-local.txt",
        "colab-image/wanted.in",
        "colab-image/overrides.txt",
    ):
        assert "://" not in (ROOT / name).read_text(encoding="utf-8"), name


def test_what_the_image_has_and_the_series_relies_on_is_left_alone():
    locked = {pin.name for pin in read_lock(LOCK)}
    assert not locked & {"torch", "numpy", "protobuf", "pyarrow", "transformers", "peft", "accelerate", "sentencepiece"}
    assert all(read_reasons(OVERRIDES).values()), "what is set aside has a reason"


@pytest.mark.slow
def test_making_the_lock_again_gives_the_same_lock(tmp_path):
    """Needs the package index; skips where it does not answer."""
    try:
        find_uv()
        image = read_freeze(IMAGE / "pip-freeze.gpu.txt")
        resolved = resolve(IMAGES / "wanted.in", overrides=OVERRIDES, image=image, python="3.13", previous=LOCK)
    except InputError as error:
        pytest.skip(str(error)[-300:])
    title = "\n".join(LOCK.read_text(encoding="utf-8").splitlines()[:3])
    again = lock_text(resolved, image=image, reasons=read_reasons(IMAGES / "wanted.in"), title=title)
    (tmp_path / "lock.txt").write_text(again)
    assert read_lock(tmp_path / "lock.txt") == read_lock(LOCK)
    for pin in read_lock(LOCK):
        assert public(image.get(pin.name) or "") != pin.version


def test_a_wish_that_nothing_fulfils_shows_uvs_own_message(tmp_path):
    if shutil.which("uv", path=os.path.dirname(sys.executable)) is None and shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    wanted = tmp_path / "wanted.in"
    wanted.write_text("trl==0.29.1\ntrl==0.29.0\n")
    with pytest.raises(InputError, match="your requirements are unsatisfiable"):
        resolve(wanted, overrides=OVERRIDES, image={}, python="3.13", previous=tmp_path / "none.txt")


# The workflow: its own steps, run by bash as a runner does. Only `gh` and the address of Google's repository are ours.

WORKFLOW = yaml.safe_load((ROOT / ".github" / "workflows" / "image-drift.yml").read_text(encoding="utf-8"))
STEPS = {step.get("name"): step for step in WORKFLOW["jobs"]["drift"]["steps"]}
GH = """#!/bin/sh
echo "$*" >> "$CALLS"
if [ "$1 $2" = "issue list" ]; then echo "$OPEN_ISSUE"; fi
"""


class Runner:
    """One run of the job on an image of ours."""

    def __init__(self, folder, month):
        self.folder, self.calls, self.output = folder, folder / "calls.txt", folder / "output.txt"
        upstream = folder / "upstream"
        shutil.copytree(IMAGES / month, upstream)
        git = ["git", "-C", str(upstream), "-c", "user.name=t", "-c", "user.email=t@localhost"]
        for command in (["init", "-q"], ["add", "."], ["commit", "-qm", month]):
            subprocess.run([*git, *command], check=True)
        programs = folder / "bin"
        programs.mkdir()
        (programs / "gh").write_text(GH)
        (programs / "gh").chmod(0o755)
        self.output.touch()
        self.calls.touch()
        address = re.search(r"https://\S+", STEPS["Fetch the image's package list"]["run"])[0]
        self.env = {
            **os.environ,
            "PATH": f"{programs}:{os.path.dirname(sys.executable)}:/usr/bin:/bin",
            "RUNNER_TEMP": str(folder),
            "GITHUB_OUTPUT": str(self.output),
            "CALLS": str(self.calls),
            "OPEN_ISSUE": "",
            "FETCH": "",  # the package index is another test's affair
            "GIT_CONFIG_COUNT": "1",
            "GIT_CONFIG_KEY_0": f"url.file://{upstream}.insteadOf",
            "GIT_CONFIG_VALUE_0": address,
        }

    def step(self, name, **env):
        step = STEPS[name]
        own = {key: value for key, value in step.get("env", {}).items() if "${{" not in value}
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", step["run"]],
            cwd=ROOT,
            env={**self.env, **own, **env},
            capture_output=True,
            text=True,
        )


def test_a_clean_image_opens_no_issue(tmp_path):
    runner = Runner(tmp_path, "2026-08")
    assert runner.step("Fetch the image's package list").returncode == 0
    done = runner.step("Check the lock against it")
    assert done.returncode == 0 and "the lock installs cleanly" in done.stdout
    assert runner.output.read_text() == "fits=true\n"
    assert STEPS["Open an issue"]["if"] == "${{ steps.check.outputs.fits == 'false' }}"


@pytest.mark.parametrize(("open_issue", "call"), [("", "issue create --title"), ("7", "issue edit 7")])
def test_an_image_that_conflicts_opens_one_issue_with_the_table(tmp_path, open_issue, call):
    runner = Runner(tmp_path, "2026-05")
    runner.step("Fetch the image's package list")
    assert runner.step("Check the lock against it").returncode == 0, "the job goes on to the issue"
    assert runner.output.read_text() == "fits=false\n"
    done = runner.step("Open an issue", OPEN_ISSUE=open_issue)
    assert done.returncode == 0, done.stderr
    assert [line.startswith(call) for line in runner.calls.read_text().splitlines()] == [False, True]
    body = (tmp_path / "body.md").read_text()
    assert (
        len(re.findall("^CONFLICT ", body, re.MULTILINE)) == 2
        and "finds 5.0.0" in body
        and re.search(r"commit [0-9a-f]{7} of", body)
    )


def test_a_list_that_cannot_be_read_fails_the_job_and_opens_no_issue(tmp_path):
    runner = Runner(tmp_path, "2026-08")
    runner.step("Fetch the image's package list")
    (tmp_path / "image" / "pip-freeze.gpu.txt").write_text("<html>not found</html>\n")
    assert runner.step("Check the lock against it").returncode == 2
    shutil.rmtree(tmp_path / "image")
    assert runner.step("Check the lock against it").returncode == 2
    crash = runner.step("Check the lock against it", PYTHONPATH=str(tmp_path), PYTHONHOME=str(tmp_path))
    assert crash.returncode == 2, "a Python that does not even start ends with 1"
    assert runner.output.read_text() == ""


def test_the_check_needs_no_more_than_the_job_installs(tmp_path):
    """In a bare environment with only the packages of the install step."""
    pins = {pin.name: pin.version for pin in read_lock(ROOT / "requirements-local.txt")}
    wanted = re.search(r"\^\((\S+?)\)==", STEPS["Install what the check needs"]["run"])[1].split("|")
    assert set(wanted) <= set(pins)
    code = (
        "import importlib.abc, sys\n"
        f"allowed = {{*sys.stdlib_module_names, 'helpers', *{wanted!r}}}\n"
        "class Bare(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path, target=None):\n"
        "        if name.split('.')[0] not in allowed and '_' != name[0]:\n"
        "            raise ModuleNotFoundError(name)\n"
        "sys.meta_path.insert(0, Bare())\n"
        "from helpers.environment import main\n"
        f"sys.exit(main(['--image', {str(IMAGE / 'pip-freeze.gpu.txt')!r}, '--json']))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["ok"] is True
