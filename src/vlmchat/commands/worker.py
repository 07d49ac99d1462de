"""`vlmchat worker`: one model behind a port, registered with a controller.

Options -> socket -> server; the model loads while health is answered already. Everything heavy is
imported inside functions.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import re
import sys
import threading
import warnings
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from vlmchat.commands.exit import reporting
from vlmchat.commands.options import (
    AccessOptions,
    EngineOptions,
    FileOptions,
    ImageOptions,
    ModelOptions,
)

if TYPE_CHECKING:
    import socket

    from vlmchat.config import EngineConfig, ModelConfig
    from vlmchat.request import Backend
    from vlmchat.server.heartbeat import Heartbeat
    from vlmchat.server.worker import Worker


@dataclass(frozen=True, slots=True)
class WorkerOptions:
    """Where a worker listens, and to whom it reports."""

    panel: ClassVar = "Server"
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0 picks a free one.")
    ] = 21002
    worker_address: Annotated[
        str | None,
        typer.Option(
            "--worker-address",
            "--worker",
            metavar="URL",
            help="How the controller reaches this worker; unset: from --host and --port.",
        ),
    ] = None
    controller_address: Annotated[
        str,
        typer.Option(
            "--controller-address", "--controller", metavar="URL", help="Whom to register with."
        ),
    ] = "http://localhost:21001"
    register: Annotated[
        bool, typer.Option("--register/--no-register", help="Register with the controller.")
    ] = True
    model_name: Annotated[
        str | None,
        typer.Option(
            "--model-name",
            metavar="NAME",
            help="What clients call the model; unset: the last part of its path, or its name at "
            "--upstream.",
        ),
    ] = None
    upstream: Annotated[
        str | None,
        typer.Option(
            "--upstream",
            metavar="URL",
            help="Answer by this OpenAI-compatible server instead of loading a model.",
        ),
    ] = None
    upstream_key: Annotated[
        str | None, typer.Option("--upstream-key", metavar="KEY", help="The key that it wants.")
    ] = None
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="When ready, say so as a JSON object.")
    ] = False
    debug: Annotated[
        bool, typer.Option("--debug/--no-debug", help="Log more, and where errors arose.")
    ] = False
    multi_modal: Annotated[
        bool, typer.Option("--multi-modal", hidden=True, help="Without effect; LLaVA has it.")
    ] = False
    use_flash_attn: Annotated[
        bool,
        typer.Option(
            "--use-flash-attn/--no-use-flash-attn",
            help="Without effect: the fastest attention that torch has is used anyway.",
        ),
    ] = False


@dataclass(frozen=True, slots=True)
class LimitOptions:
    """How much a worker takes on."""

    panel: ClassVar = "Limits"
    concurrency: Annotated[
        int,
        typer.Option(
            "--limit-model-concurrency", metavar="COUNT", min=1, help="Answers at a time."
        ),
    ] = 5
    max_queue: Annotated[
        int,
        typer.Option(
            "--max-queue-requests", metavar="COUNT", min=0, help="Requests that may wait."
        ),
    ] = 128
    max_queue_tokens: Annotated[
        int,
        typer.Option(
            "--max-queue-tokens", metavar="TOKENS", min=1, help="Prompt tokens that may wait."
        ),
    ] = 262_144
    max_images: Annotated[
        int, typer.Option("--max-images", metavar="COUNT", min=0, help="Pictures in a request.")
    ] = 16
    max_body_bytes: Annotated[
        int, typer.Option("--max-body-bytes", metavar="BYTES", min=1, help="Largest request.")
    ] = 64 * 2**20
    max_held_bytes: Annotated[
        int,
        typer.Option(
            "--max-held-bytes", metavar="BYTES", min=1, help="All requests' bodies together."
        ),
    ] = 2**30
    stream_interval: Annotated[
        int,
        typer.Option(
            "--stream-interval", metavar="COUNT", min=1, help="Tokens between two events."
        ),
    ] = 1
    ping_interval: Annotated[
        float,
        typer.Option(
            "--sse-ping-interval",
            metavar="SECONDS",
            min=0.1,
            help="Silence after which a stream gets a comment.",
        ),
    ] = 10.0
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            metavar="SECONDS",
            min=0,
            help="After SIGTERM: how long running answers may take.",
        ),
    ] = 30.0


def worker(
    ctx: typer.Context,
    server: WorkerOptions,
    model: ModelOptions,
    engine: EngineOptions,
    limits: LimitOptions,
    access: AccessOptions,
    images: ImageOptions,
    file: FileOptions,
) -> None:
    """Serve a model: OpenAI's chat completions and LLaVA's worker endpoints."""
    with reporting(as_json=server.as_json, debug=server.debug):
        config, slots = model.build(), engine.build()
        if slots.max_num_seqs is None:  # as many prefixes are kept for reuse as are answered
            slots = replace(slots, max_num_seqs=2 * limits.concurrency)
        begin_logging(debug=server.debug)
        from vlmchat.server.app import EdgePolicy, Keys
        from vlmchat.server.serve import bind, is_loopback
        from vlmchat.server.worker import DECODERS, Worker, WorkerPolicy

        keys = access.keys()
        controller = Keys((access.registration_key,) if access.registration_key else ())
        with bind(access.host, server.port) as sock:
            if not is_loopback(sock) and not keys:
                warn_open(access.host)
            edge = EdgePolicy(
                keys=Keys(keys) | controller if keys else Keys(),
                max_body_bytes=limits.max_body_bytes,
                max_held_bytes=limits.max_held_bytes,
                only_local=is_loopback(sock) and not keys,
            )
            policy = WorkerPolicy(
                concurrency=limits.concurrency,
                max_waiting=limits.max_queue,
                max_waiting_tokens=limits.max_queue_tokens,
                max_images=limits.max_images,
                images=images.build(),
                decoders=limits.concurrency if server.upstream else DECODERS,
                ping_s=limits.ping_interval,
                stream_interval=limits.stream_interval,
                drain_s=limits.drain_timeout,
            )
            name, load = _loader(config, slots, server)
            trust = controller.__contains__ if keys else lambda client: server.register
            host = Worker(name, policy, edge, log_line, trusts=trust)
            asyncio.run(_serve(host, sock, server, access, load))


def name_of(path: str) -> str:
    """A model's name as LLaVA derives it: the path's last part, with the one before a checkpoint.

    `a/llava-v1.5-7b` is `llava-v1.5-7b`, `runs/llava/checkpoint-100` is `llava_checkpoint-100`.
    """
    parts = path.strip("/").split("/")
    if parts[-1].startswith("checkpoint-") and len(parts) > 1:
        return f"{parts[-2]}_{parts[-1]}"
    return parts[-1]


def begin_logging(*, debug: bool) -> None:
    """Warnings and errors to stderr; request records go there beside them, as JSON."""
    warnings.simplefilter("ignore")  # libraries' words to developers
    logging.basicConfig(format="vlmchat: %(levelname)s: %(message)s", level=logging.WARNING)
    logging.getLogger("vlmchat").setLevel(logging.DEBUG if debug else logging.INFO)


def log_line(record: dict[str, Any]) -> None:
    """One request, on one line."""
    with suppress(OSError, ValueError):  # nobody reads stderr any more
        print(json.dumps(record), file=sys.stderr, flush=True)


def warn_open(host: str) -> None:
    """Say that whoever reaches the port may ask."""
    print(
        f"vlmchat: warning: listening on {host} without a key: everyone who reaches this port may "
        "ask; give --api-key or --api-key-file",
        file=sys.stderr,
    )


def _loader(
    config: ModelConfig, slots: EngineConfig, server: WorkerOptions
) -> tuple[str, Callable[[], Backend]]:
    """The model's name for clients, and what gives its backend. Raises what `Upstream` does."""
    if server.upstream is not None:
        from vlmchat.server.upstream import Upstream

        upstream = Upstream(server.upstream, server.upstream_key, server.model_name)
        return server.model_name or upstream.status().model, lambda: upstream
    shown = ""

    def show(stage: str) -> None:
        nonlocal shown
        stage = re.split(" [╌━]", stage)[0]  # a log needs no bar that grows
        if stage != shown:
            shown = stage
            print(f"vlmchat: {stage}", file=sys.stderr, flush=True)

    def load() -> Backend:
        from vlmchat.engine.engine import Engine

        engine = Engine.load(config, show, slots)
        engine.warm_up().wait()
        return engine

    return server.model_name or name_of(config.path), load


async def _serve(
    host: Worker,
    sock: socket.socket,
    server: WorkerOptions,
    access: AccessOptions,
    load: Callable[[], Backend],
) -> None:
    """Listen, load, register, answer, drain. Raises what loading raises."""
    from vlmchat.server.heartbeat import Heartbeat, Registration
    from vlmchat.server.serve import Server, port_of, url_of

    url = url_of(access.host, port_of(sock))
    heartbeat = None
    if server.register:
        address = server.worker_address or url
        registration = Registration(server.controller_address, address, access.registration_key)
        heartbeat = Heartbeat(registration, host.status)
        host.changed = heartbeat.changed

    async def drain() -> None:
        await asyncio.gather(host.drain(), *([heartbeat.goodbye()] if heartbeat else []))

    http = Server(host.edge, drain)
    serving = asyncio.ensure_future(http.run_on(sock))
    beating: asyncio.Future[None] | None = None
    try:
        loading = in_thread(load)
        begun: list[asyncio.Future[Any]] = [serving, loading]
        await asyncio.wait(begun, return_when=asyncio.FIRST_COMPLETED)
        if loading.done():
            try:
                host.ready(loading.result(), resumes=server.upstream is None)
            except BaseException:
                http.stop()
                raise
            if heartbeat is not None:
                beating = asyncio.ensure_future(heartbeat.run())
            tell_ready(server.as_json, url, host.name)
    finally:
        await serving
        await _end(beating, heartbeat)
        host.close()


async def _end(beating: asyncio.Future[None] | None, heartbeat: Heartbeat | None) -> None:
    if beating is not None:
        beating.cancel()
        with suppress(asyncio.CancelledError):
            await beating
    if heartbeat is not None:
        await heartbeat.close()


def tell_ready(as_json: bool, url: str, model: str) -> None:
    """On stdout: where it listens."""
    port = int(url.rpartition(":")[2])
    said = {"type": "ready", "role": "worker", "url": url, "port": port, "model": model}
    said["pid"] = os.getpid()
    print(json.dumps(said) if as_json else f"worker at {url} serves {model}", flush=True)


def in_thread(load: Callable[[], Backend]) -> asyncio.Future[Backend]:
    """`load` in a thread that does not keep the process from ending."""
    loop = asyncio.get_running_loop()
    future: asyncio.Future[Backend] = loop.create_future()

    def tell(set_result: Callable[[Any], None], value: Any) -> None:
        if not future.done():
            set_result(value)

    def work() -> None:
        try:
            outcome = (future.set_result, load())
        except BaseException as error:
            outcome = (future.set_exception, error)  # type: ignore[assignment]
        with suppress(RuntimeError):  # the loop has ended meanwhile
            loop.call_soon_threadsafe(tell, *outcome)

    threading.Thread(target=work, name="vlmchat-load", daemon=True).start()
    return future
