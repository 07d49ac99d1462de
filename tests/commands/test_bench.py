"""`vlmchat bench` as a person runs it."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

TINY = ("--device", "cpu", "--widths", "1,2", "--new-tokens", "6", "--runs", "1")


def _bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "vlmchat", "bench", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("model", [("--random", "tiny"), ("--model-path", "demo")])
def test_bench_prints_one_object_with_figures_and_machine(model: tuple[str, str]) -> None:
    done = _bench(*model, *TINY, "--json")
    found = json.loads(done.stdout)
    assert found["bench"] == 1
    assert [(row["width"], row["turn"]) for row in found["figures"]] == [
        *((1, 1), (1, 2), (2, 1), (2, 2))
    ]
    first, second = found["figures"][:2]
    assert first["new_tokens"] == 6
    assert second["cached_tokens"] > first["prompt_tokens"] / 2
    assert found["machine"]["read_bytes_s"] > 0
    assert found["work"]["weight_bytes"] > 0


def test_bench_reads_fewer_bytes_per_token_in_4_bits() -> None:
    plain, packed = (
        json.loads(_bench("--random", "tiny", *TINY, "--json", *more).stdout)["work"]
        for more in ((), ("--load-4bit",))
    )
    assert packed["weight_bytes"] < plain["weight_bytes"]
    assert packed["token_flops"] == plain["token_flops"]


def test_bench_prints_a_table_for_people() -> None:
    done = _bench("--random", "tiny", *TINY, "--no-image")
    assert "random:tiny" in done.stdout
    assert "GB/s" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--random", "nothing"), "no shape is called 'nothing'"),
        (("--widths", "1,x"), "--widths"),
        (("--random", "tiny", "--model-path", "demo"), "choose one"),
    ],
)
def test_bench_refuses_in_one_line(arguments: tuple[str, ...], told: str) -> None:
    done = _bench(*arguments)
    assert done.returncode == 2
    assert told in done.stderr
    assert len(done.stderr.splitlines()) == 1
