"""What a transformers processor would be for a checkpoint in LLaVA's own layout.

Made by the loader and given to `Processor`, which knows no difference. No torch.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from jinja2.sandbox import ImmutableSandboxedEnvironment
from PIL import Image

from vlmchat.engine.llava_config import Pictures
from vlmchat.engine.llava_pixels import PixelMaker, count_tokens
from vlmchat.engine.templates import IMAGE_MARKER


class PromptTokenizer:
    """A text tokenizer that takes prompts with pictures in them.

    What stands between pictures is encoded by itself, so that each part begins as a text does; the
    first id of every part is dropped where it is the mark of a beginning, but for one.
    """

    def __init__(self, tokenizer: Any, image_token_id: int) -> None:
        self._tokenizer = tokenizer
        self._image_token_id = image_token_id
        self.all_special_tokens: list[str] = tokenizer.all_special_tokens
        self.bos_token: str | None = tokenizer.bos_token
        self._bos_token_id: int | None = tokenizer.bos_token_id
        self.eos_token_id: int | None = tokenizer.eos_token_id
        self.backend_tokenizer = tokenizer.backend_tokenizer

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, *, add_special_tokens: bool = True) -> dict[str, list[int]]:
        """`{"input_ids": ids}`."""
        first, *others = text.split(IMAGE_MARKER)
        ids = self._encode(first, add_special_tokens)
        begins = bool(ids) and ids[0] == self._bos_token_id
        for part in others:
            ids.append(self._image_token_id)
            if part:
                ids += self._encode(part, add_special_tokens)[begins:]
        return {"input_ids": ids}

    def _encode(self, text: str, add_special_tokens: bool) -> list[int]:
        ids = self._tokenizer(text, add_special_tokens=add_special_tokens)["input_ids"]
        return list(ids)


class OriginalProcessor:
    """The surface of a transformers processor, over LLaVA's own ids and pixels."""

    image_token = IMAGE_MARKER
    chat_template = None  # LLaVA's own templates are used

    def __init__(
        self, tokenizer: PromptTokenizer, make_pixels: PixelMaker, pictures: Pictures, marks: bool
    ) -> None:
        """marks: whether a picture stands between <im_start> and <im_end>."""
        self.tokenizer = tokenizer
        self._make_pixels = make_pixels
        self._pictures = pictures
        self._marks = ("<im_start>", "<im_end>") if marks else ("", "")

    def __call__(self, images: list[Image.Image], text: list[str], **_: Any) -> dict[str, Any]:
        """Inputs of one picture, and what stands for it in a prompt.

        pixel_values: [tiles, 3, side, side] float32.  image_sizes: [[height, width]].
        """
        (picture,) = images
        number = count_tokens(picture.size, self._pictures)
        placeholder = self.image_token * number
        before, after = self._marks
        return {
            "input_ids": [self.tokenizer(placeholder)["input_ids"]],
            "text_replacement_offsets": [[{"replacement": before + placeholder + after}]],
            "pixel_values": self._make_pixels(picture),
            "image_sizes": np.array([[picture.height, picture.width]]),
        }

    def apply_chat_template(
        self,
        messages: list[dict[str, Any]],
        *,
        chat_template: str,
        add_generation_prompt: bool,
        tokenize: bool = False,
    ) -> str:
        """The prompt as text, in a sandbox as transformers does it."""
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(chat_template).render(
            messages=messages, add_generation_prompt=add_generation_prompt
        )
