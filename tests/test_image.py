"""Reading freezes of Colab's image, and finding what the lock would break there."""

import json
import subprocess
import sys

import pytest

from helpers.base import ROOT, InputError
from helpers.environment.requirements import Pin, normal_name, read_lock, unmet
from helpers.environment.setup import RUNTIME_VERSION
from tests.maintain.image import Metadata, check_image, compare_image, main, read_freeze, read_metadata, read_os_info

LOCK = ROOT / "requirements-colab.txt"
IMAGES = ROOT / "tests" / "colab-image"


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
    assert report.ok and not report.conflicts and not report.hurt
    assert {(c.package, c.before, c.after) for c in report.changed} == {
        ("certifi", "2026.7.22", "2026.10.19.post1"),
        ("datasets", "4.0.0", "3.6.0"),
        ("torchao", "0.10.0", "0.18.0"),
    }
    image = read_freeze(paths("2026-08")[0])
    assert {c.package for c in report.added} == {p.name for p in read_lock(LOCK) if p.name not in image}


@pytest.mark.parametrize(
    ("month", "conflicts"),
    [
        ("2026-07", set()),
        ("2026-05", set()),
        ("2026-04", set()),
        ("2026-01", {("xformers", "torch>=2.10", "2.9.0+cu126")}),
    ],
)
def test_colabs_past_images_are_judged(month, conflicts):
    report = check_image(*paths(month), requirements=LOCK)
    assert {(c.package.split()[0], c.requires, c.found) for c in report.conflicts} == conflicts


def test_the_runtime_that_the_setup_cell_advises_is_one_on_which_the_lock_is_clean():
    assert check_image(*paths(RUNTIME_VERSION.replace(".", "-")), requirements=LOCK).ok


@pytest.mark.parametrize(
    ("package", "version", "who"),
    [
        ("torch", "2.15.0+cu128", {"unsloth", "unsloth-zoo"}),  # past Unsloth's range
        ("torch", "2.9.1+cu128", {"xformers"}),
        ("pyarrow", "14.0.0", {"datasets"}),
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


@pytest.mark.parametrize("package", ["transformers", "peft", "accelerate", "tokenizers", "huggingface_hub", "fsspec"])
def test_what_the_lock_pins_may_move_on_in_the_image(tmp_path, package):
    report = check_image(edited(tmp_path, **{package: "2099.1"}), paths("2026-08")[1], requirements=LOCK)
    assert report.ok and normal_name(package) in {c.package for c in report.changed}


@pytest.mark.parametrize(("torch", "met"), [("2.12.0", True), ("2.14.1", True), ("2.15.0", False)])
def test_the_report_says_who_accepts_the_images_torch(tmp_path, torch, met):
    report = check_image(edited(tmp_path, torch=torch), paths("2026-08")[1], requirements=LOCK)
    said = dict(limit.split(" asks for ") for limit in report.torch_limits)
    assert {"bitsandbytes", "unsloth", "unsloth-zoo", "xformers"} <= set(said)
    assert said["unsloth"] == "torch<2.15.0,>=2.4.0: " + ("met" if met else "NOT met") and report.ok is met
    assert said["xformers"].endswith(": met") and said["bitsandbytes"].endswith(": met")


def test_a_package_that_the_series_does_not_import_is_hurt_and_one_that_it_imports_conflicts():
    image = {"datasets": "4.0.0", "needs-four": "1.0", "dill": "0.3.8"}
    metadata = {
        "datasets==3.6.0": Metadata(("dill",), ">=3.9", ("3.13",)),
        "needs-four==1.0": Metadata(("datasets>=4",)),
        "dill==0.3.8": Metadata(()),
    }
    arguments = {"python": "3.13.1", "pins": [Pin("datasets", "3.6.0")]}
    report = compare_image(image, metadata=metadata, **arguments)
    assert report.ok and [(c.package, c.found) for c in report.hurt] == [("needs-four 1.0", "3.6.0")]
    assert repr(report).count("needs-four") == 1
    metadata["dill==0.3.8"] = Metadata(("needs-four",))  # now datasets imports it, through dill
    report = compare_image(image, metadata=metadata, **arguments)
    assert not report.ok and not report.hurt and [c.package for c in report.conflicts] == ["needs-four 1.0"]


def test_what_the_image_itself_breaks_counts_only_where_the_series_needs_it():
    image = {"datasets": "4.0.0", "needs-five": "1.0", "from-an-address": None, "dill": "0.3.8", "old": "1"}
    metadata = {
        "datasets==3.6.0": Metadata(("dill",), ">=3.9", ("3.13",)),
        "needs-five==1.0": Metadata(("datasets>=5", "old>=2")),
        "dill==0.3.8": Metadata(()),
    }
    arguments = {"python": "3.13.1", "pins": [Pin("datasets", "3.6.0")]}
    report = compare_image(image, metadata=metadata, **arguments)
    assert report.ok and not report.hurt and report.unread == 2
    metadata["dill==0.3.8"] = Metadata(("old>=2",))
    report = compare_image(image, metadata=metadata, **arguments)
    assert [(c.package, c.requires, c.found) for c in report.conflicts] == [("dill 0.3.8", "old>=2", "1")]


def test_what_a_future_image_asks_for_is_read_from_beside_its_freeze(tmp_path):
    freeze = edited(tmp_path, nbclient="0.11.0")
    os_info = paths("2026-08")[1]
    assert check_image(freeze, os_info, requirements=LOCK).ok
    (tmp_path / "metadata.json").write_text('{"nbclient==0.11.0": {"requires": ["jupyter_client>=8"]}}')
    report = check_image(freeze, os_info, requirements=LOCK)
    assert [(c.package, c.requires) for c in report.conflicts] == [("nbclient 0.11.0", "jupyter_client>=8")]


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
        ("<!DOCTYPE html>\n", "line 1"),
        ("torch==abc\n", "line 1: found abc"),
        ("torch==2.11.0\n-e git+https://example.org/x\n", "line 2"),
    ],
)
def test_a_file_that_is_no_freeze_is_refused_with_its_line(tmp_path, text, message):
    path = tmp_path / "freeze.txt"
    path.write_text(text)
    with pytest.raises(InputError, match=message):
        read_freeze(path)


def test_a_freeze_with_windows_line_ends_a_mark_and_addresses_is_read(tmp_path):
    path = tmp_path / "freeze.txt"
    path.write_bytes("\ufeffJinja2==3.1.6\r\nx @ https://example.org/x.zip\r\n\r\ntorch==2.11.0+cu128\r\n".encode())
    assert read_freeze(path) == {"jinja2": "3.1.6", "x": None, "torch": "2.11.0+cu128"}
    path.write_bytes("torch==2.11.0\n".encode("utf-16"))
    with pytest.raises(InputError, match="not UTF-8"):
        read_freeze(path)


def test_a_freeze_without_torch_is_not_taken_for_an_image(tmp_path):
    with pytest.raises(InputError, match="found no torch"):
        check_image(edited(tmp_path, torch=None), paths("2026-08")[1], requirements=LOCK)


def test_a_freeze_gives_versions_and_knows_packages_from_addresses():
    freeze = read_freeze(paths("2026-08")[0])
    assert freeze["jinja2"] == "3.1.6" and freeze["google-colab"] is None and freeze["torch"] == "2.11.0+cu128"
    assert len(freeze) == 703
    assert read_os_info(paths("2026-05")[1]) == "3.12.13"


def test_a_lock_package_without_a_record_is_an_error_and_not_a_pass():
    with pytest.raises(InputError, match="no metadata"):
        compare_image({}, python="3.13.1", pins=[Pin("trl", "9.9")], metadata=read_metadata())


@pytest.mark.parametrize(("month", "status"), [("2026-08", 0), ("2026-01", 1)])
def test_the_command_says_the_same_as_text_and_as_json_and_in_its_status(month, status, capsys):
    folder = str(IMAGES / month)
    assert main([folder]) == status
    text = capsys.readouterr().out
    assert main([folder, "--json"]) == status
    data = json.loads(capsys.readouterr().out)
    assert data["ok"] is (status == 0)
    assert len(data["conflicts"]) == text.count("CONFLICT")
    assert "installs cleanly" in text if data["ok"] else "does not install cleanly: 1 conflict" in text


def test_the_command_needs_nothing_but_tabulate_and_packaging_and_refuses_bad_input_in_one_line():
    code = (
        "import sys\n"
        "from tests.maintain.image import main\n"
        "status = main(['no-such-folder'])\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'psutil'} & set(sys.modules)))\n"
        "sys.exit(status)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout.strip() == "[]"
    said = "no-such-folder/pip-freeze.gpu.txt: found no such file, expected a text file. Fix: check the path."
    assert done.stderr.strip() == said


def test_the_table_as_html_has_the_facts_of_the_text():
    report = check_image(*paths("2026-01"), requirements=LOCK)
    html = report._repr_html_()
    for fact in ("0.10.0 -&gt; 0.18.0", "CONFLICT", "finds 2.9.0+cu126", "1 conflict"):
        assert fact in html
