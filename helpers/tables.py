"""Rows as a table: the same facts as plain text (terminals, nbval), HTML (notebooks) and Markdown (job pages)."""

import re
from collections.abc import Sequence

NUMBER = re.compile(r"-?[\d,]+(\.\d+)?( ?%)?|")


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
    """The same rows as Markdown, for a job page or a file; a `|` in a cell is escaped."""
    lines = [headers, ["---"] * len(headers), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def _table(headers: Sequence[str], rows: Sequence[Sequence[object]], form: str) -> str:
    from tabulate import tabulate

    columns = zip(*rows, strict=True)
    sides = ["right" if all(NUMBER.fullmatch(str(cell)) for cell in column) else "left" for column in columns]
    return tabulate(rows, headers=headers, tablefmt=form, disable_numparse=True, colalign=sides or None)
