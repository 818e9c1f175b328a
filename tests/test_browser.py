"""The chat box in a real browser: JupyterLab with ipywidgets 8, and the classic notebook with Colab's ipywidgets 7."""

import json
import os
import shutil
import socket
import subprocess
import time
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent
TOOLS = ROOT / ".venv-proof" / "bin"
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")
SCREENSHOTS = ROOT / "runs" / "browser"
FRONT_ENDS = {
    "lab": (TOOLS, ["-m", "jupyterlab"], "lab/tree"),
    "classic": (ROOT / ".venv" / "bin", ["-m", "notebook"], "notebooks"),
}

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine: apt-get install chromium"),
    pytest.mark.skipif(not (TOOLS / "jupyter-lab").exists(), reason="no browser driver: run `make proof-tools`"),
]

CELLS = (
    """import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from helpers.smollm2 import prepare_smollm2

folder = prepare_smollm2()
model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
model = get_peft_model(model, LoraConfig(r=4, target_modules=["v_proj"], init_lora_weights=False)).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)""",
    """from helpers.chat_box import ChatBox

ChatBox(model, tokenizer, max_seq_length=2048, max_new_tokens=500).show()""",
)


@pytest.fixture(params=FRONT_ENDS)
def session(request, tmp_path):
    """What the browser saw."""
    binaries, module, page = FRONT_ENDS[request.param]
    notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(source) for source in CELLS])
    notebook.metadata["kernelspec"] = {"name": "python3", "display_name": "Python 3", "language": "python"}
    nbformat.write(notebook, tmp_path / "chat.ipynb")
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [str(binaries / "python"), *module, "--no-browser", "--allow-root", f"--port={port}", "--ip=127.0.0.1"]
    token = "--ServerApp.token=proof" if request.param == "lab" else "--NotebookApp.token=proof"
    environment = os.environ | {"PYTHONPATH": str(ROOT), "JUPYTER_CONFIG_DIR": str(tmp_path / "config")}
    environment |= {"JUPYTER_RUNTIME_DIR": str(tmp_path / "runtime"), "PATH": f"{binaries}:{os.environ['PATH']}"}
    with open(tmp_path / "server.log", "w") as log:
        server = subprocess.Popen([*command, token], cwd=tmp_path, env=environment, stdout=log, stderr=log)
    try:
        wait_for(f"http://127.0.0.1:{port}/api?token=proof", server, tmp_path / "server.log")
        url = f"http://127.0.0.1:{port}/{page}/chat.ipynb?token=proof"
        driver = [str(TOOLS / "python"), str(ROOT / "tests" / "browser_session.py"), request.param, url]
        done = subprocess.run([*driver, CHROMIUM, str(SCREENSHOTS)], capture_output=True, text=True, timeout=500)
        assert done.returncode == 0, done.stderr + (tmp_path / "server.log").read_text()[-2000:]
    finally:
        server.terminate()
        server.wait(30)
    return json.loads(done.stdout)


def wait_for(url, server, log):
    deadline = time.monotonic() + 60
    while True:
        try:
            return urllib.request.urlopen(url, timeout=5).close()
        except OSError:
            assert server.poll() is None and time.monotonic() < deadline, log.read_text()[-2000:]
            time.sleep(0.3)


def test_a_reader_asks_reads_and_stops(session):
    lengths = [len(text) for text in session["streamed"]]
    assert len(lengths) > 3 and lengths == sorted(lengths), "the reply did not grow word by word"
    assert '<img src=x onerror="window.hacked = 1">' in session["markup"]["text"]
    assert (session["markup"]["hacked"], session["markup"]["elements"]) == (False, 0)
    assert session["stopped"].rstrip().endswith("stop")
    assert session["reset"].strip() == ""
