"""How long a simulated worker takes, and what its people ask: constants, each with its source.

Called by the simulation and its command. Knows no clock and no randomness but what is handed in.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from random import Random

PART_TOKENS = 512  # --max-num-batched-tokens: of a prompt, between two tokens of others


@dataclass(frozen=True, slots=True)
class Profile:
    """One worker. Times in seconds.

    prefill_base_s, prefill_token_s: a prompt's, whatever its length, and for each token not cached;
    pictures count by their tokens. step_base_s, step_row_s: of a step of decoding, and for each
    answer in it. running: answers at a time. slots: prompts whose keys and values are kept.
    waiting: requests that may wait, before others are refused.
    """

    name: str
    prefill_base_s: float
    prefill_token_s: float
    step_base_s: float
    step_row_s: float
    running: int
    slots: int
    waiting: int = 128

    def prefill_s(self, tokens: int) -> float:
        """Of a prompt of which so many tokens are to be computed."""
        return self.prefill_base_s + tokens * self.prefill_token_s

    def step_s(self, rows: int) -> float:
        """Of a token for each of so many answers."""
        return self.step_base_s + rows * self.step_row_s


# docs/performance.md, 2026-11-23, 294 M parameters in bf16 on 2 cores: the first token took 0.475 s
# for 680 tokens and 0.060 s for some 25, the next ones 1/23.0 s each. A further answer in a step is
# computed: 65,536 bytes of keys and values at 1000 positions over 23 GB/s, and 0.6 ms of products.
CPU = Profile("cpu", 0.044, 0.415 / 655, 0.040, 0.0035, running=5, slots=10)
# Assumed, nothing measured: LLaVA-1.5-7B in bf16 on a card of 4.8 TB/s, 989 TFLOP/s and 141 GB
# (NVIDIA's data sheet of the H200). 13.5 GB of weights and 0.52 MB for each of 1000 positions at
# 85 % of that bandwidth; 13.2 GFLOP a token at half of that arithmetic. 53 contexts of 4096 fit by
# docs/deploy.md's table.
GPU = Profile("gpu", 0.0033, 13.2e9 / 495e12, 0.0033, 0.00013, running=32, slots=53)
PROFILES = {profile.name: profile for profile in (CPU, GPU)}


@dataclass(frozen=True, slots=True)
class People:
    """What conversations are like. Lognormal: (median, sigma), cut to a range.

    turns: geometric with this mean, at most max_turns, so that 4096 positions hold them all.
    think_s: from an answer's end to the next question. popular: the share of conversations that are
    about one of `num_popular` pictures, of which the k-th is asked about in proportion to 1 / k.
    """

    turns: float = 5.0
    max_turns: int = 16
    think_s: tuple[float, float] = (20.0, 0.9)
    question: tuple[float, float] = (25.0, 0.6)
    answer: tuple[float, float] = (80.0, 0.7)
    system_tokens: int = 40
    picture_tokens: int = 576
    popular: float = 0.1
    num_popular: int = 100

    def draw_turns(self, random: Random) -> int:
        """1 to max_turns."""
        turns = 1
        while turns < self.max_turns and random.random() >= 1 / self.turns:
            turns += 1
        return turns

    def draw_think_s(self, random: Random) -> float:
        """1 to 300 seconds."""
        return min(300.0, max(1.0, _lognormal(self.think_s, random)))

    def draw_question(self, random: Random) -> int:
        """5 to 200 tokens."""
        return round(min(200.0, max(5.0, _lognormal(self.question, random))))

    def draw_answer(self, random: Random) -> int:
        """1 to 300 tokens."""
        return round(min(300.0, max(1.0, _lognormal(self.answer, random))))

    def draw_picture(self, random: Random) -> int | None:
        """Which of the popular ones; None: one of its own."""
        if random.random() >= self.popular:
            return None
        # The k-th of n in proportion to 1 / k: as a continuous draw, cut down.
        return int((self.num_popular + 1) ** random.random()) - 1


def _lognormal(median_sigma: tuple[float, float], random: Random) -> float:
    median, sigma = median_sigma
    return median * math.pow(math.e, sigma * random.gauss(0.0, 1.0))


def engine_s(profile: Profile, people: People, draws: int = 20_000) -> float:
    """Seconds that a worker needs for a turn, when it runs all it can and nothing is cached.

    The mean over drawn conversations; its inverse is the load 1.0.
    """
    random, turns, seconds = Random(0), 0, 0.0
    step_s = profile.step_s(profile.running) / profile.running
    while turns < draws:
        tokens = people.system_tokens + people.picture_tokens
        for _ in range(people.draw_turns(random)):
            tokens += people.draw_question(random)
            answer = people.draw_answer(random)
            seconds += profile.prefill_s(tokens) + (answer - 1) * step_s
            tokens += answer
            turns += 1
    return seconds / turns
