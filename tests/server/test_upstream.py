"""Another server behind the worker, and LLaVA's prompts read back for it."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator

import pytest

from tests.fakes import ScriptedBackend, picture
from tests.server.running import Running, running
from vlmchat.conversation import Conversation
from vlmchat.errors import InvalidRequest
from vlmchat.server.upstream import Upstream, read_rendered

RED = picture()
ASKED = Conversation("Be kind.").ask("Q1", (RED,)).answered("A1").ask("Q2")
NO_SYSTEM = Conversation().ask("Q1", (RED,)).answered("A1").ask("Q2")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("Be kind. USER: <image>\nQ1 ASSISTANT: A1</s>USER: Q2 ASSISTANT:", ASKED),
        ("Be kind.###Human: <image>\nQ1###Assistant: A1###Human: Q2###Assistant:", ASKED),
        (
            "[INST] <<SYS>>\nBe kind.\n<</SYS>>\n\n<image>\nQ1 [/INST] A1 </s><s>[INST] Q2 [/INST]",
            ASKED,
        ),
        ("[INST] <image>\nQ1 [/INST] A1 </s>[INST] Q2 [/INST]", NO_SYSTEM),
        (
            "<|im_start|>system\nBe kind.<|im_end|><|im_start|>user\n<image>\nQ1<|im_end|>"
            "<|im_start|>assistant\nA1<|im_end|><|im_start|>user\nQ2<|im_end|>"
            "<|im_start|>assistant\n",
            ASKED,
        ),
        ("<image>\nQ1\n", Conversation().ask("Q1", (RED,))),
    ],
)
def test_llavas_prompts_are_read_back(prompt: str, expected: Conversation) -> None:
    assert read_rendered(prompt, (RED,)) == expected


def test_prompt_with_other_places_than_pictures_is_refused() -> None:
    with pytest.raises(InvalidRequest, match="pictures"):
        read_rendered("USER: Q1 ASSISTANT:", (RED,))


@pytest.fixture(scope="module")
def fronted() -> Iterator[tuple[Running, ScriptedBackend]]:
    backend = ScriptedBackend()
    with running(backend) as behind, running(Upstream(behind.url)) as front:
        yield front, backend


def test_upstream_answers_openais_wire(fronted: tuple[Running, ScriptedBackend]) -> None:
    front, _ = fronted
    answer = front.openai().chat.completions.create(
        model="scripted", messages=[{"role": "user", "content": "hello"}]
    )
    assert answer.choices[0].message.content == "You said: hello"
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == 3


def test_upstream_answers_llavas_wire(fronted: tuple[Running, ScriptedBackend]) -> None:
    front, backend = fronted
    prompt = "Be kind. USER: <image>\nhello ASSISTANT:"
    body = {"prompt": prompt, "images": [base64.b64encode(RED.data).decode()]}
    with front.http() as http:
        raw = http.post("/worker_generate_stream", json=body).content
    assert json.loads(raw.split(b"\0")[-2])["text"] == prompt + "You said: hello"
    assert backend.seen[-1] == Conversation("Be kind.").ask("hello", (RED,))


def test_upstream_refuses_to_resume_by_name(fronted: tuple[Running, ScriptedBackend]) -> None:
    front, _ = fronted
    body = {"messages": [{"role": "user", "content": "a"}], "vlmchat_resume": [1]}
    with front.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.json()["error"]["code"] == "unsupported_parameter"
