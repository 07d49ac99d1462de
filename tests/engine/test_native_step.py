"""The step in C against torch's products over the same weights, and where there is none."""

from __future__ import annotations

import copy
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as hf

from tests.pictures import noise_image
from vlmchat.config import DEMO_MODEL, ModelConfig
from vlmchat.conversation import Conversation
from vlmchat.engine import native_library
from vlmchat.engine.fused import fuse
from vlmchat.engine.hub import find_checkpoint
from vlmchat.engine.kv_cache import KVCache
from vlmchat.engine.lean import LeanModel, Span
from vlmchat.engine.loader import load_model
from vlmchat.engine.native_library import NoNativeStep
from vlmchat.engine.native_operators import NativeOperators
from vlmchat.engine.native_step import NativeStep
from vlmchat.engine.operators import Operators
from vlmchat.engine.packed import int4_linear, int8_linear
from vlmchat.engine.processor import Processor
from vlmchat.engine.runner import Row
from vlmchat.engine.static_runner import StaticRunner
from vlmchat.engine.vision import VisionCache

CONTEXT, SLOTS, VOCABULARY = 70, 4, 100
SIZES = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "initializer_range": 0.15,
}
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "wide heads": ("Llama", {"head_dim": 96, "num_key_value_heads": 4}),
    "biases": ("Qwen2", {}),
    "head norms": ("Qwen3", {"num_key_value_heads": 1}),
}
QUANTIZED = {"int4": int4_linear, "int8": int8_linear}
# Slot and position of each row: alone, odd lengths, several of a slot, more than are multiplied
# at once, and up to the end of the context.
ROWS = (
    ((0, 0),),
    ((1, 20), (3, 17)),
    ((2, 30), (2, 31), (0, 5)),
    ((0, 40), (1, 33), (2, 1), (3, 16), (3, 17)),
    tuple((1, p) for p in range(CONTEXT - 9, CONTEXT)),
)
# Prompts of more rows than a tile has, beside a single one.
MANY = (*((0, p) for p in range(20, 40)), (2, 33), *((1, p) for p in range(18)))


@pytest.fixture(autouse=True, params=["tiles", "no tiles"])
def _tiles(request: pytest.FixtureRequest) -> Iterator[None]:
    """Both ways a CPU may go, where this one can."""
    try:
        library = native_library.native_library()
    except NoNativeStep as error:
        if "cannot be compiled" in str(error):
            raise
        pytest.skip(f"there is no native step here: {error}")
    wanted = request.param == "tiles"
    if library.vlmchat_tiles(wanted) != wanted:
        pytest.skip("this CPU has no tiles")
    yield
    library.vlmchat_tiles(True)


class Pair:
    """A model run by torch and in C over one cache, whose positions hold random numbers."""

    def __init__(self, shape: str, quantization: str | None = None) -> None:
        kind, more = SHAPES[shape]
        torch.manual_seed(0)
        config = getattr(hf, f"{kind}Config")(**{**SIZES, **more})
        plain = getattr(hf, f"{kind}ForCausalLM")(config).eval()
        with torch.no_grad():
            for parameter in plain.parameters():
                parameter.copy_(parameter.bfloat16())  # so that both precisions have the same
        self.exact = LeanModel(copy.deepcopy(plain.model), CONTEXT)
        self.exact_head = copy.deepcopy(plain.lm_head)
        model = plain.bfloat16()
        if quantization is not None:
            for layer in model.model.layers:
                for part in (layer.self_attn, layer.mlp):
                    for name, linear in list(part.named_children()):
                        if isinstance(linear, torch.nn.Linear):
                            quantize = QUANTIZED[quantization]
                            packed = quantize(linear.weight, torch.bfloat16, linear.bias)
                            setattr(part, name, packed)
        with torch.no_grad():
            self.lean, self.head = LeanModel(model.model, CONTEXT), fuse([model.lm_head])
        self.quantized = quantization is not None
        self.embedding = model.model.embed_tokens
        cpu = torch.device("cpu")
        self.cache = KVCache(self.lean.shape, SLOTS, CONTEXT, torch.bfloat16, cpu)
        self.cache.data.normal_()
        self.exact_cache = KVCache(self.lean.shape, SLOTS, CONTEXT, torch.float32, cpu)
        self.exact_cache.data.copy_(self.cache.data)
        self.step = NativeStep(self.lean, self.head, self.cache)

    @torch.inference_mode()
    def native(self, rows: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Logits [rows, vocabulary]; the token of a row is its position's."""
        slots, positions = zip(*rows, strict=True)
        x = self.embedding(torch.tensor(positions))
        rotation = self.lean.rotation(torch.tensor(positions))
        return self.step.run(x, rotation, slots, positions, len(rows)).float()

    @torch.inference_mode()
    def torch(self, rows: Sequence[tuple[int, int]], *, exact: bool = False) -> torch.Tensor:
        """The same by `lean.py`, row after row."""
        lean, cache = (self.exact, self.exact_cache) if exact else (self.lean, self.cache)
        head = self.exact_head if exact else self.head
        found = []
        for slot, position in rows:
            span = Span(0, 1, cache.window(slot, position, position + 1))
            x = self.embedding(torch.tensor([position]))
            x = x.float() if exact else x
            x = lean.forward(x, lean.rotation(torch.tensor([position])), [span])
            found.append(head(lean.final_norm(x)).float())
        return torch.cat(found)


@pytest.fixture(scope="module", params=[*SHAPES, *QUANTIZED])
def pair(request: pytest.FixtureRequest) -> Pair:
    """Each shape in bfloat16, and the first one in each precision."""
    name: str = request.param
    return Pair("biases", name) if name in QUANTIZED else Pair(name)


@pytest.mark.parametrize("shape", SHAPES)
def test_native_step_is_as_near_to_float32_as_torch_in_bfloat16(shape: str) -> None:
    pair = Pair(shape)
    for rows in (*ROWS, MANY):
        exact, torch_, native = pair.torch(rows, exact=True), pair.torch(rows), pair.native(rows)
        assert (native - exact).norm() < 1.3 * (torch_ - exact).norm()


@pytest.mark.parametrize("quantization", QUANTIZED)
def test_native_step_is_near_to_torchs_products_of_quantised_weights(quantization: str) -> None:
    pair = Pair("biases", quantization)
    for rows in (*ROWS, MANY):
        torch_ = pair.torch(rows)
        assert (pair.native(rows) - torch_).norm() < 0.1 * torch_.norm()


def test_native_step_gives_a_row_the_same_whatever_the_others_are(pair: Pair) -> None:
    for rows in ROWS if pair.quantized else (*ROWS, MANY):
        together = pair.native(rows)
        assert torch.equal(together, torch.cat([pair.native([row]) for row in rows]))


def test_native_step_writes_the_positions_of_its_rows_and_no_others(pair: Pair) -> None:
    before = pair.cache.data.clone()
    pair.cache.data.fill_(torch.nan)
    pair.cache.data[:, 2, :, :10] = 0.5
    pair.native([(2, 10), (2, 11)])
    written = ~pair.cache.data.isnan()
    expected = torch.zeros_like(written)
    expected[:, 2, :, :12] = True
    assert torch.equal(written, expected)
    pair.cache.data.copy_(before)


def test_native_step_gives_the_last_rows_logits_alone_where_these_are_wanted(pair: Pair) -> None:
    rows = ROWS[3]
    slots, positions = zip(*rows, strict=True)
    everything = pair.native(rows)
    with torch.inference_mode():
        x, rotation = pair.embedding(torch.tensor(positions)), torch.tensor(positions)
        some = pair.step.run(x, pair.lean.rotation(rotation), slots, positions, 2)
        assert torch.equal(some.float(), everything[-2:])
        kept = pair.cache.data.clone()
        none = pair.step.run(x, pair.lean.rotation(rotation), slots, positions, 0)
    assert none.shape == (0, VOCABULARY)
    assert torch.equal(kept, pair.cache.data)


def test_native_step_refuses_what_it_does_not_know() -> None:
    pair = Pair("llama")
    cpu = torch.device("cpu")
    float32 = KVCache(pair.lean.shape, SLOTS, CONTEXT, torch.float32, cpu)
    with pytest.raises(NoNativeStep, match="bfloat16"):
        NativeStep(pair.lean, pair.head, float32)
    with pytest.raises(NoNativeStep, match="a layer is a Linear"):
        NativeStep(pair.lean, torch.nn.Linear(128, VOCABULARY), pair.cache)


def test_native_operators_give_what_torchs_do() -> None:
    torch.manual_seed(0)
    parts = (1e-5, torch.nn.SiLU(), torch.bfloat16, torch.device("cpu"))
    plain, native = Operators(*parts), NativeOperators(*parts, (96, 160, 16))
    for rows in (1, 5):
        x, weight = torch.randn(rows, 96), torch.randn(96)
        near(native.normed(x, weight), plain.normed(x, weight))
        gate_up = torch.randn(rows, 384).bfloat16()[:, :320]  # rows with something between
        near(native.activated(gate_up), plain.activated(gate_up))
        other, y = x.clone(), torch.randn(rows, 128).bfloat16()[:, :96]
        native.add_(x, y)
        plain.add_(other, y)
        assert torch.equal(x, other)
        joint = torch.randn(rows, 6, 32).bfloat16()
        copied, (cos, sin) = joint.clone(), torch.randn(2, rows, 1, 32).bfloat16()
        native.rotate_(joint[:, :4], cos, sin)
        plain.rotate_(copied[:, :4], cos, sin)
        near(joint, copied)


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    """Within two units in bfloat16's last place."""
    torch.testing.assert_close(found, expected, rtol=2**-7, atol=2**-8)


def test_native_library_is_compiled_once_and_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.native_library()
    (library,) = (tmp_path / "vlmchat").iterdir()
    compiled = library.stat().st_mtime_ns
    monkeypatch.setenv("PATH", "")  # no compiler is needed any more
    native_library.native_library()
    assert library.stat().st_mtime_ns == compiled


@pytest.mark.skipif(os.getuid() != 0, reason="only root may give files away")
def test_native_library_of_another_user_is_not_loaded(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    native_library.native_library()
    (library,) = (tmp_path / "vlmchat").iterdir()
    os.chown(library, 12345, -1)
    with pytest.raises(NoNativeStep, match="is another user's"):
        native_library.native_library()


def test_native_library_says_why_there_is_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    broken = tmp_path / "gcc"
    broken.write_text("#!/bin/sh\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(NoNativeStep, match="cannot be compiled"):
        native_library.native_library()
    assert list((tmp_path / "vlmchat").iterdir()) == []
    broken.unlink()
    with pytest.raises(NoNativeStep, match="there is no gcc"):
        native_library.native_library()
    cpu = tmp_path / "cpuinfo"
    cpu.write_text("flags : fpu avx512bw\n")
    monkeypatch.setattr(native_library, "_CPU", cpu)
    with pytest.raises(NoNativeStep, match="the CPU has no avx512vbmi"):
        native_library.native_library()


def test_static_runner_gives_nearly_the_same_by_native_steps_as_by_torch() -> None:
    path = str(find_checkpoint(DEMO_MODEL, None, lambda stage: None))
    chosen = ModelConfig(path, device="cpu", dtype="bfloat16", quantization="int4")
    loaded = load_model(chosen, lambda stage: None)
    vision = VisionCache(loaded.model)
    native, plain = (
        StaticRunner(loaded.model, loaded.spec, vision, 2, 400, native=native)
        for native in (True, False)
    )
    assert native.how == "native steps"
    assert plain.how == "no native steps: asked for"
    encode = Processor(loaded.processor, loaded.spec, loaded.template).encode
    asked = Conversation().ask("what is it", (noise_image(1, 60, 60),))
    prompt, longer = encode(asked), encode(asked.answered("a red square.").ask("where is it?"))
    found = []
    for runner in (native, plain):
        size = len(prompt.ids)
        assert runner.prefill(0, prompt, 0, size - 3) is None
        logits = [runner.prefill(0, prompt, size - 3, size), *runner.decode([Row(0, size, (9, 8))])]
        runner.copy_prefix(0, 1, size)
        assert runner.prefill(1, longer, size, size + 2) is None
        logits.append(runner.prefill(1, longer, size + 2, len(longer.ids)))
        logits += runner.decode([Row(0, size + 2, (7,)), Row(1, len(longer.ids), (6,))])
        found.append(
            torch.cat([each.view(-1, each.shape[-1]) for each in logits if each is not None])
        )
    assert torch.equal(found[0].argmax(-1), found[1].argmax(-1))
    assert 0 < (found[0] - found[1]).float().norm() < 0.1 * found[1].float().norm()
