"""`vlmchat batch`: a file of requests, or a folder of pictures, answered many at once.

Options -> what is asked -> what is answered already -> model -> answers. Each step fails before
the next, dearer one begins. Everything heavy is imported inside functions.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, nullcontext
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar

import typer

from vlmchat.commands.chat import open_backend
from vlmchat.commands.exit import reporting
from vlmchat.commands.options import (
    EngineOptions,
    FileOptions,
    ImageOptions,
    ModelOptions,
    SamplingOptions,
    ServerOptions,
)
from vlmchat.errors import ConfigError, NoInput

if TYPE_CHECKING:
    from rich.console import Console

    from vlmchat.batch import Request, Survey
    from vlmchat.batch_answers import Answers, AnswersFile
    from vlmchat.request import Status

SLOTS = 8  # answers at once, where nobody says how many


@dataclass(frozen=True, slots=True)
class BatchOptions:
    """What is asked, and where the answers go."""

    panel: ClassVar = "Batch"
    requests: Annotated[
        tuple[str, ...],
        typer.Argument(
            metavar="[REQUESTS.jsonl]",
            help="The requests, one JSON object a line; '-' is stdin. With --image: more pictures.",
            show_default=False,
        ),
    ] = ()
    output: Annotated[
        str | None,
        typer.Option(
            "--output",
            "-o",
            metavar="FILE",
            help="Where the answers go, one line each; '-' is stdout. A file that holds some of "
            "them already is gone on with.",
        ),
    ] = None
    images: Annotated[
        tuple[str, ...],
        typer.Option(
            "--image",
            metavar="PATH|URL|PATTERN",
            help="Ask about each of these pictures; '**' in a pattern looks into folders; "
            "repeatable.",
        ),
    ] = ()
    prompt: Annotated[
        str | None,
        typer.Option("--prompt", "-p", metavar="TEXT", help="The question, with --image."),
    ] = None
    system: Annotated[
        str, typer.Option("--system", metavar="TEXT", help="For requests without a system prompt.")
    ] = ""
    concurrency: Annotated[
        int | None,
        typer.Option(
            "--concurrency",
            metavar="COUNT",
            min=1,
            help=f"Questions asked at once; unset: one more than the engine answers at once, which "
            f"is --max-num-seqs or {SLOTS}; with --server {SLOTS}.",
        ),
    ] = None
    retry_failed: Annotated[
        bool, typer.Option("--retry-failed", help="Ask again what has failed in an earlier run.")
    ] = False
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="At the end one JSON object on stdout.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug/--no-debug", help="Show where errors arose.")] = (
        False
    )


def batch(
    ctx: typer.Context,
    asked: BatchOptions,
    model: ModelOptions,
    engine: EngineOptions,
    sampling: SamplingOptions,
    images: ImageOptions,
    server: ServerOptions,
    file: FileOptions,
) -> None:
    """Answer many requests, many at once.

    REQUESTS.jsonl holds OpenAI's batch lines, or simple ones such as {"image": "a.jpg", "prompt":
    "What is it?"}. With --image and -p every picture gets the same question. A run that was
    stopped, however that was, is gone on with by the same command.
    """
    with reporting(as_json=asked.as_json, debug=asked.debug), ExitStack() as opened:
        output = _check(asked)
        params, config = sampling.build(), model.build()
        slots = asked.concurrency or engine.max_num_seqs or SLOTS
        limits = replace(engine.build(params.max_new_tokens), max_num_seqs=slots)
        from rich.console import Console

        from vlmchat.batch import Batch, Preparer
        from vlmchat.commands.batch_progress import Run
        from vlmchat.images import ImageLoader

        err = Console(stderr=True, highlight=False)
        source = _source(asked)
        answers, before = _answers(output, asked, opened)
        found = _survey(source, before, output, err)
        total, done = (found.total, found.done) if found else (None, 0)
        run = Run(err, output, total, done, before.failed)
        if not run.over:
            backend = open_backend(ctx, server, config, limits, err, debug=asked.debug)
            opened.enter_context(closing(backend))
            status = backend.status()
            width = asked.concurrency or _width(slots, status)
            prepare = Preparer(ImageLoader(images.build()), params, asked.system, source.folder)
            requests = (r for r in source.read() if r.id not in before.done)
            with run.shown(status.model):
                Batch(backend, prepare, answers, width, run.report).run(requests)
        run.end(as_json=asked.as_json)


def _width(slots: int, status: Status) -> int:
    """How many to ask at once: as many as there are slots, and one that waits for the next."""
    return min(slots, status.load.slots) + 1 if status.load else slots


def _check(asked: BatchOptions) -> str:
    """The output. Raises ConfigError, NoInput for options that do not go together."""
    if asked.output is None:
        raise ConfigError("-o is missing: where do the answers go? '-' is stdout")
    if asked.output == "-" and asked.as_json:
        raise ConfigError("--json and -o - both write to stdout; choose one")
    if not Path(asked.output).parent.is_dir():
        raise ConfigError(f"-o {asked.output}: there is no such folder")
    if asked.images:
        if not (asked.prompt or "").strip():
            raise NoInput("there is no question: --image goes with -p")
        return asked.output
    if asked.prompt is not None:
        raise ConfigError("-p goes with --image; requests in a file bring their own questions")
    if len(asked.requests) != 1:
        raise ConfigError("give one file of requests, or pictures with --image and -p")
    path, output = Path(asked.requests[0]), Path(asked.output)
    if path.exists() and output.exists() and path.samefile(output):
        raise ConfigError(f"{path} is both input and output; choose another output")
    return asked.output


@dataclass(frozen=True, slots=True)
class Source:
    """Where requests come from. read: from the first one on; twice only where `again`."""

    read: Callable[[], Iterator[Request]]
    folder: Path | None = None  # what relative paths in them are relative to
    again: bool = True


def _source(asked: BatchOptions) -> Source:
    from vlmchat.batch import expand, picture_requests, read_requests, unique

    if asked.images:
        pictures = expand((*asked.images, *asked.requests))
        return Source(lambda: picture_requests(pictures, asked.prompt or "", asked.system))
    if asked.requests[0] == "-":
        if sys.stdin is None or sys.stdin.isatty():
            raise NoInput("stdin is a terminal; pipe requests in, or give a file")
        return Source(lambda: unique(read_requests(sys.stdin.buffer)), Path.cwd(), again=False)
    path = Path(asked.requests[0])

    def read() -> Iterator[Request]:
        with path.open("rb") as file:
            yield from read_requests(file)

    try:
        path.open("rb").close()
    except OSError as error:
        raise NoInput(f"{path} cannot be read: {(error.strerror or '').lower()}") from None
    return Source(read, path.parent.absolute())


def _answers(
    output: str, asked: BatchOptions, opened: ExitStack
) -> tuple[Answers, AnswersFile | NothingBefore]:
    """Where answers go, and what is there already."""
    from vlmchat.batch_answers import AnswersFile, AnswersStream

    if output == "-":
        return AnswersStream(sys.stdout.buffer), NothingBefore()
    file = opened.enter_context(closing(AnswersFile(Path(output), retry_failed=asked.retry_failed)))
    return file, file


@dataclass(frozen=True, slots=True)
class NothingBefore:
    """No answers from earlier runs."""

    done: dict[str, str] = field(default_factory=dict)
    failed: int = 0


def _survey(
    source: Source, before: AnswersFile | NothingBefore, output: str, err: Console
) -> Survey | None:
    """What there is to do; None where that shows only in passing. Says what looks wrong."""
    from vlmchat.batch import survey

    if not source.again:
        return None
    with err.status("reading the requests") if err.is_terminal else nullcontext():
        found = survey(source.read(), before.done)
    if not found.total:
        raise NoInput("there are no requests")
    if found.changed:
        _note(
            err,
            f"{output}: {len(found.changed)} of its answers were made for other requests of the "
            f"same id ({found.changed[0]}, …); they stay. Choose another -o to ask anew",
        )
    if found.foreign:
        _note(err, f"{output}: {found.foreign} of its answers belong to none of these requests")
    return found


def _note(err: Console, message: str) -> None:
    err.print(f"note: {message}", markup=False, soft_wrap=True)
