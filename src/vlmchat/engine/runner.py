"""Run the model: prefill a prompt's new part, decode one token per sequence.

`EagerRunner` is the reference: the unmodified transformers forward, one sequence at a time, a
`DynamicCache` per slot. A faster runner stands behind the same protocol and is held to its tokens.
Called from the engine's thread only.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from transformers import DynamicCache

from vlmchat.engine.memory import memory_errors
from vlmchat.engine.sequence import Prompt
from vlmchat.engine.spec import BothWays, ModelSpec
from vlmchat.engine.vision import VisionCache

_ADVICE = (
    "out of memory during the answer; start a shorter conversation (/clear), "
    "or use --context-length, --load-4bit or a smaller model"
)


class Runner(Protocol):
    """What the engine asks of a runner. Both raise OutOfMemory."""

    def prefill(self, slot: int, prompt: Prompt, start: int) -> torch.Tensor:
        """Logits [vocabulary] after the prompt; the slot already holds its first `start` tokens.

        `start` never lies inside a picture: see `Prompt.resume_point`.
        """

    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """Logits [n, vocabulary] after one more token in each of n slots."""


class EagerRunner:
    """The plain forward of transformers over one growing cache per slot.

    Every layer's cache keeps all positions, those with a sliding window too: their masks hide what
    lies outside it, and so every cache can be cut anywhere.
    """

    def __init__(self, model: Any, spec: ModelSpec, vision: VisionCache, num_slots: int) -> None:
        self._model = model
        self._spec = spec
        self._vision = vision
        self._caches = [DynamicCache() for _ in range(num_slots)]
        # What a slot's next position is, less the number of its tokens (see `_grid_positions`).
        self._position_deltas = [0] * num_slots

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Prompt, start: int) -> torch.Tensor:
        """See `Runner.prefill`. Keys and values past `start` are discarded first."""
        with memory_errors(_ADVICE):
            self._cut(slot, start)
            inputs: dict[str, Any] = {"input_ids": self._row(prompt.ids[start:])}
            spans = [span for span in prompt.images if span.start >= start]
            inputs["mm_encoder_outputs"] = self._vision.encoder_outputs(spans)
            if self._spec.both_ways is not BothWays.NOWHERE:
                inputs["token_type_ids"] = self._row(self._token_types(prompt))
            if self._spec.grid_positions:
                positions, self._position_deltas[slot] = self._grid_positions(prompt)
                inputs["position_ids"] = positions[..., start:]
            return self._forward(slot, inputs)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """See `Runner.decode`."""
        with memory_errors(_ADVICE):
            rows = [self._decode_one(s, t) for s, t in zip(slots, tokens, strict=True)]
            return torch.stack(rows)

    def _decode_one(self, slot: int, token: int) -> torch.Tensor:
        inputs = {"input_ids": self._row([token])}
        if self._spec.grid_positions:
            position = self._caches[slot].get_seq_length()
            positions = [position, *[position + self._position_deltas[slot]] * 3]
            inputs["position_ids"] = self._row(positions).T[:, :, None]  # [4, 1, 1]
        return self._forward(slot, inputs)

    def _forward(self, slot: int, inputs: dict[str, Any]) -> torch.Tensor:
        output = self._model(
            **inputs, past_key_values=self._caches[slot], use_cache=True, logits_to_keep=1
        )
        logits: torch.Tensor = output.logits[0, -1]  # [V]
        return logits

    def _cut(self, slot: int, start: int) -> None:
        cache = self._caches[slot]
        if start == 0:  # as new: some models tell a prompt's first part by an unused cache
            self._caches[slot] = DynamicCache()
        else:
            cache.crop(start - cache.get_seq_length())

    def _row(self, values: Sequence[int]) -> torch.Tensor:
        return torch.tensor([list(values)], device=self._model.device)  # [1, T]

    def _token_types(self, prompt: Prompt) -> list[int]:
        """Of the whole prompt, cached or not. Where all attend to all, none is told apart."""
        if self._spec.both_ways is BothWays.PROMPT:
            return [0] * len(prompt.ids)
        return [int(token == self._spec.image_token_id) for token in prompt.ids]

    def _grid_positions(self, prompt: Prompt) -> tuple[torch.Tensor, int]:
        """[4, 1, T]: each token's place in the text, and its time, row and column (M-RoPE).

        The second value: what to add to a later token's place in the text to have its others.
        The model would keep it on itself; here each slot has its own.
        """
        ids = self._row(prompt.ids)
        text = torch.arange(len(prompt.ids), device=ids.device)[None, None]  # [1, 1, T]
        if not prompt.images:
            return text.expand(4, -1, -1), 0
        grids = [torch.as_tensor(span.inputs["image_grid_thw"]) for span in prompt.images]
        types = (ids == self._spec.image_token_id).int()
        grid, delta = self._model.model.get_rope_index(
            ids, mm_token_type_ids=types, image_grid_thw=torch.cat(grids).to(ids.device)
        )
        return torch.cat([text, grid]), int(delta)
