"""A backend that is on its way: what answers at once, what waits, what it raises."""

from __future__ import annotations

import threading

import pytest

from tests.fakes import ScriptedBackend
from vlmchat.conversation import Conversation
from vlmchat.errors import OutOfMemory
from vlmchat.loading import Loading, Progress
from vlmchat.request import SamplingParams

QUESTION = Conversation().ask("Red?")


def test_loading_tells_its_stage_until_the_model_is_there() -> None:
    go, told = threading.Event(), threading.Event()

    def load(progress: Progress) -> ScriptedBackend:
        progress("reading")
        told.set()
        go.wait(60)
        return ScriptedBackend(model="there")

    loading = Loading("here", load)
    loading.start()
    assert told.wait(60)
    assert loading.stage == "reading"
    assert (loading.status().model, loading.status().context_length) == ("here", 0)
    go.set()
    assert loading.wait()
    assert loading.stage is None
    assert loading.status().model == "there"


def test_loading_answers_once_loaded() -> None:
    loading = Loading("here", lambda _: ScriptedBackend(context_length=2048))
    assert "".join(d.text for d in loading.stream(QUESTION, SamplingParams())) == "You said: Red?"
    assert loading.count(QUESTION) == ScriptedBackend().count(QUESTION)


def test_loading_raises_what_loading_raised() -> None:
    def load(progress: Progress) -> ScriptedBackend:
        raise OutOfMemory("it is too large")

    loading = Loading("here", load)
    with pytest.raises(OutOfMemory, match="it is too large"):
        loading.count(QUESTION)
    loading.close()


def test_loading_keeps_notes_for_whoever_takes_them() -> None:
    def load(progress: Progress) -> ScriptedBackend:
        progress("note: heed this")
        return ScriptedBackend()

    loading = Loading("here", load)
    loading.wait()
    assert loading.take_notes() == ["note: heed this"]
    assert loading.take_notes() == []
