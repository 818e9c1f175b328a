"""What every other module stands on: the shape of an error, paths, files written whole or not at all, and tables."""

import hashlib
import html
import itertools
import os
import re
import shutil
from collections.abc import Sequence
from pathlib import Path

from helpers.messages import _

ROOT = Path(__file__).resolve().parent.parent  # the folder that holds helpers/ and notebooks/
NUMBER = re.compile(r"[-+]?[\d,]+(\.\d+)?( ?%)?|")


class InputError(ValueError):
    """Bad input, said in one line.

    Args:
        where: the file, row, cell or setting that is wrong.
        found: what is there.
        expected: what should be there.
        fix: what the reader can do now.

    Example:
        >>> print(InputError("MAX_STEPS", found="0", expected="1 or more", fix="set MAX_STEPS to 60"))
        MAX_STEPS: found 0, expected 1 or more. Fix: set MAX_STEPS to 60.
    """

    def __init__(self, where: str, *, found: str, expected: str, fix: str):
        self.where, self.found, self.expected, self.fix = where, found, expected, fix
        line = _("{where}: found {found}, expected {expected}. Fix: {fix}.")
        super().__init__(line.format(where=where, found=found, expected=expected, fix=fix))

    def _render_traceback_(self) -> list[str]:
        """IPython shows this instead of a traceback: the one line that the reader needs."""
        return [f"{type(self).__name__}: {self}"]


def short_path(path: str | Path) -> str:
    """A path as it is printed: relative to the series' folder or to the home folder where it lies below them."""
    path = Path(path)
    for base, prefix in ((ROOT, ""), (Path.home(), "~/")):
        if path.is_relative_to(base):
            return prefix + path.relative_to(base).as_posix()
    return path.as_posix()


def sha256_of(path: Path) -> str:
    """The sha256 of a file, as 64 hexadecimal digits."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def hash_files(path: Path, *, pattern: str = "*") -> dict[str, str]:
    """{name relative to the artefact: sha256} of one file, or of the files below a folder that match a pattern."""
    if path.is_file():
        return {path.name: sha256_of(path)}
    files = (file for file in sorted(path.rglob(pattern)) if file.is_file())
    return {file.relative_to(path).as_posix(): sha256_of(file) for file in files}


def replace_file(path: Path, content: bytes, *, durable: bool = True) -> None:
    """Write a file whole or not at all.

    Args:
        durable: wait until it is on the disk; without it, a power cut may bring back the old one.
    """
    unfinished = path.with_name(f".unfinished-{path.name}")
    try:
        with open(unfinished, "wb") as file:
            file.write(content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a folder or file so that nothing is lost; its new place.

    Example: runs/cpu -> runs/cpu.previous-1, or -2 where that is there already
    """
    numbers = (path.with_name(f"{path.name}.previous-{number}") for number in itertools.count(1))
    return path.rename(next(place for place in numbers if not os.path.lexists(place)))


def reason(error: Exception) -> str:
    """The first line of what went wrong, as short as the system says it. Example: "No space left on device"."""
    if isinstance(error, shutil.Error):  # copytree's list of (source, target, message)
        return str(error.args[0][0][2]).partition(": '")[0]
    if isinstance(error, RuntimeError) and "inline_container" in str(error):  # its own words name a line of its source
        return _("PyTorch could not write a file to its end: is the disk full?")
    return getattr(error, "strerror", None) or next(iter(str(error).splitlines()), type(error).__name__)


def text_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text, columns aligned, numbers to the right and shown with the digits that they come with.

    Example:
        >>> print(text_table(["stage", "GiB"], [["load", "2.50"]]))
        stage      GiB
        -------  -----
        load      2.50
    """
    return _table(headers, rows, "simple")


def html_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same rows as an HTML table; every cell is escaped."""
    table = str(_table(headers, rows, "html"))
    for tag in ("td", "th"):  # notebooks align cells to the right unless told otherwise
        table = table.replace(f"<{tag}>", f'<{tag} style="text-align: left;">')
    return table


def markdown_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same rows as Markdown, for a job page or a file: one line each, without HTML, and with `|` escaped."""

    def shown(cell: object) -> str:
        return html.escape(" ".join(str(cell).split()), quote=False).replace("|", "\\|")

    lines = [headers, ["---"] * len(headers), *([shown(cell) for cell in row] for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


class Table:
    """A result that shows itself: a title, a table, notes below it; and in HTML further rows that a reader unfolds."""

    def _title(self) -> str:
        return ""

    def _table(self) -> tuple[Sequence[str], Sequence[Sequence[object]]]:
        """(headers, rows) of what is shown at once; no table where there are no rows."""
        return (), ()

    def _notes(self) -> Sequence[str]:
        return ()

    def _folded(self) -> tuple[str, Sequence[str], Sequence[Sequence[object]]]:
        """(what it is, headers, rows) of what HTML shows on demand; nothing where it has no name."""
        return "", (), ()

    def __repr__(self) -> str:
        headers, rows = self._table()
        lines = [self._title(), text_table(headers, rows) if rows else "", *self._notes()]
        return "\n".join(filter(None, lines))

    def _repr_html_(self) -> str:
        (headers, rows), (name, more_headers, more) = self._table(), self._folded()
        parts = [f"<p><b>{html.escape(self._title())}</b></p>"] if self._title() else []
        parts += [html_table(headers, rows)] if rows else []
        parts += [f"<p>{html.escape(note)}</p>" for note in self._notes()]
        if name:
            parts.append(f"<details><summary>{html.escape(name)}</summary>{html_table(more_headers, more)}</details>")
        return "".join(parts)


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]], form: str) -> str:
    from tabulate import tabulate

    columns = zip(*rows, strict=True)
    sides = ["right" if all(NUMBER.fullmatch(str(cell)) for cell in column) else "left" for column in columns]
    return tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True, colalign=sides or None)
