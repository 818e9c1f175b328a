"""What the README says of Unsloth's files under the AGPL is true of the versions that are installed and pinned."""

import importlib.metadata
import re
from types import SimpleNamespace

import pytest

from helpers.base import ROOT
from helpers.environment.requirements import normal_name, read_lock
from tests.maintain import licences
from tests.maintain.licences import count_agpl, find_package, imported_agpl, is_agpl

README = (ROOT / "README.md").read_text(encoding="utf-8")
DETAILS = (ROOT / "tests/README.md").read_text(encoding="utf-8")
SITES = find_package("unsloth").parent
NOTICE = """\
# Unsloth Zoo - Utilities for Unsloth
#
# it under the terms of the GNU {} General Public License as published by
# the Free Software Foundation, either version 3 of the License, or

import os
"""


@pytest.mark.parametrize(
    ("text", "agpl"),
    [
        (NOTICE.format("Affero"), True),
        (NOTICE.format("Lesser"), False),
        ("# SPDX-License-Identifier: AGPL-3.0-only\n", True),
        ("# SPDX-License-Identifier: AGPL-3.0-or-later\nimport os\n", True),
        ("# SPDX-License-Identifier: LGPL-3.0-or-later\n", False),
        ("# SPDX-License-Identifier: Apache-2.0\n", False),
        ('# Licensed under the Apache License, Version 2.0 (the "License");\n', False),
        ("\n#!/usr/bin/env python3\n\n" + NOTICE.format("Affero"), True),
        ("import os\n\n" + NOTICE.format("Affero"), False),  # no header: code comes before it
        ('"""Not under the GNU Affero General Public License."""\n', False),
        ("# All Unsloth Zoo code licensed under AGPL3\n", False),  # said of functions, not of files
        ("", False),
    ],
)
def test_a_header_is_told_from_other_licences_and_from_what_is_said_further_down(tmp_path, text, agpl):
    path = tmp_path / "file.py"
    path.write_text(text)
    assert is_agpl(path) is agpl


def test_every_python_file_of_a_folder_is_counted_and_no_other(tmp_path):
    (tmp_path / "inner/more").mkdir(parents=True)
    for name, licence in (("a.py", "Affero"), ("inner/b.py", "Lesser"), ("inner/more/c.py", "Affero")):
        (tmp_path / name).write_text(NOTICE.format(licence))
    for name in ("COPYING", "inner/d.pyc", "inner/e.txt"):
        (tmp_path / name).write_text(NOTICE.format("Affero"))
    assert count_agpl(tmp_path) == (2, 3)


def test_an_imported_file_is_named_once_and_one_outside_the_packages_by_its_path(tmp_path, monkeypatch):
    copy = tmp_path / "moe_utils.py"
    copy.write_text(NOTICE.format("Affero"))
    kernel = str(SITES / "unsloth/kernels/nf4.py")
    loaded = [kernel, kernel, str(SITES / "unsloth/save.py"), str(copy), None, str(tmp_path / "lost.py"), "built-in"]
    modules = {str(number): SimpleNamespace(__file__=file) for number, file in enumerate(loaded)}
    monkeypatch.setattr(licences, "sys", SimpleNamespace(modules=modules))
    assert imported_agpl() == sorted([str(copy), "unsloth/kernels/nf4.py"])


ROW = re.compile(r"^\| `(\w+)/`.*? \| `(\w+)` (\S+) \| (\d+) \| (\d+) \| (\d+) \| (\d+) \|$", re.MULTILINE)
ROWS = {row[0]: row for row in ROW.findall(DETAILS)}


def test_the_readme_counts_every_folder_that_the_packages_install():
    folders = set()
    for package in licences.PACKAGES:
        files = importlib.metadata.files(package)
        folders |= {file.parts[0] for file in files if file.suffix == ".py" and len(file.parts) > 1}
    assert set(ROWS) == folders


@pytest.mark.parametrize("folder", ROWS)
def test_the_readme_counts_right(folder):
    """After another version: `python -m tests.maintain.licences`, and with --run for the lists of imports."""
    _, package, version, files, agpl, *_ = ROWS[folder]
    assert (int(agpl), int(files)) == count_agpl(SITES / folder)
    pinned = {pin.name: pin.version for pin in read_lock(ROOT / "requirements-colab.txt")}
    assert version == importlib.metadata.version(package) == pinned[normal_name(package)]


def test_the_readmes_sentence_has_the_numbers_of_its_table():
    said = [f"{ROWS[name][4]} of {ROWS[name][3]}" for name in licences.PACKAGES]
    sentence = README.partition("### Unsloth's files under the AGPL\n")[2].partition(" Among them")[0]
    assert re.findall(r"\d+ of \d+", sentence) == said
    assert f"which {ROWS['unsloth'][4]} headers contradict" in DETAILS


@pytest.mark.parametrize(("column", "name"), [(5, "nvidia-h200"), (6, "cpu")])
def test_the_lists_of_imports_name_installed_files_under_the_agpl_as_many_as_the_readme_says(column, name):
    path = ROOT / f"tests/baselines/agpl-imports-{name}.txt"
    head, *lines = path.read_text(encoding="utf-8").splitlines()
    files = [line for line in lines if not line.startswith("#")]
    assert importlib.metadata.version("unsloth") in head and path.name in DETAILS
    assert files == sorted(set(files)) and all(is_agpl(SITES / file) for file in files)
    for folder, row in ROWS.items():
        assert int(row[column]) == sum(file.startswith(f"{folder}/") for file in files), folder


def test_the_readme_names_the_files_that_say_it_of_functions_only():
    found = set()
    for package in licences.PACKAGES:
        for path in find_package(package).rglob("*.py"):
            if "licensed under AGPL" in path.read_text(encoding="utf-8", errors="replace") and not is_agpl(path):
                found.add(str(path.relative_to(SITES / package)))
                assert f"`{path.relative_to(SITES / package)}`" in DETAILS, path
    assert len(found) == 4 and "Four files with another header" in DETAILS


def test_the_projects_own_licence_is_the_one_that_it_names():
    assert "Apache License" in (ROOT / "LICENSE").read_text(encoding="utf-8")[:200]
    assert 'license = "Apache-2.0"' in (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    assert "[Apache License 2.0](LICENSE)" in README
