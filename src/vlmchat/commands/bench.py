"""`vlmchat bench`: how fast a model answers on this machine, and how near that is to the bound.

Options -> plan -> model and machine -> figures as they come -> a table, or one JSON object.
Everything heavy is imported inside functions.
"""

from __future__ import annotations

import datetime
from contextlib import closing
from dataclasses import asdict, dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from vlmchat import __version__
from vlmchat.commands.exit import reporting
from vlmchat.commands.options import EngineOptions, FileOptions, ModelOptions
from vlmchat.commands.settings import given
from vlmchat.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Sequence

    from rich.console import Console
    from rich.table import Table

    from vlmchat.bench import Bounds, Figure, Plan
    from vlmchat.config import EngineConfig, ModelConfig
    from vlmchat.engine.machine import Machine, Work
    from vlmchat.request import Status


@dataclass(frozen=True, slots=True)
class BenchOptions:
    """What is measured."""

    panel: ClassVar = "Bench"
    random: Annotated[
        str | None,
        typer.Option(
            "--random",
            metavar="SHAPE",
            help="Random weights in the shape of small (294 M), llava-1.5-7b or llava-1.5-13b, "
            "made on the device, in place of a model.",
        ),
    ] = None
    widths: Annotated[
        str, typer.Option("--widths", metavar="LIST", help="Streams at once, each measured.")
    ] = "1,2,4,8"
    prompt_tokens: Annotated[
        str,
        typer.Option(
            "--prompt-tokens", metavar="LIST", help="Tokens of a question, its picture aside."
        ),
    ] = "64"
    new_tokens: Annotated[
        str, typer.Option("--new-tokens", metavar="LIST", help="Tokens of an answer.")
    ] = "128"
    runs: Annotated[
        int, typer.Option("--runs", metavar="COUNT", min=1, help="Of each; medians are told.")
    ] = 3
    image: Annotated[
        bool,
        typer.Option("--with-image/--no-image", help="Ask under a picture, another each time."),
    ] = True
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="One JSON object in place of the table.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug/--no-debug", help="Show where errors arose.")] = (
        False
    )

    def build(self) -> Plan:
        """The checked plan; ConfigError names the option that is wrong."""
        from vlmchat.bench import Plan

        plan = Plan(
            question_tokens=_numbers("--prompt-tokens", self.prompt_tokens),
            new_tokens=_numbers("--new-tokens", self.new_tokens),
            widths=_numbers("--widths", self.widths),
            runs=self.runs,
            image=self.image,
        )
        return plan.check()


def _numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        return tuple(int(each) for each in text.split(","))
    except ValueError:
        raise ConfigError(f"{option} is {text!r}; give numbers with commas between them") from None


def bench(
    ctx: typer.Context,
    asked: BenchOptions,
    model: ModelOptions,
    engine: EngineOptions,
    file: FileOptions,
) -> None:
    """Measure first token, prefill, decode and many streams at once.

    Every question is new to the caches; turn 2 asks on in the same conversation. Shares are of
    what the measured bandwidth and arithmetic of this machine allow.
    """
    with reporting(as_json=asked.as_json, debug=asked.debug):
        plan, config = asked.build(), model.build()
        limits = engine.build()
        if asked.random is not None:
            from vlmchat.engine.shapes import PREFIX, find_shape

            if "model_path" in given(ctx):
                raise ConfigError("--random and --model-path both name a model; choose one")
            config = replace(config, path=PREFIX + asked.random)
            find_shape(config.path)
        if limits.max_num_seqs is None:
            limits = replace(limits, max_num_seqs=max(plan.widths))
        from rich.console import Console

        _run(plan, config, limits, asked, Console(stderr=True, highlight=False))


def _run(
    plan: Plan, config: ModelConfig, limits: EngineConfig, asked: BenchOptions, err: Console
) -> None:
    """Load, measure, print."""
    from rich.console import Console

    from vlmchat.bench import measure
    from vlmchat.commands.chat import showing_stages

    with showing_stages(err, debug=asked.debug) as show:
        from vlmchat.engine.spare import spare_imports

        spare_imports()
        from vlmchat.engine.engine import Engine
        from vlmchat.engine.loader import load_model
        from vlmchat.engine.machine import measure_machine, work_of

        loaded = load_model(config, show)
        show("measuring the machine")
        machine = measure_machine(loaded.model.device, loaded.model.dtype)
        work = work_of(loaded.model)
        with closing(Engine.over(loaded, config, limits, show)) as engine:
            bounds = _bounds(machine, work)
            figures = list(measure(engine, plan, bounds, show))
            status = engine.status()
    if asked.as_json:
        import json

        print(json.dumps(_object(plan, status, machine, work, figures)))
    else:
        out = Console(highlight=False)
        out.print(_table(status, machine, figures))


def _bounds(machine: Machine, work: Work) -> Bounds:
    """A read is a copy's faster half; on a GPU both take the same path."""
    from vlmchat.bench import Bounds

    rate = max(machine.read_bytes_s, machine.copy_bytes_s)
    return Bounds(bytes_s=rate, flops_s=machine.flops_s, **asdict(work))


def _object(
    plan: Plan, status: Status, machine: Machine, work: Work, figures: Sequence[Figure]
) -> dict[str, Any]:
    """docs/bench.md describes it."""
    from vlmchat.bench import VERSION, report

    return {
        "bench": VERSION,
        "vlmchat": __version__,
        "date": datetime.date.today().isoformat(),
        "model": status.model,
        "details": dict(status.details),
        "load_s": status.load_s,
        "plan": asdict(plan),
        "machine": asdict(machine),
        "work": asdict(work),
        "figures": report(figures),
    }


def _table(status: Status, machine: Machine, figures: Sequence[Figure]) -> Table:
    """The figures for people."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    title = f"{status.model} · " + " · ".join(value for _, value in status.details)
    caption = (
        f"this machine: reads {machine.read_bytes_s / 1e9:.1f} GB/s, "
        f"copies {machine.copy_bytes_s / 1e9:.1f} GB/s (read and written), "
        f"{machine.flops_s / 1e12:.2f} TFLOP/s, {machine.threads} threads · "
        "in brackets: share of what it allows"
    )
    table = Table(title=title, caption=caption, title_justify="left", caption_justify="left")
    table.box, table.padding = SIMPLE_HEAD, (0, 1, 0, 0)
    for name in ("at\nonce", "turn", "prompt\ntokens", "of them\ncached", "answer\ntokens"):
        table.add_column(name, justify="right")
    for name in ("first\ntoken", "prefill\ntok/s", "decode of\none, tok/s", "all\ntok/s"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in figures:
        table.add_row(
            *map(str, (row.width, row.turn, row.prompt_tokens, row.cached_tokens, row.new_tokens)),
            f"{row.first_token_s * 1e3:.0f} ms",
            f"{row.prefill_tokens_s:.0f}{_share(row.prefill_share)}",
            f"{row.decode_tokens_s:.1f}{_share(row.decode_share)}",
            f"{row.total_tokens_s:.1f}{_share(row.total_share)}",
        )
    return table


def _share(share: float | None) -> str:
    return "" if share is None else f" ({share:.0%})"
