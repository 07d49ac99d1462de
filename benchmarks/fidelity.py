"""What fewer bits cost in answers: each way of quantising, and bfloat16, against float32.

Every precision is shown the prompt and the greedy answer of float32, token by token, and gives its
distribution of each next token. Told are the Kullback-Leibler divergence of these from float32's,
how often the likeliest token is the same, and how many answers would be the same to the last
token: `python -m benchmarks.fidelity [MODEL …]`, by default the demo model and a random one.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

from vlmchat.config import DEMO_MODEL, ImagePolicy, ModelConfig
from vlmchat.conversation import Conversation, Image

QUESTIONS = (
    "Describe the image.",
    "How many objects are there?",
    "What colour is the circle?",
    "What is at the top left?",
)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
NUM_PICTURES = 6
NEW_TOKENS = 32
# name -> (dtype, quantisation, whether by the fast runner). But for the last ones, what is not
# quantised stays exact, so that its cost stands alone.
PRECISIONS = {
    "bfloat16": ("bfloat16", None, False),
    "int8": ("float32", "int8", False),
    "bnb-int8": ("float32", "bnb-int8", False),
    "int4": ("float32", "int4", False),
    "bnb-nf4": ("float32", "bnb-nf4", False),
    "bfloat16, as it is run": ("bfloat16", None, True),
    "int8, as it is run": ("bfloat16", "int8", True),
    "int4, as it is run": ("bfloat16", "int4", True),
}


def pictures() -> Iterator[Image]:
    """Circles and squares in a grid, the same at each run."""
    from PIL import Image as Pillow
    from PIL import ImageDraw

    from vlmchat.images import ImageLoader

    loader = ImageLoader(ImagePolicy())
    for number in range(NUM_PICTURES):
        canvas = Pillow.new("RGB", (224, 224), "white")
        draw = ImageDraw.Draw(canvas)
        for place in range(number + 1):
            x, y = 16 + place % 3 * 68, 16 + place // 3 * 68
            shape = draw.ellipse if (place + number) % 2 else draw.rectangle
            shape((x, y, x + 48, y + 48), fill=COLOURS[(number + 2 * place) % len(COLOURS)])
        file = BytesIO()
        canvas.save(file, "PNG")
        yield loader.load_bytes(file.getvalue(), f"picture {number + 1}")


class Scored:
    """One model in one precision, asked for distributions instead of answers."""

    def __init__(
        self, model: str, dtype: str, quantization: str | None = None, fast: bool = False
    ) -> None:
        """fast: by the runner that is used, native steps and the head in 8 bits included."""
        from vlmchat.engine.loader import load_model
        from vlmchat.engine.processor import Processor
        from vlmchat.engine.runner import EagerRunner, Runner
        from vlmchat.engine.static_runner import StaticRunner
        from vlmchat.engine.vision import VisionCache

        config = ModelConfig(model, device="cpu", dtype=dtype, quantization=quantization)
        loaded = load_model(config, lambda stage: None)
        vision = VisionCache(loaded.model)
        kind: Any = StaticRunner if fast else EagerRunner
        context = (loaded.spec.context_length,) if fast else ()
        self.runner: Runner = kind(loaded.model, loaded.spec, vision, 1, *context)
        self.processor = Processor(loaded.processor, loaded.spec, loaded.template)
        self.eos = loaded.spec.eos_token_ids

    def log_probs(self, conversation: Conversation, answer: list[int] | None) -> Any:
        """[tokens, vocabulary] in float32, for each token of `answer`; None: the greedy one."""
        import torch

        from vlmchat.engine.runner import Row

        prompt = self.processor.encode(conversation)
        rows: list[Any] = [self.runner.prefill(0, prompt, 0, len(prompt.ids))]
        while len(rows) < (len(answer) if answer else NEW_TOKENS):
            token = answer[len(rows) - 1] if answer else int(rows[-1].argmax())
            if not answer and token in self.eos:
                break
            row = Row(0, len(prompt.ids) + len(rows) - 1, (token,))
            rows.append(self.runner.decode([row])[0][0])
        return torch.stack(rows).float().log_softmax(dim=-1)


def measure(model: str) -> Iterator[tuple[str, Any, Any, list[bool]]]:
    """For each precision: its name, divergences in nats and agreements per token, same answers."""
    import torch

    asked = [Conversation().ask(text, (picture,)) for picture in pictures() for text in QUESTIONS]
    exact = Scored(model, "float32")
    expected = [exact.log_probs(conversation, None) for conversation in asked]
    del exact
    for name, precision in PRECISIONS.items():
        scored = Scored(model, *precision)
        divergences, agreements = [], []
        for conversation, there in zip(asked, expected, strict=True):
            here = scored.log_probs(conversation, there.argmax(dim=-1).tolist())
            divergences.append((there.exp() * (there - here)).sum(dim=-1))
            agreements.append(here.argmax(dim=-1) == there.argmax(dim=-1))
        same = [bool(each.all()) for each in agreements]
        yield name, torch.cat(divergences), torch.cat(agreements).float(), same


def table(title: str, model: str) -> None:
    """Print one model's table."""
    print(f"**{title}**, {NUM_PICTURES * len(QUESTIONS)} prompts, against float32:\n")
    print("| precision | KL mean | KL 99 % | KL largest | same token | same answer |")
    print("|---|---|---|---|---|---|")
    for name, divergence, agreement, same in measure(model):
        nats = divergence.mean(), divergence.quantile(0.99), divergence.max()
        told = " | ".join(f"{float(value):.2g}" for value in nats)
        answers = f"{sum(same)} of {len(same)}"
        print(f"| {name} | {told} | {float(agreement.mean()):.1%} | {answers} |")
    print()


def main(models: list[str] | None = None) -> None:
    """Print a table for each model."""
    for model in models or [DEMO_MODEL]:
        table(model, model)
    if not models:
        from tests.tiny import make_tiny_llava

        with tempfile.TemporaryDirectory() as directory:
            table("random LLaVA, 0.2 M", str(make_tiny_llava(Path(directory), context_length=1024)))


if __name__ == "__main__":
    main(sys.argv[1:])
