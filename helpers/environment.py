"""The preflight: is this machine fit for the series, and if not, what to do about it."""

import platform
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.errors import InputError
from helpers.image import Pin, read_lock
from helpers.install import GPU_ONLY, find_requirements, installed_version, loaded_version, same_version
from helpers.tables import html_table, text_table

HEADERS = ("check", "found", "expected", "verdict", "what to do")


class EnvironmentProblem(InputError):
    """The environment has a row that failed."""


@dataclass(frozen=True)
class Row:
    """One check. `verdict` is `ok`, `warn` or `fail`; `fix` says what to do where it is not `ok`."""

    what: str
    found: str
    expected: str
    verdict: str = "ok"
    fix: str = ""


@dataclass(frozen=True)
class EnvironmentReport:
    """The rows of the preflight. Example: `check_environment().raise_if_failed()`."""

    rows: tuple[Row, ...]

    @property
    def ok(self) -> bool:
        """True where no row failed; warnings do not count."""
        return all(row.verdict != "fail" for row in self.rows)

    def raise_if_failed(self) -> None:
        """Raise EnvironmentProblem for the first failed row."""
        for row in self.rows:
            if row.verdict == "fail":
                raise EnvironmentProblem(row.what, found=row.found, expected=row.expected, fix=row.fix)

    def _cells(self) -> list[list[str]]:
        return [[row.what, row.found, row.expected, row.verdict, row.fix] for row in self.rows]

    def __repr__(self) -> str:
        return text_table(HEADERS, self._cells())

    def _repr_html_(self) -> str:
        return html_table(HEADERS, self._cells())


def check_python() -> Row:
    """The running Python against the series' range, 3.11 to 3.13."""
    found, fits = platform.python_version(), (3, 11) <= sys.version_info[:2] <= (3, 13)
    return Row(
        "Python", found, "3.11 to 3.13", "ok" if fits else "fail", "" if fits else "use Python 3.11, 3.12 or 3.13"
    )


def check_packages(pins: Sequence[Pin], *, gpu: bool) -> list[Row]:
    """Every pinned package against what is installed, and against what this process has loaded."""
    rows = []
    for pin in pins:
        installed, loaded = installed_version(pin.name), loaded_version(pin.name)
        found = (installed or "not installed") + (f", loaded {loaded}" if loaded and loaded != installed else "")
        if installed is None and pin.name in GPU_ONLY and not gpu:
            rows.append(Row(pin.name, "not installed", "not needed without a GPU"))
        elif installed is None or not same_version(installed, pin.version):
            rows.append(
                Row(pin.name, found, pin.version, "fail" if installed is None else "warn", "run the setup cell")
            )
        elif loaded and not same_version(loaded, installed):
            rows.append(Row(pin.name, found, pin.version, "fail", "restart the kernel once"))
        else:
            rows.append(Row(pin.name, found, pin.version))
    return rows


def check_environment(requirements: str | Path = "requirements-colab.txt") -> EnvironmentReport:
    """Check this machine and its packages against the lock."""
    import torch

    gpu = torch.cuda.is_available()
    return EnvironmentReport((check_python(), *check_packages(read_lock(find_requirements(requirements)), gpu=gpu)))
