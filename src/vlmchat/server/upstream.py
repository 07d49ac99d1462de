"""Somebody else's OpenAI-compatible server as the worker's backend.

Made by `commands/worker` for `--upstream`. What `client.Client` does for people at a terminal, with
what LLaVA's wire needs besides: prompts that come rendered are read back into messages, for a
server renders them by itself.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from itertools import count

from vlmchat.client import Client
from vlmchat.conversation import Conversation, Image, Message
from vlmchat.errors import ConfigError, InvalidRequest, UnsupportedParameter
from vlmchat.request import PromptSize, SamplingParams, Status, Stream

IMAGE_MARKER = "<image>"
# How LLaVA's templates mark who speaks, the role in the first group, and what ends a part.
_STYLES = (
    (re.compile(r"<\|im_start\|>(system|user|assistant)\n"), ("<|im_end|>",)),
    (re.compile(r"(?:###)(Human|Assistant):"), ("###",)),
    (re.compile(r"(?:(?<=\s)|(?<=</s>)|^)(USER|ASSISTANT):"), ("</s>",)),
    (re.compile(r"(?:<s>)?\[(/?INST)\]"), ("</s>",)),
)
_USERS, _SYSTEM = ("user", "Human", "USER", "INST"), "system"
_LLAMA_2_SYSTEM = re.compile(r"\s*<<SYS>>\n(.*?)\n<</SYS>>\n\n", re.DOTALL)


class Upstream:
    """A server at `url` behind a worker."""

    def __init__(self, url: str, api_key: str | None = None, model: str | None = None) -> None:
        """model: its name there, where it has several. Raises what `Client` does."""
        try:
            self._client = Client(url, api_key)
        except ConfigError:
            if model is None:
                raise
            self._client = Client(url, api_key, model)

    def stream(self, conversation: Conversation, params: SamplingParams) -> Stream:
        """See `Backend.stream`. Raises UnsupportedParameter for what the wire has no words for."""
        if params.resume:
            raise UnsupportedParameter("vlmchat_resume is not served by the server behind this one")
        return self._client.stream(_plain(conversation), params)

    def count(self, conversation: Conversation) -> PromptSize | None:
        """See `Backend.count`."""
        return self._client.count(_plain(conversation))

    def status(self) -> Status:
        """See `Backend.status`; context_length 0: the server does not tell."""
        return self._client.status()

    def close(self) -> None:
        """See `Backend.close`."""
        self._client.close()


def _plain(conversation: Conversation) -> Conversation:
    if conversation.begun:
        raise UnsupportedParameter(
            "continue_final_message is not served by the server behind this one"
        )
    if not conversation.rendered:
        return conversation
    return read_rendered(conversation.rendered, conversation.images)


def read_rendered(prompt: str, images: Sequence[Image]) -> Conversation:
    """The conversation that one of LLaVA's templates has rendered; pictures by their places.

    A prompt in no known format is one question. Raises InvalidRequest where pictures and places
    differ in number, or the prompt does not ask for an answer.
    """
    for pattern, ends in _STYLES:
        marks = list(pattern.finditer(prompt))
        if marks:
            return _read(prompt, marks, ends, images)
    return _with_images([Message("user", prompt)], images)


def _read(
    prompt: str, marks: list[re.Match[str]], ends: tuple[str, ...], images: Sequence[Image]
) -> Conversation:
    messages = [Message("system", _part(prompt[: marks[0].start()], ends))]
    for number, mark in zip(count(1), marks, strict=False):
        stop = marks[number].start() if number < len(marks) else len(prompt)
        text = _part(prompt[mark.end() : stop], ends)
        if mark[1] in _USERS:
            messages.append(Message("user", text))
        else:
            messages.append(Message("system" if mark[1] == _SYSTEM else "assistant", text))
    if messages[-1].role != "assistant" or messages[-1].text:
        raise InvalidRequest("the prompt does not end where an answer begins")
    return _with_images(messages[:-1], images)


def _part(text: str, ends: tuple[str, ...]) -> str:
    text = text.strip()
    for end in ends:
        text = text.removesuffix(end)
    return text.strip()


def _with_images(messages: list[Message], images: Sequence[Image]) -> Conversation:
    if sum(message.text.count(IMAGE_MARKER) for message in messages) != len(images):
        raise InvalidRequest(f"the prompt's places for pictures are not {len(images)}")
    left, system, conversation = iter(images), "", Conversation()
    for message in messages:
        text = message.text
        if message.role == "user" and (found := _LLAMA_2_SYSTEM.match(text)):
            system, text = found[1], text[found.end() :]
        own = tuple(next(left) for _ in range(text.count(IMAGE_MARKER)))
        text = text.replace(IMAGE_MARKER, "").strip()
        if message.role == "system":
            system = system or text
        elif message.role == "user":
            conversation = conversation.ask(text, own)
        elif conversation.pending is not None:
            conversation = conversation.answered(text)
    return Conversation(system, conversation.turns, conversation.pending)
