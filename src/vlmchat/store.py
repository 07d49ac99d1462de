"""Chats on disk: one JSON file each, every picture once beside them, readable at any moment.

Used by the REPL, the chat command and the web page. A file is written under another name, synced
and renamed, pictures before the JSON that names them, so that a crash leaves the old or the new
state. Private to the user. Knows nothing of how chats go on.

    <root>/sessions/NAME.json    hashes instead of pictures
    <root>/sessions/NAME.lock    held while a chat is open, so that two never write one session
    <root>/blobs/<sha256>        the pictures as they came
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO, Any

from vlmchat.conversation import Image
from vlmchat.errors import ImageError, SessionError
from vlmchat.images import ImageLoader
from vlmchat.session import ChatSession
from vlmchat.session_file import SavedSession, capture, from_json, to_json

_NAME = re.compile(r"\w[\w.+-]{0,79}")
_WORDS_IN_A_NAME = 4
_FIRST_WORDS = 60  # characters of the first question in a list


@dataclass(frozen=True, slots=True)
class Entry:
    """One line in the list of sessions. turns is None where the file cannot be read."""

    name: str
    updated: str
    turns: int | None
    first_words: str
    num_bytes: int


class SessionStore:
    """All saved sessions under one folder. Every method raises SessionError with the path."""

    def __init__(
        self, root: Path, loader: ImageLoader, now: Callable[[], datetime] = datetime.now
    ) -> None:
        self._sessions = root / "sessions"
        self._blobs = root / "blobs"
        self._loader = loader
        self._now = now

    def save(self, saved: SavedSession) -> None:
        """Write the session; whoever reads meanwhile sees the old or the new one, whole."""
        path = self._path(saved.name)
        with _told(path), self._writing():
            for image in saved.images:
                blob = self._blobs / image.sha256
                if not blob.exists():
                    _write(blob, image.data)
            _write(path, _encoded(to_json(saved)))

    def load(self, name: str) -> SavedSession:
        """The session of that name; pictures that are gone are in its `lost`."""
        path = self._existing(name)
        return _parse(path, lambda value: self._stored_picture)

    def exists(self, name: str) -> bool:
        """Whether a session of that name was saved."""
        return self._path(name).exists()

    def names(self) -> tuple[str, ...]:
        """The names of all sessions, the newest first; no file is opened."""
        paths = sorted(self._sessions.glob("*.json"), key=_modified, reverse=True)
        return tuple(path.stem for path in paths)

    def list(self) -> tuple[Entry, ...]:
        """All sessions, the newest first."""
        return tuple(_entry(self._sessions / f"{name}.json") for name in self.names())

    def delete(self, name: str) -> None:
        """Delete the session, unless it is open, and the pictures that no other one has."""
        path = self._existing(name)
        with self.hold(name), _told(path), self._writing():
            path.unlink()
            path.with_suffix(".lock").unlink(missing_ok=True)
            used = b"".join(other.read_bytes() for other in self._sessions.glob("*.json"))
            for blob in self._blobs.iterdir():
                if blob.name.encode() not in used:
                    blob.unlink()

    def new_name(self, question: str) -> str:
        """An unused name: date, time and the first words of the question."""
        words = re.findall(r"[^\W_]+", question.lower())[:_WORDS_IN_A_NAME] or ["chat"]
        base = f"{self._now():%Y-%m-%d-%H%M}-{'-'.join(words)[:40].rstrip('-')}"
        name, count = base, 1
        while self._path(name).exists() or self._path(name).with_suffix(".lock").exists():
            count += 1
            name = f"{base}-{count}"
        return name

    def hold(self, name: str) -> contextlib.ExitStack:
        """Keep other processes from writing that session until the result is closed.

        It holds nothing where no lock can be made: nobody saves there, and who tries is told why.
        """
        path = self._path(name).with_suffix(".lock")
        held = contextlib.ExitStack()
        try:
            self._make_folders()
            lock = held.enter_context(_open_private(path))
        except OSError:
            return held
        if not _lock(lock, wait=False):
            held.close()
            raise SessionError(
                f"session {name} is open in another vlmchat; close it, "
                "or choose another name with --session"
            )
        return held

    def _path(self, name: str) -> Path:
        if not _NAME.fullmatch(name):
            raise SessionError(
                f"{name!r} cannot name a session; use up to 80 letters, digits, - _ + and ."
            )
        return self._sessions / f"{name}.json"

    def _existing(self, name: str) -> Path:
        path = self._path(name)
        if not path.exists():
            raise SessionError(f"there is no session {name}; /sessions lists them ({path})")
        return path

    def _stored_picture(self, sha256: str, source: str) -> Image | None:
        if not re.fullmatch("[0-9a-f]{64}", sha256):
            return None
        try:
            data = (self._blobs / sha256).read_bytes()
        except OSError:
            return None
        return _picture(self._loader, data, sha256, source)

    def _make_folders(self) -> None:
        for folder in (self._blobs.parent, self._sessions, self._blobs):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        """One writer at a time: deleting must not see a picture whose JSON is still to come."""
        self._make_folders()
        with _open_private(self._blobs.parent / "lock") as lock:
            _lock(lock, wait=True)
            yield


def write_file(saved: SavedSession, path: Path) -> None:
    """One JSON file that holds everything, pictures as base64. Raises SessionError."""
    with _told(path):
        _write(path, encode_file(saved))


def encode_file(saved: SavedSession) -> bytes:
    """What `write_file` writes."""
    pictures = {
        image.sha256: base64.b64encode(image.data).decode("ascii") for image in saved.images
    }
    return _encoded({**to_json(saved), "pictures": pictures})


def read_file(path: Path, loader: ImageLoader) -> SavedSession:
    """The session in a file of `write_file`. Raises SessionError."""

    def pictures_of(value: Any) -> Callable[[str, str], Image | None]:
        contained = value.get("pictures") if isinstance(value, dict) else None

        def picture(sha256: str, source: str) -> Image | None:
            try:
                data = base64.b64decode(contained[sha256], validate=True)  # type: ignore[index]
            except (KeyError, TypeError, ValueError, binascii.Error):
                return None
            return _picture(loader, data, sha256, source)

        return picture

    return _parse(path, pictures_of)


def session_models(root: Path) -> list[str]:
    """The models of all sessions saved under `root`, each once, that of the newest first."""
    paths = sorted((root / "sessions").glob("*.json"), key=_modified, reverse=True)
    return list(dict.fromkeys(filter(None, map(_model, paths))))


def _model(path: Path) -> str | None:
    try:
        model = json.loads(path.read_bytes())["model"]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return model if isinstance(model, str) else None


class Autosave:
    """The `on_change` hook that saves a session after each change.

    A session without a name gets one at its first question. When saving begins to fail, that is
    told through `warn`, and the chat goes on.  failed: whether the last change is not saved.
    """

    def __init__(
        self,
        store: SessionStore,
        model: str,
        warn: Callable[[str], None],
        name: str | None = None,
        created: str | None = None,
    ) -> None:
        """Raises SessionError when another process has the session of that name open."""
        self.store = store
        self.model = model
        self.name: str | None = None
        self.failed = False
        self._warn = warn
        self._created: str | None = None
        self._held = contextlib.ExitStack()
        self.rename(name, created)

    def rename(self, name: str | None, created: str | None = None) -> None:
        """Save under another name from now on; None: a new one at the next question.

        Raises SessionError when another process has that session open.
        """
        if name != self.name:
            held = self.store.hold(name) if name is not None else contextlib.ExitStack()
            self.close()
            self._held = held
        self.name, self._created = name, created

    def saved(self, session: ChatSession) -> SavedSession:
        """The session as it would be saved now."""
        now = datetime.now().astimezone().isoformat(timespec="seconds")
        return capture(
            session,
            name=self.name or "chat",
            model=self.model,
            created=self._created or now,
            now=now,
        )

    def save(self, session: ChatSession) -> None:
        """Save, if there is anything to save. Raises SessionError."""
        turns = session.conversation.turns
        first = turns[0].user if turns else session.unanswered
        if self.name is None and first is not None:
            self.rename(self.store.new_name(first.text))
        if self.name is not None:
            saved = self.saved(session)
            self._created = saved.created
            self.store.save(saved)
        self.failed = False

    def __call__(self, session: ChatSession) -> None:
        """Save, or warn."""
        try:
            self.save(session)
        except SessionError as error:
            if not self.failed:
                self._warn(f"the chat is not being saved: {error}")
            self.failed = True

    def close(self) -> None:
        """Let other processes have the session."""
        self._held.close()


def _parse(path: Path, pictures_of: Callable[[object], Any]) -> SavedSession:
    with _told(path):
        data = path.read_bytes()
    try:
        value = json.loads(data)
        return from_json(value, pictures_of(value))
    except (ValueError, RecursionError) as error:
        raise SessionError(f"{path} is not a readable session: {error}") from None


def _picture(loader: ImageLoader, data: bytes, sha256: str, source: str) -> Image | None:
    """The picture, unless its bytes are no longer those that were saved."""
    try:
        image = loader.load_bytes(data, source)
    except ImageError:
        return None
    return image if image.sha256 == sha256 else None


def _entry(path: Path) -> Entry:
    try:
        value = json.loads(path.read_bytes())
        turns = [*value["forgotten"], *value["turns"]]
        first = (turns[0]["user"] if turns else value["unanswered"] or {"text": ""})["text"]
        words = " ".join(first.split())[:_FIRST_WORDS]
        return Entry(path.stem, value["updated"], len(turns), words, path.stat().st_size)
    except (OSError, ValueError, LookupError, TypeError, AttributeError):
        return Entry(path.stem, "", None, "(not readable)", 0)


def _modified(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _encoded(value: dict[str, Any]) -> bytes:
    try:
        return json.dumps(value, ensure_ascii=False, indent=1).encode()
    except UnicodeEncodeError:  # a lone surrogate
        return json.dumps(value, indent=1).encode()


@contextlib.contextmanager
def _told(path: Path) -> Iterator[None]:
    """What the system refuses, as a SessionError with the path."""
    try:
        yield
    except OSError as error:
        raise SessionError(f"{path}: {error.strerror or error}") from None


def _write(path: Path, data: bytes) -> None:
    """All or nothing, also when the power goes."""
    handle, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)  # mode 0600
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    with contextlib.suppress(OSError):  # not every system opens folders
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


def _open_private(path: Path) -> IO[str]:
    return open(path, "a", opener=lambda name, flags: os.open(name, flags, 0o600))


def _lock(file: IO[str], *, wait: bool) -> bool:
    """Whether the file is ours now; the system gives it back when the process ends, however."""
    try:
        import fcntl
    except ImportError:  # no such locks here: the last writer wins
        return True
    try:
        fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:  # nor on this file system
        return True
    return True
