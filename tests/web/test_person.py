"""A person's turns: what is kept when they fail, and what is shown."""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.fakes import ScriptedBackend, picture
from tests.web.pages import long_answer
from vlmchat.config import ImagePolicy, sampling_params
from vlmchat.errors import EngineDead, InvalidRequest, NetworkError, NoWorker, VlmchatError
from vlmchat.images import ImageLoader
from vlmchat.request import Backend
from vlmchat.web import markup
from vlmchat.web.log import ConversationLog
from vlmchat.web.person import IDLE_S, KEPT_S, People, Person, Wishes
from vlmchat.web.shapes import shaped

LOADER = ImageLoader(ImagePolicy(allow_local_files=False))


def wishes(mode: str = "Default", max_new_tokens: int = 32) -> Wishes:
    return Wishes("m", sampling_params(max_new_tokens=max_new_tokens), mode=mode)


def ask(person: Person, backend: Backend, text: str = "hello", mode: str = "Default") -> None:
    for _ in person.ask(text, lambda: backend, wishes(mode)):
        pass


def again(person: Person, backend: Backend) -> None:
    for _ in person.again(lambda: backend, wishes()):
        pass


def change(person: Person, backend: Backend, index: int | None, text: str) -> None:
    person.edit(index)
    for _ in person.ask_edited(text, lambda: backend, wishes()):
        pass


def test_changed_question_takes_the_place_of_all_that_follows() -> None:
    person, backend = Person(LOADER), ScriptedBackend()
    for text in ("one", "two", "three"):
        ask(person, backend, text)
    change(person, backend, 1, "other")
    assert [turn.user.text for turn in person.conversation.turns] == ["one", "other"]


def test_change_that_fails_leaves_what_followed() -> None:
    person, backend = Person(LOADER), ScriptedBackend(["a", "b", EngineDead("gone")])
    ask(person, backend, "one")
    ask(person, backend, "two")
    change(person, backend, 0, "other")
    assert [turn.user.text for turn in person.conversation.turns] == ["one", "two"]
    assert person.undo() == "two"


def test_picture_of_a_sent_question_can_be_taken_out_while_it_is_changed() -> None:
    person, backend = Person(LOADER), ScriptedBackend()
    person.attach(picture())
    ask(person, backend, "one")
    person.edit(0)
    assert person.waiting == (picture(),)
    person.keep_waiting([])
    for _ in person.ask_edited("other", lambda: backend, wishes()):
        pass
    assert person.conversation.images == ()


def test_question_left_unchanged_keeps_its_pictures() -> None:
    person, backend = Person(LOADER), ScriptedBackend()
    person.attach(picture())
    ask(person, backend, "one")
    person.edit()
    person.leave_unchanged()
    assert (person.waiting, len(person.conversation.images)) == ((), 1)


@pytest.mark.parametrize("kind", [NoWorker, NetworkError])
def test_lost_workers_are_told_without_their_addresses(kind: type[VlmchatError]) -> None:
    person = Person(LOADER)
    lost = kind("no worker for m came within 20 s; last: http://10.0.0.7:21002: silent")
    ask(person, ScriptedBackend([lost]))
    assert person.trouble.startswith("the model m went away")
    assert "10.0.0.7" not in person.trouble
    assert person.open is not None


def test_what_was_said_before_an_answer_broke_off_stays_until_the_next() -> None:
    lost = RuntimeError("silent", "half an answer")
    person, backend = Person(LOADER), ScriptedBackend([lost, "a whole one"])
    ask(person, backend)
    assert markup.messages(person)[-1]["content"] == "half an answer\n\n*(broken off)*"
    again(person, backend)
    assert [said["role"] for said in markup.messages(person)] == ["user", "assistant"]
    assert markup.messages(person)[-1]["content"] == "a whole one"


def test_changed_question_stands_below_when_its_answer_fails() -> None:
    person, backend = Person(LOADER), ScriptedBackend(["fine", EngineDead("gone")])
    ask(person, backend, "one")
    person.edit(0)
    for _ in person.ask_edited("other", lambda: backend, wishes()):
        pass
    said = [each["content"] for each in markup.messages(person)]
    assert said[1:] == ["fine", "*— in place of question 1, unanswered —*", "other"]


@pytest.mark.parametrize("code", ["`a<b && c`", "```\nif a < b:\n```"])
def test_question_shows_tags_as_typed_and_code_as_it_is(code: str) -> None:
    person = Person(LOADER)
    ask(person, ScriptedBackend(), f"<b>\n{code}\n<i>")
    assert markup.messages(person)[0]["content"].startswith(f"&lt;b&gt;\n{code}\n&lt;i&gt;")


def test_failed_turn_keeps_the_conversation_and_its_question() -> None:
    person, backend = Person(LOADER), ScriptedBackend(["fine", EngineDead("gone")])
    ask(person, backend, "one")
    person.attach(picture())
    ask(person, backend, "two")
    assert [turn.answer for turn in person.conversation.turns] == ["fine"]
    assert person.trouble.startswith("the model has stopped")
    again(person, backend)
    assert person.conversation.turns[1].user.images == (picture(),)
    assert person.trouble == ""


def test_failed_regenerate_keeps_the_old_answer() -> None:
    person, backend = Person(LOADER), ScriptedBackend(["fine", EngineDead("gone")])
    ask(person, backend)
    again(person, backend)
    assert [turn.answer for turn in person.conversation.turns] == ["fine"]
    shown = [said["content"].partition("\n")[0] for said in markup.messages(person)]
    assert shown == ["hello", "fine"]


def test_next_question_takes_the_pictures_of_a_failed_one_along() -> None:
    person, backend = Person(LOADER), ScriptedBackend([EngineDead("gone"), "fine"])
    person.attach(picture())
    ask(person, backend, "one")
    ask(person, backend, "two")
    (turn,) = person.conversation.turns
    assert (turn.user.text, len(turn.user.images)) == ("two", 1)


def test_bug_in_an_answer_is_told_without_a_stack(caplog: pytest.LogCaptureFixture) -> None:
    person = Person(LOADER)
    ask(person, ScriptedBackend([RuntimeError("inner detail")]))
    assert "inner detail" not in person.trouble
    assert "inner detail" in caplog.text


def test_stop_before_the_first_word_leaves_the_question_to_be_retried() -> None:
    person = Person(LOADER)
    turn = person.ask("hello", lambda: ScriptedBackend([long_answer()], delay_s=0.01), wishes())
    next(turn)
    person.stop()
    for _ in turn:
        pass
    assert person.conversation.turns == ()
    assert person.last_question() == "hello"


def test_second_question_is_refused_while_an_answer_is_under_way() -> None:
    person, backend = Person(LOADER), ScriptedBackend([long_answer()], delay_s=0.01)
    turn = person.ask("one", lambda: backend, wishes())
    next(turn)
    with pytest.raises(InvalidRequest, match="under way"):
        next(person.ask("two", lambda: backend, wishes()))
    with pytest.raises(InvalidRequest, match="under way"):
        person.clear()
    del turn  # the page has gone
    assert not person.busy


def test_dropped_turns_are_shown_above_a_line_and_told_of() -> None:
    person, backend = Person(LOADER), ScriptedBackend(["one two three"] * 9, context_length=60)
    for number in range(9):
        ask(person, backend, f"question {number}")
    said = [str(message["content"]) for message in markup.messages(person)]
    assert person.forgotten
    assert said[0] == "question 0"
    assert any("no longer remembers" in text for text in said)


def test_markup_of_strangers_is_escaped() -> None:
    person = Person(LOADER)
    person.attach(picture('"><script>.png'))
    ask(person, ScriptedBackend(["fine"]), "<script>alert(1)</script>")
    said = "".join(str(message["content"]) for message in markup.messages(person))
    assert "<script>" not in said


def test_undo_gives_text_and_pictures_back() -> None:
    person = Person(LOADER)
    person.attach(picture())
    ask(person, ScriptedBackend(["fine"]), "hello", mode="Pad")
    assert person.undo() == "hello"
    assert person.waiting == (picture(),)
    assert person.conversation.turns == ()


@pytest.mark.parametrize(
    ("mode", "size"),
    [("Default", (8, 6)), ("Crop", (6, 6)), ("Resize", (336, 336)), ("Pad", (8, 8))],
)
def test_shaped_picture_has_the_size_of_its_mode(mode: str, size: tuple[int, int]) -> None:
    result = shaped(picture(), mode, LOADER)
    assert (result.width, result.height) == size


def test_people_who_give_no_sign_of_life_are_forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    people, now = People(LOADER), [0.0]
    monkeypatch.setattr("vlmchat.web.person.time.monotonic", lambda: now[0])
    first = people.of("a")
    now[0] = IDLE_S + 1
    people.of("b")
    assert people.by_token(first.token) is None
    assert len(people) == 1


def test_person_comes_back_for_a_while_after_leaving_and_to_one_tab_only() -> None:
    people = People(LOADER)
    first = people.of("a")
    people.leave("a")
    assert len(people) == 0
    assert people.back("b", first.token) is first
    assert people.back("c", first.token) is not first
    people.leave("b")
    assert people.of("b") is first  # who was out of reach only
    people.leave("b")
    first.touched -= KEPT_S + 1
    assert people.back("d", first.token) is not first


def test_secret_that_cannot_be_is_nobodys() -> None:
    people = People(LOADER)
    people.of("a")
    assert people.by_token("\ud800 é") is None


def test_log_that_cannot_be_written_is_an_os_error_for_the_page(tmp_path: Path) -> None:
    log, person = ConversationLog(tmp_path / "logs"), Person(LOADER)
    ask(person, ScriptedBackend(["fine"]))
    (tmp_path / "logs").rmdir()
    assert person.answered is not None
    with pytest.raises(OSError, match="No such file"):
        log.chat(person.conversation, person.answered, "")


def test_concurrent_stop_reaches_the_answer_under_way() -> None:
    person, backend = Person(LOADER), ScriptedBackend([long_answer(5000)], delay_s=0.005)
    run: Callable[[], None] = lambda: ask(person, backend)  # noqa: E731
    thread = threading.Thread(target=run)
    thread.start()
    while not person.partial:
        threading.Event().wait(0.01)
    person.stop()
    thread.join(10)
    assert person.conversation.turns[0].interrupted


def test_changed_question_that_failed_is_taken_up_again_until_it_is_left() -> None:
    person, backend = Person(LOADER), ScriptedBackend(["fine", EngineDead("gone")])
    person.attach(picture())
    ask(person, backend, "one")
    change(person, backend, 0, "other")
    assert person.edited is not None
    assert (person.edited.question.text, person.waiting) == ("other", (picture(),))
    person.leave_unchanged()
    assert (person.open, person.waiting, person.trouble) == (None, (), "")
    assert [said["role"] for said in markup.messages(person)] == ["user", "user", "assistant"]


def test_picture_added_after_a_failed_answer_leaves_what_is_told_of_it() -> None:
    person = Person(LOADER)
    ask(person, ScriptedBackend([EngineDead("gone")]))
    person.attach(picture())
    assert person.trouble.startswith("the model has stopped")
