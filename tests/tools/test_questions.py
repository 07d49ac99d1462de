"""Answers follow from the scene, and held-out phrasings are held out."""

from __future__ import annotations

import random
import re

import pytest

from tools.demo import grammar, offtopic, questions
from tools.demo.grading import right
from tools.demo.grammar import Phrasings
from tools.demo.questions import MAKERS, PAIR_MAKERS, Ref, ask, ask_pair, follow_up
from tools.demo.scenes import COLORS, Scene, Shape, random_scene


def shape(kind: str, color: str, size: str, x: float, y: float) -> Shape:
    return Shape(kind, color, size, x, y, 0.08, (1, 2, 3))


SCENE = Scene(
    (
        shape("circle", "red", "small", 0.2, 0.2),
        shape("star", "green", "small", 0.8, 0.2),
        shape("circle", "blue", "large", 0.5, 0.5),
    )
)
TABLES = (grammar.CORES, grammar.FOLLOW_UPS, grammar.PAIR_CORES)


def all_answers(kind: str) -> set[str]:
    rng = random.Random(kind)
    asked = (ask(SCENE, kind, rng) for _ in range(300))
    return {question.answer for question in asked if question}


@pytest.mark.parametrize(
    ("kind", "expected", "impossible"),
    [
        ("color", "The star is green.", "The star is red."),
        ("color", "The circles are red and blue.", "The circle is red."),
        ("shape", "The green object is a star.", "The green object is a circle."),
        ("count", "There are two circles.", "There are three circles."),
        ("count", "There are three objects.", "There are two objects."),
        ("exist", "No, there is no red star.", "Yes, there is a red star."),
        ("exist", "Yes, there is a red circle.", "No, there is no red circle."),
        ("place", "The star is in the top right.", "The star is in the center."),
        ("region", "There is a blue circle in the center.", "There is nothing in the center."),
        (
            "relation",
            "There is a red circle to the left of the star.",
            "There is nothing below the star.",
        ),
        (
            "larger",
            "The blue circle is larger.",
            "The red circle is larger.",
        ),
        ("colors", "I see red, green and blue.", "I see red."),
    ],
)
def test_answers_are_right_by_construction(kind: str, expected: str, impossible: str) -> None:
    found = all_answers(kind)
    if kind == "relation":
        expected = "There is a red circle and a blue circle to the left of the star."
    assert expected in found
    assert impossible not in found


def test_description_has_one_sentence_per_shape_in_reading_order() -> None:
    assert all_answers("describe") == {
        "There is a small red circle in the top left. "
        "There is a small green star in the top right. "
        "There is a large blue circle in the center."
    }


def test_words_select_what_they_fit() -> None:
    assert len(Ref(kind="circle").select(SCENE.shapes)) == 2
    assert Ref(size="large", kind="circle").select(SCENE.shapes) == [SCENE.shapes[2]]
    assert Ref(color="red", kind="star").select(SCENE.shapes) == []


def test_it_means_the_shape_of_the_last_answer() -> None:
    rng = random.Random(3)
    last = questions.Question("", "", "place", SCENE.shapes[1])
    following = [follow_up(SCENE, last, rng) for _ in range(100)]
    found = {question.answer for question in following if question}
    assert {"It is green.", "It is a star.", "It is small."} <= found


def test_pictures_are_compared() -> None:
    other = Scene(SCENE.shapes[:1])
    rng = random.Random(1)
    found = {ask_pair(SCENE, other, "pair more", rng).answer for _ in range(60)}
    assert "The first picture has more circles." in found
    difference = ask_pair(SCENE, other, "pair difference", rng).answer
    assert (
        difference == "The first picture has three objects and the second picture has one object."
    )


def cores() -> list[Phrasings]:
    listed = [phrasings for table in TABLES for phrasings in table.values()]
    return [*listed, offtopic.TEMPLATES, offtopic.LINES, offtopic.THINGS, offtopic.SHADES]


def test_held_out_phrasings_are_not_trained_on() -> None:
    def plain(text: str) -> str:
        return re.sub(r"\W+", " ", text.lower()).strip()

    for phrasings in cores():
        assert phrasings.train
        assert phrasings.held_out
        assert not set(map(plain, phrasings.train)) & set(map(plain, phrasings.held_out))


@pytest.mark.parametrize("held_out", [False, True])
def test_every_kind_can_be_asked(held_out: bool) -> None:
    rng = random.Random(5)
    scenes = [random_scene(rng) for _ in range(30)]
    for kind in MAKERS:
        assert any(ask(scene, kind, rng, held_out) for scene in scenes)
    for kind in PAIR_MAKERS:
        assert ask_pair(scenes[0], scenes[1], kind, rng, held_out).text
    assert offtopic.off_topic_question(rng, held_out)


def test_grading_looks_at_meaning() -> None:
    assert right("It's the red one: a circle is red.", "The circle is red.") is False
    assert right("the circles are red", "The circle is red.")
    assert not right("The circle is blue.", "The circle is red.")
    two = "There is a small red circle in the top left. There is a large blue star in the center."
    turned = (
        "There is a large blue star in the center. There is a small red circle in the top left."
    )
    assert right(turned, two)
    assert not right(two, two.replace("small", "large"))
    assert right("Yes, there is a red circle.", "Yes, there is a red circle.")
    assert len(COLORS) == 8
