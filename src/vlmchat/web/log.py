"""What people asked and how they voted, as LLaVA's web server writes it.

Called by the page, where a directory for it was given. A file of JSON lines for each day,
`YYYY-MM-DD-conv.json`: chats, upvotes, downvotes and flags; pictures once in
`serve_images/YYYY-MM-DD/<md5 of the pixels>.jpg`. Local dates, as LLaVA has them.
"""

from __future__ import annotations

import hashlib
import json
import threading
import time
from datetime import datetime
from pathlib import Path
from typing import Any, Literal

from vlmchat.conversation import Conversation, Image
from vlmchat.errors import ConfigError
from vlmchat.web.person import Answered
from vlmchat.web.shapes import as_jpeg

Vote = Literal["upvote", "downvote", "flag"]
ROLES = ("USER", "ASSISTANT")


class ConversationLog:
    """Writes into one directory. What cannot be written is told once, and does not stop a chat."""

    def __init__(self, folder: Path) -> None:
        """Raises ConfigError when the directory cannot be made."""
        try:
            folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"--log-dir {folder}: {(error.strerror or 'bad').lower()}") from None
        self._folder = folder
        self._lock = threading.Lock()

    def chat(self, conversation: Conversation, answered: Answered, ip: str) -> None:
        """One answer, with all that was said before. Raises OSError."""
        images = [self._store(image) for image in conversation.images]
        self._write(
            {
                "tstamp": round(answered.finished, 4),
                "type": "chat",
                "model": answered.model,
                "start": round(answered.started, 4),
                "finish": round(answered.finished, 4),
                "state": _state(conversation),
                "images": images,
                "ip": ip,
            }
        )

    def vote(self, kind: Vote, conversation: Conversation, model: str, ip: str) -> None:
        """A vote on the last answer. Raises OSError."""
        record = {"tstamp": round(time.time(), 4), "type": kind, "model": model}
        self._write({**record, "state": _state(conversation), "ip": ip})

    def _write(self, record: dict[str, Any]) -> None:
        path = self._folder / f"{_today()}-conv.json"
        with self._lock, path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def _store(self, image: Image) -> str:
        """The picture's name; its file is written where it is not there yet."""
        name = hashlib.md5(image.pixels.tobytes(), usedforsecurity=False).hexdigest()
        path = self._folder / "serve_images" / _today() / f"{name}.jpg"
        with self._lock:
            if not path.exists():
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(as_jpeg(image, side=None))
        return name


def _today() -> str:
    return datetime.now().strftime("%Y-%m-%d")


def _state(conversation: Conversation) -> dict[str, Any]:
    """LLaVA's dump of a conversation; pictures stand as `<image>` behind their question."""
    said: list[list[str]] = []
    for turn in conversation.turns:
        said.append([ROLES[0], turn.user.text + "\n<image>" * len(turn.user.images)])
        said.append([ROLES[1], turn.answer])
    return {
        "system": conversation.system,
        "roles": list(ROLES),
        "messages": said,
        "offset": 0,
        "sep": " ",
        "sep2": "</s>",
    }
