"""One model over several devices of this machine: each process has a share of every layer.

Called by `Engine.load` and `capacity`. Rank 0 is the engine's own process; the others follow it,
step by step, by what comes through a pipe. What is shared, and how, is transformers' own plan of
tensor parallelism; embeddings, the vision tower and the last layer are whole everywhere. Only rank
0 draws.
"""

from __future__ import annotations

import multiprocessing
import pickle
import signal
import socket
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from vlmchat.config import ModelConfig
from vlmchat.errors import ConfigError, OutOfMemory, VlmchatError

if TYPE_CHECKING:
    from vlmchat.engine.loader import LoadedModel
    from vlmchat.engine.runner import Row, Runner
    from vlmchat.engine.sequence import Prompt

_STEP_TIMEOUT_S = 600.0  # of one exchange between processes; a silent one is dead


def check(config: ModelConfig) -> None:
    """Whether the machine and the settings allow it. Raises ConfigError."""
    size, told = config.tensor_parallel, f"--tensor-parallel {config.tensor_parallel}"
    if config.quantization is not None:
        raise ConfigError(f"{told} is for weights that are not quantised; leave that out")
    if config.runner == "static":
        raise ConfigError(f"{told}: the static runner runs in one process; use --runner auto")
    if config.device not in ("auto", "cpu", "cuda"):
        raise ConfigError(f"{told}: --device {config.device} is one device; give auto, cpu or cuda")
    if kind_of(config) == "cuda" and torch.cuda.device_count() < size:
        raise ConfigError(f"{told}: this machine shows {torch.cuda.device_count()} CUDA devices")


def kind_of(config: ModelConfig) -> str:
    """cuda or cpu."""
    if config.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return config.device


class Team:
    """The processes beside this one. They end with it, or when nobody holds this any more."""

    def __init__(self, config: ModelConfig) -> None:
        """They begin to load at once. Raises ConfigError."""
        self._processes: list[Any] = []
        check(config)
        self._config, self.size = config, config.tensor_parallel
        with socket.socket() as sock:
            sock.bind(("127.0.0.1", 0))
            self._port = sock.getsockname()[1]
        context = multiprocessing.get_context("spawn")
        self._pipes: list[Connection] = []
        for rank in range(1, self.size):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=follow, args=(theirs, config, rank, self._port), daemon=True
            )
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def join(self, loaded: LoadedModel) -> None:
        """Leave this process its share of the model. Raises ConfigError, what loading raises."""
        plan = plan_of(loaded.model, self._config)
        for pipe in self._pipes:
            try:
                failure = pickle.loads(pipe.recv_bytes())
            except EOFError:
                raise OutOfMemory(
                    "a process of --tensor-parallel died while it loaded the model; each needs "
                    "memory for all of it until it has its share"
                ) from None
            if failure is not None:
                raise failure
        self.tell("share", plan)
        share(loaded.model, plan, self._config, 0, self._port)

    def tell(self, *step: Any) -> None:
        """Let the others do the same."""
        data = pickle.dumps(step)
        for pipe in self._pipes:
            pipe.send_bytes(data)

    def end(self) -> None:
        """Let them go."""
        for process in self._processes:
            process.terminate()

    def __del__(self) -> None:
        self.end()


class TeamRunner:
    """A runner whose every step is done by all. See `Runner`."""

    splits_pictures = False

    def __init__(self, runner: Runner, team: Team, num_slots: int) -> None:
        self._runner, self._team = runner, team
        team.tell("slots", num_slots)

    def prefill(self, slot: int, prompt: Prompt, start: int, stop: int) -> torch.Tensor | None:
        """See `Runner.prefill`."""
        self._team.tell("prefill", slot, prompt, start, stop)
        return self._runner.prefill(slot, prompt, start, stop)

    def decode(self, rows: Sequence[Row]) -> list[torch.Tensor]:
        """See `Runner.decode`."""
        self._team.tell("decode", list(rows))
        return self._runner.decode(rows)

    def copy_prefix(self, source: int, target: int, length: int) -> None:
        """See `Runner.copy_prefix`."""
        self._team.tell("copy_prefix", source, target, length)
        self._runner.copy_prefix(source, target, length)


def plan_of(model: Any, config: ModelConfig) -> dict[str, str]:
    """transformers' plan for the decoder's layers: module -> how it is shared.

    Raises ConfigError where there is none, or the model's heads cannot be dealt out.
    """
    from transformers.distributed.configuration_utils import DistributedConfig

    size, told = config.tensor_parallel, f"--tensor-parallel {config.tensor_parallel}"
    try:
        asked = DistributedConfig(tp_plan="auto", tp_size=size)
        whole = model._resolve_parallel_plans(asked)[0]
    except (ValueError, AttributeError) as error:
        reason = " ".join(str(error).split())[:200]
        raise ConfigError(f"{told}: transformers has no plan for {config.path}: {reason}") from None
    text = model.config.get_text_config()
    heads = text.num_attention_heads
    kept = getattr(text, "num_key_value_heads", None) or heads
    if heads % size or kept % size:
        raise ConfigError(
            f"{told}: {config.path} has {heads} heads, {kept} of keys and values; "
            "both must be divisible by it"
        )
    modules = dict(model.named_modules())
    plan = {name: how for name, how in whole.items() if ".layers." in name}
    odd = {type(modules[name]).__name__ for name in plan if name in modules}
    odd = {kind for kind in odd if kind != "Linear" and "Norm" not in kind}
    if not plan or odd:
        what = f"layers of kind {', '.join(sorted(odd))}" if odd else "no layers with a plan"
        raise ConfigError(f"{told}: {config.path} has {what}, which cannot be shared")
    return plan


def share(model: Any, plan: dict[str, str], config: ModelConfig, rank: int, port: int) -> None:
    """Meet the others, and keep of the model what is this rank's. All ranks call it at once."""
    from torch.distributed.device_mesh import init_device_mesh
    from transformers.distributed.tensor_parallel import apply_tensor_parallelism

    kind, size = kind_of(config), config.tensor_parallel
    if kind == "cuda":
        torch.cuda.set_device(rank)
    dist.init_process_group(
        "nccl" if kind == "cuda" else "gloo",
        init_method=f"tcp://127.0.0.1:{port}",
        rank=rank,
        world_size=size,
        timeout=timedelta(seconds=_STEP_TIMEOUT_S),
    )
    modules = dict(model.named_modules())
    apply_tensor_parallelism(
        model, init_device_mesh(kind, (size,)), _with_parameters(plan, modules)
    )
    if kind == "cuda":
        model.to(torch.device("cuda", rank))


def _with_parameters(plan: dict[str, str], modules: dict[str, Any]) -> dict[str, str]:
    """transformers shares parameters by their own names, and forwards by their modules'."""
    whole = dict(plan)
    for name, how in plan.items():
        if name in modules:
            own = modules[name].named_parameters(recurse=False)
            whole |= {f"{name}.{parameter}": how for parameter, _ in own}
    return whole


def load_whole(config: ModelConfig, progress: Any, answer_tokens: int | None) -> LoadedModel:
    """The model in this process's main memory, before it is shared."""
    from vlmchat.engine.loader import load_model

    return load_model(replace(config, device="cpu", runner="eager"), progress, answer_tokens)


def follow(pipe: Connection, config: ModelConfig, rank: int, port: int) -> None:
    """The life of a process that is not rank 0: load, share, then what it is told."""
    from vlmchat.engine.runner import EagerRunner
    from vlmchat.engine.vision import VisionCache

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for rank 0, whose end is this one's
    try:
        loaded = load_whole(config, lambda stage: None, None)
    except VlmchatError as error:
        pipe.send_bytes(pickle.dumps(error))
        return
    pipe.send_bytes(pickle.dumps(None))
    runner: Any = None
    while True:
        try:
            what, *given = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if what == "share":
            share(loaded.model, given[0], config, rank, port)
        elif what == "slots":
            vision = VisionCache(loaded.model)
            runner = EagerRunner(loaded.model, loaded.spec, vision, given[0])
        else:
            with suppress(VlmchatError):  # rank 0 has met the same, and tells it
                getattr(runner, what)(*given)
