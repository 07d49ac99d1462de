"""What has been said: pictures, messages, turns, conversations. Values, never changed.

Every layer speaks these types. Plain Python: no I/O, no torch; Pillow for the types only.
An answer is part of a `Turn` only once it has ended (or was stopped with something said); the
message still waiting for its answer is `Conversation.pending`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

Role = Literal["system", "user", "assistant"]


@dataclass(frozen=True, slots=True, eq=False)
class Image:
    """A decoded, checked picture.

    pixels: RGB, upright, without alpha.  data: the encoded file, as it came.
    source: what the person called it (path, URL, `-`, `clipboard`).
    sha256: hex digest of `data`: names the stored file.
    digest: hex digest of pixels, size and mode: two pictures match only if a model sees the same.
    """

    pixels: PILImage = field(repr=False)
    data: bytes = field(repr=False)
    source: str
    sha256: str
    digest: str

    @property
    def width(self) -> int:
        """Pixels, after orientation."""
        return self.pixels.width

    @property
    def height(self) -> int:
        """Pixels, after orientation."""
        return self.pixels.height

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Image) and other.digest == self.digest

    def __hash__(self) -> int:
        return hash(self.digest)


@dataclass(frozen=True, slots=True)
class Message:
    """One speaker's part. Pictures stand before the text."""

    role: Role
    text: str
    images: tuple[Image, ...] = ()


@dataclass(frozen=True, slots=True)
class Turn:
    """A user message and the answer to it, which may have been stopped early."""

    user: Message
    answer: str
    interrupted: bool = False


@dataclass(frozen=True, slots=True)
class Conversation:
    """A system prompt, the turns so far, and perhaps a user message that waits for its answer.

    begun: how that answer begins; a model goes on from there.
    rendered: the whole prompt as a client wrote it, `<image>` where the pictures of `pending`
    stand; the rest is then empty.
    """

    system: str = ""
    turns: tuple[Turn, ...] = ()
    pending: Message | None = None
    begun: str = ""
    rendered: str = ""

    def messages(self) -> Iterator[Message]:
        """All messages in order, the system prompt first if there is one."""
        if self.system:
            yield Message("system", self.system)
        for turn in self.turns:
            yield turn.user
            yield Message("assistant", turn.answer)
        if self.pending is not None:
            yield self.pending

    @property
    def images(self) -> tuple[Image, ...]:
        """All pictures, in the order in which a model meets them."""
        return tuple(image for message in self.messages() for image in message.images)

    def ask(self, text: str, images: tuple[Image, ...] = ()) -> Conversation:
        """With a new user message waiting for its answer."""
        return replace(self, pending=Message("user", text, images))

    def answered(self, answer: str, *, interrupted: bool = False) -> Conversation:
        """With the pending message and its answer as the newest turn."""
        if self.pending is None:
            raise ValueError("no message is waiting for an answer")
        turn = Turn(self.pending, answer, interrupted)
        return replace(self, turns=(*self.turns, turn), pending=None)

    def without_oldest_turn(self) -> Conversation:
        """Without the oldest turn; its pictures move to the front of the next user message."""
        if not self.turns:
            raise ValueError("there is no turn to drop")
        oldest, *kept = self.turns
        if kept:
            first = replace(kept[0], user=_with_images_first(kept[0].user, oldest.user.images))
            return replace(self, turns=(first, *kept[1:]))
        if self.pending is None:
            return replace(self, turns=())
        return replace(self, turns=(), pending=_with_images_first(self.pending, oldest.user.images))

    def without_image(self, index: int) -> Conversation:
        """Without the picture at `index` of `images`; the words stay."""
        if not 0 <= index < len(self.images):
            raise IndexError(f"there is no picture {index + 1}")
        turns = []
        for turn in self.turns:
            user, index = _drop_image(turn.user, index)
            turns.append(replace(turn, user=user))
        pending = self.pending
        if pending is not None:
            pending, _ = _drop_image(pending, index)
        return replace(self, turns=tuple(turns), pending=pending)


def _with_images_first(message: Message, images: tuple[Image, ...]) -> Message:
    return replace(message, images=images + message.images)


def _drop_image(message: Message, index: int) -> tuple[Message, int]:
    """The message without its picture `index`, and the index that is left for later messages."""
    count = len(message.images)
    if not 0 <= index < count:
        return message, index - count
    images = message.images[:index] + message.images[index + 1 :]
    return replace(message, images=images), -1
