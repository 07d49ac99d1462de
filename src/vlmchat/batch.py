"""Many questions, many at once: requests in, one line of JSON for each out.

Called by the batch command, over any `Backend`. Requests are read as they are needed, their
pictures are decoded a few ahead, answers are written as they finish. Knows nothing of the command
line, of terminals, or of how the file of answers survives a crash (`batch_answers`).

Two forms of requests, told apart line by line: OpenAI's batch lines (`custom_id`, `body`; answered
in OpenAI's form) and simple ones (`prompt`, `image` or `images`; answered as `chat --json` does).
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import queue
import re
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, TypeVar

from vlmchat.batch_answers import Answers, Line
from vlmchat.conversation import Conversation, Image
from vlmchat.errors import (
    EngineDead,
    ImageNotFound,
    InvalidRequest,
    ModelNotFound,
    NetworkError,
    Overloaded,
    Unauthorized,
    VlmchatError,
)
from vlmchat.images import ImageLoader
from vlmchat.json_output import JSON_SCHEMA, answer_json
from vlmchat.openai_wire import read_conversation, read_params, write_completion, write_error
from vlmchat.request import (
    Backend,
    DrawnToken,
    FinishReason,
    SamplingParams,
    Status,
    Stream,
    Timings,
    Usage,
)
from vlmchat.session import Trimmed

URL = "/v1/chat/completions"
T = TypeVar("T")
_SIMPLE_KEYS = ("id", "image", "images", "prompt", "system")
_HAS_SCHEME = re.compile(r"data:|[a-z][a-z0-9+.-]*:/", re.IGNORECASE)
_DECODERS = min(4, os.cpu_count() or 1)  # threads; each holds one picture while it works
_PAUSES_S = (1.0, 4.0)  # before asking a server again that could not be reached
_TICK_S = 0.2  # how soon a stop is noticed by who waits for room in a queue


@dataclass(frozen=True, slots=True)
class Request:
    """One line of the input, or one picture of the command line.

    fields: what stands in it.  fault: why it cannot be asked at all.
    fingerprint: tells whether an answer of the same id was made for the same request.
    """

    id: str
    form: Literal["openai", "simple"]
    fields: dict[str, Any] = field(repr=False)
    fault: str | None = None

    @property
    def fingerprint(self) -> str:
        """The same for the same request, in every run; OpenAI's lines carry it as their `id`."""
        text = json.dumps([self.fields, self.fault], sort_keys=True)
        digest = hashlib.sha256(text.encode()).hexdigest()[:24]
        return f"batch_req_{digest}" if self.form == "openai" else digest


def read_requests(lines: Iterable[bytes]) -> Iterator[Request]:
    """The requests in a JSONL file, as they are needed; blank lines are none.

    A line that is no request becomes one with a `fault`, named after the line's number.
    """
    for number, raw in enumerate(lines, start=1):
        if raw.strip():
            yield _read_request(raw, number)


def _read_request(raw: bytes, number: int) -> Request:
    unnamed = f"line-{number}"
    try:
        line = json.loads(raw)
    except (ValueError, RecursionError) as error:
        reason = getattr(error, "msg", None) or "not UTF-8" * isinstance(error, UnicodeDecodeError)
        return Request(unnamed, "simple", {}, f"line {number} is not JSON: {reason or error}")
    if not isinstance(line, dict):
        return Request(unnamed, "simple", {}, f"line {number} is not a JSON object")
    form: Literal["openai", "simple"] = (
        "openai" if "custom_id" in line or "body" in line else "simple"
    )
    key = "custom_id" if form == "openai" else "id"
    id = line.get(key, unnamed)
    if isinstance(id, int) and not isinstance(id, bool):
        id = str(id)
    if not isinstance(id, str) or not id:
        return Request(unnamed, form, line, f"line {number}: {key} must be a text")
    return Request(id, form, line)


def picture_requests(sources: Iterable[str], prompt: str, system: str) -> Iterator[Request]:
    """The same question about each picture; its path is the id."""
    for source in sources:
        fields = {"image": source, "prompt": prompt, "system": system}
        yield Request(source, "simple", fields)


def expand(patterns: Iterable[str]) -> list[str]:
    """The pictures that paths, URLs and patterns (`*`, `?`, `[…]`, `**`) name, each once.

    What a pattern matches is sorted. Raises ImageNotFound for a pattern that matches no file.
    """
    found: list[str] = []
    for pattern in patterns:
        path = os.path.expanduser(pattern)
        if _HAS_SCHEME.match(pattern) or not glob.has_magic(path) or os.path.lexists(path):
            found.append(pattern)
            continue
        matches = sorted(m for m in glob.iglob(path, recursive=True) if os.path.isfile(m))
        if not matches:
            raise ImageNotFound(f"{pattern} matches no file")
        found += matches
    return list(dict.fromkeys(found))


@dataclass(frozen=True, slots=True)
class Survey:
    """What stands in an input before anything of it is asked."""

    total: int
    done: int = 0  # answered in the output already
    changed: tuple[str, ...] = ()  # ids of those whose answer was made for another request
    foreign: int = 0  # answers in the output whose request is not in the input


def survey(requests: Iterable[Request], done: dict[str, str]) -> Survey:
    """Look once through all requests. Raises InvalidRequest for an id that stands there twice."""
    seen: set[str] = set()
    changed, answered = [], 0
    for request in requests:
        _check_new(request, seen)
        if request.id in done:
            answered += 1
            if done[request.id] != request.fingerprint:
                changed.append(request.id)
    return Survey(len(seen), answered, tuple(changed), len(done) - answered)


def unique(requests: Iterable[Request]) -> Iterator[Request]:
    """The same, for an input that cannot be surveyed: InvalidRequest at an id that comes twice."""
    seen: set[str] = set()
    for request in requests:
        _check_new(request, seen)
        yield request


def _check_new(request: Request, seen: set[str]) -> None:
    if request.id in seen:
        raise InvalidRequest(f"two requests have the id {request.id!r}; ids must be unique")
    seen.add(request.id)


@dataclass(frozen=True, slots=True)
class Prepared:
    """A request as a backend takes it."""

    conversation: Conversation
    params: SamplingParams


@dataclass(frozen=True, slots=True)
class Preparer:
    """Makes conversations of requests. Called from several threads.

    folder: what relative paths in requests are relative to; None leaves paths as they are.
    system, params: for requests that say nothing else.
    """

    loader: ImageLoader
    params: SamplingParams
    system: str = ""
    folder: Path | None = None

    def __call__(self, request: Request) -> Prepared:
        """Raises InvalidRequest, ImageError, NetworkError."""
        if request.fault is not None:
            raise InvalidRequest(request.fault)
        read = self._openai if request.form == "openai" else self._simple
        return read(request.fields)

    def _openai(self, line: dict[str, Any]) -> Prepared:
        if line.get("method", "POST") != "POST" or line.get("url", URL) != URL:
            raise InvalidRequest(f"only POST {URL} is served")
        body = line.get("body")
        if not isinstance(body, dict):
            raise InvalidRequest("body must be an object")
        params = read_params(body, self.params)
        conversation = read_conversation(body.get("messages"), self._load)
        return Prepared(replace(conversation, system=conversation.system or self.system), params)

    def _simple(self, line: dict[str, Any]) -> Prepared:
        prompt, system = line.get("prompt"), line.get("system", self.system)
        if not isinstance(prompt, str) or not prompt.strip():
            raise InvalidRequest("prompt must be a text that is not empty")
        if not isinstance(system, str):
            raise InvalidRequest("system must be a text")
        if "image" in line and "images" in line:
            raise InvalidRequest("image and images are both there; choose one")
        sources = [line["image"]] if "image" in line else line.get("images", [])
        if not isinstance(sources, list) or not all(isinstance(s, str) for s in sources):
            raise InvalidRequest("images must be a list of paths or URLs, image one of them")
        overrides = {key: value for key, value in line.items() if key not in _SIMPLE_KEYS}
        params = read_params(overrides, self.params)
        images = tuple(self._load(source) for source in sources)
        return Prepared(Conversation(system).ask(prompt, images), params)

    def _load(self, source: str) -> Image:
        path = source
        if self.folder is not None and not _HAS_SCHEME.match(source):
            path = os.path.join(self.folder, os.path.expanduser(source))
        short = "data URL" if source[:5].lower() == "data:" else source
        return replace(self.loader.load(path), source=short)


@dataclass(slots=True)
class Answered:
    """One answer, gathered; what `output.answer_json` reads."""

    conversation: Conversation
    answer: str = ""
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    tokens: tuple[DrawnToken, ...] = ()
    trimmed: Trimmed = field(default_factory=Trimmed)  # one question is never trimmed

    def gather(self, stream: Stream) -> None:
        """Read the stream to its end."""
        for delta in stream:
            self.answer += delta.text
            self.tokens += delta.tokens
            if delta.finish_reason is not None:
                self.finish_reason = delta.finish_reason
                self.usage, self.timings = delta.usage, delta.timings


def answer_line(request: Request, answered: Answered, status: Status) -> Line:
    """The line for an answer, in the request's form."""
    if request.form == "simple":
        head = {"schema": JSON_SCHEMA, "type": "answer", "id": request.id}
        body = answer_json(answered, status)
        return {**head, "request": request.fingerprint, **body}
    assert answered.finish_reason is not None
    body = write_completion(
        f"chatcmpl-{request.fingerprint.removeprefix('batch_req_')}",
        status.model,
        answered.answer,
        answered.finish_reason,
        answered.usage,
        answered.tokens,
    )
    return _openai_line(request, 200, body, None)


def error_line(request: Request, error: VlmchatError) -> Line:
    """The line for a request that failed, in its form."""
    told = {"code": error.code, "message": error.message}
    if request.form == "openai":
        return _openai_line(request, error.http_status, write_error(error), told)
    head = {"schema": JSON_SCHEMA, "type": "error", "id": request.id}
    told_more = {**told, "exit_code": error.exit_code}
    return {**head, "request": request.fingerprint, "error": told_more}


def _openai_line(request: Request, status: int, body: Any, error: Any) -> Line:
    response = {"status_code": status, "request_id": request.fingerprint, "body": body}
    head = {"id": request.fingerprint, "custom_id": request.id}
    return {**head, "response": response, "error": error}


@dataclass(slots=True)
class Tally:
    """What a run has done so far. Changed by the run alone."""

    answered: int = 0
    failed: int = 0
    prompt_tokens: int = 0
    image_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0

    def add(self, answered: Answered) -> None:
        """Count an answer."""
        self.answered += 1
        if answered.usage is not None:
            self.prompt_tokens += answered.usage.prompt_tokens
            self.image_tokens += answered.usage.image_tokens
            self.cached_tokens += answered.usage.cached_tokens
            self.completion_tokens += answered.usage.completion_tokens


class Batch:
    """One run over requests: `concurrency` threads ask, a few more decode pictures ahead."""

    def __init__(
        self,
        backend: Backend,
        prepare: Callable[[Request], Prepared],
        answers: Answers,
        concurrency: int = 1,
        on_progress: Callable[[Tally], None] = lambda tally: None,
    ) -> None:
        self.tally = Tally()
        self._backend, self._prepare, self._answers = backend, prepare, answers
        self._concurrency, self._on_progress = concurrency, on_progress
        # As many wait, prepared, as are being asked: no more pictures than that are held.
        self._read: queue.Queue[Request | None] = queue.Queue(1)
        self._ready: queue.Queue[tuple[Request, Prepared] | None] = queue.Queue(concurrency)
        self._lock = threading.Lock()  # of everything below, and of the answers
        self._streams: set[Stream] = set()
        # Lines held back, and why: see _hold_back.
        self._unreachable: list[tuple[Line, VlmchatError]] = []
        self._stopping = threading.Event()
        self._fatal: BaseException | None = None

    def run(self, requests: Iterable[Request]) -> Tally:
        """Ask them all; every finished answer is written, whatever ends the run.

        Raises what makes going on useless (EngineDead, a server that is gone or refuses key or
        model, an output that cannot be written), KeyboardInterrupt, and what `requests` raises.
        """
        decoders = self._start(_DECODERS, self._decode)
        askers = self._start(self._concurrency, self._ask_all)
        try:
            for request in requests:
                if not self._put(self._read, request):
                    break
            self._end(decoders, self._read)
            self._end(askers, self._ready)
        except BaseException as error:
            self._stop()
            self._join(askers)
            self._stop(error)  # what decoders still find is not written any more
            raise
        self._join(askers)
        if self._fatal is not None:
            raise self._fatal
        if not self.tally.answered and self._unreachable:
            raise self._unreachable[0][1]
        self._write_held_back()
        return self.tally

    def _start(self, count: int, work: Callable[[], None]) -> list[threading.Thread]:
        def run() -> None:
            try:
                work()
            except BaseException as error:  # in a thread nobody would hear of it
                self._stop(error)

        # Daemons: a picture that is slow to come must not hold up the end of the program.
        threads = [threading.Thread(target=run, name="batch", daemon=True) for _ in range(count)]
        for thread in threads:
            thread.start()
        return threads

    def _put(self, into: queue.Queue[T], item: T) -> bool:
        """Whether there was room for it before the run was stopped."""
        while not self._stopping.is_set():
            try:
                into.put(item, timeout=_TICK_S)
                return True
            except queue.Full:
                continue
        return False

    def _items(self, of: queue.Queue[T | None]) -> Iterator[T]:
        """What comes, until the end or until the run is stopped."""
        while not self._stopping.is_set():
            try:
                item = of.get(timeout=_TICK_S)
            except queue.Empty:
                continue
            if item is None:
                return
            yield item

    def _end(self, threads: list[threading.Thread], source: queue.Queue[Any]) -> None:
        for _ in threads:
            self._put(source, None)
        for thread in threads:
            while thread.is_alive() and not self._stopping.is_set():
                thread.join(_TICK_S)  # in steps, so that signals are heard

    def _join(self, threads: list[threading.Thread]) -> None:
        for thread in threads:
            while thread.is_alive():
                thread.join(_TICK_S)

    def _stop(self, fatal: BaseException | None = None) -> None:
        """End soon: answers under way are given up, nothing new is begun."""
        with self._lock:
            self._fatal = self._fatal or fatal
            self._stopping.set()
            streams = tuple(self._streams)
        for stream in streams:
            stream.cancel()

    def _decode(self) -> None:
        for request in self._items(self._read):
            try:
                prepared = self._prepare(request)
            except VlmchatError as error:
                self._write(error_line(request, error))
            else:
                self._put(self._ready, (request, prepared))

    def _ask_all(self) -> None:
        for request, prepared in self._items(self._ready):
            self._serve(request, prepared)

    def _serve(self, request: Request, prepared: Prepared) -> None:
        try:
            answered = self._ask(prepared)
        except (EngineDead, ModelNotFound, Unauthorized):  # so would all others
            raise
        except (NetworkError, Overloaded) as error:
            self._hold_back(error_line(request, error), error)
        except VlmchatError as error:
            self._write(error_line(request, error))
        else:
            if answered is not None:
                line = answer_line(request, answered, self._backend.status())
                self._write(line, answered)

    def _ask(self, prepared: Prepared) -> Answered | None:
        """The answer; None if the run was stopped meanwhile. A lost server is asked again."""
        for pause_s in _PAUSES_S:
            try:
                return self._ask_once(prepared)
            except (NetworkError, Overloaded):
                if self._stopping.wait(pause_s):
                    return None
        return self._ask_once(prepared)

    def _ask_once(self, prepared: Prepared) -> Answered | None:
        stream = self._backend.stream(prepared.conversation, prepared.params)
        with self._lock:
            self._streams.add(stream)
        try:
            if self._stopping.is_set():
                stream.cancel()
            answered = Answered(prepared.conversation)
            answered.gather(stream)
        finally:
            with self._lock:
                self._streams.discard(stream)
        return None if answered.finish_reason is FinishReason.CANCELLED else answered

    def _write(self, line: Line, answered: Answered | None = None) -> None:
        with self._lock:
            if self._fatal is not None:
                return  # the output may be what failed
            if answered is None:
                self.tally.failed += 1
            else:
                self._write_held_back()
                self.tally.add(answered)
            self._answers.write(line)
            self._on_progress(self.tally)

    def _hold_back(self, line: Line, error: VlmchatError) -> None:
        """Keep an error until another request is answered: then it was this one, not the server.

        Where none is, the server is gone: the run ends, and these requests count as not asked.
        """
        with self._lock:
            self._unreachable.append((line, error))
            gone = len(self._unreachable) > self._concurrency
        if gone:
            raise error

    def _write_held_back(self) -> None:
        for line, _ in self._unreachable:
            self._answers.write(line)
            self.tally.failed += 1
        self._unreachable.clear()
