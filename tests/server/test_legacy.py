"""LLaVA's wire, byte by byte: what its clients, workers and controllers send and expect.

The exchanges are those of LLaVA's own controller and worker of May 2024, as observed.
"""

from __future__ import annotations

import asyncio
import json
import random
from dataclasses import replace
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.routing import Route

from tests.server.scripted_worker import ScriptedWorker, legacy_status
from tests.server.sockets import serving
from tests.server.test_controller import LIMITS, Site, run_async, site
from vlmchat.errors import InvalidRequest, PromptTooLong
from vlmchat.server import legacy
from vlmchat.server.failover import Limits
from vlmchat.server.legacy import Deframer, frame, parse_request

WHOLE = "".join(f"w{n} " for n in range(12))
PROMPT = "A chat. USER: <image>\nWhat is it? ASSISTANT:"
ASK: dict[str, Any] = {
    "model": "m",
    "prompt": PROMPT,
    "temperature": 0.2,
    "top_p": 0.7,
    "max_new_tokens": 512,
    "stop": "</s>",
    "images": ["iVBORw0KGgo="],
}
KEYS = (
    *(*ASK, "messages", "stream", "n", "stream_options", "vlmchat_resume", "worker_name"),
    *("worker_status", "model_names", "speed", "queue_length", "vlmchat", "check_heart_beat"),
)


async def stream(place: Site, **changes: Any) -> tuple[bytes, Any]:
    """The body of an answer by way of the controller, and the response."""
    answer = await place.http.post("/worker_generate_stream", json={**ASK, **changes})
    return answer.content, answer


def objects(body: bytes) -> list[dict[str, Any]]:
    """As LLaVA's web page reads them."""
    return [json.loads(piece) for piece in body.split(b"\0") if piece]


# -- the controller's endpoints ------------------------------------------------------------------


@run_async
async def test_controller_answers_in_llavas_bytes_when_it_is_empty() -> None:
    async with site() as place:
        post = place.http.post
        status = {"model_names": ["m"], "speed": 1, "queue_length": 0}
        unreachable = {"worker_name": "http://127.0.0.1:9", "check_heart_beat": True}
        exchanges: list[tuple[str, Any, bytes]] = [
            ("/list_models", None, b'{"models":[]}'),
            ("/get_worker_address", {"model": "m"}, b'{"address":""}'),
            ("/worker_get_status", None, b'{"model_names":[],"speed":0,"queue_length":0}'),
            ("/refresh_all_workers", None, b"null"),
            ("/receive_heart_beat", {"worker_name": "w", "queue_length": 1}, b'{"exist":false}'),
            ("/register_worker", {**unreachable, "worker_status": status}, b"null"),
        ]
        for path, body, expected in exchanges:
            answer = await (post(path) if body is None else post(path, json=body))
            assert (path, answer.status_code, answer.content) == (path, 200, expected)
            assert answer.headers["content-type"] == "application/json"


@run_async
async def test_controller_answers_in_llavas_bytes_when_it_has_workers() -> None:
    async with site(ScriptedWorker(ours=False), ScriptedWorker(ours=False)) as place:
        post, (first, second) = place.http.post, place.addresses
        exchanges: list[tuple[str, Any, bytes]] = [
            ("/list_models", None, b'{"models":["m"]}'),
            ("/get_worker_address", {"model": "m"}, b'{"address":"%s"}' % first.encode()),
            ("/get_worker_address", {"model": "m"}, b'{"address":"%s"}' % second.encode()),
            ("/worker_get_status", None, b'{"model_names":["m"],"speed":2,"queue_length":2}'),
            ("/receive_heart_beat", {"worker_name": first, "queue_length": 0}, b'{"exist":true}'),
        ]
        for path, body, expected in exchanges:
            answer = await (post(path) if body is None else post(path, json=body))
            assert (path, answer.content) == (path, expected)


@run_async
async def test_controller_answers_post_only() -> None:
    async with site() as place:
        for path in ("/list_models", "/register_worker", "/worker_generate_stream"):
            assert (await place.http.get(path)).status_code == 405


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/register_worker", b"{"),
        ("/register_worker", b'{"check_heart_beat": true}'),
        ("/register_worker", b'{"worker_name": "file:///etc/passwd"}'),
        ("/get_worker_address", b"{}"),
        ("/get_worker_address", b"[]"),
        ("/receive_heart_beat", b'{"worker_name": 1}'),
        ("/worker_generate_stream", b'{"prompt": "x"}'),
        ("/v1/chat/completions", b"\xff"),
        ("/v1/chat/completions", b'{"model": "m", "stream": "yes"}'),
    ],
)
@run_async
async def test_controller_tells_what_is_wrong_with_a_body(path: str, body: bytes) -> None:
    async with site() as place:
        answer = await place.http.post(path, content=body)
        assert (answer.status_code, answer.json()["error"]["code"]) == (400, "invalid_request")


@run_async
async def test_controller_answers_any_json_without_an_error_of_its_own() -> None:
    chance = random.Random(5)

    def value(depth: int = 0) -> Any:
        kind = chance.randrange(9 if depth < 3 else 6)
        plain = [None, True, -1, 1e308, "m", chance.choice(["", "<image>", "\ud800", "x" * 999])]
        if kind < 6:
            return plain[kind]
        if kind == 6:
            return {chance.choice(KEYS): value(depth + 1) for _ in range(3)}
        return [value(depth + 1) for _ in range(chance.randrange(3))]

    worker = ScriptedWorker(refuses=400)
    paths = ("/register_worker", "/receive_heart_beat", "/get_worker_address")
    async with site(worker, limits=replace(LIMITS, patience_s=0.0)) as place:
        for path in (*paths, "/worker_generate_stream", "/v1/chat/completions"):
            for _ in range(60):
                body = {key: value() for key in KEYS if chance.random() < 0.7}
                body |= {"model": "m"} if chance.random() < 0.5 else {}
                answer = await place.http.post(path, content=json.dumps(body))
                assert answer.status_code < 500, (path, body, answer.text)
        deep = b'{"model": "m", "messages": ' + b"[" * 400 + b"]" * 400 + b"}"
        answer = await place.http.post("/v1/chat/completions", content=deep)
    assert (answer.status_code, "nested" in answer.text) == (400, True)


# -- streams -------------------------------------------------------------------------------------


@pytest.mark.parametrize("ours", [True, False])
@run_async
async def test_stream_is_the_prompt_and_all_that_was_said_in_objects_with_nul(ours: bool) -> None:
    async with site(ScriptedWorker(words=2, ours=ours)) as place:
        body, answer = await stream(place)
    cue = json.dumps(PROMPT).encode()[:-1]
    assert body == (
        b'{"text": %sw0 ", "error_code": 0}\0{"text": %sw0 w1 ", "error_code": 0}\0' % (cue, cue)
    )
    assert answer.headers["transfer-encoding"] == "chunked"
    assert "content-type" not in answer.headers


@run_async
async def test_stream_escapes_what_is_not_ascii_as_python_does() -> None:
    async with site(ScriptedWorker(words=1, voice="é😀")) as place:
        body, _ = await stream(place, prompt="x<image>")
    assert body == b'{"text": "x<image>\\u00e9\\ud83d\\ude000 ", "error_code": 0}\0'


@run_async
async def test_stream_is_one_object_with_code_2_when_nobody_serves_the_model() -> None:
    async with site(ScriptedWorker()) as place:
        body, answer = await stream(place, model="x")
    assert answer.status_code == 200
    (only,) = objects(body)
    assert (only["text"], only["error_code"]) == (legacy.SERVER_ERROR, 2)
    assert only["vlmchat_error"]["code"] == "model_not_found"


@run_async
async def test_stream_ends_with_an_error_object_when_the_last_worker_fails() -> None:
    async with site(ScriptedWorker(fault="hang", faults=9)) as place:
        body, _ = await stream(place)
    *said, last = objects(body)
    assert said[-1] == {"text": PROMPT + "w0 w1 w2 w3 ", "error_code": 0}
    assert (last["text"], last["error_code"]) == (legacy.SERVER_ERROR, 2)


@pytest.mark.parametrize("ours", [True, False])
@pytest.mark.parametrize("fault", ["cut", "hang"])
@run_async
async def test_stream_goes_on_elsewhere_in_cumulative_text(fault: Any, ours: bool) -> None:
    first, second = ScriptedWorker(fault=fault, ours=ours), ScriptedWorker(ours=ours)
    async with site(first, second) as place:
        body, _ = await stream(place)
    texts = [item["text"] for item in objects(body)]
    assert texts[-1] == PROMPT + WHOLE
    assert all(late.startswith(early) for early, late in pairwise(texts))
    assert second.seen[-1]["params"].resume == ((0, 1, 2, 3) if ours else ())


@run_async
async def test_stream_is_not_continued_by_a_worker_that_says_something_else() -> None:
    first, second = ScriptedWorker(fault="cut", ours=False), ScriptedWorker(ours=False, voice="x")
    async with site(first, second, limits=replace(LIMITS, max_losses=1)) as place:
        body, _ = await stream(place)
    *said, last = objects(body)
    assert said[-1]["text"] == PROMPT + "w0 w1 w2 w3 "
    assert last["error_code"] == 3
    assert "answers otherwise" in last["vlmchat_error"]["message"]


@run_async
async def test_stream_is_kept_open_by_lone_nuls_while_nothing_comes(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(legacy, "PING_S", 0.05)
    async with site(ScriptedWorker(words=2, delay_s=0.3)) as place:
        body, _ = await stream(place)
    assert b"\0\0" in body
    assert objects(body)[-1]["text"] == PROMPT + "w0 w1 "


# -- the worker's half ---------------------------------------------------------------------------


@run_async
async def test_worker_tells_llavas_status_unless_asked_for_ours() -> None:
    import httpx2

    async with serving(ScriptedWorker().app()) as url, httpx2.AsyncClient(base_url=url) as http:
        plain = await http.post("/worker_get_status")
        ours = await http.post("/worker_get_status", json={"vlmchat": True})
    assert plain.content == b'{"model_names":["m"],"speed":1,"queue_length":0}'
    assert ours.json()["vlmchat"]["openai"] is True


@pytest.mark.parametrize(
    ("change", "words"),
    [
        pytest.param({"images": []}, "1 places for pictures", id="no picture"),
        pytest.param({"images": None}, "1 places for pictures", id="null"),
        pytest.param({"images": ["AA", "AA"]}, "2 came", id="too many"),
        pytest.param({"prompt": ""}, "prompt is missing", id="no prompt"),
        pytest.param({"temperature": "hot"}, "temperature is 'hot'", id="temperature"),
        pytest.param({"stop": 7}, "stop is not a text", id="stop"),
    ],
)
@run_async
async def test_worker_refuses_before_the_model_sees_it(change: dict[str, Any], words: str) -> None:
    worker = ScriptedWorker()
    async with site(worker) as place:
        body, answer = await stream(place, **change)
    assert (answer.status_code, worker.seen) == (200, [])
    (only,) = objects(body)
    assert (only["text"], only["error_code"]) == (legacy.SERVER_ERROR, 1)
    assert words in only["vlmchat_error"]["message"]


@pytest.mark.parametrize("asked", [0, -3])
@run_async
async def test_worker_says_so_when_there_is_no_room_for_an_answer(asked: int) -> None:
    async with site(ScriptedWorker()) as place:
        body, _ = await stream(place, max_new_tokens=asked)
    assert objects(body) == [
        {
            "text": PROMPT + "Exceeds max token length. Please start a new conversation, thanks.",
            "error_code": 0,
        }
    ]


class Full(ScriptedWorker):
    """A worker whose context is full."""

    def answers(self, asked: Any, request: Request) -> Any:
        raise PromptTooLong(3000, 2048)


@run_async
async def test_worker_says_so_when_the_context_is_full() -> None:
    async with site(Full()) as place:
        body, _ = await stream(place)
    assert objects(body)[0]["text"].endswith(
        "please start a new conversation, thanks.".capitalize()
    )


def test_request_has_llavas_defaults_and_limits() -> None:
    found = parse_request({"prompt": "x"})
    params = found.params
    assert (params.temperature, params.top_p, params.max_new_tokens) == (1.0, 1.0, 256)
    assert params.stop == ()
    found = parse_request({"prompt": "x", "max_new_tokens": 5000, "temperature": 0.001, "stop": ""})
    assert (found.params.max_new_tokens, found.params.temperature) == (1024, 0.0)
    assert found.params.stop == ()


@pytest.mark.parametrize("stop", [None, "", "###", ["###", ""]])
def test_request_takes_any_stop(stop: Any) -> None:
    expected = ("###",) if stop and "###" in stop else ()
    assert parse_request({"prompt": "x", "stop": stop}).params.stop == expected


def test_request_keeps_the_prompt_as_it_is_written() -> None:
    found = parse_request(ASK)
    conversation = found.conversation(())
    assert (conversation.rendered, found.images) == (PROMPT, ("data:;base64,iVBORw0KGgo=",))


json_values = st.recursive(
    st.none() | st.booleans() | st.floats() | st.text() | st.integers(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(st.fixed_dictionaries({}, optional=dict.fromkeys(ASK, json_values)))
def test_request_is_read_or_refused_whatever_it_holds(body: dict[str, Any]) -> None:
    try:
        parse_request({"prompt": "x", **body})
    except InvalidRequest:
        return


@given(st.lists(st.dictionaries(st.text(), st.text())), st.data())
def test_deframer_finds_the_objects_however_they_are_cut(
    items: list[dict[str, str]], data: st.DataObject
) -> None:
    wire = b"\0" + b"".join(map(frame, items))
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=5)))
    edges = list(zip([0, *cuts], [*cuts, len(wire)], strict=True))
    deframer = Deframer()
    assert [i for a, b in edges for i in deframer.feed(wire[a:b])] == items


# -- with LLaVA's own ----------------------------------------------------------------------------


class LlavaController:
    """What LLaVA's controller does with a worker: registers it as told, relays in its way."""

    def __init__(self) -> None:
        self.worker = ""
        self.registered: list[dict[str, Any]] = []

    def app(self) -> Starlette:
        return Starlette(
            routes=[
                Route("/register_worker", self._register, methods=["POST"]),
                Route("/worker_get_status", self._get_status, methods=["POST"]),
                Route("/worker_generate_stream", self._relay, methods=["POST"]),
            ]
        )

    async def _register(self, request: Request) -> Response:
        self.registered.append(await request.json())
        return JSONResponse(None)

    async def _get_status(self, request: Request) -> Response:
        return JSONResponse({"model_names": ["m"], "speed": 1, "queue_length": 0})

    async def _relay(self, request: Request) -> Response:
        import httpx2

        body = await request.json()

        async def relayed() -> Any:
            url = f"{self.worker}/worker_generate_stream"
            async with (
                httpx2.AsyncClient(timeout=5) as http,
                http.stream("POST", url, json=body) as answer,
            ):
                rest = b""
                async for chunk in answer.aiter_raw():
                    *pieces, rest = (rest + chunk).split(b"\0")
                    for piece in filter(None, pieces):
                        yield piece + b"\0"

        return StreamingResponse(relayed())


@run_async
async def test_controller_has_a_controller_of_llavas_as_its_worker() -> None:
    theirs = LlavaController()
    async with (
        serving(ScriptedWorker(words=3).app()) as worker,
        serving(theirs.app()) as url,
        site() as place,
    ):
        theirs.worker = worker
        assert (await place.register(url, None)).content == b"null"
        assert (await place.http.post("/list_models")).json() == {"models": ["m"]}
        body, _ = await stream(place)
    assert objects(body)[-1]["text"] == PROMPT + "w0 w1 w2 "


@run_async
async def test_controller_can_be_the_worker_of_another() -> None:
    worker = ScriptedWorker()
    async with site(worker) as inner, site() as outer:
        await outer.register(inner.url, None)
        body, _ = await stream(outer)
        answer = await outer.chat()
    assert objects(body)[-1]["text"] == PROMPT + WHOLE
    assert answer.json()["choices"][0]["message"]["content"] == WHOLE


@run_async
async def test_worker_that_registers_before_it_listens_is_taken_in_when_it_does() -> None:
    """LLaVA's workers do so."""
    worker = ScriptedWorker(ours=False)
    async with site(limits=Limits(patience_s=10)) as place:
        async with serving(worker.app()) as url:
            pass
        assert (await place.register(url, worker.status())).content == b"null"
        assert (await place.http.post("/list_models")).json() == {"models": []}
        async with serving(worker.app(), int(url.rsplit(":", 1)[1])):
            async with asyncio.timeout(10):
                while not place.controller.registry.workers:
                    await asyncio.sleep(0.02)


# -- registration --------------------------------------------------------------------------------


@run_async
async def test_register_refuses_models_that_the_worker_does_not_serve() -> None:
    async with site() as place, serving(ScriptedWorker(model="mine").app()) as url:
        answer = await place.register(url, legacy_status("yours", 0))
        assert (answer.status_code, answer.json()["error"]["code"]) == (403, "forbidden")
        assert place.controller.registry.workers == ()


class Other(ScriptedWorker):
    """One of ours, with a name for its process."""

    def status(self) -> dict[str, Any]:
        status = super().status()
        status["vlmchat"]["instance"] = self.voice
        return status


@run_async
async def test_register_refuses_an_address_at_which_another_worker_answers() -> None:
    async with site(Other(voice="a")) as place:
        answer = await place.register(place.addresses[0], Other(voice="b").status())
        assert (answer.status_code, "--worker-address" in answer.text) == (403, True)
        assert len(place.controller.registry.workers) == 1


@pytest.mark.parametrize(
    ("name", "status"),
    [
        ("http://169.254.169.254", 403),
        ("http://10.0.0.1:21002", 403),
        ("http://[::ffff:10.0.0.1]:1", 403),
        ("http://2130706433.example.invalid", 200),  # not known: it may come
        ("http://a@127.0.0.1:1", 400),
        ("http://127.0.0.1:1\\@evil", 400),
        ("http://127.0.0.1:1?x", 400),
        ("ftp://127.0.0.1", 400),
        ("http://127.0.0.1:99999", 400),
        ("127.0.0.1:1", 400),
        ("http://127.0.0.1:1/\u00e9", 400),
    ],
)
@run_async
async def test_register_refuses_addresses_outside_the_allow_list(name: str, status: int) -> None:
    async with site() as place:
        assert (await place.register(name, legacy_status("m", 0))).status_code == status
        assert place.controller.registry.workers == ()


@run_async
async def test_register_takes_the_registration_key_alone_and_clients_the_api_key_alone() -> None:
    async with site(keys=("k",), registration=("r",)) as place:
        post = place.http.post

        def key(value: str) -> dict[str, str]:
            return {"authorization": f"Bearer {value}"}

        beat = {"worker_name": "w", "queue_length": 0}
        assert (await post("/receive_heart_beat", json=beat)).status_code == 401
        assert (await post("/receive_heart_beat", json=beat, headers=key("k"))).status_code == 401
        assert (await post("/receive_heart_beat", json=beat, headers=key("r"))).status_code == 200
        assert (await post("/list_models", headers=key("r"))).status_code == 401
        assert (await post("/list_models", headers=key("k"))).status_code == 200
        assert (await place.http.get("/health")).status_code == 200
        assert (await place.http.get("/status")).status_code == 401


@run_async
async def test_unregister_ends_new_requests_and_keeps_those_under_way() -> None:
    worker = ScriptedWorker(delay_s=0.03)
    async with site(worker, limits=LIMITS) as place:
        waiting = asyncio.create_task(place.chat())
        while not worker.under_way:
            await asyncio.sleep(0.01)
        await place.http.post("/unregister_worker", json={"worker_name": place.addresses[0]})
        assert (await place.http.post("/list_models")).json() == {"models": []}
        assert (await waiting).json()["choices"][0]["message"]["content"] == WHOLE


@run_async
async def test_worker_that_drains_is_not_registered_by_its_last_beats() -> None:
    async with site(ScriptedWorker()) as place:
        beat: dict[str, Any] = {"worker_name": place.addresses[0], "queue_length": 1}
        beat["vlmchat"] = {"state": "draining"}
        answer = await place.http.post("/receive_heart_beat", json=beat)
        assert (answer.json(), place.controller.registry.workers) == ({"exist": True}, ())
