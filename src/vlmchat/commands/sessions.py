"""Which saved session a chat goes on with, and what of it the command line replaces.

Called by `chat`, before the model is loaded (to fail early) and after.
"""

from __future__ import annotations

import os
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from vlmchat.commands.options import ChatOptions
from vlmchat.config import DEMO_MODEL
from vlmchat.conversation import Conversation
from vlmchat.errors import SessionError

if TYPE_CHECKING:
    from vlmchat.request import Backend, SamplingParams
    from vlmchat.session import ChatSession
    from vlmchat.session_file import SavedSession
    from vlmchat.store import Autosave, SessionStore

SAMPLING = ("temperature", "top_p", "top_k", "max_new_tokens", "seed", "stop", "logprobs")


def find(asked: ChatOptions, store: SessionStore) -> SavedSession | None:
    """The session to go on with; None for a new one. Raises SessionError."""
    if asked.resume:
        return _newest(store)
    if asked.session is None or not store.exists(asked.session):
        return None
    return replace(store.load(asked.session), name=asked.session)


def _newest(store: SessionStore) -> SavedSession:
    """The session that was written last of those that can be read; the others are told."""
    for name in store.names():
        try:
            return replace(store.load(name), name=name)
        except SessionError as error:
            _warn(f"{error.message}; looking for an older session")
    raise SessionError("there is no session to continue; the first chat makes one")


def autosave(
    asked: ChatOptions, store: SessionStore, saved: SavedSession | None, model: str
) -> Autosave:
    """Whoever saves the chat. Raises SessionError when another process has the session open."""
    from vlmchat.store import Autosave

    path = Path(os.path.expanduser(model))
    model = str(path.absolute()) if model != DEMO_MODEL and path.is_dir() else model
    name, created = (saved.name, saved.created) if saved else (asked.session, None)
    return Autosave(store, model, _warn, name, created)


def _warn(message: str) -> None:
    print(f"vlmchat: {message}", file=sys.stderr)


def tell_lost(saved: SavedSession) -> None:
    """Say which pictures of the session are gone."""
    for source in saved.lost:
        _warn(f"the picture {source} of this session is gone; the chat goes on without it")


def begin(
    backend: Backend,
    params: SamplingParams,
    system: str | None,
    saved: SavedSession | None,
    given: frozenset[str],
) -> ChatSession:
    """A new session, or the saved one with the options in `given` in place of its own."""
    from vlmchat.session import ChatSession
    from vlmchat.session_file import resume

    if saved is None:
        return ChatSession(backend, params, Conversation(system=system or ""))
    changed = {name: getattr(params, name) for name in SAMPLING if name in given}
    changed["grammar"] = params.grammar  # of this run, not of the session
    session = resume(saved, backend, replace(saved.params, **changed))
    if system is not None and "system" in given:
        session.set_system(system)
    return session
