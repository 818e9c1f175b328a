"""Find the data set that a reader names, before anything is loaded."""

import json
import os
from pathlib import Path
from typing import Any

from helpers.base import InputError
from helpers.environment.hub import require_hub

EXPECTED = 'rows like {"conversations": [{"from": "human", "value": "…"}, …]}'


def find_dataset(name: str) -> str:
    """What `load_dataset` is to read, once it is sure that it can.

    Returns:
        The name as given; of a file its absolute path.

    Raises:
        InputError: the file is missing, empty, not UTF-8, not JSON (Lines) or holds no conversations; or the hub has
            no such data set, or cannot be reached.
    """
    if not name.endswith((".json", ".jsonl")):
        require_hub(name, setting="DATASET", repo_type="dataset")
        return name
    file = Path(os.path.abspath(os.path.expanduser(name)))
    where, fix = f"DATASET {name}", "give a file with one conversation a line"
    if not os.path.isfile(file):  # where Path raises, for a name that is too long
        fix = "correct the path; on Colab, upload the file (the folder icon) and copy its path"
        raise InputError(where, found="no such file", expected="a .json or .jsonl file", fix=fix)
    rows = _rows(file, where=where)
    if not rows:
        raise InputError(where, found="an empty file", expected="conversations", fix=fix)
    for number, row in enumerate(rows, 1):
        turns = row.get("conversations") if isinstance(row, dict) else None
        if not (isinstance(turns, list) and turns and all(isinstance(turn, dict) for turn in turns)):
            found = json.dumps(row, ensure_ascii=False)[:80]
            raise InputError(f"{where}, row {number}", found=found, expected=EXPECTED, fix="write every row so")
    return str(file)


def _rows(file: Path, *, where: str) -> list[Any]:
    try:
        text = file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        found = f"a byte that is not UTF-8, at {error.start}"
        raise InputError(where, found=found, expected="text in UTF-8", fix="save the file as UTF-8") from None
    if text.lstrip().startswith("["):
        return _parse(text, where=where, line=1)
    # splitlines would also split at U+2028 and U+0085, which may stand inside a text
    lines = enumerate(text.split("\n"), 1)
    return [_parse(content, where=where, line=line) for line, content in lines if content.strip()]


def _parse(text: str, *, where: str, line: int) -> Any:
    """The JSON in a text that begins in this line of the file."""
    try:
        return json.loads(text)
    except ValueError as error:
        within = getattr(error, "lineno", 1) - 1  # a number of too many digits has none
        found = f"not JSON ({getattr(error, 'msg', error)}): {text.split(chr(10))[within].strip()[:60]}"
        fix = "correct or delete that line"
        raise InputError(f"{where}, line {line + within}", found=found, expected="JSON", fix=fix) from None
