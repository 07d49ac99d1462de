"""Our speed against what a user would take instead, on one random checkpoint, in one sitting.

`python -m benchmarks peers [--only decode,turns,streams,shared,start] [--without vllm,…]`. Sides
take turns within every run (A/B/A …), so that a machine that changes its mind is fair to all; told
are medians, and their ratio to `transformers serve`, beside the least that is aimed at.
"""

from __future__ import annotations

import argparse
import random
import re
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from io import BytesIO
from pathlib import Path
from statistics import median

from benchmarks import sides
from benchmarks.shapes import make_checkpoint
from benchmarks.sides import Side, Timed, at_once
from vlmchat.config import ImagePolicy
from vlmchat.conversation import Conversation, Image

OURS, OURS_4BIT, OURS_8BIT = "vlmchat", "vlmchat --load-4bit", "vlmchat --load-8bit"
SERVE, GENERATE, VLLM, LLAMA = "transformers serve", "generate", "vLLM (CPU)", "llama.cpp"
QUESTION_WORDS = 90  # beside 576 tokens of a picture
NEW_TOKENS, TURN_TOKENS, STREAMS, TURNS = 128, 32, 8, 6
QUESTION = "What is at the top left?"


class Table:
    """Measured values by side and column, of several runs."""

    def __init__(self, title: str, columns: tuple[str, ...], unit: str) -> None:
        self.title, self.columns, self.unit = title, columns, unit
        self._values: dict[str, dict[str, list[float]]] = {}

    def add(self, side: str, column: str, value: float) -> None:
        """One value of one run."""
        self._values.setdefault(side, {}).setdefault(column, []).append(value)

    def median(self, side: str, column: str) -> float | None:
        """Over the runs; None where it was not measured."""
        values = self._values.get(side, {}).get(column)
        return median(values) if values else None

    def ratio(self, side: str, column: str) -> float | None:
        """To `transformers serve`, or in its absence to `generate`."""
        own = self.median(side, column)
        other = self.median(SERVE, column) or self.median(GENERATE, column)
        return own / other if own is not None and other else None

    def print(self) -> None:
        """As Markdown."""
        print(f"\n**{self.title}** ({self.unit})\n")
        print("| | " + " | ".join(f"{column} | ratio" for column in self.columns) + " |")
        print("|---" * (1 + 2 * len(self.columns)) + "|")
        for side in self._values:
            cells = []
            for column in self.columns:
                value, ratio = self.median(side, column), self.ratio(side, column)
                cells.append("-" if value is None else f"{value:.3g}")
                cells.append("-" if ratio is None else f"{ratio:.2f}")
            print(f"| {side} | " + " | ".join(cells) + " |", flush=True)


class Asker:
    """Questions of one size, no two alike, under pictures no two of which are alike."""

    def __init__(self) -> None:
        self._draw = random.Random(0)

    def text(self, words: int = QUESTION_WORDS) -> str:
        """Numbers: each is one token."""
        return " ".join(str(self._draw.randrange(1000)) for _ in range(words))

    def picture(self) -> Image:
        """Coloured rectangles, 336 pixels square."""
        from PIL import Image as Pillow
        from PIL import ImageDraw

        from vlmchat.images import ImageLoader

        canvas = Pillow.new("RGB", (336, 336), "white")
        draw = ImageDraw.Draw(canvas)
        for _ in range(8):
            x, y, red, green, blue = (self._draw.randrange(256) for _ in range(5))
            draw.rectangle((x, y, x + 64, y + 64), fill=(red, green, blue))
        file = BytesIO()
        canvas.save(file, "PNG")
        return ImageLoader(ImagePolicy()).load_bytes(file.getvalue(), "rectangles")

    def conversation(self) -> Conversation:
        """A first question under its picture."""
        return Conversation().ask(self.text(), (self.picture(),))


class Sitting:
    """The sides that are there, started when first asked for, and why others are not."""

    def __init__(self, cache: Path, without: frozenset[str]) -> None:
        self.model = make_checkpoint(cache / "small")
        self.cache, self.asker = cache, Asker()
        self.absent: dict[str, str] = dict.fromkeys(without, "left out by --without")
        self._sides: dict[str, Side] = {}
        self._makers: Mapping[str, Callable[[], Side]] = {
            OURS: lambda: sides.ours(cache, self.model),
            OURS_4BIT: lambda: sides.ours(cache, self.model, "4bit"),
            OURS_8BIT: lambda: sides.ours(cache, self.model, "8bit"),
            SERVE: lambda: sides.transformers_serve(cache, self.model),
            GENERATE: lambda: sides.Generate.load(self.model),
            VLLM: lambda: sides.vllm(cache, self.model),
            LLAMA: lambda: sides.llama_cpp(cache, self.model),
        }

    def present(self, *names: str) -> dict[str, Side]:
        """Those of `names` that can be started, warm."""
        for name in names:
            if name in self._sides or name in self.absent:
                continue
            print(f"starting {name} …", file=sys.stderr, flush=True)
            try:
                side = self._makers[name]()
                side.ask(self.asker.conversation(), 8)
                side.ask(self.asker.conversation(), 8)
            except Exception as error:  # whatever a peer fails of is told in its row's place
                self.absent[name] = " ".join(f"{error}".split())[:200] or repr(error)
            else:
                self._sides[name] = side
        return {name: self._sides[name] for name in names if name in self._sides}

    def close(self) -> None:
        """End all sides."""
        for side in self._sides.values():
            side.close()


def decode(sitting: Sitting, runs: int) -> Table:
    """One stream: tokens per second after the first, and the first."""
    table = Table("One stream, decode", ("tokens/s",), f"{NEW_TOKENS} new tokens")
    present = sitting.present(OURS, OURS_4BIT, OURS_8BIT, SERVE, GENERATE, VLLM, LLAMA)
    for _ in range(runs):
        for name, side in present.items():
            answer = side.ask(sitting.asker.conversation(), NEW_TOKENS)
            table.add(name, "tokens/s", answer.decode_rate)
    return table


def turns(sitting: Sitting, runs: int) -> Table:
    """Seconds to the first token of each turn of a chat about one picture."""
    columns = tuple(f"turn {number}" for number in range(1, TURNS + 1))
    table = Table("First token", columns, f"seconds; {TURN_TOKENS} new tokens a turn")
    present = sitting.present(OURS, SERVE, GENERATE, VLLM, LLAMA)
    for _ in range(runs):
        conversations = {name: sitting.asker.conversation() for name in present}
        for column in columns:
            for name, side in present.items():
                answer = side.ask(conversations[name], TURN_TOKENS)
                table.add(name, column, answer.first_s)
                conversations[name] = _go_on(sitting, conversations[name], answer)
    return table


def streams(sitting: Sitting, runs: int) -> Table:
    """Eight at once, each with a picture of its own: tokens per second of all, prefill included."""
    columns = ("turn 1", "turn 2")
    title = f"{STREAMS} streams with pictures, all together"
    table = Table(title, columns, f"tokens/s; {NEW_TOKENS} new tokens each, prefill included")
    present = sitting.present(OURS, SERVE, VLLM, LLAMA)
    for _ in range(runs):
        asked = {name: [sitting.asker.conversation() for _ in range(STREAMS)] for name in present}
        for column in columns:
            for name, side in present.items():
                answers, seconds = at_once(side, asked[name], NEW_TOKENS)
                table.add(name, column, sum(answer.tokens for answer in answers) / seconds)
                asked[name] = [
                    _go_on(sitting, conversation, answer)
                    for conversation, answer in zip(asked[name], answers, strict=True)
                ]
    return table


def _go_on(sitting: Sitting, conversation: Conversation, answer: Timed) -> Conversation:
    return conversation.answered(answer.text).ask(sitting.asker.text(12))


def shared(sitting: Sitting, runs: int) -> Table:
    """Ten ask about one picture at the same moment: seconds to the last one's first token."""
    table = Table("One picture, 10 questions at once", ("last first token",), "seconds")
    present = sitting.present(OURS, SERVE, VLLM)
    for _ in range(runs):
        for name, side in present.items():
            picture = sitting.asker.picture()
            asked = [Conversation().ask(sitting.asker.text(12), (picture,)) for _ in range(10)]
            before = _counts(side)
            answers, _ = at_once(side, asked, 8)
            table.add(name, "last first token", max(answer.first_s for answer in answers))
            if before and (after := _counts(side)):
                told = (b - a for a, b in zip(before, after, strict=True))
                print("vlmchat: {} pictures encoded, {} prompt tokens, {} cached".format(*told))
    return table


def _counts(side: Side) -> tuple[int, int, int] | None:
    """Pictures encoded, tokens of prompts and those of them that were cached, so far."""
    if not isinstance(side, sides.Server) or sides.MODULE not in side.command:
        return None
    page = side.get("/metrics")[1]
    found = {
        name: int(float(n))
        for name, n in re.findall(r"^vlmchat_(\w+)_total\{.* (\S+)$", page, re.M)
    }
    encoded = found["mm_cache_queries"] - found["mm_cache_hits"]
    return encoded, found["prefix_cache_queries"], found["prefix_cache_hits"]


SCRIPT = """
import sys
from PIL import Image
from transformers import AutoProcessor, LlavaForConditionalGeneration
model = LlavaForConditionalGeneration.from_pretrained(sys.argv[1], dtype="auto")
processor = AutoProcessor.from_pretrained(sys.argv[1])
content = [{"type": "image"}, {"type": "text", "text": sys.argv[3]}]
text = processor.apply_chat_template(
    [{"role": "user", "content": content}], add_generation_prompt=True
)
inputs = processor(text=text, images=Image.open(sys.argv[2]), return_tensors="pt")
answer = model.generate(**inputs.to(model.dtype), max_new_tokens=1, do_sample=False)
print(processor.decode(answer[0, -1]), flush=True)
"""


def start(sitting: Sitting, runs: int) -> Table:
    """A process's start to its first word, weights in the page cache."""
    table = Table("Process start to first token", ("demo", "S"), "seconds")
    picture = sitting.cache / "picture.png"
    picture.write_bytes(sitting.asker.picture().data)
    from vlmchat.config import DEMO_MODEL
    from vlmchat.engine.hub import find_checkpoint

    demo = find_checkpoint(DEMO_MODEL, None, lambda stage: None)
    ours = [sys.executable, "-m", "vlmchat", "chat", "--json", "--device", "cpu"]
    ours += ["--image", str(picture), "-p", QUESTION, "--max-new-tokens", "1", "--model-path"]
    for _ in range(runs + 1):  # the first fills the page cache
        for column, model in (("demo", demo), ("S", sitting.model)):
            plain = [sys.executable, "-c", SCRIPT, str(model), str(picture), QUESTION]
            table.add(OURS, column, _first_output([*ours, str(model)]))
            table.add("a script over transformers", column, _first_output(plain))
    return table


def _first_output(command: list[str]) -> float:
    """Seconds to the first byte on stdout."""
    started = time.perf_counter()
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        first = process.stdout.read(1)
        seconds = time.perf_counter() - started
        process.stdout.read()
    if not first or process.returncode:
        raise RuntimeError(f"{' '.join(command[:4])} … failed")
    return seconds


PARTS: Mapping[str, Callable[[Sitting, int], Table]] = {
    "decode": decode,
    "turns": turns,
    "streams": streams,
    "shared": shared,
    "start": start,
}
# part, side, column, ratio to aim at, whether it is the least (else the most)
AIMS = (
    ("decode", OURS, "tokens/s", 1.5, True),
    ("decode", OURS_4BIT, "tokens/s", 3.5, True),
    ("turns", OURS, "turn 1", 1.0, False),
    *(("turns", OURS, f"turn {number}", 0.1, False) for number in range(2, TURNS + 1)),
    ("streams", OURS, "turn 1", 5.0, True),
    ("streams", OURS, "turn 2", 8.0, True),
    ("start", OURS, "S", 0.6, False),
)


def summary(tables: Mapping[str, Table]) -> None:
    """Every aim that was measured, and whether it is met."""
    print("\n| against `transformers` | aim | measured | |\n|---|---|---|---|")
    for part, side, column, aim, least in AIMS:
        if part not in tables:
            continue
        table = tables[part]
        ratio = table.ratio(side, column)
        if ratio is None:
            base = table.median("a script over transformers", column)
            own = table.median(side, column)
            ratio = own / base if own and base else None
        if ratio is not None:
            met = ratio >= aim if least else ratio <= aim
            sign = "≥" if least else "≤"
            told = f"| {side}: {part}, {column} | {sign} {aim} | {ratio:.2f} |"
            print(f"{told} {'met' if met else 'not met'} |")


def main(arguments: list[str] | None = None) -> None:
    """Print a table for each part, then who was absent and why, then the aims."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks peers", description=__doc__)
    parser.add_argument("--only", default=",".join(PARTS), help="parts, with commas between them")
    parser.add_argument("--without", default="", help="sides to leave out, by name")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--slow-runs", type=int, default=3, help="of streams")
    parser.add_argument("--cache", type=Path, default=Path(__file__).parent / ".peers")
    asked = parser.parse_args(arguments)
    asked.cache.mkdir(parents=True, exist_ok=True)
    sitting = Sitting(asked.cache.resolve(), frozenset(filter(None, asked.without.split(","))))
    tables: dict[str, Table] = {}
    try:
        for part in asked.only.split(","):
            runs = asked.slow_runs if part == "streams" else asked.runs
            tables[part] = PARTS[part](sitting, runs)
            tables[part].print()
    finally:
        sitting.close()
    for name, reason in sitting.absent.items():
        print(f"\n{name} is absent: {reason}")
    summary(tables)


if __name__ == "__main__":
    main()
