"""LLaVA as its own checkpoints want it: their projector, their tiles, their vocabulary.

transformers' class does the rest. Built by the loader, run by the runner like any other model.
"""

from __future__ import annotations

import re
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn
from transformers import LlavaForConditionalGeneration

from vlmchat.engine.llava_config import Pictures
from vlmchat.engine.llava_pixels import grid_shape, unpadded


def make_projector(pictures: Pictures, hidden_size: int) -> nn.Module:
    """[T, pictures.width] -> [T, hidden_size]. GELU is the exact one, by the error function."""
    if pictures.projector == "identity":
        return nn.Identity()
    first = nn.Linear(pictures.width, hidden_size)
    if pictures.projector == "linear":
        return first
    layers: list[nn.Module] = [first]
    for _ in range(1, int(re.findall(r"\d+", pictures.projector)[0])):
        layers += [nn.GELU(), nn.Linear(hidden_size, hidden_size)]
    return nn.Sequential(*layers)


class OriginalLlava(LlavaForConditionalGeneration):  # type: ignore[misc]
    """transformers' LLaVA with what the original does otherwise."""

    def __init__(self, config: Any, pictures: Pictures) -> None:
        super().__init__(config)
        hidden_size = config.text_config.hidden_size
        self._pictures = pictures
        self.model.multi_modal_projector = make_projector(pictures, hidden_size)
        if pictures.newline:
            self.model.image_newline = nn.Parameter(torch.empty(hidden_size))

    def get_image_features(
        self, pixel_values: torch.Tensor, image_sizes: torch.Tensor, **_: Any
    ) -> SimpleNamespace:
        """Features of one picture, as `pooler_output`: a list of one [T, hidden].

        pixel_values: [tiles, 3, side, side].  image_sizes: [[height, width]] in pixels.
        """
        tower = self.model.vision_tower(pixel_values, output_hidden_states=True)
        chosen = tower.hidden_states[self._pictures.layer]  # [tiles, 1 + side², vision hidden]
        if not self._pictures.keep_class:
            chosen = chosen[:, 1:]
        tiles = self.model.multi_modal_projector(chosen)  # [tiles, side², hidden]
        height, width = image_sizes[0].tolist()
        return SimpleNamespace(pooler_output=[self._join((width, height), tiles)])

    def _join(self, size: tuple[int, int], tiles: torch.Tensor) -> torch.Tensor:
        """[tiles, side², H] -> [T, H]: the whole picture first, then its tiles."""
        pictures, side = self._pictures, self._pictures.side
        if pictures.aspect_ratio != "anyres" or pictures.merge == "flat":
            return tiles.flatten(0, 1)
        columns, rows = grid_shape(size, pictures)
        canvas = tiles[1:].view(rows, columns, side, side, -1).transpose(1, 2)
        if not pictures.newline:
            return torch.cat([tiles[0], canvas.flatten(0, 3)])
        canvas = canvas.flatten(2, 3).flatten(0, 1)  # [rows * side, columns * side, H]
        kept = canvas[unpadded(size, columns * side, rows * side)]
        ends = self.model.image_newline.expand(kept.shape[0], 1, -1)
        return torch.cat([tiles[0], torch.cat([kept, ends], dim=1).flatten(0, 1)])
