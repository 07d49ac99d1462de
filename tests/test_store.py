"""Sessions on disk: what was said comes back, whatever happened in between."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest

from tests.fakes import ScriptedBackend, picture
from vlmchat.config import ImagePolicy
from vlmchat.conversation import Conversation, Message, Turn
from vlmchat.errors import SessionError
from vlmchat.images import ImageLoader
from vlmchat.request import SamplingParams
from vlmchat.session import ChatSession
from vlmchat.session_file import SavedSession, resume
from vlmchat.store import Autosave, SessionStore, read_file, write_file

ROOT = Path(__file__).parents[1]
LOADER = ImageLoader(ImagePolicy())
RED, BLUE = picture("red.png", "red"), picture("http://a.b/blue.png", "blue")
SAVED = SavedSession(
    name="circles",
    model="demo",
    params=SamplingParams(temperature=0.5, seed=7, stop=("\n\n",)),
    conversation=Conversation(
        "Be brief.",
        (
            Turn(Message("user", "What is it? \ud800 漢", (RED,)), "A **circle**."),
            Turn(Message("user", "And now?"), "It is st", interrupted=True),
        ),
    ),
    created="2026-11-22T19:05:00+01:00",
    updated="2026-11-22T19:06:00+01:00",
    forgotten=(Turn(Message("user", "Hello", (BLUE,)), "Hi."),),
    queued=(BLUE,),
    unanswered=Message("user", "Which colour?", (RED,)),
)


@pytest.fixture
def store(tmp_path: Path) -> SessionStore:
    return SessionStore(tmp_path / "vlmchat", LOADER, lambda: datetime(2026, 11, 22, 19, 5))


def blobs(tmp_path: Path) -> set[str]:
    return {blob.name for blob in (tmp_path / "vlmchat" / "blobs").iterdir()}


def test_store_gives_back_what_was_saved(store: SessionStore) -> None:
    store.save(SAVED)
    assert store.load("circles") == SAVED


def test_store_keeps_sources_and_bytes_of_pictures(store: SessionStore) -> None:
    store.save(SAVED)
    (image,) = store.load("circles").queued
    assert (image.source, image.data) == (BLUE.source, BLUE.data)


def test_store_writes_each_picture_once_and_not_into_the_json(
    store: SessionStore, tmp_path: Path
) -> None:
    store.save(SAVED)
    store.save(replace(SAVED, name="other"))
    assert blobs(tmp_path) == {RED.sha256, BLUE.sha256}
    assert "base64" not in (tmp_path / "vlmchat/sessions/circles.json").read_text()


def test_store_keeps_everything_private(store: SessionStore, tmp_path: Path) -> None:
    store.save(SAVED)
    for path in [tmp_path / "vlmchat", *(tmp_path / "vlmchat").rglob("*")]:
        expected = 0o700 if path.is_dir() else 0o600
        assert stat.S_IMODE(path.stat().st_mode) == expected, path


def test_store_keeps_the_old_session_when_writing_fails(
    store: SessionStore, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    store.save(SAVED)
    with monkeypatch.context() as broken:
        broken.setattr(os, "replace", lambda *paths: (_ for _ in ()).throw(OSError(28, "full")))
        with pytest.raises(SessionError, match=r"circles\.json: full"):
            store.save(replace(SAVED, model="changed"))
    assert store.load("circles").model == "demo"
    assert not list((tmp_path / "vlmchat/sessions").glob(".*"))


def test_store_is_readable_after_kill_9_at_any_moment(store: SessionStore, tmp_path: Path) -> None:
    store.save(SAVED)
    script = (
        "import sys; from tests.test_store import *\n"
        f"store = SessionStore(Path({str(tmp_path / 'vlmchat')!r}), LOADER)\n"
        "print('begins', flush=True)\n"
        "for number in range(10**9):\n"
        "    image = picture(f'{number}.png', size=(number % 500 + 1, 3))\n"
        "    store.save(replace(SAVED, queued=(image,), model=str(number)))\n"
    )
    for wait_s in (0.01, 0.083, 0.171):
        process = subprocess.Popen([sys.executable, "-c", script], cwd=ROOT, stdout=subprocess.PIPE)
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(wait_s)  # any moment will do
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert store.load("circles").lost == ()


@pytest.mark.parametrize(
    "content",
    [
        pytest.param("", id="empty"),
        pytest.param('{"format": "vlmchat-session", "version": 1', id="cut off"),
        pytest.param("[]", id="a list"),
        pytest.param('{"format": "other", "version": 1}', id="other format"),
        pytest.param('{"format": "vlmchat-session", "version": 2}', id="other version"),
        pytest.param('{"format": "vlmchat-session", "version": 1}', id="nothing in it"),
        pytest.param("[" * 100_000, id="deep"),
        pytest.param("\x00\x80", id="bytes"),
    ],
)
def test_store_names_the_path_of_a_broken_session(
    store: SessionStore, tmp_path: Path, content: str
) -> None:
    store.save(SAVED)
    path = tmp_path / "vlmchat/sessions/circles.json"
    path.write_text(content)
    with pytest.raises(SessionError, match=r"circles\.json is not a readable session") as error:
        store.load("circles")
    assert "\n" not in error.value.message


@pytest.mark.parametrize(
    ("key", "value"),
    [
        pytest.param("turns", [{"user": "x"}], id="turn"),
        pytest.param("params", {"temperature": "hot", "stop": []}, id="params of a wrong kind"),
        pytest.param("params", {"temperature": -1, "stop": []}, id="params out of range"),
        pytest.param("queued", [{"sha256": 3}], id="picture"),
        pytest.param("system", None, id="system"),
    ],
)
def test_store_refuses_a_session_with_a_wrong_field(
    store: SessionStore, tmp_path: Path, key: str, value: object
) -> None:
    store.save(SAVED)
    path = tmp_path / "vlmchat/sessions/circles.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(SessionError, match="not a readable session"):
        store.load("circles")


@pytest.mark.parametrize("damage", ["gone", "changed"])
def test_store_loses_only_the_picture_whose_file_is_damaged(
    store: SessionStore, tmp_path: Path, damage: str
) -> None:
    store.save(SAVED)
    blob = tmp_path / "vlmchat/blobs" / BLUE.sha256
    blob.unlink()
    if damage == "changed":
        blob.write_bytes(RED.data)
    loaded = store.load("circles")
    assert (loaded.lost, loaded.queued) == ((BLUE.source,), ())
    assert loaded.conversation == SAVED.conversation


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a\nb", "x" * 81, "-rf"])
def test_store_refuses_names_that_are_not_plain(store: SessionStore, name: str) -> None:
    with pytest.raises(SessionError, match="cannot name a session"):
        store.load(name)


def test_store_names_a_session_after_date_and_question(store: SessionStore) -> None:
    assert store.new_name("Is the *red* circle large?") == "2026-11-22-1905-is-the-red-circle"
    assert store.new_name("?!") == "2026-11-22-1905-chat"


def test_store_never_gives_a_name_twice(store: SessionStore) -> None:
    store.save(replace(SAVED, name=store.new_name("red")))
    assert store.new_name("red") == "2026-11-22-1905-red-2"


def test_store_lists_sessions_newest_first_and_broken_ones_too(
    store: SessionStore, tmp_path: Path
) -> None:
    store.save(SAVED)
    (tmp_path / "vlmchat/sessions/broken.json").write_text("{")
    broken, circles = store.list()
    assert (broken.name, broken.turns) == ("broken", None)
    assert (circles.name, circles.turns, circles.first_words) == ("circles", 3, "Hello")


def test_store_names_the_session_written_last_first(store: SessionStore) -> None:
    assert store.names() == ()
    store.save(SAVED)
    store.save(replace(SAVED, name="later"))
    assert store.names() == ("later", "circles")


def test_store_deletes_pictures_that_no_session_needs(store: SessionStore, tmp_path: Path) -> None:
    store.save(SAVED)
    store.save(replace(SAVED, name="other", forgotten=(), queued=()))
    store.delete("circles")
    assert blobs(tmp_path) == {RED.sha256}
    with pytest.raises(SessionError, match="there is no session circles"):
        store.load("circles")


def test_store_deletes_nothing_and_leaves_nothing_when_there_is_no_such_session(
    store: SessionStore, tmp_path: Path
) -> None:
    with pytest.raises(SessionError, match="there is no session circles"):
        store.delete("circles")
    assert not (tmp_path / "vlmchat/sessions/circles.lock").exists()


def test_store_deletes_beside_a_session_that_is_not_text(
    store: SessionStore, tmp_path: Path
) -> None:
    store.save(SAVED)
    (tmp_path / "vlmchat/sessions/broken.json").write_bytes(b"\xff")
    store.delete("circles")
    assert not store.exists("circles")


def test_store_lets_only_one_hold_a_session(store: SessionStore) -> None:
    with (
        store.hold("circles"),
        pytest.raises(SessionError, match="open in another vlmchat"),
        store.hold("circles"),
    ):
        pass
    store.hold("circles").close()


def test_a_session_file_holds_everything(tmp_path: Path) -> None:
    write_file(SAVED, tmp_path / "chat.json")
    assert read_file(tmp_path / "chat.json", LOADER) == SAVED


def test_a_session_file_whose_pictures_are_broken_still_opens(tmp_path: Path) -> None:
    path = tmp_path / "chat.json"
    write_file(SAVED, path)
    path.write_text(json.dumps({**json.loads(path.read_text()), "pictures": {RED.sha256: "?"}}))
    assert read_file(path, LOADER).lost == (RED.source, BLUE.source)


def test_resume_lets_the_pictures_of_an_unanswered_question_wait_again() -> None:
    green = picture("green.png", "green")
    saved = replace(SAVED, unanswered=Message("user", "Which colour?", (green,)))
    session = resume(saved, ScriptedBackend(context_length=1024))
    assert session.queued == (BLUE, green)
    assert (session.unanswered, session.forgotten) == (saved.unanswered, saved.forgotten)


def test_resume_does_not_send_pictures_of_an_edited_question_twice() -> None:
    assert resume(SAVED, ScriptedBackend(context_length=1024)).queued == (BLUE,)


def chat(autosave: Autosave) -> ChatSession:
    return ChatSession(ScriptedBackend(), SamplingParams(max_new_tokens=9), on_change=autosave)


@pytest.fixture
def autosave(store: SessionStore) -> Iterator[Autosave]:
    with contextlib.closing(Autosave(store, "demo", pytest.fail)) as autosave:
        yield autosave


def test_autosave_saves_the_question_before_its_answer(
    store: SessionStore, autosave: Autosave
) -> None:
    chat(autosave).ask("Red?", (RED,))
    assert store.load("2026-11-22-1905-red").unanswered == Message("user", "Red?", (RED,))


def test_autosave_saves_each_turn(store: SessionStore, autosave: Autosave) -> None:
    autosave.rename("mine")
    session = chat(autosave)
    with session.ask("Red?") as reply:
        list(reply)
    saved = store.load("mine")
    assert (saved.conversation, saved.unanswered) == (session.conversation, None)


def test_autosave_writes_nothing_before_a_question(store: SessionStore, autosave: Autosave) -> None:
    chat(autosave).set_system("Be brief.")
    assert store.list() == ()


def test_autosave_warns_once_and_lets_the_chat_go_on(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    warnings: list[str] = []
    session = chat(Autosave(SessionStore(tmp_path / "file", LOADER), "demo", warnings.append))
    for _ in range(2):
        with session.ask("Red?") as reply:
            list(reply)
    assert len(warnings) == 1
    assert len(session.conversation.turns) == 2


def test_autosave_of_a_named_session_warns_where_nothing_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    warnings: list[str] = []
    store = SessionStore(tmp_path / "file", LOADER)
    session = chat(Autosave(store, "demo", warnings.append, "mine"))
    session.set_system("Be brief.")
    assert len(warnings) == 1
    assert "mine.json: " in warnings[0]


def test_autosave_warns_again_when_it_had_worked_in_between(
    store: SessionStore, tmp_path: Path
) -> None:
    warnings: list[str] = []
    autosave = Autosave(store, "demo", warnings.append, "mine")
    session = chat(autosave)
    file = next(tmp_path.rglob("mine.lock")).with_suffix(".json")
    file.mkdir()  # in the way
    session.set_system("Be brief.")
    file.rmdir()
    session.set_system("Be kind.")
    file.unlink()
    file.mkdir()
    session.set_system("Be honest.")
    autosave.close()
    assert len(warnings) == 2


def test_autosave_refuses_a_session_that_is_open_elsewhere(
    store: SessionStore, autosave: Autosave
) -> None:
    autosave.rename("mine")
    with pytest.raises(SessionError, match="open in another vlmchat"):
        Autosave(store, "demo", pytest.fail, "mine")


def test_autosave_lets_go_of_a_session_when_it_takes_another(
    store: SessionStore, autosave: Autosave
) -> None:
    autosave.rename("mine")
    autosave.rename("other")
    store.hold("mine").close()
