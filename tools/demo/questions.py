"""Questions about scenes together with answers that are right by construction.

Every maker takes a scene and returns the slots of a phrasing and the answer, or None when the
scene does not allow a clear question of its kind.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

from tools.demo import grammar
from tools.demo.grammar import article
from tools.demo.scenes import COLORS, KINDS, REGIONS, SIZES, Scene, Shape

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
SIDES = ("left", "right", "top", "bottom")
DIRECTIONS = tuple(grammar.DIRECTIONS)


@dataclass(frozen=True)
class Pointers:
    """The shapes a question mentions, and those its answer is about; training points at them."""

    mentioned: tuple[Shape, ...]
    answered: tuple[Shape, ...]


# Pieces of an answer in order, and what each of them is about.
Spans = tuple[tuple[str, Pointers], ...]


@dataclass(frozen=True)
class Question:
    """A question, its answer, what kind it is and the shape that "it" means afterwards."""

    text: str
    answer: str
    kind: str
    topic: Shape | None = None
    about: Pointers | None = None
    spans: Spans = ()


@dataclass(frozen=True)
class Ref:
    """Words that pick shapes: any of size, colour, shape and place."""

    size: str | None = None
    color: str | None = None
    kind: str | None = None
    region: str | None = None

    def select(self, shapes: Sequence[Shape]) -> list[Shape]:
        """The shapes these words fit."""
        return [
            shape
            for shape in shapes
            if self.size in (None, shape.size)
            and self.color in (None, shape.color)
            and self.kind in (None, shape.kind)
            and self.region in (None, shape.region)
        ]

    def name(self, count: int = 1) -> str:
        """The noun an answer uses."""
        noun = (self.kind or "object") + ("" if count == 1 else "s")
        words = " ".join(word for word in (self.size, self.color, noun) if word)
        return words + (f" {in_region(self.region)}" if self.region else "")

    def spoken(self, rng: random.Random, count: int = 1) -> str:
        """The noun a question uses, with synonyms."""
        noun = grammar.synonym(rng, self.kind or "object") + ("" if count == 1 else "s")
        noun = noun.replace("boxs", "boxes")
        words = [grammar.synonym(rng, word) for word in (self.size, self.color) if word]
        place = [rng.choice(grammar.PLACES[self.region])] if self.region else []
        return " ".join([*words, noun, *place])


@dataclass(frozen=True)
class Draft:
    """What a maker returns: slots, answer, and what "it" means in the next question."""

    slots: dict[str, str]
    answer: str
    topic: Shape | None = None
    about: Pointers | None = None
    spans: Spans = ()


def _same_pointers(found: Sequence[Shape]) -> Pointers:
    return Pointers(tuple(found), tuple(found))


def sentence_spans(shapes: Sequence[Shape]) -> Spans:
    """The sentences of a description."""
    end = ("", Pointers((), ()))
    return (*((f" {sentence(shape)}", _same_pointers((shape,))) for shape in shapes), end)


def value_spans(lead: str, named: Sequence[tuple[str, Shape]]) -> Spans:
    """The pieces of "The circles are red, blue and white."."""
    spans = []
    for number, (value, shape) in enumerate(named):
        before = lead if number == 0 else " and" if number == len(named) - 1 else ","
        spans.append((f"{before} {value}", _same_pointers((shape,))))
    return (*spans, (".", Pointers((), ())))


def name_spans(
    lead: str, shapes: Sequence[Shape], tail: str, mentioned: Sequence[Shape] | None = None
) -> Spans:
    """The pieces of "There is a red circle, a blue star and a white square in the center."."""
    spans = []
    for number, shape in enumerate(shapes):
        before = lead if number == 0 else " and" if number == len(shapes) - 1 else ","
        first = (shape,) if mentioned is None else tuple(mentioned)
        spans.append((f"{before} {noun(shape)}", Pointers(first, (shape,))))
    rest = Pointers(tuple(mentioned or ()), ())
    return (*spans, (tail, rest))


def in_region(region: str) -> str:
    """The place as answers word it."""
    return f"in the {region}"


def join(parts: Sequence[str]) -> str:
    """a, b and c."""
    return parts[0] if len(parts) == 1 else ", ".join(parts[:-1]) + " and " + parts[-1]


def noun(shape: Shape) -> str:
    """A red circle."""
    return article(f"{shape.color} {shape.kind}")


def names(shapes: Sequence[Shape]) -> str:
    """A red circle, a blue star and a white square."""
    return join([noun(shape) for shape in shapes])


def sentence(shape: Shape) -> str:
    """One sentence of a description."""
    return f"There is a {shape.size} {shape.color} {shape.kind} {in_region(shape.region)}."


def description(shapes: Sequence[Shape]) -> str:
    """One sentence for each shape in raster order."""
    return " ".join(sentence(shape) for shape in shapes)


def there_are(count: int, ref: Ref) -> str:
    """There are two red circles"""
    return f"There {'is' if count == 1 else 'are'} {NUMBERS[count]} {ref.name(count)}"


def missing(ref: Ref) -> str:
    """The answer about something that is not there."""
    return f"There is no {ref.name()}{'' if ref.region else ' in the picture'}."


def _fill(ref: Ref, rng: random.Random) -> dict[str, str]:
    single = ref.spoken(rng)
    return {
        "X": f"{'that' if rng.random() < 0.04 else 'the'} {single}",
        "A": article(single),
        "N": single,
        "S": ref.spoken(rng, 2),
    }


def _mask(shape: Shape, fields: str) -> Ref:
    return Ref(
        shape.size if "s" in fields else None,
        shape.color if "c" in fields else None,
        shape.kind if "k" in fields else None,
        shape.region if "r" in fields else None,
    )


def _pick(scene: Scene, rng: random.Random, masks: Sequence[str], absent: float) -> Ref:
    """Words for one shape of the scene, unambiguous if possible, or for one that is not there."""
    if rng.random() < absent:
        ref = _absent(scene, rng, masks)
        if ref:
            return ref
    want_unique = rng.random() < 0.8
    ref = _mask(rng.choice(scene.shapes), rng.choice(masks))
    for _ in range(8):
        if not want_unique or len(ref.select(scene.shapes)) == 1:
            break
        ref = _mask(rng.choice(scene.shapes), rng.choice(masks))
    return ref


def _absent(scene: Scene, rng: random.Random, masks: Sequence[str]) -> Ref | None:
    """Words that fit nothing, although as many as possible of them fit something."""
    for _ in range(12):
        shape, other = rng.choice(scene.shapes), rng.choice(scene.shapes)
        mask = rng.choice(masks)
        ref = _mask(shape, mask)
        swap = rng.choice([field for field in mask])
        lookalike = rng.random() < 0.6
        change = {
            "s": Ref(
                other.size if lookalike else rng.choice(SIZES), ref.color, ref.kind, ref.region
            ),
            "c": Ref(
                ref.size, other.color if lookalike else rng.choice(COLORS), ref.kind, ref.region
            ),
            "k": Ref(
                ref.size, ref.color, other.kind if lookalike else rng.choice(KINDS), ref.region
            ),
            "r": Ref(
                ref.size, ref.color, ref.kind, other.region if lookalike else rng.choice(REGIONS)
            ),
        }[swap]
        if not change.select(scene.shapes):
            return change
    return None


def _unique(scene: Scene, rng: random.Random, masks: Sequence[str]) -> tuple[Ref, Shape] | None:
    for _ in range(10):
        ref = _mask(rng.choice(scene.shapes), rng.choice(masks))
        found = ref.select(scene.shapes)
        if len(found) == 1:
            return ref, found[0]
    return None


def _attribute(
    scene: Scene, rng: random.Random, masks: Sequence[str], value: Callable[[Shape], str]
) -> Draft:
    """The answer about an attribute, however many shapes the words fit."""
    ref = _pick(scene, rng, masks, 0.13)
    found = ref.select(scene.shapes)
    if not found:
        return Draft(_fill(ref, rng), missing(ref), None, _same_pointers(()))
    if len(found) == 1:
        answer = f"The {ref.name()} is {value(found[0])}."
        return Draft(_fill(ref, rng), answer, found[0], _same_pointers(found))
    first = {value(shape): shape for shape in reversed(found)}
    named = [(value(shape), shape) for shape in found if first[value(shape)] is shape]
    spans = value_spans(f" The {ref.name(2)} are", named)
    return Draft(_fill(ref, rng), "".join(text for text, _ in spans).strip(), spans=spans)


def make_color(scene: Scene, rng: random.Random) -> Draft:
    """What color is the circle?"""
    masks = ("k", "k", "k", "k", "sk", "sk", "r", "kr")
    return _attribute(scene, rng, masks, lambda s: s.color)


def make_shape(scene: Scene, rng: random.Random) -> Draft:
    """What shape is the red object?"""
    masks = ("c", "c", "c", "c", "sc", "sc", "r", "cr", "s")
    return _attribute(scene, rng, masks, lambda s: article(s.kind))


def make_place(scene: Scene, rng: random.Random) -> Draft:
    """Where is the red circle?"""
    masks = ("ck", "ck", "ck", "k", "c", "sck", "sk")
    return _attribute(scene, rng, masks, lambda s: in_region(s.region))


def make_size(scene: Scene, rng: random.Random) -> Draft:
    """Is the red circle small or large?"""
    masks = ("ck", "ck", "k", "c", "r")
    return _attribute(scene, rng, masks, lambda s: s.size)


def make_count(scene: Scene, rng: random.Random) -> Draft:
    """How many circles are there?"""
    mask = rng.choice(("", "", "", "k", "k", "k", "c", "c", "ck", "ck", "s", "sk"))
    ref = _mask(rng.choice(scene.shapes), mask)
    if mask and rng.random() < 0.2:
        ref = _absent(scene, rng, [mask]) or ref
    found = ref.select(scene.shapes)
    topic = found[0] if len(found) == 1 else None
    return Draft(_fill(ref, rng), f"{there_are(len(found), ref)}.", topic, _same_pointers(found))


def make_exist(scene: Scene, rng: random.Random) -> Draft:
    """Is there a red circle?"""
    masks = ("ck", "ck", "ck", "ck", "k", "c", "sck", "sk", "sc", "kr", "ckr")
    ref = _mask(rng.choice(scene.shapes), rng.choice(masks))
    if rng.random() < 0.55:
        ref = _absent(scene, rng, masks) or ref
    found = ref.select(scene.shapes)
    if not found:
        return Draft(_fill(ref, rng), f"No, there is no {ref.name()}.", None, _same_pointers(found))
    topic = found[0] if len(found) == 1 else None
    answer = f"Yes, there is {article(ref.name())}."
    return Draft(_fill(ref, rng), answer, topic, _same_pointers(found))


def _inside(shape: Shape, region: str) -> bool:
    row, column = REGIONS.index(shape.region) // 3, REGIONS.index(shape.region) % 3
    thirds = {"left": column == 0, "right": column == 2, "top": row == 0, "bottom": row == 2}
    return thirds.get(region, shape.region == region)


def make_region(scene: Scene, rng: random.Random) -> Draft:
    """What is in the top left?"""
    region = rng.choice(scene.shapes).region if rng.random() < 0.65 else rng.choice(REGIONS)
    if rng.random() < 0.15:
        region = rng.choice(SIDES)
    place = {"left": "on the left", "right": "on the right", "top": "at the top"}.get(
        region, "at the bottom" if region == "bottom" else in_region(region)
    )
    found = [shape for shape in scene.shapes if _inside(shape, region)]
    what = names(found) if found else "nothing"
    topic = found[0] if len(found) == 1 else None
    slots = {"R": rng.choice(grammar.PLACES[region])}
    about = None if found else _same_pointers(found)
    spans = name_spans(" There is", found, f" {place}.") if found else ()
    return Draft(slots, f"There is {what} {place}.", topic, about, spans)


def _offset(shape: Shape, other: Shape, direction: str) -> float:
    """How far `shape` is from `other` in that direction."""
    return {
        "to the left of": other.x - shape.x,
        "to the right of": shape.x - other.x,
        "above": other.y - shape.y,
        "below": shape.y - other.y,
    }[direction]


def make_relation(scene: Scene, rng: random.Random) -> Draft | None:
    """What is to the left of the red circle?"""
    direction = rng.choice(DIRECTIONS)
    picked = _unique(scene, rng, ("ck", "ck", "k", "c"))
    if rng.random() < 0.1:
        ref = _absent(scene, rng, ("ck", "k", "c"))
        if ref:
            slots = {"X": _fill(ref, rng)["X"], "D": rng.choice(grammar.DIRECTIONS[direction])}
            return Draft(slots, missing(ref), None, _same_pointers(()))
    if not picked or len(scene.shapes) < 2:
        return None
    ref, shape = picked
    offsets = [_offset(other, shape, direction) for other in scene.shapes if other is not shape]
    if any(0.03 < offset < 0.09 for offset in offsets):
        return None
    found = [s for s in scene.shapes if s is not shape and _offset(s, shape, direction) >= 0.09]
    what = names(found) if found else "nothing"
    slots = {"X": _fill(ref, rng)["X"], "D": rng.choice(grammar.DIRECTIONS[direction])}
    topic = found[0] if len(found) == 1 else None
    tail = f" {direction} the {ref.name()}."
    about = None if found else Pointers((shape,), ())
    spans = name_spans(" There is", found, tail, (shape,)) if found else ()
    return Draft(slots, f"There is {what}{tail}", topic, about, spans)


def _two(scene: Scene, rng: random.Random) -> tuple[tuple[Ref, Shape], tuple[Ref, Shape]] | None:
    for _ in range(6):
        masks = (rng.choice(("ck", "k", "c")),)
        first, second = _unique(scene, rng, masks), _unique(scene, rng, masks)
        if first and second and first[1] is not second[1]:
            return first, second
    return None


def make_relation_check(scene: Scene, rng: random.Random) -> Draft | None:
    """Is the red circle to the left of the blue star?"""
    pair, direction = _two(scene, rng), rng.choice(DIRECTIONS)
    if not pair:
        return None
    (ref, shape), (other_ref, other) = pair
    offset = _offset(shape, other, direction)
    if abs(offset) < 0.09:
        return None
    slots = {
        "X": _fill(ref, rng)["X"],
        "Y": _fill(other_ref, rng)["X"],
        "D": rng.choice(grammar.DIRECTIONS[direction]),
    }
    yes_no = "Yes, the {} is {} the {}." if offset > 0 else "No, the {} is not {} the {}."
    about = Pointers((shape,), (other,))
    return Draft(slots, yes_no.format(ref.name(), direction, other_ref.name()), None, about)


def make_larger(scene: Scene, rng: random.Random) -> Draft | None:
    """Which is larger, the red circle or the blue star?"""
    pair = _two(scene, rng)
    if not pair:
        return None
    (ref, shape), (other_ref, other) = pair
    slots = {"X": _fill(ref, rng)["X"], "Y": _fill(other_ref, rng)["X"]}
    about = Pointers((shape,), (other,))
    if shape.size == other.size:
        same = f"The {ref.name()} and the {other_ref.name()} are about the same size."
        return Draft(slots, same, None, about)
    larger = ref if shape.size == "large" else other_ref
    return Draft(slots, f"The {larger.name()} is larger.", None, about)


def make_list(scene: Scene, rng: random.Random) -> Draft:
    """What objects are there?"""
    topic = scene.shapes[0] if len(scene.shapes) == 1 else None
    spans = name_spans(" There is", scene.shapes, ".")
    return Draft({}, f"There is {names(scene.shapes)}.", topic, spans=spans)


def make_colors(scene: Scene, rng: random.Random) -> Draft:
    """Which colors do you see?"""
    first = {shape.color: shape for shape in reversed(scene.shapes)}
    named = [(s.color, s) for s in scene.shapes if first[s.color] is s]
    spans = value_spans(" I see", named)
    return Draft({}, "".join(text for text, _ in spans).strip(), spans=spans)


def make_describe(scene: Scene, rng: random.Random) -> Draft:
    """Describe the image."""
    topic = scene.shapes[0] if len(scene.shapes) == 1 else None
    return Draft({}, description(scene.shapes), topic, spans=sentence_spans(scene.shapes))


MAKERS: dict[str, Callable[[Scene, random.Random], Draft | None]] = {
    "color": make_color,
    "shape": make_shape,
    "count": make_count,
    "exist": make_exist,
    "place": make_place,
    "region": make_region,
    "relation": make_relation,
    "relation check": make_relation_check,
    "size": make_size,
    "larger": make_larger,
    "list": make_list,
    "colors": make_colors,
    "describe": make_describe,
}


def ask(scene: Scene, kind: str, rng: random.Random, held_out: bool = False) -> Question | None:
    """A question of that kind about the scene."""
    draft = MAKERS[kind](scene, rng)
    if draft is None:
        return None
    text = grammar.phrase(grammar.CORES[kind], draft.slots, rng, held_out, kind)
    return Question(text, draft.answer, kind, draft.topic, draft.about, draft.spans)


def follow_up(
    scene: Scene, last: Question, rng: random.Random, held_out: bool = False
) -> Question | None:
    """A question about "it", about the others, or the same again about something else."""
    it = last.topic
    spans: Spans = ()
    kind = rng.choice(("color", "shape", "place", "place", "size", "others", "same"))
    if kind == "same" or it is None:
        return _same(scene, last.kind, rng, held_out)
    if kind == last.kind:
        return None
    if kind == "others":
        rest = [shape for shape in scene.shapes if shape is not it]
        answer = f"Yes, there is {names(rest)}." if rest else "No, there is nothing else."
        spans = name_spans(" Yes, there is", rest, ".", (it,)) if rest else ()
        topic = rest[0] if len(rest) == 1 else None
        about = None if rest else Pointers((it,), ())
    else:
        words = {
            "color": it.color,
            "shape": article(it.kind),
            "place": in_region(it.region),
            "size": it.size,
        }
        answer, topic, about = f"It is {words[kind]}.", it, _same_pointers((it,))
    text = grammar.phrase(grammar.FOLLOW_UPS[kind], {}, rng, held_out)
    return Question(text, answer, f"follow-up {kind}", topic, about, spans)


def _same(scene: Scene, kind: str, rng: random.Random, held_out: bool) -> Question | None:
    """And the square?"""
    if kind not in ("color", "shape", "place", "size", "count"):
        return None
    draft = MAKERS[kind](scene, rng)
    if draft is None:
        return None
    phrasings = grammar.FOLLOW_UPS["same count" if kind == "count" else "same"]
    text = grammar.phrase(phrasings, draft.slots, rng, held_out)
    return Question(text, draft.answer, kind, draft.topic, draft.about)


def make_pair_more(first: Scene, second: Scene, rng: random.Random) -> Draft:
    """Which picture has more circles?"""
    shape = rng.choice(rng.choice((first, second)).shapes)
    ref = _mask(shape, rng.choice(("", "k", "k", "c", "ck")))
    counts = [len(ref.select(scene.shapes)) for scene in (first, second)]
    slots, about = _fill(ref, rng), _same_pointers(ref.select((*first.shapes, *second.shapes)))
    if counts[0] == counts[1]:
        same = f"Both pictures have the same number of {ref.name(2)}."
        return Draft(slots, same, None, about)
    most = "first" if counts[0] > counts[1] else "second"
    return Draft(slots, f"The {most} picture has more {ref.name(2)}.", None, about)


def make_pair_which(first: Scene, second: Scene, rng: random.Random) -> Draft:
    """Which picture has a red square?"""
    shape = rng.choice(rng.choice((first, second)).shapes)
    ref = _mask(shape, rng.choice(("ck", "ck", "k", "c")))
    if rng.random() < 0.12:
        ref = Ref(color=rng.choice(COLORS), kind=rng.choice(KINDS))
    has = [bool(ref.select(scene.shapes)) for scene in (first, second)]
    noun_phrase = article(ref.name())
    answers = {
        (True, True): f"Both pictures have {noun_phrase}.",
        (True, False): f"The first picture has {noun_phrase}.",
        (False, True): f"The second picture has {noun_phrase}.",
        (False, False): f"Neither picture has {noun_phrase}.",
    }
    about = _same_pointers(ref.select((*first.shapes, *second.shapes)))
    return Draft(_fill(ref, rng), answers[has[0], has[1]], None, about)


def make_pair_difference(first: Scene, second: Scene, rng: random.Random) -> Draft:
    """What is the difference?"""
    one, two = (f"{NUMBERS[len(s.shapes)]} {Ref().name(len(s.shapes))}" for s in (first, second))
    return Draft({}, f"The first picture has {one} and the second picture has {two}.")


def make_pair_describe(first: Scene, second: Scene, rng: random.Random) -> Draft:
    """Describe the second picture."""
    which = rng.randrange(2)
    slots = {"P": rng.choice(grammar.PICTURES[("first", "second")[which]])}
    shapes = (first, second)[which].shapes
    return Draft(slots, description(shapes), spans=sentence_spans(shapes))


def make_pair_both(first: Scene, second: Scene, rng: random.Random) -> Draft:
    """Describe both pictures."""
    one, two = description(first.shapes), description(second.shapes)
    return Draft({}, f"In the first picture: {one} In the second picture: {two}")


PAIR_MAKERS: dict[str, Callable[[Scene, Scene, random.Random], Draft]] = {
    "pair more": make_pair_more,
    "pair which": make_pair_which,
    "pair difference": make_pair_difference,
    "pair describe": make_pair_describe,
    "pair both": make_pair_both,
}


def ask_pair(
    first: Scene, second: Scene, kind: str, rng: random.Random, held_out: bool = False
) -> Question:
    """A question about two pictures."""
    draft = PAIR_MAKERS[kind](first, second, rng)
    text = grammar.phrase(grammar.PAIR_CORES[kind], draft.slots, rng, held_out)
    return Question(text, draft.answer, kind, None, draft.about, draft.spans)


def ask_in_picture(
    scenes: tuple[Scene, Scene], kind: str, rng: random.Random, held_out: bool = False
) -> Question | None:
    """A question of a simple kind about one of two pictures."""
    which = rng.randrange(2)
    question = ask(scenes[which], kind, rng, held_out)
    if question is None or question.text[-1] not in "?.":
        return None
    place = rng.choice(grammar.PICTURES[("first", "second")[which]])
    if rng.random() < 0.5:
        text = f"{question.text[:-1]} in {place}{question.text[-1]}"
    else:
        text = f"In {place}, {question.text[0].lower()}{question.text[1:]}"
    return replace(question, text=text, kind=f"pair {kind}")
