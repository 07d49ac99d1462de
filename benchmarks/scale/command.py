"""`python -m benchmarks scale`: simulate one or many plans, as Markdown, JSON and a plot.

The first line that the benchmarks print tells the machine; simulated figures do not depend on it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

from benchmarks.scale import costs
from benchmarks.scale.plot import Panel, svg
from benchmarks.scale.profiles import PROFILES, People
from benchmarks.scale.simulation import WARM_S, Plan, Simulation
from vlmchat.server.dispatch import CACHE_MARGIN, DispatchMethod

Row = dict[str, Any]
PER_WORKER, LEAST = 1000, 10_000  # conversations, where --sessions does not say
COLUMNS = (
    ("profile", "profile"),
    ("policy", "policy"),
    ("workers", "workers"),
    ("sessions", "conversations"),
    ("seed", "seed"),
    ("load", "load"),
    ("hit_rate", "cached"),
    ("first_token_p50_s", "first token p50, s"),
    ("first_token_p99_s", "p99, s"),
    ("queue_p50", "queue p50"),
    ("queue_p99", "p99"),
    ("dispatches_s", "requests/s"),
    ("beats_s", "beats/s"),
    ("tokens_s", "tokens/s"),
    ("cores", "controller's cores"),
)
PANELS = (
    Panel("share of prompt tokens cached", lambda row: row["hit_rate"], (0, 0.2, 0.4, 0.6, 0.8)),
    Panel("first token, 99 %, seconds", lambda row: row["first_token_p99_s"], (0.1, 1, 10, 100)),
    Panel("cores that a controller needs", lambda row: cores(row), (0.001, 0.01, 0.1, 1, 10, 100)),
)


def simulate(plan: Plan) -> Row:
    """One plan's figures; rates are per simulated second, cpu_s is of this process.

    Raises ArgumentTypeError where nothing would be measured.
    """
    started = time.process_time()
    counted = Simulation(plan).run()
    cpu_s = time.process_time() - started
    if not counted.first_s:
        raise argparse.ArgumentTypeError(
            f"--sessions {plan.sessions}: all come within {WARM_S:.0f} s, which are left out"
        )
    p50, p99 = counted.first_token_s(0.5, 0.99)
    queues = counted.queue_length(0.5, 0.99, 1.0)
    seconds = counted.seconds
    return {
        "profile": plan.profile.name,
        "policy": plan.policy,
        "workers": plan.workers,
        "sessions": plan.sessions,
        "seed": plan.seed,
        "load": plan.load,
        "margin": plan.margin,
        "slots": plan.profile.slots,
        "controllers": plan.controllers,
        "sticky": plan.sticky,
        "asked": counted.asked,
        "answered": counted.answered,
        "refused": counted.refused,
        "left": counted.left,
        "hit_rate": round(counted.hit_rate, 4),
        "first_token_p50_s": round(p50, 4),
        "first_token_p99_s": round(p99, 4),
        **dict(zip(("queue_p50", "queue_p99", "queue_max"), queues, strict=True)),
        "dispatches_s": round(counted.turns / seconds, 2),
        "beats_s": round(counted.beats / seconds, 2),
        "tokens_s": round(counted.answer_tokens / seconds, 1),
        "simulated_s": round(counted.seconds, 1),
        "cpu_s": round(cpu_s, 2),
    }


def cores(row: Row) -> float:
    """How many processes would be busy if all tokens went through controllers."""
    return costs.controller_cores(row["dispatches_s"], row["tokens_s"], row["beats_s"])


def plans(asked: argparse.Namespace) -> Iterator[Plan]:
    """Every combination of what was asked for, the workers inmost."""
    for profile in asked.profile:
        kind = PROFILES[profile]
        kind = replace(kind, slots=asked.slots) if asked.slots else kind
        for policy in asked.policy:
            for workers in asked.workers:
                yield Plan(
                    workers,
                    asked.sessions or max(LEAST, PER_WORKER * workers),
                    kind,
                    policy,
                    asked.load,
                    asked.seed,
                    People(popular=asked.popular),
                    asked.margin,
                    asked.controllers,
                    not asked.any_controller,
                )


def table(rows: list[Row]) -> str:
    """As Markdown."""
    lines = ["| " + " | ".join(title for _, title in COLUMNS) + " |", "|---" * len(COLUMNS) + "|"]
    lines += ["| " + " | ".join(_cell(key, row) for key, _ in COLUMNS) + " |" for row in rows]
    return "\n".join(lines)


def _cell(key: str, row: Row) -> str:
    value = cores(row) if key == "cores" else row[key]
    if key == "hit_rate":
        return f"{value:.1%}"
    return f"{value:,.3g}" if isinstance(value, float) and value < 100 else f"{value}"


def parser() -> argparse.ArgumentParser:
    """The options."""
    found = argparse.ArgumentParser(prog="python -m benchmarks scale", description=__doc__)
    policies = get_args(DispatchMethod)
    add = found.add_argument
    add("--workers", type=_counts, default=[1, 3, 10, 30, 100], help="how many, with commas")
    sessions = f"conversations; unset: {PER_WORKER} for each worker, at least {LEAST}"
    add("--sessions", type=_count, help=sessions)
    add("--policy", type=_names(*policies), default=list(policies), help=", ".join(policies))
    add("--profile", type=_names(*PROFILES), default=list(PROFILES), help=", ".join(PROFILES))
    add("--seed", type=int, default=1)
    add("--load", type=_load, default=0.8, help="1: all that workers can do that cache nothing")
    add("--margin", type=int, default=CACHE_MARGIN, help="of cache_aware, in requests")
    add("--slots", type=_count, help="of each worker, in place of the profile's")
    add("--popular", type=float, default=People().popular, help="share about a popular picture")
    add("--controllers", type=_count, default=1, help="each knows every worker")
    add("--any-controller", action="store_true", help="a conversation's requests come to any")
    add("--costs", action="store_true", help="measure what a controller has to do instead")
    add("--json", type=Path, metavar="FILE", help="all figures, for --read")
    add("--read", type=Path, nargs="+", default=[], help="files of --json, in place of simulating")
    add("--plot", type=Path, metavar="FILE", help="an SVG of all")
    return found


def _counts(text: str) -> list[int]:
    return [_count(each) for each in text.split(",")]


def _count(text: str) -> int:
    if (found := int(text)) < 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return found


def _load(text: str) -> float:
    if not 0 < (found := float(text)) <= 10:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 10")
    return found


def _names(*known: str) -> Any:
    def names(text: str) -> list[str]:
        found = text.split(",")
        if unknown := [name for name in found if name not in known]:
            raise argparse.ArgumentTypeError(f"{unknown[0]} is none of {', '.join(known)}")
        return found

    return names


def main(arguments: list[str] | None = None) -> None:
    """Simulate, and print."""
    asked = parser().parse_args(arguments)
    if asked.costs:
        found = costs.costs()
        _keep(asked.json, found)
        print(costs.table(found))
        return
    rows = [row for file in asked.read for row in json.loads(file.read_text("utf-8"))["rows"]]
    for plan in () if asked.read else plans(asked):
        try:
            rows.append(last := simulate(plan))
        except argparse.ArgumentTypeError as error:
            parser().error(str(error))
        told = f"{last['profile']} {last['policy']} {last['workers']}: {last['cpu_s']} s of CPU"
        print(told, file=sys.stderr, flush=True)
    _keep(asked.json, {"rows": rows})
    if asked.plot:
        asked.plot.write_text(svg(rows, PANELS), encoding="utf-8")
    print(table(rows))


def _keep(file: Path | None, found: Row) -> None:
    if file is not None:
        file.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
