"""The setup cell's work: find out where this runs, install the lock there, and say what changed."""

import importlib
import importlib.metadata
import logging
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from helpers.base import ROOT, InputError, Table
from helpers.environment.requirements import (
    NOTHING,
    Change,
    Conflict,
    Pin,
    name_and_version,
    normal_name,
    public,
    read_lock,
    read_needs,
    requirement_name,
    unmet,
)
from helpers.messages import N_, _, _n

GPU_ONLY = ("xformers",)  # in the lock, but of no use without a CUDA GPU: the local CPU environment leaves it out
PLACES = {"colab": "Google Colab", "kaggle": "Kaggle", "local": N_("this computer")}
RESTART = {
    "colab": N_("Runtime > Restart session, then run this cell again"),
    "kaggle": N_("Run > Restart & clear cell outputs, then run this cell again"),
    "local": N_("restart the kernel, then run this cell again"),
}
# Of Colab's past runtimes the newest on which the lock installs cleanly; a test holds its freeze against the lock.
RUNTIME_VERSION = "2026.07"
OTHER_IMAGE = {
    "colab": N_("Runtime > Change runtime type > Runtime version > {version} > Save, then run from the top"),
    "kaggle": N_("run the notebook in Colab, with Runtime > Change runtime type > Runtime version > {version}"),
}
# No restart is needed where these change under a running kernel: {package: why}.
SAFE_TO_REPLACE = {"certifi": "a file of certificates, which the next connection reads anew"}
# What libraries warn of when Unsloth is imported and no reader can act on: {logger: part of the message}. Anything else
# that these loggers say is shown.
HARMLESS = {
    "torchao.kernel.intmm": "Detected no triton",  # true of every CPU, and the series uses none of these kernels
    "torch.utils._pytree": "Calling register_constant() on Enum subclasses is deprecated",  # by torchao, at its import
    "bitsandbytes.backends.cpu.ops": "Failed to load CPU gemm_4bit_forward",  # an optional kernel; it has its own
}

# Packages replaced after this process had imported them: `__version__` would tell too, but not every package has one.
_replaced_while_loaded: set[str] = set()


@dataclass(frozen=True, repr=False)
class SetupReport(Table):
    """What the setup cell found and did. `restart`: the packages that this kernel had loaded before they changed."""

    place: str
    changes: tuple[Change, ...]
    present: int
    installer: str
    seconds: float
    restart: tuple[str, ...]
    note: str = ""

    def _notes(self) -> list[str]:
        done = _n(
            "{count} package changed with {installer} in {seconds:.1f} s",
            "{count} packages changed with {installer} in {seconds:.1f} s",
            len(self.changes),
            installer=self.installer,
            seconds=self.seconds,
        )
        lock = _n(
            "{count} package already has the lock's versions",
            "{count} packages already have the lock's versions",
            self.present,
        )
        lines = [
            _(
                "{place}, Python {python}: {done}, {lock}.",
                place=_(PLACES[self.place]),
                python=sys.version.split()[0],
                done=done if self.changes else _("nothing to install"),
                lock=lock,
            )
        ]
        if self.note:
            lines.append(self.note)
        if self.restart:
            restart = _n(
                "RESTART NEEDED: {packages} was replaced, but this kernel still holds the old version. Do this once: "
                "{restart}.",
                "RESTART NEEDED: {packages} were replaced, but this kernel still holds the old version. Do this once: "
                "{restart}.",
                len(self.restart),
                packages=", ".join(self.restart),
                restart=_(RESTART[self.place]),
            )
            lines.append(restart)
        return lines

    def _table(self) -> tuple[list[str], list[list[str]]]:
        headers = _("package | before | now | why").split(" | ")
        return headers, [[c.package, c.before, c.after, c.reason] for c in self.changes]


def find_place() -> str:
    """Where this runs: `colab`, `kaggle` or `local`."""
    if "COLAB_RELEASE_TAG" in os.environ or "google.colab" in sys.modules:
        return "colab"
    return "kaggle" if "KAGGLE_KERNEL_RUN_TYPE" in os.environ else "local"


def find_requirements(path: str | Path) -> Path:
    """The file as given where it exists, else the one of this name in the repository's root."""
    for candidate in (Path(path), ROOT / path):
        if candidate.is_file():
            return candidate
    raise InputError(
        str(path),
        found=_("no such file"),
        expected=_("a requirements file"),
        fix=_("clone the repository again"),
    )


def installed_version(name: str) -> str | None:
    """The version that is installed now, or None. Example: `installed_version("pip")` -> `"24.1.2"`."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def same_version(a: str, b: str) -> bool:
    """Equal but for a build label and leading zeros. Example: `2.11.0+cu128` and `2.11.0` -> True."""
    from packaging.version import InvalidVersion, Version

    try:
        return Version(a).public == Version(b).public
    except InvalidVersion:  # a module may call its version as it likes
        return public(a) == public(b)


def import_names(name: str) -> set[str]:
    """What an installed package is imported as. Example: `unsloth-zoo` -> `{"unsloth_zoo"}`."""
    try:
        files = importlib.metadata.files(name) or ()
    except importlib.metadata.PackageNotFoundError:
        return set()
    names = {f.parts[0].split(".")[0] for f in files if f.suffix in (".py", ".so") and not f.parts[0].startswith(".")}
    return {n for n in names if n.isidentifier()}


def loaded_version(name: str) -> str | None:
    """The version of a package that this process has imported, where it says so, else None."""
    modules = [sys.modules[n] for n in import_names(name) if n in sys.modules]
    versions = [str(m.__dict__["__version__"]) for m in modules if "__version__" in m.__dict__]
    return versions[0] if versions else None


def stale_packages(pins: Sequence[Pin]) -> tuple[str, ...]:
    """The packages of which this process holds another version than the one installed now."""
    stale = set(_replaced_while_loaded)
    for pin in pins:
        if pin.name in SAFE_TO_REPLACE:
            continue
        loaded, installed = loaded_version(pin.name), installed_version(pin.name)
        if loaded and installed and not same_version(loaded, installed):
            stale.add(pin.name)
    return tuple(sorted(stale))


def image_conflicts(requirements: Path, *, pins: Sequence[Pin]) -> list[Conflict]:
    """What the lock's packages ask of this image's own packages and do not get; installing would not mend it.

    Read is what `make lock` wrote into the lock about that; a missing triton is no conflict, since only a GPU needs it.
    """
    versions: dict[str, str] = {}
    for distribution in importlib.metadata.distributions():
        if distribution.name:  # the first on the path wins, as in an import: a system's copy may lie behind it
            versions.setdefault(normal_name(distribution.name), distribution.version)
    python = platform.python_version()
    versions |= {"python": python, **{pin.name: pin.version for pin in pins}}
    broken = [
        Conflict(need.askers, *pair)
        for need in read_needs(requirements)
        for pair in unmet([need.requirement], versions, python=python)
    ]
    return [c for c in broken if (requirement_name(c.requires), c.found) != ("triton", NOTHING)]


def require_image(requirements: Path, *, pins: Sequence[Pin], place: str) -> None:
    """Refuse an image on which the lock cannot work, before anything is installed."""
    conflicts = image_conflicts(requirements, pins=pins)
    if conflicts:
        needs = (_("{package} (for {asker})", package=c.requires, asker=c.package) for c in conflicts)
        raise InputError(
            _("{place}'s image", place=PLACES[place]),
            found=", ".join(name_and_version(requirement_name(c.requires), c.found) for c in conflicts),
            expected=_("{needs}; nothing was installed", needs=", ".join(needs)),
            fix=other_image(place),
        )


def other_image(place: str) -> str:
    """How to get an image on which the lock works; "" on a local computer."""
    return _(OTHER_IMAGE[place], version=RUNTIME_VERSION) if place in OTHER_IMAGE else ""


def installer_command(requirements: Path) -> list[str]:
    """The command that installs the lock: uv where there is one (Colab has it), else pip."""
    uv = shutil.which("uv")
    start = [uv, "pip", "install", "--python", sys.executable] if uv else [sys.executable, "-m", "pip", "install"]
    return [*start, "--no-deps", "--require-hashes", "-r", str(requirements)]


def set_up(*, requirements: str | Path = "requirements-colab.txt") -> SetupReport:
    """Install the lock on Colab or Kaggle where something differs from it; on a local computer only look.

    Only the lock's packages are touched (no dependency resolution), and their hashes are checked. From then on this
    process does not show the `HARMLESS` warnings. Three settings are made where they are not set already:
    - UNSLOTH_DISABLE_STATISTICS: Unsloth's call home takes two minutes where the Hub is out of reach,
    - HF_UPDATE_DOWNLOAD_COUNTS: that of datasets takes three seconds there, also for a local file,
    - OMP_WAIT_POLICY: PyTorch's threads sleep where they wait for each other. By default they spin, and where other
      programs take a core from them, small products become twenty times slower (8 x 576 x 1536 on two cores beside one
      busy process: 23 ms, sleeping 1 ms).

    Raises:
        InputError: the lock cannot work on this image, the installer failed (its whole output is printed first), or a
            package is missing on a local computer, where installing is left to `make setup`.
    """
    start = time.perf_counter()
    hide_harmless_warnings()
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("UNSLOTH_DISABLE_STATISTICS", "1")
    os.environ.setdefault("HF_UPDATE_DOWNLOAD_COUNTS", "0")
    place = find_place()
    path = find_requirements(requirements)
    pins = read_lock(path)
    before = {pin.name: installed_version(pin.name) for pin in pins}
    differs = [pin for pin in pins if before[pin.name] is None or not same_version(before[pin.name], pin.version)]
    present = len(pins) - len(differs)
    if place == "local":
        return _look(pins, before=before, differs=differs, present=present)
    if not differs:
        return SetupReport(place, (), present, "", time.perf_counter() - start, stale_packages(pins))
    require_image(path, pins=pins, place=place)
    replaced = [pin for pin in differs if before[pin.name] and pin.name not in SAFE_TO_REPLACE]
    loaded = {pin.name for pin in replaced if import_names(pin.name) & set(sys.modules)}
    command = installer_command(path)
    installer = "uv" if "--python" in command else "pip"
    installing = _n(
        "{place}: installing {count} package with {installer} ...",
        "{place}: installing {count} packages with {installer} ...",
        len(differs),
        place=PLACES[place],
        installer=installer,
    )
    print(installing, flush=True)
    done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    importlib.invalidate_caches()
    now = {pin.name: installed_version(pin.name) for pin in pins}
    wrong = [pin.name for pin in pins if now[pin.name] is None or not same_version(now[pin.name], pin.version)]
    if done.returncode or wrong:
        print(" ".join(command), done.stdout, sep="\n", flush=True)
        raise _install_error(installer, status=done.returncode, wrong=wrong, file=path.name, place=place)
    _replaced_while_loaded.update(loaded)
    changes = tuple(Change(pin.name, before[pin.name] or _("none"), pin.version, pin.reason) for pin in differs)
    return SetupReport(place, changes, present, installer, time.perf_counter() - start, stale_packages(pins))


def _install_error(installer: str, *, status: int, wrong: Sequence[str], file: str, place: str) -> InputError:
    found, fix = _("exit status {status}", status=status), _("read the installer's own message above")
    if wrong:
        found = _("exit status {status}, and still not right: {packages}", status=status, packages=", ".join(wrong))
    if place == "kaggle":
        fix = _("read the installer's own message above, and see that Internet is on in the notebook's settings")
    return InputError(f"{installer} install", found=found, expected=_("the packages of {file}", file=file), fix=fix)


def hide_harmless_warnings() -> None:
    """From now on this process does not show what `HARMLESS` names."""
    for name in HARMLESS:
        logging.getLogger(name).addFilter(_not_harmless)


def _not_harmless(record: logging.LogRecord) -> bool:
    return HARMLESS[record.name] not in record.getMessage()


def _look(pins: Sequence[Pin], *, before: dict[str, str | None], differs: Sequence[Pin], present: int) -> SetupReport:
    missing = [pin.name for pin in differs if before[pin.name] is None and pin.name not in GPU_ONLY]
    if missing:
        raise InputError(
            _("this Python environment"),
            found=_("no {packages} in {folder}", packages=", ".join(missing), folder=sys.prefix),
            expected=_("the packages of {file}", file="tests/requirements-local.txt"),
            fix=_("run `make setup`, then choose the kernel of .venv"),
        )
    other = [
        _("{package} {version} (lock: {locked})", package=pin.name, version=before[pin.name], locked=pin.version)
        for pin in differs
        if before[pin.name]
    ]
    left_out = [pin.name for pin in differs if before[pin.name] is None]
    notes = [_("Left out here, since it needs a GPU: {packages}.", packages=", ".join(left_out))] if left_out else []
    if other:
        others = _(
            "Other versions than the lock's: {packages}. `make setup` brings them back.", packages=", ".join(other)
        )
        notes.append(others)
    return SetupReport("local", (), present, "", 0.0, stale_packages(pins), " ".join(notes))
