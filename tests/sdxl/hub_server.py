"""A small hub on this machine: enough of its interface for huggingface_hub to download models from it."""

import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMITS = {"main": "a" * 40, "old": "b" * 40}


class Hub(ThreadingHTTPServer):
    """Serves folders as repositories; records requests, and fails on request."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories = repositories
        self.asked: list[str] = []  # "owner/name/path" of every file that was downloaded
        self.gated: set[str] = set()
        self.token_expired = False
        self.drops = 0  # how many downloads of large files break off half-way
        self.url = f"http://127.0.0.1:{self.server_port}"

    def __enter__(self) -> "Hub":
        threading.Thread(target=self.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.shutdown()
        self.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if match := re.fullmatch(r"/api/models/([\w.-]+/[\w.-]+)/(revision|tree)/(\w+)/?", path):
            self._describe(*match.groups())
        elif match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/(\w+)/(.+)", path):
            self._file(*match.groups())
        else:
            self._answer(404, b"{}")

    def _folder(self, name: str) -> Path | None:
        if self.server.token_expired:
            self._answer(401, b'{"error": "Invalid credentials"}', {"X-Error-Message": "Invalid credentials"})
            return None
        if name in self.server.gated:
            self._answer(403, b"{}", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access is restricted"})
        elif name not in self.server.repositories:
            self._answer(401, b"{}", {"X-Error-Code": "RepoNotFound", "X-Error-Message": "Repository Not Found"})
        return None if name in self.server.gated else self.server.repositories.get(name)

    def _describe(self, name: str, what: str, revision: str) -> None:
        if (folder := self._folder(name)) is None:
            return
        commit = COMMITS.get(revision, revision)
        if commit not in COMMITS.values():
            self._answer(404, b"{}", {"X-Error-Code": "RevisionNotFound", "X-Error-Message": "Invalid rev id"})
            return
        files = sorted(path for path in folder.rglob("*") if path.is_file())
        paths = [str(path.relative_to(folder)) for path in files]
        if what == "revision":
            about = {"id": name, "sha": commit, "siblings": [{"rfilename": path} for path in paths], "tags": []}
            self._answer(200, json.dumps(about).encode())
        else:
            sizes = [path.stat().st_size for path in files]
            rows = [
                {"type": "file", "path": path, "size": size, "oid": _etag(folder / path)[:40]}
                for path, size in zip(paths, sizes, strict=True)
            ]
            self._answer(200, json.dumps(rows).encode())

    def _file(self, name: str, revision: str, path: str) -> None:
        if (folder := self._folder(name)) is None:
            return
        if not (folder / path).is_file():
            self._answer(404, b"{}", {"X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        content = (folder / path).read_bytes()
        wanted = re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))
        start = int(wanted[1]) if wanted else 0
        headers = {"ETag": f'"{_etag(folder / path)}"', "X-Repo-Commit": COMMITS.get(revision, revision)}
        if start:
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        if self.command == "GET":
            self.server.asked.append(f"{name}/{path}")
            if len(content) > 50_000 and self.server.drops > 0:
                self.server.drops -= 1
                self._begin(200, len(content) - start, headers)
                self.wfile.write(content[start : (start + len(content)) // 2])
                self.wfile.flush()
                self.connection.close()
                self.close_connection = True
                return
        self._answer(206 if start else 200, content[start:], headers)

    def _begin(self, status: int, length: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(length), "Content-Type": "application/json", **headers}.items():
            self.send_header(key, value)
        self.end_headers()

    def _answer(self, status: int, content: bytes, headers: dict[str, str] | None = None) -> None:
        self._begin(status, len(content), headers or {})
        if self.command == "GET":
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


def _etag(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
