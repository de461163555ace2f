"""A stand-in for the Hugging Face hub on loopback: models and data sets to fetch, and repositories to push to."""

import base64
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import parse_qsl, unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class HubStandIn:
    """Serves `repositories` (name -> file -> content) at `url` and takes what is pushed; `requests` are their paths.

    Data sets are named "datasets/OWNER/NAME", and one at another revision than main "datasets/OWNER/NAME@REVISION".
    """

    def __init__(self, repositories: dict[str, dict[str, bytes]], gated: Iterable[str] = ()) -> None:
        self.repositories, self.gated = repositories, set(gated)
        self.requests: list[str] = []
        self.num_sent = 0  # bytes of files
        self.delay_s = 0.0  # before every answer
        self.sends_before_it_drops: int | None = None  # bytes of a file, in one answer
        self.drops = 0  # answers left that end there; then the connections hold
        self.dies_after: int | None = None  # of `num_sent`: from then on every connection drops
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
                time.sleep(stand_in.delay_s)
                if stand_in.dies_after is not None and stand_in.num_sent > stand_in.dies_after:
                    self.close_connection = True
                    return
                status, content, headers = answered
                part = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
                if part and status == 200 and "ETag" in headers:
                    first, last = int(part[1]), min(int(part[2] or len(content)), len(content) - 1)
                    headers = {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}
                    status, content = 206, content[first : last + 1]
                self.send_response(status)
                for name, value in {"Content-Length": str(len(content)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                most = stand_in.sends_before_it_drops
                if body and "ETag" in headers and most is not None and stand_in.drops and len(content) > most:
                    stand_in.drops -= 1
                    content = content[:most]
                    self.close_connection = True
                if body:
                    stand_in.num_sent += len(content) if "ETag" in headers else 0
                    self.wfile.write(content)

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.handle_error = lambda *_: None  # type: ignore[method-assign]  # a client that gave up waiting
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
        if found := re.fullmatch(r"/api/(models/|datasets/)([^/]+/[^/]+)(?:/(tree|revision)/([^/]+)(?:/(.*))?)?", path):
            kind, name, rest, revision, folder = found.groups()
            name = name if kind == "models/" else kind + name
            deep = kind == "models/" or dict(parse_qsl(urlsplit(url).query)).get("recursive") == "true"
            files = self._find(name, revision or "main", gated=False)
            return files if isinstance(files, tuple) else self._describe(name, files, rest, folder, deep)
        found = re.fullmatch(r"/((?:datasets/)?[^/]+/[^/]+)/resolve/([^/]+)/(.*)", path)
        if not found:
            return 404, b"", {}
        files = self._find(found[1], found[2])
        if isinstance(files, tuple):
            return files
        if found[3] not in files:
            return 404, b"", {"X-Error-Code": "EntryNotFound"}
        etag = hashlib.sha256(files[found[3]]).hexdigest()
        return 200, files[found[3]], {"ETag": f'"{etag}"', "X-Repo-Commit": self._commit(found[1], found[2])}

    def _commit(self, repository: str, revision: str) -> str:
        if f"{repository}@{revision}" in self.repositories:
            return hashlib.sha1(revision.encode()).hexdigest()
        return COMMIT if revision in ("main", COMMIT) else revision

    def _find(
        self, repository: str, revision: str, gated: bool = True
    ) -> dict[str, bytes] | tuple[int, bytes, dict[str, str]]:
        if repository not in self.repositories:
            return 404, b"", {"X-Error-Code": "RepoNotFound"}
        named = [name for name in self.repositories if name.startswith(f"{repository}@")]
        ours = [name for name in named if revision in (name.split("@")[1], self._commit(*name.split("@")))]
        if not ours and revision not in ("main", COMMIT):
            return 404, b"", {"X-Error-Code": "RevisionNotFound"}
        if gated and repository in self.gated:
            return 403, b"", {"X-Error-Code": "GatedRepo", "X-Error-Message": "Access to this model is restricted."}
        return self.repositories[ours[0] if ours else repository]

    def _describe(
        self, repository: str, files: dict[str, bytes], kind: str | None, folder: str | None, deep: bool
    ) -> tuple[int, bytes, dict[str, str]]:
        if kind == "tree":
            start = f"{folder}/" if folder else ""
            inside = [name for name in files if name.startswith(start)]
            direct = [name for name in inside if deep or "/" not in name.removeprefix(start)]
            folders = {start + name.removeprefix(start).split("/")[0] for name in inside if name not in direct}
            content: Any = [_entry(name, files[name]) for name in direct]
            content += [{"type": "directory", "path": name, "oid": "0", "size": 0} for name in sorted(folders)]
            if folder and not content:
                return 404, b"", {"X-Error-Code": "EntryNotFound"}
        else:
            siblings = [{"rfilename": name, "size": len(data)} for name, data in files.items()]
            revision = next((n.split("@")[1] for n, f in self.repositories.items() if f is files and "@" in n), "main")
            commit = self._commit(repository, revision)
            content = {"_id": "1", "id": repository.removeprefix("datasets/"), "sha": commit, "siblings": siblings}
            content |= {"private": False, "tags": [], "disabled": False, "downloads": 0, "likes": 0}
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
        elif "/paths-info/" in path:
            name, revision = path.removeprefix("/api/").split("/paths-info/")
            files = self._find(name, revision, gated=False)
            if isinstance(files, tuple):
                return files
            wanted = [value for key, value in parse_qsl(content.decode()) if key == "paths"]
            if content.startswith(b"{"):
                wanted = json.loads(content)["paths"]
            return 200, json.dumps([_entry(n, files[n]) for n in wanted if n in files]).encode(), {}
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


def _entry(name: str, data: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
