"""The reader's test: a person opens the chapters in a browser, runs all, looks, and talks to the chat box.

JupyterLab, with ipywidgets 8, opens chapters 01 to 06. The classic notebook opens chapters 03, 04 and 05 with Colab's
kernel (ipykernel 6.17, IPython 7.34, ipywidgets 7.7). Both open a notebook full of faults, to show that these are
seen. All are copies with their recorded outputs cleared; the choices of `tests/profiles/cpu.toml` with the lowest
layers of its model, few rows, few steps, no GGUF files.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest
from train_once import shallow_smollm2

from helpers.chapters import CHAPTER_NAMES
from tests.maintain.image import read_freeze
from tests.maintain.lock import IMAGE
from tests.maintain.series import chapter_parameters, read_parameter_file

ROOT = Path(__file__).resolve().parent.parent
SERIES, TOOLS = ROOT / ".venv" / "bin", ROOT / ".venv-proof" / "bin"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = ROOT / "runs" / "browser"
TOKEN = "proof"
IN_LAB = CHAPTER_NAMES[1:]  # the quickstart installs from the network, and trains on a GPU
IN_CLASSIC = ("03_data", "04_train", "05_infer")
FEW_TOKENS, FEW_ROWS = 16, {"train": 16, "held_out": 4}
LONGEST = 1024  # tokens of a conversation. A reply has half as many at most: time enough to stop it
FEW_STEPS = 16  # after 4, a merge's rounding alone moved perplexity by 3 %, more than chapter 06 lets pass
FEWER_STEPS = 4  # where nothing is merged

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(not (TOOLS / "playwright").exists(), reason="no browser driver: run `make proof-tools`"),
]

VERSIONS = """import IPython, ipykernel, ipywidgets
print("Kernel:", ipykernel.__version__, IPython.__version__, ipywidgets.__version__)"""
FAULTS = (
    """from IPython.display import HTML, display

display(HTML("<img src='data:image/png;base64,broken'>"))
display(HTML("<table><thead><tr><th>a</th></tr></thead><tbody></tbody></table>"))
display(HTML("<table><tbody><tr><td>1</td></tr></tbody></table>"))""",
    """from helpers.chat.box import ChatBox, Exchange

box = ChatBox(None, None, max_seq_length=512)
reply = '<img src=x onerror="window.hacked = 1"><b id="bold">Hi</b><script>window.hacked = 1</script>'
box.exchanges.append(Exchange("Hello", {"tuned": reply + "\\n" * 30 + "The end."}))
box.show()""",
    "1 / 0",
    "'after the error'",
)
CHINESE_PAGE = "notebooks/zh-CN/said.ipynb"
SAY = (
    """import os

os.chdir("../..")
from helpers.base import InputError

print(InputError("MAX_STEPS", found="0", expected="1", fix="x"))""",
)


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of the series to run in; what it makes and saves stays there."""
    folder = tmp_path_factory.mktemp("reader")
    for name in ("helpers", "notebooks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "_unsloth*"))
    for path in ROOT.glob("*.t*ml"), ROOT.glob("requirements-*.txt"):
        for file in path:
            shutil.copy(file, folder)
    conversations = (ROOT / "notebooks/data/support_conversations.jsonl").read_text(encoding="utf-8")
    lines = sorted(conversations.splitlines(keepends=True), key=len)  # the shortest, which take the least time
    few = [[line for line in lines if f'"split": "{split}"' in line][:count] for split, count in FEW_ROWS.items()]
    (folder / "few.jsonl").write_text("".join(sum(few, [])), encoding="utf-8")
    shallow_smollm2(folder / "shallow")
    for chapter in IN_LAB:
        prepare(folder, chapter, FEW_STEPS if chapter == "04_train" else 2)
    for name, sources in {"faults.ipynb": FAULTS, CHINESE_PAGE: SAY}.items():
        page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in sources])
        page.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
        nbformat.write(page, folder / name)
    return folder


def prepare(folder, chapter, steps):
    """Set a chapter's parameters, clear what was recorded, and let it say at its end what kernel it ran in."""
    from papermill.iorw import load_notebook_node
    from papermill.parameterize import parameterize_notebook

    parameters = read_parameter_file(ROOT / "tests" / "profiles" / "cpu.toml")
    parameters |= {"DATASET": str(folder / "few.jsonl"), "MAX_STEPS": steps, "GGUF": []}
    parameters |= {"MODEL_NAME": str(folder / "shallow"), "MAX_SEQ_LENGTH": LONGEST, "MAX_NEW_TOKENS": FEW_TOKENS}
    parameters["RUN_DIR"] = str(folder / "run")
    known, name = chapter_parameters(chapter), f"{chapter}.ipynb"
    if "GENERAL" in known:  # a chapter about the series' own files
        del parameters["DATASET"]
    notebook = load_notebook_node(str(ROOT / "notebooks" / name))
    notebook = parameterize_notebook(notebook, {key: value for key, value in parameters.items() if key in known})
    notebook.cells.append(nbformat.v4.new_code_cell(VERSIONS))
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, folder / "notebooks" / name)


def open_in_browser(tree, front_end, chapters):
    """Start a Jupyter server in the tree, let the driver visit the chapters and the faults; what it saw of each."""
    binaries, module = (TOOLS, "jupyterlab") if front_end == "lab" else (SERIES, "notebook")
    state = tree.parent / f"{tree.name}-{front_end}"
    settings = {
        "page_config": {"disabledExtensions": {"@jupyterlab/apputils-extension:announcements": True}},
        "default_setting_overrides": {"@jupyterlab/notebook-extension:tracker": {"windowingMode": "none"}},
    }  # no question about news; and all cells in the page, also those out of sight, so that they can be looked at
    (state / "labconfig").mkdir(parents=True)
    for name, content in settings.items():
        (state / "labconfig" / f"{name}.json").write_text(json.dumps(content))
    environment = os.environ | {"JUPYTER_CONFIG_DIR": str(state), "JUPYTER_RUNTIME_DIR": str(state / "runtime")}
    environment |= {"PYDEVD_DISABLE_FILE_VALIDATION": "1"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [binaries / "python", "-m", module, "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}"]
    command.append("--KernelManager.shutdown_wait_time=0.5")  # each second time, Colab's kernel does not end when asked
    token = f"--IdentityProvider.token={TOKEN}" if front_end == "lab" else f"--NotebookApp.token={TOKEN}"
    with open(state / "server.log", "w") as log:
        server = subprocess.Popen([*command, token], cwd=tree, env=environment, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/api?token={TOKEN}", server, state / "server.log")
        driver = [TOOLS / "python", ROOT / "tests" / "browser_session.py", front_end, address, TOKEN]
        notebooks = ["faults.ipynb", CHINESE_PAGE, *(f"notebooks/{chapter}.ipynb" for chapter in chapters)]
        done = subprocess.run(
            [*driver, CHROMIUM, SCREENSHOTS, *notebooks], capture_output=True, text=True, timeout=3600
        )
        print(done.stderr)
        assert done.returncode == 0, done.stderr + (state / "server.log").read_text()[-2000:]
    finally:
        server.terminate()
        server.wait(30)
    return {Path(name).stem: saw for name, saw in json.loads(done.stdout).items()}


def wait_for(url, server, log):
    deadline = time.monotonic() + 300
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)


@pytest.fixture(scope="module")
def lab(tree):
    return open_in_browser(tree, "lab", IN_LAB)


@pytest.fixture(scope="module")
def classic(tree, lab):
    prepare(tree, "04_train", FEWER_STEPS)
    return open_in_browser(tree, "classic", IN_CLASSIC)  # with what the chapters before them left in the tree


def seen(request, front_end, name):
    saw = request.getfixturevalue(front_end)[name]
    assert "failure" not in saw, saw["failure"]
    return saw


VISITS = [("lab", chapter) for chapter in IN_LAB] + [("classic", chapter) for chapter in IN_CLASSIC]


@pytest.mark.parametrize("front_end, chapter", VISITS)
def test_a_chapter_runs_to_its_end_and_shows_all(request, front_end, chapter):
    saw = seen(request, front_end, chapter)
    assert saw["errors"] == []
    assert saw["prompts"] == [str(number) for number in range(1, len(saw["prompts"]) + 1)], saw["text"][-2000:]
    assert not re.search("Error displaying widget|Error creating widget|model not found|Loading widget", saw["text"])
    recorded = nbformat.read(ROOT / "notebooks" / f"{chapter}.ipynb", as_version=4)
    shown = [out.get("data", {}) for cell in recorded.cells if cell.cell_type == "code" for out in cell.outputs]
    assert len(saw["prompts"]) == 2 + sum(cell.cell_type == "code" for cell in recorded.cells)
    assert len(saw["images"]) >= sum("image/png" in data for data in shown) and all(saw["images"])
    tables = sum("<table" in data.get("text/html", "") for data in shown)
    assert len(saw["tables"]) >= tables and all(saw["tables"])


@pytest.mark.parametrize("chapter", IN_CLASSIC)
def test_the_kernel_is_colabs(request, chapter):
    image = read_freeze(IMAGE / "pip-freeze.gpu.txt")
    expected = " ".join(image[name] for name in ("ipykernel", "ipython", "ipywidgets"))
    assert f"Kernel: {expected}" in seen(request, "classic", chapter)["text"]


def test_jupyterlab_has_the_newer_widgets(request):
    assert re.search(r"^Kernel: \S+ \S+ 8\.", seen(request, "lab", "05_infer")["text"], re.MULTILINE)


def test_helpers_speak_the_language_of_the_page_where_the_server_names_it(request):
    """JupyterLab's server does, Colab's classic one does not."""
    assert "MAX_STEPS：实际：0；应为：1。解决办法：x。" in seen(request, "lab", "said")["text"]
    assert "MAX_STEPS: found 0, expected 1. Fix: x." in seen(request, "classic", "said")["text"]


@pytest.mark.parametrize("front_end", ["lab", "classic"])
def test_a_reader_asks_reads_and_stops(request, front_end):
    saw = seen(request, front_end, "05_infer")
    assert "chat" in saw, "there is no chat box"
    chat = saw["chat"]
    replies = [text.partition("tuned model")[2] for text in chat["streamed"]]
    lengths = [len(reply) for reply in replies]
    assert len(set(lengths)) > 3 and lengths == sorted(lengths), "the reply did not grow word by word"
    assert '<img src=x onerror="window.hacked = 1">' in chat["streamed"][-1]
    assert (chat["executed"], chat["rendered"]) == (False, False)
    assert chat["max_tokens"] == str(LONGEST // 2), "the slider did not move"
    assert chat["stopped"].rstrip().endswith("stop")


@pytest.mark.parametrize("front_end", ["lab", "classic"])
def test_faults_are_seen_and_markup_in_a_reply_is_only_shown(request, front_end):
    saw = seen(request, front_end, "faults")
    assert len(saw["errors"]) == 1 and "ZeroDivisionError" in saw["errors"][0]
    assert saw["prompts"] == ["1", "2", "3", ""]
    assert saw["tables"] == [0, 1]
    assert 0 in saw["images"]
    assert "<script>window.hacked = 1</script>" in saw["text"] and saw["newest_in_view"]
    assert (saw["executed"], saw["rendered"]) == (False, False)
