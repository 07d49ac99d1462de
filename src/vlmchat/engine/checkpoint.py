"""What a checkpoint is and what running it takes, told from its config and its files' headers.

For `vlmchat models`: no torch, no tensor is read, nothing is downloaded. The loader reads a
checkpoint in full and has the last word.
"""

from __future__ import annotations

import ast
import hashlib
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any

from vlmchat.engine.download import sha256_of
from vlmchat.engine.hub import (
    ADAPTERS,
    LORA_REST,
    PROJECTOR,
    is_weights,
    listed_sizes,
    missing_files,
    needed_files,
    read_config,
    read_index,
    read_json,
    tower_here,
    tower_name,
    weight_files,
)
from vlmchat.engine.llava import is_original
from vlmchat.engine.spec import FAMILIES, check_config
from vlmchat.engine.templates import template_for_checkpoint
from vlmchat.engine.weights import (
    HEADROOM,
    TensorHeader,
    as_plain,
    count_weights,
    needed_bytes,
    read_header,
    read_headers,
)
from vlmchat.errors import CheckpointError, UnsupportedModel

# What `show` tells the memory of: name -> (bytes per weight, quantisation).
PRECISIONS: Mapping[str, tuple[int, str | None]] = {
    "float32": (4, None),
    "bfloat16": (2, None),
    "8bit": (2, "8bit"),
    "4bit": (2, "4bit"),
}

_INDEX = re.compile(r"(pytorch_)?model\.(bin|safetensors)\.index\.json")
_IN_LAYER = re.compile(r"(.*\b(?:layers|blocks))\.(\d+)\.(.+)")


class Layout(StrEnum):
    """How a checkpoint lies on disk."""

    HUGGING_FACE = "hugging-face"
    ORIGINAL = "original"  # as LLaVA's own code writes it
    ORIGINAL_LORA = "original-lora"
    PROJECTOR_ONLY = "original-projector"
    ADAPTER = "peft-adapter"
    UNKNOWN = "unknown"


# With all weights but those of a vision tower.
WHOLE_LAYOUTS = (Layout.HUGGING_FACE, Layout.ORIGINAL)


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """What one directory holds.

    problem: why it cannot be run as it is; None if it can.  parameters, context_length,
    image_tokens (fewest, most per picture): None where the files do not tell.  memory_bytes: by
    precision, with room for work.  tower, base: the other models that it takes; tower_here: the
    tower's directory, None where it is not on this machine.
    """

    directory: Path
    layout: Layout
    family: str
    problem: str | None
    num_bytes: int
    parameters: int | None
    context_length: int | None
    image_tokens: tuple[int, int] | None
    template: str
    tower: str | None
    tower_here: Path | None
    base: str | None
    memory_bytes: dict[str, int]


def layout_of(directory: Path, config: Mapping[str, Any]) -> Layout:
    """Told by the config and the files that are there, never by a name."""
    here = {file.name for file in directory.iterdir()}
    # Shards that an index names belong to a whole model, also where they have not arrived.
    whole = bool(weight_files(here)) or any(_INDEX.fullmatch(name) for name in here)
    original = is_original(config)
    if not whole and here.intersection(ADAPTERS):
        return Layout.ORIGINAL_LORA if original or LORA_REST in here else Layout.ADAPTER
    if not whole and PROJECTOR in here:
        return Layout.PROJECTOR_ONLY
    if original:
        return Layout.ORIGINAL
    return Layout.HUGGING_FACE if str(config.get("model_type")) in FAMILIES else Layout.UNKNOWN


def family_of(config: Mapping[str, Any]) -> str:
    """What people call the model's family."""
    if is_original(config):
        return "LLaVA-NeXT" if "anyres" in str(config.get("image_aspect_ratio")) else "LLaVA"
    kind = str(config.get("model_type", "unknown"))
    return FAMILIES[kind].name if kind in FAMILIES else kind


def describe_kind(directory: Path, config: Mapping[str, Any]) -> str:
    """Family and layout in few words, for a list."""
    names = {
        Layout.ORIGINAL: ", original",
        Layout.ORIGINAL_LORA: ", original LoRA",
        Layout.PROJECTOR_ONLY: ", projector only",
    }
    layout = layout_of(directory, config)
    return "PEFT adapter" if layout is Layout.ADAPTER else family_of(config) + names.get(layout, "")


def why_not(directory: Path, name: str) -> str | None:
    """Why the checkpoint cannot be run; None if nothing speaks against it."""
    if absent := missing_files(directory):
        return f"incomplete: lacks {absent[0]}" + (" and more" if len(absent) > 1 else "")
    config = read_config(directory)
    if layout_of(directory, config) is Layout.ADAPTER:
        return None
    try:
        check_config(config, name)
    except UnsupportedModel as error:
        return error.message
    return None


def inspect(directory: Path, name: str) -> Checkpoint:
    """All that can be told of a checkpoint without loading it.

    name: what it goes by, for messages and as the last resort for its template.
    Raises CheckpointError where its files are broken.
    """
    config = read_config(directory)
    layout = layout_of(directory, config)
    tower = tower_name(config)
    tower_directory = tower_here(tower, directory) if tower else None
    tensors = as_plain(read_headers(directory), config, name)
    if tower_directory is not None and not any("vision_model" in name for name in tensors):
        own = {f"vision.{n}": t for n, t in read_headers(tower_directory).items() if "vision" in n}
        tensors |= own
    whole = bool(weight_files({tensor.file for tensor in tensors.values()})) and (
        not tower or tower_directory is not None
    )
    adapter = read_json(directory / "adapter_config.json")
    return Checkpoint(
        directory=directory,
        layout=layout,
        family=family_of(config),
        problem=why_not(directory, name),
        num_bytes=num_bytes(directory),
        parameters=sum(t.num_weights for t in tensors.values()) if tensors else None,
        context_length=_context_length(directory, config),
        image_tokens=image_tokens(config, read_config(tower_directory) if tower_directory else {}),
        template=_template(directory, layout, config, name),
        tower=tower,
        tower_here=tower_directory,
        base=adapter.get("base_model_name_or_path"),
        memory_bytes=_memory(tensors) if whole else {},
    )


def num_bytes(directory: Path) -> int:
    """Bytes of the files that running the model takes."""
    needed = needed_files([file.name for file in directory.iterdir()])
    return sum((directory / name).stat().st_size for name in needed if (directory / name).exists())


def image_tokens(config: Mapping[str, Any], tower: Mapping[str, Any]) -> tuple[int, int] | None:
    """Fewest and most tokens of one picture, for LLaVA's families and those of fixed numbers.

    tower: the config of the vision tower where it is a model of its own.
    """
    if isinstance(config.get("mm_tokens_per_image"), int):  # Gemma 3
        return (config["mm_tokens_per_image"],) * 2
    original = is_original(config)
    if not original and config.get("model_type") not in ("llava", "llava_next"):
        return None
    whole = tower if original else config
    vision = _part(whole, "vision_config") or whole
    size, patch = vision.get("image_size"), vision.get("patch_size")
    if not isinstance(size, int) or not isinstance(patch, int):
        return None
    side = size // patch  # patches
    if config.get("model_type") == "llava_next" or "anyres" in str(
        config.get("image_aspect_ratio")
    ):
        return _tiled(side, _grids(config.get("image_grid_pinpoints"), size), config)
    with_class = config.get("vision_feature_select_strategy") == "full" or (
        config.get("mm_vision_select_feature") == "cls_patch"
    )
    return (side * side + with_class,) * 2


def verify(
    directory: Path, progress: Callable[[str], None] = lambda stage: None
) -> tuple[dict[str, int], list[str]]:
    """Check a checkpoint's files: what was looked at, counted, and every problem found.

    Tensors: every file's table is sound and fits its size, every tensor that the index names is
    there, and each layer has what its fellows have, as many as the config says. Hashes: of every
    file in the Hugging Face cache, whose name there is its hash.
    """
    problems = [f"{name} is missing" for name in missing_files(directory)]
    tensors: dict[str, TensorHeader] = {}
    files = needed_files([file.name for file in directory.iterdir()])
    for name in files:
        if is_weights(name):
            try:
                tensors |= read_header(directory / name)
            except CheckpointError as error:
                problems.append(error.message)
    if not problems and layout_of(directory, read_config(directory)) in WHOLE_LAYOUTS:
        problems += _missing_tensors(directory, tensors)
    sizes = listed_sizes(directory) or {}
    for name in files:
        found = (directory / name).stat().st_size if (directory / name).exists() else 0
        if found != sizes.get(name, found):
            problems.append(f"{name} has {found} bytes, the hub has {sizes[name]}")
    hashes = 0
    for name in files:
        expected = _known_hash(directory / name)
        if expected is not None:
            hashes += 1
            progress(f"reading {name}")
            if _hash_like(expected, directory / name) != expected:
                problems.append(f"{name} is damaged: its hash is not the hub's")
    return {"files": len(files), "tensors": len(tensors), "hashes": hashes}, problems


def _missing_tensors(directory: Path, tensors: Mapping[str, TensorHeader]) -> Iterator[str]:
    for index in directory.glob("*.index.json"):
        named = read_index(index)
        if set(named.values()) & {t.file for t in tensors.values()}:
            for name in sorted(set(named) - set(tensors)):
                yield f"{name} is missing, which {index.name} puts into {named[name]}"
    if not any(name.endswith("embed_tokens.weight") for name in tensors):
        yield "the token embeddings are missing"
    config = read_config(directory)
    stacks: dict[str, dict[int, set[str]]] = {}
    for name in tensors:
        if found := _IN_LAYER.fullmatch(name):
            stacks.setdefault(found[1], {}).setdefault(int(found[2]), set()).add(found[3])
    for stack, layers in stacks.items():
        parts = set[str]().union(*layers.values())
        for number in range(max(_num_layers(config, stack), max(layers) + 1)):
            for part in sorted(parts - layers.get(number, set())):
                yield f"{stack}.{number}.{part} is missing"


def _part(config: Mapping[str, Any], name: str) -> Mapping[str, Any]:
    """A config within a config; empty where there is none."""
    part = config.get(name)
    return part if isinstance(part, dict) else {}


def _num_layers(config: Mapping[str, Any], stack: str) -> int:
    """How many layers the config says a language model has; 0 for a vision tower.

    A tower may be cut behind the layer whose features are used.
    """
    text = _part(config, "text_config") or config
    count = 0 if "vision" in stack or "visual" in stack else text.get("num_hidden_layers")
    return count if isinstance(count, int) else 0


def _known_hash(file: Path) -> str | None:
    """The hash that names the file's content in the cache: sha256, or git's for small files."""
    if not file.is_symlink():
        return None
    blob = Path(os.readlink(file)).name  # the first hop: a blob may itself be a link
    return blob if re.fullmatch("[0-9a-f]{64}|[0-9a-f]{40}", blob) else None


def _hash_like(expected: str, file: Path) -> str:
    if not file.exists():
        return ""
    if len(expected) == 64:
        return sha256_of(file)
    data = file.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def _context_length(directory: Path, config: Mapping[str, Any]) -> int | None:
    """The config's; LLaVA's own code cuts prompts at `tokenizer_model_max_length` too."""
    text = _part(config, "text_config") or config
    limits = [text.get("max_position_embeddings"), config.get("tokenizer_model_max_length")]
    return min((limit for limit in limits if isinstance(limit, int)), default=None)


def _template(directory: Path, layout: Layout, config: Mapping[str, Any], name: str) -> str:
    """The prompt format in words."""
    if layout in (Layout.ORIGINAL, Layout.ORIGINAL_LORA, Layout.PROJECTOR_ONLY):
        found, rule = template_for_checkpoint(directory, config, name)
        return f"{found}, by {rule}; --conv-mode chooses another"
    files = ("chat_template.json", "tokenizer_config.json", "processor_config.json")
    own = any(read_json(directory / file).get("chat_template") for file in files)
    if own or (directory / "chat_template.jinja").exists():
        return "the checkpoint's own"
    family = FAMILIES.get(str(config.get("model_type")))
    if family is not None and family.chat_template:
        return "the family's"
    return "none in the checkpoint; --conv-mode chooses one"


def _memory(tensors: Mapping[str, TensorHeader]) -> dict[str, int]:
    linear, other = count_weights(tensors)
    return {
        name: round(needed_bytes(linear, other, item_bytes, quantization) * HEADROOM)
        for name, (item_bytes, quantization) in PRECISIONS.items()
    }


def _grids(pinpoints: Any, size: int) -> list[tuple[int, int]]:
    """Grids of tiles from resolutions, which some checkpoints hold as a text."""
    if isinstance(pinpoints, str):
        try:
            pinpoints = ast.literal_eval(pinpoints)
        except (ValueError, SyntaxError):
            return []
    try:
        return [(int(w) // size, int(h) // size) for w, h in pinpoints or ()]
    except (TypeError, ValueError):
        return []


def _tiled(
    side: int, grids: list[tuple[int, int]], config: Mapping[str, Any]
) -> tuple[int, int] | None:
    """LLaVA-NeXT: the whole picture, then its tiles, with a newline after each row of patches."""
    if not grids:
        return None
    if "text_config" in config:  # the Hugging Face layout: height first, always unpadded
        rows, unpadded = [w for w, _ in grids], True
    else:
        rows, unpadded = [h for _, h in grids], "unpad" in str(config.get("mm_patch_merge_type"))
    base = side * side
    counts = [base * (1 + w * h) for w, h in grids]
    if unpadded:  # rows or columns of padding are cut away, at worst all of them
        most = (count + row * side for count, row in zip(counts, rows, strict=True))
        return base, max(most)
    return min(counts), max(counts)
