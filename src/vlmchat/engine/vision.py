"""Picture features: computed once per picture, kept by digest within a byte budget.

Called by the runner. The features are those that the model's own `get_image_features` gives, after
the projector, ready to stand in place of the placeholders' embeddings.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any

import torch

from vlmchat.engine.sequence import ImageSpan

# A LLaVA-1.5-7B picture is 576 x 4096 x 2 bytes = 4.7 MB.
MAX_FEATURE_BYTES = 256 * 2**20


class VisionCache:
    """Least recently used features go first once `max_bytes` is exceeded."""

    def __init__(self, model: Any, max_bytes: int = MAX_FEATURE_BYTES) -> None:
        self._model = model
        self._max_bytes = max_bytes
        self._features: OrderedDict[str, torch.Tensor] = OrderedDict()
        self.num_encoded = 0  # how often the vision tower ran

    def features(self, span: ImageSpan) -> torch.Tensor:
        """[num_tokens, hidden]: the picture's features, from the cache or from the tower."""
        features = self._features.pop(span.digest, None)
        if features is None:
            features = self._encode(span)
        self._features[span.digest] = features
        self._evict()
        return features

    def _encode(self, span: ImageSpan) -> torch.Tensor:
        self.num_encoded += 1
        inputs = {name: self._tensor(value) for name, value in span.inputs.items()}
        pooled = self._model.get_image_features(**inputs, return_dict=True).pooler_output
        return torch.cat(list(pooled), dim=0)  # [T, H]

    def _tensor(self, value: Any) -> torch.Tensor:
        tensor = torch.as_tensor(value).to(self._model.device)
        return tensor.to(self._model.dtype) if tensor.is_floating_point() else tensor

    def _evict(self) -> None:
        while len(self._features) > 1 and self._num_bytes() > self._max_bytes:
            self._features.popitem(last=False)

    def _num_bytes(self) -> int:
        return sum(f.numel() * f.element_size() for f in self._features.values())
