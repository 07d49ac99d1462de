"""The reference that every answer is held to: plain transformers `generate` on the whole prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoProcessor

from vlmchat.conversation import Conversation


class Reference:
    """An unmodified model and processor of transformers, with no cache between calls."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory).eval()
        self.processor: Any = AutoProcessor.from_pretrained(directory)

    def inputs(self, conversation: Conversation) -> Any:
        """What the processor makes of a fresh conversation with these turns."""
        messages = [
            {
                "role": message.role,
                "content": [{"type": "image"} for _ in message.images]
                + [{"type": "text", "text": message.text}],
            }
            for message in conversation.messages()
        ]
        text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        images = [image.pixels for image in conversation.images]
        return self.processor(text=[text], images=images or None, return_tensors="pt")

    def answer_ids(self, conversation: Conversation, max_new_tokens: int) -> list[int]:
        """The greedy answer's token ids, end token included."""
        inputs = self.inputs(conversation)
        with torch.inference_mode():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return ids
