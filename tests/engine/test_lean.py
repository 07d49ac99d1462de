"""Llama-shaped layers run by us, against transformers' own, for every shape of layer there is."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
import transformers as hf
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from vlmchat.engine.kv_cache import KVCache, KVShape, QuantizedKVCache
from vlmchat.engine.lean import LeanModel, Span, attend
from vlmchat.engine.operators import Operators

CONTEXT = 96
HIDDEN = 48
SIZES = {
    "vocab_size": 50,
    "hidden_size": HIDDEN,
    "intermediate_size": 80,
    "num_hidden_layers": 3,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": CONTEXT,
    "initializer_range": 0.3,
}
YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 24}
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 24,
}
# One line for each way in which layers of this shape differ.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("Llama", {}),
    "no groups": ("Llama", {"num_key_value_heads": 6}),
    "one group": ("Llama", {"num_key_value_heads": 1}),
    "wide heads": ("Llama", {"head_dim": 16}),
    "biases": ("Llama", {"attention_bias": True, "mlp_bias": True}),
    "gelu, eps": ("Llama", {"hidden_act": "gelu", "rms_norm_eps": 0.1}),
    "linear": ("Llama", {"rope_parameters": {"rope_type": "linear", "factor": 4.0}}),
    "llama3": ("Llama", {"rope_parameters": LLAMA3}),
    "yarn": ("Llama", {"rope_parameters": YARN}),
    "mistral": ("Mistral", {"sliding_window": None, "head_dim": 8}),
    "qwen2": ("Qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "qwen3": ("Qwen3", {"head_dim": 16}),
}


def make(name: str) -> Any:
    """A random float32 model, norms and biases random too."""
    kind, more = SHAPES[name]
    if "rope_parameters" in more:
        more = {**more, "rope_parameters": {"rope_theta": 1e4, **more["rope_parameters"]}}
    torch.manual_seed(0)
    model = getattr(hf, f"{kind}Model")(getattr(hf, f"{kind}Config")(**{**SIZES, **more})).eval()
    for parameter in model.parameters():
        if parameter.dim() == 1:
            torch.nn.init.normal_(parameter, 1.0, 0.3)
    return model


class Lean:
    """A LeanModel over a cache of two slots filled with NaN, so that garbage read would tell."""

    def __init__(self, model: Any) -> None:
        self.model = LeanModel(model, CONTEXT)
        self.cache = KVCache(self.model.shape, 2, CONTEXT, torch.float32, torch.device("cpu"))
        self.cache.data.fill_(torch.nan)

    def run(self, x: torch.Tensor, start: int, slot: int = 1) -> torch.Tensor:
        """[T, hidden] at positions start… -> [T, hidden] after the final norm."""
        stop = start + len(x)
        span = Span(0, len(x), self.cache.window(slot, start, stop), causal=len(x) > 1)
        if start:
            mask = torch.full((len(x), stop), -torch.inf).triu(start + 1)
            span = replace(span, mask=mask, causal=False)
        rotation = self.model.rotation(torch.arange(start, stop))
        return self.model.final_norm(self.model.forward(x.clone(), rotation, [span]))


@pytest.mark.parametrize("name", SHAPES)
@torch.inference_mode()
def test_lean_equals_the_models_own_forward_whole_in_parts_and_token_by_token(name: str) -> None:
    model = make(name)
    x = torch.randn(80, HIDDEN)
    expected = model(inputs_embeds=x[None]).last_hidden_state[0]
    lean = Lean(model)
    torch.testing.assert_close(lean.run(x, 0), expected, rtol=1e-4, atol=1e-4)
    parts = [lean.run(x[:30], 0), lean.run(x[30:77], 30)]
    parts += [lean.run(x[i : i + 1], i) for i in range(77, 80)]
    torch.testing.assert_close(torch.cat(parts), expected, rtol=1e-4, atol=1e-4)


@torch.inference_mode()
def test_lean_joins_weights_without_a_second_copy_and_leaves_the_model_whole() -> None:
    model = make("biases")
    x = torch.randn(1, 9, HIDDEN)
    before = model(inputs_embeds=x).last_hidden_state
    lean = LeanModel(model, CONTEXT)
    attention, qkv = model.layers[0].self_attn, lean.layers[0].qkv
    for linear in (attention.q_proj, attention.k_proj, attention.v_proj):
        storage = linear.weight.untyped_storage().data_ptr()
        assert storage == qkv.weight.untyped_storage().data_ptr()  # type: ignore[attr-defined]
    torch.testing.assert_close(model(inputs_embeds=x).last_hidden_state, before)


def test_rotate_equals_transformers() -> None:
    torch.manual_seed(0)
    x, angles = torch.randn(5, 4, 16), torch.randn(5, 8).repeat(1, 2)
    cos, sin = angles.cos(), angles.sin()
    expected, _ = apply_rotary_pos_emb(x[None], x[None], cos[None], sin[None], unsqueeze_dim=2)
    signed = torch.cat([-sin[:, :8], sin[:, 8:]], dim=1)
    Operators(0, torch.nn.SiLU(), x.dtype, x.device).rotate_(x, cos[:, None], signed[:, None])
    torch.testing.assert_close(x, expected[0])


@pytest.mark.parametrize("num_new", [1, 3])
def test_attend_lets_each_group_of_queries_share_its_keys(num_new: int) -> None:
    torch.manual_seed(0)
    keys, values = torch.randn(2, 2, 7, 8).unbind()
    queries = torch.randn(num_new, 6, 8)
    mask = torch.full((num_new, 7), -torch.inf).triu(7 - num_new + 1)
    window = KVCache(KVShape(1, 2, 8), 1, 7, torch.float32, torch.device("cpu")).window(0, 0, 7)
    found = attend(queries, keys[None], values[None], Span(0, num_new, window, mask), 0.5)
    for head in range(6):
        scores = queries[:, head] @ keys[head // 3].T * 0.5 + mask
        expected = scores.softmax(-1) @ values[head // 3]
        torch.testing.assert_close(found[:, head * 8 : head * 8 + 8], expected)


def test_kv_shape_counts_the_bytes_that_the_caches_take() -> None:
    shape = KVShape(num_layers=3, num_heads=2, head_dim=16)
    for kind, dtype in ((KVCache, torch.bfloat16), (QuantizedKVCache, torch.int8)):
        cache = kind(shape, 4, 10, torch.bfloat16, torch.device("cpu"))
        tensors = [v for v in vars(cache).values() if isinstance(v, torch.Tensor)]
        size = sum(tensor.nbytes for tensor in tensors)
        assert size == 4 * 10 * shape.position_bytes(dtype, torch.bfloat16)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_quantized_cache_gives_back_each_head_within_half_a_step(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    cache = QuantizedKVCache(KVShape(2, 3, 8), 2, 20, dtype, torch.device("cpu"))
    keys, values = (torch.randn(2, 3, 5, 8) * torch.logspace(-3, 3, 5)[:, None]).to(dtype)
    keys[0, 0] = 0
    found = cache.window(1, 0, 5).put(1, torch.stack([keys, values]))
    for given, (got,) in zip((keys, values), found, strict=True):
        step = given.float().abs().amax(-1, keepdim=True) / 127
        rounding = torch.finfo(dtype).eps * given.float().abs().amax(-1, keepdim=True)
        assert bool(((got.float() - given.float()).abs() <= 0.5 * step + 2 * rounding).all())


def test_cache_copies_a_prefix_and_nothing_else() -> None:
    cache = KVCache(KVShape(2, 1, 4), 3, 10, torch.float32, torch.device("cpu"))
    cache.data.copy_(torch.arange(cache.data.numel()).view_as(cache.data))
    expected = cache.data.clone()
    expected[:, 2, :, :6] = expected[:, 0, :, :6]
    cache.copy_prefix(0, 2, 6)
    assert torch.equal(cache.data, expected)
