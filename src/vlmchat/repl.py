"""The chat at the terminal: reads lines, runs commands and answers, outlives whatever fails.

Called by the chat command with a session that is ready. prompt_toolkit edits the lines; `slash`
has the commands, `output` prints the answers, the session's `on_change` hook saves. Knows nothing
of engines and options.
"""

from __future__ import annotations

import logging
import select
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from pathlib import Path

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.enums import DEFAULT_BUFFER
from prompt_toolkit.filters import Condition, has_focus
from prompt_toolkit.formatted_text import StyleAndTextTuples
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.input import Input
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent
from prompt_toolkit.output import Output
from prompt_toolkit.styles import Style
from rich.console import Console
from rich.markup import escape

from vlmchat import slash
from vlmchat.chat import Chat, count
from vlmchat.ctrl_c import CtrlC
from vlmchat.errors import VlmchatError
from vlmchat.images import ImageLoader, split_image_sources
from vlmchat.loading import Loading
from vlmchat.output import TextPrinter
from vlmchat.session import ChatSession, Reply
from vlmchat.session_file import SavedSession
from vlmchat.slash import ERROR, Next
from vlmchat.store import Autosave

_log = logging.getLogger(__name__)
_STYLE = Style.from_dict(
    {
        "prompt": "bold",
        "placeholder": "fg:ansibrightblack",
        "bottom-toolbar": "noreverse fg:ansibrightblack",
    }
)
_WATCH_S = 0.1
# An Enter that was pressed while an answer still came, and is read so soon after it, ends nothing.
_TYPED_AHEAD_S = 0.5
_PLACEHOLDER = "a question, a picture's path, or /help"


class Repl:
    """One chat at one terminal; `run` it once.

    autosave: where the session is saved after each change, if it is.
    console: where everything but the answers is said.  env: the terminal's variables.
    history_file: the lines typed, for the arrow keys; None keeps them for this run only.
    loading: the session's backend, where its model is still to be loaded: it begins once the
    prompt is on the screen, and what comes of it ends `run` if it fails.
    input, output: another terminal than the process's own.
    """

    def __init__(
        self,
        session: ChatSession,
        loader: ImageLoader,
        printer: TextPrinter,
        autosave: Autosave | None,
        console: Console,
        env: Mapping[str, str],
        history_file: Path | None = None,
        *,
        loading: Loading | None = None,
        input: Input | None = None,
        output: Output | None = None,
    ) -> None:
        self._loading = loading
        self.chat = Chat(session, loader, printer, console, env, autosave)
        session.on_change = autosave
        self._prefill = session.unanswered.text if session.unanswered else ""
        self._editing = False
        self._typed_ahead_until = 0.0
        self._lines: PromptSession[str] = PromptSession(
            history=_history(history_file),
            completer=_SlashCompleter(self.chat),
            complete_while_typing=Condition(self._begins_with_slash),
            key_bindings=_keys(),
            multiline=True,
            prompt_continuation="  ",
            reserve_space_for_menu=5,
            style=_STYLE,
            input=input,
            output=output,
        )
        if loading is not None:
            self._lines.bottom_toolbar = lambda: loading.stage or ""
            self._lines.app.after_render += lambda _: loading.start()
            loading.on_change = self._loading_went_on

    def run(self, resumed: SavedSession | None = None) -> int:
        """Chat until the person ends it; returns the exit status.

        resumed: what the session was made from, if it goes on from a saved one.
        Raises what loading the model raised, and KeyboardInterrupt for Ctrl-C while it lasts.
        """
        self._greet(resumed)
        while True:
            try:
                line = self._read()
            except EOFError:
                break
            except KeyboardInterrupt:
                if self._loading is not None and self._loading.stage is not None:
                    raise
                self._editing = False
                self.chat.say("(an empty line, /exit or Ctrl-D ends the chat)")
                continue
            if line.strip():
                if self._obey(line):
                    break
            elif time.monotonic() > self._typed_ahead_until:
                break
        self._part()
        return 0

    def _greet(self, resumed: SavedSession | None) -> None:
        chat, status = self.chat, self.chat.session.backend.status()
        context = status.context_length
        chat.say(
            f"{status.model} · "
            + (f"context {context} tokens · " if context else "")
            + "/help lists the commands, an empty line ends"
        )
        if resumed is not None:
            chat.say_lost(resumed)
        chat.show_tail()
        if self._prefill:
            chat.say("the last question has no answer yet; Enter asks it again")

    def _part(self) -> None:
        autosave = self.chat.autosave
        if autosave is not None and autosave.failed:
            self.chat.say("the end of this chat could not be saved", ERROR)
        elif autosave is not None and autosave.name is not None:
            self.chat.say(f"saved as {autosave.name}; vlmchat chat --continue goes on with it")

    def _read(self) -> str:
        """One message as it was typed. Raises EOFError on Ctrl-D, KeyboardInterrupt on Ctrl-C."""
        prefill, self._prefill = self._prefill, ""
        self._say_notes()
        line = self._lines.prompt(
            [("class:prompt", self._label())],
            default=prefill,
            placeholder=self._placeholder,
            pre_run=self._show_loading,
        )
        return line.encode("utf-8", "surrogateescape").decode("utf-8", "replace")

    def _show_loading(self) -> None:
        """Put the stage below the prompt up to date. In the thread that edits lines."""
        app, loading = self._lines.app, self._loading
        if loading is None or app.is_done:
            return
        if loading.stage is None:
            self._lines.bottom_toolbar = None
        if loading.error is not None:
            app.exit(exception=loading.error)
        app.invalidate()

    def _loading_went_on(self) -> None:
        """In the thread that loads."""
        loop = self._lines.app.loop
        if loop is not None and self._lines.app.is_running:
            with suppress(RuntimeError):  # the line ended just now
                loop.call_soon_threadsafe(self._show_loading)

    def _await_model(self) -> None:
        """Until the model is there, with its stages shown. Raises what loading raised."""
        if (loading := self._loading) is None:
            return
        with self.chat.console.status("") as shown:
            while (stage := loading.stage) is not None:
                shown.update(escape(stage))
                loading.wait(_WATCH_S)
        loading.wait()
        self._say_notes()

    def _say_notes(self) -> None:
        for note in self._loading.take_notes() if self._loading is not None else ():
            self.chat.say(note)

    def _placeholder(self) -> StyleAndTextTuples:
        app = self._lines.app  # what is left on the screen is what was typed, or found
        return (
            [] if app.is_done or app.layout.is_searching else [("class:placeholder", _PLACEHOLDER)]
        )

    def _label(self) -> str:
        if self._editing:
            return "edit> "
        waiting = len(self.chat.session.queued)
        return f"({count(waiting, 'picture')}) > " if waiting else "> "

    def _begins_with_slash(self) -> bool:
        return self._lines.default_buffer.text.startswith("/")

    def _obey(self, line: str) -> bool:
        """Do what the line says, whatever comes of it. True: the chat is over."""
        try:
            step = self._step(line)
            self._prefill, self._editing = step.prefill, step.editing
            if step.begin is not None:
                self._await_model()
                self._answer(step.begin)
            return step.end
        except KeyboardInterrupt:
            self.chat.say("(stopped)")
        except VlmchatError as error:
            if self._loading is not None and error is self._loading.error:
                raise
            self.chat.say(error.message, ERROR)
        except Exception as error:  # a bug costs a turn, not the conversation
            if self._loading is not None and error is self._loading.error:
                raise
            _log.debug("a turn failed", exc_info=True)
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            self.chat.say(f"this failed unexpectedly (--debug shows where): {reason}", ERROR)
        return False

    def _step(self, line: str) -> Next:
        text, session = line.strip(), self.chat.session
        ask = session.edit if self._editing else session.ask
        if (found := slash.find(text)) is not None:
            command, argument = found
            if command.needs_model:
                self._await_model()
            return command.run(self.chat, argument) or Next()
        if text.startswith("//"):
            return Next(begin=lambda: ask(text[1:]))
        sources, question = ([], text) if self._editing else split_image_sources(text)
        if text.startswith("/") and not sources:
            raise slash.unknown(text)
        for image in [self.chat.loader.load(source) for source in sources]:
            self.chat.attach(image)
        return Next(begin=lambda: ask(question)) if question.strip() else Next()

    def _answer(self, begin: Callable[[], Reply]) -> None:
        with CtrlC() as ctrl_c:
            reply = begin()
            ctrl_c.stops(reply)
            with suppress(KeyboardInterrupt):  # what was said is shown and kept by then
                self.chat.printer.answer(reply, self.chat.session.backend.status())
            self.chat.totals.add(reply)
        self.chat.console.print()
        if self._keys_wait():
            self._typed_ahead_until = time.monotonic() + _TYPED_AHEAD_S

    def _keys_wait(self) -> bool:
        try:
            return bool(select.select([self._lines.input.fileno()], [], [], 0)[0])
        except (OSError, ValueError, NotImplementedError):  # not a file that can be asked
            return False


class _SlashCompleter(Completer):
    """Commands, and what may follow them: paths, sessions, settings."""

    def __init__(self, chat: Chat) -> None:
        self._chat = chat
        self._paths = PathCompleter(expanduser=True)

    def get_completions(
        self, document: Document, complete_event: CompleteEvent
    ) -> Iterable[Completion]:
        line = document.text_before_cursor
        if not line.startswith("/") or "\n" in line:
            return
        name, space, argument = line.partition(" ")
        if not space:
            for command in slash.COMMANDS:
                if f"/{command.name}".startswith(name):
                    yield Completion(f"/{command.name}", -len(name), display_meta=command.help)
            return
        for word in slash.words_after(self._chat, name):
            if word.startswith(argument):
                yield Completion(word, -len(argument))
        if slash.takes_path(name):
            whole = list(self._paths.get_completions(Document(argument), complete_event))
            last = Document(argument.rpartition(" ")[2])  # of several paths
            yield from whole or self._paths.get_completions(last, complete_event)


class _PrivateHistory(FileHistory):
    """Lines typed, in a file that can hold any of them; a chat without old lines is still one."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return ()

    def store_string(self, string: str) -> None:
        with suppress(OSError):  # a full disk
            super().store_string(string.encode("utf-8", "replace").decode())


def _history(file: Path | None) -> History:
    if file is None:
        return InMemoryHistory()
    try:
        file.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        file.touch(mode=0o600)
    except OSError:
        return InMemoryHistory()
    return _PrivateHistory(str(file))


def _keys() -> KeyBindings:
    keys = KeyBindings()
    typing = has_focus(DEFAULT_BUFFER)  # and not in the search line of Ctrl-R, which has its own

    @keys.add("enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        if buffer.document.is_cursor_at_the_end and buffer.text.endswith("\\"):
            buffer.delete_before_cursor()
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    @keys.add("escape", "enter", filter=typing)
    def _(event: KeyPressEvent) -> None:
        event.current_buffer.insert_text("\n")

    @keys.add("c-c", filter=typing)
    def _(event: KeyPressEvent) -> None:
        if event.current_buffer.text:
            event.current_buffer.reset()
        else:
            event.app.exit(exception=KeyboardInterrupt)

    return keys
