"""Samples as tensors: tokens, positions, targets and who may look at whom."""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

import numpy as np
import torch
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor

from tools.demo.model import BOS, EOS, IMAGE, PATCHES, SPECIAL_TOKENS, VOCAB_SIZE
from tools.demo.pool import GRID
from tools.demo.questions import Pointers, Question
from tools.demo.samples import Sample
from tools.demo.scenes import Scene
from tools.demo.tower import Pictures

IGNORE = -100
LONGEST = 1900
_WORDS = re.compile(r" ?\S+|\s")
BOS_ID, EOS_ID, IMAGE_ID = (SPECIAL_TOKENS.index(token) for token in (BOS, EOS, IMAGE))


def train_tokenizer(texts: list[str]) -> Tokenizer:
    """A byte-level BPE vocabulary; <s> goes in front of whatever is encoded."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[
            AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS
        ],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, BOS_ID)]
    )
    return tokenizer


@dataclass
class Batch:
    """One training step's text; `picked` are the places where a target counts."""

    ids: Tensor
    positions: Tensor
    mask: Tensor
    picked: Tensor
    targets: Tensor
    pictures: list[int]
    pointing: Tensor
    mentioned: Tensor
    answered: Tensor
    weights: Tensor
    counted: Tensor
    count_weights: Tensor


class _Row:
    """One sequence under construction."""

    def __init__(self) -> None:
        self.ids: list[int] = [BOS_ID]
        self.positions: list[int] = [0]
        self.blocks: list[int] = [0]
        self.targets: list[int] = [IGNORE]
        self.pointers: list[tuple[int, int, Pointers, bool]] = []

    def add(self, ids: list[int], block: int, position: int, answer: bool = False) -> int:
        """Append tokens; the token before an answer has the answer's first token as target."""
        if answer:
            self.targets[-1] = ids[0]
        self.ids += ids
        self.positions += range(position, position + len(ids))
        self.blocks += [block] * len(ids)
        self.targets += [*ids[1:], IGNORE] if answer else [IGNORE] * len(ids)
        return position + len(ids)


def _mark(
    lines: np.ndarray, about: Pointers, scene: Scene, covers: np.ndarray, cells: np.ndarray
) -> None:
    """Mark the patches of the mentioned and answered shapes, and the latter's middles."""
    for line, chosen in enumerate((about.mentioned, about.answered)):
        wanted = [n for n, shape in enumerate(scene.shapes, start=1) if shape in chosen]
        lines[line, cells[np.isin(covers, wanted)]] = True
    for shape in scene.shapes:
        if shape in about.answered:
            lines[2, cells[int(shape.y * GRID) * GRID + int(shape.x * GRID)]] = True


class Encoder:
    """Turns samples into batches."""

    def __init__(self, tokenizer: Tokenizer, seed: str, gaps: float = 0.2, room: int = 224) -> None:
        self.tokenizer, self.rng = tokenizer, random.Random(f"encoder {seed}")
        self.gaps, self.room = gaps, room
        self.known: dict[str, list[int]] = {}

    def tokens(self, text: str) -> list[int]:
        """The tokens of a piece of text, with each picture at its full length."""
        return [token for word in _WORDS.findall(text) for token in self._word(word)]

    def _word(self, word: str) -> list[int]:
        ids = self.known.get(word)
        if ids is None:
            plain = self.tokenizer.encode(word, add_special_tokens=False).ids
            ids = [n for i in plain for n in ([IMAGE_ID] * PATCHES if i == IMAGE_ID else [i])]
            self.known[word] = ids
        return ids

    def _jump(self, wild: bool, position: int) -> int:
        """Pretend now and then that a long conversation lies in between."""
        if not wild or self.rng.random() < 0.5:
            return position
        return position + self.rng.randint(0, max(0, LONGEST - position - 200))

    def row(self, sample: Sample) -> _Row:
        """The sequence of one sample."""
        row, wild = _Row(), self.rng.random() < self.gaps
        position = row.add(self.tokens(sample.start), 0, 1)
        lead = sample.first
        for question in sample.opening:
            position = row.add(self.tokens(f"{lead}{question.text} ASSISTANT:"), 0, position)
            position = row.add([*self.tokens(f" {question.answer}"), EOS_ID], 0, position, True)
            lead = "USER: "
        if sample.opening:
            position = row.add(self.tokens("USER: <image>"), 0, position)
        full = len(row.ids) + self.room
        for number, turns in enumerate(sample.blocks, start=1):
            place, lead = self._jump(wild, position), sample.first
            for question in turns:
                asked = self.tokens(f"{lead}{question.text} ASSISTANT:")
                answer = [*self.tokens(f" {question.answer}"), EOS_ID]
                if len(row.ids) + len(asked) + len(answer) > full:
                    break
                place = row.add(asked, number, place)
                self._point(row, question, len(answer))
                place = row.add(answer, number, place, True)
                place, lead = self._jump(wild, place), "USER: "
        return row

    def _point(self, row: _Row, question: Question, size: int) -> None:
        """Note what the coming answer is about, for descriptions sentence by sentence."""
        place = len(row.ids) - 1
        if question.about:
            row.pointers.append((place, min(size, 7), question.about, True))
        for text, about in question.spans:
            length = len(self.tokens(text)) or 1
            row.pointers.append((place, length, about, False))
            place += length

    def _pointers(
        self, samples: list[Sample], rows: list[_Row], pictures: Pictures, length: int
    ) -> tuple[Tensor, ...]:
        """Places that should look at shapes (flat), the keys they should look at, and weights."""
        places: list[int] = []
        masks: list[np.ndarray] = []
        weights: list[tuple[float, float]] = []
        for i, (sample, row) in enumerate(zip(samples, rows, strict=True)):
            images = np.flatnonzero(np.array(row.ids) == IMAGE_ID).reshape(-1, PATCHES)
            for start, size, about, whole in row.pointers:
                lines = np.zeros((3, length), bool)
                for number, cells in zip(sample.pictures, images, strict=True):
                    _mark(lines, about, pictures.scenes[number], pictures.covers[number], cells)
                lines[:2, 0] = ~lines[:2].any(1)
                lines[2, 0] = True
                for place in range(start, start + size):
                    places.append(i * length + place)
                    masks.append(lines)
                    # Where the answer starts, nothing of it tells where to look.
                    weight = 4.0 if place == start else 1.0
                    weights.append((weight, weight * whole))
        if not places:
            empty, none = torch.zeros((0, length), dtype=torch.bool), torch.zeros(0)
            return torch.zeros(0, dtype=torch.long), empty, empty, none, empty, none
        wanted, weighted = torch.from_numpy(np.stack(masks)), torch.tensor(weights)
        at = torch.tensor(places)
        return at, wanted[:, 0], wanted[:, 1], weighted[:, 0], wanted[:, 2], weighted[:, 1]

    def batch(self, samples: list[Sample], shown: Pictures) -> Batch:
        """All samples, padded to the same length."""
        rows = [self.row(sample) for sample in samples]
        length = max(len(row.ids) for row in rows)
        length += -length % 32
        ids = np.zeros((len(rows), length), np.int64)
        positions, blocks = np.zeros_like(ids), np.full_like(ids, -1)
        targets = np.full_like(ids, IGNORE)
        for i, row in enumerate(rows):
            size = len(row.ids)
            ids[i, :size], positions[i, :size] = row.ids, row.positions
            blocks[i, :size], targets[i, :size] = row.blocks, row.targets
        block = torch.from_numpy(blocks)
        mask = (block[:, None, :] == 0) | (block[:, None, :] == block[:, :, None])
        mask = mask.tril().unsqueeze(1)
        flat = torch.from_numpy(targets).flatten()
        picked = (flat != IGNORE).nonzero().squeeze(1)
        pictures = [number for sample in samples for number in sample.pictures]
        return Batch(
            torch.from_numpy(ids),
            torch.from_numpy(positions),
            mask,
            picked,
            flat[picked],
            pictures,
            *self._pointers(samples, rows, shown, length),
        )
