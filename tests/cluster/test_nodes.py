"""Two nodes, started by the lines of docs/cluster.md; the commands there, and clients of all kinds.

Answers are held against those of an engine in the process that asks, without any Ray.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from pathlib import Path
from secrets import token_hex
from tempfile import TemporaryDirectory
from typing import Any

import httpx2
import openai
import psutil
import pytest

from tests.cluster.ports import free_port

pytestmark = [pytest.mark.ray, pytest.mark.timeout(900)]
ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes.png"
QUESTIONS = ("Describe the image.", "What colour is the star?")
EXACT = ("--device", "cpu", "--dtype", "float32")
NODE = ("--num-cpus=1", "--object-store-memory=80000000", "--disable-usage-stats", "--block")
PATIENCE_S = 300.0  # on a busy machine


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + PATIENCE_S
    while not condition():
        assert time.monotonic() < deadline, "it did not come about"
        time.sleep(0.2)


def listens(port: int) -> bool:
    with socket.socket() as sock:
        return sock.connect_ex(("127.0.0.1", port)) == 0


def vlmchat(*arguments: str, code: int = 0) -> list[Any]:
    """The JSON lines that it prints; those of stderr where it is to fail."""
    command = [sys.executable, "-m", "vlmchat", *arguments, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=PATIENCE_S)
    assert done.returncode == code, done.stderr
    return [json.loads(line) for line in (done.stderr if code else done.stdout).splitlines()]


@contextmanager
def node(*arguments: str) -> Iterator[psutil.Process]:
    """`ray start`, which takes all its processes along."""
    command = [str(Path(sys.executable).with_name("ray")), "start", *arguments, *NODE]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT) as started:
        process = psutil.Process(started.pid)
        try:
            yield process
        finally:
            mine = process.children(recursive=True)
            process.terminate()
            for left in psutil.wait_procs(mine, timeout=30)[1]:
                left.kill()


class Cluster:
    """Two nodes with one CPU each, and the demo model on both."""

    def __init__(self, head: str, nodes: list[psutil.Process], port: int) -> None:
        self.head, self.nodes, self.port = head, nodes, port
        self.url = f"http://127.0.0.1:{port}"

    def command(self, name: str, *arguments: str, code: int = 0) -> Any:
        """What `vlmchat cluster` says last."""
        return vlmchat("cluster", name, "--address", self.head, *arguments, code=code)[-1]

    def replicas(self) -> list[psutil.Process]:
        """Their processes."""
        children = [one for node in self.nodes for one in node.children(recursive=True)]
        return [one for one in children if "ServeReplica:vlmchat:model-demo" in title(one)]


def title(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline())
    except psutil.Error:
        return ""


@pytest.fixture(scope="module")
def cluster() -> Iterator[Cluster]:
    pytest.importorskip("ray", reason="ray is not installed: pip install 'vlmchat[cluster]'")
    first, port = free_port(), free_port()
    with (
        TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder,
        pytest.MonkeyPatch.context() as patch,
        ExitStack() as on,
    ):
        patch.setenv("RAY_worker_niceness", "0")  # on a busy machine replicas would get nothing
        patch.setenv("RAY_AUTH_MODE", "token")
        patch.setenv("RAY_AUTH_TOKEN", token_hex(32))
        head = ("--head", "--include-dashboard=false", f"--port={first}", f"--temp-dir={folder}")
        nodes = [on.enter_context(node(*head))]
        until(lambda: listens(first))
        nodes.append(on.enter_context(node(f"--address=127.0.0.1:{first}")))
        running = Cluster(f"127.0.0.1:{first}", nodes, port)
        told = running.command(
            *("up", "--port", str(port), "--model-path", "demo", "--replicas", "2", *EXACT)
        )
        assert told == {
            **{"type": "ready", "role": "cluster", "url": running.url, "port": port},
            "models": ["demo"],
        }
        yield running


@pytest.fixture(scope="module")
def expected() -> list[str]:
    """An engine's answers."""
    return answers("--model-path", "demo", *EXACT)


def answers(*where: str) -> list[str]:
    """Of `vlmchat chat` to both questions."""
    asked = [word for question in QUESTIONS for word in ("-p", question)]
    told = vlmchat("chat", *where, "--temperature", "0", "--image", str(SHAPES), *asked)
    return [line["answer"] for line in told]


def streamed(url: str) -> str:
    """The answer to the first question, by OpenAI's own client, which does not ask twice."""
    data = base64.b64encode(SHAPES.read_bytes()).decode()
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}},
        {"type": "text", "text": QUESTIONS[0]},
    ]
    messages: Any = [{"role": "user", "content": content}]
    with openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        chunks = client.chat.completions.create(
            model="demo", messages=messages, temperature=0, stream=True
        )
        return "".join(c.choices[0].delta.content or "" for c in chunks if c.choices).strip()


def test_each_node_has_a_replica(cluster: Cluster) -> None:
    assert len(cluster.replicas()) == 2
    assert cluster.command("status")["models"] == [
        {
            **{"name": "demo", "replicas": {"RUNNING": 2}, "gpus_per_replica": 0.0},
            **{"min_replicas": 2, "max_replicas": 2},
        }
    ]


def test_conversation_with_a_picture_is_answered_as_by_one_engine(
    cluster: Cluster, expected: list[str]
) -> None:
    assert answers("--server", cluster.url) == expected


def test_openai_client_is_answered_as_by_one_engine(cluster: Cluster, expected: list[str]) -> None:
    assert streamed(cluster.url) == expected[0]


def test_batch_is_answered_as_by_one_engine(
    cluster: Cluster, expected: list[str], tmp_path: Path
) -> None:
    target = tmp_path / "answers.jsonl"
    asked = ("--image", str(SHAPES), "-p", QUESTIONS[0], "--temperature", "0")
    vlmchat("batch", "--server", cluster.url, *asked, "-o", str(target))
    assert json.loads(target.read_text("utf-8"))["answer"] == expected[0]


def test_answers_are_whole_when_a_replica_is_killed_under_load(
    cluster: Cluster, expected: list[str]
) -> None:
    told: list[str] = []
    over = threading.Event()

    def client(_: int) -> None:
        while not over.is_set():
            told.append(streamed(cluster.url))

    with ThreadPoolExecutor(4) as pool:
        clients = [pool.submit(client, number) for number in range(4)]
        try:
            until(lambda: len(told) >= 4)
            killed = cluster.replicas()[0].pid
            os.kill(killed, signal.SIGKILL)
            enough = len(told) + 12
            until(lambda: len(told) >= enough or any(one.done() for one in clients))
        finally:
            over.set()
    assert [one.exception() for one in clients] == [None] * 4
    assert set(told) == {expected[0]}
    until(lambda: httpx2.get(f"{cluster.url}/ready").status_code == 200)
    until(
        lambda: len(cluster.replicas()) == 2 and killed not in [p.pid for p in cluster.replicas()]
    )


def test_commands_scale_and_end_what_runs(cluster: Cluster) -> None:
    (shown,) = cluster.command("scale", "--replicas", "1")["models"]
    assert (shown["min_replicas"], shown["max_replicas"]) == (1, 1)
    until(lambda: len(cluster.replicas()) == 1)
    assert cluster.command("down") == {"type": "down"}
    until(lambda: cluster.replicas() == [])
    assert cluster.command("status", code=69)["error"]["code"] == "no_worker"
