"""Where a picture came from and how large it is, as messages to people say it."""

from __future__ import annotations

import re

_MAX_CHARACTERS = 120


def shown(text: str) -> str:
    """A URL or path fit for one line: printable, not too long, a URL without its query."""
    if re.match(r"(?i)https?:", text):
        # Signed addresses carry their secrets in the query, others before the @.
        text = re.sub(r"(?<=[/\\])[^/\\?#]*@", "", re.sub(r"\?.*", "?…", text, flags=re.DOTALL))
    text = "".join(character if character.isprintable() else "�" for character in text)
    return text if len(text) <= _MAX_CHARACTERS else text[: _MAX_CHARACTERS - 1] + "…"


def shown_bytes(count: int) -> str:
    """`count` bytes for people: 52428800 is "50 MiB"."""
    for unit, size in (("GiB", 2**30), ("MiB", 2**20), ("KiB", 2**10)):
        if count >= size:
            return f"{count / size:.4g} {unit}"
    return f"{count} bytes"
