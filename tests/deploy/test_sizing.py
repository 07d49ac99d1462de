"""tools/sizing.py: sizes that agree with what is known of the models, and the page's tables."""

from __future__ import annotations

import pytest

from tools import sizing

# Billions of parameters, by the models' own cards.
PUBLISHED = {
    "LLaVA-1.5 7B": 7.06,
    "LLaVA-1.5 13B": 13.35,
    "LLaVA-NeXT Mistral 7B": 7.57,
    "LLaVA-NeXT 34B": 34.75,
    "LLaVA-OneVision 0.5B": 0.89,
    "LLaVA-OneVision 7B": 8.03,
    "Qwen2.5-VL 3B": 3.75,
    "Qwen2.5-VL 7B": 8.29,
    "Qwen2.5-VL 32B": 33.45,
    "Qwen2.5-VL 72B": 73.41,
    "Gemma 3 4B": 4.30,
    "Gemma 3 12B": 12.19,
    "Gemma 3 27B": 27.43,
}


@pytest.fixture(scope="module")
def sizes() -> dict[str, sizing.Size]:
    return {name: sizing.size_of(config) for name, config in sizing.configs().items()}


def test_size_of_counts_as_many_weights_as_are_published(sizes: dict[str, sizing.Size]) -> None:
    counted = {name: (size.linear + size.other) / 1e9 for name, size in sizes.items()}
    assert counted == pytest.approx(PUBLISHED, rel=0.01)


def test_sizing_tables_of_the_page_are_up_to_date(sizes: dict[str, sizing.Size]) -> None:
    text = sizing.PAGE.read_text("utf-8")
    assert sizing.page(text, sizing.tables(sizes)) == text


def test_slots_are_none_where_the_weights_do_not_load(sizes: dict[str, sizing.Size]) -> None:
    size = sizes["LLaVA-1.5 7B"]  # 14.1 GB, with the loader's headroom 15.5
    assert size.slots(15, None) == 0
    assert size.slots(24, None) == int(0.9 * (24e9 - size.weights(None)) / (4096 * 524_288))
