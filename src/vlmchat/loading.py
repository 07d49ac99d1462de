"""A backend that is still on its way: somebody can type while the model loads.

Made by the chat command for the REPL, which shows how far it is. What needs the model waits for it.
Knows nothing of engines and terminals.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from vlmchat.conversation import Conversation
from vlmchat.request import Backend, PromptSize, SamplingParams, Status, Stream

Progress = Callable[[str], None]
_NOTE = "note: "
_THREAD = "vlmchat-loading"


class Loading:
    """The `Backend` that `load` gives, once it has; loads in a thread of its own.

    load: is told whom to tell its stages, in words; what is to heed begins with `note: `.
    """

    def __init__(self, model: str, load: Callable[[Progress], Backend]) -> None:
        """model: what it is called until it can be asked."""
        self._model, self._load = model, load
        self._stage = "starting"
        self._notes: list[str] = []
        self._backend: Backend | None = None
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._run, name=_THREAD, daemon=True)
        self._closed = False
        self.error: BaseException | None = None
        self.on_change: Callable[[], None] = lambda: None  # called in the loading thread

    @property
    def stage(self) -> str | None:
        """What is being done; None once the model is there, or never will be."""
        return None if self._over.is_set() else self._stage

    def take_notes(self) -> list[str]:
        """What is to heed, once each."""
        notes, self._notes = self._notes, []
        return notes

    def start(self) -> None:
        """Begin. Does nothing the second time."""
        if self._thread.ident is None:
            self._thread.start()

    def wait(self, seconds: float | None = None) -> bool:
        """Whether it is over by then. Raises what `load` raised."""
        self.start()
        over = self._over.wait(seconds)
        if self.error is not None:
            raise self.error
        return over

    def stream(self, conversation: Conversation, params: SamplingParams) -> Stream:
        """See `Backend.stream`."""
        return self._loaded().stream(conversation, params)

    def count(self, conversation: Conversation) -> PromptSize | None:
        """See `Backend.count`."""
        return self._loaded().count(conversation)

    def status(self) -> Status:
        """See `Backend.status`; does not wait, so the context length is not known at first."""
        if self._backend is not None:
            return self._backend.status()
        return Status(self._model, 0, details=(("loading", self._stage),))

    def render(self, conversation: Conversation) -> str:
        """The prompt as text, where the backend tells it."""
        render: Callable[[Conversation], str] = getattr(self._loaded(), "render", lambda _: "")
        return render(conversation)

    def close(self) -> None:
        """See `Backend.close`. A model that still loads is not waited for: see `still_loading`."""
        self._closed = True
        if self._backend is not None:
            self._backend.close()

    def _loaded(self) -> Backend:
        self.wait()
        assert self._backend is not None, "it is there, or wait has raised"
        return self._backend

    def _run(self) -> None:
        try:
            self._backend = self._load(self._tell)
        except BaseException as error:  # whoever waits shall have it
            self.error = error
        self._over.set()
        if not self._closed:
            self.on_change()

    def _tell(self, stage: str) -> None:
        if stage.startswith(_NOTE):
            self._notes.append(stage)
        else:
            self._stage = stage
        if not self._closed:
            self.on_change()


def still_loading() -> bool:
    """Whether a model loads in this process: it cannot be stopped, but the process can."""
    return any(thread.name == _THREAD for thread in threading.enumerate())
