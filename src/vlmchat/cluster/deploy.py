"""A plan carried out on a Ray cluster: deployed, looked at, scaled, taken down.

Called by `commands/cluster` and by tests. What ray raises on the way is one line of ours.
"""

from __future__ import annotations

import logging
import pickle
import re
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import ray
from ray import serve
from ray._private.services import canonicalize_bootstrap_address
from ray._private.state import available_resources_per_node
from ray.exceptions import ActorDiedError, RayError, RayTaskError
from ray.experimental import internal_kv
from ray.serve import context as serve_context
from ray.serve.exceptions import RayServeException
from ray.serve.schema import LoggingConfig

from vlmchat import __version__
from vlmchat.cluster.front import Ingress
from vlmchat.cluster.plan import APPLICATION, FRONT, ClusterPlan, ModelPlan, Scale
from vlmchat.cluster.replica import Replica
from vlmchat.errors import (
    ConfigError,
    ModelError,
    NetworkError,
    NoWorker,
    Unavailable,
    VlmchatError,
)
from vlmchat.server.serve import bind

_ROUTER = "vlmchat.cluster.router.PrefixRouter"
_PLAN_KEY = b"vlmchat:plan"
_HEAD = "node:__internal_head__"  # what every head has one of
_FRONT_REQUESTS = 10_000  # that a front carries at a time
_HEALTH_TIMEOUT_S = 30.0  # of a look at a replica: a token is generated
_LOAD_ATTEMPTS = 2  # Ray's default of 20 loads hides for long what is wrong
_SURGE_PERCENT = 20  # more replicas while they are replaced: as many as Ray replaces at a time
_ATTEMPTS = 4  # Ray replaces an HTTP server that is slow to start, and tells us of its death
_LOOK_S = 0.5
_CONNECT_S = 5.0
_POLL_S = 1.0  # between looks whether the application is still wanted
_LEAVING_S = 5.0
RUNNING, FAILED = "RUNNING", "DEPLOY_FAILED"


def connect(address: str | None, *, start: bool = False) -> bool:
    """Join a Ray cluster: at the address, else RAY_ADDRESS's, else the one on this machine.

    start: begin one in this process where there is none. Returns whether that was done. Raises
    NetworkError, ConfigError.
    """
    if address is not None and "://" in address:
        raise ConfigError(f"--address {address}: give the head's host and port, such as host:6379")
    quiet: dict[str, Any] = {"namespace": "vlmchat", "log_to_driver": False}
    quiet["logging_level"] = logging.ERROR
    logging.getLogger("ray.serve").setLevel(logging.ERROR)
    try:
        there = _listening(address)
    except NetworkError:
        if address is not None or not start:
            raise
    else:
        try:
            ray.init(address=address or "auto", **quiet)
            return False
        except (ConnectionError, ValueError, RuntimeError, RayError) as error:
            raise NetworkError(
                f"could not join the Ray cluster at {there}: {_line(error)}; where it wants a "
                "token, set RAY_AUTH_MODE=token"
            ) from None
    # It listens on all addresses of this machine, to whoever has the token that it makes.
    ray.init(address="local", include_dashboard=False, **quiet)
    return True


def _listening(address: str | None) -> str:
    """The head's address. Raises NetworkError where nobody listens; ray would wait for minutes."""
    try:
        there: str | None = canonicalize_bootstrap_address(address or "auto")
        if there is None:
            raise ConnectionError("none is known")
        host, _, port = there.rpartition(":")
        socket.create_connection((host.strip("[]"), int(port)), _CONNECT_S).close()
    except (OSError, ValueError) as error:
        where = f"at {address}" if address else "here"
        raise NetworkError(
            f"no Ray cluster {where}: {_line(error)}; start one with 'ray start --head'"
        ) from None
    return there


def has_gpus() -> bool:
    """Whether any node has one."""
    return float(ray.cluster_resources().get("GPU", 0)) > 0


def stay() -> None:
    """Return once somebody else has taken the application down, and is through with Serve."""
    with _translated():
        while _stored() is not None:
            time.sleep(_POLL_S)
    time.sleep(_LEAVING_S)


def leave(*, take_down: bool = False) -> None:
    """Let go of the cluster; it ends, answers under way first, if this process has begun it."""
    if take_down and _stored() is not None:
        with suppress(VlmchatError), _translated():
            serve.delete(APPLICATION)
    ray.shutdown()


@dataclass(frozen=True, slots=True)
class Standing:
    """How the application stands. state, message: Ray's words. replicas: deployment -> by state.

    listens: whether an HTTP server of Ray's is up.
    """

    state: str
    message: str
    listens: bool
    replicas: dict[str, dict[str, int]]
    plan: ClusterPlan

    @property
    def url(self) -> str:
        """Where clients ask."""
        return _url(self.plan)

    def running(self, model: ModelPlan) -> int:
        """Replicas that answer."""
        return self.replicas.get(model.deployment, {}).get(RUNNING, 0)


def deploy(plan: ClusterPlan) -> str:
    """Make it so, without waiting for it; replicas whose version stays are kept.

    Returns the address. Raises ConfigError, NetworkError.
    """
    names = [model.deployment for model in plan.models]
    if len(set(names)) < len(names):
        raise ConfigError("two models have the same name; give each a --model-name of its own")
    for attempt in range(_ATTEMPTS):
        with _translated(), suppress(*([ActorDiedError] if attempt + 1 < _ATTEMPTS else [])):
            _deploy(plan)
            break
    return _url(plan)


def _deploy(plan: ClusterPlan) -> None:
    """Raises ConfigError for an address that cannot be had."""
    if serve_context._get_global_client(raise_if_no_controller_running=False) is None:
        _check_free(plan)
    serve.start(
        proxy_location="EveryNode" if plan.every_node else "HeadOnly",
        http_options={"host": plan.host, "port": plan.port},
    )
    has = serve_context._get_global_client().http_config
    if (has.host, has.port) != (plan.host, plan.port):
        raise ConfigError(
            f"Ray Serve of this cluster listens on {has.host} port {has.port} already, for all its "
            "applications; give --host and --port so, or take them down first"
        )
    internal_kv._internal_kv_put(_PLAN_KEY, pickle.dumps(plan), True)
    quiet = LoggingConfig(enable_access_log=False)  # each replica's beats would be in it
    target = serve.RunTarget(_application(plan), APPLICATION, "/", quiet)
    serve.run_many([target], wait_for_applications_running=False)


def _check_free(plan: ClusterPlan) -> None:
    """Whether the port is to be had, where that can be seen: on the head."""
    here = ray.get_runtime_context().get_node_id()
    if any(node["NodeID"] == here and _HEAD in node["Resources"] for node in ray.nodes()):
        bind(plan.host, plan.port).close()


def await_ready(timeout_s: float, tell: Callable[[str], None]) -> Standing:
    """Return once every model has its replicas. Raises ModelError with what Ray says, Unavailable.

    tell(line) is called when something has changed.
    """
    deadline, told = time.monotonic() + timeout_s, ""
    while True:
        now = standing()
        least = {model.name: model.scale.least for model in now.plan.models}
        there = {model.name: now.running(model) for model in now.plan.models}
        if now.state == FAILED:
            raise ModelError(f"could not be deployed: {_cause(now.message)}")
        ready = now.state == RUNNING and all(there[name] >= least[name] for name in least)
        if ready and now.listens:
            return now
        line = ", ".join(f"{name} {there[name]} of {least[name]}" for name in least)
        line += "; HTTP is not up yet" if ready else _without_room(now.message)
        if line != told:
            tell(f"replicas: {line}")
            told = line
        if time.monotonic() > deadline:
            raise Unavailable(f"not ready within {timeout_s:g} s ({line}): {_cause(now.message)}")
        time.sleep(_LOOK_S)


def _without_room(message: str) -> str:
    """What Ray says once a replica has waited half a minute for a node."""
    found = re.search(r"to be scheduled.* required for each replica: (\{.*?\})", message, re.S)
    return f"; no node has room for another, which takes {found[1]}" if found else ""


def standing() -> Standing:
    """How it stands. Raises NoWorker where nothing is deployed."""
    with _translated():
        stored = _stored()
        status = serve.status() if stored is not None else None
    if stored is None or status is None or APPLICATION not in status.applications:
        raise NoWorker("nothing of vlmchat runs on this Ray cluster; start it: vlmchat cluster up")
    found = status.applications[APPLICATION]
    messages = [found.message, *(d.message for d in found.deployments.values())]
    replicas = {name: dict(d.replica_states) for name, d in found.deployments.items()}
    return Standing(
        str(getattr(found.status, "value", found.status)),
        next((message for message in messages if message), ""),
        any(getattr(proxy, "value", proxy) == "HEALTHY" for proxy in status.proxies.values()),
        {name: {str(k): v for k, v in states.items()} for name, states in replicas.items()},
        pickle.loads(stored),
    )


def _stored() -> bytes | None:
    """The plan that was deployed, pickled."""
    stored: bytes | None = internal_kv._internal_kv_get(_PLAN_KEY)
    return stored


def scale(name: str | None, least: int, most: int) -> ModelPlan:
    """Other bounds for a model's replicas; name: None where there is one model only.

    Raises ConfigError, NoWorker.
    """
    now = standing()
    names = [model.name for model in now.plan.models]
    if name is None and len(names) > 1:
        raise ConfigError(f"--model-name is missing; it is one of {', '.join(names)}")
    model = next((m for m in now.plan.models if m.name == (name or names[0])), None)
    if model is None:
        raise ConfigError(f"--model-name {name}: there are {', '.join(names)}")
    changed = replace(model, scale=replace(model.scale, least=least, most=most))
    models = tuple(changed if one is model else one for one in now.plan.models)
    deploy(replace(now.plan, models=models))
    return changed


def end() -> None:
    """Take the application down; answers under way have their time. Serve ends with its last one.

    Raises NoWorker where there is none.
    """
    standing()
    with _translated():
        serve.delete(APPLICATION)
        internal_kv._internal_kv_del(_PLAN_KEY)
        with suppress(RayError):  # whoever has begun this Ray may end it from now on
            if not serve.status().applications:
                serve.shutdown()


def _application(plan: ClusterPlan) -> Any:
    """The front, bound to every model's deployment."""
    behind = [_deployment(model, plan).bind(*_arguments(model)) for model in plan.models]
    # With one address the front is where that is: other nodes can go, and no answer with them.
    at_head = {} if plan.every_node else {"resources": {_HEAD: 0.001}}
    front = serve.deployment(
        Ingress,
        name=FRONT,
        num_replicas=plan.num_fronts,
        ray_actor_options={"num_cpus": 0, **at_head},
        max_ongoing_requests=_FRONT_REQUESTS,
        user_config={
            "models": {
                model.name: {"deployment": model.deployment, "resumes": model.resumes}
                for model in plan.models
            }
        },
        graceful_shutdown_timeout_s=max(m.policy.drain_s for m in plan.models),
    )
    front = front.options(version=f"{__version__} {plan.version}", _internal=True)
    return front.bind(plan.edge, plan.limits, *behind)


def _arguments(model: ModelPlan) -> tuple[Any, ...]:
    return model.name, model.load, model.policy, model.resumes


def _deployment(model: ModelPlan, plan: ClusterPlan) -> Any:
    """One model's. What is told in it but its version can change while replicas run."""
    least, most = model.scale.least, model.scale.most
    how_many: dict[str, Any] = {"num_replicas": least}
    if least < most:
        how_many = {"autoscaling_config": _autoscaling(model.scale)}
    deployment = serve.deployment(
        Replica,
        name=model.deployment,
        ray_actor_options={"num_cpus": model.num_cpus, "num_gpus": model.num_gpus},
        max_ongoing_requests=model.policy.concurrency,
        max_queued_requests=model.policy.max_waiting,
        request_router_config={
            "request_router_class": _ROUTER,
            "request_router_kwargs": {"margin": plan.cache_margin},
        },
        health_check_period_s=model.health_s,
        health_check_timeout_s=_HEALTH_TIMEOUT_S,
        graceful_shutdown_timeout_s=model.policy.drain_s,
        graceful_shutdown_wait_loop_s=1.0,
        max_constructor_retry_count=_LOAD_ATTEMPTS,
        max_surge_percent=_SURGE_PERCENT if _has_room(model) else 0,
        **how_many,
    )
    return deployment.options(version=f"{__version__} {model.version}", _internal=True)


def _has_room(model: ModelPlan) -> bool:
    """Whether a node has room for one more; else the old has to go before the new comes."""
    needed = {"CPU": model.num_cpus, "GPU": model.num_gpus}
    return any(
        all(free.get(what, 0.0) >= count for what, count in needed.items())
        for free in available_resources_per_node().values()
    )


def _autoscaling(scale: Scale) -> dict[str, Any]:
    return {
        "min_replicas": scale.least,
        "max_replicas": scale.most,
        "target_ongoing_requests": scale.ongoing,
        "upscale_delay_s": scale.up_delay_s,
        "downscale_delay_s": scale.down_delay_s,
        "look_back_period_s": max(1.0, min(30.0, scale.up_delay_s)),
    }


def _url(plan: ClusterPlan) -> str:
    host = {"0.0.0.0": "localhost", "::": "localhost"}.get(plan.host, plan.host)
    return f"http://[{host}]:{plan.port}" if ":" in host else f"http://{host}:{plan.port}"


@contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except (RayError, RayServeException, RuntimeError, ConnectionError, TimeoutError) as error:
        raise NetworkError(f"Ray: {_line(error)}") from error


def _line(error: Exception) -> str:
    if isinstance(error, RayTaskError):  # whose own words are a traceback
        error = error.cause
    return " ".join(str(error).split())[:300].rstrip(".") or type(error).__name__


def _cause(message: str) -> str:
    """The last exception's line of a traceback that Ray passes on."""
    lines = [line.strip() for line in message.splitlines() if line.strip()]
    told = [line for line in lines if line.startswith("vlmchat.errors.")]
    if told:
        return told[-1].partition(": ")[2]
    return " ".join(message.split())[:300] or "Ray gives no reason"
