"""JSON for a stream: one value, one line, whatever the stream's encoding.

Used for answers, settings and errors alike. Knows nothing of what the values mean.
"""

from __future__ import annotations

import json
from typing import Any, TextIO


def json_line(value: dict[str, Any], stream: TextIO) -> str:
    """`value` as JSON without a line break; characters that `stream` cannot carry are escaped."""
    line = json.dumps(value, ensure_ascii=False)
    try:
        line.encode(stream.encoding or "utf-8")
    except UnicodeEncodeError:  # a lone surrogate, or a stream that is not UTF-8
        return json.dumps(value)
    return line
