"""Open a checkpoint in the Hugging Face layout, with whatever names its version gave the tensors.

Called by the loader. Builds the model without memory; the weights come as a stream, renamed by
transformers' own rules.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForImageTextToText, GenerationConfig
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightRenaming, rename_source_key

from vlmchat.engine.assemble import Opened
from vlmchat.engine.hf_processor import read_processor
from vlmchat.engine.hub import read_config
from vlmchat.engine.prequantized import read_weights
from vlmchat.engine.schemes import read_scheme
from vlmchat.engine.spare import on_meta
from vlmchat.engine.tensors import model_files
from vlmchat.errors import CheckpointError, UnsupportedModel

MAX_WORDS = 200  # of a library's message, in characters


def open_hugging_face(directory: Path) -> Opened:
    """Raises CheckpointError where files lack or are damaged."""
    with damaged_files(str(directory)):
        config = AutoConfig.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False
        )
        with on_meta():
            model = AutoModelForImageTextToText.from_config(config)
        processor = read_processor(directory, config)
        generation_config = read_generation_config(directory, model)
    files = model_files(directory)
    if not files:
        raise CheckpointError(f"{directory} has no weights as .safetensors or .bin")
    rename = _renaming(model)
    scheme = read_scheme(read_config(directory), str(directory))
    tensors = ((rename(name), weight) for name, weight in read_weights(files, scheme))
    return Opened(model, tensors, processor, generation_config, scheme=scheme)


@contextmanager
def damaged_files(name: str) -> Iterator[None]:
    """Turn what transformers raises over settings that cannot be used into CheckpointError."""
    try:
        yield
    except (
        StrictDataclassError,
        OSError,
        ValueError,
        LookupError,
        RuntimeError,
        TypeError,
        AttributeError,
        SyntaxError,
    ) as error:
        words = " ".join(str(error).split())
        if isinstance(error, LookupError) or not words:  # often nothing but the key
            words = repr(error)
        shown = words if len(words) <= MAX_WORDS else f"{words[:MAX_WORDS]} …"
        raise CheckpointError(f"{name} cannot be loaded: {shown}") from error


def read_generation_config(directory: Path, model: Any) -> Any:
    """generation_config.json, or what the model's config says of generation."""
    if (directory / "generation_config.json").is_file():
        return GenerationConfig.from_pretrained(directory, local_files_only=True)
    return GenerationConfig.from_model_config(model.config.get_text_config())


def _renaming(model: Any) -> Callable[[str], str]:
    """From names in files, of transformers 4.3x, 4.52+ or 5, to the model's."""
    rules = get_model_conversion_mapping(model)
    if not all(isinstance(rule, WeightRenaming) for rule in rules):
        raise UnsupportedModel(
            f"the weights of {model.config.model_type} would have to be rearranged, "
            "which is not served; choose another model"
        )
    own = model.state_dict()

    def rename(name: str) -> str:
        renamed, _ = rename_source_key(name, rules, [], model.base_model_prefix, own)
        return str(renamed)

    return rename
