"""Build the notebooks from their sources in `src/`: `python notebooks/build.py`.

A source is one py:percent file a chapter. Markdown cells carry `lang="en"` or `lang="zh"`; code cells are shared, so
the editions differ in prose alone. A code cell that reads `# include: FILE` is replaced by that file of `src/`.

Recorded outputs live in the built notebooks. They are kept up to the first code cell that changed and cleared from
there on, because everything below a changed cell may depend on it. `--outputs-from DIR` takes them from the executed
notebooks of a run instead, and `--check` writes nothing and fails where a notebook differs from its source.

The README's chapter table is written too, from the titles and from what was measured when the outputs were recorded.
Its picture of the losses is the recorded one. The glossary comes from `terms.toml`; it is no chapter: text alone.
`--location owner/name` rewrites every mention of the series' place on GitHub.
"""

import argparse
import base64
import copy
import functools
import hashlib
import json
import re
import sys
import tomllib
from collections import Counter
from collections.abc import Container
from pathlib import Path
from typing import NamedTuple

import nbformat
from nbformat import NotebookNode

NOTEBOOKS = Path(__file__).resolve().parent
ROOT = NOTEBOOKS.parent
sys.path.insert(0, str(ROOT))

from helpers.chapters import CHAPTER_NAMES, CHAPTERS, producer_of  # noqa: E402

READMES, PICTURE = {"en": ROOT / "README.md", "zh": ROOT / "README.zh-CN.md"}, NOTEBOOKS / "images" / "loss.png"
PICTURED = NOTEBOOKS / f"{producer_of('report.json').name}.ipynb"  # the chapter that draws the losses
RUN_START, RUN_END = "<!-- run: written by notebooks/build.py -->", "<!-- end of run -->"
TABLE_START, TABLE_END = "<!-- chapters: written by notebooks/build.py -->", "<!-- end of chapters -->"
EDITIONS = {"en": NOTEBOOKS, "zh": NOTEBOOKS / "zh-CN"}
TERMS, GLOSSARY = NOTEBOOKS / "terms.toml", "glossary.ipynb"
METADATA = {
    "accelerator": "GPU",
    "colab": {"gpuType": "T4", "provenance": []},
    "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
}
CELL_METADATA = ("tags", "lang", "cellView")
INCLUDE = "# include: "
SHOWN = (
    "MODEL_NAME",
    "MAX_SEQ_LENGTH",
    "MAX_STEPS",
    "MICRO_BATCH",
    "PADDING_FREE",
    "EVAL_ROWS",
    "LEARNING_RATE",
)  # of the recorded run's choices
QUICKSTART = CHAPTER_NAMES[0]
# Where a line of Chinese goes on in the next: a page would show a space there. Not before a list, a table or a block.
LINE_BREAK = re.compile(r"(?<=[，。、；：？！）”])\n(?=[\w`*\[（“])(?!```|\d+\. |\* )|(?<=[一-鿿])\n(?=[一-鿿（“])")
SPEAK_CHINESE = "如果辅助函数的消息是英文，就在最上面新建一个单元格，运行 `%env LANGUAGE=zh_CN`。"
BUDGET, NEXT = "{{budget}}", "{{next}}"  # in a source, for what the build writes


def repository() -> str:
    """`owner/name` on GitHub: the one constant, from pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return project["urls"]["Repository"].removeprefix("https://github.com/")


def sources() -> list[Path]:
    """The chapters' sources in order.

    Raises:
        SystemExit: the table in helpers/chapters.py and the folder src/ do not name the same chapters.
    """
    paths = [NOTEBOOKS / "src" / f"{name}.py" for name in CHAPTER_NAMES]
    present = sorted((NOTEBOOKS / "src").glob("[0-9][0-9]_*.py"))
    if odd := sorted({path.name for path in set(paths) ^ set(present)}):
        raise SystemExit(
            f"notebooks/src: found {', '.join(odd)} in one place alone, expected a source for each row of "
            "helpers/chapters.py. Fix: add the row, or the source."
        )
    return paths


def read_cells(source: Path) -> list[NotebookNode]:
    """The cells of a source, every language, includes resolved."""
    cells = copy.deepcopy(_parsed(source, source.stat().st_mtime_ns))
    for cell in cells:
        if cell.cell_type == "code" and cell.source.startswith(INCLUDE):
            cell.source = (
                (source.parent / cell.source.removeprefix(INCLUDE).strip()).read_text(encoding="utf-8").strip()
            )
    return cells


@functools.cache
def _parsed(source: Path, _changed: int) -> list[NotebookNode]:
    """A source's cells as jupytext reads them. Cached: a source is asked for its title in every other chapter."""
    import jupytext  # here, because what compares a run with the notebooks has no use for it

    return jupytext.read(source, fmt="py:percent").cells


def build(source: Path, lang: str) -> NotebookNode:
    """One edition of one chapter, without outputs.

    A cell's id is a hash of its own source: the same in every build and in both editions, whatever is added around it,
    and a different one as soon as the cell changes. The repository's name and the measured budget do not count, so
    that neither moving the series nor measuring it again changes an id.
    """
    seen: Counter[str] = Counter()
    cells, spoken = [], read_cells(source)
    languages = {cell.metadata.get("lang") for cell in spoken if cell.cell_type == "markdown"}
    written = {BUDGET: budget(source.stem, lang), NEXT: next_line(source.stem, lang)}
    for cell in spoken:
        if cell.cell_type == "markdown" and cell.metadata.get("lang") != lang:
            continue
        text = f"{source.stem}\n{cell.cell_type}\n{cell.source}".replace(repository(), "")
        seen[text] += 1
        metadata = {key: cell.metadata[key] for key in CELL_METADATA if key in cell.metadata}
        source_text = cell.source
        for mark, line in written.items():
            source_text = source_text.replace(mark, line)
        source_text = with_switch(source_text, source.stem, lang, languages).rstrip()
        if lang == "zh" and cell.cell_type == "markdown":
            source_text = LINE_BREAK.sub("", source_text)
        make = nbformat.v4.new_code_cell if cell.cell_type == "code" else nbformat.v4.new_markdown_cell
        cell_id = hashlib.sha256(f"{text}\n{seen[text]}".encode()).hexdigest()[:12]
        cells.append(make(source_text, id=cell_id, metadata=metadata))
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=METADATA)
    notebook.nbformat_minor = 5
    return notebook


class Term(NamedTuple):
    """A word of the trade that the glossary explains.

    Attributes:
        names: in each language.
        meanings: a sentence in each language.
        uses: in each language, a pattern for the word in a text.
    """

    names: dict[str, str]
    meanings: dict[str, str]
    uses: dict[str, str]

    @property
    def anchor(self) -> str:
        """Its place on the page. Example: "learning rate" -> "learning-rate"

        So the documentation site names it. JupyterLab keeps capitals: there the links to LoRA and GGUF open the page.
        """
        return self.names["en"].lower().replace(" ", "-")


def terms() -> list[Term]:
    """The glossary's words, in the order of the English alphabet: those of terms.toml that have a meaning."""
    found = []
    for row in tomllib.loads(TERMS.read_text(encoding="utf-8"))["term"]:
        if "meaning_en" in row:
            names = {"en": re.split(r",| \(", row["en"])[0], "zh": row["zh"]}
            uses = {"en": row.get("uses_en", f"{names['en']}s?"), "zh": row.get("uses_zh", row["zh"])}
            found.append(Term(names, {lang: row[f"meaning_{lang}"] for lang in EDITIONS}, uses))
    return sorted(found, key=lambda term: term.names["en"].lower())


def glossary(lang: str) -> NotebookNode:
    """The glossary in one language. Both have English headings, so that one link leads to a word in either."""
    title, other, opening = {
        "en": ("Glossary", f"[简体中文](zh-CN/{GLOSSARY})", "The words of the trade, each in a sentence."),
        "zh": ("术语表", f"[English](../{GLOSSARY})", "本系列用到的术语，每个用一句话说明。按英文字母排序。"),
    }[lang]
    texts = [f"# {title}\n\n{other}\n\n{opening}"]
    for term in terms():
        name, meaning = term.names["zh"], term.meanings[lang]
        said = {"en": f"{meaning} In Chinese: {name}.", "zh": f"**{name}**：{meaning}"}[lang]
        texts.append(f"## {term.names['en']}\n\n{said}")
    cells = [nbformat.v4.new_markdown_cell(text, id=hashlib.sha256(text.encode()).hexdigest()[:12]) for text in texts]
    notebook = nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": METADATA["kernelspec"]})
    notebook.nbformat_minor = 5
    return notebook


def move(location: str) -> list[Path]:
    """Put another `owner/name` wherever the repository's name stands; returns the files that changed.

    Raises:
        SystemExit: it is not of the form owner/name.
    """
    if not re.fullmatch(r"[\w.-]+/[\w.-]+", location):
        raise SystemExit(
            f"--location: found {location!r}, expected owner/name. Fix: make location REPOSITORY=owner/name."
        )
    before, changed = repository(), []
    files = [ROOT / "pyproject.toml", *READMES.values(), *NOTEBOOKS.glob("src/*.py"), *(path for *_, path in targets())]
    for path in files:
        text = path.read_text(encoding="utf-8")
        if before in text:
            moved = text.replace(before, location).replace(site_of(before), site_of(location))
            path.write_text(moved, encoding="utf-8")
            changed.append(path)
    return changed


def site_of(location: str) -> str:
    """The address at which GitHub Pages shows a repository. Example: "me/series" -> "me.github.io/series" """
    return location.replace("/", ".github.io/")


def title(source: Path, lang: str = "en") -> str:
    """The chapter's heading."""
    cells = (cell.source for cell in read_cells(source) if cell.metadata.get("lang") == lang)
    return next(cells, "\n").splitlines()[0].removeprefix("# ")


def readme(trained: NotebookNode, lang: str = "en") -> str:
    """A README with its chapter table and its run made anew, each between its two markers."""
    taken = measured()
    heading, minutes = {"en": ("chapter", "minutes"), "zh": ("章节", "分钟")}[lang]
    memory, unknown = {"en": ("peak GiB", "not measured yet"), "zh": ("内存峰值 GiB", "尚未测量")}[lang]
    minutes += {"en": f" ({device(lang)})", "zh": f"（{device(lang)}）"}[lang]
    rows = [f"| {heading} | Colab | {minutes} | {memory} |", "|---|---|---|---|"]
    words = {"en": "Open in Colab", "zh": "在 Colab 中打开"}[lang]
    for source in sources():
        place = (EDITIONS[lang] / f"{source.stem}.ipynb").relative_to(ROOT).as_posix()
        link = f"https://colab.research.google.com/github/{repository()}/blob/main/{place}"
        badge = f"[![{words}](https://colab.research.google.com/assets/colab-badge.svg)]({link})"
        figures = taken["chapters"].get(source.stem, {"minutes": unknown, "peak_gib": ""})
        name = f"[{source.stem[:2]} {title_of(source.stem, lang)}]({place})"
        rows.append(f"| {name} | {badge} | {figures['minutes']} | {figures['peak_gib']} |")
    place = (EDITIONS[lang] / GLOSSARY).relative_to(ROOT).as_posix()
    words = {"en": f"The [glossary]({place}) explains their words.", "zh": f"[术语表]({place})解释各章用到的术语。"}[
        lang
    ]
    table = "\n".join([TABLE_START, *rows, "", words, TABLE_END])
    text = READMES[lang].read_text(encoding="utf-8")
    text = between(text, TABLE_START, TABLE_END, table)
    return between(text, RUN_START, RUN_END, "\n".join([RUN_START, *run_lines(trained, lang), RUN_END]))


def device(lang: str) -> str:
    """Where the recorded run was, as people say it. Example: "1 of 2 CPU cores with AVX2"."""
    name = measured()["device"]
    return (
        name if lang == "en" else re.sub(r"(\d+) of (\d+) CPU cores with (\S+)", r"\2 个 CPU 核心中的 \1 个，\3", name)
    )


def between(text: str, start: str, end: str, replacement: str) -> str:
    """A text with what stands from one mark to another replaced, the marks included."""
    before, rest = text.split(start)
    return before + replacement + rest.split(end)[1]


def run_lines(trained: NotebookNode, lang: str = "en") -> list[str]:
    """What the recorded run of chapter 04 showed: one question before and after, and its result."""
    outputs = (output for cell in trained.cells for output in cell.get("outputs", []))
    shown = "\n".join(output.text for output in outputs if output.output_type == "stream")
    exchange = re.search(r"^QUESTION +(.+?)\n\nBEFORE +(.+?)\n\nAFTER +(.+?)\n—", shown, re.DOTALL | re.MULTILINE)
    result = re.search(r"^Result: (held-out loss .+)$", shown, re.MULTILINE)
    if exchange is None or result is None:
        return [{"en": "Nothing is recorded yet.", "zh": "尚未记录。"}[lang]]
    cells = [
        " ".join(part.split("\n")) if number < 2 else "<br>".join(part.split("\n"))
        for number, part in enumerate(exchange.groups())
    ]
    names = {"en": ("asked", "before", "after"), "zh": ("提问", "训练前", "训练后")}[lang]
    date = measured()["date"]
    return [
        "| | |",
        "|---|---|",
        *(f"| {name} | {cell.replace('|', '&#124;')} |" for name, cell in zip(names, cells, strict=True)),
        "",
        f"That run, SmolLM2-135M on {device(lang)}, {date}: {result[1]}."
        if lang == "en"
        else f"这次运行：SmolLM2-135M，{device(lang)}，{date}：`{result[1]}`。",
    ]


def measured() -> dict:
    """What each chapter took when the outputs were recorded: device, date, and minutes and peak GiB a chapter."""
    return json.loads((NOTEBOOKS / "measured.json").read_text(encoding="utf-8"))


def budget(chapter: str, lang: str) -> str:
    """The chapter's budget line: measured where it was recorded, and honest about where it was not."""
    taken = measured()
    figures = taken["chapters"].get(chapter)
    if figures is None:
        return "**输出**：尚未测量。" if lang == "zh" else "**Outputs**: not measured yet."
    given = taken["choices"] | taken["choices"].get(chapter, {})
    shown = choice_names(chapter).intersection(SHOWN)
    comma = "，" if lang == "zh" else ", "
    choices = "".join(f"{comma}`{name} = {value!r}`" for name, value in given.items() if name in shown)
    if lang == "zh":
        return (
            f"**输出**：{taken['date']} 录于 {device(lang)}{choices}；"
            f"{figures['minutes']} 分钟，内存峰值 {figures['peak_gib']} GiB。T4：未测量。"
        )
    return (
        f"**Outputs**: recorded on {taken['date']} with {taken['device']} and no GPU{choices}. That took "
        f"{figures['minutes']} minutes and {figures['peak_gib']} GiB of memory. On a T4: not measured."
    )


def choice_names(chapter: str) -> set[str]:
    """The names that a chapter's parameters cell sets."""
    cells = (
        cell
        for cell in read_cells(NOTEBOOKS / "src" / f"{chapter}.py")
        if "parameters" in cell.metadata.get("tags", ())
    )
    return {name for cell in cells for name in re.findall(r"^([A-Z_]+) = ", cell.source, re.MULTILINE)}


def next_line(chapter: str, lang: str) -> str:
    """The link to the chapter that follows; nothing behind the last one."""
    following = CHAPTERS[CHAPTER_NAMES.index(chapter) + 1 :][:1]
    word = {"en": "Next", "zh": "下一章"}[lang]
    colon = {"en": ": ", "zh": "："}[lang]
    return "".join(
        f"{word}{colon}[{title_of(other.name, lang)} →]({place_of(other.name, lang)})" for other in following
    )


def place_of(chapter: str, lang: str) -> str:
    """Where a chapter lies, from the folder of an edition; the English one where it has no other yet."""
    spoken = title(NOTEBOOKS / "src" / f"{chapter}.py", lang)
    return f"{chapter}.ipynb" if spoken else f"../{chapter}.ipynb"


def title_of(chapter: str, lang: str) -> str:
    """A chapter's heading in a language; the English one where it has no other yet."""
    source = NOTEBOOKS / "src" / f"{chapter}.py"
    return title(source, lang) or title(source)


def with_switch(text: str, chapter: str, lang: str, languages: Container[str]) -> str:
    """A chapter's first text with a link to its other edition behind the badge; any other text as it is.

    The Chinese one also says how the helpers speak Chinese where the kernel is not told its page, as on Colab.
    """
    if "zh" not in languages:
        return text
    other = {"en": f" [简体中文](zh-CN/{chapter}.ipynb)", "zh": f" [English](../{chapter}.ipynb)"}[lang]
    if lang == "zh" and chapter != QUICKSTART:  # which has no helpers
        other += f"\n\n{SPEAK_CHINESE}"
    return re.sub(r"^(\[!\[[^\n]*badge\.svg\)\][^\n]*)$", lambda badge: badge[1] + other, text, flags=re.MULTILINE)


def keep_outputs(notebook: NotebookNode, donor: NotebookNode) -> int:
    """Copy the donor's outputs up to the first code cell that it does not have; returns how many cells got theirs.

    The cell that papermill puts in for the parameters is passed over, and does not count among the executed ones.
    """
    ours = [cell for cell in notebook.cells if cell.cell_type == "code"]
    theirs = [cell for cell in donor.cells if cell.cell_type == "code"]
    given = [cell for cell in theirs if "injected-parameters" in cell.metadata.get("tags", [])]
    kept = 0
    for cell, recorded in zip(ours, [cell for cell in theirs if cell not in given], strict=False):
        if (cell.id, cell.source) != (recorded.id, recorded.source) or recorded.execution_count is None:
            break
        earlier = sum(theirs.index(cell) < theirs.index(recorded) for cell in given)
        cell.outputs, cell.execution_count = clean(recorded.outputs), recorded.execution_count - earlier
        for output in cell.outputs:
            if output.output_type == "execute_result":
                output.execution_count = cell.execution_count
        kept += 1
    return kept


def clean(outputs: list[NotebookNode]) -> list[NotebookNode]:
    """Outputs without what only a live kernel can show (widgets), warnings on stderr, and this machine's paths."""
    widget = "application/vnd.jupyter.widget-view+json"
    kept: list[NotebookNode] = []
    for output in outputs:
        if output.get("name") == "stderr" or widget in output.get("data", {}):
            continue
        if kept and output.output_type == kept[-1].output_type == "stream":  # one block, not one for each streamed word
            kept[-1].text += output.text
        else:
            kept.append(output)
    for output in kept:
        for holder, kinds in ((output, ["text"]), (output.get("data", {}), ["text/plain", "text/html"])):
            for kind in kinds:
                if kind in holder:
                    holder[kind] = holder[kind].replace(f"{ROOT}/", "").replace(str(Path.home()), "~")
    return kept


def first_picture(notebook: NotebookNode) -> bytes:
    """The first recorded PNG of a chapter; empty where none is recorded."""
    outputs = (output for cell in notebook.cells for output in cell.get("outputs", []))
    return next((base64.b64decode(o.data["image/png"]) for o in outputs if "image/png" in o.get("data", {})), b"")


def read_notebook(path: Path) -> NotebookNode:
    return nbformat.read(path, as_version=4)


def targets() -> list[tuple[Path, str, Path]]:
    """(source, language, notebook) of everything that is built; the Chinese edition where a chapter has one."""
    found = []
    for source in sources():
        spoken = {cell.metadata.get("lang") for cell in read_cells(source) if cell.cell_type == "markdown"}
        found += [(source, lang, EDITIONS[lang] / f"{source.stem}.ipynb") for lang in EDITIONS if lang in spoken]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--outputs-from", type=Path, metavar="DIR", help="take the outputs of the run executed in DIR")
    parser.add_argument("--check", action="store_true", help="write nothing, fail where a notebook is out of date")
    parser.add_argument("--location", metavar="OWNER/NAME", help="where the series lives on GitHub from now on")
    arguments = parser.parse_args()
    if arguments.location:
        for path in move(arguments.location):
            print(path.relative_to(ROOT))
    made: dict[Path, bytes] = {}
    notebooks: dict[Path, NotebookNode] = {}
    stale: list[Path] = []
    for source, lang, path in targets():
        notebook = build(source, lang)
        donor = (arguments.outputs_from or EDITIONS["en"]) / path.name  # both editions show one run
        if donor.exists():
            keep_outputs(notebook, read_notebook(donor))
        notebooks[path] = notebook
        made[path] = (nbformat.writes(notebook) + "\n").encode()
    made |= {folder / GLOSSARY: (nbformat.writes(glossary(lang)) + "\n").encode() for lang, folder in EDITIONS.items()}
    made |= {path: readme(notebooks[PICTURED], lang).encode() for lang, path in READMES.items() if path.exists()}
    if picture := first_picture(notebooks[PICTURED]):
        made[PICTURE] = picture
    for path, content in made.items():
        if not path.exists() or path.read_bytes() != content:
            stale.append(path.relative_to(ROOT))
            if not arguments.check:
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)
    if arguments.check and stale:
        print("Out of date: " + ", ".join(map(str, stale)) + ". Run `make notebooks`.", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
