"""Train the demo model from nothing: python -m tools.demo.train --seed 0 --out DIR

Three stages: the tower learns what covers each patch, then the whole model learns to describe
pictures, then to answer questions and hold conversations.  Every stage ends after its number of
steps, or with --minutes after its share of that time.
"""

from __future__ import annotations

import argparse
import math
import random
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from tools.demo import evaluate, nf4, samples
from tools.demo.attention import additive, in_training
from tools.demo.batching import IMAGE_ID, Batch, Encoder, train_tokenizer
from tools.demo.model import PatchHeads, build_model, build_processor, normalised, patch_loss
from tools.demo.pointing import pointing_loss
from tools.demo.pool import start_pool
from tools.demo.scenes import Scene
from tools.demo.tower import Album, Pictures, train_tower

CHECKED = 20
POINTING = 0.4
# Pictures a step that only the tower sees: it is cheap, and names small shapes the better for it.
TOWER_ONLY = 24
MakeSamples = Callable[[list[Scene], random.Random], list[samples.Sample]]
DESCRIBE_FIRST = {"list": 1, "color": 2, "shape": 2, "place": 2, "exist": 2, "count": 1}


@dataclass(frozen=True)
class Stage:
    """A part of training; `share` is its part of the time, `peak` the highest learning rate."""

    name: str
    steps: int
    share: float
    peak: float
    floor: float
    patch_weight: float
    growing: bool = False
    rehearse: bool = False


TOWER = Stage("tower", 1800, 0.14, 1.6e-3, 0.6e-3, 1.0)
STAGES = (
    Stage("describe", 900, 0.09, 1.5e-3, 1.2e-3, 0.3, growing=True),
    Stage("questions", 5500, 0.72, 1e-3, 0.0, 0.6, rehearse=True),
)


def describing(scenes: list[Scene], rng: random.Random) -> list[samples.Sample]:
    """A description of every picture, and a few questions beside it."""
    made = []
    for number, scene in enumerate(scenes):
        sample = samples.picture_sample(number, scene, rng, 4, DESCRIBE_FIRST, 0.0)
        sample.blocks.insert(0, [samples.one(scene, rng, {"describe": 1})])
        made.append(sample)
    return made


def asking(scenes: list[Scene], rng: random.Random) -> list[samples.Sample]:
    """Questions and conversations about one picture, two pictures or none."""
    weights = samples.WEIGHTS
    choose = rng.random()
    if choose < 0.76:
        return [
            samples.picture_sample(i, scene, rng, 12, weights, 0.2)
            for i, scene in enumerate(scenes)
        ]
    if choose < 0.965:
        return [
            samples.pair_sample((i, i + 1), (scenes[i], scenes[i + 1]), rng, 8, weights)
            for i in range(0, len(scenes), 2)
        ]
    return [samples.blind_sample(scene, rng, 4, weights) for scene in scenes]


MAKE: dict[str, MakeSamples] = {"describe": describing, "questions": asking}


class Trainer:
    """The model with everything that exists only while it learns."""

    def __init__(self, out: Path, pool: Path, seed: int, size: int, resume: Path | None) -> None:
        torch.manual_seed(seed)
        self.out, self.seed, self.size = out, seed, size
        self.model: LlavaForConditionalGeneration = build_model()
        self.heads = PatchHeads()
        self.pool = pool
        self.rng = random.Random(f"train {seed}")
        if resume:
            self.resume(resume)
            tokenizer = Tokenizer.from_file(str(resume / "tokenizer.json"))
        else:
            tokenizer = train_tokenizer(samples.corpus(random.Random(f"corpus {seed}"), 4000))
        self.processor: LlavaProcessor = build_processor(tokenizer)
        self.encoder = Encoder(tokenizer, str(seed))
        self.tower: Any = torch.compile(self.model.model.vision_tower)
        self.decoder: Any = torch.compile(self.model.model.language_model, dynamic=True)

    def features(self, pictures: Pictures, numbers: list[int]) -> tuple[Tensor, Tensor]:
        """What the decoder gets for the pictures, and the loss of the patch read-outs.

        The pictures from `size` on are for the read-outs alone.
        """
        shown = [*numbers, *range(self.size, len(pictures.scenes))]
        pixels = normalised(pictures.pixels[shown])
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.tower(pixels).last_hidden_state[:, 1:]
        seen = seen.float()
        loss = patch_loss(self.heads(seen), pictures.targets[shown])
        return self.model.model.multi_modal_projector(seen[: len(numbers)]), loss

    def loss(self, pictures: Pictures, batch: Batch) -> tuple[Tensor, Tensor, Tensor]:
        """Language loss, patch loss and pointing loss of one step."""
        embeds = self.model.get_input_embeddings()(batch.ids)
        patches = torch.zeros(())
        if batch.pictures:
            seen, patches = self.features(pictures, batch.pictures)
            place = (batch.ids == IMAGE_ID).unsqueeze(-1)
            embeds = embeds.masked_scatter(place, seen.to(embeds.dtype))
        with torch.autocast("cpu", torch.bfloat16):
            mask = additive(batch.mask)
            output = self.decoder(
                inputs_embeds=embeds,
                attention_mask=mask,
                position_ids=batch.positions,
                use_cache=False,
                output_hidden_states=True,
            )
            hidden = output.last_hidden_state
            logits = self.model.lm_head(hidden.flatten(0, 1)[batch.picked])
            decoder = self.model.model.language_model
            points = pointing_loss(decoder, output.hidden_states, batch, mask)
        return nn.functional.cross_entropy(logits.float(), batch.targets), patches, points

    def run(
        self, stage: Stage, start: int, minutes: float | None, begun: float, check: float
    ) -> None:
        """One stage, from step `start`; `begun` is the share of its time already used."""
        weights = [*self.model.parameters(), *self.heads.parameters()]
        optimizer = torch.optim.AdamW(
            weights, lr=1e-4, betas=(0.9, 0.98), weight_decay=0.03, fused=True
        )
        album = Album(self.pool, f"{self.seed} {stage.name} {start}")
        clock = checked = time.time()
        step, recent, tokens = start, 0.0, 0
        while True:
            passed = time.time() - clock
            done = step / stage.steps
            if minutes is not None:
                done = begun + (1 - begun) * passed / (60 * minutes)
            if done >= 1:
                break
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(stage, done, step - start)
            most = min(6, 2 + int(done * 8)) if stage.growing else 6
            pictures = album.take(self.size + TOWER_ONLY, most)
            asked = MAKE[stage.name](pictures.scenes[: self.size], self.rng)
            batch = self.encoder.batch(asked, pictures)
            rehearse = stage.rehearse and done > 0.6 and self.rng.random() < 0.5
            decoder, tower = self.model.model.language_model, self.model.model.vision_tower
            with (
                in_training(decoder, tower),
                nf4.rehearsal(decoder) if rehearse else nullcontext(),
            ):
                language, patches, points = self.loss(pictures, batch)
                optimizer.zero_grad()
                total = language + stage.patch_weight * patches + POINTING * points
                total.backward()  # type: ignore[no-untyped-call]
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            step += 1
            tokens += batch.ids.numel()
            now = language.item()
            recent = 0.97 * recent + 0.03 * now if recent else now
            if step % 25 == 0:
                rate = tokens / (time.time() - clock)
                parts = f"patch {patches.item():.3f} point {points.item():.3f}"
                note = f"loss {recent:.4f} {parts} {rate:.0f} tokens/s done {done:.3f}"
                print(f"{stage.name} {step} {time.time() - clock:.0f}s {note}", flush=True)
            if time.time() - checked > 60 * check:
                self.check(f"{stage.name} {step}", done)
                checked = time.time()
        self.check(f"{stage.name} {step} end", 1.0)

    def check(self, name: str, done: float) -> None:
        """Save, and grade a few held-out questions."""
        self.save(self.out)
        torch.save({"heads": self.heads.state_dict(), "done": done}, self.out / "training.pt")
        self.model.eval()
        items = evaluate.make_items((*evaluate.KINDS, *evaluate.EXTRA_KINDS), CHECKED, 10_001)
        start = time.time()
        scores = evaluate.score(items, evaluate.answers(self.model, self.processor, items, 100, 80))
        self.model.train()
        told = ", ".join(f"{kind} {good / asked:.0%}" for kind, (good, asked) in scores.items())
        print(f"CHECK {name} ({time.time() - start:.0f}s): {told}", flush=True)

    def save(self, folder: Path) -> None:
        """Model and processor as users load them: float32 weights, kept in 16 bits to be small."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.save_pretrained(folder)
        weights = {n: w.half() for n, w in load_file(folder / "model.safetensors").items()}
        save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
        # A processor in use notes how it last padded; what is saved is a fresh one.
        tokenizer = Tokenizer.from_str(self.encoder.tokenizer.to_str())
        tokenizer.no_padding()
        tokenizer.no_truncation()
        build_processor(tokenizer).save_pretrained(folder)
        (folder / "model.safetensors").chmod(0o644)

    def resume(self, folder: Path) -> None:
        """Weights of a checkpoint."""
        state = _renamed(load_file(folder / "model.safetensors"))
        missing, unknown = self.model.load_state_dict(state, strict=False)
        assert not unknown, unknown
        assert missing in ([], ["lm_head.weight"]), missing
        self.heads.load_state_dict(torch.load(folder / "training.pt")["heads"])


def _renamed(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """Saved names as the modules have them."""
    renamed = {}
    for name, value in state.items():
        for old, new in (
            ("language_model.model.", "model.language_model."),
            ("language_model.lm_head.", "lm_head."),
            ("vision_tower.vision_model.", "model.vision_tower."),
            ("vision_tower.", "model.vision_tower."),
            ("multi_modal_projector.", "model.multi_modal_projector."),
        ):
            if name.startswith(old):
                name = new + name.removeprefix(old)
                break
        renamed[name] = value
    return renamed


def learning_rate(stage: Stage, done: float, since_start: int) -> float:
    """Warm-up, then half a cosine from the stage's peak to its floor."""
    warm = min(1.0, (since_start + 1) / 100)
    return warm * (stage.floor + (stage.peak - stage.floor) * 0.5 * (1 + math.cos(math.pi * done)))


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description="Train the demo model.")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--pool", type=Path, help="pictures drawn ahead (default: OUT/pool)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--minutes", type=float, help="fit the stages into that time")
    parser.add_argument("--shards", type=int, default=30, help="of 4,000 pictures each")
    parser.add_argument("--batch", type=int, default=32, help="pictures per step")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--check", type=float, default=6.0, help="minutes between checks")
    parser.add_argument("--resume", type=Path, help="folder of a checkpoint")
    parser.add_argument("--tower", type=Path, help="weights of a tower trained before")
    parser.add_argument("--stage", choices=("tower", "describe", "questions"), default="tower")
    parser.add_argument("--begun", type=float, default=0.0, help="share of that stage done before")
    return parser.parse_args()


def main() -> None:
    """All stages, or from a later one when resuming."""
    args = parse()
    torch.set_num_threads(args.threads)
    pool = args.pool or args.out / "pool"
    jobs = start_pool(pool, args.seed, args.shards, 2)
    trainer = Trainer(args.out, pool, args.seed, args.batch, args.resume)
    if args.tower:
        state = torch.load(args.tower)
        trainer.model.load_state_dict(state["model"])
        trainer.heads.load_state_dict(state["heads"])
    if args.stage == "tower":
        minutes = args.minutes and args.minutes * TOWER.share
        tower, album = trainer.model.model.vision_tower, Album(pool, f"{args.seed} tower")
        train_tower(tower, trainer.heads, album, TOWER.steps, minutes)
    names = [stage.name for stage in STAGES]
    first = names.index(args.stage) if args.stage in names else 0
    left = STAGES[first:]
    for number, stage in enumerate(left):
        total = sum(other.share for other in left) if args.stage != "tower" else 1.0
        minutes = args.minutes and args.minutes * stage.share / total
        begun = args.begun if number == 0 else 0.0
        trainer.run(stage, round(begun * stage.steps), minutes, begun, args.check)
    for job in jobs:
        job.join()


if __name__ == "__main__":
    main()
