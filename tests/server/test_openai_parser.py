"""The request parser under whatever anybody sends: an answer or a typed refusal, nothing else."""

from __future__ import annotations

import json
from typing import Any

import hypothesis.strategies as st
import pytest
from hypothesis import given, settings

from tests.fakes import picture
from vlmchat.conversation import Conversation
from vlmchat.errors import InvalidRequest
from vlmchat.server.app import error_response
from vlmchat.server.openai import _Chat, parse_chat

TEXT = st.text(st.characters(codec=None), max_size=8)  # lone surrogates too
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner),
    max_leaves=8,
)
PART = st.one_of(
    st.fixed_dictionaries({"type": st.sampled_from(["text", "input_text"]), "text": TEXT}),
    st.fixed_dictionaries(
        {
            "type": st.sampled_from(["image_url", "input_image"]),
            "image_url": st.sampled_from(["data:,", {"url": "https://a"}, {"url": 3}]),
        }
    ),
    JSON,
)
MESSAGE = st.fixed_dictionaries(
    {
        "role": st.sampled_from(["system", "user", "assistant", "developer", "tool"]),
        "content": TEXT | st.lists(PART, max_size=3),
    }
)
NAMES = sorted({*_Chat.model_fields, "tools", "user", "min_p", "unheard_of"})
BODY = st.builds(
    lambda messages, extra: {**extra, "messages": messages},
    st.lists(MESSAGE | JSON, max_size=5),
    st.dictionaries(st.sampled_from(NAMES) | TEXT, JSON, max_size=3),
)


@settings(max_examples=400)
@given(BODY | JSON)
def test_parser_takes_or_refuses_whatever_comes(body: Any) -> None:
    try:
        asked = parse_chat(json.loads(json.dumps(body)))
    except InvalidRequest as error:
        refused = error_response(error)
        told = json.loads(bytes(refused.body))["error"]["message"]
        assert (refused.status_code, "\n" in told) == (400, False)
        return
    conversation = asked.conversation([picture()] * len(asked.sources))
    assert conversation.pending is not None
    assert len(asked.choices()) == asked.n


def test_parser_joins_messages_of_one_speaker() -> None:
    said = [("system", "a"), ("developer", "b"), ("user", "c"), ("user", "d")]
    body = {"messages": [{"role": role, "content": text} for role, text in said]}
    conversation: Conversation = parse_chat(body).conversation([])
    assert conversation == Conversation("a\n\nb").ask("c\n\nd")


@pytest.mark.parametrize("name", ["refusal", "tool_calls", "function_call", "audio", "annotations"])
def test_parser_takes_back_an_answer_as_clients_keep_it(name: str) -> None:
    answer = {"role": "assistant", "content": "b", name: None}
    user = {"role": "user", "content": "a"}
    asked = parse_chat({"messages": [user, answer, user]})
    assert len(asked.conversation([]).turns) == 1
