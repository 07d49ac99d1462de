"""Merge a LoRA adapter by hand: W + scale · B A, one weight at a time, in float32.

So an adapter goes into a model while that is read, also one that is then quantised; and it touches
the layers that it names, whatever else has the same short name. Used by the loader's readers.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from vlmchat.engine.hub import ADAPTERS, read_json
from vlmchat.engine.prequantized import NamedWeight, StoredWeight
from vlmchat.engine.tensors import read_tensors
from vlmchat.errors import CheckpointError, UnsupportedModel

_FACTOR = re.compile(r"(?P<layer>.+)\.lora_(?P<factor>[AB])(\.default)?\.weight")


def bare_name(name: str) -> str:
    """A tensor's name without the wrappings of PEFT and trainers: `model.layers.0…`, `lm_head…`."""
    name = re.sub(r"^base_model\.", "", name)
    name = re.sub(r"^(model\.)+|\.modules_to_save(\.default)?", "", name)
    return name if name.startswith("lm_head") else f"model.{name}"


class Lora:
    """One adapter's layers, by the name of the weight that each belongs to."""

    def __init__(self, directory: Path, rename: Callable[[str], str] = bare_name) -> None:
        """rename: from the adapter's names to those given to `merge`.

        Raises CheckpointError or UnsupportedModel where it cannot be merged.
        """
        self._config = read_json(directory / "adapter_config.json")
        self._source = directory
        if self._config.get("peft_type", "LORA") != "LORA" or self._config.get("use_dora"):
            raise UnsupportedModel(f"{directory} is a PEFT adapter, but not a plain LoRA")
        files = [directory / name for name in ADAPTERS if (directory / name).is_file()]
        if not files:
            raise CheckpointError(f"{directory} lacks {' or '.join(ADAPTERS)}")
        self._factors: dict[str, dict[str, torch.Tensor]] = {}
        self._trained: dict[str, str] = {}  # the adapter's own names, which its config speaks of
        self.replacements: dict[str, torch.Tensor] = {}  # tensors that the adapter holds whole
        for name, tensor in read_tensors(files[:1]):
            if found := _FACTOR.fullmatch(name):
                layer = rename(f"{found['layer']}.weight")
                self._factors.setdefault(layer, {})[found["factor"]] = tensor
                self._trained[layer] = found["layer"]
            elif "lora_" in name:
                raise UnsupportedModel(f"{directory} holds {name}, which is not served")
            else:
                self.replacements[rename(name)] = tensor

    def merge(self, name: str, weight: torch.Tensor | StoredWeight) -> torch.Tensor | StoredWeight:
        """The weight with its share of the adapter, in float32; as it is if it has none.

        Raises CheckpointError where shapes do not fit.
        """
        factors = self._factors.pop(name, None)
        if factors is None:
            return weight
        try:
            a, b = factors["A"].float(), factors["B"].float()  # [r, in], [out, r]
            change = b @ a * self._scale(self._trained[name], a.shape[0])
            if self._config.get("fan_in_fan_out"):
                change = change.T
            if change.shape != weight.shape:
                raise ValueError(f"{list(change.shape)} for {list(weight.shape)}")
        except (KeyError, ValueError, RuntimeError) as error:
            raise CheckpointError(
                f"the adapter {self._source} does not fit {name} of the base ({error}); "
                "is --model-base the model that it was made from?"
            ) from error
        return weight.float() + change

    def merged(self, tensors: Iterable[NamedWeight]) -> Iterator[NamedWeight]:
        """Every tensor, with its share. Raises CheckpointError if a layer finds no weight."""
        for name, tensor in tensors:
            yield name, self.merge(name, tensor)
        self.check_used()

    def check_used(self) -> None:
        """Raise CheckpointError if some layer of the adapter found no weight."""
        if left := sorted(self._factors):
            raise CheckpointError(
                f"the base lacks {len(left)} layers of the adapter {self._source}: "
                f"{', '.join(left[:3])}; is --model-base the model that it was made from?"
            )

    def _scale(self, name: str, rank: int) -> float:
        alpha = self._config.get("lora_alpha", rank)
        patterns: dict[str, Any] = self._config.get("alpha_pattern") or {}
        for pattern, value in patterns.items():
            if re.fullmatch(rf"(.*\.)?({pattern})", name):
                alpha = value
                break
        return float(alpha / (math.sqrt(rank) if self._config.get("use_rslora") else rank))
