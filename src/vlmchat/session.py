"""A chat: history, the trimmer that keeps it inside the context, and answers that join it whole.

Used by the REPL, the one-shot command and the web page, over any `Backend`. Plain Python.
History changes only when an answer has ended (or was stopped after something was said): a failed
turn leaves everything as it was. Trimming works on a copy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import TracebackType

from vlmchat.conversation import Conversation, Image, Message, Turn
from vlmchat.errors import ConfigError, InvalidRequest, PromptTooLong
from vlmchat.request import (
    Backend,
    Delta,
    DrawnToken,
    FinishReason,
    PromptSize,
    SamplingParams,
    Stream,
    Timings,
    Usage,
)

# After an overflow the prompt is cut to this share of its budget, so that the next trim is some
# turns away and the re-prefill behind the cut is paid rarely.
LOW_WATER = 0.7


@dataclass(frozen=True, slots=True)
class Trimmed:
    """What the trimmer dropped before one answer."""

    turns: int = 0
    tokens: int | None = 0  # None: the backend cannot count them
    images: tuple[Image, ...] = ()

    def __bool__(self) -> bool:
        return bool(self.turns or self.images)


class Reply:
    """One answer under way. Iterate it inside `with`; leaving commits or rolls back.

    The answer joins the history when it has ended, or when it was stopped (Ctrl-C, `cancel`)
    after saying something; any other exception leaves the history as it was.
    """

    def __init__(
        self,
        session: ChatSession,
        conversation: Conversation,
        stream: Stream,
        trimmed: Trimmed,
        history: tuple[Turn, ...] = (),
    ) -> None:
        self._session = session
        self._stream = stream
        self._history = history
        self._own_images = len(conversation.pending.images) if conversation.pending else 0
        self._cancelled = False
        self.conversation = conversation
        self.trimmed = trimmed
        self.answer = ""
        self.finish_reason: FinishReason | None = None
        self.usage: Usage | None = None
        self.timings: Timings | None = None
        self.tokens: tuple[DrawnToken, ...] = ()

    def __enter__(self) -> Reply:
        return self

    def __iter__(self) -> Iterator[Delta]:
        for delta in self._deltas():
            self.answer += delta.text
            self.tokens += delta.tokens
            if delta.finish_reason is not None:
                self.finish_reason = delta.finish_reason
                self.usage, self.timings = delta.usage, delta.timings
            yield delta

    def _deltas(self) -> Iterator[Delta]:
        """The stream's; where the backend finds the prompt too long only now, of a shorter one."""
        backend = self._session.backend
        while True:
            try:
                yield from self._stream
                return
            except PromptTooLong:
                shorter = shorten(self.conversation, self._own_images)
                if shorter is None or backend.count(self.conversation) is not None:
                    raise
                self.conversation, dropped = shorter
                turns = self.trimmed.turns + dropped.turns
                self.trimmed = Trimmed(turns, None, self.trimmed.images + dropped.images)
            self._stream = backend.stream(self.conversation, self._session.params)
            if self._cancelled:
                self._stream.cancel()

    @property
    def dropped(self) -> tuple[Turn, ...]:
        """The turns that the trimmer dropped."""
        return self._history[: self.trimmed.turns]

    @property
    def over(self) -> bool:
        """Whether the answer has ended: what is left to do is to show and to keep it."""
        return self.finish_reason is not None

    def cancel(self) -> None:
        """Stop the answer; what was said so far is kept."""
        self._cancelled = True
        self._stream.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stream.cancel()
        stopped = kind is not None and issubclass(kind, (KeyboardInterrupt, GeneratorExit))
        if self.finish_reason is None and (kind is None or stopped):
            self.finish_reason = FinishReason.CANCELLED
        if self.finish_reason is not None:
            self._session._commit(self)


class ChatSession:
    """A conversation with one backend.

    on_change(session) is called after every change, and with the question in `unanswered` before
    an answer begins: whoever stores sessions hooks in here.
    """

    def __init__(
        self,
        backend: Backend,
        params: SamplingParams,
        conversation: Conversation | None = None,
        *,
        forgotten: tuple[Turn, ...] = (),
        on_change: Callable[[ChatSession], None] | None = None,
    ) -> None:
        """Raises ConfigError when max_new_tokens leaves no room for a prompt."""
        self.backend = backend
        self.params = params
        self.forgotten = forgotten  # turns that the trimmer dropped: kept for the record only
        self.queued: tuple[Image, ...] = ()
        self.unanswered: Message | None = None
        self.on_change = on_change
        self._conversation = conversation or Conversation()
        self._check_room(params)

    @property
    def conversation(self) -> Conversation:
        """What the model will be shown: system prompt, pictures, the turns still remembered."""
        return self._conversation

    @property
    def budget(self) -> int:
        """Tokens that a prompt may have: the context length less the room for the answer."""
        return self.backend.status().context_length - self.params.max_new_tokens

    def size(self) -> PromptSize | None:
        """Exact size of the history as the model would see it now; None where nobody knows."""
        return self.backend.count(self._conversation)

    def set_params(self, params: SamplingParams) -> None:
        """Use other sampling parameters from now on; ConfigError if they leave no room."""
        self._check_room(params)
        self.params = params
        self._changed()

    def attach(self, image: Image) -> None:
        """Send `image` with the next question."""
        self.queued = (*self.queued, image)
        self._changed()

    def ask(self, text: str, images: tuple[Image, ...] = ()) -> Reply:
        """Begin the answer to a new question, with the queued pictures and these.

        Raises PromptTooLong, history untouched, when the message alone does not fit.
        """
        question = Message("user", text, self.queued + images)
        return self._begin(self._conversation, question, unanswered=question)

    def regenerate(self) -> Reply:
        """Answer the last question again. The old answer stays if the new one fails."""
        before, question = self._without_last_turn()
        return self._begin(before, question, unanswered=None)

    def edit(self, text: str) -> Reply:
        """Ask `text` in place of the last question, with the same pictures."""
        before, question = self._without_last_turn()
        edited = replace(question, text=text)
        return self._begin(before, edited, unanswered=edited)

    def undo(self) -> Turn:
        """Take the last turn back, as it was asked.

        Pictures that the trimmer had moved into it from forgotten turns wait for the next question.
        """
        before, question = self._without_last_turn()
        moved = _images_of(self.forgotten)
        back = tuple(image for image in question.images if image in moved)
        own = tuple(image for image in question.images if image not in moved)
        turn = replace(self._conversation.turns[-1], user=replace(question, images=own))
        self._conversation, self.queued = before, self.queued + back
        self._changed()
        return turn

    def clear(self) -> None:
        """Forget turns and pictures; the system prompt stays."""
        self.queued, self.forgotten, self.unanswered = (), (), None
        self._set(Conversation(system=self._conversation.system))

    def set_system(self, text: str) -> None:
        """Use another system prompt, for the whole conversation."""
        self._set(replace(self._conversation, system=text))

    def remove_image(self, index: int) -> Image:
        """Take picture `index` out of the conversation (those queued count on after the others)."""
        sent = self._conversation.images
        if index < len(sent):
            self._set(self._conversation.without_image(index))
            return sent[index]
        position = index - len(sent)
        removed = self.queued[position]
        self.queued = self.queued[:position] + self.queued[position + 1 :]
        self._changed()
        return removed

    def _without_last_turn(self) -> tuple[Conversation, Message]:
        if not self._conversation.turns:
            raise InvalidRequest("there is no question yet")
        *before, last = self._conversation.turns
        return replace(self._conversation, turns=tuple(before)), last.user

    def _begin(
        self, history: Conversation, question: Message, *, unanswered: Message | None
    ) -> Reply:
        self._check_room(self.params)  # a model that was loading had told no length before
        fitted, trimmed = fit(replace(history, pending=question), self.backend, self.budget)
        self.unanswered = unanswered
        self._changed()
        stream = self.backend.stream(fitted, self.params)
        return Reply(self, fitted, stream, trimmed, history.turns)

    def _commit(self, reply: Reply) -> None:
        stopped = reply.finish_reason is FinishReason.CANCELLED
        answer, asked = reply.answer.strip(), reply.conversation.pending
        if stopped and not answer:
            return
        conversation = reply.conversation.answered(answer, interrupted=stopped)
        forgotten = self.forgotten + reply.dropped
        queued = tuple(image for image in self.queued if asked and image not in asked.images)
        # In one go: no call stands between these, so that no Ctrl-C can leave half of it.
        self.unanswered, self.queued = None, queued
        self._conversation, self.forgotten = conversation, forgotten
        self._changed()

    def _set(self, conversation: Conversation) -> None:
        self._conversation = conversation
        self._changed()

    def _changed(self) -> None:
        if self.on_change is not None:
            self.on_change(self)

    def _check_room(self, params: SamplingParams) -> None:
        context = self.backend.status().context_length
        if 0 < context <= params.max_new_tokens:
            raise ConfigError(
                f"--max-new-tokens {params.max_new_tokens} leaves no room for a question in a "
                f"context of {context} tokens; lower it"
            )


def fit(conversation: Conversation, backend: Backend, budget: int) -> tuple[Conversation, Trimmed]:
    """The conversation inside `budget` tokens, and what had to go; untouched if it fits.

    The system prompt, the pending message and the pictures stay; the oldest whole turns go, and
    their pictures move to the oldest turn kept. Pictures that would not fit even with no turn
    kept go, oldest first. Raises PromptTooLong when the pending message alone is too much.
    A backend that cannot count is believed to have room: see `shorten`.
    """
    size = backend.count(conversation)
    if size is None or size.tokens <= budget:
        return conversation, Trimmed()
    kept, dropped_images = conversation, []
    own_images = conversation.pending.images if conversation.pending else ()
    while (fixed := _count(_without_turns(kept), backend)).tokens > budget:
        if len(kept.images) == len(own_images):
            raise PromptTooLong(fixed.tokens, budget, fixed.image_tokens)
        dropped_images.append(kept.images[0])
        kept = kept.without_image(0)
    # Only turns can make room, so the low-water mark is a share of what turns may use.
    low_water = fixed.tokens + int((budget - fixed.tokens) * LOW_WATER)
    while (tokens := _count(kept, backend).tokens) > low_water and kept.turns:
        kept = kept.without_oldest_turn()
    turns = len(conversation.turns) - len(kept.turns)
    return kept, Trimmed(turns, size.tokens - tokens, tuple(dropped_images))


def shorten(conversation: Conversation, own_images: int) -> tuple[Conversation, Trimmed] | None:
    """One step shorter, for backends that cannot count: as `fit` would, were all turns alike.

    The oldest turns go; with none left, the oldest picture, but never the last `own_images`, which
    belong to the pending message. None when nothing more can go.
    """
    turns = len(conversation.turns)
    if turns:
        dropped = max(1, round(turns * (1 - LOW_WATER)))
        for _ in range(dropped):
            conversation = conversation.without_oldest_turn()
        return conversation, Trimmed(dropped, None)
    if len(conversation.images) > own_images:
        image = conversation.images[0]
        return conversation.without_image(0), Trimmed(0, None, (image,))
    return None


def _count(conversation: Conversation, backend: Backend) -> PromptSize:
    size = backend.count(conversation)
    assert size is not None, "a backend that counts does so always"
    return size


def _images_of(turns: tuple[Turn, ...]) -> set[Image]:
    return {image for turn in turns for image in turn.user.images}


def _without_turns(conversation: Conversation) -> Conversation:
    while conversation.turns:
        conversation = conversation.without_oldest_turn()
    return conversation
