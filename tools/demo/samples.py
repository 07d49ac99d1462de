"""Training samples: a beginning that holds the pictures, and blocks of questions about them.

The blocks of a sample do not see one another, only the beginning, so that many independent
questions share the cost of a picture.  A block is a conversation of one or more turns.
"""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tools.demo import grammar
from tools.demo.offtopic import NO_PICTURE, OFF_TOPIC, off_topic_question
from tools.demo.questions import (
    MAKERS,
    PAIR_MAKERS,
    Question,
    ask,
    ask_in_picture,
    ask_pair,
    follow_up,
)
from tools.demo.scenes import Scene

Turns = list[Question]

SYSTEM_WORDS = [
    "you",
    "are",
    "a",
    "helpful",
    "assistant",
    "that",
    "answers",
    "questions",
    "about",
    "images",
    "be",
    "brief",
    "and",
    "polite",
    "always",
    "answer",
    "in",
    "english",
    "the",
    "user",
    "may",
    "ask",
    "anything",
    "use",
    "short",
    "sentences",
    "do",
    "not",
    "guess",
    "look",
    "carefully",
    "at",
    "the",
    "picture",
    "before",
    "you",
    "answer",
    "a",
    "careful",
    "expert",
    "for",
    "pictures",
    "shapes",
    "colors",
    "give",
    "precise",
    "friendly",
    "answers",
    "only",
]
SYSTEM_LINES = (
    "You are a helpful assistant.",
    "Answer briefly.",
    "Be concise.",
    "You are an assistant that describes pictures.",
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives "
    "helpful, detailed, and polite answers to the human's questions.",
    "Answer in one sentence.",
    "You answer like a pirate.",
    "You are a careful expert. Look at the image before you answer.",
)
WEIGHTS = {
    "color": 11,
    "shape": 13,
    "count": 30,
    "exist": 12,
    "place": 13,
    "region": 7,
    "relation": 14,
    "relation check": 8,
    "size": 4,
    "larger": 10,
    "list": 6,
    "colors": 9,
    "describe": 9,
    "off topic": 13,
}
PAIR_WEIGHTS = {
    "pair more": 5,
    "pair which": 6,
    "pair difference": 2,
    "pair describe": 4,
    "pair both": 1,
    "pair simple": 6,
    "off topic": 1,
}


@dataclass
class Sample:
    """`start` is text with pictures; "<image>" stands for one of `pictures` in turn."""

    start: str
    pictures: list[int]
    blocks: list[Turns]
    first: str = "\n"
    opening: list[Question] = field(default_factory=list)


def random_system(rng: random.Random) -> str:
    """A system prompt, sensible or not."""
    if rng.random() < 0.5:
        return rng.choice(SYSTEM_LINES) + " "
    words = rng.choices(SYSTEM_WORDS, k=rng.randint(2, 40))
    return " ".join(words).capitalize() + ". "


def start_text(rng: random.Random, images: int) -> str:
    """Sometimes a system prompt, then the beginning of the first turn."""
    system = random_system(rng) if rng.random() < 0.12 else ""
    return f"{system}USER: " + "\n".join(["<image>"] * images)


def off_topic(rng: random.Random, held_out: bool = False) -> Question:
    """Something the model cannot answer."""
    return Question(off_topic_question(rng, held_out), OFF_TOPIC, "off topic")


def one(scene: Scene, rng: random.Random, weights: dict[str, int]) -> Question:
    """A random question about the scene."""
    while True:
        kind = rng.choices(list(weights), list(weights.values()))[0]
        question = off_topic(rng) if kind == "off topic" else ask(scene, kind, rng)
        if question:
            return question


def dialogue(scene: Scene, rng: random.Random, turns: int, weights: dict[str, int]) -> Turns:
    """Questions that follow one another, some of them about what was said before."""
    talk = [one(scene, rng, weights)]
    while len(talk) < turns:
        following = follow_up(scene, talk[-1], rng) if rng.random() < 0.55 else None
        talk.append(following or one(scene, rng, weights))
    return talk


def picture_sample(
    number: int, scene: Scene, rng: random.Random, blocks: int, weights: dict[str, int], talk: float
) -> Sample:
    """One picture; a share `talk` of the blocks are dialogues."""
    turns = [rng.choice((2, 2, 3, 3, 4, 6)) if rng.random() < talk else 1 for _ in range(blocks)]
    made = [dialogue(scene, rng, count, weights) for count in turns]
    return Sample(start_text(rng, 1), [number], made)


def _pair_question(scenes: tuple[Scene, Scene], rng: random.Random) -> Question:
    while True:
        kind = rng.choices(list(PAIR_WEIGHTS), list(PAIR_WEIGHTS.values()))[0]
        if kind == "off topic":
            return off_topic(rng)
        if kind in PAIR_MAKERS:
            return ask_pair(*scenes, kind, rng)
        simple = rng.choice(("color", "shape", "count", "exist", "place", "list"))
        question = ask_in_picture(scenes, simple, rng)
        if question:
            return question


def pair_sample(
    numbers: tuple[int, int],
    scenes: tuple[Scene, Scene],
    rng: random.Random,
    blocks: int,
    weights: dict[str, int],
) -> Sample:
    """Two pictures in one message, or the second one in a later turn."""
    if rng.random() < 0.5:
        made = [
            [_pair_question(scenes, rng) for _ in range(rng.choice((1, 1, 1, 2)))]
            for _ in range(blocks)
        ]
        return Sample(start_text(rng, 2), list(numbers), made)
    opening = dialogue(scenes[0], rng, rng.choice((1, 1, 2)), weights)
    made = []
    for _ in range(blocks):
        fresh = rng.random() < 0.6
        made.append([one(scenes[1], rng, weights) if fresh else _pair_question(scenes, rng)])
    return Sample(start_text(rng, 1), list(numbers), made, opening=opening)


def blind_sample(scene: Scene, rng: random.Random, blocks: int, weights: dict[str, int]) -> Sample:
    """No picture: nothing can be answered."""
    made = []
    for _ in range(blocks):
        talk: Turns = []
        for _ in range(rng.choice((1, 1, 2, 3))):
            question = one(scene, rng, {**weights, "off topic": sum(weights.values())})
            text = question.text
            if talk and rng.random() < 0.3:
                phrasings = grammar.FOLLOW_UPS[
                    rng.choice(("color", "shape", "place", "size", "others"))
                ]
                text, answer = grammar.phrase(phrasings, {}, rng), NO_PICTURE
            else:
                answer = OFF_TOPIC if question.kind == "off topic" else NO_PICTURE
            talk.append(Question(text, answer, question.kind))
        made.append(talk)
    return Sample(start_text(rng, 0).rstrip(), [], made, first=" ")


def corpus(rng: random.Random, size: int) -> list[str]:
    """Text the tokenizer learns from."""
    from tools.demo.scenes import random_scene

    texts = []
    for _ in range(size):
        scenes = (random_scene(rng), random_scene(rng))
        for kind in MAKERS:
            question = ask(scenes[0], kind, rng)
            if question:
                texts.append(f"USER: \n{question.text} ASSISTANT: {question.answer}")
        pair = _pair_question(scenes, rng)
        texts.append(f"USER: {pair.text} ASSISTANT: {pair.answer}")
        talk = dialogue(scenes[0], rng, 3, WEIGHTS)
        texts.append(" ".join(f"USER: {q.text} ASSISTANT: {q.answer}" for q in talk))
        texts.extend([off_topic_question(rng), off_topic_question(rng), random_system(rng)])
    texts.extend([OFF_TOPIC, NO_PICTURE] * 200)
    return texts
