"""Feed broken pictures and requests to their readers: `python -m tools.fuzz --cases 100000`.

Pictures of every format that is read, and chat requests, are damaged at random: bytes changed, cut
out, doubled, cut off. Each must be read or be refused by a typed error; anything else ends the run
with the case's number, by which it can be had again. Prints counts, the slowest case, and by how
much the memory has grown between the first tenth and the end.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import random
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import psutil
from PIL import Image

from vlmchat.config import ImagePolicy
from vlmchat.errors import InvalidRequest, VlmchatError
from vlmchat.server.openai import parse_chat
from vlmchat.server.pictures import Pictures, Source

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "TIFF", "BMP", "AVIF")
MODES = ("RGB", "RGBA", "L", "P", "LA", "1", "CMYK", "I;16")
MAX_PIXELS = 1_000_000


@dataclass(slots=True)
class Tally:
    """What became of the cases, by the name of the error or `read`."""

    outcomes: Counter[str] = field(default_factory=Counter)
    slowest_s: float = 0.0
    slowest_case: int = 0
    more_mib: float = 0.0


def seeds() -> list[bytes]:
    """Small sound pictures: each format in each mode that it can have."""
    chance, found = random.Random(0), []
    base = Image.frombytes("RGB", (24, 17), chance.randbytes(24 * 17 * 3))
    for kind in FORMATS:
        for mode in MODES:
            file = io.BytesIO()
            try:
                base.convert("L" if mode == "I;16" else mode).convert(mode).save(file, kind)
            except (OSError, KeyError, ValueError):  # the format has no such mode
                continue
            found.append(file.getvalue())
    return found


def damaged(data: bytes, chance: random.Random) -> bytes:
    """One to eight small damages, most of them near the beginning, where headers are."""
    harmed = bytearray(data)
    for _ in range(chance.randint(1, 8)):
        at = min(int(chance.expovariate(6 / len(data))), max(len(harmed) - 1, 0))
        length = chance.choice((1, 1, 1, 2, 4, 8))
        match chance.randrange(6):
            case 0:
                harmed[at : at + length] = chance.randbytes(length)
            case 1:
                harmed[at : at + length] = chance.choice((b"\0", b"\xff", b"\x7f")) * length
            case 2:
                del harmed[at : at + length]
            case 3:
                harmed[at:at] = harmed[at : at + length * 4]
            case 4:
                del harmed[len(harmed) - chance.randint(0, len(harmed) // 2) :]
            case _:
                if at < len(harmed):
                    harmed[at] ^= 1 << chance.randrange(8)
    return bytes(harmed)


def pictures() -> Callable[[random.Random], None]:
    """A case: a damaged picture, read as a worker reads what clients send."""
    reader, sound = Pictures(ImagePolicy(max_pixels=MAX_PIXELS), 1), seeds()

    def case(chance: random.Random) -> None:
        file = base64.b64encode(damaged(chance.choice(sound), chance)).decode()
        source = Source(f"data:image/png;base64,{file}", "messages[0]")
        reader.check([source])
        (image,) = reader.decode([source], {})
        assert image.width * image.height <= MAX_PIXELS

    return case


def requests() -> Callable[[random.Random], None]:
    """A case: a damaged chat request."""
    picture = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
    text = {"type": "text", "text": "hi"}
    schema = {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "object"}}}
    body = {
        "model": "m",
        "messages": [
            {"role": "system", "content": "s"},
            {"role": "user", "content": [picture, text]},
            {"role": "assistant", "content": "a"},
            {"role": "user", "content": "more"},
        ],
        **{"temperature": 0.5, "top_p": 0.9, "top_k": 3, "max_tokens": 5, "n": 2, "seed": 1},
        **{"stop": ["a"], "logprobs": True, "top_logprobs": 2, "logit_bias": {"5": -1}},
        **{"stream": True, "stream_options": {"include_usage": True}, "response_format": schema},
        **{"vlmchat_token_ids": True, "user": None, "truncation": "auto"},
    }
    values: list[object] = [
        None,
        0,
        -1,
        2**70,
        1e308,
        "",
        "x",
        "\ud800",
        [],
        {},
        [[]],
        True,
        [None],
        {"a": {}},
    ]
    written = [json.dumps(value) for value in values]

    def case(chance: random.Random) -> None:
        if chance.random() < 0.5:
            try:
                parsed = json.loads(damaged(json.dumps(body).encode(), chance))
            except (ValueError, RecursionError):
                raise InvalidRequest("not JSON") from None
        else:
            parsed = json.loads(json.dumps(body))
            for _ in range(chance.randint(1, 3)):
                _replace(parsed, json.loads(chance.choice(written)), chance)
        parse_chat(parsed)

    return case


def _replace(inside: object, value: object, chance: random.Random) -> None:
    """Put `value` in some place, however deep."""
    keys = list(inside) if isinstance(inside, dict) else range(len(inside))  # type: ignore[arg-type]
    key = chance.choice(list(keys))
    inner = inside[key]  # type: ignore[index]
    if isinstance(inner, dict | list) and inner and chance.random() < 0.7:
        _replace(inner, value, chance)
    else:
        inside[key] = value  # type: ignore[index]


def fuzz(case: Callable[[random.Random], None], count: int, first: int = 0) -> Tally:
    """Run cases `first` to `first + count`. Raises whatever is no typed error, with the case."""
    tally, process = Tally(), psutil.Process()
    rss = process.memory_info().rss
    for number in range(first, first + count):
        if number == first + count // 10:
            rss = process.memory_info().rss
        begin = time.monotonic()
        try:
            case(random.Random(number))
            outcome = "read"
        except VlmchatError as error:
            outcome = error.code
            if error.http_status >= 500:
                raise AssertionError(f"case {number}: {error}") from error
        except BaseException as error:
            raise AssertionError(f"case {number}: {error!r}") from error
        tally.outcomes[outcome] += 1
        took_s = time.monotonic() - begin
        if took_s > tally.slowest_s:
            tally.slowest_s, tally.slowest_case = took_s, number
    tally.more_mib = (process.memory_info().rss - rss) / 2**20
    return tally


def main() -> None:
    """See the module's docstring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--cases", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    given = parser.parse_args()
    for name, make in (("pictures", pictures), ("requests", requests)):
        tally = fuzz(make(), given.cases, given.first)
        counts = ", ".join(f"{code} {count}" for code, count in tally.outcomes.most_common())
        print(
            f"{name}: {given.cases} cases: {counts}; slowest {tally.slowest_s:.2f} s "
            f"(case {tally.slowest_case}); memory {tally.more_mib:+.1f} MiB",
            flush=True,
        )


if __name__ == "__main__":
    main()
