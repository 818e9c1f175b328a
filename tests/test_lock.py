"""The lock itself, how it is made, images of other days, and uv's second opinion on them."""

import os
import re
import shutil
import sys

import pytest
from packaging.specifiers import Specifier, SpecifierSet

from helpers.base import ROOT, InputError
from helpers.environment.requirements import read_lock, read_needs
from tests.maintain.future import change_freeze, main, make_future, newest_versions, touched_packages
from tests.maintain.image import LOCK, Metadata, check_image, read_freeze, read_metadata, read_os_info
from tests.maintain.lock import (
    IMAGE,
    THE_IMAGES_OWN,
    WANTED,
    excludes_newer,
    limits,
    lock_text,
    make_lock,
    needs_lines,
    resolve,
    resolve_conflict,
    tightest,
)

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
peft==0.20.0 \\
    --hash=sha256:dd
    # via trl
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
RECORDS = {
    "datasets==3.6.0": Metadata(("numpy>=1.17",), ">=3.9"),
    "trl==0.29.1": Metadata(("datasets", "peft<0.21", "torch>=2.4,<2.15", "tyro"), ">=3.10"),
    "peft==0.20.0": Metadata(("torch",), ">=3.10"),
    "tyro==1.0.17": Metadata(()),
}


def test_a_lock_has_what_the_image_lacks_or_may_move_out_of_a_limit_and_says_why_each_row_is_there():
    image = {"datasets": "4.0.0", "numpy": "2.1.3", "torch": "2.11.0+cu128", "peft": "0.20.0"}
    reasons = {"datasets": "too new", "trl": "the trainer"}
    text = lock_text(RESOLVED, image=image, reasons=reasons, records=RECORDS, python="3.13.1", title="# head")
    assert text.splitlines() == [
        "# head",
        "#: numpy>=1.17  datasets",
        "#: python>=3.10  peft, trl",
        "#: torch<2.15,>=2.4  trl",
        "# too new (image: 4.0.0)",
        "datasets==3.6.0 \\",
        "    --hash=sha256:aa \\",
        "    --hash=sha256:bb",
        "# trl asks for peft<0.21 (image: 0.20.0)",
        "peft==0.20.0 \\",
        "    --hash=sha256:dd",
        "# the trainer (not in the image)",
        "trl==0.29.1 \\",
        "    --hash=sha256:ee",
        "# needed by trl, unsloth (not in the image)",
        "tyro==1.0.17 \\",
        "    --hash=sha256:ff",
    ]


VERSIONS = {
    "trl": "1",
    "peft": "0.20",
    "tqdm": "4",
    "hub": "1.27",
    "torch": "2.11",
    "safetensors": "0.8",
    "torchvision": "0.26",
}


@pytest.mark.parametrize(
    ("asks", "limited"),
    [
        ({"trl": ["peft<0.21"]}, {"peft"}),
        ({"trl": ["peft!=0.21.*"]}, {"peft"}),
        ({"trl": ["peft!=0.11.0"], "app": ["peft"]}, set()),  # only an older version is excluded
        ({"trl": ["peft>=0.18"], "app": ["peft"]}, set()),  # somebody outside PyTorch's stack asks for it too
        ({"trl": ["torch", "peft>=0.18"]}, {"peft"}),  # nobody else does
        ({"trl": ["torch", "peft"]}, set()),  # any version will do
        ({"trl": ["peft"], "peft": ["huggingface-hub"], "app": ["peft"]}, {"peft", "huggingface-hub"}),  # of the stack
        (
            {"trl": ["peft<1"], "peft": ["hub<2"], "hub": ["tqdm==4.*"]},
            {"peft", "hub", "tqdm"},
        ),  # limits of limited ones
        ({"trl": ["torch<2.15", "torchvision==0.26"]}, set()),  # the image's own
        ({"app": ["peft<0.21"]}, set()),  # nothing that is locked
    ],
)
def test_what_is_limited_is_found_in_the_metadata(asks, limited):
    assert set(limits(["trl"], versions=VERSIONS, requires=asks, python="3.13.1")) == limited


def test_the_reason_names_the_bound_that_matters_whoever_is_asked_first():
    requires = {"trl": ["torch", "peft>=0.18", "hub>=1"], "hub": ["peft>=0.1,<0.21"], "app": ["hub"]}
    limited = limits(["trl", "hub"], versions=VERSIONS, requires=requires, python="3.13.1")
    assert limited == {"peft": "hub asks for peft<0.21"}
    del requires["hub"]
    assert limits(["trl"], versions=VERSIONS, requires=requires, python="3.13.1") == {"peft": "moves together with trl"}


@pytest.mark.parametrize(
    ("bound", "excludes"),
    [("<2", True), ("<=1.5", True), ("==1.*", True), ("~=1.4", True)]
    + [("!=1.6.0", True), ("!=2.*", True), (">=1", False), (">1.4", False), ("!=1.0", False), ("!=1.4.*", False)],
)
def test_a_bound_that_excludes_something_newer_is_told_from_one_that_does_not(bound, excludes):
    assert excludes_newer(Specifier(bound), "1.5") is excludes


def test_many_bounds_are_said_by_the_tightest():
    assert tightest(SpecifierSet(">=1.9,>=1.17,>1.3,<3,<=4,!=2.5,==2.*")) == "!=2.5,<3,==2.*,>=1.17"
    assert tightest([]) == ""


def test_the_image_must_have_a_line_for_each_package_outside_the_lock():
    requires = {"trl": ["peft", "torch>=2.4", "python>=3.10"], "peft": ["torch<3", "numpy"]}
    assert needs_lines(requires, python="3.13.1") == [
        "#: numpy  peft",
        "#: python>=3.10  trl",
        "#: torch<3,>=2.4  trl, peft",
    ]


def test_every_row_of_the_lock_has_a_reason_hashes_and_a_record():
    text = LOCK.read_text(encoding="utf-8")
    pins, metadata = read_lock(LOCK), read_metadata()
    assert all(pin.reason for pin in pins)
    for block in re.split(r"\n(?=# )", text)[4:]:
        assert re.search(r"^\S+==\S+ \\\n(    --hash=sha256:[0-9a-f]{64}( \\\n|\n?$))+", block, re.MULTILINE), block
    assert {f"{pin.name}=={pin.version}" for pin in pins} <= set(metadata)
    assert f"Python {read_os_info(IMAGE / 'os-info-gpu.txt')}" in text and IMAGE.name in text
    assert f"torch {read_freeze(IMAGE / 'pip-freeze.gpu.txt')['torch']}" in text
    assert any(need.requirement.startswith("torch<2.15") and "unsloth" in need.askers for need in read_needs(LOCK))


def test_the_lock_names_no_place_to_fetch_from():
    for path in (LOCK, ROOT / "tests/requirements-local.txt", WANTED):
        assert "://" not in path.read_text(encoding="utf-8"), path.name


def test_the_lock_pins_what_unsloth_limits_and_leaves_the_image_its_own():
    locked = {pin.name for pin in read_lock(LOCK)}
    assert {"transformers", "peft", "accelerate", "tokenizers", "huggingface-hub", "safetensors", "datasets"} <= locked
    assert not locked & {*THE_IMAGES_OWN, "pandas", "packaging", "tqdm", "ipython", "pillow"}


@pytest.mark.slow
def test_making_the_lock_again_gives_the_same_lock():
    """Needs the package index; skips where it does not answer."""
    try:
        again = make_lock(IMAGE, read_metadata())
    except InputError as error:
        pytest.skip(str(error)[-300:])
    assert again == LOCK.read_text(encoding="utf-8")


def test_a_wish_that_nothing_fulfils_shows_uvs_own_message():
    if shutil.which("uv", path=os.path.dirname(sys.executable)) is None and shutil.which("uv") is None:
        pytest.skip("uv is not installed")
    with pytest.raises(InputError, match="your requirements are unsatisfiable"):
        resolve(["trl==0.29.1", "trl==0.29.0"], image={}, python="3.13")


# Images of other days


def test_a_freeze_of_another_day_has_other_versions_and_all_else_as_it_was():
    text = "Jinja2==3.1.6\nx @ file:///x.whl\ntorch==2.11.0+cu128\n"
    assert (
        change_freeze(text, {"jinja2": "3.2", "new": "1"})
        == "Jinja2==3.2\nx @ file:///x.whl\ntorch==2.11.0+cu128\nnew==1\n"
    )
    assert change_freeze(text, {}) == text


def test_the_packages_that_the_series_touches_are_those_it_pins_or_asks_for_but_torch():
    image = read_freeze(IMAGE / "pip-freeze.gpu.txt")
    names = touched_packages(image, pins=read_lock(LOCK), metadata=read_metadata(), python="3.13.15")
    assert {"transformers", "datasets", "numpy", "pandas", "pyarrow", "fsspec", "protobuf"} <= set(names)
    assert not {"torch", "triton", "torchvision", "trl", "tensorflow"} & set(names)


def test_a_day_that_is_none_and_a_version_that_no_index_has_are_refused(tmp_path, capsys):
    with pytest.raises(InputError, match="DATE: found 'tomorrow'.*up to today"):
        newest_versions(["trl"], date="tomorrow", python="3.13")
    with pytest.raises(InputError, match="DATE: found '2999-01-01'.*up to today"):
        newest_versions(["trl"], date="2999-01-01", python="3.13")
    arguments = ["--date", "2026-11-28", "--out", str(tmp_path / "out")]
    assert main([*arguments, "--image", str(tmp_path)]) == 2 and not (tmp_path / "out").exists()
    assert "no such file" in capsys.readouterr().err


DAY = "2026-11-28"  # versions of a day never change, so uv's answer is the same on any later one


@pytest.mark.slow
@pytest.mark.parametrize(
    ("packages", "clean"),
    [
        (["transformers", "peft", "accelerate", "datasets", "tokenizers", "huggingface-hub", "trl"], True),
        (["numpy", "pandas", "pyarrow"], True),
        (["torch==2.14.1"], True),
        (["torch==2.15.0"], False),
    ],
)
def test_uv_agrees_with_the_verdict_on_an_image_of_another_day(tmp_path, packages, clean):
    """Needs the package index; skips where it does not answer."""
    try:
        changes = make_future(IMAGE, date=DAY, out=tmp_path, only=packages)
        assert set(changes) == {package.partition("==")[0] for package in packages}
        freeze = tmp_path / "pip-freeze.gpu.txt"
        why = resolve_conflict(read_lock(LOCK), image=read_freeze(freeze), python="3.13")
    except InputError as error:
        pytest.skip(str(error)[-300:])
    if "Failed to fetch" in why or "error sending request" in why:
        pytest.skip(why[-300:])
    report = check_image(freeze, tmp_path / "os-info-gpu.txt", requirements=LOCK)
    assert report.ok is clean and (why == "") is clean, (report, why)
    assert clean or "torch" in why


def test_uv_disagrees_where_the_image_lacks_what_the_lock_asks_for():
    image = dict(read_freeze(IMAGE / "pip-freeze.gpu.txt"))
    del image["entrypoints"]
    try:
        why = resolve_conflict(read_lock(LOCK), image=image, python="3.13")
    except InputError as error:
        pytest.skip(str(error)[-300:])
    if "Failed to fetch" in why or "error sending request" in why:
        pytest.skip(why[-300:])
    assert why == "the image has no entrypoints"
