"""What the engine must know of a model, read from its configs."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import GenerationConfig

from tests.engine.reference import Reference
from tests.families import make_family
from tests.tiny import make_tiny_llava
from vlmchat.engine.spec import PALIGEMMA_TEMPLATE, read_spec


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        pytest.param([1, 106], {1, 106}, id="several"),
        pytest.param(7, {7}, id="one"),
        pytest.param(None, {1}, id="none-so-the-tokenizers"),
    ],
)
def test_spec_takes_the_end_tokens_of_the_generation_config(
    tmp_path: Path, given: int | list[int] | None, expected: set[int]
) -> None:
    reference = Reference(make_tiny_llava(tmp_path))
    generation = GenerationConfig(eos_token_id=given)
    spec = read_spec(reference.model.config, generation, reference.processor)
    assert spec.eos_token_ids == expected


def test_spec_gives_a_chat_template_only_where_the_checkpoint_has_none(tmp_path: Path) -> None:
    reference = Reference(make_family("paligemma", tmp_path / "model"))
    config, generation = reference.model.config, reference.model.generation_config
    assert read_spec(config, generation, reference.processor).chat_template == PALIGEMMA_TEMPLATE
    reference.processor.chat_template = "own"
    assert read_spec(config, generation, reference.processor).chat_template is None
