"""`vlmchat` with a scripted model: `python -m tests.commands.scripted`.

It repeats what it is asked; asked to count, it counts for a minute.
"""

from __future__ import annotations

from typing import Any

from tests.fakes import ScriptedBackend, ScriptedStream
from vlmchat.commands import main
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine
from vlmchat.request import SamplingParams


class Counting(ScriptedBackend):
    """Slow, and good at counting."""

    def stream(self, conversation: Conversation, params: SamplingParams) -> ScriptedStream:
        if conversation.pending is not None and conversation.pending.text == "count":
            self.answers = [" ".join(str(number) for number in range(6000))]
        return super().stream(conversation, params)


if __name__ == "__main__":
    backend: Any = Counting(context_length=20_000, delay_s=0.01)
    Engine.load = lambda *_: backend  # type: ignore[method-assign]
    main()
