"""Read a checkpoint's own transformers processor: its tokenizer and its Pillow image processor.

Called by the loader. `AutoProcessor` would do, were it not that it gives up where torchvision is
missing and the processor could take videos too. Here a processor takes pictures and text only, and
always processes pictures by Pillow, so that a prompt is the same on every machine.
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import transformers
from transformers import PROCESSOR_MAPPING, AutoImageProcessor, AutoTokenizer, ProcessorMixin

from vlmchat.errors import UnsupportedModel

# Where a checkpoint may name its processor's class, first come first.
NAMING_FILES = ("processor_config.json", "preprocessor_config.json", "tokenizer_config.json")


def read_processor(directory: Path, config: Any) -> Any:
    """The processor in `directory`; `config` is the model's, for checkpoints that name none.

    Raises OSError, ValueError or TypeError, as transformers does, where files lack or are damaged,
    and UnsupportedModel where transformers wants a package that is not there.
    """
    options: dict[str, Any] = {"local_files_only": True, "trust_remote_code": False}
    kind: Any = getattr(transformers, _class_name(directory), None)
    if not (isinstance(kind, type) and issubclass(kind, ProcessorMixin)):
        kind = PROCESSOR_MAPPING[type(config)]
    settings, _ = kind.get_processor_dict(directory, local_files_only=True)
    parts = {
        "tokenizer": AutoTokenizer.from_pretrained(directory, **options),
        "image_processor": AutoImageProcessor.from_pretrained(directory, backend="pil", **options),
    }
    arguments = [parts.get(name) for name in kind.get_attributes()]
    settings = _placeholder_settings(kind, config) | _given(settings)
    try:
        return pictures_only(kind).from_args_and_dict(arguments, settings)
    except ImportError as error:
        raise UnsupportedModel(f"the processor in {directory} cannot be used: {error}") from error


def _placeholder_settings(kind: Any, config: Any) -> dict[str, Any]:
    """What LLaVA's older checkpoints leave to the model's config: how many tokens a picture has."""
    if "num_additional_image_tokens" not in inspect.signature(kind.__init__).parameters:
        return {}
    vision = config.vision_config
    return {
        "patch_size": vision.patch_size,
        "vision_feature_select_strategy": config.vision_feature_select_strategy,
        "num_additional_image_tokens": int(vision.model_type == "clip_vision_model"),  # its CLS
    }


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if value is not None}


def pictures_only(kind: Any) -> Any:
    """A processor class that takes `None` for its video processor."""

    class PictureProcessor(kind):  # type: ignore[misc]
        # SmolVLM's chat template asks for these two whether or not there is a video.
        video_processor = SimpleNamespace(num_frames=None, fps=None)

        @classmethod
        def get_attributes(cls) -> list[str]:
            return [name for name in kind.get_attributes() if name != "video_processor"]

    PictureProcessor.__name__ = kind.__name__
    return PictureProcessor


def _class_name(directory: Path) -> str:
    for name in NAMING_FILES:
        file = directory / name
        found = json.loads(file.read_text("utf-8")).get("processor_class") if file.is_file() else ""
        if found:
            return str(found)
    return ""
