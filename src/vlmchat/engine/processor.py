"""Conversation to prompt: render the checkpoint's chat template, tokenise, place the pictures.

Called from callers' threads by the engine. No torch: a picture's inputs are numpy arrays.
The ids equal those of the checkpoint's own transformers processor, called on the whole
conversation; but each picture is processed once, not once per turn.
"""

from __future__ import annotations

import re
from collections import OrderedDict
from threading import Lock
from typing import Any

from jinja2 import TemplateError

from vlmchat.conversation import Conversation, Image, Message
from vlmchat.engine.sequence import ImageSpan, Prompt, image_match_id
from vlmchat.engine.spec import ModelSpec
from vlmchat.engine.templates import IMAGE_MARKER, ConversationTemplate
from vlmchat.errors import InvalidRequest, UnsupportedModel
from vlmchat.request import PromptSize

# Processed pictures kept for the next turn's prompt; a LLaVA-1.5 picture is 1.4 MB in float32.
MAX_PROCESSED_IMAGES = 16
TEXT_KEYS = {"input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}


class Processor:
    """Renders and counts prompts for one model, with its transformers processor."""

    def __init__(
        self, hf_processor: Any, spec: ModelSpec, template: ConversationTemplate | None = None
    ) -> None:
        """template: used in place of the checkpoint's own.

        Raises UnsupportedModel when there is neither.
        """
        if template is None and not hf_processor.chat_template:
            raise UnsupportedModel("the checkpoint has no chat template; choose one by --conv-mode")
        self._hf = hf_processor
        self._spec = spec
        self._jinja = template.jinja if template else None
        self._marker = IMAGE_MARKER if template else spec.image_token
        self.stop = template.stop if template else ()  # strings that end an answer
        self._inputs: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._num_tokens: dict[str, int] = {}
        self._lock = Lock()
        specials = {*hf_processor.tokenizer.all_special_tokens, spec.image_token, self._marker}
        self._special = re.compile("|".join(re.escape(token) for token in sorted(specials)))

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's fast tokenizer."""
        return self._hf.tokenizer

    def render(self, conversation: Conversation) -> str:
        """The prompt as text, one image token per picture; asks for an answer if one is pending.

        Raises InvalidRequest when the checkpoint's template refuses it, say for a system prompt.
        """
        messages = [self._template_message(message) for message in conversation.messages()]
        if not messages:
            return ""
        try:
            text: str = self._hf.apply_chat_template(
                messages,
                chat_template=self._jinja,
                add_generation_prompt=conversation.pending is not None,
                tokenize=False,
            )
        except (TemplateError, TypeError) as error:
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}; "
                "--conv-mode takes another template"
            ) from error
        return text

    def count(self, conversation: Conversation) -> PromptSize:
        """Exact size of the prompt."""
        ids = self._ids(conversation)
        return PromptSize(len(ids), ids.count(self._spec.image_token_id))

    def encode(self, conversation: Conversation) -> Prompt:
        """The prompt as token ids with the pictures' inputs."""
        ids = self._ids(conversation)
        match_ids, spans, position = list(ids), [], 0
        for image in conversation.images:
            start = ids.index(self._spec.image_token_id, position)
            position = start + self._num_tokens[image.digest]
            match_ids[start:position] = [image_match_id(image.digest)] * (position - start)
            spans.append(ImageSpan(start, position, image.digest, self._image_inputs(image)))
        return Prompt(tuple(ids), tuple(match_ids), tuple(spans))

    def _ids(self, conversation: Conversation) -> list[int]:
        text = self.render(conversation)
        if not text:
            return []
        parts = text.split(self._marker)
        counts = [self._num_image_tokens(image) for image in conversation.images]
        if len(parts) != len(counts) + 1:
            raise UnsupportedModel(
                f"the model's chat template shows {len(parts) - 1} of {len(counts)} pictures; "
                "--conv-mode takes another template"
            )
        placeholders = [self._spec.image_token * count for count in counts]
        expanded = "".join(
            part + placeholder for part, placeholder in zip(parts, [*placeholders, ""], strict=True)
        )
        bos = self.tokenizer.bos_token
        add_special = not (bos and text.startswith(bos))
        ids: list[int] = self.tokenizer(expanded, add_special_tokens=add_special)["input_ids"]
        return ids

    def _template_message(self, message: Message) -> dict[str, Any]:
        content: list[dict[str, str]] = [{"type": "image"} for _ in message.images]
        content.append({"type": "text", "text": self._plain(message.text)})
        return {"role": message.role, "content": content}

    def _plain(self, text: str) -> str:
        """Text in which no special token can be read: `</s>` typed by a person is five letters.

        Lone surrogates, which no tokenizer takes, become question marks.
        """
        text = text.encode("utf-8", "replace").decode()
        return self._special.sub(lambda found: f"{found[0][0]} {found[0][1:]}", text)

    def _num_image_tokens(self, image: Image) -> int:
        if image.digest not in self._num_tokens:
            self._image_inputs(image)
        return self._num_tokens[image.digest]

    def _image_inputs(self, image: Image) -> dict[str, Any]:
        with self._lock:
            inputs = self._inputs.pop(image.digest, None)
            if inputs is None:
                inputs = self._process(image)
            self._inputs[image.digest] = inputs
            while len(self._inputs) > MAX_PROCESSED_IMAGES:
                self._inputs.popitem(last=False)
            return inputs

    def _process(self, image: Image) -> dict[str, Any]:
        output = self._hf(images=[image.pixels], text=[self._spec.image_token], return_tensors="np")
        ids = output["input_ids"][0].tolist()
        self._num_tokens[image.digest] = ids.count(self._spec.image_token_id)
        return {name: value for name, value in output.items() if name not in TEXT_KEYS}
