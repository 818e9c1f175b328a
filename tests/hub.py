"""A stand-in for the Hugging Face Hub on loopback: as much of it as publishing needs. Every request is kept."""

import base64
import contextlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Hub(ThreadingHTTPServer):
    """Attributes: `url` for HF_ENDPOINT, and `requests`, (path, headers, body) of each one."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.requests, self.url = [], f"http://127.0.0.1:{self.server_port}"

    def committed_files(self) -> dict[str, bytes]:
        """{name in the repository: content} of the one commit."""
        [body] = [body for path, _, body in self.requests if path.endswith("/commit/main")]
        lines = [json.loads(line) for line in body.splitlines()]
        files = [line["value"] for line in lines if line["key"] == "file"]
        return {file["path"]: base64.b64decode(file["content"]) for file in files}


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):  # noqa: N802, the base class's name
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.server.requests.append((self.path, dict(self.headers), body))
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
            self.answer(200, {"commitUrl": f"{url}/commit/1", "commitOid": "1" * 40})
        else:
            self.answer(404, {})

    def do_GET(self):  # noqa: N802, the base class's name
        self.server.requests.append((self.path, dict(self.headers), b""))
        self.answer(404, {})

    do_HEAD = do_GET  # noqa: N815, the base class's name

    def answer(self, status: int, content: dict) -> None:
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(json.dumps(content).encode())

    def log_message(self, *arguments):
        """Say nothing."""


@contextlib.contextmanager
def serve_hub():
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()
