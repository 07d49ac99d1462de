"""The worker: one model behind the OpenAI wire and LLaVA's.

`Worker` takes requests of either wire through admission, pictures and prompt to `Answers`;
`routes` are its HTTP endpoints. Called by `commands/worker`, over any `Backend`.
"""

from __future__ import annotations

import asyncio
import json
import time
import uuid
from collections import OrderedDict
from collections.abc import AsyncGenerator, AsyncIterator, Awaitable, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, aclosing, asynccontextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import Receive, Scope, Send

from vlmchat.config import ImagePolicy
from vlmchat.conversation import Conversation, Image
from vlmchat.errors import (
    EngineDead,
    ModelNotFound,
    PromptTooLong,
    Unavailable,
    UnsupportedParameter,
)
from vlmchat.request import Backend, Delta, Load, PromptSize, SamplingParams, Usage
from vlmchat.server import openai
from vlmchat.server.admission import Admission
from vlmchat.server.answers import Answers, Piece
from vlmchat.server.app import CLIENT_CLOSED, Edge, EdgePolicy, error_object, note, read_json
from vlmchat.server.legacy import GenerateRequest, worker_routes
from vlmchat.server.metrics import CONTENT_TYPE, Metrics
from vlmchat.server.pictures import Pictures, Source, is_remote
from vlmchat.server.relayed import with_pings
from vlmchat.session import fit

CHARACTERS_PER_TOKEN = 3  # a guess on the high side, for the queue's limit only
FIRST_GUESS_IMAGE_TOKENS = 576  # LLaVA-1.5's; then what pictures took lately
# Kept free by truncation where the request names no max_tokens, or none can be told.
ROOM_FOR_ANSWER = 512
DECODERS = 2
KEPT_PREFIXES = 64
DRAIN_STEP_S = 0.05
PING = b": ping\n\n"  # a comment, which keeps proxies from giving up
CLIENT_HEADER = "x-vlmchat-client"


@dataclass(frozen=True, slots=True)
class WorkerPolicy:
    """How much a worker takes on."""

    concurrency: int = 5
    max_waiting: int = 128
    max_waiting_tokens: int = 262_144
    max_images: int = 16
    images: ImagePolicy = field(default_factory=ImagePolicy)
    decoders: int = DECODERS  # pictures and prompts made ready at a time
    fetchers: int = 16  # pictures fetched at a time
    ping_s: float = 10.0
    stream_interval: int = 1
    drain_s: float = 30.0


@dataclass(frozen=True, slots=True)
class Work:
    """One request, of whichever wire.

    conversation(images) is given the pictures of `sources`, in order.
    params: one for each answer; max_new_tokens 0 is all that the context has left.
    clamp: where the context has less left than max_new_tokens, that is taken.
    prefixes: hashes of what it begins with, for controllers that know who has seen it.
    """

    sources: tuple[Source, ...]
    conversation: Callable[[Sequence[Image]], Conversation]
    characters: int
    params: tuple[SamplingParams, ...]
    truncate: bool = False
    clamp: bool = False
    prefixes: tuple[str, ...] = ()


@dataclass(eq=False, slots=True)
class Begun:
    """A request that has its turn: iterate `answers`; `trimmed` is what truncation dropped."""

    answers: Answers
    trimmed: openai.Dropped


class Worker:
    """A backend with a queue before it.

    Made before the backend has loaded (`ready` gives it), so that health can be asked meanwhile.
    log(record) gets one record for each request.  trusts(client) tells whether that client is a
    controller, which says in a header for whom it asks.
    """

    def __init__(
        self,
        name: str,
        policy: WorkerPolicy,
        edge: EdgePolicy,
        log: Callable[[dict[str, Any]], None],
        *,
        trusts: Callable[[str], bool] = lambda client: False,
    ) -> None:
        self.name, self.policy = name, policy
        self.created = int(time.time())
        self._instance = uuid.uuid4().hex
        self.metrics = Metrics(name, self._load)
        self.admission = Admission(
            policy.concurrency, policy.max_waiting, policy.max_waiting_tokens, time.monotonic
        )
        self.changed: Callable[[], None] = lambda: None  # called when the queue has changed
        self._log, self._trusts = log, trusts
        self._backend: Backend | None = None
        self._dead = self._draining = False
        self._resumes = True
        self._pictures = Pictures(policy.images, policy.max_images)
        self._decoders = ThreadPoolExecutor(policy.decoders, "vlmchat-prepare")
        self._preparing = asyncio.Semaphore(policy.decoders)
        self._fetchers = ThreadPoolExecutor(policy.fetchers, "vlmchat-fetch")
        self._image_tokens = float(FIRST_GUESS_IMAGE_TOKENS)
        self._under_way: set[Begun] = set()
        self._prefixes: OrderedDict[str, None] = OrderedDict()  # those seen last come last
        self._num_active = 0
        self.edge = Edge(self._routes(), edge, self._note)

    def ready(self, backend: Backend, *, resumes: bool = True) -> None:
        """The model is loaded. resumes: whether it can go on from token ids."""
        self._backend, self._resumes = backend, resumes

    @property
    def backend(self) -> Backend:
        """Who answers. Raises Unavailable while it loads, and when all is over; EngineDead."""
        if self._draining:
            raise Unavailable("the server shuts down; ask another one")
        if self._dead:
            raise EngineDead("the engine has stopped; the server must be restarted")
        if self._backend is None:
            raise Unavailable("the model is loading; try again in some seconds")
        return self._backend

    @property
    def queue_length(self) -> int:
        """Requests that run or wait."""
        return self._num_active

    def state(self) -> str:
        """loading, ready, draining or dead."""
        if self._draining:
            return "draining"
        return "dead" if self._dead else "loading" if self._backend is None else "ready"

    def status(self) -> dict[str, Any]:
        """What a controller is told, in LLaVA's words and, below `vlmchat`, in ours."""
        from vlmchat import __version__

        context = self._backend.status().context_length if self._backend else 0
        return {
            "model_names": [self.name],
            "speed": 1,
            "queue_length": self.queue_length,
            "vlmchat": {
                "version": __version__,
                "openai": True,
                "resume": self._resumes,
                "instance": self._instance,
                "state": self.state(),
                "running": self.admission.running,
                "waiting": self.admission.waiting,
                "limit": self.policy.concurrency,
                "context_length": context,
                "prefixes": list(self._prefixes),
            },
        }

    @asynccontextmanager
    async def answering(self, work: Work, request: Request) -> AsyncIterator[Begun]:
        """`work`'s turn, once it has come. Leaving stops what still runs.

        Raises Overloaded, Unavailable, EngineDead, ImageError and PromptTooLong; iterating the
        answers raises what `Backend.stream` and its streams do.
        """
        backend = self.backend
        watch = _Watch(self.metrics, request.state.record, work)
        self._num_active += 1
        self.changed()
        try:
            self._pictures.check(work.sources)
            fetched = await self._fetch(work.sources, request)
            width = min(len(work.params), self.policy.concurrency)
            client = self._client(request)
            ticket = await self.admission.enter(client, width, self._guess_tokens(work))
            watch.turn()
            free = partial(self.admission.leave, ticket)
            begun = await self._begun(backend, work, fetched, width, free, watch)
            del fetched
            try:
                yield begun
                watch.answered()
                self._remember(work.prefixes)
            finally:
                self._end(begun)
                self._learn(watch.usage(), len(work.sources))
        except EngineDead:
            self._dead = True
            raise
        finally:
            self._num_active -= 1
            self.changed()

    async def _begun(
        self,
        backend: Backend,
        work: Work,
        fetched: dict[str, bytes],
        width: int,
        free: Callable[[int], None],
        watch: _Watch,
    ) -> Begun:
        """Pictures decoded, the prompt handed to the backend: few at a time have memory for it."""
        loop = asyncio.get_running_loop()
        with ExitStack() as on_failure:
            on_failure.callback(free, width)
            async with self._preparing:
                conversation, params, dropped = await loop.run_in_executor(
                    self._decoders, self._prepare, backend, work, fetched
                )
                freed = partial(free, 1)
                answers = Answers(
                    backend, conversation, params, width, self._decoders, freed, watch.seen
                )
                del conversation
                begun = Begun(answers, dropped)
                self._under_way.add(begun)
                on_failure.pop_all()
                on_failure.callback(self._end, begun)
                await answers.begin()
                on_failure.pop_all()
            return begun

    def _end(self, begun: Begun) -> None:
        self._under_way.discard(begun)
        begun.answers.close()

    @asynccontextmanager
    async def answers(
        self, asked: GenerateRequest, request: Request
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """See `legacy.WorkerHost`."""
        sources = tuple(Source(url, f"images[{i}]") for i, url in enumerate(asked.images))
        work = Work(
            sources,
            asked.conversation,
            len(asked.prompt),
            (asked.params,),
            clamp=True,
            prefixes=asked.prefixes,
        )
        async with self.answering(work, request) as begun:
            yield (piece.delta async for piece in begun.answers)

    async def size(self, work: Work, request: Request) -> PromptSize:
        """The tokens of `work`'s prompt. Raises UnsupportedParameter where nobody counts them."""
        backend = self.backend
        self._pictures.check(work.sources)
        fetched = await self._fetch(work.sources, request)

        def count() -> PromptSize:
            images = self._pictures.decode(work.sources, fetched)
            size = backend.count(work.conversation(images))
            if size is None:
                raise UnsupportedParameter("the server behind this one does not count tokens")
            return size

        return await asyncio.get_running_loop().run_in_executor(self._decoders, count)

    async def drain(self) -> None:
        """Refuse what comes; return once all that runs or waits has ended, or was ended in time."""
        self._draining = True
        self.changed()
        try:
            async with asyncio.timeout(self.policy.drain_s):
                await self._until_idle()
        except TimeoutError:
            ended = Unavailable("the server shuts down; ask another one")
            self.admission.abandon(ended)
            for begun in list(self._under_way):
                begun.answers.fail(ended)
            with suppress(TimeoutError):
                async with asyncio.timeout(1.0):
                    await self._until_idle()

    def close(self) -> None:
        """Let go of threads and model."""
        self._fetchers.shutdown(wait=False, cancel_futures=True)
        self._decoders.shutdown(wait=False, cancel_futures=True)
        if self._backend is not None:
            self._backend.close()

    async def _until_idle(self) -> None:
        while self._num_active:
            await asyncio.sleep(DRAIN_STEP_S)

    async def _fetch(self, sources: Sequence[Source], request: Request) -> dict[str, bytes]:
        """The files at remote addresses; their bytes count as held by the request."""
        loop = asyncio.get_running_loop()
        remote = {source.url: source for source in sources if is_remote(source.url)}
        fetches = [
            loop.run_in_executor(self._fetchers, self._pictures.fetch, source)
            for source in remote.values()
        ]
        try:
            files = await asyncio.gather(*fetches)
        except BaseException:
            for fetch in fetches:
                fetch.cancel()
            raise
        request.state.hold(sum(len(file) for file in files))
        return dict(zip(remote, files, strict=True))

    def _prepare(
        self, backend: Backend, work: Work, fetched: dict[str, bytes]
    ) -> tuple[Conversation, tuple[SamplingParams, ...], openai.Dropped]:
        """In a thread: pictures decoded, the conversation inside the context."""
        context = backend.status().context_length
        images = self._pictures.decode(work.sources, fetched)
        conversation = work.conversation(images)
        wanted, dropped = work.params[0].max_new_tokens, openai.Dropped()
        if work.truncate:
            room = wanted or min(ROOM_FOR_ANSWER, context // 4)
            conversation, trimmed = fit(conversation, backend, context - room)
            dropped = openai.Dropped(trimmed.turns, trimmed.tokens, len(trimmed.images))
        if wanted and not work.clamp:
            return conversation, work.params, dropped
        left = _room_left(backend, conversation)
        most = min(wanted or left, left)
        return conversation, tuple(replace(p, max_new_tokens=most) for p in work.params), dropped

    def _remember(self, prefixes: Sequence[str]) -> None:
        for prefix in prefixes:
            self._prefixes[prefix] = None
            self._prefixes.move_to_end(prefix)
        while len(self._prefixes) > KEPT_PREFIXES:
            self._prefixes.popitem(last=False)

    def _guess_tokens(self, work: Work) -> int:
        of_images = int(len(work.sources) * self._image_tokens)
        return work.characters // CHARACTERS_PER_TOKEN + of_images

    def _learn(self, usage: Usage, num_images: int) -> None:
        if num_images and usage.image_tokens:
            self._image_tokens += 0.2 * (usage.image_tokens / num_images - self._image_tokens)

    def _client(self, request: Request) -> str:
        """Whose turn it takes."""
        name: str = request.state.client
        behind = request.headers.get(CLIENT_HEADER, "")[:64] if self._trusts(name) else ""
        return f"{name}/{behind}"

    def _load(self) -> Load | None:
        return self._backend.status().load if self._backend is not None else None

    def _note(self, record: dict[str, Any]) -> None:
        if error := record.get("error"):
            self.metrics.failed(error["code"])
        elif record["status"] == CLIENT_CLOSED:
            self.metrics.failed("client_closed")
        self._log({**record, "model": self.name})

    def _routes(self) -> list[BaseRoute]:
        routes: list[BaseRoute] = [
            Route("/health", self._health),
            Route("/ready", self._ready),
            Route("/metrics", self._metrics_page),
            Route("/v1/models", self._models),
            Route("/v1/models/{model:path}", self._model),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
            Route("/v1/vlmchat/count", self._count, methods=["POST"]),
        ]
        return routes + worker_routes(self)

    async def _health(self, request: Request) -> Response:
        return JSONResponse({"status": self.state()})

    async def _ready(self, request: Request) -> Response:
        state = self.state()
        return JSONResponse({"status": state}, 200 if state == "ready" else 503)

    async def _metrics_page(self, request: Request) -> Response:
        self.metrics.running.set(self.admission.running)
        self.metrics.waiting.set(self.admission.waiting)
        return Response(self.metrics.page(), media_type=CONTENT_TYPE)

    async def _models(self, request: Request) -> Response:
        return JSONResponse({"object": "list", "data": [self._model_object()]})

    async def _model(self, request: Request) -> Response:
        self.check_model(request.path_params["model"])
        return JSONResponse(self._model_object())

    def _model_object(self) -> dict[str, Any]:
        context = self.backend.status().context_length
        return openai.model_object(self.name, context, self.created)

    def check_model(self, name: str | None) -> None:
        """Raises ModelNotFound for a name that is not this worker's model."""
        if name is not None and name != self.name:
            raise ModelNotFound(f"no model {name[:100]!r} here; this server has {self.name!r}")

    async def _count(self, request: Request) -> Response:
        asked = openai.parse_chat(await read_json(request))
        self.check_model(asked.model)
        size = await self.size(_work(asked), request)
        context = self.backend.status().context_length
        return JSONResponse(
            {
                "tokens": size.tokens,
                "image_tokens": size.image_tokens,
                "context_length": context,
            }
        )

    async def _chat(self, request: Request) -> Response:
        asked = openai.parse_chat(await read_json(request))
        self.check_model(asked.model)
        send = self._send_stream if asked.stream else self._send_whole
        return WhileConnected(lambda sender: send(asked, request, sender))

    async def _send_whole(
        self, asked: openai.ChatRequest, request: Request, send: Responder
    ) -> None:
        said = [openai.Said() for _ in range(asked.n)]
        usages: list[Usage] = []
        async with self._begin(asked, request) as begun:
            reply = openai.Reply(asked, self.name, begun.trimmed)
            async for piece in begun.answers:
                _add(said[piece.choice], piece)
                if piece.delta.usage is not None:
                    usages.append(piece.delta.usage)
        whole = json.dumps(reply.whole(said, openai.total(usages)))
        await send(Response(whole, media_type="application/json"))

    async def _send_stream(
        self, asked: openai.ChatRequest, request: Request, send: Responder
    ) -> None:
        pinged = with_pings(self._stream(asked, request), self.policy.ping_s)
        async with aclosing(pinged) as events:
            first = await anext(events)  # an error until here has its own status
            await send.start("text/event-stream", {"cache-control": "no-cache"})
            try:
                await send.more(first or PING)
                async for chunk in events:
                    await send.more(chunk or PING)
            except Exception as error:  # the status line has gone: the stream tells it
                note(request.state.record, error)
                await send.more(openai.event(error_object(error)))
            await send.end()

    async def _stream(self, asked: openai.ChatRequest, request: Request) -> AsyncGenerator[bytes]:
        """The stream from the queue on: who waits there is pinged too."""
        async with (
            self._begin(asked, request) as begun,
            aclosing(self._events(asked, begun)) as events,
        ):
            async for event in events:
                yield event

    async def _events(self, asked: openai.ChatRequest, begun: Begun) -> AsyncGenerator[bytes]:
        """The stream, event by event."""
        reply = openai.Reply(asked, self.name, begun.trimmed)
        usages: list[Usage] = []
        held = [openai.Said() for _ in range(asked.n)]
        counts = [0] * asked.n
        opened: set[int] = set()
        async for piece in begun.answers:
            choice, said = piece.choice, held[piece.choice]
            if choice not in opened:
                opened.add(choice)
                yield openai.event(reply.first_chunk(choice))
            _add(said, piece)
            counts[choice] += 1
            if piece.delta.usage is not None:
                usages.append(piece.delta.usage)
            if said.finish_reason or counts[choice] % self.policy.stream_interval == 0:
                yield openai.event(reply.chunk(choice, said.text, said))
                held[choice] = openai.Said()
        if asked.include_usage:
            yield openai.event(reply.usage_chunk(openai.total(usages)))
        yield openai.event("[DONE]")

    @asynccontextmanager
    async def _begin(self, asked: openai.ChatRequest, request: Request) -> AsyncIterator[Begun]:
        context = self.backend.status().context_length
        try:
            async with self.answering(_work(asked), request) as begun:
                yield begun
        except PromptTooLong as error:
            raise openai.overflow(error, context) from error


def _room_left(backend: Backend, conversation: Conversation) -> int:
    """Tokens that an answer may have; a guess where the backend cannot count."""
    size, context = backend.count(conversation), backend.status().context_length
    if size is None:
        return ROOM_FOR_ANSWER
    if size.tokens >= context > 0:
        raise PromptTooLong(size.tokens, context - 1, size.image_tokens)
    return context - size.tokens if context else ROOM_FOR_ANSWER


def _work(asked: openai.ChatRequest) -> Work:
    return Work(
        asked.sources,
        asked.conversation,
        asked.characters,
        asked.choices(),
        asked.truncate,
        prefixes=asked.prefixes,
    )


def _add(said: openai.Said, piece: Piece) -> None:
    """One more piece. Raises Unavailable for an answer that somebody else has stopped."""
    delta = piece.delta
    said.text += delta.text
    said.tokens += delta.tokens
    said.token_ids += delta.token_ids
    if delta.finish_reason is not None:
        try:
            said.finish_reason = openai.finish_reason(delta.finish_reason)
        except KeyError:
            raise Unavailable("the answer was stopped on the server") from None


class Responder:
    """Sends one response: whole by a call, or piece by piece."""

    def __init__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._scope, self._receive, self._send = scope, receive, send

    async def __call__(self, response: Response) -> None:
        """All of it."""
        await response(self._scope, self._receive, self._send)

    async def start(self, media_type: str, headers: dict[str, str]) -> None:
        """The status line."""
        raw = [(k.encode(), v.encode()) for k, v in headers.items()]
        raw.append((b"content-type", f"{media_type}; charset=utf-8".encode()))
        await self._send({"type": "http.response.start", "status": 200, "headers": raw})

    async def more(self, data: bytes) -> None:
        """A piece of the body."""
        await self._send({"type": "http.response.body", "body": data, "more_body": True})

    async def end(self) -> None:
        """There is no more."""
        await self._send({"type": "http.response.body", "body": b""})


class WhileConnected(Response):
    """A response that is worked on only as long as its client is there.

    work(responder) is cancelled when the client leaves.
    """

    def __init__(self, work: Callable[[Responder], Awaitable[None]]) -> None:
        self._work = work

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Raises what the work does, and ClientDisconnect."""
        work = asyncio.ensure_future(self._work(Responder(scope, receive, send)))
        gone = asyncio.ensure_future(_until_gone(receive))
        try:
            await asyncio.wait({work, gone}, return_when=asyncio.FIRST_COMPLETED)
            if not work.done():
                raise ClientDisconnect
            work.result()
        finally:
            gone.cancel()
            if not work.done():
                work.cancel()
                with suppress(asyncio.CancelledError):
                    await work


async def _until_gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class _Watch:
    """One request's times and tokens, for the log and the metrics."""

    def __init__(self, metrics: Metrics, record: dict[str, Any], work: Work) -> None:
        self._metrics, self._record = metrics, record
        self._arrived = self._turn = time.monotonic()
        self._first = self._last = 0.0
        self._usages: list[tuple[Usage, str]] = []
        record["images"] = len(work.sources)

    def turn(self) -> None:
        """The request has left the queue."""
        self._turn = time.monotonic()
        self._record["queue_s"] = round(self._turn - self._arrived, 4)
        self._metrics.queue_s.observe(self._turn - self._arrived)

    def seen(self, piece: Piece) -> None:
        """Something was said."""
        now = time.monotonic()
        if not self._first:
            self._first = now
            self._record["first_token_s"] = round(now - self._arrived, 4)
            self._metrics.first_token_s.observe(now - self._arrived)
            self._metrics.prefill_s.observe(now - self._turn)
        else:
            self._metrics.token_s.observe(now - self._last)
        self._last = now
        delta = piece.delta
        if delta.usage is not None and delta.finish_reason is not None:
            self._usages.append((delta.usage, delta.finish_reason.value))
            self._metrics.answered(delta.usage, delta.finish_reason.value)
            usage = self.usage()
            self._record |= {
                "finish_reason": delta.finish_reason.value,
                "prompt_tokens": usage.prompt_tokens,
                "image_tokens": usage.image_tokens,
                "cached_tokens": usage.cached_tokens,
                "completion_tokens": usage.completion_tokens,
            }

    def answered(self) -> None:
        """All was said."""
        now = time.monotonic()
        self._metrics.request_s.observe(now - self._arrived)
        self._metrics.decode_s.observe(max(now - (self._first or now), 0.0))

    def usage(self) -> Usage:
        """Of all answers so far."""
        return openai.total(usage for usage, _ in self._usages)
