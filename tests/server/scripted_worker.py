"""A worker without a model: it says `w0 w1 w2 …`, and fails in the way that it is told to.

In the test's process by `ScriptedWorker(...).app()`, or in one of its own:
`python -m tests.server.scripted_worker '{"fault": "hang", "after": 3}'`, which prints its address.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.server.sockets import serving
from vlmchat.request import Delta, FinishReason
from vlmchat.server import legacy
from vlmchat.server.app import Edge, EdgePolicy

Fault = Literal["cut", "hang", "error"]


@dataclass
class ScriptedWorker:
    """fault: what happens after `after` tokens, while `faults` are left.

    refuses: a status in place of an answer. ids: whether it tells token ids. ours: whether it
    speaks the OpenAI wire. words: how long an answer is.
    """

    model: str = "m"
    words: int = 12
    delay_s: float = 0.0
    fault: Fault | None = None
    after: int = 4
    faults: int = 1
    refuses: int | None = None
    ids: bool = True
    ours: bool = True
    alive: bool = True
    voice: str = "w"
    seen: list[dict[str, Any]] = field(default_factory=list)
    under_way: int = 0
    told: dict[str, Any] = field(default_factory=dict)  # headers of the last request

    def status(self) -> dict[str, Any]:
        """See `legacy.WorkerHost.status`."""
        status: dict[str, Any] = legacy_status(self.model, self.under_way)
        if self.ours:
            ours = {"openai": True, "version": "0", "context_length": 2048, "resume": self.ids}
            status["vlmchat"] = ours
        return status

    def app(self) -> Edge:
        """The application."""
        routes = [
            *legacy.worker_routes(self),
            Route("/v1/chat/completions", self._chat, methods=["POST"]),
        ]
        return Edge([_gated(self, route) for route in routes], EdgePolicy(), lambda record: None)

    async def _chat(self, request: Request) -> Response:
        body = await request.json()
        self.seen.append(body)
        self.told = dict(request.headers)
        if not self.ours:
            return JSONResponse({"detail": "Not Found"}, 404)
        if self.refuses:
            error = {"message": "no", "type": "server_error", "param": None, "code": "unavailable"}
            return JSONResponse({"error": error}, self.refuses, {"retry-after": "7"})
        return StreamingResponse(self._events(body), media_type="text/event-stream")

    async def _events(self, body: dict[str, Any]) -> AsyncIterator[bytes]:
        head = {"id": f"chatcmpl-{id(body)}", "object": "chat.completion.chunk", "created": 1}
        head["model"] = self.model

        def event(delta: dict[str, Any], reason: str | None, ids: list[int] | None) -> bytes:
            choice = {"index": 0, "delta": delta, "logprobs": None, "finish_reason": reason}
            chunk: dict[str, Any] = {**head, "choices": [choice]}
            if ids is not None and self.ids and body.get("vlmchat_token_ids"):
                chunk["vlmchat_token_ids"] = ids
            return b"data: " + json.dumps(chunk).encode() + b"\n\n"

        resumed = body.get("vlmchat_resume") or []
        limit = body.get("max_tokens") or self.words
        async for number in self._tokens(len(resumed), limit):
            if isinstance(number, dict):
                yield b"data: " + json.dumps(number).encode() + b"\n\n"
                return
            if number == len(resumed):
                yield event({"role": "assistant", "content": ""}, None, None)
            over = number + 1 == min(limit, self.words)
            reason = ("stop" if number + 1 == self.words else "length") if over else None
            yield event({"content": f"{self.voice}{number} "}, reason, [number])
        if (body.get("stream_options") or {}).get("include_usage"):
            count = min(limit, self.words)
            usage: dict[str, Any] = {"prompt_tokens": 5, "completion_tokens": count}
            usage |= {"total_tokens": 5 + count, "prompt_tokens_details": {"cached_tokens": 3}}
            yield b"data: " + json.dumps({**head, "choices": [], "usage": usage}).encode() + b"\n\n"
        yield b"data: [DONE]\n\n"

    async def _tokens(self, start: int, limit: int) -> AsyncIterator[int | dict[str, Any]]:
        self.under_way += 1
        try:
            for number in range(start, min(limit, self.words)):
                if number - start == self.after and self.fault and self.faults:
                    self.faults -= 1
                    if self.fault == "cut":
                        raise ConnectionError("cut off")
                    if self.fault == "error":
                        yield {"error": {"message": "broken", "code": "engine_dead"}}
                        return
                    self.alive = False
                    await asyncio.sleep(3600)
                yield number
                await asyncio.sleep(self.delay_s)
        finally:
            self.under_way -= 1

    @asynccontextmanager
    async def answers(
        self, asked: legacy.GenerateRequest, request: Request
    ) -> AsyncIterator[AsyncIterator[Delta]]:
        """See `legacy.WorkerHost.answers`."""
        self.seen.append({"prompt": asked.prompt, "params": asked.params, "images": asked.images})

        async def deltas() -> AsyncIterator[Delta]:
            start = len(asked.params.resume)
            async for number in self._tokens(start, asked.params.max_new_tokens):
                assert isinstance(number, int)
                over = number + 1 == self.words
                reason = FinishReason.STOP if over else None
                yield Delta(f"{self.voice}{number} ", reason, token_ids=(number,))

        yield deltas()


def legacy_status(model: str, queue_length: int) -> dict[str, Any]:
    """LLaVA's three fields."""
    return {"model_names": [model], "speed": 1, "queue_length": queue_length}


def _gated(worker: ScriptedWorker, route: Any) -> Route:
    """The route; once the worker has hung, nothing is answered any more."""
    endpoint = route.endpoint

    async def gate(request: Request) -> Response:
        if not worker.alive:
            await asyncio.sleep(3600)
        answer: Response = await endpoint(request)
        return answer

    return Route(route.path, gate, methods=["POST"])


async def _main() -> None:
    worker = ScriptedWorker(**json.loads(sys.argv[1]))
    async with serving(worker.app()) as url:
        print(url, flush=True)
        await asyncio.sleep(3600)


if __name__ == "__main__":
    asyncio.run(_main())
