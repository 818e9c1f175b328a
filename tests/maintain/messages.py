"""The helpers' messages in Chinese: `python -m tests.maintain.messages` brings the catalogue up to date.

It extracts every message of `helpers/` into `helpers/locale/zh/LC_MESSAGES/helpers.po`, keeps the translations that are
there, and compiles `helpers.mo`, which is what gettext reads. `--check` writes nothing and fails where a message has no
translation, where one has other places for values than its message, and where a text is not marked for translation.
"""

import argparse
import ast
import datetime
import io
import re
import string
import sys
import tomllib
from collections.abc import Container, Iterator
from pathlib import Path

from babel.messages.catalog import Catalog, Message
from babel.messages.extract import extract_from_dir
from babel.messages.mofile import write_mo
from babel.messages.pofile import read_po, write_po

from helpers.base import ROOT

HELPERS, TERMS = ROOT / "helpers", ROOT / "notebooks" / "terms.toml"
PO = HELPERS / "locale" / "zh" / "LC_MESSAGES" / "helpers.po"
READERS = [("**.py", "python"), ("**.html", "jinja2")]
KEYWORDS = {"_": None, "N_": None, "_n": (1, 2), "label": None}  # `label` is that of helpers/figures.py
DATE = datetime.datetime(2026, 11, 30, tzinfo=datetime.UTC)  # in the header: one date, so that a build changes nothing
# What a reader is told: these arguments of an error, and whatever is printed.
TOLD = ("found", "expected", "fix")
WORDS = re.compile(r"[a-z]{2,}")
SENTENCE = re.compile(r"[A-Za-z]{2,},? [a-z]{2,} [a-z]{2,}\b(?![_=:])")
# Whole files in which only errors are told: titles that are compared with the pages', and a public card in English.
ERRORS_ALONE = ("chapters.py", "export/card.py")
# Texts that programs compare, by how they begin: a command, other libraries' messages, a template, a commit's subject.
UNTOLD = (
    *("%pip ", "probe_", "max_steps num_train", "a file of certificates", "{{ else", "Upload the tuned", "font-weight"),
    *("Detected no triton", "Calling register", "Failed to load CPU", "unexpected end of data"),
)


def extracted(folder: Path = HELPERS) -> Catalog:
    """The messages of a folder's modules, without translations."""
    catalog = Catalog(locale="zh", project="helpers", charset="utf-8", header_comment="# The helpers' messages.")
    catalog.creation_date = catalog.revision_date = DATE
    for name, _, message, _, _ in extract_from_dir(folder, READERS, keywords=KEYWORDS):
        catalog.add(message, locations=[(name, None)])
    return catalog


def updated(po: Path = PO) -> Catalog:
    """Today's messages with the translations that the catalogue has; those of messages that went are left out."""
    catalog, known = extracted(), translations(po)
    for message in catalog:
        if message.id and message.id in known:
            message.string = known[message.id].string
    return catalog


def translations(po: Path = PO) -> dict[str | tuple[str, str], Message]:
    """{message: its entry} of a catalogue; empty where there is none."""
    if not po.is_file():
        return {}
    with open(po, "rb") as file:
        return {message.id: message for message in read_po(file) if message.id}


def as_po(catalog: Catalog) -> bytes:
    buffer = io.BytesIO()
    write_po(buffer, catalog, width=120, include_lineno=False, sort_by_file=True)
    return buffer.getvalue()


def as_mo(catalog: Catalog) -> bytes:
    buffer = io.BytesIO()
    write_mo(buffer, catalog)
    return buffer.getvalue()


def places(text: str) -> set[str]:
    """The names of the values that a message takes. Example: "{rows:,} of {name!r}" -> {"rows", "name"}"""
    return {name for _, name, _, _ in string.Formatter().parse(text) if name}


def problems_of(message: Message, avoided: dict[str, str]) -> Iterator[str]:
    """What is wrong with one entry: no translation, other places than the message, a word that the terms avoid."""
    ids = message.id if isinstance(message.id, tuple) else (message.id,)
    strings = message.string if isinstance(message.string, tuple) else (message.string,)
    if not all(strings):
        yield f"no translation of {ids[0]!r}: add it to {PO.relative_to(ROOT)}"
        return
    try:
        ours, theirs = set().union(*map(places, ids)), set().union(*map(places, strings))
    except ValueError as error:
        yield f"{error}, in the translation of {ids[0]!r}"
        return
    if ours != theirs:
        yield f"other places for values, {', '.join(sorted(ours ^ theirs))}, in the translation of {ids[0]!r}"
    for word, term in avoided.items():
        if any(word in text for text in strings):
            yield f"{word} instead of {term} in the translation of {ids[0]!r}"


def unmarked(source: str, *, errors_alone: bool = False) -> Iterator[tuple[int, str]]:
    """(line, text) of each text of a module that a reader is told, and that nothing marks for extraction."""
    tree = ast.parse(source)
    marked = {id(part) for call in _calls(tree, *KEYWORDS) for part in ast.walk(call)}
    patterns = {id(part) for call in _calls(tree, "compile", "sub", "search", "fullmatch") for part in ast.walk(call)}
    told = {id(part) for call in _calls(tree, "print") for part in ast.walk(call)}
    told |= {
        id(part)
        for call in ast.walk(tree)
        if isinstance(call, ast.Call)
        for keyword in call.keywords
        if keyword.arg in TOLD
        for part in ast.walk(keyword)
    }
    docs = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if (
            not isinstance(node, ast.Constant)
            or not isinstance(node.value, str)
            or id(node) in marked | docs | patterns
        ):
            continue
        if node.value.startswith(UNTOLD) or (errors_alone and id(node) not in told):
            continue
        if (WORDS if id(node) in told else SENTENCE).search(node.value):
            yield node.lineno, node.value


def unextracted(source: str, extracted: Container[str]) -> Iterator[tuple[int, str]]:
    """(line, text) of each marked text that Babel passes over: one that is put together, or inside an f-string."""
    for call in _calls(ast.parse(source), *KEYWORDS):
        text = call.args[0] if call.args else None
        if isinstance(text, ast.JoinedStr | ast.BinOp):
            yield call.lineno, ast.unparse(text)
        if isinstance(text, ast.Constant) and text.value not in extracted:
            yield call.lineno, text.value


def _calls(tree: ast.AST, *names: str) -> Iterator[ast.Call]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Call) and getattr(node.func, "id", getattr(node.func, "attr", "")) in names:
            yield node


def problems() -> list[str]:
    """Everything that is wrong with the catalogue and with the marks, a line each."""
    terms = tomllib.loads(TERMS.read_text(encoding="utf-8"))["term"]
    avoided = {word: term["zh"] for term in terms for word in term["avoid"]}
    catalog = updated()
    ids = {text for message in catalog for text in (message.id if isinstance(message.id, tuple) else (message.id,))}
    found = [problem for message in catalog if message.id for problem in problems_of(message, avoided)]
    for path, content in ((PO, as_po(catalog)), (PO.with_suffix(".mo"), as_mo(catalog))):
        if not path.is_file() or path.read_bytes() != content:
            found.append(f"{path.relative_to(ROOT)} is not up to date: run `make messages`")
    for path in sorted(HELPERS.rglob("*.py")):
        name = path.relative_to(HELPERS).as_posix()
        source = path.read_text(encoding="utf-8")
        texts = unmarked(source, errors_alone=name in ERRORS_ALONE)
        found += [f"helpers/{name}:{line}: {text!r} is not marked for translation" for line, text in texts]
        texts = unextracted(source, ids)
        found += [f"helpers/{name}:{line}: {text!r} is not extracted: make it a literal" for line, text in texts]
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; fail where something is wrong")
    if not parser.parse_args().check:
        catalog = updated()
        PO.parent.mkdir(parents=True, exist_ok=True)
        PO.write_bytes(as_po(catalog))
        PO.with_suffix(".mo").write_bytes(as_mo(catalog))
    found = problems()
    print("\n".join(found) or f"{len(translations())} messages, each in both languages")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
