"""Run the model: prefill parts of a prompt, decode new tokens of many sequences.

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
from vlmchat.engine.sequence import Row as Row
from vlmchat.engine.spec import BothWays, ModelSpec
from vlmchat.engine.vision import VisionCache

_ADVICE = (
    "out of memory during the answer; start a shorter conversation (/clear), "
    "or use --context-length, --load-4bit or a smaller model"
)


class Runner(Protocol):
    """What the engine asks of a runner. All three raise OutOfMemory.

    It keeps no lengths: what lies in a slot past the `start` it is told is overwritten.
    splits_pictures: a prefill chunk may begin or end inside a picture.
    """

    splits_pictures: bool

    def prefill(self, slot: int, prompt: Prompt, start: int, stop: int) -> torch.Tensor | None:
        """Compute positions start..stop-1 of the prompt; the slot holds those before `start`.

        Logits [vocabulary] after the prompt if `stop` is its end, else None.
        """

    def decode(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """For each row logits [len(row.tokens), vocabulary], those after each of its tokens."""

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """The first `length` positions of slot `source` into slot `target`; both may be in use."""


class EagerRunner:
    """The plain forward of transformers over one growing cache per slot.

    Every layer's cache keeps all positions, those with a sliding window too: their masks hide what
    lies outside it, and so every cache can be cut anywhere.
    """

    splits_pictures = False  # a picture's features go in whole

    def __init__(self, model: Any, spec: ModelSpec, vision: VisionCache, num_slots: int) -> None:
        self._model = model
        self._spec = spec
        self._vision = vision
        self._caches = [DynamicCache() for _ in range(num_slots)]
        # What a slot's next position is, less the number of its tokens (see `grid_positions`).
        self._position_deltas = [0] * num_slots

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Prompt, start: int, stop: int) -> torch.Tensor | None:
        """See `Runner.prefill`."""
        with memory_errors(_ADVICE):
            self._cut(slot, start)
            inputs: dict[str, Any] = {"input_ids": self._row(prompt.ids[start:stop])}
            spans = [span for span in prompt.images if start <= span.start < stop]
            inputs["mm_encoder_outputs"] = self._vision.encoder_outputs(spans)
            if self._spec.both_ways is not BothWays.NOWHERE:
                inputs["token_type_ids"] = self._row(self._token_types(prompt)[:stop])
            if self._spec.grid_positions:
                positions, self._position_deltas[slot] = grid_positions(
                    self._model, self._spec, prompt
                )
                inputs["position_ids"] = positions[..., start:stop]
            logits = self._forward(slot, inputs, 1)
            return logits[-1] if stop == len(prompt.ids) else None

    @torch.inference_mode()
    def decode(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """See `Runner.decode`."""
        with memory_errors(_ADVICE):
            return [self._decode_one(row) for row in rows]

    @torch.inference_mode()
    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `Runner.copy_prefix`."""
        with memory_errors(_ADVICE):
            copied = DynamicCache()
            for index, layer in enumerate(self._caches[source].layers):
                parts = (layer.keys[..., :length, :], layer.values[..., :length, :])
                copied.update(*(part.clone() for part in parts), index)
            self._caches[target] = copied

    def _decode_one(self, row: Row) -> torch.Tensor:
        self._cut(row.slot, row.start)
        inputs = {"input_ids": self._row(row.tokens)}
        if self._spec.grid_positions:
            text = range(row.start, row.start + len(row.tokens))
            grid = [position + self._position_deltas[row.slot] for position in text]
            inputs["position_ids"] = torch.stack([self._row(text), *[self._row(grid)] * 3])
        return self._forward(row.slot, inputs, len(row.tokens))  # [T, V]

    def _forward(self, slot: int, inputs: dict[str, Any], keep: int) -> torch.Tensor:
        output = self._model(
            **inputs, past_key_values=self._caches[slot], use_cache=True, logits_to_keep=keep
        )
        logits: torch.Tensor = output.logits[0, -keep:]  # [keep, V]
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


def grid_positions(model: Any, spec: ModelSpec, prompt: Prompt) -> tuple[torch.Tensor, int]:
    """[4, 1, T]: each token's place in the text, and its time, row and column (M-RoPE).

    The second value: what to add to a later token's place in the text to have its others.
    The model would keep it on itself; here each slot has its own. Its rule chooses by values, so it
    is applied on the CPU: a GPU would be waited for each time.
    """
    ids = torch.tensor([prompt.ids])
    text = torch.arange(len(prompt.ids))[None, None]  # [1, 1, T]
    if not prompt.images:
        return text.expand(4, -1, -1).to(model.device), 0
    grids = [torch.as_tensor(span.inputs["image_grid_thw"]) for span in prompt.images]
    types = (ids == spec.image_token_id).int()
    grid, delta = model.model.get_rope_index(
        ids, mm_token_type_ids=types, image_grid_thw=torch.cat(grids).cpu()
    )
    return torch.cat([text, grid]).to(model.device), int(delta)
