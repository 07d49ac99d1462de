"""A server's model as a `Backend`: the client's side of OpenAI's chat completions.

Used by `chat --server` and `batch --server`, against servers of ours, vLLM, llama.cpp and whoever
else speaks this wire. Callers' threads ask; one thread with an event loop does all the talking, so
that an answer can be cancelled at any moment: its connection is closed. Knows nothing of models.
"""

from __future__ import annotations

import asyncio
import json
import re
import threading
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterator
from concurrent.futures import Future
from contextlib import asynccontextmanager, contextmanager
from typing import Any, TypeVar

import httpx2

from vlmchat.conversation import Conversation
from vlmchat.errors import (
    ConfigError,
    InvalidRequest,
    ModelError,
    ModelNotFound,
    NetworkError,
    OutOfMemory,
    Overloaded,
    PromptTooLong,
    Unauthorized,
    VlmchatError,
)
from vlmchat.openai_wire import Body, write_body, write_messages
from vlmchat.queued_stream import Outlet, QueuedStream
from vlmchat.request import (
    Delta,
    DrawnToken,
    FinishReason,
    Logprob,
    PromptSize,
    SamplingParams,
    Status,
    Timings,
    Usage,
)

CONNECT_TIMEOUT_S = 10.0
READ_TIMEOUT_S = 600.0  # without a sign of life: a prompt may take long before its first token
MAX_TRIES = 5  # of a request that a busy server sends away
MAX_PAUSE_S = 60.0  # between them, whatever Retry-After says
_BUSY = (429, 503)
_NO_SUCH_ROUTE = (404, 405, 501)
_UNKNOWN_TOKEN = -1  # the wire tells no ids
_SHOWN_CHARACTERS = 500
# Where lists of models tell the context length: ours, vLLM's, LM Studio's, llama.cpp's.
_CONTEXT_KEYS = ("context_length", "max_model_len", "max_context_length", "n_ctx")
# Words in which servers say that a prompt is too long, and the numbers in them.
_TOO_LONG = re.compile(r"context[ _](length|size|window)|prompt is too long|maximum .*tokens", re.I)
_LIMIT = re.compile(
    r"(?:maximum|limit|room for|context (?:size|length|window))\D{0,60}?(\d+)", re.I
)
_ASKED = re.compile(r"(?:requested|resulted in|request has|needs|contains)\D{0,20}?(\d+)", re.I)

T = TypeVar("T")


class Client:
    """A model behind an OpenAI-compatible server, answering any number of streams."""

    def __init__(
        self,
        url: str,
        api_key: str | None = None,
        model: str | None = None,
        timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        """Connect, and ask which model there is.

        url: with or without /v1.  model: its name there; None takes the only one there is.
        timeout_s: how long the server may be silent.

        Raises ConfigError (a bad URL or key, a choice of models), NetworkError, Unauthorized.
        """
        self._root = _api_root(url)
        headers = {"Authorization": f"Bearer {_checked(api_key)}"} if api_key else {}
        timeout = httpx2.Timeout(timeout_s, connect=CONNECT_TIMEOUT_S, pool=None)
        limits = httpx2.Limits(max_connections=None)
        self._http = httpx2.AsyncClient(headers=headers, timeout=timeout, limits=limits)
        self._counts = False  # whether the server does
        self._closed = False
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(
            target=self._loop.run_forever, name="vlmchat-client", daemon=True
        )
        self._thread.start()
        try:
            self._status = self._wait(self._look_around(model))
        except BaseException:
            self.close()
            raise

    def stream(self, conversation: Conversation, params: SamplingParams) -> QueuedStream:
        """See `Backend.stream`; PromptTooLong, as all else, comes from the iteration."""
        body = write_body(conversation, params, self._status.model)
        outlet = Outlet()
        future = self._submit(self._answer(body, outlet.put))

        def ended(future: Future[None]) -> None:
            if future.cancelled():
                outlet.put(self._gone() if self._closed else Delta("", FinishReason.CANCELLED))
            elif (error := future.exception()) is not None:
                outlet.put(error)

        future.add_done_callback(ended)
        return QueuedStream(outlet, future.cancel)  # closes the connection

    def count(self, conversation: Conversation) -> PromptSize | None:
        """See `Backend.count`: exact where the server has our endpoint for it, else None."""
        messages = write_messages(conversation)
        if not self._counts or not messages:
            return None
        return self._wait(self._count({"model": self._status.model, "messages": messages}))

    def status(self) -> Status:
        """See `Backend.status`."""
        return self._status

    def close(self) -> None:
        """See `Backend.close`."""
        if self._closed:
            return
        self._closed = True
        asyncio.run_coroutine_threadsafe(self._shut_down(), self._loop).result()
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def _submit(self, work: Coroutine[Any, Any, T]) -> Future[T]:
        if self._closed:
            work.close()
            raise self._gone()
        return asyncio.run_coroutine_threadsafe(work, self._loop)

    def _gone(self) -> NetworkError:
        return NetworkError(f"{_shown(self._root)}: the connection was closed")

    def _wait(self, work: Coroutine[Any, Any, T]) -> T:
        future = self._submit(work)
        try:
            return future.result()
        finally:
            future.cancel()  # Ctrl-C may be what ended the wait

    async def _shut_down(self) -> None:
        others = asyncio.all_tasks() - {asyncio.current_task()}
        for task in others:
            task.cancel()
        await asyncio.gather(*others, return_exceptions=True)
        await self._http.aclose()

    async def _look_around(self, model: str | None) -> Status:
        """The model that answers, and its context length where the server tells it."""
        try:
            listed = await self._ask("GET", "models")
        except ModelNotFound:  # no such route
            listed = {}
        data = listed.get("data")
        models = [m for m in data if isinstance(m, dict)] if isinstance(data, list) else []
        names = [str(m.get("id")) for m in models]
        if model is None and len(names) != 1:
            some = f"several models: {', '.join(names[:8])}" if names else "no model in its list"
            raise ConfigError(f"{_shown(self._root)} has {some}; name one with --model-path")
        model = model or names[0]
        entry = models[names.index(model)] if model in names else {}
        details = (("server", _shown(self._root)),)
        context = await self._counted_context(model)
        self._counts = context is not None
        return Status(model, context or _context_length(entry), details=details)

    async def _count(self, body: Body) -> PromptSize:
        told = await self._ask("POST", "vlmchat/count", body)
        try:
            return PromptSize(int(told["tokens"]), int(told["image_tokens"]))
        except (KeyError, TypeError, ValueError):
            raise NetworkError(f"{_shown(self._root)} does not count as it did before") from None

    async def _counted_context(self, model: str) -> int | None:
        """The context length, as a server of ours that can count tells it; else None."""
        body = {"model": model, "messages": [{"role": "user", "content": "?"}]}
        try:
            told = (await self._ask("POST", "vlmchat/count", body)).get("context_length")
        except (ModelNotFound, InvalidRequest, NetworkError):  # whatever others make of it
            return None
        return told if isinstance(told, int) else None

    async def _ask(self, method: str, path: str, body: Body | None = None) -> Body:
        async with self._open(method, path, body) as response:
            await response.aread()
        try:
            answer = json.loads(response.content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise NetworkError(f"{_shown(str(response.url))} did not answer with a JSON object")
        return answer

    async def _answer(self, body: Body, put: Callable[[Delta], None]) -> None:
        """One answer from request to end. Raises VlmchatError."""
        gathered = _Gathered()
        async with self._open("POST", "chat/completions", body) as response:
            async for event in httpx2.EventSource(response):
                if event.data == "[DONE]":
                    gathered.done = True
                    break
                chunk = _json_object(event.data)
                if chunk.get("error"):
                    raise _error(200, chunk, self._root)
                if delta := gathered.add(chunk):
                    put(delta)
        put(gathered.end())

    @asynccontextmanager
    async def _open(
        self, method: str, path: str, body: Body | None
    ) -> AsyncIterator[httpx2.Response]:
        """A response that is not an error; a busy server is asked again a few times."""
        content = None if body is None else json.dumps(body).encode()
        headers = {} if body is None else {"Content-Type": "application/json"}
        with _network_errors(self._root):
            for tried in range(1, MAX_TRIES + 1):
                request = self._http.build_request(
                    method, f"{self._root}/{path}", content=content, headers=headers
                )
                response = await self._http.send(request, stream=True)
                try:
                    if response.status_code in _BUSY and tried < MAX_TRIES:
                        pause_s = _pause_s(response, tried)
                    elif not response.is_success:
                        await response.aread()
                        raise _error(response.status_code, _body_of(response), self._root)
                    else:
                        yield response
                        return
                finally:
                    await response.aclose()
                await asyncio.sleep(pause_s)


class _Gathered:
    """What the chunks of one answer have told so far."""

    def __init__(self) -> None:
        self.done = False
        self._reason: FinishReason | None = None
        self._usage: Usage | None = None
        self._tokens: list[DrawnToken] = []
        self._began = time.perf_counter()
        self._first: float | None = None

    def add(self, chunk: Body) -> Delta | None:
        """Take a chunk in; what is to be passed on at once."""
        if isinstance(chunk.get("usage"), dict):
            self._usage = _usage(chunk["usage"])
        for choice in (chunk.get("choices") or [])[:1]:
            text = (choice.get("delta") or {}).get("content") or ""
            logprobs = (choice.get("logprobs") or {}).get("content") or ()
            self._tokens += [_drawn(token) for token in logprobs]
            if reason := choice.get("finish_reason"):
                self._reason = FinishReason.LENGTH if reason == "length" else FinishReason.STOP
            if text:
                self._first = self._first or time.perf_counter()
                return Delta(text)
        return None

    def end(self) -> Delta:
        """The last Delta. Raises NetworkError when the answer did not come to its end."""
        if self._reason is None and not self.done:
            raise NetworkError("the server closed the stream in the middle of an answer")
        reason = self._reason or FinishReason.STOP
        return Delta("", reason, self._usage, self._timings(), tuple(self._tokens))

    def _timings(self) -> Timings:
        now = time.perf_counter()
        first = self._first or now
        decoded = self._usage.completion_tokens - 1 if self._usage else 0
        rate = decoded / (now - first) if decoded > 0 and now > first else 0.0
        return Timings(first - self._began, now - self._began, rate)


def _api_root(url: str) -> str:
    """`url` down to its /v1, without a slash behind it."""
    root = re.sub(r"(/chat/completions)?/*$", "", url.strip())
    try:
        parsed = httpx2.URL(root)
    except httpx2.InvalidURL as error:
        raise ConfigError(f"--server {_shown(url)}: not a valid address ({error})") from None
    if parsed.scheme not in ("http", "https") or not parsed.host:
        raise ConfigError(f"--server {_shown(url)}: give an address like http://127.0.0.1:8000")
    return root if re.search(r"/v\d+$", parsed.path) else f"{root}/v1"


def _checked(api_key: str) -> str:
    if not (api_key.isascii() and api_key.isprintable()) or " " in api_key:
        raise ConfigError("--api-key holds characters that no key may hold")
    return api_key


def _context_length(entry: Body) -> int:
    """0 where the server does not tell."""
    places = [entry, entry.get("meta")]
    found = (place.get(key) for place in places if isinstance(place, dict) for key in _CONTEXT_KEYS)
    return next((n for n in found if isinstance(n, int) and n > 0), 0)


def _usage(told: Body) -> Usage:
    details = told.get("prompt_tokens_details") or {}
    return Usage(
        prompt_tokens=told.get("prompt_tokens") or 0,
        image_tokens=details.get("image_tokens") or 0,
        cached_tokens=details.get("cached_tokens") or 0,
        completion_tokens=told.get("completion_tokens") or 0,
    )


def _drawn(token: Body) -> DrawnToken:
    def one(told: Body) -> Logprob:
        return Logprob(_UNKNOWN_TOKEN, str(told.get("token", "")), float(told.get("logprob", 0)))

    return DrawnToken(one(token), tuple(one(other) for other in token.get("top_logprobs") or ()))


@contextmanager
def _network_errors(root: str) -> Iterator[None]:
    """Whatever httpx raises, as ours."""
    try:
        yield
    except httpx2.TimeoutException:
        raise NetworkError(f"{_shown(root)} did not answer in time; --server-timeout") from None
    except httpx2.HTTPError as error:
        reason = _shown(str(error)) or "the connection was lost"
        raise NetworkError(f"{_shown(root)}: {reason}") from None


def _pause_s(response: httpx2.Response, tried: int) -> float:
    """What Retry-After says in seconds, else longer each time."""
    told = response.headers.get("retry-after", "")
    return min(MAX_PAUSE_S, float(told) if told.isdecimal() else 0.25 * 2.0**tried)


def _body_of(response: httpx2.Response) -> Body:
    try:
        return _json_object(response.text)
    except NetworkError:
        return {"error": response.text or response.reason_phrase}


def _json_object(text: str) -> Body:
    try:
        value = json.loads(text)
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise NetworkError(f"the server sent something that is no JSON object: {_shown(text)}")
    return value


def _error(status: int, body: Body, root: str) -> VlmchatError:
    """A server's error object, in whichever of the usual forms, as an error of ours."""
    told = body.get("error") or body  # vLLM and FastAPI have used bodies without the key
    if not isinstance(told, dict):
        told = {"message": told}
    message = _shown(str(told.get("message") or told.get("detail") or told))
    code = str(told.get("code") or "")
    if isinstance(told.get("code"), int) and status == 200:
        status = told["code"]
    kinds = f"{code} {told.get('type')}"
    if re.search("context_length|exceed_context", kinds) or (
        status in (400, 413, 422, 200) and _TOO_LONG.search(message)
    ):
        return _too_long(told, message)
    if code in _BY_CODE:
        return _BY_CODE[code](message)
    if status in (401, 403):
        return Unauthorized(f"{_shown(root)}: {message}; --api-key gives a key")
    if status == 429:
        return Overloaded(f"{_shown(root)}: {message}")
    if status in _NO_SUCH_ROUTE:
        return ModelNotFound(f"{_shown(root)}: {message}")
    if 400 <= status < 500:
        return InvalidRequest(message)
    return NetworkError(f"{_shown(root)}: the server failed: {message}")


def _too_long(told: Body, message: str) -> PromptTooLong:
    """With the numbers where they are told: llama.cpp has keys for them, others words."""
    asked, limit = told.get("n_prompt_tokens"), told.get("n_ctx")
    found = [pattern.search(message) for pattern in (_ASKED, _LIMIT)]
    if not (isinstance(asked, int) and isinstance(limit, int)):
        asked, limit = (int(match[1]) if match else 0 for match in found)
    said = "" if asked > limit > 0 else f"the message is too long: {message}"
    return PromptTooLong(asked, limit, said=said)


def _simple_errors(root: type[VlmchatError]) -> Iterator[type[VlmchatError]]:
    yield root
    for child in root.__subclasses__():
        yield from _simple_errors(child)


_BY_CODE = {
    kind.code: kind
    for root in (InvalidRequest, ModelError, OutOfMemory, Unauthorized, Overloaded)
    for kind in _simple_errors(root)
    if kind is not PromptTooLong
}


def _shown(text: str) -> str:
    """Somebody else's words, or an address, on one line: printable, not too long, no password."""
    text = re.sub(r"//[^/@\s]*@", "//", text)
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= _SHOWN_CHARACTERS else line[: _SHOWN_CHARACTERS - 1] + "…"
