"""Stand-ins for the tests: a `Backend` that says what it was told to say, exactly counted.

No torch, no model. Words are tokens, a picture is `IMAGE_TOKENS` of them. Runs as fast or as
slowly as a test wants, fails on demand, and can be stopped like the real one.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from io import BytesIO

from PIL import Image as PILImage

from vlmchat.config import ImagePolicy
from vlmchat.conversation import Conversation, Image
from vlmchat.errors import EngineDead, PromptTooLong
from vlmchat.images import ImageLoader
from vlmchat.request import (
    Delta,
    DrawnToken,
    FinishReason,
    Logprob,
    PromptSize,
    SamplingParams,
    Status,
    Timings,
    Usage,
)

IMAGE_TOKENS = 16
MESSAGE_TOKENS = 2  # what a chat template puts around each message
_WORD = re.compile(r"\s*\S+|\s+$")


def words(text: str) -> list[str]:
    """The tokens of a text; joined they are the text again."""
    return _WORD.findall(text)


def picture(source: str = "red.png", color: str = "red", size: tuple[int, int] = (8, 6)) -> Image:
    """A picture of one colour, as the loader would hand it out."""
    file = BytesIO()
    PILImage.new("RGB", size, color).save(file, "PNG")
    return ImageLoader(ImagePolicy()).load_bytes(file.getvalue(), source)


class ScriptedStream:
    """One scripted answer under way."""

    def __init__(
        self, answer: str | Exception, usage: Usage, params: SamplingParams, delay_s: float
    ) -> None:
        self._cancelled = threading.Event()
        self._deltas = self._run(answer, usage, params, delay_s)

    def __iter__(self) -> Iterator[Delta]:
        return self

    def __next__(self) -> Delta:
        return next(self._deltas)

    def cancel(self) -> None:
        self._cancelled.set()

    def _run(
        self, answer: str | Exception, usage: Usage, params: SamplingParams, delay_s: float
    ) -> Iterator[Delta]:
        start = time.monotonic()
        if isinstance(answer, Exception):
            said = words(str(answer.args[1])) if len(answer.args) > 1 else []
        else:
            said = words(answer)
        count = len(params.resume)  # words are tokens; their places are their ids
        first_s, reason = 0.0, FinishReason.STOP
        for word in said[count:]:
            if count == params.max_new_tokens:
                reason = FinishReason.LENGTH
                break
            if self._cancelled.wait(delay_s) if delay_s else self._cancelled.is_set():
                reason = FinishReason.CANCELLED
                break
            count += 1
            first_s = first_s or time.monotonic() - start
            tokens = (_drawn(word),) if params.logprobs is not None else ()
            yield Delta(word, tokens=tokens, token_ids=(count - 1,))
        if isinstance(answer, Exception):
            raise answer
        total_s = time.monotonic() - start
        rate = (count - 1) / max(total_s - first_s, 1e-6) if count > 1 else 0.0
        counted = Usage(usage.prompt_tokens, usage.image_tokens, usage.cached_tokens, count)
        yield Delta("", reason, counted, Timings(first_s, total_s, rate))


class ScriptedBackend:
    """Answers with `answers` in turn, then with an echo of the question.

    An exception in `answers` fails that turn; its second argument, if any, is said before.
    """

    def __init__(
        self,
        answers: Iterable[str | Exception] = (),
        *,
        context_length: int = 512,
        delay_s: float = 0.0,
        model: str = "scripted",
    ) -> None:
        self.answers = list(answers)
        self.delay_s = delay_s
        self.seen: list[Conversation] = []
        self.params: list[SamplingParams] = []
        self._status = Status(model, context_length, load_s=0.5, details=(("device", "none"),))
        self._cached: Sequence[str] = ()
        self._closed = False

    def stream(self, conversation: Conversation, params: SamplingParams) -> ScriptedStream:
        if self._closed:
            raise EngineDead("the engine has stopped; start vlmchat again")
        size = self.count(conversation)
        room = self._status.context_length - params.max_new_tokens
        if size.tokens > room:
            raise PromptTooLong(size.tokens, room, size.image_tokens)
        self.seen.append(conversation)
        self.params.append(params)
        prompt = _tokens(conversation)
        cached = _common_prefix(prompt, self._cached)
        self._cached = prompt
        usage = Usage(size.tokens, size.image_tokens, cached, 0)
        question = conversation.pending.text if conversation.pending else ""
        answer = self.answers.pop(0) if self.answers else f"You said: {question}"
        return ScriptedStream(answer, usage, params, self.delay_s)

    def count(self, conversation: Conversation) -> PromptSize:
        return PromptSize(len(_tokens(conversation)), IMAGE_TOKENS * len(conversation.images))

    def status(self) -> Status:
        return self._status

    def close(self) -> None:
        self._closed = True


def _drawn(word: str) -> DrawnToken:
    sure = Logprob(len(word), word, -0.5)
    return DrawnToken(sure, (sure,))


def _tokens(conversation: Conversation) -> list[str]:
    tokens: list[str] = []
    for message in conversation.messages():
        tokens += [message.role] * MESSAGE_TOKENS
        for image in message.images:
            tokens += [image.digest] * IMAGE_TOKENS
        tokens += words(message.text)
    return tokens


def _common_prefix(left: Sequence[str], right: Sequence[str]) -> int:
    count = 0
    for one, other in zip(left, right, strict=False):
        if one != other:
            break
        count += 1
    return count
