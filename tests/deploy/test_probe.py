"""deploy/docker/probe.py, which images ask their servers by, against a real server."""

from __future__ import annotations

import importlib.util
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import pytest

from tests.deploy.command_lines import DEPLOY


class Ready(BaseHTTPRequestHandler):
    """A worker's routes: /health for anybody, /ready with the key."""

    def do_GET(self) -> None:
        """Answer by the path and the key."""
        known = self.path == "/health" or self.headers["authorization"] == "Bearer secret"
        self.send_response(200 if known else 401)
        self.end_headers()

    def log_message(self, *_: object) -> None:
        """Say nothing."""


@pytest.fixture
def probe() -> Iterator[Any]:
    spec = importlib.util.spec_from_file_location("probe", DEPLOY / "docker" / "probe.py")
    assert spec is not None
    assert spec.loader is not None
    module: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    with HTTPServer(("127.0.0.1", 0), Ready) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        module.ALIVE = {"worker": (server.server_port, "/health"), "web": (1, "/")}
        yield module
        server.shutdown()
        thread.join()


def test_probe_is_content_when_any_role_answers(probe: Any) -> None:
    assert probe.main() == 0
    assert probe.main("web") == 1


def test_probe_shows_the_first_key(probe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert probe.main("worker", "/ready") == 1
    monkeypatch.setenv("VLMCHAT_API_KEY", "secret\nanother")
    assert probe.main("worker", "/ready") == 0
