"""The tensors of a checkpoint in LLaVA's own layout, by the names of `OriginalLlava`.

A stream: base, what stands in place of parts of it, LoRA, tower. Nothing is held but what is
small. Called by the loader.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from vlmchat.engine.lora import Lora, bare_name
from vlmchat.engine.prequantized import NamedWeight, plain, read_weights
from vlmchat.engine.schemes import Scheme
from vlmchat.engine.tensors import NamedTensor, model_files, read_shapes, read_tensors
from vlmchat.errors import CheckpointError, UnsupportedModel

EMBEDDINGS = "model.embed_tokens.weight"
HEAD = "lm_head.weight"
TOWER = "model.vision_tower."
PROJECTOR = "model.mm_projector."
NEWLINE = "model.image_newline"
_RENAMES = (
    (re.compile(r"^model\.vision_tower\.(vision_tower\.)?(vision_model\.)?"), TOWER),
    (re.compile(r"^model\.mm_projector\."), "model.multi_modal_projector."),
    (re.compile(r"^model\.(embed_tokens|layers|norm)\."), r"model.language_model.\1."),
)
# Weights of a delta are differences: far smaller than those of any model.
_DELTA_NORM, _DELTA_SPREAD = 0.05, 0.005


@dataclass(frozen=True, slots=True)
class Parts:
    """Where an original checkpoint's tensors lie.

    files: the language model, whole.  overlay: tensors in place of theirs, or beside them.
    tower: a CLIP repository whose weights are taken, or None: those among the files.
    rows: how many tokens there are.  newline: whether the model has an image_newline.
    scheme: how the files' weights are stored quantised, if they are.
    """

    files: list[Path]
    tower: Path | None
    rows: int
    newline: bool
    overlay: Mapping[str, torch.Tensor] = field(default_factory=dict)
    lora: Lora | None = None
    scheme: Scheme | None = None


def original_tensors(parts: Parts) -> Iterator[NamedWeight]:
    """Every tensor of the model once. Raises CheckpointError where an adapter does not fit."""
    overlay = dict(parts.overlay)
    for name, weight in read_weights(parts.files, parts.scheme):
        if _left_out(name, parts):
            continue
        if parts.lora is not None:
            weight = parts.lora.merge(name, weight)
        if name in (EMBEDDINGS, HEAD):
            yield _rename(name), _fit_rows(plain(weight), overlay.pop(name, None), parts.rows)
        elif name not in overlay:
            yield _rename(name), weight
    yield from ((_rename(n), t) for n, t in overlay.items() if not _left_out(n, parts, own=True))
    if parts.lora is not None:
        parts.lora.check_used()
    if parts.tower is not None:
        yield from _tower_tensors(parts.tower)


def read_overlay(file: Path) -> dict[str, torch.Tensor]:
    """Tensors of non_lora_trainables.bin or mm_projector.bin, by the names of a whole model."""
    return {bare_name(name): tensor for name, tensor in read_tensors([file])}


def has_tower(files: list[Path], overlay: Mapping[str, Any]) -> bool:
    """Whether a vision tower is among the tensors."""
    return any(name.startswith(TOWER) for name in (*read_shapes(files), *overlay))


def check_names(files: list[Path], name: str) -> None:
    """Raise UnsupportedModel if the files hold something else than an original language model."""
    shapes = read_shapes(files)
    if not shapes:
        raise CheckpointError(f"{name} has no weights: no .safetensors, no pytorch_model*.bin")
    if any(each.startswith("transformer.") for each in shapes):
        raise UnsupportedModel(f"{name} holds an MPT or GPT model, which is not served")
    if EMBEDDINGS not in shapes:
        raise CheckpointError(
            f"{name} lacks {EMBEDDINGS}: it is no whole language model in LLaVA's own layout"
        )


def check_delta(files: list[Path], name: str) -> None:
    """Raise UnsupportedModel if the weights are differences from some base ("delta weights")."""
    wanted = ("model.norm.weight", "model.layers.0.self_attn.q_proj.weight")
    found = {name: t.float() for name, t in read_tensors(files) if name in wanted}
    if len(found) < len(wanted):
        return
    norm, spread = float(found[wanted[0]].abs().mean()), float(found[wanted[1]].std())
    if norm == 0 or (norm < _DELTA_NORM and spread < _DELTA_SPREAD):
        raise UnsupportedModel(
            f"{name} holds delta weights, differences from a base model; add them to their base "
            "first (python -m llava.model.apply_delta), then give the result"
        )


def _left_out(name: str, parts: Parts, *, own: bool = False) -> bool:
    """Tensors that the original does not use; those of the base that the overlay replaces."""
    if name.startswith(TOWER):
        return parts.tower is not None
    if name == NEWLINE:
        return not parts.newline
    if name.startswith(PROJECTOR) and not own:
        return any(other.startswith(PROJECTOR) for other in parts.overlay)
    return name.endswith("rotary_emb.inv_freq")


def _rename(name: str) -> str:
    for pattern, replacement in _RENAMES:
        name = pattern.sub(replacement, name)
    return name


def _fit_rows(base: torch.Tensor, own: torch.Tensor | None, rows: int) -> torch.Tensor:
    """[rows, H]: one row a token.

    own: in place of the base's rows: of all of them, or of the tokens that were added last.
    """
    if own is None:
        return _resize(base, rows)
    if own.shape[0] >= min(base.shape[0], rows):
        return _resize(own, rows)
    return torch.cat([_resize(base, rows - own.shape[0]), own])


def _resize(table: torch.Tensor, rows: int) -> torch.Tensor:
    """A surplus is cut, as the original does.

    A row that no file holds is the mean of all, so that its token is never the likeliest one.
    """
    if table.shape[0] >= rows:
        return table[:rows]
    mean = table.float().mean(dim=0).to(table.dtype)
    return torch.cat([table, mean.expand(rows - table.shape[0], -1)])


def _tower_tensors(tower: Path) -> Iterator[NamedTensor]:
    """A CLIP repository's vision half; in newer files it stands alone, without a prefix."""
    files = model_files(tower)
    if not files:
        raise CheckpointError(f"the vision tower {tower} has no weights")
    prefix = "vision_model."
    if not any(name.startswith(prefix) for name in read_shapes(files)):
        prefix = ""
    for name, tensor in read_tensors(files):
        if name.startswith(prefix):
            yield TOWER + name.removeprefix(prefix), tensor
