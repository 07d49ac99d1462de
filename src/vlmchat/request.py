"""What crosses the door between those who ask and those who answer.

Everything that can answer is a `Backend`: the engine in this process, or a client of a server.
The REPL, the JSON output, batch runner, web page and HTTP routes know nothing else.
Plain values and protocols: no torch, no I/O.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from enum import StrEnum
from typing import Literal, Protocol, runtime_checkable

from vlmchat.conversation import Conversation


class FinishReason(StrEnum):
    """Why an answer ended."""

    STOP = "stop"  # the model's end token, or a stop string
    LENGTH = "length"  # max_new_tokens, or the end of the context
    CANCELLED = "cancelled"


@dataclass(frozen=True, slots=True)
class Grammar:
    """What form an answer must have."""

    kind: Literal["json_object", "json_schema", "regex", "lark"]
    text: str


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How an answer is drawn. Already checked: see `config.sampling_params`.

    temperature 0 is greedy. top_k 0 and top_p 1 are off. seed None draws a fresh one.
    repetition_penalty: divides or multiplies the logits of tokens in prompt and answer; None is
    what the model's generation config says, 1 is off.
    presence_penalty, frequency_penalty: subtracted from the logits of tokens in the answer, once
    and for each time they stand there.  logit_bias: (token id, what is added to its logit).
    ignore_eos: the model's end token does not end the answer.
    resume: tokens of this answer that were drawn before, elsewhere: they count as drawn and are
    not sent again.
    """

    temperature: float = 0.2
    top_p: float = 1.0
    top_k: int = 0
    max_new_tokens: int = 512
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None  # report each token's, and those of so many likeliest ones
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    ignore_eos: bool = False
    grammar: Grammar | None = None
    resume: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """Exact token counts of one answer. prompt_tokens include image_tokens and cached_tokens."""

    prompt_tokens: int
    image_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class Timings:
    """Seconds, from the moment the request was accepted."""

    first_token_s: float
    total_s: float
    tokens_per_second: (
        float  # of the decode: tokens after the first / time after the first; 0 if < 2
    )


@dataclass(frozen=True, slots=True)
class Logprob:
    """A token and the natural logarithm of its probability, before temperature and filters."""

    token_id: int
    token: str
    logprob: float


@dataclass(frozen=True, slots=True)
class DrawnToken:
    """A token of the answer (its end token too) beside the likeliest ones in its place."""

    drawn: Logprob
    top: tuple[Logprob, ...]


@dataclass(frozen=True, slots=True)
class Delta:
    """Text since the last one. The last Delta of a stream carries reason, usage and timings.

    token_ids: all that were drawn since the last one, also those whose text is not certain yet;
    tokens: the same with their logprobs, where the request asks for them.
    """

    text: str
    finish_reason: FinishReason | None = None
    usage: Usage | None = None
    timings: Timings | None = None
    tokens: tuple[DrawnToken, ...] = ()
    token_ids: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class PromptSize:
    """Exact token counts of a rendered conversation. image_tokens are part of tokens."""

    tokens: int
    image_tokens: int


@dataclass(frozen=True, slots=True)
class Load:
    """What an engine is doing now, and has done since it began.

    running, waiting: sequences.  waiting_tokens: of prompts still to be computed.
    prompt_tokens, cached_tokens, generated_tokens: of all sequences that got a slot.
    drafted, accepted: tokens guessed ahead, and those that proved right.
    images, images_cached: pictures asked for, and those whose features were there already.
    """

    running: int = 0
    waiting: int = 0
    waiting_tokens: int = 0
    slots: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    generated_tokens: int = 0
    drafted: int = 0
    accepted: int = 0
    images: int = 0
    images_cached: int = 0


@dataclass(frozen=True, slots=True)
class Status:
    """What a backend is and how it stands."""

    model: str
    context_length: int  # tokens, prompt and answer together; 0: a server that does not tell
    load_s: float = 0.0
    details: tuple[tuple[str, str], ...] = ()  # (label, value) for people: device, dtype, memory …
    load: Load | None = None


class Stream(Protocol):
    """One answer on its way. Iterate it for Deltas; `cancel` from any thread ends it early."""

    def __iter__(self) -> Iterator[Delta]: ...

    def __next__(self) -> Delta: ...

    def cancel(self) -> None:
        """Stop soon; iteration then ends with FinishReason.CANCELLED. No-op when over."""


@runtime_checkable
class PushedStream(Stream, Protocol):
    """A stream that need not be waited for by a thread."""

    def deliver(self, to: Callable[[Delta | BaseException], object]) -> None:
        """Call `to`, instead of iteration, with each Delta or what iteration would raise.

        From the backend's thread, which must not be kept waiting.
        """


class Backend(Protocol):
    """Whoever can answer."""

    def stream(self, conversation: Conversation, params: SamplingParams) -> Stream:
        """Begin the answer to `conversation.pending`.

        Raises PromptTooLong when prompt + max_new_tokens exceed the context (nothing is begun);
        iteration raises EngineDead, OutOfMemory, NetworkError … when the answer fails.
        """

    def count(self, conversation: Conversation) -> PromptSize | None:
        """Exact size of the conversation's prompt as the model will see it.

        None where nobody can tell (a server that does not count): then it is the iteration of
        the stream that raises PromptTooLong.
        """

    def status(self) -> Status:
        """The model's name, context length and state."""

    def close(self) -> None:
        """Give everything back. Streams under way end with an error."""
