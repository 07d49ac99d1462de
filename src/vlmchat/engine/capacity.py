"""How many sequences the memory holds, and which runner can serve them.

Called by `Engine.over` once the weights are loaded. Knows nothing of requests.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from vlmchat.config import EngineConfig, ModelConfig
from vlmchat.engine.borrowed import borrowed_bytes
from vlmchat.engine.kv_cache import KVShape
from vlmchat.engine.memory import free_bytes
from vlmchat.engine.runner import EagerRunner
from vlmchat.engine.static_runner import StaticRunner, unsupported
from vlmchat.errors import ConfigError, OutOfMemory

if TYPE_CHECKING:
    from vlmchat.engine.loader import LoadedModel
    from vlmchat.engine.runner import Runner
    from vlmchat.engine.vision import VisionCache

# Of the memory that is free: for keys and values at most, and for slots beyond the first one.
_SHARE = 0.9
_SPARE_SHARE = 0.1
# Slots where nobody says how many: one chat and what it may come back to; as --kv-memory allows.
_CHAT_SLOTS = 4
_MOST_SLOTS = 16


@dataclass(frozen=True, slots=True)
class Slots:
    """So many, of so many tokens and bytes each."""

    count: int
    context_length: int
    bytes_each: int

    def __str__(self) -> str:
        size = self.count * self.bytes_each / 1e9
        return f"{self.count} of {self.context_length} tokens, {size:.2f} GB"


def make_runner(
    loaded: LoadedModel, vision: VisionCache, config: ModelConfig, limits: EngineConfig
) -> tuple[Runner, Slots, str]:
    """The fastest runner that is proven for this model, its slots, and what it is called.

    Raises OutOfMemory when not one slot fits, ConfigError when the model cannot run as asked.
    """
    model, spec, context = loaded.model, loaded.spec, loaded.status.context_length
    if loaded.team is not None:
        return _shared_runner(loaded, vision, limits)
    why = unsupported(model, spec) if config.runner != "eager" else "asked for"
    if why is not None:
        if config.runner == "static":
            raise ConfigError(f"--runner static: {why}")
        if limits.kv_dtype != "auto":
            raise ConfigError(f"--kv-dtype {limits.kv_dtype}: the eager runner has none ({why})")
    dtype = torch.int8 if limits.kv_dtype == "int8" else model.dtype
    each = context * shape_of(model).position_bytes(dtype, model.dtype)
    free = free_bytes(model.device) - borrowed_bytes(model)
    slots = fit(limits, context, each, free)
    if why is not None:
        return EagerRunner(model, spec, vision, slots.count), slots, f"eager: {why}"
    static = StaticRunner(model, spec, vision, slots.count, context, dtype)
    return static, slots, f"static, {static.how}" if static.how else "static"


def _shared_runner(
    loaded: LoadedModel, vision: VisionCache, limits: EngineConfig
) -> tuple[Runner, Slots, str]:
    """Where processes share the model, each has the keys and values of its own heads."""
    from vlmchat.engine.parallel import TeamRunner

    model, team, context = loaded.model, loaded.team, loaded.status.context_length
    if limits.kv_dtype != "auto":
        raise ConfigError(f"--kv-dtype {limits.kv_dtype} does not go with --tensor-parallel")
    each = context * shape_of(model).position_bytes(model.dtype, model.dtype) // team.size
    slots = fit(limits, context, each, free_bytes(model.device))
    eager = EagerRunner(model, loaded.spec, vision, slots.count)
    return TeamRunner(eager, team, slots.count), slots, f"eager, on {team.size} devices"


def shape_of(model: Any) -> KVShape:
    """What the model's language model keeps for each position."""
    config = model.config.get_text_config()
    heads = config.num_attention_heads
    return KVShape(
        num_layers=config.num_hidden_layers,
        num_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def fit(limits: EngineConfig, context_length: int, bytes_each: int, free: float) -> Slots:
    """As many slots as are asked for and fit. Raises OutOfMemory if that is none.

    free: bytes; so much of it as --kv-memory says is used, or most of it.
    """
    given = limits.kv_memory
    usable = free * _SHARE if given is None else min(float(given), free)
    if usable < bytes_each:
        told = "free" if given is None or given > free else "given by --kv-memory"
        raise OutOfMemory(
            f"{context_length} tokens of context need {bytes_each / 1e9:.2f} GB for their keys and "
            f"values, {usable / 1e9:.2f} GB are {told}; lower --context-length, use --kv-dtype "
            "int8, or choose a smaller model"
        )
    most = limits.max_num_seqs
    if most is None:
        spare = int(free * _SPARE_SHARE / bytes_each)
        most = min(_CHAT_SLOTS, 1 + spare) if given is None else _MOST_SLOTS
    return Slots(min(most, int(usable / bytes_each)), context_length, bytes_each)
