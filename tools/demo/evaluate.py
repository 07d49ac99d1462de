"""How often the demo model is right, on pictures and phrasings that training never used.

python -m tools.demo.evaluate [--model DIR] [--load-4bit | --load-8bit] [--scenes N] [--json]
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from transformers import (
    GenerationConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from tools.demo.grading import right
from tools.demo.offtopic import NO_PICTURE
from tools.demo.questions import PAIR_MAKERS, Question, ask, ask_in_picture, ask_pair, follow_up
from tools.demo.samples import off_topic
from tools.demo.scenes import Scene, degrade, draw, random_longest, random_scene, size_for
from vlmchat.config import ModelConfig
from vlmchat.engine.loader import load_model

MODEL = Path(__file__).parents[2] / "src/vlmchat/demo/model"
KINDS = (
    *("color", "shape", "exist", "place", "count", "describe"),
    *("region", "relation", "relation check", "size", "larger", "list", "colors"),
)
EXTRA_KINDS = ("off topic", "no picture", "follow-up", "two pictures", "two pictures, simple")


@dataclass
class Item:
    """One question with what came before it and the pictures."""

    kind: str
    messages: list[dict[str, object]]
    images: list[Image.Image]
    expected: str


def picture(scene: Scene, rng: random.Random) -> Image.Image:
    """The scene at some native size between 64 and 2,000 pixels."""
    longest = rng.choices(
        (random_longest(rng, 640), rng.randint(64, 128), rng.randint(640, 2000)), (75, 10, 15)
    )[0]
    size = size_for(scene, max(longest, 64 if min(scene.aspect, 1 / scene.aspect) == 1 else 128))
    return degrade(draw(scene, size), rng)


def user(text: str, images: int = 0) -> dict[str, object]:
    """A message of the user with that many pictures."""
    parts: list[dict[str, str]] = [{"type": "image"}] * images
    parts = [*parts, {"type": "text", "text": text}]
    return {"role": "user", "content": parts}


def _single(kind: str, rng: random.Random, held_out: bool) -> Item:
    while True:
        scene = random_scene(rng, margin=0.03)
        question = ask(scene, kind, rng, held_out)
        if question:
            return Item(kind, [user(question.text, 1)], [picture(scene, rng)], question.answer)


def _talk(first: Question, then: Question, images: int) -> list[dict[str, object]]:
    answered: dict[str, object] = {"role": "assistant", "content": first.answer}
    return [user(first.text, images), answered, user(then.text)]


def _extra(kind: str, rng: random.Random, held_out: bool) -> Item:
    while True:
        scenes = (random_scene(rng, margin=0.03), random_scene(rng, margin=0.03))
        images = [picture(scene, rng) for scene in scenes]
        if kind == "off topic":
            question = off_topic(rng, held_out)
            return Item(kind, [user(question.text, 1)], images[:1], question.answer)
        first = ask(scenes[0], rng.choice(KINDS), rng, held_out)
        if first is None:
            continue
        if kind == "no picture":
            return Item(kind, [user(first.text)], [], NO_PICTURE)
        if kind == "follow-up":
            then = follow_up(scenes[0], first, rng, held_out)
            if then:
                return Item(kind, _talk(first, then, 1), images[:1], then.answer)
        elif kind == "two pictures":
            question = ask_pair(*scenes, rng.choice(list(PAIR_MAKERS)), rng, held_out)
            return Item(kind, [user(question.text, 2)], images, question.answer)
        else:
            simple = rng.choice(("color", "shape", "count", "exist", "place", "list"))
            asked = ask_in_picture(scenes, simple, rng, held_out)
            if asked:
                return Item(kind, [user(asked.text, 2)], images, asked.answer)


def make_items(kinds: tuple[str, ...], count: int, seed: int, held_out: bool = True) -> list[Item]:
    """`count` questions of each kind, each about pictures of its own."""
    items = []
    for kind in kinds:
        rng = random.Random(f"evaluation {seed} {kind}")
        make = _extra if kind in EXTRA_KINDS else _single
        items += [make(kind, rng, held_out) for _ in range(count)]
    return items


@torch.inference_mode()
def answers(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    items: list[Item],
    size: int = 50,
    longest: int = 170,
) -> list[str]:
    """Greedy answers, in batches of similar kind."""
    order = sorted(range(len(items)), key=lambda i: (len(items[i].images), items[i].kind))
    found = [""] * len(items)
    for start in range(0, len(order), size):
        chosen = order[start : start + size]
        groups: dict[int, list[int]] = {}
        for i in chosen:
            groups.setdefault(len(items[i].images), []).append(i)
        for images, group in groups.items():
            texts = [
                processor.apply_chat_template(items[i].messages, add_generation_prompt=True)
                for i in group
            ]
            pictures = [image for i in group for image in items[i].images] if images else None
            inputs = processor(text=texts, images=pictures, padding=True, return_tensors="pt")
            inputs = inputs.to(model.device)
            ids = model.generate(**inputs, do_sample=False, max_new_tokens=longest)
            fresh = ids[:, inputs["input_ids"].shape[1] :]
            for i, text in zip(
                group, processor.batch_decode(fresh, skip_special_tokens=True), strict=True
            ):
                found[i] = text.strip()
    return found


def score(items: list[Item], found: list[str]) -> dict[str, tuple[int, int]]:
    """Right answers and questions per kind."""
    good: Counter[str] = Counter()
    asked: Counter[str] = Counter()
    for item, answer in zip(items, found, strict=True):
        asked[item.kind] += 1
        good[item.kind] += right(answer, item.expected)
    return {kind: (good[kind], asked[kind]) for kind in asked}


def load(folder: Path, bits: int | None) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model as vlmchat loads it: in float32, or with its decoder in 4 or 8 bits."""
    kind = f"{bits}bit" if bits else None
    config = ModelConfig(str(folder), device="cpu", dtype="float32", quantization=kind)
    loaded = load_model(config, lambda stage: None)
    loaded.model.generation_config = GenerationConfig.from_pretrained(folder)
    return loaded.model, loaded.processor


def main() -> None:
    """Ask, grade and print a table."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", type=Path, default=MODEL)
    bits = parser.add_mutually_exclusive_group()
    bits.add_argument("--load-4bit", dest="bits", action="store_const", const=4)
    bits.add_argument("--load-8bit", dest="bits", action="store_const", const=8)
    parser.add_argument("--scenes", type=int, default=300, help="questions and scenes per kind")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--training-phrasings", action="store_true", help="not the held-out ones")
    parser.add_argument("--json", action="store_true")
    parser.add_argument("--show", type=int, default=0, help="wrong answers to print per kind")
    args = parser.parse_args()
    torch.set_num_threads(2)
    model, processor = load(args.model, args.bits)
    start = time.time()
    items = make_items((*KINDS, *EXTRA_KINDS), args.scenes, args.seed, not args.training_phrasings)
    found = answers(model, processor, items)
    scores = score(items, found)
    shown: Counter[str] = Counter()
    for item, answer in zip(items, found, strict=True):
        if not right(answer, item.expected) and shown[item.kind] < args.show:
            shown[item.kind] += 1
            text = item.messages[-1]["content"]
            print(f"{item.kind}: {text}\n  got  {answer}\n  want {item.expected}", file=sys.stderr)
    if args.json:
        print(json.dumps({kind: {"right": r, "asked": n} for kind, (r, n) in scores.items()}))
        return
    print(f"{'kind':22} {'right':>6} {'asked':>6} {'share':>7}")
    for kind, (good, asked) in scores.items():
        print(f"{kind:22} {good:6} {asked:6} {good / asked:7.1%}")
    print(f"{len(items)} questions in {time.time() - start:.0f} s")


if __name__ == "__main__":
    main()
