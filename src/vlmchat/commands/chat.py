"""`vlmchat chat`: one-shot questions, pipes and the interactive chat.

Options -> what is asked -> pictures -> model -> answers. Each step fails before the next, dearer
one begins. Everything heavy is imported inside functions.
"""

from __future__ import annotations

import gc
import logging
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from functools import partial
from typing import TYPE_CHECKING, TypeVar

import typer

from vlmchat.commands import sessions
from vlmchat.commands.exit import reporting
from vlmchat.commands.options import (
    ChatOptions,
    EngineOptions,
    FileOptions,
    FormOptions,
    ImageOptions,
    ModelOptions,
    OutputOptions,
    SamplingOptions,
    ServerOptions,
)
from vlmchat.commands.settings import given, state_path
from vlmchat.config import DEMO_MODEL
from vlmchat.errors import ConfigError, InvalidRequest, NoInput
from vlmchat.loading import Loading
from vlmchat.request import FinishReason

if TYPE_CHECKING:
    from rich.console import Console

    from vlmchat.config import EngineConfig, ModelConfig
    from vlmchat.engine.engine import Engine
    from vlmchat.json_output import JsonPrinter
    from vlmchat.output import TextPrinter
    from vlmchat.request import Backend, Status
    from vlmchat.session import ChatSession, Reply

    AnyPrinter = TypeVar("AnyPrinter", TextPrinter, JsonPrinter)


def chat(
    ctx: typer.Context,
    asked: ChatOptions,
    model: ModelOptions,
    engine_options: EngineOptions,
    sampling: SamplingOptions,
    form: FormOptions,
    images: ImageOptions,
    output: OutputOptions,
    server: ServerOptions,
    file: FileOptions,
) -> None:
    """Chat about pictures.

    Without a question this is an interactive chat; with -p, or with a question on stdin, the
    answer is printed and that is all.
    """
    with reporting(as_json=output.as_json, debug=output.debug):
        if sampling.logprobs is not None and not output.as_json:
            raise ConfigError("--logprobs goes with --json")
        questions = read_questions(asked, output)
        params, config = replace(sampling.build(), grammar=form.build()), model.build()
        limits = engine_options.build(params.max_new_tokens)
        from rich.console import Console

        from vlmchat.images import ImageLoader
        from vlmchat.store import SessionStore

        out, err = Console(highlight=False), Console(stderr=True, highlight=False)
        loader = ImageLoader(images.build())
        pictures = [loader.load(source) for source in asked.images]
        store = SessionStore(state_path(), loader)
        saved = sessions.find(asked, store)
        if saved is not None and "model_path" not in given(ctx):
            config = replace(config, path=saved.model)
        kept = questions is None or asked.session or asked.resume
        autosave = sessions.autosave(asked, store, saved, config.path) if kept else None
        later = questions is None and not output.debug  # its log would run into the line
        opened = open_backend(ctx, server, config, limits, err, later=later, debug=output.debug)
        with closing(opened) as engine:
            if autosave is not None and server.server is not None:
                autosave.model = engine.status().model
            session = sessions.begin(engine, params, asked.system, saved, given(ctx))
            session.on_change = autosave
            for picture in pictures:
                session.attach(picture)
            if questions is not None and saved is not None:
                sessions.tell_lost(saved)
            if questions is None:
                from vlmchat.repl import Repl

                printer = text_printer(output, out, out, engine, stats=True)
                history = state_path() / "history"
                loading = engine if isinstance(engine, Loading) else None
                repl = Repl(
                    *(session, loader, printer, autosave, out, os.environ, history),
                    loading=loading,
                )
                repl.run(saved)
            elif output.as_json:
                ask_all(session, questions, json_printer(output, engine))
            else:
                show = partial(show_question, out, err, session)
                printer = text_printer(output, out, err, engine, stats=_somebody_watches())
                ask_all(session, questions, printer, show)


def open_backend(
    ctx: typer.Context,
    server: ServerOptions,
    config: ModelConfig,
    limits: EngineConfig,
    err: Console,
    *,
    debug: bool,
    later: bool = False,
) -> Backend:
    """Whoever answers: the engine with its model, or the server that was asked for.

    later: the model is loaded once the chat has begun.
    """
    if server.server is None:
        return load_later(config, limits, err) if later else load(config, limits, err, debug=debug)
    options = {param.name: param.opts[0] for param in ctx.command.params}
    here = {f.name for group in (ModelOptions, EngineOptions) for f in fields(group)}
    for name in given(ctx) & here - {"model_path"}:
        raise ConfigError(f"{options[name]} is for a model here; it does not go with --server")
    from vlmchat.client import Client

    model = config.path if "model_path" in given(ctx) else None
    return Client(server.server, server.api_key, model, server.server_timeout)


def load(config: ModelConfig, limits: EngineConfig, err: Console, *, debug: bool) -> Engine:
    """The engine with its model; its stages are shown on `err` while they last."""
    with showing_stages(err, debug=debug) as show:
        from vlmchat.engine.engine import Engine

        return Engine.load(config, show, limits)


def load_later(config: ModelConfig, limits: EngineConfig, err: Console) -> Backend:
    """The same, while somebody types already. What is to be downloaded is downloaded before.

    Raises ModelNotFound, UnsupportedModel, DiskFull and NetworkError at once.
    """
    if not _all_here(config, err):
        return load(config, limits, err, debug=False)
    _hush(debug=False)

    def load_quietly(progress: Callable[[str], None]) -> Engine:
        with _no_garbage():
            from vlmchat.engine.engine import Engine

            engine = Engine.load(config, progress, limits)
        engine.warm_up()
        return engine

    return Loading(config.path, load_quietly)


def _all_here(config: ModelConfig, err: Console) -> bool:
    """Whether loading needs nothing but the checkpoint's own files; these are here afterwards."""
    if config.path == DEMO_MODEL:
        return True
    from vlmchat.engine.checkpoint import Layout, layout_of
    from vlmchat.engine.hub import find_checkpoint, read_config
    from vlmchat.engine.shapes import find_shape

    if find_shape(config.path):
        return True
    with showing_stages(err, debug=False) as show:
        directory = find_checkpoint(config.path, config.revision, show)
    return layout_of(directory, read_config(directory)) is Layout.HUGGING_FACE


def _hush(*, debug: bool) -> None:
    if debug:
        logging.getLogger("vlmchat").setLevel(logging.DEBUG)
        logging.basicConfig(format="%(name)s: %(message)s")
    else:
        warnings.simplefilter("ignore")  # libraries' words to developers
        logging.disable(logging.WARNING)


@contextmanager
def _no_garbage() -> Iterator[None]:
    gc.disable()  # a fifth of the time that imports take goes into finding no garbage
    try:
        yield
    finally:
        gc.enable()
        gc.freeze()  # what is loaded stays


@contextmanager
def showing_stages(err: Console, *, debug: bool) -> Iterator[Callable[[str], None]]:
    """Gives a function that shows on `err` what is being done, until the `with` ends."""
    _hush(debug=debug)
    from rich.markup import escape

    status = err.status("starting")

    def show(stage: str) -> None:
        if stage.startswith(("downloading", "note: ")):  # to stay; a download draws its own bar
            status.stop()
            err.print(stage, markup=False, soft_wrap=True)
        elif _somebody_watches():
            status.update(escape(stage))
            status.start()

    show("starting")
    try:
        with _no_garbage():
            yield show
    finally:
        status.stop()


def _somebody_watches() -> bool:
    """Whether stderr is a terminal in fact: colours may be forced into a file."""
    return sys.stderr is not None and sys.stderr.isatty()


def text_printer(
    output: OutputOptions, out: Console, err: Console, engine: Backend, *, stats: bool
) -> TextPrinter:
    """Prints answers for people."""
    from vlmchat.output import TextPrinter

    printer = TextPrinter(out, err, markdown=output.markdown, stats=stats)
    return _with_prompt(printer, engine) if output.debug else printer


def json_printer(output: OutputOptions, engine: Backend) -> JsonPrinter:
    """Prints answers for programs."""
    from vlmchat.json_output import JsonPrinter

    printer = JsonPrinter(sys.stdout, stream_deltas=output.stream)
    return _with_prompt(printer, engine) if output.debug else printer


def _with_prompt(printer: AnyPrinter, engine: Backend) -> AnyPrinter:
    """The printer; after each answer it shows the prompt, as the model saw it, on stderr.

    A server does not tell that.
    """
    render = getattr(engine, "render", None)
    if render is None:
        return printer
    answer = printer.answer

    def answer_and_prompt(reply: Reply, status: Status) -> None:
        answer(reply, status)
        print(render(reply.conversation), file=sys.stderr)

    printer.answer = answer_and_prompt  # type: ignore[method-assign]
    return printer


def ask_all(
    session: ChatSession,
    questions: tuple[str, ...],
    printer: TextPrinter | JsonPrinter,
    before: Callable[[str], None] = lambda question: None,
) -> None:
    """One turn for each question. Ctrl-C ends the run once what was said is out."""
    from vlmchat.ctrl_c import CtrlC

    for question in questions:
        before(question)
        with CtrlC() as ctrl_c:
            reply = session.ask(question)
            ctrl_c.stops(reply)
            printer.answer(reply, session.backend.status())
        if reply.finish_reason is FinishReason.CANCELLED:
            raise KeyboardInterrupt


def show_question(out: Console, err: Console, session: ChatSession, question: str) -> None:
    """At a terminal: the pictures that go with the question, and the question."""
    from rich.text import Text

    from vlmchat.terminal_image import show

    if out.is_terminal and _somebody_watches():
        for picture in session.queued:
            show(picture, err, os.environ)
        err.print(Text(f"> {question}", "bold"))


def read_questions(asked: ChatOptions, output: OutputOptions) -> tuple[str, ...] | None:
    """What to ask, from -p or stdin; None for an interactive chat.

    Raises ConfigError when options contradict each other, NoInput when there is no question.
    """
    if output.stream and not output.as_json:
        raise ConfigError("--stream goes with --json; plain answers are streamed anyway")
    if asked.session and asked.resume:
        raise ConfigError("--session and --continue both name a session; choose one")
    at_terminal = sys.stdin is not None and sys.stdin.isatty()
    pictures_on_stdin = asked.images.count("-")
    if pictures_on_stdin > 1:
        raise ConfigError("--image - is given twice; stdin holds one picture only")
    if pictures_on_stdin and at_terminal:
        raise ConfigError("--image - reads a picture from stdin, which is a terminal; pipe one in")
    if any(not prompt.strip() for prompt in asked.prompts):
        raise NoInput("there is no question: -p is empty")
    if asked.prompts:
        return tuple(_as_text(prompt) for prompt in asked.prompts)
    if pictures_on_stdin:
        raise ConfigError("stdin holds the picture (--image -); give the question with -p")
    if not at_terminal:
        return (_question_on_stdin(),)
    if output.as_json or not sys.stdout.isatty():
        raise ConfigError(
            "an interactive chat needs a terminal; give the question with -p or stdin"
        )
    return None


def _as_text(argument: str) -> str:
    """An argument that is not text in this locale, read as UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        return os.fsencode(argument).decode("utf-8", "replace")
    return argument


def _question_on_stdin() -> str:
    try:
        question = sys.stdin.buffer.read().decode().strip() if sys.stdin is not None else ""
    except UnicodeDecodeError:
        raise InvalidRequest(
            "stdin is not UTF-8 text; pipe a picture in with --image - and ask with -p"
        ) from None
    if not question:
        raise NoInput("there is no question: stdin is empty; ask with -p, or pipe a question in")
    return question
