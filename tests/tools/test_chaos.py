"""A small run of `make chaos`: real workers on the demo model, one of them killed and restarted."""

from __future__ import annotations

import asyncio
from pathlib import Path

from tools.chaos import Plan, run, table


def test_chaos_leaves_every_answer_whole_and_nothing_behind(tmp_path: Path) -> None:
    plan = Plan(2, 12, 4, kill_every_s=1.5, stop=False, restart=False, seconds=6)
    tally = asyncio.run(run(plan, tmp_path))
    assert tally.wrong == []
    assert tally.good
    assert tally.outcomes["whole"] >= 12
    assert tally.kills >= 1
    assert f"| answers: whole | {tally.outcomes['whole']} |" in table(plan, tally)
