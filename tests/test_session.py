"""ChatSession and its trimmer over a scripted backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from tests.fakes import ScriptedBackend, picture
from vlmchat.conversation import Conversation, Message, Turn
from vlmchat.errors import ConfigError, InvalidRequest, OutOfMemory, PromptTooLong
from vlmchat.request import FinishReason, SamplingParams
from vlmchat.session import ChatSession, Reply

RED, BLUE = picture("red.png", "red"), picture("blue.png", "blue")


def make_session(backend: ScriptedBackend | None = None, room: int = 10) -> ChatSession:
    return ChatSession(backend or ScriptedBackend(), SamplingParams(max_new_tokens=room))


def finish(reply: Reply) -> Reply:
    with reply:
        for _ in reply:
            pass
    return reply


def interrupt_at(reply: Reply, word: str) -> None:
    with reply:
        for delta in reply:
            if word in delta.text:
                raise KeyboardInterrupt


def test_ask_adds_the_turn_when_the_answer_has_ended() -> None:
    session = make_session(ScriptedBackend(["  It is red. "]))
    finish(session.ask("colour?", (RED,)))
    assert session.conversation.turns == (Turn(Message("user", "colour?", (RED,)), "It is red."),)
    assert session.unanswered is None


def test_queued_pictures_go_with_the_next_question_only() -> None:
    session = make_session()
    session.attach(RED)
    finish(session.ask("one"))
    finish(session.ask("two"))
    assert [turn.user.images for turn in session.conversation.turns] == [(RED,), ()]


def test_history_is_as_before_when_a_turn_fails() -> None:
    backend = ScriptedBackend([OutOfMemory("no room", "half an"), "fine"])
    session = make_session(backend)
    session.attach(RED)
    with pytest.raises(OutOfMemory):
        finish(session.ask("one"))
    assert session.conversation == Conversation()
    assert session.queued == (RED,)
    assert session.unanswered == Message("user", "one", (RED,))
    finish(session.ask("two"))
    assert [turn.user.text for turn in session.conversation.turns] == ["two"]


def test_reply_keeps_the_partial_answer_after_ctrl_c() -> None:
    session = make_session(ScriptedBackend(["one two three four"]))
    reply = session.ask("count")
    with pytest.raises(KeyboardInterrupt):
        interrupt_at(reply, "two")
    assert session.conversation.turns[0].answer == "one two"
    assert session.conversation.turns[0].interrupted
    assert reply.finish_reason is FinishReason.CANCELLED


def test_reply_stopped_before_a_word_leaves_the_history() -> None:
    session = make_session()
    with pytest.raises(KeyboardInterrupt), session.ask("hello"):
        raise KeyboardInterrupt
    assert session.conversation.turns == ()
    assert session.unanswered == Message("user", "hello")


def test_regenerate_replaces_the_last_answer_and_keeps_it_when_that_fails() -> None:
    session = make_session(ScriptedBackend(["first", OutOfMemory("no room"), "second"]))
    finish(session.ask("q", (RED,)))
    with pytest.raises(OutOfMemory):
        finish(session.regenerate())
    assert [turn.answer for turn in session.conversation.turns] == ["first"]
    finish(session.regenerate())
    assert [turn.answer for turn in session.conversation.turns] == ["second"]
    assert session.conversation.images == (RED,)


def test_edit_asks_another_question_with_the_same_pictures() -> None:
    session = make_session()
    finish(session.ask("q", (RED,)))
    finish(session.edit("other"))
    assert session.conversation.turns[0].user == Message("user", "other", (RED,))


def test_undo_takes_the_last_turn_back() -> None:
    session = make_session()
    finish(session.ask("a"))
    finish(session.ask("b"))
    assert session.undo().user.text == "b"
    assert [turn.user.text for turn in session.conversation.turns] == ["a"]


def test_undo_leaves_pictures_of_forgotten_turns_to_the_next_question() -> None:
    """A picture that the trimmer had moved into the only turn left went with that turn."""
    session = make_session(ScriptedBackend(context_length=60), room=10)
    finish(session.ask("one two three four five six seven", (RED,)))
    finish(session.ask("eight nine ten eleven", (BLUE,)))
    assert [turn.user.images for turn in session.conversation.turns] == [(RED, BLUE)]
    assert session.undo().user.images == (BLUE,)
    assert session.queued == (RED,)


def test_regenerate_leaves_no_question_unanswered() -> None:
    """After a crash in a second answer, the question came back though its first answer was kept."""
    session = make_session()
    finish(session.ask("a"))
    session.regenerate()
    assert session.unanswered is None


@pytest.mark.parametrize("act", [ChatSession.undo, ChatSession.regenerate])
def test_session_refuses_to_go_back_when_there_is_no_turn(act: object) -> None:
    with pytest.raises(InvalidRequest, match="no question"):
        act(make_session())  # type: ignore[operator]


def test_clear_keeps_the_system_prompt() -> None:
    session = make_session()
    session.set_system("Be brief.")
    finish(session.ask("a", (RED,)))
    session.clear()
    assert session.conversation == Conversation(system="Be brief.")


def test_remove_image_takes_sent_and_queued_pictures() -> None:
    session = make_session()
    finish(session.ask("a", (RED,)))
    session.attach(BLUE)
    assert session.remove_image(1) == BLUE
    assert session.remove_image(0) == RED
    assert session.conversation.images == session.queued == ()


def test_on_change_sees_the_question_before_the_answer_begins() -> None:
    seen: list[tuple[int, bool]] = []
    session = make_session()
    session.on_change = lambda s: seen.append((len(s.conversation.turns), bool(s.unanswered)))
    finish(session.ask("a"))
    assert seen == [(0, True), (1, False)]


@pytest.mark.parametrize(
    "act",
    [
        pytest.param(lambda session: session.attach(BLUE), id="attach"),
        pytest.param(lambda session: session.remove_image(0), id="remove a queued picture"),
        pytest.param(
            lambda session: session.set_params(SamplingParams(max_new_tokens=3)), id="set"
        ),
        pytest.param(lambda session: session.set_system("Be brief."), id="system"),
    ],
)
def test_on_change_hears_of_every_change(act: Callable[[ChatSession], object]) -> None:
    session = make_session()
    session.attach(RED)
    heard: list[ChatSession] = []
    session.on_change = heard.append
    act(session)
    assert heard == [session]


def test_session_refuses_parameters_that_leave_no_room() -> None:
    with pytest.raises(ConfigError, match="512"):
        make_session(ScriptedBackend(context_length=512), room=512)


def test_trimmer_drops_oldest_turns_to_the_low_water_mark_and_keeps_the_picture() -> None:
    backend = ScriptedBackend(context_length=110)
    session = make_session(backend, room=10)
    session.set_system("Be kind.")
    sizes = []
    for index in range(40):
        reply = finish(session.ask(f"question number {index}", (RED,) if index == 0 else ()))
        sizes.append(backend.count(reply.conversation).tokens)
        assert reply.conversation.images == (RED,)
        assert reply.conversation.system == "Be kind."
        if reply.trimmed:
            assert reply.trimmed.turns >= 2
            assert sizes[-1] < 0.8 * session.budget
    assert max(sizes) <= session.budget
    kept = len(session.conversation.turns)
    assert [turn.user.text for turn in session.forgotten] == [
        f"question number {index}" for index in range(40 - kept)
    ]


def test_trimmer_moves_a_picture_of_a_dropped_turn_to_the_oldest_turn_kept() -> None:
    session = make_session(ScriptedBackend(context_length=110), room=10)
    for index in range(12):
        images = {0: (RED,), 3: (BLUE,)}.get(index, ())
        finish(session.ask(f"question number {index}", images))
    assert session.conversation.turns[0].user.images == (RED, BLUE)


def test_trimmer_drops_oldest_pictures_that_no_longer_fit_and_says_so() -> None:
    session = make_session(ScriptedBackend(context_length=60), room=10)
    finish(session.ask("one", (RED,)))
    finish(session.ask("two", (BLUE,)))
    reply = finish(session.ask("three", (picture("green.png", "green"),)))
    assert reply.trimmed.images == (RED,)
    assert [image.source for image in session.conversation.images] == ["blue.png", "green.png"]


def test_trimmer_does_not_bring_back_a_picture_that_was_removed() -> None:
    session = make_session(ScriptedBackend(context_length=80), room=10)
    finish(session.ask("one", (RED,)))
    session.remove_image(0)
    for index in range(12):
        finish(session.ask(f"question number {index}"))
    assert session.forgotten
    assert session.conversation.images == ()


def test_ask_refuses_a_message_that_cannot_fit_and_leaves_the_history() -> None:
    session = make_session(ScriptedBackend(context_length=60), room=10)
    finish(session.ask("one"))
    before = session.conversation
    with pytest.raises(PromptTooLong) as caught:
        session.ask("word " * 60)
    assert caught.value.tokens > caught.value.limit == 50
    assert session.conversation == before


def test_prompt_too_long_speaks_of_pictures_only_when_there_are_some() -> None:
    assert "picture" not in str(PromptTooLong(90, 80))
    assert "use fewer pictures" in str(PromptTooLong(90, 80, 16))
