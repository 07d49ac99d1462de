"""The chat at the terminal, typed at through a pipe; a scripted backend answers."""

from __future__ import annotations

import contextlib
import io
import shlex
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from prompt_toolkit.completion import CompleteEvent
from prompt_toolkit.document import Document
from prompt_toolkit.input import create_pipe_input
from prompt_toolkit.output import DummyOutput
from rich.console import Console

from tests.fakes import ScriptedBackend, picture
from vlmchat import slash
from vlmchat.chat import Chat
from vlmchat.config import ImagePolicy
from vlmchat.conversation import Conversation, Message, Turn
from vlmchat.ctrl_c import CtrlC
from vlmchat.errors import OutOfMemory
from vlmchat.images import ImageLoader
from vlmchat.output import TextPrinter
from vlmchat.repl import Repl, _PrivateHistory, _SlashCompleter
from vlmchat.request import SamplingParams
from vlmchat.session import ChatSession
from vlmchat.store import Autosave, SessionStore

LOADER = ImageLoader(ImagePolicy())


class Room:
    """A chat to type at: a backend, a session, a store, and all that was said."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.said = io.StringIO()
        self.console = Console(file=self.said, width=200, _environ={})
        self.backend = ScriptedBackend()
        self.session = ChatSession(self.backend, SamplingParams(max_new_tokens=64))
        self.store = SessionStore(root / "state", LOADER)
        self.autosave = Autosave(self.store, "scripted", pytest.fail)
        self.chat = Chat(
            self.session,
            LOADER,
            TextPrinter(self.console, self.console),
            self.console,
            {},
            self.autosave,
        )

    def type(self, *lines: str, end: str = "\r") -> str:
        """Type the lines, Enter after each, then an empty one; what was said meanwhile."""
        before = len(self.said.getvalue())
        with create_pipe_input() as keys:
            typed = "".join(line + "\r" for line in lines) + end
            keys.send_bytes(typed.encode("utf-8", "surrogateescape"))
            repl = Repl(
                self.chat.session,
                LOADER,
                self.chat.printer,
                self.autosave,
                self.console,
                {},
                input=keys,
                output=DummyOutput(),
            )
            self.status = repl.run()
            self.chat = repl.chat
            self.session = repl.chat.session
        return self.said.getvalue()[before:]

    def picture(self, name: str = "red.png", color: str = "red") -> Path:
        path = self.root / name
        path.write_bytes(picture(color=color).data)
        return path

    @property
    def questions(self) -> list[str]:
        """All that reached the backend."""
        return [seen.pending.text for seen in self.backend.seen if seen.pending]


@pytest.fixture
def room(tmp_path: Path) -> Iterator[Room]:
    room = Room(tmp_path)
    with contextlib.closing(room.autosave):
        yield room


def test_repl_asks_what_was_typed_and_shows_the_answer(room: Room) -> None:
    assert "You said: Red?\n" in room.type("Red?")
    assert room.session.conversation.turns == (Turn(Message("user", "Red?"), "You said: Red?"),)


@pytest.mark.parametrize("end", ["\r", "\x04", "/exit\r"], ids=["empty line", "Ctrl-D", "/exit"])
def test_repl_ends_with_status_0(room: Room, end: str) -> None:
    room.type("Red?", end=end)
    assert room.status == 0


@pytest.mark.parametrize(
    "keys",
    [
        pytest.param("one\\\rtwo", id="backslash"),
        pytest.param("one\x1b\rtwo", id="Alt-Enter"),
        pytest.param("\x1b[200~one\ntwo\x1b[201~", id="bracketed paste"),
    ],
)
def test_repl_takes_several_lines_as_one_message(room: Room, keys: str) -> None:
    room.type(keys)
    assert room.questions == ["one\ntwo"]


def test_repl_ctrl_c_clears_the_line_and_at_an_empty_one_tells_how_to_end(room: Room) -> None:
    assert "ends the chat)" not in room.type("not this\x03this")
    assert "ends the chat)" in room.type("\x03")
    assert room.questions == ["this"]


@pytest.mark.parametrize("leave", ["\r", "\x03"], ids=["enter", "ctrl-c"])
def test_repl_leaves_the_search_of_ctrl_r(room: Room, leave: str) -> None:
    """Enter did nothing there, and after Ctrl-C nothing typed was seen any more."""
    room.type("one", f"\x12{leave}two")
    assert room.questions == ["one", "two"]


def test_repl_suggests_the_nearest_command_and_sends_nothing(room: Room) -> None:
    assert "/imgae is not a command; did you mean /image?" in room.type("/imgae red.png")
    assert room.questions == []


def test_repl_sends_a_line_that_begins_with_two_slashes(room: Room) -> None:
    room.type("//image is a word")
    assert room.questions == ["/image is a word"]


def test_repl_replaces_bytes_that_are_not_utf_8(room: Room) -> None:
    room.type("a\udcffb")
    assert room.questions == ["a\ufffdb"]


@pytest.mark.parametrize(
    ("failure", "line"),
    [
        pytest.param(OutOfMemory("no memory left"), "no memory left\n", id="expected"),
        pytest.param(KeyError("x"), "(--debug shows where): KeyError: 'x'\n", id="unexpected"),
    ],
)
def test_repl_outlives_a_failed_turn(room: Room, failure: Exception, line: str) -> None:
    room.backend.answers = [failure, "Yes."]
    said = room.type("Red?", "Round?")
    assert line in said
    assert [turn.user.text for turn in room.session.conversation.turns] == ["Round?"]


def test_repl_outlives_a_message_that_is_too_long(room: Room) -> None:
    assert "the message needs 602 tokens" in room.type("word " * 600, "short?")
    assert room.questions == ["short?"]


def test_repl_image_sends_pictures_with_the_next_question(room: Room) -> None:
    red, blue = room.picture(), room.picture("my blue.png", "blue")
    said = room.type(f"/image {red} {shlex.quote(str(blue))}", "What?", "And?")
    assert "picture 1: " in said
    assert [len(turn.user.images) for turn in room.session.conversation.turns] == [2, 0]


def test_repl_image_takes_a_path_with_spaces_as_it_is(room: Room) -> None:
    room.type(f"/image {room.picture('my red.png')}")
    assert len(room.session.queued) == 1


def test_repl_image_names_each_bad_picture_and_takes_the_others(room: Room) -> None:
    said = room.type(f"/image /no/one.png {room.picture()} /no/two.png")
    assert "/no/one.png: no such file" in said
    assert "/no/two.png: no such file" in said
    assert len(room.session.queued) == 1


def test_repl_attaches_a_path_dropped_into_a_question(room: Room) -> None:
    room.type(f"{room.picture()} What is it?")
    (seen,) = room.backend.seen
    assert (seen.pending and seen.pending.text, len(seen.images)) == ("What is it?", 1)


def test_repl_sends_nothing_when_a_dropped_picture_is_bad(room: Room) -> None:
    (room.root / "bad.png").write_text("no picture")
    assert "bad.png is text" in room.type(f"{room.root}/bad.png What is it?")
    assert (room.questions, room.session.queued) == ([], ())


def test_repl_lists_and_removes_pictures(room: Room) -> None:
    red, blue = room.picture(), room.picture("blue.png", "blue")
    said = room.type(f"/image {red}", "What?", f"/image {blue}", "/images")
    assert f"1  {red} (8×6)" in said
    assert "waits for the next question" in said
    room.type("/images remove 1", "/images remove 1")
    assert room.chat.session.conversation.images + room.session.queued == ()


@pytest.mark.parametrize("number", ["0", "3", "x", ""])
def test_repl_refuses_to_remove_a_picture_that_is_not_there(room: Room, number: str) -> None:
    said = room.type(f"/image {room.picture()}", f"/images remove {number}")
    assert "give the number of a picture to remove; this chat has 1 picture" in said


def test_repl_sets_and_shows_the_system_prompt(room: Room) -> None:
    said = room.type("/system", "/system Be brief.", "/system")
    assert "no system prompt" in said
    assert room.session.conversation.system == "Be brief."
    room.type("/system none")
    assert room.session.conversation.system == ""


@pytest.mark.parametrize(
    ("line", "key", "value"),
    [
        ("temperature 0", "temperature", 0.0),
        ("--top-p 0.5", "top_p", 0.5),
        ("top_k 3", "top_k", 3),
        ("max-new-tokens 7", "max_new_tokens", 7),
        ("seed 11", "seed", 11),
        ('stop "\\n\\n" END', "stop", ("\n\n", "END")),
        ("stop \\n ### \\end", "stop", ("\n", "###", "\\end")),
        ("stop none", "stop", ()),
    ],
)
def test_repl_changes_a_setting(room: Room, line: str, key: str, value: object) -> None:
    room.type(f"/set {line}")
    assert getattr(room.session.params, key) == value


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("temperature -1", "--temperature is -1.0"),
        ("temperature hot", "temperature is 'hot'; it must be a number"),
        ("top-k 1.5", "it must be a whole number"),
        ("max-new-tokens 512", "leaves no room for a question"),
        ("warmth 1", "there is no setting warmth"),
        ("seed", "give a value: /set seed VALUE"),
    ],
)
def test_repl_refuses_a_bad_setting_in_one_line(room: Room, line: str, said: str) -> None:
    before = room.session.params
    assert said in room.type(f"/set {line}")
    assert room.session.params == before


def test_repl_regenerates_the_last_answer(room: Room) -> None:
    room.backend.answers = ["Red.", "Blue."]
    room.type("What?", "/regen")
    assert [turn.answer for turn in room.session.conversation.turns] == ["Blue."]


def test_repl_edits_the_last_question(room: Room) -> None:
    room.type(f"/image {room.picture()}", "What?", "/edit Which colour?")
    (turn,) = room.session.conversation.turns
    assert (turn.user.text, len(turn.user.images)) == ("Which colour?", 1)


def test_repl_obeys_commands_while_a_question_is_edited(room: Room) -> None:
    room.type("What?", "/edit", "\x15/undo", "Next?")
    assert [turn.user.text for turn in room.session.conversation.turns] == ["Next?"]


def test_repl_edit_without_text_puts_the_question_into_the_prompt(room: Room) -> None:
    room.type("What is it?", "/edit", " Exactly?")
    assert room.questions == ["What is it?", "What is it? Exactly?"]
    assert len(room.session.conversation.turns) == 1


@pytest.mark.parametrize("command", ["/regen", "/edit", "/edit x", "/undo", "/copy"])
def test_repl_says_when_there_is_no_question_yet(room: Room, command: str) -> None:
    assert "there is no question yet\n" in room.type(command)


def test_repl_undo_takes_the_turn_back(room: Room) -> None:
    said = room.type("One?", "Two?", "/undo")
    assert "took back: Two?" in said
    assert [turn.user.text for turn in room.session.conversation.turns] == ["One?"]


def test_repl_clear_forgets_all_but_the_system_prompt(room: Room) -> None:
    said = room.type("/system Be brief.", f"{room.picture()} What?", "/clear")
    assert "forgot 1 turn and 1 picture; the system prompt stays" in said
    assert room.session.conversation == Conversation("Be brief.")


def test_repl_clear_leaves_the_saved_chat_as_it_was(room: Room) -> None:
    room.type("One?", "/clear", "Two?")
    first_questions = {entry.first_words for entry in room.store.list()}
    assert first_questions == {"One?", "Two?"}


def test_repl_history_shows_what_the_trimmer_dropped_and_a_gauge(room: Room) -> None:
    room.backend.answers = ["long " * 60] * 9
    room.session.set_params(SamplingParams(max_new_tokens=256))
    said = room.type(*[f"Question {number}?" for number in range(9)], "/history")
    assert "dropped the " in said
    assert "no longer remembered by the model" in said
    assert "/512 tokens · 0 of them pictures · 256 kept for the answer" in said


def test_repl_saves_under_a_name_and_loads_it(room: Room) -> None:
    room.type(f"{room.picture()} What?", "/save mine")
    conversation = room.session.conversation
    said = room.type("/clear", "/load mine", "/sessions")
    assert room.session.conversation == conversation
    assert "> What?" in said
    assert "→  mine" in said


def test_repl_saves_into_a_file_and_loads_it(room: Room) -> None:
    file = room.root / "chat.json"
    room.type(f"{room.picture()} What?", f"/save {file}")
    conversation = room.session.conversation
    room.type("/clear", f"/load {file}")
    assert room.session.conversation == conversation


def test_repl_never_overwrites_a_file_or_a_session(room: Room) -> None:
    (room.root / "chat.json").write_text("mine")
    room.type("What?", "/save one", "/clear", "Why?", "/save two")
    said = room.type("/save one", f"/save {room.root}/chat.json")
    assert "there is a session one already" in said
    assert "chat.json exists" in said
    assert (room.root / "chat.json").read_text() == "mine"


def test_repl_deletes_a_session_but_not_the_one_it_is_in(room: Room) -> None:
    room.type("What?", "/save one", "/save two")
    assert "deleted one" in room.type("/sessions delete one")
    assert "this chat is that session" in room.type("/sessions delete two")


def test_repl_saves_the_chat_by_itself(room: Room) -> None:
    said = room.type("What?")
    (name,) = room.store.names()
    assert f"saved as {name}" in said
    assert room.store.load(name).conversation == room.session.conversation


def test_repl_says_at_the_end_that_the_chat_could_not_be_saved(tmp_path: Path) -> None:
    """It said "saved as …", after the disk had become full."""
    room = Room(tmp_path / "room")
    (tmp_path / "room").write_text("not a folder")
    warnings: list[str] = []
    room.autosave = Autosave(room.store, "scripted", warnings.append, "mine")
    said = room.type("Hello", "/save")
    assert "the end of this chat could not be saved" in said
    assert "mine.json: " in said
    assert "saved as" not in said


def test_repl_chats_on_when_typed_lines_cannot_be_kept(room: Room, tmp_path: Path) -> None:
    """A full disk showed a traceback after each line."""
    history = _PrivateHistory(str(tmp_path))  # a folder can be neither read nor written
    history.append_string("Hello")
    assert list(history.load_history_strings()) == []


@pytest.mark.parametrize("command", ["/save", "/load"])
def test_repl_takes_a_path_of_an_unknown_user_for_one_that_is_not_there(
    room: Room, command: str
) -> None:
    """It was told as an unexpected failure."""
    assert "~nosuchuser/x.json: No such file" in room.type("Hello", f"{command} ~nosuchuser/x.json")


def test_repl_numbers_turns_of_pictures_as_history_does(room: Room) -> None:
    room.session.forgotten = (Turn(Message("user", "Old?"), "Yes."),)
    said = room.type(f"What is it? {room.picture()}", "/images")
    assert "turn 2" in said


def test_repl_puts_an_unanswered_question_into_the_prompt(room: Room) -> None:
    room.session.unanswered = Message("user", "Red?")
    assert "no answer yet; Enter asks it again" in room.type("")
    assert room.questions == ["Red?"]


def test_repl_shows_the_last_turns_of_a_resumed_chat(room: Room) -> None:
    turns = tuple(Turn(Message("user", f"Q{n}"), f"A{n}") for n in range(4))
    room.chat.session = ChatSession(room.backend, room.session.params, Conversation("", turns))
    said = room.type()
    assert "… 2 earlier turns; /history lists them\n> Q2\nA2\n> Q3\nA3\n" in said


def test_repl_counts_what_the_answers_cost(room: Room) -> None:
    said = " ".join(room.type("One?", "Two?", "/stats").split())
    assert "answers 2, " in said
    assert "from the cache 3 (" in said


def test_repl_copies_the_last_answer(room: Room, monkeypatch: pytest.MonkeyPatch) -> None:
    copied: list[str] = []

    def copy_text(text: str, terminal: object) -> str:
        copied.append(text)
        return "here"

    monkeypatch.setattr(slash, "copy_text", copy_text)
    assert "copied 14 characters (here)" in room.type("Red?", "/copy")
    assert copied == ["You said: Red?"]


def test_repl_help_lists_every_command(room: Room) -> None:
    said = room.type("/help")
    assert all(command.usage in said for command in slash.COMMANDS)


def test_repl_works_without_a_store(room: Room) -> None:
    room.autosave.close()
    room.autosave = None  # type: ignore[assignment]
    assert "this chat is not saved" in room.type("Red?", "/save it")
    room.autosave = Autosave(room.store, "scripted", pytest.fail)


def completions(room: Room, text: str) -> list[str]:
    completer = _SlashCompleter(room.chat)
    return [found.text for found in completer.get_completions(Document(text), CompleteEvent())]


def test_completion_offers_commands_settings_sessions_and_paths(room: Room) -> None:
    room.picture()
    room.type("What?", "/save mine")
    assert completions(room, "/im") == ["/image", "/images"]
    assert completions(room, "/set to") == ["top-p", "top-k"]
    assert completions(room, "/load mi") == ["mine"]
    assert completions(room, f"/image {room.root}/re") == ["d.png"]
    assert completions(room, f"/image {room.root}/red.png {room.root}/re") == ["d.png"]
    assert completions(room, "no command") == []


class Pressed:
    """An answer that remembers being cancelled."""

    def __init__(self) -> None:
        self.cancelled = 0
        self.over = False

    def cancel(self) -> None:
        self.cancelled += 1


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        pass


def test_ctrl_c_first_stops_the_answer_then_leaves_it_and_no_more() -> None:
    answer = Pressed()
    with CtrlC() as ctrl_c:
        ctrl_c.stops(answer)
        signal.raise_signal(signal.SIGINT)
        until(lambda: answer.cancelled == 1)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
    assert answer.cancelled == 1


def test_ctrl_c_lets_an_answer_that_is_over_be_saved() -> None:
    """An impatient second Ctrl-C cut the saving short: the stopped answer was not on disk."""
    answer = Pressed()
    with CtrlC() as ctrl_c:
        ctrl_c.stops(answer)
        signal.raise_signal(signal.SIGINT)
        answer.over = True
        signal.raise_signal(signal.SIGINT)


def test_ctrl_c_before_the_answer_began_stops_it_at_once() -> None:
    answer = Pressed()
    with CtrlC() as ctrl_c:
        signal.raise_signal(signal.SIGINT)
        ctrl_c.stops(answer)
    assert answer.cancelled == 1


def test_ctrl_c_is_as_before_afterwards() -> None:
    before = signal.getsignal(signal.SIGINT)
    with CtrlC():
        assert signal.getsignal(signal.SIGINT) != before
    assert signal.getsignal(signal.SIGINT) == before


class Impatient(io.StringIO):
    """A terminal at which somebody presses Ctrl-C when a certain word appears."""

    def write(self, text: str) -> int:
        if text == " two":
            signal.raise_signal(signal.SIGINT)
        return super().write(text)


def test_repl_keeps_what_was_said_before_ctrl_c_and_goes_on(room: Room) -> None:
    room.said = room.console.file = Impatient()
    room.backend.answers, room.backend.delay_s = ["one two " + "three " * 400], 0.01
    assert "(stopped)\n" in room.type("What?", "And?")
    first, second = room.session.conversation.turns
    assert first.interrupted
    assert first.answer.startswith("one two")
    assert (second.answer, second.interrupted) == ("You said: And?", False)
