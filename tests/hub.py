"""Stand-ins on loopback: a Hub to publish to and to download from, a ModelScope, and a server that never answers.

Each is as much of the real one as the clients ask for, and keeps every request.
"""

import base64
import contextlib
import hashlib
import json
import socket
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

COMMIT = "1" * 40


class Server(ThreadingHTTPServer):
    """Attributes: `url`, `requests`, (path, headers, body) of each one, and `models`, {name: folder with its files}.

    The name of a data set is one such as "datasets/me/rows".
    """

    daemon_threads = True

    def __init__(self, handler, models=None):
        super().__init__(("127.0.0.1", 0), handler)
        self.requests, self.models, self.url = [], models or {}, f"http://127.0.0.1:{self.server_port}"

    def paths(self) -> list[str]:
        """The paths that were asked for, in order."""
        return [path for path, _, _ in self.requests]


class Hub(Server):
    """The Hugging Face Hub, or a mirror of it: `url` is for HF_ENDPOINT."""

    def __init__(self, models=None):
        super().__init__(HubHandler, models)

    def committed_files(self) -> dict[str, bytes]:
        """{name in the repository: content} of the one commit."""
        [body] = [body for path, _, body in self.requests if path.endswith("/commit/main")]
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        return {file["path"]: base64.b64decode(file["content"]) for file in files}


class Handler(BaseHTTPRequestHandler):
    """Answers in JSON or with a file, and keeps the requests."""

    def keep(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, dict(self.headers), body))
        return body

    def answer(self, status: int, content: object, **headers: str) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *arguments):
        """Say nothing."""


class HubHandler(Handler):
    def do_POST(self):  # noqa: N802, the base class's name
        body = self.keep()
        url = f"{self.server.url}/me/tuned"
        if self.path == "/api/repos/create":
            self.answer(200, {"url": url})
        elif self.path == "/api/validate-yaml" and b"license: mit" in body:
            self.answer(400, {"errors": [{"message": "the Hub says no"}], "warnings": []})
        elif self.path == "/api/validate-yaml":
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path == "/api/models/me/tuned/preupload/main":
            regular = {"uploadMode": "regular", "shouldIgnore": False}
            self.answer(200, {"files": [{"path": file["path"], **regular} for file in json.loads(body)["files"]]})
        elif self.path == "/api/models/me/tuned/commit/main":
            self.answer(200, {"commitUrl": f"{url}/commit/1", "commitOid": COMMIT})
        else:
            self.answer(404, {})

    def do_GET(self):  # noqa: N802, the base class's name
        self.keep()
        name, action, file = parts_of(self.path)
        folder, api = self.server.models.get(name), self.path.startswith("/api/")
        if folder is None:
            self.answer(404, {}, X_Error_Code="RepoNotFound")
        elif api and action in ("", "revision"):
            about = {"id": name.removeprefix("datasets/"), "sha": COMMIT, "gated": False, "private": False}
            self.answer(200, about | {"siblings": [{"rfilename": each} for each in files_of(folder)]})
        elif api and action == "tree":
            listed = [each for each in files_of(folder) if each.startswith(f"{file}/" if file else "")]
            entries = [{"type": "file", "path": each, "size": size(folder, each), "oid": COMMIT} for each in listed]
            if entries:
                self.answer(200, entries)
            else:
                self.answer(404, {}, X_Error_Code="EntryNotFound")
        elif action == "resolve":
            self.give_file(folder, file)
        else:
            self.answer(404, {})

    do_HEAD = do_GET  # noqa: N815, the base class's name

    def give_file(self, folder: Path, file: str) -> None:
        if file not in files_of(folder):
            self.answer(404, {}, X_Error_Code="EntryNotFound", X_Repo_Commit=COMMIT)
            return
        data = (folder / file).read_bytes()
        self.answer(200, data, ETag=f'"{hashlib.sha256(data).hexdigest()}"', X_Repo_Commit=COMMIT)


class ModelScopeHandler(Handler):
    def do_GET(self):  # noqa: N802, the base class's name
        self.keep()
        parts = urlsplit(self.path)
        owner_name, _, rest = unquote(parts.path).removeprefix("/api/v1/models/").partition("/repo")
        folder, asked = self.server.models.get(owner_name), parse_qs(parts.query)
        if folder is None or not parts.path.startswith("/api/v1/models/"):
            self.answer(404, {"Code": 10010205001, "Message": "record not found", "Success": False})
        elif rest == "/files":
            self.answer(200, {"Code": 200, "Data": {"Files": [entry(folder, file) for file in files_of(folder)]}})
        elif "FilePath" in asked:
            self.answer(200, (folder / asked["FilePath"][0]).read_bytes(), Content_Type="application/octet-stream")
        else:
            self.answer(200, {"Code": 200, "Data": {"Name": owner_name.partition("/")[2]}, "Success": True})


def parts_of(path: str) -> tuple[str, str, str]:
    """(name, action, file) of a path on the Hub; the revision is left out, for there is one.

    Example: "/api/datasets/me/rows/tree/main/data?recursive=true" -> ("datasets/me/rows", "tree", "data")
    """
    plain = unquote(urlsplit(path).path).removeprefix("/api").removeprefix("/models").strip("/")
    parts = plain.split("/")
    end = 3 if parts[0] == "datasets" else 2
    return "/".join(parts[:end]), "".join(parts[end : end + 1]), "/".join(parts[end + 2 :])


def entry(folder: Path, file: str) -> dict:
    """A file as ModelScope lists it."""
    sha256 = hashlib.sha256((folder / file).read_bytes()).hexdigest()
    return {"Path": file, "Name": Path(file).name, "Type": "blob", "Size": size(folder, file), "Sha256": sha256}


def files_of(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def size(folder: Path, file: str) -> int:
    return (folder / file).stat().st_size


@contextlib.contextmanager
def serving(server):
    with server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def serve_hub(models=None):
    """A Hub, for a `with` statement; `models` are what can be downloaded from it."""
    return serving(Hub(models))


def serve_modelscope(models=None):
    """A ModelScope, for a `with` statement: its `url` is for MODELSCOPE_ENDPOINT."""
    return serving(Server(ModelScopeHandler, models))


class Silence:
    """Accepts connections and never answers. Attributes: `url`, and `connections`, which stay open."""

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url, self.connections = f"http://127.0.0.1:{self.listener.getsockname()[1]}", []

    def accept(self) -> None:
        with contextlib.suppress(OSError):  # the listener is closed
            while True:
                self.connections.append(self.listener.accept()[0])


@contextlib.contextmanager
def serve_silence():
    """A server that hangs, for a `with` statement."""
    server = Silence()
    threading.Thread(target=server.accept, daemon=True).start()
    try:
        yield server
    finally:
        for each in (server.listener, *server.connections):
            each.close()
