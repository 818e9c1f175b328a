"""The way to a T4 elsewhere: the notebook that is sent runs for real here; the two services' commands are stand-ins.

A stand-in takes exactly the options of the real command (kaggle 2.2.5, google-colab-cli 0.7.5) and, like the real one,
ends with status 0 whatever the notebook did.
"""

import base64
import io
import json
import os
import re
import shutil
import sys
import tarfile
import tomllib
from pathlib import Path

import nbclient
import nbformat
import pytest

from helpers.base import ROOT
from tests.maintain import remote
from tests.maintain.series import AT_THE_END, read_parameter_file, with_new_ports
from tests.maintain.smollm2 import prepare_smollm2

KAGGLE = """
kernels = commands.add_parser("kernels").add_subparsers(dest="command")
push = kernels.add_parser("push")
push.add_argument("--path"), push.add_argument("--timeout", type=int), push.add_argument("--accelerator")
kernels.add_parser("status").add_argument("kernel")
output = kernels.add_parser("output")
output.add_argument("kernel"), output.add_argument("--path"), output.add_argument("--force", action="store_true")
given = parser.parse_args()
if given.command == "push":
    shutil.copytree(given.path, world / "pushed")
    print(world.joinpath("refusal").read_text() if world.joinpath("refusal").exists()
          else "Kernel version 3 successfully pushed.  Please check progress at https://example.org")
elif given.command == "status":
    states = world.joinpath("states").read_text().split()
    world.joinpath("states").write_text(" ".join(states[1:]))
    print(f'{given.kernel} has status "KernelWorkerStatus.{states[0]}"')
elif world.joinpath("executed.tar.gz").exists():
    shutil.copy(world / "executed.tar.gz", given.path)
"""
COLAB = """
new, run = commands.add_parser("new"), commands.add_parser("exec")
new.add_argument("--gpu", choices=["T4", "L4"])
run.add_argument("--file"), run.add_argument("--timeout", type=float)
download, stop = commands.add_parser("download"), commands.add_parser("stop")
download.add_argument("remote"), download.add_argument("local")
for each in (new, run, download, stop):
    each.add_argument("--session", required=True)
given = parser.parse_args()
if given.part == "exec":
    shutil.copytree(pathlib.Path(given.file).parent, world / "pushed")
    if world.joinpath("times-out").exists():
        sys.exit("[colab] Timed out")
elif given.part == "download":
    assert given.remote == "/content/executed.tar.gz"
    if not world.joinpath("executed.tar.gz").exists():
        sys.exit("[colab] Download failed: 404")
    shutil.copy(world / "executed.tar.gz", given.local)
"""
BOTH = """#!{python}
import argparse, pathlib, shutil, sys
world = pathlib.Path("{world}")
with world.joinpath("calls").open("a") as calls:
    print(*sys.argv[1:], file=calls)
parser = argparse.ArgumentParser()
commands = parser.add_subparsers(dest="part")
"""
T4 = read_parameter_file(ROOT / "tests/profiles/t4.toml")
PARAMETERS = ("-p", "MAX_SEQ_LENGTH", "256")


def command(folder, name, text):
    folder.mkdir(exist_ok=True)
    (folder / name).write_text(text)
    (folder / name).chmod(0o755)


def run_driver(machine, chapters, **choices):
    """Run the notebook that is sent here, in an empty folder; what it said, and the archive that it packed."""
    command(machine / "bin", "nvidia-smi", "#!/bin/sh\necho Tesla T4\n")
    choices |= {"MODEL_NAME": str(prepare_smollm2()), "CHAT_TEMPLATE": "", "MAX_SEQ_LENGTH": 256, "ROWS": 100}
    driver = remote.make_driver(remote.make_bundle(chapters, choices, profile="small"))
    changed = {"PATH": f"{machine / 'bin'}:{os.environ['PATH']}", "TMPDIR": str(machine)}
    with pytest.MonkeyPatch.context() as patch:
        for name, value in changed.items():
            patch.setenv(name, value)
        options = dict(kernel_name="python3", resources={"metadata": {"path": str(machine)}}, **AT_THE_END)
        with_new_ports(lambda: nbclient.NotebookClient(driver, **options).execute())
    return "".join(output.text for output in driver.cells[1].outputs), machine / "executed.tar.gz"


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """What the notebook that is sent packs: one chapter passes and one fails."""
    said, packed = run_driver(tmp_path_factory.mktemp("machine"), ["03_data", "05_infer"], MAX_STEPS=2)
    assert said.startswith("Tesla T4") and "[2/2] 05_infer" in said, said
    return packed


@pytest.fixture
def world(tmp_path, monkeypatch):
    """A machine with both commands, which write what they are asked for into one folder."""
    for name, text in (("kaggle", KAGGLE), ("colab", COLAB)):
        command(tmp_path / "bin", name, BOTH.format(python=sys.executable, world=tmp_path) + text)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setenv("KAGGLE_USERNAME", "someone")
    monkeypatch.setattr(remote, "POLL_SECONDS", 0)
    (tmp_path / "states").write_text("QUEUED RUNNING COMPLETE")
    return tmp_path


def calls(world):
    return (world / "calls").read_text().splitlines()


@pytest.mark.parametrize("service", ["kaggle", "colab"])
def test_a_chapter_that_failed_there_fails_here(service, world, archive, capsys):
    shutil.copy(archive, world)
    into = world / "t4"
    into.mkdir()
    (into / "old").touch()
    assert remote.main([service, "03_data", "05_infer", *PARAMETERS, "--into", str(into)]) == 1
    rows = {line.split()[0]: line for line in capsys.readouterr().out.splitlines() if line.startswith("0")}
    assert rows["03_data"].split()[1] == "ok" and "conversations, longest" in rows["03_data"]
    assert rows["05_infer"].split()[1] == "FAILED" and "adapter" in rows["05_infer"]
    assert (into / "executed/05_infer.ipynb").exists() and (into / "executed/measured.json").exists()
    assert (into / "handoff.json").exists() and (into / "numbers/03_data.json").exists()  # the regression reads them
    assert json.loads((into / "executed/measured.json").read_text())["profile"] == "small"
    assert (world / "t4.previous/old").exists() and not (into / "old").exists()


@pytest.mark.parametrize("service", ["kaggle", "colab"])
def test_chapters_that_passed_pass(service, world, archive):
    shutil.copy(archive, world)
    assert remote.main([service, "03_data", *PARAMETERS, "--into", str(world / "t4")]) == 0


def test_kaggle_is_asked_for_a_t4_and_for_this_very_version(world, archive):
    shutil.copy(archive, world)
    remote.main(["kaggle", "03_data", *PARAMETERS, "--into", str(world / "t4")])
    asked = calls(world)
    assert "--accelerator NvidiaTeslaT4" in asked[0] and "--timeout 10800" in asked[0]
    assert asked[1:4] == ["kernels status someone/llama-series-on-a-t4/3"] * 3
    metadata = json.loads((world / "pushed/kernel-metadata.json").read_text())
    assert metadata["is_private"] and metadata["enable_gpu"] and metadata["enable_internet"]
    assert (world / "pushed" / metadata["code_file"]).stat().st_size < remote.KAGGLE_LIMIT


def test_colab_gives_its_machine_back_also_after_a_failure(world):
    assert remote.main(["colab", "01_install", "--into", str(world / "t4")]) == 2
    asked = [line.split()[0] for line in calls(world)]
    assert asked == ["new", "exec", "download", "stop"]
    assert "--gpu T4" in calls(world)[0] and not (world / "t4").exists()


@pytest.mark.parametrize(("came_back", "status"), [(True, 1), (False, 2)])
def test_after_a_time_out_on_colab_what_ran_is_fetched_and_the_time_out_is_told(
    came_back, status, world, archive, capsys
):
    (world / "times-out").touch()
    if came_back:
        shutil.copy(archive, world)
    assert remote.main(["colab", "03_data", *PARAMETERS, "--into", str(world / "t4")]) == status
    assert [line.split()[0] for line in calls(world)] == ["new", "exec", "download", "stop"]
    assert "colab exec --session: found exit status 1" in capsys.readouterr().err
    assert (world / "t4/executed/03_data.ipynb").exists() == came_back


@pytest.mark.slow
def test_the_first_chapter_alone_runs(tmp_path):
    """It has neither RUN_DIR nor MAX_SEQ_LENGTH."""
    said, packed = run_driver(tmp_path, ["01_install"])
    assert "[1/1] 01_install: " in said, said
    with tarfile.open(packed) as opened:
        assert {"executed/01_install.ipynb", "executed/measured.json"} <= set(opened.getnames())


def test_what_is_sent_is_parametrised_and_whole(world, archive):
    shutil.copy(archive, world)
    remote.main(["colab", "04_train", "-p", "MAX_STEPS", "5", "--into", str(world / "t4")])
    sent = nbformat.read(world / "pushed/series.ipynb", as_version=4)
    nbformat.validate(sent)
    bundle = base64.b64decode(re.match(r'BUNDLE = "(\S+)"\n', sent.cells[0].source)[1])
    with tarfile.open(fileobj=io.BytesIO(bundle)) as opened:
        job = json.load(opened.extractfile("job.json"))
        choices = tomllib.loads(opened.extractfile("t4.toml").read().decode())
    assert (job["chapters"], job["profile"]) == (["04_train"], "t4")
    assert choices == {**T4, "MAX_STEPS": 5, "RUN_DIR": "run"}
    assert all(output == [] for output in (cell.outputs for cell in sent.cells))


def test_a_file_is_for_the_series_and_a_typed_parameter_for_the_chapters_named(world, archive, capsys):
    shutil.copy(archive, world)
    (world / "file.toml").write_text("MAX_STEPS = 5\n")
    arguments = ["colab", "01_install", "-f", str(world / "file.toml"), "--into", str(world / "t4")]
    assert remote.main([*arguments, "-p", "MAX_STEPS", "5"]) == 2
    assert "parameter: found MAX_STEPS" in capsys.readouterr().err and not (world / "calls").exists()
    assert remote.main(arguments) == 1  # the stand-in's archive holds other chapters
    assert (world / "pushed/series.ipynb").exists()


def test_the_bundle_holds_no_outputs_and_nothing_private():
    with tarfile.open(fileobj=io.BytesIO(remote.make_bundle(["03_data"], {}))) as bundle:
        names = bundle.getnames()
        notebook = json.load(bundle.extractfile("notebooks/04_train.ipynb"))
        owners = {(entry.uname, entry.uid) for entry in bundle.getmembers()}
    assert {
        "helpers/training/report.html",
        "helpers/export/card.md",
        "tests/maintain/series.py",
        "job.json",
        "notebooks/06_save.ipynb",
        "requirements-colab.txt",
        "pyproject.toml",
    } <= set(names)
    assert not [name for name in names if name.startswith(("runs", ".git", ".venv")) or "__pycache__" in name]
    assert {name for name in names if name.startswith("tests/")} <= set(remote.SENT), "the runner alone"
    assert all(not cell["outputs"] for cell in notebook["cells"] if cell["cell_type"] == "code")
    assert owners == {("", 0)}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["kaggle", "-p", "NO_SUCH", "1"], "parameter: found NO_SUCH"),
        (["kaggle", "09_more"], "chapter: found 09_more"),
        (["colab", "04_train", "-p", "MAX_STEPS", "0"], "MAX_STEPS: found 0"),
        (["colab", "-f", "/nowhere.toml"], "parameter file /nowhere.toml"),
    ],
)
def test_a_slip_is_told_before_anything_is_sent(arguments, said, world, capsys):
    assert remote.main(arguments) == 2
    assert said in capsys.readouterr().err
    assert not (world / "calls").exists()


def test_kaggle_needs_an_account(world, monkeypatch, capsys):
    monkeypatch.delenv("KAGGLE_USERNAME")
    assert remote.main(["kaggle"]) == 2
    assert "KAGGLE_USERNAME: found nothing" in capsys.readouterr().err


def test_a_refused_push_is_seen_although_it_ends_with_status_0(world, capsys):
    (world / "refusal").write_text("Kernel push error: Maximum weekly GPU quota of 30.00 hours reached.")
    assert remote.main(["kaggle", "--into", str(world / "t4")]) == 2
    assert "weekly GPU quota" in capsys.readouterr().err
    assert len(calls(world)) == 1


def test_a_run_that_brought_nothing_back_leaves_the_last_one_alone(world, capsys):
    (world / "states").write_text("ERROR")
    (world / "t4").mkdir()
    (world / "t4/old").touch()
    assert remote.main(["kaggle", "--into", str(world / "t4")]) == 2
    assert "executed.tar.gz: found no such file" in capsys.readouterr().err
    assert (world / "t4/old").exists()


def test_a_missing_command_names_its_package(world, monkeypatch, capsys):
    monkeypatch.setenv("PATH", "/nowhere")
    assert remote.main(["colab"]) == 2
    assert "uv tool install --python 3.13 google-colab-cli==0.7.5" in capsys.readouterr().err


def executed(tmp_path, *cells):
    notebook = nbformat.v4.new_notebook(cells=list(cells))
    nbformat.write(notebook, tmp_path / "04_train.ipynb")
    return tmp_path / "04_train.ipynb"


def ran(number, source, *outputs):
    return nbformat.v4.new_code_cell(source, execution_count=number, outputs=list(outputs))


def test_the_faults_of_an_executed_notebook(tmp_path):
    result = nbformat.v4.new_output("stream", text="Result: all well\n")
    error = nbformat.v4.new_output("error", ename="ValueError", evalue="no", traceback=[])
    assert remote.failure_of(executed(tmp_path, ran(1, "x = 1"), ran(2, "print(result)", result))) == ""
    assert (
        remote.failure_of(executed(tmp_path, ran(1, "x = 1\ny = 2", error))) == "code cell [1] `x = 1`: ValueError: no"
    )
    assert remote.failure_of(executed(tmp_path, ran(1, "x"), ran(None, "train()"))) == "stopped before `train()`"
    assert "no `Result" in remote.failure_of(executed(tmp_path, ran(1, "x = 1")))
    assert remote.failure_of(Path(tmp_path / "05_infer.ipynb")) == "did not run"
