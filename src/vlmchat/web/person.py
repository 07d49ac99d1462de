"""One person at the page: a conversation, the pictures that wait, the answer under way.

Called by the page's event handlers, in threads. Each turn is a `ChatSession` of its own over the
conversation as a value: what fails changes nothing. Knows nothing of Gradio.
"""

from __future__ import annotations

import logging
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

from vlmchat.conversation import Conversation, Image, Message, Turn
from vlmchat.errors import Forbidden, InvalidRequest, VlmchatError
from vlmchat.images import ImageLoader
from vlmchat.request import Backend, FinishReason, SamplingParams, Timings, Usage
from vlmchat.session import ChatSession, Reply, Trimmed
from vlmchat.web.shapes import as_jpeg, shaped
from vlmchat.web.words import told

logger = logging.getLogger(__name__)

REDRAW_S = 0.05  # a page is not redrawn more often while an answer streams
MAX_WAITING = 16  # pictures
IDLE_S = 900.0  # without a sign of life from the page, which gives one every few seconds
KEPT_S = 600.0  # after the page has gone: it may be loaded again, or was out of reach only
MAX_KEPT = 64
_LEAVING_S = 2.0  # what it takes at most to notice that a page has gone, and to end its answer

Find = Callable[[], Backend]  # whoever answers; raises what is then told of the answer


@dataclass(frozen=True, slots=True)
class Wishes:
    """How a person wants to be answered."""

    model: str
    params: SamplingParams
    system: str = ""
    mode: str = "Default"


@dataclass(frozen=True, slots=True)
class Answered:
    """What is known of the last answer. context_length 0: nobody told."""

    model: str
    finish_reason: FinishReason
    usage: Usage | None
    timings: Timings | None
    trimmed: Trimmed
    context_length: int
    started: float  # seconds since the epoch
    finished: float


@dataclass(frozen=True, slots=True)
class Open:
    """A question under way, or one whose answer has failed; `before` is what stood above it.

    replaces: it was to take the place of the turn after `before`, and of all that follow.
    """

    before: Conversation
    question: Message
    replaces: bool


class Person:
    """What one open page is about. All methods may be called from any thread."""

    def __init__(self, loader: ImageLoader) -> None:
        self.token = secrets.token_urlsafe(18)  # who knows it may see the pictures
        self.conversation = Conversation()
        self.forgotten: tuple[Turn, ...] = ()
        self.waiting: tuple[Image, ...] = ()
        self.open: Open | None = None
        self.under_way: Open | None = None
        self.partial = ""  # of the answer under way, or of one that broke off
        self.trouble = ""
        self.answered: Answered | None = None
        self.voted = ""
        self.edited: Open | None = None  # its question is in the box, to be changed
        self.model = ""
        self.wishes: Wishes | None = None  # of the last question, or of a conversation taken up
        self.touched = time.monotonic()
        self._loader = loader
        self._reply: Reply | None = None
        self._stopped, self._refused = False, False
        self._turn_lock = threading.Lock()
        self._originals: dict[Image, Image] = {}
        self._shown: dict[str, bytes] = {}  # of small pictures, by sha256

    def has(self, token: str) -> bool:
        """Whether this is the person's secret."""
        return secrets.compare_digest(self.token.encode(), token.encode(errors="replace"))

    @property
    def busy(self) -> bool:
        """Whether an answer is under way."""
        return self.under_way is not None

    # -- asking -------------------------------------------------------------------------------

    def ask(self, text: str, find: Find, wishes: Wishes) -> Iterator[None]:
        """Ask with the pictures that wait; yields when there is something new to show.

        Never raises but InvalidRequest, for a question that cannot be; what goes wrong with the
        answer is in `trouble`. A question that was refused is taken up, as by `edit`.
        """
        if not text.strip():
            raise InvalidRequest("type a question first")
        images = self.waiting
        if self.open is not None and not self.open.replaces:
            images = self.open.question.images + images
        question = Message("user", text, tuple(dict.fromkeys(images)))
        yield from self._turn(Open(self.conversation, question, False), find, wishes)
        if self.open is not None and self._refused:
            self._take_up(self.open)

    def again(self, find: Find, wishes: Wishes) -> Iterator[None]:
        """Ask the last question once more: the old answer stays if the new one fails."""
        last = self._last()
        question = replace(last.question, images=self._own(last))
        yield from self._turn(replace(last, question=question), find, wishes)

    def ask_edited(self, text: str, find: Find, wishes: Wishes) -> Iterator[None]:
        """Ask what `edit` has taken up, with the pictures that wait: it and all that follows stay
        until the new answer is there. Where that fails, the change is taken up again."""
        if self.edited is None:
            raise InvalidRequest("no question is being changed")
        if not text.strip():
            raise InvalidRequest("type a question first")
        question = Message("user", text, self.waiting)
        yield from self._turn(replace(self.edited, question=question), find, wishes)
        if self.open is not None:
            self._take_up(self.open)

    def stop(self) -> None:
        """End the answer under way; what was said stays."""
        self._stopped = True
        if (reply := self._reply) is not None:
            reply.cancel()

    def _last(self) -> Open:
        if self.open is not None:
            return self.open
        if not self.conversation.turns:
            raise InvalidRequest("there is no question yet")
        *before, last = self.conversation.turns
        return Open(replace(self.conversation, turns=tuple(before)), last.user, True)

    def _turn(self, asked: Open, find: Find, wishes: Wishes) -> Iterator[None]:
        if not self._turn_lock.acquire(blocking=False):
            raise InvalidRequest("an answer is under way; stop it first")
        try:
            self.wishes = wishes
            self._begin(asked)
            yield
            yield from self._answer(asked, find, wishes)
        except VlmchatError as error:
            self._refused = isinstance(error, (InvalidRequest, Forbidden))
            if not self._refused:
                logger.warning("an answer of %s failed: %s", wishes.model, error.message)
            self._fail(asked, told(error, wishes.model))
        except Exception:  # a bug: told in words, and the conversation stays
            logger.exception("an answer failed")
            self._fail(asked, "something went wrong on the server; its log says what")
        finally:
            self.under_way, self._reply = None, None
            self._turn_lock.release()

    def _begin(self, asked: Open) -> None:
        self.under_way, self.edited = asked, None
        self.partial, self.trouble, self.voted = "", "", ""
        self._stopped, self._refused = False, False
        self.waiting = tuple(i for i in self.waiting if i not in asked.question.images)

    def _fail(self, asked: Open, message: str) -> None:
        self.open, self.trouble = asked, message

    def _answer(self, asked: Open, find: Find, wishes: Wishes) -> Iterator[None]:
        started = time.time()
        images = tuple(self._shaped(image, wishes.mode) for image in asked.question.images)
        before = replace(asked.before, system=wishes.system)
        session = ChatSession(find(), wishes.params, before, forgotten=self.forgotten)
        reply = session.ask(asked.question.text, images)
        self._reply = reply
        if self._stopped:
            reply.cancel()
        try:
            with reply:
                drawn_at = 0.0
                for _ in reply:
                    self.partial = reply.answer
                    if time.monotonic() - drawn_at >= REDRAW_S:
                        yield
                        drawn_at = time.monotonic()
        finally:  # also when the page has gone
            if session.conversation is not before:
                self._keep(session, reply, wishes.model, started)
        if session.conversation is before:
            self._fail(asked, "stopped before anything was said")

    def _keep(self, session: ChatSession, reply: Reply, model: str, started: float) -> None:
        assert reply.finish_reason is not None
        self.answered = Answered(
            model=model,
            finish_reason=reply.finish_reason,
            usage=reply.usage,
            timings=reply.timings,
            trimmed=reply.trimmed,
            context_length=session.backend.status().context_length,
            started=started,
            finished=time.time(),
        )
        self.conversation, self.forgotten = session.conversation, session.forgotten
        self.open = None

    def _shaped(self, image: Image, mode: str) -> Image:
        result = shaped(image, mode, self._loader)
        self._originals[result] = image
        return result

    # -- between answers ----------------------------------------------------------------------

    @contextmanager
    def _at_rest(self) -> Iterator[None]:
        if not self._turn_lock.acquire(blocking=False):
            raise InvalidRequest("an answer is under way; stop it first")
        try:
            self.trouble = ""
            yield
        finally:
            self._turn_lock.release()

    def attach(self, image: Image) -> None:
        """Send the picture with the next question. Raises InvalidRequest when they are many."""
        if len(self.waiting) >= MAX_WAITING:
            raise InvalidRequest(f"{MAX_WAITING} pictures wait already; send them first")
        if image not in self.waiting:
            self.waiting = (*self.waiting, image)
        if self.open is None:  # what it says of a picture; of an answer it stands until a retry
            self.trouble = ""

    def keep_waiting(self, indices: list[int]) -> None:
        """Of the pictures that wait, only these."""
        self.waiting = tuple(image for i, image in enumerate(self.waiting) if i in indices)

    def last_question(self) -> str:
        """The text that `again` would ask. Raises InvalidRequest when there is none."""
        return self._last().question.text

    def edit(self, index: int | None = None) -> str:
        """Take up the question of turn `index`, or the last, to be asked otherwise: its text is
        returned, its pictures wait again. Raises InvalidRequest when there is none."""
        with self._at_rest():
            self._put_down()
            turns = self.conversation.turns
            if index is None:
                asked = self._last()
            elif 0 <= index < len(turns):
                before = replace(self.conversation, turns=turns[:index])
                asked = Open(before, turns[index].user, True)
            else:
                raise InvalidRequest("that question is no longer there")
            self._take_up(asked)
            return asked.question.text

    def _take_up(self, asked: Open) -> None:
        self.edited = replace(asked, question=replace(asked.question, images=self._own(asked)))
        self.waiting = tuple(dict.fromkeys((*self.edited.question.images, *self.waiting)))

    def leave_unchanged(self) -> None:
        """What `edit` has taken up stays as it was; a change of it that failed is forgotten."""
        with self._at_rest():
            self._put_down()
            if self.open is not None and self.open.replaces:
                self.open = None

    def _put_down(self) -> None:
        own = self.edited.question.images if self.edited else ()
        self.waiting = tuple(image for image in self.waiting if image not in own)
        self.edited = None

    def _own(self, asked: Open) -> tuple[Image, ...]:
        """The question's pictures, as they were before anything was done to them."""
        return tuple(self._originals.get(image, image) for image in asked.question.images)

    def undo(self) -> str:
        """Take the last question back: its text is returned, its pictures wait again."""
        with self._at_rest():
            self._put_down()
            later = self.open and len(self.conversation.turns) - len(self.open.before.turns)
            if later and later > 1:  # a change further up that failed: what stands there stays
                self.open = None
            last = self._last()
            self.waiting = tuple(dict.fromkeys((*self._own(last), *self.waiting)))
            if self.open is None or self.open.replaces:
                self.conversation = last.before
            self.open, self.answered, self.voted = None, None, ""
            return last.question.text

    def clear(self) -> None:
        """Forget everything."""
        with self._at_rest():
            self.conversation, self.forgotten, self.waiting = Conversation(), (), ()
            self.open, self.answered, self.voted, self.edited = None, None, "", None
            self._originals, self._shown = {}, {}

    def resume(
        self, conversation: Conversation, forgotten: tuple[Turn, ...], params: SamplingParams
    ) -> None:
        """Go on with another conversation."""
        self.clear()
        self.wishes = Wishes(self.model, params, conversation.system)
        self.conversation, self.forgotten = conversation, forgotten

    # -- pictures on the page -----------------------------------------------------------------

    def shown(self, sha256: str) -> bytes | None:
        """A picture of this person as a small JPEG; None for any other."""
        if sha256 not in self._shown:
            image = next((i for i in self._all_images() if i.sha256 == sha256), None)
            if image is None:
                return None
            self._shown[sha256] = as_jpeg(image)
        return self._shown[sha256]

    def _all_images(self) -> Iterator[Image]:
        yield from self.waiting
        for asked in (self.under_way, self.open):
            yield from asked.question.images if asked else ()
        yield from self.conversation.images
        for turn in self.forgotten:
            yield from turn.user.images


class People:
    """Everybody who has the page open, by the name that Gradio gives their tab.

    A page that is loaded again is another tab to Gradio; who was there is known by their secret.
    """

    def __init__(self, loader: ImageLoader) -> None:
        self._loader = loader
        self._people: dict[str, Person] = {}
        self._gone: dict[str, Person] = {}  # by the tab they left, in that order
        self._lock = threading.Lock()

    def of(self, tab: str) -> Person:
        """The person at this tab; a new one where nobody was."""
        with self._lock:
            self._forget_idle()
            person = self._people.get(tab) or self._gone.pop(tab, None) or Person(self._loader)
            self._people[tab] = person
            person.touched = time.monotonic()
            return person

    def back(self, tab: str, token: str) -> Person:
        """The person with this secret, who has just left another tab; else as `of`.

        Waits for their leaving, which may be noticed later than their coming.
        """
        deadline = time.monotonic() + _LEAVING_S
        while token and time.monotonic() < deadline:
            with self._lock:
                left = next((t for t, p in self._gone.items() if p.has(token)), None)
                if left is not None and not self._gone[left].busy:
                    self._gone[tab] = self._gone.pop(left)
                    break
            if left is None and self.by_token(token) is None:
                break
            time.sleep(0.05)
        return self.of(tab)

    def by_token(self, token: str) -> Person | None:
        """The person whose secret this is."""
        with self._lock:
            found = [p for p in self._people.values() if p.has(token)]
        return found[0] if found else None

    def leave(self, tab: str) -> None:
        """The tab is closed or out of reach: its answer is stopped, the rest soon forgotten."""
        with self._lock:
            person = self._people.pop(tab, None)
            if person is not None:
                person.touched = time.monotonic()
                self._gone[tab] = person
                while len(self._gone) > MAX_KEPT:
                    del self._gone[next(iter(self._gone))]
        if person is not None:
            person.stop()

    def close(self) -> None:
        """Everybody leaves."""
        for tab in list(self._people):
            self.leave(tab)

    def __len__(self) -> int:
        return len(self._people)

    def _forget_idle(self) -> None:
        limit = time.monotonic() - IDLE_S
        for tab in [tab for tab, p in self._people.items() if p.touched < limit]:
            self._people.pop(tab).stop()
        gone = time.monotonic() - KEPT_S
        for tab in [tab for tab, p in self._gone.items() if p.touched < gone]:
            del self._gone[tab]
