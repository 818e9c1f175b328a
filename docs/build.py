"""Build the site from the READMEs and the executed notebooks: `python docs/build.py [FOLDER]`.

The English edition is at the top of FOLDER/html, the Chinese one in `zh-CN/`. Nothing is executed. A link within the
site that leads nowhere is an error. `--links` asks the network about every other link instead.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import NamedTuple

DOCS = Path(__file__).resolve().parent
ROOT = DOCS.parent
IMAGES = ROOT / "notebooks" / "images"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
REPOSITORY = PROJECT["urls"]["Repository"]
RAW = re.compile(REPOSITORY.replace("github.com", "raw.githubusercontent.com") + "/[^/]+/")
BADGE = re.compile(r"\[!\[([^]]+)\]\(\S+badge\.svg\)\]")
SWITCH = re.compile(r"(English · |(?<=\)) )?\[(English|简体中文)\]\([^)\s]+\)( · 简体中文)?")  # each page has its own
LINK = re.compile(r"\]\(([^)\s]+)\)")
INDEX = """{text}

```{{toctree}}
:hidden:

{chapters}
```
"""


class Edition(NamedTuple):
    """One language's tree: where its texts are, where it goes, and what its pages say of the other one."""

    readme: Path
    notebooks: Path
    tree: str
    settings: dict[str, str]
    other: dict[str, str]


EDITIONS = (
    Edition(
        ROOT / "README.md",
        ROOT / "notebooks",
        "",
        {"language": "en"},
        {"other_lang": "zh-CN", "other_name": "简体中文", "other_tree": "zh-CN/"},
    ),
    Edition(
        ROOT / "README.zh-CN.md",
        ROOT / "notebooks" / "zh-CN",
        "zh-CN",
        {"language": "zh_CN", "html_theme_options.toc_title": "本页内容"},
        {"other_lang": "en", "other_name": "English", "other_tree": "../"},
    ),
)


def adapt(text: str, folder: Path, edition: Edition) -> str:
    """A text of `folder` as the site has it: no remote pictures, no second language switch, links that lead on."""
    text = SWITCH.sub("", BADGE.sub(r"[\1]", text))
    return LINK.sub(lambda link: f"]({place(link[1], folder, edition)})", text)


def place(target: str, folder: Path, edition: Edition) -> str:
    """Where a link leads on the site: to a page or picture of it, else to the file on GitHub.

    Of a file that is not there nothing is changed, so that Sphinx finds it missing.
    """
    target = RAW.sub(f"{ROOT}/", target)
    name, hash_sign, anchor = target.partition("#")
    file = (folder / name).resolve()
    if "://" in target or not name or not file.exists():
        return target
    if file == edition.readme:
        return f"index.md{hash_sign}{anchor}"
    if file.parent == edition.notebooks and file.suffix == ".ipynb":
        return f"{file.name}{hash_sign}{anchor}"
    if file.parent == IMAGES:
        return f"images/{file.name}"
    return f"{REPOSITORY}/blob/main/{file.relative_to(ROOT).as_posix()}{hash_sign}{anchor}"


def stage(edition: Edition, folder: Path) -> None:
    """Write the sources of one edition: its start page, its chapters, and the glossary where there is one."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.copytree(IMAGES, folder / "images")
    notebooks = sorted(edition.notebooks.glob("*.ipynb"))
    rows = []
    for path in notebooks:
        notebook = json.loads(path.read_text(encoding="utf-8"))
        for cell in notebook["cells"]:
            if cell["cell_type"] == "markdown":
                cell["source"] = adapt("".join(cell["source"]), edition.notebooks, edition)
        (folder / path.name).write_text(json.dumps(notebook), encoding="utf-8")
        title = notebook["cells"][0]["source"].splitlines()[0].removeprefix("# ")
        number = re.match(r"\d\d ", path.stem.replace("_", " "))
        rows.append(f"{number[0] if number else ''}{title} <{path.stem}>")
    text = adapt(edition.readme.read_text(encoding="utf-8"), ROOT, edition)
    (folder / "index.md").write_text(INDEX.format(text=text, chapters="\n".join(rows)), encoding="utf-8")


def sphinx(edition: Edition, folder: Path, builder: str) -> subprocess.Popen:
    """Start Sphinx on one edition. A warning is a failure, and all of them are shown."""
    name = edition.settings["language"]
    stage(edition, folder / "source" / name)
    settings = [f"-D{key}={value}" for key, value in edition.settings.items()]
    context = [f"-A{key}={value}" for key, value in edition.other.items()]
    options = ["-q", "-W", "--keep-going", "-b", builder, "-c", DOCS, "-d", folder / "doctrees" / name]
    command = [sys.executable, "-m", "sphinx", *options, *settings, *context]
    return subprocess.Popen([*command, folder / "source" / name, folder / builder / edition.tree])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=ROOT / "runs" / "site")
    parser.add_argument("--links", action="store_true", help="ask the network about the links to other places")
    arguments = parser.parse_args()
    builder = "linkcheck" if arguments.links else "html"
    shutil.rmtree(arguments.folder / builder, ignore_errors=True)
    started = [sphinx(edition, arguments.folder, builder) for edition in EDITIONS]  # both at once
    status = max(each.wait() for each in started)
    shutil.rmtree(arguments.folder / builder / "jupyter_execute", ignore_errors=True)  # myst-nb's: not for readers
    return status


if __name__ == "__main__":
    sys.exit(main())
