"""A server that speaks OpenAI's chat completions by the book, on a real socket, over any backend.

Streams only. Strict: a body with a key that the book has not, or a message of another form, is
refused, so that a client that leans on one server's leniency is found out.
"""

from __future__ import annotations

import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from tests.fakes import ScriptedBackend
from vlmchat.config import ImagePolicy
from vlmchat.errors import PromptTooLong, VlmchatError
from vlmchat.images import ImageLoader
from vlmchat.openai_wire import read_conversation, read_params, write_error, write_usage
from vlmchat.request import SamplingParams

BY_THE_BOOK = {
    *("model", "messages", "temperature", "top_p", "max_tokens", "seed", "stop", "stream"),
    *("stream_options", "logprobs", "top_logprobs", "presence_penalty", "frequency_penalty"),
}


class OpenAIServer(ThreadingHTTPServer):
    """answers over `backend`; refusals: (status, headers, body) for the next requests, in turn.

    counts: has vlmchat's own endpoint for counting.  cut_after: words, then the connection breaks.
    """

    daemon_threads = True

    def __init__(self, backend: ScriptedBackend) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.backend = backend
        self.api_key: str | None = None
        self.models: list[dict[str, Any]] = [{"id": "m", "object": "model"}]
        self.refusals: list[tuple[int, dict[str, str], Any]] = []
        self.counts = False
        self.cut_after: int | None = None
        self.bodies: list[dict[str, Any]] = []
        self.hung_up = threading.Event()  # a client left in the middle of an answer
        threading.Thread(target=self.serve_forever, args=(0.05,), daemon=True).start()

    @property
    def url(self) -> str:
        """Its address, without /v1."""
        return f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A client that hangs up is no failure of ours."""
        self.hung_up.set()


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    server: OpenAIServer
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        if self._refused():
            return
        if self.path == "/v1/models":
            self._json(200, {"object": "list", "data": self.server.models})
        else:
            self._json(404, {"error": {"message": "no such route", "code": None}})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        if self.path == "/v1/vlmchat/count" and self.server.counts:
            size = self.server.backend.count(self._conversation(body))
            context = self.server.backend.status().context_length
            told = {"tokens": size.tokens, "image_tokens": size.image_tokens}
            self._json(200, {**told, "context_length": context})
        elif self.path == "/v1/chat/completions":
            self.server.bodies.append(body)
            self._answer(body)
        else:
            self._json(404, {"detail": "Not Found"})

    def _conversation(self, body: dict[str, Any]) -> Any:
        return read_conversation(body["messages"], ImageLoader(ImagePolicy()).load)

    def _refused(self) -> bool:
        key = self.server.api_key
        if key is not None and self.headers["Authorization"] != f"Bearer {key}":
            told = {"message": "Incorrect API key provided", "code": "invalid_api_key"}
            self._json(401, {"error": told})
            return True
        if not self.server.refusals:
            return False
        status, headers, body = self.server.refusals.pop(0)
        self._json(status, body, headers)
        return True

    def _answer(self, body: dict[str, Any]) -> None:
        try:
            if unknown := set(body) - BY_THE_BOOK:
                raise AssertionError(f"not in OpenAI's book: {unknown}")
            params = read_params(body, SamplingParams())
            stream = self.server.backend.stream(self._conversation(body), params)
        except PromptTooLong as error:
            limit = self.server.backend.status().context_length
            message = (
                f"This model's maximum context length is {limit} tokens. However, you requested "
                f"{error.tokens + params.max_new_tokens} tokens ({error.tokens} in the messages)."
            )
            told = {"message": message, "type": "invalid_request_error", "param": "messages"}
            self._json(400, {"error": {**told, "code": "context_length_exceeded"}})
            return
        except VlmchatError as error:
            self._json(error.http_status, write_error(error))
            return
        self._start(200, {"Content-Type": "text/event-stream", "Transfer-Encoding": "chunked"})
        self._chunk(": ping\n\n")
        head: dict[str, Any] = {
            "id": "c",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
        }

        def event(delta: dict[str, Any], reason: str | None = None, **more: Any) -> None:
            choice = {"index": 0, "delta": delta, "finish_reason": reason, "logprobs": None}
            self._chunk(f"data: {json.dumps({**head, 'choices': [choice], **more})}\n\n")

        event({"role": "assistant", "content": ""})
        try:
            for number, delta in enumerate(stream):
                if number == self.server.cut_after:
                    self.close_connection = True
                    self.wfile.flush()
                    self.connection.close()
                    return
                if delta.text:
                    event({"content": delta.text})
                if delta.finish_reason is not None:
                    event({}, str(delta.finish_reason))
                    assert delta.usage is not None
                    counts = {**head, "choices": [], "usage": write_usage(delta.usage)}
                    self._chunk(f"data: {json.dumps(counts)}\n\ndata: [DONE]\n\n")
        except VlmchatError as error:
            self._chunk(f"data: {json.dumps(write_error(error))}\n\n")
        self._chunk("")

    def _chunk(self, text: str) -> None:
        data = text.encode()
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()

    def _start(self, status: int, headers: dict[str, str]) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def _json(self, status: int, body: Any, headers: dict[str, str] | None = None) -> None:
        data = (body if isinstance(body, str) else json.dumps(body)).encode()
        length = {"Content-Length": str(len(data)), "Content-Type": "application/json"}
        self._start(status, {**length, **(headers or {})})
        self.wfile.write(data)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is logged."""
