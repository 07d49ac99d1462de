"""The client against a real socket: what it sends, what it makes of answers, and that it ends."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from tests.fakes import ScriptedBackend, picture
from tests.openai_server import OpenAIServer
from vlmchat.client import Client
from vlmchat.conversation import Conversation, Turn
from vlmchat.errors import (
    ConfigError,
    EngineDead,
    ImageRejected,
    InvalidRequest,
    ModelNotFound,
    NetworkError,
    NoWorker,
    Overloaded,
    PromptTooLong,
    Unauthorized,
    VlmchatError,
)
from vlmchat.request import Delta, FinishReason, PromptSize, SamplingParams
from vlmchat.session import ChatSession

QUESTION = Conversation("Be brief.").ask("what is it")
PARAMS = SamplingParams(temperature=0, max_new_tokens=20)
Connect = Callable[..., Client]


@pytest.fixture
def server() -> Iterator[OpenAIServer]:
    with OpenAIServer(ScriptedBackend(context_length=200)) as server:
        yield server
        server.shutdown()


@pytest.fixture
def connect(server: OpenAIServer) -> Iterator[Connect]:
    clients: list[Client] = []

    def make(url: str | None = None, **options: Any) -> Client:
        clients.append(Client(url or server.url, **options))
        return clients[-1]

    yield make
    for client in clients:
        client.close()


def _text(deltas: list[Delta]) -> str:
    return "".join(delta.text for delta in deltas)


def _turns(count: int) -> Conversation:
    turns = tuple(Turn(Conversation().ask(f"q{n}").pending, "a " * 20) for n in range(count))  # type: ignore[arg-type]
    return Conversation(turns=turns)


def test_client_streams_an_answer_and_ends_with_its_counts(connect: Connect) -> None:
    *pieces, last = connect().stream(QUESTION, PARAMS)
    assert _text(pieces) == "You said: what is it"
    assert len(pieces) == 5
    assert (last.finish_reason, last.usage and last.usage.completion_tokens) == ("stop", 5)
    assert last.timings is not None
    assert 0 < last.timings.first_token_s <= last.timings.total_s


def test_client_sends_pictures_turns_and_system_prompt_as_they_are(
    server: OpenAIServer, connect: Connect
) -> None:
    history = QUESTION.ask("a", (picture(),)).answered("b").ask("c", (picture(color="blue"),))
    list(connect().stream(history, PARAMS))
    assert server.backend.seen == [history]
    assert server.backend.params[0].temperature == 0


def test_client_tells_cached_and_image_tokens(connect: Connect) -> None:
    client, asked = connect(), QUESTION.ask("x", (picture(),))
    list(client.stream(asked, PARAMS))
    usage = list(client.stream(asked, PARAMS))[-1].usage
    assert usage is not None
    assert (usage.image_tokens, usage.cached_tokens) == (16, usage.prompt_tokens)


@pytest.mark.parametrize("ending", ["", "/", "/v1", "/v1/", "/v1/chat/completions"])
def test_client_takes_an_address_with_or_without_its_end(
    server: OpenAIServer, connect: Connect, ending: str
) -> None:
    assert connect(server.url + ending).status().model == "m"


@pytest.mark.parametrize("url", ["127.0.0.1:8000", "ftp://host", "http://", "http://a:b:c"])
def test_client_refuses_what_is_no_address(url: str) -> None:
    with pytest.raises(ConfigError, match="--server"):
        Client(url)


@pytest.mark.parametrize(
    "entry", [{"max_model_len": 77}, {"context_length": 77}, {"meta": {"n_ctx": 77}}]
)
def test_client_reads_the_context_length_where_it_is_told(
    server: OpenAIServer, connect: Connect, entry: dict[str, Any]
) -> None:
    assert connect().status().context_length == 0
    server.models = [{"id": "m", **entry}]
    assert connect().status().context_length == 77


def test_client_asks_for_a_choice_where_there_are_several_models(
    server: OpenAIServer, connect: Connect
) -> None:
    server.models = [{"id": "a"}, {"id": "b"}]
    with pytest.raises(ConfigError, match="several models: a, b; name one with --model-path"):
        Client(server.url)
    assert connect(model="b").status().model == "b"


def test_client_sends_its_key(server: OpenAIServer, connect: Connect) -> None:
    server.api_key = "secret"
    with pytest.raises(Unauthorized, match="Incorrect API key provided; --api-key"):
        Client(server.url)
    assert _text(list(connect(api_key="secret").stream(QUESTION, PARAMS)))


def test_client_fails_where_nobody_listens(server: OpenAIServer) -> None:
    url = server.url
    server.shutdown()
    server.server_close()
    with pytest.raises(NetworkError, match=r"127\.0\.0\.1"):
        Client(url)


def test_client_gives_up_a_server_that_is_silent(server: OpenAIServer, connect: Connect) -> None:
    server.backend.delay_s = 30
    with pytest.raises(NetworkError, match="did not answer in time"):
        list(connect(timeout_s=0.2).stream(QUESTION, PARAMS))


def test_client_closes_the_connection_when_cancelled(
    server: OpenAIServer, connect: Connect
) -> None:
    server.backend.answers = ["word " * 400]
    server.backend.delay_s = 0.01
    stream = connect().stream(QUESTION, SamplingParams(max_new_tokens=150))
    assert next(stream).text
    stream.cancel()
    assert list(stream)[-1].finish_reason is FinishReason.CANCELLED
    assert server.hung_up.wait(10)


def test_client_can_be_cancelled_before_the_server_has_answered(
    server: OpenAIServer, connect: Connect
) -> None:
    client = connect()
    server.refusals = [(429, {"Retry-After": "30"}, {})]
    stream = client.stream(QUESTION, PARAMS)
    threading.Timer(0.1, stream.cancel).start()
    assert [delta.finish_reason for delta in stream] == [FinishReason.CANCELLED]


def test_client_asks_a_busy_server_again_when_it_says_so(
    server: OpenAIServer, connect: Connect
) -> None:
    client = connect()
    busy = {"error": {"message": "slow down"}}
    server.refusals = [(429, {"Retry-After": "0"}, busy), (503, {"Retry-After": "0"}, busy)]
    assert _text(list(client.stream(QUESTION, PARAMS))) == "You said: what is it"
    server.refusals = [(429, {"Retry-After": "0"}, busy)] * 5
    with pytest.raises(Overloaded, match="slow down"):
        list(client.stream(QUESTION, PARAMS))
    assert server.refusals == []


@pytest.mark.parametrize(
    ("status", "body", "kind", "words"),
    [
        pytest.param(
            400, {"error": {"message": "bad top_p"}}, InvalidRequest, "bad top_p", id="ours"
        ),
        pytest.param(
            422,
            {"error": {"message": "p.png is broken", "code": "image_rejected"}},
            ImageRejected,
            "p.png is broken",
            id="code",
        ),
        pytest.param(
            404, {"error": {"message": "no model x"}}, ModelNotFound, "no model x", id="404"
        ),
        pytest.param(413, "too big", InvalidRequest, "too big", id="text"),
        pytest.param(400, {"detail": "no"}, InvalidRequest, "no", id="fastapi"),
        pytest.param(400, {"error": "flat"}, InvalidRequest, "flat", id="ollama"),
        pytest.param(500, {"error": {"message": "ouch"}}, NetworkError, "failed: ouch", id="500"),
        pytest.param(502, "<html>", NetworkError, "failed: <html>", id="proxy"),
        pytest.param(
            503,  # not asked again: the controller has waited
            {"error": {"message": "no worker for m came", "code": "no_worker"}},
            NoWorker,
            "no worker for m came",
            id="no worker",
        ),
    ],
)
def test_client_makes_errors_of_ours_of_a_servers(
    server: OpenAIServer,
    connect: Connect,
    status: int,
    body: Any,
    kind: type[VlmchatError],
    words: str,
) -> None:
    client = connect()
    server.refusals = [(status, {}, body)]
    with pytest.raises(kind, match=words) as info:
        list(client.stream(QUESTION, PARAMS))
    assert type(info.value) is kind


@pytest.mark.parametrize(
    ("body", "numbers"),
    [
        pytest.param(
            {
                "message": "This model's maximum context length is 4096 tokens. However, your "
                "request has 5000 input tokens. Please reduce the length of the input messages.",
                "code": 400,
            },
            (5000, 4096),
            id="vllm",
        ),
        pytest.param(
            {
                "error": {
                    "code": 400,
                    "message": "the request exceeds the available context size",
                    "type": "exceed_context_size_error",
                    "n_prompt_tokens": 900,
                    "n_ctx": 512,
                }
            },
            (900, 512),
            id="llama.cpp",
        ),
        pytest.param(
            {
                "error": {
                    "message": "the message needs 300 tokens, the context has room for 200; …",
                    "code": "context_length_exceeded",
                }
            },
            (300, 200),
            id="ours",
        ),
        pytest.param(
            {"error": {"message": "no", "code": "context_length_exceeded"}}, (0, 0), id="untold"
        ),
    ],
)
def test_client_reads_how_much_too_long_a_prompt_is(
    server: OpenAIServer, connect: Connect, body: Any, numbers: tuple[int, int]
) -> None:
    client = connect()
    server.refusals = [(400, {}, body)]
    with pytest.raises(PromptTooLong) as info:
        list(client.stream(QUESTION, PARAMS))
    assert (info.value.tokens, info.value.limit) == numbers


def test_client_fails_when_the_server_fails_in_mid_answer(
    server: OpenAIServer, connect: Connect
) -> None:
    server.backend.answers = [EngineDead("the engine failed", "half an answer")]
    stream = connect().stream(QUESTION, PARAMS)
    assert next(stream).text == "half"
    with pytest.raises(NetworkError, match="the engine failed"):
        list(stream)


def test_client_fails_when_the_connection_breaks_in_mid_answer(
    server: OpenAIServer, connect: Connect
) -> None:
    server.cut_after = 2
    with pytest.raises(NetworkError):
        list(connect().stream(QUESTION, PARAMS))


def test_client_counts_where_the_server_does(server: OpenAIServer, connect: Connect) -> None:
    assert connect().count(QUESTION) is None
    server.counts = True
    client = connect()
    asked = QUESTION.ask("x", (picture(),))
    assert client.count(asked) == PromptSize(tokens=23, image_tokens=16)
    assert client.status().context_length == 200


@pytest.mark.parametrize(
    "counts", [pytest.param(True, id="counted"), pytest.param(False, id="not")]
)
def test_session_on_a_server_drops_the_oldest_turns_and_says_so(
    server: OpenAIServer, connect: Connect, counts: bool
) -> None:
    server.counts = counts
    session = ChatSession(connect(), PARAMS, _turns(10))
    with session.ask("and now") as reply:
        list(reply)
    assert reply.trimmed.turns > 0
    assert (reply.trimmed.tokens is not None) == counts
    assert len(session.conversation.turns) == 11 - reply.trimmed.turns
    assert len(session.forgotten) == reply.trimmed.turns


def test_session_on_a_server_that_does_not_count_refuses_a_question_too_long(
    server: OpenAIServer, connect: Connect
) -> None:
    history = _turns(2)
    session = ChatSession(connect(), PARAMS, history)
    with pytest.raises(PromptTooLong, match="room for 200"), session.ask("word " * 300) as reply:
        list(reply)
    assert session.conversation == history


def test_session_on_a_server_that_does_not_count_keeps_the_questions_own_pictures(
    server: OpenAIServer, connect: Connect
) -> None:
    old, own = (picture(color=f"#{n:06x}") for n in (1, 2))
    history = Conversation().ask("old", (old,) * 12).answered("ok")
    session = ChatSession(connect(), PARAMS, history)
    with session.ask("and this", (own,)) as reply:
        list(reply)
    assert reply.trimmed.turns == 1
    assert reply.conversation.images[-1] == own
    assert 0 < len(reply.trimmed.images) < 12


def test_client_is_closed_while_an_answer_is_on_its_way(
    server: OpenAIServer, connect: Connect
) -> None:
    server.backend.answers = ["word " * 400]
    server.backend.delay_s = 0.01
    client = connect()
    stream = client.stream(QUESTION, SamplingParams(max_new_tokens=150))
    next(stream)
    client.close()
    with pytest.raises(NetworkError, match="closed"):
        list(stream)
    with pytest.raises(NetworkError, match="closed"):
        client.stream(QUESTION, PARAMS)
