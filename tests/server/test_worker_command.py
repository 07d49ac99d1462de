"""`vlmchat worker` in a process of its own, with the demo model and OpenAI's client."""

from __future__ import annotations

import base64
import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from openai import OpenAI

ROOT = Path(__file__).parents[2]
SHAPES = ROOT / "examples" / "shapes.png"


def _start(
    *arguments: str, module: str = "vlmchat"
) -> tuple[subprocess.Popen[str], dict[str, Any]]:
    command = [sys.executable, "-m", module, "worker", "--port", "0", "--json", *arguments]
    process = subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT
    )
    assert process.stdout is not None
    return process, json.loads(process.stdout.readline())


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    process, ready = _start("--model-path", "demo", "--no-register", "--device", "cpu")
    yield str(ready["url"])
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 0, log
    assert [json.loads(line)["model"] for line in log.splitlines() if line.startswith("{")]


def _look(text: str) -> Any:
    url = "data:image/png;base64," + base64.b64encode(SHAPES.read_bytes()).decode()
    image = {"type": "image_url", "image_url": {"url": url}}
    return [{"role": "user", "content": [image, {"type": "text", "text": text}]}]


def test_worker_answers_about_a_picture_and_then_reuses_it(url: str) -> None:
    client = OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    messages = _look("Describe the image.")
    first = client.chat.completions.create(model="demo", messages=messages, temperature=0)
    content = first.choices[0].message.content
    assert content
    messages += [
        {"role": "assistant", "content": content},
        {"role": "user", "content": "What colour is the star?"},
    ]
    stream = client.chat.completions.create(
        model="demo",
        messages=messages,
        temperature=0,
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    usage = chunks[-1].usage
    assert "".join(c.choices[0].delta.content or "" for c in chunks[:-1])
    assert usage is not None
    assert usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) > 10


def test_worker_goes_on_with_a_partial_answer(url: str) -> None:
    with httpx2.Client(base_url=url, timeout=60) as http:

        def ask(**extra: Any) -> str:
            body = {"messages": _look("Describe the image."), "temperature": 0, **extra}
            told = http.post("/v1/chat/completions", json=body).json()
            return str(told["choices"][0]["message"]["content"])

        whole = ask()
        begun = whole[: whole.index(" ", len(whole) // 2)]
        messages = [*_look("Describe the image."), {"role": "assistant", "content": begun}]
        assert begun + ask(messages=messages, continue_final_message=True) == whole


def test_worker_answers_llavas_wire_too(url: str) -> None:
    picture = base64.b64encode(SHAPES.read_bytes()).decode()
    prompt = "USER: <image>\nDescribe the image. ASSISTANT:"
    body = {"model": "demo", "prompt": prompt, "temperature": 0, "images": [picture]}
    with httpx2.Client(base_url=url, timeout=60) as http:
        status = http.post("/worker_get_status").json()
        raw = http.post("/worker_generate_stream", json=body).content
    assert status["model_names"] == ["demo"]
    last = json.loads(raw.split(b"\0")[-2])
    assert last["error_code"] == 0
    assert last["text"].startswith(prompt)
    assert len(last["text"]) > len(prompt)


@pytest.mark.skipif(os.name == "nt", reason="signals")
def test_second_signal_ends_a_drain_at_once() -> None:
    process, ready = _start("--no-register", module="tests.commands.scripted")
    body = {"messages": [{"role": "user", "content": "count"}], "stream": True}
    try:
        with (
            httpx2.Client(base_url=str(ready["url"]), timeout=60) as http,
            http.stream("POST", "/v1/chat/completions", json=body) as answer,
        ):
            next(answer.iter_bytes())
            process.send_signal(signal.SIGTERM)
            while http.get("/ready").status_code != 503:
                pass
            process.send_signal(signal.SIGTERM)
            process.communicate(timeout=30)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGTERM


def test_busy_port_is_told_before_anything_is_loaded(url: str) -> None:
    port = url.rpartition(":")[2]
    command = [sys.executable, "-m", "vlmchat", "worker", "--port", port, "--model-path", "demo"]
    ended = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert ended.returncode == 2
    assert ended.stderr.startswith(f"vlmchat: cannot listen on 127.0.0.1 port {port}")
