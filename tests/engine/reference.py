"""The reference that every answer is held to: plain transformers `generate` on the whole prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText

from vlmchat.conversation import Conversation
from vlmchat.engine.hf_processor import read_processor


class Reference:
    """An unmodified model and processor of transformers, with no cache between calls."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self.model: Any = AutoModelForImageTextToText.from_pretrained(directory).eval()
        self.processor: Any = read_processor(directory, self.model.config)

    def inputs(self, conversation: Conversation) -> Any:
        """What the processor makes of a fresh conversation with these turns."""
        text = self.text(conversation)
        images = [image.pixels for image in conversation.images]
        bos = self.processor.tokenizer.bos_token
        return self.processor(
            text=[text],
            images=[images] if images else None,
            add_special_tokens=not (bos and text.startswith(bos)),
            return_tensors="pt",
        )

    def text(self, conversation: Conversation) -> str:
        """The prompt; without a chat template, PaliGemma's: pictures, then a line for each text."""
        if self.processor.chat_template is None:
            lines = "\n".join(message.text for message in conversation.messages())
            return "<image>" * len(conversation.images) + lines
        messages = [
            {
                "role": message.role,
                "content": [{"type": "image"} for _ in message.images]
                + [{"type": "text", "text": message.text}],
            }
            for message in conversation.messages()
        ]
        text: str = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        return text

    def answer_ids(self, conversation: Conversation, max_new_tokens: int) -> list[int]:
        """The greedy answer's token ids, end token included."""
        inputs = self.inputs(conversation)
        inputs.pop("labels", None)  # PaliGemma's processor gives them always
        with torch.inference_mode():
            output = self.model.generate(**inputs, do_sample=False, max_new_tokens=max_new_tokens)
        ids: list[int] = output[0, inputs["input_ids"].shape[1] :].tolist()
        return ids
