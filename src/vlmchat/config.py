"""Settings as frozen values, validated once where they are made. Never reads the environment.

`commands/` builds these from flags, environment and config file; everything below only reads them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from vlmchat.errors import ConfigError
from vlmchat.request import SamplingParams

DEFAULT_MODEL = "liuhaotian/llava-v1.5-7b"
DEMO_MODEL = "demo"

# 8bit and 4bit are whatever is the default on the device: see `loader.pick_kind`.
QUANTIZATIONS = ("8bit", "4bit", "int8", "int4", "bnb-int8", "bnb-nf4")


@dataclass(frozen=True, slots=True)
class ImagePolicy:
    """What a picture may cost, and where it may come from."""

    max_bytes: int = 50 * 2**20
    max_pixels: int = 64_000_000
    timeout_s: float = 30.0
    max_redirects: int = 3
    allow_private_urls: bool = False
    allow_local_files: bool = True  # off for whoever serves remote clients


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """Which model, and how to load it."""

    path: str = DEFAULT_MODEL  # "demo", a directory, or a hub id
    base: str | None = None
    revision: str | None = None
    device: str = "auto"  # auto | cpu | cuda | cuda:N | mps
    dtype: str = "auto"  # auto | float32 | bfloat16 | float16
    quantization: str | None = None  # None, or one of QUANTIZATIONS
    context_length: int | None = None  # None: what the model's config says
    conv_mode: str | None = None
    runner: str = "auto"  # auto | static | eager
    tensor_parallel: int = 1  # devices of this machine that share the model


@dataclass(frozen=True, slots=True)
class EngineConfig:
    """How many the engine answers at once, and what memory it may take for that.

    max_num_seqs: sequences at once; None: as many slots as one chat makes use of.
    max_num_batched_tokens: of a prompt, in one step, while other answers are under way.
    kv_memory: bytes for the keys and values of all sequences; None: what is free.
    kv_dtype: auto is the weights' own; int8.
    image_cache: bytes for the features of pictures.
    speculation: guess tokens ahead where that pays.
    answer_tokens: the longest answer that will be asked for, where known; the context must hold it.
    """

    max_num_seqs: int | None = None
    max_num_batched_tokens: int = 512
    kv_memory: int | None = None
    kv_dtype: str = "auto"
    image_cache: int = 256 * 2**20
    speculation: bool = True
    answer_tokens: int | None = None


_UNITS = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 2**10, "mib": 2**20, "gib": 2**30}


def num_bytes(option: str, text: str) -> int:
    """`2GB`, `512 MiB`, `1.5g` or a plain number as bytes; ConfigError names the option."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([kmg]?i?b?)", text.strip().lower())
    unit = found[2] if found else ""
    unit = f"{unit}b" if unit and not unit.endswith("b") else unit.removeprefix("b")
    if found is None or unit not in _UNITS or float(found[1]) * _UNITS[unit] < 1:
        raise ConfigError(f"{option} is {text!r}; give bytes, or a size such as 2GB or 512MiB")
    return int(float(found[1]) * _UNITS[unit])


def sampling_params(
    *,
    temperature: float = 0.2,
    top_p: float = 1.0,
    top_k: int = 0,
    max_new_tokens: int = 512,
    seed: int | None = None,
    stop: tuple[str, ...] = (),
    logprobs: int | None = None,
) -> SamplingParams:
    """SamplingParams with every value checked; ConfigError names the option that is wrong."""
    if not 0.0 <= temperature <= 100.0:
        raise ConfigError(f"--temperature is {temperature}; it must be between 0 and 100")
    if not 0.0 < top_p <= 1.0:
        raise ConfigError(f"--top-p is {top_p}; it must be above 0 and at most 1")
    if top_k < 0:
        raise ConfigError(f"--top-k is {top_k}; it must be 0 (off) or more")
    if max_new_tokens < 1:
        raise ConfigError(f"--max-new-tokens is {max_new_tokens}; it must be 1 or more")
    if seed is not None and not 0 <= seed < 2**63:
        raise ConfigError(f"--seed is {seed}; it must be between 0 and 2^63 - 1")
    if any(not string for string in stop):
        raise ConfigError("--stop is empty; give the text that ends an answer")
    if logprobs is not None and logprobs < 0:
        raise ConfigError(f"--logprobs is {logprobs}; it must be 0 or more")
    return SamplingParams(temperature, top_p, top_k, max_new_tokens, seed, stop, logprobs)


def settings_of(params: SamplingParams) -> dict[str, Any]:
    """What a person can set, by name: it goes into `sampling_params` as it is."""
    return {name: getattr(params, name) for name in sampling_params.__kwdefaults__ or ()}
