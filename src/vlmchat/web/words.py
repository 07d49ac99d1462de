"""What went wrong, in the words of the page.

Called by the page and its conversations. People there know its controls; not the program's options,
a wire's parameters, or addresses of workers. Knows nothing of HTML.
"""

from __future__ import annotations

import re

from vlmchat.errors import (
    EngineDead,
    FetchRefused,
    ModelNotFound,
    NetworkError,
    NoWorker,
    OutOfMemory,
    Overloaded,
    PromptTooLong,
    Unauthorized,
    VlmchatError,
    WorkerFailed,
)

# The controls' names.
LONGEST, SEED, TOP_P = "Longest answer", "Seed", "Top-p"
TEMPERATURE, SYSTEM = "Temperature", "System prompt"
_CONTROLS = {
    r"(--max-new-tokens|max_(new_|completion_)?tokens)": LONGEST,
    r"--seed": SEED,
    r"(--top-p|top_p)": TOP_P,
    r"--temperature": TEMPERATURE,
    r"--system": SYSTEM,
}
_SHORT: dict[type[VlmchatError], str] = {
    FetchRefused: "pictures are fetched from public addresses only; save this one and add its file",
    Unauthorized: "the server does not take this page's key; whoever runs the page must change it",
    Overloaded: "the server is busy; try again in a moment",
    OutOfMemory: "there was not enough memory for this; use fewer or smaller pictures, "
    "or a shorter question",
    EngineDead: "the model has stopped; whoever runs this page must start it again",
}
_GONE = (NoWorker, WorkerFailed, ModelNotFound, NetworkError)
_OR_RAISE = re.compile(r" or raise --[\w-]+")
_FOR_OPERATORS = re.compile(r";[^;]*\s(--[a-z]|/[a-z]+\b|install\b)[^;]*")


def told(error: VlmchatError, model: str = "") -> str:
    """One line for whoever uses the page; model: who was to answer."""
    if isinstance(error, PromptTooLong):
        return _too_long(error)
    if isinstance(error, _GONE):
        return f"the model {model} went away, or its server failed; try again once it is back"
    for kind, text in _SHORT.items():
        if isinstance(error, kind):
            return text
    text = error.message
    for name, control in _CONTROLS.items():
        text = re.sub(rf"(?<![\w-]){name}(?![\w-])", control, text)
    return _FOR_OPERATORS.sub("", _OR_RAISE.sub("", text))


def _too_long(error: PromptTooLong) -> str:
    fewer = "use fewer pictures, " if error.image_tokens else ""
    what_to_do = f"shorten it, {fewer}or lower {LONGEST} under Parameters"
    if not error.tokens > error.limit > 0:  # a server's numbers, or none
        return f"the question is too long for this model; {what_to_do}"
    of_images = f" ({error.image_tokens} of them pictures)" if error.image_tokens else ""
    return (
        f"the question needs {error.tokens} tokens{of_images}, there is room for {error.limit}; "
        f"{what_to_do}"
    )
