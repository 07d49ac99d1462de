"""`vlmchat` with a scripted model: `python -m tests.commands.scripted`.

It repeats what it is asked; asked to count, it counts for a minute. The model `slow` loads for a
minute, `broken` fails after a moment.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from tests.fakes import ScriptedBackend, ScriptedStream
from vlmchat.commands import main
from vlmchat.config import ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine.engine import Engine
from vlmchat.errors import OutOfMemory
from vlmchat.request import SamplingParams


class Counting(ScriptedBackend):
    """Slow, and good at counting."""

    def stream(self, conversation: Conversation, params: SamplingParams) -> ScriptedStream:
        if conversation.pending is not None and conversation.pending.text == "count":
            self.answers = [" ".join(str(number) for number in range(6000))]
        return super().stream(conversation, params)

    def warm_up(self) -> threading.Event:
        """As `Engine` has it."""
        over = threading.Event()
        over.set()
        return over


backend: Any = Counting(context_length=20_000, delay_s=0.01)


def load(config: ModelConfig, progress: Callable[[str], None], limits: object) -> Any:
    name = Path(config.path).name
    progress("reading tensors")
    if name == "slow":
        time.sleep(60)
    if name == "broken":
        time.sleep(1)
        raise OutOfMemory("the model needs 9.0 GB on cpu, 1.0 GB are free")
    return backend


if __name__ == "__main__":
    Engine.load = load  # type: ignore[method-assign, assignment]
    main()
