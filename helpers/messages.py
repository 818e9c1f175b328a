"""What the helpers say, in the reader's language: GNU gettext's catalogues in `locale/`, with English as the fallback.

Chinese is spoken on a page of the Chinese edition, where the notebook server tells a kernel its page, and wherever
gettext's own variables ask for it. Example: `%env LANGUAGE=zh_CN` in a cell of its own.
"""

import contextlib
import contextvars
import functools
import gettext
import os
from collections.abc import Iterator
from pathlib import Path

FOLDER, DOMAIN = Path(__file__).with_name("locale"), "helpers"
PAGE = "JPY_SESSION_NAME"  # Jupyter Server puts the notebook's path here
EDITION = "/zh-CN/"  # the folder of the Chinese pages
VARIABLES = (PAGE, "LANGUAGE", "LC_ALL", "LC_MESSAGES", "LANG")  # all that a choice of language depends on

_published = contextvars.ContextVar("published", default=False)


def _(message: str, /, **values: object) -> str:
    """A message in the reader's language, with the values in their places. It must be a literal, to be extracted.

    Example:
        >>> _("{name} has {rows:,} rows", name="my.csv", rows=1200)
        'my.csv has 1,200 rows'
    """
    text = _translations().gettext(message)
    return text.format(**values) if values else text


def _n(one: str, many: str, count: int, /, **values: object) -> str:
    """A message whose form depends on a number, which takes the place `{count}`.

    Example:
        >>> _n("{count:,} row of {name}", "{count:,} rows of {name}", 1, name="my.csv")
        '1 row of my.csv'
    """
    return _translations().ngettext(one, many, count).format(count=count, **values)


def N_(message: str) -> str:  # noqa: N802
    """The message as it is: marks the text of a constant for extraction. `_` translates it where it is shown."""
    return message


@contextlib.contextmanager
def in_english() -> Iterator[None]:
    """Whatever is said inside is in English: for what is published, not told to this reader."""
    token = _published.set(True)
    try:
        yield
    finally:
        _published.reset(token)


def _translations() -> gettext.NullTranslations:
    """The catalogue for this call: a reader may choose another language at any time."""
    if _published.get():
        return gettext.NullTranslations()
    return _catalogue(*map(os.environ.get, VARIABLES))


@functools.cache
def _catalogue(page: str | None, *_variables: str | None) -> gettext.NullTranslations:
    """The catalogue under these variables, which gettext reads by itself. Cached: it looks for files each time."""
    chinese_page = page is not None and EDITION in page.replace("%2F", "/")
    return gettext.translation(DOMAIN, FOLDER, languages=["zh"] if chinese_page else None, fallback=True)
