"""`vlmchat web`: a chat about pictures in the browser.

Options -> whose models -> page -> socket -> server. Everything heavy is imported inside functions.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import fields, replace
from typing import TYPE_CHECKING

import typer

from vlmchat.commands.chat import load
from vlmchat.commands.exit import reporting
from vlmchat.commands.options import (
    EngineOptions,
    FileOptions,
    ImageOptions,
    ModelOptions,
    PageOptions,
    ServerOptions,
)
from vlmchat.commands.settings import given
from vlmchat.errors import ConfigError

if TYPE_CHECKING:
    import socket

    from starlette.types import ASGIApp

    from vlmchat.web.models import Models
    from vlmchat.web.moderation import Moderation
    from vlmchat.web.person import People

ANSWER_TOKENS = 1024  # the most that the page's slider gives
SLOTS = 4  # conversations that go on at once and keep what was computed of them


def web(
    ctx: typer.Context,
    page: PageOptions,
    model: ModelOptions,
    engine: EngineOptions,
    server: ServerOptions,
    images: ImageOptions,
    file: FileOptions,
) -> None:
    """Chat about pictures in the browser.

    With --model-path the model runs in this process; with --server another one answers; without
    either, the workers of the controller do.
    """
    with reporting(as_json=page.as_json, debug=page.debug):
        _check(ctx, server, page)
        from vlmchat.server.serve import bind

        moderation = _moderation(page)
        with (
            bind(page.host, page.port) as sock,
            _folder_for_uploads(),
            closing(_models(ctx, page, model, engine, server)) as models,
        ):
            _run(page, sock, models, moderation, images)


def _check(ctx: typer.Context, server: ServerOptions, page: PageOptions) -> None:
    """Raises ConfigError for options that contradict each other."""
    of_engine = {f.name for group in (ModelOptions, EngineOptions) for f in fields(group)}
    options = {param.name: param.opts[0] for param in ctx.command.params}
    set_here = given(ctx)
    if "model_path" not in set_here:
        for name in sorted(set_here & of_engine):
            raise ConfigError(f"{options[name]} is for a model here; give --model-path with it")
    elif server.server is not None:
        raise ConfigError("--model-path and --server are both given; choose one")
    elif "controller_url" in set_here:
        raise ConfigError("--model-path and --controller-url are both given; choose one")
    if page.moderate and page.moderation_url is None:
        raise ConfigError("--moderate needs --moderation-url, the address of the service")


def _models(
    ctx: typer.Context,
    page: PageOptions,
    model: ModelOptions,
    engine: EngineOptions,
    server: ServerOptions,
) -> Models:
    from vlmchat.web.models import OneModel, ServedModels

    if "model_path" not in given(ctx):
        url = server.server or page.controller_url
        keep = page.model_list_mode == "once"
        ours = server.server is None
        timeout_s = server.server_timeout
        return ServedModels(url, server.api_key, timeout_s, keep=keep, controller=ours)
    from rich.console import Console

    limits = engine.build(ANSWER_TOKENS)
    if limits.max_num_seqs is None:
        limits = replace(limits, max_num_seqs=SLOTS)
    backend = load(model.build(), limits, Console(stderr=True, highlight=False), debug=page.debug)
    return OneModel(backend.status().model, backend)


def _moderation(page: PageOptions) -> Moderation | None:
    if not page.moderate or page.moderation_url is None:
        return None
    from vlmchat.web.moderation import Moderation

    return Moderation(page.moderation_url, page.moderation_key)


@contextmanager
def _folder_for_uploads() -> Iterator[None]:
    """One of this process alone, gone with it; Gradio, which reads these, is told to be quiet."""
    folder = tempfile.mkdtemp(prefix="vlmchat-web-")
    os.environ["GRADIO_TEMP_DIR"] = folder
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _run(
    options: PageOptions,
    sock: socket.socket,
    models: Models,
    moderation: Moderation | None,
    images: ImageOptions,
) -> None:
    warnings.simplefilter("ignore")  # libraries' words to developers
    logging.basicConfig(level=logging.WARNING, format="vlmchat: %(message)s", stream=sys.stderr)
    from vlmchat.images import ImageLoader
    from vlmchat.server.pictures import Pictures
    from vlmchat.server.serve import is_loopback
    from vlmchat.web import page
    from vlmchat.web.log import ConversationLog
    from vlmchat.web.person import MAX_WAITING, People
    from vlmchat.web.site import site

    policy = replace(images.build(), allow_local_files=False)
    loader, pictures = ImageLoader(policy), Pictures(policy, MAX_WAITING)
    people = People(loader)
    chosen = page.PageOptions(options.concurrency_count, options.embed)
    log = ConversationLog(options.log_dir) if options.log_dir is not None else None
    only_local = is_loopback(sock) and not options.share
    answers = options.concurrency_count

    def build() -> ASGIApp:
        whole = page.Page(models, people, loader, pictures, chosen, log, moderation)
        return site(
            whole, people, policy, answers=answers, only_local=only_local, embed=options.embed
        )

    asyncio.run(_serve(build, sock, people, options))


async def _serve(
    build: Callable[[], ASGIApp], sock: socket.socket, people: People, options: PageOptions
) -> None:
    """build: what is served; called here, because Gradio opens loops where none runs."""
    from vlmchat.server import serve

    app = build()

    async def drain() -> None:
        people.close()
        # Pages that are open still are cut off; uvicorn would print a stack for each.
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)

    server = serve.Server(app, drain)
    server.config.lifespan = "on"
    server.config.timeout_graceful_shutdown = 1

    async def announce() -> None:
        while not server.started:
            await asyncio.sleep(0.01)
        await asyncio.to_thread(_announce, sock, options)

    beside = asyncio.create_task(announce())
    try:
        await server.run_on(sock)
    finally:
        beside.cancel()
        await asyncio.wait([beside])


def _announce(sock: socket.socket, options: PageOptions) -> None:
    """Where the page is, on stdout; on stderr what to heed."""
    from vlmchat.server import serve

    port = serve.port_of(sock)
    url = serve.url_of(options.host, port)
    ready = {"type": "ready", "role": "web", "url": url, "port": port}
    if options.share:
        ready["share"] = _share(port)
    if options.as_json:
        print(json.dumps(ready), flush=True)
    else:
        print(f"page at {url}", flush=True)
        if options.share:
            print(f"public at {ready['share']}", flush=True)
    if not serve.is_loopback(sock) or options.share:
        print(
            f"vlmchat: warning: everyone who can reach {'it' if options.share else options.host} "
            "may use this page",
            file=sys.stderr,
        )


def _share(port: int) -> str:
    """A public address, by Gradio's tunnel."""
    import secrets

    from gradio.networking import setup_tunnel

    try:
        _check_tunnel()
        return str(setup_tunnel("127.0.0.1", port, secrets.token_urlsafe(32), None, None))
    except Exception as error:  # whatever the download and the start of its tunnel may raise
        told = " ".join(str(error).split())[:300] or type(error).__name__
        print(f"vlmchat: warning: --share failed: {told}", file=sys.stderr)
        return "no address: the tunnel could not be made"


def _check_tunnel() -> None:
    """Bring the tunnel's program, and see that it is the one that Gradio's release names.

    Gradio compares it only right after its download, and leaves there what it has refused: the
    next start would run that. Raises ConfigError.
    """
    from hashlib import sha256
    from pathlib import Path

    from gradio import tunneling

    path, known = Path(tunneling.BINARY_PATH), tunneling.CHECKSUMS.get(tunneling.BINARY_URL)
    if known is None:
        raise ConfigError("the tunnel's program for this machine has no known checksum")
    if not path.exists():
        print(f"vlmchat: --share brings {tunneling.BINARY_URL} (SHA-256 {known})", file=sys.stderr)
        tunneling.Tunnel.download_binary()
    if sha256(path.read_bytes()).hexdigest() != known:
        raise ConfigError(f"{path} is not the tunnel's program that it should be; remove it")
