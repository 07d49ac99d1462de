"""CPU time of commands that need no model, against importing typer and rich alone."""

from __future__ import annotations

import resource
import subprocess
import sys
from statistics import median

RUNS = 9
BARE = [sys.executable, "-c", "import typer, rich"]
COMMANDS = {
    "--help": ["--help"],
    "--version": ["--version"],
    "chat --help": ["chat", "--help"],
    "chat --no-such-option": ["chat", "--no-such-option"],
    "chat --image missing.png": ["chat", "--image", "missing.png", "-p", "?"],
}


def cpu_seconds(command: list[str]) -> float:
    """User and system time of one run."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(command, capture_output=True, stdin=subprocess.DEVNULL, check=False)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def main(arguments: list[str] | None = None) -> None:
    """Print the table: medians, bare and command in turn."""
    print("| command | CPU time | more than `import typer, rich` |\n|---|---|---|")
    for name, arguments in COMMANDS.items():
        pairs = [
            (cpu_seconds([sys.executable, "-m", "vlmchat", *arguments]), cpu_seconds(BARE))
            for _ in range(RUNS)
        ]
        seconds = median(own for own, _ in pairs)
        more = median(own - bare for own, bare in pairs)
        print(f"| `vlmchat {name}` | {seconds:.3f} s | {more:+.3f} s |")
    print()


if __name__ == "__main__":
    main()
