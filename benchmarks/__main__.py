"""Run every benchmark and print its table as Markdown."""

from __future__ import annotations

import datetime
import os
import platform

from benchmarks import fidelity, startup, turns


def main() -> None:
    """All tables, after a line on the machine."""
    print(f"{datetime.date.today()}, {platform.processor() or platform.machine()}, ", end="")
    print(f"{os.cpu_count()} cores, Python {platform.python_version()}\n")
    startup.main()
    turns.main()
    fidelity.main()


if __name__ == "__main__":
    main()
