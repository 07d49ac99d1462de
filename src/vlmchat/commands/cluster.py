"""`vlmchat cluster`: the worker on Ray Serve; up, status, scale, down.

Options -> a plan -> `cluster/deploy`. ray is an extra, and it, like everything heavy, is imported
inside functions.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import typer

from vlmchat.commands.cluster_models import Entry, ReplicaOptions, digest, read_models, say
from vlmchat.commands.exit import reporting
from vlmchat.commands.options import (
    ClientOptions,
    EngineOptions,
    FileOptions,
    GroupedCommand,
    ImageOptions,
    ModelOptions,
    grouped,
)
from vlmchat.commands.settings import ALIASES
from vlmchat.commands.worker import LimitOptions, warn_open
from vlmchat.errors import ConfigError

if TYPE_CHECKING:
    from vlmchat.cluster.deploy import Standing
    from vlmchat.cluster.plan import ClusterPlan, ModelPlan

_Address = Annotated[
    str | None, typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster.")
]
_Json = Annotated[bool, typer.Option("--json", help="As one JSON object.")]
_Debug = Annotated[bool, typer.Option("--debug", help="Show where errors arose.")]

cluster = typer.Typer(help="Serve models on a Ray cluster.", rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class ClusterOptions:
    """Where it runs."""

    panel: ClassVar = "Cluster"
    file: Annotated[
        Path | None,
        typer.Option(
            "--file",
            metavar="FILE",
            help="Models in YAML: a list 'models' of options as they are here, without dashes.",
        ),
    ] = None
    address: Annotated[
        str | None,
        typer.Option(
            "--address",
            metavar="HOST:PORT",
            help="The Ray cluster; auto: the one of RAY_ADDRESS or of this machine; unset: that "
            "one, or if there is none, one that runs as long as this command.",
        ),
    ] = None
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=1, max=65535, help="For HTTP.")
    ] = 21001
    proxies: Annotated[
        Literal["head", "every-node"],
        typer.Option("--proxies", help="Where HTTP is answered: on Ray's head, or on every node."),
    ] = "head"
    fronts: Annotated[
        int,
        typer.Option(
            "--fronts", metavar="COUNT", min=1, help="Processes that carry answers to clients."
        ),
    ] = 1
    timeout: Annotated[
        float,
        typer.Option(
            "--timeout", metavar="SECONDS", min=1, help="Until all must be ready, loading included."
        ),
    ] = 1800.0
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="When ready, say so as a JSON object.")
    ] = False
    debug: Annotated[
        bool, typer.Option("--debug/--no-debug", help="Log more, and where errors arose.")
    ] = False


def up(
    ctx: typer.Context,
    cluster: ClusterOptions,
    replicas: ReplicaOptions,
    model: ModelOptions,
    engine: EngineOptions,
    limits: LimitOptions,
    access: ClientOptions,
    images: ImageOptions,
    files: FileOptions,
) -> None:
    """Serve models on Ray, one address for all; once more: change what runs, losing no request.

    On a cluster that is there this returns when all replicas are ready. Where there is none it
    begins one on this machine, and stays until Ctrl-C.
    """
    with reporting(as_json=cluster.as_json, debug=cluster.debug):
        base = Entry(model, engine, limits, images, replicas)
        entries = read_models(base, cluster.file, ctx.meta.get(ALIASES, {}))
        for entry in entries:  # what is wrong in them is told before Ray is asked
            entry.model.build(), entry.engine.build(), entry.replicas.scale(1)
        deploy = _ray_serve()
        own = deploy.connect(_told(cluster.address), start=True)
        try:
            plans = [entry.plan(deploy.has_gpus()) for entry in entries]
            plan = _plan(plans, cluster, limits, access)
            url = deploy.deploy(plan)
            deploy.await_ready(cluster.timeout, say)
            _announce(url, plan, own, as_json=cluster.as_json)
            if own:
                deploy.stay()
        finally:
            deploy.leave(take_down=own)


def status(address: _Address = None, as_json: _Json = False, debug: _Debug = False) -> None:
    """Show what of vlmchat runs on a Ray cluster."""
    with reporting(as_json=as_json, debug=debug), _on(address) as deploy:
        _show(deploy.standing(), as_json=as_json)


def scale(
    model_name: Annotated[
        str | None,
        typer.Option("--model-name", metavar="NAME", help="Which, where there are several."),
    ] = None,
    replicas: Annotated[
        int | None, typer.Option("--replicas", metavar="COUNT", min=1, help="So many.")
    ] = None,
    min_replicas: Annotated[
        int | None, typer.Option("--min-replicas", metavar="COUNT", min=1, help="At least.")
    ] = None,
    max_replicas: Annotated[
        int | None, typer.Option("--max-replicas", metavar="COUNT", min=1, help="At most.")
    ] = None,
    address: _Address = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1, help="Until it must be so.")
    ] = 1800.0,
    as_json: _Json = False,
    debug: _Debug = False,
) -> None:
    """Give a model another number of replicas; those that stay are not touched."""
    with reporting(as_json=as_json, debug=debug):
        if replicas is None and min_replicas is None and max_replicas is None:
            raise ConfigError("give --replicas, or --min-replicas and --max-replicas")
        wanted = ReplicaOptions(
            replicas=replicas, min_replicas=min_replicas, max_replicas=max_replicas
        ).scale(1)
        with _on(address) as deploy:
            deploy.scale(model_name, wanted.least, wanted.most)
            _show(deploy.await_ready(timeout, say), as_json=as_json)


def down(address: _Address = None, as_json: _Json = False, debug: _Debug = False) -> None:
    """End it; answers under way have their time. The Ray cluster itself stays."""
    with reporting(as_json=as_json, debug=debug), _on(address) as deploy:
        deploy.end()
        print(json.dumps({"type": "down"}) if as_json else "nothing of vlmchat runs there any more")


cluster.command("up", cls=GroupedCommand)(grouped(up))
cluster.command("status")(status)
cluster.command("scale")(scale)
cluster.command("down")(down)


def _plan(
    models: list[ModelPlan], cluster: ClusterOptions, limits: LimitOptions, access: ClientOptions
) -> ClusterPlan:
    from ipaddress import ip_address

    from vlmchat.cluster.plan import ClusterPlan
    from vlmchat.server.app import EdgePolicy, Keys

    keys = access.keys()
    try:
        host = "127.0.0.1" if access.host == "localhost" else access.host
        local = ip_address(host).is_loopback
    except ValueError:
        raise ConfigError(f"--host {access.host} is no address; give one, or 0.0.0.0") from None
    if not local and not keys:
        warn_open(access.host)
    edge = EdgePolicy(
        keys=Keys(keys),
        max_body_bytes=limits.max_body_bytes,
        max_held_bytes=limits.max_held_bytes,
        only_local=local and not keys,
    )
    return ClusterPlan(
        tuple(models),
        version=digest(*keys, repr((edge.max_body_bytes, edge.max_held_bytes, local))),
        host=host,
        port=cluster.port,
        every_node=cluster.proxies == "every-node",
        edge=edge,
        num_fronts=cluster.fronts,
    )


def _ray_serve() -> Any:
    """`cluster/deploy`, after Ray's settings. Raises ConfigError where ray is not installed."""
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    try:
        from vlmchat.cluster import deploy
    except ImportError as error:
        raise ConfigError(
            f"this needs Ray Serve, which is an extra: pip install 'vlmchat[cluster]' ({error})"
        ) from None
    return deploy


def _told(address: str | None) -> str | None:
    """Where Ray is said to be: there it has to be then."""
    return address or os.environ.get("RAY_ADDRESS") or None


@contextmanager
def _on(address: str | None) -> Iterator[Any]:
    """`cluster/deploy`, connected. Raises ConfigError, NetworkError."""
    deploy = _ray_serve()
    deploy.connect(_told(address))
    try:
        yield deploy
    finally:
        deploy.leave()


def _announce(url: str, plan: ClusterPlan, own: bool, *, as_json: bool) -> None:
    names = [model.name for model in plan.models]
    if as_json:
        said = {"type": "ready", "role": "cluster", "url": url, "port": plan.port, "models": names}
        print(json.dumps(said), flush=True)
    else:
        print(f"cluster at {url} serves {', '.join(names)}", flush=True)


def _show(now: Standing, *, as_json: bool) -> None:
    models = [
        {
            "name": model.name,
            "replicas": now.replicas.get(model.deployment, {}),
            "min_replicas": model.scale.least,
            "max_replicas": model.scale.most,
            "gpus_per_replica": model.num_gpus,
        }
        for model in now.plan.models
    ]
    if as_json:
        said = {"type": "status", "state": now.state, "url": now.url, "models": models}
        print(json.dumps({**said, "message": now.message}))
        return
    print(f"{now.state.lower()} at {now.url}" + (f": {now.message}" if now.message else ""))
    for model in now.plan.models:
        by_state = now.replicas.get(model.deployment, {})
        states = ", ".join(f"{count} {state.lower()}" for state, count in by_state.items())
        least, most = model.scale.least, model.scale.most
        bounds = f"{least}" if least == most else f"{least} to {most}"
        print(f"{model.name}: {states or 'no replicas'}; wanted {bounds}")
