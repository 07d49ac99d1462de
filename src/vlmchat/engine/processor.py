"""Conversation to prompt: render the checkpoint's chat template, tokenise, place the pictures.

Called from callers' threads by the engine. No torch: a picture's inputs are numpy arrays.
The ids equal those of the checkpoint's own transformers processor, called on the whole
conversation; but each picture is processed once, not once per turn.
"""

from __future__ import annotations

import hashlib
import re
from collections import OrderedDict
from dataclasses import dataclass
from threading import Lock
from typing import Any

import numpy as np
from jinja2 import TemplateError

from vlmchat.conversation import Conversation, Image, Message
from vlmchat.engine.sequence import ImageSpan, Prompt, image_match_id
from vlmchat.engine.spec import ModelSpec
from vlmchat.engine.templates import IMAGE_MARKER, ConversationTemplate
from vlmchat.errors import InvalidRequest, UnsupportedModel
from vlmchat.request import PromptSize

# Processed pictures kept for the next turn's prompt; a LLaVA-1.5 picture is 1.4 MB in float32.
MAX_PROCESSED_BYTES = 256 * 2**20
# What a processor returns besides a picture's own inputs.
OFFSETS = "text_replacement_offsets"
TEXT_KEYS = {OFFSETS, "input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids"}
TEXT_KEYS |= {"labels"}  # PaliGemma's, for training


@dataclass(frozen=True, slots=True)
class Placeholder:
    """What stands for one picture in a prompt.

    text: in place of the image token; between placeholders it may hold words and row marks.
    num_tokens: how many of its tokens are the image token.
    """

    text: str
    num_tokens: int


@dataclass(frozen=True, slots=True)
class View:
    """A picture and the way it is processed: `crowded` where others stand beside it."""

    image: Image
    crowded: bool

    @property
    def digest(self) -> str:
        """Two views match only if a model sees the same."""
        if not self.crowded:
            return self.image.digest
        return hashlib.sha256(f"crowded {self.image.digest}".encode()).hexdigest()


class Processor:
    """Renders and counts prompts for one model, with its transformers processor."""

    def __init__(
        self, hf_processor: Any, spec: ModelSpec, template: ConversationTemplate | None = None
    ) -> None:
        """hf_processor: a transformers processor, or an object with what is used of one here:
        `.tokenizer`, `.chat_template`, `.apply_chat_template`, and a call with `images=[one]`,
        `text=[image token]` and keywords that it may ignore, which gives `input_ids` and the
        picture's inputs. `.tokenizer` is given the whole prompt with every picture's placeholders
        in it, and may split it as it likes.
        template: used in place of the checkpoint's own.

        Raises UnsupportedModel when there is neither.
        """
        given = template.jinja if template else spec.chat_template
        if not (given or hf_processor.chat_template):
            raise UnsupportedModel("the checkpoint has no chat template; choose one by --conv-mode")
        self._hf = hf_processor
        self._spec = spec
        self._jinja = given  # None: the checkpoint's own
        self._marker = IMAGE_MARKER if template else spec.image_token
        self.stop = template.stop if template else ()  # strings that end an answer
        self._inputs: OrderedDict[str, dict[str, Any]] = OrderedDict()
        self._placeholders: dict[str, Placeholder] = {}  # by digest; some kB each, never dropped
        self._lock = Lock()
        self._special = self._special_tokens()

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's fast tokenizer."""
        return self._hf.tokenizer

    def render(self, conversation: Conversation) -> str:
        """The prompt as text, one image token per picture; asks for an answer if one is pending.

        Raises InvalidRequest where the chat template refuses the conversation, and
        UnsupportedModel where it does not place its pictures.
        """
        if conversation.rendered:
            return self._as_written(conversation)
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
        except (TemplateError, TypeError) as error:  # by raise_exception(…), or by a mistake in it
            raise InvalidRequest(
                f"the model's chat template refuses this conversation: {error}; "
                "--conv-mode takes another template"
            ) from error
        if (placed := text.count(self._marker)) != len(conversation.images):
            raise UnsupportedModel(
                f"the model's chat template shows {placed} of {len(conversation.images)} pictures; "
                "--conv-mode takes another template"
            )
        return text + self._plain(conversation.begun)

    def _as_written(self, conversation: Conversation) -> str:
        """A prompt that came rendered: special tokens in it are meant, `<image>` is a picture."""
        text = conversation.rendered.encode("utf-8", "replace").decode()
        text = text.replace(IMAGE_MARKER, self._marker)
        if (placed := text.count(self._marker)) != len(conversation.images):
            raise InvalidRequest(
                f"the prompt has {placed} places for pictures ({IMAGE_MARKER}), "
                f"{len(conversation.images)} came with it"
            )
        return text

    def count(self, conversation: Conversation) -> PromptSize:
        """Exact size of the prompt."""
        ids, spans = self._ids_and_spans(conversation)
        return PromptSize(len(ids), sum(stop - start for start, stop in spans))

    def encode(self, conversation: Conversation) -> Prompt:
        """The prompt as token ids with the pictures' inputs."""
        ids, spans = self._ids_and_spans(conversation)
        match_ids, images = list(ids), []
        for view, (start, stop) in zip(self._views(conversation), spans, strict=True):
            match_ids[start:stop] = [image_match_id(view.digest)] * (stop - start)
            images.append(ImageSpan(start, stop, view.digest, self._image_inputs(view)))
        return Prompt(tuple(ids), tuple(match_ids), tuple(images), self._spec.reusable_prefix)

    def _views(self, conversation: Conversation) -> list[View]:
        crowded = self._spec.crowds and len(conversation.images) > 1
        return [View(image, crowded) for image in conversation.images]

    def _ids_and_spans(self, conversation: Conversation) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids, and for each picture the range from its first to its last image token."""
        text = self.render(conversation)
        if not text:
            return [], []
        placeholders = [self._placeholder(view) for view in self._views(conversation)]
        first, *parts = text.split(self._marker)
        fillings = [placeholder.text for placeholder in placeholders]
        expanded = first + "".join(f + part for f, part in zip(fillings, parts, strict=True))
        bos = self.tokenizer.bos_token
        add_special = not (bos and text.startswith(bos))
        ids: list[int] = self.tokenizer(expanded, add_special_tokens=add_special)["input_ids"]
        positions = [i for i, token in enumerate(ids) if token == self._spec.image_token_id]
        spans, used = [], 0
        for placeholder in placeholders:
            last = used + placeholder.num_tokens - 1
            spans.append((positions[used], positions[last] + 1))
            used = last + 1
        return ids, spans

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

    def _special_tokens(self) -> re.Pattern[str]:
        tokenizer = self.tokenizer
        added = getattr(tokenizer, "added_tokens_decoder", {}).values()
        tokens = {*tokenizer.all_special_tokens, *(str(t) for t in added if t.special)}
        tokens |= {self._spec.image_token, self._marker}
        return re.compile("|".join(re.escape(token) for token in sorted(tokens)))

    def _placeholder(self, view: View) -> Placeholder:
        if view.digest not in self._placeholders:
            self._image_inputs(view)
        return self._placeholders[view.digest]

    def _image_inputs(self, view: View) -> dict[str, Any]:
        with self._lock:
            inputs = self._inputs.pop(view.digest, None)
            if inputs is None:
                inputs = self._process(view)
            self._inputs[view.digest] = inputs
            while len(self._inputs) > 1 and self._num_bytes() > MAX_PROCESSED_BYTES:
                self._inputs.popitem(last=False)
            return inputs

    def _num_bytes(self) -> int:
        return sum(array.nbytes for inputs in self._inputs.values() for array in inputs.values())

    def _process(self, view: View) -> dict[str, Any]:
        """Process one picture; a crowded one as the first of two, of which the first is kept."""
        token, pixels = self._spec.image_token, view.image.pixels
        images: list[Any] = [[pixels, pixels]] if view.crowded else [pixels]
        count = 2 if view.crowded else 1
        output = self._hf(images=images, text=[token * count], return_text_replacement_offsets=True)
        num_tokens = list(output["input_ids"][0]).count(self._spec.image_token_id) // count
        replaced = output[OFFSETS][0][0]["replacement"] if OFFSETS in output else token * num_tokens
        self._placeholders[view.digest] = Placeholder(replaced, num_tokens)
        inputs = {name: np.asarray(v) for name, v in output.items() if name not in TEXT_KEYS}
        return {name: v[:1] for name, v in inputs.items()} if view.crowded else inputs
