"""The release check: it passes where place, version and tag agree, and refuses each way in which they do not."""

import shutil

import pytest

from helpers.base import ROOT
from tests.maintain.release import PLACEHOLDER, problems_of


@pytest.fixture
def project(tmp_path):
    """A copy that is ready to be released: at a place of its own."""
    shutil.copytree(ROOT / "notebooks", tmp_path / "notebooks", ignore=shutil.ignore_patterns("src", "data", "__*"))
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    (tmp_path / "pyproject.toml").write_text(text.replace(f"/{PLACEHOLDER}/", "/somebody/"), encoding="utf-8")
    return tmp_path


def test_a_project_that_is_ready_passes(project):
    assert problems_of(project, tags={"v0.1.0"}) == []


@pytest.mark.parametrize(
    ("file", "before", "after", "said"),
    [
        ("pyproject.toml", "/somebody/", f"/{PLACEHOLDER}/", "make location"),
        ("notebooks/03_data.ipynb", "-b v0.1.0", "-b v0.0.9", "03_data.ipynb: fetches v0.0.9"),
        ("notebooks/00_quickstart.ipynb", "/v0.1.0/req", "/main/req", "00_quickstart.ipynb: fetches no tag"),
        ("notebooks/05_infer.ipynb", "/v0.1.0/notebooks/", "/v0.0.9/notebooks/", "05_infer.ipynb: fetches v0.0.9"),
        ("pyproject.toml", 'version = "0.1.0"', 'version = "0.2.0"', "no tag v0.2.0"),
    ],
)
def test_what_does_not_agree_is_named(project, file, before, after, said):
    path = project / file
    text = path.read_text(encoding="utf-8")
    assert before in text
    path.write_text(text.replace(before, after), encoding="utf-8")
    assert any(said in problem for problem in problems_of(project, tags={"v0.1.0"}))


def test_a_commit_without_its_tag_is_refused(project):
    [problem] = problems_of(project, tags={"v0.0.9"})
    assert "git tag v0.1.0" in problem
