"""Hold a checkpoint to LLaVA's own code: the same ids, first-step logits, greedy tokens and text.

    python tools/against_llava.py reference CHECKPOINT PICTURE… [--base B] [--conv C] > ref.json
    python tools/against_llava.py compare ref.json

The first runs where LLaVA and the transformers that it pins are installed, in float32 on the CPU;
there the checkpoint's folder needs a name by which LLaVA knows it. The second runs here. Two turns,
each about half of the pictures. docs/models.md has what was found.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

QUESTIONS = ("What is it?", "é☂ and\n  why is that")
NUM_TOKENS = 40
ATOL = 1e-4


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=["reference", "compare"])
    parser.add_argument("path")
    parser.add_argument("pictures", nargs="*")
    parser.add_argument("--base")
    parser.add_argument("--conv", default="llava_v1")
    asked = parser.parse_args()
    if asked.what == "reference":
        with redirect_stdout(sys.stderr):  # LLaVA prints as it loads
            found = reference(asked)
        json.dump(found, sys.stdout)
    else:
        sys.exit(compare(json.loads(Path(asked.path).read_text("utf-8"))))


def _shares(pictures: list[str]) -> list[list[str]]:
    """The pictures of each turn."""
    first = (len(pictures) + 1) // 2
    return [pictures[:first], pictures[first:]]


def reference(asked: argparse.Namespace) -> dict[str, Any]:
    """What LLaVA makes of both turns."""
    import torch
    from PIL import Image

    builder, mm_utils = import_module("llava.model.builder"), import_module("llava.mm_utils")
    conversation = import_module("llava.conversation").conv_templates[asked.conv].copy()
    float32 = ModuleType("torch")  # LLaVA asks for float16 wherever it loads
    float32.__dict__.update(torch.__dict__, float16=torch.float32)
    builder.torch = float32  # type: ignore[attr-defined]
    name = mm_utils.get_model_name_from_path(asked.path)
    tokenizer, model, processor, _ = builder.load_pretrained_model(
        asked.path, asked.base, name, device="cpu"
    )
    model.float().eval().get_vision_tower().float()
    images: list[Any] = []
    turns = []
    for question, share in zip(QUESTIONS, _shares(asked.pictures), strict=True):
        images += [Image.open(path).convert("RGB") for path in share]
        mark = "<im_start><image><im_end>" if model.config.mm_use_im_start_end else "<image>"
        conversation.append_message(conversation.roles[0], f"{mark}\n" * len(share) + question)
        conversation.append_message(conversation.roles[1], None)
        ids = mm_utils.tokenizer_image_token(conversation.get_prompt(), tokenizer)
        pixels = mm_utils.process_images(images, processor, model.config)
        with torch.inference_mode():
            output = model.generate(
                torch.tensor([ids]),
                images=pixels,
                image_sizes=[image.size for image in images],
                do_sample=False,
                num_beams=1,
                max_new_tokens=NUM_TOKENS,
                return_dict_in_generate=True,
                output_scores=True,
            )
        tokens = output.sequences[0].tolist()[-len(output.scores) :]
        answer = tokenizer.decode(tokens, skip_special_tokens=True).strip()
        conversation.messages[-1][-1] = answer
        logits = output.scores[0][0].tolist()
        turns.append({"ids": ids, "logits": logits, "tokens": tokens, "answer": answer})
    return {**vars(asked), "turns": turns}


def compare(expected: dict[str, Any]) -> int:
    """Print a line for each turn; 0 if all is the same."""
    import torch

    from vlmchat.config import ModelConfig
    from vlmchat.conversation import Conversation
    from vlmchat.engine.loader import load_model
    from vlmchat.engine.processor import Processor
    from vlmchat.engine.runner import EagerRunner, Row
    from vlmchat.engine.vision import VisionCache

    config = ModelConfig(
        expected["path"],
        base=expected["base"],
        device="cpu",
        dtype="float32",
        conv_mode=expected["conv"],
    )
    loaded = load_model(config, lambda stage: None)
    processor = Processor(loaded.processor, loaded.spec, loaded.template)
    runner = EagerRunner(loaded.model, loaded.spec, VisionCache(loaded.model), 1)
    conversation, differing = Conversation(), 0
    shares = _shares(expected["pictures"])
    for question, share, turn in zip(QUESTIONS, shares, expected["turns"], strict=True):
        conversation = conversation.ask(question, tuple(_picture(path) for path in share))
        prompt = processor.encode(conversation)
        ids = list(prompt.ids)
        for span in reversed(prompt.images):
            ids[span.start : span.stop] = [-200]
        logits = runner.prefill(0, prompt, 0, len(prompt.ids))
        assert logits is not None
        distance = float((logits - torch.tensor(turn["logits"])).abs().max())
        tokens = [int(logits.argmax())]
        while len(tokens) < len(turn["tokens"]):
            row = Row(0, len(prompt.ids) + len(tokens) - 1, (tokens[-1],))
            tokens.append(int(runner.decode([row])[0].argmax()))
        text = processor.tokenizer.backend_tokenizer.decode(tokens, skip_special_tokens=True)
        same = {
            "ids": ids == turn["ids"],
            "logits": distance < ATOL,
            "tokens": tokens == turn["tokens"],
            "text": text.strip() == turn["answer"],
        }
        print(f"{expected['path']}: logits differ by {distance:.1e}; the same: {same}")
        differing += not all(same.values())
        conversation = conversation.answered(turn["answer"])
    return differing


def _picture(path: str) -> Any:
    import PIL.Image

    from vlmchat.conversation import Image

    pixels = PIL.Image.open(path).convert("RGB")
    digest = hashlib.sha256(pixels.tobytes() + repr(pixels.size).encode()).hexdigest()
    return Image(pixels, b"", path, digest, digest)


if __name__ == "__main__":
    main()
