"""The commands of the chat that begin with a slash, as one table.

Called by `repl`, which reads lines and runs answers. A command acts on a `Chat` and tells through
`Next` what the loop has to do. Knows nothing of keys and of how lines are edited.
"""

from __future__ import annotations

import difflib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from rich.text import Text

from vlmchat.chat import Chat, count, described, first_words
from vlmchat.clipboard import copy_text
from vlmchat.config import sampling_params, settings_of
from vlmchat.conversation import Turn
from vlmchat.errors import ConfigError, InvalidRequest, SessionError, VlmchatError
from vlmchat.markdown_stream import printable
from vlmchat.session import Reply
from vlmchat.session_file import resume
from vlmchat.store import Autosave, read_file, write_file

_GAUGE_CELLS = 24
_NONE = ("none", "off")
ERROR = "red"


@dataclass(frozen=True, slots=True)
class Next:
    """What the loop does after a command: run an answer, prefill the prompt, or end."""

    begin: Callable[[], Reply] | None = None
    prefill: str = ""
    editing: bool = False
    end: bool = False


@dataclass(frozen=True, slots=True)
class Command:
    """One entry of the table. run gets the rest of the line, stripped."""

    name: str
    usage: str
    help: str
    run: Callable[[Chat, str], Next | None]
    takes_path: bool = False
    needs_model: bool = False


def find(line: str) -> tuple[Command, str] | None:
    """The command that a line begins with, and its argument; None if it begins with none."""
    name, *argument = line.split(None, 1)
    for command in COMMANDS:
        if name.lower() in (f"/{command.name}", *_ALIASES.get(command.name, ())):
            return command, "".join(argument).strip()
    return None


def takes_path(name: str) -> bool:
    """Whether a path may follow this command."""
    return any(command.takes_path for command in COMMANDS if name == f"/{command.name}")


def words_after(chat: Chat, name: str) -> Iterable[str]:
    """The words that may follow this command."""
    if name == "/load" and chat.autosave is not None:
        return chat.autosave.store.names()
    if name == "/set":
        return [key.replace("_", "-") for key in settings_of(chat.session.params)]
    return {"/images": ["remove"], "/sessions": ["delete"], "/system": ["none"]}.get(name, [])


def unknown(line: str) -> InvalidRequest:
    """The error for a line that begins with a slash and is no command."""
    name = line.split()[0]
    close = difflib.get_close_matches(name.lower(), [f"/{command.name}" for command in COMMANDS], 1)
    meant = f"did you mean {close[0]}?" if close else "/help lists the commands."
    return InvalidRequest(f"{name} is not a command; {meant} To ask it as it is, begin with //")


def _image(chat: Chat, argument: str) -> None:
    if not argument:
        raise InvalidRequest("give a file or a URL: /image PATH|URL…")
    for source in _sources(argument):
        try:
            chat.attach(chat.loader.load(source))
        except VlmchatError as error:  # one bad picture does not keep the others out
            chat.say(error.message, ERROR)


def _images(chat: Chat, argument: str) -> None:
    pictures = chat.images
    word, _, number = argument.partition(" ")
    if word in ("remove", "rm"):
        if not number.strip().isdecimal() or not 1 <= int(number) <= len(pictures):
            has = count(len(pictures), "picture")
            raise InvalidRequest(f"give the number of a picture to remove; this chat has {has}")
        removed = chat.session.remove_image(int(number) - 1)
        chat.say(f"removed {described(removed)}")
    elif word:
        raise InvalidRequest("use /images, or /images remove N")
    elif not pictures:
        chat.say("no picture yet; /image PATH|URL brings one")
    else:
        chat.print_rows(_image_rows(chat))


def _paste(chat: Chat, argument: str) -> None:
    chat.attach(chat.loader.load_clipboard())


def _system(chat: Chat, argument: str) -> None:
    if not argument:
        chat.say(chat.session.conversation.system or "no system prompt; /system TEXT sets one")
    elif argument in _NONE:
        chat.session.set_system("")
        chat.say("no system prompt from now on")
    else:
        chat.session.set_system(argument)
        chat.say("the system prompt is set, for the whole conversation")


def _set(chat: Chat, argument: str) -> None:
    values = settings_of(chat.session.params)
    name, _, text = argument.partition(" ")
    if name:
        key = name.lstrip("-").replace("-", "_").lower()
        if key not in values:
            raise InvalidRequest(f"there is no setting {name}; /set lists them")
        if not text.strip():
            raise InvalidRequest(f"give a value: /set {name} VALUE")
        changed = {**values, key: _setting(key, text.strip())}
        chat.session.set_params(sampling_params(**changed))
        values = {key: changed[key]}
    rows = ((name.replace("_", "-"), _shown_setting(value)) for name, value in values.items())
    chat.print_rows(rows)


def _regen(chat: Chat, argument: str) -> Next:
    _last_turn(chat)
    return Next(begin=chat.session.regenerate)


def _edit(chat: Chat, argument: str) -> Next:
    last = _last_turn(chat)
    if argument:
        return Next(begin=lambda: chat.session.edit(argument))
    return Next(prefill=last.user.text, editing=True)


def _undo(chat: Chat, argument: str) -> None:
    turn = chat.session.undo()
    chat.say(f"took back: {first_words(turn.user.text)}")
    for picture in turn.user.images:
        chat.say(f"and its picture {described(picture)}")


def _clear(chat: Chat, argument: str) -> None:
    turns, pictures = len(chat.session.conversation.turns), len(chat.images)
    if chat.autosave is not None:
        if chat.autosave.name is not None:
            chat.say(f"{chat.autosave.name} stays saved; what follows gets a name of its own")
        chat.autosave.rename(None)
    chat.session.clear()
    stays = "; the system prompt stays" if chat.session.conversation.system else ""
    chat.say(f"forgot {count(turns, 'turn')} and {count(pictures, 'picture')}{stays}")


def _history(chat: Chat, argument: str) -> None:
    session = chat.session
    forgotten = len(session.forgotten)
    turns = (*session.forgotten, *session.conversation.turns)
    chat.print_rows(
        (_turn_row(number, turn, number <= forgotten) for number, turn in enumerate(turns, 1)),
    )
    if forgotten:
        chat.say(f"{count(forgotten, 'turn')} in grey: no longer remembered by the model")
    chat.console.print(_gauge(chat))


def _save(chat: Chat, argument: str) -> None:
    if _is_file(argument):
        path = _path(argument)
        if path.exists():
            raise SessionError(f"{path} exists; delete it, or choose another name")
        write_file(_saving(chat).saved(chat.session), path)
        chat.say(f"written to {path}, pictures included; /load {argument} reads it")
        return
    autosave = _saving(chat)
    if argument and argument != autosave.name:
        if autosave.store.exists(argument):
            raise SessionError(f"there is a session {argument} already; choose another name")
        autosave.rename(argument)
    autosave.save(chat.session)
    if autosave.name is None:
        raise InvalidRequest("there is nothing to save yet")
    chat.say(f"saved as {autosave.name}; --session {autosave.name} goes on with it")


def _load(chat: Chat, argument: str) -> Next:
    if not argument:
        raise InvalidRequest("give a file or a session: /load FILE|NAME; /sessions lists them")
    autosave = _saving(chat)
    is_file = _is_file(argument)
    store = autosave.store
    saved = read_file(_path(argument), chat.loader) if is_file else store.load(argument)
    session = resume(saved, chat.session.backend)
    autosave.rename(None if is_file else argument, None if is_file else saved.created)
    session.on_change = autosave
    chat.session = session
    chat.say_lost(saved)
    chat.show_tail()
    return Next(prefill=saved.unanswered.text if saved.unanswered else "")


def _sessions(chat: Chat, argument: str) -> None:
    autosave = _saving(chat)
    word, _, name = argument.partition(" ")
    if word == "delete":
        if name.strip() == autosave.name:
            raise InvalidRequest("this chat is that session; end it first, or /load another one")
        autosave.store.delete(name.strip())
        chat.say(f"deleted {name.strip()}")
        return
    entries = autosave.store.list()
    if not entries:
        chat.say("no session yet")
    chat.print_rows(
        (
            (
                "→" if entry.name == autosave.name else "",
                entry.name,
                "" if entry.turns is None else count(entry.turns, "turn"),
                entry.first_words,
            )
            for entry in entries
        ),
    )


def _stats(chat: Chat, argument: str) -> None:
    totals = chat.totals
    share = totals.cached_tokens / totals.prompt_tokens if totals.prompt_tokens else 0.0
    status = chat.session.backend.status()
    rows = [
        ("model", status.model),
        *status.details,
        ("answers", f"{totals.turns}, {totals.seconds:.1f} s"),
        ("prompt tokens", f"{totals.prompt_tokens}, {totals.image_tokens} of them pictures"),
        ("from the cache", f"{totals.cached_tokens} ({share:.0%} of the prompts)"),
        ("tokens answered", str(totals.completion_tokens)),
    ]
    if (load := status.load) is not None:
        rows.append(("pictures", f"{load.images}, {load.images_cached} of them seen before"))
        if load.drafted:
            rows.append(("guessed ahead", f"{load.drafted} tokens, {load.accepted} of them right"))
    chat.print_rows(rows)


def _copy(chat: Chat, argument: str) -> None:
    answer = _last_turn(chat).answer
    way = copy_text(answer, sys.stdout)
    chat.say(f"copied {count(len(answer), 'character')} ({way})")


def _help(chat: Chat, argument: str) -> None:
    chat.print_rows((command.usage, command.help) for command in COMMANDS)
    chat.say(
        "Alt-Enter, or a backslash at the end of a line, begins a new line; a path or an image "
        "URL in a line attaches it; // sends a line that begins with a slash; Ctrl-C stops an "
        "answer; an empty line or Ctrl-D ends."
    )


def _exit(chat: Chat, argument: str) -> Next:
    return Next(end=True)


COMMANDS = (
    Command("image", "/image PATH|URL…", "send pictures with the next question", _image, True),
    Command("images", "/images [remove N]", "list the pictures, or take one out", _images),
    Command("paste", "/paste", "take the picture on the clipboard", _paste),
    Command("system", "/system [TEXT|none]", "show or set the system prompt", _system),
    Command("set", "/set [NAME VALUE]", "show or set temperature, top-p, seed …", _set),
    Command("regen", "/regen", "answer the last question again", _regen),
    Command("edit", "/edit [TEXT]", "change the last question and ask it again", _edit),
    Command("undo", "/undo", "take the last question and its answer back", _undo),
    Command("clear", "/clear", "forget all turns and pictures", _clear),
    Command("history", "/history", "the turns, and how full the context is", _history, False, True),
    Command("save", "/save [FILE|NAME]", "keep the chat under a name, or in one file", _save, True),
    Command("load", "/load FILE|NAME", "go on with a saved chat", _load, True),
    Command(
        "sessions", "/sessions [delete NAME]", "list the saved chats, or delete one", _sessions
    ),
    Command("stats", "/stats", "what the answers have cost so far", _stats, False, True),
    Command("copy", "/copy", "copy the last answer to the clipboard", _copy),
    Command("help", "/help", "this list", _help),
    Command("exit", "/exit", "end the chat", _exit),
)
_ALIASES = {"exit": ("/quit", "/q"), "help": ("/?", "/h")}


def _image_rows(chat: Chat) -> Iterator[tuple[str, ...]]:
    number = 0
    session = chat.session
    for turn_number, turn in enumerate(session.conversation.turns, len(session.forgotten) + 1):
        for picture in turn.user.images:
            number += 1
            yield str(number), described(picture), f"turn {turn_number}"
    for picture in session.queued:
        number += 1
        yield str(number), described(picture), "waits for the next question"


def _sources(argument: str) -> list[str]:
    """One path with spaces, or several words as a shell reads them."""
    if os.path.exists(os.path.expanduser(argument)):
        return [argument]
    return _words(shlex.shlex(argument, posix=True), argument)


def _stop_texts(text: str) -> tuple[str, ...]:
    """The words of a line; a backslash is itself, but `\\n` a line break."""
    words = shlex.shlex(text, posix=True)
    words.escape = ""
    return tuple(word.replace("\\n", "\n") for word in _words(words, text))


def _words(words: shlex.shlex, text: str) -> list[str]:
    words.whitespace_split, words.commenters = True, ""
    try:
        return list(words)
    except ValueError:  # an apostrophe
        return [text]


def _setting(key: str, text: str) -> object:
    if text in _NONE and key in ("stop", "seed"):
        return () if key == "stop" else None
    if key == "stop":
        return _stop_texts(text)
    kind = float if key in ("temperature", "top_p") else int
    try:
        return kind(text)
    except ValueError:
        number = "a number" if kind is float else "a whole number"
        raise ConfigError(f"{key.replace('_', '-')} is {text!r}; it must be {number}") from None


def _shown_setting(value: object) -> str:
    if isinstance(value, tuple):
        return " ".join(shlex.quote(text) for text in value) or "none"
    return "none" if value is None else str(value)


def _last_turn(chat: Chat) -> Turn:
    turns = chat.session.conversation.turns
    if not turns:
        raise InvalidRequest("there is no question yet")
    return turns[-1]


def _turn_row(number: int, turn: Turn, forgotten: bool) -> tuple[str | Text, ...]:
    pictures = f" [{count(len(turn.user.images), 'picture')}]" if turn.user.images else ""
    answer = first_words(turn.answer) + (" (stopped)" if turn.interrupted else "")
    style = "bright_black" if forgotten else ""
    cells = (str(number), first_words(turn.user.text) + pictures, answer)
    return tuple(Text(printable(cell), style) for cell in cells)


def _gauge(chat: Chat) -> Text:
    """How much of the context the history takes, and what is kept for the answer."""
    session = chat.session
    size, context = session.size(), session.backend.status().context_length
    if size is None or not context:
        return Text("the server does not tell how full the context is", "dim")
    used = round(_GAUGE_CELLS * min(1.0, size.tokens / context))
    kept = round(_GAUGE_CELLS * session.params.max_new_tokens / context)
    free = max(0, _GAUGE_CELLS - used - kept)
    return Text.assemble(
        ("█" * used, "cyan"),
        ("░" * free, "dim"),
        ("▒" * (_GAUGE_CELLS - used - free), "dim"),
        (
            f" {size.tokens}/{context} tokens · {size.image_tokens} of them pictures · "
            f"{session.params.max_new_tokens} kept for the answer",
            "dim",
        ),
    )


def _saving(chat: Chat) -> Autosave:
    if chat.autosave is None:
        raise SessionError("this chat is not saved: there is no folder for sessions")
    return chat.autosave


def _path(argument: str) -> Path:
    return Path(os.path.expanduser(argument))


def _is_file(argument: str) -> bool:
    return (
        "/" in argument
        or os.sep in argument
        or argument.startswith("~")
        or (argument.endswith(".json"))
    )
