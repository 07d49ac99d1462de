"""The REPL over a scripted backend, for tests in a real terminal; no torch, no model.

usage: python -m tests.scripted_chat STATE_DIR [--session NAME] [--delay SECONDS] [--answer TEXT]…
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from rich.console import Console

from tests.fakes import ScriptedBackend
from vlmchat.config import ImagePolicy
from vlmchat.images import ImageLoader
from vlmchat.output import TextPrinter
from vlmchat.repl import Repl
from vlmchat.request import SamplingParams
from vlmchat.session import ChatSession
from vlmchat.session_file import resume
from vlmchat.store import Autosave, SessionStore


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("state", type=Path)
    parser.add_argument("--session", default="test")
    parser.add_argument("--delay", type=float, default=0.0)
    parser.add_argument("--answer", action="append", default=[])
    options = parser.parse_args()

    options.state.mkdir(exist_ok=True)
    (options.state / "pid").write_text(str(os.getpid()))  # for those who want to kill it
    loader = ImageLoader(ImagePolicy())
    store = SessionStore(options.state, loader)
    console = Console(highlight=False)
    backend = ScriptedBackend(options.answer, context_length=2048, delay_s=options.delay)
    saved = store.load(options.session) if store.exists(options.session) else None
    params = SamplingParams(max_new_tokens=1024)
    session = resume(saved, backend) if saved else ChatSession(backend, params)
    autosave = Autosave(store, "scripted", console.print, options.session)
    printer = TextPrinter(console, console)
    history = options.state / "history"
    return Repl(session, loader, printer, autosave, console, os.environ, history).run(saved)


if __name__ == "__main__":
    sys.exit(main())
