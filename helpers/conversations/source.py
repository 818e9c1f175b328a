"""The rows of a file, a folder, a data set on the Hub, or a list, each with its place. Nothing is converted here."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from helpers.base import InputError
from helpers.environment.hub import hide_token, require_hub

ENDINGS = ".json, .jsonl, .ndjson, .csv, .tsv or .parquet, also with .gz"
OTHER_FILES = {".xlsx": "save it as .csv, in UTF-8", ".xls": "save it as .csv, in UTF-8", ".zip": "unpack it"}
ROLE_KEYS = ("role", "from", "speaker", "author", "sender")  # of a turn, in lower case
_HUB_NAME = re.compile(r"(?P<name>[\w.-]+(/[\w.-]+)?)(:(?P<split>[\w.-]+))?")
_SPACE = re.compile(r"[ \t\r\n]*")
_TRAIN = re.compile(r"(^|[^a-z])train([^a-z]|$)")


class Row(NamedTuple):
    """One row as it comes, and where it stands: "line 4" of a file's lines, counted from 1, or "row 3", from 0."""

    place: str
    value: Any


@dataclass(frozen=True)
class Unreadable:
    """In place of a row that cannot be read: why."""

    why: str


def read_rows(source: Any) -> tuple[list[Row], str]:
    """All rows of a source, and one sentence about which part of it was read, or "".

    Args:
        source: a path, a name on the Hub (`owner/name`, or `owner/name:split`), a `datasets.Dataset` or `DatasetDict`,
            or a list.

    Raises:
        InputError: there is no such file or data set, or nothing of it can be read.
    """
    if isinstance(source, str | os.PathLike):
        path = find_path(os.fspath(source))
        return _rows_of_path(path) if path else _rows_of_hub(str(source))
    if hasattr(source, "column_names"):  # of a DatasetDict, a dict of them
        return _rows_of_dataset(source, where="dataset")
    if isinstance(source, Sequence):
        return [Row(f"row {number}", value) for number, value in enumerate(source)], ""
    found, fix = f"a {type(source).__name__}", "give a path, a name on the Hub, a Dataset or a list"
    raise InputError("dataset", found=found, expected="conversations", fix=fix)


def find_path(name: str) -> Path | None:
    """The file or folder that a name means; None where it can only be a name on the Hub.

    Raises:
        InputError: it looks like a path, and nothing is there.
    """
    path = Path(os.path.abspath(os.path.expanduser(name)))
    if name.strip() and os.path.exists(path):  # Path.exists raises for a name that is too long
        return path
    ending = Path(name.lower().removesuffix(".gz")).suffix
    if ending in READERS or ending in OTHER_FILES or not _HUB_NAME.fullmatch(name):
        fix = "correct the path; on Colab, upload the file (the folder icon) and copy its path"
        shown = name if name.isprintable() and name.strip() else repr(name)
        raise InputError(f"DATASET {shown}", found="no such file", expected=f"a file ending in {ENDINGS}", fix=fix)
    return None


def _rows_of_path(path: Path) -> tuple[list[Row], str]:
    if path.is_file():
        return _rows_of_file(path), ""
    if (path / "dataset_dict.json").is_file() or (path / "dataset_info.json").is_file():
        from datasets import load_from_disk

        return _rows_of_dataset(load_from_disk(str(path)), where=f"DATASET {path.name}")
    files = [file for file in sorted(path.rglob("*")) if file.is_file() and _ending(file) in READERS]
    files = [file for file in files if not any(part.startswith(".") for part in file.relative_to(path).parts)]
    chosen = [file for file in files if _TRAIN.search(file.name.lower())] or files
    if not chosen:
        fix = "put the files into it"
        raise InputError(f"DATASET {path}", found="a folder without data", expected=f"files in {ENDINGS}", fix=fix)
    note = f"Read {len(chosen)} of the folder's {len(files)} files: those with `train` in their names."
    rows = [Row(f"{file.name}, {row.place}", row.value) for file in chosen for row in _rows_of_file(file)]
    return rows, note if len(chosen) < len(files) else ""


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _rows_of_file(path: Path) -> list[Row]:
    where, ending = f"DATASET {path.name}", _ending(path)
    if ending not in READERS:
        fix = OTHER_FILES.get(ending, "convert it; a file with one JSON object a line ends in .jsonl")
        raise InputError(where, found=f"a file ending in {ending or 'nothing'}", expected=ENDINGS, fix=fix)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        fix = "copy or download it again"
        raise InputError(
            where, found=f"a file that cannot be read ({error})", expected="a whole file", fix=fix
        ) from None
    rows = READERS[ending](data, where)
    if not rows:
        raise InputError(where, found="an empty file", expected="conversations", fix="give a file with conversations")
    return rows


def _text(data: bytes) -> str:
    """UTF-8 or UTF-16 as text. A byte that is not UTF-8 becomes half a character, which the check of its row names."""
    if data.startswith((b"\xff\xfe", b"\xfe\xff")):
        return data.decode("utf-16", "replace")
    if data[:200].count(0) * 3 > len(data[:200]):  # without a mark: every other byte of plain text is 0
        return data.decode("utf-16-le" if data[:1] != b"\0" else "utf-16-be", "replace")
    return data.decode("utf-8-sig", "surrogateescape")


def _json_rows(data: bytes, where: str) -> list[Row]:
    """JSON in any layout: a list, one object a line, or objects printed over several lines."""
    text, decoder, values = _text(data), json.JSONDecoder(), []
    at, line = _SPACE.match(text).end(), 1
    while at < len(text):
        line += text.count("\n", values[-1][2] if values else 0, at)
        try:
            value, end = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            return _lines(text, where=where, error=error, line=line)
        values.append((line, value, at))
        at = _SPACE.match(text, end).end()
    if len(values) > 1:
        return [Row(f"line {line}", value) for line, value, _ in values]
    return [Row(f"row {number}", value) for number, value in enumerate(_unwrapped(values[0][1]))] if values else []


def _unwrapped(value: Any) -> list[Any]:
    """The rows in a file's one value: a list, or a list under a single key such as "data"; else the value is a row."""
    if isinstance(value, dict) and len(value) == 1:
        [inner] = value.values()
        if isinstance(inner, list) and inner and all(isinstance(row, dict) for row in inner):
            keys = {str(key).lower() for row in inner for key in row}
            return [value] if keys & set(ROLE_KEYS) else inner
    return value if isinstance(value, list) else [value]


def _lines(text: str, *, where: str, error: Exception, line: int) -> list[Row]:
    """One value a line, where the text as a whole is not JSON; a line that is not becomes `Unreadable`.

    Raises:
        InputError: most lines are not, so that the file was not meant to be read so: about what the whole lacked.
    """
    rows = []
    # splitlines would also split at U+2028 and U+0085, which may stand inside a text
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                rows.append(Row(f"line {number}", json.loads(content)))
            except (ValueError, RecursionError) as one:
                rows.append(Row(f"line {number}", Unreadable(f"not JSON ({_message(one)}): {content.strip()[:60]}")))
    if sum(isinstance(row.value, dict | list) for row in rows) * 2 <= len(rows):
        line = getattr(error, "lineno", line)
        content = text.split("\n")[line - 1].strip()[:60]
        found, fix = f"not JSON ({_message(error)}): {content}", "correct that line, or the one before it"
        raise InputError(f"{where}, line {line}", found=found, expected="JSON", fix=fix)
    return rows


def _message(error: Exception) -> str:
    return getattr(error, "msg", "") or str(error).partition(";")[0]  # a number of too many digits has no `msg`


def _table_rows(data: bytes, where: str) -> list[Row]:
    """A table with a header, split at whichever of comma, semicolon and tab gives the header most columns."""
    text = _text(data)
    limit = csv.field_size_limit(len(text) + 1)  # it is 131,072 characters for the whole process
    try:
        first = [next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), []) for mark in ",;\t"]
        names, mark = max(zip(first, ",;\t", strict=True), key=lambda pair: len(pair[0]))
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            found, fix = f"the column {twice[0]!r} twice", "give every column a name of its own"
            raise InputError(f"{where}, line 1", found=found, expected="different names", fix=fix)
        return list(
            _records(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True), names, where=where)
        )
    finally:
        csv.field_size_limit(limit)


def _records(reader: Any, names: list[str], *, where: str) -> Iterator[Row]:
    next(reader, None)  # the header
    while True:
        line = reader.line_num + 1
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # it swallowed every line behind it
                found, fix = "a quotation mark that is never closed", "close it, or double it where it is text"
                raise InputError(f"{where}, line {line}", found=found, expected="a table", fix=fix) from None
            yield Row(f"line {line}", Unreadable(f"not a table's row ({error})"))
            continue
        if cells is None:
            return
        if len(cells) > len(names):
            yield Row(f"line {line}", Unreadable(f"{len(cells)} cells under {len(names)} columns"))
        elif cells:
            yield Row(f"line {line}", dict(zip(names, cells, strict=False)))


def _parquet_rows(data: bytes, where: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException as error:
        found, fix = f"not Parquet ({str(error).splitlines()[0][:80]})", "copy or download it again"
        raise InputError(where, found=found, expected="a Parquet file", fix=fix) from None
    return [Row(f"row {number}", value) for number, value in enumerate(values)]


READERS: dict[str, Callable[[bytes, str], list[Row]]] = {
    ".json": _json_rows,
    ".jsonl": _json_rows,
    ".ndjson": _json_rows,
    ".csv": _table_rows,
    ".tsv": _table_rows,
    ".parquet": _parquet_rows,
}


def _rows_of_hub(name: str) -> tuple[list[Row], str]:
    parts = _HUB_NAME.fullmatch(name)
    repository, where = parts["name"], f"DATASET {name}"
    require_hub(repository, setting="DATASET", repo_type="dataset")
    from datasets import load_dataset

    try:
        dataset = load_dataset(repository, split=parts["split"])
    except Exception as error:  # what its files hold, its author's choices: datasets raises a dozen kinds
        fix = "download one of its files and give its path"
        found = f"a data set that cannot be loaded ({hide_token(error)[:160]})"
        raise InputError(where, found=found, expected="one that `load_dataset` reads", fix=fix) from None
    return _rows_of_dataset(dataset, where=where)


def _rows_of_dataset(dataset: Any, *, where: str) -> tuple[list[Row], str]:
    """The rows of a Dataset; of a DatasetDict those of its one split, or of the one with `train` in its name."""
    note = ""
    if isinstance(dataset.column_names, dict):
        splits = list(dataset)
        chosen = splits if len(splits) == 1 else [split for split in splits if _TRAIN.search(split.lower())]
        if len(chosen) != 1:
            example = f"{where.partition(' ')[2] or 'name'}:{splits[0]}"
            found, fix = f"the splits {', '.join(splits)}", f'name one, as in "{example}"'
            raise InputError(where, found=found, expected="one to train on", fix=fix)
        note = f"Read of its splits ({', '.join(splits)}): {chosen[0]}." if len(splits) > 1 else ""
        dataset = dataset[chosen[0]]
    tables = dataset.with_format("arrow").iter(1000)  # as stored: neither pictures nor sounds are decoded
    values = (value for table in tables for value in table.to_pylist())
    return [Row(f"row {number}", value) for number, value in enumerate(values)], note
