"""`vlmchat controller`: parse, build, serve until a signal.

Everything heavier than the standard library is imported inside functions.
"""

from __future__ import annotations

import json
import logging
import sys
from typing import TYPE_CHECKING, Any

import typer

from vlmchat.commands.exit import reporting
from vlmchat.commands.options import AccessOptions, ControllerOptions, FileOptions

if TYPE_CHECKING:
    import socket

    from vlmchat.server.controller import Controller


def controller(
    ctx: typer.Context, files: FileOptions, access: AccessOptions, controller: ControllerOptions
) -> None:
    """Know workers, and give requests to them.

    Workers register here; clients ask here, as they would ask LLaVA's controller or OpenAI's API.
    When a worker fails in mid-answer, another one goes on with it.
    """
    with reporting(as_json=controller.as_json, debug=controller.debug):
        _run(access, controller)


def _run(access: AccessOptions, options: ControllerOptions) -> None:
    import asyncio

    from vlmchat.server import serve

    keys = access.keys()
    built = _build(access, options)
    sock = serve.bind(access.host, options.port)
    logging.basicConfig(level=logging.WARNING, format="vlmchat: %(message)s", stream=sys.stderr)
    asyncio.run(_serve(built, sock, keys, access, options))


def _build(access: AccessOptions, options: ControllerOptions) -> Controller:
    import random
    import time

    from vlmchat.server.controller import Controller
    from vlmchat.server.dispatch import chooser
    from vlmchat.server.failover import Limits
    from vlmchat.server.outgoing import LOOPBACK, AllowList, Outgoing
    from vlmchat.server.registry import Registry

    choose = chooser(options.dispatch_method, random.Random(), options.cache_margin)
    limits = Limits(
        first_token_s=options.first_token_timeout,
        token_s=options.token_timeout,
        patience_s=options.worker_patience,
    )
    return Controller(
        Registry(choose, time.monotonic),
        Outgoing(AllowList(options.allow_worker or LOOPBACK), access.registration_key),
        limits,
        dispatch_method=options.dispatch_method,
    )


def _announce(sock: socket.socket, access: AccessOptions, options: ControllerOptions) -> None:
    """Where it listens, on stdout; on stderr what to heed."""
    from vlmchat.server import serve

    port = serve.port_of(sock)
    url = serve.url_of(access.host, port)
    if options.as_json:
        ready = {"type": "ready", "role": "controller", "url": url, "port": port}
        print(json.dumps(ready), flush=True)
    else:
        print(f"controller at {url}", flush=True)
    if not serve.is_loopback(sock) and not access.keys():
        print(
            f"vlmchat: warning: anyone who can reach {access.host} port {port} may use this; "
            "--api-key sets a key",
            file=sys.stderr,
        )
    if options.allow_worker and access.registration_key is None:
        print(
            "vlmchat: warning: anyone at the addresses of --allow-worker may register a worker "
            "and see requests; --registration-key sets a key",
            file=sys.stderr,
        )


async def _serve(
    controller: Controller,
    sock: socket.socket,
    keys: tuple[str, ...],
    access: AccessOptions,
    options: ControllerOptions,
) -> None:
    import asyncio

    from vlmchat.server import serve
    from vlmchat.server.app import EdgePolicy, Keys

    policy = EdgePolicy(keys=Keys(keys), only_local=serve.is_loopback(sock) and not keys)
    own = (access.registration_key,) if access.registration_key else ()
    app = controller.app(policy, Keys(own), _log)
    server = serve.Server(app, lambda: controller.drain(options.drain_timeout))

    async def announce() -> None:
        while not server.started:  # from then on signals drain
            await asyncio.sleep(0.01)
        _announce(sock, access, options)

    beside = [asyncio.create_task(controller.run()), asyncio.create_task(announce())]
    try:
        await server.run_on(sock)
    finally:
        for task in beside:
            task.cancel()
        await asyncio.wait(beside)


def _log(record: dict[str, Any]) -> None:
    """One line for each request, on stderr; heart beats that are as they should be have none."""
    if record["path"] == "/receive_heart_beat" and record["status"] == 200:
        return
    print(json.dumps(record), file=sys.stderr, flush=True)
