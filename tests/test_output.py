"""Answers on a terminal (a real emulator looks at the screen), as plain text, and as JSON."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterator

import pyte
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from rich.console import Console

from tests.fakes import ScriptedBackend, picture
from vlmchat.errors import OutOfMemory
from vlmchat.json_output import JsonPrinter, answer_json
from vlmchat.live_region import LiveRegion
from vlmchat.markdown_stream import MarkdownStream, Row
from vlmchat.output import TextPrinter
from vlmchat.request import SamplingParams
from vlmchat.session import ChatSession, Trimmed

WIDTH, HEIGHT = 32, 8


class Terminal(io.StringIO):
    """A file that is a terminal: pyte keeps what a person would see, scrollback included."""

    def __init__(self, width: int = WIDTH, height: int = HEIGHT) -> None:
        super().__init__()
        self.screen = pyte.HistoryScreen(width, height, history=10_000, ratio=0.5)
        self._emulator = pyte.Stream(self.screen)
        self.writes: list[str] = []

    def isatty(self) -> bool:
        return True

    def write(self, text: str) -> int:
        self.writes.append(text)
        self._emulator.feed(text.replace("\n", "\r\n"))
        return len(text)

    def lines(self) -> list[str]:
        width = self.screen.columns
        above = [
            "".join(line[column].data for column in range(width))
            for line in self.screen.history.top
        ]
        rows = [line.rstrip() for line in (*above, *self.screen.display)]
        while rows and not rows[-1]:
            rows.pop()
        return rows


def console(file: io.StringIO, width: int = WIDTH, height: int = HEIGHT) -> Console:
    return Console(
        file=file,
        force_terminal=True,
        width=width,
        height=height,
        color_system="truecolor",
        _environ={},
    )


def ticking() -> Callable[[], float]:
    """A clock on which every look takes a second, so that every piece is drawn."""
    seconds = iter(range(10**9))
    return lambda: float(next(seconds))


def streamed(pieces: Iterator[str] | list[str], terminal: Terminal) -> list[str]:
    """What is on the screen after drawing at every piece."""
    out = console(terminal, terminal.screen.columns, terminal.screen.lines)
    stream, region = MarkdownStream(out), LiveRegion(out)
    for piece in pieces:
        stream.feed(piece)
        region.draw(*stream.update())
    region.draw(*stream.update(final=True))
    return terminal.lines()


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, position = [], 0
    for size in sizes:
        pieces.append(text[position : position + size])
        position += size
    return [*pieces, text[position:]]


def session(
    *answers: str | Exception, max_new_tokens: int = 64, context_length: int = 512
) -> ChatSession:
    backend = ScriptedBackend(answers, context_length=context_length)
    return ChatSession(backend, SamplingParams(max_new_tokens=max_new_tokens))


def plain_printer() -> tuple[TextPrinter, io.StringIO, io.StringIO]:
    out, err = io.StringIO(), io.StringIO()
    err_console = Console(file=err, width=200, _environ={})
    return TextPrinter(Console(file=out, _environ={}), err_console), out, err


MARKDOWN_LINES = st.sampled_from(
    [
        "# heading", "words that go on and on until they have to wrap", "- item", "  - nested",
        "  more of it", "1. first", "2. second", "10. tenth", "* star", "---", "===", "--",
        "> quote", "> - in it", "```python", "```", "def f(x): return '[a]'", "    indented code",
        "\ttab", "", "", "| a | b |", "|---|---|", "| 1 | 2 |", "[ref]: http://x",
        "[red]not eaten[/red] <b>", "![i](u) [l](http://u.v)", "**bold", "on** *and* `code`",
        "漢字 wide 🙂", "- ```", "  ```", "a\\", "- - -", "&lt;", "x" * 40,
    ]
)  # fmt: skip


@settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow])
@given(st.lists(MARKDOWN_LINES, max_size=25), st.lists(st.integers(1, 25), max_size=60))
def test_streamed_markdown_ends_as_the_same_screen_as_one_render(
    lines: list[str], sizes: list[int]
) -> None:
    text = "\n".join(lines)
    at_once = streamed([text], Terminal(height=400))
    assert streamed(cut(text, sizes), Terminal()) == at_once


@pytest.mark.parametrize(
    "text",
    [
        pytest.param("[not a tag] [red]words[/red] [/] [link=x]y[/link]", id="rich markup"),
        pytest.param("<b>kept</b> <script>too</script>", id="html"),
        pytest.param("[name]: http://one.two", id="reference definition"),
    ],
)
def test_markdown_shows_brackets_as_they_are_written(text: str) -> None:
    assert streamed([text], Terminal(width=80)) == [text]


def test_markdown_shows_the_address_of_a_link() -> None:
    assert streamed(["[a](http://b.c)"], Terminal()) == ["a (http://b.c)"]


def test_markdown_never_sends_control_characters_to_the_terminal() -> None:
    terminal = Terminal()
    shown = streamed(["\x1b]0;title\x07 \x1b[2J\x9b2J a\rb\x08\x7f `\x1bc` \ud800"], terminal)
    assert shown[0].startswith("␛]0;title␇ ␛[2J")
    assert "\x07" not in "".join(terminal.writes)


def test_markdown_settles_a_code_block_line_by_line() -> None:
    stream = MarkdownStream(console(io.StringIO()))
    stream.feed("```python\none = 1\ntwo = 2\nthr")
    settled, live = stream.update()
    assert (len(settled), len(live)) == (2, 1)


def test_markdown_settles_a_list_item_by_item() -> None:
    stream = MarkdownStream(console(io.StringIO()))
    stream.feed("1. one\n2. two\n3. thr")
    settled, live = stream.update()
    assert (len(settled), len(live)) == (1, 2)  # item 2 may still go on


def test_markdown_highlights_code() -> None:
    stream = MarkdownStream(console(io.StringIO()))
    stream.feed("```python\nimport os\n```\n")
    (row,), _ = stream.update()
    assert row.ansi.count("\x1b[38;2;") > 1


def test_a_tail_taller_than_the_screen_is_neither_lost_nor_doubled() -> None:
    paragraph = " ".join(f"word{number}" for number in range(200))
    shown = " ".join(streamed(cut(paragraph, [7] * 200), Terminal(height=5))).split()
    assert shown == paragraph.split()


def test_live_region_rewrites_only_the_rows_that_changed() -> None:
    terminal = Terminal()
    region = LiveRegion(console(terminal))
    region.draw([], [Row("one", 3), Row("two", 3)])
    region.draw([], [Row("one", 3), Row("three", 5)])
    assert "one" not in terminal.writes[-1]


def test_live_region_erases_rows_that_are_gone() -> None:
    terminal = Terminal()
    region = LiveRegion(console(terminal))
    region.draw([], [Row("one", 3), Row("two", 3), Row("three", 5)])
    region.draw([Row("one", 3)], [])
    assert terminal.lines() == ["one"]


def test_live_region_writes_nothing_when_nothing_changed() -> None:
    terminal = Terminal()
    region = LiveRegion(console(terminal))
    region.draw([], [Row("one", 3)])
    region.draw([], [Row("one", 3)])
    assert len(terminal.writes) == 1


def test_text_printer_redraws_at_a_bounded_rate() -> None:
    terminal = Terminal()
    out = console(terminal)
    printer = TextPrinter(out, console(io.StringIO()), clock=lambda: 0.0)
    printer.answer((chat := session("word " * 60)).ask("?"), chat.backend.status())
    # the sign that it waits, the first piece (the clock stands still after it), and the end
    assert len([write for write in terminal.writes if write]) == 3


def test_text_printer_shows_the_answer_and_what_it_took() -> None:
    terminal, err = Terminal(width=80), io.StringIO()
    printer = TextPrinter(console(terminal, 80), Console(file=err, width=200), clock=ticking())
    chat = session("A **red** circle.", context_length=128)
    printer.answer(chat.ask("What?"), chat.backend.status())
    assert terminal.lines() == ["A red circle."]
    assert err.getvalue().startswith("3 tokens · first ")
    assert err.getvalue().endswith("context 6/128\n")


def test_plain_text_ends_with_exactly_one_line_break() -> None:
    printer, out, _ = plain_printer()
    chat = session("one\n\ntwo [b]\n\n\n")
    printer.answer(chat.ask("?"), chat.backend.status())
    assert out.getvalue() == "one\n\ntwo [b]\n"


def test_plain_text_neutralises_escape_sequences() -> None:
    printer, out, _ = plain_printer()
    printer.text("\x1b[31mred")
    assert out.getvalue() == "␛[31mred\n"


def test_text_printer_says_when_an_answer_was_cut() -> None:
    printer, _, err = plain_printer()
    chat = session("one two three four", max_new_tokens=3)
    printer.answer(chat.ask("?"), chat.backend.status())
    assert err.getvalue().startswith("(cut at --max-new-tokens 3)\n")


def test_text_printer_says_what_was_trimmed() -> None:
    printer, _, err = plain_printer()
    chat = session("yes")
    reply = chat.ask("?")
    reply.trimmed = Trimmed(3, 412, (picture("old.png"),))
    printer.answer(reply, chat.backend.status())
    assert err.getvalue().splitlines()[:2] == [
        "dropped the 3 oldest turns (412 tokens) to stay inside the context",
        "the picture old.png no longer fits and was dropped",
    ]


class Interrupted(io.StringIO):
    """A file at which somebody presses Ctrl-C when a certain word is written."""

    def write(self, text: str) -> int:
        if " three" in text and "finish_reason" not in text:
            raise KeyboardInterrupt
        return super().write(text)


def test_text_printer_keeps_and_shows_what_was_said_before_an_interrupt() -> None:
    out, err = Interrupted(), io.StringIO()
    printer = TextPrinter(Console(file=out), Console(file=err))
    chat = session("one two three four")
    with pytest.raises(KeyboardInterrupt):
        printer.answer(chat.ask("?"), chat.backend.status())
    assert (out.getvalue(), err.getvalue()) == ("one two\n", "(stopped)\n")
    assert chat.conversation.turns[0].answer == "one two three"


def test_text_printer_leaves_history_alone_when_an_answer_fails() -> None:
    printer, out, _ = plain_printer()
    chat = session(OutOfMemory("no memory left", "half an"))
    with pytest.raises(OutOfMemory):
        printer.answer(chat.ask("?"), chat.backend.status())
    assert (out.getvalue(), chat.conversation.turns) == ("half an\n", ())


def test_json_printer_prints_one_object_a_turn() -> None:
    stream = io.StringIO()
    chat = session("A red\ncircle.")
    printer = JsonPrinter(stream)
    for _ in range(2):
        printer.answer(chat.ask("What?", (picture(),)), chat.backend.status())
    first, second = map(json.loads, stream.getvalue().splitlines())
    assert first["answer"] == "A red\ncircle."
    assert first["usage"] == {
        "prompt_tokens": 19, "image_tokens": 16, "cached_tokens": 0, "completion_tokens": 3,
    }  # fmt: skip
    assert [image["source"] for image in second["images"]] == ["red.png", "red.png"]


def test_json_printer_has_the_documented_fields() -> None:
    chat = session("yes")
    reply = chat.ask("?")
    with reply:
        list(reply)
    value = answer_json(reply, chat.backend.status())
    assert list(value) == [
        "schema", "type", "model", "answer", "finish_reason", "usage", "timings", "images",
        "trimmed",
    ]  # fmt: skip
    assert list(value["timings"]) == ["load", "first_token", "total", "tokens_per_second"]


def test_json_printer_streams_deltas_before_the_answer() -> None:
    stream = io.StringIO()
    chat = session("one two")
    JsonPrinter(stream, stream_deltas=True).answer(chat.ask("?"), chat.backend.status())
    events = [json.loads(line) for line in stream.getvalue().splitlines()]
    assert [event["type"] for event in events] == ["delta", "delta", "answer"]
    assert "".join(event["text"] for event in events[:2]) == events[2]["answer"]


@pytest.mark.parametrize("encoding", ["utf-8", "ascii"])
def test_json_printer_survives_what_the_stream_cannot_encode(encoding: str) -> None:
    raw = io.BytesIO()
    stream = io.TextIOWrapper(raw, encoding=encoding)
    chat = session("lone \ud800 漢")
    JsonPrinter(stream).answer(chat.ask("?"), chat.backend.status())
    assert json.loads(raw.getvalue())["answer"] == "lone \ud800 漢"


def test_json_printer_prints_what_was_said_before_an_interrupt() -> None:
    stream = Interrupted()
    chat = session("one two three four")
    with pytest.raises(KeyboardInterrupt):
        JsonPrinter(stream, stream_deltas=True).answer(chat.ask("?"), chat.backend.status())
    event = json.loads(stream.getvalue().splitlines()[-1])
    assert (event["finish_reason"], event["answer"]) == ("cancelled", "one two three")
