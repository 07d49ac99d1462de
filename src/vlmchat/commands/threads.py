"""How torch's threads behave: set in the environment before torch is loaded, which reads it once.

Called by `main` first of all. What a user has set stays.
"""

from __future__ import annotations

import math
import os
from collections.abc import MutableMapping
from pathlib import Path

# GNU's OpenMP spins so often at the end of each operation before a thread sleeps. Its own 300,000
# make a decode step 8 to 12 times slower once another program wants the cores; 1,000 do not last to
# the next operation, and waking a thread for each costs a third of a decode step.
_SPIN_COUNT = 20_000


def settle(env: MutableMapping[str, str], quota: float | None) -> None:
    """Few spins, and no more threads than the quota of CPUs. quota: None where there is none."""
    if "OMP_WAIT_POLICY" not in env:
        env.setdefault("GOMP_SPINCOUNT", str(_SPIN_COUNT))
    if quota is not None and quota < (os.cpu_count() or 1):
        env.setdefault("OMP_NUM_THREADS", str(max(1, math.floor(quota))))


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """CPUs that a container may use at once, which nothing else tells a program."""
    for names in (("cpu.max",), ("cpu/cpu.cfs_quota_us", "cpu/cpu.cfs_period_us")):
        try:
            words = " ".join((root / name).read_text("ascii") for name in names).split()
            if (quota := float(words[0]) / float(words[1])) > 0:
                return quota
        except (OSError, ValueError, IndexError, ZeroDivisionError):
            continue  # no such file, or no limit: "max", -1
    return None
