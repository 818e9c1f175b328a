"""The site's settings, for both editions. What differs between them is in `build.py`, which calls Sphinx."""

import re
import tomllib
from pathlib import Path

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.search.zh import SearchChinese

PROJECT = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8"))["project"]

project = PROJECT["name"]
author = f"{project} contributors"
version = PROJECT["version"]
extensions = ["myst_nb"]
templates_path = ["_templates"]

myst_enable_extensions = ["dollarmath"]
myst_heading_anchors = 3
myst_update_mathjax = False
nb_execution_mode = "off"
nb_ipywidgets_js = {}  # else each page asks two other hosts for scripts

html_title = PROJECT["name"]
html_theme = "sphinx_book_theme"
html_static_path = ["_static"]
html_css_files = ["site.css"]
html_favicon = "_static/favicon.svg"  # else a browser asks for a file that is not there
html_context = {"default_mode": "auto"}
html_copy_source = False
html_use_index = False
html_show_copyright = False
html_show_sphinx = False
html_math_renderer = "mathml"  # browsers draw it themselves: MathJax would add 24 MB to each edition
html_theme_options = {
    "repository_url": PROJECT["urls"]["Repository"],
    "use_repository_button": True,
    "use_download_button": False,
    "home_page_in_toc": True,
    "navbar_persistent": [],
    "article_header_end": ["edition.html", "article-header-buttons.html"],
}


class PairSearch(SearchChinese):
    """Search for pairs of characters, since Chinese has no spaces.

    Sphinx's own way needs the package jieba, and finds a word only where jieba's dictionary has it.
    Example: 学习率 -> 学习, 习率
    """

    language_name = "English"  # of the stemmer for Latin words: Sphinx 9.0 asks the page for a ChineseStemmer else
    js_splitter_code = r"""
var splitQuery = (query) => (query.match(/\w+|\p{Script=Han}+/gu) || []).flatMap((word) =>
  /\w/.test(word) || word.length < 3 ? [word] : [...word].slice(1).map((_, i) => word.slice(i, i + 2)));
"""

    def split(self, text: str) -> list[str]:
        """The Latin words of a text, and every two Chinese characters that stand together."""
        runs = re.findall("[\u4e00-\u9fff]+", text)
        return super().split(text) + [run[i : i + 2] for run in runs for i in range(max(len(run) - 1, 1))]


def draw_math(translator, node) -> None:
    """A formula as MathML. One that cannot be drawn stops the build."""
    translator.body.append(tex2mathml(node.astext(), as_block=isinstance(node, nodes.math_block)))
    raise nodes.SkipNode


def setup(app) -> None:
    """What Sphinx calls first."""
    app.add_search_language(PairSearch)
    app.add_html_math_renderer("mathml", (draw_math, None), (draw_math, None))
