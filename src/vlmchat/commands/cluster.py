"""`vlmchat cluster`: the worker on Ray Serve; up, status, scale, down.

Options and a YAML file -> a plan -> `cluster/deploy`. Here a replica's process finds how to load
its model. ray is an extra, and it, like everything heavy, is imported inside functions.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import (
    TYPE_CHECKING,
    Annotated,
    Any,
    ClassVar,
    Literal,
    get_args,
    get_origin,
    get_type_hints,
)

import typer

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
from vlmchat.commands.settings import ALIASES, checked, resolve_model
from vlmchat.commands.threads import cpu_quota, settle
from vlmchat.commands.worker import LimitOptions, name_of, warn_open
from vlmchat.config import EngineConfig, ModelConfig
from vlmchat.errors import ConfigError

if TYPE_CHECKING:
    from vlmchat.cluster.deploy import Standing
    from vlmchat.cluster.plan import ClusterPlan, ModelPlan, Scale
    from vlmchat.request import Backend

_LEAVING_S = 1.0  # between looks whether the application is still there
_POLL_S = 2.0

cluster = typer.Typer(help="Serve models on a Ray cluster.", rich_markup_mode=None)


@dataclass(frozen=True, slots=True)
class ReplicaOptions:
    """How many replicas a model has, and what each takes."""

    panel: ClassVar = "Replicas"
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
    replicas: Annotated[
        int | None,
        typer.Option("--replicas", metavar="COUNT", min=1, help="So many; unset: one."),
    ] = None
    min_replicas: Annotated[
        int | None,
        typer.Option("--min-replicas", metavar="COUNT", min=1, help="With less load, not fewer."),
    ] = None
    max_replicas: Annotated[
        int | None,
        typer.Option("--max-replicas", metavar="COUNT", min=1, help="With more load, not more."),
    ] = None
    target_ongoing: Annotated[
        float | None,
        typer.Option(
            "--target-ongoing-requests",
            metavar="COUNT",
            min=0.1,
            help="For each replica, by which their number is chosen; unset: 60 % of "
            "--limit-model-concurrency.",
        ),
    ] = None
    upscale_delay: Annotated[
        float,
        typer.Option(
            "--upscale-delay", metavar="SECONDS", min=0, help="Of load, until there are more."
        ),
    ] = 30.0
    downscale_delay: Annotated[
        float,
        typer.Option(
            "--downscale-delay", metavar="SECONDS", min=0, help="Of less, until there are fewer."
        ),
    ] = 600.0
    gpus: Annotated[
        float | None,
        typer.Option(
            "--gpus-per-replica",
            metavar="COUNT",
            min=0,
            help="A part of one is shared; unset: --tensor-parallel, if the cluster has any and "
            "--device is not cpu.",
        ),
    ] = None
    cpus: Annotated[
        float,
        typer.Option("--cpus-per-replica", metavar="COUNT", min=0, help="Threads of each, too."),
    ] = 1.0

    def scale(self, concurrency: int) -> Scale:
        """Raises ConfigError for bounds that contradict each other."""
        from vlmchat.cluster.plan import Scale

        if self.replicas is not None and (self.min_replicas or self.max_replicas):
            raise ConfigError(
                "--replicas is for a fixed number; leave out --min- or --max-replicas"
            )
        least = self.replicas or self.min_replicas or 1
        most = self.replicas or self.max_replicas or least
        if most < least:
            raise ConfigError(f"--max-replicas {most} is less than --min-replicas {least}")
        ongoing = self.target_ongoing or 0.6 * concurrency
        return Scale(least, most, ongoing, self.upscale_delay, self.downscale_delay)


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


@dataclass(frozen=True, slots=True)
class _Entry:
    """One model's options: the command line's, with those of its entry in the file above them."""

    model: ModelOptions
    engine: EngineOptions
    limits: LimitOptions
    images: ImageOptions
    replicas: ReplicaOptions

    def overlaid(self, where: str, entry: dict[str, Any], aliases: dict[str, str]) -> _Entry:
        """With the entry's values. Raises ConfigError, which names `where`."""
        groups = {field.name: getattr(self, field.name) for field in fields(self)}
        options = {
            flag[2:]: (group, name, kind)
            for group, value in groups.items()
            for name, kind, flags in _options(value)
            for flag in flags
        }
        for key, value in entry.items():
            name = str(key).replace("_", "-")
            if name not in options:
                close = get_close_matches(name, options, n=1)
                hint = f"; is it {close[0]!r}?" if close else ""
                raise ConfigError(f"{where}: unknown option {key!r}{hint}")
            group, field, kind = options[name]
            fit = _fitting(f"{where}: {key}", value, kind)
            if field in ("model_path", "model_base") and fit is not None:
                fit = resolve_model(fit, aliases)
            groups[group] = replace(groups[group], **{field: fit})
        return _Entry(**groups)

    def plan(self, has_gpus: bool) -> ModelPlan:
        """Raises ConfigError, and for --upstream what `Upstream` does."""
        from vlmchat.cluster.plan import ModelPlan
        from vlmchat.server.worker import DECODERS, WorkerPolicy

        own, limits = self.replicas, self.limits
        if own.upstream is not None:
            name, load, what = _upstream(own.upstream, own.upstream_key, own.model_name)
        else:
            config, slots = self.model.build(), self.engine.build()
            if slots.max_num_seqs is None:
                slots = replace(slots, max_num_seqs=2 * limits.concurrency)
            name, load = own.model_name or name_of(config.path), partial(load_engine, config, slots)
            what = repr((config, slots))
        policy = WorkerPolicy(
            concurrency=limits.concurrency,
            max_waiting=limits.max_queue,
            max_waiting_tokens=limits.max_queue_tokens,
            max_images=limits.max_images,
            images=self.images.build(),
            decoders=limits.concurrency if own.upstream else DECODERS,
            ping_s=limits.ping_interval,
            stream_interval=limits.stream_interval,
            drain_s=limits.drain_timeout,
        )
        on_gpu = has_gpus and own.upstream is None and self.model.device != "cpu"
        return ModelPlan(
            name=name,
            load=load,
            policy=policy,
            version=_digest(name, what, repr(policy)),
            scale=own.scale(limits.concurrency),
            num_cpus=own.cpus,
            num_gpus=float(on_gpu * self.model.tensor_parallel) if own.gpus is None else own.gpus,
            resumes=own.upstream is None,
        )


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
    with reporting(as_json=cluster.as_json, debug=cluster.debug), _ray():
        base = _Entry(model, engine, limits, images, replicas)
        entries = _entries(base, cluster.file, ctx.meta.get(ALIASES, {}))
        for entry in entries:  # what is wrong in them is told before Ray is asked
            entry.model.build(), entry.engine.build(), entry.replicas.scale(1)
        from vlmchat.cluster import deploy

        own = deploy.connect(cluster.address, start=True)
        try:
            plan = _plan(
                [entry.plan(deploy.has_gpus()) for entry in entries], cluster, limits, access
            )
            url = deploy.deploy(plan)
            deploy.await_ready(cluster.timeout, _say)
            _announce(url, plan, own, as_json=cluster.as_json)
            if own:
                deploy.stay(_POLL_S)
        finally:
            deploy.leave(take_down=own)


def status(
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where errors arose.")] = False,
) -> None:
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
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster.")
    ] = None,
    timeout: Annotated[
        float, typer.Option("--timeout", metavar="SECONDS", min=1, help="Until it must be so.")
    ] = 1800.0,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where errors arose.")] = False,
) -> None:
    """Give a model another number of replicas; those that stay are not touched."""
    with reporting(as_json=as_json, debug=debug):
        if replicas is None and min_replicas is None and max_replicas is None:
            raise ConfigError("give --replicas, or --min-replicas and --max-replicas")
        options = ReplicaOptions(
            replicas=replicas, min_replicas=min_replicas, max_replicas=max_replicas
        )
        with _ray():
            wanted = options.scale(1)
        with _on(address) as deploy:
            deploy.scale(model_name, wanted.least, wanted.most)
            _show(deploy.await_ready(timeout, _say), as_json=as_json)


def down(
    address: Annotated[
        str | None, typer.Option("--address", metavar="HOST:PORT", help="The Ray cluster.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="As one JSON object.")] = False,
    debug: Annotated[bool, typer.Option("--debug", help="Show where errors arose.")] = False,
) -> None:
    """End it; answers under way have their time. The Ray cluster itself stays."""
    with reporting(as_json=as_json, debug=debug), _on(address) as deploy:
        deploy.take_down()
        print(json.dumps({"type": "down"}) if as_json else "nothing of vlmchat runs there any more")


cluster.command("up", cls=GroupedCommand)(grouped(up))
cluster.command("status")(status)
cluster.command("scale")(scale)
cluster.command("down")(down)


def load_engine(config: ModelConfig, slots: EngineConfig) -> Backend:
    """In a replica: the engine, loaded and warm."""
    settle(os.environ, cpu_quota())
    from vlmchat.engine.engine import Engine

    engine = Engine.load(config, _say, slots)
    engine.warm_up().wait()
    return engine


def load_upstream(url: str, key: str | None, name: str | None) -> Backend:
    """In a replica: another server as a backend."""
    from vlmchat.server.upstream import Upstream

    return Upstream(url, key, name)


def _upstream(url: str, key: str | None, name: str | None) -> tuple[str, partial[Backend], str]:
    """Its name for clients, its loader, and what tells it from others."""
    asked = load_upstream(url, key, name)
    try:
        shown = name or asked.status().model
    finally:
        asked.close()
    return shown, partial(load_upstream, url, key, name), repr((url, key, name))


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
        version=_digest(*keys, repr(limits), str(local)),
        host=host,
        port=cluster.port,
        every_node=cluster.proxies == "every-node",
        edge=edge,
        max_waiting=limits.max_queue,
        num_fronts=cluster.fronts,
    )


def _entries(base: _Entry, file: Path | None, aliases: dict[str, str]) -> list[_Entry]:
    """One for each model. Raises ConfigError for a file that cannot be read, or holds none."""
    if file is None:
        return [base]
    import yaml

    try:
        document = yaml.safe_load(file.read_text("utf-8"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())
        raise ConfigError(f"cannot read {file}: {reason}") from None
    models = document.get("models") if isinstance(document, dict) else None
    if not isinstance(models, list) or not models or set(document) != {"models"}:
        raise ConfigError(f"{file}: it must hold a list 'models' with an entry for each, no more")
    found = []
    for number, entry in enumerate(models, 1):
        where = f"{file}: model {number}"
        if not isinstance(entry, dict):
            raise ConfigError(f"{where} is not options and their values: {entry!r}"[:300])
        found.append(base.overlaid(where, entry, aliases))
    return found


def _options(group: Any) -> Iterator[tuple[str, Any, list[str]]]:
    """Each option of a group: its field, its type, its flags."""
    for name, hint in get_type_hints(type(group), include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, option = get_args(hint)
            named = [option.default, *(option.param_decls or ())]
            yield name, kind, [f.split("/")[0] for f in named if str(f).startswith("--")]


def _fitting(where: str, value: Any, kind: Any) -> Any:
    """The value, if the option takes it."""
    choices = [c for k in (kind, *get_args(kind)) if get_origin(k) is Literal for c in get_args(k)]
    if choices and value not in choices:
        raise ConfigError(f"{where} is {value!r}; it must be one of {', '.join(choices)}")
    return value if choices else checked(where, value, kind)


def _digest(*told: str) -> str:
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]


@contextmanager
def _ray() -> Iterator[None]:
    """Ray's settings, before it is imported. Raises ConfigError where it is not installed."""
    if find_spec("ray") is None:
        raise ConfigError("this needs ray, which is an extra: pip install 'vlmchat[cluster]'")
    os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
    os.environ.setdefault("RAY_SERVE_LOG_TO_STDERR", "0")
    yield


@contextmanager
def _on(address: str | None) -> Iterator[Any]:
    """`cluster/deploy`, connected. Raises NetworkError."""
    with _ray():
        from vlmchat.cluster import deploy

        deploy.connect(address)
        try:
            yield deploy
        finally:
            deploy.leave()


def _say(line: str) -> None:
    print(f"vlmchat: {line}", file=sys.stderr, flush=True)


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
        for model in now.wanted
    ]
    if as_json:
        said = {"type": "status", "state": now.state, "url": now.url, "models": models}
        print(json.dumps({**said, "message": now.message}))
        return
    print(f"{now.state.lower()} at {now.url}" + (f": {now.message}" if now.message else ""))
    for model, entry in zip(now.wanted, models, strict=True):
        states = ", ".join(
            f"{n} {s.lower()}" for s, n in now.replicas.get(model.deployment, {}).items()
        )
        least, most = model.scale.least, model.scale.most
        bounds = f"{least}" if least == most else f"{least} to {most}"
        print(f"{entry['name']}: {states or 'no replicas'}; wanted {bounds}")
