"""Picture features: computed once per picture, kept by digest within a byte budget.

Called by the runner. The features are those that the model's own `get_image_features` gives, after
the projector, ready to stand in place of the placeholders' embeddings.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import torch

from vlmchat.engine.memory import memory_errors
from vlmchat.engine.sequence import ImageSpan

_ADVICE = "out of memory while a picture was encoded; use --load-4bit or a smaller model"
# A LLaVA-1.5-7B picture is 576 x 4096 x 2 bytes = 4.7 MB.
MAX_FEATURE_BYTES = 256 * 2**20


@dataclass(frozen=True, slots=True)
class Features:
    """What the language model takes of one picture.

    pooled: [num_tokens, hidden].  deepstack: the same shape, for each layer of the language model
    that takes features of its own (Qwen3-VL); else empty.
    """

    pooled: torch.Tensor
    deepstack: tuple[torch.Tensor, ...] = ()

    @property
    def num_bytes(self) -> int:
        """Of all tensors."""
        return sum(t.numel() * t.element_size() for t in (self.pooled, *self.deepstack))


class VisionCache:
    """Least recently used features go first once `max_bytes` is exceeded."""

    def __init__(self, model: Any, max_bytes: int = MAX_FEATURE_BYTES) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._features: OrderedDict[str, Features] = OrderedDict()
        self._in_one_tensor = False  # the model's own form: all pictures in one, or a list
        self.num_encoded = 0  # how often the vision tower ran

    @torch.inference_mode()
    def features(self, span: ImageSpan) -> Features:
        """The picture's features, from the cache or from the tower. Raises OutOfMemory."""
        features = self._features.pop(span.digest, None)
        if features is None:
            with memory_errors(_ADVICE):
                features = self._encode(span)
        self._features[span.digest] = features
        self._evict()
        return features

    def forget(self, span: ImageSpan) -> None:
        """Keep the picture's features no longer."""
        self._features.pop(span.digest, None)

    def encoder_outputs(self, spans: Sequence[ImageSpan]) -> dict[str, Any] | None:
        """The pictures' features in the form that the model's `mm_encoder_outputs` takes."""
        if not spans:
            return None
        pictures = [self.features(span) for span in spans]
        pooled = [picture.pooled for picture in pictures]
        output = SimpleNamespace(
            pooler_output=torch.cat(pooled) if self._in_one_tensor else pooled,
            deepstack_features=list(zip(*(p.deepstack for p in pictures), strict=True)),
        )
        return {"image": output}

    def _encode(self, span: ImageSpan) -> Features:
        self.num_encoded += 1
        inputs = {name: self._tensor(value) for name, value in span.inputs.items()}
        output = self._model.get_image_features(**inputs, return_dict=True)
        self._in_one_tensor = isinstance(output.pooler_output, torch.Tensor)
        deepstack = getattr(output, "deepstack_features", None) or ()
        return Features(_flat(output.pooler_output), tuple(_flat(layer) for layer in deepstack))

    def _tensor(self, value: Any) -> torch.Tensor:
        tensor = torch.as_tensor(value).to(self._model.device)
        return tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor

    def _evict(self) -> None:
        while len(self._features) > 1 and self._num_bytes() > self._max_bytes:
            self._features.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(features.num_bytes for features in self._features.values())


def _flat(parts: torch.Tensor | Sequence[torch.Tensor]) -> torch.Tensor:
    """[T, H]: the tiles of one picture, one after the other."""
    joined = parts if isinstance(parts, torch.Tensor) else torch.cat(list(parts))
    return joined.reshape(-1, joined.shape[-1])  # [T, H]
