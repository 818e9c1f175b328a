"""The rows of a file, a folder, a data set on the Hub, or a list, each with its place. Nothing is converted here."""

import csv
import gzip
import io
import json
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from helpers.base import InputError
from helpers.environment.hub import hide_token, require_hub
from helpers.messages import N_, _

ENDINGS = N_(".json, .jsonl, .ndjson, .csv, .tsv or .parquet, also with .gz")
OTHER_FILES = dict.fromkeys([".xlsx", ".xls"], N_("save it as .csv, in UTF-8")) | {".zip": N_("unpack it")}
CHINESE = ("gb18030", "gbk", "gb2312", "big5", "cp950")
CONVERT = N_("convert it; a file with one JSON object a line ends in .jsonl")
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
        return _numbered(source), ""
    found = _("a {kind}", kind=type(source).__name__)
    fix = _("give a path, a name on the Hub, a Dataset or a list")
    raise InputError("dataset", found=found, expected=_("conversations"), fix=fix)


def _numbered(values: Iterable[Any]) -> list[Row]:
    place = _("row {number}")
    return [Row(place.format(number=number), value) for number, value in enumerate(values)]


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
        expected = _("a file ending in {ending}", ending=_(ENDINGS))
        fix = _("correct the path; on Colab, upload the file (the folder icon) and copy its path")
        shown = name if name.isprintable() and name.strip() else repr(name)
        raise InputError(f"DATASET {shown}", found=_("no such file"), expected=expected, fix=fix)
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
        found, expected = _("a folder without data"), _("files in {endings}", endings=_(ENDINGS))
        raise InputError(f"DATASET {path}", found=found, expected=expected, fix=_("put the files into it"))
    note = _(
        "Read {read} of the folder's {all} files: those with `train` in their names.", read=len(chosen), all=len(files)
    )
    place = _("{where}, {place}")
    rows = [
        Row(place.format(where=file.name, place=row.place), row.value) for file in chosen for row in _rows_of_file(file)
    ]
    return rows, note if len(chosen) < len(files) else ""


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _rows_of_file(path: Path) -> list[Row]:
    where, ending = f"DATASET {path.name}", _ending(path)
    if ending not in READERS:
        found = _("a file ending in {ending}", ending=ending) if ending else _("a file ending in nothing")
        fix = _(OTHER_FILES.get(ending, CONVERT))
        raise InputError(where, found=found, expected=_(ENDINGS), fix=fix)
    try:
        data = path.read_bytes()
        data = gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data
    except (OSError, EOFError, zlib.error) as error:
        found, fix = _("a file that cannot be read ({error})", error=error), _("copy or download it again")
        raise InputError(where, found=found, expected=_("a whole file"), fix=fix) from None
    if ending != ".parquet" and (encoding := chinese_encoding(data)):
        data = data.decode(encoding).encode()
        print(_("{where}: read as {encoding}, because it is not UTF-8", where=where, encoding=encoding.upper()))
    rows = READERS[ending](data, where)
    if not rows:
        found, fix = _("an empty file"), _("give a file with conversations")
        raise InputError(where, found=found, expected=_("conversations"), fix=fix)
    return rows


def chinese_encoding(data: bytes) -> str:
    """The encoding of a Chinese text that is not UTF-8, such as "gb18030", as Excel in China saves; else "".

    Texts in other encodings are not guessed at: cp1250 and cp1252 look alike, and the wrong one changes letters unseen.
    """
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        from charset_normalizer import from_bytes

        best = None if data.startswith((b"\xff\xfe", b"\xfe\xff")) else from_bytes(data).best()
        if best and best.encoding in CHINESE:
            return best.encoding
    return ""


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
        place = _("line {number}")
        return [Row(place.format(number=line), value) for line, value, at in values]
    return _numbered(_unwrapped(values[0][1])) if values else []


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
    rows, place = [], _("line {number}")
    # splitlines would also split at U+2028 and U+0085, which may stand inside a text
    for number, content in enumerate(text.split("\n"), 1):
        if content.strip():
            try:
                value = json.loads(content)
            except (ValueError, RecursionError) as one:
                value = Unreadable(_not_json(one, content))
            rows.append(Row(place.format(number=number), value))
    if sum(isinstance(row.value, dict | list) for row in rows) * 2 <= len(rows):
        line = getattr(error, "lineno", line)
        found = _not_json(error, text.split("\n")[line - 1])
        fix = _("correct that line, or the one before it")
        raise InputError(_("{where}, line {line}", where=where, line=line), found=found, expected="JSON", fix=fix)
    return rows


def _not_json(error: Exception, content: str) -> str:
    why = getattr(error, "msg", "") or str(error).partition(";")[0]  # a number of too many digits has no `msg`
    return _("not JSON ({why}): {content}", why=why, content=content.strip()[:60])


def _table_rows(data: bytes, where: str) -> list[Row]:
    """A table with a header, split at whichever of comma, semicolon and tab gives the header most columns."""
    text = _text(data)
    limit = csv.field_size_limit(len(text) + 1)  # it is 131,072 characters for the whole process
    try:
        first = [next(csv.reader(io.StringIO(text, newline=""), delimiter=mark), []) for mark in ",;\t"]
        names, mark = max(zip(first, ",;\t", strict=True), key=lambda pair: len(pair[0]))
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            place = _("{where}, line {line}", where=where, line=1)
            found = _("the column {name!r} twice", name=twice[0])
            fix = _("give every column a name of its own")
            raise InputError(place, found=found, expected=_("different names"), fix=fix)
        return list(
            _records(csv.reader(io.StringIO(text, newline=""), delimiter=mark, strict=True), names, where=where)
        )
    finally:
        csv.field_size_limit(limit)


def _records(reader: Any, names: list[str], *, where: str) -> Iterator[Row]:
    next(reader, None)  # the header
    place = _("line {number}")
    while True:
        line = reader.line_num + 1
        here = place.format(number=line)
        try:
            cells = next(reader, None)
        except csv.Error as error:
            if "unexpected end" in str(error):  # it swallowed every line behind it
                found = _("a quotation mark that is never closed")
                fix = _("close it, or double it where it is text")
                where = _("{where}, line {line}", where=where, line=line)
                raise InputError(where, found=found, expected=_("a table"), fix=fix) from None
            yield Row(here, Unreadable(_("not a table's row ({error})", error=error)))
            continue
        if cells is None:
            return
        if len(cells) > len(names):
            why = _("{cells} cells under {columns} columns", cells=len(cells), columns=len(names))
            yield Row(here, Unreadable(why))
        elif cells:
            yield Row(here, dict(zip(names, cells, strict=False)))


def _parquet_rows(data: bytes, where: str) -> list[Row]:
    import pyarrow
    import pyarrow.parquet

    try:
        values = pyarrow.parquet.read_table(pyarrow.BufferReader(data)).to_pylist()
    except pyarrow.ArrowException as error:
        found = _("not Parquet ({error})", error=str(error).splitlines()[0][:80])
        fix = _("copy or download it again")
        raise InputError(where, found=found, expected=_("a Parquet file"), fix=fix) from None
    return _numbered(values)


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
        found = _("a data set that cannot be loaded ({error})", error=hide_token(error)[:160])
        fix = _("download one of its files and give its path")
        raise InputError(where, found=found, expected=_("one that `load_dataset` reads"), fix=fix) from None
    return _rows_of_dataset(dataset, where=where)


def _rows_of_dataset(dataset: Any, *, where: str) -> tuple[list[Row], str]:
    """The rows of a Dataset; of a DatasetDict those of its one split, or of the one with `train` in its name."""
    note = ""
    if isinstance(dataset.column_names, dict):
        splits = list(dataset)
        chosen = splits if len(splits) == 1 else [split for split in splits if _TRAIN.search(split.lower())]
        if len(chosen) != 1:
            example = f"{where.partition(' ')[2] or 'name'}:{splits[0]}"
            found = _("the splits {splits}", splits=", ".join(splits))
            fix = _('name one, as in "{example}"', example=example)
            raise InputError(where, found=found, expected=_("one to train on"), fix=fix)
        if len(splits) > 1:
            note = _("Read of its splits ({splits}): {split}.", splits=", ".join(splits), split=chosen[0])
        dataset = dataset[chosen[0]]
    tables = dataset.with_format("arrow").iter(1000)  # as stored: neither pictures nor sounds are decoded
    values = (value for table in tables for value in table.to_pylist())
    return _numbered(values), note
