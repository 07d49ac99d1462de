"""`vlmchat` with a scripted model that counts for a minute: `python -m tests.commands.scripted`."""

from __future__ import annotations

from typing import Any

from tests.fakes import ScriptedBackend
from vlmchat.commands import main
from vlmchat.engine.engine import Engine

if __name__ == "__main__":
    counting = " ".join(str(number) for number in range(6000))
    backend: Any = ScriptedBackend([counting], context_length=20_000, delay_s=0.01)
    Engine.load = lambda *_: backend  # type: ignore[method-assign]
    main()
