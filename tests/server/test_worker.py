"""The worker's promises: bounded, fair, cancelled, drained, guarded, seen."""

from __future__ import annotations

import json
import socket
import threading
from typing import Any

import openai
import pytest

from tests.fakes import ScriptedBackend
from tests.server.running import MODEL, Running, counting, running
from vlmchat.server.app import EdgePolicy, Keys
from vlmchat.server.worker import WorkerPolicy

HELLO: Any = [{"role": "user", "content": "hello there"}]
STREAM = {"messages": HELLO, "stream": True}


def _wait(happened: Any) -> None:
    """Until `happened()`; the test's own timeout ends what never does."""
    pause = threading.Event()
    while not happened():
        pause.wait(0.01)


def _leave_after_the_request(up: Running, body: dict[str, Any]) -> None:
    """Send a request, and close the connection once it runs."""
    data = json.dumps(body).encode()
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(data)}"
    with socket.create_connection(("127.0.0.1", int(up.url.rpartition(":")[2]))) as connection:
        connection.sendall(f"{head}\r\n\r\n".encode() + data)
        _wait(lambda: up.worker.admission.running == 1)


@pytest.mark.parametrize("stream", [False, True])
def test_client_that_leaves_frees_its_slot(stream: bool) -> None:
    with running(counting(), WorkerPolicy(concurrency=1)) as up:
        _leave_after_the_request(up, {"messages": HELLO, "stream": stream})
        _wait(lambda: up.worker.admission.running == 0)
        assert up.recorded(1)[0]["status"] == 499
        assert up.worker.queue_length == 0


def test_client_that_leaves_the_queue_is_forgotten() -> None:
    with running(counting(2), WorkerPolicy(concurrency=1)) as up, up.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        next(iter(stream))
        _leave_after_the_request(up, STREAM)
        _wait(lambda: up.worker.admission.waiting == 0 and up.worker.queue_length == 1)
        stream.close()
        _wait(lambda: up.worker.admission.running == 0)


def test_full_queue_answers_429_and_when_to_come_back() -> None:
    policy = WorkerPolicy(concurrency=1, max_waiting=0)
    with running(counting(), policy) as up, up.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        next(iter(stream))
        with pytest.raises(openai.RateLimitError) as refused:
            client.chat.completions.create(model=MODEL, messages=HELLO)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "overloaded"
        stream.close()


def test_queue_is_bounded_in_prompt_tokens() -> None:
    policy = WorkerPolicy(concurrency=1, max_waiting_tokens=100)
    with running(counting(3), policy) as up, up.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        next(iter(stream))
        waiting = threading.Thread(target=_leave_after_the_request, args=(up, STREAM))
        waiting.start()
        long: Any = [{"role": "user", "content": "word " * 200}]
        _wait(lambda: up.worker.queue_length >= 1)
        waiting.join()
        stream.close()
        _wait(lambda: up.worker.queue_length == 0)
        assert client.chat.completions.create(model=MODEL, messages=long, max_tokens=1).id


def test_long_prefill_is_bridged_by_pings() -> None:
    slow = ScriptedBackend(["word"], delay_s=0.5)
    with running(slow, WorkerPolicy(ping_s=0.1)) as up, up.http() as http:
        text = http.post("/v1/chat/completions", json=STREAM).text
    assert text.startswith(": ping\n\n")
    assert text.endswith("data: [DONE]\n\n")


def test_stream_interval_joins_tokens() -> None:
    with running(ScriptedBackend(), WorkerPolicy(stream_interval=3)) as up, up.http() as http:
        text = http.post("/v1/chat/completions", json=STREAM).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    contents = [c["choices"][0]["delta"].get("content") for c in chunks]
    assert contents == ["", "You said: hello", " there"]


def test_drain_finishes_what_runs_and_refuses_what_comes() -> None:
    with running(counting(words=60)) as up, up.openai() as client, up.http() as http:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        chunks = iter(stream)
        next(chunks)
        up.call(up.server.stop)
        _wait(lambda: up.worker.state() == "draining")
        assert http.get("/ready").status_code == 503
        late = http.post("/v1/chat/completions", json={"messages": HELLO})
        assert (late.status_code, late.json()["error"]["code"]) == (503, "unavailable")
        assert [c.choices[0].finish_reason for c in chunks][-1] == "stop"


def test_drain_ends_what_takes_too_long_with_an_error() -> None:
    with running(counting(), WorkerPolicy(drain_s=0.1)) as up, up.openai() as client:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        chunks = iter(stream)
        next(chunks)
        up.call(up.server.stop)
        with pytest.raises(openai.APIError, match="shuts down"):
            list(chunks)


def test_drain_tells_those_who_still_wait() -> None:
    policy = WorkerPolicy(drain_s=0.2, concurrency=1)
    with running(counting(2), policy) as up, up.openai() as client, up.http() as http:
        stream = client.chat.completions.create(model=MODEL, messages=HELLO, stream=True)
        next(iter(stream))
        answers: list[int] = []

        def wait_in_line() -> None:
            answers.append(http.post("/v1/chat/completions", json=STREAM).status_code)

        waiting = threading.Thread(target=wait_in_line)
        waiting.start()
        _wait(lambda: up.worker.admission.waiting == 1)
        up.call(up.server.stop)
        waiting.join()
        assert answers == [503]


def test_health_is_told_while_the_model_loads() -> None:
    with running(None) as up, up.http() as http:
        assert http.get("/health").json() == {"status": "loading"}
        assert http.get("/ready").status_code == 503
        answer = http.post("/v1/chat/completions", json={"messages": HELLO})
        assert answer.status_code == 503
        assert "retry-after" in answer.headers


KEYS = EdgePolicy(keys=Keys(["first", "second"]))


@pytest.mark.parametrize(
    "path", ["/v1/models", "/ready", "/metrics", "/v1/chat/completions", "/worker_get_status", "/"]
)
def test_every_route_but_health_wants_a_key(path: str) -> None:
    with running(ScriptedBackend(), edge=KEYS) as up, up.http() as http:
        for headers in ({}, {"authorization": "Bearer third"}, {"authorization": "first"}):
            answer = http.post(path, headers=headers)
            assert (answer.status_code, answer.json()["error"]["code"]) == (401, "unauthorized")
        assert http.get("/health").status_code == 200


def test_each_key_opens_and_none_is_logged() -> None:
    with running(ScriptedBackend(), edge=KEYS) as up:
        for key in ("first", "second"):
            assert up.openai(key).models.list().data[0].id == MODEL
        assert "second" not in json.dumps(up.recorded(2))


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"origin": "https://evil.example"}, 403),
        ({"origin": "http://localhost:80", "host": "localhost:80"}, 200),
        ({"host": "rebound.example"}, 403),
        ({"host": "127.0.0.1.evil.example:21002"}, 403),
        ({"host": "[::1]:21002"}, 200),
    ],
)
def test_pages_of_strangers_are_not_answered(headers: dict[str, str], status: int) -> None:
    with running(ScriptedBackend(), edge=EdgePolicy(only_local=True)) as up, up.http() as http:
        assert http.get("/v1/models", headers=headers).status_code == status


def test_body_over_the_limit_is_refused_by_header_and_as_it_comes() -> None:
    edge = EdgePolicy(max_body_bytes=1000)
    with running(ScriptedBackend(), edge=edge) as up, up.http() as http:
        assert http.post("/v1/chat/completions", content=b"x" * 1001).status_code == 413
        chunks = (b"x" * 500 for _ in range(3))
        answer = http.post("/v1/chat/completions", content=chunks)
        assert (answer.status_code, answer.json()["error"]["code"]) == (413, "body_too_large")


def test_body_that_drips_is_refused_in_time() -> None:
    edge = EdgePolicy(body_timeout_s=0.2)
    with running(ScriptedBackend(), edge=edge) as up:
        port = int(up.url.rpartition(":")[2])
        with socket.create_connection(("127.0.0.1", port)) as connection:
            connection.sendall(b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n")
            connection.sendall(b"Content-Length: 99\r\n\r\n{")
            assert b"HTTP/1.1 400" in connection.recv(1000)


def test_bodies_held_together_are_bounded_and_given_back() -> None:
    edge = EdgePolicy(max_held_bytes=1000)
    with running(ScriptedBackend(), edge=edge) as up, up.http() as http:
        assert http.post("/v1/chat/completions", content=b"x" * 1001).status_code == 429
        assert http.post("/v1/chat/completions", json={"messages": HELLO}).status_code == 200
        up.recorded(2)
        assert up.worker.edge.held.held == 0


@pytest.mark.parametrize(
    "body",
    [b"", b"[", b"[]", b"null", b"\xff\xfe", b'{"messages": NaN}', b"[" * 100_000, b"1" * 5000],
)
def test_body_that_is_no_request_is_a_400(body: bytes) -> None:
    with running(ScriptedBackend()) as up, up.http() as http:
        answer = http.post("/v1/chat/completions", content=body)
        assert answer.status_code == 400
        assert answer.json()["error"]["type"] == "invalid_request_error"


def test_unknown_routes_and_methods_have_error_objects() -> None:
    with running(ScriptedBackend()) as up, up.http() as http:
        assert http.get("/v1/nothing").json()["error"]["code"] == "not_found"
        assert http.get("/v1/chat/completions").json()["error"]["code"] == "method_not_allowed"


def test_bug_is_a_500_that_tells_nothing() -> None:
    class Broken(ScriptedBackend):
        def stream(self, conversation: Any, params: Any) -> Any:
            raise RuntimeError("secret")

    with running(Broken()) as up, up.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HELLO})
        assert answer.status_code == 500
        assert "secret" not in answer.text
        assert up.worker.queue_length == up.worker.admission.running == 0


def test_request_id_goes_in_and_out() -> None:
    with running(ScriptedBackend()) as up, up.http() as http:
        assert http.get("/health", headers={"x-request-id": "a-1"}).headers["x-request-id"] == "a-1"
        made = http.get("/health", headers={"x-request-id": "a\tb"}).headers["x-request-id"]
        assert len(made) == 32
        assert [record["request_id"] for record in up.recorded(2)] == ["a-1", made]


def test_metrics_count_tokens_requests_and_failures() -> None:
    with running(ScriptedBackend()) as up, up.http() as http:
        http.post("/v1/chat/completions", json={"messages": HELLO})
        http.post("/v1/chat/completions", json={"messages": []})
        up.recorded(2)
        page = http.get("/metrics").text
    labels = f'{{model_name="{MODEL}"}}'
    assert f"vlmchat_prompt_tokens_total{labels} 4.0" in page
    assert f"vlmchat_generation_tokens_total{labels} 4.0" in page
    assert f"vlmchat_time_to_first_token_seconds_count{labels} 1.0" in page
    assert 'finished_reason="stop",model_name="scripted"} 1.0' in page
    assert 'code="invalid_request",model_name="scripted"} 1.0' in page


def test_log_record_tells_times_and_tokens() -> None:
    with running(ScriptedBackend()) as up, up.http() as http:
        http.post("/v1/chat/completions", json={"messages": HELLO})
        (record,) = up.recorded(1)
    assert record["prompt_tokens"] == 4
    assert record["finish_reason"] == "stop"
    assert {"queue_s", "first_token_s", "total_s", "request_id", "client"} <= set(record)


def test_stream_that_waits_in_the_queue_is_pinged() -> None:
    policy = WorkerPolicy(concurrency=1, ping_s=0.05)
    body = {"messages": [{"role": "user", "content": "go"}], "stream": True}
    with (
        running(counting(2, words=60), policy) as server,
        server.http() as http,
        http.stream("POST", "/v1/chat/completions", json=body) as first,
    ):
        until_first = first.iter_lines()
        next(until_first)  # it has the only place
        with http.stream("POST", "/v1/chat/completions", json=body) as second:
            lines = second.iter_lines()
            assert next(lines) == ": ping"
            list(until_first)
            assert [line for line in lines if line][-1] == "data: [DONE]"


def test_worker_tells_an_instance_of_its_own() -> None:
    def instance(server: Running) -> str:
        return str(server.worker.status()["vlmchat"]["instance"])

    with running(counting()) as one, running(counting()) as other:
        assert instance(one) == instance(one) != instance(other)
