"""The lock itself, how it is made, and the workflow that watches Colab's image, step by step."""

import os
import re
import shutil
import sys

import pytest

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
