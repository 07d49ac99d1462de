"""Time to first token over the turns of one chat, against plain transformers `generate`.

The other side does what a script over transformers does (and LLaVA's own command line did): every
turn it processes the picture and the whole history anew. Both get the same conversation, in one
process, turn by turn in alternation.
"""

from __future__ import annotations

import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

from vlmchat.config import DEMO_MODEL, ImagePolicy, ModelConfig, sampling_params
from vlmchat.conversation import Conversation

PICTURE = "examples/shapes.png"
QUESTIONS = ["Describe the image."] + [f"Number {n}: what is at the top left?" for n in range(2, 7)]
NEW_TOKENS = 32
RUNS = 5


class Plain:
    """transformers alone: `generate` on the whole conversation."""

    def __init__(self, directory: Path) -> None:
        from transformers import AutoModelForImageTextToText, AutoProcessor

        self.processor: Any = AutoProcessor.from_pretrained(directory)
        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory, dtype="auto")

    def first_token_s(self, conversation: Conversation) -> float:
        """Seconds from the conversation to its answer's first token."""
        started = time.perf_counter()
        messages = [
            {
                "role": message.role,
                "content": [{"type": "image"} for _ in message.images]
                + [{"type": "text", "text": message.text}],
            }
            for message in conversation.messages()
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [image.pixels for image in conversation.images]
        inputs = self.processor(text=[text], images=images, return_tensors="pt")
        inputs = inputs.to(self.model.dtype)
        self.model.generate(**inputs, do_sample=False, max_new_tokens=1)
        return time.perf_counter() - started


def measure(directory: Path) -> list[tuple[float, float, int, int]]:
    """For each turn: seconds here, seconds there, prompt tokens, cached tokens (medians)."""
    from vlmchat.engine.engine import Engine
    from vlmchat.images import ImageLoader
    from vlmchat.session import ChatSession

    engine = Engine.load(ModelConfig(str(directory), device="cpu"))
    plain = Plain(directory)
    image = ImageLoader(ImagePolicy()).load(PICTURE)
    params = sampling_params(temperature=0, max_new_tokens=NEW_TOKENS)
    runs = []
    for run in range(RUNS + 1):
        session = ChatSession(engine, params)
        session.set_system(f"Run {run}.")  # so that no run finds the last one's cache
        session.attach(image)
        turns = []
        for question in QUESTIONS:
            with session.ask(question) as reply:
                list(reply)
            assert reply.timings is not None
            assert reply.usage is not None
            there = plain.first_token_s(reply.conversation)
            counts = reply.usage.prompt_tokens, reply.usage.cached_tokens
            turns.append((reply.timings.first_token_s, there, *counts))
        runs.append(turns)
    engine.close()
    by_turn = zip(*runs[1:], strict=True)  # the first run warms up
    return [tuple(map(median, zip(*turn, strict=True))) for turn in by_turn]


def main() -> None:
    """Print a table for the demo model and for a random LLaVA of 294 M parameters."""
    from benchmarks.shapes import make_checkpoint
    from vlmchat.engine.hub import find_checkpoint

    small = make_checkpoint(Path(tempfile.gettempdir()) / "vlmchat-bench-small")
    demo = find_checkpoint(DEMO_MODEL, None, lambda stage: None)
    for name, directory in (("demo", demo), ("random LLaVA, 294 M, bfloat16", small)):
        print(f"**{name}**, time to first token:\n")
        print("| turn | prompt tokens | of them cached | vlmchat | `generate` | ratio |")
        print("|---|---|---|---|---|---|")
        for turn, (here, there, tokens, cached) in enumerate(measure(directory), 1):
            times = f"{here * 1e3:.0f} ms | {there * 1e3:.0f} ms | {here / there:.2f}"
            print(f"| {turn} | {tokens:.0f} | {cached:.0f} | {times} |")
        print()


if __name__ == "__main__":
    main()
