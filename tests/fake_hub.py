"""A small Hugging Face hub on this machine: the few endpoints that huggingface_hub asks.

`FakeHub` serves repositories from memory, counts requests, refuses, and cuts a file off in the
middle, as a bad line does.
"""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import huggingface_hub
import pytest

LARGE = 2000  # bytes from which a file is kept in LFS here
RESOLVE = re.compile(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/models/([^/]+/[^/?]+)(/(revision|tree)/([^/?]+))?(\?.*)?")


@dataclass
class FakeRepo:
    """One repository, one commit. refusal: (status, X-Error-Code) for everything in it."""

    files: dict[str, bytes]
    refusal: tuple[int, str] | None = None

    @property
    def commit(self) -> str:
        """Changes with the files."""
        told = repr(sorted((n, hashlib.sha256(d).hexdigest()) for n, d in self.files.items()))
        return hashlib.sha1(told.encode()).hexdigest()

    def etag(self, name: str) -> str:
        """sha256 for large files, git's hash for small ones, as the hub has it."""
        data = self.files[name]
        if len(data) >= LARGE:
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def entry(self, name: str) -> dict[str, Any]:
        """The file as the tree endpoint lists it."""
        data, etag = self.files[name], self.etag(name)
        lfs = {"oid": etag, "sha256": etag, "size": len(data), "pointerSize": 130}
        told = {"type": "file", "path": name, "size": len(data), "oid": etag[:40]}
        return told | ({"lfs": lfs} if len(data) >= LARGE else {})


@dataclass
class FakeHub:
    """All repositories; `requests` is what was asked: method, path, Range."""

    repos: dict[str, FakeRepo] = field(default_factory=dict)
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    cut_after: int | None = None  # bytes after which the next large file breaks off
    stall: threading.Event | None = None  # hold the line there until this is set, then break off
    url: str = ""

    def add(self, name: str, **files: bytes) -> FakeRepo:
        """A new repository; `model__safetensors` stands for `model.safetensors`."""
        self.repos[name] = FakeRepo({n.replace("__", "."): data for n, data in files.items()})
        return self.repos[name]

    def gets(self, suffix: str) -> list[str | None]:
        """The Range of every GET of a file that ends so."""
        return [r for method, path, r in self.requests if method == "GET" and path.endswith(suffix)]


@contextmanager
def serve(monkeypatch: pytest.MonkeyPatch, cache: str) -> Iterator[FakeHub]:
    """A running hub that huggingface_hub in this process talks to, with an empty cache."""
    hub = FakeHub()
    handler = type("Handler", (_Handler,), {"hub": hub})
    server = _Server(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    hub.url = f"http://127.0.0.1:{server.server_port}"
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.url)
    template = f"{hub.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", cache)
    try:
        yield hub
    finally:
        huggingface_hub.close_session()
        server.shutdown()
        server.server_close()
        thread.join()


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """A client that goes away is what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    hub: FakeHub
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: object) -> None:
        """Nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        self.hub.requests.append((self.command, self.path, self.headers["Range"]))
        if found := API.fullmatch(self.path):
            self._list(found[1], found[3], found[4])
        elif found := RESOLVE.fullmatch(self.path):
            self._file(found[1], found[2], found[3])
        else:
            self._send(404, b"{}")

    def _repo(self, name: str, revision: str | None) -> FakeRepo | None:
        """The repository; otherwise the refusal has been sent."""
        repo = self.hub.repos.get(name)
        if repo is None:
            self._send(401, b"{}", {"X-Error-Code": "RepoNotFound"})
        elif repo.refusal is not None:
            self._send(repo.refusal[0], b"{}", {"X-Error-Code": repo.refusal[1]})
        elif revision not in (None, "main", repo.commit):
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"})
        else:
            return repo
        return None

    def _list(self, name: str, kind: str | None, revision: str | None) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        entries = [repo.entry(file) for file in repo.files]
        if kind == "tree":
            self._send(200, json.dumps(entries).encode())
            return
        siblings = [{**entry, "rfilename": entry["path"]} for entry in entries]
        told = {"id": name, "sha": repo.commit, "siblings": siblings}
        self._send(200, json.dumps(told).encode())

    def _file(self, name: str, revision: str, file: str) -> None:
        repo = self._repo(name, revision)
        if repo is None:
            return
        if file not in repo.files:
            headers = {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": repo.commit}
            self._send(404, b"", headers)
            return
        data = repo.files[file]
        headers = {"X-Repo-Commit": repo.commit, "ETag": f'"{repo.etag(file)}"'}
        wanted = re.fullmatch(r"bytes=(\d+)-", self.headers["Range"] or "")
        start = int(wanted[1]) if wanted else 0
        if wanted:
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(206 if wanted else 200, data[start:], headers, cuttable=len(data) >= LARGE)

    def _send(
        self,
        status: int,
        body: bytes,
        headers: dict[str, str] | None = None,
        *,
        cuttable: bool = False,
    ) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        cut = self.hub.cut_after
        if cuttable and cut is not None and cut < len(body):
            self.hub.cut_after = None
            self.wfile.write(body[:cut])
            self.wfile.flush()
            if self.hub.stall is not None:
                self.hub.stall.wait(30)
            self.close_connection = True
            self.connection.close()
        else:
            self.wfile.write(body)
