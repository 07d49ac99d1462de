"""OpenAI's chat completions, as values: bodies from and to conversations, answers, errors.

Used by the batch runner (bodies come in) and the client (bodies go out). Knows nothing of HTTP,
files or models: pictures are opened by whoever is handed in.

A `Conversation` has one system prompt, turns, and a last question, and pictures stand before the
words of a message: what does not fit this is refused by name, but for the place of pictures among
the words of one message, which is not kept.
"""

from __future__ import annotations

import json
import time
from base64 import b64encode
from collections.abc import Callable, Mapping
from dataclasses import replace
from io import BytesIO
from typing import Any

from PIL import Image as PILImage

from vlmchat.config import sampling_params
from vlmchat.conversation import Conversation, Image, Message
from vlmchat.errors import ConfigError, InvalidRequest, VlmchatError
from vlmchat.request import DrawnToken, FinishReason, Grammar, SamplingParams, Usage

Body = dict[str, Any]
LoadImage = Callable[[str], Image]

# Accepted, and without effect on the answer.
WITHOUT_EFFECT = (
    *("model", "user", "metadata", "store", "service_tier", "safety_identifier"),
    *("prompt_cache_key", "prompt_cache_retention", "stream", "stream_options"),
)
# OpenAI's name -> SamplingParams' name, for what goes over as it is.
_SAME = {
    **{name: name for name in ("temperature", "top_p", "top_k", "seed", "ignore_eos")},
    **{f"{name}_penalty": f"{name}_penalty" for name in ("repetition", "presence", "frequency")},
    "max_tokens": "max_new_tokens",
    "max_completion_tokens": "max_new_tokens",
    "max_new_tokens": "max_new_tokens",
}
_FLAGS = ("ignore_eos",)
_WHOLE = ("top_k", "seed", "max_tokens", "max_completion_tokens", "max_new_tokens", "top_logprobs")
_ELSEWHERE = ("messages", "n", "stop", "logprobs", "top_logprobs", "logit_bias", "response_format")
_PASSED_ON = {"JPEG": "image/jpeg", "PNG": "image/png"}  # formats that every server reads
_EXIF_ORIENTATION = 0x0112


def read_conversation(messages: Any, load: LoadImage) -> Conversation:
    """The conversation in `messages`; `load` opens each picture, by the URL or path given.

    Raises InvalidRequest, and whatever `load` does.
    """
    if not isinstance(messages, list) or not messages:
        raise InvalidRequest("messages must be a list with at least one message")
    conversation, systems = Conversation(), []
    for index, message in enumerate(messages):
        where = f"messages[{index}]"
        if not isinstance(message, dict):
            raise InvalidRequest(f"{where} is not an object")
        text, images = _read_content(message.get("content"), where, load)
        role = message.get("role")
        if images and role != "user":
            raise InvalidRequest(f"{where}: only a user's message may hold pictures")
        if role in ("system", "developer"):
            if conversation.turns or conversation.pending:
                raise InvalidRequest(f"{where}: a {role} message must come first")
            systems.append(text)
        elif role == "user":
            if conversation.pending is not None:
                raise InvalidRequest(f"{where} follows another user message; join them into one")
            conversation = conversation.ask(text, images)
        elif role == "assistant":
            if conversation.pending is None:
                raise InvalidRequest(f"{where}: an assistant message must follow a user message")
            conversation = conversation.answered(text)
        else:
            raise InvalidRequest(f"{where}: role {role!r} is none of system, user, assistant")
    if conversation.pending is None:
        raise InvalidRequest("the last message must be a user's")
    return Conversation("\n\n".join(systems), conversation.turns, conversation.pending)


def _read_content(content: Any, where: str, load: LoadImage) -> tuple[str, tuple[Image, ...]]:
    if isinstance(content, str):
        return content, ()
    if not isinstance(content, list):
        raise InvalidRequest(f"{where}.content must be a text or a list of parts")
    texts, images = [], []
    for number, part in enumerate(content):
        kind = part.get("type") if isinstance(part, dict) else None
        if kind in ("text", "input_text") and isinstance(part.get("text"), str):
            texts.append(part["text"])
        elif kind in ("image_url", "input_image"):
            given = part.get("image_url")
            url = given.get("url") if isinstance(given, dict) else given
            if not isinstance(url, str):
                raise InvalidRequest(f"{where}.content[{number}].image_url holds no url")
            images.append(load(url))
        else:
            raise InvalidRequest(f"{where}.content[{number}] is neither a text nor an image_url")
    return "\n".join(texts), tuple(images)


def read_params(body: Mapping[str, Any], defaults: SamplingParams) -> SamplingParams:
    """The parameters in `body`, with `defaults` for what it does not say.

    Raises InvalidRequest for a parameter that is not known, and for a bad value, by name.
    """
    unknown = [key for key in body if key not in (*_SAME, *_ELSEWHERE, *WITHOUT_EFFECT)]
    if unknown:
        raise InvalidRequest(f"the parameter {unknown[0]!r} is not served")
    if body.get("n") not in (None, 1):
        raise InvalidRequest(f"n is {body['n']!r}; one answer to a request is all that is served")
    values = {name: getattr(defaults, name) for name in defaults.__dataclass_fields__}
    for key, name in _SAME.items():
        if body.get(key) is not None:
            values[name] = _read_value(key, body[key])
    values |= _read_others(body)
    checked_there = sampling_params.__kwdefaults__
    try:
        checked = sampling_params(**{name: values[name] for name in checked_there})
    except ConfigError as error:
        option, space, rest = error.message.partition(" ")
        raise InvalidRequest(option.removeprefix("--").replace("-", "_") + space + rest) from None
    return replace(checked, **values)


def _read_value(key: str, value: Any) -> Any:
    kinds: tuple[type, ...] = (
        (bool,) if key in _FLAGS else (int,) if key in _WHOLE else (int, float)
    )
    if not isinstance(value, kinds) or (isinstance(value, bool) and key not in _FLAGS):
        wanted = "true or false" if key in _FLAGS else f"a {'whole ' * (key in _WHOLE)}number"
        raise InvalidRequest(f"{key} is {value!r}; it must be {wanted}")
    return value


def _read_others(body: Mapping[str, Any]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    stop = body.get("stop")
    if stop is not None:
        texts = [stop] if isinstance(stop, str) else stop
        if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
            raise InvalidRequest("stop must be a text or a list of texts")
        values["stop"] = tuple(texts)
    if body.get("logprobs") not in (None, False):
        asked = body["logprobs"]
        count = body.get("top_logprobs") or 0 if asked is True else asked
        values["logprobs"] = _read_value("top_logprobs", count)
    if (bias := body.get("logit_bias")) is not None:
        try:
            values["logit_bias"] = tuple((int(token), float(b)) for token, b in bias.items())
        except (AttributeError, TypeError, ValueError):
            raise InvalidRequest("logit_bias must map token ids to numbers") from None
    if (form := body.get("response_format")) is not None:
        values["grammar"] = _read_grammar(form)
    return values


def _read_grammar(form: Any) -> Grammar | None:
    kind = form.get("type") if isinstance(form, dict) else None
    if kind == "text":
        return None
    if kind == "json_object":
        return Grammar("json_object", "")
    schema = form["json_schema"].get("schema") if _holds_schema(form) else None
    if kind == "json_schema" and isinstance(schema, dict):
        return Grammar("json_schema", json.dumps(schema))
    raise InvalidRequest(
        "response_format must be of type text, json_object, or json_schema with a schema"
    )


def _holds_schema(form: Any) -> bool:
    return isinstance(form, dict) and isinstance(form.get("json_schema"), dict)


def write_body(conversation: Conversation, params: SamplingParams, model: str) -> Body:
    """The body that asks for a streamed answer. Raises InvalidRequest for what the wire has not.

    Only what differs from being off is named, so that servers that know less take it too.
    """
    if params.grammar is not None and not params.grammar.kind.startswith("json"):
        raise InvalidRequest(f"a {params.grammar.kind} grammar cannot be asked of a server")
    off = SamplingParams()
    names = ("top_k", "seed", "repetition_penalty", "presence_penalty", "frequency_penalty")
    extras = {name: getattr(params, name) for name in (*names, "ignore_eos")}
    body: Body = {
        "model": model,
        "messages": write_messages(conversation),
        "temperature": params.temperature,
        "top_p": params.top_p,
        "max_tokens": params.max_new_tokens,
        **{name: value for name, value in extras.items() if value != getattr(off, name)},
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    if params.stop:
        body["stop"] = list(params.stop)
    if params.logprobs is not None:
        body |= {"logprobs": True, "top_logprobs": params.logprobs}
    if params.logit_bias:
        body["logit_bias"] = {str(token): bias for token, bias in params.logit_bias}
    if params.grammar is not None:
        body["response_format"] = _write_grammar(params.grammar)
    return body


def _write_grammar(grammar: Grammar) -> Body:
    if grammar.kind == "json_object":
        return {"type": "json_object"}
    schema = {"name": "answer", "schema": json.loads(grammar.text), "strict": True}
    return {"type": "json_schema", "json_schema": schema}


def write_messages(conversation: Conversation) -> list[Body]:
    """All messages; pictures go along as data URLs."""
    return [_write_message(message) for message in conversation.messages()]


def _write_message(message: Message) -> Body:
    if not message.images:
        return {"role": message.role, "content": message.text}
    parts: list[Body] = [
        {"type": "image_url", "image_url": {"url": data_url(image)}} for image in message.images
    ]
    return {"role": message.role, "content": [*parts, {"type": "text", "text": message.text}]}


def data_url(image: Image) -> str:
    """The picture as a data URL: its file where every server sees in it what we see, else PNG."""
    kind, data = _passed_on(image), image.data
    if kind is None:
        file = BytesIO()
        image.pixels.save(file, "PNG", compress_level=1)
        kind, data = "image/png", file.getvalue()
    return f"data:{kind};base64,{b64encode(data).decode()}"


def _passed_on(image: Image) -> str | None:
    """The media type of a file that needs no turning, no background and fewer than 9 bits."""
    opened = PILImage.open(BytesIO(image.data)) if image.data[:1] in (b"\xff", b"\x89") else None
    if opened is None or opened.mode not in ("RGB", "L") or "transparency" in opened.info:
        return None
    if opened.getexif().get(_EXIF_ORIENTATION, 1) != 1:
        return None
    return _PASSED_ON.get(opened.format or "")


def write_completion(
    id: str,
    model: str,
    text: str,
    reason: FinishReason,
    usage: Usage | None,
    tokens: tuple[DrawnToken, ...] = (),
) -> Body:
    """A finished answer as a `chat.completion` object."""
    choice = {
        "index": 0,
        "message": {"role": "assistant", "content": text, "refusal": None},
        "logprobs": {"content": [_write_token(token) for token in tokens]} if tokens else None,
        "finish_reason": str(reason),
    }
    head = {"id": id, "object": "chat.completion", "created": int(time.time()), "model": model}
    return {**head, "choices": [choice], "usage": usage and write_usage(usage)}


def write_usage(usage: Usage) -> Body:
    """Token counts in OpenAI's form; `image_tokens` is an addition."""
    return {
        "prompt_tokens": usage.prompt_tokens,
        "completion_tokens": usage.completion_tokens,
        "total_tokens": usage.prompt_tokens + usage.completion_tokens,
        "prompt_tokens_details": {
            "cached_tokens": usage.cached_tokens,
            "image_tokens": usage.image_tokens,
        },
    }


def _write_token(token: DrawnToken) -> Body:
    def one(text: str, logprob: float) -> Body:
        encoded = list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": logprob, "bytes": encoded}

    top = [one(other.token, other.logprob) for other in token.top]
    return {**one(token.drawn.token, token.drawn.logprob), "top_logprobs": top}


def write_error(error: VlmchatError) -> Body:
    """OpenAI's error object: the code is that of our error tree."""
    kind = "invalid_request_error" if error.http_status < 500 else "server_error"
    inner = {"message": error.message, "type": kind, "param": None, "code": error.code}
    return {"error": inner}
