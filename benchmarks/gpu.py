"""LLaVA-1.5-7B's shape on a GPU, as `vlmchat bench` measures it, against threads of `generate`.

`python -m benchmarks gpu [--json FILE]`: random weights made on the card; a table, the aims, and
everything as JSON in the file. Takes a few minutes.
"""

from __future__ import annotations

import argparse
import gc
import json
import threading
from collections.abc import Callable
from contextlib import closing
from dataclasses import asdict
from pathlib import Path
from typing import Any

from vlmchat.bench import Bounds, Figure, Plan, measure, noise
from vlmchat.config import EngineConfig, ModelConfig
from vlmchat.conversation import Conversation

CLIENTS = 32
# LLaVA's worker lets so many requests run at the same time (limit_model_concurrency).
CONCURRENCY = 5
NEW_TOKENS = 128


def ours(name: str, device: str, quantization: str | None, plan: Plan) -> dict[str, Any]:
    """Figures of the engine in one precision, with the machine's and the model's numbers."""
    from vlmchat.engine.engine import Engine
    from vlmchat.engine.loader import load_model
    from vlmchat.engine.machine import measure_machine, work_of

    config = ModelConfig(f"random:{name}", device=device, quantization=quantization)
    loaded = load_model(config, lambda stage: None)
    machine, work = measure_machine(loaded.model.device, loaded.model.dtype), work_of(loaded.model)
    bounds = Bounds(machine.copy_bytes_s, machine.flops_s, **asdict(work))
    limits = EngineConfig(max_num_seqs=max(plan.widths))
    with closing(Engine.over(loaded, config, limits)) as engine:
        figures = list(measure(engine, plan, bounds, print))
        details = dict(engine.status().details)
    for figure in figures:
        print(_line(figure), flush=True)
    told = {"details": details, "machine": asdict(machine), "work": asdict(work)}
    return {**told, "figures": [asdict(figure) for figure in figures]}


def _line(figure: Figure) -> str:
    """One row for people."""
    share = f"{figure.decode_share:.0%} of what a copy's bandwidth allows"
    return (
        f"{figure.width} at once, turn {figure.turn}: first token {figure.first_token_s * 1e3:.1f}"
        f" ms, decode {figure.decode_tokens_s:.1f} tokens/s ({share}), all "
        f"{figure.total_tokens_s:.0f} tokens/s"
    )


def llava_way(name: str, device: str, clients: int) -> dict[str, float]:
    """Tokens per second of one `generate`, and of threads of it over one model."""
    import torch
    from transformers import LlavaForConditionalGeneration

    from benchmarks.sides import Generate, Timed, at_once
    from vlmchat.engine.random_model import random_config, random_processor
    from vlmchat.engine.shapes import SHAPES

    shape = SHAPES[name]
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(device):
        model: Any = LlavaForConditionalGeneration(random_config(shape)).eval()
    torch.set_default_dtype(torch.float32)
    gate = threading.Semaphore(CONCURRENCY)

    class Gated(Generate):
        """At most so many at the same time."""

        def ask(self, conversation: Conversation, new_tokens: int) -> Timed:
            with gate:
                return super().ask(conversation, new_tokens)

    side = Gated(model, random_processor(shape))
    numbers = " ".join(str(number) for number in range(60))
    asked = [Conversation().ask(f"{n} {numbers}", (noise(n),)) for n in range(clients)]
    side.ask(asked[0], 8)
    one = side.ask(asked[0], NEW_TOKENS)
    answers, seconds = at_once(side, asked, NEW_TOKENS)
    tokens = sum(answer.tokens for answer in answers)
    found = {"first_token_s": one.first_s, "decode_tokens_s": one.decode_rate}
    return {**found, "clients": clients, "total_tokens_s": tokens / seconds}


def _aims(found: dict[str, Any], widths: tuple[int, ...]) -> dict[str, tuple[float, str]]:
    """What the figures come to, beside what is aimed at."""

    def row(side: str, width: int, turn: int) -> dict[str, Any]:
        rows = found[side]["figures"]
        return next(each for each in rows if each["width"] == width and each["turn"] == turn)

    plain, work, machine = row("bf16", 1, 1), found["bf16"]["work"], found["bf16"]["machine"]
    position = plain["prompt_tokens"] + plain["new_tokens"] / 2
    per_token = work["weight_bytes"] + position * work["kv_bytes"]
    rate = per_token * plain["decode_tokens_s"]
    most = row("bf16", max(widths), 1)["total_tokens_s"]
    clients = row("bf16", min(CLIENTS, max(widths)), 1)["total_tokens_s"]
    four = row("4bit", 1, 1)["decode_tokens_s"]
    return {
        "decode, share of copy bandwidth": (rate / machine["copy_bytes_s"], ">= 0.85"),
        "4-bit over bf16": (four / plain["decode_tokens_s"], ">= 1.8"),
        "first token, turn 1, ms": (plain["first_token_s"] * 1e3, "<= 40"),
        "first token, turn 2, ms": (row("bf16", 1, 2)["first_token_s"] * 1e3, "<= 10"),
        f"{max(widths)} streams over one": (most / plain["total_tokens_s"], ">= 20 at 64"),
        f"over threads of generate, {CLIENTS} clients": (
            clients / found["generate"]["total_tokens_s"],
            ">= 8",
        ),
    }


def main(arguments: list[str] | None = None) -> None:
    """Measure all, print as it comes, then the aims."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu", description=__doc__)
    parser.add_argument("--json", type=Path, default=Path("gpu.json"))
    parser.add_argument("--random", default="llava-1.5-7b", help="a shape")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--widths", default="1,8,32,64")
    parser.add_argument("--runs", type=int, default=3)
    asked = parser.parse_args(arguments)
    widths = tuple(int(each) for each in asked.widths.split(","))
    plan = Plan((60,), (NEW_TOKENS,), widths, asked.runs)
    single = Plan((60,), (NEW_TOKENS,), (1,), asked.runs)
    found: dict[str, Any] = {}
    parts: dict[str, Callable[[], Any]] = {
        "bf16": lambda: ours(asked.random, asked.device, None, plan),
        "4bit": lambda: ours(asked.random, asked.device, "4bit", single),
        "generate": lambda: llava_way(asked.random, asked.device, min(CLIENTS, max(widths))),
    }
    for name, part in parts.items():
        print(f"\n{name}", flush=True)
        found[name] = part()
        asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
        gc.collect()
    found["aims"] = _aims(found, widths)
    asked.json.write_text(json.dumps(found, indent=1), encoding="utf-8")
    print("\n| LLaVA-1.5-7B's shape, bf16 | measured | aim |\n|---|---|---|")
    for name, (value, aim) in found["aims"].items():
        print(f"| {name} | {value:.3g} | {aim} |")


if __name__ == "__main__":
    main()
