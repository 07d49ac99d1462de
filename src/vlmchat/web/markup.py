"""A person's state as what the page shows: messages for the chat, and small pieces of HTML.

Called by the page. Everything that people or models wrote is escaped here, or left to the chat's
own sanitizer. Knows nothing of events.
"""

from __future__ import annotations

import re
from html import escape
from typing import Any

from vlmchat.conversation import Image, Message, Turn
from vlmchat.request import FinishReason
from vlmchat.web.person import Open, Person

Said = dict[str, Any]
_CODE = re.compile(r"(^```.*?^```|`[^`\n]+`)", re.M | re.S)


def messages(person: Person) -> list[Said]:
    """The conversation as Gradio's chat takes it, forgotten turns first."""
    said: list[Said] = []
    shown: set[Image] = set()
    for turn in person.forgotten:
        said += _turn(person, turn, shown)
    if person.forgotten:
        said.append(_note("the model no longer remembers what stands above"))
    turns = person.conversation.turns
    if person.under_way is not None:
        turns = turns[: len(person.under_way.before.turns)]
    for index, turn in enumerate(turns):
        said += _turn(person, turn, shown, index)
    failed = person.open
    if person.under_way is not None:
        said += _question(person, person.under_way.question, shown)
        said.append({"role": "assistant", "content": person.partial or "…"})
    elif failed and not _stands_above(failed, turns):
        if failed.replaces:
            said.append(_note(f"in place of question {len(failed.before.turns) + 1}, unanswered"))
        said += _question(person, failed.question, shown)
        if person.partial:
            broken = f"{person.partial}\n\n*(broken off)*"
            said.append({"role": "assistant", "content": broken})
    return said


def _stands_above(failed: Open, turns: tuple[Turn, ...]) -> bool:
    """Whether it is an old question that was asked again."""
    return failed.replaces and failed.question.text == turns[len(failed.before.turns)].user.text


def _turn(person: Person, turn: Turn, shown: set[Image], index: int | None = None) -> list[Said]:
    """A question and its answer; index: by which its question can be taken up."""
    answer = turn.answer or "*(the model said nothing)*"
    answer += "\n\n*(stopped)*" if turn.interrupted else ""
    asked = _question(person, turn.user, shown)
    if index is not None:
        name = f'title="Change question {index + 1} and go on from there"'
        asked[-1]["content"] += f'\n\n<a class="edit" href="#edit-{index}" {name}>Edit</a>'
    return [*asked, {"role": "assistant", "content": answer}]


def _question(person: Person, message: Message, shown: set[Image]) -> list[Said]:
    """Pictures that the trimmer moved here were shown before."""
    new = [image for image in message.images if image not in shown]
    shown.update(new)
    said: list[Said] = []
    if new:
        html = "".join(picture(person, image) for image in new)
        said.append({"role": "user", "content": f'<div class="pictures">{html}</div>'})
    said.append({"role": "user", "content": _escaped(message.text)})
    return said


def _escaped(text: str) -> str:
    """Markdown in which tags stand as they were typed; code, which Markdown escapes, as it is."""
    parts = _CODE.split(text)
    return "".join(p if n % 2 else escape(p, quote=False) for n, p in enumerate(parts))


def _note(text: str) -> Said:
    return {"role": "assistant", "content": f"*— {text} —*"}


def picture(person: Person, image: Image) -> str:
    """An `img` whose address only this person knows."""
    alt = escape(f"{image.source}, {image.width} × {image.height} pixels")
    return f'<img src="picture/{person.token}/{image.sha256}" alt="{alt}" title="{alt}">'


def waiting(person: Person) -> str:
    """The pictures for the next question."""
    if not person.waiting:
        return ""
    shown = "".join(picture(person, image) for image in person.waiting)
    return f'<div class="pictures waiting">{shown}</div>'


def trouble(text: str) -> str:
    """What went wrong, for the eye and for screen readers."""
    if not text:
        return ""
    return f'<div class="trouble" role="alert">{escape(text[:1].upper() + text[1:])}.</div>'


def facts(person: Person) -> str:
    """How full the context is, what was dropped, how fast the last answer came."""
    last = person.answered
    if last is None:
        return '<div class="facts" role="status"></div>'
    parts: list[str] = []
    if last.usage is not None:
        used = last.usage.prompt_tokens + last.usage.completion_tokens
        parts.append(_gauge(used, last.context_length))
    if last.trimmed:
        parts.append(f"<b>{_dropped(person)}</b>")
    if last.timings is not None and last.timings.tokens_per_second:
        parts.append(f"{last.timings.tokens_per_second:.1f} tokens/s")
    if last.timings is not None:
        parts.append(f"first token after {last.timings.first_token_s:.2f} s")
    if last.finish_reason is FinishReason.LENGTH:
        parts.append("<b>cut at the longest answer allowed</b>")
    return f'<div class="facts" role="status">{" · ".join(parts)}</div>'


def _gauge(used: int, context_length: int) -> str:
    if not context_length:
        return f"{used} tokens"
    label = f"context: {used} of {context_length} tokens"
    meter = f'<meter min="0" max="{context_length}" value="{used}" aria-label="{label}"></meter>'
    return f"{meter} {label}"


def _dropped(person: Person) -> str:
    assert person.answered is not None
    trimmed = person.answered.trimmed
    parts = [_count(trimmed.turns, "turn")] if trimmed.turns else []
    parts += [_count(len(trimmed.images), "picture")] if trimmed.images else []
    tokens = f" ({trimmed.tokens} tokens)" if trimmed.tokens else ""
    return f"the context was full: {' and '.join(parts)} dropped{tokens}"


def _count(number: int, noun: str) -> str:
    return f"{number} {noun}{'' if number == 1 else 's'}"
