"""A real Ray of several nodes: answers are whole, whatever is killed, removed, or replaced."""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Any

import httpx2
import pytest

from tests.cluster.conftest import NODE, Running, model
from tests.fakes import ScriptedBackend
from tests.openai_server import OpenAIServer
from vlmchat.cluster.plan import ClusterPlan, Scale
from vlmchat.commands.cluster_models import load_upstream
from vlmchat.errors import NetworkError
from vlmchat.server.worker import WorkerPolicy

# What ray's own modules warn of is nothing that can be done here.
pytestmark = [
    pytest.mark.ray,
    pytest.mark.filterwarnings("ignore"),
    pytest.mark.timeout(900),  # on a busy machine a replica takes long to start
]
LONG = " ".join(f"word{n}" for n in range(60))
PATIENCE_S = 180.0


def body(question: str, **more: Any) -> dict[str, Any]:
    messages = [{"role": "user", "content": question}]
    return {"model": "echo", "messages": messages, "max_tokens": 200, **more}


def ask(url: str, question: str, begun: Callable[[], None] = lambda: None) -> str:
    """The streamed answer; fails unless it ends as it should. begun() at its tenth word."""
    text, done, reasons = "", False, []
    with (
        httpx2.Client(timeout=90) as client,
        client.stream("POST", f"{url}/v1/chat/completions", json=body(question, stream=True)) as r,
    ):
        assert r.status_code == 200, r.read()
        for line in r.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line[6:])
                assert "error" not in chunk, chunk
                for choice in chunk["choices"]:
                    text += choice["delta"].get("content", "")
                    reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                    if len(text.split()) == 10 and choice["delta"].get("content"):
                        begun()
    assert (done, reasons) == (True, ["stop"])
    return text


def replicas(state: str = "RUNNING") -> list[Any]:
    """Ray's records of the model's replicas."""
    from ray import serve

    details = serve.context._get_global_client().get_serve_details()
    deployments = details["applications"]["vlmchat"]["deployments"]
    return [r for r in deployments["model-echo"]["replicas"] if r["state"] == state]


def busy(replica: Any) -> int:
    """Requests that it has under way."""
    import ray

    actor = ray.get_actor(replica["actor_name"], namespace="serve")
    return int(ray.get(actor.get_num_ongoing_requests.remote(), timeout=5))


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def void(value: object) -> None:
    """For a callback that returns nothing."""


@contextmanager
def load(url: str, clients: int) -> Iterator[list[str]]:
    """So many ask all the time; each answer is in the list, or what failed."""
    answers: list[str] = []
    over = threading.Event()

    def client(number: int) -> None:
        turn = 0
        while not over.is_set():
            turn += 1
            question = f"client {number} turn {turn} " + " ".join(LONG.split()[:20])
            try:
                whole = ask(url, question) == f"You said: {question}"
                answers.append("whole" if whole else f"not whole: {question}")
            except Exception as error:
                answers.append(repr(error))

    with ThreadPoolExecutor(clients) as pool:
        for number in range(clients):
            pool.submit(client, number)
        try:
            yield answers
        finally:
            over.set()


def test_front_speaks_both_wires_for_its_replicas(running: Running) -> None:
    running.deploy(model())
    with httpx2.Client(base_url=running.url, timeout=30) as client:
        until(lambda: client.get("/ready").status_code == 200)
        assert client.post("/list_models").json() == {"models": ["echo"]}
        asked = client.post("/get_worker_address", json={"model": "echo"})
        assert asked.json() == {"address": running.url}
        assert client.get("/v1/models").json()["data"][0]["max_model_len"] == 512
        whole = client.post("/v1/chat/completions", json=body("a b")).json()
        assert whole["choices"][0]["message"]["content"] == "You said: a b"
        assert client.post("/v1/vlmchat/count", json=body("a b")).json()["tokens"] == 4
        prompt = "A chat. USER: a b ASSISTANT:"
        legacy = {"model": "echo", "prompt": prompt, "stop": "</s>", "max_new_tokens": 50}
        told = client.post("/worker_generate_stream", json=legacy).content.split(b"\0")
        assert json.loads(told[-2])["text"].startswith(prompt + "You said:")
        missing = client.post("/v1/chat/completions", json=body("a") | {"model": "none"})
        assert missing.status_code == 404
        assert missing.json()["error"]["code"] == "model_not_found"


def test_conversation_returns_to_the_replica_that_has_its_beginning(running: Running) -> None:
    running.deploy(model())
    with httpx2.Client(base_url=running.url, timeout=30) as client:
        messages: list[dict[str, str]] = []
        for turn in range(6):
            messages.append({"role": "user", "content": f"turn {turn}"})
            told = client.post("/v1/chat/completions", json=body("") | {"messages": messages})
            messages.append(told.json()["choices"][0]["message"])
        page = client.get("/metrics").text
    hits = [
        line for line in page.splitlines() if line.startswith("vlmchat_prefix_cache_hits_total")
    ]
    assert sorted(float(line.split()[-1]) > 30 for line in hits) == [False, True]


def test_front_answers_429_when_as_many_wait_as_may(running: Running) -> None:
    policy = WorkerPolicy(concurrency=1, max_waiting=1)
    running.deploy(model(policy=policy, scale=Scale(1, 1)))
    answers: list[httpx2.Response] = []
    with ThreadPoolExecutor(6) as pool, httpx2.Client(timeout=90) as client:

        def post(number: int) -> httpx2.Response:
            return client.post(f"{running.url}/v1/chat/completions", json=body(LONG))

        def refused() -> bool:  # routers hear of new limits by and by
            answers.extend(pool.map(post, range(6)))
            return any(answer.status_code != 200 for answer in answers)

        until(refused)
    late = [answer for answer in answers if answer.status_code != 200]
    assert {answer.status_code for answer in late} == {429}
    assert late[0].json()["error"]["code"] == "overloaded"
    assert late[0].headers["retry-after"] == "1"


def test_answer_is_whole_when_its_replica_is_killed(running: Running) -> None:
    running.deploy(model())
    killed: list[int] = []

    def kill() -> None:
        (replica,) = [r for r in replicas() if busy(r)]
        os.kill(replica["pid"], signal.SIGKILL)
        killed.append(replica["pid"])

    assert ask(running.url, LONG, kill) == f"You said: {LONG}"
    assert len(killed) == 1
    until(lambda: len(replicas()) == 2 and killed[0] not in [r["pid"] for r in replicas()])


def test_replica_stops_when_its_client_has_left(running: Running) -> None:
    running.deploy(model())
    with httpx2.Client(base_url=running.url, timeout=60) as client:
        asked = body(" ".join(["word"] * 250), stream=True)
        with client.stream("POST", "/v1/chat/completions", json=asked) as answer:
            assert answer.status_code == 200
            next(answer.iter_lines())
        until(lambda: re.search(r"client_closed.* 1\.0", client.get("/metrics").text) is not None)
    until(lambda: sum(map(busy, replicas())) == 0)


def test_answers_are_whole_when_a_node_is_removed(running: Running) -> None:
    node = running.ray.add_node(**NODE)
    running.deploy(model(scale=Scale(4, 4)))  # three fit on the head
    assert len({replica["node_id"] for replica in replicas()}) == 2
    reached = threading.Barrier(7)
    questions = [f"{number} {LONG}" for number in range(6)]
    with ThreadPoolExecutor(6) as pool:
        asked = [
            pool.submit(ask, running.url, q, lambda: void(reached.wait(30))) for q in questions
        ]
        reached.wait(30)
        running.ray.remove_node(node, allow_graceful=False)
        answers = [one.result() for one in asked]
    assert answers == [f"You said: {question}" for question in questions]
    until(lambda: len({replica["node_id"] for replica in replicas()}) == 1)


def test_replicas_become_more_under_load_and_fewer_after_it(running: Running) -> None:
    scale = Scale(1, 3, ongoing=1.0, up_delay_s=1.0, down_delay_s=2.0)
    running.deploy(model(scale=scale))
    with load(running.url, clients=4) as answers:
        until(lambda: len(replicas()) == 3)
    assert set(answers) == {"whole"}
    until(lambda: len(replicas()) == 1)
    assert ask(running.url, "after") == "You said: after"


@pytest.mark.parametrize(
    "num_cpus", [pytest.param(1.0, id="room for both"), pytest.param(3.0, id="the old goes first")]
)
def test_no_request_is_lost_while_replicas_are_replaced(running: Running, num_cpus: float) -> None:
    plan: dict[str, Any] = {"scale": Scale(1, 1), "num_cpus": num_cpus}
    running.deploy(model(version="old", **plan))
    before = {replica["pid"] for replica in replicas()}
    with load(running.url, clients=4) as answers:
        until(lambda: len(answers) >= 4)
        running.deploy(model(version="new", **plan))
        until(lambda: before.isdisjoint({replica["pid"] for replica in replicas()}))
        enough = len(answers) + 4
        until(lambda: len(answers) >= enough)
    assert set(answers) == {"whole"}


def test_no_request_is_lost_while_replicas_become_three_and_one_again(running: Running) -> None:
    from vlmchat.cluster import deploy

    running.deploy(model(scale=Scale(1, 1)))
    (kept,) = replicas()
    with load(running.url, clients=4) as answers:
        for count in (3, 1):
            deploy.scale(None, count, count)
            deploy.await_ready(PATIENCE_S, lambda line: None)
            until(lambda count=count: len(replicas()) == count)  # type: ignore[misc]
            if count == 3:  # those that stay are not touched
                assert kept["pid"] in [replica["pid"] for replica in replicas()]
            enough = len(answers) + 4
            until(lambda enough=enough: len(answers) >= enough)  # type: ignore[misc]
    assert set(answers) == {"whole"}


def test_deploy_tells_that_no_node_has_room(running: Running) -> None:
    from vlmchat.cluster import deploy

    def heard(line: str) -> None:
        if 'no node has room for another, which takes {"CPU": 64}' in line:
            raise StopIteration

    deploy.deploy(ClusterPlan((model(scale=Scale(1, 1), num_cpus=64),), port=running.port))
    with pytest.raises(StopIteration):
        deploy.await_ready(60, heard)


def test_error_of_a_ray_task_is_told_in_its_own_words(running: Running) -> None:
    import ray

    def bind() -> None:
        raise RuntimeError("the port is taken")

    from vlmchat.cluster import deploy

    with pytest.raises(NetworkError, match=r"^Ray: the port is taken$"), deploy._translated():
        ray.get(ray.remote(bind).remote())


def test_other_server_answers_behind_a_replica(running: Running) -> None:
    server = OpenAIServer(ScriptedBackend(["from elsewhere"]))
    load = partial(load_upstream, f"{server.url}/v1", None, "m")
    running.deploy(model(load=load, scale=Scale(1, 1), resumes=False, version="upstream"))
    assert ask(running.url, "a") == "from elsewhere"
    server.shutdown()
    server.server_close()


def test_replica_without_an_engine_is_replaced(running: Running) -> None:
    running.deploy(model(scale=Scale(1, 1), health_s=1.0))
    (dead,) = replicas()
    with httpx2.Client(timeout=60) as client:
        client.post(f"{running.url}/v1/chat/completions", json=body("stop the engine"))
    until(lambda: [r["pid"] for r in replicas()] not in ([], [dead["pid"]]))
    assert ask(running.url, "again") == "You said: again"
