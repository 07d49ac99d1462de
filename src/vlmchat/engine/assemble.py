"""Put tensors into a model that was built without memory, one by one, each in its final form.

Called by the loader. Peak memory is the finished model and what the reader holds: a tensor is
cast, moved and quantised as it arrives. What lacks, is left over or does not fit is an error.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from vlmchat.engine.borrowed import borrowed
from vlmchat.engine.prequantized import NamedWeight, StoredWeight, plain
from vlmchat.engine.quantize import in_place_of, quantized
from vlmchat.engine.schemes import Scheme
from vlmchat.errors import CheckpointError

# Left in files by older versions of transformers; computed from the config today.
COMPUTED = r"(^|\.)(rotary_emb\.inv_freq|position_ids)$"


@dataclass(frozen=True, slots=True)
class Precision:
    """What weights become: their device, their dtype, and a kind of `quantize.KINDS` or None.

    kept: the kind that most are stored as, and stay where `quantization` is None.
    """

    device: torch.device
    dtype: torch.dtype
    quantization: str | None = None
    kept: str | None = None

    @property
    def kind(self) -> str | None:
        """The kind of the language model's linear layers; None where they are plain."""
        return self.quantization or self.kept


@dataclass(frozen=True, slots=True)
class Opened:
    """A checkpoint that is all there and understood; its weights are yet to be read.

    model: on the meta device.  tensors: by the model's names.  context_limit: besides the
    config's, where the checkpoint has one.  tokenizer_directory: where it is not the checkpoint's.
    scheme: how its weights are stored quantised, if they are.
    """

    model: Any
    tensors: Iterable[NamedWeight]
    processor: Any
    generation_config: Any
    context_limit: int | None = None
    tokenizer_directory: Path | None = None
    scheme: Scheme | None = None


@dataclass(slots=True)
class _Found:
    """What a reader brought, by the model's names."""

    seen: set[str] = field(default_factory=set)
    unexpected: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)


def assemble(
    model: Any,
    tensors: Iterable[NamedWeight],
    precision: Precision,
    source: str,
    arrived: Callable[[int], None] = lambda number: None,
) -> None:
    """Fill `model`, a transformers model on the meta device, and leave it ready to run.

    tensors: by the model's own names.  source: what an error calls the checkpoint.
    arrived: told how many tensors have been taken so far.
    Raises CheckpointError that names tensors which are missing, unexpected or misshapen.
    """
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    shrinking = _quantizable(model)
    found = _Found()
    for name, tensor in tensors:
        if name not in shapes:
            found.unexpected.append(name)
        elif tensor.shape != shapes[name]:
            found.mismatched.append(
                f"{name} is {list(tensor.shape)} in place of {list(shapes[name])}"
            )
        else:
            _place(model, name, tensor, precision, shrink=name in shrinking)
        found.seen.add(name)
        arrived(len(found.seen))
    missing = set(shapes) - found.seen
    _refuse(model, missing, found, source)
    _compute_buffers(model, precision.device)
    model.tie_weights(missing_keys=missing, recompute_mapping=False)
    _let_image_tokens_pass(model)
    model.eval()


def _place(
    model: Any, name: str, weight: torch.Tensor | StoredWeight, to: Precision, *, shrink: bool
) -> None:
    module_name, _, leaf = name.rpartition(".")
    module = model.get_submodule(module_name)
    if shrink and (layer := _quantized_layer(module, weight, to)) is not None:
        model.set_submodule(module_name, layer)
        return
    tensor = plain(weight)
    # A copy, even where nothing changes: the file may be replaced while the model runs.
    final = tensor.dtype is to.dtype and tensor.device == to.device and leaf == "weight"
    if final and (parameter := borrowed(module, tensor)) is not None:  # for a while
        module._parameters[leaf] = parameter
        return
    dtype = to.dtype if tensor.is_floating_point() else tensor.dtype
    value = tensor.to(to.device, dtype, copy=True)
    if leaf in module._parameters:
        module._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    else:
        module._buffers[leaf] = value


def _quantized_layer(
    linear: nn.Linear, weight: torch.Tensor | StoredWeight, to: Precision
) -> nn.Module | None:
    """What stands in place of `linear`; None where it stays a plain one.

    A weight that is stored quantised keeps its numbers, unless another kind is asked for.
    """
    if not isinstance(weight, torch.Tensor) and to.quantization in (None, weight.kind):
        layer = weight.layer(linear, to.device, to.dtype)
        if layer is not None:
            found: nn.Module = in_place_of(linear, layer, to.device)
            return found
    if to.quantization is None:
        return None
    made: nn.Module = quantized(linear, plain(weight), to.quantization, to.device, to.dtype)
    return made


def _quantizable(model: Any) -> set[str]:
    """Weights of the language model's linear layers; the output head stands outside of it."""
    decoder = model.get_decoder()
    (prefix,) = (name for name, module in model.named_modules() if module is decoder)
    layers = (name for name, m in decoder.named_modules() if isinstance(m, nn.Linear))
    return {f"{prefix}.{name}.weight" for name in layers}


def _refuse(model: Any, missing: set[str], found: _Found, source: str) -> None:
    """Raise CheckpointError for the first kind of trouble there is."""
    tied = model.all_tied_weights_keys.items()
    excused = {a for a, b in tied if b not in missing} | {b for a, b in tied if a not in missing}
    absent = _without(missing - excused, model._keys_to_ignore_on_load_missing)
    left_over = _without(found.unexpected, model._keys_to_ignore_on_load_unexpected)
    troubles = {"missing": absent, "mismatched": sorted(found.mismatched), "unexpected": left_over}
    for kind, names in troubles.items():
        if names:
            shown = ", ".join(names[:3]) + (" …" if len(names) > 3 else "")
            raise CheckpointError(f"{source} has {len(names)} {kind} tensors: {shown}")


def _without(names: Iterable[str], ignored: Iterable[str] | None) -> list[str]:
    patterns = [COMPUTED, *(ignored or ())]
    return sorted(n for n in names if not any(re.search(pattern, n) for pattern in patterns))


def _let_image_tokens_pass(model: Any) -> None:
    """Where the image token is no row of the embeddings, look up another: it is replaced anyway."""
    embeddings = model.get_input_embeddings()
    last = embeddings.weight.shape[0] - 1
    if model.config.image_token_id > last:
        embeddings.register_forward_pre_hook(lambda _, inputs: (inputs[0].clamp(max=last),))


def _compute_buffers(model: Any, device: torch.device) -> None:
    """Buffers that no file holds (rotary frequencies, position ids), by the model's own rules."""
    computing = set()
    for name, buffer in list(model.named_non_persistent_buffers()):
        module_name, _, leaf = name.rpartition(".")
        module = model.get_submodule(module_name)
        module._buffers[leaf] = torch.empty_like(buffer, device=device)
        computing.add(module)
    # transformers initialises what does not bear this mark.
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    for module in model.modules():
        module._is_hf_initialized = module not in computing
    model.initialize_weights()
