"""OpenAI's chat completions: a request's JSON to our values, our values to its JSON.

Called by the worker's routes. No I/O. What is not served is refused by name; what is accepted
without effect is listed in `WITHOUT_EFFECT`; fields of our own begin with `vlmchat_`.
"""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from difflib import get_close_matches
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from vlmchat.conversation import Conversation, Image, Message, Turn
from vlmchat.errors import InvalidRequest, PromptTooLong, UnsupportedParameter
from vlmchat.openai_wire import write_usage
from vlmchat.request import DrawnToken, FinishReason, Grammar, SamplingParams, Usage
from vlmchat.server.dispatch import prefix_hashes
from vlmchat.server.pictures import Source

MAX_CHOICES = 16
MAX_STOPS = 16
MAX_TOKENS = 2**31 - 1
# Accepted, and without effect here.
WITHOUT_EFFECT = (
    *("user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"),
    *("prompt_cache_retention", "add_generation_prompt"),
)
# Known elsewhere, not served here; fine at the values that ask for nothing.
NOT_SERVED: dict[str, tuple[Any, ...]] = {
    "audio": (),
    "bad_words": ([],),
    "best_of": (1,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "documents": ([],),
    "echo": (False,),
    "function_call": ("none", "auto"),
    "functions": ([],),
    "guided_choice": (),
    "guided_grammar": (),
    "guided_json": (),
    "guided_regex": (),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "modalities": (["text"],),
    "moderation": (),
    "parallel_tool_calls": (True, False),
    "prediction": (),
    "prompt_logprobs": (),
    "reasoning_effort": (),
    "skip_special_tokens": (True,),
    "stop_token_ids": ([],),
    "structured_outputs": (),
    "suffix": ("",),
    "tool_choice": ("none", "auto"),
    "tools": ([],),
    "use_beam_search": (False,),
    "verbosity": (),
    "web_search_options": (),
}
_OF_MESSAGES = ("name", "refusal", "annotations", "audio", "function_call", "tool_calls")
_FINISH = {FinishReason.STOP: "stop", FinishReason.LENGTH: "length"}


class _Schema(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)


class _ImageUrl(_Schema):
    url: str
    detail: Any = None


class _TextPart(_Schema):
    type: Literal["text", "input_text"]
    text: str


class _ImagePart(_Schema):
    type: Literal["image_url", "input_image"]
    image_url: str | _ImageUrl
    detail: Any = None

    @property
    def url(self) -> str:
        return self.image_url if isinstance(self.image_url, str) else self.image_url.url


_Part = Annotated[_TextPart | _ImagePart, Field(discriminator="type")]


class _Message(_Schema):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[_Part] = ""


class _JsonSchema(_Schema):
    name: str = ""
    description: str | None = None
    schema_: dict[str, Any] = Field({}, alias="schema")
    strict: bool | None = True


class _ResponseFormat(_Schema):
    type: Literal["text", "json_object", "json_schema"]
    json_schema: _JsonSchema | None = None


class _StreamOptions(_Schema):
    include_usage: bool | None = False
    include_obfuscation: bool | None = False


class _Chat(_Schema):
    """The parameters that are served."""

    model: str | None = None
    messages: list[_Message] = Field(min_length=1)
    stream: bool = False
    stream_options: _StreamOptions | None = None
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    top_k: int = Field(0, ge=-1, le=MAX_TOKENS)
    max_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    max_completion_tokens: int | None = Field(None, ge=1, le=MAX_TOKENS)
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    seed: int | None = Field(None, ge=0, lt=2**63)
    stop: str | list[str] = []
    logprobs: bool = False
    top_logprobs: int | None = Field(None, ge=0, le=20)
    frequency_penalty: float = Field(0.0, ge=-2, le=2)
    presence_penalty: float = Field(0.0, ge=-2, le=2)
    repetition_penalty: float | None = Field(None, gt=0, le=10)
    logit_bias: dict[str, float] = {}
    ignore_eos: bool = False
    response_format: _ResponseFormat | None = None
    continue_final_message: bool = False
    truncation: Literal["auto", "disabled"] = "disabled"
    vlmchat_token_ids: bool = False
    vlmchat_resume: list[Annotated[int, Field(ge=0, le=MAX_TOKENS)]] = []


_CHAT = TypeAdapter(_Chat)


@dataclass(frozen=True, slots=True)
class ChatRequest:
    """A checked request.

    sources: its pictures, in the order of `conversation(images)`.
    params.max_new_tokens is 0 where the request leaves the length to us.
    characters: of text, to guess its tokens by.
    """

    model: str | None
    sources: tuple[Source, ...]
    conversation: Callable[[Sequence[Image]], Conversation]
    characters: int
    params: SamplingParams
    n: int
    stream: bool
    include_usage: bool
    truncate: bool
    token_ids: bool
    prefixes: tuple[str, ...]

    def choices(self) -> tuple[SamplingParams, ...]:
        """One for each answer: with a seed, each has its own."""
        seed = self.params.seed
        if seed is None:
            return (self.params,) * self.n
        return tuple(replace(self.params, seed=(seed + i) % 2**63) for i in range(self.n))


def parse_chat(body: Any) -> ChatRequest:
    """A request for an answer. Raises InvalidRequest, UnsupportedParameter, with their `param`."""
    chat = _checked(body)
    grammar = _grammar(chat.response_format)
    if chat.stream_options is not None and not chat.stream:
        raise _refused('goes with "stream": true', "stream_options")
    if chat.top_logprobs is not None and not chat.logprobs:
        raise _refused('goes with "logprobs": true', "top_logprobs")
    messages, begun = _split(chat)
    params = SamplingParams(
        temperature=chat.temperature,
        top_p=chat.top_p,
        top_k=max(chat.top_k, 0),
        max_new_tokens=_max_tokens(chat),
        seed=chat.seed,
        stop=_stops(chat.stop),
        logprobs=(chat.top_logprobs or 0) if chat.logprobs else None,
        repetition_penalty=chat.repetition_penalty,
        presence_penalty=chat.presence_penalty,
        frequency_penalty=chat.frequency_penalty,
        logit_bias=_logit_bias(chat.logit_bias),
        ignore_eos=chat.ignore_eos,
        grammar=grammar,
        resume=tuple(chat.vlmchat_resume),
    )
    if params.resume and chat.n > 1:
        raise _refused("goes with one answer only", "vlmchat_resume")
    return ChatRequest(
        model=chat.model,
        sources=tuple(source for message in messages for source in message.sources),
        conversation=lambda images: _conversation(messages, begun, images),
        characters=sum(len(message.text) for message in messages) + len(begun),
        params=params,
        n=chat.n,
        stream=chat.stream,
        include_usage=bool(chat.stream_options and chat.stream_options.include_usage),
        truncate=chat.truncation == "auto",
        token_ids=chat.vlmchat_token_ids,
        prefixes=prefix_hashes(body["messages"]),
    )


def _checked(body: Any) -> _Chat:
    if not isinstance(body, dict):
        raise InvalidRequest("the body is not a JSON object")
    given = {name: value for name, value in body.items() if value is not None}
    for name in list(given):
        if name in WITHOUT_EFFECT:
            del given[name]
        elif name in NOT_SERVED:
            if given.pop(name) not in NOT_SERVED[name]:
                raise _unsupported(f"{name} is not served", name)
        elif name not in _Chat.model_fields:
            close = get_close_matches(name[:64], _Chat.model_fields, n=1)
            hint = f"; is it {close[0]!r}?" if close else ""
            raise _unsupported(f"unknown parameter {name[:64]!r}{hint}", name[:64])
    if isinstance(messages := given.get("messages"), list):
        given["messages"] = [_plain(m, f"messages[{i}]") for i, m in enumerate(messages)]
    try:
        return _CHAT.validate_python(given)
    except ValidationError as error:
        raise _invalid(error) from None


def _plain(message: Any, where: str) -> Any:
    """A message without what says nothing: clients send back all that answers come with."""
    if not isinstance(message, dict):
        return message
    plain = {name: value for name, value in message.items() if value is not None}
    for name in _OF_MESSAGES:
        if plain.pop(name, None):
            raise _unsupported(f"{where}.{name} is not served", f"{where}.{name}")
    return plain


def _invalid(error: ValidationError) -> InvalidRequest:
    """pydantic's complaint, in OpenAI's words for places: messages[0].content[1].text."""
    errors = error.errors(include_url=False, include_context=False, include_input=False)
    first = max(errors, key=lambda one: len(one["loc"]))  # of a union: the one that went furthest
    # Of a union's members pydantic names the types, of tagged ones the tags: no part of the path.
    names = {"text", "input_text", "image_url", "input_image"}
    path = ""
    previous: object = None
    for step in first["loc"]:
        if isinstance(step, int):
            path += f"[{step}]"
        elif (
            not (step in names and isinstance(previous, int))
            and "[" not in step
            and (step not in ("str", "_ImageUrl"))
        ):
            path += f".{step}" if path else step
        previous = step
    message = first["msg"][:1].lower() + first["msg"][1:300]
    return _refused(message, path)


def _refused(message: str, param: str) -> InvalidRequest:
    error = InvalidRequest(f"{param}: {message}" if param else message)
    error.param = param or None
    return error


def _unsupported(message: str, param: str) -> UnsupportedParameter:
    error = UnsupportedParameter(message)
    error.param = param
    return error


def _max_tokens(chat: _Chat) -> int:
    given = {chat.max_tokens, chat.max_completion_tokens} - {None}
    if len(given) > 1:
        raise _refused("differs from max_completion_tokens", "max_tokens")
    return chat.max_completion_tokens or chat.max_tokens or 0


def _stops(stop: str | list[str]) -> tuple[str, ...]:
    stops = (stop,) if isinstance(stop, str) else tuple(stop)
    if len(stops) > MAX_STOPS:
        raise _refused(f"{len(stops)} texts, {MAX_STOPS} is the most", "stop")
    return tuple(text for text in stops if text)


def _logit_bias(bias: dict[str, float]) -> tuple[tuple[int, float], ...]:
    if len(bias) > 1024:
        raise _refused(f"{len(bias)} tokens, 1024 is the most", "logit_bias")
    for token, value in bias.items():
        if not (token.isascii() and token.isdecimal() and len(token) < 10):
            raise _refused(f"{token[:32]!r} is not a token id", "logit_bias")
        if not -100 <= value <= 100:
            raise _refused(f"{value} is not between -100 and 100", "logit_bias")
    return tuple((int(token), value) for token, value in bias.items())


def _grammar(form: _ResponseFormat | None) -> Grammar | None:
    if form is None or form.type == "text":
        return None
    if form.type == "json_object":
        return Grammar("json_object", "")
    if form.json_schema is None:
        raise _refused("is needed for the type json_schema", "response_format.json_schema")
    return Grammar("json_schema", json.dumps(form.json_schema.schema_))


@dataclass(frozen=True, slots=True)
class _Said:
    """A message with its pictures' sources; consecutive ones of a role are one."""

    role: str
    text: str
    sources: tuple[Source, ...]


def _split(chat: _Chat) -> tuple[list[_Said], str]:
    """The messages, the last of them the user's, and how the answer begins."""
    said: list[_Said] = []
    for i, message in enumerate(chat.messages):
        one = _said(message, f"messages[{i}]")
        if one.role == "system" and said and said[-1].role != "system":
            raise _refused("a system message stands before all others", f"messages[{i}].role")
        if one.role == "assistant" and (not said or said[-1].role == "system"):
            raise _refused("the conversation begins with a user message", f"messages[{i}].role")
        if said and said[-1].role == one.role:
            before = said.pop()
            text = "\n\n".join(text for text in (before.text, one.text) if text)
            one = _Said(one.role, text, before.sources + one.sources)
        said.append(one)
    begun = ""
    if chat.continue_final_message:
        if said[-1].role != "assistant":
            raise _refused("the last message is not an assistant's", "continue_final_message")
        begun = said.pop().text
    if said[-1].role != "user":
        raise _refused(
            "the last message must be a user's; to go on from an assistant's, set "
            "continue_final_message",
            "messages",
        )
    return said, begun


def _said(message: _Message, where: str) -> _Said:
    role = "system" if message.role == "developer" else message.role
    if isinstance(message.content, str):
        return _Said(role, message.content, ())
    texts, sources = [], []
    for i, part in enumerate(message.content):
        if isinstance(part, _TextPart):
            texts.append(part.text)
        elif role != "user":
            raise _refused("only a user's message has pictures", f"{where}.content[{i}]")
        else:
            sources.append(Source(part.url, f"{where}.content[{i}].image_url"))
    return _Said(role, "\n".join(texts), tuple(sources))


def _conversation(said: Sequence[_Said], begun: str, images: Sequence[Image]) -> Conversation:
    """Pictures stand before their message's text."""
    left = iter(images)
    system, users, answers = "", [], []
    for one in said:
        if one.role == "system":
            system = one.text
        elif one.role == "assistant":
            answers.append(one.text)
        else:
            users.append(Message("user", one.text, tuple(next(left) for _ in one.sources)))
    *asked, pending = users
    turns = tuple(Turn(user, answer) for user, answer in zip(asked, answers, strict=True))
    return Conversation(system, turns, pending, begun)


def overflow(error: PromptTooLong, context_length: int) -> PromptTooLong:
    """The same error in the words of this wire, with the context length."""
    answer = context_length - error.limit
    of_images = f", {error.image_tokens} of them pictures" if error.image_tokens else ""
    told = PromptTooLong(error.tokens, error.limit, error.image_tokens)
    told.args = (
        f"the context length is {context_length} tokens; the messages have {error.tokens}"
        f"{of_images}, and the answer needs at least {answer}: shorten the messages, lower "
        'max_tokens, or send "truncation": "auto"',
    )
    told.param = "messages"
    return told


@dataclass(frozen=True, slots=True)
class Dropped:
    """How much truncation dropped. tokens: None where the backend cannot count them."""

    turns: int = 0
    tokens: int | None = 0
    images: int = 0


class Reply:
    """One answer's JSON, whole or in chunks."""

    def __init__(self, request: ChatRequest, model: str, dropped: Dropped) -> None:
        self._request = request
        self._head: dict[str, Any] = {
            "id": f"chatcmpl-{uuid.uuid4().hex}",
            "object": "chat.completion.chunk" if request.stream else "chat.completion",
            "created": int(time.time()),
            "model": model,
        }
        self._trimmed: dict[str, Any] = {}
        if request.truncate:
            self._trimmed["vlmchat_trimmed"] = asdict(dropped)

    def first_chunk(self, choice: int) -> dict[str, Any]:
        """Before anything is said."""
        return self._chunk(choice, {"role": "assistant", "content": ""}) | self._trimmed

    def chunk(self, choice: int, text: str, said: Said) -> dict[str, Any]:
        """Some text, with the tokens that it came of where the request asks for them."""
        chunk = self._chunk(choice, {"content": text} if text else {}, said.finish_reason)
        if said.tokens:
            chunk["choices"][0]["logprobs"] = _logprobs(said.tokens)
        if self._request.token_ids:
            chunk["vlmchat_token_ids"] = list(said.token_ids)
        return chunk

    def usage_chunk(self, usage: Usage) -> dict[str, Any]:
        """The last one, for who asked for it."""
        return {**self._head, "choices": [], "usage": write_usage(usage)}

    def whole(self, choices: Sequence[Said], usage: Usage) -> dict[str, Any]:
        """Everything in one object."""
        listed = []
        for index, said in enumerate(choices):
            choice: dict[str, Any] = {
                "index": index,
                "message": {"role": "assistant", "content": said.text, "refusal": None},
                "logprobs": _logprobs(said.tokens)
                if self._request.params.logprobs is not None
                else None,
                "finish_reason": said.finish_reason,
            }
            if self._request.token_ids:
                choice["vlmchat_token_ids"] = list(said.token_ids)
            listed.append(choice)
        return {**self._head, "choices": listed, "usage": write_usage(usage), **self._trimmed}

    def _chunk(
        self, choice: int, delta: dict[str, Any], finish_reason: str | None = None
    ) -> dict[str, Any]:
        one = {"index": choice, "delta": delta, "logprobs": None, "finish_reason": finish_reason}
        return {**self._head, "choices": [one]}


@dataclass(slots=True)
class Said:
    """What was said of one answer: of all of it, or since the last chunk."""

    text: str = ""
    finish_reason: str | None = None
    tokens: tuple[DrawnToken, ...] = ()
    token_ids: tuple[int, ...] = ()


def finish_reason(reason: FinishReason) -> str:
    """OpenAI's word for it. Raises KeyError for an answer that was cancelled."""
    return _FINISH[reason]


def total(usages: Iterable[Usage]) -> Usage:
    """Of several answers to one prompt, which counts once."""
    every = list(usages)
    if not every:
        return Usage(0, 0, 0, 0)
    return replace(every[0], completion_tokens=sum(usage.completion_tokens for usage in every))


def _logprobs(tokens: Sequence[DrawnToken]) -> dict[str, Any]:
    def one(token_id: int, token: str, logprob: float) -> dict[str, Any]:
        return {
            "token": token,
            "logprob": max(logprob, -9999.0),  # JSON has no infinity
            "bytes": list(token.encode("utf-8", "replace")),
            "vlmchat_id": token_id,
        }

    content = []
    for token in tokens:
        drawn = one(token.drawn.token_id, token.drawn.token, token.drawn.logprob)
        top = [one(t.token_id, t.token, t.logprob) for t in token.top]
        content.append({**drawn, "top_logprobs": top})
    return {"content": content, "refusal": None}


def model_object(model: str, context_length: int, created: int) -> dict[str, Any]:
    """An entry of /v1/models."""
    return {
        "id": model,
        "object": "model",
        "created": created,
        "owned_by": "vlmchat",
        "max_model_len": context_length,
        "capabilities": ["completion", "multimodal"],
    }


def event(data: dict[str, Any] | str) -> bytes:
    """A server-sent event."""
    text = data if isinstance(data, str) else json.dumps(data, separators=(",", ":"))
    return b"data: " + text.encode("utf-8", "replace") + b"\n\n"
