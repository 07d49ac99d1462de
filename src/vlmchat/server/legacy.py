"""LLaVA's own wire: JSON objects, each ended by a NUL, whose text grows from the prompt on.

The worker mounts `worker_routes`, the controller carries answers by `LegacyWire`; everything else
here is plain encoding and decoding. Paths, fields, limits and words are those of LLaVA's
`llava/serve/controller.py` and `model_worker.py` of May 2024; what differs, on purpose: an empty or
missing `stop` is taken, `stop` ends the answer, pictures and their places are counted before the
model sees them, and an error's cause stands in `vlmchat_error`.
"""

from __future__ import annotations

import json
import math
from collections.abc import AsyncGenerator, AsyncIterator, Iterator, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, nullcontext
from dataclasses import dataclass
from typing import Any, Protocol

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from vlmchat.conversation import Conversation, Image, Message
from vlmchat.errors import InvalidRequest, ModelNotFound, NoWorker, PromptTooLong, VlmchatError
from vlmchat.request import Delta, SamplingParams
from vlmchat.server.app import error_object, read_json
from vlmchat.server.dispatch import text_hashes
from vlmchat.server.failover import ELSEWHERE, Item, Refusal, WorkerLost
from vlmchat.server.openai_relay import Overlap
from vlmchat.server.registry import Worker
from vlmchat.server.relayed import Relayed, described

STATUS_PATH, STREAM_PATH = "/worker_get_status", "/worker_generate_stream"
SERVER_ERROR = "**NETWORK ERROR DUE TO HIGH TRAFFIC. PLEASE REGENERATE OR REFRESH THIS PAGE.**"
NO_ROOM = "Exceeds max token length. Please start a new conversation, thanks."
FAILED, NO_WORKER, WORKER_FAILED = 1, 2, 3  # error codes

IMAGE_MARKER = "<image>"
PING_S = 4.0  # LLaVA's controller gives up after 5 s of silence
_MAX_NEW_TOKENS = 1024
_DEFAULT_NEW_TOKENS = 256
_GREEDY_BELOW = 0.001  # a temperature that LLaVA's worker takes for none
_LEAST_TOP_P = 1e-6  # top_p 0: the likeliest token only
_DATA_URL = "data:;base64,"
_MAX_OBJECT_BYTES = 16 * 2**20
_TOKEN_IDS, _RESUME, _ERROR = "vlmchat_token_ids", "vlmchat_resume", "vlmchat_error"


def frame(item: Item) -> bytes:
    """An object as it goes over the wire, in Python's own JSON, then a NUL."""
    return json.dumps(item).encode() + b"\0"


def error_item(code: int, error: Mapping[str, Any], text: str = SERVER_ERROR) -> Item:
    """What a client shows, its code, and the cause for whoever looks."""
    cause = {key: error.get(key) for key in ("message", "type", "param", "code")}
    return {"text": text, "error_code": code, _ERROR: cause}


class Deframer:
    """Bytes to objects. Empty pieces are passed over, as LLaVA's clients do."""

    def __init__(self) -> None:
        self._rest = b""

    def feed(self, chunk: bytes) -> list[Item]:
        """Objects that are complete now. Raises ValueError for anything else."""
        *pieces, self._rest = (self._rest + chunk).split(b"\0")
        if len(self._rest) > _MAX_OBJECT_BYTES:
            raise ValueError("an object without end")
        items = [json.loads(piece) for piece in pieces if piece]
        if not all(isinstance(item, dict) for item in items):
            raise ValueError("not an object")
        return items


@dataclass(frozen=True, slots=True)
class GenerateRequest:
    """What a client of LLaVA's asks of a worker.

    images: data URLs of the pictures, in the order of their places in `prompt`.
    params: how to draw; max_new_tokens, at most LLaVA's 1024, is to be cut to what the context has
    left, and may be 0 or less: then there is no room for an answer.
    """

    prompt: str
    images: tuple[str, ...]
    params: SamplingParams
    token_ids: bool

    def conversation(self, images: Sequence[Image]) -> Conversation:
        """The prompt as it is written, with its pictures decoded."""
        return Conversation(pending=Message("user", "", tuple(images)), rendered=self.prompt)

    @property
    def prefixes(self) -> tuple[str, ...]:
        """Hashes of what it begins with."""
        return text_hashes(self.prompt, [image.removeprefix(_DATA_URL) for image in self.images])


def parse_request(body: Any) -> GenerateRequest:
    """A request from JSON. Raises InvalidRequest, with what is wrong.

    Pictures are counted; nothing of them is decoded.
    """
    if not isinstance(body, Mapping):
        raise InvalidRequest("the body is not an object")
    prompt = body.get("prompt")
    if not isinstance(prompt, str) or not prompt:
        raise InvalidRequest("prompt is missing; it is the finished prompt, a text")
    given = body.get("images")
    images = [] if given is None else given
    if not isinstance(images, list) or not all(isinstance(image, str) for image in images):
        raise InvalidRequest("images is not a list of texts in base64")
    if (places := prompt.count(IMAGE_MARKER)) != len(images):
        raise InvalidRequest(
            f"the prompt has {places} places for pictures ({IMAGE_MARKER}), {len(images)} came"
        )
    temperature = _number(body, "temperature", 1.0, 0.0, 100.0)
    params = SamplingParams(
        temperature=temperature if temperature > _GREEDY_BELOW else 0.0,
        top_p=max(_number(body, "top_p", 1.0, 0.0, 1.0), _LEAST_TOP_P),
        max_new_tokens=min(
            int(_number(body, "max_new_tokens", _DEFAULT_NEW_TOKENS)), _MAX_NEW_TOKENS
        ),
        stop=_stops(body.get("stop")),
        resume=_ids(body.get(_RESUME)),
    )
    urls = tuple(_DATA_URL + image for image in images)
    return GenerateRequest(prompt, urls, params, body.get(_TOKEN_IDS) is True)


def _number(
    body: Mapping[str, Any],
    key: str,
    default: float,
    least: float = -1e9,
    most: float = 1e9,
) -> float:
    """A number, or a text that is one: LLaVA's worker takes both."""
    value = body.get(key, default)
    try:
        number = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        number = math.nan
    if not least <= number <= most:
        raise InvalidRequest(f"{key} is {str(value)[:40]!r}, not a number that it can be")
    return number


def _stops(value: Any) -> tuple[str, ...]:
    stops = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(stop, str) for stop in stops):
        raise InvalidRequest("stop is not a text")
    return tuple(stop for stop in stops if stop)


def _ids(value: Any) -> tuple[int, ...]:
    ids = [] if value is None else value
    if not isinstance(ids, list) or not all(type(i) is int and 0 <= i < 2**31 for i in ids):
        raise InvalidRequest(f"{_RESUME} is not a list of token ids")
    return tuple(ids)


class WorkerHost(Protocol):
    """What the worker lends to the routes here."""

    def status(self) -> Item:
        """LLaVA's status object, with ours in its key `vlmchat`."""

    def answers(
        self, asked: GenerateRequest, request: Request
    ) -> AbstractAsyncContextManager[AsyncIterator[Delta]]:
        """The answer, once it is admitted; leaving the context cancels it.

        Raises PromptTooLong when the context has no room for a single token, and what else
        keeps it from an answer.
        """


def worker_routes(host: WorkerHost) -> list[BaseRoute]:
    """The two endpoints of LLaVA's worker."""

    async def get_status(request: Request) -> Response:
        return JSONResponse(await asked_status(request, host.status()))

    async def generate_stream(request: Request) -> Response:
        items = _answer(host, request, await read_json(request))
        return Relayed(items, LegacyForm(), lambda record: nullcontext())

    return [
        Route(STATUS_PATH, get_status, methods=["POST"]),
        Route(STREAM_PATH, generate_stream, methods=["POST"]),
    ]


async def asked_status(request: Request, status: Item) -> Item:
    """A status in LLaVA's bytes, with ours in `vlmchat` for whoever says `{"vlmchat": true}`."""
    body = await read_json(request) if await request.body() else None
    if isinstance(body, dict) and body.get("vlmchat") is True:
        return status
    return {key: value for key, value in status.items() if key != "vlmchat"}


async def _answer(host: WorkerHost, request: Request, body: Any) -> AsyncGenerator[Item, None]:
    """The worker's side of one answer: objects, whatever happens."""
    try:
        asked = parse_request(body)
        try:
            async for item in _generated(host, request, asked):
                yield item
        except PromptTooLong:
            yield {"text": asked.prompt + NO_ROOM, "error_code": 0}
    except VlmchatError as error:
        request.state.record["error"] = {"code": error.code, "message": error.message}
        yield error_item(FAILED, error_object(error)["error"])


async def _generated(
    host: WorkerHost, request: Request, asked: GenerateRequest
) -> AsyncGenerator[Item, None]:
    if asked.params.max_new_tokens < 1:
        raise PromptTooLong(0, 0)
    text = asked.prompt
    async with host.answers(asked, request) as deltas:
        async for delta in deltas:
            text += delta.text
            item: Item = {"text": text, "error_code": 0}
            if asked.token_ids:
                item[_TOKEN_IDS] = list(delta.token_ids)
            yield item


class LegacyForm:
    """See `relayed.Form`: objects with NULs, errors too.

    Lone NULs, which LLaVA's clients pass over, keep their short timeouts away.
    """

    def __init__(self) -> None:
        self.headers: dict[str, str] = {}  # LLaVA's name no type either
        self.ping, self.ping_s, self.begins = b"\0", PING_S, True

    def item(self, item: Item) -> bytes:
        """One object."""
        return frame(item)

    def error(self, error: VlmchatError | Refusal) -> bytes:
        """Code 2 when nobody serves the model, else 3."""
        nobody = isinstance(error, ModelNotFound | NoWorker)
        return frame(error_item(NO_WORKER if nobody else WORKER_FAILED, described(error)["error"]))

    def end(self) -> bytes:
        """There is no mark."""
        return b""


class LegacyWire:
    """See `failover.Wire`. Items are objects, as the client is to have them."""

    def __init__(self, body: Item) -> None:
        self._body = body
        prompt = body.get("prompt")
        self._prompt = prompt if isinstance(prompt, str) else ""
        self._wants_ids = body.get(_TOKEN_IDS) is True
        self._given = body.get(_RESUME) if isinstance(body.get(_RESUME), list) else []
        self._deframer = Deframer()
        self._ids: list[int] | None = []  # of the tokens of `_sent`; None: not told of all
        self._sent = self._prompt  # the text as the client has it
        self._base = self._prompt  # what stands before the text that this worker adds
        self._again = False  # this worker says it all once more
        self._behind = False  # and has not come as far as the one before
        self.usage: Any = None
        self.done = False
        self.begun = False

    def fits(self, worker: Worker) -> bool:
        """See `failover.Wire.fits`."""
        return True

    def request(self, worker: Worker) -> tuple[str, Item]:
        """See `failover.Wire.request`."""
        self._deframer, self._base = Deframer(), self._prompt
        self._again = self._behind = False
        body = dict(self._body)
        if worker.is_ours:
            body[_TOKEN_IDS] = True
        if self.begun and self._ids and worker.resumes:
            body[_RESUME] = [*(self._given or []), *self._ids]
            self._base = self._sent
        elif self.begun:
            self._again, self._behind, self._ids = True, True, None
        return STREAM_PATH, body

    def feed(self, chunk: bytes) -> Iterator[Item]:
        """See `failover.Wire.feed`."""
        try:
            objects = self._deframer.feed(chunk)
        except (ValueError, RecursionError):
            raise WorkerLost("sent what is not LLaVA's wire") from None
        for found in objects:
            item = self._item(found)
            if item is not None:
                self.begun = True
                yield item

    def end(self) -> Iterator[Item]:
        """See `failover.Wire.end`."""
        if self._behind or not self.begun:
            raise WorkerLost("ended without an answer", suspect=False)
        self.done = True
        return iter(())

    def _item(self, found: Item) -> Item | None:
        ids = found.get(_TOKEN_IDS)
        if not self._wants_ids:
            found.pop(_TOKEN_IDS, None)
        if found.get("error_code"):
            self._fail(found)
            return found
        text = found.get("text")
        if not isinstance(text, str) or not text.startswith(self._prompt):
            return found  # as it is: what it means is between worker and client
        text = self._base + text[len(self._prompt) :]
        if self._again:
            if len(text) < len(self._sent):
                Overlap(self._sent).fresh(text)
                return None
            text = self._sent + Overlap(self._sent).fresh(text)
            self._behind = False
        if isinstance(ids, list) and self._ids is not None:
            self._ids = [*self._ids, *ids]
        else:
            self._ids = None
        if text != self._prompt and not self._ids:
            self._ids = None  # text, but no tokens: the worker does not tell them
        self._sent = text
        return {**found, "text": text}

    def _fail(self, found: Item) -> None:
        """Raises WorkerLost and Refusal where another worker may do better."""
        cause = found.get(_ERROR)
        if not isinstance(cause, dict) or cause.get("code") not in ELSEWHERE:
            return
        if cause.get("code") == "overloaded":
            raise Refusal(429, cause)
        raise WorkerLost(f"{cause.get('code')}: {cause.get('message')}")
