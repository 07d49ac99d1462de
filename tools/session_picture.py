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
    console = Console(
        record=True, width=88, height=48, file=io.StringIO(), force_terminal=True, highlight=False,
        color_system="truecolor",
    )  # fmt: skip
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
    OUTPUT.write_text(console.export_svg(title="vlmchat"), encoding="utf-8")


if __name__ == "__main__":
    main()
