"""The models of `vlmchat cluster up`: options and a YAML file's entries -> a plan for each.

Called by `commands/cluster`, and in a replica's process, which finds here how to load its model.
Knows no ray.
"""

from __future__ import annotations

import hashlib
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass, fields, replace
from difflib import get_close_matches
from functools import partial
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

from vlmchat.commands.options import EngineOptions, ImageOptions, ModelOptions, known_device
from vlmchat.commands.settings import checked, resolve_model
from vlmchat.commands.threads import cpu_quota, settle
from vlmchat.commands.worker import LimitOptions, name_of
from vlmchat.config import EngineConfig, ModelConfig
from vlmchat.errors import ConfigError

if TYPE_CHECKING:
    from vlmchat.cluster.plan import ModelPlan, Scale
    from vlmchat.request import Backend

_OF_ALL = ("max-body-bytes", "max-held-bytes")  # what the front looks at, before any model


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
class Entry:
    """One model's options: the command line's, with those of its entry in the file above them."""

    model: ModelOptions
    engine: EngineOptions
    limits: LimitOptions
    images: ImageOptions
    replicas: ReplicaOptions

    def overlaid(self, where: str, entry: dict[str, Any], aliases: dict[str, str]) -> Entry:
        """With the entry's values. Raises ConfigError, which names `where`."""
        groups = {field.name: getattr(self, field.name) for field in fields(self)}
        options = {
            flag[2:]: (group, name, kind, option)
            for group, value in groups.items()
            for name, kind, option, flags in _options(value)
            for flag in flags
        }
        for key, value in entry.items():
            name = str(key).replace("_", "-")
            if name in _OF_ALL:
                raise ConfigError(f"{where}: {key} is for all models together; give it as --{name}")
            if name not in options:
                close = get_close_matches(name, options, n=1)
                hint = f"; is it {close[0]!r}?" if close else ""
                raise ConfigError(f"{where}: unknown option {key!r}{hint}")
            group, field, kind, option = options[name]
            fit = _fitting(f"{where}: {key}", value, kind, option)
            if field in ("model_path", "model_base") and fit is not None:
                fit = resolve_model(fit, aliases)
            groups[group] = replace(groups[group], **{field: fit})
        return Entry(**groups)

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
            version=digest(name, what, repr(policy)),
            scale=own.scale(limits.concurrency),
            num_cpus=own.cpus,
            num_gpus=float(on_gpu * self.model.tensor_parallel) if own.gpus is None else own.gpus,
            resumes=own.upstream is None,
        )


def read_models(base: Entry, file: Path | None, aliases: dict[str, str]) -> list[Entry]:
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


def _options(group: Any) -> Iterator[tuple[str, Any, Any, list[str]]]:
    """Each option of a group: its field, its type, what is declared of it, its flags."""
    for name, hint in get_type_hints(type(group), include_extras=True).items():
        if get_origin(hint) is Annotated:
            kind, option = get_args(hint)
            named = [option.default, *(option.param_decls or ())]
            yield name, kind, option, [f.split("/")[0] for f in named if str(f).startswith("--")]


def _fitting(where: str, value: Any, kind: Any, option: Any) -> Any:
    """The value, if the option takes it. Raises ConfigError."""
    choices = [c for k in (kind, *get_args(kind)) if get_origin(k) is Literal for c in get_args(k)]
    if choices:
        if value not in choices:
            raise ConfigError(f"{where} is {value!r}; it must be one of {', '.join(choices)}")
        return value
    fit = checked(where, value, kind)
    if option.min is not None and not fit >= option.min:
        raise ConfigError(f"{where} is {fit}; it must be at least {option.min}")
    if option.callback is known_device:
        try:
            known_device(fit)
        except typer.BadParameter as error:
            raise ConfigError(f"{where}: {error.message}") from None
    return fit


def say(line: str) -> None:
    """To people."""
    print(f"vlmchat: {line}", file=sys.stderr, flush=True)


def load_engine(config: ModelConfig, slots: EngineConfig) -> Backend:
    """In a replica: the engine, loaded and warm."""
    settle(os.environ, cpu_quota())
    from vlmchat.engine.engine import Engine

    engine = Engine.load(config, say, slots)
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


def digest(*told: str) -> str:
    """A version: another one when anything told is another."""
    return hashlib.sha256("\0".join(told).encode()).hexdigest()[:16]
