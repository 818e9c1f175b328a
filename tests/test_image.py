"""Reading freezes of Colab's image, and finding what the lock would break there."""

import json
import subprocess
import sys

import pytest

from helpers.environment import main
from helpers.image import (
    ROOT,
    ImageError,
    Metadata,
    Pin,
    check_image,
    compare_image,
    normal_name,
    read_freeze,
    read_lock,
    read_metadata,
    read_os_info,
    unmet,
)

LOCK = ROOT / "requirements-colab.txt"
IMAGES = ROOT / "colab-image"


def paths(month):
    return IMAGES / month / "pip-freeze.gpu.txt", IMAGES / month / "os-info-gpu.txt"


def edited(tmp_path, **versions):
    """August's freeze with other versions of some packages; None takes one out."""
    lines = paths("2026-08")[0].read_text().splitlines()
    for name, version in versions.items():
        wanted = normal_name(name)
        lines = [line for line in lines if normal_name(line.split("==")[0]) != wanted]
        lines += [f"{name}=={version}"] if version else []
    path = tmp_path / "freeze.txt"
    path.write_text("\n".join(lines))
    return path


def test_the_lock_is_clean_on_the_image_it_was_made_for():
    report = check_image(*paths("2026-08"), requirements=LOCK)
    assert report.ok and not report.conflicts
    assert {(c.package, c.before, c.after) for c in report.changed} == {
        ("datasets", "4.0.0", "3.6.0"),
        ("torchao", "0.10.0", "0.18.0"),
    }
    assert {c.package for c in report.added} | {c.package for c in report.changed} == {p.name for p in read_lock(LOCK)}
    assert {c.requires for c in report.accepted} == {"certifi>=2026.10.19"}, (
        "only what overrides.txt gives a reason for"
    )


def test_the_older_image_is_not_clean_and_the_package_that_is_too_old_is_named():
    report = check_image(*paths("2026-05"), requirements=LOCK)
    assert not report.ok
    assert {(c.package.split()[0], c.requires.split("!")[0], c.found) for c in report.conflicts} == {
        ("unsloth", "transformers", "5.0.0"),
        ("unsloth-zoo", "transformers", "5.0.0"),
    }
    assert report.python == "3.12.13" and report.torch == "2.10.0+cu128"


@pytest.mark.parametrize(
    ("package", "version", "who"),
    [
        ("transformers", "5.18.0", {"unsloth", "unsloth-zoo"}),  # past Unsloth's range
        ("torch", "2.15.0+cu128", {"unsloth", "unsloth-zoo"}),
        ("peft", "0.17.0", {"unsloth", "unsloth-zoo"}),
        ("fsspec", "2026.1.0", {"datasets"}),
        ("sentencepiece", None, {"unsloth", "unsloth-zoo"}),
    ],
)
def test_a_package_that_leaves_a_range_is_a_conflict_with_each_package_that_asks_for_it(
    tmp_path, package, version, who
):
    report = check_image(edited(tmp_path, **{package: version}), paths("2026-08")[1], requirements=LOCK)
    assert not report.ok
    assert {c.package.split()[0] for c in report.conflicts} == who
    assert all(c.requires.startswith(package) and c.found == (version or "nothing") for c in report.conflicts)


def test_a_package_of_the_image_that_needs_what_the_lock_changes_is_found_but_not_what_was_broken_before():
    image = {"datasets": "4.0.0", "needs-four": "1.0", "needs-five": "1.0", "from-an-address": None}
    metadata = {
        "datasets==3.6.0": Metadata((), ">=3.9", ("3.13",)),
        "needs-four==1.0": Metadata(("datasets>=4",)),
        "needs-five==1.0": Metadata(("datasets>=5",)),
    }
    pins = [Pin("datasets", "3.6.0")]
    report = compare_image(image, python="3.13.1", pins=pins, metadata=metadata, accepted={})
    assert [(c.package, c.requires, c.found) for c in report.conflicts] == [("needs-four 1.0", "datasets>=4", "3.6.0")]
    assert report.unread == 1


def test_a_python_without_wheels_or_outside_the_range_is_a_conflict(tmp_path):
    os_info = tmp_path / "os.txt"
    os_info.write_text("Ubuntu 26.04 LTS\nPython 3.15.0\n")
    report = check_image(paths("2026-08")[0], os_info, requirements=LOCK)
    found = {c.package.split()[0]: c.requires for c in report.conflicts}
    assert found["unsloth"] == "Python <3.15,>=3.9"
    assert found["msgspec"] == "a wheel for this Python"


def test_extras_and_foreign_platforms_are_not_asked_for():
    requires = ["mlx==0.32.4; sys_platform == 'darwin'", "pytest; extra == 'dev'", "rich>=13 ; python_version>='3.9'"]
    assert unmet(requires, {"rich": "12.0"}, python="3.13.1") == [("rich>=13", "12.0")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "no package"),
        ("# only a comment\n", "no package"),
        ("torch==2.11.0\n<html>\n", "line 2"),
        ("torch>=2\n", "line 1"),
    ],
)
def test_a_file_that_is_no_freeze_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "freeze.txt"
    path.write_text(text)
    with pytest.raises(ImageError, match=message):
        read_freeze(path)


def test_a_freeze_gives_versions_and_knows_packages_from_addresses():
    freeze = read_freeze(paths("2026-08")[0])
    assert freeze["jinja2"] == "3.1.6" and freeze["google-colab"] is None and freeze["torch"] == "2.11.0+cu128"
    assert len(freeze) == 703
    assert read_os_info(paths("2026-05")[1]) == "3.12.13"


def test_a_lock_package_without_a_record_is_an_error_and_not_a_pass():
    with pytest.raises(ImageError, match="no metadata"):
        compare_image({}, python="3.13.1", pins=[Pin("trl", "9.9")], metadata=read_metadata(), accepted={})


@pytest.mark.parametrize(("month", "status"), [("2026-08", 0), ("2026-05", 1)])
def test_the_command_says_the_same_as_text_and_as_json_and_in_its_status(month, status, capsys):
    freeze, os_info = map(str, paths(month))
    assert main(["--image", freeze, "--os", os_info]) == status
    text = capsys.readouterr().out
    assert main(["--image", freeze, "--os", os_info, "--json"]) == status
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is (status == 0)
    assert len(data["conflicts"]) == text.count("CONFLICT")
    assert "installs cleanly" in text if data["ok"] else "does not install cleanly: 2 conflicts" in text


def test_the_command_needs_nothing_but_tabulate_and_packaging_and_refuses_bad_input_in_one_line():
    code = (
        "import sys\n"
        "from helpers.environment import main\n"
        "status = main(['--image', 'no-such-file.txt'])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'psutil'} & set(sys.modules)))\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.strip() == "[]"
    assert done.stderr.strip() == "no-such-file.txt: found no such file, expected a text file. Fix: check the path."


def test_the_table_as_html_has_the_facts_of_the_text():
    report = check_image(*paths("2026-05"), requirements=LOCK)
    html = report._repr_html_()
    for fact in ("0.10.0 -&gt; 0.18.0", "CONFLICT", "finds 5.0.0", "2 conflicts"):
        assert fact in html
