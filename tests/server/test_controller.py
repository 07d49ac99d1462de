"""The controller over scripted workers, on real sockets: dispatch, failover, registration."""

from __future__ import annotations

import asyncio
import json
import random
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass, field
from functools import wraps
from typing import Any

import httpx2
import pytest

from tests.server.scripted_worker import ScriptedWorker
from tests.server.sockets import serving
from vlmchat.server.app import EdgePolicy, Keys
from vlmchat.server.controller import Controller, Probing
from vlmchat.server.dispatch import chooser
from vlmchat.server.failover import Limits
from vlmchat.server.outgoing import AllowList, Outgoing
from vlmchat.server.registry import Registry

LIMITS = Limits(silence_s=0.2, alive_s=0.3, first_token_s=10, token_s=10, patience_s=0.5)
WHOLE = "".join(f"w{n} " for n in range(12))
ASK = {"model": "m", "messages": [{"role": "user", "content": "hello"}]}


def run_async(test: Callable[..., Awaitable[None]]) -> Callable[..., None]:
    """The test, in an event loop of its own."""

    @wraps(test)
    def run(*arguments: Any, **named: Any) -> None:
        asyncio.run(test(*arguments, **named))  # type: ignore[arg-type]

    return run


@dataclass
class Site:
    """A controller, its workers, and a client."""

    controller: Controller
    url: str
    http: httpx2.AsyncClient
    stack: AsyncExitStack
    records: list[dict[str, Any]] = field(default_factory=list)
    addresses: list[str] = field(default_factory=list)

    async def add(self, worker: ScriptedWorker) -> ScriptedWorker:
        """Serve a worker and register it, as it would itself."""
        self.addresses.append(await self.stack.enter_async_context(serving(worker.app())))
        answer = await self.register(self.addresses[-1], worker.status())
        assert answer.json() is None
        return worker

    async def register(self, name: str, status: dict[str, Any] | None) -> httpx2.Response:
        """LLaVA's registration."""
        body = {"worker_name": name, "check_heart_beat": True, "worker_status": status}
        return await self.http.post("/register_worker", json=body)

    async def chat(self, **changes: Any) -> httpx2.Response:
        """One request, answered whole."""
        return await self.http.post("/v1/chat/completions", json={**ASK, **changes})

    async def chunks(self, **changes: Any) -> list[dict[str, Any]]:
        """A streamed answer's events; [DONE] is a chunk {"done": true}."""
        answer = await self.chat(stream=True, **changes)
        events = [line[5:].strip() for line in answer.text.splitlines() if line[:5] == "data:"]
        return [{"done": True} if e == "[DONE]" else json.loads(e) for e in events]


@asynccontextmanager
async def site(
    *workers: ScriptedWorker, limits: Limits = LIMITS, graced: bool = False, **access: Any
) -> AsyncIterator[Site]:
    """A controller with these workers."""
    registration = Keys(access.pop("registration", ()))
    registry: Any = Registry(chooser("shortest_queue", random.Random(1)), time.monotonic)
    outgoing = Outgoing(AllowList(access.pop("allowed", ("127.0.0.1",))))
    controller = Controller(registry, outgoing, limits, Probing(30, 0.1, 1, 0.05))
    if not graced:
        controller.counts.started -= 3600
    records: list[dict[str, Any]] = []
    policy = EdgePolicy(keys=Keys(access.pop("keys", ())))
    app = controller.app(policy, registration, records.append)
    async with AsyncExitStack() as stack:
        url = await stack.enter_async_context(serving(app))
        http = await stack.enter_async_context(httpx2.AsyncClient(base_url=url, timeout=20))
        beside = asyncio.create_task(controller.run())
        stack.callback(beside.cancel)
        place = Site(controller, url, http, stack, records)
        for worker in workers:
            await place.add(worker)
        yield place


def text_of(chunks: list[dict[str, Any]]) -> str:
    """All that was said."""
    return "".join(
        choice["delta"].get("content") or ""
        for chunk in chunks
        for choice in chunk.get("choices", ())
    )


@run_async
async def test_controller_relays_a_stream_as_it_is() -> None:
    async with site(ScriptedWorker()) as place:
        chunks = await place.chunks(stream_options={"include_usage": True})
    assert text_of(chunks) == WHOLE
    assert [c["choices"][0]["delta"].get("role") for c in chunks[:2]] == ["assistant", None]
    assert chunks[-3]["choices"][0]["finish_reason"] == "stop"
    assert chunks[-2]["usage"]["completion_tokens"] == 12
    assert chunks[-1] == {"done": True}
    assert not any("vlmchat_token_ids" in chunk for chunk in chunks)


@run_async
async def test_controller_sends_no_usage_to_who_does_not_ask_for_it() -> None:
    async with site(ScriptedWorker()) as place:
        chunks = await place.chunks()
        assert place.controller.registry.workers[0].prompt_tokens == 5
    assert not any("usage" in chunk for chunk in chunks)


@run_async
async def test_controller_puts_an_answer_together_for_who_does_not_stream() -> None:
    async with site(ScriptedWorker()) as place:
        answer = (await place.chat()).json()
    assert answer["object"] == "chat.completion"
    choice = answer["choices"][0]
    assert choice["message"] == {"role": "assistant", "content": WHOLE, "refusal": None}
    assert choice["finish_reason"] == "stop"
    assert answer["usage"]["total_tokens"] == 17


@pytest.mark.parametrize("stream", [True, False])
@pytest.mark.parametrize("ids", [pytest.param(True, id="ids"), pytest.param(False, id="text")])
@pytest.mark.parametrize("fault", ["cut", "hang", "error"])
@run_async
async def test_controller_goes_on_elsewhere_when_a_worker_fails_in_mid_answer(
    fault: Any, ids: bool, stream: bool
) -> None:
    first, second = ScriptedWorker(fault=fault, ids=ids), ScriptedWorker(ids=ids)
    async with site(first, second) as place:
        if stream:
            chunks = await place.chunks()
            answer, heads = text_of(chunks), {c["id"] for c in chunks[:-1]}
            roles = [c["choices"][0]["delta"].get("role") for c in chunks[:-1]]
            assert (len(heads), roles.count("assistant"), chunks[-1]) == (1, 1, {"done": True})
        else:
            answer = (await place.chat()).json()["choices"][0]["message"]["content"]
    assert answer == WHOLE
    assert second.seen[-1].get("vlmchat_resume") == ([0, 1, 2, 3] if ids else None)
    assert place.records[-1]["losses"]


@run_async
async def test_controller_survives_many_failures_where_each_brings_tokens() -> None:
    workers = [ScriptedWorker(fault="cut", after=1, faults=4) for _ in range(2)]
    async with site(*workers, limits=Limits(patience_s=10)) as place:
        assert text_of(await place.chunks()) == WHOLE
    assert place.controller.counts.failovers == 8


@run_async
async def test_controller_tells_on_the_stream_when_there_is_no_other_worker() -> None:
    async with site(ScriptedWorker(fault="cut", faults=99, after=0)) as place:
        answer = await place.chat(stream=True)
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "no_worker"
    async with site(ScriptedWorker(fault="hang")) as place:
        chunks = await place.chunks()
    assert text_of(chunks) == "w0 w1 w2 w3 "
    assert chunks[-1]["error"]["code"] == "no_worker"


@run_async
async def test_controller_tries_the_next_worker_when_one_refuses() -> None:
    async with site(ScriptedWorker(refuses=503), ScriptedWorker()) as place:
        assert text_of(await place.chunks()) == WHOLE


@pytest.mark.parametrize("status", [429, 503, 400])
@run_async
async def test_controller_hands_on_a_refusal_when_nobody_does_better(status: int) -> None:
    async with site(ScriptedWorker(refuses=status)) as place:
        answer = await place.chat(stream=True)
    assert (answer.status_code, answer.headers.get("retry-after")) == (status, "7")
    assert answer.json()["error"]["message"] == "no"


@run_async
async def test_controller_does_not_shop_around_with_a_bad_request() -> None:
    bad, other = ScriptedWorker(refuses=400), ScriptedWorker()
    async with site(bad, other) as place:
        assert (await place.chat()).status_code == 400
    assert other.seen == []


@run_async
async def test_controller_names_the_models_there_are_when_one_is_not_known() -> None:
    async with site(ScriptedWorker()) as place:
        answer = await place.chat(model="x")
    assert answer.status_code == 404
    assert answer.json()["error"]["message"] == "no worker serves x; served are: m"


@run_async
async def test_controller_waits_for_workers_that_have_yet_to_come_back() -> None:
    async with site(graced=True, limits=Limits(patience_s=10)) as place:
        waiting = asyncio.create_task(place.chat())
        await asyncio.sleep(0.3)
        await place.add(ScriptedWorker())
        assert (await waiting).status_code == 200


@pytest.mark.parametrize("stream", [True, False])
@run_async
async def test_controller_cancels_at_the_worker_when_the_client_leaves(stream: bool) -> None:
    worker = ScriptedWorker(delay_s=0.02, words=10_000)
    async with site(worker) as place:
        with pytest.raises(httpx2.ReadTimeout):
            async with asyncio.timeout(10):
                await place.http.post(
                    "/v1/chat/completions",
                    json={**ASK, "stream": False},
                    timeout=httpx2.Timeout(5, read=0.3),
                )
        async with asyncio.timeout(5):
            while worker.under_way or place.controller.registry.workers[0].leases:
                await asyncio.sleep(0.01)
    assert place.records[-1]["status"] == 499


@run_async
async def test_controller_gives_a_failed_worker_work_again_once_it_answers_a_probe() -> None:
    worker = ScriptedWorker(fault="cut")
    async with site(worker, limits=Limits(patience_s=10)) as place:
        assert text_of(await place.chunks()) == WHOLE
        assert place.controller.registry.workers[0].epoch == 1


@run_async
async def test_controller_passes_on_whose_request_it_is() -> None:
    worker = ScriptedWorker()
    async with site(worker) as place:
        await place.http.post("/v1/chat/completions", json=ASK, headers={"x-request-id": "abc"})
    assert worker.told["x-request-id"] == "abc"
    assert worker.told["x-vlmchat-client"] == "127.0.0.1"


@run_async
async def test_controller_serves_workers_of_llava_on_their_own_wire_only() -> None:
    async with site(ScriptedWorker(ours=False)) as place:
        answer = await place.chat()
        assert (answer.status_code, "wire only" in answer.text) == (404, True)


@run_async
async def test_controller_tells_streams_that_it_ends_when_they_outlast_the_drain() -> None:
    async with site(ScriptedWorker(delay_s=0.05, words=10_000)) as place:
        waiting = asyncio.create_task(place.chunks())
        while not place.controller.registry.workers[0].leases:
            await asyncio.sleep(0.01)
        draining = asyncio.create_task(place.controller.drain(0.3))
        await asyncio.sleep(0.1)
        late = await place.chat()
        chunks = await waiting
        await draining
    assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
    assert chunks[-1]["error"]["code"] == "unavailable"
    assert text_of(chunks).startswith("w0 w1 ")


@run_async
async def test_controller_shows_how_it_stands() -> None:
    async with site(ScriptedWorker()) as place:
        await place.chat()
        shown = (await place.http.get("/status")).json()
        metrics = (await place.http.get("/metrics")).text
        ready = await place.http.get("/ready")
    assert (shown["requests"], shown["models"], shown["under_way"]) == (1, ["m"], 0)
    worker = shown["workers"][0]
    assert (worker["leases"], worker["hit_rate"]) == (0, 0.6)
    assert "vlmchat_controller_requests_total 1.0" in metrics
    assert ready.status_code == 200


@run_async
async def test_controller_is_not_ready_without_a_worker() -> None:
    async with site() as place:
        assert (await place.http.get("/ready")).status_code == 503
        assert (await place.http.get("/health")).status_code == 200


@run_async
async def test_controller_lists_the_models_of_all_workers_once() -> None:
    workers = ScriptedWorker(), ScriptedWorker(), ScriptedWorker(model="n", ours=False)
    async with site(*workers) as place:
        data = (await place.http.get("/v1/models")).json()["data"]
        assert (await place.http.get("/v1/models/m")).json() == data[0]
        assert (await place.http.get("/v1/models/x")).status_code == 404
    assert [(entry["id"], entry.get("max_model_len")) for entry in data] == [
        ("m", 2048),
        ("n", None),
    ]


@run_async
async def test_controller_gives_up_in_time_when_everybody_refuses_to_go_on() -> None:
    class Fickle(ScriptedWorker):
        """Refuses to go on with what another one began."""

        async def _chat(self, request: Any) -> Any:
            self.refuses = 429 if (await request.json()).get("vlmchat_resume") else None
            return await super()._chat(request)

    async with site(Fickle(fault="cut"), Fickle(fault="cut")) as place:
        chunks = await place.chunks()
    assert text_of(chunks) == "w0 w1 w2 w3 "
    assert chunks[-1]["error"]["code"] == "no_worker"


@run_async
async def test_controller_takes_a_worker_for_dead_that_sends_pings_only() -> None:
    class Pinging(ScriptedWorker):
        """Sends comments, and nothing else."""

        async def _events(self, body: Any) -> Any:
            while True:
                yield b": ping\n\n"
                await asyncio.sleep(0.05)

    limits = Limits(first_token_s=0.3, silence_s=5, patience_s=5)
    async with site(Pinging(), ScriptedWorker(), limits=limits) as place:
        assert text_of(await place.chunks()) == WHOLE
