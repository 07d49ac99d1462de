"""OpenAI's wire as its own client meets it, over a scripted model and a real socket."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.fakes import IMAGE_TOKENS, ScriptedBackend, picture
from tests.server.running import MODEL, Running, running
from vlmchat.config import ImagePolicy
from vlmchat.errors import EngineDead, OutOfMemory
from vlmchat.request import Grammar
from vlmchat.server.worker import WorkerPolicy

HELLO: Any = [{"role": "user", "content": "hello there"}]
RED = "data:image/png;base64," + base64.b64encode(picture().data).decode()


def _see(text: str, *urls: str) -> Any:
    parts: list[dict[str, Any]] = [{"type": "image_url", "image_url": {"url": u}} for u in urls]
    return [{"role": "user", "content": [*parts, {"type": "text", "text": text}]}]


@pytest.fixture(scope="module")
def backend() -> ScriptedBackend:
    return ScriptedBackend(context_length=256)


@pytest.fixture(scope="module")
def shared(backend: ScriptedBackend) -> Iterator[Running]:
    with running(backend, WorkerPolicy(max_images=3, images=ImagePolicy(max_pixels=10_000))) as up:
        yield up


@pytest.fixture
def server(shared: Running, backend: ScriptedBackend) -> Running:
    backend.answers.clear()
    backend.seen.clear()
    backend.params.clear()
    return shared


def test_answer_comes_whole_with_usage(server: Running) -> None:
    answer = server.openai().chat.completions.create(model=MODEL, messages=HELLO)
    assert answer.choices[0].message.content == "You said: hello there"
    assert answer.choices[0].finish_reason == "stop"
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 4)


def test_answer_streams_role_text_reason_usage(server: Running) -> None:
    stream = server.openai().chat.completions.create(
        model=MODEL, messages=HELLO, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    texts = [c.choices[0].delta.content or "" for c in chunks if c.choices]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert texts == ["", "You", " said:", " hello", " there", ""]
    assert chunks[-2].choices[0].finish_reason == "stop"
    assert chunks[-1].choices == []
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 4


def test_stream_ends_with_done(server: Running) -> None:
    body = {"messages": HELLO, "stream": True}
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert answer.text.endswith("data: [DONE]\n\n")
    assert '"usage"' not in answer.text


def test_pictures_of_several_turns_reach_the_model(
    server: Running, backend: ScriptedBackend
) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        *_see("one", RED),
        {"role": "assistant", "content": "A red one."},
        *_see("two", RED, RED),
    ]
    answer = server.openai().chat.completions.create(model=MODEL, messages=messages)
    (conversation,) = backend.seen
    assert conversation.system == "Be brief."
    assert conversation.turns[0].answer == "A red one."
    assert [len(m.images) for m in conversation.messages()] == [0, 1, 0, 2]
    assert answer.usage is not None
    details: Any = answer.usage.prompt_tokens_details
    assert details.image_tokens == 3 * IMAGE_TOKENS


def test_picture_may_be_a_bare_string_or_a_responses_part(
    server: Running, backend: ScriptedBackend
) -> None:
    parts = [
        {"type": "image_url", "image_url": RED, "detail": "high"},
        {"type": "input_image", "image_url": RED},
        {"type": "input_text", "text": "what?"},
    ]
    with server.http() as http:
        body = {"messages": [{"role": "user", "content": parts}]}
        assert http.post("/v1/chat/completions", json=body).status_code == 200
    assert len(backend.seen[0].images) == 2


def test_parameters_reach_the_model(server: Running, backend: ScriptedBackend) -> None:
    server.openai().chat.completions.create(
        model=MODEL,
        messages=HELLO,
        temperature=0.5,
        top_p=0.9,
        max_completion_tokens=7,
        stop=["x", "y"],
        seed=3,
        frequency_penalty=0.5,
        presence_penalty=-0.5,
        logit_bias={"5": 2},
        response_format={"type": "json_object"},
        extra_body={"top_k": 4, "repetition_penalty": 1.1, "ignore_eos": True},
    )
    (params,) = backend.params
    assert (params.temperature, params.top_p, params.top_k) == (0.5, 0.9, 4)
    assert (params.max_new_tokens, params.seed, params.stop) == (7, 3, ("x", "y"))
    assert (params.frequency_penalty, params.presence_penalty) == (0.5, -0.5)
    assert (params.repetition_penalty, params.logit_bias) == (1.1, ((5, 2.0),))
    assert (params.ignore_eos, params.grammar) == (True, Grammar("json_object", ""))


def test_json_schema_reaches_the_model(server: Running, backend: ScriptedBackend) -> None:
    schema = {"type": "object", "properties": {"colour": {"type": "string"}}}
    form: Any = {"type": "json_schema", "json_schema": {"name": "a", "schema": schema}}
    server.openai().chat.completions.create(model=MODEL, messages=HELLO, response_format=form)
    grammar = backend.params[0].grammar
    assert grammar is not None
    assert (grammar.kind, json.loads(grammar.text)) == ("json_schema", schema)


def test_without_max_tokens_the_answer_may_fill_the_context(
    server: Running, backend: ScriptedBackend
) -> None:
    server.openai().chat.completions.create(model=MODEL, messages=HELLO)
    assert backend.params[0].max_new_tokens == 256 - 4


def test_several_choices_have_seeds_of_their_own(server: Running, backend: ScriptedBackend) -> None:
    answer = server.openai().chat.completions.create(model=MODEL, messages=HELLO, n=7, seed=5)
    assert sorted(choice.index for choice in answer.choices) == list(range(7))
    assert {choice.message.content for choice in answer.choices} == {"You said: hello there"}
    assert sorted(p.seed or 0 for p in backend.params) == list(range(5, 12))
    assert answer.usage is not None
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (4, 28)


def test_several_choices_stream_side_by_side(server: Running) -> None:
    stream = server.openai().chat.completions.create(model=MODEL, messages=HELLO, n=3, stream=True)
    texts = ["", "", ""]
    for chunk in stream:
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == ["You said: hello there"] * 3


def test_logprobs_come_in_openais_form(server: Running) -> None:
    answer = server.openai().chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, top_logprobs=2
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    assert logprobs.content is not None
    assert [token.token for token in logprobs.content] == ["You", " said:", " hello", " there"]
    assert logprobs.content[0].bytes == list(b"You")
    assert logprobs.content[0].top_logprobs[0].logprob == -0.5


def test_streamed_logprobs_are_complete(server: Running) -> None:
    stream = server.openai().chat.completions.create(
        model=MODEL, messages=HELLO, logprobs=True, stream=True
    )
    told = [c.choices[0].logprobs for c in stream if c.choices]
    assert sum(len(one.content or ()) for one in told if one is not None) == 4


def test_final_message_is_gone_on_with(server: Running, backend: ScriptedBackend) -> None:
    messages = [*HELLO, {"role": "assistant", "content": "Well,"}]
    extra = {"continue_final_message": True, "add_generation_prompt": False}
    server.openai().chat.completions.create(model=MODEL, messages=messages, extra_body=extra)
    (conversation,) = backend.seen
    assert (conversation.begun, conversation.turns) == ("Well,", ())


def test_token_ids_let_another_server_go_on(server: Running, backend: ScriptedBackend) -> None:
    body = {"messages": HELLO, "stream": True, "vlmchat_token_ids": True, "vlmchat_resume": [0, 1]}
    with server.http() as http:
        lines = http.post("/v1/chat/completions", json=body).text.split("\n\n")
    chunks = [json.loads(line[6:]) for line in lines if line.startswith("data: {")]
    texts = [c["choices"][0]["delta"].get("content", "") for c in chunks]
    ids = [i for c in chunks for i in c.get("vlmchat_token_ids", ())]
    assert "".join(texts) == " hello there"
    assert ids == [2, 3]
    assert backend.params[0].resume == (0, 1)


def test_overflow_is_refused_with_its_numbers(server: Running) -> None:
    messages = _see("word" + " word" * 299)
    with pytest.raises(openai.BadRequestError) as refused:
        server.openai().chat.completions.create(model=MODEL, messages=messages, max_tokens=9)
    assert refused.value.code == "context_length_exceeded"
    assert all(number in str(refused.value) for number in ("256", "302", "9"))


@pytest.mark.parametrize("stream", [False, True])
def test_truncation_drops_old_turns_and_says_so(server: Running, stream: bool) -> None:
    turns = [
        {"role": "user", "content": "word " * 50},
        {"role": "assistant", "content": "yes " * 40},
    ]
    body: dict[str, Any] = {
        "messages": [*turns * 3, *HELLO],
        "truncation": "auto",
        "max_tokens": 20,
    }
    body["stream"] = stream
    with server.http() as http:
        text = http.post("/v1/chat/completions", json=body).text
    told = json.loads(text.split("\n\n")[0].removeprefix("data: "))["vlmchat_trimmed"]
    assert told["turns"] == 2
    assert told["tokens"] > 180
    assert told["images"] == 0


def test_count_tells_tokens_and_context(server: Running) -> None:
    with server.http() as http:
        told = http.post("/v1/vlmchat/count", json={"messages": _see("one two", RED)}).json()
    assert told == {"tokens": 4 + IMAGE_TOKENS, "image_tokens": IMAGE_TOKENS, "context_length": 256}


def test_models_are_listed(server: Running) -> None:
    (model,) = server.openai().models.list().data
    assert model.id == MODEL
    assert server.openai().models.retrieve(MODEL).id == MODEL


def test_other_model_is_not_found(server: Running) -> None:
    with pytest.raises(openai.NotFoundError) as missing:
        server.openai().chat.completions.create(model="gpt-4o", messages=HELLO)
    assert missing.value.code == "model_not_found"


@pytest.mark.parametrize(
    ("change", "param"),
    [
        ({"tools": [{"type": "function"}]}, "tools"),
        ({"min_p": 0.1}, "min_p"),
        ({"temprature": 1}, "temprature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 3}, "temperature"),
        ({"n": 1000}, "n"),
        ({"n": True}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": 5, "max_completion_tokens": 6}, "max_tokens"),
        ({"stop": [""] * 20}, "stop"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"stream_options": {"include_usage": True}}, "stream_options"),
        ({"logit_bias": {"a": 1}}, "logit_bias"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema"),
        ({"continue_final_message": True}, "continue_final_message"),
        ({"vlmchat_resume": [-1]}, "vlmchat_resume[0]"),
        ({"messages": []}, "messages"),
        ({"messages": [*HELLO, {"role": "assistant", "content": "A"}]}, "messages"),
        ({"messages": [{"role": "tool", "content": "A"}]}, "messages[0].role"),
        (
            {"messages": [{"role": "user", "content": [{"type": "audio"}]}]},
            "messages[0].content[0]",
        ),
        ({"messages": [*HELLO, {"role": "system", "content": "A"}]}, "messages[1].role"),
        (
            {"messages": [{"role": "assistant", "content": "A", "tool_calls": [{}]}, *HELLO]},
            "messages[0].tool_calls",
        ),
        ({"messages": _see("x", "file:///etc/passwd")}, "messages[0].content[0].image_url"),
        ({"messages": _see("x", "/etc/passwd")}, "messages[0].content[0].image_url"),
        ({"messages": _see("x", "http://127.0.0.1/x.png")}, "messages[0].content[0].image_url"),
        ({"messages": _see("x", "http://2130706433/")}, "messages[0].content[0].image_url"),
        ({"messages": _see("x", "http://[::ffff:10.0.0.1]/")}, "messages[0].content[0].image_url"),
        ({"messages": _see("x", "data:image/png;base64,AAAA")}, "messages[0].content[0].image_url"),
    ],
)
def test_bad_request_is_refused_by_name(
    server: Running, change: dict[str, Any], param: str
) -> None:
    with server.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HELLO, **change})
    error = answer.json()["error"]
    assert answer.status_code == 400
    assert error["param"] == param
    assert error["type"] == "invalid_request_error"


def test_parameters_without_effect_are_accepted(server: Running) -> None:
    answer = server.openai().chat.completions.create(
        model=MODEL, messages=HELLO, user="me", metadata={"a": "b"}, tools=[], store=False
    )
    assert answer.choices[0].finish_reason == "stop"


def test_private_address_is_not_told(server: Running) -> None:
    with server.http() as http:
        body = {"messages": _see("x", "http://localhost/secret.png")}
        text = http.post("/v1/chat/completions", json=body).text
    assert "127.0.0.1" not in text
    assert "--allow-private-urls" not in text


def test_too_many_and_too_large_pictures_are_refused(server: Running) -> None:
    large = base64.b64encode(picture(size=(200, 100)).data).decode()
    with server.http() as http:
        many = http.post("/v1/chat/completions", json={"messages": _see("x", *[RED] * 4)})
        body = {"messages": _see("x", f"data:image/png;base64,{large}")}
        too_large = http.post("/v1/chat/completions", json=body)
    assert (many.status_code, too_large.status_code) == (400, 400)
    assert "3 is the most" in many.json()["error"]["message"]
    assert "--max-image-pixels" not in too_large.json()["error"]["message"]


def test_failure_before_the_first_token_has_its_status(
    server: Running, backend: ScriptedBackend
) -> None:
    backend.answers.append(OutOfMemory("no memory is left"))
    with pytest.raises(openai.InternalServerError) as failed:
        server.openai().chat.completions.create(model=MODEL, messages=HELLO, stream=True)
    assert failed.value.status_code == 503
    assert failed.value.code == "out_of_memory"


def test_failure_in_the_middle_is_told_on_the_stream(
    server: Running, backend: ScriptedBackend
) -> None:
    backend.answers.append(OutOfMemory("no memory is left", "so far so good"))
    with server.http() as http:
        text = http.post("/v1/chat/completions", json={"messages": HELLO, "stream": True}).text
    last = json.loads(text.split("\n\n")[-2].removeprefix("data: "))
    assert "good" in text
    assert last["error"]["code"] == "out_of_memory"
    assert "[DONE]" not in text


def test_dead_engine_is_told_and_not_ready() -> None:
    with running(ScriptedBackend([EngineDead("it is dead")])) as up, up.http() as http:
        answer = http.post("/v1/chat/completions", json={"messages": HELLO})
        assert answer.status_code == 503
        assert answer.json()["error"]["code"] == "engine_dead"
        assert http.get("/ready").status_code == 503
        assert http.get("/health").status_code == 200
