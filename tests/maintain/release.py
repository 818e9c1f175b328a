"""Can the badges be handed out? `python -m tests.maintain.release` says what a reader would stumble over, or nothing.

A badge opens a notebook on GitHub, whose first cell fetches the series at a tag: place, version and tag must agree.
"""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

from helpers.base import ROOT

PLACEHOLDER = "your-org"


def problems_of(root: Path, *, tags: set[str]) -> list[str]:
    """What keeps a release back, a line each.

    Args:
        root: the project.
        tags: the tags that stand on the present commit.
    """
    project = tomllib.loads((root / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    place, tag = project["urls"]["Repository"], f"v{project['version']}"
    problems = []
    if f"/{PLACEHOLDER}/" in place:
        problems.append(f"pyproject.toml: the place is {place}. Fix: make location REPOSITORY=owner/name")
    if tag not in tags:
        problems.append(f"git: no tag {tag} on this commit. Fix: git tag {tag}, and push it")
    for path in sorted((root / "notebooks").glob("[0-9]*.ipynb")):  # the chapters; the glossary fetches nothing
        text = path.read_text(encoding="utf-8")
        named = re.findall(r"-b (v[\w.]+)|/(v\d[\w.]+)/(?:requirements-colab|notebooks/images)", text)
        others = {one for pair in named for one in pair if one} - {tag}
        if not named or others:
            found = ", ".join(sorted(others)) or "no tag"
            problems.append(f"{path.name}: fetches {found}, expected {tag}. Fix: correct its source, make notebooks")
    return problems


def main() -> int:
    done = subprocess.run(["git", "tag", "--points-at", "HEAD"], cwd=ROOT, capture_output=True, text=True)
    problems = problems_of(ROOT, tags=set(done.stdout.split()))
    print("\n".join(problems) or "Ready: place, version and tag agree.")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
