"""A chat as a value that can be written down, and the JSON that it becomes.

Used by `store` (pictures by hash) and for the files of /save and /load, which hold everything.
Knows the shape of the JSON, nothing of folders and locks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from vlmchat.config import sampling_params, settings_of
from vlmchat.conversation import Conversation, Image, Message, Turn
from vlmchat.errors import ConfigError
from vlmchat.request import Backend, SamplingParams
from vlmchat.session import ChatSession

FORMAT = "vlmchat-session"
VERSION = 1

# (sha256, source) -> the picture, or None if it is lost
Pictures = Callable[[str, str], Image | None]
_T = TypeVar("_T")


@dataclass(frozen=True, slots=True)
class SavedSession:
    """All that a chat needs to go on later.

    created, updated: local time in ISO 8601.  forgotten: turns that the trimmer dropped.
    unanswered: a question whose answer never ended.  lost: sources of pictures that are gone.
    """

    name: str
    model: str
    params: SamplingParams
    conversation: Conversation
    created: str
    updated: str
    forgotten: tuple[Turn, ...] = ()
    queued: tuple[Image, ...] = ()
    unanswered: Message | None = None
    lost: tuple[str, ...] = ()

    @property
    def images(self) -> tuple[Image, ...]:
        """Every picture in it, each once, also those of forgotten turns."""
        messages = [turn.user for turn in self.forgotten]
        messages += list(self.conversation.messages())
        messages += [self.unanswered] if self.unanswered else []
        images = [image for message in messages for image in message.images]
        return tuple({image.sha256: image for image in (*images, *self.queued)}.values())


def capture(session: ChatSession, *, name: str, model: str, created: str, now: str) -> SavedSession:
    """The session as it stands."""
    return SavedSession(
        name=name,
        model=model,
        params=session.params,
        conversation=session.conversation,
        created=created,
        updated=now,
        forgotten=session.forgotten,
        queued=session.queued,
        unanswered=session.unanswered,
    )


def resume(
    saved: SavedSession, backend: Backend, params: SamplingParams | None = None
) -> ChatSession:
    """A session that goes on from there; new pictures of an unanswered question wait again.

    Raises ConfigError when the parameters leave no room in this backend's context.
    """
    session = ChatSession(
        backend, params or saved.params, saved.conversation, forgotten=saved.forgotten
    )
    asked = saved.unanswered.images if saved.unanswered else ()
    new = (image for image in asked if image not in saved.conversation.images)
    session.queued = tuple(dict.fromkeys((*saved.queued, *new)))
    session.unanswered = saved.unanswered
    return session


def to_json(saved: SavedSession) -> dict[str, Any]:
    """The session as JSON values; pictures are named by hash and source, not contained."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "name": saved.name,
        "created": saved.created,
        "updated": saved.updated,
        "model": saved.model,
        "params": settings_of(saved.params),
        "system": saved.conversation.system,
        "forgotten": [_turn_json(turn) for turn in saved.forgotten],
        "turns": [_turn_json(turn) for turn in saved.conversation.turns],
        "unanswered": saved.unanswered and _message_json(saved.unanswered),
        "queued": _images_json(saved.queued),
    }


def from_json(value: object, pictures: Pictures) -> SavedSession:
    """The session in parsed JSON. Raises ValueError, which says what is wrong with it."""
    if _get(value, "format", str) != FORMAT:
        raise ValueError(f"it is not a {FORMAT} file")
    version = _get(value, "version", int)
    if version != VERSION:
        raise ValueError(f"it has version {version}, this vlmchat reads version {VERSION}")
    reader = _Reader(pictures)
    saved = SavedSession(
        name=_get(value, "name", str),
        model=_get(value, "model", str),
        params=_params(_get(value, "params", dict)),
        conversation=Conversation(_get(value, "system", str), reader.turns(value, "turns")),
        created=_get(value, "created", str),
        updated=_get(value, "updated", str),
        forgotten=reader.turns(value, "forgotten"),
        queued=reader.images(value, "queued"),
        unanswered=reader.message(value, "unanswered") if _has(value, "unanswered") else None,
    )
    return replace(saved, lost=tuple(dict.fromkeys(reader.lost)))


def _turn_json(turn: Turn) -> dict[str, Any]:
    return {
        "user": _message_json(turn.user),
        "answer": turn.answer,
        "interrupted": turn.interrupted,
    }


def _message_json(message: Message) -> dict[str, Any]:
    return {"text": message.text, "images": _images_json(message.images)}


def _images_json(images: tuple[Image, ...]) -> list[dict[str, str]]:
    return [{"sha256": image.sha256, "source": image.source} for image in images]


class _Reader:
    """Reads turns and messages, and keeps a list of the pictures that are lost."""

    def __init__(self, pictures: Pictures) -> None:
        self._pictures = pictures
        self.lost: list[str] = []

    def turns(self, value: object, key: str) -> tuple[Turn, ...]:
        return tuple(
            Turn(
                self.message(turn, "user"),
                _get(turn, "answer", str),
                _get(turn, "interrupted", bool),
            )
            for turn in _get(value, key, list)
        )

    def message(self, value: object, key: str) -> Message:
        message = _get(value, key, dict)
        return Message("user", _get(message, "text", str), self.images(message, "images"))

    def images(self, value: object, key: str) -> tuple[Image, ...]:
        found = []
        for entry in _get(value, key, list):
            source = _get(entry, "source", str)
            image = self._pictures(_get(entry, "sha256", str), source)
            if image is None:
                self.lost.append(source)
            else:
                found.append(image)
        return tuple(found)


def _params(value: dict[str, Any]) -> SamplingParams:
    try:
        return sampling_params(**{**value, "stop": tuple(_get(value, "stop", list))})
    except (TypeError, ConfigError) as error:
        raise ValueError(f"`params`: {error}") from None


def _has(value: object, key: str) -> bool:
    return isinstance(value, dict) and value.get(key) is not None


def _get(value: object, key: str, kind: type[_T]) -> _T:
    found = value.get(key) if isinstance(value, dict) else None
    if not isinstance(found, kind):
        raise ValueError(f"`{key}` is missing or of the wrong kind")
    return found
