"""Check the built notebooks as a learner and a maintainer would read them: `python notebooks/lint.py`.

Whole, short, executed from top to bottom, up to date with their sources, and free of secrets and of anybody's paths.
Nothing is executed. One line a problem; the exit status is 1 where there is one.
"""

import ast
import copy
import json
import re
import sys
import tomllib
import warnings
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import build
import nbformat
from nbformat import NotebookNode

TAGS = {"parameters", "nbval-check-output", "handoff"}
MOST_SETUP_LINES = 8
MOST_CODE_CELLS, MOST_LINES, MOST_CHARACTERS = 25, 15, 120
MACHINE_FOLDERS = "root|home|Users|tmp|var|opt|usr|mnt|data|work|content|kaggle|runner|github"  # as in the sanitizer
MACHINE_PATH = re.compile(rf"(?<![\w./<-])/{{1,3}}(?:{MACHINE_FOLDERS})/[\w.@+-]|\b[A-Z]:\\+[\w .@+-]+\\")
URL = re.compile(r"\b(?!file:)[a-z][a-z0-9+.-]*://[^\s<>\"']+")  # its path is nobody's machine's
# By such a comment nbval lets a cell pass whatever it shows, also a tagged one.
NBVAL_COMMENT = re.compile(r"^\s*#+\s*((?:NBVAL|PYTEST_VALIDATE)_\w+)\s*$", re.MULTILINE)
CODE_SPAN, LINK = re.compile(r"`[^`]+`"), re.compile(r"\]\(([^)\s]+)\)")
ALONE = {"en": "On your own", "zh": "自己动手"}
SUMMARY = {"en": "Solution", "zh": "参考答案"}
# The blank lines let GitHub, Colab and JupyterLab read what is folded as Markdown.
FOLDED = r"^<details><summary>([^\n]+)</summary>\n\n```python\n(.+?)\n```\n\n(.+?)\n\n</details>$"
FOLDED = re.compile(FOLDED, re.MULTILINE | re.DOTALL)
MOST_MEANING_WORDS = 30
BLOCK = re.compile(r"```.*?```", re.DOTALL)
# What is no running text: code, formulas, pictures, headings and rows of tables.
UNREAD = re.compile(r"```.*?```|`[^`]+`|\$[^$]+\$|!\[[^\]]*\]\([^)]*\)|^(?:#+ |\|).*?$", re.DOTALL | re.MULTILINE)
LINKED = re.compile(r"\[([^\]]*)\]\(([^)]*)\)")
NUMBER = re.compile(r"\d(?:[\d.]*\d)?")
UNITS = {"million": 10**6, "billion": 10**9, "万": 10**4, "亿": 10**8}
LARGE = re.compile(rf"(\d+(?:\.\d+)?) ?({'|'.join(UNITS)})")


def _links(text: str) -> list[str]:
    """The targets of a text's links, as they are from the English edition."""
    return [link.replace("zh-CN/", "").removeprefix("../") for link in LINK.findall(text)]


def _spans(text: str) -> list[str]:
    return CODE_SPAN.findall(BLOCK.sub("", text))


def _numbers(text: str) -> list[str]:
    """A text's numbers, without those of code and links. Example: "24 million" and "2400 万" -> ["24000000"]"""
    text = CODE_SPAN.sub("", LINK.sub("]", text)).replace(",", "")
    text = LARGE.sub(lambda number: str(round(float(number[1]) * UNITS[number[2]])), text)
    return [number.rstrip(".") for number in NUMBER.findall(text)]


# What a text and its translation must share.
PARTS = {"code spans": _spans, "links": _links, "numbers": _numbers}
PARTS |= {"blocks of code": BLOCK.findall}
PARTS |= {"headings": lambda text: re.findall(r"^#+ ", text, re.MULTILINE)}
PARTS |= {"rows of tables": lambda text: re.findall(r"^\|", text, re.MULTILINE)}
QUOTE = r"(?:[\"']|&(?:quot|apos|#\w+);)"
# By the prefix that the issuer gives, so that a hash or an id is not taken for one. Wider scanners guess by entropy,
# which a notebook full of images and fingerprints sets off at every turn.
SECRETS = {
    "Hugging Face": r"\bhf_[A-Za-z0-9]{20,}",
    "OpenAI, Anthropic": r"\bsk-[A-Za-z0-9_-]{16,}",
    "GitHub": r"\b(?:gh[pousr]_[A-Za-z0-9]{20,}|github_pat_[A-Za-z0-9_]{20,})",
    "AWS": r"\b(?:AKIA|ASIA)[A-Z0-9]{16}\b",
    "Google": r"\b(?:AIza[A-Za-z0-9_-]{35}|GOCSPX-[A-Za-z0-9_-]{20,}|ya29\.[A-Za-z0-9_-]{20,})",
    "Weights & Biases": r"\bwandb_v1_[A-Za-z0-9_]{20,}|(?i:wandb).{0,40}\b[0-9a-f]{40}\b",
    "Kaggle": rf"\bKGAT_[0-9a-f]{{32}}|(?i:kaggle_key|{QUOTE}key\\?{QUOTE})(?:\W|{QUOTE}){{1,5}}[0-9a-f]{{32}}\b",
    "Slack": r"\bxox[abprs]-[A-Za-z0-9-]{10,}",
    "private key": r"-----BEGIN [A-Z ]*PRIVATE KEY-----",
}


class Chapter(NamedTuple):
    """One built notebook: its source, its language and where it lies (as `build.targets()` gives them)."""

    source: Path
    lang: str
    path: Path


def code_cells(notebook: NotebookNode) -> list[NotebookNode]:
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def printed(cell: NotebookNode) -> str:
    """All that a code cell shows, as text; images are left out."""
    parts = []
    for output in cell.outputs:
        parts += [output.get("text", ""), "\n".join(output.get("traceback", []))]
        data = output.get("data", {})
        parts += [value if isinstance(value, str) else json.dumps(value) for value in map(data.get, texts(data))]
    return "\n".join(parts)


def texts(data: dict) -> list[str]:
    """The kinds of an output's data that hold text. Example: `{"text/html": …, "image/png": …}` -> `["text/html"]`."""
    return [kind for kind in data if kind.startswith("text/") or kind.endswith(("json", "+xml"))]


def tags_of(cell: NotebookNode) -> list[str]:
    return cell.metadata.get("tags", [])


def first_line(cell: NotebookNode) -> str:
    return cell.source.partition("\n")[0]


def parameter_names(notebook: NotebookNode) -> list[str]:
    """The names that the parameters cell sets. Example: `MAX_STEPS = 60` -> `["MAX_STEPS"]`."""
    cells = [cell for cell in code_cells(notebook) if "parameters" in tags_of(cell)]
    nodes = [node for cell in cells for node in ast.parse(cell.source).body]
    return [node.targets[0].id for node in nodes if isinstance(node, ast.Assign)]


def is_one_call(source: str) -> bool:
    """Whether a cell is imports and one call, which may have an argument a line. Example: `SFTTrainer(…)`"""
    try:
        statements = ast.parse(source).body
    except SyntaxError:  # a magic
        return False
    rest = [each for each in statements if not isinstance(each, ast.Import | ast.ImportFrom)]
    return len(rest) == 1 and isinstance(rest[0], ast.Assign | ast.Expr) and isinstance(rest[0].value, ast.Call)


def problems_of(notebook: NotebookNode, chapter: Chapter) -> list[str]:
    """Everything that is wrong with one notebook, a line each."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of ids, which are looked at below
            nbformat.validate(copy.deepcopy(notebook))  # a copy, because it repairs what it finds
    except nbformat.ValidationError as error:
        return [f"not valid nbformat: {str(error).splitlines()[0]}"]
    checks = (of_identity, of_text, of_code, of_outputs, of_secrets)
    return [problem for check in checks for problem in check(notebook, chapter)]


def of_identity(notebook: NotebookNode, chapter: Chapter) -> list[str]:
    """The notebook is what its source gives, under ids that the next build gives again."""
    found = []
    expected = build.build(chapter.source, chapter.lang)
    ids = [cell.get("id", "") for cell in notebook.cells]
    if notebook.nbformat_minor < 5 or "" in ids:
        found.append("cells without an id")
    if twice := [cell_id for cell_id, count in Counter(ids).items() if count > 1]:
        found.append(f"cell ids that occur twice: {', '.join(twice)}")
    if ids != [cell.id for cell in expected.cells]:
        found.append("cell ids that the build does not give: run `make notebooks`")
    if [cell.source for cell in notebook.cells] != [cell.source for cell in expected.cells]:
        found.append(f"not up to date with {chapter.source.name}: run `make notebooks`")
    if extra := set(notebook.metadata) - set(build.METADATA):
        found.append(f"notebook metadata that is not allowed: {', '.join(sorted(extra))}")
    for cell in notebook.cells:
        if set(cell.metadata) - set(build.CELL_METADATA) or set(tags_of(cell)) - TAGS:
            found.append(f"metadata or tags that are not allowed, of `{first_line(cell)}`")
    return found


def of_text(notebook: NotebookNode, chapter: Chapter) -> list[str]:
    """Title, badge, links, the words about the parameters, and the last cell."""
    found = []
    prose = [cell.source for cell in notebook.cells if cell.cell_type == "markdown"]
    headings = [line for text in prose for line in text.splitlines() if line.startswith("# ")]
    if len(headings) != 1 or not notebook.cells[0].source.startswith("# "):
        found.append("one H1, at the top")
    titles = {row.name: row.title for row in build.CHAPTERS}
    if chapter.lang == "en" and headings[:1] != [f"# {titles[chapter.source.stem]}"]:
        found.append(f"a heading that is not the title in helpers/chapters.py, {titles[chapter.source.stem]!r}")
    place = chapter.path.relative_to(build.ROOT).as_posix()
    badge = f"https://colab.research.google.com/github/{build.repository()}/blob/main/{place}"
    if not prose or f"({badge})" not in prose[0]:
        found.append(f"badge to {badge}")
    links = re.findall(r"\]\(([^)\s]+)\)", "\n".join(prose))
    for link in links:
        if "://" not in link and not (chapter.path.parent / link.partition("#")[0]).is_file():
            found.append(f"link to {link}, which does not exist")
    chapters = [source.stem for source in build.sources()]
    following = chapters[chapters.index(chapter.source.stem) + 1 :][:1]
    if following and build.place_of(following[0], chapter.lang) not in links:
        found.append(f"no link to the next chapter, {following[0]}.ipynb")
    if notebook.cells[-1].cell_type != "markdown" or ALONE[chapter.lang] not in prose[-1]:
        found.append("the last cell says what to try on your own")
    found += of_exercises(prose[-1] if prose else "", chapter)
    if silent := [name for name in parameter_names(notebook) if not re.search(rf"`{name}\b", "\n".join(prose))]:
        found.append(f"parameters that no text cell explains, named as `NAME`: {', '.join(silent)}")
    return found


def solutions_of(text: str) -> list[str]:
    """The code of the solutions that a text folds away."""
    return [code for _, code, _ in FOLDED.findall(text)]


def of_exercises(text: str, chapter: Chapter) -> list[str]:
    """A chapter's last text has an exercise, and each has a short solution that unfolds everywhere."""
    found = []
    folded = FOLDED.findall(text)
    if not folded and chapter.source.stem != build.CHAPTERS[0].name:
        found.append("no solution to an exercise in the last cell")
    if text.count("<details>") != len(folded) or any(said != SUMMARY[chapter.lang] for said, *_ in folded):
        found.append(
            f"a solution of another form than <details><summary>{SUMMARY[chapter.lang]}</summary>, code, outcome"
        )
    for _, code, _ in folded:
        lines = code.splitlines()
        if len(lines) > MOST_LINES or max(map(len, lines)) > MOST_CHARACTERS:
            found.append(
                f"more than {MOST_LINES} lines, or of {MOST_CHARACTERS} characters, in the solution `{lines[0]}`"
            )
    return found


def of_code(notebook: NotebookNode, chapter: Chapter) -> list[str]:
    """Order and length of the code cells."""
    found = []
    cells = code_cells(notebook)
    if len(cells) > MOST_CODE_CELLS:
        found.append(f"{len(cells)} code cells, more than {MOST_CODE_CELLS}")
    helped = any("helpers" in cell.source for cell in cells)
    if [number for number, cell in enumerate(cells) if "parameters" in tags_of(cell)] != [1 if helped else 0]:
        found.append(f"the {'second' if helped else 'first'} code cell, and only it, sets the parameters")
    setup = (chapter.source.parent / "setup_cell.py").read_text(encoding="utf-8").strip()
    if helped and cells[0].source.strip() != setup:
        found.append("the first code cell is the setup cell")
    if helped and len([line for line in setup.splitlines() if line and not line.startswith("#")]) > MOST_SETUP_LINES:
        found.append(f"a setup cell of more than {MOST_SETUP_LINES} lines")
    for cell in cells:
        lines = [line for line in cell.source.splitlines() if not line.startswith("# @title")]  # a heading on Colab
        if len(lines) > MOST_LINES and not is_one_call(cell.source):
            found.append(f"{len(lines)} lines, more than {MOST_LINES}, in `{first_line(cell)}`")
        if max(map(len, lines), default=0) > MOST_CHARACTERS:
            found.append(f"a line of over {MOST_CHARACTERS} characters in `{first_line(cell)}`")
        if re.search(r"if (False|0)\b|%%capture", cell.source):
            found.append(f"dead or hidden code in `{first_line(cell)}`")
        for marker in NBVAL_COMMENT.findall(cell.source):
            found.append(f"the comment {marker}, which nbval puts above the tags, in `{first_line(cell)}`")
    return found


def of_outputs(notebook: NotebookNode, chapter: Chapter) -> list[str]:
    """Recorded in one run, without an error, and there where they are compared."""
    found = []
    cells = code_cells(notebook)
    if [cell.execution_count for cell in cells] != list(range(1, len(cells) + 1)):
        found.append("outputs that are not recorded from one run, top to bottom: run `make record`")
    for cell in cells:
        if "nbval-check-output" in tags_of(cell) and not cell.outputs:
            found.append(f"nothing recorded to compare with in `{first_line(cell)}`")
        if any(output.output_type == "error" for output in cell.outputs):
            found.append(f"an error in the output of `{first_line(cell)}`")
        if any("widget" in kind for output in cell.outputs for kind in output.get("data", {})):
            found.append(f"a widget view in the output of `{first_line(cell)}`")
        if match := MACHINE_PATH.search(URL.sub("", printed(cell))):
            found.append(f"a path of somebody's machine, {match.group()!r}, in the output of `{first_line(cell)}`")
    if not cells or not re.search(r"^Result: .", printed(cells[-1]), re.MULTILINE):
        found.append("no `Result: …` in the last code cell")
    return found


def of_secrets(notebook: NotebookNode, chapter: Chapter) -> list[str]:
    """Keys and tokens, in what is shown and in what is written. The secret itself is not repeated."""
    found = []
    for cell in notebook.cells:
        text = cell.source + ("\n" + printed(cell) if cell.cell_type == "code" else "")
        for issuer, pattern in SECRETS.items():
            if re.search(pattern, text):
                found.append(f"a secret ({issuer}) in `{first_line(cell)}`: revoke it, then remove it")
    return found


def problems_of_source(cells: list[NotebookNode]) -> list[str]:
    """In a source that speaks Chinese, each English text has its Chinese partner right behind it, and the reverse."""
    spoken = [(cell.metadata.get("lang"), first_line(cell)) for cell in cells if cell.cell_type == "markdown"]
    found = [f'no lang="en" or lang="zh" on `{line}`' for lang, line in spoken if lang not in build.EDITIONS]
    if found or not any(lang == "zh" for lang, _ in spoken):
        return found
    while spoken:
        (lang, line), *rest = spoken
        if lang == "en" and rest and rest[0][0] == "zh":
            spoken = rest[1:]
        else:
            found.append(f"no {'Chinese' if lang == 'en' else 'English'} partner of `{line}`")
            spoken = rest
    return found


def problems_of_pairs(cells: list[NotebookNode]) -> list[str]:
    """What a Chinese text has other than its English partner: code spans, links, numbers, headings, rows of tables."""
    found = []
    for english, chinese in zip(cells, cells[1:], strict=False):
        if (english.metadata.get("lang"), chinese.metadata.get("lang")) == ("en", "zh"):
            for what, parts in PARTS.items():
                ours, theirs = (Counter(parts(cell.source)) for cell in (english, chinese))
                if differ := sorted(((ours - theirs) + (theirs - ours)).elements()):
                    found.append(
                        f"{what} that the two texts do not share, {', '.join(differ)}, of `{first_line(english)}`"
                    )
    return found


def problems_of_terms(cells: list[NotebookNode]) -> list[str]:
    """The words of a Chinese text that the table of terms says to avoid."""
    terms = tomllib.loads(build.TERMS.read_text(encoding="utf-8"))["term"]
    prose = [cell for cell in cells if cell.metadata.get("lang") == "zh"]
    return [
        f"{word} instead of {term['zh']} in `{first_line(cell)}`"
        for cell in prose
        for term in terms
        for word in term["avoid"]
        if word in cell.source
    ]


def running_text(cells: list[NotebookNode], lang: str) -> str:
    """All that a chapter says in a language, in one line, without what is no running text."""
    prose = "\n\n".join(cell.source for cell in cells if cell.metadata.get("lang") == lang)
    return " ".join(UNREAD.sub("", prose).split())


def glossary_links(text: str) -> list[tuple[str, str, str]]:
    """The links of a text to the glossary: (the linked words, the anchor, the text before, without links)."""
    links = [link for link in LINKED.finditer(text) if link[2].startswith(f"{build.GLOSSARY}#")]
    return [(link[1], link[2].partition("#")[2], LINKED.sub("", text[: link.start()])) for link in links]


def problems_of_words(cells: list[NotebookNode]) -> list[str]:
    """Links to words that the glossary lacks, on other words, or behind the word's first use in the chapter."""
    found, terms = [], {term.anchor: term for term in build.terms()}
    for lang in build.EDITIONS:
        for words, anchor, before in glossary_links(running_text(cells, lang)):
            if anchor not in terms:
                found.append(f"link to {build.GLOSSARY}#{anchor}, which the glossary does not explain")
                continue
            use = terms[anchor].uses[lang]
            pattern = re.compile(rf"(?<![\w-])(?:{use})(?![\w-])" if lang == "en" else use, re.IGNORECASE)
            if not pattern.search(words):
                found.append(f"link to {build.GLOSSARY}#{anchor} on other words, {words!r}")
            if earlier := pattern.search(before):
                behind = before[max(0, earlier.start() - 20) : earlier.end()]
                found.append(f"link to {build.GLOSSARY}#{anchor} behind the first use of the word, …{behind!r}")
    return found


def problems_of_glossary(chapters: list[list[NotebookNode]]) -> list[str]:
    """Words of the glossary that no chapter links, or whose meaning is long."""
    found = []
    for lang in build.EDITIONS:
        linked = {anchor for cells in chapters for _, anchor, _ in glossary_links(running_text(cells, lang))}
        found += [f"no link to {term.anchor}, {lang}" for term in build.terms() if term.anchor not in linked]
    for term in build.terms():
        if len(term.meanings["en"].split()) > MOST_MEANING_WORDS:
            found.append(f"more than {MOST_MEANING_WORDS} words for {term.anchor}")
    return found


def main() -> int:
    problems = []
    chapters = [Chapter(*target) for target in build.targets()]
    sources = {source: build.read_cells(source) for source in build.sources()}
    for source, cells in sources.items():
        checks = (problems_of_source, problems_of_pairs, problems_of_terms, problems_of_words)
        problems += [f"{source.name}: {problem}" for check in checks for problem in check(cells)]
    problems += [f"{build.TERMS.name}: {problem}" for problem in problems_of_glossary(list(sources.values()))]
    for chapter in chapters:
        name = chapter.path.relative_to(build.NOTEBOOKS)
        if chapter.path.exists():
            problems += [f"{name}: {text}" for text in problems_of(build.read_notebook(chapter.path), chapter)]
        else:
            problems.append(f"{name}: does not exist: run `make notebooks`")
    built = {chapter.path for chapter in chapters} | {folder / build.GLOSSARY for folder in build.EDITIONS.values()}
    for folder in build.EDITIONS.values():
        problems += [f"{path.name}: has no source" for path in sorted(folder.glob("*.ipynb")) if path not in built]
    print("\n".join(problems) or f"{len(chapters)} notebooks: no problem found")
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
