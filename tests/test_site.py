"""The site, as a reader sees it in Chromium: whole, in two languages, in the dark, on a phone, without a network."""

import functools
import http.server
import json
import shutil
import subprocess
import threading

import pytest
from test_browser import CHROMIUM, ROOT, TOOLS

from helpers.chapters import CHAPTER_NAMES

PYTHON = ROOT / ".venv-site" / "bin" / "python"
TREES = {"": "notebooks", "zh-CN/": "notebooks/zh-CN"}
PAGES = [f"{tree}{name}.html" for tree in TREES for name in ("index", *CHAPTER_NAMES)]
GLOSSARY = [f"{tree}glossary.html" for tree, folder in TREES.items() if (ROOT / folder / "glossary.ipynb").exists()]
SEARCHES = {
    "search.html?q=perplexity": "/06_save.html",
    "zh-CN/search.html?q=学习率": "/zh-CN/04_train.html",
    "zh-CN/search.html?q=LoRA": "/zh-CN/02_load_and_lora.html",
}
NOTHING = ("search.html?q=xylophone", "zh-CN/search.html?q=鸭嘴兽")
READABLE = 4.5  # WCAG 2, level AA
FAULTS = """<html style="background: #000"><body><article>
<p style="color: #222">Too dark.</p><img src="missing.png"><img src="http://elsewhere.invalid/badge.svg">
<div style="width: 2000px">Too broad.</div><script>console.error("an error")</script>
</article></body></html>"""

pytestmark = [
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(not (TOOLS / "playwright").exists(), reason="no browser driver: run `make proof-tools`"),
    pytest.mark.skipif(not PYTHON.exists(), reason="no Sphinx: run `make site`"),
]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *arguments):
        pass


def build(root, folder):
    return subprocess.run([PYTHON, root / "docs" / "build.py", folder], capture_output=True, text=True)


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    folder = tmp_path_factory.mktemp("site")
    done = build(ROOT, folder)
    assert done.returncode == 0, done.stderr
    (folder / "html" / "faults.html").write_text(FAULTS)
    return folder / "html"


@pytest.fixture(scope="module")
def saw(site):
    """What the browser saw of every page, of each search, and of a page full of faults."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=site))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    pages = [*PAGES, *GLOSSARY, *SEARCHES, *NOTHING, "faults.html"]
    driver = [TOOLS / "python", ROOT / "tests" / "site_session.py", f"http://127.0.0.1:{server.server_port}", CHROMIUM]
    done = subprocess.run([*driver, *pages], capture_output=True, text=True, timeout=600)
    server.shutdown()
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def faults_of(page):
    """What no page may have."""
    dark = {what for what, contrast in page["dark"].items() if contrast is not None and contrast < READABLE}
    found = {"foreign": page["foreign"], "errors": page["errors"], "too broad": page["too_broad"] > 0}
    return [what for what, there in found.items() if there] + [f"dark {what}" for what in sorted(dark)]


@pytest.mark.parametrize("path", [*PAGES, *GLOSSARY, *SEARCHES])
def test_a_page_is_whole_without_a_network_in_the_dark_and_on_a_phone(saw, path):
    assert faults_of(saw[path]) == [], saw[path]
    assert all(saw[path]["pictures"])


def test_the_same_look_finds_each_fault(saw):
    assert faults_of(saw["faults.html"]) == ["foreign", "errors", "too broad", "dark text"]
    assert saw["faults.html"]["pictures"] == [0, 0]


def test_every_page_of_the_site_is_among_those(site):
    built = {path.relative_to(site).as_posix() for path in site.rglob("*.html") if "_static" not in path.parts}
    assert built == {*PAGES, *GLOSSARY, *(f"{tree}search.html" for tree in TREES), "faults.html"}


@pytest.mark.parametrize("name", ["index", *CHAPTER_NAMES])
def test_the_switch_leads_to_the_same_page_and_back(saw, name):
    english, chinese = (saw[f"{tree}{name}.html"] for tree in TREES)
    assert (english["lang"], english["other"]) == ("en", f"/zh-CN/{name}.html")
    assert (chinese["lang"], chinese["other"]) == ("zh-CN", f"/{name}.html")


@pytest.mark.parametrize("tree", TREES)
@pytest.mark.parametrize("chapter", CHAPTER_NAMES)
def test_a_chapter_opens_its_own_notebook_in_colab(saw, tree, chapter):
    [link] = saw[f"{tree}{chapter}.html"]["colab"]
    assert link.endswith(f"/blob/main/{TREES[tree]}/{chapter}.ipynb")


@pytest.mark.parametrize("tree", TREES)
def test_the_curves_and_the_masks_are_there(saw, tree):
    chapter = saw[f"{tree}04_train.html"]
    assert len(chapter["pictures"]) == 1 and len(chapter["mask"]) > 100 and all(chapter["mask"])
    assert None not in chapter["dark"].values()


@pytest.mark.parametrize("path", SEARCHES)
def test_search_finds_a_word_of_a_chapter(saw, path):
    assert SEARCHES[path] in saw[path]["found"]


@pytest.mark.parametrize("path", NOTHING)
def test_search_finds_nothing_where_there_is_nothing(saw, path):
    assert saw[path]["found"] == []


def test_a_link_that_leads_nowhere_fails_the_build(tmp_path):
    shutil.copytree(ROOT / "docs", tmp_path / "docs", ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    text = "# Title\n\n[a file](pyproject.toml), [a page](gone.md), [a place](01_page.ipynb#gone)\n"
    notebook = {"cells": [{"cell_type": "markdown", "metadata": {}, "source": text}], "metadata": {}}
    for readme, folder in (("README.md", "notebooks"), ("README.zh-CN.md", "notebooks/zh-CN")):
        (tmp_path / folder / "images").mkdir(parents=True)
        (tmp_path / readme).write_text("# Title\n")
        (tmp_path / folder / "01_page.ipynb").write_text(json.dumps(notebook | {"nbformat": 4, "nbformat_minor": 4}))
    done = build(tmp_path, tmp_path / "site")
    assert done.returncode != 0 and "Traceback" not in done.stderr
    for target in ("pyproject.toml", "gone.md", "gone"):
        assert f"'{target}'" in done.stderr or f"/{target}" in done.stderr, done.stderr
