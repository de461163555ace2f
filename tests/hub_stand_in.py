"""A stand-in for the Hugging Face hub on loopback: models to fetch, and repositories to push to."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """Serves `repositories` (name -> file -> content) at `url` and takes what is pushed; `requests` are their paths."""

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: Iterable[str] = ()) -> None:
        self.repositories, self.gated = repositories, set(gated)
        self.requests: list[str] = []
        stand_in = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: Any) -> None:
                pass

            def do_HEAD(self) -> None:
                self.answer(stand_in.get(self.path), body=False)

            def do_GET(self) -> None:
                self.answer(stand_in.get(self.path))

            def do_POST(self) -> None:
                if self.headers.get("Transfer-Encoding") == "chunked":
                    content = b""
                    while size := int(self.rfile.readline(), 16):
                        content += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                else:
                    content = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.answer(stand_in.post(self.path, content))

            def answer(self, answered: tuple[int, bytes, dict[str, str]], body: bool = True) -> None:
                status, content, headers = answered
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                if body:
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "HubStandIn":
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self.server.shutdown()
        self.server.server_close()

    def get(self, url: str) -> tuple[int, bytes, dict[str, str]]:
        path = unquote(urlsplit(url).path)
        self.requests.append(path)
        if path.startswith("/api/models/"):
            owner, name, *rest = path.removeprefix("/api/models/").split("/")
            found = self._find(f"{owner}/{name}", rest[1] if len(rest) > 1 else "main", gated=False)
            return found if isinstance(found, tuple) else self._describe(f"{owner}/{name}", found, rest)
        owner, name, _, revision, file = path.removeprefix("/").split("/", 4)
        files = self._find(f"{owner}/{name}", revision)
        if isinstance(files, tuple):
            return files
        if file not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        etag = hashlib.sha256(files[file]).hexdigest()
        return 200, files[file], {"ETag": f'"{etag}"', "X-Repo-Commit": COMMIT}

    def _find(
        self, repository: str, revision: str, gated: bool = True
    ) -> dict[str, bytes] | tuple[int, bytes, dict[str, str]]:
        if repository not in self.repositories:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        if revision not in ("main", COMMIT):
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if gated and repository in self.gated:
            return 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
        return self.repositories[repository]

    def _describe(self, repository: str, files: dict[str, bytes], rest: list[str]) -> tuple[int, bytes, dict[str, str]]:
        if rest[:1] == ["tree"]:
            content: Any = [
                {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                for name, data in files.items()
            ]
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            content = {"_id": "1", "id": repository, "sha": COMMIT, "siblings": siblings, "private": False, "tags": []}
        return 200, json.dumps(content).encode(), {"Content-Type": "application/json"}

    def post(self, url: str, content: bytes) -> tuple[int, bytes, dict[str, str]]:
        path = unquote(urlsplit(url).path)
        self.requests.append(path)
        answer: dict[str, Any] = {}
        if path == "/api/repos/create":
            asked = json.loads(content)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.repositories.setdefault(name, {})
            answer = {"url": f"{self.url}/{name}", "name": name, "id": name}
        elif path == "/api/validate-yaml":
            answer = {"errors": [], "warnings": []}
        elif "/preupload/" in path:
            names = [file["path"] for file in json.loads(content)["files"]]
            answer = {"files": [{"path": n, "uploadMode": "regular", "shouldIgnore": False} for n in names]}
        elif "/commit/" in path:
            repository = path.removeprefix("/api/models/").split("/commit/")[0]
            for line in map(json.loads, content.decode().splitlines()):
                if line["key"] == "file":
                    data = base64.b64decode(line["value"]["content"])
                    self.repositories[repository][line["value"]["path"]] = data
            answer = {"commitUrl": f"{self.url}/{repository}/commit/{COMMIT}", "commitOid": COMMIT}
        return 200, json.dumps(answer).encode(), {"Content-Type": "application/json"}
