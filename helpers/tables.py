"""Rows as a table: the same facts as plain text (terminals, nbval) and as HTML (notebooks)."""

from collections.abc import Sequence


def text_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Plain text, columns aligned, numbers to the right.

    Example:
        >>> print(text_table(["stage", "GiB"], [["load", 2.5]]))
        stage      GiB
        -------  -----
        load       2.5
    """
    from tabulate import tabulate

    return tabulate(rows, headers=headers, disable_numparse=False)


def html_table(headers: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """The same rows as an HTML table; every cell is escaped."""
    from tabulate import tabulate

    return str(tabulate(rows, headers=headers, tablefmt="html"))
