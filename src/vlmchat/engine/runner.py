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
from transformers.modeling_outputs import BaseModelOutputWithPooling

from vlmchat.engine.memory import memory_errors
from vlmchat.engine.sequence import Prompt
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
    """The plain forward of transformers over one growing cache per slot."""

    def __init__(self, model: Any, vision: VisionCache, num_slots: int) -> None:
        self._model = model
        self._vision = vision
        self._caches = [DynamicCache() for _ in range(num_slots)]

    @torch.inference_mode()
    def prefill(self, slot: int, prompt: Prompt, start: int) -> torch.Tensor:
        """See `Runner.prefill`. Keys and values past `start` are discarded first."""
        with memory_errors(_ADVICE):
            cache = self._caches[slot]
            cache.crop(start - cache.get_seq_length())
            features = [self._vision.features(s) for s in prompt.images if s.start >= start]
            encoded = {"image": BaseModelOutputWithPooling(pooler_output=features)}
            return self._forward(slot, prompt.ids[start:], encoded if features else None)

    @torch.inference_mode()
    def decode(self, slots: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        """See `Runner.decode`."""
        with memory_errors(_ADVICE):
            rows = [self._forward(s, [t]) for s, t in zip(slots, tokens, strict=True)]
            return torch.stack(rows)

    def _forward(
        self, slot: int, ids: Sequence[int], encoded: dict[str, Any] | None = None
    ) -> torch.Tensor:
        output = self._model(
            input_ids=torch.tensor([list(ids)], device=self._model.device),  # [1, T]
            past_key_values=self._caches[slot],
            mm_encoder_outputs=encoded,
            use_cache=True,
            logits_to_keep=1,
        )
        logits: torch.Tensor = output.logits[0, -1]  # [V]
        return logits
