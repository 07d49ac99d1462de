"""`python -m benchmarks [PART [OPTIONS]]`: one part, or all that need no GPU, as Markdown."""

from __future__ import annotations

import datetime
import os
import platform
import sys

from benchmarks import fidelity, gpu, peers, startup
from benchmarks.scale import command as scale

PARTS = {
    "startup": startup.main,
    "fidelity": fidelity.main,
    "peers": peers.main,
    "gpu": gpu.main,
    "scale": scale.main,
}


def main() -> None:
    """Tables, after a line on the machine."""
    asked = sys.argv[1:]
    if asked and asked[0] not in PARTS:
        sys.exit(f"no such part: {asked[0]}; there are {', '.join(PARTS)}")
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, ", end="")
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}\n", flush=True)
    if asked:
        PARTS[asked[0]](asked[1:])
    else:
        for part in ("startup", "peers", "fidelity"):
            PARTS[part]([])


if __name__ == "__main__":
    main()
