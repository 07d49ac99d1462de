"""LLaVA's conversation templates: byte for byte, and growing only at the end."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import Template
from jinja2.sandbox import ImmutableSandboxedEnvironment

from vlmchat.engine.templates import TEMPLATE_NAMES, template
from vlmchat.errors import ConfigError

Message = dict[str, Any]
GOLDEN: dict[str, dict[str, str]] = json.loads(
    Path(__file__).with_name("golden_prompts.json").read_text("utf-8")
)
every_template = pytest.mark.parametrize("name", TEMPLATE_NAMES)


def said(role: str, text: str, pictures: int = 0) -> Message:
    images = [{"type": "image"}] * pictures
    return {"role": role, "content": [*images, {"type": "text", "text": text}]}


ONE_TURN = [said("user", "Q1", 1)]
TWO_TURNS = [*ONE_TURN, said("assistant", "A1"), said("user", "Q2")]


@cache
def compiled(name: str) -> Template:
    environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template(name).jinja)


def render(name: str, messages: list[Message], *, ask: bool = True) -> str:
    return compiled(name).render(messages=messages, add_generation_prompt=ask)


def around_answer(name: str) -> tuple[str, str]:
    """What a template puts between its request for an answer and the answer, and after that."""
    question = [said("user", "Q")]
    answered = render(name, [*question, said("assistant", "@")], ask=False)
    before, _, after = answered.removeprefix(render(name, question)).partition("@")
    return before, after


def test_golden_prompts_are_there_for_every_template() -> None:
    assert set(TEMPLATE_NAMES) == set(GOLDEN)


@every_template
def test_template_equals_llava_for_one_turn(name: str) -> None:
    assert render(name, ONE_TURN) == GOLDEN[name]["web_1turn"]


@pytest.mark.parametrize("name", [name for name in TEMPLATE_NAMES if "plain" not in name])
def test_template_equals_llava_for_two_turns(name: str) -> None:
    assert render(name, TWO_TURNS) == GOLDEN[name]["web_2turn"]


def test_plain_ends_an_answer_like_a_caption() -> None:
    assert render("plain", TWO_TURNS) == "<image>\nQ1\nA1\nQ2\n"


@every_template
def test_template_takes_plain_strings_as_content(name: str) -> None:
    strings = [{"role": "user", "content": "Q1"}, {"role": "assistant", "content": "A1"}]
    assert render(name, strings) == render(name, [said("user", "Q1"), said("assistant", "A1")])


words = st.text(max_size=12)


@every_template
@settings(max_examples=30)
@given(system=st.none() | words, turns=st.lists(st.tuples(words, st.integers(0, 2), words)))
def test_template_grows_only_at_the_end(
    name: str, system: str | None, turns: list[tuple[str, int, str]]
) -> None:
    before, after = around_answer(name)
    history = [] if system is None else [said("system", system)]
    rendered = render(name, history, ask=False)
    for question, pictures, answer in turns:
        history.append(said("user", question, pictures))
        prompt = render(name, history)
        assert prompt.startswith(rendered)
        history.append(said("assistant", answer))
        rendered = render(name, history, ask=False)
        answer = answer.strip()  # as LLaVA's page keeps it
        assert rendered == prompt + (before + answer + after if answer else "")


@pytest.fixture(scope="module")
def processor(tmp_path_factory: pytest.TempPathFactory) -> Any:
    from transformers import AutoProcessor

    from tests.tiny import make_tiny_llava

    directory = make_tiny_llava(tmp_path_factory.mktemp("tiny"))
    return AutoProcessor.from_pretrained(directory)


@every_template
def test_template_gives_the_same_through_transformers(name: str, processor: Any) -> None:
    spoken = [said("system", "Be brief."), said("user", "Q1", 2), *TWO_TURNS[1:]]
    through = processor.apply_chat_template(
        spoken, chat_template=template(name).jinja, add_generation_prompt=True, tokenize=False
    )
    assert through == render(name, spoken)


@pytest.mark.parametrize(
    ("name", "prompt"),
    [
        ("llava_v1", "Be brief. USER: Q ASSISTANT:"),
        ("llava_v0", "Be brief.###Human: Q###Assistant:"),
        ("mistral_instruct", "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\nQ [/INST]"),
        (
            "chatml_direct",
            "<|im_start|>system\nBe brief.<|im_end|><|im_start|>user\nQ<|im_end|>"
            "<|im_start|>assistant\n",
        ),
    ],
)
def test_system_message_replaces_the_stock_one(name: str, prompt: str) -> None:
    assert render(name, [said("system", "Be brief."), said("user", "Q")]) == prompt


def test_pictures_stand_in_front_of_their_message() -> None:
    spoken = [said("user", " Q1 ", 2), said("assistant", "A1"), said("user", " Q2 ", 1)]
    prompt = render("llava_v1", spoken)
    assert prompt.endswith(
        "USER: <image>\n<image>\nQ1 ASSISTANT: A1</s>USER: <image>\n Q2  ASSISTANT:"
    )


def test_mmtag_takes_later_pictures_untagged() -> None:
    spoken = [said("user", "Q1", 2), said("assistant", "A1"), said("user", "Q2", 1)]
    assert render("v1_mmtag", spoken).endswith(
        "USER: <Image><image></Image><Image><image></Image> ASSISTANT: Received.</s>"
        "USER: Q1 ASSISTANT: A1</s>USER: <image>\nQ2 ASSISTANT:"
    )


def test_empty_answer_renders_the_open_form() -> None:
    spoken = [said("user", "Q1"), said("assistant", ""), said("user", "Q2")]
    assert render("llava_v1", spoken).endswith("USER: Q1 ASSISTANT:USER: Q2 ASSISTANT:")


@pytest.mark.parametrize(
    ("name", "stop"),
    [("llava_v0", ("###",)), ("mpt", ("<|im_end|>",)), ("llava_v1", ()), ("llava_llama_2", ())],
)
def test_template_stops_where_its_style_does(name: str, stop: tuple[str, ...]) -> None:
    assert template(name).stop == stop


def test_unknown_template_names_close_ones_and_all() -> None:
    with pytest.raises(ConfigError, match=r"did you mean llava_v1.*known are .*mpt"):
        template("lava_v1")


@pytest.mark.parametrize("name", ["default", "v0", "llama_2"])
def test_template_left_out_names_the_nearest(name: str) -> None:
    with pytest.raises(ConfigError, match="the nearest is llava_"):
        template(name)
