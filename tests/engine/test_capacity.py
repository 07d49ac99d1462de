"""Slots: how many the memory holds, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from tests.engine.originals import load
from tests.families import make_family
from vlmchat.config import EngineConfig, ModelConfig
from vlmchat.engine import capacity
from vlmchat.engine.capacity import fit, make_runner
from vlmchat.engine.engine import Engine
from vlmchat.engine.runner import EagerRunner
from vlmchat.engine.static_runner import StaticRunner
from vlmchat.engine.vision import VisionCache
from vlmchat.errors import ConfigError, OutOfMemory

GB = 10**9


@pytest.mark.parametrize(
    ("limits", "free", "expected"),
    [
        pytest.param(EngineConfig(), 100 * GB, 4, id="a-chat"),
        pytest.param(EngineConfig(), 20 * GB, 3, id="spare-slots-take-a-tenth"),
        pytest.param(EngineConfig(), 2 * GB, 1, id="a-chat-with-little-memory"),
        pytest.param(EngineConfig(max_num_seqs=8), 100 * GB, 8, id="as-many-as-asked"),
        pytest.param(EngineConfig(max_num_seqs=8), 5 * GB, 4, id="as-many-as-fit"),
        pytest.param(EngineConfig(kv_memory=6 * GB), 100 * GB, 6, id="as-many-as-given"),
        pytest.param(EngineConfig(kv_memory=6 * GB, max_num_seqs=2), 100 * GB, 2, id="the-fewer"),
        pytest.param(EngineConfig(kv_memory=6 * GB), 3 * GB, 3, id="never-more-than-free"),
    ],
)
def test_slots_follow_what_is_asked_and_free(
    limits: EngineConfig, free: float, expected: int
) -> None:
    assert fit(limits, 4096, GB, free).count == expected


@pytest.mark.parametrize("limits", [EngineConfig(), EngineConfig(kv_memory=GB // 2)])
def test_slots_are_refused_with_numbers_and_advice_when_not_one_fits(limits: EngineConfig) -> None:
    with pytest.raises(OutOfMemory, match=r"4096 tokens .* 1\.00 GB .* --context-length"):
        fit(limits, 4096, GB, GB if limits.kv_memory is None else 9 * GB)


@pytest.mark.parametrize(
    ("name", "runner", "kind"),
    [
        ("llava", "auto", StaticRunner),
        ("llava", "eager", EagerRunner),
        ("gemma3", "auto", EagerRunner),
    ],
)
def test_runner_is_the_fastest_that_is_proven(
    name: str, runner: str, kind: type, tmp_path: Path
) -> None:
    loaded = load(make_family(name, tmp_path / "model"), conv_mode=None)
    config = ModelConfig(runner=runner)
    found, _, words = make_runner(loaded, VisionCache(loaded.model), config, EngineConfig())
    assert type(found) is kind
    assert words.startswith("static" if kind is StaticRunner else "eager: ")


def test_runner_refuses_what_the_model_cannot_do(tmp_path: Path) -> None:
    loaded = load(make_family("gemma3", tmp_path / "model"), conv_mode=None)
    vision = VisionCache(loaded.model)
    with pytest.raises(ConfigError, match="--runner static: "):
        make_runner(loaded, vision, ModelConfig(runner="static"), EngineConfig())
    with pytest.raises(ConfigError, match="--kv-dtype int8: "):
        make_runner(loaded, vision, ModelConfig(), EngineConfig(kv_dtype="int8"))


def test_engine_says_how_many_slots_it_has_and_why_not_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded = load(make_family("llava", tmp_path / "model"), conv_mode=None)
    each = loaded.status.context_length * capacity.shape_of(loaded.model).position_bytes(
        loaded.model.dtype, loaded.model.dtype
    )
    monkeypatch.setattr(capacity, "free_bytes", lambda device: 2.5 * each)
    said: list[str] = []
    engine = Engine.over(loaded, ModelConfig(), EngineConfig(max_num_seqs=3), said.append)
    engine.close()
    assert said[-1].startswith("note: slots for conversations: 2 of 1024 tokens")
    assert "3 were asked for" in dict(engine.status().details)["slots"]


@pytest.mark.parametrize(
    ("config", "limits", "words"),
    [
        (ModelConfig(context_length=2000), EngineConfig(), "--context-length 2000"),
        (ModelConfig(), EngineConfig(answer_tokens=1024), "--max-new-tokens 1024"),
    ],
)
def test_engine_refuses_what_the_context_cannot_hold_before_weights_are_read(
    config: ModelConfig, limits: EngineConfig, words: str, tmp_path: Path
) -> None:
    directory = make_family("llava", tmp_path / "model")
    (directory / "model.safetensors").write_bytes(b"no weights")
    with pytest.raises(ConfigError, match=words):
        Engine.load(replace(config, path=str(directory), device="cpu"), limits=limits)
