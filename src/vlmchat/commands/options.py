"""Every option of every command, declared once: name, type, default, help.

A command takes whole groups (`model: ModelOptions`); `grouped` unfolds them into single options
for Typer and folds the values back. Each option gets the environment variable named after it.
Imports nothing heavy.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, fields, is_dataclass
from functools import wraps
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints

import typer
from typer.models import ArgumentInfo

from vlmchat.commands.plain_values import PlainCommand
from vlmchat.commands.settings import model_alias, read_aliases, read_config, state_path
from vlmchat.config import (
    DEFAULT_MODEL,
    DEMO_MODEL,
    EngineConfig,
    ImagePolicy,
    ModelConfig,
    num_bytes,
    sampling_params,
)
from vlmchat.errors import ConfigError
from vlmchat.request import Grammar, SamplingParams

POLICY = ImagePolicy()
ENGINE = EngineConfig()
SAMPLING = SamplingParams()
DEVICES = ("auto", "cpu", "cuda", "mps")


def grouped(function: Callable[..., None]) -> Callable[..., None]:
    """`function(ctx, *option groups)` as a function of the context and single options."""
    groups: dict[str, Any] = {n: t for n, t in get_type_hints(function).items() if is_dataclass(t)}

    @wraps(function)
    def command(ctx: typer.Context, **values: Any) -> None:
        built = {name: group(**_values(group, values)) for name, group in groups.items()}
        function(ctx, **built)

    parameters = [Parameter("ctx", Parameter.KEYWORD_ONLY, annotation=typer.Context)]
    parameters += [p for group in groups.values() for p in _parameters(group)]
    command.__signature__ = Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {p.name: p.annotation for p in parameters}
    return command


def first_key(value: str | None) -> str | None:
    """A client's key: the variable may hold a server's, several, one per line; then the first."""
    return value.split("\n")[0] if value else value


def _values(group: Any, values: dict[str, Any]) -> dict[str, Any]:
    named = {field.name: values[field.name] for field in fields(group)}
    return {name: tuple(v) if isinstance(v, list) else v for name, v in named.items()}


def _parameters(group: Any) -> list[Parameter]:
    hints = get_type_hints(group, include_extras=True)
    return [_parameter(group, field, *get_args(hints[field.name])) for field in fields(group)]


def _parameter(group: Any, field: Any, kind: Any, declared: Any) -> Parameter:
    """One field as Typer wants it: a list for a tuple, the environment variable, the panel."""
    option = copy(declared)
    option.rich_help_panel = group.panel
    if get_origin(kind) is tuple:
        kind = list[get_args(kind)[0]]  # type: ignore[misc]
    annotation = Annotated[kind, option]
    parameter = Parameter(
        field.name, Parameter.KEYWORD_ONLY, default=field.default, annotation=annotation
    )
    if isinstance(option, ArgumentInfo):
        return parameter
    flag = next(f for f in (option.default, *(option.param_decls or ())) if f.startswith("--"))
    option.envvar = "VLMCHAT_" + flag.split("/")[0].strip("-").replace("-", "_").upper()
    if field.default is False:
        option.show_default = False
    return parameter


class GroupedCommand(PlainCommand):
    """A command whose help lists its options by group."""

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """One section for each group, in the order of declaration."""
        sections: dict[str, list[Any]] = {}
        for param in self.get_params(ctx):
            title = getattr(param, "rich_help_panel", None) or "Other"
            sections.setdefault(title, []).append(param.get_help_record(ctx))
        for title, records in sections.items():
            with formatter.section(title):
                formatter.write_dl([record for record in records if record])


def known_device(value: str) -> str:
    """Callback of --device. Raises typer.BadParameter."""
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", value):
        raise typer.BadParameter(f"{value!r} is none of auto, cpu, cuda, cuda:N, mps")
    return value


def _complete_device(incomplete: str) -> list[str]:
    return [device for device in DEVICES if device.startswith(incomplete)]


def complete_model(incomplete: str) -> list[str]:
    """Aliases, the demo model, the default one, and directories."""
    start = Path(incomplete)
    folder, name = (start, "") if incomplete.endswith("/") else (start.parent, start.name)
    try:
        found = [f"{p}/" for p in folder.iterdir() if p.name.startswith(name) and p.is_dir()]
    except OSError:
        found = []
    try:
        aliases = read_aliases(None)
    except ConfigError:
        aliases = {}
    names = (*aliases, DEMO_MODEL, DEFAULT_MODEL)
    return [*(name for name in names if name.startswith(incomplete)), *sorted(found)]


def _complete_conv_mode(incomplete: str) -> list[str]:
    from vlmchat.engine.templates import TEMPLATE_NAMES

    return [name for name in TEMPLATE_NAMES if name.startswith(incomplete)]


def _complete_session(incomplete: str) -> list[str]:
    return sorted(file.stem for file in (state_path() / "sessions").glob(f"{incomplete}*.json"))


@dataclass(frozen=True, slots=True)
class FileOptions:
    """Where the settings come from."""

    panel: ClassVar = "Other"
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            metavar="FILE",
            help="Settings file, in TOML; unset: vlmchat/config.toml under $XDG_CONFIG_HOME.",
            is_eager=True,  # its values must be known before the other options are read
            callback=read_config,
        ),
    ] = None


@dataclass(frozen=True, slots=True)
class ModelOptions:
    """Which model answers, and where it runs."""

    panel: ClassVar = "Model"
    model_path: Annotated[
        str,
        typer.Option(
            "--model-path",
            metavar="MODEL",
            help="'demo', a directory, a model's name on the Hugging Face hub, or an alias of "
            "the settings file.",
            callback=model_alias,
            autocompletion=complete_model,
        ),
    ] = DEFAULT_MODEL
    model_base: Annotated[
        str | None,
        typer.Option(
            "--model-base",
            metavar="MODEL",
            help="The model that a LoRA or projector-only checkpoint was made for.",
            callback=model_alias,
            autocompletion=complete_model,
        ),
    ] = None
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="REV", help="Branch, tag or commit on the hub."),
    ] = None
    device: Annotated[
        str,
        typer.Option(
            "--device",
            metavar="DEVICE",
            help="auto, cpu, cuda, cuda:N or mps.",
            callback=known_device,
            autocompletion=_complete_device,
        ),
    ] = "auto"
    dtype: Annotated[
        Literal["auto", "float32", "bfloat16", "float16"],
        typer.Option("--dtype", help="Number format of the weights."),
    ] = "auto"
    load_8bit: Annotated[
        bool, typer.Option("--load-8bit/--no-load-8bit", help="Quantise the weights to 8 bits.")
    ] = False
    load_4bit: Annotated[
        bool, typer.Option("--load-4bit/--no-load-4bit", help="Quantise the weights to 4 bits.")
    ] = False
    quantization: Annotated[
        Literal["int8", "int4", "bnb-int8", "bnb-nf4"] | None,
        typer.Option(
            "--quantization",
            help="Instead of --load-8bit or --load-4bit, which choose by the device: packed for "
            "CPUs, or by bitsandbytes.",
        ),
    ] = None
    context_length: Annotated[
        int | None,
        typer.Option(
            "--context-length",
            metavar="TOKENS",
            min=1,
            help="Room for the conversation and its answer; unset: what the model was made for.",
        ),
    ] = None
    conv_mode: Annotated[
        str | None,
        typer.Option(
            "--conv-mode",
            metavar="NAME",
            help="One of LLaVA's prompt formats; unset: the checkpoint's own.",
            autocompletion=_complete_conv_mode,
        ),
    ] = None
    tensor_parallel: Annotated[
        int,
        typer.Option(
            "--tensor-parallel",
            metavar="COUNT",
            min=1,
            help="Devices of this machine that share the model, each with a process of its own.",
        ),
    ] = 1
    runner: Annotated[
        Literal["auto", "static", "eager"],
        typer.Option("--runner", hidden=True, help="Which of the engine's runners."),
    ] = "auto"

    def build(self) -> ModelConfig:
        """The settings for the engine; ConfigError when two quantisations are asked for."""
        asked = {"--load-8bit": self.load_8bit and "8bit", "--load-4bit": self.load_4bit and "4bit"}
        asked["--quantization"] = self.quantization or False
        on = {option: kind for option, kind in asked.items() if kind}
        if len(on) > 1:
            raise ConfigError(f"{' and '.join(on)} are both on; choose one")
        return ModelConfig(
            path=self.model_path,
            base=self.model_base,
            revision=self.revision,
            device=self.device,
            dtype=self.dtype,
            quantization=next(iter(on.values()), None),
            context_length=self.context_length,
            conv_mode=self.conv_mode,
            runner=self.runner,
            tensor_parallel=self.tensor_parallel,
        )


@dataclass(frozen=True, slots=True)
class EngineOptions:
    """How much the engine does at once, and the memory for it."""

    panel: ClassVar = "Engine"
    max_num_seqs: Annotated[
        int | None,
        typer.Option(
            "--max-num-seqs",
            metavar="COUNT",
            min=1,
            help="Answers at once, and prompts kept for reuse; unset: a few, if memory is plenty.",
        ),
    ] = None
    max_num_batched_tokens: Annotated[
        int,
        typer.Option(
            "--max-num-batched-tokens",
            metavar="TOKENS",
            min=16,
            help="Of a prompt, in one step, while other answers are under way.",
        ),
    ] = ENGINE.max_num_batched_tokens
    kv_memory: Annotated[
        str | None,
        typer.Option(
            "--kv-memory",
            metavar="SIZE",
            help="For keys and values, such as 2GB; unset: from what is free.",
        ),
    ] = None
    kv_dtype: Annotated[
        Literal["auto", "int8"],
        typer.Option("--kv-dtype", help="Number format of keys and values."),
    ] = "auto"
    image_cache_memory: Annotated[
        str,
        typer.Option(
            "--image-cache-memory", metavar="SIZE", help="For the features of pictures seen before."
        ),
    ] = f"{ENGINE.image_cache >> 20}MiB"
    speculation: Annotated[
        bool,
        typer.Option("--speculation/--no-speculation", hidden=True, help="Guess tokens ahead."),
    ] = ENGINE.speculation

    def build(self, answer_tokens: int | None = None) -> EngineConfig:
        """The engine's limits; ConfigError when a size cannot be read."""
        kv_memory = None
        if self.kv_memory is not None:
            kv_memory = num_bytes("--kv-memory", self.kv_memory)
        return EngineConfig(
            max_num_seqs=self.max_num_seqs,
            max_num_batched_tokens=self.max_num_batched_tokens,
            kv_memory=kv_memory,
            kv_dtype=self.kv_dtype,
            image_cache=num_bytes("--image-cache-memory", self.image_cache_memory),
            speculation=self.speculation,
            answer_tokens=answer_tokens,
        )


@dataclass(frozen=True, slots=True)
class ImageOptions:
    """What a picture may cost, and where it may come from."""

    panel: ClassVar = "Pictures"
    max_image_bytes: Annotated[
        int, typer.Option("--max-image-bytes", metavar="BYTES", min=1, help="Largest file.")
    ] = POLICY.max_bytes
    max_image_pixels: Annotated[
        int, typer.Option("--max-image-pixels", metavar="PIXELS", min=1, help="Largest picture.")
    ] = POLICY.max_pixels
    image_timeout: Annotated[
        float,
        typer.Option("--image-timeout", metavar="SECONDS", min=0.001, help="Deadline of a fetch."),
    ] = POLICY.timeout_s
    allow_private_urls: Annotated[
        bool,
        typer.Option(
            "--allow-private-urls/--no-allow-private-urls",
            help="Fetch from addresses that are not public, such as localhost.",
        ),
    ] = POLICY.allow_private_urls

    def build(self) -> ImagePolicy:
        """The limits for the image loader."""
        return ImagePolicy(
            max_bytes=self.max_image_bytes,
            max_pixels=self.max_image_pixels,
            timeout_s=self.image_timeout,
            allow_private_urls=self.allow_private_urls,
        )


@dataclass(frozen=True, slots=True)
class SamplingOptions:
    """How answers are drawn."""

    panel: ClassVar = "Answers"
    temperature: Annotated[
        float, typer.Option("--temperature", metavar="NUMBER", help="0 is deterministic.")
    ] = SAMPLING.temperature
    top_p: Annotated[
        float,
        typer.Option("--top-p", metavar="SHARE", help="Draw from the likeliest tokens; 1 is off."),
    ] = SAMPLING.top_p
    top_k: Annotated[
        int,
        typer.Option("--top-k", metavar="COUNT", help="Draw from so many tokens; 0 is off."),
    ] = SAMPLING.top_k
    max_new_tokens: Annotated[
        int, typer.Option("--max-new-tokens", metavar="TOKENS", help="Longest answer.")
    ] = SAMPLING.max_new_tokens
    seed: Annotated[
        int | None,
        typer.Option("--seed", metavar="NUMBER", help="Repeat the same draw; unset: a fresh one."),
    ] = None
    stop: Annotated[
        tuple[str, ...],
        typer.Option("--stop", metavar="TEXT", help="End the answer before this text; repeatable."),
    ] = ()

    logprobs: Annotated[
        int | None,
        typer.Option(
            "--logprobs",
            metavar="COUNT",
            help="With --json: each token's logprob, and those of so many likeliest ones.",
        ),
    ] = None

    def build(self) -> SamplingParams:
        """The checked parameters; ConfigError names the option that is wrong."""
        return sampling_params(
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            max_new_tokens=self.max_new_tokens,
            seed=self.seed,
            stop=self.stop,
            logprobs=self.logprobs,
        )


@dataclass(frozen=True, slots=True)
class ChatOptions:
    """What is asked."""

    panel: ClassVar = "Conversation"
    images: Annotated[
        tuple[str, ...],
        typer.Option(
            "--image",
            "--image-file",
            metavar="PATH|URL",
            help="A picture for the first question; '-' is stdin; repeatable.",
        ),
    ] = ()
    prompts: Annotated[
        tuple[str, ...],
        typer.Option(
            "--prompt",
            "-p",
            metavar="TEXT",
            help="Ask this and exit; repeated: one turn after the other.",
        ),
    ] = ()
    system: Annotated[
        str | None, typer.Option("--system", metavar="TEXT", help="The system prompt.")
    ] = None
    session: Annotated[
        str | None,
        typer.Option(
            "--session",
            metavar="NAME",
            help="Resume or begin the session of that name.",
            autocompletion=_complete_session,
        ),
    ] = None
    resume: Annotated[
        bool, typer.Option("--continue/--no-continue", help="Resume the last session.")
    ] = False


@dataclass(frozen=True, slots=True)
class OutputOptions:
    """How answers are shown."""

    panel: ClassVar = "Output"
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="One JSON object per answer, on one line.")
    ] = False
    stream: Annotated[
        bool,
        typer.Option("--stream/--no-stream", help="With --json: an event per piece of text too."),
    ] = False
    markdown: Annotated[
        bool, typer.Option("--markdown/--no-markdown", help="Render answers as Markdown.")
    ] = True
    debug: Annotated[
        bool,
        typer.Option("--debug/--no-debug", help="Show the full prompt, and where errors arose."),
    ] = False


@dataclass(frozen=True, slots=True)
class ServerOptions:
    """A server that answers in place of a model here."""

    panel: ClassVar = "Server"
    server: Annotated[
        str | None,
        typer.Option(
            "--server",
            metavar="URL",
            help="Ask this OpenAI-compatible server; --model-path is then the model's name there.",
        ),
    ] = None
    api_key: Annotated[
        str | None,
        typer.Option(
            "--api-key",
            metavar="KEY",
            callback=first_key,
            help="The server's key; better given as the variable.",
        ),
    ] = None
    server_timeout: Annotated[
        float,
        typer.Option(
            "--server-timeout",
            metavar="SECONDS",
            min=0.001,
            help="How long the server may be silent.",
        ),
    ] = 600.0


@dataclass(frozen=True, slots=True)
class ClientOptions:
    """Which clients may come in to a server."""

    panel: ClassVar = "Access"
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen on.")] = (
        "127.0.0.1"
    )
    api_keys: Annotated[
        tuple[str, ...],
        typer.Option(
            "--api-key",
            metavar="KEY",
            help="A key that opens the server; repeatable; without one it is open.",
        ),
    ] = ()
    api_key_file: Annotated[
        Path | None,
        typer.Option("--api-key-file", metavar="FILE", help="More keys, one per line."),
    ] = None

    def keys(self) -> tuple[str, ...]:
        """All keys for clients. Raises ConfigError when a key is empty or the file unreadable."""
        if self.api_key_file is None:
            keys = self.api_keys
        else:
            try:
                lines = self.api_key_file.read_text("utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                reason = getattr(error, "strerror", None) or error
                raise ConfigError(f"cannot read {self.api_key_file}: {reason}") from None
            keys = (*self.api_keys, *(line.strip() for line in lines if line.strip()))
            if not keys:
                raise ConfigError(f"--api-key-file {self.api_key_file} holds no key")
        if not all(key.strip() for key in keys):
            raise ConfigError("--api-key is empty; give a key")
        return keys


@dataclass(frozen=True, slots=True)
class AccessOptions(ClientOptions):
    """Who may come in to a server: clients, and of workers and controllers each other."""

    registration_key: Annotated[
        str | None,
        typer.Option(
            "--registration-key",
            metavar="KEY",
            help="The key by which workers and their controller know each other.",
        ),
    ] = None

    def keys(self) -> tuple[str, ...]:
        """See `ClientOptions.keys`; the key of registration is checked too."""
        if not (self.registration_key or "x").strip():
            raise ConfigError("--registration-key is empty; give a key")
        return ClientOptions.keys(self)


@dataclass(frozen=True, slots=True)
class ControllerOptions:
    """How the controller treats its workers."""

    panel: ClassVar = "Controller"
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: any free one.")
    ] = 21001
    dispatch_method: Annotated[
        Literal["lottery", "shortest_queue", "cache_aware"],
        typer.Option("--dispatch-method", help="Which worker gets a request."),
    ] = "shortest_queue"
    cache_margin: Annotated[
        int,
        typer.Option(
            "--cache-margin",
            metavar="REQUESTS",
            min=0,
            help="For cache_aware: how much longer than the shortest a queue may be.",
        ),
    ] = 4
    allow_worker: Annotated[
        tuple[str, ...],
        typer.Option(
            "--allow-worker",
            metavar="ADDRESS",
            help="Where workers may be: an address, a network, a host's name or '*'; repeatable.",
            show_default="loopback only",
        ),
    ] = ()
    worker_patience: Annotated[
        float,
        typer.Option(
            "--worker-patience",
            metavar="SECONDS",
            min=0,
            help="How long a request waits for a worker when there is none.",
        ),
    ] = 20.0
    token_timeout: Annotated[
        float,
        typer.Option(
            "--token-timeout",
            metavar="SECONDS",
            min=0.1,
            help="A worker without a new token for so long is taken for dead.",
        ),
    ] = 60.0
    first_token_timeout: Annotated[
        float,
        typer.Option(
            "--first-token-timeout",
            metavar="SECONDS",
            min=0.1,
            help="The same before the first token: waiting and reading the prompt.",
        ),
    ] = 600.0
    drain_timeout: Annotated[
        float,
        typer.Option(
            "--drain-timeout",
            metavar="SECONDS",
            min=0,
            help="At the end, how long to wait for answers under way.",
        ),
    ] = 30.0
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="Say in JSON that the server is ready.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug/--no-debug", help="Show where errors arose.")] = (
        False
    )


@dataclass(frozen=True, slots=True)
class FormOptions:
    """What form answers must have."""

    panel: ClassVar = "Answers"
    schema: Annotated[
        Path | None,
        typer.Option("--schema", metavar="FILE", help="Answer in JSON that follows this schema."),
    ] = None
    json_object: Annotated[
        bool, typer.Option("--json-object/--no-json-object", help="Answer with a JSON object.")
    ] = False

    def build(self) -> Grammar | None:
        """The grammar asked for. Raises ConfigError for a file that holds no schema."""
        if self.schema is None:
            return Grammar("json_object", "") if self.json_object else None
        if self.json_object:
            raise ConfigError("--schema and --json-object are both given; choose one")
        try:
            text = self.schema.read_text("utf-8")
            schema = json.loads(text)
        except (OSError, ValueError, RecursionError) as error:
            reason = getattr(error, "strerror", None) or f"not JSON ({error})"
            raise ConfigError(f"--schema {self.schema} cannot be read: {reason}") from None
        if not isinstance(schema, dict):
            raise ConfigError(f"--schema {self.schema} holds no schema: it is not an object")
        return Grammar("json_schema", text)


@dataclass(frozen=True, slots=True)
class PageOptions:
    """Where the page listens, and whose models it offers."""

    panel: ClassVar = "Page"
    host: Annotated[str, typer.Option("--host", metavar="HOST", help="Address to listen on.")] = (
        "127.0.0.1"
    )
    port: Annotated[
        int, typer.Option("--port", metavar="PORT", min=0, max=65535, help="0: any free one.")
    ] = 7860
    controller_url: Annotated[
        str,
        typer.Option(
            "--controller-url",
            "--controller",
            metavar="URL",
            help="The controller whose workers answer, without --model-path and --server.",
        ),
    ] = "http://localhost:21001"
    model_list_mode: Annotated[
        Literal["once", "reload"],
        typer.Option(
            "--model-list-mode",
            help="once: a model that was there stays in the list while it is away; reload: the "
            "list is what is there now.",
        ),
    ] = "once"
    concurrency_count: Annotated[
        int, typer.Option("--concurrency-count", metavar="COUNT", min=1, help="Answers at a time.")
    ] = 16
    share: Annotated[
        bool,
        typer.Option("--share/--no-share", help="A public address for 72 hours, by Gradio's host."),
    ] = False
    embed: Annotated[
        bool,
        typer.Option(
            "--embed/--no-embed", help="Without a title, and allowed in frames of other sites."
        ),
    ] = False
    log_dir: Annotated[
        Path | None,
        typer.Option(
            "--log-dir", metavar="DIR", help="Keep chats, votes and pictures, as LLaVA does."
        ),
    ] = None
    moderate: Annotated[
        bool,
        typer.Option("--moderate/--no-moderate", help="Let a moderation service judge questions."),
    ] = False
    moderation_url: Annotated[
        str | None,
        typer.Option("--moderation-url", metavar="URL", help="Where it is; it speaks OpenAI's."),
    ] = None
    moderation_key: Annotated[
        str | None, typer.Option("--moderation-key", metavar="KEY", help="The key that it wants.")
    ] = None
    as_json: Annotated[
        bool, typer.Option("--json/--no-json", help="Say in JSON that the page is ready.")
    ] = False
    debug: Annotated[bool, typer.Option("--debug/--no-debug", help="Show where errors arose.")] = (
        False
    )
