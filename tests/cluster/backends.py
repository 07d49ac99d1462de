"""Loaders for replicas: importable there, no torch."""

from __future__ import annotations

from tests.fakes import ScriptedBackend, ScriptedStream
from vlmchat.conversation import Conversation
from vlmchat.errors import EngineDead
from vlmchat.request import SamplingParams


class Echo(ScriptedBackend):
    """Says each question again; its engine can be asked to stop."""

    def stream(self, conversation: Conversation, params: SamplingParams) -> ScriptedStream:
        if conversation.pending and conversation.pending.text == "stop the engine":
            self.answers = [EngineDead("the engine was asked to stop")]
        return super().stream(conversation, params)


def echo(delay_s: float) -> Echo:
    """Says each question again, a word every `delay_s`."""
    return Echo(delay_s=delay_s, model="echo")
