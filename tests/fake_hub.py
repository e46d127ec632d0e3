"""A Hub on this machine that speaks as much of the Hub's HTTP API as huggingface_hub needs to push and to download.

It keeps every commit of a repository in memory. Files of any size are part of the commit request, as the Hub
itself has it for small text files; LFS, Xet, branches and private repositories are left out.

    with FakeHub() as hub:
        hub.run_python(tmp_path, code)
"""

import base64
import hashlib
import json
import os
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from unittest import mock
from urllib.parse import unquote, urlsplit

import tiny

TOKEN = "hf_token_of_the_tests"


@dataclass
class Commit:
    """All files of a repository after one commit."""

    message: str
    files: dict[str, bytes]

    @property
    def sha(self) -> str:
        names = {name: hashlib.sha256(data).hexdigest() for name, data in sorted(self.files.items())}
        return hashlib.sha1(json.dumps([self.message, names]).encode()).hexdigest()


@dataclass
class FakeHub:
    """A server on a free port of this machine, for as long as the context lasts.

    Attributes:
        repositories: commits by repository name, the oldest first.
        requests: method and path of each request, in order.
    """

    repositories: dict[str, list[Commit]] = field(default_factory=dict)
    requests: list[tuple[str, str]] = field(default_factory=list)

    def __enter__(self) -> "FakeHub":
        handler = type("BoundHandler", (_Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_exception) -> None:
        self._server.shutdown()
        self._server.server_close()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self._server.server_port}"

    def run_python(self, home: Path, code: str, *arguments: object) -> str:
        """``tiny.run_python`` in a process that takes this for the Hub and keeps its cache in ``home``."""
        online = dict.fromkeys(("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE"), "0")
        hub = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_TOKEN": TOKEN}
        with mock.patch.dict(os.environ, online | hub):
            return tiny.run_python(code, *arguments)

    def files(self, name: str) -> dict[str, bytes]:
        """The files of a repository after its latest commit."""
        return self.repositories[name][-1].files

    def commit(self, name: str, revision: str) -> Commit | None:
        """The commit of a repository that a revision names: "main", or a commit's hash."""
        commits = self.repositories.get(name, [])
        return next((c for c in reversed(commits) if revision in ("main", c.sha)), None)


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        parts = self._begin()
        match parts:
            case ["api", "whoami-v2"]:
                self._json({"type": "user", "name": "tester", "orgs": []})
            case ["api", "models", owner, name, *rest]:
                self._information(f"{owner}/{name}", rest)
            case [owner, name, "resolve", revision, *path]:
                self._file(f"{owner}/{name}", revision, "/".join(path))
            case _:
                self._refuse(404, "RepoNotFound")

    do_HEAD = do_GET

    def do_POST(self):
        parts = self._begin()
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self._refuse(401, "")
            return
        match parts:
            case ["api", "repos", "create"]:
                self._create(json.loads(body))
            case ["api", "validate-yaml"]:
                self._json({"errors": [], "warnings": []})
            case ["api", "models", owner, name, "preupload", _] if f"{owner}/{name}" in self.hub.repositories:
                wanted = json.loads(body)["files"]
                regular = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in wanted]
                self._json({"files": regular})
            case ["api", "models", owner, name, "commit", "main"] if f"{owner}/{name}" in self.hub.repositories:
                self._commit(f"{owner}/{name}", [json.loads(line) for line in body.splitlines()])
            case _:
                self._refuse(404, "RepoNotFound")

    def _begin(self) -> list[str]:
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, path))
        return [unquote(part) for part in path.strip("/").split("/")]

    def _create(self, asked: dict) -> None:
        name = f"{asked.get('organization') or 'tester'}/{asked['name']}"
        exists = name in self.hub.repositories
        self.hub.repositories.setdefault(name, [Commit("initial commit", {})])
        self._json({"url": f"{self.hub.url}/{name}", "name": name}, 409 if exists else 200)

    def _commit(self, name: str, lines: list[dict]) -> None:
        files = dict(self.hub.files(name))
        (header,) = (line["value"] for line in lines if line["key"] == "header")
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif line["key"] != "header":
                self._refuse(400, "")
                return
        commit = Commit(header["summary"], files)
        self.hub.repositories[name].append(commit)
        url = f"{self.hub.url}/{name}/commit/{commit.sha}"
        self._json({"success": True, "commitOid": commit.sha, "commitUrl": url})

    def _information(self, name: str, rest: list[str]) -> None:
        revision = rest[1] if rest else "main"
        if (commit := self._found(name, revision)) is None:
            return
        if rest and rest[0] == "tree":
            self._json(
                [
                    {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                    for path, data in commit.files.items()
                ]
            )
        else:
            siblings = [{"rfilename": path} for path in commit.files]
            self._json({"id": name, "sha": commit.sha, "siblings": siblings, "private": False, "tags": []})

    def _file(self, name: str, revision: str, path: str) -> None:
        if (commit := self._found(name, revision)) is None:
            return
        headers = {"X-Repo-Commit": commit.sha}
        if path not in commit.files:
            self._refuse(404, "EntryNotFound", headers)
            return
        data = commit.files[path]
        self._answer(200, data, headers | {"ETag": f'"{hashlib.sha1(data).hexdigest()}"'})

    def _found(self, name: str, revision: str) -> Commit | None:
        commit = self.hub.commit(name, revision)
        if commit is None:
            self._refuse(404, "RevisionNotFound" if name in self.hub.repositories else "RepoNotFound")
        return commit

    def _json(self, answer: object, status: int = 200) -> None:
        self._answer(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

    def _refuse(self, status: int, code: str, headers: dict[str, str] | None = None) -> None:
        self._answer(status, b"", (headers or {}) | {"X-Error-Code": code})

    def _answer(self, status: int, body: bytes, headers: dict[str, str]) -> None:
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *_arguments) -> None:
        """Say nothing; ``FakeHub.requests`` has it."""
