"""Record a real chat with the demo model as docs/session.svg, the README's picture.

`python -m tools.session_picture` loads the model, asks, and exports what the terminal shows.
"""

from __future__ import annotations

import io
from pathlib import Path

from rich.console import Console
from rich.text import Text

from vlmchat.config import DEMO_MODEL, ImagePolicy, ModelConfig, sampling_params
from vlmchat.engine.engine import Engine
from vlmchat.images import ImageLoader
from vlmchat.output import TextPrinter
from vlmchat.session import ChatSession
from vlmchat.terminal_image import show

PICTURE = "examples/shapes.png"
QUESTIONS = ["Describe the image.", "What colour is the star?", "And where is it?"]
OUTPUT = Path("docs/session.svg")


def main() -> None:
    """Run the chat and write the picture."""
    screen = io.StringIO()
    console = _console(screen)
    engine = Engine.load(ModelConfig(DEMO_MODEL, device="cpu"))
    session = ChatSession(engine, sampling_params(temperature=0))
    image = ImageLoader(ImagePolicy()).load(PICTURE)
    console.print(Text(f"$ vlmchat chat --model-path demo --image {PICTURE}", style="bold"))
    show(image, console, {"TERM": "xterm-256color"})
    session.attach(image)
    printer = TextPrinter(console, console)
    for question in QUESTIONS:
        console.print(Text(f"\n> {question}", style="bold cyan"))
        printer.answer(session.ask(question), engine.status())
    engine.close()
    # Answers are written past rich's recorder, to the terminal itself: what that got is recorded.
    recorder = _console(io.StringIO())
    recorder.print(Text.from_ansi(screen.getvalue()))
    OUTPUT.write_text(recorder.export_svg(title="vlmchat"), encoding="utf-8")


def _console(file: io.StringIO) -> Console:
    return Console(
        file=file,
        record=True,
        width=88,
        height=48,
        force_terminal=True,
        color_system="truecolor",
        highlight=False,
    )


if __name__ == "__main__":
    main()
